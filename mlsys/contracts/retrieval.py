"""What BM25 must compute: the right scores, the right documents, in the right order.

The implementation is anything that is called as `make(variant=…, k1=…, b=…)`
and gives an object with `fit(documents)` and `search(queries, k)`; documents and
queries are lists of lists of tokens, and the result is `(scores, ids)`, both
(n_queries, k), best first:

- a hit is a document that shares a term with the query, whatever its score;
- with fewer than k hits the row is filled with id -1 and score 0;
- equal scores are ordered by id, smallest first;
- a term that the query repeats counts each time;
- tokens are taken as they come, in documents and queries: "The", "the", "bus" and "buses" are four terms;
- `fit` replaces what an earlier `fit` built, an index can be searched again and
  again, and indexes share nothing;
- an object that has `add(documents)` too is then as if `fit` had been given all; the lists that it is given stay as
  they are.

The variants asked for are "lucene" and "okapi" (as in rank_bm25); their formulas
are in `mlsys.retrieval.bm25`. Which of two documents comes first is not judged
where their scores differ by less than rounding, unless the documents are the same.

Cost:
    Corpora of 32 to 60 documents, and one of 320, scored by two plain loops: milliseconds a case.

Papers:
    Those of `mlsys.retrieval.bm25`.

See also:
    `mlsys.contracts.core`, `mlsys.retrieval.bm25`.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np

from mlsys.contracts import (
    _retrieval_exact,
    _retrieval_fusion,
    _retrieval_hnsw,
    _retrieval_ivf,
    _retrieval_late_interaction,
    _retrieval_metrics,
    _retrieval_pq,
)
from mlsys.contracts.core import Case, Contract, Inputs, Mismatch, Results, Wrong
from mlsys.retrieval import (
    bm25,
    bm25_numba,
    exact,
    exact_numba,
    fusion,
    hnsw,
    hnsw_numba,
    ivf,
    ivf_numba,
    ivfpq,
    ivfpq_numba,
    late_interaction,
    late_interaction_numba,
    metrics,
    pq,
    pq_numba,
)

Tokens = list[str]


@dataclass
class Plain:
    """BM25 in float64 by two loops, from the formulas: the oracle. Each further option is one place to go wrong."""

    variant: str
    k1: float
    b: float
    log: Callable[[float], float] = math.log
    one_plus: bool = True  # lucene: ln(1 + …)
    floor: float = 0.25  # okapi: a negative idf becomes this times the mean idf
    keep_negative: bool = False  # okapi: … or stays negative
    count_tokens: bool = False  # df counts tokens, not documents
    distinct_length: bool = False  # |d| counts distinct terms
    count: Callable[[int], int] = lambda tf: tf  # how an occurrence count is kept
    ratio: Callable[[float, float], float] = lambda length, average: length / average
    swap_b: bool = False
    ignore_b: bool = False
    saturate: bool = True
    numerator: bool | None = None  # factor k1 + 1; None: as the variant has it
    query_as_set: bool = False
    everything_hits: bool = False
    only_positive: bool = False
    order: Callable[[float, int], tuple[float, int]] = lambda score, document: (-score, document)
    id_type: type[np.integer] = np.int64
    taken: Callable[[str], str] = lambda token: token  # what a token is taken for; "" is dropped

    def fit(self, documents: list[Tokens]) -> Plain:
        """Count what the formulas need."""
        self.documents = documents
        documents = [self._tokens(document) for document in documents]
        self.counts = [Counter(document) for document in documents]
        self.lengths = [len(set(document)) if self.distinct_length else len(document) for document in documents]
        self.average = sum(self.lengths) / len(documents)
        n, df = len(documents), Counter[str]()
        for document in documents:
            df.update(document if self.count_tokens else set(document))
        self.idf = {term: self._idf(n, df[term]) for term in df}
        if self.variant == "okapi" and not self.keep_negative:
            low = self.floor * sum(self.idf.values()) / len(self.idf)
            self.idf = {term: low if idf < 0 else idf for term, idf in self.idf.items()}
        return self

    def add(self, documents: list[Tokens]) -> Plain:
        """Count all documents again."""
        return self.fit([*self.documents, *documents])

    def _tokens(self, words: Tokens) -> Tokens:
        return [token for token in map(self.taken, words) if token]

    def _idf(self, n: int, df: int) -> float:
        odds = (n - df + 0.5) / (df + 0.5)
        return self.log(1 + odds if self.variant == "lucene" and self.one_plus else odds)

    def score(self, query: Tokens, document: int) -> float:
        """The score of one document for one query."""
        total = 0.0
        for term in dict.fromkeys(query) if self.query_as_set else query:
            tf = self.count(self.counts[document][term])
            if tf:
                b = 0.0 if self.ignore_b else 1 - self.b if self.swap_b else self.b
                norm = self.k1 * (1 - b + b * self.ratio(self.lengths[document], self.average))
                weight = tf / (tf + norm) if self.saturate else float(tf)
                if self.variant == "okapi" if self.numerator is None else self.numerator:
                    weight *= self.k1 + 1
                total += self.idf[term] * weight
        return total

    def search(self, queries: list[Tokens], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Score everything, sort everything, cut."""
        scores, ids = np.zeros((len(queries), k)), np.full((len(queries), k), -1, np.int64)
        for row, query in enumerate(map(self._tokens, queries)):
            found = [(self.score(query, document), document) for document in self.hits(query)]
            found = [(score, document) for score, document in found if score > 0 or not self.only_positive]
            for rank, (score, document) in enumerate(sorted(found, key=lambda hit: self.order(*hit))[:k]):
                scores[row, rank], ids[row, rank] = score, document
        return scores, ids.astype(self.id_type)

    def hits(self, query: Tokens) -> list[int]:
        """The documents that share a term with the query, in order of id."""
        shared = [not count.keys().isdisjoint(query) for count in self.counts]
        return [document for document, hit in enumerate(shared) if hit or self.everything_hits]


