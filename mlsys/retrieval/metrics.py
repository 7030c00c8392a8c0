"""How good a ranking is, when it is known which documents should have been found.

    recall@k = |relevant ∩ first k| / |relevant|        how much of it was found
    MRR@k    = 1 / rank of the first relevant document   how far down one has to read; 0 beyond k

both averaged over the queries. With one relevant document a query (known-item
search), recall@k is the share of queries answered on the first page.

Cost:
    O(k) per query.

Memory:
    None beyond the input.

Papers:
    Voorhees 1999, "The TREC-8 Question Answering Track Report" (mean reciprocal rank).
    Manning, Raghavan & Schütze 2008, "Introduction to Information Retrieval", §8.4.

See also:
    `bm25` (whose ids these take), `mlsys.data.docs.known_items` (queries with a known answer).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np

Relevant = Sequence[int | Collection[int]]  # for each query its one relevant id, or all of them


def recall(ids: np.ndarray, relevant: Relevant, k: int) -> float:
    """Mean share of the relevant documents among the first `k` of `ids` (n_queries, ≥ k); -1 is padding.

    ValueError if the shapes do not fit, or a query has no relevant document.
    """
    rows = _rows(ids, relevant, k)
    return float(np.mean([len(wanted.intersection(row)) / len(wanted) for row, wanted in rows]))


def mrr(ids: np.ndarray, relevant: Relevant, k: int) -> float:
    """Mean reciprocal rank of the first relevant document among the first `k` of `ids` (n_queries, ≥ k).

    ValueError if the shapes do not fit, or a query has no relevant document.
    """
    rows = _rows(ids, relevant, k)
    return float(
        np.mean([max((1 / rank for rank, i in enumerate(row, 1) if i in wanted), default=0.0) for row, wanted in rows])
    )


def _rows(ids: np.ndarray, relevant: Relevant, k: int) -> list[tuple[list[int], set[int]]]:
    """Each query's first k ids and its set of relevant ids."""
    ids = np.asarray(ids)
    if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu":
        raise ValueError(f"ids must be integers (n_queries, k), got {ids.dtype} of shape {ids.shape}")
    if not 1 <= k <= ids.shape[1]:
        raise ValueError(f"k must be between 1 and {ids.shape[1]}, the number of ids a query has, got {k}")
    if len(relevant) != len(ids):
        raise ValueError(f"relevant must have one entry per query: got {len(relevant)} for {len(ids)} queries")
    wanted = [set(entry) if isinstance(entry, Iterable) else {entry} for entry in relevant]
    for query, entry in enumerate(wanted):
        if not entry or min(entry) < 0:
            raise ValueError(f"relevant[{query}] must hold at least one id, and none below 0, got {sorted(entry)}")
    return [(row, entry) for row, entry in zip(ids[:, :k].tolist(), wanted, strict=True)]
