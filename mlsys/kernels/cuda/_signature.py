"""What a compiled kernel's parameters are, in the codes of mlsys_module.h: `f4`, `*cf4`, `s128`.

On a processor the compiler writes the codes itself. For a GPU they are read from what NVRTC leaves: the mangled name
has the types as the compiler understood them (a template's arguments filled in, typedefs resolved), and the PTX has
their sizes. A kernel that is `extern "C"` has no types in its name: then the file's own words are taken.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from functools import cache

from mlsys.kernels.cuda._source import Declared

_CODES = {
    "bool": "?1", "char": "i1", "signed char": "i1", "unsigned char": "u1", "short": "i2", "unsigned short": "u2",
    "int": "i4", "unsigned int": "u4", "unsigned": "u4", "long": "i8", "unsigned long": "u8", "long long": "i8",
    "unsigned long long": "u8", "float": "f4", "double": "f8", "void": "void",
    "__half": "h2", "half": "h2", "__nv_bfloat16": "b2", "nv_bfloat16": "b2", "__half2": "v2h2", "half2": "v2h2",
    "__nv_bfloat162": "v2b2", "nv_bfloat162": "v2b2", "size_t": "u8", "ptrdiff_t": "i8", "uint": "u4",
    **{f"{sign}int{8 * n}_t": f"{sign or 'i'}{n}" for sign in ("", "u") for n in (1, 2, 4, 8)},
    **{f"{name}{n}": f"v{n}{code}" for name, code, sizes in (
        ("float", "f4", "234"), ("double", "f8", "2"), ("int", "i4", "24"), ("uint", "u4", "24"), ("char", "i1", "4"),
        ("uchar", "u1", "4")) for n in sizes},
}  # fmt: skip
_SPECIFIERS = re.compile(r"\b(const|volatile|__restrict__|__restrict|struct|enum|class)\b")


def codes(mangled: str, ptx: str, declared: Declared) -> list[str]:
    """The codes of a kernel's parameters. ValueError if the PTX has another number of them, or no such kernel."""
    sizes = parameter_sizes(ptx, mangled)
    types = _types(demangled(mangled)) if mangled.startswith("_Z") else [p.type for p in declared.parameters]
    if len(types) != len(sizes):
        raise ValueError(f"{declared} has {len(types)} parameters by its name, and {len(sizes)} by its code")
    return [_by_value(code(t), *size) for t, size in zip(types, sizes, strict=True)]


def code(type_: str) -> str:
    """The code of a type as C++ spells it, `float const*` or `const float *`; `s` for one that only its file knows."""
    text = type_.strip()
    while True:
        text = re.sub(r"(\bconst|\bvolatile|__restrict__|__restrict)$", "", text).rstrip()
        if not text.endswith("*"):
            break
        pointee = text[:-1].rstrip()
        return f"*{'c' if _is_const(pointee) else ''}{code(pointee)}"
    plain = " ".join(_SPECIFIERS.sub(" ", text).split())
    if plain in _CODES:
        return _CODES[plain]
    words = sorted(plain.split())  # `long unsigned int` and its like, in any order
    if set(words) <= {"unsigned", "signed", "int", "long", "short", "char"}:
        size = 1 if "char" in words else 2 if "short" in words else 8 if "long" in words else 4
        return f"{'u' if 'unsigned' in words else 'i'}{size}"
    return "s"


def parameter_sizes(ptx: str, mangled: str) -> list[tuple[int, bool]]:
    """Of each parameter of a kernel in PTX: bytes, and whether it is an array of bytes, as structures are."""
    found = re.search(rf"\.entry\s+{re.escape(mangled)}\s*\(([^)]*)\)", ptx) or re.search(
        rf"\.entry\s+{re.escape(mangled)}\s*()(?=[\s.{{])", ptx
    )
    if found is None:
        raise ValueError(f"there is no kernel {mangled} in the compiled code")
    sizes = []
    for parameter in re.findall(r"\.param\b[^,]*", found[1]):
        bits, length = re.search(r"\.[bufs](8|16|32|64)\b", parameter), re.search(r"\[(\d+)\]", parameter)
        count = int(length[1]) if length else 1
        sizes.append((int(bits[1]) // 8 * count if bits else 0, length is not None))
    return sizes


@cache
def demangled(name: str) -> str:
    """The C++ name behind a mangled one: `void sgemm<32>(int, float const*)`. ValueError if it is none."""
    library = ctypes.CDLL("libstdc++.so.6")  # torch needs it too, so it is there
    demangle, free = library.__cxa_demangle, ctypes.CDLL(None).free
    demangle.restype, demangle.argtypes = ctypes.c_void_p, [ctypes.c_char_p, *[ctypes.c_void_p] * 3]
    free.argtypes = [ctypes.c_void_p]
    status = ctypes.c_int()
    text = demangle(name.encode(), None, None, ctypes.addressof(status))
    if not text:
        raise ValueError(f"{name!r} is no mangled name")
    try:
        return ctypes.string_at(text).decode()
    finally:
        free(text)


def _types(signature: str) -> list[str]:
    """Of `void f<(int)3>(int, float const*)`: what stands in the last brackets, at its commas."""
    depth, start = 0, len(signature)
    for start in range(len(signature) - 1, -1, -1):
        depth += (signature[start] == ")") - (signature[start] == "(")
        if depth == 0:
            break
    return [t for t in _split(signature[start + 1 : -1]) if t != "void"]


def _split(text: str) -> Sequence[str]:
    parts, depth, last = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "(<[{") - (c in ")>]}")
        if c == "," and depth == 0:
            parts.append(text[last:i].strip())
            last = i + 1
    return [part for part in [*parts, text[last:].strip()] if part]


def _is_const(pointee: str) -> bool:
    """Of what is pointed to: `float const`, `const float`, `float *const`, but not `const float *`."""
    return bool(re.search(r"\bconst( (volatile|__restrict__))?$", pointee)) or (
        "*" not in pointee and bool(re.search(r"\bconst\b", _outside(pointee)))
    )


def _outside(text: str) -> str:
    """Without template arguments."""
    return re.sub(r"<.*>", "", text)


def _by_value(code_: str, size: int, structure: bool) -> str:
    return (
        (f"s{size}" if structure else f"i{size}") if code_ == "s" else code_
    )  # what is no structure is an enumeration
