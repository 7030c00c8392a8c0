"""Kernel files, kernels, and their launches: where the tensors are decides what runs them."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlsys.kernels.cuda import _build, _processor, _source
from mlsys.kernels.cuda._arguments import Arguments, convert, copied, device_of
from mlsys.kernels.cuda._findings import Finding, Reader, static_variables
from mlsys.kernels.cuda._processor import Line, Memory
from mlsys.kernels.cuda._profile import Profile, read_profile
from mlsys.kernels.cuda._source import Declared

LIBRARY = Path(__file__).parent.parent  # the library's own kernels lie beside its modules
MOST_THREADS, MOST_SHARED = 1024, 227 * 1024


class KernelError(RuntimeError):
    """A launch that could not be finished; `findings` says why, as far as it is known without `check`."""

    def __init__(self, kernel: Kernel, findings: Sequence[Finding]) -> None:
        self.findings = list(findings)
        super().__init__(f"{kernel.name} was stopped\n" + "\n".join(map(str, findings)))


def load(path: str | Path, *, includes: Sequence[str | Path] = ()) -> File:
    """A kernel file. Nothing is compiled before a kernel is used.

    path: of a `.cu` file that has kernels only; host code must be in another file, or behind `#ifndef MLSYS`.
    includes: folders for its `#include`s, beside its own. FileNotFoundError; ValueError if it has no kernel.
    """
    return File(Path(path), tuple(Path(x).resolve() for x in includes))


def source(name: str) -> Path:
    """Where one of the library's own kernel files is: `source("matmul.tiled")`. ValueError naming what there is."""
    path = LIBRARY / f"{name}.cu"
    if not path.is_file():
        have = sorted(p.stem for p in LIBRARY.glob("*.cu"))
        raise ValueError(f"name must be one of {', '.join(have)}, got {name!r}")
    return path


def check(
    kernel: Kernel,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    *args: Any,
    shared: int = 0,
    limit: float = 60.0,
) -> list[Finding]:
    """Run a kernel with every access to memory watched; what is wrong with it, nothing if nothing was found.

    Looks for races on shared memory and on tensors (between threads and between blocks), accesses out of bounds and
    misaligned, reads of shared memory that nobody wrote, barriers and shuffles that not all threads reach, deadlocks.
    It looks at this run: other sizes may take other paths. Works on copies: the tensors stay as they are. They must be
    on the CPU. TypeError, ValueError as for a launch.
    """
    return kernel._watched(_grid("grid", grid), _block(block), args, shared, limit, _processor.CHECK)[0]


def profile(
    kernel: Kernel,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    *args: Any,
    shared: int = 0,
    limit: float = 60.0,
) -> Profile:
    """Run a kernel and count: what each line moves, in which pieces, with how many bank conflicts; and its arithmetic.

    Works on copies of the tensors, which must be on the CPU. KernelError if the launch is not finished.
    """
    findings, lines, reader = kernel._watched(
        _grid("grid", grid), _block(block), args, shared, limit, _processor.PROFILE
    )
    if findings:
        raise KernelError(kernel, findings)
    return read_profile(kernel.name, lines, reader, [p.name for p in kernel.declared.parameters])


class File(Mapping[str, "Kernel"]):
    """The kernels of one file, by name; a template's by instance, `file["sgemm<32>"]`."""

    def __init__(self, path: Path, includes: tuple[Path, ...] = ()) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"path must be a kernel file, and there is none at {str(path)!r}")
        self.path, self.includes = path.resolve(), includes
        self.text = self.path.read_text(encoding="utf-8")
        self.declared = _source.kernels(self.text)
        if not self.declared:
            raise ValueError(f"path must be a file with __global__ functions, and {str(path)!r} has none")
        if "<<<" in _source.for_device_only(self.text):
            line = _source.for_device_only(self.text).split("<<<")[0].count("\n") + 1
            raise ValueError(
                f"{path.name}:{line} launches a kernel with <<<…>>>: a kernel file has kernels only. Move host code to "
                "another file, or put #ifndef MLSYS before it and #endif after it"
            )
        self._lock = threading.Lock()
        self._libraries: dict[tuple[str, _build.Mode], tuple[_processor.Library, int, list[str]]] = {}

    def __getitem__(self, name: str) -> Kernel:
        """KeyError naming the kernels there are, or what a template wants."""
        base = _source.base_name(name)
        declared = self.declared.get(base.split("::")[-1])
        if declared is None:
            raise KeyError(
                f"{self.path.name} has no kernel {base!r}, it has: {'; '.join(map(str, self.declared.values()))}"
            )
        if declared.template and "<" not in name and any("=" not in parameter for parameter in declared.template):
            example = f"{base}<{', '.join('32' for _ in declared.template)}>"
            raise KeyError(f"{declared} is a template: ask for an instance, such as {example}")
        return Kernel(self, name, declared)

    def __iter__(self) -> Iterator[str]:
        return iter(self.declared)

    def __len__(self) -> int:
        return len(self.declared)

    def __repr__(self) -> str:
        return f"File({str(self.path)!r}: {'; '.join(map(str, self.declared.values()))})"

    def _library(self, name: str, mode: _build.Mode) -> tuple[_processor.Library, int, list[str]]:
        """Where a kernel's code for the processor is: the library, its number there, its parameters' codes."""
        with self._lock:
            key = (name, mode)
            if key not in self._libraries:
                declared = self.declared[_source.base_name(name).split("::")[-1]]
                # all kernels that are no templates are compiled together; an instance by itself
                together = [n for n, d in self.declared.items() if not d.template] if not declared.template else [name]
                names = tuple(together if name in together else [name])
                spelled = tuple(self.declared[_source.base_name(n).split("::")[-1]].spelled(n) for n in names)
                path = _build.kernel_library(_source.for_processor(self.text), self.path, spelled, mode, self.includes)
                library = _processor.Library(path, _runtime(mode != "run"))
                for number, each in enumerate(names):
                    self._libraries[each, mode] = (library, number, library.signature(number))
            return self._libraries[key]


