"""Arrays that begin where a cache line does, and arrays that grow.

The processor loads 64 bytes of one cache line in one go; where they lie across two lines, it takes two. NumPy's arrays
begin at any multiple of 16, so that with the widest registers nearly every load of a row would be such a one, and the
dot products of vectors that the caches hold are limited by their loads.

See also:
    `_vectors` (the indexes), `_hnsw_graph`, `_lists` (what they keep).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import DTypeLike

LINE = 64  # bytes of a cache line


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An array that begins where a cache line does: a row of 512 bytes then lies in 8 lines, not in 9."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + LINE, np.uint8)
    begin = -memory.ctypes.data % LINE
    return memory[begin : begin + size].view(dtype).reshape(shape)


def copy(a: np.ndarray) -> np.ndarray:
    """What is in `a`, contiguous, from the beginning of a cache line on."""
    new = empty(a.shape, a.dtype)
    new[...] = a
    return new


def aligned(a: np.ndarray) -> np.ndarray:
    """`a` itself if it is contiguous and begins where a cache line does, else a copy that does."""
    return a if a.ctypes.data % LINE == 0 and a.flags.c_contiguous else copy(a)


def rows(a: np.ndarray, which: np.ndarray) -> np.ndarray:
    """a[which], for numbers of rows that are there, from the beginning of a cache line on."""
    new = empty((len(which), *a.shape[1:]), a.dtype)
    return np.take(a, which, axis=0, out=new, mode="clip")  # with "raise" it would be copied once more


class Growing:
    """An array that grows at its end: when it is full it gets half as much room again, so that n appends cost O(n).

    The array it is made of becomes its own: it may be written to.
    """

    def __init__(self, array: np.ndarray) -> None:
        self._room = array
        self._length = len(array)

    @property
    def view(self) -> np.ndarray:
        """What it holds, nothing copied."""
        return self._room[: self._length]

    @property
    def nbytes(self) -> int:
        """Bytes of what it holds, and of the room that is left."""
        return self._room.nbytes

    def append(self, more: np.ndarray) -> None:
        """Put `more` (n, …) behind what is there."""
        length = self._length + len(more)
        if length > len(self._room):
            room = empty((max(length, self._length + self._length // 2), *self._room.shape[1:]), self._room.dtype)
            room[: self._length] = self.view
            self._room = room
        self._room[self._length : length] = more
        self._length = length
