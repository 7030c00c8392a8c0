"""Paged attention, compiled: queries meet the blocks where they lie, and nothing is copied.

`paged` copies the blocks of a few sequences together, because torch's matrix products want rows that lie side
by side. A loop of one's own does not: it follows the table, block by block, and multiplies what it finds.

- The two products are compiled; the softmax between them, and all the options, stay torch's and `paged`'s own.
- A block is read from its beginning to its end, all heads, before the next: memory is fastest in a row.
- Four query heads of a group with two tokens at once: what is loaded is used eight times before it is dropped.
- 16 and 8 bits are widened to float32 as they are loaded, so that codes of a quantized cache need no copy either.
  numba knows no bfloat16: it reads the bits as integers and shifts them to where float32 has them.

- Small blocks are fetched ahead, while the one before is worked on: a processor foresees what is read in a row, but
  no jump. Into the second cache, that is: the first has too few places for what is on its way. Above 4 KB a head,
  jumps are so few that asking for every line costs more.
- Many rows with the same keys, a shared prefix, are left to `paged`: a matrix product is worth its copy there.

Cost:
    `paged`'s FLOPs; each number in a visible block is read once.

Memory:
    The scores and weights of as many sequences as fit in 1 MiB, at least one, in float32.

Where it loses: with many query heads a group in bfloat16, matrix products have instructions that this loop
has not. `prefill` is bound by arithmetic and is `paged`'s. On a CPU only, one thread.

Papers:
    Kwon et al. 2023, arXiv:2309.06180, section 5.1 (kernels that read through the block table).

See also:
    `mlsys.attention.paged` (the readable version, with the formulas).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Unpack, overload

import numpy as np
import torch
from jaxtyping import Float, Int
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from mlsys.attention import paged
from mlsys.attention._inputs import wide
from mlsys.attention._paged_inputs import DecodeOptions, Items, LayerOptions, Stored, check_how
from mlsys.attention.kv_cache import PagedKVCache, Sequence
from mlsys.attention.paged import prefill, tokens_read

__all__ = ["attention", "decode", "prefill", "tokens_read"]

Array = np.ndarray
SCORES = 1 << 20  # bytes that are worked on at once
# The integers as which numba reads what it has no type for: each stands for one format.
BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float8_e4m3fn: torch.uint8}
FETCHED = 4096  # bytes of a head in a block, up to which the next block is fetched ahead
REORDERED = {"reassoc", "contract", "nsz"}  # sums in any order, or they would be done one number at a time


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


def decode(
    q: Float[Tensor, "seqs h d"],
    keys: Tensor,
    values: Tensor,
    tables: Int[Tensor, "seqs max_blocks"],
    lengths: Int[Tensor, " seqs"],
    *,
    window: tuple[int, int] = (-1, -1),
    alibi: Float[Tensor, " h"] | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " h"] | None = None,
    scale: float | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    splits: int = 1,
    share_prefixes: bool = False,
    return_lse: bool = False,
) -> Float[Tensor, "seqs h dv"] | tuple[Float[Tensor, "seqs h dv"], Float[Tensor, "seqs h"]]:
    """`paged.decode`: arguments, results and errors. ValueError if anything is not on the CPU.

    The first call in a process loads the compiled code (a fraction of a second), the first ever compiles it (seconds).
    """
    how = check_how(q, window, alibi, softcap, sinks, scale)
    if q.device.type != "cpu":
        raise ValueError(f"q must be on the CPU, got {q.device}: use paged.decode there")
    stored = Stored(keys, values, scales)
    out, lse = paged.decode_by(Compiled, q, stored, tables, lengths, how, splits, share_prefixes, return_lse)
    return (out, lse) if return_lse else out


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
    q: Float[Tensor, "b h t d"],
    cache: PagedKVCache,
    layer: int,
    seqs: Iterable[Sequence],
    pending: int = 0,
    *,
    causal: bool = True,
    window: tuple[int, int] | None = None,
    alibi: Float[Tensor, " h"] | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " h"] | None = None,
    scale: float | None = None,
    splits: int = 1,
    share_prefixes: bool = False,
    return_lse: bool = False,
) -> Float[Tensor, "b h t d"] | tuple[Float[Tensor, "b h t d"], Float[Tensor, "b h t"]]:
    """`paged.attention`: arguments, results and errors; compiled for one query a sequence."""
    return paged.attention_by(
        decode, q, cache, layer, seqs, pending, causal, window, splits, share_prefixes, return_lse,
        {"alibi": alibi, "softcap": softcap, "sinks": sinks, "scale": scale},
    )  # fmt: skip


class Compiled(paged.Reader):
    """The two products over blocks where they lie."""

    hides = True

    def __init__(self, q: Tensor, stored: Stored) -> None:
        self.stored = stored
        self.dtype = wide(q)
        self.limit = SCORES // (q.shape[1] * self.dtype.itemsize)
        self._keys, self._values = _array(stored.keys), _array(stored.values)
        self._scales = (None, None) if stored.scales is None else tuple(x.numpy() for x in stored.scales)

    def turn_to(self, items: Items) -> None:
        """Note the tables."""
        self.items = items

    def scores(self, q: Tensor) -> Tensor:
        """The first product."""
        table, start, stop, _ = self.items
        out = torch.empty(*q.shape[:3], table.shape[1] * self.stored.block, dtype=self.dtype)
        q = q.to(self.dtype).contiguous()
        _scores(q.numpy(), self._keys, self._scales[0], table, start, stop, out.numpy())
        return out

    def average(self, weights: Tensor) -> Tensor:
        """The second product."""
        table, start, stop, _ = self.items
        out = torch.zeros(*weights.shape[:3], self.stored.values.shape[3], dtype=self.dtype)
        _average(weights.numpy(), self._values, self._scales[1], table, start, stop, out.numpy())
        return out


def _array(x: Tensor) -> Array:
    """The memory of a tensor as numba can read it."""
    return x.view(BITS.get(x.dtype, x.dtype)).numpy()


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


def _prefetched(typing_context: Any, array: Any, index: Any) -> Any:
    """Bring the cache line of array[index] nearer; nothing waits for it."""

    def generate(context: Any, build: Any, signature: Any, args: Any) -> Any:
        of, at = signature.args
        memory = context.make_array(of)(context, build, args[0])
        where = cgutils.get_item_pointer(context, build, of, memory, cgutils.unpack_tuple(build, args[1], len(at)))
        pointer, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
        prefetch = cgutils.get_or_insert_function(build.module, kind, "llvm.prefetch.p0i8")
        build.call(prefetch, [build.bitcast(where, pointer), i32(0), i32(2), i32(1)])  # to read, second cache, data
        return context.get_dummy_value()

    return types.void(array, index), generate


_fetch: Any = intrinsic(_prefetched)


@njit(cache=True, nogil=True)
def _fetch_head(blocks: Array, b: int, h: int) -> None:
    """What one head has in block b."""
    line = 64 // blocks.itemsize
    for t in range(blocks.shape[2]):
        for j in range(0, blocks.shape[3], line):
            _fetch(blocks, (b, h, t, j))


@njit(cache=True, nogil=True, fastmath=REORDERED)
def _scores(q: Array, keys: Array, scales: Array | None, table: Array, start: Array, stop: Array, out: Array) -> None:
    """Queries (m, kv_heads, rows, d) with the keys in the table's blocks: out (m, kv_heads, rows, n), −∞ if unseen."""
    items, heads, rows, d = q.shape
    block = keys.shape[2]
    ahead = block * keys.shape[3] * keys.itemsize <= FETCHED
    zero = q.dtype.type(0)
    for i in range(items):
        out[i, :, :, : start[i]] = -np.inf
        out[i, :, :, stop[i] :] = -np.inf
        columns = (stop[i] + block - 1) // block
        for column in range(start[i] // block, columns):
            b, base = table[i, column], column * block
            following = table[i, min(column + 1, columns - 1)]
            first, last = max(start[i] - base, 0), min(stop[i] - base, block)
            for h in range(heads):
                if ahead:
                    _fetch_head(keys, following, h)
                for r in range(0, rows - 3, 4):
                    for t in range(first, last - 1, 2):
                        x0 = x1 = x2 = x3 = y0 = y1 = y2 = y3 = zero
                        for j in range(d):
                            x, y = _number(keys[b, h, t, j]), _number(keys[b, h, t + 1, j])
                            q0, q1, q2, q3 = q[i, h, r, j], q[i, h, r + 1, j], q[i, h, r + 2, j], q[i, h, r + 3, j]
                            x0 += q0 * x
                            x1 += q1 * x
                            x2 += q2 * x
                            x3 += q3 * x
                            y0 += q0 * y
                            y1 += q1 * y
                            y2 += q2 * y
                            y3 += q3 * y
                        at = base + t
                        out[i, h, r, at], out[i, h, r, at + 1] = x0, y0
                        out[i, h, r + 1, at], out[i, h, r + 1, at + 1] = x1, y1
                        out[i, h, r + 2, at], out[i, h, r + 2, at + 1] = x2, y2
                        out[i, h, r + 3, at], out[i, h, r + 3, at + 1] = x3, y3
                fours = rows - rows % 4  # done above, but for the last token of an odd number
                for r in range(rows):
                    for t in range(last - (last - first) % 2 if r < fours else first, last):
                        x0 = zero
                        for j in range(d):
                            x0 += q[i, h, r, j] * _number(keys[b, h, t, j])
                        out[i, h, r, base + t] = x0
                if scales is not None:
                    for r in range(rows):
                        for t in range(first, last):
                            out[i, h, r, base + t] *= scales[b, h, t]


@njit(cache=True, nogil=True, fastmath=REORDERED)
def _average(
    weights: Array, values: Array, scales: Array | None, table: Array, start: Array, stop: Array, out: Array
) -> None:
    """Weights (m, kv_heads, rows, n) times the values in the table's blocks, added to out (m, kv_heads, rows, dv)."""
    items, heads, rows, d = out.shape
    block = values.shape[2]
    ahead = block * values.shape[3] * values.itemsize <= FETCHED
    for i in range(items):
        columns = (stop[i] + block - 1) // block
        for column in range(start[i] // block, columns):
            b, base = table[i, column], column * block
            following = table[i, min(column + 1, columns - 1)]
            first, last = max(start[i] - base, 0), min(stop[i] - base, block)
            for h in range(heads):
                if ahead:
                    _fetch_head(values, following, h)
                if scales is not None:
                    for r in range(rows):
                        for t in range(first, last):
                            weights[i, h, r, base + t] *= scales[b, h, t]
                for r in range(0, rows - 3, 4):
                    for t in range(first, last - 1, 2):
                        at = base + t
                        u0, w0 = weights[i, h, r, at], weights[i, h, r, at + 1]
                        u1, w1 = weights[i, h, r + 1, at], weights[i, h, r + 1, at + 1]
                        u2, w2 = weights[i, h, r + 2, at], weights[i, h, r + 2, at + 1]
                        u3, w3 = weights[i, h, r + 3, at], weights[i, h, r + 3, at + 1]
                        for j in range(d):
                            x, y = _number(values[b, h, t, j]), _number(values[b, h, t + 1, j])
                            out[i, h, r, j] += u0 * x + w0 * y
                            out[i, h, r + 1, j] += u1 * x + w1 * y
                            out[i, h, r + 2, j] += u2 * x + w2 * y
                            out[i, h, r + 3, j] += u3 * x + w3 * y
                fours = rows - rows % 4
                for r in range(rows):
                    for t in range(last - (last - first) % 2 if r < fours else first, last):
                        u0 = weights[i, h, r, base + t]
                        for j in range(d):
                            out[i, h, r, j] += u0 * _number(values[b, h, t, j])
