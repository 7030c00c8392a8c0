"""BM25 over your Python's own documentation: how fast is it to index and to search, and does it find what it should?

What to look at: rank_bm25 scores every document for every query; an index of
precomputed impacts touches only the postings of the query's terms. All get the
same token lists, so no tokenizer is timed. Recall and MRR are of known-item
queries: a docstring's summary line has to find its own body. The cases
"without stop words" leave 33 words out of documents and queries alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np

from mlsys.bench import Benchmark, Impl, Plot, Work
from mlsys.data import docs
from mlsys.retrieval import bm25, bm25_numba, metrics
from mlsys.retrieval.tokenize import Tokenizer

Case = Mapping[str, Any]
K = 10
K1, B = 1.5, 0.75
STOPPED = "without stop words"
WIDE = ("numpy", "torch", "numba")  # what mlsys itself needs, so that every installation has them


@dataclass
class Corpus:
    """Documents and known-item queries as token lists, and the indexes built over them so far."""

    documents: list[list[str]]
    queries: list[list[str]]
    relevant: list[int]
    built: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def frequencies(self) -> Counter[str]:
        """How many documents each term is in."""
        return Counter(term for document in self.documents for term in set(document))


@cache
def corpus(packages: tuple[str, ...], stopwords: str | None) -> Corpus:
    found = docs.load(packages)
    queries, relevant = docs.known_items(found, 2000, seed=0)
    tokenize = Tokenizer(stopwords=stopwords)
    return Corpus([tokenize(d.body) for d in found], [tokenize(q) for q in queries], relevant)


def inputs(case: Case, device: str) -> Corpus:
    return corpus(WIDE if case["corpus"] == "wide" else (), "english" if case.get("words") == STOPPED else None)


def work(case: Case, found: Corpus) -> Work:
    if case["task"] == "index":
        tokens = sum(map(len, found.documents))
        # Read a pointer to each token, write eight bytes a posting: no index can do with less.
        return Work(flops=5 * tokens, bytes=16 * tokens, items=len(found.documents), unit="docs")
    queries = found.queries[: case["queries"]]
    postings = sum(found.frequencies[term] for query in queries for term in query)
    # An add a posting; its document id and impact are read, four bytes each.
    return Work(flops=postings, bytes=8 * postings, items=len(queries), unit="queries")


class Bm25s:
    """bm25s behind our two methods; it scores all documents and has no padding, so its zero scores become ids of -1."""

    backend = "numpy"

    def __init__(self, *, variant: str, k1: float, b: float) -> None:
        import bm25s

        assert variant == "lucene"
        self.index = bm25s.BM25(method="lucene", k1=k1, b=b, backend=self.backend)

    def fit(self, documents: list[list[str]]) -> Bm25s:
        self.index.index(documents, show_progress=False)
        return self

    def search(self, queries: list[list[str]], k: int) -> tuple[np.ndarray, np.ndarray]:
        ids, scores = self.index.retrieve(queries, k=k, show_progress=False, n_threads=0)
        return scores, np.where(scores > 0, ids, -1)


class Bm25sNumba(Bm25s):
    backend = "numba"


class RankBm25:
    """rank_bm25 behind our two methods; it gives all scores, of which we take the best k by partition."""

    def __init__(self, *, variant: str, k1: float, b: float) -> None:
        assert variant == "okapi"
        self.k1, self.b = k1, b

    def fit(self, documents: list[list[str]]) -> RankBm25:
        from rank_bm25 import BM25Okapi

        self.index = BM25Okapi(documents, k1=self.k1, b=self.b)
        return self

    def search(self, queries: list[list[str]], k: int) -> tuple[np.ndarray, np.ndarray]:
        best = []
        for query in queries:
            scores = self.index.get_scores(query)
            top = np.argpartition(scores, -k)[-k:]
            top = top[np.argsort(-scores[top], kind="stable")]
            best.append((scores[top], np.where(scores[top] > 0, top, -1)))
        return np.stack([s for s, _ in best]), np.stack([i for _, i in best])


def prepare(make: Callable[..., Any], case: Case, found: Corpus) -> Callable[[], Any]:
    def fitted() -> Any:
        index = make(variant=case["variant"], k1=K1, b=B)  # which `fit` may return, or not
        index.fit(found.documents)
        return index

    if case["task"] == "index":
        return fitted
    key = make, case["variant"]
    if key not in found.built:
        found.built[key] = fitted()
    index, queries = found.built[key], found.queries[: case["queries"]]
    return lambda: index.search(queries, K)


def answers(case: Case, found: Corpus, got: Any) -> tuple[np.ndarray, np.ndarray]:
    scores, ids = got.search(found.queries[:100], K) if case["task"] == "index" else got
    return np.asarray(scores), np.asarray(ids)


def verify(case: Case, found: Corpus, got: Any, want: Any) -> tuple[float, float]:
    """Largest error of the k best scores, relative to the best; ids may differ where scores tie."""
    ours, theirs = answers(case, found, got)[0], answers(case, found, want)[0]
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max()), 1e-5


def figures(case: Case, found: Corpus, got: Any) -> dict[str, float]:
    _, ids = answers(case, found, got)
    relevant = found.relevant[: len(ids)]
    return {
        "documents": len(found.documents),
        "recall@10": metrics.recall(ids, relevant, K),
        "MRR@10": metrics.mrr(ids, relevant, K),
    }


def cases(*names: str, queries: int = 1000) -> list[Case]:
    return [
        {"task": task, "corpus": name, "variant": variant, "queries": asked, **words}
        for name in names
        for task, variant, asked, words in (
            ("search", "lucene", queries, {}),
            ("search", "lucene", queries, {"words": STOPPED}),
            ("search", "okapi", 20, {}),  # rank_bm25 takes as long for these as the others for thousands
            ("index", "lucene", None, {}),
            ("index", "okapi", None, {}),
        )
    ]


bench = Benchmark(
    __file__,
    cases={"quick": cases("stdlib", queries=200), "default": cases("stdlib", "wide"), "full": cases("stdlib", "wide")},
    inputs=inputs,
    work=work,
    impls={
        "numpy": Impl(lambda: bm25.BM25, "reference"),
        "numba": Impl(lambda: bm25_numba.BM25, "ours"),
        "bm25s numba": Impl(lambda: Bm25sNumba, "peer", "bm25s", lambda case: case["variant"] == "lucene"),
        "bm25s numpy": Impl(lambda: Bm25s, "peer", "bm25s", lambda case: case["variant"] == "lucene"),
        "rank_bm25": Impl(lambda: RankBm25, "peer", "rank_bm25", lambda case: case["variant"] == "okapi"),
    },
    subject="numba",
    prepare=prepare,
    verify=verify,
    figures=figures,
    contract="retrieval.bm25",
    plots=(Plot(xlabel="higher is better", panel=("task", "variant", "corpus", "words"), y="throughput"),),
)

if __name__ == "__main__":
    bench.main()
