"""A pipeline schedule as an exercise: 1F1B as a table.

The oracle is no list of operations, since another order may be as good: a formula where all stages cost the same,
and a slow simulation in fractions, of an order worked out from where each operation stands, where they do not.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from mlsys.contracts.core import Case, Contract, Inputs, Mismatch, Results, Wrong, accepts
from mlsys.parallel.schedules import Op, ScheduleError, one_f_one_b, validate

SIGNATURE = "schedule(p, m) -> {rank: [(kind, stage, microbatch), …]}, kind being F, BW, or B and W"
KINDS = ("F", "B", "W", "BW")
ONE_NUMBER = 1e-9  # relative: fractions, rounded once

Table = Mapping[int, Sequence[tuple[str, int, int]]]
Costs = Sequence[Mapping[str, Fraction]]  # of each stage, of F, B and W


class Stuck(Exception):
    """Nobody can go on."""


# --- the oracle -------------------------------------------------------------------------------------------------------


def order(p: int, m: int, rank: int) -> list[tuple[str, int, int]]:
    """1F1B by the place of each operation in the list: how many come before it.

    Rank r may have p − r microbatches on their way. So before F of microbatch i there are i forward passes, and as many
    backward passes as it takes; before BW of i there are i backward passes, and as many forward passes as there may be.
    """
    most = p - rank
    place = {("F", rank, i): i + max(0, i + 1 - most) for i in range(m)}
    place |= {("BW", rank, i): i + min(m, i + most) for i in range(m)}
    return sorted(place, key=place.__getitem__)


def makespan(table: Table, costs: Costs) -> Fraction:
    """By going over the ranks again and again, as long as one of them can do something. `Stuck` if none can."""
    done: dict[tuple[str, int, int], Fraction] = {}
    now = dict.fromkeys(table, Fraction(0))
    todo = {rank: list(ops) for rank, ops in table.items()}
    last = len(costs) - 1
    while any(todo.values()):
        before = len(done)
        for rank, ops in todo.items():
            while ops:
                kind, stage, i = ops[0]
                needs = {
                    "F": [("F", stage - 1, i)] if stage else [],
                    "B": [("F", stage, i)] + [("B", stage + 1, i)] * (stage < last),
                    "W": [("B", stage, i)],
                }[kind[0]]
                if any(one not in done for one in needs):
                    break
                begin = max([now[rank], *(done[one] for one in needs)])
                now[rank] = begin + sum(costs[stage][part] for part in kind)
                done |= {(part, stage, i): now[rank] for part in kind}
                ops.pop(0)
        if len(done) == before:
            raise Stuck
    return max(now.values())


def held(table: Table, p: int) -> list[int]:
    """The most microbatches that are between F and the end of W."""
    most = []
    for rank in range(p):
        between = [0]
        for kind, _, _ in table.get(rank, ()):
            between.append(between[-1] + (kind == "F") - ("W" in kind))
        most.append(max(between))
    return most


def flaw(table: Table, p: int, m: int) -> int:
    """0 for a table that can be run, else a number for what keeps it from it."""
    if sorted(table) != list(range(p)) or any(stage != rank for rank, ops in table.items() for _, stage, _ in ops):
        return 1
    for rank in range(p):
        parts = Counter((part, i) for kind, _, i in table[rank] for part in kind)
        if max(parts.values(), default=0) > 1:
            return 2
        wanted = {(part, i) for part in "FBW" for i in range(m)}
        if parts.keys() != wanted:
            return 3 if parts.keys() < wanted else 4
        first = {part: place for place, (kind, _, i) in reversed([*enumerate(table[rank])]) for part in [(kind[0], i)]}
        if any(first["F", i] > first["B", i] for i in range(m)):
            return 5
    try:
        makespan(table, [dict.fromkeys("FBW", Fraction(1))] * p)
    except (Stuck, KeyError):
        return 6
    return 0


# --- the contract -----------------------------------------------------------------------------------------------------


def _costs(p: int, seed: int) -> list[Costs]:
    """All alike; a backward pass that takes longer; stages that differ."""
    drawn = random.Random(seed)
    unequal = [dict(zip("FBW", (Fraction(drawn.randint(2, 9)) for _ in "FBW"))) for _ in range(p)]
    return [
        [dict.fromkeys("FBW", Fraction(1))] * p,
        [{"F": Fraction(2), "B": Fraction(3), "W": Fraction(5, 2)}] * p,
        unequal,
    ]


def _inputs(case: Case, seed: int, device: str) -> Inputs:
    if "drawn" in case:
        drawn = random.Random(seed)
        case = {"p": drawn.randint(2, 7), "m": drawn.randint(2, 15)}
    return {**case, "costs": seed}


def _call(impl: Callable[..., Any], inputs: Inputs) -> Results:
    accepts(impl, 2, {}, SIGNATURE)
    p, m = inputs["p"], inputs["m"]
    table = _table(impl(p, m))
    wrong = flaw(table, p, m)
    if wrong:
        times = [-float(wrong)] * 3
    else:
        times = [float(makespan(table, costs)) for costs in _costs(p, inputs["costs"])]
    return {"order": _numbers(table), "makespan": np.array(times), "held": np.array(held(table, p))}


def _table(answer: object) -> Table:
    """What was returned, if it has the form of a schedule."""
    if not isinstance(answer, Mapping):
        raise Mismatch(f"returned {type(answer).__name__}, expected a dictionary from each rank to its list")
    table: dict[int, list[tuple[str, int, int]]] = {}
    for rank, ops in answer.items():
        if not isinstance(rank, int) or not isinstance(ops, list | tuple):
            raise Mismatch(f"has {rank!r}: {type(ops).__name__}, expected a rank and the list of its operations")
        for op in ops:
            whole = isinstance(op, list | tuple) and len(op) == 3 and all(isinstance(value, int) for value in op[1:])
            if not whole or op[0] not in KINDS:
                raise Mismatch(f"rank {rank} has {op!r}, expected (kind, stage, microbatch) as ('F', 0, 1) is")
        table[rank] = [(str(kind), int(stage), int(i)) for kind, stage, i in ops]
    return table


def _numbers(table: Table) -> np.ndarray:
    """A row for each operation: rank, kind, stage, microbatch."""
    rows = [(rank, KINDS.index(kind), stage, i) for rank, ops in table.items() for kind, stage, i in ops]
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


def _oracle(inputs: Inputs) -> dict[str, np.ndarray]:
    p, m = inputs["p"], inputs["m"]
    table = {rank: order(p, m, rank) for rank in range(p)}
    equal, slower, unequal = _costs(p, inputs["costs"])
    formula = [(m + p - 1) * sum(costs[0].values()) for costs in (equal, slower)]
    times = [*formula, makespan(table, unequal)]
    most = [min(m, p - rank) for rank in range(p)]
    return {
        "order": _numbers(table),
        "makespan": np.array([float(t) for t in times]),
        "held": np.array(most),
    }


def _tolerance(inputs: Inputs, result: str, want: np.ndarray) -> float:
    return ONE_NUMBER * float(np.abs(want).max()) if result == "makespan" else 0.0


def _compare_order(inputs: Inputs, got: np.ndarray, want: np.ndarray, tolerance: float) -> str | None:
    """Any that can be run will do."""
    p, m = inputs["p"], inputs["m"]
    table: dict[int, list[Op]] = {rank: [] for rank in range(p)}
    for rank, kind, stage, i in got.tolist():
        table.setdefault(rank, []).append(Op(KINDS[kind], stage, i))
    try:
        found = validate(table)
    except ScheduleError as error:
        return str(error)
    if (found.ranks, found.stages, found.microbatches) != (p, p, m):
        return f"{found.ranks} ranks, {found.stages} stages and {found.microbatches} microbatches, not {p}, {p} and {m}"
    swapped = next((stage for stage, rank in enumerate(found.rank_of) if stage != rank), None)
    if swapped is not None:
        return f"stage {swapped} is on rank {found.rank_of[swapped]}, expected on rank {swapped}"
    return None


def _compare_makespan(inputs: Inputs, got: np.ndarray, want: np.ndarray, tolerance: float) -> str | None:
    words = ("F=1, B=1, W=1", "F=2, B=3, W=2.5", "stages that differ")
    for costs, mine, right in zip(words, got.tolist(), want.tolist(), strict=True):
        if mine > right + tolerance:
            return f"a step takes {mine:.6g} with {costs}, and 1F1B takes {right:.6g}"
    return None


def _compare_held(inputs: Inputs, got: np.ndarray, want: np.ndarray, tolerance: float) -> str | None:
    for rank, (mine, right) in enumerate(zip(got.tolist(), want.tolist(), strict=True)):
        if mine > right:
            return f"rank {rank} holds {mine} microbatches at once, and 1F1B {right}"
    return None


# --- wrong variants ---------------------------------------------------------------------------------------------------


def _plain(
    p: int,
    m: int,
    *,
    ahead: Callable[[int, int, int], int] = lambda p, m, rank: p - rank,
    cut: bool = True,
    steady_from: int = 0,
    last_first: bool = False,
    tail: bool = True,
    stage: Callable[[int, int], int] = lambda p, rank: rank,
) -> dict[int, list[tuple[str, int, int]]]:
    """1F1B with a knob for each mistake."""
    table = {}
    for rank in range(p):
        warm_up = ahead(p, m, rank)
        warm_up = min(warm_up, m) if cut else warm_up
        ops = [("F", stage(p, rank), i) for i in range(warm_up)]
        waiting = list(range(warm_up))
        following: Iterator[int] = iter(range(max(0, warm_up - steady_from), m))
        for _ in range(m):
            nearest = waiting.pop(-1 if last_first else 0) if waiting else None
            more = next(following, None)
            if more is None and not tail:
                break
            pair = [("BW", stage(p, rank), nearest)] if nearest is not None else []
            if more is not None:
                pair.append(("F", stage(p, rank), more))
                waiting.append(more)
            ops += pair
        table[rank] = ops
    return table


def _backward_before_forward(p: int, m: int) -> Table:
    return {rank: [(k, rank, i) for i in range(m) for k in ("BW", "F")] for rank in range(p)}


def _wrong(hint: str, **knobs: Any) -> Wrong:
    return Wrong(lambda p, m: _plain(p, m, **knobs), hint)


WRONG = {
    "warm_up_one_short": _wrong(
        "rank r sends p − 1 − r microbatches on before the pair that begins the steady phase: its first backward pass "
        "comes back only when the last rank has had the microbatch",
        ahead=lambda p, m, rank: max(1, p - 1 - rank),
    ),
    "warm_up_one_long": _wrong(
        "one forward pass too many before the first backward pass: no step is shorter for it, and each rank holds one "
        "microbatch more; rank p − 1 begins with one forward pass",
        ahead=lambda p, m, rank: p - rank + 1,
    ),
    "gpipe": _wrong(
        "all forward passes before the first backward pass are GPipe: the same time, and m microbatches held; go back "
        "as soon as the first microbatch is back",
        ahead=lambda p, m, rank: m,
    ),
    "sequential": _wrong(
        "one microbatch at a time: the other ranks wait; send p − 1 − r more on before the first backward pass",
        ahead=lambda p, m, rank: 1,
    ),
    "newest_first": _wrong(
        "backward passes come back in the order in which the microbatches went: the oldest first", last_first=True
    ),
    "ranks_alike": _wrong(
        "every rank warms up like rank 0: the later a rank, the sooner it has its first gradient, p − 1 − r",
        ahead=lambda p, m, rank: p,
    ),
    "ranks_reversed": _wrong(
        "the first rank has the longest warm-up, the last none: p − 1 − r forward passes, not r",
        ahead=lambda p, m, rank: rank + 1,
    ),
    "tail_missing": _wrong(
        "after the last forward pass there are backward passes left: as many as the warm-up had forward passes",
        tail=False,
    ),
    "forward_twice": _wrong(
        "the steady phase goes on with the microbatch after those of the warm-up, not with the last of them",
        steady_from=1,
    ),
    "too_few_microbatches": _wrong(
        "with fewer microbatches than ranks the warm-up ends with the last of them: min(p − 1 − r, m)", cut=False
    ),
    "backward_before_forward": Wrong(
        _backward_before_forward, "a pair is one forward, then one backward: the last rank has nothing to go back with"
    ),
    "stages_reversed": _wrong("stage r is on rank r: rank 0 has the first layers", stage=lambda p, rank: p - 1 - rank),
    "last_microbatch_missing": Wrong(
        lambda p, m: {rank: [op for op in order(p, m, rank) if op[2] < m - 1] for rank in range(p)},
        "microbatches are counted from 0 to m − 1, and the last one counts",
    ),
}

CASES = [
    {"p": 1, "m": 1},
    {"p": 2, "m": 1},
    {"p": 2, "m": 2},
    {"p": 1, "m": 3},
    {"p": 2, "m": 5},
    {"p": 4, "m": 8},
    {"p": 4, "m": 4},
    {"p": 4, "m": 2},
    {"p": 3, "m": 7},
    {"p": 8, "m": 5},
    {"p": 8, "m": 24},
    *({"drawn": i} for i in (1, 2, 3)),
]


def contract(name: str) -> Contract:
    """The contract of the technique `name`."""
    return Contract(
        name=name,
        signature=SIGNATURE,
        reference=one_f_one_b,
        cases=CASES,
        inputs=_inputs,
        call=_call,
        oracle=_oracle,
        tolerance=_tolerance,
        wrong=WRONG,
        compare={"order": _compare_order, "makespan": _compare_makespan, "held": _compare_held},
        incidental=("order",),
    )
