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
    impacts_  (n_postings)    what each adds to its document's score

The variants differ in two factors (N documents, df of them with the term):

    variant        idf                              factor of tf
    lucene         ln(1 + (N−df+½)/(df+½))          tf/(tf+K)                  Lucene ≥ 8; never negative
    robertson      max(0, ln((N−df+½)/(df+½)))      tf/(tf+K)                  the original, floored as bm25s does
    atire          ln(N/df)                         (k1+1)·tf/(tf+K)
    okapi          ln((N−df+½)/(df+½))              (k1+1)·tf/(tf+K)           as rank_bm25.BM25Okapi, see below
    bm25+          ln((N+1)/df)                     (k1+1)·tf/(tf+K) + δ       as rank_bm25.BM25Plus, see below
    bm25l          ln((N+1)/(df+½))                 tf·(k1+1)·(c+δ)/(k1+c+δ)   c = tf/(K/k1), as rank_bm25.BM25L
    paper-bm25+    ln((N+1)/df)                     (k1+1)·tf/(tf+K) + δ       only where tf > 0 (Lv & Zhai)
    paper-bm25l    ln((N+1)/(df+½))                 (k1+1)·(c+δ)/(k1+c+δ)      only where tf > 0 (Lv & Zhai)

Where the libraries and the papers part:
- okapi: a term in more than half of the documents has a negative idf; rank_bm25
  gives it ¼ of the mean idf over all terms instead (which may be negative too,
  in a tiny corpus). A term in exactly half of them scores 0.
- bm25+: the paper adds δ·idf to documents that *have* the term. rank_bm25 and
  bm25s add it to all documents, a constant per query that changes no ranking.
- bm25l: rank_bm25 multiplies by tf once more, which undoes the saturation;
  bm25s does not, but gives documents without the term the value at c = 0.

What counts as a hit: a document that shares at least one term with the query,
even if its score is 0 or negative. The others are not returned.

Cost:
    fit: one dictionary look-up per token and a sort of the (term, document) pairs.
    search: the postings of the query's terms, plus one pass over N scores.

Memory:
    8 bytes per posting, 4 per document while searching, and the vocabulary.

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

import json
import math
import operator
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, count, repeat
from typing import Any, Self

import numpy as np

from mlsys.retrieval import _index_file
from mlsys.retrieval.tokenize import Tokenizer

Texts = Sequence[str | Sequence[str]]  # each a string, or a list of tokens

FORMAT = "mlsys.bm25/1"  # of a saved index, which holds these settings and arrays:
SETTINGS = ("variant", "k1", "b", "delta", "tokenizer", "n_documents", "average_length")
ARRAYS = {
    "vocabulary": np.uint8,  # UTF-8 of a JSON list: the words, by term id
    "indptr": np.int64,
    "indices": np.int32,
    "impacts": np.float32,
    "absent": np.float64,
}


@dataclass(frozen=True)
class Variant:
    """One way to weigh a term.

    idf:    (N, df (n_terms,)) → (n_terms,).
    tf:     (tf, length, k1, b, delta) → the factor; `length` is |d| / avg|d|; tf and length have one entry a posting.
    delta:  default of δ; None if the variant has none.
    absent: what the factor of tf is where tf = 0, as a function of delta; nonzero only for "bm25+".
    """

    idf: Callable[[int, np.ndarray], np.ndarray]
    tf: Callable[[np.ndarray, np.ndarray, float, float, float], np.ndarray]
    delta: float | None = None
    absent: Callable[[float], float] = lambda delta: 0.0


def _idf_robertson(n: int, df: np.ndarray) -> np.ndarray:
    return np.log(n - df + 0.5) - np.log(df + 0.5)


def _idf_okapi(n: int, df: np.ndarray) -> np.ndarray:
    idf = _idf_robertson(n, df)
    return np.where(idf < 0, 0.25 * idf.mean(), idf)


