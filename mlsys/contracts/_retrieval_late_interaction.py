"""The contract of `retrieval.late_interaction`: MaxSim over the token vectors of all documents.

The implementation is anything that is called without arguments and gives an object with `fit(documents)` and
`search(queries, k)`; documents and queries are lists of float32 arrays (n_tokens, d). The result is `(scores, ids)`,
both (n_queries, k), best first: with fewer documents than k, or a query without tokens, id -1 and score -∞. A document
without tokens is never found. An object that has `add(documents)` too is then as if `fit` had been given all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlsys.contracts.core import Case, Contract, Inputs, Mismatch, Results, Wrong

SIGNATURE = "make() -> object with fit(list of (n_i, d)) and search(list of (m_i, d), k) -> (scores, ids)"


def case(
    what: str, *, documents: int = 30, longest: int = 12, asked: int = 5, dim: int = 16, k: int = 5, use: str = "search"
) -> Case:
    """One case: so many documents of 1 … longest tokens, and queries of 1 … asked."""
    return {
        "what": what, "documents": documents, "longest": longest, "asked": asked, "dim": dim, "k": k, "use": use,
    }  # fmt: skip


CASES = [
    case("one token each", longest=1, asked=1),
    case("one token asked for", asked=1),
    case("several"),
    case("all documents", k=30),
    case("far from each other", k=30),
    case("of very different lengths", longest=300, documents=20),
    case("longer than a block", longest=3000, documents=5, k=5),
    case("many queries' tokens", asked=200, documents=12),
    case("one dimension", dim=1),
    case("not of length 1"),
    case("without tokens", k=30),
    case("the same", k=30),
    case("more asked for than there is", documents=4, k=9),
    case("several", use="search again"),
    case("several", use="fit again"),
    case("several", use="add"),
]


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Vectors of length 1 in all directions, or what the case says."""
    rng = np.random.default_rng(seed)
    what, dim = case["what"], case["dim"]

    def text(longest: int) -> np.ndarray:
        x = rng.normal(size=(rng.integers(1, longest + 1), dim))
        if what == "the same":  # whole numbers: sums are exact, and so are ties
            return rng.integers(-2, 3, size=x.shape).astype(np.float32)
        if what != "not of length 1":
            x /= np.linalg.norm(x, axis=1, keepdims=True)
        return x.astype(np.float32)

    documents = [text(case["longest"]) for _ in range(case["documents"])]
    queries = [text(case["asked"]) for _ in range(6)]
    if what == "far from each other":  # every product is negative, so that zeros from padding would win
        documents, queries = [np.abs(x) for x in documents], [-np.abs(x) for x in queries]
    if what == "without tokens":
        for i in (0, 7, 8, len(documents) - 1):
            documents[i] = documents[i][:0]
        queries[2] = queries[2][:0]
    if what == "the same":
        for i in range(15):
            documents[29 - i] = documents[i][::-1].copy()
    others = [text(case["longest"]) for _ in range(9)]
    return {"documents": documents, "queries": queries, "k": case["k"], "use": case["use"], "others": others,
            "exact": what == "the same"}  # fmt: skip


def call(make: Callable[..., Any], inputs: Inputs) -> Results:
    """Fit, search, and whatever else the case does."""
    index = make()
    documents, queries, k = inputs["documents"], inputs["queries"], inputs["k"]
    if inputs["use"] == "fit again":
        index.fit(inputs["others"])
        index.search(queries, k)
    if inputs["use"] == "add" and hasattr(index, "add"):
        index.fit(documents[:11])
        index.search(queries, k)
        index.add(documents[11:12])
        index.add(documents[12:])
    else:
        index.fit(documents)
    if inputs["use"] == "search again":
        index.search(queries[::-1], k)
    answer = index.search(queries, k)
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise Mismatch(f"search returned a {type(answer).__name__}, expected the tuple (scores, ids)")
    scores, ids = (np.asarray(part) for part in answer)
    if ids.dtype.kind not in "iu":
        raise Mismatch(f"search returned ids of dtype {ids.dtype}, expected integers; the order is (scores, ids)")
    return {"scores": scores, "ids": ids}


