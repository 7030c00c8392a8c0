"""Exact attention that never holds the t × s scores: one tile at a time, forward and backward.

Softmax seems to need a whole row of scores before it can normalise any of them.
It does not: keep a running maximum m and denominator z, and rescale what is
already summed whenever the maximum moves. For a block of queries Qᵢ, walk the
blocks of keys and values (Kⱼ, Vⱼ):

    S  = scale · Qᵢ Kⱼᵀ
    m' = max(m, rowmax S)
    P  = exp(S − m')
    z ← z · exp(m − m') + rowsum P
    A ← A · exp(m − m') + P Vⱼ          at the end   Oᵢ = A / z,   Lᵢ = m + log z

The backward pass keeps O and the log-sum-exp L (one number a row) and computes
each tile of probabilities again, which is cheaper than remembering it:

    P  = exp(S − Lᵢ)                    D  = rowsum(dO ∘ O)
    dV += Pᵀ dO                         dS = P ∘ (dO Vᵀ − D)
    dQ += scale · dS K                  dK += scale · dSᵀ Q

D is the softmax's −P Pᵀ term: Σⱼ Pⱼ dPⱼ = Σⱼ Pⱼ (Vⱼ · dO) = O · dO, so the sum over
a whole row of keys is known before the first of them is read.

The update of (m, z, A) is `merge.merge` of two parts, the tiles so far and the next one,
with O = A / z and L = m + log z; only that the division waits for the end.

Query heads that share a key/value head are stacked in one tile, so grouped keys
are read once and never copied out. A block of queries walks the keys that it sees
and no others: with `causal` it stops at its last visible key, with a window it starts
at its first, and what a mask hides at the ends of a tile, or all of it, is passed over.
Queries that see nothing are left out of the loops and stay 0. A single query that sees all, as in decoding,
is two products over all heads.

The options change a tile where `naive` changes S. A soft-cap needs its derivative in
dS; a sink is where the running state starts, m = sink, z = 1, A = 0, instead of from
nothing; and as ∂L/∂S = P, a gradient of L joins in as dS = P ∘ (dO Vᵀ − D + dL).

What makes it fast on a CPU: one head at a time, so that a tile stays in cache;
wide key blocks, since each tile costs a fixed time in Python; in-place updates;
exp2 instead of exp, with log₂e folded into the scale; in 16 bits, where a block
holds the whole row, torch's fused softmax.

Cost:
    2·b·h·t·s·(d + dv) FLOPs forward, about half of that when causal, and in
    proportion to the tiles visited with a window or a mask (`tiles` counts them); the
    backward pass 2.5 times as many, one of its five matmuls being the forward's again.
    Slow memory: `traffic` counts what the paper's loops move for a fast memory of any size.

Memory:
    One tile of block_q × block_k scores beyond inputs and results: linear in t and
    s. For the backward pass O and L stay, b·h·t·(dv + 1) numbers.

Where it loses: on a CPU below some 500 keys it is no faster than `naive`. On a
GPU every line below is a kernel launch per tile: the result is right and the
memory linear, but the point of the paper, tiles that stay on chip, needs one
fused kernel. In bfloat16 the scores are rounded to 16 bits, as `naive` rounds
them; fused kernels keep them in float32 and err about half as much. float16 is
computed in float32 on a CPU, which has no fast float16 arithmetic.

Papers:
    Milakov & Gimelshein 2018, arXiv:1805.02867, Algorithm 3 (online softmax).
    Dao et al. 2022, arXiv:2205.14135, Algorithms 1, 2 and 4, Theorem 2 (tiling, recomputation, traffic).
    Dao 2023, arXiv:2307.08691, Algorithms 1 and 2 (queries outside, L instead of m and z).

See also:
    `mlsys.attention.naive` (the formula), `mlsys.attention.merge` (the update),
    `mlsys.attention.variants` (the options).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise, product
from typing import Any, Literal, NamedTuple, Unpack, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mlsys.attention._inputs import Options, Rules, check_block, check_qkv, check_rules, wide
from mlsys.attention._visible import Band

LOG2E = math.log2(math.e)
# The best of a grid at head_dim 64 on a CPU core with 1 MB of L2, forward and backward, full and causal.
BLOCK_Q, BLOCK_K = 256, 2048
# Scores in a block of whole rows: beyond some 4,000 keys it has fewer rows, but not so few that the matmuls suffer.
ROWS_AT_ONCE, LEAST_ROWS = 1 << 20, 64


class TileOptions(Options, total=False):
    """The options of every attention function, and those of tiles."""

    block_q: int | None
    block_k: int | None
    sweeps: Sweeps | None


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[TileOptions],
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[TileOptions],
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b h_kv s d"],
    v: Float[Tensor, "b h_kv s dv"],
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    mask: Bool[Tensor, "*mask"] | None = None,
    alibi: Float[Tensor, " h"] | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " h"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    block_q: int | None = None,
    block_k: int | None = None,
    sweeps: Sweeps | None = None,
) -> Float[Tensor, "b h t dv"] | tuple[Float[Tensor, "b h t dv"], Float[Tensor, "b h t"]]:
    """Scaled dot-product attention in tiles of `block_q` queries (of each head in a group) by `block_k` keys.

    Options and result are those of `naive.attention`, to rounding, for any lengths and block sizes.
    Left None, `block_q` is 256 divided among the heads of a group and `block_k` is 2048, or in
    bfloat16's forward pass, where the scores are not changed, the whole row of keys, of fewer queries the longer it is.
    NaN and infinity are not looked for. A query whose own row or one of whose visible keys or values
    holds a NaN gets NaN, as in `naive`. A NaN that is hidden stays out of the output in `k`; in
    `v` it also reaches the queries whose tile covers it, since 0 · NaN is NaN, but no others. With a mask, a query
    whose visible scores are all −∞ counts as one that sees nothing. Scores are held in units of log 2, or of the
    soft-cap: beyond 2e38 they are infinite in float32.
    `sweeps` is what happens to a tile between its matmuls: torch's operations unless given.
    Raises TypeError or ValueError naming the argument if shapes, dtypes, devices, options or
    block sizes are wrong; RuntimeError if asked for a second derivative.
    """
    scale = check_qkv(q, k, v, causal, scale)
    rules = check_rules(q, k, causal, window, mask, alibi, softcap, sinks)
    check_block("block_q", block_q)
    check_block("block_k", block_k)
    how = _How(rules, scale, return_lse, block_q, block_k, sweeps or SWEEPS)
    if q.dtype == torch.float16 and q.device.type == "cpu":
        out, lse = _attend(q.float(), k.float(), v.float(), how)
        out = out.half()
    else:
        out, lse = _attend(q, k, v, how)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def varlen(
    q: Float[Tensor, "total_q h d"],
    k: Float[Tensor, "total_k h_kv d"],
    v: Float[Tensor, "total_k h_kv dv"],
    cu_seqlens_q: Int[Tensor, " n_plus_1"],
    cu_seqlens_k: Int[Tensor, " n_plus_1"],
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    alibi: Float[Tensor, " h"] | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " h"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    block_q: int | None = None,
    block_k: int | None = None,
) -> Float[Tensor, "total_q h dv"] | tuple[Float[Tensor, "total_q h dv"], Float[Tensor, "total_q h"]]:
    """Attention of n sequences of different lengths, packed one after the other without padding.

    Sequence i is rows `cu_seqlens_q[i]` … `cu_seqlens_q[i + 1] − 1` of q and likewise of k and v: cumulative lengths,
    from 0 to the total, n + 1 of them. Each query attends to its own sequence only, as one call of `attention` for each
    would have it, with the same options (but a mask, whose shape would be another one for each sequence). Lengths may
    be 0. With `return_lse` the second result is (total_q, h).
    Raises TypeError or ValueError naming the argument if lengths, shapes, dtypes or options are wrong.
    """
    lengths_q = _lengths("q", q, cu_seqlens_q)
    lengths_k = _lengths("k", k, cu_seqlens_k)
    if len(lengths_q) != len(lengths_k):
        raise ValueError(
            "cu_seqlens_k must name as many sequences as cu_seqlens_q, "
            f"{len(lengths_q)}, got {len(lengths_k)} (one number more than sequences)"
        )
    if v.shape[0] != k.shape[0]:
        raise ValueError(f"v must have as many rows as k, {k.shape[0]}, got {v.shape[0]} (shape {tuple(v.shape)})")
    outs, lses = [], []
    # split, whose backward pass writes one gradient; slices would fill one of the whole length for each sequence
    for qi, ki, vi in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True):
        out, lse = attention(
            *(x.transpose(0, 1)[None] for x in (qi, ki, vi)),  # (1, heads, length, ·)
            causal=causal,
            window=window,
            alibi=alibi,
            softcap=softcap,
            sinks=sinks,
            scale=scale,
            return_lse=True,
            block_q=block_q,
            block_k=block_k,
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0].transpose(0, 1))
    out = torch.cat(outs)
    return (out, torch.cat(lses)) if return_lse else out


def _lengths(name: str, x: Tensor, cumulative: Tensor) -> list[int]:
    """The lengths of the sequences packed in q or k."""
    if not isinstance(x, Tensor) or x.ndim != 3:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a packed tensor (total, heads, head_dim), got {got}")
    where = f"cu_seqlens_{name}"
    if not isinstance(cumulative, Tensor) or cumulative.dtype not in (torch.int32, torch.int64):
        kind = cumulative.dtype if isinstance(cumulative, Tensor) else type(cumulative).__name__
        raise TypeError(f"{where} must be an int32 or int64 tensor, got {kind}")
    if cumulative.ndim != 1 or cumulative.shape[0] < 2:
        raise ValueError(
            f"{where} must have one number more than sequences, at least 2, got shape {tuple(cumulative.shape)}"
        )
    ends = cumulative.tolist()
    lengths = [end - start for start, end in pairwise(ends)]
    if ends[0] != 0 or ends[-1] != x.shape[0] or min(lengths) < 0:
        raise ValueError(
            f"{where} must go up from 0 to the rows of {name}, {x.shape[0]}, got {ends}: "
            "cumulative lengths, e.g. [0, 3, 8] for lengths 3 and 5"
        )
    return lengths


def tiles(
    t: int,
    s: int,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    mask: Bool[Tensor, "t s"] | None = None,
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
) -> list[tuple[range, range]]:
    """The tiles that `attention` visits for one head, in their order: (queries, keys) of each.

    It is the walk of the forward pass itself, without the arithmetic: what it leaves out is never computed. A tile is
    narrower than `block_k` where there is no more to see.
    """
    check_block("block_q", block_q)
    check_block("block_k", block_k)
    q, k = (torch.empty(1, 1, n, 1, device=None if mask is None else mask.device) for n in (t, s))
    rules = check_rules(q, k, causal, window, mask, None, None, None)
    found = []
    for rows in rules.band.query_blocks(block_q):
        strip = Tile(0, slice(0, 1), rows, slice(*rules.band.keys(rows)))
        found += [
            (range(rows.start, rows.stop), range(tile.columns.start, tile.columns.stop))
            for tile in _tiles(strip, block_k, rules.mask)
        ]
    return found


def traffic(t: int, s: int, d: int, sram: int, *, backward: bool = False) -> int:
    """Elements moved between slow memory and a fast one of `sram` elements by the paper's Algorithm 1, for one head.

    Counted load by load and store by store, in the paper's loops: key blocks outside, query blocks inside, block sizes
    ⌈M/4d⌉ and min(⌈M/4d⌉, d). With `backward`, those of Algorithm 4 as well. Theorem 2: Θ(t·s·d²/M), for M between d
    and s·d; `attention` itself has the queries outside, as FlashAttention-2 has, and stores each output once.
    """
    for name, size in (("t", t), ("s", s), ("d", d), ("sram", sram)):
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be an int, got {type(size).__name__} {size!r}")
    if min(t, s) < 0 or min(d, sram) < 1:
        raise ValueError(f"t and s must be at least 0, d and sram at least 1, got t={t}, s={s}, d={d}, sram={sram}")
    block_k = math.ceil(sram / (4 * d))
    block_q = min(block_k, d)
    moved = 0
    for j in range(0, s, block_k):
        keys = min(block_k, s - j)
        moved += 2 * keys * d  # load Kj, Vj
        for i in range(0, t, block_q):
            rows = min(block_q, t - i)
            moved += 2 * rows * d + 2 * rows  # load Qi, Oi, li, mi
            moved += rows * d + 2 * rows  # store Oi, li, mi
        if not backward:
            continue
        moved += 2 * keys * d  # load Kj, Vj
        for i in range(0, t, block_q):
            rows = min(block_q, t - i)
            moved += 4 * rows * d + 2 * rows  # load Qi, Oi, dOi, dQi, li, mi
            moved += rows * d  # store dQi
        moved += 2 * keys * d  # store dKj, dVj
    return moved


class Blocks(NamedTuple):
    """Tiles to take where none are asked for, (block_q, block_k).

    full: of a forward pass in which every query sees every key. band: with one, whose edge makes waste of tall tiles.
    """

    full: tuple[int, int]
    band: tuple[int, int]
    backward: tuple[int, int]


class Sweeps(NamedTuple):
    """What is done to the scores of a tile between the matmuls: pure memory traffic, which a compiler can fuse.

    softmax:  (scores, state, tile, plan). Turns scores into P; state is m, z and exp(m − m'), (3, group·rows, 1).
    gradient: (scores, dp, lse, delta, tile, plan). Turns scores into P and dP into dS.
    """

    softmax: Callable[[Tensor, Tensor, Tile, Plan], None]
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor, Tile, Plan], None]
    blocks: Blocks


class _How(NamedTuple):
    """The checked options of a call."""

    rules: Rules
    scale: float
    return_lse: bool
    block_q: int | None
    block_k: int | None
    sweeps: Sweeps

    @property
    def plain(self) -> bool:
        """Whether nothing was asked for that changes scores or sets the tiles."""
        return self.rules.by_band_alone and self.block_q is None and self.block_k is None

    @property
    def unit(self) -> float:
        """What the scores are in while they are products: units of log 2, or of the soft-cap, ready for tanh."""
        return LOG2E if self.rules.softcap is None else 1 / self.rules.softcap


def _attend(q: Tensor, k: Tensor, v: Tensor, how: _How) -> tuple[Tensor, Tensor | None]:
    """O and, if it is returned, L in natural logarithms; recorded for a backward pass if one may come."""
    sinks = how.rules.sinks
    given = (q, k, v) if sinks is None else (q, k, v, sinks)
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        out, lse = _Flash.apply(q, k, v, sinks, how)
        return out, lse
    lse2 = _empty_lse(q) if how.return_lse else None
    out = _forward(q, k, v, sinks, lse2, how)
    return out, None if lse2 is None else lse2 / LOG2E


class _Flash(torch.autograd.Function):
    """Keeps the inputs, O and L for the backward pass; never a tile."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, how: _How
    ) -> tuple[Tensor, Tensor | None]:
        lse = _empty_lse(q)
        out = _forward(q, k, v, sinks, lse, how)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.how = how
        return out, lse / LOG2E if how.return_lse else None

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():  # create_graph=True, but the loops below record nothing to derive again
            raise RuntimeError("flash.attention has no second derivative: use naive.attention with create_graph=True")
        grad_out, grad_lse = grads
        q, k, v, sinks, out, lse = ctx.saved_tensors
        return (*_backward(grad_out, grad_lse, q, k, v, sinks, out, lse, ctx.how), None)


