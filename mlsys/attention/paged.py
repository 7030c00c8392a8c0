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

from collections.abc import Iterable
from functools import reduce
from typing import Literal, Unpack, overload

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mlsys.attention import flash
from mlsys.attention._inputs import wide
from mlsys.attention._paged_copied import Copy, copied
from mlsys.attention._paged_inputs import (
    DecodeOptions,
    How,
    LayerOptions,
    Parts,
    PrefillOptions,
    Queries,
    Reader,
    Stored,
    check_counted,
    check_how,
    check_packed,
    check_stored,
    check_tables,
)
from mlsys.attention._paged_items import Items, Tables, common_prefixes
from mlsys.attention._pages import whole
from mlsys.attention.kv_cache import PagedKVCache, Sequence
from mlsys.attention.merge import merge


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
    reader: Reader | None = None,
) -> Float[Tensor, "seqs h dv"] | tuple[Float[Tensor, "seqs h dv"], Float[Tensor, "seqs h"]]:
    """One query for each sequence, that of its last token: (seqs, h, d) → (seqs, h, dv).

    `keys` and `values` are one layer of a cache, (blocks, kv_heads, block, d) and (…, dv). Row i of `tables` names
    the blocks of sequence i in order; `lengths[i]` counts its tokens, the query's own included. Both are int32 or
    int64. What stands in a table beyond the length or before the window is not looked at.

    `scales`          of keys and of values, (blocks, kv_heads, block) float32 each, where they are int8 or fp8.
    `splits`          how many parts each sequence is done in.
    `share_prefixes`  full blocks with which several tables begin are done once for all of them.
    `return_lse`      also return the log-sum-exps (seqs, h), float32 at least.
    `reader`          what reads the blocks and attends to them: copied together, for torch's products, unless given.

    `window`, `alibi`, `softcap`, `sinks` and `scale` are those of `naive.attention`. A sequence of no tokens gives 0,
    and −∞ as its lse; with a sink, 0 and the sink.
    Raises TypeError or ValueError naming the argument if anything does not fit; RuntimeError under a gradient.
    """
    how = check_how(q, window, alibi, softcap, sinks, scale)
    stored = Stored(keys, values, scales)
    check_stored(q, stored)
    held = check_tables(tables, lengths, stored)
    out, lse = _decode(q, stored, held, how, splits, share_prefixes, return_lse, reader)
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
    check_stored(q, stored)
    held = check_tables(tables, lengths, stored)
    queries = check_packed(q, cu_seqlens_q, held.length)
    out, lse = _prefill(q, queries, stored, held, how, causal)
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
    reader: Reader | None = None,
) -> Float[Tensor, "b h t d"] | tuple[Float[Tensor, "b h t d"], Float[Tensor, "b h t"]]:
    """The last t queries of each of b sequences of a cache, in the order of a model's layer: (b, h, t, d).

    `pending` counts tokens that this layer has appended and `advance` has not counted yet: t of them within a step.
    The sequences may have any lengths of at least t. A `window` of None is that of the cache. `splits` and
    `share_prefixes` are for one query a sequence, t = 1. The rest is as in `decode` and `prefill`; lse is (b, h, t).
    """
    seqs = list(seqs)
    if not isinstance(q, Tensor):
        raise TypeError(f"q must be a torch.Tensor, got {type(q).__name__}")
    if q.ndim != 4 or q.shape[0] != len(seqs):
        raise ValueError(f"q must be (seqs, heads, t, head_dim) with {len(seqs)} sequences, got {tuple(q.shape)}")
    if window is None:
        window = (-1 if cache.pool.window is None else cache.pool.window, -1)
    whole("splits", splits)
    stored = Stored(*cache.layer(layer))
    b, _, t, _ = q.shape
    rows = q[:, :, 0] if t == 1 else q.transpose(1, 2).flatten(0, 1)
    how = check_how(rows, window, alibi, softcap, sinks, scale)
    check_stored(rows, stored)
    held = cache.held(seqs, pending)
    if t == 1:
        out, lse = _decode(rows, stored, held, how, splits, share_prefixes, return_lse, reader)
        out, lse = out[:, :, None], lse[:, :, None]
    else:
        out, lse = _prefill(rows, np.full(b, t), stored, held, how, causal)
        out, lse = (x.view(b, t, *x.shape[1:]).transpose(1, 2) for x in (out, lse))
    return (out, lse) if return_lse else out


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