def oracle(inputs: Inputs) -> dict[str, np.ndarray]:
    """Scores and ids in float64, one query and one document at a time."""
    scores, ids = Plain().fit(inputs["documents"]).search(inputs["queries"], inputs["k"])
    return {"scores": scores, "ids": ids}


def tolerance(inputs: Inputs, name: str, want: np.ndarray) -> float:
    """Float32 products of d numbers, and a sum over the query's tokens."""
    if name == "ids" or inputs["exact"]:
        return 0.0
    largest = max((float(np.abs(x).max(initial=0.0)) for x in inputs["documents"] + inputs["queries"]), default=0.0)
    tokens = max(map(len, inputs["queries"]))
    return 4e-7 * max(1.0, largest**2) * tokens * np.sqrt(inputs["documents"][0].shape[1])


def compare_scores(inputs: Inputs, got: np.ndarray, want: np.ndarray, limit: float) -> str | None:
    """The first score that is off; -∞ must be where it belongs."""
    if got.shape != want.shape:
        return f"shape {got.shape}, expected {want.shape}"
    with np.errstate(invalid="ignore"):
        off = ~((got == want) | (np.abs(got - want) <= limit))
    if off.any():
        row, rank = (int(place[0]) for place in np.nonzero(off))
        return f"query {row}, rank {rank}: {got[row, rank]:.6g}, expected {want[row, rank]:.6g}"
    return None


def compare_ids(inputs: Inputs, got: np.ndarray, want: np.ndarray, limit: float) -> str | None:
    """What is wrong with the ids: each must stand where its score belongs; where sums are exact, so are ties."""
    if got.shape != want.shape:
        return f"shape {got.shape}, expected {want.shape}"
    plain = Plain().fit(inputs["documents"])
    limit = tolerance(inputs, "scores", want)
    for row, query in enumerate(inputs["queries"]):
        mine_row = got[row].tolist()
        for rank, (mine, right) in enumerate(zip(mine_row, want[row].tolist(), strict=True)):
            at = f"query {row}, rank {rank}: id {mine}, expected {right}"
            if mine == right:
                continue
            if -1 in (mine, right) or not 0 <= mine < len(inputs["documents"]) or not len(inputs["documents"][mine]):
                return f"{at}; of {len(inputs['documents'])} documents, those with tokens are found"
            if mine_row.count(mine) > 1:
                return f"{at}; {mine} is returned {mine_row.count(mine)} times"
            gap = abs(plain.score(query, plain.documents[mine]) - plain.score(query, plain.documents[right]))
            if gap > limit:
                return f"{at}, whose score is better by {gap:.3g}"
            if inputs["exact"]:
                return f"{at}; their scores are equal, so the smaller id comes first"
    return None


