"""Brute force, with the selection compiled: the same index and the same results as `exact`, faster.

What `exact` spends beside the matrix product goes into passes over the estimates:
adding ½‖x‖², block minima, gathering the blocks that pass. Here the estimates never
reach memory: they are summed up in registers, a few vectors times a few queries at a
time, and compared with the bar there (`_registers_numba`). After the first tiles hardly
any is below.

A few queries get no matrix product at all: reading the vectors takes longer than
computing with them. So one loop reads each vector once, for up to 8 queries at a time.

Many queries are shared out among as many threads as numba is set to, each its own: what
is found does not depend on how many.

Cost:
    As `exact`: n·d multiply-adds a query; then n comparisons, 16 or so at once.

Memory:
    As `exact`; in place of the tile, the queries once more and a few candidates each.

Papers:
    Those of `exact`.

See also:
    `exact` (the readable version: why the results are exact), `_registers_numba` (the product),
    `_collect_numba` (the selection).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np

from mlsys.compiled import uncounted
from mlsys.retrieval import exact
from mlsys.retrieval._collect_numba import Collector, note
from mlsys.retrieval._registers_numba import COLUMNS, compare, panels

Array = np.ndarray

TILE = 4096  # vectors that are gathered at once, where a filter leaves some
QUERIES = 1024  # queries that are searched together
CANDIDATES = 1 << 20  # neighbours that are looked for at once: each takes 48 bytes (see `Collector`)
ENOUGH = 1 << 24  # multiply-adds for which another thread is worth its start
FEW = 8  # queries that are compared directly, without a matrix product
ZERO = np.empty(0, np.float32)  # halves that are all 0, and need not be read


class Exact(exact.Exact):
    """`exact.Exact` with compiled selection: same arguments, methods, results, and index files.

    The first search in a process loads compiled code (a fraction of a second), the first ever compiles it (seconds).
    """

    def _at_once(self, k: int, tile: int) -> int:
        return at_once(min(k, len(self)))

    def _search(self, queries: Array, k: int, rows: Array | None, tile: int, distances: Array, ids: Array) -> None:
        x, halves = self._vectors.view, self._halves.view
        n = len(x) if rows is None else len(rows)
        collector = Collector(self.metric, queries, min(k, n), self._longest)
        if not collector.estimable:
            super()._search(queries, k, rows, tile, distances, ids)
            return
        if len(queries) <= FEW and rows is None:
            _stream(queries, x, halves if self.metric == "l2" else ZERO, *collector.state)
        else:
            _compare(queries, x, halves, rows, collector)
        overflown = collector.settle(x, self._ids, rows, distances, ids, by_row=True)
        for q in overflown:
            one = slice(q, q + 1)
            super()._search(queries[one], k, rows, tile, distances[one], ids[one])


def at_once(k: int) -> int:
    """How many queries are searched together: QUERIES, but fewer if their lists of candidates get long."""
    return max(1, min(QUERIES, CANDIDATES // k))


def _compare(queries: Array, x: Array, halves: Array, rows: Array | None, collector: Collector) -> None:
    """Collect candidates among these rows (None: all), by the product in registers."""
    n = len(x) if rows is None else len(rows)
    step = n if rows is None else TILE
    columns = panels(queries)
    parts = list(_parts(len(columns), _threads(len(queries) * n * x.shape[1])))
    states = [[a[p.start * COLUMNS : p.stop * COLUMNS] for a in collector.state] for p in parts]
    with ThreadPoolExecutor(len(parts)) as pool:  # which starts no thread before it has work
        for start in range(0, n, step):
            some = slice(start, start + step) if rows is None else rows[start : start + step]
            near, added = x[some], halves[some]
            if len(parts) == 1:
                compare(columns, near, added, start, *states[0])
                continue
            work = [
                pool.submit(compare, columns[p], near, added, start, *state)
                for p, state in zip(parts, states, strict=True)
            ]
            for done in work:
                done.result()


def _threads(steps: int) -> int:
    """How many threads share this many multiply-adds."""
    return 1 if steps < 2 * ENOUGH else min(numba.get_num_threads(), steps // ENOUGH)


def _parts(n: int, most: int) -> Iterator[slice]:
    """0 … n in up to `most` parts, of one length but for the last."""
    each = -(-n // most)
    return (slice(start, min(start + each, n)) for start in range(0, n, each))


@uncounted(fastmath={"nnan", "nsz", "reassoc", "contract"})
def _stream(
    queries: Array,
    x: Array,
    halves: Array,
    bars: Array,
    slack: Array,
    estimates: Array,
    slots: Array,
    counts: Array,
) -> None:
    """`collect` of estimates that are computed directly: each vector is read once for all queries. halves: or ZERO."""
    for i in range(len(x)):
        half: Any = halves[i] if len(halves) else np.float32(0)
        for q in range(len(queries)):
            total = np.float32(0)
            for j in range(x.shape[1]):
                total += queries[q, j] * x[i, j]
            near = half - total
            if near <= bars[q]:
                note(q, near, i, bars, slack, estimates, slots, counts)
