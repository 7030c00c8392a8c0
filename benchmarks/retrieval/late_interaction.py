"""MaxSim over all tokens of all documents: how near is it to the time of its matrix product, and what does it find?

What to look at: all do the same products. Padding documents to the longest multiplies them (where one is very long, as
among the docstrings, by so much that it is left out); a maximum that is taken in a pass of its own reads them again
from memory. The share of the limit is that of one matrix product with the same
FLOPs. Token vectors are 32 a query and 20 to 120 a document in 128 dimensions, the sizes of ColBERT, drawn at random:
what they mean makes no difference to time. In the case "python docs" they are latent vectors of words, made from the
docstrings themselves, so that it can be said what is found: MRR@10 of known items, beside BM25's and that of both
rankings fused by reciprocal ranks. Word vectors that know no context are no match for a trained encoder.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from mlsys.bench import Benchmark, Impl, Plot, Work
from mlsys.data import beir, latent_words
from mlsys.retrieval import bm25_numba, fusion, late_interaction, late_interaction_numba, metrics
from mlsys.retrieval.tokenize import LUCENE

Case = Mapping[str, Any]
K = 100
DIM = 96  # of the latent vectors
PYTHON = "python docs"


@dataclass
class Texts:
    """Token vectors of documents and queries; of the docstrings also what is relevant, and what BM25 finds."""

    documents: list[np.ndarray]
    queries: list[np.ndarray]
    relevant: list[dict[int, int]] = field(default_factory=list)
    by_words: np.ndarray | None = None
    built: dict[Any, Any] = field(default_factory=dict)


@cache
def drawn(n: int, queries: int, dim: int = 128) -> Texts:
    rng = np.random.default_rng(n)

    def text(length: int) -> np.ndarray:
        x = rng.standard_normal((length, dim), dtype=np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    return Texts([text(length) for length in rng.integers(20, 121, n)], [text(32) for _ in range(queries)])


@cache
def docstrings(queries: int) -> Texts:
    corpus = beir.from_docs()
    documents = [LUCENE(text) for text in corpus.texts]
    asked = [LUCENE(text) for text in corpus.asked[:queries]]
    latent = latent_words.fit(documents, DIM)
    _, by_words = bm25_numba.BM25(k1=0.9, b=0.4).fit(documents).search(asked, K)
    return Texts(
        [latent.tokens(text) for text in documents],
        [latent.tokens(text, weighted=True) for text in asked],
        corpus.relevant[:queries],
        by_words,
    )


def inputs(case: Case, device: str) -> Texts:
    if case["corpus"] == PYTHON:
        return docstrings(case["queries"])
    return drawn(case["documents"], case["queries"])


def work(case: Case, texts: Texts) -> Work:
    n_tokens, asked = sum(map(len, texts.documents)), sum(map(len, texts.queries))
    dim = texts.documents[0].shape[1]
    return Work(
        flops=2.0 * dim * n_tokens * asked,
        bytes=4.0 * dim * (n_tokens + asked),
        items=len(texts.queries),
        unit="queries",
    )


class Scorer(ABC):
    """What gives the scores of all documents for one query, behind our two methods; empty documents score -∞."""

    def fit(self, documents: list[np.ndarray]) -> Scorer:
        self.filled = np.flatnonzero([len(document) for document in documents])
        self.n = len(documents)
        self.keep([documents[i] for i in self.filled])
        return self

    @abstractmethod
    def keep(self, documents: list[np.ndarray]) -> None:
        """None of them is empty."""

    @abstractmethod
    def score(self, query: np.ndarray) -> np.ndarray:
        """Of each document that is kept."""

    def search(self, queries: list[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
        scores = np.full((len(queries), k), -np.inf, np.float32)
        ids = np.full((len(queries), k), -1, np.int64)
        for row, query in enumerate(queries):
            if len(query):
                found = self.score(query)
                top = np.argpartition(found, -k)[-k:]
                top = top[np.argsort(-found[top], kind="stable")]
                scores[row], ids[row] = found[top], self.filled[top]
        return scores, ids


class Padded(Scorer):
    """The formula as most write it in torch: all documents as long as the longest, and a mask."""

    def keep(self, documents: list[np.ndarray]) -> None:
        import torch

        self.tokens = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(x) for x in documents], batch_first=True)
        lengths = torch.tensor([len(x) for x in documents])
        self.beyond = torch.arange(self.tokens.shape[1]) >= lengths[:, None]

    def score(self, query: np.ndarray) -> np.ndarray:
        import torch

        products = self.tokens @ torch.from_numpy(query).T  # (documents, longest, query tokens)
        products.masked_fill_(self.beyond[:, :, None], -torch.inf)
        return np.asarray(products.amax(1).sum(1))


class MaxSimCpu(Scorer):
    """maxsim-cpu, which takes one query and a list of documents."""

    def keep(self, documents: list[np.ndarray]) -> None:
        self.documents = documents

    def score(self, query: np.ndarray) -> np.ndarray:
        import maxsim_cpu

        return maxsim_cpu.maxsim_scores_variable(query, self.documents)


def on_one_thread() -> type[MaxSimCpu]:
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # read when it is imported: it has threads of its own
    return MaxSimCpu


def prepare(make: Callable[..., Any], case: Case, texts: Texts) -> Callable[[], Any]:
    if make not in texts.built:
        texts.built[make] = make()
        texts.built[make].fit(texts.documents)
    index = texts.built[make]
    return lambda: index.search(texts.queries, K)


def verify(case: Case, texts: Texts, got: Any, want: Any) -> tuple[float, float]:
    """Largest error of the best scores, relative to the largest; ids may differ where scores tie."""
    ours, theirs = np.asarray(got[0]), np.asarray(want[0])
    some = np.isfinite(theirs)
    if (np.isfinite(ours) != some).any():
        return float("inf"), 1e-5
    return float(np.abs(ours[some] - theirs[some]).max() / np.abs(theirs[some]).max()), 1e-5


def figures(case: Case, texts: Texts, got: Any) -> dict[str, float]:
    tokens = sum(map(len, texts.documents))
    found = {"documents": float(len(texts.documents)), "tokens": float(tokens)}
    if texts.by_words is not None:
        own = np.asarray(got[1])
        _, fused = fusion.reciprocal_rank([texts.by_words, own], K)
        for name, ids in (("MRR@10", own), ("BM25 MRR@10", texts.by_words), ("fused MRR@10", fused)):
            found[name] = metrics.mrr(ids, texts.relevant, 10)
    return found


def case(queries: int, documents: int | None = None) -> Case:
    if documents is None:
        return {"corpus": PYTHON, "queries": queries}
    return {"corpus": "drawn", "documents": documents, "queries": queries}


bench = Benchmark(
    __file__,
    cases={
        "quick": [case(1, 1000), case(4, 1000), case(10)],
        "default": [case(1, 4000), case(16, 4000), case(100)],
        "full": [case(1, 4000), case(16, 4000), case(64, 4000), case(1), case(1000)],
    },
    inputs=inputs,
    work=work,
    impls={
        "numpy": Impl(lambda: late_interaction.LateInteraction, "reference"),
        "numba": Impl(lambda: late_interaction_numba.LateInteraction, "ours"),
        "maxsim-cpu": Impl(on_one_thread, "peer", "maxsim_cpu"),
        "torch padded": Impl(lambda: Padded, "peer", only=lambda case: case["corpus"] != PYTHON),
    },
    subject="numba",
    prepare=prepare,
    verify=verify,
    figures=figures,
    contract="retrieval.late_interaction",
    plots=(Plot(xlabel="higher is better", panel=("corpus", "documents", "queries"), y="throughput"),),
)

if __name__ == "__main__":
    bench.main()
