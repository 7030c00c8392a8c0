"""When everything in a schedule begins and ends, if each operation takes as long as it is said to take.

Times are counted in whole ticks, of which every cost is a multiple: floats too are fractions. So no rounding decides
who waits for whom, and each figure is rounded once, when it is done.

See also:
    `mlsys.parallel.schedules` (what the words mean), `mlsys.parallel._schedule_run` (the loop).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

from mlsys.parallel._schedule_check import Summary, holding, structure
from mlsys.parallel._schedule_ops import Op, Table
from mlsys.parallel._schedule_run import run
from mlsys.perf import _checks

Number = int | float | Fraction
Cost = Number | Sequence[Number] | Mapping[int, Number]  # of a rank's whole part of the model, or of each stage
Times = Mapping[int, Sequence[float]]  # rank → of each of its operations
Spans = Mapping[int, Sequence[tuple[Op, float, float]]]  # rank → operation, start, end


@dataclass(frozen=True)
class RankTime:
    """One rank's step: when its first operation begins, when its last ends, how long it works and waits between."""

    start: float
    end: float
    busy: float
    idle: float


@dataclass(frozen=True)
class Simulation:
    """A step of a pipeline on paper; times are in the unit of the costs.

    schedule:    what was simulated. summary: its size.
    makespan:    from the first operation of any rank to the end of the last.
    bubble:      the share of all ranks' time, up to the makespan, in which they have nothing to do.
    span_bubble: the same of one rank from its own first operation to its own last; of the rank where it is largest.
    peak:        the most microbatches that each rank holds at once, where one of its v stages counts 1/v.
    ranks:       start, end, work and waiting of each.
    """

    schedule: Table
    summary: Summary
    makespan: float
    bubble: float
    span_bubble: float
    peak: dict[int, float]
    ranks: dict[int, RankTime]
    _starts: Times = field(repr=False)
    _ends: Times = field(repr=False)
    _ticks: int = field(repr=False)  # of a unit of time

    @cached_property
    def spans(self) -> dict[int, list[tuple[Op, float, float]]]:
        """Each rank's operations with their start and end."""
        return {
            rank: [
                (op, start / self._ticks, end / self._ticks)
                for op, start, end in zip(ops, self._starts[rank], self._ends[rank])
            ]
            for rank, ops in self.schedule.items()
        }


def simulate(schedule: Table, f: Cost = 1, b: Cost = 1, w: Cost = 1, comm: Number = 0) -> Simulation:
    """Time `schedule`, of which F takes `f`, B `b`, W `w` and BW both of these.

    A number is the cost of a microbatch in a rank's whole part of the model: where that has v stages, each takes 1/v of
    it. A sequence or a mapping has the cost of each stage, as it is. `comm` is how long a message between two ranks is
    on its way; both work on meanwhile.

    ScheduleError if the schedule cannot be run; ValueError or TypeError for costs that are none.
    """
    summary = structure(schedule)
    costs = {kind: _costs(name, cost, summary) for kind, name, cost in (("F", "f", f), ("B", "b", b), ("W", "w", w))}
    costs["BW"] = [apart + more for apart, more in zip(costs["B"], costs["W"])]
    delay = _fraction("comm", comm)
    ticks = math.lcm(delay.denominator, *(cost.denominator for each in costs.values() for cost in each))
    seconds = {(kind, stage): int(cost * ticks) for kind, each in costs.items() for stage, cost in enumerate(each)}
    starts, ends = run(schedule, summary.rank_of, seconds, int(delay * ticks))

    try:
        return _figures(schedule, summary, starts, ends, ticks)
    except OverflowError:
        raise ValueError(
            f"f={f!r}, b={b!r}, w={w!r}: too large for their sum to be a number; use other units"
        ) from None


def observed(spans: Spans) -> Simulation:
    """The same figures of a step that was measured: what each rank did, in its order, with start and end.

    Times may begin anywhere, but count from the same moment on all ranks; the first operation begins at 0 in the
    result. TypeError or ScheduleError if this is not a whole step.
    """
    if not isinstance(spans, Mapping):
        raise TypeError(
            f"spans must be a dictionary from each rank to its (Op, start, end), got {type(spans).__name__}"
        )
    schedule, starts, ends = {}, {}, {}
    for rank, row in spans.items():
        for place, one in enumerate(row):
            if not isinstance(one, tuple) or len(one) != 3:
                raise TypeError(f"spans[{rank}][{place}] must be (Op, start, end), got {one!r}")
        schedule[rank] = [op for op, _, _ in row]
        starts[rank] = [start for _, start, _ in row]
        ends[rank] = [end for _, _, end in row]
    summary = structure(schedule)
    for rank, row in spans.items():
        for place, (op, start, end) in enumerate(row):
            before = ends[rank][place - 1] if place else start
            if not math.isfinite(end - start) or not before <= start <= end:
                raise ValueError(
                    f"spans[{rank}][{place}]: {op} from {start!r} to {end!r}, the one before it until {before!r}; "
                    "a rank does one thing at a time"
                )
    first = min(start[0] for start in starts.values())
    starts = {rank: [start - first for start in row] for rank, row in starts.items()}
    ends = {rank: [end - first for end in row] for rank, row in ends.items()}
    return _figures(schedule, summary, starts, ends, 1)


def _figures(schedule: Table, summary: Summary, starts: Times, ends: Times, ticks: int) -> Simulation:
    makespan = max(row[-1] for row in ends.values())
    ranks: dict[int, RankTime] = {}
    peak: dict[int, float] = {}
    working: float = 0
    span_bubble = 0.0
    for rank, ops in schedule.items():
        start, end = starts[rank][0], ends[rank][-1]
        busy = sum(ends[rank]) - sum(starts[rank])
        idle = end - start - busy
        ranks[rank] = RankTime(start / ticks, end / ticks, busy / ticks, idle / ticks)
        working += busy
        span_bubble = max(span_bubble, _share(idle, end - start))
        peak[rank] = max(holding(ops)) / summary.rank_of.count(rank)
    everything = len(ranks) * makespan
    bubble = _share(everything - working, everything)
    return Simulation(
        schedule, summary, makespan / ticks, bubble, span_bubble, peak, ranks, _starts=starts, _ends=ends, _ticks=ticks
    )


def _costs(name: str, cost: Cost, summary: Summary) -> list[Fraction]:
    """Of each stage."""
    stages = range(summary.stages)
    if isinstance(cost, numbers.Real):
        whole = _fraction(name, cost)
        return [whole / summary.rank_of.count(rank) for rank in summary.rank_of]
    if isinstance(cost, Mapping):
        if set(cost) != set(stages):
            raise ValueError(f"{name} has costs of stages {sorted(cost)}, the schedule has stages 0 to {stages[-1]}")
    elif not isinstance(cost, Sequence) or isinstance(cost, str):
        raise TypeError(f"{name} must be a number, or a list or dictionary with one for each stage; got {cost!r}")
    elif len(cost) != len(stages):
        raise ValueError(f"{name} has costs of {len(cost)} stages, the schedule has {len(stages)}")
    return [_fraction(f"{name}[{stage}]", cost[stage]) for stage in stages]


def _fraction(name: str, value: Number) -> Fraction:
    """The value itself, to the last bit."""
    _checks.amount(name, value)  # type: ignore[arg-type]
    return Fraction(value if isinstance(value, numbers.Rational) else float(value))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
