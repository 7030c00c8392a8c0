"""The compiled half of `qlinear`: builds _native.cpp on first use, and hands weights to it.

The library is kept in the cache folder under a hash of its source, flags, compiler and processor, so that it is never
stale there, and may be deleted at any time. Nothing else outlives a call.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import secrets
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mlsys.files import cache_folder
from mlsys.quant._tensor import QuantizedTensor
from mlsys.quant.formats import FLOATS, Codebook, Integer, Minifloat
from mlsys.quant.packing import pack

SOURCE = Path(__file__).with_name("_native.cpp")
_ARM = platform.machine() in ("aarch64", "arm64")
# Sums may be taken in any order, or no loop of them would be vectorised; NaN and infinity stay what they are.
_REORDER = ("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros")
_NATIVE = "-mcpu=native" if _ARM else "-march=native"
_FLAGS = ("-std=c++17", "-O3", _NATIVE, *_REORDER, "-fPIC", "-shared", "-pthread", "-fvisibility=hidden")

BYTE, NIBBLE, E5M2, E4M3 = range(4)
_STORED = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
_NONE, _E8M0, _FP8, _U8 = 0, 4, 5, 6


class NotBuilt(RuntimeError):
    """There is no compiled library here: no compiler, or one that refused; says what to do."""


class _Weight(ctypes.Structure):
    """As in _native.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "zero", "table")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "stride", "group", "groups")),
        *((name, ctypes.c_int32) for name in ("shared_scale", "kind", "scale_type", "zero_type", "is_signed")),
        *((name, ctypes.c_float) for name in ("factor", "centre")),
    )


@dataclass(frozen=True, eq=False)
class Weight:
    """A quantized matrix as the library reads it: one of 4 or 8 bits a weight.

    kept: the tensors that `record` points into; most are those of the QuantizedTensor, not copies.
    """

    record: _Weight = field(repr=False)  # addresses
    kept: tuple[Tensor, ...]
    kind: int

    @property
    def integers(self) -> bool:
        """Whether its codes are integers that can be multiplied with integers."""
        return self.kind == BYTE or (self.kind == NIBBLE and bool(self.record.centre or self.record.is_signed))


def weight(qw: QuantizedTensor) -> Weight:
    """How the library reads `qw`. ValueError, saying why, for a format that it does not."""
    scheme, element = qw.scheme, qw.scheme.element
    if qw.zero is not None and not scheme.affine:
        raise ValueError("zero points that are added after scaling are not compiled")
    table, signed, centre = None, False, 0.0
    if isinstance(element, Integer):
        signed = element.signed
        if element.bits <= 4:
            kind = NIBBLE
            # Signed and unsigned codes alike are read as four bits, so that a product of integers can use the same
            table = torch.arange(16.0) if not signed else (torch.arange(16.0) + 8) % 16
            table, centre = table - 8, 0.0 if signed else 8.0
            codes = qw.codes
            if element.bits < 4:
                wide = element.decode(qw.unpacked()).to(torch.int16) if signed else qw.unpacked()
                codes = pack((wide & 15).to(torch.uint8), 4)
        else:
            kind, centre, codes = BYTE, 0.0 if signed else 128.0, qw.codes
            if element.bits < 8:  # all of them are numbers of 8 signed bits
                codes = element.decode(qw.unpacked()).to(torch.int8).view(torch.uint8)
                signed, centre = True, 0.0
    elif isinstance(element, Codebook | Minifloat) and element.bits == 4:
        kind, table, codes = NIBBLE, element.table.clone(), qw.codes
    elif isinstance(element, Minifloat) and element.bits in (6, 8):
        # 6 bits are a part of the format of 8 that has as long a mantissa
        wider = {"e2m3": "e4m3", "e3m2": "e5m2"}.get(element.name, element.name)
        kind = E4M3 if wider == "e4m3" else E5M2
        codes = qw.codes if wider == element.name else FLOATS[wider].encode(element.decode(qw.unpacked()))
    elif isinstance(element, Codebook):
        raise ValueError(f"{element.name} has a table of {len(element.values)} numbers: a register holds 16")
    else:
        raise ValueError(f"{element.name} is no format of 8 bits or fewer: torch multiplies it as it is")

    factor, scale, scale_type = 1.0, qw.scale, _NONE
    if isinstance(scale, QuantizedTensor) and scheme.scales == "e4m3":
        assert isinstance(scale.scale, Tensor)
        factor, scale, scale_type = float(scale.scale), scale.codes, _FP8
    elif isinstance(scale, QuantizedTensor):
        scale, scale_type = qw.scales(), _STORED[torch.float32]
    elif scheme.scales == "e8m0":
        scale_type = _E8M0
    elif scale is not None:
        scale_type = _STORED[scale.dtype]
    zero = qw.zero
    if zero is not None and zero.dtype not in (*_STORED, torch.uint8):
        zero = zero.float()
    zero_type = _NONE if zero is None else _STORED.get(zero.dtype, _U8)

    one = scheme.groups(qw.columns) <= 1
    kept = tuple(t.detach().contiguous() if t is not None else None for t in (codes, scale, zero, table))
    record = _Weight(
        *(None if t is None else t.data_ptr() for t in kept),
        qw.rows, qw.columns, codes.shape[1],
        qw.columns if one else scheme.group_size(qw.columns), scheme.groups(qw.columns),
        scale is not None and scale.shape[0] == 1 and qw.rows > 1, kind, scale_type, zero_type, signed,
        factor, centre,
    )  # fmt: skip
    return Weight(record, tuple(t for t in kept if t is not None), kind)