@dataclass
class Plain:
    """MaxSim by one product for each query and document: the oracle. Each further option is one place to go wrong."""

    over_document: Callable[[np.ndarray], np.ndarray] = lambda products: products.max(axis=1)  # (m, n) → (m,)
    over_query: Callable[[np.ndarray], float] = lambda best: float(best.sum())
    prepared: Callable[[np.ndarray], np.ndarray] = lambda tokens: tokens
    swapped: bool = False
    padded: bool = False
    by_length: bool = False
    empty_found: bool = False
    add_replaces: bool = False
    fit_adds: bool = False
    order: Callable[[float, int], tuple[float, int]] = lambda score, i: (-score, i)

    def fit(self, documents: list[np.ndarray]) -> Plain:
        """Keep them."""
        kept = [np.asarray(document, np.float64) for document in documents]
        self.documents = [*getattr(self, "documents", []), *kept] if self.fit_adds else kept
        return self

    def add(self, documents: list[np.ndarray]) -> Plain:
        """Keep them as well."""
        kept = [np.asarray(document, np.float64) for document in documents]
        self.documents = kept if self.add_replaces else [*self.documents, *kept]
        return self

    def score(self, query: np.ndarray, document: np.ndarray) -> float:
        """One query, one document."""
        query, document = self.prepared(np.asarray(query, np.float64)), self.prepared(document)
        if self.padded:
            longest = max(map(len, self.documents))
            document = np.concatenate([document, np.zeros((longest - len(document), document.shape[1]))])
        products = query @ document.T  # (query tokens, document tokens)
        score = self.over_query(self.over_document(products.T if self.swapped else products))
        return score / len(document) if self.by_length else score

    def search(self, queries: list[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Score everything, sort everything, cut."""
        scores, ids = np.full((len(queries), k), -np.inf), np.full((len(queries), k), -1, np.int64)
        for row, query in enumerate(queries):
            if not len(query):
                continue
            found = [(self.score(query, x) if len(x) else 0.0, i) for i, x in enumerate(self.documents)]
            found = [(score, i) for score, i in found if len(self.documents[i]) or self.empty_found]
            for rank, (score, i) in enumerate(sorted(found, key=lambda hit: self.order(*hit))[:k]):
                scores[row, rank], ids[row, rank] = score, i
        return scores, ids


def _pooled(tokens: np.ndarray) -> np.ndarray:
    return tokens.mean(axis=0, keepdims=True)


def _wrong(hint: str, **knobs: Any) -> Wrong:
    return Wrong(lambda: Plain(**knobs), hint)


WRONG = {
    "mean_over_document": _wrong(
        "take the maximum over the document's tokens, not their mean",
        over_document=lambda products: products.mean(axis=1),
    ),
    "sum_over_document": _wrong(
        "take the maximum over the document's tokens, not their sum",
        over_document=lambda products: products.sum(axis=1),
    ),
    "worst_match": _wrong(
        "take the maximum over the document's tokens, not the minimum",
        over_document=lambda products: products.min(axis=1),
    ),
    "largest_magnitude": _wrong(
        "a product far below 0 is no good match: take the maximum of the products themselves",
        over_document=lambda products: np.abs(products).max(axis=1),
    ),
    "negative_cut_off": _wrong(
        "a maximum below 0 counts as it is: nothing starts from 0",
        over_document=lambda products: products.max(axis=1, initial=0),
    ),
    "maxima_of_document": _wrong(
        "maximum over the document's tokens, sum over the query's; here they are swapped", swapped=True
    ),
    "maximum_of_both": _wrong(
        "add up over the query's tokens: each has a vote", over_query=lambda best: float(best.max())
    ),
    "mean_over_query": _wrong(
        "add up over the query's tokens, do not average", over_query=lambda best: float(best.mean())
    ),
    "first_token": _wrong("every token takes part, not only the first", prepared=lambda tokens: tokens[:1]),
    "pooled": _wrong("keep a vector for every token: averaging them first is not late interaction", prepared=_pooled),
    "normalised": _wrong(
        "take the vectors as they are; who wants cosines gives vectors of length 1",
        prepared=lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12),
    ),
    "padding_takes_part": _wrong("the zeros that fill short documents up must not be matched: mask them", padded=True),
    "by_length": _wrong("do not divide by the document's length", by_length=True),
    "truncated": _wrong("use all tokens of a document, however long it is", prepared=lambda tokens: tokens[:256]),
    "empty_found": _wrong("a document without tokens matches nothing, and is not returned", empty_found=True),
    "add_replaces": _wrong("`add` keeps what is there; new documents get the ids that follow", add_replaces=True),
    "fit_adds": _wrong("`fit` replaces what an earlier `fit` built", fit_adds=True),
    "ties_to_larger_id": _wrong("of equal scores the smaller id comes first", order=lambda score, i: (-score, -i)),
    "worst_first": _wrong("the best comes first: sort by descending score", order=lambda score, i: (score, i)),
}


def contract(name: str, reference: Callable[..., Any]) -> Contract:
    """The contract of `retrieval.late_interaction` for one implementation of it."""
    return Contract(
        name=name,
        signature=SIGNATURE,
        reference=reference,
        cases=CASES,
        inputs=inputs,
        call=call,
        oracle=oracle,
        tolerance=tolerance,
        wrong=WRONG,
        compare={"scores": compare_scores, "ids": compare_ids},
    )
