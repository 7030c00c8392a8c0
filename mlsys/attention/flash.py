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

Query heads that share a key/value head are stacked in one tile, so grouped keys
are read once and never copied out. A causal query block stops at its last visible
key; queries that see nothing are left out of the loops and stay 0.

What makes it fast on a CPU: one head at a time, so that a tile stays in cache;
wide key blocks, since each tile costs a fixed time in Python; in-place updates;
exp2 instead of exp, with log₂e folded into the scale; in 16 bits, where a block
holds the whole row, torch's fused softmax.

Cost:
    2·b·h·t·s·(d + dv) FLOPs forward, about half of that when causal; the backward
    pass 2.5 times as many, one of its five matmuls being the forward's again.

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
    Dao et al. 2022, arXiv:2205.14135, Algorithms 1, 2 and 4 (tiling, recomputation).
    Dao 2023, arXiv:2307.08691, Algorithms 1 and 2 (queries outside, L instead of m and z).

See also:
    `mlsys.attention.naive` (the formula).
"""

import math
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mlsys.attention._inputs import check_block, check_qkv

LOG2E = math.log2(math.e)
# The best of a grid at head_dim 64 on a CPU core with 1 MB of L2, forward and backward, full and causal.
BLOCK_Q, BLOCK_K = 256, 2048


def attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b h_kv s d"],
    v: Float[Tensor, "b h_kv s dv"],
    *,
    causal: bool = False,
    scale: float | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
) -> Float[Tensor, "b h t dv"]:
    """Scaled dot-product attention in tiles of `block_q` queries (of each head in a group) by `block_k` keys.

    Same result as `naive.attention`, to rounding, for any lengths and block sizes.
    Left None, `block_q` is 256 divided among the heads of a group and `block_k` is
    2048, or in bfloat16's forward pass the whole row of keys, which is still linear memory.
    NaN and infinity are not looked for. A query whose own row or one of whose visible keys or values
    holds a NaN gets NaN, as in `naive`. A NaN that the mask hides stays out of the output in `k`; in
    `v` it also reaches the queries whose tile covers it, since 0 · NaN is NaN, but no others.
    Raises TypeError or ValueError naming the argument if shapes, dtypes, devices or
    block sizes are wrong; RuntimeError if asked for a second derivative.
    """
    scale = check_qkv(q, k, v, causal, scale)
    check_block("block_q", block_q)
    check_block("block_k", block_k)
    if q.dtype == torch.float16 and q.device.type == "cpu":
        q, k, v = q.float(), k.float(), v.float()
        return attention(q, k, v, causal=causal, scale=scale, block_q=block_q, block_k=block_k).half()
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out: Tensor = _Flash.apply(q, k, v, causal, scale, block_q, block_k)
        return out
    return _forward(q, k, v, None, causal, scale, block_q, block_k)


class _Flash(torch.autograd.Function):
    """Keeps the inputs, O and L for the backward pass; never a tile."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> Tensor:
        lse = q.new_full(q.shape[:-1], -math.inf, dtype=_wide(q))  # (b, h, t)
        out = _forward(q, k, v, lse, *settings)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = settings
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():  # create_graph=True, but the loops below record nothing to derive again
            raise RuntimeError("flash.attention has no second derivative: use naive.attention with create_graph=True")
        return (*_backward(*grads, *ctx.saved_tensors, *ctx.settings), *(None for _ in ctx.settings))


class _Tiling(NamedTuple):
    """What the tiles of one pass share."""

    group: int  # query heads that read one key/value head, stacked in a tile
    block_q: int
    block_k: int
    buffers: Tensor  # (2, ·) space for two tiles: fresh memory for each would cost page faults
    future: Tensor  # (block_q, block_q) True where a key comes after the query, on the diagonal


