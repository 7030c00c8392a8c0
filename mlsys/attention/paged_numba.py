"""Paged attention, compiled: queries meet the blocks where they lie, and nothing is copied.

`paged` copies the blocks of a few sequences together, because torch's matrix products want rows that lie side
by side. A loop of one's own does not: it follows the table, block by block, and multiplies what it finds.

- Scores, softmax and average of one sequence are one compiled call, so that a call of Python costs little beside it.
  The softmax is that of `flash_numba`: 2^x by a polynomial, many numbers at once.
- A block is read from its beginning to its end, all heads, before the next: memory is fastest in a row.
- Four query heads of a group with two tokens at once: what is loaded is used eight times before it is dropped.
- 16 and 8 bits are widened to float32 as they are loaded, so that codes of a quantized cache need no copy either.
  numba knows no bfloat16: it reads the bits as integers and shifts them to where float32 has them.

- Small blocks are fetched ahead, while the one before is worked on: a processor foresees what is read in a row, but
  no jump. Into the second cache, that is: the first has too few places for what is on its way. Above 4 KB a head,
  jumps are so few that asking for every line costs more; so it does if all layers together read so little that it
  is still in the processor's cache from the step before.
- Many rows with the same keys, a shared prefix, are left to `paged`: a matrix product is worth its copy there.

Cost:
    `paged`'s FLOPs; each number in a visible block is read once.

Memory:
    The scores of one sequence, in float32.

Where it loses: with many query heads a group in bfloat16, matrix products have instructions that this loop
has not. `prefill` is bound by arithmetic and is `paged`'s. On a CPU only, one thread.

Papers:
    Kwon et al. 2023, arXiv:2309.06180, section 5.1 (kernels that read through the block table).

See also:
    `mlsys.attention.paged` (the readable version, with the formulas), `mlsys.attention.flash_numba` (2^x).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Unpack, overload

import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic
from numba.extending import overload as compiled_by_type
from torch import Tensor

from mlsys.attention import paged
from mlsys.attention._inputs import wide
from mlsys.attention._paged_inputs import DecodeOptions, LayerOptions, Parts, Queries, Stored
from mlsys.attention._paged_items import Items
from mlsys.attention._vector_numba import REORDERED, exp2, largest
from mlsys.attention.kv_cache import PagedKVCache, Sequence
from mlsys.attention.paged import prefill, tokens_read
from mlsys.compiled import prefetch_second, uncounted

__all__ = ["attention", "decode", "prefill", "tokens_read"]

Array = np.ndarray
# The integers as which numba reads what it has no type for: each stands for one format.
BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float8_e4m3fn: torch.uint8}
FETCHED = 4096  # bytes of a head in a block, up to which the next block is fetched ahead
NEAR = 12 << 20  # bytes that a step may read and find in the processor's cache again in the next: nothing to fetch
LOG2E = float(np.log2(np.e))


@overload
def decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[DecodeOptions],
) -> Tensor: ...


@overload
def decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[DecodeOptions],
) -> tuple[Tensor, Tensor]: ...


def decode(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, **options: Any) -> Any:
    """`paged.decode`: arguments, results and errors. ValueError if anything is not on the CPU.

    The first call in a process loads the compiled code (a fraction of a second), the first ever compiles it (seconds).
    """
    _check_device(q)
    return paged.decode(q, keys, values, tables, lengths, **{"reader": compiled, **options})


@overload
def attention(
    q: Tensor,
    cache: PagedKVCache,
    layer: int,
    seqs: Iterable[Sequence],
    pending: int = 0,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[LayerOptions],
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    cache: PagedKVCache,
    layer: int,
    seqs: Iterable[Sequence],
    pending: int = 0,
    *,
    return_lse: Literal[True],
    **options: Unpack[LayerOptions],
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor, cache: PagedKVCache, layer: int, seqs: Iterable[Sequence], pending: int = 0, **options: Any
) -> Any:
    """`paged.attention`: arguments, results and errors; compiled for one query a sequence."""
    return paged.attention(q, cache, layer, seqs, pending, **{"reader": compiled, **options})


def compiled(queries: Queries, stored: Stored, items: Items) -> Parts:
    """Attention of each item's queries to its blocks where they lie."""
    _check_device(queries.rows)
    q = queries.rows.to(wide(queries.rows)).contiguous().numpy()
    slopes = np.zeros(q.shape[1:3], q.dtype) if queries.slopes is None else queries.slopes.contiguous().numpy()
    out, lse = np.empty((*q.shape[:3], stored.values.shape[3]), q.dtype), np.empty(q.shape[:3], q.dtype)
    room = np.empty(q.shape[1:], q.dtype), np.empty((*q.shape[1:3], items.table.shape[1] * stored.block), q.dtype)
    key_scales, value_scales = (None, None) if stored.scales is None else (x.numpy() for x in stored.scales)
    _attend(
        q, _array(stored.keys), _array(stored.values), key_scales, value_scales, _layers(stored.keys),
        items.table, items.start, items.stop, queries.position, queries.scale, slopes, queries.softcap or 0.0,
        *room, out, lse,
    )  # fmt: skip
    return torch.from_numpy(out), torch.from_numpy(lse)


