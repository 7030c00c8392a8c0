"""Attention that reads keys and values from the blocks where a paged cache keeps them.

The blocks of a sequence lie anywhere in memory; its table says where. For one query, of
sequence i with n tokens in blocks of B,

    S_j = scale · q · K[table[i, j // B], j mod B]          j = 0 … n − 1
    O   = Σ_j softmax(S)_j · V[table[i, j // B], j mod B]

What has no token of this sequence does not count: places after the n-th, entries of −1, blocks
before the window. They may hold NaN, or what is another's.

Decoding does two FLOPs for each number that it reads, so it is bound by what it reads; and a
matrix product, which would read at full speed, wants the rows of a head side by side. Here
they are copied together first, of a few sequences at a time, into one scratch of the size
of a cache, so that the copy is read while it is still there. Query heads that share
a key/value head are the rows of one product, so that grouped keys are read once.

A row of keys can be taken apart in two ways, and `merge.merge` puts it together:

    splits            a long sequence in parts that have nothing to do with each other:
                      work for many cores where there is only one sequence
    share_prefixes    tables that begin with the same blocks: those are read once, with the queries
                      of all their sequences as rows of one product; then each one's own

`decode` is for one query a sequence, `prefill` for several: a prompt, or a piece of one whose
beginning is in the cache already. `attention` takes a `kv_cache.PagedKVCache` and its sequences
in place of tensors.

Cost:
    2·h·n·(d + dv) FLOPs a query. 2·kv_heads·n·head_dim numbers read for each sequence, and
    copied. `tokens_read` counts what sharing saves.

Memory:
    Decoding: the scratch, 2 MiB on a CPU, and the scores of as many sequences as fit in it.
    `prefill`: a copy of the keys and values that one sequence has in one layer.

Where it loses: with the copy, a step takes up to twice as long as on contiguous keys if blocks are
large, two to four times with blocks of 16, more where those keys lie in a fast cache. `paged_numba`
does not copy. For equal lengths that are known, a contiguous cache is simpler and faster. To split
is a loss on one core, as is to share a prefix of a few blocks.

Papers:
    Kwon et al. 2023, arXiv:2309.06180, section 4.1, equation 4 (attention block by block over a table).
    Juravsky et al. 2024, arXiv:2402.05099, section 3 (a shared prefix as one matrix product, and the merge).
    Dao et al. 2023, "Flash-Decoding for long-context inference" (one row in parts, for many cores, and the merge).

See also:
    `mlsys.attention.paged_numba` (the same without the copy), `mlsys.attention.kv_cache` (who holds which block),
    `mlsys.attention.merge` (parts of a row), `mlsys.attention.flash` (what `prefill` calls).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any, Literal, Unpack, overload

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mlsys.attention import flash
from mlsys.attention._inputs import wide
from mlsys.attention._kv_quant import dequantize
from mlsys.attention._paged_inputs import (
    DecodeOptions,
    How,
    Items,
    LayerOptions,
    PrefillOptions,
    Stored,
    check_how,
    check_packed,
    check_stored,
    common_prefixes,
    visible,
)
from mlsys.attention._pages import whole
from mlsys.attention.kv_cache import PagedKVCache, Sequence
from mlsys.attention.merge import merge

# Bytes. With less, calls take longer than copies; with more, the copy has left the cache before it is read. On other
# devices every call is the launch of a kernel, so there are to be few.
SCRATCH, SCRATCH_ELSEWHERE = 2 << 20, 256 << 20
Parts = tuple[Tensor, Tensor]  # out and lse: what `merge` joins


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
    """One query for each sequence, that of its last token: (seqs, h, d) → (seqs, h, dv).

    `keys` and `values` are one layer of a cache, (blocks, kv_heads, block, d) and (…, dv). Row i of `tables` names
    the blocks of sequence i in order; `lengths[i]` counts its tokens, the query's own included. Both are int32 or
    int64. What stands in a table beyond the length or before the window is not looked at.

    `scales`          of keys and of values, (blocks, kv_heads, block) float32 each, where they are int8 or fp8.
    `splits`          how many parts each sequence is done in.
    `share_prefixes`  full blocks with which several tables begin are done once for all of them.
    `return_lse`      also return the log-sum-exps (seqs, h), float32 at least.

    `window`, `alibi`, `softcap`, `sinks` and `scale` are those of `naive.attention`. A sequence of no tokens gives 0,
    and −∞ as its lse; with a sink, 0 and the sink.
    Raises TypeError or ValueError naming the argument if anything does not fit; RuntimeError under a gradient.
    """
    how = check_how(q, window, alibi, softcap, sinks, scale)
    stored = Stored(keys, values, scales)
    out, lse = decode_by(Gathered, q, stored, tables, lengths, how, splits, share_prefixes, return_lse)
    return (out, lse) if return_lse else out


@overload
def prefill(
    q: Tensor,
    cu_seqlens_q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[PrefillOptions],
) -> Tensor: ...


@overload
def prefill(
    q: Tensor,
    cu_seqlens_q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[PrefillOptions],
) -> tuple[Tensor, Tensor]: ...


def prefill(
    q: Float[Tensor, "total_q h d"],
    cu_seqlens_q: Int[Tensor, " n_plus_1"],
    keys: Tensor,
    values: Tensor,
    tables: Int[Tensor, "seqs max_blocks"],
    lengths: Int[Tensor, " seqs"],
    *,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    alibi: Float[Tensor, " h"] | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " h"] | None = None,
    scale: float | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    return_lse: bool = False,
) -> Float[Tensor, "total_q h dv"] | tuple[Float[Tensor, "total_q h dv"], Float[Tensor, "total_q h"]]:
    """The last queries of each sequence, packed one after the other: (total_q, h, d) → (total_q, h, dv).

    Sequence i has the rows `cu_seqlens_q[i]` … `cu_seqlens_q[i + 1] − 1` of q. They belong to its last tokens: to all
    of them if it is a whole prompt; to fewer if the beginning is in the cache already. With `causal=False`, they see
    the tokens after them too. All else is as in `decode`, also the errors. lse is (total_q, h).
    """
    how = check_how(q, window, alibi, softcap, sinks, scale)
    stored = Stored(keys, values, scales)
    table, length = check_stored(q, stored, tables, lengths)
    queries = check_packed(q, cu_seqlens_q, length)
    items = visible(table, stored, length - np.array(queries, np.int64), length, how.left)
    out = q.new_zeros(*q.shape[:2], values.shape[3])
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=wide(q))
    end = 0
    for i, count in enumerate(queries):
        rows, end = slice(end, end + count), end + count
        if not count:
            continue
        reader, seen = Gathered(q, stored), slice(int(items.start[i]), int(items.stop[i]))
        reader.turn_to(items.only(slice(i, i + 1), stored.block))
        k, v = (reader.copied(which, slice(None)).clone()[None, :, seen] for which in (0, 1))  # (1, kv_heads, n, ·)
        found = flash.attention(
            q[None, rows].transpose(1, 2).to(k.dtype), k, v,
            causal=causal, window=window, alibi=alibi, softcap=softcap, sinks=sinks, scale=scale, return_lse=True,
        )  # fmt: skip
        out[rows], lse[rows] = (x[0].transpose(0, 1) for x in found)
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
    """The last t queries of each of b sequences of a cache, in the order of a model's layer: (b, h, t, d).

    `pending` counts tokens that this layer has appended and `advance` has not counted yet: t of them within a step.
    The sequences may have any lengths of at least t. A `window` of None is that of the cache. `splits` and
    `share_prefixes` are for one query a sequence, t = 1. The rest is as in `decode` and `prefill`; lse is (b, h, t).
    """
    return attention_by(
        decode, q, cache, layer, seqs, pending, causal, window, splits, share_prefixes, return_lse,
        {"alibi": alibi, "softcap": softcap, "sinks": sinks, "scale": scale},
    )  # fmt: skip


def tokens_read(
    tables: Int[Tensor, "seqs max_blocks"], lengths: Int[Tensor, " seqs"], block: int, *, share_prefixes: bool = False
) -> int:
    """Of how many tokens a decode step reads keys and values: each sequence's, and a shared prefix only once."""
    length = lengths.cpu().numpy().astype(np.int64)
    read = int(length.sum())
    if share_prefixes:
        items = Items(tables.cpu().numpy(), np.zeros_like(length), length, length - 1)
        read -= sum((members.size - 1) * count * block for members, count in common_prefixes(items, block))
    return read