def use_large_pages(w: Weight) -> None:
    """Have the system keep the codes in pages of 2 MiB, if it can; they stay where they are."""
    codes = w.kept[0]
    _library().use_large_pages(codes.data_ptr(), codes.nbytes)


def float_linear(x: Tensor, w: Weight) -> Tensor:
    """From x float32 (M, K), rows one after the other: x Ŵᵀ, float32 (M, N)."""
    y = x.new_empty(len(x), w.record.rows)
    _library().float_linear(ctypes.byref(w.record), x.data_ptr(), len(x), y.data_ptr(), torch.get_num_threads())
    return y


def int8_linear(x: Tensor, w: Weight) -> Tensor:
    """The same, of x rounded to integers with a scale for each row."""
    codes, scale = quantize_rows(x)
    y = x.new_empty(len(x), w.record.rows)
    _library().int8_linear(
        ctypes.byref(w.record), codes.data_ptr(), scale.data_ptr(), len(x), y.data_ptr(), torch.get_num_threads()
    )
    return y


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """From x float32 (M, K): int8 (M, K) and scales (M, 1)."""
    codes, scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(len(x), 1)
    _library().quantize_rows(x.data_ptr(), len(x), x.shape[1], codes.data_ptr(), scale.data_ptr())
    return codes, scale


def dequantize(w: Weight, first: int, last: int, out: Tensor) -> Tensor:
    """Rows first … last − 1 of Ŵ, in `out`, float32 or bfloat16 (≥ last − first, K)."""
    narrow = out.dtype == torch.bfloat16
    _library().dequantize(ctypes.byref(w.record), first, last, out.data_ptr(), narrow, torch.get_num_threads())
    return out[: last - first]


def vectorised(w: Weight, integers: bool) -> bool:
    """Whether products with it run on AVX-512 (and VNNI, of integers) here; else in plain loops."""
    return bool(_library().vectorised(ctypes.byref(w.record), integers))


def in_fixed_point(w: Weight) -> bool:
    """Whether one row of float x is written in fixed point here, and multiplied with `w` as integers."""
    return bool(_library().fixed_point(ctypes.byref(w.record)))


def has_vnni() -> bool:
    """Whether the library was compiled for AVX-512 with VNNI."""
    return bool(_library().features() & 2)


def has_avx512() -> bool:
    """Whether the library was compiled for AVX-512."""
    return bool(_library().features() & 1)


def missing() -> str | None:
    """Why there is no compiled library, or None. Builds it, if it is not there."""
    try:
        _library()
    except NotBuilt as why:
        return str(why)
    return None


@cache
def _library() -> ctypes.CDLL:
    path = build()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NotBuilt(
            f"{path} cannot be loaded ({error}): set MLSYS_CACHE to a folder that programs may run from"
        ) from None
    pointer, whole, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    for name, arguments, result in (
        ("features", (), flag),
        ("vectorised", (pointer, flag), flag),
        ("fixed_point", (pointer,), flag),
        ("float_linear", (pointer, pointer, whole, pointer, whole), None),
        ("int8_linear", (pointer, pointer, pointer, whole, pointer, whole), None),
        ("dequantize", (pointer, whole, whole, pointer, flag, whole), None),
        ("use_large_pages", (pointer, whole), None),
        ("quantize_rows", (pointer, whole, whole, pointer, pointer), None),
    ):
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library


def build() -> Path:
    """The library; compiled if it is not in the cache (about ten seconds, once a machine). NotBuilt if that fails."""
    if sys.platform == "win32":
        raise NotBuilt("the compiled kernels are for Linux and macOS")
    compiler = _compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    source = SOURCE.read_text(encoding="utf-8")
    digest = hashlib.sha256("\0".join([source, *_FLAGS, version, _processor(compiler)]).encode())
    folder = cache_folder() / "quant"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NotBuilt(f"the cache folder cannot be made ({error}): set MLSYS_CACHE to one that can") from None
    target = folder / f"native-{digest.hexdigest()[:16]}.so"
    if not target.is_file():
        temporary = target.with_name(f".{secrets.token_hex(6)}.{target.name}")
        try:
            command = [compiler, *_FLAGS, str(SOURCE), "-o", str(temporary)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise NotBuilt(f"{compiler} refused {SOURCE.name}: {done.stderr.strip()[:500]}")
            os.replace(temporary, target)  # noqa: PTH105  (two processes may build the same: the last one wins)
        finally:
            temporary.unlink(missing_ok=True)
    return target


def _compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "clang++"]:
        if found := shutil.which(name):
            return found
    raise NotBuilt(
        f"there is no C++ compiler ({wanted or 'g++ or clang++'}): install one (Debian, Ubuntu: apt install g++), or "
        "name it in the environment variable CXX"
    )


def _processor(compiler: str) -> str:
    """What "native" means here, in the compiler's words."""
    said = subprocess.run(
        [compiler, _NATIVE, "-E", "-v", "-x", "c++", os.devnull], capture_output=True, text=True, check=False
    ).stderr
    return "\n".join([platform.machine(), *(line for line in said.splitlines() if "cc1" in line)])