def _check_device(q: Tensor) -> None:
    if isinstance(q, Tensor) and q.device.type != "cpu":
        raise ValueError(f"q must be on the CPU, got {q.device}: use paged there")


def _layers(keys: Tensor) -> int:
    """Of how many layers these are the keys of one: a cache keeps all of them in one piece of memory."""
    return keys.untyped_storage().nbytes() // max(1, keys.nbytes)


def _array(x: Tensor) -> Array:
    """The memory of a tensor as numba can read it."""
    return (x.view(BITS[x.dtype]) if x.dtype in BITS else x).numpy()


# --- compiled ---------------------------------------------------------------------------------------------------------


def _widened(typing_context: Any, x: Any) -> Any:
    """What is stored, as float32 (float64 as it is): one instruction or a few, many at a time."""
    i32, f32 = ir.IntType(32), ir.FloatType()

    def bfloat16(context: Any, build: Any, signature: Any, args: Any) -> Any:  # the upper half of a float32
        return build.bitcast(build.shl(build.zext(args[0], i32), i32(16)), f32)

    def float16(context: Any, build: Any, signature: Any, args: Any) -> Any:
        return build.fpext(build.bitcast(args[0], ir.HalfType()), f32)

    def e4m3(context: Any, build: Any, signature: Any, args: Any) -> Any:
        bits = build.zext(args[0], i32)  # exponent and mantissa to where float32 has them; the biases are 120 apart
        sign = build.shl(build.and_(bits, i32(0x80)), i32(24))
        magnitude = build.bitcast(build.shl(build.and_(bits, i32(0x7F)), i32(20)), f32)
        scaled = build.bitcast(build.fmul(magnitude, f32(2.0**120)), i32)
        return build.bitcast(build.or_(scaled, sign), f32)

    def int8(context: Any, build: Any, signature: Any, args: Any) -> Any:
        return build.sitofp(args[0], f32)

    widen = {types.uint16: bfloat16, types.int16: float16, types.uint8: e4m3, types.int8: int8}
    if x in widen:
        return types.float32(x), widen[x]
    return x(x), lambda context, build, signature, args: args[0]


_number: Any = intrinsic(_widened)


@uncounted()
def _fetch_head(blocks: Array, b: int, h: int) -> None:
    """What one head has in block b."""
    line = 64 // blocks.itemsize
    for t in range(blocks.shape[2]):
        for j in range(0, blocks.shape[3], line):
            prefetch_second(blocks, (b, h, t, j))


