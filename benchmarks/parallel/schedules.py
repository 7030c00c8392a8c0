"""Pipeline schedules: how long is a step under each, what do ranks hold, and how long does it take to know that?

What to look at: the columns "step", "bubble" and "held", which are the answer of the
simulation with F = B = W = 1, and the times, which are what it takes. 64 stages and 1024
microbatches are 131,072 operations.

Reference: going over the ranks again and again in exact fractions, as long as one of them can go on.
Peer: torch's own dry run of a table, `_add_send_recv` and `_simulate_comms_compute` of `torch.distributed.pipelining`,
private functions by which it looks for deadlocks. It answers less: each operation and each message is one step, so it
knows no makespan and no memory, and what is compared is whether all operations ran.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from mlsys.bench import Benchmark, Impl, Plot, Record, Work
from mlsys.bench.plots import to_svg
from mlsys.parallel.schedules import SCHEDULES, Schedule, plot, simulate

Case = Mapping[str, Any]
TITLES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved": "1F1B, 2 chunks",
    "zb-h1": "ZB-H1",
    "zb-h2": "ZB-H2",
    "zbv": "ZB-V",
}


@dataclass(frozen=True)
class Found:
    """How many operations ran, and when the last ended, as far as either is known."""

    operations: int | None
    makespan: float | None
    figures: dict[str, float]


@dataclass(frozen=True)
class Inputs:
    """A table; and the same in torch's words, made before anything is timed."""

    schedule: Schedule

    @cached_property
    def rank_of(self) -> dict[int, int]:
        return {op.stage: rank for rank, ops in self.schedule.items() for op in ops}

    @cached_property
    def actions(self) -> dict[int, list[Any]]:
        from torch.distributed.pipelining.schedules import _Action

        kinds = torch_kinds()
        return {rank: [_Action(stage, kinds[kind], i) for kind, stage, i in ops] for rank, ops in self.schedule.items()}


def torch_kinds() -> dict[str, Any]:
    from torch.distributed.pipelining.schedules import _ComputationType

    return {kind: _ComputationType.from_str(word) for kind, word in {"F": "F", "B": "I", "W": "W", "BW": "B"}.items()}


def table(name: str, p: int, m: int) -> Schedule:
    return SCHEDULES[name](p, m, 2) if name == "interleaved" else SCHEDULES[name](p, m)


def ours(given: Inputs) -> Found:
    found = simulate(given.schedule)
    figures = {
        "step": found.makespan,
        "bubble": found.bubble,
        "span bubble": found.span_bubble,
        "held": max(found.peak.values()),
    }
    return Found(sum(map(len, given.schedule.values())), found.makespan, figures)


def swept(given: Inputs) -> Found:
    """Over the ranks again and again."""
    schedule = given.schedule
    stages = 1 + max(op.stage for ops in schedule.values() for op in ops)
    cost = {rank: Fraction(1, len({op.stage for op in ops})) for rank, ops in schedule.items()}
    done: dict[tuple[str, int, int], Fraction] = {}
    now = dict.fromkeys(schedule, Fraction(0))
    place = dict.fromkeys(schedule, 0)
    moving = True
    while moving:
        moving = False
        for rank, ops in schedule.items():
            while place[rank] < len(ops):
                kind, stage, i = ops[place[rank]]
                needs = [("F", stage - 1, i)] if kind == "F" and stage else []
                needs += [("B", stage + 1, i)] if kind in ("B", "BW") and stage < stages - 1 else []
                if any(need not in done for need in needs):
                    break
                now[rank] = max([now[rank], *(done[need] for need in needs)]) + cost[rank] * len(kind)
                done[kind[0], stage, i] = now[rank]
                place[rank] += 1
                moving = True
    return Found(sum(place.values()), float(max(now.values())), {})


def by_torch() -> Callable[[Inputs], Found]:
    from torch.distributed.pipelining import schedules as theirs

    computed = set(torch_kinds().values())

    def run(given: Inputs) -> Found:
        stages, rank_of = len(given.rank_of), given.rank_of.__getitem__
        actions = {rank: list(row) for rank, row in given.actions.items()}  # what they are given is used up
        steps = theirs._simulate_comms_compute(theirs._add_send_recv(actions, rank_of, stages), rank_of, stages)
        ran = sum(one is not None and one.computation_type in computed for row in steps.values() for one in row)
        return Found(ran, None, {})

    return run


def prepare(function: Callable[[Any], Any], case: Case, given: Inputs) -> Callable[[], Found]:
    """Someone's own is called with the table, and returns the makespan."""

    def call() -> Found:
        found = function(given if function.__module__ == __name__ else given.schedule)
        return found if isinstance(found, Found) else Found(None, float(found), {})

    return call


def case(schedule: str, p: int, m: int) -> Case:
    return {"schedule": schedule, "p": p, "m": m}


def verify(case: Case, given: Inputs, got: Found, want: Found) -> tuple[float, float]:
    """How far the ends are apart, and how many operations are missing, as far as both are known."""
    error = 0.0
    for mine, right in ((got.makespan, want.makespan), (got.operations, want.operations)):
        if mine is not None and right is not None:
            error += abs(mine - right)
    return error, 0.0


def timelines(records: Sequence[Record]) -> str | None:
    """Every schedule with 4 ranks and 8 microbatches, above each other."""
    return to_svg(plot({title: table(name, 4, 8) for name, title in TITLES.items()}, unit="F = B = W = 1"))


SMALL = [case(name, 4, 8) for name in SCHEDULES]
LARGE = [case("1f1b", 16, 256), case("interleaved", 16, 256), case("zb-h1", 16, 256), case("zbv", 16, 256)]
bench = Benchmark(
    __file__,
    cases={
        "quick": SMALL,
        "default": [*SMALL, *LARGE, case("1f1b", 64, 1024)],
        "full": [*SMALL, *LARGE, case("1f1b", 64, 1024), case("zb-h1", 64, 1024), case("zbv", 64, 1024)],
    },
    inputs=lambda case, device: Inputs(table(case["schedule"], case["p"], case["m"])),
    # Nothing is computed but times, so there is no share of a machine's limit.
    work=lambda case, given: Work(flops=0, bytes=0, items=sum(map(len, given.schedule.values())), unit="operations"),
    impls={
        "swept": Impl(lambda: swept, "reference"),
        "schedules": Impl(lambda: ours, "ours"),
        "torch dry run": Impl(by_torch, "peer"),
    },
    subject="schedules",
    prepare=prepare,
    verify=verify,
    figures=lambda case, given, got: got.figures,
    plots=(
        Plot(
            xlabel="one process, 1F1B",
            y="throughput",
            panel=("p", "m"),
            only=lambda case: case["schedule"] == "1f1b" and case["p"] > 4,
        ),
    ),
    pictures={"timelines": timelines},
)

if __name__ == "__main__":
    bench.main()