class Appending(Plain):
    """Wrong: a second `fit` adds to what the first one built."""

    def fit(self, documents: list[Tokens]) -> Plain:
        """Count all documents that this index was ever given."""
        self.seen = [*getattr(self, "seen", []), *documents]
        return super().fit(self.seen)


class Stale(Plain):
    """Wrong: what depends on all documents stays as `fit` left it."""

    def add(self, documents: list[Tokens]) -> Plain:
        """Count the new documents; weigh only their new terms."""
        idf, average = self.idf, self.average
        super().add(documents)
        self.idf, self.average = {**self.idf, **idf}, average
        return self


class Replacing(Plain):
    """Wrong: `add` forgets what was there."""

    def add(self, documents: list[Tokens]) -> Plain:
        """Fit."""
        return self.fit(documents)


class Repeating(Plain):
    """Wrong: every search after the first gives the answer of the first."""

    def search(self, queries: list[Tokens], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Search once."""
        if not hasattr(self, "answer"):
            self.answer = super().search(queries, k)
        return self.answer


class Sharing(Plain):
    """Wrong: what `fit` counts is kept in the class, so that all indexes are the one fitted last."""

    latest: ClassVar[dict[str, Any]] = {}

    def fit(self, documents: list[Tokens]) -> Plain:
        """Fit for all."""
        super().fit(documents)
        type(self).latest = dict(vars(self))
        return self

    def search(self, queries: list[Tokens], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Search what was fitted last."""
        vars(self).update(self.latest)
        return super().search(queries, k)


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Token lists of the kind that the case names; `others` are documents for what else the case does."""
    documents, queries = CORPORA[case["corpus"]](random.Random(seed))
    settings = {name: case[name] for name in ("k", "variant", "k1", "b")}
    drawn = {"documents": documents, "queries": queries, **settings}
    if "use" in case:
        others = [_words(random.Random(-1 - seed), 9) for _ in range(25)]
        drawn |= {"use": case["use"], "others": others}
    return drawn


def _words(rng: random.Random, n: int, vocabulary: int = 30) -> Tokens:
    """`n` words of which the first are common and the last are rare."""
    return [f"w{int(vocabulary * rng.random() ** 2)}" for _ in range(n)]


def _random(rng: random.Random) -> tuple[list[Tokens], list[Tokens]]:
    documents = [_words(rng, rng.randint(3, 20)) for _ in range(40)]
    return documents, [["w0", *dict.fromkeys(f"w{rng.randint(3, 20)}" for _ in range(2))] for _ in range(6)]


def _repeated(rng: random.Random) -> tuple[list[Tokens], list[Tokens]]:
    documents, queries = _random(rng)
    return documents, [[*query, query[-1], query[-1]] for query in queries]


def _few_hits(rng: random.Random) -> tuple[list[Tokens], list[Tokens]]:
    documents, _ = _random(rng)
    documents[4] += ["rare"]
    documents[7] += ["rare", "seldom"]
    return documents, [["rare"], ["seldom", "unheard"], ["unheard"], [], ["w0", "unheard"]]


def _empty(rng: random.Random) -> tuple[list[Tokens], list[Tokens]]:
    documents, queries = _random(rng)
    for document in (0, 5, 6, 39):
        documents[document] = []
    return documents, queries


def _duplicates(rng: random.Random) -> tuple[list[Tokens], list[Tokens]]:
    documents, queries = _random(rng)
    copies = [list(document) for document in documents[:20]]
    rng.shuffle(copies)
    return documents + copies, queries


def _common(rng: random.Random) -> tuple[list[Tokens], list[Tokens]]:
    """Words in more than half of the documents (idf < 0 without a floor), one in exactly half (idf = 0 in okapi)."""
    documents = [["most", *_words(rng, rng.randint(2, 12))] for _ in range(30)] + [["few", "many"] for _ in range(2)]
    for document in documents[:16]:
        document += ["half"]
    for document in documents[4:29]:
        document += ["many"]
    return documents, [["most"], ["many", "half"], ["half"], ["most", "w20"], ["many", "few"]]


def _many(rng: random.Random) -> tuple[list[Tokens], list[Tokens]]:
    """More documents than a byte can number, more words than a small hash can tell apart, more of one than 255."""
    vocabulary = [f"w{rng.getrandbits(32):x}" for _ in range(4000)]
    documents = [rng.choices(vocabulary, k=10) for _ in range(320)]
    for position, count in ((20, 20), (150, 1), (310, 300)):
        documents[position] += count * ["often"]
    queries = [[*rng.choices(vocabulary, k=8), *document[:2]] for document in documents[::32]]
    return documents, [["often"], *queries]


def _written(rng: random.Random) -> tuple[list[Tokens], list[Tokens]]:
    """Words that a tokenizer might have made one, or left out."""
    documents, queries = _random(rng)
    for word in ("The", "the", "a", "of", "bus", "buses", "cat", "cats"):
        for document in rng.sample(range(40), 9):
            documents[document] += [word]
    return documents, [["The", "the"], ["bus"], ["buses", "w3"], ["cat"], ["cats", "bus"], ["a", "of"], queries[0]]


CORPORA = {
    "random words": _random,
    "repeated query words": _repeated,
    "few hits, unknown words": _few_hits,
    "empty documents": _empty,
    "duplicates": _duplicates,
    "common words": _common,
    "many documents and words": _many,
    "words as they are written": _written,
}

CASES = [
    {"corpus": "random words", "k": 5, "variant": "lucene", "k1": 1.5, "b": 0.75},
    {"corpus": "repeated query words", "k": 5, "variant": "lucene", "k1": 1.5, "b": 0.75},
    {"corpus": "few hits, unknown words", "k": 10, "variant": "lucene", "k1": 1.5, "b": 0.75},
    {"corpus": "duplicates", "k": 7, "variant": "lucene", "k1": 1.5, "b": 0.75},
    {"corpus": "empty documents", "k": 10, "variant": "lucene", "k1": 1.5, "b": 0.75},
    {"corpus": "common words", "k": 10, "variant": "lucene", "k1": 1.5, "b": 0.75},
    {"corpus": "random words", "k": 1, "variant": "lucene", "k1": 0.9, "b": 0.4},
    {"corpus": "random words", "k": 40, "variant": "lucene", "k1": 0.0, "b": 1.0},
    {"corpus": "random words", "k": 10, "variant": "lucene", "k1": 3.0, "b": 0.0},
    {"corpus": "random words", "k": 5, "variant": "okapi", "k1": 1.5, "b": 0.75},
    {"corpus": "common words", "k": 32, "variant": "okapi", "k1": 1.5, "b": 0.75},
    {"corpus": "repeated query words", "k": 10, "variant": "okapi", "k1": 1.2, "b": 0.5},
    {"corpus": "duplicates", "k": 60, "variant": "okapi", "k1": 0.9, "b": 0.4},
    {"corpus": "empty documents", "k": 10, "variant": "okapi", "k1": 2.0, "b": 0.9},
    {"corpus": "random words", "k": 5, "variant": "lucene", "k1": 1.5, "b": 0.75, "use": "search again"},
    {"corpus": "random words", "k": 5, "variant": "lucene", "k1": 1.5, "b": 0.75, "use": "fit again"},
    {"corpus": "random words", "k": 5, "variant": "lucene", "k1": 1.5, "b": 0.75, "use": "two indexes"},
    {"corpus": "many documents and words", "k": 10, "variant": "lucene", "k1": 1.5, "b": 0.75},
    {"corpus": "random words", "k": 5, "variant": "lucene", "k1": 1.5, "b": 0.75, "use": "add"},
    {"corpus": "few hits, unknown words", "k": 5, "variant": "okapi", "k1": 1.5, "b": 0.75, "use": "add"},
    {"corpus": "words as they are written", "k": 10, "variant": "lucene", "k1": 1.5, "b": 0.75},
]


def call(make: Callable[..., Any], inputs: Inputs) -> Results:
    """Fit, search, and see that the result is two rectangles; before that, whatever else the case does."""
    index = make(variant=inputs["variant"], k1=inputs["k1"], b=inputs["b"])
    use, queries, k = inputs.get("use"), inputs["queries"], inputs["k"]
    parts: list[list[Tokens]] = []
    if use == "fit again":
        index.fit(inputs["others"])
        index.search(queries, k)
    if use == "two indexes":
        other = make(variant=inputs["variant"], k1=inputs["k1"] + 1, b=1 - inputs["b"])
        index.fit(inputs["documents"])
        other.fit(inputs["others"])
        other.search(queries, k)
    elif use == "add" and hasattr(index, "add"):
        parts = [inputs["documents"][part] for part in (slice(0, 20), slice(20, 21), slice(21, None))]
        index.fit(parts[0])
        index.search(queries, k)
        for part in parts[1:]:
            index.add(part)
    else:
        index.fit(inputs["documents"])
    if use == "search again":
        index.search(queries[::-1], k)
        index.search(queries[:1], 1)
    answer = index.search(queries, k)
    if list(map(len, parts)) not in ([], [20, 1, len(inputs["documents"]) - 21]):
        raise Mismatch("`add` changed a list of documents that the index was given: it is the caller's, so copy it")
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise Mismatch(f"search returned a {type(answer).__name__}, expected the tuple (scores, ids)")
    scores, ids = (_rectangle(name, part) for name, part in zip(("scores", "ids"), answer, strict=True))
    if ids.dtype.kind not in "iu":
        raise Mismatch(f"search returned ids of dtype {ids.dtype}, expected integers; the order is (scores, ids)")
    return {"scores": scores, "ids": ids}


def _rectangle(name: str, rows: Any) -> np.ndarray:
    try:
        return np.asarray(rows)
    except ValueError:
        raise Mismatch(f"rows of {name} differ in length: fill up with id -1 and score 0 after the last hit") from None


def oracle(inputs: Inputs) -> dict[str, np.ndarray]:
    """Scores and ids from `Plain`."""
    scores, ids = _plain(inputs).search(inputs["queries"], inputs["k"])
    return {"scores": scores, "ids": ids}


def _plain(inputs: Inputs) -> Plain:
    return Plain(inputs["variant"], inputs["k1"], inputs["b"]).fit(inputs["documents"])


def tolerance(inputs: Inputs, name: str, want: np.ndarray) -> float:
    """Float32 sums of a few impacts for scores; ids are exact up to near ties (see `compare_ids`)."""
    return 0.0 if name == "ids" else 1e-5 * max(1.0, float(np.abs(want).max(initial=0.0)))


def compare_ids(inputs: Inputs, got: np.ndarray, want: np.ndarray, limit: float) -> str | None:
    """What is wrong with the ids: each must stand where its score belongs; equal documents stand in order of id."""
    if got.shape != want.shape:
        return f"shape {got.shape}, expected {want.shape}"
    plain = _plain(inputs)
    limit = tolerance(inputs, "scores", oracle(inputs)["scores"])
    for row, query in enumerate(inputs["queries"]):
        hits = plain.hits(query)
        found = [int(document) for document in got[row] if document != -1]
        for rank, (mine, right) in enumerate(zip(got[row].tolist(), want[row].tolist(), strict=True)):
            at = f"query {row} {query}, rank {rank}: id {mine}, expected {right}"
            if (mine == -1) != (right == -1):
                return f"{at} ({len(hits)} documents share a term with the query)"
            if mine == -1:
                continue
            if mine not in hits:
                return f"{at}; document {mine} shares no term with the query"
            if found.count(mine) > 1:
                return f"{at}; document {mine} is returned {found.count(mine)} times"
            if abs(plain.score(query, mine) - plain.score(query, right)) > limit:
                return f"{at}, whose score is {plain.score(query, right):.6g} against {plain.score(query, mine):.6g}"
            for twin in hits[: hits.index(mine)]:
                if plain.counts[twin] == plain.counts[mine] and twin not in found[:rank]:
                    return f"{at}; document {twin} is the same and has the smaller id, so it comes first"
    return None


WRONG = {
    "idf_without_one": Wrong(partial(Plain, one_plus=False), "lucene's idf is ln(1 + (N−df+½)/(df+½)): add the 1"),
    "log2": Wrong(partial(Plain, log=math.log2), "idf takes the natural logarithm, not the one to base 2"),
    "log10": Wrong(partial(Plain, log=math.log10), "idf takes the natural logarithm, not the one to base 10"),
    "collection_frequency": Wrong(
        partial(Plain, count_tokens=True), "df is the number of documents with the term, not how often it occurs"
    ),
    "inverted_length": Wrong(
        partial(Plain, ratio=lambda length, average: average / max(length, 1)),
        "the length factor is |d|/avg|d|, not its inverse",
    ),
    "b_ignored": Wrong(partial(Plain, ignore_b=True), "normalise by length: K = k1·(1 − b + b·|d|/avg|d|)"),
    "b_swapped": Wrong(partial(Plain, swap_b=True), "b multiplies |d|/avg|d| and 1 − b stands alone; they are swapped"),
    "distinct_length": Wrong(partial(Plain, distinct_length=True), "|d| counts all tokens, not the distinct ones"),
    "not_saturated": Wrong(partial(Plain, saturate=False), "divide tf by tf + K: k1 has no effect"),
    "extra_k1_plus_1": Wrong(
        partial(Plain, numerator=True), "the lucene variant has no factor k1 + 1 (Lucene dropped it in version 8)"
    ),
    "missing_k1_plus_1": Wrong(partial(Plain, numerator=False), "the okapi variant has the factor k1 + 1"),
    "query_as_set": Wrong(partial(Plain, query_as_set=True), "a term that the query repeats counts each time"),
    "lower_cased": Wrong(partial(Plain, taken=str.lower), 'tokens are taken as they come: "The" and "the" are two'),
    "stemmed": Wrong(
        partial(Plain, taken=lambda token: token.removesuffix("s")),
        'tokens are taken as they come: "cat" and "cats" are two, and to stem them is the tokenizer\'s work',
    ),
    "stop_words_dropped": Wrong(
        partial(Plain, taken=lambda token: "" if token in ("a", "of", "the") else token),
        "tokens are taken as they come: to leave some out is the tokenizer's work",
    ),
    "worst_first": Wrong(
        partial(Plain, order=lambda score, document: (score, document)),
        "sort by descending score: the best comes first",
    ),
    "ordered_by_id": Wrong(
        partial(Plain, order=lambda score, document: (document, 0)), "sort by score, not by document id"
    ),
    "ties_to_larger_id": Wrong(
        partial(Plain, order=lambda score, document: (-score, -document)),
        "of equal scores the smaller id comes first (a reversed ascending sort turns ties around)",
    ),
    "unmatched_returned": Wrong(
        partial(Plain, everything_hits=True),
        "documents that share no term are not returned: fill up with id -1, score 0",
    ),
    "negative_idf": Wrong(
        partial(Plain, keep_negative=True), "okapi gives terms in more than half of the documents ¼ of the mean idf"
    ),
    "floor_at_zero": Wrong(partial(Plain, floor=0.0), "okapi's floor for a negative idf is ¼ of the mean idf, not 0"),
    "zero_scores_dropped": Wrong(
        partial(Plain, only_positive=True), "a document that shares a term is a hit, even if its score is 0"
    ),
    "answers_as_before": Wrong(Repeating, "each search answers its own queries: keep nothing of the one before"),
    "fit_adds": Wrong(Appending, "fit replaces what an earlier fit built: start from nothing in it"),
    "added_to_old_weights": Wrong(
        Stale, "idf and the average length are of all documents: after `add`, compute them and all impacts anew"
    ),
    "add_replaces": Wrong(Replacing, "`add` keeps the documents that are there; the new ones get the ids that follow"),
    "shared_state": Wrong(
        Sharing, "two indexes share nothing: keep what fit builds in the object, not in the class or the module"
    ),
    "tf_in_a_byte": Wrong(
        partial(Plain, count=lambda tf: tf % 256), "count in more than 8 bits: a word may occur more than 255 times"
    ),
    "ids_in_a_byte": Wrong(
        partial(Plain, id_type=np.int8), "ids need more than 8 bits: a corpus may have more than 127 documents"
    ),
}

_BM25 = Contract(
    name="retrieval.bm25",
    signature="make(*, variant, k1, b) -> object with fit(token_lists) and search(token_lists, k) -> (scores, ids)",
    reference=bm25.BM25,
    cases=CASES,
    inputs=inputs,
    call=call,
    oracle=oracle,
    tolerance=tolerance,
    wrong=WRONG,
    compare={"ids": compare_ids},
)

CONTRACTS = {
    "bm25": _BM25,
    "bm25_numba": replace(_BM25, name="retrieval.bm25_numba", reference=bm25_numba.BM25),
    "exact": _retrieval_exact.contract("retrieval.exact", exact.Exact),
    "exact_numba": _retrieval_exact.contract("retrieval.exact_numba", exact_numba.Exact),
    "ivf": _retrieval_ivf.contract("retrieval.ivf", ivf.IVF),
    "ivf_numba": _retrieval_ivf.contract("retrieval.ivf_numba", ivf_numba.IVF),
    "pq": _retrieval_pq.contract("retrieval.pq", pq.PQ),
    "pq_numba": _retrieval_pq.contract("retrieval.pq_numba", pq_numba.PQ),
    "ivfpq": _retrieval_pq.contract("retrieval.ivfpq", ivfpq.IVFPQ),
    "ivfpq_numba": _retrieval_pq.contract("retrieval.ivfpq_numba", ivfpq_numba.IVFPQ),
    "hnsw": _retrieval_hnsw.contract("retrieval.hnsw", hnsw.HNSW),
    "hnsw_numba": _retrieval_hnsw.contract("retrieval.hnsw_numba", hnsw_numba.HNSW, fast=True),
    "fusion": _retrieval_fusion.contract("retrieval.fusion", fusion.reciprocal_rank),
    "late_interaction": _retrieval_late_interaction.contract(
        "retrieval.late_interaction", late_interaction.LateInteraction
    ),
    "late_interaction_numba": _retrieval_late_interaction.contract(
        "retrieval.late_interaction_numba", late_interaction_numba.LateInteraction
    ),
    "metrics": _retrieval_metrics.contract("retrieval.metrics", metrics.evaluate),
}
