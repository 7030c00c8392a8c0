"""IVF, compiled: the same index and the same results as `ivf`, faster.

`ivf` writes the estimates of a query one list behind the other, and then looks for
the smallest: as many bytes written and read again as vectors are compared. Here a
loop goes from list to list, and through the queries that probe it, four at a time:
each vector is read once for all four, out of a cache that holds the list. What is
near enough for its query is noted (`_collect_numba`) while its estimate is in cache.

Cost:
    As `ivf`.

Memory:
    As `ivf`; a few candidates a query in place of all estimates.

Papers:
    Those of `ivf`.

See also:
    `ivf` (the readable version), `exact_numba` (which finds the centroids).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from mlsys.compiled import uncounted
from mlsys.retrieval import _memory, exact_numba, ivf
from mlsys.retrieval._collect_numba import Collector, collect

Array = np.ndarray

CACHED = 1 << 22  # bytes of vectors that stay in a cache, so that lists may be gone through twice
NONE = np.empty(0, np.bool_)
TOGETHER = 4  # queries that are compared with a vector at once: more do not fit into registers


class IVF(ivf.IVF):
    """`ivf.IVF`, compiled: same arguments, methods, results, and index files.

    The first search in a process loads compiled code (a fraction of a second), the first ever compiles it (seconds).
    """

    EXACT = exact_numba.Exact

    def _at_once(self, k: int, n_probe: int) -> int:
        return exact_numba.at_once(min(k, len(self)))

    def _scan(self, queries: Array, probes: Array, k: int, mask: Array | None, distances: Array, ids: Array) -> None:
        lists = self._lists
        x, halves = lists.arrays["vectors"], lists.arrays["halves"]
        collector = Collector(self.metric, queries, min(k, len(self)), self._longest)
        if not collector.estimable:
            super()._scan(queries, probes, k, mask, distances, ids)
            return
        allowed = NONE if mask is None else mask
        queries = _memory.aligned(queries)
        room = np.empty(TOGETHER * int(lists.sizes.max(initial=0)), np.float32)
        # The list nearest to each query first, so that few of the others' vectors are below its bar
        rounds = (probes[:, :1], probes[:, 1:]) if x.nbytes <= CACHED else (probes,)
        for some in rounds:
            some = np.ascontiguousarray(some)
            first, members = by_list(some, len(lists.sizes))
            _scan(queries, first, members, lists.starts, lists.sizes, x, halves, allowed, room, *collector.state)
        overflown = collector.settle(x, self._ids, lists.rows, distances, ids, by_row=False)
        for q in overflown:
            one = slice(q, q + 1)
            super()._scan(queries[one], probes[one], k, mask, distances[one], ids[one])


@uncounted()
def _scan(
    queries: Array,
    first: Array,
    members: Array,
    starts: Array,
    sizes: Array,
    x: Array,
    halves: Array,
    allowed: Array,
    room: Array,
    bars: Array,
    slack: Array,
    estimates: Array,
    slots: Array,
    counts: Array,
) -> None:
    """`collect` list by list, for the queries that probe it, from `by_list`. allowed: by slot, or empty for all.

    room: for the products of TOGETHER queries and the longest list.
    """
    for i in range(len(sizes)):
        start, end = starts[i], starts[i] + sizes[i]
        products = room[: TOGETHER * sizes[i]].reshape(TOGETHER, sizes[i])
        near = allowed[start:end] if len(allowed) else allowed
        at = first[i]
        while at < first[i + 1]:
            some = members[at : min(at + TOGETHER, first[i + 1])]
            if len(some) == TOGETHER:
                _estimate_four(queries, some, x, start, products)
            else:
                for r in range(len(some)):
                    _estimate(queries[some[r]], x, start, products[r])
            collect(products, halves[start:end], start, some, near, bars, slack, estimates, slots, counts)
            at += len(some)


@njit(cache=True, nogil=True)
def by_list(probes: Array, n_lists: int) -> tuple[Array, Array]:
    """The queries that probe list i: members[first[i]] … members[first[i + 1] − 1], in order."""
    first = np.zeros(n_lists + 2, np.int64)
    for i in probes.flat:
        first[i + 2] += 1
    first = first.cumsum()
    members = np.empty(probes.size, np.int64)
    for q in range(len(probes)):
        for i in probes[q]:
            members[first[i + 1]] = q
            first[i + 1] += 1
    return first, members


@uncounted(fastmath={"nnan", "nsz", "reassoc", "contract"})
def _estimate_four(queries: Array, some: Array, x: Array, start: int, out: Array) -> None:
    """−⟨q, x⟩ of four queries and the vectors x[start], x[start + 1], …: out (4, n)."""
    q, r, s, t = some[0], some[1], some[2], some[3]
    for i in range(out.shape[1]):
        a = b = c = d = np.float32(0)
        for j in range(x.shape[1]):
            value = x[start + i, j]
            a += queries[q, j] * value
            b += queries[r, j] * value
            c += queries[s, j] * value
            d += queries[t, j] * value
        out[0, i], out[1, i], out[2, i], out[3, i] = -a, -b, -c, -d


@uncounted(fastmath={"nnan", "nsz", "reassoc", "contract"})
def _estimate(query: Array, x: Array, start: int, out: Array) -> None:
    """−⟨q, x⟩ for the vectors x[start], x[start + 1], …, one for each place in `out`."""
    for i in range(len(out)):
        total = np.float32(0)
        for j in range(x.shape[1]):
            total += query[j] * x[start + i, j]
        out[i] = -total
