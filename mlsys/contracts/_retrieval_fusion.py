"""The contract of `retrieval.fusion`: several rankings become one, by reciprocal ranks.

The implementation is a function `reciprocal_rank(rankings, k, *, constant, weights)`; `rankings` is a list of integer
arrays (n_queries, any length), best first, -1 where there is nothing more; `weights` None or a number for each
ranking. It gives `(scores, ids)`, both (n_queries, k), best first; where fewer documents are found, id -1 and score 0.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np

from mlsys.contracts.core import Case, Contract, Inputs, Mismatch, Results, Wrong

SIGNATURE = "reciprocal_rank(rankings, k, *, constant, weights) -> (scores, ids), both (n_queries, k)"
NEAR = 1e-8  # scores that differ by less may stand either way: an implementation may add in float32


def case(
    what: str, *lengths: int, k: int = 10, constant: int = 60, weights: tuple[float, ...] | None = None, of: int = 30
) -> Case:
    """One case: rankings of these lengths of `of` documents."""
    return {"what": what, "lengths": lengths, "k": k, "constant": constant, "weights": weights, "of": of}


CASES = [
    case("two", 10, 10),
    case("of different lengths", 20, 6),
    case("three", 12, 10, 8),
    case("one alone", 8, k=5),
    case("padded", 10, 10),
    case("nothing found by some", 10, 10),
    case("nothing in common", 8, 8, k=16),
    case("more asked for than there is", 4, 4, k=12),
    case("opposite", 9, 9, k=9),
    case("small constant", 10, 10, constant=1),
    case("constant 0", 10, 10, constant=0),
    case("weights", 10, 10, weights=(1.0, 0.5)),
    case("one left out", 10, 10, weights=(0.0, 1.0)),
    case("two of three", 6, 6, 6, k=3, of=12),
    case("large ids", 10, 10),
]


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Rankings that agree somewhat, for six queries."""
    rng = np.random.default_rng(seed)
    n, of = 6, case["of"]
    worth = rng.normal(size=(n, of))
    rankings = []
    for i, length in enumerate(case["lengths"]):
        order = np.argsort(-(worth + rng.normal(size=(n, of))), axis=1)[:, :length]
        if case["what"] == "nothing in common":
            order = np.stack([rng.permutation(15)[:length] + 15 * i for _ in range(n)])
        if case["what"] == "opposite":
            order = np.stack([np.arange(9)[:: 1 if i == 0 else -1] * (row + 1) for row in range(n)])
        if case["what"] == "padded":
            order = np.where(np.arange(length) < rng.integers(1, length, (n, 1)), order, -1)
        if case["what"] == "nothing found by some" and i == 1:
            order = np.where(np.arange(n)[:, None] % 2 == 0, order, -1)
        if case["what"] == "large ids":
            order = order + 2**40
        rankings.append(order.astype(np.int64))
    return {"rankings": rankings, **{name: case[name] for name in ("k", "constant", "weights")}}


def call(impl: Callable[..., Any], inputs: Inputs) -> Results:
    """Scores and ids."""
    got = impl(inputs["rankings"], inputs["k"], constant=inputs["constant"], weights=inputs["weights"])
    if not isinstance(got, tuple) or len(got) != 2:
        raise Mismatch(f"returned {type(got).__name__}, expected the tuple (scores, ids)")
    scores, ids = (np.asarray(part) for part in got)
    if ids.dtype.kind not in "iu":
        raise Mismatch(f"returned ids of dtype {ids.dtype}, expected integers; the order is (scores, ids)")
    return {"scores": scores, "ids": ids}


def oracle(inputs: Inputs) -> dict[str, np.ndarray]:
    """Sums of fractions, so that what ties, ties exactly."""
    scores, ids = plain(**inputs)
    return {"scores": scores, "ids": ids}


def tolerance(inputs: Inputs, name: str, want: np.ndarray) -> float:
    """Float32 scores."""
    return 0.0 if name == "ids" else 1e-6 * max(1.0, float(np.abs(want).max(initial=0.0)))


def compare_ids(inputs: Inputs, got: np.ndarray, want: np.ndarray, limit: float) -> str | None:
    """What is wrong with the ids: each must stand where its score belongs; of two rankings, ties are exact."""
    if got.shape != want.shape:
        return f"shape {got.shape}, expected {want.shape}"
    for row, (mine_row, right_row) in enumerate(zip(got.tolist(), want.tolist(), strict=True)):
        fused = _fused(inputs, row)
        for rank, (mine, right) in enumerate(zip(mine_row, right_row, strict=True)):
            at = f"query {row}, rank {rank}: id {mine}, expected {right}"
            if (mine == -1) != (right == -1):
                return f"{at}; {len(fused)} documents are in a ranking"
            if mine == right:
                continue
            if mine not in fused:
                return f"{at}; {mine} is in no ranking"
            if mine_row.count(mine) > 1:
                return f"{at}; {mine} is returned {mine_row.count(mine)} times"
            if abs(fused[mine] - fused[right]) > NEAR:
                return f"{at}, whose score is {float(fused[right]):.8f} against {float(fused[mine]):.8f}"
            if fused[mine] == fused[right] and len(inputs["rankings"]) <= 2:
                return f"{at}; their scores are equal, so the smaller id comes first"
    return None


