"""Kernels for aarch64, made by a cross compiler and run by qemu, do and find what they do and find here.

Python stays on this machine's processor: what it gives to a library goes through a pipe to `files/launcher.cpp`. An
emulator shows that the switch of stacks, the signals, the instrumentation and the listings hold; not how weakly a real
one orders memory, since it runs on this machine's.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mlsys.kernels.cuda import KernelError, _arguments, _build, _processor, _runner, check, load, profile, source
from mlsys.kernels.cuda._arguments import Arguments
from mlsys.kernels.cuda._processor import Line, Memory

HERE = Path(__file__).parent
FILES = HERE / "files"
TRIPLE = "aarch64-linux-gnu"
TOOLS = ("nm", "addr2line", "objdump")


class Emulator:
    """The launcher, under qemu. A request and its answer are numbers of eight bytes, and texts after their length."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.converted: Arguments | None = None

    def convert(self, *args: Any) -> Arguments:
        """Kept, since a launch is given addresses only."""
        self.converted = _arguments.convert(*args)
        return self.converted

    def ask(self, *parts: int | str | bytes) -> None:
        for part in parts:
            if isinstance(part, int):
                self._stdin.write(struct.pack("<Q", part))
            else:
                raw = part.encode() if isinstance(part, str) else part
                self._stdin.write(struct.pack("<Q", len(raw)) + raw)

    def answer(self) -> bytes:
        self._stdin.flush()
        size = self.process.stdout.read(8)  # type: ignore[union-attr]
        assert len(size) == 8, f"the launcher has ended, with status {self.process.wait()}"
        return self.process.stdout.read(*struct.unpack("<Q", size))  # type: ignore[union-attr]

    @property
    def _stdin(self) -> Any:
        return self.process.stdin

    def signature(self, path: Path, number: int) -> list[str]:
        self.ask("signature", str(path), f"mlsys_signature_{number}")
        return self.answer().decode().split()

    def launch(
        self,
        library: _processor.Library,
        number: int,
        grid: Sequence[int],
        block: Sequence[int],
        args: ctypes.Array[ctypes.c_void_p],
        *,
        shared: int,
        order: int,
        mode: int,
        memory: Sequence[Memory],
        symbols: Sequence[int],
        threads: int,
        limit: float,
    ) -> list[Line]:
        """As _processor.launch: tensors go there and come back, and pointers to them point to where they are there."""
        assert self.converted is not None
        assert self.converted.pointers is args
        threads = max(1, min(threads, grid[0] * grid[1] * grid[2]))
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, t in self.converted.tensors}
        starts = list(storages)

        def place(address: int) -> tuple[int, int] | None:
            return next(((starts.index(s), address - s) for s in starts if s <= address <= s + storages[s]), None)

        self.ask("launch", str(library.path), f"mlsys_kernel_{number}", *grid, *block, shared, order, mode, threads)
        self.ask(int(1000 * limit), len(storages))
        self.ask(*(ctypes.string_at(start, size) if size else b"" for start, size in storages.items()))
        self.ask(len(self.converted.values))
        for value in self.converted.values:
            raw = bytes(value)
            words = [struct.unpack_from("<Q", raw, at)[0] for at in range(0, len(raw) - 7, 8)]
            places = [(8 * i, *found) for i, word in enumerate(words) if word and (found := place(word))]
            self.ask(raw, len(places), *(n for found in places for n in found))
        self.ask(len(memory))
        for m in memory:
            at = place(m.address)
            assert at is not None
            self.ask(*at, m.bytes, m.unit, m.index)
        self.ask(len(symbols), *symbols)
        told = [self.answer().decode(errors="replace") for _ in range(threads)]
        for start, size in storages.items():
            ctypes.memmove(start, self.answer(), size)
        return [Line(tuple(row.split("\t")), 0) for out in told for row in out.splitlines()]


class Library(_processor.Library):
    """One that only the emulator loads."""

    def __init__(self, emulator: Emulator, path: Path, runtime: object) -> None:
        self.emulator, self.path = emulator, path

    def signature(self, number: int) -> list[str]:
        return self.emulator.signature(self.path, number)


def missing() -> str:
    """What this machine lacks, and how to get it."""
    wanted = [f"{TRIPLE}-{tool}" for tool in ("g++", *TOOLS)]
    lacking = [name for name in wanted if not shutil.which(name)]
    if not any(shutil.which(name) for name in ("qemu-aarch64", "qemu-aarch64-static")):
        lacking.append("qemu-aarch64")
    return f"no {', '.join(lacking)}: apt install g++-{TRIPLE} qemu-user" if lacking else ""


def emulation(folder: Path, patch: pytest.MonkeyPatch, cpu: str = "neoverse-n1") -> Emulator:
    """From now on kernels are compiled for aarch64, and the emulator runs them."""
    for tool in TOOLS:
        (folder / tool).symlink_to(str(shutil.which(f"{TRIPLE}-{tool}")))
    launcher = str(folder / "launcher")
    source = str(FILES / "launcher.cpp")
    command = [f"{TRIPLE}-g++", "-std=c++17", "-O1", "-pthread", source, "-o", launcher, "-ldl"]
    subprocess.run(command, check=True)
    patch.setenv("PATH", str(folder), prepend=":")
    patch.setenv("CXX", f"{TRIPLE}-g++")
    native = f"-mcpu={cpu}"
    patch.setattr(_build, "_FAST", tuple(native if flag == _build._NATIVE else flag for flag in _build._FAST))
    patch.setattr(_build, "_NATIVE", native)
    for name in ("compiler", "_version", "_machine", "runtime"):  # what they know is of another compiler
        patch.setattr(_build, name, functools.cache(getattr(_build, name).__wrapped__))
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    emulator = Emulator([str(qemu), "-cpu", "max", "-L", f"/usr/{TRIPLE}", launcher])
    patch.setattr(_runner, "_runtime", _build.runtime)
    patch.setattr(_runner, "convert", emulator.convert)
    patch.setattr(_processor, "launch", emulator.launch)
    patch.setattr(_processor, "Library", functools.partial(Library, emulator))
    return emulator


