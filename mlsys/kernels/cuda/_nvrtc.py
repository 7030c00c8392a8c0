"""Compile kernel files for NVIDIA GPUs with NVRTC, NVIDIA's compiler as a library: no GPU, no nvcc, no host compiler.

It is found among the installed packages: pip's CUDA wheels put library and headers into the package `nvidia`, and a
torch for CUDA brings them too. What was compiled is kept, named by a hash of all that went into it.

NVRTC has no C++ standard library, and refuses host code. So the standard headers that kernel files name are given
here, from CUDA's own where it has them. `cuda.h`, which is host code but for CUtensorMap, is given as that.
"""

from __future__ import annotations

import base64
import binascii
import ctypes
import hashlib
import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mlsys.files import write_atomic
from mlsys.kernels.cuda._build import CompileError, folder

INCLUDE = Path(__file__).parent / "include"
INSTALL = "pip install 'mlsys-reference[cuda]'"
_OPTIONS = ("--std=c++17", "--generate-line-info", "--ptxas-options=-v", "-DMLSYS", "--pre-include=mlsys_nvrtc.h")
_FORMAT = 1  # of what is kept; count up when Compiled changes
_INCLUDED = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"]([^>"\n]+)[>"]', re.MULTILINE)
_NOISE = re.compile(r"^ptxas (info|        ) .*\n?", re.MULTILINE)

_INTEGERS = """#pragma once
using int8_t = signed char; using int16_t = short; using int32_t = int; using int64_t = long long;
using uint8_t = unsigned char; using uint16_t = unsigned short; using uint32_t = unsigned int;
using uint64_t = unsigned long long; using intptr_t = int64_t; using uintptr_t = uint64_t;
#ifndef INT32_MAX
#define INT32_MIN INT_MIN
#define INT32_MAX INT_MAX
#define UINT32_MAX UINT_MAX
#define INT64_MAX LLONG_MAX
#define UINT64_MAX ULLONG_MAX
#endif
#include <limits.h>
"""
# these two in the words of CUDA's own <cuda/std/climits> and <cuda/std/cfloat>, which may follow and must not differ
_LIMITS = """#pragma once
#ifndef INT_MAX
#define CHAR_BIT 8
#define INT_MIN (-INT_MAX - 1)
#define INT_MAX 0x7fffffff
#define UINT_MAX 0xffffffff
#define LLONG_MIN (-LLONG_MAX - 1)
#define LLONG_MAX 0x7fffffffffffffffLL
#define ULLONG_MAX 0xffffffffffffffffUL
#endif
"""
_FLOATS = """#pragma once
#ifndef FLT_MAX
#define FLT_MIN         1.17549435082228750796873653722224568e-38f
#define FLT_MAX         3.40282346638528859811704183484516925e+38f
#define FLT_EPSILON     1.19209289550781250000000000000000000e-7f
#define DBL_MIN         2.22507385850720138309023271733240406e-308
#define DBL_MAX         1.79769313486231570814527423731704357e+308
#define DBL_EPSILON     2.22044604925031308084726333618164062e-16
#endif
"""
# what nvcc's own first header brings from the host's <math.h> and <sys/types.h>
_FIRST = """#pragma once
#ifndef INFINITY
#define INFINITY __builtin_bit_cast(float, 0x7f800000)
#define NAN __builtin_bit_cast(float, 0x7fffffff)
#define M_PI 3.14159265358979323846
#endif
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned long ulong;
"""
_CUDA_H = """#pragma once
#include <stdint.h>
typedef uint32_t cuuint32_t;
typedef uint64_t cuuint64_t;
typedef struct CUtensorMap_st { alignas(64) cuuint64_t opaque[16]; } CUtensorMap;
"""
_NOTHING = "#pragma once\n"  # printf, assert, memcpy and the functions of <math.h> are there without
_OURS = "#include <cuda/std/{0}>\nnamespace std {{ using namespace cuda::std; }}\n"
_HEADERS = {
    **{name: _OURS.format(name) for name in ("array", "limits", "tuple", "type_traits", "utility", "initializer_list")},
    "mlsys_nvrtc.h": _FIRST,
    "cuda.h": _CUDA_H,
    **dict.fromkeys(("stdint.h", "cstdint"), _INTEGERS),
    **dict.fromkeys(("limits.h", "climits"), _LIMITS),
    **dict.fromkeys(("float.h", "cfloat"), _FLOATS),
    **dict.fromkeys(("math.h", "cmath", "stdio.h", "cstdio", "stdlib.h", "cstdlib", "string.h", "cstring"), _NOTHING),
    **dict.fromkeys(("assert.h", "cassert", "stddef.h", "cstddef"), _NOTHING),
}


class NoNVRTC(RuntimeError):
    """NVRTC, or CUDA's headers, are not installed."""


@dataclass(frozen=True)
class Toolkit:
    """An NVRTC, its version, and where CUDA's headers are."""

    file: Path
    version: tuple[int, int]
    includes: tuple[Path, ...]

    def __str__(self) -> str:
        return "NVRTC {}.{}".format(*self.version)


@dataclass(frozen=True)
class Compiled:
    """Kernels for one architecture: machine code, the PTX it was made from, mangled names, the compiler's log."""

    arch: str
    cubin: bytes
    ptx: str
    names: dict[str, str]
    log: str
    compiler: str


def compile(
    text: str,
    path: Path,
    instances: Sequence[str],
    arch: str,
    *,
    includes: Sequence[Path] = (),
    toolkit: Toolkit | None = None,
) -> Compiled:
    """Compile the kernels `instances` of a file, `sgemm<32>` or `reduce`, for an architecture such as `sm_90a`.

    text: of the file; path: what errors call it, and whose folder is searched for headers first. toolkit: the newest
    if None. CompileError with the compiler's words; NoNVRTC if there is no compiler; ValueError for an architecture
    that it does not know.
    """
    toolkit = toolkit or newest()
    folders = [path.parent, *includes, INCLUDE]
    options = [*_OPTIONS, f"--gpu-architecture={arch}", *(f"--include-path={f}" for f in [*folders, *toolkit.includes])]
    key = _hash(text, str(path), *instances, *options, str(toolkit), *_included(text, folders))
    kept = folder() / f"{path.stem}-{arch}-{key}.json"
    compiled = _read(kept)
    if compiled is None:
        known = architectures(toolkit)
        if arch not in known:
            raise ValueError(f"arch must be one that {toolkit} knows, {', '.join(known)}, got {arch!r}")
        compiled = _Program(toolkit, text, path).compile(instances, arch, options)
        _write(kept, compiled)
    return compiled


def newest(most: int | None = None) -> Toolkit:
    """The newest NVRTC that is installed, of a major version up to `most`. NoNVRTC says how to get one."""
    found = [t for t in toolkits() if most is None or t.version[0] <= most]
    if not found:
        have = (
            f"; there is {', '.join(map(str, toolkits()))}, too new for a driver of CUDA {most}" if toolkits() else ""
        )
        wheel = "nvidia-cuda-nvrtc" if most is None or most >= 13 else f"nvidia-cuda-nvrtc-cu{most}"
        raise NoNVRTC(f"compiling for a GPU needs NVRTC, the wheel {wheel}, on Linux: {INSTALL}{have}")
    return max(found, key=lambda t: t.version)


@cache
def toolkits() -> tuple[Toolkit, ...]:
    """What is installed. Wheels of CUDA 13 share one folder, `nvidia/cu13`; those of CUDA 12 have one each."""
    found = []
    for root in _roots():
        for library in sorted([*root.glob("cu[0-9]*/lib/libnvrtc.so.*"), *root.glob("cuda_nvrtc/lib/libnvrtc.so.*")]):
            home = library.parent.parent
            if home.name == "cuda_nvrtc":
                own = [root / part / "include" for part in ("cuda_runtime", "cuda_nvcc", "cuda_cccl")]
            else:
                own = [home / "include", home / "include" / "cccl"]
            found.append(Toolkit(library, _version(library), tuple(own)))
    return tuple(found)


@cache
def architectures(toolkit: Toolkit) -> tuple[str, ...]:
    """What it compiles for; an architecture's own instructions have its name with an `a`, from sm_90a on."""
    library = _library(toolkit.file)
    count = ctypes.c_int()
    _call(library, "nvrtcGetNumSupportedArchs", ctypes.byref(count))
    numbers = (ctypes.c_int * count.value)()
    _call(library, "nvrtcGetSupportedArchs", numbers)
    return tuple(f"sm_{n}{own}" for n in numbers for own in (("", "a") if n >= 90 else ("",)))


class _Program:
    """One compilation: NVRTC's own object, and the calls on it."""

    def __init__(self, toolkit: Toolkit, text: str, path: Path) -> None:
        self.toolkit, self.nvrtc, self.path = toolkit, _library(toolkit.file), path
        self.handle = ctypes.c_void_p()
        self._text = text.encode()

    def compile(self, instances: Sequence[str], arch: str, options: Sequence[str]) -> Compiled:
        _call(
            self.nvrtc, "nvrtcCreateProgram", ctypes.byref(self.handle), self._text, str(self.path).encode(),
            len(_HEADERS), _strings(_HEADERS.values()), _strings(_HEADERS),
        )  # fmt: skip
        try:
            for instance in instances:
                self.call("nvrtcAddNameExpression", instance.encode())
            status = self.nvrtc.nvrtcCompileProgram(self.handle, len(options), _strings(options))
            log = self.output("nvrtcGetProgramLog").rstrip(b"\0").decode(errors="replace")
            if status:
                raise CompileError(self.complaint(status, log, arch))
            names = {}
            for instance in instances:
                name = ctypes.c_char_p()
                self.call("nvrtcGetLoweredName", instance.encode(), ctypes.byref(name))
                names[instance] = (name.value or b"").decode()
            ptx = self.output("nvrtcGetPTX").rstrip(b"\0").decode()
            return Compiled(arch, self.output("nvrtcGetCUBIN"), ptx, names, log, str(self.toolkit))
        finally:
            self.nvrtc.nvrtcDestroyProgram(ctypes.byref(self.handle))

    def call(self, name: str, *args: object) -> None:
        _call(self.nvrtc, name, self.handle, *args)

    def output(self, name: str) -> bytes:
        size = ctypes.c_size_t()
        self.call(f"{name}Size", ctypes.byref(size))
        out = ctypes.create_string_buffer(size.value)
        self.call(name, out)
        return out.raw

    def complaint(self, status: int, log: str, arch: str) -> str:
        words = _NOISE.sub("", log).strip() or _message(self.nvrtc, status)
        return f"{self.toolkit} refused {self.path.name} for {arch}:\n{words}{self.hint(words)}"

    def hint(self, words: str) -> str:
        missing = re.search(r'cannot open source file "([^"]+)"', words)
        if missing and re.match(r"(cuda|mma\.h|crt/|cooperative_groups|nv/)", missing[1]):
            return f"\n{missing[1]} is CUDA's: {INSTALL} brings its headers"
        if missing and any((folder / "cuda" / "std" / missing[1]).is_file() for folder in self.toolkit.includes):
            return f"\nNVRTC has no C++ standard library: include <cuda/std/{missing[1]}>, whose names are in cuda::std"
        if missing and "." not in missing[1]:
            return "\nNVRTC has no C++ standard library"
        if "JIT mode" in words:
            return "\na kernel file has no host code, unless #ifndef MLSYS stands before it and #endif after it"
        return ""


def _roots() -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    return [Path(p) for p in spec.submodule_search_locations or ()] if spec else []


@cache
def _library(path: Path) -> ctypes.CDLL:
    # the library opens its builtins by name alone: they must be there already, or on the loader's path
    for builtins in sorted(path.parent.glob("libnvrtc-builtins.so.*")):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(path))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def _version(path: Path) -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _call(_library(path), "nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def _call(library: ctypes.CDLL, name: str, *args: object) -> None:
    status = getattr(library, name)(*args)
    if status:
        raise CompileError(f"{name}: {_message(library, status)}")


def _message(library: ctypes.CDLL, status: int) -> str:
    return (library.nvrtcGetErrorString(status) or b"").decode() or f"error {status}"


def _strings(texts: object) -> ctypes.Array[ctypes.c_char_p]:
    encoded = [t.encode() for t in texts]  # type: ignore[attr-defined]
    return (ctypes.c_char_p * len(encoded))(*encoded)


def _included(text: str, folders: Sequence[Path]) -> list[str]:
    """The text of each header that is included from these folders, directly or not; CUDA's change with its version."""
    seen: dict[Path, str] = {}
    waiting = [text]
    while waiting:
        for name in _INCLUDED.findall(waiting.pop()):
            for path in (f / name for f in folders):
                if path.is_file() and path not in seen:
                    seen[path] = path.read_text(encoding="utf-8", errors="replace")
                    waiting.append(seen[path])
    return [f"{path}\n{seen[path]}" for path in sorted(seen)]


def _hash(*parts: str) -> str:
    digest = hashlib.sha256(f"{_FORMAT}\0{sorted(_HEADERS.items())}\0".encode())
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def _write(path: Path, compiled: Compiled) -> None:
    write_atomic(path, json.dumps({**vars(compiled), "cubin": base64.b64encode(compiled.cubin).decode()}))


def _read(path: Path) -> Compiled | None:
    try:
        kept = json.loads(path.read_bytes())
        return Compiled(**{**kept, "cubin": base64.b64decode(kept["cubin"], validate=True)})
    except (OSError, ValueError, TypeError, KeyError, binascii.Error):  # not there, or not ours: compile again
        return None
