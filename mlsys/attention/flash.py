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
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mlsys.attention._inputs import check_block, check_qkv

LOG2E = math.log2(math.e)
BLOCK_Q, BLOCK_K = 256, 2048  # at head_dim 64 the best of a grid on a CPU with 1 MB of L2 a core
SHORT = 2**19  # scores: heads whose tiles are smaller are taken together, up to this many


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
    2048, or in bfloat16 and float16 the whole row of keys (still linear memory).
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
    return _forward(q, k, v, causal, scale, block_q, block_k, want_lse=False)[0]


class _Flash(torch.autograd.Function):
    """Keeps the inputs, O and L for the backward pass; never a tile."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> Tensor:
        out, lse = _forward(q, k, v, *settings, want_lse=True)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = settings
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True, but the loops below record nothing to derive again
            raise RuntimeError("flash.attention has no second derivative: use naive.attention with create_graph=True")
        return (*_backward(*grads, *ctx.saved_tensors, *ctx.settings), *(None for _ in ctx.settings))


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    block_q: int | None,
    block_k: int | None,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """O (b, h, t, dv) and, if wanted, L (n, group, t) with n = b·h_kv."""
    shape = (*q.shape[:-1], v.shape[-1])
    q, k, v = _fold(q, k, v)
    (n, group, t, _), s = q.shape, k.shape[1]
    half = q.element_size() == 2
    block_q = block_q or max(1, BLOCK_Q // group)
    block_k = block_k or (s if half else BLOCK_K)
    out = v.new_zeros(n, group, t, v.shape[-1])
    lse = v.new_full((n, group, t), -math.inf, dtype=_wide(v)) if want_lse else None

    for heads in _heads_at_once(n, group * block_q * min(block_k, s)):
        for rows, last in _query_blocks(t, s, causal, block_q):
            tile = q[heads, :, rows]
            attend = _fused_softmax if half and s <= block_k else _online_softmax
            o, m = attend(tile, k[heads], v[heads], scale, last, block_k, want_lse)
            out[heads, :, rows] = o.view(*tile.shape[:-1], -1)
            if lse is not None:
                lse[heads, :, rows] = m.view(tile.shape[:-1])
    return out.view(shape), lse


def _online_softmax(
    q: Tensor, k: Tensor, v: Tensor, scale: float, last: int, block_k: int, want_lse: bool
) -> tuple[Tensor, Tensor]:
    """O and L of one block of queries (n, group, rows, d), the first of which sees keys 0 … last."""
    end = min(k.shape[1], last + q.shape[2])  # keys that some query of the block sees
    tile_shape = (*q.shape[:3], -1)
    q = (q * (scale * LOG2E)).flatten(1, 2)  # (n, group·rows, d); scores come out in units of log 2
    lowest = torch.finfo(q.dtype).min  # instead of −∞, so that −∞ − m is never −∞ + ∞

    for j in range(0, end, block_k):
        keys = slice(j, min(j + block_k, end))
        scores = torch.bmm(q, k[:, keys].mT).to(_wide(q))  # (n, group·rows, block_k)
        _hide_future(scores.view(tile_shape), last - j)
        tile_max = scores.amax(-1, keepdim=True).clamp_(min=lowest)
        if j == 0:
            m = tile_max
            p = scores.sub_(m).exp2_()
            z = p.sum(-1, keepdim=True)
            acc = torch.bmm(p.to(v.dtype), v[:, keys]).to(p.dtype)
            continue
        m_new = torch.maximum(m, tile_max)
        p = scores.sub_(m_new).exp2_()
        rescale = m.sub_(m_new).exp2_()  # what was summed relative to m, relative to m_new
        z.mul_(rescale).add_(p.sum(-1, keepdim=True))
        acc.mul_(rescale)
        if p.dtype == v.dtype:
            acc.baddbmm_(p, v[:, keys])
        else:
            acc.add_(torch.bmm(p.to(v.dtype), v[:, keys]))
        m = m_new
    return acc.div_(z), z.log_().add_(m, alpha=1 / LOG2E)


def _fused_softmax(
    q: Tensor, k: Tensor, v: Tensor, scale: float, last: int, block_k: int, want_lse: bool
) -> tuple[Tensor, Tensor]:
    """The same where one key block holds the row: nothing to merge, and torch's 16-bit softmax is one pass."""
    end = min(k.shape[1], last + q.shape[2])
    tile_shape = (*q.shape[:3], -1)
    scores = torch.bmm((q * scale).flatten(1, 2), k[:, :end].mT)
    _hide_future(scores.view(tile_shape), last)
    lse = scores.float().logsumexp(-1) if want_lse else scores
    return torch.bmm(scores.softmax(-1), v[:, :end]), lse


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
    """dQ, dK and dV: for every key block, the query blocks that see it (FlashAttention-2, Algorithm 2)."""
    shapes, dtype, wide = (q.shape, k.shape, v.shape), q.dtype, _wide(q)
    delta = (grad_out.to(wide) * out.to(wide)).sum(-1)  # D (b, h, t)
    q, k, v = _fold(q, k, v)
    (n, group, t, _), s = q.shape, k.shape[1]
    grad_out, delta = grad_out.reshape(n, group, t, v.shape[-1]), delta.reshape(n, group, t)
    block_q = block_q or max(1, BLOCK_Q // group)
    block_k = block_k or BLOCK_K
    dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))

    for heads in _heads_at_once(n, group * block_q * min(block_k, s)):
        for j in range(0, s, block_k):
            for rows, last in _query_blocks(t, s, causal, block_q):
                keys = slice(j, min(j + block_k, s, last + rows.stop - rows.start))
                if keys.stop <= j:
                    continue  # these queries see none of these keys
                q_tile = (q[heads, :, rows] * (scale * LOG2E)).flatten(1, 2)  # (n, group·rows, d)
                do_tile = grad_out[heads, :, rows].flatten(1, 2)  # (n, group·rows, dv)
                k_tile, v_tile = k[heads, keys], v[heads, keys]
                scores = torch.bmm(q_tile, k_tile.mT).to(wide)
                tile_shape = (*q[heads, :, rows].shape[:3], -1)
                _hide_future(scores.view(tile_shape), last - j)
                p = scores.sub_(lse[heads, :, rows].flatten(1).unsqueeze(-1) * LOG2E).exp2_()
                dv[heads, keys] += torch.bmm(p.to(dtype).mT, do_tile)
                dp = torch.bmm(do_tile, v_tile.mT).to(wide)
                ds = dp.sub_(delta[heads, :, rows].flatten(1).unsqueeze(-1)).mul_(p).to(dtype)
                dq[heads, :, rows] += torch.bmm(ds, k_tile).view(tile_shape)
                dk[heads, keys] += torch.bmm(ds.mT, q_tile)
    dq.mul_(scale)
    dk.mul_(1 / LOG2E)  # q_tile carried scale · log₂e
    grads = (x.to(dtype).view(shape) for x, shape in zip((dq, dk, dv), shapes, strict=True))
    return tuple(grads)