@uncounted(fastmath=REORDERED)
def _attend(
    q: Array,
    keys: Array,
    values: Array,
    key_scales: Array | None,
    value_scales: Array | None,
    layers: int,
    table: Array,
    start: Array,
    stop: Array,
    position: Array,
    scale: float,
    slopes: Array,
    softcap: float,
    scaled: Array,
    scores: Array,
    out: Array,
    lse: Array,
) -> None:
    """Queries (items, kv_heads, rows, d) with the table's blocks: out (items, kv_heads, rows, dv) and its lse.

    scaled, scores: room for the queries and the scores of one item.
    """
    items, heads, rows, d = q.shape
    block = keys.shape[2]
    unit = q.dtype.type(scale)
    read = 0
    for i in range(items):
        read += max(0, stop[i] - start[i]) * heads * (keys.shape[3] + values.shape[3]) * keys.itemsize
    far = read * layers > NEAR
    fetch_keys = far and block * keys.shape[3] * keys.itemsize <= FETCHED
    fetch_values = far and block * values.shape[3] * values.itemsize <= FETCHED
    for i in range(items):
        first, columns = start[i] // block, (stop[i] + block - 1) // block
        for h in range(heads):
            for r in range(rows):
                for j in range(d):
                    scaled[h, r, j] = q[i, h, r, j] * unit
        for column in range(first, columns):
            b, following, base = table[i, column], table[i, min(column + 1, columns - 1)], column * block
            places = max(start[i] - base, 0), min(stop[i] - base, block)
            for h in range(heads):
                if fetch_keys:
                    _fetch_head(keys, following, h)
                _scores(scaled[h], keys, key_scales, b, h, places, scores[h], base)
        for h in range(heads):
            for r in range(rows):
                seen = scores[h, r, start[i] : stop[i]]
                at = position[i, min(r, position.shape[1] - 1)] - start[i]
                _change(seen, softcap, slopes[h, r], at)
                lse[i, h, r] = _softmax(seen)
        out[i] = 0
        for column in range(first, columns):
            b, following, base = table[i, column], table[i, min(column + 1, columns - 1)], column * block
            places = max(start[i] - base, 0), min(stop[i] - base, block)
            for h in range(heads):
                if fetch_values:
                    _fetch_head(values, following, h)
                _average(scores[h], base, values, value_scales, b, h, places, out[i, h])


@uncounted(fastmath=REORDERED, inline="always")
def _scores(
    q: Array, keys: Array, scales: Array | None, b: int, h: int, places: tuple[int, int], out: Array, base: int
) -> None:
    """Rows of q with the keys of one head in some places of block b, into out's columns from base on."""
    rows, d = q.shape
    first, last = places
    zero = q.dtype.type(0)
    for r in range(0, rows - 3, 4):
        for t in range(first, last - 1, 2):
            x0 = x1 = x2 = x3 = y0 = y1 = y2 = y3 = zero
            for j in range(d):
                x, y = _number(keys[b, h, t, j]), _number(keys[b, h, t + 1, j])
                q0, q1, q2, q3 = q[r, j], q[r + 1, j], q[r + 2, j], q[r + 3, j]
                x0 += q0 * x
                x1 += q1 * x
                x2 += q2 * x
                x3 += q3 * x
                y0 += q0 * y
                y1 += q1 * y
                y2 += q2 * y
                y3 += q3 * y
            at = base + t
            out[r, at], out[r, at + 1] = x0, y0
            out[r + 1, at], out[r + 1, at + 1] = x1, y1
            out[r + 2, at], out[r + 2, at + 1] = x2, y2
            out[r + 3, at], out[r + 3, at + 1] = x3, y3
    fours = rows - rows % 4  # done above, but for the last token of an odd number
    for r in range(rows):
        for t in range(last - (last - first) % 2 if r < fours else first, last):
            x0 = zero
            for j in range(d):
                x0 += q[r, j] * _number(keys[b, h, t, j])
            out[r, base + t] = x0
    if scales is not None:
        for r in range(rows):
            for t in range(first, last):
                out[r, base + t] *= scales[b, h, t]


