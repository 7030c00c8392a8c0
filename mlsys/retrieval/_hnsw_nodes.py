"""Which node has this vector? A hash table that holds numbers of nodes only: the vectors are in the graph.

A vector's hash says at which place to begin; from there on, one place after the
other is looked at until one is free, or has a node with the same bytes. At most
half of the places are taken, so that few are looked at.

Cost:
    A vector: a hash, and about one comparison of bytes. All again when the table has to grow, which is seldom.

Memory:
    8 to 16 bytes a node; a dictionary of digests would take a hundred.

Papers:
    Knuth 1998, "The Art of Computer Programming", volume 3, Section 6.4 (Algorithm L, linear probing).
    Dietzfelbinger 1996, "Universal hashing and k-wise independent random variables via integer arithmetic without
    primes", STACS (the hash).

See also:
    `_hnsw_index` (one node for equal vectors), `_hnsw_graph` (where the vectors are).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np

ROWS = 1024  # vectors that are hashed at once
FREE, GONE = -1, -2  # a place that was never taken, and one whose node was removed: the search goes on after it


class NodeTable:
    """From vectors, compared byte by byte, to nodes. It is told of the vectors of nodes when it needs them."""

    def __init__(self) -> None:
        self._places = array("i", [FREE])  # as many as a power of two
        self._taken = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return len(self._places) * self._places.itemsize

    def enter(self, x: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """The node of each of x (m, d), and the rows of x that are new: nodes len(vectors) … of `vectors` (n, d)."""
        if 2 * (self._taken + len(x)) > len(self._places):
            self._places = array("i", [FREE]) * (1 << (2 * (len(vectors) + len(x)) - 1).bit_length())
            for node, at in enumerate(_hashes(vectors)):
                at, _ = self._find(at, vectors[node], vectors, x, [])
                self._places[at] = node
            self._taken = len(vectors)
        nodes, new, places, last = array("i"), list[int](), self._places, len(self._places) - 1
        for row, at in enumerate(_hashes(x)):
            node = places[at & last]
            if node != FREE:  # else, which is usual, there is nothing to compare
                at, node = self._find(at, x[row], vectors, x, new)
            if node == FREE:
                node = places[at & last] = len(vectors) + len(new)
                new.append(row)
            nodes.append(node)
        self._taken += len(new)
        return np.frombuffer(nodes, np.int32), new

    def _find(self, at: int, vector: np.ndarray, vectors: np.ndarray, x: np.ndarray, new: list[int]) -> tuple[int, int]:
        """The place of a vector with this hash, and the node there, which is FREE if no node has it."""
        places, last, own = self._places, len(self._places) - 1, vector.tobytes()
        at &= last
        while (node := places[at]) != FREE:
            if node >= 0:
                other = vectors[node] if node < len(vectors) else x[new[node - len(vectors)]]
                if other.tobytes() == own:
                    break
            at = (at + 1) & last
        return at, node

    def renumber(self, gone: np.ndarray) -> None:
        """Forget the nodes that are `gone`, a bool mask; the others close the gaps."""
        number = np.append(np.where(gone, GONE, np.cumsum(~gone) - 1), [GONE, FREE]).astype(np.int32)
        places = np.frombuffer(self._places, np.int32)  # the same memory
        places[:] = number[places]


def _hashes(vectors: np.ndarray) -> Iterator[int]:
    """A hash of each vector: the upper half of Σ a_j · bits_j modulo 2⁶⁴, with odd random a_j."""
    weights = np.random.default_rng(0).integers(1 << 62, size=vectors.shape[1], dtype=np.uint64) * 2 + 1
    for start in range(0, len(vectors), ROWS):
        bits = np.ascontiguousarray(vectors[start : start + ROWS]).view(np.uint32).astype(np.uint64)
        yield from ((bits @ weights) >> np.uint64(32)).tolist()