def _fold(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries as (n, group, t, d), keys and values as (n, s, ·), with n = b·h_kv."""
    n = k.shape[0] * k.shape[1]
    group = q.shape[1] // k.shape[1]
    return q.reshape(n, group, *q.shape[2:]), k.flatten(0, 1), v.flatten(0, 1)


def _wide(x: Tensor) -> torch.dtype:
    """The dtype in which scores, sums and gradients are kept."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _heads_at_once(n: int, tile: int) -> Iterator[slice]:
    """Key/value heads one at a time, or as many as make up a tile worth a call into torch."""
    step = max(1, SHORT // max(1, tile))
    return (slice(i, i + step) for i in range(0, n, step))


def _query_blocks(t: int, s: int, causal: bool, block_q: int) -> Iterator[tuple[slice, int]]:
    """Blocks of queries that see a key, each with the last key that its first query sees."""
    if s == 0:
        return
    for i in range(max(0, t - s) if causal else 0, t, block_q):
        yield slice(i, min(i + block_q, t)), i + s - t if causal else s - 1


def _hide_future(scores: Tensor, last: int) -> None:
    """Set to −∞, in place, what row r of a tile (…, rows, keys) may not see: keys after last + r."""
    rows, keys = scores.shape[-2:]
    first = max(0, last + 1)  # the first column that any row may not see
    if first < keys:
        future = torch.ones(rows, keys - first, dtype=torch.bool, device=scores.device).triu(last + 1 - first)
        scores[..., first:].masked_fill_(future, -math.inf)
