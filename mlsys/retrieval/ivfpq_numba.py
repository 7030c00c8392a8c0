"""IVF-PQ, compiled: the same index and the same results as `ivfpq`, faster.

One loop over queries, their lists, and the codes in these. The query's table is
made in the first-level cache, and stays there for all its lists; a list adds nothing
but its base ‖q − c‖² and the terms that lie beside its codes. The look-ups are
those of `pq_numba`.

Cost:
    As `ivfpq`.

Memory:
    As `ivfpq`.

Papers:
    Those of `ivfpq` and `pq_numba`.

See also:
    `ivfpq` (the readable version), `pq_numba` (how codes are scanned).
"""

from __future__ import annotations

import numpy as np

from mlsys.compiled import uncounted
from mlsys.retrieval import exact_numba, ivfpq
from mlsys.retrieval._heap_numba import NO_ID, sort
from mlsys.retrieval.pq_numba import NONE, add_up, books_across, fill, keep, words

Array = np.ndarray


class IVFPQ(ivfpq.IVFPQ):
    """`ivfpq.IVFPQ`, compiled: same arguments, methods, results, and index files.

    The first search in a process loads compiled code (a fraction of a second), the first ever compiles it (seconds).
    """

    EXACT = exact_numba.Exact

    def _scan(
        self,
        queries: Array,
        probes: Array,
        to_centroids: Array,
        mask: Array | None,
        distances: Array,
        ids: Array,
    ) -> None:
        lists = self._lists
        parts, across = books_across(self.quantizer_, self._asked(queries))
        codes, terms = lists.arrays["codes"], lists.arrays["terms"]
        allowed = NONE if mask is None else mask
        ids[:] = NO_ID
        room = np.empty(across[..., 0, :].size, np.float32), np.empty(int(lists.sizes.max()), np.float32)
        _scan(
            parts, across, probes, to_centroids, lists.starts, lists.sizes, codes, words(codes), terms, lists.rows,
            self._ids, allowed, *room, distances, ids,
        )  # fmt: skip
        ids[ids == NO_ID] = -1


@uncounted()
def _scan(
    parts: Array,
    across: Array,
    probes: Array,
    to_centroids: Array,
    starts: Array,
    sizes: Array,
    codes: Array,
    packed: Array,
    terms: Array,
    rows: Array,
    ids: Array,
    allowed: Array,
    table: Array,
    room: Array,
    distances: Array,
    found: Array,
) -> None:
    """Fill distances (∞ so far) and found (NO_ID so far), (n_queries, k). terms, rows, allowed: by slot.

    table, room: for one query, for one list.
    """
    size = across.shape[2]
    for q in range(len(parts)):
        fill(parts[q], across, False, table)
        for p in range(probes.shape[1]):
            i = probes[q, p]
            start, end = starts[i], starts[i] + sizes[i]
            out = room[: sizes[i]]
            base = to_centroids[q, p]
            for s in range(len(out)):
                out[s] = base + terms[start + s]
            add_up(table, size, codes, packed, start, out)
            near = allowed[start:end] if len(allowed) else allowed
            keep(out, ids, rows[start:end], near, distances[q], found[q])
        sort(distances[q], found[q])