# --- inside: checked arguments are assumed ----------------------------------------------------------------------------


class Reader(ABC):
    """Who brings queries and blocks together, some items at a time.

    limit: how many tokens it likes to do at once.
    hides: whether its scores are −∞ in places that are not seen; else they are anything.
    """

    stored: Stored
    limit: int
    hides: bool

    @abstractmethod
    def __init__(self, q: Tensor, stored: Stored) -> None: ...

    @abstractmethod
    def turn_to(self, items: Items) -> None:
        """What the next calls are about: m items, with tables of n tokens."""

    @abstractmethod
    def scores(self, q: Tensor) -> Tensor:
        """Queries (m, kv_heads, rows, d) with the keys: (m, kv_heads, rows, n)."""

    @abstractmethod
    def average(self, weights: Tensor) -> Tensor:
        """Weights (m, kv_heads, rows, n), 0 where not seen, which it may overwrite: (m, kv_heads, rows, dv)."""


def attention_by(
    decode: Callable[..., Any],
    q: Tensor,
    cache: PagedKVCache,
    layer: int,
    seqs: Iterable[Sequence],
    pending: int,
    causal: bool,
    window: tuple[int, int] | None,
    splits: int,
    share_prefixes: bool,
    return_lse: bool,
    options: dict[str, Any],
) -> Any:
    """`attention`, for any implementation of `decode`."""
    seqs = list(seqs)
    if not isinstance(q, Tensor):
        raise TypeError(f"q must be a torch.Tensor, got {type(q).__name__}")
    if q.ndim != 4 or q.shape[0] != len(seqs):
        raise ValueError(f"q must be (seqs, heads, t, head_dim) with {len(seqs)} sequences, got {tuple(q.shape)}")
    whole("splits", splits)
    if whole("layer", layer, at_least=0) >= cache.keys.shape[0]:
        raise ValueError(f"layer must be below {cache.keys.shape[0]}, the number of layers, got {layer}")
    b, _, t, _ = q.shape
    tables, lengths = cache.tables(seqs, pending)
    if window is None:
        window = (-1 if cache.pool.window is None else cache.pool.window, -1)
    scales = None if cache.scales is None else (cache.scales[0, layer], cache.scales[1, layer])
    stored = (cache.keys[layer], cache.values[layer], tables, lengths)
    options = {"window": window, "scales": scales, "return_lse": True, **options}
    if t == 1:
        out, lse = decode(q[:, :, 0], *stored, splits=splits, share_prefixes=share_prefixes, **options)
        out, lse = out[:, :, None], lse[:, :, None]
    else:
        packed, ends = q.transpose(1, 2).flatten(0, 1), torch.arange(0, b * t + 1, max(t, 1), dtype=torch.int32)
        ends = ends if t else ends.new_zeros(b + 1)
        out, lse = prefill(packed, ends, *stored, causal=causal, **options)
        out, lse = (x.view(b, t, *x.shape[1:]).transpose(1, 2) for x in (out, lse))
    return (out, lse) if return_lse else out


