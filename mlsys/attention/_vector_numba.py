"""2^x, the largest of a row, and bfloat16, written so that numba's compiler makes vector instructions of them.

2^x: split x = n + f with n whole and |f| ≤ 1/2. A polynomial of degree 6 gives 2^f to 3e-9, less than float32 can
tell, and 2^n is n in the exponent's bits: 16 numbers take some 20 instructions.

Maximum: the compiler does not vectorize that of floats, since a NaN among them would depend on the order. It does so
with integers, and the bits of floats are integers in the same order, or, if all are negative, in the opposite one: so
the largest and the smallest integer are kept, of which one is the largest float.

bfloat16 is the upper half of a float32. numba has no type for it: it is read as uint16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

Array = Any  # (columns,)

# 2^f for |f| ≤ 1/2, from the constant term up
_C0, _C1, _C2, _C3, _C4, _C5, _C6 = (
    np.polynomial.Chebyshev.interpolate(np.exp2, 6, domain=[-0.5, 0.5])
    .convert(kind=np.polynomial.Polynomial)
    .coef.astype(np.float32)
)
_LEAST = np.float32(-127)  # 2^x is 0 from here down, and so is 2^−∞
_BIAS, _MANTISSA_BITS = np.int32(127), np.int32(23)
_HALF, _JUST_BELOW_HALF = np.int32(16), np.int32(0x7FFF)  # of the bits of a float32
_LOWEST = np.float32(-np.inf)
_LOG2E = np.float32(np.log2(np.e))
# Sums in any order and fused multiply-adds; NaN and infinity keep their meaning
REORDERED = {"reassoc", "contract", "nsz"}


@njit(cache=True, nogil=True, fastmath=REORDERED, inline="always")
def exp2(x: np.float32) -> np.float32:
    """2^x, to three roundings; 0 below −127."""
    x = _LEAST if x < _LEAST else x  # NaN is not less than anything and stays
    n = np.rint(x)
    f = x - n
    power = _C0 + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
    return power * np.int32((np.int32(n) + _BIAS) << _MANTISSA_BITS).view(np.float32)


@njit(cache=True, nogil=True)
def largest(bits: Array, so_far: np.float32) -> np.float32:
    """The larger of `so_far` and the floats with these bits, int32."""
    high, low = np.int32(-(2**31)), np.int32(2**31 - 1)
    for j in range(bits.shape[0]):
        high = bits[j] if bits[j] > high else high
        low = bits[j] if bits[j] < low else low
    top = np.int32(high if high >= 0 else low).view(np.float32)
    return so_far if bits.shape[0] == 0 or top < so_far else top


@njit(cache=True, nogil=True)
def _largest_bfloat16(bits: Array) -> np.float32:
    """The largest of the bfloat16 with these bits, of which there is at least one."""
    high, low = np.int16(-(2**15)), np.int16(2**15 - 1)
    for j in range(bits.shape[0]):
        x = np.int16(bits[j])
        high = x if x > high else high
        low = x if x < low else low
    return _bfloat16(np.int16(high if high >= 0 else low))


@njit(cache=True, nogil=True, inline="always")
def _bfloat16(bits: Any) -> np.float32:
    return np.int32(np.int32(bits) << _HALF).view(np.float32)


@njit(cache=True, nogil=True, inline="always")
def _to_bfloat16(x: np.float32) -> np.uint16:
    """Rounded to the nearest, a tie to the even one; a NaN must have a lower half of zeros."""
    bits = np.float32(x).view(np.int32)
    return np.uint16((bits + _JUST_BELOW_HALF + ((bits >> _HALF) & np.int32(1))) >> _HALF)


# --- of float32, and of bfloat16 as uint16 ----------------------------------------------------------------------------


# The bodies are for NUMBA_DISABLE_JIT=1; compiled code takes the one for its type below.


def peak(row: Array) -> np.float32:
    """The largest of a row, −∞ if there are none."""
    if row.dtype == np.uint16:
        return _largest_bfloat16(row) if row.shape[0] else _LOWEST
    return largest(row.view(np.int32), _LOWEST)


def number(x: Any) -> np.float32:
    """What is stored, as float32."""
    return _bfloat16(x) if isinstance(x, np.uint16) else x


def stored(x: np.float32, like: Any) -> Any:
    """A float32 as what is stored."""
    return _to_bfloat16(x) if isinstance(like, np.uint16) else x


def in_log2(x: Any, like: Any) -> Any:
    """A score from natural units to those of log 2 where `like` is bfloat16; float32 is in those already."""
    return x * _LOG2E if like.dtype == np.uint16 else x


@overload(peak)
def _peak(row: Any) -> Any:
    def of_bfloat16(row: Any) -> Any:
        return _largest_bfloat16(row) if row.shape[0] else _LOWEST

    def of_float32(row: Any) -> Any:
        return largest(row.view(np.int32), _LOWEST)

    return of_bfloat16 if row.dtype == types.uint16 else of_float32


@overload(number, inline="always")
def _number(x: Any) -> Any:
    def of_bfloat16(x: Any) -> Any:
        return _bfloat16(x)

    def of_float32(x: Any) -> Any:
        return x

    return of_bfloat16 if x == types.uint16 else of_float32


@overload(in_log2, inline="always")
def _in_log2(x: Any, like: Any) -> Any:
    def of_bfloat16(x: Any, like: Any) -> Any:
        return x * _LOG2E

    def of_float32(x: Any, like: Any) -> Any:
        return x

    return of_bfloat16 if like.dtype == types.uint16 else of_float32


@overload(stored, inline="always")
def _stored(x: Any, like: Any) -> Any:
    def as_bfloat16(x: Any, like: Any) -> Any:
        return _to_bfloat16(x)

    def as_float32(x: Any, like: Any) -> Any:
        return x

    return as_bfloat16 if like == types.uint16 else as_float32