@uncounted(fastmath=REORDERED, inline="always")
def _average(
    weights: Array, base: int, values: Array, scales: Array | None, b: int, h: int, places: tuple[int, int], out: Array
) -> None:
    """Weights from column base on times the values of one head in some places of block b, added to out (rows, dv)."""
    rows, d = out.shape
    first, last = places
    if scales is not None:
        for r in range(rows):
            for t in range(first, last):
                weights[r, base + t] *= scales[b, h, t]
    for r in range(0, rows - 3, 4):
        for t in range(first, last - 1, 2):
            at = base + t
            u0, w0 = weights[r, at], weights[r, at + 1]
            u1, w1 = weights[r + 1, at], weights[r + 1, at + 1]
            u2, w2 = weights[r + 2, at], weights[r + 2, at + 1]
            u3, w3 = weights[r + 3, at], weights[r + 3, at + 1]
            for j in range(d):
                x, y = _number(values[b, h, t, j]), _number(values[b, h, t + 1, j])
                out[r, j] += u0 * x + w0 * y
                out[r + 1, j] += u1 * x + w1 * y
                out[r + 2, j] += u2 * x + w2 * y
                out[r + 3, j] += u3 * x + w3 * y
    fours = rows - rows % 4
    for r in range(rows):
        rest = last - (last - first) % 2 if r < fours else first
        for t in range(rest, last - 3, 4):  # so that out is loaded and stored once for four tokens
            at = base + t
            u0, u1, u2, u3 = weights[r, at], weights[r, at + 1], weights[r, at + 2], weights[r, at + 3]
            for j in range(d):
                x0, x1 = _number(values[b, h, t, j]), _number(values[b, h, t + 1, j])
                x2, x3 = _number(values[b, h, t + 2, j]), _number(values[b, h, t + 3, j])
                out[r, j] += u0 * x0 + u1 * x1 + u2 * x2 + u3 * x3
        for t in range(last - (last - rest) % 4, last):
            u0 = weights[r, base + t]
            for j in range(d):
                out[r, j] += u0 * _number(values[b, h, t, j])


@uncounted(fastmath=REORDERED)
def _change(row: Array, softcap: float, slope: float, position: int) -> None:
    """Soft-cap and ALiBi of scores, whose first is that of key 0."""
    if softcap:
        cap = row.dtype.type(softcap)
        for j in range(row.shape[0]):
            row[j] = cap * np.tanh(row[j] / cap)
    if slope:
        for j in range(row.shape[0]):
            row[j] -= slope * abs(position - j)


@uncounted(fastmath=REORDERED)
def _softmax(row: Array) -> float:
    """Weights in place of scores; returns the log-sum-exp of these, −∞ if there are none."""
    top, unit = _peak(row), row.dtype.type(LOG2E)
    total = row.dtype.type(0)
    for j in range(row.shape[0]):
        weight = _power((row[j] - top) * unit)
        row[j] = weight
        total += weight
    for j in range(row.shape[0]):
        row[j] /= total
    return top + np.log(total)


def _power(x: Any) -> Any:
    """2^x."""
    return np.exp2(x)


def _peak(row: Any) -> Any:
    """The largest of a row, −∞ if there are none."""
    return max(row, default=-np.inf)


@compiled_by_type(_power, inline="always")
def _power_of(x: Any) -> Any:
    def fast(x: Any) -> Any:
        return exp2(x)

    def exact(x: Any) -> Any:
        return np.exp2(x)

    return fast if x == types.float32 else exact


@compiled_by_type(_peak)
def _peak_of(row: Any) -> Any:
    def fast(row: Any) -> Any:
        return largest(row.view(np.int32), np.float32(-np.inf))

    def exact(row: Any) -> Any:
        top = -np.inf
        for x in row:
            top = max(top, x)
        return top

    return fast if row.dtype == types.float32 else exact
