"""Compile the runtime and kernel files with the machine's C++ compiler, once each; what was compiled is kept.

A library is named by a hash of everything that went into it: sources, headers, flags, compiler, processor. So a cache
is never stale, and may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from mlsys.files import cache_folder
from mlsys.kernels.cuda import _source

RUNTIME = Path(__file__).parent / "runtime"
HEADERS = RUNTIME / "include"
WRAPPERS = Path(__file__).parent / "include"  # <mlsys/ptx.cuh>, for GPUs too
_PARTS = ("scheduler.cpp", "async.cpp")
_CHECKER = ("checker.cpp", "profiler.cpp")
# A `static` of a kernel file is shared memory: one copy a library, no lock round it, seen by nobody else.
_KERNEL = ("-std=c++17", "-x", "c++", "-fPIC", "-fvisibility=hidden", "-fno-threadsafe-statics", "-fno-plt")
# CUDA's compilers let a float array be read as float4; -w: what a processor's compiler warns of is not the kernel's;
# and a char has a sign, whatever the processor's custom.
_MEANING = ("-fno-strict-aliasing", "-fwrapv", "-fsigned-char", "-w")
_NATIVE = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
_FAST = ("-O3", _NATIVE, "-g1")
_CHECKED = ("-O2", "-g", "-DMLSYS_CHECK", "-fno-optimize-sibling-calls", "-fsanitize=thread")
# -fplt: the call that counts a block has a name in the listing, which on aarch64 it otherwise has not.
_PROFILED = ("-ffp-contract=off", "-fno-tree-vectorize", "-fno-tree-slp-vectorize", "-fplt")


# CUB, Thrust, libcu++, CUTLASS, and CUDA's own headers beyond those of `runtime/include`
_FOR_GPUS = re.compile(r"(cub|thrust|cuda|nv|cutlass|cute|crt)/|cu\w+\.h$|curand|cublas|cufft|nvtx")


@dataclass(frozen=True)
class _Dialect:
    """What one compiler calls the same things; `checked` is for `check` and `profile`, `profiled` for the latter."""

    always: tuple[str, ...]
    checked: tuple[str, ...]
    profiled: tuple[str, ...]
    in_order: tuple[str, ...]  # `__device__` variables stay between the two that enclose them
    linked: tuple[str, ...]  # `checked` too


_GCC = _Dialect(
    always=("-fno-gnu-unique", "-fmax-errors=5"),
    checked=(
        "-fsanitize=bounds",
        "-fno-sanitize-recover=bounds",
        "--param=tsan-distinguish-volatile=1",
        "--param=tsan-instrument-func-entry-exit=0",
    ),
    profiled=("-fsanitize-coverage=trace-pc",),
    in_order=("-fno-toplevel-reorder",),
    linked=(),
)
# clang instruments after it has optimised: each access must still be the kernel's own, not half a vector, nor a part of
# a memset that was a loop. It would also leave out a read that a write follows, blocks whose count follows from that of
# others, loops that wait for other threads, and, before clang 16, the memcpy that it makes of a structure's copy.
_CLANG = _Dialect(
    always=("-ferror-limit=5", "-fno-finite-loops"),
    checked=(
        "-fno-vectorize",
        "-fno-slp-vectorize",
        "-fno-builtin-memset",
        "-fsanitize=array-bounds",
        "-fno-sanitize-recover=array-bounds",
        *("-mllvm", "-tsan-distinguish-volatile"),
        *("-mllvm", "-tsan-instrument-func-entry-exit=0"),
        *("-mllvm", "-tsan-instrument-read-before-write"),
        *("-mllvm", "-disable-loop-idiom-all"),
    ),
    profiled=("-fsanitize-coverage=bb,no-prune,trace-pc",),
    in_order=(),
    linked=("-Wl,--wrap=memcpy,--wrap=memmove,--wrap=memset",),
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
def _version() -> str:
    return subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout


def _dialect() -> _Dialect:
    return _CLANG if "clang" in _version() else _GCC  # not by its file's name, which may be c++


@cache
def _machine() -> str:
    """What "native" means here, and who compiles."""
    target = subprocess.run(
        [compiler(), _NATIVE, "-E", "-v", "-x", "c++", "/dev/null"], capture_output=True, text=True, check=False
    ).stderr
    said = (line for line in target.splitlines() if "cc1" in line)
    return "\n".join([platform.machine(), _version(), *said])


@cache
def runtime(checked: bool) -> Path:
    """The library that runs blocks: fibers, barriers, and if `checked` the checker. Takes seconds, once a machine."""
    parts = [RUNTIME / name for name in _PARTS + (_CHECKER if checked else ())]
    flags = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-pthread", _NATIVE]
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
    """The library of a kernel file, with a door for each of the instances. CompileError with the compiler's words."""
    if host := _source.host_header(source):
        raise CompileError(
            f"{path}:{host[0]}: a kernel has no C++ standard library, and the file includes <{host[1]}>: leave it out, "
            "or put it, with the host code that needs it, between #ifndef MLSYS and #endif"
        )
    doors = "".join(f"MLSYS_EXPORT({i}, {name})\n" for i, name in enumerate(instances))
    text = f'#line 1 "{path}"\n{source}\n#line 1 "mlsys"\n#include "mlsys_module.h"\n{doors}'
    checked = mode != "run"
    with_runtime = runtime(checked)
    dialect = _dialect()
    flags = [*_KERNEL, *_MEANING, *dialect.always, *(_CHECKED + dialect.checked if checked else _FAST)]
    flags += _PROFILED + dialect.profiled if mode == "profile" else ()
    if "__device_variable__" in source:
        flags += ["-DMLSYS_DEVICE_VARIABLES", *dialect.in_order]
    folders = [HEADERS, WRAPPERS, path.parent, *includes]
    flags += [f"-I{folder}" for folder in folders] + ["-include", "mlsys_cuda.h"]
    headers = [p.read_text(errors="replace") for folder in folders for p in sorted(_headers(folder))]
    linked = dialect.linked if checked else ()
    key = _hash(text, *flags, *linked, str(with_runtime), _machine(), *headers)
    name = f"{path.stem}-{key}.so"
    if (folder() / name).is_file():
        return folder() / name
    with tempfile.TemporaryDirectory() as scratch:
        obj = Path(scratch) / "kernel.o"
        try:
            _run([compiler(), *flags, "-c", "-", "-o", str(obj)], text)
        except CompileError as refused:
            raise CompileError(f"{refused}{_hint(str(refused))}") from None
        _refuse_constructors(obj, path)
        return _built(name, ["-shared", *linked, str(obj), str(with_runtime)])


def _hint(words: str) -> str:
    """What to do about a header that is not there, if that is what the compiler says."""
    missing = re.search(r"fatal error: '?([^\s:']+)'?(?:: No such file| file not found)", words)
    if missing is None:
        return ""
    if _FOR_GPUS.match(missing[1]):
        return (
            f"\n{missing[1]} belongs to a library for GPUs, which a processor has not: write out what it would do, or "
            "put its use between #ifndef MLSYS_CPU and #endif"
        )
    return f"\n{missing[1]} is not beside the file: name its folder, load(…, includes=[…])"


def _refuse_constructors(obj: Path, path: Path) -> None:
    """Of shared variables, since CUDA runs none; g++ refuses them itself (mlsys_cuda.h), clang has no word for it."""
    symbols = subprocess.run(["nm", "-C", str(obj)], capture_output=True, text=True, check=True).stdout
    if guarded := re.findall(r"guard variable for (.*)", symbols):
        raise CompileError(
            f"{path}: no constructor runs for a __shared__ variable, and {', '.join(guarded)} has one: "
            "let the threads give it its values"
        )


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
