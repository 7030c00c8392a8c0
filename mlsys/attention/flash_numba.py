"""Flash attention with compiled sweeps: what happens to a tile between the matmuls is one pass instead of eight.

The matmuls of `flash` are BLAS and hard to beat. Between them torch walks over the tile
of scores once for each operation: hide the future, take the maximum, subtract it, raise 2
to it, sum up; 2 MB each time, which do not fit in the second-level cache. Here a row of a
tile, 4 KB, goes through all of it while it lies in the first-level cache, and what a query
does not see is not computed at all:

    forward     m' = max(m, max Sᵢ)     Pᵢⱼ = 2^(Sᵢⱼ − m')     z ← z · 2^(m − m') + Σⱼ Pᵢⱼ
    backward    Pᵢⱼ = 2^(Sᵢⱼ − Lᵢ)      dSᵢⱼ = Pᵢⱼ · (dPᵢⱼ − Dᵢ)

Half of torch's time went into 2^x, worked out to the last bit. Split x = n + f with n whole
and |f| ≤ 1/2: a polynomial of degree 6 gives 2^f to 3e-9, less than float32 can tell, and
2^n is n in the exponent's bits. 16 numbers take some 20 instructions.

The compiler does not turn a maximum of floats into vector instructions, since a NaN among
them would depend on the order. It does so with integers, and the bits of floats are
integers in the same order once negative ones are flipped.

Everything else is `flash`'s own code: the loops, the tiles, the options. Soft-cap, ALiBi and
masks change a tile in torch before the sweep. float64, and tensors on a GPU, take `flash`'s
sweeps: nothing is gained there. So does bfloat16 without options: torch's row softmax.

Cost:
    `flash`'s FLOPs; between the matmuls one read and one write of each tile. Compiled once
    a machine, about two seconds, and kept in numba's cache.

Memory:
    `flash`'s, with half or a quarter of its tile: there are no more fixed costs in Python for
    a wide one to spread.

Where it loses: below some 1000 keys the walk over heads in Python still shows. In the forward pass torch's
kernel is as fast: both are bound by the matmuls. Any change to the sweeps has to be made twice.

Papers:
    Dao 2023, arXiv:2307.08691, section 3.1 (fewer operations that are no matmul).
    Cody & Waite 1980, "Software Manual for the Elementary Functions" (reduce the argument, then a polynomial).

See also:
    `mlsys.attention.flash` (the loops, readable), `mlsys.attention.naive` (the formula).
"""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

import numpy as np
import torch
from numba import njit
from torch import Tensor

from mlsys.attention import flash
from mlsys.attention._flash_scores import Blocks, Plan, Sweeps, TileOptions, change, edges
from mlsys.attention._flash_tiles import Tile

# The best of a grid at head_dim 64. A tile, in the backward pass two, fills 1 MB of L2.
BLOCKS = Blocks(full=(512, 512), band=(256, 1024), backward=(256, 512))

# 2^f for |f| ≤ 1/2, from the constant term up
_C0, _C1, _C2, _C3, _C4, _C5, _C6 = (
    np.polynomial.Chebyshev.interpolate(np.exp2, 6, domain=[-0.5, 0.5])
    .convert(kind=np.polynomial.Polynomial)
    .coef.astype(np.float32)
)
_LEAST = np.float32(-127)  # 2^x is 0 from here down, and so is 2^−∞
_BIAS, _MANTISSA_BITS, _SIGN_BIT, _ALL_BUT_SIGN = np.int32(127), np.int32(23), np.int32(31), np.int32(2**31 - 1)
# Sums in any order and fused multiply-adds; NaN and infinity keep their meaning
_FAST = {"reassoc", "contract", "nsz"}


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False, **options: Unpack[TileOptions]
) -> Tensor: ...


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[TileOptions]
) -> tuple[Tensor, Tensor]: ...


def attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, **options: Any) -> Any:
    """`flash.attention`, with its arguments, results and errors; tiles that are not asked for are those of `BLOCKS`."""
    return flash.attention(q, k, v, return_lse=return_lse, sweeps=_SWEEPS, **options)  # type: ignore[call-overload]


