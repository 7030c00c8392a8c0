"""The graph of an HNSW index as flat arrays: vectors, levels, links.

A node is on the layers 0 … level. Its links on a layer are one row of a table,
`-1` where a place is free:

    links   (n, 2M)              layer 0
    upper   (Σ levels, M)        layers 1 and up; node v's layer l is row first[v] + l − 1

Levels fall off exponentially, P(level ≥ l) = M^−l, so `upper` has n / (M − 1)
rows in the mean: the hierarchy costs next to nothing.

See also:
    `hnsw` (the algorithms), `_hnsw_index` (ids, duplicates, filters, removal).
"""

from __future__ import annotations

import math

import numpy as np

from mlsys.retrieval._memory import Growing
from mlsys.retrieval._vectors import whole

FREE = -1  # a place in a row of links that holds none
MOST = 2**31 - 1  # nodes: links are int32


class Graph:
    """Nodes 0 … n−1 with vectors, levels and links. `entry` is where every search begins: −1 if there is no node."""

    def __init__(self, dim: int, M: int) -> None:
        self.M = M
        self.entry = -1
        self._vectors = Growing(np.empty((0, dim), np.float32))
        self._levels = Growing(np.empty(0, np.int32))
        self._first = Growing(np.empty(0, np.int64))
        self._links = Growing(np.empty((0, 2 * M), np.int32))
        self._upper = Growing(np.empty((0, M), np.int32))

    def __len__(self) -> int:
        return len(self._levels.view)

    @property
    def vectors(self) -> np.ndarray:
        """Float32 (n, d)."""
        return self._vectors.view

    @property
    def levels(self) -> np.ndarray:
        """Int32 (n,): the highest layer that each node is on."""
        return self._levels.view

    @property
    def first(self) -> np.ndarray:
        """Int64 (n,): the row of `upper` that is the node's layer 1, if it is on it."""
        return self._first.view

    @property
    def links(self) -> np.ndarray:
        """Int32 (n, 2M): layer 0."""
        return self._links.view

    @property
    def upper(self) -> np.ndarray:
        """Int32 (Σ levels, M): the layers above."""
        return self._upper.view

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, and of the room in which they grow."""
        return sum(a.nbytes for a in (self._vectors, self._levels, self._first, self._links, self._upper))

    @property
    def top(self) -> int:
        """The entry point's layer, the highest there is; −1 if there is no node."""
        return int(self.levels[self.entry]) if self.entry >= 0 else -1

    def row(self, node: int, layer: int) -> np.ndarray:
        """The node's places for links on a layer, free ones included: a view, to be written to."""
        return self.upper[self.first[node] + layer - 1] if layer else self.links[node]

    def neighbors(self, node: int, layer: int) -> list[int]:
        """What the node is linked to."""
        row = self.row(node, layer)
        return row[row != FREE].tolist()

    def set_neighbors(self, node: int, layer: int, neighbors: list[int] | np.ndarray) -> None:
        """Link the node to these, and to nothing else."""
        row = self.row(node, layer)
        row[: len(neighbors)] = neighbors
        row[len(neighbors) :] = FREE

    def grow(self, x: np.ndarray, levels: np.ndarray) -> None:
        """Nodes without links, for vectors x (n, d)."""
        rows = len(self.upper) + np.cumsum(levels, dtype=np.int64)
        self._vectors.append(x)
        self._levels.append(levels)
        self._first.append(rows - levels)
        self._links.append(np.full((len(x), 2 * self.M), FREE, np.int32))
        self._upper.append(np.full((int(levels.sum()), self.M), FREE, np.int32))

    def layer(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """The nodes on a layer, and their rows in `links` or `upper`."""
        if not layer:
            return np.arange(len(self)), np.arange(len(self))
        nodes = np.flatnonzero(self.levels >= layer)
        return nodes, self.first[nodes] + layer - 1

    def without(self, gone: np.ndarray) -> Graph:
        """The graph of the nodes that are not `gone`, a bool mask; none may have links to one that is."""
        keep = ~gone
        number = np.full(len(self) + 1, FREE, np.int32)  # old number → new; the last one stands for a free place
        number[:-1][keep] = np.arange(int(keep.sum()))
        rows = np.repeat(keep, self.levels)
        graph = Graph(self.vectors.shape[1], self.M)
        graph._fill(self.vectors[keep], self.levels[keep], number[self.links[keep]], number[self.upper[rows]])
        entry = int(number[self.entry])
        # If the entry point is gone: one of the highest of those that are left.
        graph.entry = entry if entry != FREE or not len(graph) else int(graph.levels.argmax())
        return graph

    def _fill(self, vectors: np.ndarray, levels: np.ndarray, links: np.ndarray, upper: np.ndarray) -> None:
        """Make these the rows of an empty graph."""
        self._vectors.append(vectors)
        self._levels.append(levels)
        self._first.append(np.cumsum(levels, dtype=np.int64) - levels)
        self._links.append(links)
        self._upper.append(upper)

    def reached(self, start: int, seen: np.ndarray | None = None) -> np.ndarray:
        """Bool (n,): which nodes the links of layer 0 lead to from `start`, and those `seen` before."""
        seen = np.zeros(len(self), bool) if seen is None else seen
        front = np.array([start])
        seen[start] = True
        while len(front):
            found = self.links[front].ravel()
            fresh = np.zeros(len(self), bool)
            fresh[found[found != FREE]] = True
            fresh &= ~seen
            seen |= fresh
            front = np.flatnonzero(fresh)
        return seen

    def arrays(self) -> dict[str, np.ndarray]:
        """What has to be saved."""
        entry = np.array([self.entry], np.int64)
        return {
            "vectors": self.vectors,
            "levels": self.levels,
            "links": self.links,
            "upper": self.upper,
            "entry": entry,
        }

    @classmethod
    def of(
        cls,
        M: int,
        vectors: np.ndarray,
        levels: np.ndarray,
        links: np.ndarray,
        upper: np.ndarray,
        entry: int,
    ) -> Graph:
        """The graph with these arrays, of the right dtypes and shapes. ValueError if they are none."""
        if not np.isfinite(vectors).all():
            raise ValueError("vectors holds NaN or infinity")
        n = len(vectors)
        if len(levels) != n or len(links) != n:
            raise ValueError(f"there are {n} vectors, but {len(levels)} levels and {len(links)} rows of links")
        if n and (levels.min() < 0 or levels.max() > highest(M)):
            raise ValueError(f"levels must be from 0 to {highest(M)}, got {levels.min()} … {levels.max()}")
        if len(upper) != int(levels.sum(dtype=np.int64)):
            raise ValueError(f"upper has {len(upper)} rows, but the levels sum up to {int(levels.sum(dtype=np.int64))}")
        if not (0 <= entry < n if n else entry == -1):
            raise ValueError(f"entry must be one of the {n} nodes, got {entry}")
        if n and levels[entry] != levels.max():
            raise ValueError(f"the entry point is on layer {levels[entry]}, but the highest is {levels.max()}")
        graph = cls(vectors.shape[1], M)
        graph.entry = entry
        graph._fill(vectors, levels, links, upper)
        for layer in range(graph.top + 1):
            _check_links(graph, layer)
        return graph


def _check_links(graph: Graph, layer: int) -> None:
    """ValueError for a link that leads nowhere, to the node itself, to one twice, or to one not on the layer."""
    nodes, rows = graph.layer(layer)
    table = (graph.upper if layer else graph.links)[rows]
    if table.min(initial=0) < FREE or table.max(initial=0) >= len(graph):
        raise ValueError(f"links on layer {layer} lead to nodes that are not there")
    used = table != FREE
    if (np.diff(used.astype(np.int8), axis=1) > 0).any():
        raise ValueError(f"a row of links on layer {layer} has a free place before a link")
    ordered = np.sort(table, axis=1)
    if (table == nodes[:, None]).any() or ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != FREE)).any():
        raise ValueError(f"a node on layer {layer} is linked to itself, or twice to another")
    if (graph.levels[table[used]] < layer).any():
        raise ValueError(f"links on layer {layer} lead to nodes that are not on it")


def highest(M: int) -> int:
    """No level that `draw_levels` gives is above: u ≥ 2⁻⁵³."""
    return int(53 * math.log(2) / math.log(M)) + 1


def draw_levels(n: int, M: int, seed: int, drawn: int) -> np.ndarray:
    """Int32 (n,): ⌊−ln(u) · mL⌋ with mL = 1 / ln M (Algorithm 1, line 4), u uniform in (0, 1].

    The levels of a seed are one sequence, of which `drawn` have been used.
    """
    generator = np.random.Generator(np.random.PCG64(whole("seed", seed, 0)).advance(drawn))
    return (-np.log(1.0 - generator.random(n)) / math.log(M)).astype(np.int32)
