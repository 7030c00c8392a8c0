"""Where one tile of `flash` holds whole rows of scores: there is nothing to merge, and torch's softmax will do."""

from __future__ import annotations

import torch
from torch import Tensor

from mlsys.attention._flash_scores import LOG2E, How, Plan, hide, in_buffer
from mlsys.attention._flash_tiles import BLOCK_Q, Tile
from mlsys.attention._inputs import wide

# Scores in a block of whole rows: beyond some 4,000 keys it has fewer rows, but not so few that the matmuls suffer.
ROWS_AT_ONCE, LEAST_ROWS = 1 << 20, 64


def whole_rows(s: int) -> tuple[int, int]:
    """The block of queries and keys that has all s keys."""
    return max(LEAST_ROWS, min(BLOCK_Q, ROWS_AT_ONCE // max(s, 1))), s


def one_query(q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None, how: How) -> Tensor:
    """O of a single query that sees every key, as in decoding.

    Its scores are one row a head: nothing to tile, and all heads at once spare the walk over them.
    """
    heads = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # (b, h_kv, group, d)
    scores = (heads * how.scale) @ k.mT  # (b, h_kv, group, s)
    if lse is not None:
        lse.copy_((scores.to(wide(q)).logsumexp(-1) * LOG2E).view(lse.shape))
    return (scores.softmax(-1) @ v).view(*q.shape[:3], v.shape[-1])


def fused_softmax(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, lse: Tensor | None, out: Tensor, strip: Tile, plan: Plan
) -> None:
    """O of a block of queries in 16 bits, where torch's softmax is one pass and ours would be more; no sinks."""
    scores = in_buffer(q, k[strip.columns].mT, plan.buffers[0], plan.how.scale)
    hide(scores, strip, plan)
    if lse is not None:
        lse.copy_((scores.float().logsumexp(-1) * LOG2E).view(lse.shape))
    out.copy_(torch.mm(torch.softmax(scores, -1, out=scores), v[strip.columns]).view(out.shape))