def _fused(inputs: Inputs, row: int) -> dict[int, Fraction]:
    """The score of every document that a ranking has for this query."""
    weights = inputs["weights"] or [1] * len(inputs["rankings"])
    fused: dict[int, Fraction] = {}
    for ranking, weight in zip(inputs["rankings"], weights, strict=True):
        for rank, i in enumerate(ranking[row].tolist(), 1):
            if i >= 0 and weight > 0:
                fused[i] = fused.get(i, Fraction(0)) + Fraction(weight) / (inputs["constant"] + rank)
    return fused


def plain(
    rankings: list[np.ndarray],
    k: int,
    *,
    constant: int,
    weights: tuple[float, ...] | None,
    share: Callable[[int, int, int], Fraction] = lambda rank, constant, length: Fraction(1, constant + rank),
    join: Callable[[list[Fraction]], Fraction] = lambda shares: sum(shares, Fraction(0)),
    absent: bool = False,
    padding: bool = False,
    unweighted: bool = False,
    always: int | None = None,
    in_all: bool = False,
    order: Callable[[Fraction, int], tuple[Any, Any]] = lambda score, i: (-score, i),
) -> tuple[np.ndarray, np.ndarray]:
    """The formula by loops over dictionaries; each further option is one place to go wrong."""
    n = len(rankings[0])
    scores, ids = np.zeros((n, k)), np.full((n, k), -1, np.int64)
    factors = [Fraction(weight) for weight in weights] if weights and not unweighted else [Fraction(1)] * len(rankings)
    for row in range(n):
        shares: dict[int, list[Fraction]] = {}
        for ranking, factor in zip(rankings, factors, strict=True):
            for rank, i in enumerate(ranking[row].tolist(), 1):
                if (i >= 0 or padding) and factor:
                    added = share(rank, constant if always is None else always, ranking.shape[1])
                    shares.setdefault(i, []).append(factor * added)
        if absent:
            for i in shares:
                for ranking in rankings:
                    if i not in ranking[row]:
                        shares[i].append(Fraction(1, constant + ranking.shape[1] + 1))
        if in_all:
            shares = {i: own for i, own in shares.items() if len(own) == len(rankings)}
        fused = {i: join(own) for i, own in shares.items()}
        for place, (i, score) in enumerate(sorted(fused.items(), key=lambda pair: order(pair[1], pair[0]))[:k]):
            ids[row, place], scores[row, place] = i, float(score)
    return scores, ids


def _wrong(hint: str, **knobs: Any) -> Wrong:
    return Wrong(partial(plain, **knobs), hint)


WRONG = {
    "rank_from_zero": _wrong(
        "the best document has rank 1: it adds 1 / (constant + 1)",
        share=lambda rank, constant, length: (
            Fraction(1, constant + rank - 1) if constant + rank > 1 else Fraction(10**6)
        ),
    ),
    "constant_outside": _wrong(
        "the constant stands in the denominator, beside the rank: 1 / (constant + rank)",
        share=lambda rank, constant, length: constant + Fraction(1, rank),
    ),
    "constant_ignored": _wrong("use the constant that is given, not always 60", always=60),
    "no_constant": _wrong("add the constant to the rank: 1 / (constant + rank)", always=0),
    "by_length": _wrong(
        "add 1 / (constant + rank), whatever the length of the ranking: these are Borda's counts",
        share=lambda rank, constant, length: Fraction(length - rank + 1),
    ),
    "maximum": _wrong("add up what the rankings give a document; the maximum forgets that several agree", join=max),
    "mean": _wrong(
        "add up, do not average over the rankings that have a document: that several agree must count",
        join=lambda shares: sum(shares, Fraction(0)) / len(shares),
    ),
    "absent_ranks_last": _wrong("a ranking that lacks a document adds nothing to it", absent=True),
    "only_in_all": _wrong("a document counts even if only one ranking has it", in_all=True),
    "padding_counted": _wrong("-1 is padding and no document: leave it out", padding=True),
    "weights_ignored": _wrong("multiply what each ranking adds by its weight", unweighted=True),
    "ties_to_larger_id": _wrong(
        "of equal scores the smaller id comes first (a reversed ascending sort turns ties around)",
        order=lambda score, i: (-score, -i),
    ),
    "worst_first": _wrong("the best comes first: sort by descending score", order=lambda score, i: (score, i)),
}


def contract(name: str, reference: Callable[..., Any]) -> Contract:
    """The contract of `retrieval.fusion` for one implementation of it."""
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
        compare={"ids": compare_ids},
    )
