"""A tile of scores in `flash`: what the tiles of a pass share, their products, and what options and band do to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mlsys.attention._flash_tiles import Tile
from mlsys.attention._inputs import Options, Rules, wide
from mlsys.attention._visible import Band

LOG2E = math.log2(math.e)


class TileOptions(Options, total=False):
    """The options of every attention function, and those of tiles."""

    block_q: int | None
    block_k: int | None


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
              Returns whether some exp(m − m') may be other than 1, so that the numerators have to be rescaled.
    gradient: (scores, dp, lse, delta, tile, plan). Turns scores into P and dP into dS.
    narrow:   (q). Whether `softmax` takes tiles of q's 16 bits as they are, in natural units, if nothing changes them.
    """

    softmax: Callable[[Tensor, Tensor, Tile, Plan], bool]
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor, Tile, Plan], None]
    blocks: Blocks
    narrow: Callable[[Tensor], bool]


class How(NamedTuple):
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


class Plan(NamedTuple):
    """What the tiles of one pass share."""

    how: How
    group: int  # query heads that read one key/value head, stacked in a tile
    block_q: int
    block_k: int
    band: Band  # the rules' own, as the next: a tile is a matter of microseconds
    by_band_alone: bool
    narrow: bool  # the scores stay in 16 bits
    natural: (
        bool  # 16 bits are rounded in natural units, by every pass alike, or P would not sum to 1 in the backward one
    )
    # Space for two tiles of scores, and for a block of results: fresh memory for each would cost page faults, some 10%
    # of the time
    buffers: tuple[Tensor, ...]
    numerator: Tensor
    future: Tensor  # (block_q, block_q) True where a key comes after the query; empty where every query sees every key


def make_plan(q: Tensor, k: Tensor, v: Tensor, how: How, blocks: tuple[int, int], passes: int, narrow: bool) -> Plan:
    """The plan of a pass that keeps so many tiles at once; `blocks` are the tiles where none were asked for."""
    band = how.rules.band
    group = q.shape[1] // k.shape[1]
    block_q = max(1, min(q.shape[2], how.block_q or blocks[0] // group))
    block_k = max(1, min(k.shape[2], how.block_k or blocks[1]))
    edge = block_q if band.bounded else 0
    future = torch.ones(edge, edge, dtype=torch.bool, device=q.device).triu_(1)
    columns = min(block_k, band.widest(block_q))
    rows = group * block_q
    buffers = q.new_empty(passes, rows * columns).unbind()
    numerator = q.new_empty(rows * v.shape[3], dtype=wide(q))
    alone = how.rules.by_band_alone
    natural = alone and q.element_size() == 2
    return Plan(how, group, block_q, block_k, band, alone, narrow, natural, buffers, numerator, future)


# --- products ---------------------------------------------------------------------------------------------------------


def shaped(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """The start of a buffer as a matrix."""
    return buffer[: rows * columns].view(rows, columns)


def stacked(x: Tensor) -> Tensor:
    """Rows of a group (group, rows, d) with its heads one below the other, (group·rows, d); one head is no copy."""
    return x.flatten(0, 1).contiguous()


def in_buffer(a: Tensor, b: Tensor, buffer: Tensor, by: float = 1.0) -> Tensor:
    """The product of a and b, times a number, in `buffer`."""
    return shaped(buffer, a.shape[0], b.shape[1]).addmm_(a, b, beta=0, alpha=by)


def scores_of(q: Tensor, k: Tensor, plan: Plan) -> Tensor:
    """The scores of a tile for a sweep, widened: scale · q kᵀ in `How.unit`."""
    how = plan.how
    if plan.natural:
        return in_buffer(q, k.mT, plan.buffers[0], how.scale).to(wide(q)).mul_(LOG2E)
    return in_buffer(q, k.mT, plan.buffers[0], how.scale * how.unit).to(wide(q))


def add_product(total: Tensor, a: Tensor, b: Tensor, by: float = 1.0, *, to_nothing: bool = False) -> None:
    """Add a · b, times a number, to `total`, which may be wider, or hold nothing yet."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if to_nothing else 1, alpha=by)
    elif to_nothing:
        torch.mul(torch.mm(a, b), by, out=total)
    else:
        total.add_(torch.mm(a, b), alpha=by)


# --- what changes the scores ------------------------------------------------------------------------------------------


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


def hide(scores: Tensor, tile: Tile, plan: Plan) -> None:
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
