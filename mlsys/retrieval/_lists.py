"""Inverted lists: what belongs to one centroid lies together in memory, so that scanning a list reads it in one go.

All lists lie in one arena, each a range of *slots* with some room behind its end.
A list that is full moves to the end of the arena, with twice the room; its old
place is a hole. An arena that is full is laid out anew without holes, and with as
much again of free space. So n additions cost O(n), and a vector is never further
than one copy away from its neighbours.

See also:
    `ivf` (vectors in lists), `ivfpq` (codes in lists).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mlsys.retrieval import _memory


class Lists:
    """`n` lists of slots.

    starts, sizes: of each list, int64 (n,): its slots are starts[i] … starts[i] + sizes[i].
    rows:          the row of the vector in each slot, int32 (n_slots,); meaningless outside of lists.
    arrays:        what else lies in each slot, by name: (n_slots, …).
    """

    def __init__(self, n: int, list_of: np.ndarray, arrays: Mapping[str, np.ndarray]) -> None:
        """Row i goes into list list_of[i], with arrays[name][i]; everything is copied, nothing has room to spare."""
        order = np.argsort(list_of, kind="stable")
        self.sizes = np.bincount(list_of, minlength=n)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.rows = order.astype(np.int32)
        self.arrays = {name: _memory.rows(a, order) for name, a in arrays.items()}
        self._room = self.sizes.copy()
        self._end = len(order)  # of the slots in use

    def append(self, list_of: np.ndarray, first_row: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Rows first_row, first_row + 1, … go into these lists."""
        order = np.argsort(list_of, kind="stable")
        more = np.bincount(list_of, minlength=len(self.sizes))
        full = np.flatnonzero(self.sizes + more > self._room)
        self._move(full, 2 * (self.sizes + more)[full])
        # The r-th newcomer of a list goes to the r-th place behind its end.
        grouped = list_of[order]
        rank = np.arange(len(order)) - np.searchsorted(grouped, grouped)
        slots = self.starts[grouped] + self.sizes[grouped] + rank
        self.rows[slots] = first_row + order
        for name, a in self.arrays.items():
            a[slots] = arrays[name][order]
        self.sizes += more

    def remove(self, rows: np.ndarray) -> None:
        """Take out these rows (ascending); later rows move up."""
        slots = self.slots()
        list_of = np.repeat(np.arange(len(self.sizes)), self.sizes)
        for i in np.unique(list_of[np.isin(self.rows[slots], rows)]).tolist():
            here = np.arange(self.starts[i], self.starts[i] + self.sizes[i])
            kept = here[~np.isin(self.rows[here], rows)]
            new = slice(self.starts[i], self.starts[i] + len(kept))
            for a in (self.rows, *self.arrays.values()):
                a[new] = a[kept]
            self.sizes[i] = len(kept)
        slots = self.slots()
        self.rows[slots] -= np.searchsorted(rows, self.rows[slots]).astype(np.int32)

    def slots(self) -> np.ndarray:
        """All slots that hold something, list by list."""
        firsts = np.cumsum(self.sizes) - self.sizes
        return np.arange(int(self.sizes.sum())) + np.repeat(self.starts - firsts, self.sizes)

    def marked(self, rows: np.ndarray) -> np.ndarray:
        """A mask of rows, bool (n,), as a mask of slots; False where no vector is."""
        mask = np.zeros(len(self.rows), np.bool_)
        slots = self.slots()
        mask[slots] = rows[self.rows[slots]]
        return mask

    def by_row(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """What `__init__` took: the list of each row, int32, and the arrays in order of rows. Copies."""
        slots = self.slots()
        order = np.empty(len(slots), np.int64)
        order[self.rows[slots]] = np.arange(len(slots))
        list_of = np.repeat(np.arange(len(self.sizes), dtype=np.int32), self.sizes)
        return list_of[order], {name: a[slots[order]] for name, a in self.arrays.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the arena, with the room that it has to spare."""
        return sum(a.nbytes for a in (self.starts, self.sizes, self._room, self.rows, *self.arrays.values()))

    def _move(self, lists: np.ndarray, room: np.ndarray) -> None:
        """Give these lists new places at the end of the arena, with this room."""
        if self._end + room.sum() > len(self.rows):
            self._lay_out_anew(int(room.sum()))
        for i, its_room in zip(lists.tolist(), room.tolist(), strict=True):
            old, new = self.starts[i], self._end
            for a in (self.rows, *self.arrays.values()):
                a[new : new + self.sizes[i]] = a[old : old + self.sizes[i]]
            self.starts[i], self._room[i] = new, its_room
            self._end = new + its_room

    def _lay_out_anew(self, more: int) -> None:
        """Without holes, and with space for `more` slots and as many again as are in use."""
        old = self.slots()
        starts = np.cumsum(self._room) - self._room
        used = int(self._room.sum())
        new = np.arange(len(old)) + np.repeat(starts - (np.cumsum(self.sizes) - self.sizes), self.sizes)

        def placed(a: np.ndarray) -> np.ndarray:
            fresh = _memory.empty((2 * used + more, *a.shape[1:]), a.dtype)
            fresh[:] = 0
            fresh[new] = a[old]
            return fresh

        self.rows = placed(self.rows)
        self.arrays = {name: placed(a) for name, a in self.arrays.items()}
        self.starts, self._end = starts, used
