"""What an HNSW index does beside searching and linking: batches, duplicates, filters, removal, files.

One node a distinct vector. Equal vectors are at distance 0 from each other, so
that M of them would fill their rows with links among themselves and cut others
off. Rows of the index (see `_vectors`) are therefore mapped to nodes; a node
lives as long as one of its rows.

Batches. Inserting is searching, then linking. All nodes of a batch search the
graph as it is before the batch, and only then are linked, in order: so the
searches may run in any number of threads, without locks, and the graph does not
depend on it. A batch of one is the paper's Algorithm 1. Nodes of a batch do not
see each other, so a batch is at most 1/50 of the graph, at most half of what the
same call has inserted before, and drawn in random order: what is alike comes
apart even if it arrives together. A node that rises above the top layer is a
batch of its own, since the searches of the next begin at it.

Filters. The search goes through all nodes and keeps the allowed ones, for they
alone need not be connected. Of n nodes of which a are allowed, ef·n/a must be
found to find ef, and each brings about M new distances. If that is more than a,
the a allowed ones are scanned, which is exact.

Removal. Who was linked to a node that goes gets new links by the heuristic, to
its other neighbours and to those of the node that goes. If more goes than stays,
what stays is linked anew. Then all nodes of layer 0 that the entry point does
not lead to are connected again; searches start there from the entry point too.

Cost:
    remove: one pass over the index, and a selection for each node that loses a link. Remove many at once.
    add: the same pass, to see that all nodes can be reached, once for every n/256 vectors.

Papers:
    Dobson et al. 2023, arXiv:2305.04359 (ParlayANN: batches that search a frozen graph give the same graph always).

See also:
    `hnsw` (the algorithms), `_hnsw_graph` (the arrays), `_vectors` (ids, metrics, checks).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mlsys.retrieval._hnsw_graph import FREE, MOST, Graph, draw_levels
from mlsys.retrieval._hnsw_nodes import NodeTable
from mlsys.retrieval._memory import Growing
from mlsys.retrieval._vectors import Index, array, modest, whole

SELECT = ("heuristic", "keep pruned", "nearest")
BATCH = 50  # a batch is at most the graph's size divided by this
MOST_AT_ONCE = 4096  # nodes in a batch
UNCHECKED = 256  # reachability is checked when 1/256 of the nodes is new
QUERIES_AT_ONCE = 256  # of a filtered search, whose lists are long


@dataclass(frozen=True)
class Members:
    """Rows in order of node, then id; those of node v are rows[starts[v] : starts[v + 1]]."""

    rows: np.ndarray
    starts: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.rows.nbytes + self.starts.nbytes


class NodeIndex(Index):
    """An `Index` over a `Graph`. What is left to implement is what takes time: searches, selections, links."""

    FORMAT: ClassVar[str] = "mlsys.hnsw/2"
    SETTINGS: ClassVar[tuple[str, ...]] = ("metric", "M", "ef_construction", "seed", "select")

    def __init__(
        self, metric: str = "l2", M: int = 16, ef_construction: int = 200, seed: int = 0, *, select: str = "heuristic"
    ) -> None:
        super().__init__(metric)
        if select not in SELECT:
            raise ValueError(f"select must be one of {', '.join(SELECT)}; got {select!r}")
        self.M = whole("M", M, 2, 4096)
        self.ef_construction = whole("ef_construction", ef_construction, 1)
        self.seed = whole("seed", seed, 0)
        self.select = select
        self._start(0)

    def _start(self, dim: int) -> None:
        self._graph = Graph(dim, self.M)
        self._node_of_row = np.empty(0, np.int32)
        self._drawn = 0  # levels, of the sequence that belongs to the seed
        self._unchecked = 0  # nodes inserted since all were known to be reachable
        self._table = NodeTable()  # vector → node
        self._plain = 0  # so many rows, from the first on, are known to be node 0, 1, …, with ids in ascending order
        self._listed: Members | None = None  # of all rows, if they are not plain

    @property
    def graph(self) -> Graph:
        """Vectors, levels and links, to look at."""
        return self._graph

    @property
    def _node_of_row(self) -> np.ndarray:
        return self._stored_nodes.view

    @_node_of_row.setter
    def _node_of_row(self, nodes: np.ndarray) -> None:
        self._stored_nodes = Growing(nodes)

    def _checked(self, name: str, x: Any, dim: int | None) -> np.ndarray:
        return modest(name, super()._checked(name, x, dim))

    # --- what takes time ----------------------------------------------------------------------------------------------

    @abstractmethod
    def _explore(self, nodes: np.ndarray) -> None:
        """Search for the neighbours of new nodes, and write them into the nodes' own rows, which nobody sees yet."""

    @abstractmethod
    def _link_back(self, nodes: np.ndarray) -> None:
        """Link the neighbours of these nodes to them, in this order; of a row that overflows, keep a selection."""

    @abstractmethod
    def _nearest(self, queries: np.ndarray, ef: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k first of the ef ≤ n nearest nodes that a search finds: distances and nodes, filled with ∞ and −1."""

    @abstractmethod
    def _choose(self, node: int, candidates: np.ndarray, most: int) -> np.ndarray:
        """A selection of distinct candidates as the node's neighbours."""

    @abstractmethod
    def _distances(self, query: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        """Float32 (len(nodes),)."""

    # --- adding -------------------------------------------------------------------------------------------------------

    def _build(self, x: np.ndarray) -> None:
        self._start(x.shape[1])
        self._insert(x)

    def _insert(self, x: np.ndarray) -> None:
        graph, start = self._graph, len(self._graph)
        if start + len(x) > MOST:
            raise ValueError(f"HNSW holds at most {MOST} vectors, for links are 32-bit numbers; got {start + len(x)}")
        x = x + np.float32(0)  # −0 becomes 0: equal numbers have equal bytes
        nodes, new = self._table.enter(x, graph.vectors)
        if new:
            graph.grow(x[new] if len(new) < len(x) else x, self._levels(len(new)))
            self._link_in(np.arange(start, len(graph)))
            self._unchecked += len(new)
            if self._unchecked * UNCHECKED >= len(graph):
                self._reconnect()
        self._stored_nodes.append(nodes)
        self._listed = None

    def _levels(self, n: int) -> np.ndarray:
        """The next n of the random levels."""
        levels = draw_levels(n, self.M, self.seed, self._drawn)
        self._drawn += n
        return levels

    def _link_in(self, nodes: np.ndarray) -> None:
        """Give links to nodes that have none, batch by batch."""
        graph = self._graph
        there = len(graph) - len(nodes)
        nodes = nodes[np.random.default_rng([self.seed, there]).permutation(len(nodes))]
        done = 0
        while done < len(nodes):
            size = max(1, min((there + done) // BATCH, done // 2, MOST_AT_ONCE))
            batch = nodes[done : done + size]
            higher = np.flatnonzero(graph.levels[batch] > graph.top)
            if len(higher):
                batch = batch[: max(1, higher[0])]
            self._explore(batch)
            self._link_back(batch)
            if graph.levels[batch[0]] > graph.top:
                graph.entry = int(batch[0])
            done += len(batch)

    # --- removing -----------------------------------------------------------------------------------------------------

    def _delete(self, rows: np.ndarray) -> None:
        graph = self._graph
        node_of_row = np.delete(self._node_of_row, rows)
        gone = np.ones(len(graph), bool)
        gone[node_of_row] = False
        if gone.any():
            if 2 * int(gone.sum()) > len(graph):
                self._graph = Graph(graph.vectors.shape[1], self.M)
                self._graph.grow(graph.vectors[~gone], graph.levels[~gone])
                self._link_in(np.arange(len(self._graph)))
            else:
                for layer in range(graph.top + 1):
                    self._repair(gone, layer)
                self._graph = graph.without(gone)
            node_of_row = (np.cumsum(~gone, dtype=np.int32) - 1)[node_of_row]
            self._table.renumber(gone)
            self._reconnect()
        self._node_of_row, self._listed = node_of_row, None
        self._plain = 0

    def _repair(self, gone: np.ndarray, layer: int) -> None:
        """New links for the nodes that are linked to one that is gone."""
        graph = self._graph
        nodes, rows = graph.layer(layer)
        table = (graph.upper if layer else graph.links)[rows]
        lost = np.append(gone, False)[table].any(axis=1) & ~gone[nodes]
        links = {}  # all are chosen before any is changed, so that the order does not matter
        for node in nodes[lost].tolist():
            around = self._around(node, layer, gone)
            links[node] = self._choose(node, around, table.shape[1]) if len(around) else around
        for node, chosen in links.items():
            graph.set_neighbors(node, layer, chosen)

    def _around(self, node: int, layer: int, gone: np.ndarray) -> np.ndarray:
        """The node's neighbours, with the neighbours of those that are gone in their place."""
        around: list[int] = []
        passed, queue = {node}, [node]
        for via in queue:  # which grows
            for near in self._graph.neighbors(via, layer):
                if near not in passed:
                    passed.add(near)
                    (queue if gone[near] else around).append(near)
            if len(passed) > self.ef_construction:  # as far as a search would look
                break
        return np.array(around, np.int32)

    def _reconnect(self) -> None:
        """Make the entry point lead to every node of layer 0."""
        graph = self._graph
        self._unchecked = 0
        if not len(graph):
            return
        seen = graph.reached(graph.entry)
        while not seen.all():
            node = int(seen.argmin())
            ef = min(self.ef_construction, len(graph))
            _, found = self._nearest(graph.vectors[node : node + 1], ef, ef)
            near = found[0][(found[0] >= 0) & seen[found[0]]]
            host = int(near[0]) if len(near) else graph.entry
            linked = graph.neighbors(host, 0)
            if len(linked) == 2 * self.M:  # no room: the node takes the place of the furthest, and leads to it
                furthest = linked.pop(int(self._distances(graph.vectors[host], np.array(linked)).argmax()))
                onward = [near for near in graph.neighbors(node, 0) if near != furthest]
                graph.set_neighbors(node, 0, [*onward[: 2 * self.M - 1], furthest])
            graph.set_neighbors(host, 0, [*linked, node])
            seen = graph.reached(node, seen)

    # --- searching ----------------------------------------------------------------------------------------------------

    def _options(self, k: int, *, ef: int | None = None, **others: Any) -> dict[str, Any]:
        super()._options(k, **others)
        return {"ef": max(k, 50 if ef is None else whole("ef", ef, 1))}

    def _find(
        self,
        queries: np.ndarray,
        k: int,
        allowed: np.ndarray | None,
        distances: np.ndarray,
        ids: np.ndarray,
        *,
        ef: int = 50,
        **_: Any,
    ) -> None:
        members = self._members()
        if allowed is not None:
            rows = np.flatnonzero(allowed) if members is None else members.rows[allowed[members.rows]]
            members = self._ordered(rows)
            for at in range(0, len(queries), QUERIES_AT_ONCE):
                some = slice(at, at + QUERIES_AT_ONCE)
                self._find_allowed(queries[some], k, ef, members, distances[some], ids[some])
            return
        ef = min(ef, len(self._graph))
        if members is None:  # node, row and order of ids are the same
            width = min(k, ef)
            distances[:, :width], found = self._nearest(queries, ef, width)
            ids[:, :width] = np.where(found >= 0, self._ids[found], -1)
        else:
            self._report(*self._nearest(queries, ef, ef), k, members, distances, ids)

    def _find_allowed(
        self, queries: np.ndarray, k: int, ef: int, members: Members, distances: np.ndarray, ids: np.ndarray
    ) -> None:
        """Search among these rows."""
        graph = self._graph
        allowed = np.append(np.diff(members.starts) > 0, False)  # the last: no node
        nodes = np.flatnonzero(allowed)
        open_, pool = np.arange(len(queries)), -(-ef * len(graph) // len(nodes))
        while len(open_):
            if pool * self.M >= len(nodes):
                near = np.stack([self._distances(queries[i], nodes) for i in open_])
                found = np.broadcast_to(nodes, near.shape)
                enough = np.ones(len(open_), bool)
            else:
                near, found = self._nearest(queries[open_], pool, pool)
                hits = allowed[found]
                near, found = np.where(hits, near, np.inf).astype(np.float32), np.where(hits, found, FREE)
                enough = hits.sum(axis=1) >= min(k, len(nodes))
            some = open_[enough]
            near_k = np.full((len(some), k), np.inf, np.float32)
            ids_k = np.full((len(some), k), -1, np.int64)
            self._report(near[enough], found[enough], k, members, near_k, ids_k)
            distances[some], ids[some] = near_k, ids_k
            open_, pool = open_[~enough], 2 * pool

    def _report(
        self, near: np.ndarray, found: np.ndarray, k: int, members: Members, distances: np.ndarray, ids: np.ndarray
    ) -> None:
        """Fill in the k nearest of the rows whose nodes were found (n_queries, any)."""
        rows, starts = members.rows, members.starts
        bar = np.partition(near, k - 1, axis=1)[:, k - 1 : k] if near.shape[1] > k else np.inf
        query, at = np.nonzero((found >= 0) & (near <= bar))
        node, distance = found[query, at], near[query, at]
        count = np.minimum(starts[node + 1] - starts[node], k)
        place = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
        id_ = self._ids[rows[np.repeat(starts[node], count) + place]]
        query, distance = np.repeat(query, count), np.repeat(distance, count)
        order = np.lexsort((id_, distance, query))
        query, distance, id_ = query[order], distance[order], id_[order]
        rank = np.arange(len(query)) - np.searchsorted(query, query)
        best = rank < k
        distances[query[best], rank[best]] = distance[best]
        ids[query[best], rank[best]] = id_[best]

    def _members(self) -> Members | None:
        """All rows; None if row, node and order of ids are the same."""
        ids, nodes, plain = self._ids, self._node_of_row, self._plain
        if self._listed is None and plain < len(ids):  # something was added
            ascending = bool((np.diff(ids[max(plain - 1, 0) :]) > 0).all())
            if ascending and np.array_equal(nodes[plain:], np.arange(plain, len(ids))):
                self._plain = len(ids)
            else:
                self._listed = self._ordered(np.lexsort((ids, nodes)))
        return self._listed

    def _ordered(self, rows: np.ndarray) -> Members:
        """Rows that are in order of node, then id."""
        count = np.bincount(self._node_of_row[rows], minlength=len(self._graph))
        return Members(rows, np.append(0, np.cumsum(count)))

    # --- files --------------------------------------------------------------------------------------------------------

    def _arrays(self) -> dict[str, np.ndarray]:
        counts = {"drawn": self._drawn, "unchecked": self._unchecked}
        saved = {name: np.array([count], np.int64) for name, count in counts.items()}
        return {**self._graph.arrays(), "node_of_row": self._node_of_row, **saved}

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        assert self.dim is not None
        graph = Graph.of(
            self.M,
            array(arrays, "vectors", np.float32, (None, self.dim)),
            array(arrays, "levels", np.int32, (None,)),
            array(arrays, "links", np.int32, (None, 2 * self.M)),
            array(arrays, "upper", np.int32, (None, self.M)),
            int(array(arrays, "entry", np.int64, (1,))[0]),
        )
        nodes = array(arrays, "node_of_row", np.int32, (len(self._ids),))
        if len(nodes) and (nodes.min() < 0 or nodes.max() >= len(graph)):
            raise ValueError(f"node_of_row must be from 0 to {len(graph) - 1}, got {nodes.min()} … {nodes.max()}")
        if len(np.unique(nodes)) != len(graph):
            raise ValueError("node_of_row leaves out a node")
        drawn = whole("drawn", array(arrays, "drawn", np.int64, (1,))[0], len(graph))
        unchecked = whole("unchecked", array(arrays, "unchecked", np.int64, (1,))[0], 0, len(graph))
        self._start(self.dim)
        self._graph, self._node_of_row, self._drawn, self._unchecked = graph, nodes, drawn, unchecked
