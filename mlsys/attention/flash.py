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
them; fused kernels keep them in float32. With scores of about 1 those err half as
much, with large ones far less: at 64 a bfloat16 is off by up to 1/4, and so is, as
a share, the weight. float16 is
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
from itertools import product
from typing import Any, Literal, Unpack, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mlsys.attention._flash_backward import backward
from mlsys.attention._flash_rows import fused_softmax, one_query, whole_rows
from mlsys.attention._flash_scores import (
    LOG2E,
    Blocks,
    How,
    Plan,
    Sweeps,
    TileOptions,
    add_product,
    change,
    hide,
    make_plan,
    shaped,
    stacked,
)
from mlsys.attention._flash_tiles import BLOCK_K, BLOCK_Q, Tile, along, tiles, traffic
from mlsys.attention._inputs import check_block, check_qkv, check_rules, wide
from mlsys.attention._packed import sequences

__all__ = ["attention", "tiles", "traffic", "varlen"]


class _Options(TileOptions, total=False):
    sweeps: Sweeps | None


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False, **options: Unpack[_Options]
) -> Tensor: ...


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[_Options]
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
    soft-cap: beyond 2e38 they are infinite in float32, and so are unscaled products of q and k beyond 3e38.
    `sweeps` is what happens to a tile between its matmuls: torch's operations unless given.
    Raises TypeError or ValueError naming the argument if shapes, dtypes, devices, options or
    block sizes are wrong; RuntimeError if asked for a second derivative.
    """
    scale = check_qkv(q, k, v, causal, scale)
    rules = check_rules(q, k, causal, window, mask, alibi, softcap, sinks)
    check_block("block_q", block_q)
    check_block("block_k", block_k)
    how = How(rules, scale, return_lse, block_q, block_k, sweeps or SWEEPS)
    if q.dtype == torch.float16 and q.device.type == "cpu":
        out, lse = _attend(q.float(), k.float(), v.float(), how)
        out = out.half()
    else:
        out, lse = _attend(q, k, v, how)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def _attend(q: Tensor, k: Tensor, v: Tensor, how: How) -> tuple[Tensor, Tensor | None]:
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
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, how: How
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
        return (*backward(grad_out, grad_lse, q, k, v, sinks, out, lse, ctx.how), None)


def _forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, lse: Tensor | None, how: How) -> Tensor:
    """O (b, h, t, dv); L (b, h, t) is written into `lse` if there is one.

    L is kept in units of log 2, as the scores are: converted to natural logarithms and back, a large
    L would be off by its own rounding, and with it every probability of its row in the backward pass.
    """
    batch, h_kv, s, _ = k.shape
    if q.shape[2] == 1 and s > 0 and how.plain and not how.rules.band.bounded:
        return one_query(q, k, v, lse, how)
    blocks = how.sweeps.blocks.band if how.rules.band.bounded else how.sweeps.blocks.full
    row_at_once = narrow = False
    if q.element_size() == 2 and how.rules.by_band_alone:
        narrow = how.sweeps.narrow(q)
        row_at_once = not narrow
        blocks = whole_rows(s) if row_at_once else (blocks[0], 2 * blocks[1])  # half the bytes a score
    plan = make_plan(q, k, v, how, blocks, passes=1, narrow=narrow)
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
            attend = fused_softmax if row_at_once and stop - start <= plan.block_k else _online_softmax
            attend(stacked(q[b, heads, rows]), keys, values, sinks, row_lse, out[b, heads, rows], strip, plan)
    return out


def _online_softmax(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, lse: Tensor | None, out: Tensor, strip: Tile, plan: Plan
) -> None:
    """O of one block of queries (group·rows, d) into `out` (group, rows, dv), tile by tile along the keys they see."""
    acc = shaped(plan.numerator, q.shape[0], v.shape[1])
    state = acc.new_zeros(3, q.shape[0], 1)
    m, z, rescale = state.unbind()  # maximum and denominator so far, of nothing: the lowest number instead of −∞,
    m.fill_(torch.finfo(m.dtype).min)  # so that −∞ − m is never −∞ + ∞
    if sinks is not None:
        sink = sinks[strip.heads] if plan.narrow else sinks[strip.heads] * LOG2E
        m.view(plan.group, -1).copy_(sink.clamp(min=torch.finfo(m.dtype).min)[:, None])
        z.fill_(1.0)

    first, softmax = True, plan.how.sweeps.softmax
    widened = wide(q) if wide(q) != q.dtype and not plan.narrow else None
    unit = plan.how.scale * (1 if plan.natural else plan.how.unit)
    scores = product = shaped(plan.buffers[0], q.shape[0], 0)
    for tile in along(strip, plan.block_k, plan.how.rules.mask):  # a millisecond each: a dozen calls of torch are seen
        start, width = tile.columns.start, tile.columns.stop - tile.columns.start
        if width != product.shape[1]:
            scores = product = shaped(plan.buffers[0], q.shape[0], width)  # (group·rows, columns)
        product.addmm_(q, k.narrow(0, start, width).mT, beta=0, alpha=unit)
        if widened:
            scores = product.to(widened)
            if plan.natural:
                scores.mul_(LOG2E)
        if softmax(scores, state, tile, plan) and not first:
            acc.mul_(rescale)
        add_product(acc, scores if widened is None else scores.to(v.dtype), v.narrow(0, start, width), to_nothing=first)
        first = False
    if lse is not None:
        lse.copy_((z.log2() + (m * LOG2E if plan.narrow else m)).view(lse.shape))
    if first:  # a mask hides every tile
        acc.zero_()
    if plan.how.rules.mask is not None:
        z.masked_fill_(z == 0, 1.0)  # a query that sees nothing
    torch.div(acc.view(out.shape), z.view(*out.shape[:2], 1), out=out)


def _softmax_sweep(scores: Tensor, state: Tensor, tile: Tile, plan: Plan) -> bool:
    m, z, rescale = state
    change(scores, tile, plan)
    hide(scores, tile, plan)
    m_new = torch.maximum(m, scores.amax(-1, keepdim=True))
    torch.sub(m, m_new, out=rescale).exp2_()  # from units of exp(m) to units of exp(m_new)
    scores.sub_(m_new).exp2_()
    z.mul_(rescale).add_(scores.sum(-1, keepdim=True))
    m.copy_(m_new)
    return True


def _gradient_sweep(scores: Tensor, dp: Tensor, lse: Tensor, delta: Tensor, tile: Tile, plan: Plan) -> None:
    slope = change(scores, tile, plan, derivative=True)
    hide(scores, tile, plan)
    p = scores.sub_(lse).exp2_()
    ds = dp.sub_(delta).mul_(p)
    if slope is not None:
        ds.mul_(slope)


def _never_narrow(q: Tensor) -> bool:
    return False


SWEEPS = Sweeps(_softmax_sweep, _gradient_sweep, Blocks(*[(BLOCK_Q, BLOCK_K)] * 3), _never_narrow)


def _empty_lse(q: Tensor) -> Tensor:
    """L of queries that have seen nothing yet, (b, h, t)."""
    return q.new_full(q.shape[:-1], -math.inf, dtype=wide(q))


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
    parts = [
        attention(
            *sequence,
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
        for sequence in sequences(q, k, v, cu_seqlens_q, cu_seqlens_k)
    ]
    out, lse = (torch.cat([x[0].transpose(0, 1) for x in side]) for side in zip(*parts, strict=True))
    return (out, lse) if return_lse else out
