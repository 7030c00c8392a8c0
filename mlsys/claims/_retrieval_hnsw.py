"""Published numbers about HNSW, on vectors drawn here."""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from mlsys.claims.core import Claim

PAPER = "Malkov & Yashunin 2016, arXiv:1603.09320"
K = 10


def _uniform(n: int, d: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((n, d), dtype=np.float32)


@cache
def distances_for_recall(n: int, recall: float = 0.95) -> float:
    """Distances a search computes among n random vectors of 4 dimensions, at the smallest ef with this recall."""
    from mlsys.retrieval import hnsw, hnsw_numba

    x, queries = _uniform(n, 4, 0), _uniform(300, 4, 1)
    true = np.partition(((queries[:, None] - x) ** 2).sum(-1), K - 1, axis=1)[:, K - 1 : K]
    index = hnsw_numba.HNSW(M=6, ef_construction=100).fit(x)
    for ef in range(K, 200):
        found, _ = index.search(queries, K, ef=ef)
        if (found <= true + 1e-6).mean() >= recall:
            return hnsw.distances_per_query(index, queries, K, ef=ef)
    return math.inf


def growth_each_decade() -> float:
    """Of the distances: the last tenfold against the one before; 1 where cost grows as the logarithm of n."""
    few, more, many = (distances_for_recall(n) for n in (300, 3000, 30_000))
    return (many - more) / (more - few)


def mean_level(M: int) -> float:
    """Of five million nodes."""
    from mlsys.retrieval._hnsw_graph import draw_levels

    return float(draw_levels(5_000_000, M, 0, 0).mean())


def bytes_of_links(M: int) -> float:
    """Each node's, in the mean, on all layers."""
    from mlsys.retrieval import hnsw_numba

    graph = hnsw_numba.HNSW(M=M, ef_construction=20).fit(_uniform(5000, 4, 0)).graph
    return (graph.links.nbytes + graph.upper.nbytes) / len(graph)


CLAIMS = [
    Claim(
        name="hnsw-mean-level",
        area="retrieval.hnsw",
        source=f"{PAPER}, Algorithm 1, line 4, with mL = 1 / ln M (Section 4.1)",
        what="mean level of a node at M = 16: Σ P(l ≥ i) = Σ M^−i = 1 / (M − 1)",
        unit="layers",
        published=1 / 15,
        digits=3,
        compute=lambda: mean_level(16),
        formula=True,
    ),
    Claim(
        name="hnsw-logarithmic",
        area="retrieval.hnsw",
        source=f"{PAPER}, Section 4.2.1: search scales as the logarithm of n at low dimension and fixed recall",
        what="distances for recall .95 (d = 4): growth from n = 3,000 to 30,000 over that from 300 to 3,000",
        unit="ratio",
        published=1.0,
        digits=1,
        compute=growth_each_decade,
        tolerance=0.5,
        expected="approximate",
        reason="the ratio of two small differences between random graphs",
        formula=True,
    ),
    Claim(
        name="hnsw-memory",
        area="retrieval.hnsw",
        source=f"{PAPER}, Section 4.2.3: (Mmax0 + mL · Mmax) links of 4 bytes each",
        what="bytes of links for each node at M = 16: (32 + 16 / ln 16) · 4",
        unit="bytes",
        published=(32 + 16 / math.log(16)) * 4,
        digits=0,
        compute=lambda: bytes_of_links(16),
        tolerance=0.15,
        expected="approximate",
        reason="the paper takes mL for the mean level; rounded down, levels have the mean 1 / (M − 1), not 1 / ln M",
        formula=True,
    ),
]
