"""HNSW: find near vectors by walking a graph, from few and far nodes to many and near ones.

Every vector is a node, linked to some of its near ones. A search stands at a
node, looks at the neighbours, and goes on from the nearest to the query; it keeps
the `ef` best so far and ends when none of them has neighbours to look at. In one
such graph the way from anywhere to the query is long. So each node has a random
level, and a graph of its own is on each layer: all nodes on layer 0, one in M on
layer 1, one in M² on layer 2. The upper layers are express lanes; the search
descends through them, greedily, and is near its goal when layer 0 begins.

    level of a node      l = ⌊−ln(u) · mL⌋,  u uniform in (0, 1],  mL = 1 / ln M      P(l ≥ i) = M^−i
    links of a node      at most M on layers ≥ 1, at most 2M on layer 0

Whom to link. The M nearest would be a mistake where vectors come in clusters:
all links stay inside, and no search gets out. The heuristic goes through the
candidates from the nearest on, and keeps one only if it is nearer to the new node
than to every one that was kept before: who lies behind another is reached through
it, and the links point in different directions.

    Algorithm 1  INSERT                       `HNSW._explore` (search), `HNSW._link_back` (link)
    Algorithm 2  SEARCH-LAYER                 `search_layer`
    Algorithm 3  SELECT-NEIGHBORS-SIMPLE      select="nearest"
    Algorithm 4  SELECT-NEIGHBORS-HEURISTIC   `select_neighbors`
    Algorithm 5  K-NN-SEARCH                  `HNSW._nearest`

Where the paper leaves a choice, this is what hnswlib does: candidates are not
extended by their neighbours (the paper: only for extremely clustered data), those
that the heuristic drops stay dropped (select="keep pruned" fills up with them),
and fewer than M candidates are all kept. Equally near nodes are ordered by number,
so that a search has one answer. Batches, duplicates, filters, removal: `_hnsw_index`.

Cost:
    Search: about ef · M distances on layer 0, and a number of hops above it that grows as ln n. Insertion: a search
    with ef_construction, and at most M selections. This version steps through Python; `hnsw_numba` takes far less time.

Memory:
    4d bytes of vector and 8M of links for each node, and 4M / (M − 1) for the layers above: 644 at d = 128, M = 16;
    32 to 40 for ids, levels, and the table in which equal vectors are looked up.

Papers:
    Malkov & Yashunin 2016, arXiv:1603.09320 (Algorithms 1–5; Section 4.1 for M and mL).
    Toussaint 1980, "The relative neighbourhood graph of a finite planar set" (what the heuristic approximates).

See also:
    `hnsw_numba` (the same graph and the same answers, compiled), `exact`, `ivf`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlsys.retrieval._hnsw_graph import Graph
from mlsys.retrieval._hnsw_index import NodeIndex
from mlsys.retrieval._vectors import whole

Near = tuple[float, int]  # distance, node: compared in this order
Distances = Callable[[list[int]], list[float]]  # of these nodes from one query
Visit = Callable[[int, Near, list[int]], None]  # layer, the node expanded, and which neighbours are new


def search_layer(
    graph: Graph, distances: Distances, starts: list[Near], ef: int, layer: int, visit: Visit | None = None
) -> list[Near]:
    """Algorithm 2: the `ef` nodes nearest to a query that a best-first walk over one layer finds, nearest first.

    starts: where it begins.
    visit:  is told of each node whose neighbours are looked at.
    """
    starts = sorted(starts)[:ef]
    seen = {node for _, node in starts}
    candidates = list(starts)  # to be expanded: a heap, the nearest on top
    found = [(-distance, -node) for distance, node in starts]  # the best so far: a heap, the furthest on top
    heapq.heapify(found)
    while candidates:
        nearest = heapq.heappop(candidates)
        furthest = -found[0][0], -found[0][1]
        if nearest > furthest:
            break  # all of `found` has been expanded
        fresh = [node for node in graph.neighbors(nearest[1], layer) if node not in seen]
        seen.update(fresh)
        if visit:
            visit(layer, nearest, fresh)
        for distance, node in zip(distances(fresh), fresh, strict=True):
            if len(found) < ef:
                heapq.heappush(found, (-distance, -node))
            elif (-distance, -node) > found[0]:
                heapq.heapreplace(found, (-distance, -node))
            else:
                continue
            heapq.heappush(candidates, (distance, node))
    return sorted((-distance, -node) for distance, node in found)


def select_neighbors(
    between: Callable[[int, list[int]], list[float]], candidates: list[Near], most: int, how: str = "heuristic"
) -> list[int]:
    """Algorithm 4 (Algorithm 3 if how is "nearest"): at most `most` of the candidates, which come nearest first.

    between: (node, nodes) → the distances between them; those of the candidates are from the node that they are for.
    """
    if how == "nearest" or len(candidates) < most:
        return [node for _, node in candidates[:most]]
    kept: list[int] = []
    pruned: list[int] = []
    for distance, node in candidates:
        if len(kept) == most:
            break
        behind = kept and min(between(node, kept)) < distance
        (pruned if behind else kept).append(node)
    if how == "keep pruned":
        kept += pruned[: most - len(kept)]
    return kept


class HNSW(NodeIndex):
    """The index.

    metric:          "l2", "ip" or "cosine".
    M:               links of a new node on each layer, ≥ 2; more for vectors of high dimension.
    ef_construction: candidates among which they are chosen.
    seed:            of the random levels.
    select:          "heuristic"; "keep pruned" fills up with what the heuristic drops; "nearest" is for comparison.

    `search(queries, k, ef=None, filter=None)`: ef is how many of the best a search keeps, at least k; 50 if None. More
    finds more and takes longer. `fit` or one large `add` inserts in batches; `add` of one vector is Algorithm 1.
    """

    def _explore(self, nodes: np.ndarray) -> None:
        graph = self._graph
        if graph.entry < 0:
            return
        for node in nodes.tolist():
            distances = self._from(graph.vectors[node])
            near = [(distances([graph.entry])[0], graph.entry)]
            for layer in range(graph.top, graph.levels[node], -1):
                near = search_layer(graph, distances, near, 1, layer)
            for layer in range(min(graph.top, graph.levels[node]), -1, -1):
                near = search_layer(graph, distances, near, self.ef_construction, layer)
                graph.set_neighbors(node, layer, select_neighbors(self._between, near, self.M, self.select))

    def _link_back(self, nodes: np.ndarray) -> None:
        graph = self._graph
        for node in nodes.tolist():
            for layer in range(min(graph.top, graph.levels[node]) + 1):
                for neighbor in graph.neighbors(node, layer):
                    linked = [*graph.neighbors(neighbor, layer), node]
                    most = len(graph.row(neighbor, layer))
                    if len(linked) > most:
                        linked = self._choose(neighbor, np.array(linked), most).tolist()
                    graph.set_neighbors(neighbor, layer, linked)

    def _choose(self, node: int, candidates: np.ndarray, most: int) -> np.ndarray:
        nodes = candidates.tolist()
        near = sorted(zip(self._between(node, nodes), nodes, strict=True))
        return np.array(select_neighbors(self._between, near, most, self.select), np.int32)

    def _nearest(self, queries: np.ndarray, ef: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        near = np.full((len(queries), k), np.inf, np.float32)
        nodes = np.full((len(queries), k), -1, np.int32)
        for i, query in enumerate(queries):
            for rank, hit in enumerate(self._walk(query, ef)[:k]):
                near[i, rank], nodes[i, rank] = hit
        return near, nodes

    def _walk(self, query: np.ndarray, ef: int, visit: Visit | None = None) -> list[Near]:
        """Algorithm 5, before the cut to k."""
        graph, distances = self._graph, self._from(query)
        entry = distances([graph.entry])[0], graph.entry
        near = [entry]
        for layer in range(graph.top, 0, -1):
            near = search_layer(graph, distances, near, 1, layer, visit)
        # Layer 0 begins at the entry point as well: from there all nodes can be reached.
        starts = sorted({*near, entry})
        return search_layer(graph, distances, starts, ef, 0, visit)

    def _from(self, query: np.ndarray) -> Distances:
        return lambda nodes: self._distances(query, np.array(nodes, np.int64)).tolist()

    def _between(self, node: int, nodes: list[int]) -> list[float]:
        return self._distances(self._graph.vectors[node], np.array(nodes, np.int64)).tolist()

    def _distances(self, query: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        vectors = self._graph.vectors[nodes]
        if self.metric == "l2":
            return ((vectors - query) ** 2).sum(axis=1)
        products = (vectors * query).sum(axis=1)
        return np.float32(1 if self.metric == "cosine" else 0) - products


# --- one query, step by step ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A node whose neighbours were looked at."""

    layer: int
    node: int
    distance: float
    looked_at: tuple[int, ...]  # its neighbours whose distances were computed here: those not seen before on this layer


