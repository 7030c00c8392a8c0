"""BM25: rank documents by the words they share with the query, scored when the index is built.

A shared word counts more the rarer it is (inverse document frequency), more if
it occurs often but with diminishing returns (saturation by k1), and less in a
long document (length normalisation by b):

    score(q, d) = Σ_{t ∈ q}  idf(t) · tf / (tf + K_d)          K_d = k1·(1 − b + b·|d| / avg|d|)

A term that the query repeats counts each time. Nothing in a summand depends on
the query, so `fit` computes it for every (term, document) pair that occurs: the
*impact*. Impacts lie by term, as the columns of a sparse matrix (CSC); a query
adds up a few columns, and the work is the length of their postings lists:

    indptr_   (n_terms + 1)   term t's postings are indptr_[t] … indptr_[t+1]
    indices_  (n_postings)    document ids, ascending within a term
    tf_       (n_postings)    how often the term occurs in it
    impacts_  (n_postings)    what that adds to its document's score

Every added document changes N, the average length and some df, and so all
impacts. But counts do not change: `add` counts the new documents alone, and the
next use of the index puts their postings after the old ones of each term and
computes the impacts anew, once for however many were added. The index is then
the one that `fit` makes of all documents, bit for bit.

The variants, which differ in idf and in the factor of tf, are in `_bm25_variants`.

What counts as a hit: a document that shares at least one term with the query,
even if its score is 0 or negative. The others are not returned.

Cost:
    fit: one dictionary look-up per token and a sort of the (term, document) pairs.
    add: the same for the new documents, and at the next search a copy of all postings and some ten FLOPs for each.
    search: the postings of the query's terms, plus one pass over N scores.

Memory:
    12 bytes per posting, 8 per document and 4 more while searching, and the vocabulary. A saved index leaves out what
    counts and formulas give: 8 bytes per posting.

Papers:
    Robertson & Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and Beyond" (the model).
    Trotman, Puurula & Burgess 2014, "Improvements to BM25 and Language Models Examined" (the variants).
    Lv & Zhai 2011, "Lower-Bounding Term Frequency Normalization", CIKM (BM25+), and
    "When Documents Are Very Long, BM25 Fails!", SIGIR (BM25L).
    Kamphuis et al. 2020, "Which BM25 Do You Mean?", ECIR (the variants compared).
    Lù 2024, arXiv:2407.03618 (BM25S: eager scores in a sparse matrix).

See also:
    `bm25_numba` (the same, compiled), `tokenize` (text to terms), `metrics`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from mlsys.retrieval import _bm25_file, _bm25_texts, _bm25_variants
from mlsys.retrieval._bm25_columns import Columns, Counts, weigh
from mlsys.retrieval._bm25_texts import Texts, Tokenize
from mlsys.retrieval._bm25_variants import VARIANTS, Variant
from mlsys.retrieval._vectors import whole

__all__ = ["BM25", "VARIANTS", "Variant"]


class BM25:
    """An index of documents, searched by BM25.

    variant:   one of `VARIANTS`.
    k1:        saturation of the term frequency, ≥ 0 (0: only presence counts).
    b:         length normalisation, 0 (none) to 1 (full).
    delta:     δ of the bm25+ and bm25l variants; None takes the variant's own.
    tokenizer: callable str → list of str for documents and queries given as strings; None takes `Tokenizer()`.

    Setting one of these after `fit` has no effect before the next `fit`.

    Fitted: `parameters_` (the five above as they were used), `vocabulary_` (term → term id), `n_documents_`,
    `average_length_`, `indptr_`, `indices_`, `tf_`, `impacts_` (the postings, see the module), `absent_` (per term,
    what a document without it scores).

    Several threads may search an index, as long as none fits it or adds to it.

        >>> index = BM25().fit(["the cat sat", "the dog ran"])
        >>> scores, ids = index.search(["a dog"], k=1)
        >>> ids
        array([[1]])
        >>> index.add(["a dog barked"]).search(["barking dogs, a dog"], k=2)[1]
        array([[2, 1]])
    """

    parameters_: dict[str, Any]
    vocabulary_: dict[str, int]
    n_documents_: int

    def __init__(
        self,
        *,
        variant: str = "lucene",
        k1: float = 1.5,
        b: float = 0.75,
        delta: float | None = None,
        tokenizer: Tokenize | None = None,
    ) -> None:
        self.variant = variant
        self.k1 = k1
        self.b = b
        self.delta = delta
        self.tokenizer = tokenizer

    def fit(self, documents: Texts) -> Self:
        """Index `documents`, each a string or a list of tokens; a document may be empty. What was fitted is replaced.

        Raises ValueError for an empty corpus or parameters out of range, TypeError for what is no text. After a
        failure the index is what it was before.
        """
        _bm25_variants.check(self.variant, self.k1, self.b, self.delta)
        tokens = _bm25_texts.tokenized("documents", documents, self.tokenizer)
        if not tokens:
            raise ValueError("documents is empty: an index needs at least one document")
        terms, lengths, vocabulary = _bm25_texts.numbered(tokens)
        self._adopt(vocabulary, Counts(lengths, *self._postings(terms, lengths, len(vocabulary))))
        return self

    def add(self, documents: Texts) -> Self:
        """Index `documents` as well, under the ids that follow: as if `fit` had been given all of them.

        An index that holds none is fitted on them. Errors are those of `fit`, and leave the index as it was.
        """
        if not hasattr(self, "_state"):
            return self.fit(documents)
        tokens = _bm25_texts.tokenized("documents", documents, self.parameters_["tokenizer"])
        terms, lengths, fresh = _bm25_texts.numbered_on(tokens, self.vocabulary_)
        self.vocabulary_.update(fresh)
        self._state[1].append((terms, lengths))
        self.n_documents_ += len(tokens)
        return self

    def search(self, queries: Texts, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
        """The best `k` documents for each query: float32 scores and int64 ids, both (n_queries, k), best first.

        Equal scores are ordered by id, smallest first. Only documents that share a term with the query are returned:
        with fewer than k of them, the rest of the row has id -1 and score 0. A query without known terms, or an empty
        one, gets such a row. `queries` is a list, each a string or a list of tokens.

        Raises TypeError for a single string or what is no text, ValueError if k is not in 1 … n_documents_ or the
        index is not fitted.
        """
        self._require_fitted()
        terms, starts = _bm25_texts.known("queries", queries, self.parameters_["tokenizer"], self.vocabulary_)
        k = whole("k", k, 1)
        if k > self.n_documents_:
            raise ValueError(f"k must be at most {self.n_documents_}, the number of documents, got {k}")
        columns = self._columns()
        scores, ids = self._rank(columns, terms, starts, k)
        if columns.absent.any():
            # A constant per query: it is added last, so that rounding it in cannot change the ranking.
            constant = [columns.absent[own[own >= 0]].sum() for own in np.split(terms, starts[1:-1])]
            scores = np.where(ids >= 0, scores + np.array(constant, np.float32).reshape(-1, 1), np.float32(0))
        return scores, ids

    def scores(self, query: str | Sequence[str]) -> np.ndarray:
        """The score of every document, float64 (n_documents_,), for one query: a string or a list of tokens.

        Documents without any of its terms have score 0, or for "bm25+" what rank_bm25 gives them.
        """
        self._require_fitted()
        terms, _ = _bm25_texts.known("query", [query], self.parameters_["tokenizer"], self.vocabulary_)
        terms = terms[terms >= 0]
        columns = self._columns()
        counts = columns.counts
        scores = np.full(self.n_documents_, columns.absent[terms].sum())
        for term in terms:
            postings = slice(counts.indptr[term], counts.indptr[term + 1])
            scores[counts.indices[postings]] += columns.impacts[postings]
        return scores

    @property
    def average_length_(self) -> float:
        """Tokens of a document, on average."""
        return self._columns().average_length

    @property
    def indptr_(self) -> np.ndarray:
        """Where each term's postings begin, int64 (n_terms + 1,)."""
        return self._columns().counts.indptr

    @property
    def indices_(self) -> np.ndarray:
        """The document of each posting, int32 (n_postings,)."""
        return self._columns().counts.indices

    @property
    def tf_(self) -> np.ndarray:
        """How often the term occurs there, int32 (n_postings,)."""
        return self._columns().counts.tf

    @property
    def impacts_(self) -> np.ndarray:
        """What each posting adds to its document's score, float32 (n_postings,)."""
        return self._columns().impacts

    @property
    def absent_(self) -> np.ndarray:
        """What a document without the term scores, float64 (n_terms,)."""
        return self._columns().absent

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Save the index in `folder` (safetensors and JSON), in place of an index there: whole, or not at all.

        A tokenizer of one's own is code and is not saved; give it to `load` again. Raises ValueError if not fitted, or
        if the folder has an index.json that is not of a BM25 index.
        """
        self._require_fitted()
        _bm25_file.write(folder, self.parameters_, self.vocabulary_, self._columns().counts)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, tokenizer: Tokenize | None = None) -> Self:
        """The index saved in `folder`. `tokenizer` is needed if it was saved with one that is not a `Tokenizer`.

        Raises ValueError if there is none or a file is damaged; files are left as they are.
        """
        parameters, vocabulary, counts = _bm25_file.read(folder, tokenizer)
        index = cls(**parameters)
        index._adopt(vocabulary, counts)
        return index

    # The two steps that take the time; `bm25_numba` has its own.

    def _postings(self, terms: np.ndarray, lengths: np.ndarray, n_terms: int) -> tuple[np.ndarray, ...]:
        """Term ids of documents in a row → indptr int64 (n_terms + 1,), document ids and tf int32 (n_postings,)."""
        n = len(lengths)
        document = np.repeat(np.arange(n), lengths)
        pairs, tf = np.unique(terms * n + document, return_counts=True)  # sorted by term, then by document
        indptr = np.searchsorted(pairs, np.arange(n_terms + 1) * n)
        return indptr, (pairs % max(n, 1)).astype(np.int32), tf.astype(np.int32)

    def _rank(self, columns: Columns, terms: np.ndarray, starts: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Term ids of all queries in a row (-1: unknown), query j's at starts[j] … starts[j+1] → scores and ids."""
        n_queries = len(starts) - 1
        best_scores = np.zeros((n_queries, k), np.float32)
        best_ids = np.full((n_queries, k), -1, np.int64)
        indptr, indices, n = columns.counts.indptr, columns.counts.indices, len(columns.counts.lengths)
        for query in range(n_queries):
            scores = np.zeros(n, np.float32)
            matched = None if columns.positive else np.zeros(n, np.bool_)
            for term in terms[starts[query] : starts[query + 1]]:
                if term >= 0:
                    postings = slice(indptr[term], indptr[term + 1])
                    documents = indices[postings]
                    scores[documents] += columns.impacts[postings]  # a document occurs once in a term's postings
                    if matched is not None:
                        matched[documents] = True
            hits = np.flatnonzero(scores if matched is None else matched)
            if len(hits) > k:  # keep those not below the k-th best, ties included, before sorting
                found = scores[hits]
                hits = hits[found >= np.partition(found, len(hits) - k)[len(hits) - k]]
            top = hits[np.argsort(-scores[hits], kind="stable")][:k]  # stable: equal scores stay in order of id
            best_ids[query, : len(top)] = top
            best_scores[query, : len(top)] = scores[top]
        return best_scores, best_ids

    def _adopt(self, vocabulary: dict[str, int], counts: Counts) -> None:
        """Take these, and the parameters as they are now, as the fitted index: all fitted attributes are set here."""
        parameters = {
            "variant": self.variant,
            "k1": float(self.k1),
            "b": float(self.b),
            "delta": None if self.delta is None else float(self.delta),
            "tokenizer": self.tokenizer,
        }
        columns = self._weighed(counts, parameters)
        self.parameters_, self.vocabulary_, self.n_documents_ = parameters, vocabulary, len(counts.lengths)
        # What was counted and weighed, and what was added since: term ids and lengths of documents.
        self._state: tuple[Columns, list[tuple[np.ndarray, np.ndarray]]] = columns, []

    def _columns(self) -> Columns:
        """What a search reads, with all that was added.

        The first threads that ask after an `add` may all compute it, each the same; the state is replaced at once.
        """
        self._require_fitted()
        columns, added = self._state
        if added:
            terms, lengths = (np.concatenate(parts) for parts in zip(*added, strict=True))
            new = Counts(lengths, *self._postings(terms, lengths, len(self.vocabulary_)))
            columns = self._weighed(columns.counts.followed_by(new), self.parameters_)
            self._state = columns, []
        return columns

    def _weighed(self, counts: Counts, parameters: Mapping[str, Any]) -> Columns:
        return weigh(counts, parameters)

    def _require_fitted(self) -> None:
        if not hasattr(self, "_state"):
            raise ValueError("this BM25 index holds no documents yet: call fit(documents) first")