@pytest.fixture(scope="module", autouse=True)
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if lacking := missing():
        pytest.skip(lacking)
    with pytest.MonkeyPatch.context() as patch:
        running = emulation(tmp_path_factory.mktemp("aarch64"), patch)
        yield
        running.process.kill()
        running.process.communicate()


@pytest.fixture(scope="module")
def cases() -> ModuleType:
    """The planted mistakes, how they are launched, and on which lines they stand."""
    spec = importlib.util.spec_from_file_location("cases_of_check", HERE / "test_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", ["barriers", "divergence", "blocks"])
def test_right_kernels_are_right_in_any_order_and_planted_mistakes_are_found(cases, file):
    kernels = load(FILES / f"{file}.cu")
    for name, case in cases.TABLE[file].items():
        for order in (0, 1, 7):
            given, args = case.arguments(), case.arguments()
            expected = case.expected(*given)
            kernels[name](case.grid, case.block, *args, shared=case.shared, order=order, threads=2)
            results = tuple(args[i] for i in case.results)
            torch.testing.assert_close(results, expected if isinstance(expected, tuple) else (expected,))
        assert check(kernels[name], case.grid, case.block, *case.arguments(), shared=case.shared) == []
        wrong = kernels[f"{name}_wrong"]
        marks = cases.planted(kernels, wrong.name)
        if "endless-loop" in marks.values():  # takes as long as its limit
            continue
        found = check(wrong, case.grid, case.block, *(case.wrong or case.arguments)(), shared=case.shared)
        assert {finding.kind for finding in found} == set(marks.values()), name
        assert cases.lines(found) == set(marks), name


def test_it_is_made_for_aarch64():
    assert (_build.runtime(False)).read_bytes()[18:20] == b"\xb7\x00"  # e_machine of an ELF file: EM_AARCH64


def test_numbers_in_registers_outlast_a_switch_of_stacks(tmp_path):
    sums = "\n".join(f"  double d{i} = x[t] * {i + 1};" for i in range(24))
    adds = " ".join(f"d{i} += d{(i + 1) % 24} * 0.5;" for i in range(24))
    (tmp_path / "many.cu").write_text(
        "__global__ void many(const double *x, double *y, int n) {\n  int t = threadIdx.x, a = 3 * t, b = 5 * t;\n"
        f"{sums}\n  for (int i = 0; i < n; i++) {{ {adds} a += b; __syncthreads(); b += a; }}\n"
        f"  y[t] = {' + '.join(f'd{i}' for i in range(24))} + a + b;\n}}\n"
    )
    x, y = torch.arange(96.0, dtype=torch.float64), torch.zeros(96, dtype=torch.float64)
    load(tmp_path / "many.cu")["many"](1, 96, x, y, 5)
    d, a, b = [x * (i + 1) for i in range(24)], 3 * x, 5 * x
    for _ in range(5):
        for i in range(24):
            d[i] = d[i] + d[(i + 1) % 24] * 0.5
        a = a + b
        b = b + a
    torch.testing.assert_close(y, sum(d) + a + b)


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_each_of_65536_patterns_of_sixteen_bits_as_a_float(name, dtype):
    x, y = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype), torch.zeros(65536)
    load(FILES / "formats.cu")[f"widen_{name}"](256, 256, 65536, x, y)
    torch.testing.assert_close(y, x.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "kind", "arg"),
    [
        ("crashes", "invalid-address", lambda: torch.ones(8)),
        ("recurses", "stack-overflow", lambda: torch.zeros(8, dtype=torch.int32)),
        ("loops", "endless-loop", lambda: torch.zeros(8, dtype=torch.int32)),
        ("asserts", "assertion", lambda: -torch.ones(8, dtype=torch.int32)),
    ],
)
def test_a_kernel_that_fails_is_stopped_and_the_next_one_runs(name, kind, arg):
    kernels = load(FILES / "runner.cu", includes=[FILES / "include"])
    with pytest.raises(KernelError, match=f"{name} was stopped") as caught:
        kernels[name](4, 8, arg(), limit=0.5, threads=2)
    assert {finding.kind for finding in caught.value.findings} == {kind}
    y = torch.zeros(3)
    kernels["maximum"](3, 128, torch.arange(300.0), y, 300, threads=2)
    assert y.tolist() == [299] * 3


def test_a_profile_counts_the_same():
    m, n, k = 33, 17, 40
    kernel = load(source("matmul.naive"))["matmul_naive"]
    counted = profile(kernel, (2, 3), (32, 8), m, n, k, torch.ones(m, k), torch.ones(k, n), torch.zeros(m, n))
    assert counted.flops == 2 * m * n * k