@dataclass(frozen=True)
class Trace:
    """What one search did, and where things are, to be drawn.

    steps:    the nodes expanded, in order, from the top layer down.
    hits:     the answer: (distance, node), nearest first.
    counted:  distances computed, layer by layer, from the top; the entry point's first one is the top layer's.
    places:   float32 (n, 2), all nodes on their first two principal axes; `query` is the query there.
    layers:   for each layer from 0 up: its nodes, and its links (m, 2), each once.
    """

    steps: tuple[Step, ...]
    hits: tuple[Near, ...]
    counted: tuple[int, ...]
    places: np.ndarray
    query: np.ndarray
    layers: tuple[tuple[np.ndarray, np.ndarray], ...]

    def path(self, layer: int) -> list[int]:
        """The nodes that were the nearest so far when they were expanded on a layer: the way to the goal."""
        way: list[int] = []
        best = np.inf
        for step in self.steps:
            if step.layer == layer and step.distance < best:
                way.append(step.node)
                best = step.distance
        return way

    def __str__(self) -> str:
        lines = []
        for layer in range(len(self.layers) - 1, -1, -1):
            expanded = sum(step.layer == layer for step in self.steps)
            way = " → ".join(map(str, self.path(layer)))
            distances = self.counted[len(self.layers) - 1 - layer]
            lines.append(
                f"layer {layer}: {len(self.layers[layer][0])} nodes, {expanded} expanded, {distances} distances; {way}"
            )
        hits = ", ".join(f"{node} ({distance:.4g})" for distance, node in self.hits)
        return "\n".join([*lines, f"nearest: {hits}"])