def _decode(
    q: Tensor,
    stored: Stored,
    held: Tables,
    how: How,
    splits: int,
    share_prefixes: bool,
    need_lse: bool,
    reader: Reader | None,
) -> Parts:
    """Out (seqs, h, dv) in q's dtype and lse (seqs, h), which is only right if it is needed."""
    whole("splits", splits)
    seqs, heads, d = q.shape
    if held.length.size != seqs:
        raise ValueError(
            f"q must have one query for each of {held.length.size} sequences, got shape {tuple(q.shape)}; "
            "for more than one use prefill"
        )
    read, block, kv_heads = reader or copied, stored.block, stored.keys.shape[1]
    items = held.last(1, how.left)
    merged = splits > 1 or share_prefixes
    need_lse = need_lse or merged or how.sinks is not None
    rows = q.reshape(seqs, kv_heads, heads // kv_heads, d)
    slopes = None if how.alibi is None else how.alibi.view(kv_heads, -1)

    parts = []
    if share_prefixes:
        shared = np.zeros_like(items.stop)
        parts = [_prefixes(rows, stored, items, slopes, how, shared)]
        items = items.part(shared, -(-items.stop // block) - shared, block)
    if splits > 1:
        items, rows = items.split(splits, block), rows.repeat(splits, 1, 1, 1)
    out, lse = read(Queries(rows, how.scale, items.position[:, None], slopes, how.softcap, need_lse), stored, items)
    if merged and seqs:
        parts += zip(out.chunk(splits), lse.chunk(splits), strict=True)
        out, lse = reduce(lambda a, b: merge(*a, *b), parts)
    out, lse = out.reshape(seqs, heads, out.shape[3]), lse.reshape(seqs, heads)
    if how.sinks is not None:  # one more part, of the value 0
        with_sink = torch.logaddexp(lse, how.sinks)
        out, lse = out * torch.exp(lse - with_sink)[..., None], with_sink
    return out.to(q.dtype), lse


def _prefixes(rows: Tensor, stored: Stored, items: Items, slopes: Tensor | None, how: How, shared: np.ndarray) -> Parts:
    """Attention to the blocks with which several items begin; how many those are of each is written into `shared`.

    They are always copied: for so many rows, a matrix product is worth it.
    """
    block = stored.block
    out = rows.new_zeros(*rows.shape[:3], stored.values.shape[3], dtype=wide(rows))
    lse = rows.new_full(rows.shape[:3], -torch.inf, dtype=wide(rows))
    for members, count in common_prefixes(items, block):
        shared[members] = count
        one = Items(items.table[members[:1], :count], *(np.array([x]) for x in (0, count * block, 0)))
        ids = torch.from_numpy(members).to(rows.device)
        stacked = rows[ids].transpose(0, 1).flatten(1, 2)[None]  # (1, kv_heads, members · group, d)
        position = items.position[members].repeat(rows.shape[2])[None]
        many = None if slopes is None else slopes.repeat(1, members.size)
        found = copied(Queries(stacked, how.scale, position, many, how.softcap, need_lse=True), stored, one)
        out[ids], lse[ids] = (x[0].unflatten(1, (members.size, -1)).transpose(0, 1) for x in found)
    return out, lse


def _prefill(q: Tensor, queries: np.ndarray, stored: Stored, held: Tables, how: How, causal: bool) -> Parts:
    """`flash` of each sequence, with a copy of its blocks: out (total_q, h, dv) and lse (total_q, h)."""
    check_counted(queries, held.length)
    items = held.items(queries, how.left)
    out = q.new_zeros(*q.shape[:2], stored.values.shape[3])
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=wide(q))
    end = 0
    for i, count in enumerate(queries.tolist()):
        rows, end = slice(end, end + count), end + count
        if not count:
            continue
        copy, seen = Copy(q, stored), slice(int(items.start[i]), int(items.stop[i]))
        copy.turn_to(items.only(slice(i, i + 1), stored.block))
        k, v = (copy.copied(which, slice(None)).clone()[None, :, seen] for which in (0, 1))  # (1, kv_heads, n, ·)
        found = flash.attention(
            q[None, rows].transpose(1, 2).to(k.dtype), k, v, causal=causal, window=how.window,
            alibi=how.alibi, softcap=how.softcap, sinks=how.sinks, scale=how.scale, return_lse=True,
        )  # fmt: skip
        out[rows], lse[rows] = (x[0].transpose(0, 1) for x in found)
    return out, lse
