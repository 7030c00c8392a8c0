"""Which tiles of the t × s scores `flash` walks over, and what the paper's own walk moves.

A tile is some queries of the heads that share a key/value head, and some keys. A strip is a
tile of all keys that a block of queries sees: the walk cuts it from the left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from mlsys.attention._inputs import Rules, check_block, check_rules

# The best of a grid at head_dim 64 on a CPU core with 1 MB of L2, forward and backward, full and causal.
BLOCK_Q, BLOCK_K = 256, 2048


class Tile(NamedTuple):
    """A place in the matrix of scores: the query heads of one key/value head, some queries, some keys."""

    batch: int
    heads: slice
    rows: slice
    columns: slice


def along(strip: Tile, block_k: int, mask: Tensor | None) -> Iterator[Tile]:
    """The tiles along a strip, without what a mask hides altogether."""
    batch, heads, rows, columns = strip
    for j in range(columns.start, columns.stop, block_k):
        tile = _trimmed(Tile(batch, heads, rows, slice(j, min(j + block_k, columns.stop))), mask)
        if tile is not None:
            yield tile


def within(tile: Tile, rules: Rules) -> Tile | None:
    """The part of a tile that some query of it sees; None if there is none."""
    start, stop = rules.band.keys(tile.rows)
    columns = slice(max(start, tile.columns.start), min(stop, tile.columns.stop))
    return _trimmed(tile._replace(columns=columns), rules.mask) if columns.start < columns.stop else None


def _trimmed(tile: Tile, mask: Tensor | None) -> Tile | None:
    """From the first key that the mask shows to some query of the tile to the last; None if it shows none."""
    if mask is None:
        return tile
    shown = mask[tile].any(1).any(0).nonzero()
    if len(shown) == 0:
        return None
    start = tile.columns.start
    return tile._replace(columns=slice(start + int(shown[0]), start + int(shown[-1]) + 1))


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
            for tile in along(strip, block_k, rules.mask)
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
