"""How good a ranking is, when it is known which documents should have been found, and how much each is worth.

A judge gives documents a grade: 0 for not relevant, 1 for relevant, more for better.
With g_r the grade of the document at rank r, and R documents of grade ≥ 1 in all:

    precision@k = |relevant in the first k| / k                 how much of what is shown is of use
    recall@k    = |relevant in the first k| / R                 how much of it was found
    MRR@k       = 1 / rank of the first relevant document       how far down one has to read; 0 beyond k
    AP@k        = 1/R · Σ_{r ≤ k, relevant} precision@r         both at once; its mean is MAP
    nDCG@k      = DCG / DCG of the best order,  DCG = Σ_{r ≤ k} g_r / log2(r + 1)        grades and ranks

all averaged over the queries. With one relevant document a query (known-item search), recall@k is the share of
queries answered on the first page, and AP is the reciprocal rank.

The figures are those of trec_eval, the program with which nearly all published ones are computed. Its conventions,
each of which some library does otherwise:
- precision divides by k, even if fewer than k were returned; recall and AP by R, even if R > k;
- nDCG's gain is the grade itself, not 2^grade − 1, and its ideal is made of *all* judged documents, found or not;
- a document without a judgement, or with a grade below 1, is not relevant;
- a query without any relevant document scores 0, and counts; so does one with judgements that was not answered
  (trec_eval's option -c), while a query without judgements does not count;
- trec_eval orders a run by score itself, equal scores by *descending* name of the document (`in_trec_order`).

Two doors: arrays of ids as an index returns them (`recall`, `precision`, `mrr`, `mean_average_precision`, `ndcg`, or
`evaluate` for all five), and dictionaries of names as in trec_eval's files (`evaluate_run`).

Cost:
    O(k) per query, and a sort of its judgements.

Memory:
    None beyond the input.

Papers:
    Järvelin & Kekäläinen 2002, "Cumulated Gain-Based Evaluation of IR Techniques", TOIS 20(4) (nDCG; the discount by
    log2(r + 1) from the first rank on is trec_eval's, theirs is log_b(r) from rank b on).
    Voorhees 1999, "The TREC-8 Question Answering Track Report" (mean reciprocal rank).
    Manning, Raghavan & Schütze 2008, "Introduction to Information Retrieval", §8.4 (precision, recall, MAP).

See also:
    `bm25` (whose ids these take), `mlsys.data.docs.known_items` (queries with a known answer), `mlsys.data.beir`.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mlsys.retrieval._vectors import whole

# For each query its one relevant id, or all of them, or the grade of each id that was judged.
Relevant = Sequence[int | Collection[int] | Mapping[int, int]]
Run = Mapping[str, Mapping[str, float]]  # query → document → score
Judgements = Mapping[str, Mapping[str, int]]  # query → document → grade; TREC calls them qrels

# --- arrays of ids ----------------------------------------------------------------------------------------------------


def recall(ids: np.ndarray, relevant: Relevant, k: int) -> float:
    """Mean share of the relevant documents among the first `k` of `ids` (n_queries, ≥ k); -1 is padding.

    ValueError if the shapes do not fit, or a row has an id twice; TypeError for ids, grades or a `k` that are no whole
    numbers.
    """
    return _mean(_recall, ids, relevant, k)


def precision(ids: np.ndarray, relevant: Relevant, k: int) -> float:
    """Mean share of relevant documents among the first `k` of `ids`. Arguments and errors as for `recall`."""
    return _mean(_precision, ids, relevant, k)


def mrr(ids: np.ndarray, relevant: Relevant, k: int) -> float:
    """Mean reciprocal rank of the first relevant document among the first `k`. Arguments and errors as for `recall`."""
    return _mean(_reciprocal_rank, ids, relevant, k)


def mean_average_precision(ids: np.ndarray, relevant: Relevant, k: int) -> float:
    """Mean average precision of the first `k` of `ids`. Arguments and errors as for `recall`."""
    return _mean(_average_precision, ids, relevant, k)


def ndcg(ids: np.ndarray, relevant: Relevant, k: int) -> float:
    """Mean normalised discounted cumulative gain of the first `k` of `ids`. Arguments and errors as for `recall`."""
    return _mean(_ndcg, ids, relevant, k)


def evaluate(ids: np.ndarray, relevant: Relevant, k: int) -> dict[str, float]:
    """All five at `k`: "recall", "precision", "mrr", "map" and "ndcg". Arguments and errors as for `recall`."""
    rows = _rows(ids, relevant, k)
    return {
        name: float(np.mean([measure(row, grades, k) for row, grades in rows])) for name, measure in MEASURES.items()
    }


def dcg(grades: Sequence[float], k: int) -> float:
    """Discounted cumulative gain of the grades in order of rank, up to rank `k`: Σ g_r / log2(r + 1).

    TypeError or ValueError for a `k` that is no whole number of at least 1.
    """
    return math.fsum(grade / math.log2(rank + 1) for rank, grade in enumerate(grades[: whole("k", k, 1)], 1))


# --- dictionaries of names --------------------------------------------------------------------------------------------


def evaluate_run(run: Run, judgements: Judgements, measures: Iterable[str] = ("ndcg@10",)) -> dict[str, float]:
    """The mean of each measure over the judged queries, as trec_eval -c prints it; one that is not in `run` counts 0.

    run:        for each query the score of each document returned.
    judgements: for each query the grade of each document judged.
    measures:   "ndcg@10", "recall@100", "precision@5", "mrr@10", "map@1000"; without @k nothing is cut off.

    ValueError for an unknown measure or no judged query, TypeError for a grade that is no whole number.
    """
    if not judgements:
        raise ValueError("judgements is empty: a mean needs at least one query")
    chosen = {name: _parsed(name) for name in measures}
    grades = {query: _grades(f"judgements[{query!r}]", judged) for query, judged in judgements.items()}
    ranked = {
        query: [grades[query].get(document, 0) for document in in_trec_order(run.get(query, {}))] for query in grades
    }
    return {
        name: float(np.mean([measure(ranked[query], _best(grades[query]), k) for query in grades]))
        for name, (measure, k) in chosen.items()
    }


def in_trec_order(scores: Mapping[str, float]) -> list[str]:
    """The documents by descending score; equal scores by descending name, as trec_eval orders a run.

    trec_eval reads scores as float32, so that two which differ in the eighth digit are equal. ValueError for NaN.
    """
    narrow = {document: float(np.float32(score)) for document, score in scores.items()}
    if any(map(math.isnan, narrow.values())):
        raise ValueError("scores hold NaN, which has no place in an order")
    return sorted(narrow, key=lambda document: (narrow[document], document), reverse=True)


# --- one query: the grades of what was returned, in order, and all grades above 0, best first ------------------------


def _precision(ranked: Sequence[int], judged: Sequence[int], k: int | None) -> float:
    depth = len(ranked) if k is None else k
    return sum(grade > 0 for grade in ranked[:k]) / depth if depth else 0.0


def _recall(ranked: Sequence[int], judged: Sequence[int], k: int | None) -> float:
    return sum(grade > 0 for grade in ranked[:k]) / len(judged) if judged else 0.0


def _reciprocal_rank(ranked: Sequence[int], judged: Sequence[int], k: int | None) -> float:
    return next((1 / rank for rank, grade in enumerate(ranked[:k], 1) if grade > 0), 0.0)


def _average_precision(ranked: Sequence[int], judged: Sequence[int], k: int | None) -> float:
    found, total = 0, 0.0
    for rank, grade in enumerate(ranked[:k], 1):
        if grade > 0:
            found += 1
            total += found / rank
    return total / len(judged) if judged else 0.0


def _ndcg(ranked: Sequence[int], judged: Sequence[int], k: int | None) -> float:
    depth = max(len(ranked), len(judged)) if k is None else k
    return dcg([max(grade, 0) for grade in ranked], depth) / dcg(judged, depth) if judged else 0.0


Measure = Callable[[Sequence[int], Sequence[int], int | None], float]
MEASURES: Mapping[str, Measure] = {
    "recall": _recall,
    "precision": _precision,
    "mrr": _reciprocal_rank,
    "map": _average_precision,
    "ndcg": _ndcg,
}


# --- the public door --------------------------------------------------------------------------------------------------


def _mean(measure: Measure, ids: np.ndarray, relevant: Relevant, k: int) -> float:
    return float(np.mean([measure(ranked, judged, k) for ranked, judged in _rows(ids, relevant, k)]))


def _rows(ids: np.ndarray, relevant: Relevant, k: int) -> list[tuple[list[int], list[int]]]:
    """For each query the grades of its first k ids, 0 for padding, and all its grades above 0, best first."""
    ids = np.asarray(ids)
    if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu":
        raise ValueError(f"ids must be integers (n_queries, k), got {ids.dtype} of shape {ids.shape}")
    if whole("k", k, 1) > ids.shape[1]:
        raise ValueError(f"k must be at most {ids.shape[1]}, the number of ids a query has, got {k}")
    if len(relevant) != len(ids):
        raise ValueError(f"relevant must have one entry per query: got {len(relevant)} for {len(ids)} queries")
    rows = []
    for query, (row, entry) in enumerate(zip(ids[:, :k].tolist(), relevant, strict=True)):
        found = [i for i in row if i >= 0]
        if len(set(found)) < len(found):
            twice = next(i for i in found if found.count(i) > 1)
            raise ValueError(f"ids[{query}] holds {twice} twice; a ranking has each document once (-1 is padding)")
        if isinstance(entry, Mapping):
            grades = _grades(f"relevant[{query}]", entry)
        else:
            grades = dict.fromkeys(_ids(f"relevant[{query}]", entry), 1)
        if grades and min(grades) < 0:
            raise ValueError(f"relevant[{query}] must hold no id below 0, got {sorted(grades)}")
        rows.append(([grades.get(i, 0) for i in row], _best(grades)))
    return rows


def _grades(where: str, judged: Mapping[Any, Any]) -> dict[Any, int]:
    try:
        return {document: operator.index(grade) for document, grade in judged.items()}
    except TypeError:
        raise TypeError(f"{where}: grades must be whole numbers, got {list(judged.values())!r:.60}") from None


def _ids(where: str, entry: Any) -> list[int]:
    try:
        return [operator.index(i) for i in (entry if isinstance(entry, Iterable) else [entry])]
    except TypeError:
        raise TypeError(f"{where} must be an id, ids or grades by id, whole numbers; got {entry!r:.60}") from None


def _best(grades: Mapping[Any, int]) -> list[int]:
    return sorted((grade for grade in grades.values() if grade > 0), reverse=True)


def _parsed(name: str) -> tuple[Measure, int | None]:
    found = re.fullmatch(r"([a-z]+)(?:@([1-9]\d*))?", name) if isinstance(name, str) else None
    if not found or found[1] not in MEASURES:
        raise ValueError(
            f"measures: {name!r} is none; known are {', '.join(MEASURES)}, each with or without @k (ndcg@10)"
        )
    return MEASURES[found[1]], int(found[2]) if found[2] else None
