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

import numpy as np
from numba import njit

from mlsys.retrieval import bm25

Array = np.ndarray

BLOCK = 16  # scores compared at once
DENSE_FROM = 16  # a term in more than N / DENSE_FROM documents gets a dense row


class BM25(bm25.BM25):
    """`bm25.BM25` with compiled building and searching: same parameters, methods, results, and index files.

    The first call in a process loads the compiled code (a fraction of a second), the first ever compiles it (seconds).
    """

    def _postings(self, terms: np.ndarray, lengths: np.ndarray, n_terms: int) -> tuple[np.ndarray, ...]:
        return _count_postings(terms, lengths, n_terms)

    def _rank(self, terms: np.ndarray, starts: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores = np.zeros((len(starts) - 1, k), np.float32)
        ids = np.full((len(starts) - 1, k), -1, np.int64)
        postings = self.indptr_, self.indices_, self.impacts_
        if self._positive:
            _search(terms, starts, *postings, self._row_of, self._rows, scores, ids)
        else:
            _search_any_sign(terms, starts, *postings, self.n_documents_, scores, ids)
        return scores, ids

    def _adopt(
        self,
        vocabulary: dict[str, int],
        n_documents: int,
        average_length: float,
        indptr: np.ndarray,
        indices: np.ndarray,
        impacts: np.ndarray,
        absent: np.ndarray,
    ) -> None:
        super()._adopt(vocabulary, n_documents, average_length, indptr, indices, impacts, absent)
        frequent = np.flatnonzero(np.diff(indptr) * DENSE_FROM > n_documents)
        self._row_of = np.full(len(vocabulary), -1, np.int32)
        self._row_of[frequent] = np.arange(len(frequent))
        self._rows = np.zeros((len(frequent), -(-n_documents // BLOCK) * BLOCK), np.float32)
        for row, term in enumerate(frequent):
            postings = slice(indptr[term], indptr[term + 1])
            self._rows[row, indices[postings]] = impacts[postings]


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
@njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def _search(
    terms: Array,
    starts: Array,
    indptr: Array,
    indices: Array,
    impacts: Array,
    row_of: Array,
    rows: Array,
    best_scores: Array,
    best_ids: Array,
) -> None:
    """Fill best_scores and best_ids (n_queries, k). For positive impacts: a score of 0 is no hit."""
    n_padded = rows.shape[1]
    k = best_scores.shape[1]
    scores = np.empty(n_padded, np.float32)
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

        heap_scores, heap_ids = best_scores[query], best_ids[query]
        size = 0
        bar = np.float32(0)  # what a score must exceed to enter
        for block in range(0, n_padded, BLOCK):
            highest = np.float32(0)
            for document in range(block, block + BLOCK):  # becomes one or two vector instructions
                highest = max(highest, scores[document])
            if highest > bar:
                for document in range(block, block + BLOCK):
                    if scores[document] > bar:
                        size = _push(heap_scores, heap_ids, size, scores[document], document)
                        if size == k:
                            bar = heap_scores[0]
        _sort(heap_scores, heap_ids, size)


@njit(cache=True, nogil=True)
def _search_any_sign(
    terms: Array,
    starts: Array,
    indptr: Array,
    indices: Array,
    impacts: Array,
    n_documents: int,
    best_scores: Array,
    best_ids: Array,
) -> None:
    """As `_search`, for impacts that may be 0 or negative: which documents matched is noted beside the scores."""
    k = best_scores.shape[1]
    scores = np.empty(n_documents, np.float32)
    matched_by = np.full(n_documents, -1, np.int64)  # the last query that matched
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

        heap_scores, heap_ids = best_scores[query], best_ids[query]
        size = 0
        for document in range(n_documents):
            if matched_by[document] == query and (size < k or scores[document] > heap_scores[0]):
                size = _push(heap_scores, heap_ids, size, scores[document], document)
        _sort(heap_scores, heap_ids, size)


@njit(cache=True, nogil=True)
def _worse(score: float, document: int, other_score: float, other_document: int) -> bool:
    return score < other_score or (score == other_score and document > other_document)


@njit(cache=True, nogil=True)
def _push(scores: Array, ids: Array, size: int, score: float, document: int) -> int:
    """Add to the heap, whose top is its worst entry; if it is full, in place of that. Returns its new size."""
    if size < len(scores):
        at = size
        while at > 0:  # up, past parents that are better
            parent = (at - 1) >> 1
            if not _worse(score, document, scores[parent], ids[parent]):
                break
            scores[at], ids[at] = scores[parent], ids[parent]
            at = parent
        scores[at], ids[at] = score, document
        return size + 1
    _replace_top(scores, ids, size, score, document)
    return size


@njit(cache=True, nogil=True)
def _replace_top(scores: Array, ids: Array, size: int, score: float, document: int) -> None:
    """Put an entry in place of the top of the first `size`, and let it sink below children that are worse."""
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and _worse(scores[child + 1], ids[child + 1], scores[child], ids[child]):
            child += 1
        if not _worse(scores[child], ids[child], score, document):
            break
        scores[at], ids[at] = scores[child], ids[child]
        at = child
    scores[at], ids[at] = score, document


@njit(cache=True, nogil=True)
def _sort(scores: Array, ids: Array, size: int) -> None:
    """Turn the heap into a list, best first: take the worst off the top, and put it where the heap ended."""
    for end in range(size - 1, 0, -1):
        score, document = scores[0], ids[0]
        last_score, last_document = scores[end], ids[end]
        _replace_top(scores, ids, end, last_score, last_document)
        scores[end], ids[end] = score, document
