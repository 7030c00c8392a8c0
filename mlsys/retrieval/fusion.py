"""Reciprocal rank fusion: several rankings become one, by ranks alone.

BM25 gives scores from 0 to 30, cosine from −1 to 1, and neither is the same from
query to query. So the scores are forgotten, and each ranking adds to a document

    RRF(d) = Σ_rankings  w / (c + rank(d))          rank from 1; nothing where d is not in the ranking; c = 60

A large c makes a document that two rankings have at rank 10 (2/70) better than one
that a single ranking has first (1/61); c = 0 would make the first of any ranking
unbeatable. c = 60 was chosen once, on one collection, and has hardly been changed since.

What is fused are sets of names: any ranking that gives ids can take part, and no
training is needed. It loses against a weighted sum of scores where those are
comparable and there are judgements to fit the weights on.

Cost:
    A sort of all (query, id) pairs: O(n log n) for n ids in all rankings.

Memory:
    24 bytes an id while it is sorted.

Papers:
    Cormack, Clarke & Büttcher 2009, "Reciprocal Rank Fusion outperforms Condorcet and individual Rank Learning
    Methods", SIGIR (the formula and c = 60).
    Bruch, Gai & Ingber 2023, arXiv:2210.11934 (how it compares with a weighted sum of scores).

See also:
    `bm25`, `late_interaction` and the vector indexes (whose ids these are), `metrics`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mlsys.retrieval._vectors import number, whole


def reciprocal_rank(
    rankings: Sequence[np.ndarray],
    k: int = 10,
    *,
    constant: float = 60.0,
    weights: Sequence[float] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The best `k` documents for each query by all `rankings`: float32 scores and int64 ids, both (n_queries, k).

    rankings: arrays of ids (n_queries, any k), best first, one row a query; -1 is padding, and no document.
    k:        how many to return, ≥ 1. With fewer documents the row ends in id -1 and score 0.
    constant: c, > -1.
    weights:  w of each ranking, ≥ 0 (0 leaves it out); None is 1 for each.

    Equal scores are ordered by id, smallest first; scores are compared in float64.
    Raises TypeError or ValueError for anything else, and for a row that has an id twice.
    """
    arrays = _checked(rankings)
    k = whole("k", k, 1)
    constant = number("constant", constant)
    if not -1 < constant < math.inf:
        raise ValueError(f"constant must be above -1 and finite (60 is usual), got {constant}")
    shares = _shares(weights, len(arrays))

    queries, documents, added = [], [], []
    for ids, share in zip(arrays, shares, strict=True):
        query, place = np.nonzero(ids >= 0) if share > 0 else (np.empty(0, np.int64), np.empty(0, np.int64))
        queries.append(query)
        documents.append(ids[query, place])
        added.append(share / (constant + place + 1))
    query, document, share_of = (np.concatenate(parts) for parts in (queries, documents, added))

    # Pairs side by side, and what each ranking adds in ascending order: then documents with the same ranks in other
    # rankings have the same sum to the last bit, and tie.
    order = np.lexsort((share_of, document, query))
    query, document, share_of = query[order], document[order], share_of[order]
    first = np.ones(len(query), np.bool_)
    first[1:] = (query[1:] != query[:-1]) | (document[1:] != document[:-1])
    starts = np.flatnonzero(first)
    score = np.add.reduceat(share_of, starts) if len(starts) else np.empty(0)
    query, document = query[starts], document[starts]

    order = np.lexsort((document, -score, query))
    query, document, score = query[order], document[order], score[order]
    n_queries = len(arrays[0])
    rank = np.arange(len(query)) - np.searchsorted(query, np.arange(n_queries))[query]
    kept = rank < k
    scores, ids = np.zeros((n_queries, k), np.float32), np.full((n_queries, k), -1, np.int64)
    scores[query[kept], rank[kept]] = score[kept]
    ids[query[kept], rank[kept]] = document[kept]
    return scores, ids


def _checked(rankings: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Each as int64 (n_queries, k_i)."""
    if isinstance(rankings, np.ndarray) or not len(rankings):
        raise ValueError("rankings must be a list of at least one array of ids, one for each ranking")
    arrays = []
    for i, ranking in enumerate(rankings):
        ids = np.asarray(ranking)
        if ids.ndim != 2 or (ids.dtype.kind not in "iu" and ids.size):
            raise ValueError(
                f"rankings[{i}] must be ids, integers (n_queries, k), got {ids.dtype} of shape {ids.shape}"
            )
        if len(ids) != len(np.asarray(rankings[0])):
            raise ValueError(
                f"rankings must have one row for each query: rankings[0] has {len(np.asarray(rankings[0]))}, "
                f"rankings[{i}] {len(ids)}"
            )
        ids = ids.astype(np.int64)
        ascending = np.sort(ids, axis=1)
        twice = (ascending[:, 1:] == ascending[:, :-1]) & (ascending[:, 1:] >= 0)
        if twice.any():
            row, place = (int(found[0]) for found in np.nonzero(twice))
            raise ValueError(f"rankings[{i}][{row}] holds id {ascending[row, place]} twice; a ranking has it once")
        if (ids < -1).any():
            raise ValueError(f"rankings[{i}] holds the id {ids.min()}; ids are at least 0, and -1 is padding")
        arrays.append(ids)
    return arrays


def _shares(weights: Sequence[float] | None, n: int) -> list[float]:
    if weights is None:
        return [1.0] * n
    shares = [number(f"weights[{i}]", weight) for i, weight in enumerate(weights)]
    if len(shares) != n or not all(0 <= share < math.inf for share in shares):
        raise ValueError(f"weights must be {n} finite numbers of at least 0, one for each ranking, got {list(weights)}")
    return shares
