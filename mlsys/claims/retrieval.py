"""Published numbers about text retrieval, on the corpus that is always at hand: Python's own documentation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache

import numpy as np

from mlsys.claims import _retrieval_hnsw, _retrieval_text, _retrieval_vectors
from mlsys.claims.core import Claim

KAMPHUIS = "Kamphuis et al. 2020, ECIR, doi:10.1007/978-3-030-45442-5_4, abstract and Table 2"
QUERIES = 2000
SIGNIFICANT = 2.576  # |t| of a paired two-sided test at p = .01, many degrees of freedom


@cache
def reciprocal_ranks(variant: str) -> np.ndarray:
    """1 / rank of each known-item query's own document, 0 below rank 1000; k1 = .9, b = .4 as in the paper."""
    from mlsys.data import docs
    from mlsys.retrieval import bm25_numba
    from mlsys.retrieval.tokenize import Tokenizer

    found = docs.load()
    queries, relevant = docs.known_items(found, QUERIES, seed=0)
    tokenize = Tokenizer()
    index = bm25_numba.BM25(variant=variant, k1=0.9, b=0.4).fit([tokenize(d.body) for d in found])
    _, ids = index.search([tokenize(q) for q in queries], k=1000)
    hit = ids == np.array(relevant)[:, None]
    return np.where(hit.any(axis=1), 1.0 / (1.0 + hit.argmax(axis=1)), 0.0)


def significant_pairs(pairs: Sequence[tuple[str, str]]) -> int:
    """How many of these pairs of variants differ in MRR by a paired t-test at p < .01."""
    count = 0
    for a, b in pairs:
        difference = reciprocal_ranks(a) - reciprocal_ranks(b)
        error = difference.std(ddof=1) / math.sqrt(len(difference))
        count += bool(error > 0 and abs(difference.mean()) > SIGNIFICANT * error)
    return count


CLAIMS = [
    *_retrieval_vectors.CLAIMS,
    Claim(
        name="bm25-variants-alike",
        area="retrieval.bm25",
        source=KAMPHUIS,
        what="of the pairs among Robertson, Lucene and ATIRE, those whose MRR differs significantly (p < .01)",
        unit="of 3 pairs",
        published=0,
        digits=0,
        compute=lambda: significant_pairs(list(itertools.combinations(("robertson", "lucene", "atire"), 2))),
        tolerance=0.0,
        expected="exact",
        reason="theirs on newswire with judged topics, ours known-item queries over Python's documentation",
    ),
    Claim(
        name="bm25-lower-bounds-alike",
        area="retrieval.bm25",
        source=KAMPHUIS,
        what="of BM25+ and BM25L as in their papers, those whose MRR differs significantly from Lucene's (p < .01)",
        unit="of 2 pairs",
        published=0,
        digits=0,
        compute=lambda: significant_pairs([("lucene", "paper-bm25+"), ("lucene", "paper-bm25l")]),
        tolerance=0.0,
        expected="disagrees",
        reason="both lift long documents, which helps where several long documents are relevant (newswire); a "
        "known-item query has one relevant document, usually short, and the lift puts long ones before it",
    ),
    *_retrieval_hnsw.CLAIMS,
    *_retrieval_text.CLAIMS,
]
