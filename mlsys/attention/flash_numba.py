"""Flash attention with compiled sweeps: what happens to a tile between the matmuls is one pass instead of eight.

The matmuls of `flash` are BLAS and hard to beat. Between them torch walks over the tile
of scores once for each operation: hide the future, take the maximum, subtract it, raise 2
to it, sum up; 2 MB each time, which do not fit in the second-level cache. Here a row of a
tile, 4 KB, goes through all of it while it lies in the first-level cache, and what a query
does not see is not computed at all:

    forward     m' = m or max Sᵢ        Pᵢⱼ = 2^(Sᵢⱼ − m')     z ← z · 2^(m − m') + Σⱼ Pᵢⱼ
    backward    Pᵢⱼ = 2^(Sᵢⱼ − Lᵢ)      dSᵢⱼ = Pᵢⱼ · (dPᵢⱼ − Dᵢ)

m' need not be the maximum: any number near it keeps 2^x in range, and A / z and m + log z stay what they are. So m
rises only where the maximum is more than 8 above it, which makes of P at most 2^8; after the first tiles that is
rare, and where it happens in no row of a tile, A is not rescaled at all.

Half of torch's time went into 2^x, worked out to the last bit: here it is a polynomial, and the maximum
is one of integers, so that the compiler makes vector instructions of both (`_vector_numba`).

In bfloat16 a tile is widened a number at a time, where it is used, and rounded again: there is no
second tile in float32, and none of whole rows as in `flash`.

Everything else is `flash`'s own code: the loops, the tiles, the options. Soft-cap, ALiBi and
masks change a tile in torch before the sweep. float64, and tensors on a GPU, take `flash`'s
sweeps: nothing is gained there.

Cost:
    `flash`'s FLOPs; between the matmuls one read and one write of each tile. Compiled once
    a machine, about two seconds, and kept in numba's cache.

Memory:
    `flash`'s, with half or a quarter of its tile: there are no more fixed costs in Python for
    a wide one to spread. In bfloat16 without options 1 MB, where `flash` has 2 or more of whole rows.

Where it loses: below some 1000 keys the walk over heads in Python still shows. With P up to 2^8, A overflows by
    values beyond 10^38 / (256 · keys), which `flash` still sums up. In the forward pass torch's
kernel is as fast: both are bound by the matmuls. Any change to the sweeps has to be made twice.

Papers:
    Dao 2023, arXiv:2307.08691, section 3.1 (fewer operations that are no matmul).
    Zadouri et al. 2026, "FlashAttention-4" (rescale only where the maximum has risen by more than a threshold).
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
from mlsys.attention._vector_numba import REORDERED, exp2, in_log2, number, peak, stored

_RISE = np.float32(8)  # by how much, in units of log 2, a maximum may lie above m before m follows
# The best of a grid at head_dim 64. A tile, in the backward pass two, fills 1 MB of L2; in 16 bits it is twice as wide.
BLOCKS = Blocks(full=(512, 512), band=(256, 1024), backward=(256, 512))


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


def _softmax_sweep(scores: Tensor, state: Tensor, tile: Tile, plan: Plan) -> bool:
    if plan.narrow:
        numbers = scores.view(torch.uint16).numpy()
    elif _compiled_for(scores):
        change(scores, tile, plan)
        numbers = scores.numpy()
    else:
        return flash.SWEEPS.softmax(scores, state, tile, plan)
    return _softmax_rows(numbers, state.numpy(), numbers.shape[0] // plan.group, *edges(tile, plan))


def _gradient_sweep(scores: Tensor, dp: Tensor, lse: Tensor, delta: Tensor, tile: Tile, plan: Plan) -> None:
    if not _compiled_for(scores):
        flash.SWEEPS.gradient(scores, dp, lse, delta, tile, plan)
        return
    slope = change(scores, tile, plan, derivative=True)
    shift, mean = lse.view(-1).numpy(), delta.view(-1).numpy()
    _gradient_rows(scores.numpy(), dp.numpy(), shift, mean, scores.shape[0] // plan.group, *edges(tile, plan))
    if slope is not None:
        dp.mul_(slope)


def _narrow(q: Tensor) -> bool:
    return q.dtype == torch.bfloat16 and q.device.type == "cpu"


_SWEEPS = Sweeps(_softmax_sweep, _gradient_sweep, BLOCKS, _narrow)


def _compiled_for(scores: Tensor) -> bool:
    return scores.dtype == torch.float32 and scores.device.type == "cpu"


# --- compiled ---------------------------------------------------------------------------------------------------------

Array = Any  # (rows, columns) or (rows,), float32; scores may be bfloat16, as uint16


@njit(cache=True, nogil=True, fastmath=REORDERED)
def _softmax_rows(s: Array, state: Array, rows: int, first: int, last: int) -> bool:
    """P in place of S, and m, z and 2^(m − m') of each row; row r of each head sees columns first + r … last + r.

    m is in the units of S: of log 2, or, of bfloat16, natural ones, which are subtracted before they are converted:
    the rounding of the largest alone would move huge scores by more than 1. Returns whether any m has risen.
    """
    m, z, rescale = state[0, :, 0], state[1, :, 0], state[2, :, 0]
    risen = False
    for i in range(s.shape[0]):
        start, stop = _visible(i % rows, s.shape[1], first, last)
        row = s[i, start:stop]
        top = peak(row)
        if in_log2(top - m[i], s) > _RISE:
            risen = True
        else:
            top = m[i]
        total = np.float32(0)
        for j in range(row.shape[0]):
            p = exp2(in_log2(number(row[j]) - top, s))
            row[j] = stored(p, row[j])
            total += p
        rescale[i] = exp2(in_log2(m[i] - top, s))
        z[i] = z[i] * rescale[i] + total
        m[i] = top
        s[i, :start] = 0
        s[i, stop:] = 0
    return risen


@njit(cache=True, nogil=True, fastmath=REORDERED)
def _gradient_rows(s: Array, dp: Array, lse: Array, delta: Array, rows: int, first: int, last: int) -> None:
    """P in place of S and dS in place of dP."""
    for i in range(s.shape[0]):
        start, stop = _visible(i % rows, s.shape[1], first, last)
        row, drow = s[i, start:stop], dp[i, start:stop]
        shift, mean = lse[i], delta[i]
        for j in range(row.shape[0]):
            p = exp2(row[j] - shift)
            row[j] = p
            drow[j] = (drow[j] - mean) * p
        for x in (s, dp):
            x[i, :start] = 0
            x[i, stop:] = 0


@njit(cache=True, nogil=True)
def _visible(row: int, columns: int, first: int, last: int) -> tuple[int, int]:
    start = min(max(0, first + row), columns)
    return start, max(start, min(columns, last + row + 1))
