"""The contract of `retrieval.metrics`: recall, precision, MRR, MAP and nDCG by the conventions of trec_eval.

The implementation is a function `evaluate(ids, relevant, k)` that gives a dictionary of "recall", "precision",
"mrr", "map" and "ndcg": `ids` is an integer array (n_queries, ≥ k), best first, -1 where nothing was found;
`relevant` a list with, for each query, a dictionary id → grade of what was judged.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from mlsys.contracts.core import Case, Contract, Inputs, Mismatch, Results, Wrong

SIGNATURE = "evaluate(ids (n_queries, >= k), relevant [{id: grade}, …], k) -> {recall, precision, mrr, map, ndcg}"
NAMES = ("recall", "precision", "mrr", "map", "ndcg")


def case(what: str, k: int = 10, *, grades: tuple[int, ...] = (1,), returned: int = 20, judged: int = 8) -> Case:
    """One case: queries of 60 documents, each with up to `judged` of these grades."""
    return {"what": what, "k": k, "grades": grades, "returned": returned, "judged": judged}


CASES = [
    case("one relevant", judged=1),
    case("several relevant"),
    case("graded", grades=(1, 2, 3)),
    case("judged as not relevant", grades=(0, 0, 1)),
    case("graded, some not relevant", grades=(0, 1, 2)),
    case("more relevant than k", 5, judged=25),
    case("more relevant than k, graded", 5, grades=(1, 2, 3), judged=25),
    case("few returned", returned=4),
    case("few returned, graded", grades=(1, 2, 3), returned=4),
    case("only the first", 1, grades=(1, 2), judged=15),
    case("queries without anything relevant", grades=(0, 1), judged=2),
    case("below zero", grades=(-2, -1, 1, 2)),
    case("all of them", 20, grades=(1, 2), judged=30),
]


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Rankings in which what is relevant stands somewhat higher than by chance."""
    rng = random.Random(seed)
    ids, relevant = [], []
    for _ in range(12):
        judged = {i: rng.choice(case["grades"]) for i in rng.sample(range(60), rng.randint(1, case["judged"]))}
        order = sorted(range(60), key=lambda i: rng.random() - 0.2 * (i in judged))
        kept = rng.randint(0, case["returned"]) if case["returned"] < case["k"] else case["returned"]
        ids.append([*order[:kept], *[-1] * (20 - kept)])
        relevant.append(judged)
    if case["what"] == "queries without anything relevant":
        relevant[3], relevant[7] = {}, dict.fromkeys(relevant[7], 0)
    return {"ids": np.array(ids, np.int64), "relevant": relevant, "k": case["k"]}


def call(impl: Callable[..., Any], inputs: Inputs) -> Results:
    """The five figures."""
    got = impl(inputs["ids"], inputs["relevant"], inputs["k"])
    if not isinstance(got, Mapping):
        raise Mismatch(f"returned {type(got).__name__}, expected a dictionary: {SIGNATURE}")
    missing = [name for name in NAMES if name not in got]
    if missing:
        raise Mismatch(f"has no {', '.join(missing)}: {SIGNATURE}")
    return {name: np.asarray(got[name]) for name in NAMES}


def oracle(inputs: Inputs) -> dict[str, np.ndarray]:
    """The formulas, one query at a time."""
    return {name: np.asarray(value) for name, value in plain(**inputs).items()}


def tolerance(inputs: Inputs, name: str, want: np.ndarray) -> float:
    """Nothing but rounding in float64."""
    return 1e-9


