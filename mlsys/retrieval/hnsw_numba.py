"""HNSW, compiled: the same graph and the same answers as `hnsw`, faster than hnswlib.

The algorithms are those of `hnsw`, on the same arrays (`_hnsw_graph`), in the
same batches (`_hnsw_index`). What makes a search fast:

- Candidates and the best so far are one sorted list of `ef` places. What falls out
  of the best would never be expanded, so the two heaps of the paper hold the same.
- An entry of the list is one 64-bit integer: distance, node, and whether it has been
  expanded. A float32's bits are in the order of its value once those of negative
  ones are turned round, so entries compare as integers, ties by the smaller node.
- The way into the list is a binary search and one `memmove`.
- A node's neighbours are first looked up, and their vectors requested from memory
  (`prefetch`), then compared: most of the time of a search is waiting for vectors.
- Of many searches, those that descend to the same region of the graph come one after
  the other: they look at the same vectors, which the caches then hold.
- Visited nodes carry the number of the search in 16 bits, so nothing is cleared
  from one search to the next, but for every 65,535th.

Distances are sums of floats in another order than NumPy's, for the processor adds
eight or sixteen at a time: the graph is that of `hnsw` where sums are exact
(descriptors and images of small integers), and as good a one elsewhere.

Cost:
    As `hnsw`, in far less time. Threads search and link independently of each other (see `_hnsw_index`).

Memory:
    `hnsw`'s, and 2 bytes a node for each thread that searches.

Papers:
    Malkov & Yashunin 2016, arXiv:1603.09320 (Algorithms 1–5).

See also:
    `hnsw` (the readable version), `_hnsw_compiled` (the loops).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np

from mlsys.retrieval import _hnsw_compiled as compiled
from mlsys.retrieval import _memory
from mlsys.retrieval._hnsw_index import SELECT, NodeIndex
from mlsys.retrieval._team import Team
from mlsys.retrieval._vectors import METRICS, whole

FEW = 4  # nodes or queries: not worth a thread
LINKED = 200  # nodes to link, below which one thread is as fast as several, which all look at all of them


class HNSW(NodeIndex):
    """`hnsw.HNSW` with compiled insertion and search: same parameters, graph, answers, and index files.

    threads: of `fit`, `add` and `search`; the result is the same for any number.

    The first call in a process loads the compiled code (a fraction of a second), the first ever compiles it (seconds).
    """

    def __init__(
        self,
        metric: str = "l2",
        M: int = 16,
        ef_construction: int = 200,
        seed: int = 0,
        *,
        select: str = "heuristic",
        threads: int = 1,
    ) -> None:
        super().__init__(metric, M, ef_construction, seed, select=select)
        self.threads = whole("threads", threads, 1)
        self._how = METRICS.index(metric)
        self._rule = SELECT.index(select)
        self._marks: list[np.ndarray] = []  # of visited nodes, by threads that have done with them
        self._team: Team | None = None  # while nodes are linked in

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps: those of `hnsw`, and the marks of visited nodes."""
        return super().nbytes + sum(marks.nbytes for marks in self._marks)

    def _link_in(self, nodes: np.ndarray) -> None:
        if self.threads == 1 or len(nodes) <= FEW:
            super()._link_in(nodes)
            return
        with Team(self.threads) as self._team:
            try:
                super()._link_in(nodes)
            finally:
                self._team = None

    def _explore(self, nodes: np.ndarray) -> None:
        graph = self._graph
        if graph.entry < 0:
            return
        arrays = self._tables
        order, ends = self._by_region(_memory.rows(graph.vectors, nodes))
        nodes = nodes[order]
        taken = np.zeros(1, np.int64)

        def explore(_: int) -> None:
            marks = self._borrow()
            how = graph.entry, self.ef_construction, self.M, self._rule
            room = np.empty(self.ef_construction + 1, np.int64), _nodes(2 * self.M), _nodes(self.M)
            compiled.explore(*arrays, nodes, ends, taken, *how, marks, *room)
            self._marks.append(marks)

        self._spread(explore, -(-len(nodes) // FEW))

    def _link_back(self, nodes: np.ndarray) -> None:
        graph, arrays = self._graph, self._tables
        parts = self.threads if len(nodes) >= LINKED else 1
        width = 2 * self.M + 1

        def link(part: int) -> None:
            room = _nodes(width), np.empty(width, np.int64), _nodes(width)
            compiled.link_back(*arrays, nodes, graph.top, self._rule, part, parts, *room)

        self._spread(link, parts)

    def _nearest(self, queries: np.ndarray, ef: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        graph, arrays = self._graph, self._tables
        order, ends = self._by_region(_memory.aligned(queries))
        queries = _memory.rows(queries, order)
        near = np.full((len(queries), k), np.inf, np.float32)
        nodes = np.full((len(queries), k), -1, np.int32)
        taken = np.zeros(1, np.int64)

        def search(_: int) -> None:
            marks = self._borrow()
            room = np.empty(max(ef, 2) + 1, np.int64), _nodes(2 * self.M)
            compiled.search(*arrays, queries, ends, taken, graph.entry, ef, marks, *room, near, nodes)
            self._marks.append(marks)

        self._spread(search, -(-len(queries) // FEW))
        back = np.argsort(order)
        return near[back], nodes[back]

    def _by_region(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """An order of the queries in which those that descend to the same nodes come together, and their ends so."""
        graph = self._graph
        ends = np.empty((len(queries), graph.top), np.int32)
        if not graph.top:
            return np.arange(len(queries)), ends
        vectors, how, levels, first, _, upper = self._tables
        compiled.descend(vectors, how, levels, first, upper, queries, graph.entry, ends)
        order = np.lexsort(ends.T)
        return order, ends[order]

    def _choose(self, node: int, candidates: np.ndarray, most: int) -> np.ndarray:
        vectors, candidates = self._graph.vectors, candidates.astype(np.int32)
        room = np.empty(len(candidates), np.int64), _nodes(most), _nodes(most)
        return room[1][: compiled.choose(vectors, self._how, node, candidates, most, self._rule, *room)]

    def _distances(self, query: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        result = np.empty(len(nodes), np.float32)
        compiled.distances(self._graph.vectors, self._how, query, nodes.astype(np.int32), result)
        return result

    @property
    def _tables(self) -> tuple[np.ndarray, int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        graph = self._graph
        return graph.vectors, self._how, graph.levels, graph.first, graph.links, graph.upper

    def _borrow(self) -> np.ndarray:
        """Marks for visited nodes: uint16, one for each node, and before them that of the last search."""
        try:
            marks = self._marks.pop()  # lists are safe to share between threads
        except IndexError:
            marks = np.zeros(0, np.uint16)
        return marks if len(marks) > len(self._graph) else np.zeros(len(self._graph) + 1, np.uint16)

    def _spread(self, work: Callable[[int], None], most: int) -> None:
        """Let as many threads as there are, but no more than `most`, do work(0), work(1), …; the caller is the first.

        Where they share something, each takes the next of it when it has done with one (see `_intrinsics_numba`), so
        that all are done at about one time.
        """
        parts = min(self.threads, most)
        if parts <= 1:
            work(0)
            return
        running = self._team if self._team and not self._team.ended else None
        with nullcontext(running) if running else Team(parts) as team:
            team.spread(work, parts)


def _nodes(n: int) -> np.ndarray:
    """Room for n nodes."""
    return np.empty(n, np.int32)
