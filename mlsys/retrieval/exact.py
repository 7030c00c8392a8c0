"""Exact nearest neighbours by brute force: compare every query with every vector, as fast as a matrix product.

For each query the k smallest of n distances. Nearly all the time goes into
n·d multiplications per query, and into reading the vectors from memory. For many
queries at once both are one matrix product, since

    ‖q − x‖² = ‖q‖² + ‖x‖² − 2⟨q, x⟩

which reads each tile of vectors once for hundreds of queries, and keeps the
processor's multipliers busy. But this form *cancels*: where the vectors are long
and the distances short, two large numbers are subtracted. In float32 with vectors
around 10⁴ the result may be wrong in every digit, or negative; faiss and most
others return it as it is, and the distance of a vector to itself is then not 0.

Here the product only chooses candidates. The rounding error of a float32 dot
product has a bound, γ_d‖q‖‖x‖ (see `_rank.slack`): what is within twice the
bound of the k-th smallest estimate may be among the k nearest, nothing else can.
For these few, Σ(q_i − x_i)² is computed in float64, rounded to float32 once, and
ranked by (distance, id). So the result is *exact*: equal vectors have equal
distances, and nothing depends on tiles, threads, or which queries come together.
Data far from the origin cost more candidates, never a wrong answer: centre it.

Top-k without a sort: the smallest estimate in each block of 32 is cheap to find
(one vector instruction compares 16), and the k-th smallest of these block minima
bounds the k-th smallest of all, as k different blocks each hold one that is no
larger. Only blocks whose minimum is below that are looked into. As tiles go by
the bound falls, and soon nearly no block is.

Cost:
    n·d multiply-adds a query in float32; d for each candidate in float64, about k of them.
    Few queries are limited by reading n·d numbers instead. add: d a vector, doubling the memory when it is full.
    remove: one pass over all vectors, however many go; so remove many at once.

Memory:
    4·d + 12 bytes a vector, and one tile of estimates (16 MB).

Papers:
    Johnson, Douze & Jégou 2019, arXiv:1702.08734 (§5.1: search by matrix product; §4: k-selection).
    Higham 2002, "Accuracy and Stability of Numerical Algorithms", §3.1 (the bound γ_n on a dot product).

See also:
    `exact_numba` (the same, the selection compiled), `ivf`, `pq`, `hnsw` (fewer comparisons, for some recall).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from mlsys.retrieval import _memory, _rank
from mlsys.retrieval._memory import Growing
from mlsys.retrieval._vectors import Index, array

ESTIMATES = 1 << 22  # in a tile: queries × vectors
TILE = 8192  # vectors in a tile, at least
QUERIES = 512  # queries in a tile, at most
BLOCK = 32  # estimates of which the smallest is found first, at most


class Exact(Index):
    """All vectors, compared with every query: the k nearest, exactly, by (distance as float32, id).

    metric: "l2" (squared), "ip" or "cosine", see `Index`.

        >>> index = Exact().fit(np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]]))
        >>> index.search(np.array([0.0, 0.0]), k=2)
        (array([[0., 1.]], dtype=float32), array([[0, 2]]))
    """

    FORMAT = "mlsys.exact/1"
    SETTINGS = ("metric",)

    _vectors: Growing  # float32 (n, d)
    _halves: Growing  # ½‖x‖² for l2, float32 (n,)
    _longest: float  # an upper bound on ‖x‖

    @classmethod
    def over(cls, metric: str, x: np.ndarray, ids: np.ndarray) -> Self:
        """An index over these very vectors (n, d), which are checked already and of length 1 under cosine."""
        index = cls(metric)
        index._adopt(x)
        index.dim, index._ids = x.shape[1], ids
        return index

    def _build(self, x: np.ndarray) -> None:
        self._adopt(_memory.copy(x))

    def _adopt(self, x: np.ndarray) -> None:
        self._vectors, self._halves = Growing(x), Growing(_rank.half_norms(self.metric, x))
        self._longest = _rank.longest(x)

    def _insert(self, x: np.ndarray) -> None:
        self._vectors.append(x)
        self._halves.append(_rank.half_norms(self.metric, x))
        self._longest = max(self._longest, _rank.longest(x))

    def _delete(self, rows: np.ndarray) -> None:
        x, halves = self._vectors.view, self._halves.view
        kept = np.delete(np.arange(len(x)), rows)
        self._vectors, self._halves = Growing(_memory.rows(x, kept)), Growing(halves[kept])

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"vectors": self._vectors.view}

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        vectors = array(arrays, "vectors", np.float32, (len(self), self.dim))
        if not np.isfinite(vectors).all():
            raise ValueError("vectors hold NaN or infinity")
        self._adopt(_memory.aligned(vectors))

    def _find(
        self,
        queries: np.ndarray,
        k: int,
        allowed: np.ndarray | None,
        distances: np.ndarray,
        ids: np.ndarray,
        **how: Any,
    ) -> None:
        rows = None if allowed is None else np.flatnonzero(allowed)
        tile = max(TILE, 4 * k)
        step = self._at_once(k, tile)
        for start in range(0, len(queries), step):
            part = slice(start, start + step)
            self._search(queries[part], k, rows, tile, distances[part], ids[part])

    def _at_once(self, k: int, tile: int) -> int:
        """How many queries are searched together."""
        return max(1, min(QUERIES, ESTIMATES // tile))

    def _search(
        self, queries: np.ndarray, k: int, rows: np.ndarray | None, tile: int, distances: np.ndarray, ids: np.ndarray
    ) -> None:
        """Fill distances and ids for a few queries, among these rows (ascending; None: all)."""
        x, halves = self._vectors.view, self._halves.view
        n = len(x) if rows is None else len(rows)
        slack = _rank.slack(self.metric, queries, self._longest)
        estimable = bool(np.isfinite(slack).all())
        lowest = np.full((len(queries), k), np.inf, np.float32)  # the k smallest block minima so far
        found = _rank.Candidates(self.metric, queries, x, self._ids, k)
        for start in range(0, n, tile):
            some = slice(start, start + tile) if rows is None else rows[start : start + tile]
            if estimable:
                estimates = -queries @ x[some].T
                estimates += halves[some]
                blocks = _in_blocks(estimates, k)
                minima = blocks.min(axis=1)
                lowest = np.partition(np.concatenate([lowest, minima], axis=1), k - 1, axis=1)[:, :k]
                bar = lowest.max(axis=1) + slack
                query, block = np.nonzero(minima <= bar[:, None])
                hit, member = np.nonzero(blocks[query, :, block] <= bar[query, None])
                query, column = query[hit], member * blocks.shape[2] + block[hit]
                real = column < estimates.shape[1]
                query, column = query[real], column[real]
            else:  # numbers so large that estimates overflow: compute all distances
                query, column = (i.ravel() for i in np.indices((len(queries), min(tile, n - start))))
            found.add(query, column + start if rows is None else rows[column + start])
        found.settle(distances, ids)


def _in_blocks(estimates: np.ndarray, k: int) -> np.ndarray:
    """A view (n_queries, block size, n_blocks): block j is columns j, j + n_blocks, …, so that minima are vector code.

    A copy, filled up with ∞, where the columns do not come out even. Blocks are smaller for a large k: with fewer than
    k of them there is no bound.
    """
    columns = estimates.shape[1]
    size = max(1, min(BLOCK, columns // (4 * k)))
    blocks = -(-columns // size)
    if blocks * size > columns:
        estimates = np.pad(estimates, ((0, 0), (0, blocks * size - columns)), constant_values=np.inf)
    return estimates.reshape(len(estimates), size, blocks)