def _tf_lucene(tf: np.ndarray, length: np.ndarray, k1: float, b: float, delta: float) -> np.ndarray:
    return tf / (tf + k1 * (1 - b + b * length))


def _tf_okapi(tf: np.ndarray, length: np.ndarray, k1: float, b: float, delta: float) -> np.ndarray:
    return (k1 + 1) * _tf_lucene(tf, length, k1, b, delta)


def _tf_plus(tf: np.ndarray, length: np.ndarray, k1: float, b: float, delta: float) -> np.ndarray:
    return _tf_okapi(tf, length, k1, b, delta) + delta


def _tf_l(tf: np.ndarray, length: np.ndarray, k1: float, b: float, delta: float) -> np.ndarray:
    c = tf / (1 - b + b * length) + delta
    return (k1 + 1) * c / (k1 + c)


VARIANTS: Mapping[str, Variant] = {
    "lucene": Variant(lambda n, df: np.log1p((n - df + 0.5) / (df + 0.5)), _tf_lucene),
    "robertson": Variant(lambda n, df: np.maximum(_idf_robertson(n, df), 0), _tf_lucene),
    "atire": Variant(lambda n, df: np.log(n / df), _tf_okapi),
    "okapi": Variant(_idf_okapi, _tf_okapi),
    "bm25+": Variant(lambda n, df: np.log((n + 1) / df), _tf_plus, delta=1.0, absent=lambda delta: delta),
    "bm25l": Variant(lambda n, df: np.log((n + 1) / (df + 0.5)), lambda tf, *rest: tf * _tf_l(tf, *rest), delta=0.5),
    "paper-bm25+": Variant(lambda n, df: np.log((n + 1) / df), _tf_plus, delta=1.0),
    "paper-bm25l": Variant(lambda n, df: np.log((n + 1) / (df + 0.5)), _tf_l, delta=0.5),
}


