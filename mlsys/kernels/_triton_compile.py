"""What the compiler makes of the Triton kernels, without a GPU: registers, spills, shared memory, instructions.

    python -m mlsys.kernels._triton_compile mlsys.kernels.softmax_triton --target 80 --target 90

Each module has a function `specimens()`, a list of its kernels with every config as they would be compiled for typical
calls. One JSON line is printed for each and each target. `compiled` runs that in a process of its own, where the
interpreter is off, and returns the lines as values: Triton is either one or the other in a process.

A spill is a number that found no register and lives in memory, thread by thread. ptxas keeps spills on the stack of a
thread, and Triton's kernels have nothing else there, so bytes of stack are bytes of spills; where there are some, the
loads and stores of local memory in the machine code are counted beside them.

See also:
    `mlsys.kernels._triton` (`Specimen`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlsys.files import cache_folder

TARGETS = (80, 90)  # A100 and H100
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a block may have

# What to look for in the PTX, by the name that it has there or that people write. ptxas turns each into its counterpart
# of the machine code; to disassemble that would take longer than to compile a small kernel.
MARKS = {
    "mma.sync": r"\bmma\.sync\b",
    "wgmma": r"\bwgmma\.mma_async\b",
    "cp.async": r"\bcp\.async\.c[ag]\b",
    "TMA": r"\bcp\.async\.bulk\.",
    "ldmatrix": r"\bldmatrix\.",
    "128-bit loads": r"\bld\.global\.\S*\b(?:v4\.[bfus]32|v2\.[bfus]64)\b",
}


@dataclass(frozen=True)
class Compiled:
    """What became of one specimen. `failed` is the compiler's complaint, or "": the rest then means nothing.

    registers: of a thread.
    spilled:   bytes on the stack of a thread.
    local:     loads and stores of local memory in the code.
    shared:    bytes of shared memory of a block.
    shows:     which of `MARKS` appear in the code.
    missing:   which of those the specimen says must appear do not.
    """

    module: str
    name: str
    config: str
    why_spills: str
    target: int
    registers: int = 0
    spilled: int = 0
    local: int = 0
    shared: int = 0
    shows: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    failed: str = ""

    def problems(self) -> list[str]:
        """What must not be: a failure, spills that the config does not explain, shared memory beyond the target's."""
        where = f"{self.name}, {self.config}, sm_{self.target}"
        if self.failed:
            return [f"{where}: {self.failed}"]
        found = []
        if (self.spilled or self.local) and not self.why_spills:
            found.append(f"{where}: {self.spilled} bytes of spills, {self.local} local loads and stores")
        if self.shared > SHARED.get(self.target, self.shared):
            found.append(f"{where}: {self.shared} bytes of shared memory, of {SHARED[self.target]}")
        if self.missing:
            found.append(f"{where}: no {' and no '.join(self.missing)}")
        return found


def compiled(
    modules: Sequence[str], targets: Sequence[int] = TARGETS, only: str = "", limit_s: float = 900
) -> list[Compiled]:
    """Compile the specimens of these modules, those with `only` in their name, in a process of its own.

    RuntimeError with its last words if it fails.
    """
    words = [word for target in targets for word in ("--target", str(target))]
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # a product and a sum as one instruction: what Triton does unasked today, and 3.9 warns that it will not tomorrow
    environment = kept | {
        "TRITON_CACHE_DIR": str(cache_folder() / "triton-compiled"),
        "TRITON_DEFAULT_FP_FUSION": os.environ.get("TRITON_DEFAULT_FP_FUSION", "1"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "mlsys.kernels._triton_compile", *modules, *words, "--only", only],
        capture_output=True, text=True, env=environment, timeout=limit_s, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"compiling {', '.join(modules)} ended with {done.returncode}: {done.stderr[-2000:]}")
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return [Compiled(**row | {"shows": tuple(row["shows"]), "missing": tuple(row["missing"])}) for row in rows]


def compile_one(module: str, specimen: Any, target: int) -> Compiled:
    """Compile this specimen for this target, here and now; only where the interpreter is off."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    config = specimen.config
    found = {"module": module, "name": specimen.name, "config": str(config), "why_spills": config.why_spills}
    constants = {**specimen.constants, **dict(config.constants)}
    names = specimen.kernel.arg_names
    signature = {name: "constexpr" if name in constants else specimen.signature[name] for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in specimen.aligned}
    source = ASTSource(
        fn=specimen.kernel,
        signature=signature,
        constexprs={name: constants[name] for name in names if name in constants},
        attrs=aligned or None,
    )
    try:
        kernel = triton.compile(
            source,
            target=GPUTarget("cuda", target, 32),
            options={"num_warps": config.warps, "num_stages": config.stages},
        )
    except Exception as error:  # the compiler raises what it likes: a result, not an accident
        reason: BaseException = error  # Triton wraps what is wrong into where it is, once for each function
        while reason.__cause__ is not None:
            reason = reason.__cause__
        text = " ".join(str(reason).split()) or " ".join(str(error).split())
        return Compiled(**found, target=target, failed=f"{type(reason).__name__}: {text[-300:]}")
    registers, stack, local = look_into(kernel.asm["cubin"])
    shows = tuple(mark for mark, pattern in MARKS.items() if re.search(pattern, kernel.asm["ptx"]))
    return Compiled(
        **found,
        target=target,
        registers=registers,
        spilled=stack,
        local=local,
        shared=int(kernel.metadata.shared),
        shows=shows,
        missing=tuple(mark for mark in specimen.shows.get(target, ()) if mark not in shows),
    )


def look_into(cubin: bytes) -> tuple[int, int, int]:
    """Registers and bytes of stack of a thread, and accesses to local memory, of a compiled kernel."""
    text = _dump(cubin, "--dump-resource-usage")
    counts = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    if counts[0] is None or counts[1] is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {text[:300]!r}")
    registers, stack = int(counts[0][1]), int(counts[1][1])
    return registers, stack, len(re.findall(r"\b(?:LDL|STL)\b", _dump(cubin, "--dump-sass"))) if stack else 0


def _dump(cubin: bytes, what: str) -> str:
    """What cuobjdump, which Triton brings along, says of a kernel."""
    import triton

    tool = triton.knobs.nvidia.cuobjdump.path
    # nvdisasm, which cuobjdump calls, lies beside it
    environment = os.environ | {"PATH": f"{Path(tool).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    with tempfile.TemporaryDirectory(prefix="mlsys-") as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        done = subprocess.run(
            [tool, what, str(file)], capture_output=True, text=True, env=environment, check=True
        )  # fmt: skip
        return done.stdout


def main(words: Sequence[str] | None = None) -> int:
    """Print one JSON line for each specimen of the modules and each target."""
    parser = argparse.ArgumentParser(prog="python -m mlsys.kernels._triton_compile", description=main.__doc__)
    parser.add_argument("modules", nargs="+", metavar="MODULE", help="such as mlsys.kernels.softmax_triton")
    parser.add_argument("--target", type=int, action="append", help="80 for sm_80 (repeatable; default: 80 and 90)")
    parser.add_argument("--only", default="", metavar="WORD", help="specimens with this in their name or config")
    args = parser.parse_args(words)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set, and under the interpreter there is nothing to compile: unset it")
    for module in args.modules:
        for specimen in importlib.import_module(module).specimens():
            if args.only not in f"{specimen.name} {specimen.config}":
                continue
            for target in args.target or TARGETS:
                if specimen.targets and target not in specimen.targets:
                    continue
                print(json.dumps(asdict(compile_one(module, specimen, target))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