class Kernel:
    """A kernel, ready to be launched."""

    def __init__(self, file: File, name: str, declared: Declared) -> None:
        self.file, self.name, self.declared = file, name, declared

    @property
    def codes(self) -> list[str]:
        """What each parameter takes, as the compiler says it: `f4` a float, `*cf4` a pointer to constant ones."""
        return self.file._library(self.name, "run")[2]

    def __repr__(self) -> str:
        return f"Kernel({self.name} of {self.file.path.name}: {self.declared})"

    def __call__(
        self,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        *args: Any,
        shared: int = 0,
        stream: Any = None,
        order: int = 0,
        threads: int | None = None,
        limit: float = 60.0,
    ) -> None:
        """Launch on a grid of blocks: on the GPU where the tensors are, without waiting; on the CPU if they are there.

        grid, block: up to three sizes, x first. shared: bytes of dynamic shared memory. stream: torch's current one if
        None. On the CPU: order: 0 threads as they are numbered, 1 backwards, other numbers warps in a random order (a
        right kernel does not care); threads: OS threads, all cores if None; limit: seconds after which it is stopped.
        TypeError or ValueError naming the argument; KernelError if it crashed, hung or ran out of time.
        """
        dims, sizes = _grid("grid", grid), _block(block)
        device = device_of(args)
        _check_shared(shared)
        if device.type == "cuda":
            from mlsys.kernels.cuda import _gpu

            _gpu.launch(self, device, dims, sizes, args, shared, stream)
            return
        if device.type != "cpu":
            raise ValueError(f"tensors must be on the CPU or an NVIDIA GPU, got {device}")
        lines, reader = self._run(
            dims, sizes, args, shared, order, threads or _processor.cores(), limit, _processor.RUN
        )
        if lines:
            raise KernelError(self, reader().read(lines))

    def _watched(
        self, grid: _Dims, block: _Dims, args: Sequence[Any], shared: int, limit: float, mode: int
    ) -> tuple[list[Finding], list[Line], Reader]:
        device = device_of(args)
        _check_shared(shared)
        if device.type != "cpu":
            raise ValueError(
                f"tensors must be on the CPU to be watched, got {device}: give x.cpu(); on a GPU use compute-sanitizer"
            )
        # What one block tells another through memory, by a fence, is followed in one worker only.
        alone = mode == _processor.PROFILE or "__threadfence" in self.file.text or "volatile" in self.file.text
        threads = 1 if alone else _processor.cores()
        lines, reader = self._run(grid, block, copied(args), shared, 0, threads, limit, mode)
        read = reader()
        return read.read(lines), lines, read

    def _run(
        self,
        grid: _Dims,
        block: _Dims,
        args: Sequence[Any],
        shared: int,
        order: int,
        threads: int,
        limit: float,
        mode: int,
    ) -> tuple[list[Line], Callable[[], Reader]]:
        checked = mode != _processor.RUN
        library, number, codes = self.file._library(self.name, _MODES[mode])
        arguments = convert(self.declared, codes, args)
        lines = _processor.launch(
            library,
            number,
            grid,
            block,
            arguments.pointers,
            shared=shared,
            order=order,
            mode=mode,
            memory=_memory(arguments) if checked else (),
            symbols=_symbols(library) if checked else (),
            threads=threads,
            limit=limit,
        )
        names = [p.name for p in self.declared.parameters]
        return lines, lambda: Reader(library.path, self.file.path, self.file.text, names, grid, block)


_Dims = tuple[int, int, int]
_MODES: dict[int, _build.Mode] = {_processor.RUN: "run", _processor.CHECK: "check", _processor.PROFILE: "profile"}


def _memory(arguments: Arguments) -> list[Memory]:
    return [
        Memory(t.data_ptr(), t.numel() * t.element_size(), min(t.element_size(), 4), i)
        for i, t in arguments.tensors
        if t.numel()
    ]


def _symbols(library: _processor.Library) -> list[int]:
    return [number for v in static_variables(library.path) for number in (v.offset, v.bytes)]


def _runtime(checked: bool) -> ctypes.CDLL:
    return ctypes.CDLL(str(_build.runtime(checked)))


def _grid(name: str, value: int | Sequence[int]) -> _Dims:
    sizes = tuple(value) if isinstance(value, Sequence) else (value,)
    whole = all(isinstance(x, int) and not isinstance(x, bool) for x in sizes)
    if not 1 <= len(sizes) <= 3 or not whole or min(sizes) < 1:
        raise ValueError(f"{name} must be one to three positive ints, got {value!r}")
    x, y, z = (*sizes, 1, 1)[:3]
    if name == "grid" and (x >= 2**31 or y > 65535 or z > 65535):
        raise ValueError(f"grid must be at most 2147483647 × 65535 × 65535, got {value!r}")
    return x, y, z


def _block(value: int | Sequence[int]) -> _Dims:
    x, y, z = _grid("block", value)
    if x * y * z > MOST_THREADS or z > 64:
        raise ValueError(
            f"block must be at most {MOST_THREADS} threads, and 64 in z, got {value!r}: {x * y * z} threads"
        )
    return x, y, z


def _check_shared(shared: int) -> None:
    if not isinstance(shared, int) or isinstance(shared, bool) or not 0 <= shared <= MOST_SHARED:
        raise ValueError(f"shared must be between 0 and {MOST_SHARED} bytes, got {shared!r}")
