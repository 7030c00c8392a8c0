"""Compiled selection: which estimates are near enough to be looked at again, and the best k with distances and ids.

`collect` keeps for each query a bar and a list of candidates: all estimates that were not above
the bar when they came. When the list has grown by so many, it is thinned out: its k-th smallest
estimate and the slack make a new bar, and what is above goes. (A heap of the k smallest would
lower the bar with each of them, and cost a walk from its top each time; here most cost a store.)
A query whose list is full of candidates all the same (thousands of equal vectors, data far from
the origin, where the slack is wide) is marked as overflown, and left to the readable version.

See also:
    `_rank` (what an estimate is, and the slack), `_heap_numba` (the best k with ids), `exact_numba`, `ivf_numba`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from mlsys.compiled import uncounted
from mlsys.retrieval import _rank
from mlsys.retrieval._heap_numba import NO_ID, sink, sort, worse
from mlsys.retrieval._intrinsics_numba import lowest_bit

Array = np.ndarray
BLOCK = 16  # estimates compared at once
COUNTED = 64  # candidates among which a rank is found by comparing each with all others
MORE = 32  # a list is thinned out when it has grown by k and so many
METRICS = ("l2", "ip", "cosine")  # by the number that the compiled code gets
EVERY = np.empty(0, np.int32)
NONE = np.empty(0, np.int64)


class Collector:
    """The bars and the candidate lists of a few queries, for the k nearest of vectors that are at most so long.

    estimable: False if estimates could overflow for one of them: then nothing can be collected.
    """

    def __init__(self, metric: str, queries: Array, k: int, longest: float) -> None:
        n, room = len(queries), 4 * k + 64
        self._metric, self._queries = METRICS.index(metric), queries
        self.bars, self.slack = np.empty(n, np.float32), np.empty(n, np.float32)  # a bar of −∞: overflown
        self.estimates, self.slots = np.empty((n, room), np.float32), np.empty((n, room), np.int64)
        self.counts = np.empty((n, 3), np.int64)  # of candidates, at which they are thinned out, and k
        limits = min(room, 2 * k + MORE), k
        error = _rank.rounding(queries.shape[1])
        self.estimable: bool = _begin(metric == "l2", queries, longest, *error, *limits, *self.state)

    @property
    def state(self) -> tuple[Array, Array, Array, Array, Array]:
        """What the compiled functions take."""
        return self.bars, self.slack, self.estimates, self.slots, self.counts

    def settle(
        self, vectors: Array, ids: Array, rows: Array | None, distances: Array, found: Array, *, by_row: bool
    ) -> Array:
        """Write the k nearest of the candidates, as `_rank.Candidates.settle` does. The queries that have overflown.

        ids: by row. rows: the row of each slot (None: its number). by_row: whether vectors lie by row, or by slot.
        """
        rows = EVERY if rows is None else rows
        wide, queries = np.empty(vectors.shape[1]), self._queries
        overflown = _settle(self._metric, queries, vectors, ids, rows, by_row, wide, *self.state, distances, found)
        return np.flatnonzero(self.bars == -np.inf) if overflown else NONE


@uncounted(fastmath={"reassoc", "contract"})
def _begin(
    l2: bool,
    queries: Array,
    longest: float,
    factor: float,
    least: float,
    full: int,
    k: int,
    bars: Array,
    slack: Array,
    estimates: Array,
    slots: Array,
    counts: Array,
) -> bool:
    """Empty lists, no bars, and `_rank.slack`, rounded up. False if that is infinite for a query."""
    for q in range(len(queries)):
        total = 0.0
        for j in range(queries.shape[1]):
            total += np.float64(queries[q, j]) * np.float64(queries[q, j])
        length = np.sqrt(total)
        scale = (length + longest) ** 2 if l2 else 2 * length * longest
        if not (scale < _rank.MOST and factor < np.inf):
            return False
        slack[q] = np.float32((factor * scale + least) * (1 + 4 * _rank.UNIT))
        bars[q] = np.inf
        counts[q, 0], counts[q, 1], counts[q, 2] = 0, full, k
    return True


# The order in which a float64 sum is taken differs from NumPy's: rounded to float32, a distance seldom differs, but for
# cosine distances near 0, differences of two numbers near 1.
@uncounted(fastmath={"nnan", "nsz", "reassoc", "contract"})
def _settle(
    metric: int,
    queries: Array,
    vectors: Array,
    ids: Array,
    rows: Array,
    by_row: bool,
    wide: Array,
    bars: Array,
    slack: Array,
    estimates: Array,
    slots: Array,
    counts: Array,
    distances: Array,
    found: Array,
) -> int:
    """How many have overflown. wide: room for a query in float64. The lists then hold distances and ids."""
    d, overflown = queries.shape[1], 0
    for q in range(len(queries)):
        if bars[q] == -np.inf:
            overflown += 1
            continue
        for j in range(d):
            wide[j] = np.float64(queries[q, j])
        _thin(q, 100, bars, slack, estimates, slots, counts)
        for c in range(counts[q, 0]):
            slot = slots[q, c]
            row = rows[slot] if len(rows) else slot
            at = row if by_row else slot
            total = 0.0
            if metric == 0:
                for j in range(d):
                    step = wide[j] - np.float64(vectors[at, j])
                    total += step * step
            else:
                for j in range(d):
                    total += wide[j] * np.float64(vectors[at, j])
                total = (1.0 if metric == 2 else 0.0) - total
            estimates[q, c], slots[q, c] = np.float32(total), ids[row]
        _rank_few(q, estimates, slots, counts[q, 0], distances, found)
    return overflown


@uncounted()
def _rank_few(q: int, near: Array, ids: Array, n: int, distances: Array, found: Array) -> None:
    """Write the nearest of n hits of query q, in order: by how many come before each; by a heap if there are many."""
    k = found.shape[1]
    if n > COUNTED:
        found[q] = NO_ID
        for c in range(n):
            if worse(distances[q, 0], found[q, 0], near[q, c], ids[q, c]):
                sink(distances[q], found[q], k, near[q, c], ids[q, c])
        sort(distances[q], found[q])
        for c in range(k):
            if found[q, c] == NO_ID:
                found[q, c] = -1
        return
    for c in range(n):
        distance, id_ = near[q, c], ids[q, c]
        rank = 0
        for o in range(n):
            rank += (near[q, o] < distance) | ((near[q, o] == distance) & (ids[q, o] < id_))
        if rank < k:
            distances[q, rank], found[q, rank] = distance, id_


@uncounted(fastmath={"nnan", "nsz"})
def collect(
    products: Array,
    halves: Array,
    first: int,
    which: Array,
    allowed: Array,
    bars: Array,
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
        if not filtered and bars[q] == np.inf and counts[q, 0] == 0:
            _lower(q, products, r, halves, bars, slack, estimates, counts)
        bar = bars[q]
        for start in range(0, n, BLOCK):
            if start + BLOCK <= n:
                hits = _below(products, r, halves, start, bar)
            else:
                hits = np.uint64(0)
                for i in range(start, n):
                    hits |= np.uint64(products[r, i] + halves[i] <= bar) << np.uint64(i - start)
            while hits:
                i = start + lowest_bit(hits)
                hits &= hits - np.uint64(1)
                estimate = products[r, i] + halves[i]  # the bar may be lower by now
                if estimate <= bar and (not filtered or allowed[i]):
                    bar = note(q, estimate, first + i, bars, slack, estimates, slots, counts)


@uncounted(fastmath={"nnan", "nsz"})
def _lower(
    q: int, products: Array, r: int, halves: Array, bars: Array, slack: Array, estimates: Array, counts: Array
) -> None:
    """A first bar for query q, whose list is empty: from the smallest of every BLOCK-th estimate, for k ≤ BLOCK."""
    n, k = products.shape[1], counts[q, 2]
    if k > BLOCK or n < 2 * BLOCK:
        return
    for lane in range(BLOCK):
        estimates[q, lane] = products[r, lane] + halves[lane]
    for start in range(BLOCK, n - BLOCK + 1, BLOCK):
        for lane in range(BLOCK):
            estimates[q, lane] = min(estimates[q, lane], products[r, start + lane] + halves[start + lane])
    bars[q] = _kth(estimates, q, BLOCK, k, 10) + slack[q]


def _below_typed(typing_context: Any, products: Any, r: Any, halves: Any, start: Any, bar: Any) -> tuple[Any, Any]:
    """Which of products[r, i] + halves[i] are not above the bar, as bits, of BLOCK numbers from i = start on.

    Both are float32, and the numbers of a row lie side by side.
    """
    vector, bits, i32, i64 = ir.VectorType(ir.FloatType(), BLOCK), ir.IntType(BLOCK), ir.IntType(32), ir.IntType(64)

    def generate(context: Any, build: Any, signature: Any, args: Any) -> Any:
        r, at = (context.cast(build, args[i], signature.args[i], types.int64) for i in (1, 3))
        table, added = (context.make_array(signature.args[i])(context, build, args[i]) for i in (0, 2))
        stride = build.udiv(build.extract_value(table.strides, 0), i64(4))
        some = []
        for data, place in ((table.data, build.add(build.mul(r, stride), at)), (added.data, at)):
            some.append(build.load(build.bitcast(build.gep(data, [place]), vector.as_pointer()), align=4))
        undefined = ir.Constant(vector, ir.Undefined)
        limit = build.insert_element(undefined, args[4], i32(0))
        limit = build.shuffle_vector(limit, undefined, ir.Constant(ir.VectorType(i32, BLOCK), [0] * BLOCK))
        near = build.fcmp_ordered("<=", build.fadd(*some), limit)
        return build.zext(build.bitcast(near, bits), i64)

    return types.uint64(products, r, halves, start, types.float32), generate


_below: Any = intrinsic(_below_typed)


@uncounted(inline="always")
def note(
    q: int, estimate: float, slot: int, bars: Array, slack: Array, estimates: Array, slots: Array, counts: Array
) -> float:
    """Put an estimate that is not above the bar into the list of query q; its bar then, −∞ if it has overflown."""
    count = counts[q, 0]
    if count == counts[q, 1]:  # overflown, and the estimate is −∞ as well
        return bars[q]
    estimates[q, count], slots[q, count] = estimate, slot
    counts[q, 0] = count + 1
    if count + 1 == counts[q, 1]:
        _thin(q, 10, bars, slack, estimates, slots, counts)
        if counts[q, 0] > estimates.shape[1] - estimates.shape[1] // 8:
            bars[q] = -np.inf
    return bars[q]


@uncounted()
def _thin(q: int, steps: int, bars: Array, slack: Array, estimates: Array, slots: Array, counts: Array) -> None:
    """Lower the bar of query q to what its candidates allow, and drop those above."""
    count, k = counts[q, 0], counts[q, 2]
    if count >= k:
        bars[q] = min(bars[q], _kth(estimates, q, count, k, steps) + slack[q])
    bar = bars[q]
    left = 0
    for i in range(count):
        if estimates[q, i] <= bar:
            estimates[q, left], slots[q, left] = estimates[q, i], slots[q, i]
            left += 1
    counts[q, 0], counts[q, 1] = left, min(estimates.shape[1], left + k + MORE)


@uncounted(fastmath={"nnan", "nsz"})
def _kth(values: Array, q: int, n: int, k: int, steps: int) -> float:
    """The k-th smallest of n values in row q, or after `steps` a later one: halve the interval in which it lies."""
    low = high = values[q, 0]
    for i in range(n):
        low, high = min(low, values[q, i]), max(high, values[q, i])
    for _ in range(steps):
        middle = low + (high - low) / np.float32(2)
        if not low < middle < high:
            break
        below = 0
        for i in range(n):
            below += values[q, i] <= middle
        if below < k:
            low = middle
        else:
            high = middle
            if below == k:
                break
    kth = low
    for i in range(n):
        kth = max(kth, values[q, i] if values[q, i] <= high else low)
    return kth