class Plan(NamedTuple):
    """What the tiles of one pass share."""

    how: _How
    group: int  # query heads that read one key/value head, stacked in a tile
    block_q: int
    block_k: int
    band: Band  # the rules' own, as the next: a tile is a matter of microseconds
    by_band_alone: bool
    # Space for two tiles of scores, and for a block of scaled queries and one of results: fresh memory for each would
    # cost page faults, some 10% of the time
    buffers: tuple[Tensor, ...]
    scaled: Tensor
    numerator: Tensor
    future: Tensor  # (block_q, block_q) True where a key comes after the query, on the diagonal


class Tile(NamedTuple):
    """A place in the matrix of scores: the query heads of one key/value head, some queries, some keys."""

    batch: int
    heads: slice
    rows: slice
    columns: slice


def _plan(q: Tensor, k: Tensor, v: Tensor, how: _How, blocks: tuple[int, int], passes: int) -> Plan:
    band = how.rules.band
    group = q.shape[1] // k.shape[1]
    block_q = max(1, min(q.shape[2], how.block_q or blocks[0] // group))
    block_k = max(1, min(k.shape[2], how.block_k or blocks[1]))
    future = torch.ones(block_q, block_q, dtype=torch.bool, device=q.device).triu(1)
    columns = min(block_k, band.widest(block_q))
    rows = group * block_q
    buffers = q.new_empty(passes, rows * columns).unbind()
    scaled, numerator = q.new_empty(rows * q.shape[3]), q.new_empty(rows * v.shape[3], dtype=wide(q))
    return Plan(how, group, block_q, block_k, band, how.rules.by_band_alone, buffers, scaled, numerator, future)


def _forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, lse: Tensor | None, how: _How) -> Tensor:
    """O (b, h, t, dv); L (b, h, t) is written into `lse` if there is one.

    L is kept in units of log 2, as the scores are: converted to natural logarithms and back, a large
    L would be off by its own rounding, and with it every probability of its row in the backward pass.
    """
    batch, h_kv, s, _ = k.shape
    if q.shape[2] == 1 and s > 0 and how.plain and not how.rules.band.bounded:
        return _one_query(q, k, v, lse, how)
    row_at_once = q.element_size() == 2 and how.rules.by_band_alone
    blocks = how.sweeps.blocks.band if how.rules.band.bounded else how.sweeps.blocks.full
    if row_at_once:
        blocks = max(LEAST_ROWS, min(BLOCK_Q, ROWS_AT_ONCE // max(s, 1))), s
    plan = _plan(q, k, v, how, blocks, passes=1)
    blind = plan.band.blind

    out = v.new_empty(*q.shape[:-1], v.shape[-1])
    out[:, :, :blind] = 0
    if lse is not None and sinks is not None:
        lse[:, :, :blind] = sinks[:, None] * LOG2E
    for b, head in product(range(batch), range(h_kv)):
        heads = slice(head * plan.group, (head + 1) * plan.group)  # the query heads that read this key/value head
        keys, values = k[b, head].contiguous(), v[b, head].contiguous()  # (s, d), (s, dv)
        for rows in plan.band.query_blocks(plan.block_q):
            start, stop = plan.band.keys(rows)
            strip = Tile(b, heads, rows, slice(start, stop))
            row_lse = None if lse is None else lse[b, heads, rows]
            if row_at_once and stop - start <= plan.block_k:
                o = _fused_softmax(q[b, heads, rows], keys, values, row_lse, strip, plan)
            else:
                o = _online_softmax(q[b, heads, rows], keys, values, sinks, row_lse, strip, plan)
            out[b, heads, rows] = o.view(plan.group, -1, v.shape[-1])
    return out


def _online_softmax(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, lse: Tensor | None, strip: Tile, plan: Plan
) -> Tensor:
    """O of one block of queries (group, rows, d), tile by tile along the keys that some of them see."""
    rows = q.shape[1]
    q = _scaled(q, plan.how.scale * plan.how.unit, plan)  # (group·rows, d); its products are the scores in `unit`
    acc = _shaped(plan.numerator, q.shape[0], v.shape[1])
    state = acc.new_zeros(3, q.shape[0], 1)
    m, z, rescale = state.unbind()  # maximum and denominator so far, of nothing: the lowest number instead of −∞,
    m.fill_(torch.finfo(m.dtype).min)  # so that −∞ − m is never −∞ + ∞
    if sinks is not None:
        m.view(plan.group, rows).copy_((sinks[strip.heads] * LOG2E)[:, None])
        z.fill_(1.0)

    first = True
    for tile in _tiles(strip, plan.block_k, plan.how.rules.mask):
        scores = _product(q, k[tile.columns].mT, plan.buffers[0])  # (group·rows, columns)
        plan.how.sweeps.softmax(scores, state, tile, plan)
        if not first:
            acc.mul_(rescale)
        _add_product(acc, scores.to(v.dtype), v[tile.columns], to_nothing=first)
        first = False
    if lse is not None:
        lse.copy_((z.log2() + m).view(lse.shape))
    if first:  # a mask hides every tile
        return acc.zero_()
    if plan.how.rules.mask is not None:
        z.masked_fill_(z == 0, 1.0)  # a query that sees nothing
    return acc.div_(z)


def _one_query(q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None, how: _How) -> Tensor:
    """O of a single query that sees every key, as in decoding.

    Its scores are one row a head: nothing to tile, and all heads at once spare the walk over them.
    """
    heads = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # (b, h_kv, group, d)
    scores = (heads * how.scale) @ k.mT  # (b, h_kv, group, s)
    if lse is not None:
        lse.copy_((scores.to(wide(q)).logsumexp(-1) * LOG2E).view(lse.shape))
    return (scores.softmax(-1) @ v).view(*q.shape[:3], v.shape[-1])


def _fused_softmax(q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None, strip: Tile, plan: Plan) -> Tensor:
    """The same for 16 bits and a key block that holds the row: nothing to merge, and torch's softmax is one pass."""
    q = _scaled(q, plan.how.scale, plan)
    keys = k[strip.columns]
    scores = torch.mm(q, keys.mT, out=_shaped(plan.buffers[0], q.shape[0], keys.shape[0]))
    _hide(scores, strip, plan)
    if lse is not None:
        lse.copy_((scores.float().logsumexp(-1) * LOG2E).view(lse.shape))
    return torch.mm(torch.softmax(scores, -1, out=scores), v[strip.columns])


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    how: _How,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dQ, dK, dV, dsinks: each key block against the query blocks that see it (FlashAttention-2, Algorithm 2)."""
    batch, h_kv, s, _ = k.shape
    plan = _plan(q, k, v, how, how.sweeps.blocks.backward, passes=2)
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)  # D (b, h, t)
    if grad_lse is not None and how.return_lse:
        delta = delta - grad_lse  # dS = P ∘ (dP − D + dL)
    if how.rules.mask is not None:  # a row that sees nothing: exp(−∞ − ∞) is 0 where exp(−∞ + ∞) is NaN
        lse = lse.masked_fill(lse == -math.inf, math.inf)
    dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
    # Keys along the last axis: their products are then wide and low, which BLAS likes better than high and narrow
    dk, dv = (torch.zeros(x.mT.shape, dtype=lse.dtype, device=x.device) for x in (k, v))

    for b, head in product(range(batch), range(h_kv)):
        heads = slice(head * plan.group, (head + 1) * plan.group)
        for j in range(0, s, plan.block_k):
            block = slice(j, j + plan.block_k)
            kj, vj = k[b, head, block].contiguous(), v[b, head, block].contiguous()
            for rows in plan.band.query_blocks(plan.block_q):
                tile = _within(Tile(b, heads, rows, block), plan)
                if tile is None:
                    continue
                kt, vt = (x[tile.columns.start - j : tile.columns.stop - j] for x in (kj, vj))
                qi = _scaled(q[b, heads, rows], how.scale * how.unit, plan)  # (group·rows, d)
                doi = grad_out[b, heads, rows].flatten(0, 1)  # (group·rows, dv)
                scores = _product(qi, kt.mT, plan.buffers[0])  # (group·rows, columns)
                dp = _product(doi, vt.mT, plan.buffers[1])
                lse_i, delta_i = lse[b, heads, rows].reshape(-1, 1), delta[b, heads, rows].reshape(-1, 1)
                how.sweeps.gradient(scores, dp, lse_i, delta_i, tile, plan)
                p, ds = scores.to(q.dtype), dp.to(q.dtype)
                _add_product(dv[b, head, :, tile.columns], doi.mT, p)
                _add_product(dk[b, head, :, tile.columns], qi.mT, ds)  # sums over the heads of the group as well
                dq[b, heads, rows] += torch.mm(ds, kt).view(plan.group, -1, q.shape[-1])
    dq.mul_(how.scale)
    dk.div_(how.unit)  # qi carried scale · unit
    grad_sinks = None
    if sinks is not None:  # the sink's value is nothing, so its dP is 0
        grad_sinks = -(torch.exp2(sinks[:, None] * LOG2E - lse) * delta).sum((0, 2))
    return dq.to(q.dtype), dk.mT.to(k.dtype), dv.mT.to(v.dtype), grad_sinks


# --- which tiles ------------------------------------------------------------------------------------------------------


def _tiles(strip: Tile, block_k: int, mask: Tensor | None) -> Iterator[Tile]:
    """The tiles along a strip of keys, without what a mask hides altogether."""
    batch, heads, rows, columns = strip
    for j in range(columns.start, columns.stop, block_k):
        tile = _trimmed(Tile(batch, heads, rows, slice(j, min(j + block_k, columns.stop))), mask)
        if tile is not None:
            yield tile


def _within(tile: Tile, plan: Plan) -> Tile | None:
    """The part of a tile that some query of it sees; None if there is none."""
    start, stop = plan.band.keys(tile.rows)
    columns = slice(max(start, tile.columns.start), min(stop, tile.columns.stop))
    return _trimmed(tile._replace(columns=columns), plan.how.rules.mask) if columns.start < columns.stop else None


def _trimmed(tile: Tile, mask: Tensor | None) -> Tile | None:
    """From the first key that the mask shows to some query of the tile to the last; None if it shows none."""
    if mask is None:
        return tile
    shown = mask[tile].any(1).any(0).nonzero()
    if len(shown) == 0:
        return None
    start = tile.columns.start
    return tile._replace(columns=slice(start + int(shown[0]), start + int(shown[-1]) + 1))


# --- what happens in a tile -------------------------------------------------------------------------------------------


def _shaped(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer[: rows * columns].view(rows, columns)


def _scaled(q: Tensor, by: float, plan: Plan) -> Tensor:
    """Queries of a group times a number, with its heads one below the other: (group·rows, d)."""
    scaled = _shaped(plan.scaled, q.shape[0] * q.shape[1], q.shape[2])
    torch.mul(q, by, out=scaled.view(q.shape))
    return scaled


def _product(a: Tensor, b: Tensor, buffer: Tensor) -> Tensor:
    """The product of a and b, in `buffer` or, if that is 16 bits, widened."""
    return torch.mm(a, b, out=_shaped(buffer, a.shape[0], b.shape[1])).to(wide(a))


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, to_nothing: bool = False) -> None:
    """Add a · b to `total`, which may be wider, or hold nothing yet."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if to_nothing else 1)
    elif to_nothing:
        total.copy_(torch.mm(a, b))
    else:
        total.add_(torch.mm(a, b))


def _softmax_sweep(scores: Tensor, state: Tensor, tile: Tile, plan: Plan) -> None:
    m, z, rescale = state
    change(scores, tile, plan)
    _hide(scores, tile, plan)
    m_new = torch.maximum(m, scores.amax(-1, keepdim=True))
    torch.sub(m, m_new, out=rescale).exp2_()  # from units of exp(m) to units of exp(m_new)
    scores.sub_(m_new).exp2_()
    z.mul_(rescale).add_(scores.sum(-1, keepdim=True))
    m.copy_(m_new)


def _gradient_sweep(scores: Tensor, dp: Tensor, lse: Tensor, delta: Tensor, tile: Tile, plan: Plan) -> None:
    slope = change(scores, tile, plan, derivative=True)
    _hide(scores, tile, plan)
    p = scores.sub_(lse).exp2_()
    ds = dp.sub_(delta).mul_(p)
    if slope is not None:
        ds.mul_(slope)


SWEEPS = Sweeps(_softmax_sweep, _gradient_sweep, Blocks(*[(BLOCK_Q, BLOCK_K)] * 3))


def change(scores: Tensor, tile: Tile, plan: Plan, *, derivative: bool = False) -> Tensor | None:
    """Soft-cap, ALiBi and mask, in place, to units of log 2; the soft-cap's derivative if asked for."""
    rules = plan.how.rules
    if plan.by_band_alone:
        return None
    slope = None
    if rules.softcap is not None:
        scores.tanh_()
        slope = 1 - scores.square() if derivative else None
        scores.mul_(rules.softcap * LOG2E)
    by_head = scores.view(plan.group, -1, scores.shape[1])
    if rules.alibi is not None:
        position, key = (torch.arange(x.start, x.stop, device=scores.device) for x in (tile.rows, tile.columns))
        distance = (position[:, None] + (plan.band.s - plan.band.t) - key).abs().to(scores.dtype)
        by_head.addcmul_(rules.alibi[tile.heads, None, None], distance, value=-LOG2E)
    if rules.mask is not None:
        by_head.masked_fill_(~rules.mask[tile], -math.inf)
    return slope


def edges(tile: Tile, plan: Plan) -> tuple[int, int]:
    """The first and the last column of a tile that its row 0 sees; each row sees one further. They may lie outside."""
    t, s, left, right = plan.band
    stands = tile.rows.start + s - t - tile.columns.start  # the column at which row 0 stands
    return stands - left, stands + right


def _hide(scores: Tensor, tile: Tile, plan: Plan) -> None:
    """Set to −∞, in place, what row r of each head may not see: columns before first + r and after last + r."""
    rows, columns = scores.shape[0] // plan.group, scores.shape[1]
    first, last = edges(tile, plan)
    if last + 1 < columns:
        start = max(0, last)  # the triangle lies with its corner on column `last`, which may be left of this tile
        future = plan.future[:rows, start - last : columns - last]
        scores.view(plan.group, rows, columns)[:, :, start:].masked_fill_(future, -math.inf)
    if first + rows > 1:  # the other triangle, mirrored; its corner is in this tile or left of it
        past = plan.future.mT[:rows, -first : columns - first]
        scores.view(plan.group, rows, columns)[:, :, : past.shape[1]].masked_fill_(past, -math.inf)


def _empty_lse(q: Tensor) -> Tensor:
    """L of queries that have seen nothing yet, (b, h, t)."""
    return q.new_full(q.shape[:-1], -math.inf, dtype=wide(q))