def plain(
    ids: np.ndarray,
    relevant: list[dict[int, int]],
    k: int,
    *,
    gain: Callable[[int], float] = lambda grade: max(grade, 0),
    discount: Callable[[int], float] = lambda rank: math.log2(rank + 1),
    least: int = 1,
    ideal: str = "judged",
    shown: Callable[[int, int], int] = lambda k, returned: k,
    wanted: Callable[[int, int, int], int] = lambda n_relevant, k, found: n_relevant,
    wanted_by_ap: Callable[[int, int, int], int] = lambda n_relevant, k, found: n_relevant,
    first: Callable[[list[int]], float] = lambda ranks: 1 / ranks[0],
    only_answerable: bool = False,
    cut: bool = True,
) -> dict[str, float]:
    """All five by their formulas; each further option is one place to go wrong."""
    rows = []
    for row, judged in zip(ids.tolist(), relevant, strict=True):
        returned = [i for i in row if i >= 0]
        top = returned[:k] if cut else returned
        n_relevant = sum(grade >= least for grade in judged.values())
        if only_answerable and not n_relevant:
            continue
        ranks = [rank for rank, i in enumerate(top, 1) if judged.get(i, least - 1) >= least]
        best = sorted((judged.get(i, 0) for i in top) if ideal == "found" else judged.values(), reverse=True)
        best = best if ideal == "uncut" else best[:k]
        most = sum(gain(grade) / discount(rank) for rank, grade in enumerate(best, 1))
        reached = sum(gain(judged.get(i, 0)) / discount(rank) for rank, i in enumerate(top, 1))
        shares = wanted(n_relevant, k, len(ranks)), wanted_by_ap(n_relevant, k, len(ranks))
        rows.append(
            {
                "recall": len(ranks) / shares[0] if shares[0] else 0.0,
                "precision": len(ranks) / shown(k, len(top)) if shown(k, len(top)) else 0.0,
                "mrr": first(ranks) if ranks else 0.0,
                "map": sum(found / rank for found, rank in enumerate(ranks, 1)) / shares[1] if shares[1] else 0.0,
                "ndcg": reached / most if most else 0.0,
            }
        )
    return {name: float(np.mean([row[name] for row in rows])) if rows else 0.0 for name in NAMES}


def _wrong(hint: str, **knobs: Any) -> Wrong:
    return Wrong(partial(plain, **knobs), hint)


WRONG = {
    "exponential_gain": _wrong(
        "nDCG's gain is the grade itself in trec_eval, not 2^grade − 1", gain=lambda grade: 2.0 ** max(grade, 0) - 1
    ),
    "binary_gain": _wrong("nDCG uses the grade, not only whether there is one", gain=lambda grade: float(grade > 0)),
    "loss_below_zero": _wrong("a grade below 0 gains nothing; it takes nothing away either", gain=float),
    "discount_of_rank": _wrong(
        "divide the gain at rank r by log2(r + 1), from the first rank on",
        discount=lambda rank: max(1.0, math.log2(rank)),
    ),
    "no_discount": _wrong("divide the gain at rank r by log2(r + 1): rank matters", discount=lambda rank: 1.0),
    "ideal_of_found": _wrong(
        "nDCG's best order is made of all judged documents, not only of those that were found", ideal="found"
    ),
    "ideal_not_cut": _wrong("the best order is cut at k like the ranking: only k places can be filled", ideal="uncut"),
    "judged_is_relevant": _wrong("a document of grade 0 was judged and is not relevant", least=0),
    "precision_of_returned": _wrong("precision@k divides by k, even if fewer were returned", shown=lambda k, n: n),
    "recall_of_possible": _wrong(
        "recall divides by the number of relevant documents, even if that is more than k",
        wanted=lambda n, k, found: min(n, k),
    ),
    "ap_of_found": _wrong(
        "average precision divides by the number of relevant documents, not of those found",
        wanted_by_ap=lambda n, k, found: found,
    ),
    "ap_of_possible": _wrong(
        "average precision divides by the number of relevant documents, even if that is more than k",
        wanted_by_ap=lambda n, k, found: min(n, k),
    ),
    "rank_from_zero": _wrong("the first rank is 1: reciprocal rank is 1/rank", first=lambda ranks: 1 / (ranks[0] + 1)),
    "last_relevant": _wrong(
        "MRR looks at the first relevant document, not at the last", first=lambda ranks: 1 / ranks[-1]
    ),
    "unanswerable_dropped": _wrong(
        "a query without anything relevant scores 0, and counts in the mean", only_answerable=True
    ),
    "not_cut": _wrong("only the first k count", cut=False),
}


def contract(name: str, reference: Callable[..., Any]) -> Contract:
    """The contract of `retrieval.metrics` for one implementation of it."""
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
    )
