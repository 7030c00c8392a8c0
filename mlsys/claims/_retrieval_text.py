"""Published statements about fusion, late interaction and metrics, on Python's own documentation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np

from mlsys.claims.core import Claim

QUERIES = 500
DEPTH = 1000
DIM = 64  # of the latent vectors
SIGNIFICANT = 2.576  # t of a paired two-sided test at p = .01, many degrees of freedom

CORMACK = "Cormack, Clarke & Büttcher 2009, SIGIR, abstract (RRF consistently yields better results than any input)"
KHATTAB = "Khattab & Zaharia 2020, arXiv:2004.12832, section 4.4 and figure 5 ([A] one vector, [B] average similarity)"
JARVELIN = "Järvelin & Kekäläinen 2002, TOIS 20(4), section 2.2 (DCG' of the example, log base 2, at rank 10)"
GRADES = (3, 2, 3, 0, 0, 1, 2, 2, 3, 0)  # G' of that example


@cache
def rankings() -> dict[str, np.ndarray]:
    """The ids of known items that each way of searching finds, (queries, DEPTH), best first; and "relevant"."""
    from mlsys.data import beir, latent_words
    from mlsys.retrieval import bm25_numba, late_interaction_numba
    from mlsys.retrieval.tokenize import LUCENE

    corpus = beir.from_docs(n_queries=QUERIES)
    documents, asked = ([LUCENE(text) for text in texts] for texts in (corpus.texts, corpus.asked))
    latent = latent_words.fit(documents, DIM)
    tokens, queries = ([latent.tokens(text) for text in texts] for texts in (documents, asked))

    def by_vector(of_queries: np.ndarray, of_documents: np.ndarray) -> np.ndarray:
        scores = of_queries @ of_documents.T
        scores[:, ~of_documents.any(axis=1)] = -np.inf
        return np.argsort(-scores, axis=1, kind="stable")[:, :DEPTH]

    def pooled(texts: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([x.mean(axis=0) if len(x) else np.zeros(DIM, np.float32) for x in texts])

    return {
        "relevant": np.array([next(iter(row)) for row in corpus.relevant]),
        "words": bm25_numba.BM25(k1=0.9, b=0.4).fit(documents).search(asked, DEPTH)[1],
        "one vector": by_vector(latent.documents(asked), latent.documents(documents)),
        # Mean over i and j of ⟨q_i, d_j⟩ is ⟨mean q, mean d⟩; the mean over i in place of a sum changes no ranking.
        "average similarity": by_vector(pooled(queries), pooled(tokens)),
        "late interaction": late_interaction_numba.LateInteraction().fit(tokens).search(queries, DEPTH)[1],
    }


def reciprocal_ranks(ids: np.ndarray) -> np.ndarray:
    """1 / rank of each query's own document, 0 if it was not found."""
    hit = ids == rankings()["relevant"][:, None]
    return np.where(hit.any(axis=1), 1.0 / (1.0 + hit.argmax(axis=1)), 0.0)


def beaten(ids: np.ndarray, others: Sequence[str]) -> int:
    """How many of these ways of searching have a smaller MRR than `ids`, by a paired t-test at p < .01."""
    count = 0
    for other in others:
        difference = reciprocal_ranks(ids) - reciprocal_ranks(rankings()[other])
        error = difference.std(ddof=1) / math.sqrt(len(difference))
        count += bool(error > 0 and difference.mean() > SIGNIFICANT * error)
    return count


def fused_beats() -> int:
    """Of BM25 and latent vectors, those that their fusion beats."""
    from mlsys.retrieval import fusion

    inputs = ("words", "one vector")
    _, ids = fusion.reciprocal_rank([rankings()[name] for name in inputs], DEPTH)
    return beaten(ids, inputs)


def undiscounted_first() -> float:
    """Their DCG, whose first two ranks have no discount: rank r is divided by log2(r), ours by log2(r + 1)."""
    from mlsys.retrieval import metrics

    first, *rest = GRADES
    return first + metrics.dcg(rest, len(rest))


def ours() -> float:
    """The same grades by trec_eval's discount."""
    from mlsys.retrieval import metrics

    return metrics.dcg(GRADES, len(GRADES))


CLAIMS = [
    Claim(
        name="rrf-beats-its-inputs",
        area="retrieval.fusion",
        source=CORMACK,
        what="of BM25 and latent vectors, those whose MRR their fusion (constant 60) exceeds significantly (p < .01)",
        unit="of 2 inputs",
        published=2,
        digits=0,
        compute=fused_beats,
        expected="disagrees",
        reason="theirs are TREC runs of like quality. Here BM25's MRR is nearly four times that of the latent vectors, "
        "and RRF, which sees ranks alone, believes both alike: the result lies between them",
    ),
    Claim(
        name="maxsim-beats-one-vector",
        area="retrieval.late_interaction",
        source=KHATTAB,
        what="of one vector a text and the average similarity of tokens, those whose MRR MaxSim exceeds (p < .01)",
        unit="of 2 ways",
        published=2,
        digits=0,
        compute=lambda: beaten(rankings()["late interaction"], ("one vector", "average similarity")),
        expected="exact",
        reason="theirs with BERT on MS MARCO, ours with latent vectors of words on known items",
    ),
    Claim(
        name="dcg-example",
        area="retrieval.metrics",
        source=JARVELIN,
        what="discounted cumulative gain of ten grades, the first two ranks without a discount",
        unit="",
        published=9.61,
        digits=2,
        compute=undiscounted_first,
    ),
    Claim(
        name="dcg-example-by-trec-eval",
        area="retrieval.metrics",
        source=JARVELIN,
        what="discounted cumulative gain of the same grades by trec_eval's discount, which all of today's tools use",
        unit="",
        published=9.61,
        digits=2,
        compute=ours,
        expected="disagrees",
        reason="the paper divides by log2(r) from rank 2 on, trec_eval by log2(r + 1) from rank 1 on; "
        "figures by one cannot be compared with figures by the other",
    ),
]
