"""Compiled selection: which estimates are near enough to be looked at again, and the best k with distances and ids.

`collect` keeps for each query the k smallest estimates it has seen (a heap, worst
on top) and a list of candidates: all that were within the slack of the k-th
smallest when they came. The bar falls as more comes by, so the list is thinned
out when it is full; a query whose list is full of candidates all the same
(thousands of equal vectors, data far from the origin) is marked as overflown, and
left to the readable version.

See also:
    `_rank` (what an estimate is, and the slack), `_heap_numba` (the best k with ids), `exact_numba`, `ivf_numba`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from mlsys.retrieval._heap_numba import NO_ID, sink, sort, worse

Array = np.ndarray
BLOCK = 16  # estimates compared at once
METRICS = ("l2", "ip", "cosine")  # by the number that the compiled code gets
EVERY = np.empty(0, np.int32)


class Collector:
    """The heaps and the candidate lists of a few queries."""

    def __init__(self, n_queries: int, k: int, slack: Array) -> None:
        self.heaps = np.full((n_queries, k), np.inf, np.float32)
        self.slack = np.nextafter(slack.astype(np.float32), np.float32(np.inf))
        room = 4 * k + 64
        self.estimates = np.empty((n_queries, room), np.float32)
        self.slots = np.empty((n_queries, room), np.int64)
        self.counts = np.zeros(n_queries, np.int64)  # −1: overflown

    @property
    def state(self) -> tuple[Array, Array, Array, Array, Array]:
        """What the compiled functions take."""
        return self.heaps, self.slack, self.estimates, self.slots, self.counts

    def settle(
        self,
        metric: str,
        queries: Array,
        vectors: Array,
        ids: Array,
        rows: Array | None,
        distances: Array,
        found: Array,
        *,
        by_row: bool,
    ) -> Array:
        """Write the k nearest of the candidates, as `_rank.Candidates.settle` does. The queries that have overflown.

        ids: by row. rows: the row of each slot (None: its number). by_row: whether vectors lie by row, or by slot.
        """
        rows = EVERY if rows is None else rows
        found[:] = NO_ID
        _settle(METRICS.index(metric), queries, vectors, ids, rows, by_row, *self.state, distances, found)
        found[found == NO_ID] = -1
        return np.flatnonzero(self.counts < 0)


# The order in which a float64 sum is taken differs from NumPy's: rounded to float32, one distance in 10⁸ or so differs.
@njit(cache=True, nogil=True, fastmath={"nnan", "nsz", "reassoc", "contract"})
def _settle(
    metric: int,
    queries: Array,
    vectors: Array,
    ids: Array,
    rows: Array,
    by_row: bool,
    heaps: Array,
    slack: Array,
    estimates: Array,
    slots: Array,
    counts: Array,
    distances: Array,
    found: Array,
) -> None:
    d = queries.shape[1]
    for q in range(len(queries)):
        if counts[q] < 0:
            continue
        query = queries[q]
        for c in range(_thin(heaps[q], slack[q], estimates[q], slots[q], counts[q])):
            slot = slots[q, c]
            row = rows[slot] if len(rows) else slot
            vector = vectors[row if by_row else slot]
            total = 0.0
            if metric == 0:
                for j in range(d):
                    step = np.float64(query[j]) - np.float64(vector[j])
                    total += step * step
            else:
                for j in range(d):
                    total += np.float64(query[j]) * np.float64(vector[j])
                total = (1.0 if metric == 2 else 0.0) - total
            distance: Any = np.float32(total)
            if worse(distances[q, 0], found[q, 0], distance, ids[row]):
                sink(distances[q], found[q], found.shape[1], distance, ids[row])
        sort(distances[q], found[q])


@njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def collect(
    products: Array,
    halves: Array,
    first: int,
    which: Array,
    allowed: Array,
    heaps: Array,
    slack: Array,
    estimates: Array,
    slots: Array,
    counts: Array,
) -> None:
    """Look at products (r, n), −⟨q, x⟩ of the queries `which` (r,), and the vectors in slots first … first + n.

    halves (n,): what is added for an estimate. allowed: bool (n,), or empty for all.
    """
    n = products.shape[1]
    filtered = len(allowed) > 0
    for r in range(len(which)):
        q = which[r]
        if counts[q] < 0:
            continue
        row = products[r]
        bar = heaps[q, 0] + slack[q]
        for start in range(0, n, BLOCK):
            end = min(start + BLOCK, n)
            lowest = np.float32(np.inf)
            if end == start + BLOCK:
                for i in range(start, start + BLOCK):  # becomes one or two vector instructions
                    lowest = min(lowest, row[i] + halves[i])
            else:
                for i in range(start, end):
                    lowest = min(lowest, row[i] + halves[i])
            if lowest > bar:
                continue
            for i in range(start, end):
                estimate = row[i] + halves[i]
                if estimate <= bar and (not filtered or allowed[i]):
                    bar = note(q, estimate, first + i, heaps, slack, estimates, slots, counts)
                    if counts[q] < 0:
                        break
            if counts[q] < 0:
                break


@njit(cache=True, nogil=True, inline="always")
def note(
    q: int, estimate: float, slot: int, heaps: Array, slack: Array, estimates: Array, slots: Array, counts: Array
) -> float:
    """Put an estimate that is not above the bar into the list of query q; its bar then, −∞ if it has overflown."""
    heap, kept = heaps[q], estimates[q]
    if counts[q] == len(kept):
        counts[q] = _thin(heap, slack[q], kept, slots[q], len(kept))
        if counts[q] > len(kept) - len(kept) // 8:
            counts[q] = -1
            return np.float32(-np.inf)  # type: ignore[return-value]  # compiled, a float like any other
    kept[counts[q]] = estimate
    slots[q, counts[q]] = slot
    counts[q] += 1
    if estimate < heap[0]:
        _replace_top(heap, estimate)
    return heap[0] + slack[q]


@njit(cache=True, nogil=True)
def _thin(heap: Array, slack: float, kept: Array, where: Array, count: int) -> int:
    """Drop the candidates above the bar; how many are left."""
    bar = heap[0] + np.float32(slack)
    left = 0
    for i in range(count):
        if kept[i] <= bar:
            kept[left], where[left] = kept[i], where[i]
            left += 1
    return left


@njit(cache=True, nogil=True)
def _replace_top(heap: Array, value: float) -> None:
    """Put a value in place of the largest, and let it sink below children that are larger."""
    at = 0
    while True:
        child = 2 * at + 1
        if child >= len(heap):
            break
        if child + 1 < len(heap) and heap[child + 1] > heap[child]:
            child += 1
        if heap[child] <= value:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = value