def decode_by(
    make: Callable[[Tensor, Stored], Reader],
    q: Tensor,
    stored: Stored,
    tables: Tensor,
    lengths: Tensor,
    how: How,
    splits: int,
    share_prefixes: bool,
    need_lse: bool,
) -> Parts:
    """`decode`, for any reader: out in q's dtype and lse, which is only right if it is needed."""
    table, length = check_stored(q, stored, tables, lengths)
    whole("splits", splits)
    if length.size != q.shape[0]:
        raise ValueError(
            f"q must have one query for each of {length.size} sequences, got shape {tuple(q.shape)}; "
            "for more than one use prefill"
        )
    block, kv_heads = stored.block, stored.keys.shape[1]
    items = visible(table, stored, length - 1, length, how.left)
    reader = make(q, stored)
    merged = splits > 1 or share_prefixes
    need_lse = need_lse or merged or how.sinks is not None
    rows = (q * how.scale).unflatten(1, (kv_heads, -1))  # (seqs, kv_heads, group, d)
    slopes = None if how.alibi is None else how.alibi.view(kv_heads, -1)

    parts = []
    if share_prefixes:
        shared = np.zeros_like(items.stop)
        parts = [_prefixes(Gathered(q, stored), rows, items, slopes, how.softcap, shared)]
        items = items.part(shared, -(-items.stop // block) - shared, block)
    if splits > 1:
        items, rows = items.split(splits, block), rows.repeat(splits, 1, 1, 1)
    position = None if slopes is None else torch.from_numpy(items.position).to(q.device)[:, None]
    out, lse = _attend(reader, rows, items, position, slopes, how.softcap, need_lse)
    if merged and length.size:
        parts += zip(out.chunk(splits), lse.chunk(splits), strict=True)
        out, lse = reduce(lambda a, b: merge(*a, *b), parts)
    out, lse = out.flatten(1, 2), lse.flatten(1, 2)
    if how.sinks is not None:  # one more part, of the value 0
        with_sink = torch.logaddexp(lse, how.sinks)
        out, lse = out * torch.exp(lse - with_sink)[..., None], with_sink
    return out.to(q.dtype), lse


def _prefixes(
    reader: Reader, rows: Tensor, items: Items, slopes: Tensor | None, softcap: float | None, shared: np.ndarray
) -> Parts:
    """Attention to the blocks with which several items begin; how many those are of each is written into `shared`."""
    block = reader.stored.block
    out = rows.new_zeros(*rows.shape[:3], reader.stored.values.shape[3], dtype=wide(rows))
    lse = rows.new_full(rows.shape[:3], -torch.inf, dtype=wide(rows))
    for members, count in common_prefixes(items, block):
        shared[members] = count
        one = Items(items.table[members[:1], :count], *(np.array([x]) for x in (0, count * block, 0)))
        ids = torch.from_numpy(members).to(rows.device)
        stacked = rows[ids].transpose(0, 1).flatten(1, 2)[None]  # (1, kv_heads, members · group, d)
        position = torch.from_numpy(items.position[members]).to(rows.device).repeat_interleave(rows.shape[2])[None]
        many = None if slopes is None else slopes.repeat(1, members.size)
        found = _attend(reader, stacked, one, position, many, softcap, need_lse=True)
        out[ids], lse[ids] = (x[0].unflatten(1, (members.size, -1)).transpose(0, 1) for x in found)
    return out, lse


def _attend(
    reader: Reader,
    q: Tensor,
    items: Items,
    position: Tensor | None,
    slopes: Tensor | None,
    softcap: float | None,
    need_lse: bool,
) -> Parts:
    """Rows of queries (items, kv_heads, rows, d), scaled, with the blocks of their item, a group of items at a time.

    `position` (items, rows) or (items, 1) says where queries stand, and `slopes` (kv_heads, rows) belong to them.
    """
    dtype = wide(q)
    block, dv = reader.stored.block, reader.stored.values.shape[3]
    out = q.new_zeros(*q.shape[:3], dv, dtype=dtype)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=dtype) if need_lse else out[..., 0]
    for group in items.groups(block, reader.limit):
        some = items.only(group, block)
        ids = group if isinstance(group, slice) else torch.from_numpy(group).to(q.device)
        reader.turn_to(some)
        scores = reader.scores(q[ids]).to(dtype)  # (m, kv_heads, rows, n)
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        if slopes is not None and position is not None:
            distance = position[ids, None, :, None] - torch.arange(scores.shape[-1], device=q.device)
            scores.sub_(slopes[..., None].to(dtype) * distance.abs().to(dtype))
        if softcap is not None or not reader.hides:
            _hide(scores, some)
        weights = torch.softmax(scores, -1)
        if need_lse:  # the heaviest weight is exp(its score − L)
            lse[ids] = scores.amax(-1) - weights.amax(-1).log()
        out[ids] = reader.average(weights).to(dtype)
    return out, lse


def _hide(scores: Tensor, items: Items) -> None:
    """Set to −∞, in place, what is not seen."""
    n = scores.shape[-1]
    if items.start.any() or (items.stop < n).any():
        start, stop = (torch.from_numpy(x).to(scores.device)[:, None] for x in (items.start, items.stop))
        key = torch.arange(n, device=scores.device)
        hidden = (key < start) | (key >= stop)  # (m, n)
        scores.masked_fill_(hidden[:, None, None], -torch.inf)


class Gathered(Reader):
    """Copies the blocks of each key/value head together, for two matrix products."""

    hides = False

    def __init__(self, q: Tensor, stored: Stored) -> None:
        self.stored = stored
        on_cpu = q.device.type == "cpu"
        # float16 is computed in float32 on a CPU, which has no fast float16 arithmetic
        self.dtype = torch.float32 if on_cpu and q.dtype == torch.float16 else q.dtype
        size = max(stored.keys.shape[3], stored.values.shape[3])
        room = (SCRATCH if on_cpu else SCRATCH_ELSEWHERE) // self.dtype.itemsize
        self.limit = max(stored.block, room // (stored.keys.shape[1] * size))
        self._scratch: Tensor | None = None

    def turn_to(self, items: Items) -> None:
        """Find where the pieces lie, block · d numbers each, that belong together: rows (m, kv_heads, width)."""
        heads, device = self.stored.keys.shape[1], self.stored.keys.device
        self.items = items
        self.rows = torch.from_numpy(items.table).to(device)[:, None] * heads
        self.rows = self.rows + torch.arange(heads, device=device)[:, None]
        width, each = items.table.shape[1], max(1, self.limit // self.stored.block)
        alone = items.table.shape[0] == 1  # only then is there more than fits the scratch
        self.columns = [slice(i, i + each) for i in range(0, width, each)] if alone else [slice(0, width)]

    def scores(self, q: Tensor) -> Tensor:
        """The first product; of a long sequence, in pieces that fit the scratch."""
        q = q.to(self.dtype).flatten(0, 1)
        found = [torch.bmm(q, self.copied(0, columns).mT) for columns in self.columns]
        return (found[0] if len(found) == 1 else torch.cat(found, -1)).unflatten(0, self.rows.shape[:2])

    def average(self, weights: Tensor) -> Tensor:
        """The second product. Values that are not seen become 0, since 0 · NaN is NaN."""
        weights = weights.to(self.dtype).flatten(0, 1)
        products = []
        for columns in self.columns:
            values = self.copied(1, columns)  # (m · kv_heads, n, dv)
            first, n = columns.start * self.stored.block, values.shape[1]
            by_item = values.unflatten(0, self.rows.shape[:2])
            for i in np.flatnonzero((self.items.start > first) | (self.items.stop < first + n)):
                by_item[i, :, : max(0, int(self.items.start[i]) - first)] = 0
                by_item[i, :, max(0, int(self.items.stop[i]) - first) :] = 0
            products.append(torch.bmm(weights[..., first : first + n], values))
        total = products[0] if len(products) == 1 else torch.stack(products).sum(0, dtype=wide(products[0]))
        return total.unflatten(0, self.rows.shape[:2])

    def copied(self, which: int, columns: slice) -> Tensor:
        """Keys (0) or values (1) of some columns of the table: (m · kv_heads, n, ·), in memory that is used again."""
        stored = self.stored.values if which else self.stored.keys
        rows = self.rows[..., columns].flatten()
        pieces = stored.view(-1, stored.shape[2] * stored.shape[3])
        if self.stored.scales is not None:
            scales = self.stored.scales[which].flatten(0, 1).index_select(0, rows)
            codes = pieces.index_select(0, rows).view(*scales.shape, -1)
            found = dequantize(codes, scales, self.dtype)
        else:
            if self._scratch is None or self._scratch.numel() < rows.numel() * pieces.shape[1]:
                self._scratch = pieces.new_empty(rows.numel() * pieces.shape[1])  # fresh memory costs page faults
            out = self._scratch[: rows.numel() * pieces.shape[1]].view(rows.numel(), -1)
            found = torch.index_select(pieces, 0, rows, out=out).to(self.dtype)
        return found.view(self.rows.shape[0] * self.rows.shape[1], -1, stored.shape[3])
