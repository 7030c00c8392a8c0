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

See also:
    `_hnsw_index` (one node for equal vectors), `_hnsw_graph` (where the vectors are).
"""

from __future__ import annotations

from array import array

import numpy as np

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
            self._taken = 0
            for node in range(len(vectors)):
                at, _ = self._find(vectors[node].tobytes(), vectors, x, [])
                self._take(at, node)
        nodes, new = np.empty(len(x), np.int32), list[int]()
        for row in range(len(x)):
            at, node = self._find(x[row].tobytes(), vectors, x, new)
            if node == FREE:
                node = len(vectors) + len(new)
                self._take(at, node)
                new.append(row)
            nodes[row] = node
        return nodes, new

    def _find(self, vector: bytes, vectors: np.ndarray, x: np.ndarray, new: list[int]) -> tuple[int, int]:
        """The place of a vector, and the node there, which is FREE if no node has it."""
        places, last = self._places, len(self._places) - 1
        at = hash(vector) & last
        while (node := places[at]) != FREE:
            if (
                node >= 0
                and (vectors[node] if node < len(vectors) else x[new[node - len(vectors)]]).tobytes() == vector
            ):
                break
            at = (at + 1) & last
        return at, node

    def _take(self, at: int, node: int) -> None:
        self._places[at] = node
        self._taken += 1

    def renumber(self, gone: np.ndarray) -> None:
        """Forget the nodes that are `gone`, a bool mask; the others close the gaps."""
        number = np.append(np.where(gone, GONE, np.cumsum(~gone) - 1), [GONE, FREE]).astype(np.int32)
        places = np.frombuffer(self._places, np.int32)  # the same memory
        places[:] = number[places]