def trace(index: NodeIndex, query: np.ndarray, k: int = 10, ef: int | None = None) -> Trace:
    """Follow one query (d,) through an index of `hnsw` or `hnsw_numba`; nodes are numbered as in `index.graph`."""
    queries, walker, ef = _walker(index, np.asarray(query)[None], k, ef)
    graph, steps = index.graph, list[Step]()

    def visit(layer: int, hit: Near, fresh: list[int]) -> None:
        steps.append(Step(layer, hit[1], hit[0], tuple(fresh)))

    hits = walker._walk(queries[0], ef, visit)[:k]
    counted = [sum(len(step.looked_at) for step in steps if step.layer == at) for at in range(graph.top, -1, -1)]
    counted[0] += 1
    center = graph.vectors.mean(axis=0)
    *_, axes = np.linalg.svd(graph.vectors[:: max(1, len(graph) // 2000)] - center, full_matrices=False)
    flat = np.zeros((graph.vectors.shape[1], 2), np.float32)
    flat[:, : len(axes[:2])] = axes[:2].T
    return Trace(
        steps=tuple(steps),
        hits=tuple(hits),
        counted=tuple(counted),
        places=(graph.vectors - center) @ flat,
        query=(queries[0] - center) @ flat,
        layers=tuple(_links(graph, layer) for layer in range(graph.top + 1)),
    )


def distances_per_query(index: NodeIndex, queries: np.ndarray, k: int = 10, ef: int | None = None) -> float:
    """How many distances a search computes, in the mean over queries (n_queries, d): the sum of `Trace.counted`."""
    queries, walker, ef = _walker(index, queries, k, ef)
    if not len(queries):
        raise ValueError("queries must hold one at least: of none there is no mean")
    looked_at = [1] * len(queries)  # the entry point
    for i, query in enumerate(queries):

        def visit(layer: int, hit: Near, fresh: list[int], i: int = i) -> None:
            looked_at[i] += len(fresh)

        walker._walk(query, ef, visit)
    return sum(looked_at) / len(queries)


def _walker(index: NodeIndex, queries: np.ndarray, k: int, ef: int | None) -> tuple[np.ndarray, HNSW, int]:
    """Checked queries, the plain search over the index's graph, and ef."""
    if not len(index):
        raise ValueError("the index holds no vectors: there is nothing to search")
    queries = index._checked("queries", queries, index.dim)
    walker = HNSW(index.metric, index.M)
    walker._graph = index.graph
    return queries, walker, index._options(whole("k", k, 1), ef=ef)["ef"]


def _links(graph: Graph, layer: int) -> tuple[np.ndarray, np.ndarray]:
    nodes, rows = graph.layer(layer)
    table = (graph.upper if layer else graph.links)[rows]
    pairs = np.stack([np.repeat(nodes, table.shape[1]), table.ravel()], axis=1)
    return nodes, np.unique(np.sort(pairs[pairs[:, 1] >= 0], axis=1), axis=0)