def _tiling(q: Tensor, k: Tensor, block_q: int | None, block_k: int, passes: int) -> _Tiling:
    group = q.shape[1] // k.shape[1]
    block_q = max(1, min(q.shape[2], block_q or BLOCK_Q // group))
    block_k = max(1, min(k.shape[2], block_k))
    future = torch.ones(block_q, block_q, dtype=torch.bool, device=q.device).triu(1)
    return _Tiling(group, block_q, block_k, q.new_empty(passes, group * block_q * block_k), future)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor | None,
    causal: bool,
    scale: float,
    block_q: int | None,
    block_k: int | None,
) -> Tensor:
    """O (b, h, t, dv); L (b, h, t) is written into `lse` if there is one.

    L is kept in units of log 2, as the scores are: converted to natural logarithms and back, a large
    L would be off by its own rounding, and with it every probability of its row in the backward pass.
    """
    batch, h_kv, s, _ = k.shape
    half = q.element_size() == 2
    tiling = _tiling(q, k, block_q, block_k or (s if half else BLOCK_K), passes=1)
    attend = _fused_softmax if half and tiling.block_k >= s else _online_softmax

    out = v.new_empty(*q.shape[:-1], v.shape[-1])
    out[:, :, : _blind(q.shape[2], s, causal)] = 0
    for b, head in product(range(batch), range(h_kv)):
        heads = slice(head * tiling.group, (head + 1) * tiling.group)  # the query heads that read this key/value head
        keys, values = k[b, head].contiguous(), v[b, head].contiguous()  # (s, d), (s, dv)
        for rows, last in _query_blocks(q.shape[2], s, causal, tiling.block_q):
            row_lse = None if lse is None else lse[b, heads, rows]
            o = attend(q[b, heads, rows], keys, values, row_lse, scale, last, tiling)
            out[b, heads, rows] = o.view(tiling.group, -1, v.shape[-1])
    return out


def _online_softmax(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None, scale: float, last: int, tiling: _Tiling
) -> Tensor:
    """O of one block of queries (group, rows, d), the first row of which sees keys 0 … last."""
    end = min(k.shape[0], last + q.shape[1])  # keys that some query of the block sees
    q = (q * (scale * LOG2E)).flatten(0, 1)  # (group·rows, d); scores come out in units of log 2

    for j in range(0, end, tiling.block_k):
        kj, vj = (x[j : min(j + tiling.block_k, end)] for x in (k, v))
        scores = _product(q, kj.mT, tiling.buffers[0])  # (group·rows, block_k)
        _hide(scores, last - j, tiling)
        # The lowest number instead of −∞, so that −∞ − m is never −∞ + ∞
        tile_max = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
        if j == 0:
            m = tile_max
            p = scores.sub_(m).exp2_()
            z = p.sum(-1, keepdim=True)
            acc = torch.mm(p.to(v.dtype), vj).to(p.dtype)
        else:
            m_new = torch.maximum(m, tile_max)
            p = scores.sub_(m_new).exp2_()
            rescale = m.sub_(m_new).exp2_()  # from units of exp(m) to units of exp(m_new)
            z.mul_(rescale).add_(p.sum(-1, keepdim=True))
            _add_product(acc.mul_(rescale), p.to(v.dtype), vj)
            m = m_new
    if lse is not None:
        lse.copy_((z.log2() + m).view(lse.shape))
    return acc.div_(z)


def _fused_softmax(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None, scale: float, last: int, tiling: _Tiling
) -> Tensor:
    """The same for 16 bits and a key block that holds the row: nothing to merge, and torch's softmax is one pass."""
    end = min(k.shape[0], last + q.shape[1])
    q = (q * scale).flatten(0, 1)
    scores = torch.mm(q, k[:end].mT, out=_shaped(tiling.buffers[0], q.shape[0], end))
    _hide(scores, last, tiling)
    if lse is not None:
        lse.copy_((scores.float().logsumexp(-1) * LOG2E).view(lse.shape))
    return torch.mm(scores.softmax(-1), v[:end])


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    block_q: int | None,
    block_k: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and dV: each key block against the query blocks that see it (FlashAttention-2, Algorithm 2)."""
    batch, h_kv, s, _ = k.shape
    wide = _wide(q)
    tiling = _tiling(q, k, block_q, block_k or BLOCK_K, passes=2)
    delta = (grad_out.to(wide) * out.to(wide)).sum(-1)  # D (b, h, t)
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))

    for b, head in product(range(batch), range(h_kv)):
        heads = slice(head * tiling.group, (head + 1) * tiling.group)
        for j in range(0, s, tiling.block_k):
            block = slice(j, j + tiling.block_k)
            kj, vj = k[b, head, block].contiguous(), v[b, head, block].contiguous()
            for rows, last in _query_blocks(q.shape[2], s, causal, tiling.block_q):
                seen = min(kj.shape[0], last + rows.stop - rows.start - j)  # keys of this block that some query sees
                if seen <= 0:
                    continue
                qi = (q[b, heads, rows] * (scale * LOG2E)).flatten(0, 1)  # (group·rows, d)
                doi = grad_out[b, heads, rows].flatten(0, 1)  # (group·rows, dv)
                scores = _product(qi, kj[:seen].mT, tiling.buffers[0])  # (group·rows, seen)
                _hide(scores, last - j, tiling)
                p = scores.sub_(lse[b, heads, rows].reshape(-1, 1)).exp2_()
                _add_product(dv[b, head, block][:seen], p.to(q.dtype).mT, doi)
                dp = _product(doi, vj[:seen].mT, tiling.buffers[1])
                ds = dp.sub_(delta[b, heads, rows].reshape(-1, 1)).mul_(p).to(q.dtype)
                dq[b, heads, rows] += torch.mm(ds, kj[:seen]).view(tiling.group, -1, q.shape[-1])
                _add_product(dk[b, head, block][:seen], ds.mT, qi)  # sums over the heads of the group as well
    dq.mul_(scale)
    dk.div_(LOG2E)  # qi carried scale · log₂e
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _blind(t: int, s: int, causal: bool) -> int:
    """How many queries, the first ones, see no key at all."""
    if s == 0:
        return t
    return max(0, t - s) if causal else 0


def _query_blocks(t: int, s: int, causal: bool, block_q: int) -> Iterator[tuple[slice, int]]:
    """Blocks of the queries that see a key, each with the last key that its first query sees."""
    for i in range(_blind(t, s, causal), t, block_q):
        yield slice(i, min(i + block_q, t)), i + s - t if causal else s - 1


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of scores, sums and gradients while they are worked on."""
    return torch.float32 if x.element_size() == 2 else x.dtype


def _shaped(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer[: rows * columns].view(rows, columns)


def _product(a: Tensor, b: Tensor, buffer: Tensor) -> Tensor:
    """The product of a and b, in `buffer` or, if that is 16 bits, widened."""
    return torch.mm(a, b, out=_shaped(buffer, a.shape[0], b.shape[1])).to(_wide(a))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a · b to `total`, which may be wider."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(torch.mm(a, b))


def _hide(scores: Tensor, last: int, tiling: _Tiling) -> None:
    """Set to −∞, in place, what row r of each head may not see: the columns after last + r."""
    rows, columns = scores.shape[0] // tiling.group, scores.shape[1]
    if last + 1 < columns:
        first = max(0, last)  # the triangle lies with its corner on column `last`, which may be left of this tile
        future = tiling.future[:rows, first - last : columns - last]
        scores.view(tiling.group, rows, columns)[:, :, first:].masked_fill_(future, -math.inf)
