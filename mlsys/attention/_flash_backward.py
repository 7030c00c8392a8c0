"""The backward pass of `flash`: each block of keys against the blocks of queries that see it.

What a block of queries brings to every tile (its rows of Q, dO, L and D) is cut out once a head, before the loops: the
matmuls of a tile take a millisecond and leave nothing else in cache, after which a dozen small calls of torch are slow.
"""

from __future__ import annotations

import math
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from mlsys.attention._flash_scores import LOG2E, How, add_product, in_buffer, make_plan, scores_of, stacked
from mlsys.attention._flash_tiles import Tile, within


class _Queries(NamedTuple):
    """A block of queries, the heads of a group one below the other."""

    rows: slice
    q: Tensor  # (group·rows, d)
    grad_out: Tensor  # (group·rows, dv)
    lse: Tensor  # (group·rows, 1)
    delta: Tensor  # (group·rows, 1)
    dq: Tensor  # (group·rows, d), the sum so far


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    how: How,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dQ, dK, dV, dsinks (FlashAttention-2, Algorithm 2); `lse` is in units of log 2."""
    plan = make_plan(q, k, v, how, how.sweeps.blocks.backward, passes=2, narrow=False)
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)  # D (b, h, t)
    if grad_lse is not None and how.return_lse:
        delta = delta - grad_lse  # dS = P ∘ (dP − D + dL)
    if how.rules.mask is not None:  # a row that sees nothing: exp(−∞ − ∞) is 0 where exp(−∞ + ∞) is NaN
        lse = lse.masked_fill(lse == -math.inf, math.inf)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dq[:, :, : plan.band.blind] = 0

    for b, head in product(range(k.shape[0]), range(k.shape[1])):
        heads = slice(head * plan.group, (head + 1) * plan.group)
        queries = []
        for rows in plan.band.query_blocks(plan.block_q):
            qi, doi = stacked(q[b, heads, rows]), stacked(grad_out[b, heads, rows])
            lse_i, delta_i = lse[b, heads, rows].reshape(-1, 1), delta[b, heads, rows].reshape(-1, 1)
            queries.append(_Queries(rows, qi, doi, lse_i, delta_i, torch.zeros_like(qi, dtype=lse.dtype)))
        for start in range(0, k.shape[2], plan.block_k):
            block = slice(start, start + plan.block_k)
            keys, values = k[b, head, block].contiguous(), v[b, head, block].contiguous()
            # Keys along the last axis: the products are wide and low, which BLAS likes better than high and narrow
            dkt, dvt = (x.new_zeros(x.mT.shape, dtype=lse.dtype) for x in (keys, values))
            for rows, qi, doi, lse_i, delta_i, dqi in queries:
                tile = within(Tile(b, heads, rows, block), how.rules)
                if tile is None:
                    continue
                seen = slice(tile.columns.start - start, tile.columns.stop - start)
                scores = scores_of(qi, keys[seen], plan)  # (group·rows, columns)
                dp = in_buffer(doi, values[seen].mT, plan.buffers[1]).to(lse.dtype)
                how.sweeps.gradient(scores, dp, lse_i, delta_i, tile, plan)
                p, ds = scores.to(q.dtype), dp.to(q.dtype)
                add_product(dvt[:, seen], doi.mT, p)
                add_product(dkt[:, seen], qi.mT, ds, how.scale)  # sums over the heads of the group as well
                add_product(dqi, ds, keys[seen], how.scale)
            dk[b, head, block], dv[b, head, block] = dkt.mT, dvt.mT
        for block_of in queries:
            dq[b, heads, block_of.rows] = block_of.dq.view(plan.group, -1, q.shape[-1])
    grad_sinks = None
    if sinks is not None:  # the sink's value is nothing, so its dP is 0
        grad_sinks = -(torch.exp2(sinks[:, None] * LOG2E - lse) * delta).sum((0, 2))
    return dq, dk, dv, grad_sinks
