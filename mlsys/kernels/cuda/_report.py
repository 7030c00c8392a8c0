"""What a compiled kernel takes of a GPU, without one: registers, spills, shared memory, occupancy, instructions.

Sizes are what the compiler's log says (`ptxas -v`): spills stand nowhere else, and from Hopper on the machine code
counts the kilobyte of shared memory that the system keeps as the kernel's. Launch bounds, constants and instructions
are read in the PTX; an instruction counts once for each time that it is written there, however often it runs.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlsys.kernels.cuda import _nvrtc, _signature, _targets
from mlsys.kernels.cuda._occupancy import MOST_THREADS, Occupancy, multiprocessor, occupancy

INSTRUCTIONS = {  # those that make the difference between a kernel's versions
    "wgmma": r"wgmma\.mma_async",
    "mma": r"(?:wmma\.)?mma\.(?:sp\.)?sync",
    "ldmatrix": r"ldmatrix\.sync",
    "TMA": r"cp\.async\.bulk\.(?:tensor|shared|global|reduce)",
    "cp.async": r"cp\.async\.c[ag]",
    "mbarrier": r"mbarrier\.\w*wait",
    "barrier": r"(?:bar|barrier)\.(?:cta\.)?(?:sync|red|arrive)",
    "shuffle": r"shfl\.sync",
    "atomic": r"(?:atom|red)\.(?!async)",
    "16-byte load": r"ld\.(?:global|shared|param)[\w:.]*(?:v4\.[bfsu]32|v2\.[bfsu]64)",
}
_PTX_INSTRUCTIONS = {name: re.compile(rf"(?<![\w.%$]){pattern}") for name, pattern in INSTRUCTIONS.items()}
_DEFAULT_BLOCK = 256  # where neither the caller nor the kernel says


@dataclass(frozen=True)
class KernelReport:
    """One kernel, compiled for one architecture.

    registers: of a thread. spill_stores, spill_loads: bytes of registers that did not fit and went to local memory, as
    written in the code. stack: bytes of local memory a thread. shared, dynamic_shared: bytes a block, declared in the
    kernel and asked for. constant: bytes of the file's `__constant__` variables. parameters: bytes. barriers: of a
    block's 16. max_threads: a block's, by `__launch_bounds__`, else 1,024. block: threads that occupancy is for.
    instructions: how often each stands in the PTX.
    """

    kernel: str
    arch: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int
    dynamic_shared: int
    constant: int
    parameters: int
    barriers: int
    max_threads: int
    block: int
    occupancy: Occupancy
    instructions: tuple[tuple[str, int], ...]


class Report(list[KernelReport]):
    """A file's kernels for one architecture; printed, a table. `warnings`: what the compiler had to say."""

    def __init__(self, title: str, kernels: Sequence[KernelReport], warnings: Sequence[str] = ()) -> None:
        super().__init__(kernels)
        self.title, self.warnings = title, tuple(warnings)

    def __str__(self) -> str:
        from tabulate import tabulate

        head = (
            "kernel",
            "registers",
            "spilled",
            "stack",
            "shared",
            "constant",
            "block",
            "blocks/SM",
            "warps/SM",
            "limited by",
        )
        rows = [
            (
                k.kernel, k.registers, f"{k.spill_stores} B", f"{k.stack} B", _shared(k), f"{k.constant} B", k.block,
                k.occupancy.blocks, f"{k.occupancy.warps} of {k.occupancy.most_warps}", k.occupancy.limit,
            )
            for k in self
        ]  # fmt: skip
        right = ("left", *["right"] * (len(head) - 2), "left")
        used = [f"{k.kernel}: {', '.join(f'{n} {name}' for name, n in k.instructions)}" for k in self if k.instructions]
        parts = [
            self.title,
            tabulate(rows, head, tablefmt="github", colalign=right if rows else None),
            *used,
            *self.warnings,
        ]
        return "\n\n".join(parts[:2]) + "".join(f"\n{line}" for line in parts[2:])


def compile_report(
    name_or_path: str | os.PathLike[str],
    arch: str = "sm_90a",
    *,
    instances: Sequence[str] | None = None,
    block: int | Sequence[int] | None = None,
    shared: int = 0,
    includes: Sequence[str | Path] = (),
) -> Report:
    """What a file's kernels take of a GPU that need not be there: one entry a kernel; printed, a table.

    name_or_path: one of the library's kernels, `matmul.hopper`, or a `.cu` file. instances: the kernels to report,
    templates by instance, `sgemm<32>`; those that are no templates, and those that the comment `// instances:` lists,
    if None. block: threads, for occupancy; the most that the kernel's `__launch_bounds__` allows if None, and 256
    without. shared: bytes of dynamic shared memory. ValueError naming the argument, also for an architecture that the
    file is not for; CompileError; NoNVRTC.
    """
    path = _path(name_or_path)
    text = path.read_text(encoding="utf-8")
    multiprocessor(arch)
    if not _targets.runs_on(text, arch):
        raise ValueError(
            f"arch must be one that {path.name} is for, {', '.join(_targets.architectures(text))}, got {arch!r}"
        )
    names = tuple(instances) if instances is not None else _targets.instances(text)
    if isinstance(instances, str) or not names:
        raise ValueError(f"instances must be a list of kernels, such as ['sgemm<32>'], got {instances!r}")
    threads = None if block is None else _threads(block)
    compiled = _nvrtc.compile(text, path, names, arch, includes=[Path(x).resolve() for x in includes])
    kernels = [_kernel(compiled, name, threads, shared) for name in names]
    return Report(f"{path.name} for {arch}, {compiled.compiler}", kernels, warnings(compiled.log))


