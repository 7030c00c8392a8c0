"""BM25, compiled: the same index and the same results as `bm25`, several times faster.

`bm25` leaves its time in NumPy's gather and scatter, one pass over all scores
per query, and a sort to build the index. Here:

- Building is two passes of counting, without a sort: documents come in order,
  so writing each token to its term's next free place leaves the postings sorted.
- A term in many documents is kept as a dense row as well, 0 where it is absent:
  adding 8 or 16 consecutive floats at once costs less than scattering each one.
  A row of N floats pays off long before every document has the term; at
  N/16 postings it is about even, and a row then takes 8 times its postings.
- Most scores cannot enter the top k. Of each block of 16 the maximum is taken,
  and a block is looked into only if that beats the k-th best so far.
- The best k lie in a heap with the worst on top, so that a large k costs log k.

What does not help with tens of thousands of documents: skipping some by upper
bounds (MaxScore, WAND) costs more in branches than it saves in additions.

Cost:
    fit: O(tokens). search: a scatter per posting of rare terms, N/8 to N/16
    vector additions per frequent one, N/16 comparisons of block maxima.

Memory:
    `bm25`'s, and 4·N bytes per frequent term: at most 8 times the postings it stands for.

Papers:
    Lù 2024, arXiv:2407.03618 (BM25S: eager scores in a sparse matrix).
    Moffat & Culpepper 2007, "Hybrid Bitvector Index Compression" (dense rows for frequent terms, lists for rare ones).
    Turtle & Flood 1995, "Query Evaluation: Strategies and Optimizations" (MaxScore, which is not used here).

See also:
    `bm25` (the readable version, with the formulas).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from mlsys.compiled import uncounted
from mlsys.retrieval import _bm25_columns, bm25
from mlsys.retrieval._bm25_columns import Counts, weigh
from mlsys.retrieval._heap_numba import push, sort

Array = np.ndarray

BLOCK = 16  # scores compared at once
DENSE_FROM = 16  # a term in more than N / DENSE_FROM documents gets a dense row


@dataclass(frozen=True)
class Columns(_bm25_columns.Columns):
    """The columns of `bm25`, and the rows of the terms that are in many documents."""

    row_of: np.ndarray  # (n_terms,) int32: which row is the term's, or -1
    rows: np.ndarray  # (n_rows, n_documents, rounded up to whole blocks) float32


class BM25(bm25.BM25):
    """`bm25.BM25` with compiled building and searching: same parameters, methods, results, and index files.

    The first call in a process loads the compiled code (a fraction of a second), the first ever compiles it (seconds).
    """

    def _postings(self, terms: np.ndarray, lengths: np.ndarray, n_terms: int) -> tuple[np.ndarray, ...]:
        return _count_postings(terms, lengths, n_terms)

    def _rank(
        self, columns: _bm25_columns.Columns, terms: np.ndarray, starts: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        assert isinstance(columns, Columns)
        counts = columns.counts
        distances = np.zeros((len(starts) - 1, k), np.float32)  # for the heap: a score with the other sign
        ids = np.full((len(starts) - 1, k), -1, np.int64)
        postings = counts.indptr, counts.indices, columns.impacts
        if columns.positive:
            room = np.empty(columns.rows.shape[1], np.float32)
            _search(terms, starts, *postings, columns.row_of, columns.rows, room, distances, ids)
        else:
            n = len(counts.lengths)
            _search_any_sign(terms, starts, *postings, np.empty(n, np.float32), np.full(n, -1), distances, ids)
        return 0 - distances, ids

    def _weighed(self, counts: Counts, parameters: Mapping[str, Any]) -> Columns:
        columns = weigh(counts, parameters)
        n = len(counts.lengths)
        frequent = np.flatnonzero(np.diff(counts.indptr) * DENSE_FROM > n)
        row_of = np.full(len(counts.indptr) - 1, -1, np.int32)
        row_of[frequent] = np.arange(len(frequent))
        rows = np.zeros((len(frequent), -(-n // BLOCK) * BLOCK), np.float32)
        for row, term in enumerate(frequent):
            postings = slice(counts.indptr[term], counts.indptr[term + 1])
            rows[row, counts.indices[postings]] = columns.impacts[postings]
        return Columns(**vars(columns), row_of=row_of, rows=rows)


@njit(cache=True, nogil=True)
def _count_postings(terms: Array, lengths: Array, n_terms: int) -> tuple[Array, Array, Array]:
    """Term ids of all documents in a row → indptr, document ids and term frequencies, without sorting."""
    last_document = np.full(n_terms, -1, np.int64)
    indptr = np.zeros(n_terms + 1, np.int64)
    position = 0
    for document in range(len(lengths)):
        for _ in range(lengths[document]):
            term = terms[position]
            position += 1
            if last_document[term] != document:
                last_document[term] = document
                indptr[term + 1] += 1
    for term in range(n_terms):
        indptr[term + 1] += indptr[term]

    indices = np.empty(indptr[n_terms], np.int32)
    tf = np.zeros(indptr[n_terms], np.int32)
    free = indptr[:n_terms].copy()  # the next free place of each term
    last_document[:] = -1
    position = 0
    for document in range(len(lengths)):
        for _ in range(lengths[document]):
            term = terms[position]
            position += 1
            if last_document[term] != document:
                last_document[term] = document
                indices[free[term]] = document
                free[term] += 1
            tf[free[term] - 1] += 1
    return indptr, indices, tf


# The two flags say that no score is NaN, so that a maximum may be taken many at a time. Sums keep their order.
@uncounted(fastmath={"nnan", "nsz"})
def _search(
    terms: Array,
    starts: Array,
    indptr: Array,
    indices: Array,
    impacts: Array,
    row_of: Array,
    rows: Array,
    scores: Array,
    distances: Array,
    ids: Array,
) -> None:
    """Fill distances and ids (n_queries, k). For positive impacts: a score of 0 is no hit. scores: of one query."""
    n_padded = rows.shape[1]
    k = distances.shape[1]
    for query in range(len(starts) - 1):
        scores[:] = 0
        for term in terms[starts[query] : starts[query + 1]]:
            if term < 0:
                continue
            if row_of[term] >= 0:
                row = rows[row_of[term]]
                for document in range(n_padded):
                    scores[document] += row[document]
            else:
                for posting in range(indptr[term], indptr[term + 1]):
                    scores[indices[posting]] += impacts[posting]

        nearest, found, size = distances[query], ids[query], 0
        bar = np.float32(0)  # what a score must exceed to enter
        for block in range(0, n_padded, BLOCK):
            highest = np.float32(0)
            for document in range(block, block + BLOCK):  # becomes one or two vector instructions
                highest = max(highest, scores[document])
            if highest > bar:
                for document in range(block, block + BLOCK):
                    if scores[document] > bar:
                        size = push(nearest, found, size, -scores[document], document)
                        if size == k:
                            bar = -nearest[0]
        sort(nearest[:size], found[:size])


@uncounted()
def _search_any_sign(
    terms: Array,
    starts: Array,
    indptr: Array,
    indices: Array,
    impacts: Array,
    scores: Array,
    matched_by: Array,
    distances: Array,
    ids: Array,
) -> None:
    """As `_search`, for impacts that may be 0 or negative. matched_by: the last query that matched, −1 so far."""
    k = distances.shape[1]
    for query in range(len(starts) - 1):
        for term in terms[starts[query] : starts[query + 1]]:
            if term < 0:
                continue
            for posting in range(indptr[term], indptr[term + 1]):
                document = indices[posting]
                if matched_by[document] != query:
                    matched_by[document] = query
                    scores[document] = 0
                scores[document] += impacts[posting]

        nearest, found, size = distances[query], ids[query], 0
        for document in range(len(scores)):
            if matched_by[document] == query and (size < k or -scores[document] < nearest[0]):
                size = push(nearest, found, size, -scores[document], document)
        sort(nearest[:size], found[:size])