def _softmax_sweep(scores: Tensor, state: Tensor, tile: Tile, plan: Plan) -> None:
    if not _compiled_for(scores):
        flash.SWEEPS.softmax(scores, state, tile, plan)
        return
    change(scores, tile, plan)
    _softmax_rows(scores.numpy(), state.numpy(), scores.shape[0] // plan.group, *edges(tile, plan))


def _gradient_sweep(scores: Tensor, dp: Tensor, lse: Tensor, delta: Tensor, tile: Tile, plan: Plan) -> None:
    if not _compiled_for(scores):
        flash.SWEEPS.gradient(scores, dp, lse, delta, tile, plan)
        return
    slope = change(scores, tile, plan, derivative=True)
    shift, mean = lse.view(-1).numpy(), delta.view(-1).numpy()
    _gradient_rows(scores.numpy(), dp.numpy(), shift, mean, scores.shape[0] // plan.group, *edges(tile, plan))
    if slope is not None:
        dp.mul_(slope)


_SWEEPS = Sweeps(_softmax_sweep, _gradient_sweep, BLOCKS)


def _compiled_for(scores: Tensor) -> bool:
    return scores.dtype == torch.float32 and scores.device.type == "cpu"


# --- compiled ---------------------------------------------------------------------------------------------------------

Array = Any  # (rows, columns) or (rows,), float32


@njit(cache=True, nogil=True, fastmath=_FAST)
def _softmax_rows(s: Array, state: Array, rows: int, first: int, last: int) -> None:
    """P in place of S, and m, z and 2^(m − m') of each row; row r of each head sees columns first + r … last + r."""
    m, z, rescale = state[0, :, 0], state[1, :, 0], state[2, :, 0]
    for i in range(s.shape[0]):
        start, stop = _visible(i % rows, s.shape[1], first, last)
        row = s[i, start:stop]
        top = _largest(row.view(np.int32), m[i])
        total = np.float32(0)
        for j in range(row.shape[0]):
            p = _exp2(row[j] - top)
            row[j] = p
            total += p
        rescale[i] = _exp2(m[i] - top)
        z[i] = z[i] * rescale[i] + total
        m[i] = top
        s[i, :start] = 0
        s[i, stop:] = 0


@njit(cache=True, nogil=True, fastmath=_FAST)
def _gradient_rows(s: Array, dp: Array, lse: Array, delta: Array, rows: int, first: int, last: int) -> None:
    """P in place of S and dS in place of dP."""
    for i in range(s.shape[0]):
        start, stop = _visible(i % rows, s.shape[1], first, last)
        row, drow = s[i, start:stop], dp[i, start:stop]
        shift, mean = lse[i], delta[i]
        for j in range(row.shape[0]):
            p = _exp2(row[j] - shift)
            row[j] = p
            drow[j] = (drow[j] - mean) * p
        for x in (s, dp):
            x[i, :start] = 0
            x[i, stop:] = 0


@njit(cache=True, nogil=True)
def _visible(row: int, columns: int, first: int, last: int) -> tuple[int, int]:
    start = min(max(0, first + row), columns)
    return start, max(start, min(columns, last + row + 1))


@njit(cache=True, nogil=True, fastmath=_FAST, inline="always")
def _exp2(x: np.float32) -> np.float32:
    x = _LEAST if x < _LEAST else x  # NaN is not less than anything and stays
    n = np.rint(x)
    f = x - n
    power = _C0 + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
    return power * np.int32((np.int32(n) + _BIAS) << _MANTISSA_BITS).view(np.float32)


@njit(cache=True, nogil=True)
def _largest(bits: Array, so_far: np.float32) -> np.float32:
    """The larger of `so_far` and the floats with these bits."""
    top = np.int32(-(2**31))
    for j in range(bits.shape[0]):
        ordered = _ordered(bits[j])
        top = ordered if ordered > top else top
    largest = _ordered(top).view(np.float32)
    return so_far if bits.shape[0] == 0 or largest < so_far else largest


@njit(cache=True, nogil=True, inline="always")
def _ordered(bits: np.int32) -> np.int32:
    """An integer that is larger where the float is, and back again: all bits but the sign flipped if negative."""
    return np.int32(bits ^ ((bits >> _SIGN_BIT) & _ALL_BUT_SIGN))