def warnings(log: str) -> tuple[str, ...]:
    """What the compiler warned of: unused variables, or that it had to serialise wgmma."""
    return tuple(
        dict.fromkeys(line.strip() for line in log.splitlines() if re.search(r"warning\s*[#:]|Performance Loss", line))
    )


def _kernel(compiled: _nvrtc.Compiled, name: str, threads: int | None, dynamic: int) -> KernelReport:
    mangled = compiled.names[name]
    said = re.search(
        rf"Compiling entry function '{re.escape(mangled)}'(.*?)(?=Compiling entry function|\Z)", compiled.log, re.DOTALL
    )
    log = said[1] if said else ""
    if "registers" not in log:
        raise RuntimeError(
            f"{compiled.compiler} does not say what {name} takes, in a form that is known here: {compiled.log!r}"
        )
    head, body = _ptx(compiled.ptx, mangled)
    bound = _bound(head)
    block = threads or bound or _DEFAULT_BLOCK
    if bound is not None and block > bound:
        raise ValueError(f"block must be at most {bound} threads, by the __launch_bounds__ of {name}, got {block}")
    registers, shared, barriers = (
        _number(r"Used (\d+) reg", log),
        _number(r"(\d+) bytes smem", log),
        _number(r"(\d+) barriers", log),
    )
    return KernelReport(
        kernel=name,
        arch=compiled.arch,
        registers=registers,
        spill_stores=_number(r"(\d+) bytes spill stores", log),
        spill_loads=_number(r"(\d+) bytes spill loads", log),
        stack=max(_number(r"(\d+) bytes stack frame", log), _number(r"(\d+) bytes cumulative stack", log)),
        shared=shared,
        dynamic_shared=dynamic,
        constant=_constant(compiled.ptx),
        parameters=sum(size for size, _ in _signature.parameter_sizes(compiled.ptx, mangled)),
        barriers=barriers,
        max_threads=bound or MOST_THREADS,
        block=block,
        occupancy=occupancy(compiled.arch, block, registers, shared + dynamic, barriers=barriers),
        instructions=_instructions(body),
    )


def _number(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    return int(found[1]) if found else 0  # what there is none of is left out


def _constant(ptx: str) -> int:
    """Bytes of the module's `.const` variables."""
    total = 0
    for bits, length in re.findall(
        r"^(?:\.\w+\s+)*\.const\b.*?\.[bfsu](8|16|32|64)\s+[\w$]+(?:\[(\d+)\])?", ptx, re.MULTILINE
    ):
        total += int(bits) // 8 * int(length or 1)
    return total


def _instructions(body: str) -> tuple[tuple[str, int], ...]:
    counted = ((name, len(pattern.findall(body))) for name, pattern in _PTX_INSTRUCTIONS.items())
    return tuple((name, n) for name, n in counted if n)


def _ptx(ptx: str, mangled: str) -> tuple[str, str]:
    """A kernel's directives, and its instructions without comments."""
    start = re.search(rf"\.entry\s+{re.escape(mangled)}\b", ptx)
    assert start is not None  # it was compiled under this name
    opening = ptx.index("{", start.end())
    # to the next function: a "}" may be that of inline assembly
    closing = re.compile(r"^(?:\.\w+\s+)*\.(?:entry|func)\b", re.MULTILINE).search(ptx, opening)
    body = ptx[opening : closing.start() if closing else len(ptx)]
    return ptx[start.start() : opening], re.sub(r"//[^\n]*", "", body)


def _bound(head: str) -> int | None:
    """The most threads of a block by `__launch_bounds__`; None without."""
    found = re.search(r"\.(?:maxntid|reqntid)\s+([\d, ]+)", head)
    return math.prod(int(size) for size in found[1].split(",")) if found else None


def _threads(block: int | Sequence[int]) -> int:
    sizes = (block,) if isinstance(block, int) else tuple(block)
    if not 1 <= len(sizes) <= 3 or any(not isinstance(x, int) or isinstance(x, bool) or x < 1 for x in sizes):
        raise ValueError(f"block must be one to three positive ints, got {block!r}")
    threads = math.prod(sizes)
    if threads > MOST_THREADS:
        raise ValueError(f"block must have at most {MOST_THREADS} threads, got {block!r}")
    return threads


def _path(name_or_path: str | os.PathLike[str]) -> Path:
    from mlsys.kernels.cuda._runner import source

    path = Path(name_or_path)
    if path.suffix == ".cu" or path.is_file():
        if not path.is_file():
            raise FileNotFoundError(
                f"name_or_path must be a kernel of the library or a file, and there is none at {str(path)!r}"
            )
        return path.resolve()
    return source(str(name_or_path))


def _shared(kernel: KernelReport) -> str:
    return f"{kernel.shared} B" + (f" + {kernel.dynamic_shared} B" if kernel.dynamic_shared else "")
