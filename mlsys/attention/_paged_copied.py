"""The readable way to read blocks: copied together, for the matrix products of torch.

A matrix product wants the rows of a head side by side. They are copied so, of a few sequences at a time, into one
scratch of the size of a cache, and read while they are still there. Scores of a whole row are kept, which are few
beside its keys, so that there is one softmax and nothing to rescale.

See also:
    `mlsys.attention.paged` (who asks for it), `mlsys.attention.paged_numba` (the same without the copy).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mlsys.attention._inputs import wide
from mlsys.attention._kv_quant import dequantize
from mlsys.attention._paged_inputs import Parts, Queries, Stored
from mlsys.attention._paged_items import Items

# Bytes. With less, calls take longer than copies; with more, the copy has left the cache before it is read. On other
# devices every call is the launch of a kernel, so there are to be few.
SCRATCH, SCRATCH_ELSEWHERE = 2 << 20, 256 << 20


def copied(queries: Queries, stored: Stored, items: Items) -> Parts:
    """Attention of each item's queries to its blocks, a group of items of about the same length at a time."""
    q, scale, position, slopes, softcap, need_lse = queries
    dtype = wide(q)
    out = q.new_zeros(*q.shape[:3], stored.values.shape[3], dtype=dtype)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=dtype) if need_lse else out[..., 0]
    copy = Copy(q, stored)
    for group in items.groups(stored.block, copy.limit):
        some = items.only(group, stored.block)
        ids = group if isinstance(group, slice) else torch.from_numpy(group).to(q.device)
        copy.turn_to(some)
        scores = copy.scores(q[ids]).to(dtype).mul_(scale)  # (m, kv_heads, rows, n)
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        if slopes is not None:
            stands = torch.from_numpy(position[group]).to(q.device)
            distance = stands[:, None, :, None] - torch.arange(scores.shape[-1], device=q.device)
            scores.sub_(slopes[..., None].to(dtype) * distance.abs().to(dtype))
        _hide(scores, some)
        weights = torch.softmax(scores, -1)
        if need_lse:  # the heaviest weight is exp(its score − L)
            lse[ids] = scores.amax(-1) - weights.amax(-1).log()
        out[ids] = copy.average(weights).to(dtype)
    return out, lse


def _hide(scores: Tensor, items: Items) -> None:
    """Set to −∞, in place, what is not seen."""
    n = scores.shape[-1]
    if items.start.any() or (items.stop < n).any():
        start, stop = (torch.from_numpy(x).to(scores.device)[:, None] for x in (items.start, items.stop))
        key = torch.arange(n, device=scores.device)
        hidden = (key < start) | (key >= stop)  # (m, n)
        scores.masked_fill_(hidden[:, None, None], -torch.inf)


class Copy:
    """The blocks of each key/value head copied together, some items at a time, and the two matrix products.

    limit: how many tokens of one sequence fit the scratch.
    """

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
        """Say what the next calls are about: m items, with tables of n tokens.

        Finds where the pieces lie, block · d numbers each, that belong together: rows (m, kv_heads, width).
        """
        heads, device = self.stored.keys.shape[1], self.stored.keys.device
        self.items = items
        self.rows = torch.from_numpy(items.table).to(device)[:, None] * heads
        self.rows = self.rows + torch.arange(heads, device=device)[:, None]
        width, each = items.table.shape[1], max(1, self.limit // self.stored.block)
        alone = items.table.shape[0] == 1  # only then is there more than fits the scratch
        self.columns = [slice(i, i + each) for i in range(0, width, each)] if alone else [slice(0, width)]

    def scores(self, q: Tensor) -> Tensor:
        """Queries (m, kv_heads, rows, d) with the keys: (m, kv_heads, rows, n). Where nothing is seen, it is anything.

        Of a long sequence, in pieces that fit the scratch.
        """
        q = q.to(self.dtype).flatten(0, 1)
        found = [torch.bmm(q, self.copied(0, columns).mT) for columns in self.columns]
        return (found[0] if len(found) == 1 else torch.cat(found, -1)).unflatten(0, self.rows.shape[:2])

    def average(self, weights: Tensor) -> Tensor:
        """Weights (m, kv_heads, rows, n) times the values: (m, kv_heads, rows, dv).

        Values that are not seen become 0, since 0 · NaN is NaN.
        """
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
