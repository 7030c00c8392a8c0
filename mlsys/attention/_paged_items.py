"""What paged attention makes of block tables: items, each a query and the blocks that it reads.

A window cuts blocks off the front of a sequence's table, splitting makes several items of one, sharing takes a common
beginning out of many: each is `Items.part`. What is not visible is never in an item's table, so who reads them may
read all that is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


class Items(NamedTuple):
    """Which blocks are read, one row an item; all other numbers count tokens from the first one of the row."""

    table: np.ndarray  # (items, width) int64; an item that has fewer repeats its last
    start: np.ndarray  # (items,) the first token that is seen
    stop: np.ndarray  # (items,) one after the last; start or less if none is
    position: np.ndarray  # (items,) where the query stands

    def part(self, first: np.ndarray, count: np.ndarray, block: int) -> Items:
        """The same items with only `count` blocks from `first` on."""
        width = int(count.max(initial=0))
        if not width:
            none = np.zeros_like(self.stop)
            return Items(self.table[:, :0], none, none, self.position)
        if self.table.shape[1] == width and not first.any() and (count == width).all():
            return self
        columns = first[:, None] + np.minimum(np.arange(width), np.maximum(count - 1, 0)[:, None])
        table = np.take_along_axis(self.table, np.minimum(columns, self.table.shape[1] - 1), 1)
        offset, end = first * block, count * block
        start, stop = (np.clip(x - offset, 0, end) for x in (self.start, self.stop))
        return Items(table, start, stop, self.position - offset)

    def split(self, parts: int, block: int) -> Items:
        """`parts` items in place of each: first the beginnings of all, then what follows."""
        if parts == 1:
            return self
        count = -(-self.stop // block)
        each = -(-count // parts)
        first = (np.arange(parts)[:, None] * each).ravel()
        count, each = np.tile(count, parts), np.tile(each, parts)
        many = Items(np.tile(self.table, (parts, 1)), *(np.tile(x, parts) for x in self[1:]))
        return many.part(first, np.clip(count - first, 0, each), block)

    def groups(self, block: int, limit: int) -> Iterator[slice | np.ndarray]:
        """The numbers of items that are done together: up to `limit` tokens, of about the same length."""
        width = self.table.shape[1]
        if width and (self.stop > (width - 1) * block).all() and (self.stop > self.start).all():  # all of one length
            each = max(1, limit // (width * block))
            yield from (slice(i, i + each) for i in range(0, self.stop.size, each))
            return
        tokens = np.where(self.stop > self.start, -(-self.stop // block) * block, 0)
        order = np.argsort(-tokens, kind="stable")
        order = order[: np.count_nonzero(tokens)]
        while order.size:
            group = order[: max(1, limit // int(tokens[order[0]]))]
            group = group[2 * tokens[group] > tokens[order[0]]]  # or half of what is done is for nothing
            yield group
            order = order[group.size :]

    def only(self, which: slice | np.ndarray, block: int) -> Items:
        """Some of the items, with a table as wide as they need."""
        stop = self.stop[which]
        table = self.table[which, : -(-int(stop.max()) // block)]
        return Items(table, self.start[which], stop, self.position[which])


def common_prefixes(items: Items, block: int) -> list[tuple[np.ndarray, int]]:
    """Sets of items whose tables begin with the same full blocks, and how many those are: one prefix for each set."""
    full = np.where(items.start == 0, items.stop // block, 0)
    first = np.where(full > 0, items.table[:, 0], -1) if items.table.shape[1] else full - 1
    found = []
    for block_id in np.unique(first[first >= 0]):
        members = np.flatnonzero(first == block_id)
        if members.size < 2:
            continue
        columns = items.table[members, : int(full[members].min())]
        alike = (columns == columns[0]).all(0)
        found.append((members, int(alike.argmin()) if not alike.all() else alike.size))
    return found


@dataclass(frozen=True, eq=False)
class Tables:
    """The blocks and the tokens of some sequences. Every layer of a step asks for the same items: made once."""

    table: np.ndarray  # (seqs, max_blocks) int64; anything where no token is
    length: np.ndarray  # (seqs,) int64
    block: int  # tokens in each block
    blocks: int  # how many there are
    _made: dict[tuple[int, int], Items] = field(default_factory=dict, repr=False)

    def last(self, queries: int, left: int) -> Items:
        """`items`, for the same number of queries of each sequence."""
        found = self._made.get((queries, left))
        if found is None:
            found = self._made[queries, left] = self.items(queries, left)
        return found

    def items(self, queries: np.ndarray | int, left: int) -> Items:
        """The blocks that the last `queries` tokens see, and `left` before each; ValueError if one does not exist."""
        block, length = self.block, self.length
        count = (length + (block - 1)) // block
        longest = int(count.max(initial=0))
        start = first = np.zeros_like(length)
        if left < 0 and int(count.min(initial=longest)) == longest:  # the usual case, in few calls: a step is short
            items = Items(self.table[:, :longest], start, length, length - 1)
        else:
            if left >= 0:
                start = np.maximum(0, length - queries - left)
                first = start // block
            items = Items(self.table, start, length, length - 1).part(first, count - first, block)
        entries = items.table.view(np.uint64)  # a negative number is a large one
        if int(entries.max(initial=0)) < self.blocks:
            return items
        wrong = (entries >= self.blocks) & (items.stop > items.start)[:, None]
        if wrong.any():
            row, column = (int(i) for i in np.argwhere(wrong)[0])
            entry, at = int(items.table[row, column]), int(first[row]) + column
            remedy = (
                "a block that has left the cache's window is visible in this call; pass the window that the cache has"
                if entry == -1
                else f"there are {self.blocks} blocks"
            )
            raise ValueError(
                f"tables must name a block for each token that is seen, got {entry} for sequence {row} at column {at}, "
                f"tokens {at * block} to {at * block + block - 1}: {remedy}"
            )
        return items
