"""Compile the runtime and kernel files with the machine's C++ compiler, once each; what was compiled is kept.

A library is named by a hash of everything that went into it: sources, headers, flags, compiler, processor. So a cache
is never stale, and may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Literal

from mlsys.files import cache_folder

RUNTIME = Path(__file__).parent / "runtime"
HEADERS = RUNTIME / "include"
WRAPPERS = Path(__file__).parent / "include"  # <mlsys/ptx.cuh>, for GPUs too
_PARTS = ("scheduler.cpp", "async.cpp")
_CHECKER = ("checker.cpp", "profiler.cpp")
# A `static` of a kernel file is shared memory: one copy a library, no lock round it, seen by nobody else.
_KERNEL = ("-std=c++17", "-x", "c++", "-fPIC", "-fvisibility=hidden", "-fno-threadsafe-statics", "-fno-plt")
# CUDA's compilers let a float array be read as float4; -w: what a processor's compiler warns of is not the kernel's
_MEANING = ("-fno-strict-aliasing", "-fwrapv", "-w", "-fmax-errors=5")
_FAST = ("-O3", "-march=native", "-g1")
_PROFILED = ("-fsanitize-coverage=trace-pc", "-ffp-contract=off", "-fno-tree-vectorize", "-fno-tree-slp-vectorize")
_CHECKED = (
    "-O2",
    "-g",
    "-DMLSYS_CHECK",
    "-fno-optimize-sibling-calls",
    "-fsanitize=thread",
    "-fsanitize=bounds",
    "-fno-sanitize-recover=bounds",
)


Mode = Literal["run", "check", "profile"]


class CompileError(RuntimeError):
    """The compiler refused a kernel file; its words follow."""


class NoCompiler(RuntimeError):
    """There is no C++ compiler to run kernels on the processor with."""


@cache
def compiler() -> str:
    """The C++ compiler: what CXX names, else g++ or clang++. NoCompiler if there is none."""
    if not sys.platform.startswith("linux"):
        raise NoCompiler(f"CUDA kernels run on the processor under Linux only, this is {sys.platform}: use a container")
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "clang++"]:
        if found := shutil.which(name):
            return found
    raise NoCompiler(
        f"running CUDA kernels on the processor needs a C++ compiler, and there is no {wanted or 'g++ or clang++'}: "
        "install one (Debian and Ubuntu: apt install g++), or name it in the environment variable CXX"
    )


@cache
def _machine() -> str:
    """What -march=native means here, and who compiles."""
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    target = subprocess.run(
        [compiler(), "-march=native", "-E", "-v", "-x", "c++", "/dev/null"], capture_output=True, text=True, check=False
    ).stderr
    return "\n".join([platform.machine(), version, *(line for line in target.splitlines() if "cc1plus" in line)])


@cache
def runtime(checked: bool) -> Path:
    """The library that runs blocks: fibers, barriers, and if `checked` the checker. Takes seconds, once a machine."""
    parts = [RUNTIME / name for name in _PARTS + (_CHECKER if checked else ())]
    flags = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-pthread", "-march=native"]
    flags += ["-DMLSYS_CHECK"] if checked else []
    key = _hash(*flags, _machine(), *(p.read_text() for p in [*parts, *sorted(RUNTIME.glob("*.h"))]))
    name = f"runtime-{key}.so"
    if (folder() / name).is_file():
        return folder() / name
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor() as pool:
        objects = [str(Path(scratch) / f"{part.stem}.o") for part in parts]
        made = [
            pool.submit(_run, [compiler(), *flags, "-c", str(part), "-o", obj])
            for part, obj in zip(parts, objects, strict=True)
        ]
        for each in made:
            each.result()
        return _built(name, ["-shared", "-pthread", *objects])


def kernel_library(source: str, path: Path, instances: tuple[str, ...], mode: Mode, includes: tuple[Path, ...]) -> Path:
    """The library of a kernel file, with a door for each of the instances."""
    doors = "".join(f"MLSYS_EXPORT({i}, {name})\n" for i, name in enumerate(instances))
    text = f'#line 1 "{path}"\n{source}\n#line 1 "mlsys"\n#include "mlsys_module.h"\n{doors}'
    checked = mode != "run"
    with_runtime = runtime(checked)
    flags = [*_KERNEL, *_MEANING, *(_CHECKED if checked else _FAST)]
    if "clang" in Path(compiler()).name:
        flags += (
            ["-mllvm", "-tsan-distinguish-volatile", "-mllvm", "-tsan-instrument-func-entry-exit=0"] if checked else []
        )
    else:
        flags.append("-fno-gnu-unique")
        flags += ["--param=tsan-distinguish-volatile=1", "--param=tsan-instrument-func-entry-exit=0"] if checked else []
    flags += _PROFILED if mode == "profile" else ()
    if "__device_variable__" in source:
        flags += ["-DMLSYS_DEVICE_VARIABLES"] + (
            ["-fno-toplevel-reorder"] if "clang" not in Path(compiler()).name else []
        )
    folders = [HEADERS, WRAPPERS, path.parent, *includes]
    flags += [f"-I{folder}" for folder in folders] + ["-include", "mlsys_cuda.h"]
    headers = [p.read_text(errors="replace") for folder in folders for p in sorted(_headers(folder))]
    key = _hash(text, *flags, str(with_runtime), _machine(), *headers)
    name = f"{path.stem}-{key}.so"
    if (folder() / name).is_file():
        return folder() / name
    with tempfile.TemporaryDirectory() as scratch:
        obj = Path(scratch) / "kernel.o"
        _run([compiler(), *flags, "-c", "-", "-o", str(obj)], text)
        return _built(name, ["-shared", str(obj), str(with_runtime)])


def folder() -> Path:
    """Where compiled kernels are kept."""
    where = cache_folder() / "cuda"
    where.mkdir(parents=True, exist_ok=True)
    return where


def _headers(where: Path) -> list[Path]:
    return [p for end in ("h", "cuh", "hpp") for p in [*where.glob(f"*.{end}"), *where.glob(f"*/*.{end}")]]


def _hash(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def _built(name: str, arguments: list[str]) -> Path:
    target = folder() / name
    if not target.is_file():
        temporary = target.with_name(f".{os.getpid()}.{name}")
        try:
            _run([compiler(), *arguments, "-o", str(temporary)])
            os.replace(temporary, target)  # noqa: PTH105  (two processes may build the same: the last one wins)
        finally:
            temporary.unlink(missing_ok=True)
    return target


def _run(command: list[str], text: str = "") -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(done.stderr.strip() or f"{command[0]} failed with status {done.returncode}")
