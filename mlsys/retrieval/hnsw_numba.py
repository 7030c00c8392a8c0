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
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext

import numpy as np

from mlsys.retrieval import _hnsw_compiled as compiled
from mlsys.retrieval._hnsw_index import SELECT, NodeIndex
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
        self._pool: ThreadPoolExecutor | None = None  # while nodes are linked in: to start threads takes time

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps: those of `hnsw`, and the marks of visited nodes."""
        return super().nbytes + sum(marks.nbytes for marks in self._marks)

    def _link_in(self, nodes: np.ndarray) -> None:
        if self.threads == 1 or len(nodes) <= FEW:
            super()._link_in(nodes)
            return
        with ThreadPoolExecutor(self.threads - 1) as self._pool:
            try:
                super()._link_in(nodes)
            finally:
                self._pool = None

    def _explore(self, nodes: np.ndarray) -> None:
        graph = self._graph
        if graph.entry < 0:
            return
        arrays, nodes = self._tables, nodes[self._by_region(graph.vectors[nodes])]

        def explore(begin: int, end: int) -> None:
            marks = self._borrow()
            compiled.explore(*arrays, nodes[begin:end], graph.entry, self.ef_construction, self.M, self._rule, marks)
            self._marks.append(marks)

        self._spread(explore, len(nodes))

    def _link_back(self, nodes: np.ndarray) -> None:
        graph, arrays = self._graph, self._tables
        parts = self.threads if len(nodes) >= LINKED else 1

        def link(part: int, _: int) -> None:
            compiled.link_back(*arrays, nodes, graph.top, self._rule, part, parts)

        self._spread(link, parts, each=1)

    def _nearest(self, queries: np.ndarray, ef: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        graph, arrays = self._graph, self._tables
        order = self._by_region(queries)
        queries = queries[order]
        near = np.full((len(queries), k), np.inf, np.float32)
        nodes = np.full((len(queries), k), -1, np.int32)

        def search(begin: int, end: int) -> None:
            marks = self._borrow()
            some = slice(begin, end)
            compiled.search(*arrays, queries[some], graph.entry, ef, marks, near[some], nodes[some])
            self._marks.append(marks)

        self._spread(search, len(queries))
        back = np.argsort(order)
        return near[back], nodes[back]

    def _by_region(self, queries: np.ndarray) -> np.ndarray:
        """An order of the queries in which those that descend to the same nodes come together."""
        graph = self._graph
        if len(queries) <= FEW or not graph.top:
            return np.arange(len(queries))
        vectors, how, levels, first, _, upper = self._tables
        return np.lexsort(compiled.paths(vectors, how, levels, first, upper, queries, graph.entry))

    def _choose(self, node: int, candidates: np.ndarray, most: int) -> np.ndarray:
        return compiled.choose(self._graph.vectors, self._how, node, candidates.astype(np.int32), most, self._rule)

    def _distances(self, query: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        return compiled.distances(self._graph.vectors, self._how, query, nodes.astype(np.int32))

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

    def _spread(self, work: Callable[[int, int], None], n: int, each: int = FEW) -> None:
        """Let the threads do work(begin, end) for all of 0 … n; the one that calls is one of them."""
        parts = min(self.threads, -(-n // each))
        if parts <= 1:
            work(0, n)
            return
        left, begin = list[tuple[int, int]](), 0
        while begin < n:  # half of what there is for all of them, then half of the rest: all are done at about one time
            end = min(n, begin + max(each // 2, -(-(n - begin) // (2 * parts)), 1))
            left.append((begin, end))
            begin = end
        left.reverse()  # the first at the end

        def take_turns() -> None:
            while True:
                try:
                    begin, end = left.pop()  # lists are safe to share between threads
                except IndexError:
                    return
                work(begin, end)

        with nullcontext(self._pool) if self._pool else ThreadPoolExecutor(parts - 1) as pool:
            others = [pool.submit(take_turns) for _ in range(parts - 1)]
            try:
                take_turns()
            finally:
                wait(others)
            for other in others:
                other.result()
