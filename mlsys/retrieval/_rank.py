"""From cheap estimates to exact results: how far an estimate can be off, and the ranking of what it left.

A matrix product in float32 gives many distances at once, in a form that cancels
(see `exact`). So it only chooses candidates, with room for its error; their
distances are then computed one by one in float64, and ranked by (distance, id).
What is returned therefore does not depend on tiles, threads or batches.

An *estimate* leaves out what is the same for all vectors of a query, and halves
the rest:

    l2            e(q, x) = ½‖x‖² − ⟨q, x⟩         ½ (‖q − x‖² − ‖q‖²)
    ip, cosine    e(q, x) = −⟨q, x⟩

See also:
    `exact`, `ivf` (who use it).
"""

from __future__ import annotations

import numpy as np

UNIT = 2.0**-24  # half the distance from 1 to the next float32
MOST = 1e37  # what an estimate may be made of: float32 ends at 3.4e38
PAIRS = 1 << 13  # (query, vector) pairs whose differences are held at once, in float64
HELD = 1 << 21  # candidates that may wait before they are thinned out


def half_norms(metric: str, x: np.ndarray) -> np.ndarray:
    """What is added to −⟨q, x⟩ in an estimate, float32 (n,): ½‖x‖² for l2, else 0."""
    if metric != "l2":
        return np.zeros(len(x), np.float32)
    with np.errstate(over="ignore"):  # ∞ makes the slack infinite, see below
        return (0.5 * squared_lengths(x)).astype(np.float32)


def squared_lengths(x: np.ndarray) -> np.ndarray:
    """‖x‖² of each row, float64 (n,)."""
    lengths = np.empty(len(x))
    for start in range(0, len(x), PAIRS):
        wide = x[start : start + PAIRS].astype(np.float64)
        lengths[start : start + PAIRS] = np.einsum("nd,nd->n", wide, wide)
    return lengths


def longest(x: np.ndarray) -> float:
    """The largest ‖x‖."""
    return float(np.sqrt(squared_lengths(x).max(initial=0.0)))


def slack(metric: str, queries: np.ndarray, longest: float) -> np.ndarray:
    """How far beyond the k-th smallest estimate a vector of the true k nearest can lie, float64 (n_queries,).

    longest: the largest ‖x‖. A dot product of d float32 numbers, summed in whatever order, is off by at most
    γ_d ‖q‖‖x‖ with γ_d = d·u / (1 − d·u), u = 2⁻²⁴ (Higham 2002, §3.1). Adding ½‖x‖² and rounding it make that
    γ_{d+2} of ½‖x‖² + ‖q‖‖x‖. Two estimates may be off, in opposite directions. A few u more are for distances that
    differ, but become the same float32, and for the bar itself, which is kept in float32. What underflows is in the
    last term.
    ∞ where estimates could overflow: then they say nothing.
    """
    factor, least = rounding(queries.shape[1])
    lengths = np.sqrt(squared_lengths(queries))
    scale = (lengths + longest) ** 2 if metric == "l2" else 2 * lengths * longest
    return np.where(scale < MOST, factor * scale + least, np.inf) if factor < np.inf else np.full(len(queries), np.inf)


def rounding(d: int) -> tuple[float, float]:
    """What `slack` has of the dimension: γ, ∞ if it says nothing, and what may underflow."""
    steps = (d + 10) * UNIT
    return (steps / (1 - steps) if steps < 0.5 else np.inf), steps * 2.0**-100


def distances_of_pairs(
    metric: str, queries: np.ndarray, vectors: np.ndarray, query: np.ndarray, row: np.ndarray
) -> np.ndarray:
    """The distance of queries[query[i]] and vectors[row[i]] for each i: summed in float64, rounded to float32 once."""
    found = np.empty(len(query), np.float32)
    for start in range(0, len(query), PAIRS):
        piece = slice(start, start + PAIRS)
        q, x = queries[query[piece]].astype(np.float64), vectors[row[piece]].astype(np.float64)
        if metric == "l2":
            q -= x
            total = np.einsum("nd,nd->n", q, q)
        else:
            total = (1.0 if metric == "cosine" else 0.0) - np.einsum("nd,nd->n", q, x)
        with np.errstate(over="ignore"):
            found[piece] = total
    return found


def best(
    distances: np.ndarray, ids: np.ndarray, query: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which of these hits are among the k nearest of their query, by (distance, id), and at which rank.

    distances, ids, query: of each hit. Returns the hits' positions, their queries and their ranks.
    """
    order = np.lexsort((ids, distances, query))
    of = query[order]
    rank = np.arange(len(of)) - np.searchsorted(of, of)  # the first of the same query has rank 0
    near = rank < k
    return order[near], of[near], rank[near]


class Candidates:
    """(query, vector) pairs that may be results; `settle` computes their distances and ranks them.

    If there are very many (all estimates within the slack), they are thinned out on the way to the k nearest so far, so
    that memory stays bounded.

    vectors: the (n, d) that the candidates' numbers point into; each at most once a query.
    ids:     the ids by row; rows: the row of each vector, if they lie in another order.
    """

    def __init__(
        self,
        metric: str,
        queries: np.ndarray,
        vectors: np.ndarray,
        ids: np.ndarray,
        k: int,
        rows: np.ndarray | None = None,
    ) -> None:
        self._metric, self._queries, self._vectors, self._k = metric, queries, vectors, k
        self._ids, self._rows = ids, rows
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._n_waiting = 0
        self._kept = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)  # query, row, distance

    def add(self, query: np.ndarray, row: np.ndarray) -> None:
        """These pairs."""
        self._waiting.append((query, row))
        self._n_waiting += len(query)
        if self._n_waiting > HELD:
            self._thin_out()

    def _thin_out(self) -> np.ndarray:
        """Keep the k nearest of each query; their ranks."""
        query, row = (np.concatenate(part) for part in zip(*self._waiting, strict=True))
        distances = distances_of_pairs(self._metric, self._queries, self._vectors, query, row)
        query, row, distances = (
            np.concatenate([old, new]) for old, new in zip(self._kept, (query, row, distances), strict=True)
        )
        near, query, rank = best(distances, self._ids_of(row), query, self._k)
        self._kept = query, row[near], distances[near]
        self._waiting, self._n_waiting = [], 0
        return rank

    def settle(self, distances: np.ndarray, ids: np.ndarray) -> None:
        """Write the k nearest of each query: (n_queries, k), where they are ∞ and −1 so far."""
        self.add(np.empty(0, np.int64), np.empty(0, np.int64))
        if not self._waiting:  # it was thinned out just now
            self._waiting = [(np.empty(0, np.int64), np.empty(0, np.int64))]
        rank = self._thin_out()
        query, row, nearest = self._kept
        distances[query, rank] = nearest
        ids[query, rank] = self._ids_of(row)

    def _ids_of(self, numbers: np.ndarray) -> np.ndarray:
        return self._ids[numbers if self._rows is None else self._rows[numbers]]