class BM25:
    """An index of documents, searched by BM25.

    variant:   one of `VARIANTS`.
    k1:        saturation of the term frequency, ≥ 0 (0: only presence counts).
    b:         length normalisation, 0 (none) to 1 (full).
    delta:     δ of the bm25+ and bm25l variants; None takes the variant's own.
    tokenizer: callable str → list of str for documents and queries given as strings; None takes `Tokenizer()`.

    Setting one of these after `fit` has no effect before the next `fit`.

    Fitted: `parameters_` (the five above as they were used), `vocabulary_` (term → term id), `n_documents_`,
    `average_length_`, `indptr_`, `indices_`, `impacts_` (the postings, see the module), `absent_` (per term, what a
    document without it scores).

        >>> index = BM25().fit(["the cat sat", "the dog ran"])
        >>> scores, ids = index.search(["a dog"], k=1)
        >>> ids
        array([[1]])
    """

    parameters_: dict[str, Any]
    vocabulary_: dict[str, int]
    n_documents_: int
    average_length_: float
    indptr_: np.ndarray
    indices_: np.ndarray
    impacts_: np.ndarray
    absent_: np.ndarray

    def __init__(
        self,
        *,
        variant: str = "lucene",
        k1: float = 1.5,
        b: float = 0.75,
        delta: float | None = None,
        tokenizer: Callable[[str], Sequence[str]] | None = None,
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
        variant, k1, b, delta = self._parameters()
        tokens = _tokenized("documents", documents, self.tokenizer)
        if not tokens:
            raise ValueError("documents is empty: an index needs at least one document")
        lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
        # One C-level pass: looking a new token up in this dictionary gives it the next id.
        numbering: defaultdict[str, int] = defaultdict(count().__next__)
        flat = _look_up("documents", tokens, numbering.__getitem__, int(lengths.sum()))
        vocabulary = dict(numbering)
        _check_strings("documents", vocabulary)

        indptr, indices, tf = self._postings(flat, lengths, len(vocabulary))
        df = np.diff(indptr)
        average_length = float(lengths.mean())
        idf = variant.idf(len(tokens), df.astype(np.float64)) if len(df) else np.empty(0)
        length = lengths[indices] / (average_length or 1.0)
        absent = idf * variant.absent(delta)
        impacts = np.repeat(idf, df) * variant.tf(tf.astype(np.float64), length, k1, b, delta) - np.repeat(absent, df)
        self._adopt(vocabulary, len(tokens), average_length, indptr, indices, impacts.astype(np.float32), absent)
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
        tokens = _tokenized("queries", queries, self.parameters_["tokenizer"])
        k = _whole_number("k", k)
        if not 1 <= k <= self.n_documents_:
            raise ValueError(f"k must be between 1 and {self.n_documents_}, the number of documents, got {k}")
        terms, starts = self._encode(tokens)
        scores, ids = self._rank(terms, starts, k)
        if self.absent_.any():
            # A constant per query: it is added last, so that rounding it in cannot change the ranking.
            constant = [self.absent_[own[own >= 0]].sum() for own in np.split(terms, starts[1:-1])]
            scores = np.where(ids >= 0, scores + np.array(constant, np.float32).reshape(-1, 1), np.float32(0))
        return scores, ids

    def scores(self, query: str | Sequence[str]) -> np.ndarray:
        """The score of every document, float64 (n_documents_,), for one query: a string or a list of tokens.

        Documents without any of its terms have score 0, or for "bm25+" what rank_bm25 gives them.
        """
        self._require_fitted()
        terms, _ = self._encode(_tokenized("query", [query], self.parameters_["tokenizer"]))
        terms = terms[terms >= 0]
        scores = np.full(self.n_documents_, self.absent_[terms].sum())
        for term in terms:
            postings = slice(self.indptr_[term], self.indptr_[term + 1])
            scores[self.indices_[postings]] += self.impacts_[postings]
        return scores

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Save the index in `folder` (safetensors and JSON), in place of an index there: whole, or not at all.

        A tokenizer of one's own is code and is not saved; give it to `load` again. Raises ValueError if not fitted, or
        if the folder has an index.json that is not of a BM25 index.
        """
        self._require_fitted()
        tokenizer = self.parameters_["tokenizer"]
        known = tokenizer is None or isinstance(tokenizer, Tokenizer)
        settings = {
            **self.parameters_,
            "tokenizer": _tokenizer_settings(tokenizer) if known else "custom",
            "n_documents": self.n_documents_,
            "average_length": self.average_length_,
        }
        words = np.frombuffer(json.dumps(list(self.vocabulary_)).encode(), np.uint8)
        arrays = {name: getattr(self, f"{name}_") for name in ("indptr", "indices", "impacts", "absent")}
        _index_file.write(folder, FORMAT, settings, {"vocabulary": words, **arrays})

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, tokenizer: Callable[[str], Sequence[str]] | None = None) -> Self:
        """The index saved in `folder`. `tokenizer` is needed if it was saved with one that is not a `Tokenizer`.

        Raises ValueError if there is none or a file is damaged; files are left as they are.
        """
        settings, arrays = _index_file.read(folder, FORMAT)
        problem = _problem(settings, arrays)
        if problem:
            raise _index_file.IndexFileError(f"the index in {folder} cannot be used: {problem}; save it again")
        if settings["tokenizer"] == "custom" and tokenizer is None:
            raise ValueError(f"the index in {folder} was made with a tokenizer of one's own: give it as tokenizer=…")
        try:
            if tokenizer is None:
                tokenizer = _tokenizer_from(settings["tokenizer"])
            index = cls(**{name: settings[name] for name in ("variant", "k1", "b", "delta")}, tokenizer=tokenizer)
            index._parameters()
        except (TypeError, ValueError) as error:
            raise _index_file.IndexFileError(f"the index in {folder} cannot be used: {error}; save it again") from None
        vocabulary = {word: term for term, word in enumerate(json.loads(arrays["vocabulary"].tobytes()))}
        index._adopt(
            vocabulary, settings["n_documents"], settings["average_length"], arrays["indptr"], arrays["indices"],
            arrays["impacts"], arrays["absent"],
        )  # fmt: skip
        return index

    # The two steps that take the time; `bm25_numba` has its own.

    def _postings(self, terms: np.ndarray, lengths: np.ndarray, n_terms: int) -> tuple[np.ndarray, ...]:
        """Term ids of all documents in a row → indptr (n_terms + 1,), document ids and tf (both n_postings,)."""
        n = len(lengths)
        document = np.repeat(np.arange(n), lengths)
        pairs, tf = np.unique(terms * n + document, return_counts=True)  # sorted by term, then by document
        indptr = np.searchsorted(pairs, np.arange(n_terms + 1) * n)
        return indptr, (pairs % n).astype(np.int32), tf

    def _rank(self, terms: np.ndarray, starts: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Term ids of all queries in a row (-1: unknown), query j's at starts[j] … starts[j+1] → scores and ids."""
        n_queries = len(starts) - 1
        best_scores = np.zeros((n_queries, k), np.float32)
        best_ids = np.full((n_queries, k), -1, np.int64)
        for query in range(n_queries):
            scores = np.zeros(self.n_documents_, np.float32)
            matched = None if self._positive else np.zeros(self.n_documents_, np.bool_)
            for term in terms[starts[query] : starts[query + 1]]:
                if term >= 0:
                    postings = slice(self.indptr_[term], self.indptr_[term + 1])
                    documents = self.indices_[postings]
                    scores[documents] += self.impacts_[postings]  # a document occurs once in a term's postings
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
        """Take these, and the parameters as they are now, as the fitted index: all fitted attributes are set here."""
        self.parameters_ = {
            "variant": self.variant,
            "k1": float(self.k1),
            "b": float(self.b),
            "delta": None if self.delta is None else float(self.delta),
            "tokenizer": self.tokenizer,
        }
        self.vocabulary_, self.n_documents_, self.average_length_ = vocabulary, n_documents, average_length
        self.indptr_, self.indices_, self.impacts_, self.absent_ = indptr, indices, impacts, absent
        # If every impact is positive, a score of 0 says that nothing matched. Okapi's need not be.
        self._positive = bool((impacts > 0).all())

    # The public door

    def _parameters(self) -> tuple[Variant, float, float, float]:
        if not isinstance(self.variant, str) or self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}; got {self.variant!r}")
        variant = VARIANTS[self.variant]
        k1, b = _number("k1", self.k1), _number("b", self.b)
        if not 0 <= k1 < math.inf:
            raise ValueError(f"k1 must be at least 0 and finite (1.2 to 2 is usual), got {k1}")
        if not 0 <= b <= 1:
            raise ValueError(f"b must be between 0 and 1 (0.75 is usual), got {b}")
        if self.delta is None:
            return variant, k1, b, variant.delta or 0.0
        if variant.delta is None:
            raise ValueError(f"delta has no meaning for variant {self.variant!r}; leave it None, got {self.delta!r}")
        delta = _number("delta", self.delta)
        if not 0 <= delta < math.inf:
            raise ValueError(f"delta must be at least 0 and finite, got {delta}")
        return variant, k1, b, delta

    def _require_fitted(self) -> None:
        if not hasattr(self, "indptr_"):
            raise ValueError("this BM25 index holds no documents yet: call fit(documents) first")

    def _encode(self, queries: list[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
        """Queries → term ids in a row (-1: not in the vocabulary), and where each query starts (n_queries + 1,)."""
        starts = np.zeros(len(queries) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, queries), np.int64, len(queries)), out=starts[1:])
        terms = _look_up("queries", queries, self.vocabulary_.get, int(starts[-1]), repeat(-1))
        if (terms < 0).any():  # a token that is known is a string
            _check_strings("queries", chain.from_iterable(queries))
        return terms, starts


def _tokenized(argument: str, texts: Texts, tokenizer: Callable[[str], Sequence[str]] | None) -> list[Sequence[str]]:
    """Each text as a list of tokens."""
    if isinstance(texts, str | bytes):
        raise TypeError(f"{argument} must be a list of texts, got the single string {texts!r:.60}: use [{texts!r:.60}]")
    found: list[Sequence[str]] = []
    for position, text in enumerate(texts):
        if isinstance(text, list | tuple):
            found.append(text)
        elif isinstance(text, str):
            tokenizer = tokenizer or Tokenizer()
            found.append(tokenizer(text))
        else:
            raise TypeError(f"{argument}[{position}] must be a string or a list of tokens, got {type(text).__name__}")
    return found


def _look_up(
    argument: str, texts: Sequence[Sequence[str]], number: Callable[..., int], total: int, *default: repeat[int]
) -> np.ndarray:
    """Every token of every text through `number`, in a row: (total,) term ids. No Python code runs per token."""
    try:
        return np.fromiter(map(number, chain.from_iterable(texts), *default), np.int64, total)
    except TypeError:  # a list inside a list of tokens cannot be looked up
        _check_strings(argument, chain.from_iterable(texts))
        raise


def _check_strings(argument: str, tokens: Iterable[object]) -> None:
    for token in tokens:
        if not isinstance(token, str):
            raise TypeError(f"{argument}: tokens must be strings, got {token!r:.60} ({type(token).__name__})")


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def _whole_number(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None


def _tokenizer_settings(tokenizer: Callable[[str], Sequence[str]] | None) -> dict[str, Any]:
    """A `Tokenizer`'s options as JSON can hold them."""
    assert tokenizer is None or isinstance(tokenizer, Tokenizer)
    options = asdict(tokenizer or Tokenizer())
    if isinstance(options["stopwords"], frozenset):
        options["stopwords"] = sorted(options["stopwords"])
    return options


def _tokenizer_from(options: dict[str, Any]) -> Tokenizer:
    words = options["stopwords"]
    return Tokenizer(**{**options, "stopwords": frozenset(words) if isinstance(words, list) else words})


def _problem(settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str | None:
    """What is wrong with a saved index, or None. Compiled code must never see ids or offsets that lead nowhere."""
    lacking = [name for name in SETTINGS if name not in settings] + [name for name in ARRAYS if name not in arrays]
    if lacking:
        return f"it lacks {', '.join(lacking)}"
    for name, dtype in ARRAYS.items():
        if arrays[name].ndim != 1 or arrays[name].dtype != dtype:
            return f"{name} is {arrays[name].ndim}-D {arrays[name].dtype}, expected 1-D {np.dtype(dtype)}"
    n, average = settings["n_documents"], settings["average_length"]
    if type(n) is not int or n < 1 or not isinstance(average, float) or not 0 <= average < math.inf:
        return f"n_documents {n!r} and average_length {average!r} are not those of a corpus"
    options = settings["tokenizer"]
    if options != "custom" and not (isinstance(options, dict) and options.keys() == asdict(Tokenizer()).keys()):
        return f"{options!r:.60} are not the options of a Tokenizer"
    try:
        words = json.loads(arrays["vocabulary"].tobytes())
    except (ValueError, RecursionError):
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words) or len(set(words)) < len(words):
        return "its vocabulary is no list of distinct words"
    indptr, indices, impacts, absent = (arrays[name] for name in ("indptr", "indices", "impacts", "absent"))
    if (
        not len(indptr) - 1 == len(absent) == len(words)
        or not len(impacts) == len(indices) == indptr[-1]
        or (np.diff(indptr, prepend=0) < 0).any()
        or (len(indices) and not 0 <= indices.min() <= indices.max() < n)
    ):
        return "its arrays do not fit together"
    if not (np.isfinite(impacts).all() and np.isfinite(absent).all()):
        return "impacts or absent hold NaN or infinity"
    return None
