"""What is wrong with a schedule, in words.

See also:
    `mlsys.parallel.schedules` (the rules).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from mlsys.parallel._schedule_ops import KINDS, Op, ScheduleError, Table
from mlsys.parallel._schedule_run import run

# What a stage has done for a microbatch: 0 nothing, 1 F, 2 F and B, 3 everything. kind → {before: after}
STEPS = {"F": {0: 1}, "B": {1: 2}, "W": {2: 3}, "BW": {1: 3}}
COMPLETE = 3


@dataclass(frozen=True)
class Summary:
    """The size of a schedule. rank_of: of each stage. chunks: of the rank with the most stages."""

    ranks: int
    stages: int
    microbatches: int
    chunks: int
    rank_of: tuple[int, ...]


def validate(schedule: Table, *, limit: int | Mapping[int, int] | None = None) -> Summary:
    """Refuse a schedule that cannot be run, with the first reason; return how large it is.

    limit: the most microbatches that a rank may hold, or that each may: {rank: limit}. As in `Simulation.peak`, one of
    a rank's v stages counts 1/v, from F to the end of W.
    TypeError if `schedule` is no mapping from ranks to sequences of `Op`, otherwise ScheduleError.
    """
    summary = structure(schedule)
    run(schedule, summary.rank_of, dict.fromkeys(((k, s) for k in KINDS for s in range(summary.stages)), 0), 0)
    if limit is not None:
        _check_held(schedule, _limits(limit, summary.ranks))
    return summary


def structure(schedule: Table) -> Summary:
    """All of `validate` but deadlock and limit: each operation is there once, in the right list, in a right order."""
    _check_types(schedule)
    _check_ranks(schedule)
    rank_of = _owners(schedule)
    stages = len(rank_of)
    microbatches = 1 + max(op.microbatch for ops in schedule.values() for op in ops)
    if 2 * stages * microbatches > sum(map(len, schedule.values())):  # F and BW of each are the least
        _name_missing(schedule, rank_of, microbatches)
    states = [bytearray(microbatches) for _ in rank_of]
    for rank, ops in schedule.items():
        for kind, stage, microbatch in ops:
            state = states[stage]
            after = STEPS[kind].get(state[microbatch])
            if after is None:
                raise ScheduleError(_complaint(rank, ops, stage, microbatch))
            state[microbatch] = after
    _name_missing_in(schedule, rank_of, states)
    return Summary(len(schedule), stages, microbatches, max(map(rank_of.count, schedule)), rank_of)


def _check_types(schedule: Table) -> None:
    if not isinstance(schedule, Mapping):
        raise TypeError(
            f"schedule must be a dictionary from each rank to the list of its operations, got {type(schedule).__name__}"
        )
    for rank, ops in schedule.items():
        if not isinstance(rank, int) or isinstance(rank, bool):
            raise TypeError(f"the keys of schedule must be ranks, whole numbers; got {rank!r}")
        if not isinstance(ops, Sequence) or isinstance(ops, str):
            raise TypeError(f"schedule[{rank}] must be a list of operations, got {type(ops).__name__}")
        for place, op in enumerate(ops):
            if not isinstance(op, Op):
                raise TypeError(f'schedule[{rank}][{place}] must be an Op, as Op("F", 0, 1) is; got {op!r}')
            if not isinstance(op.kind, str):
                raise TypeError(f"schedule[{rank}][{place}]: kind must be one of {', '.join(KINDS)}, got {op.kind!r}")
            if type(op.stage) is not int or type(op.microbatch) is not int:
                raise TypeError(
                    f"schedule[{rank}][{place}]: stage and microbatch must be whole numbers, "
                    f"got {op.stage!r} and {op.microbatch!r}"
                )


def _check_ranks(schedule: Table) -> None:
    if not schedule:
        raise ScheduleError("the schedule is empty: it needs a list of operations for each rank")
    if sorted(schedule) != list(range(len(schedule))):
        raise ScheduleError(f"the ranks must be 0 to {len(schedule) - 1}, got {sorted(schedule)}")
    for rank, ops in schedule.items():
        if not ops:
            raise ScheduleError(f"rank {rank} has nothing to do: leave it out, or give it a stage")
        for place, op in enumerate(ops):
            if op.kind not in KINDS:
                raise ScheduleError(
                    f"rank {rank}, operation {place}: the kind is {op.kind!r}, known are {', '.join(KINDS)}"
                )
            if op.stage < 0 or op.microbatch < 0:
                raise ScheduleError(f"rank {rank}, operation {place}: {op}; both are counted from 0")


def _owners(schedule: Table) -> tuple[int, ...]:
    """The rank of each stage."""
    owner: dict[int, int] = {}
    for rank in sorted(schedule):
        for stage in sorted({op.stage for op in schedule[rank]}):
            if stage in owner:
                raise ScheduleError(
                    f"stage {stage} is on two ranks, {owner[stage]} and {rank}: its weights can be on one only"
                )
            owner[stage] = rank
    for stage in range(len(owner)):
        if stage not in owner:
            raise ScheduleError(
                f"no rank has stage {stage}, but rank {owner[max(owner)]} has stage {max(owner)}: "
                "stages are numbered from 0 along the model"
            )
    return tuple(owner[stage] for stage in range(len(owner)))


def _name_missing(schedule: Table, rank_of: Sequence[int], microbatches: int) -> None:
    """Without a table of all of them: somebody may have written microbatch 10⁹."""
    there = {(op.stage, op.microbatch) for ops in schedule.values() for op in ops}
    for microbatch in range(microbatches):
        for stage, rank in enumerate(rank_of):
            if (stage, microbatch) not in there:
                raise ScheduleError(_complaint(rank, schedule[rank], stage, microbatch))


def _name_missing_in(schedule: Table, rank_of: Sequence[int], states: Sequence[bytearray]) -> None:
    for stage, state in enumerate(states):
        if state.count(COMPLETE) < len(state):
            microbatch = next(i for i, done in enumerate(state) if done != COMPLETE)
            raise ScheduleError(_complaint(rank_of[stage], schedule[rank_of[stage]], stage, microbatch))


def _complaint(rank: int, ops: Sequence[Op], stage: int, microbatch: int) -> str:
    """What is wrong with what a stage does for a microbatch; something is."""
    places = defaultdict(list)
    for place, op in enumerate(ops):
        if (op.stage, op.microbatch) == (stage, microbatch):
            places[op.kind].append(place)
    what = f"microbatch {microbatch} in stage {stage}"
    for kind, found in places.items():
        if len(found) > 1:
            return f"rank {rank} has {kind} of {what} twice, as operations {found[0]} and {found[1]}"
    if "BW" in places and len(places.keys() & {"B", "W"}):
        other = min(places.keys() & {"B", "W"})
        return (
            f"rank {rank} has BW of {what} (operation {places['BW'][0]}) and {other} as well "
            f"(operation {places[other][0]}): BW is B and W at once"
        )
    wanted = {"F": "", "B": "" if "W" in places else ", or BW for both gradients at once"}
    if "B" in places:
        wanted["W"] = ", which the optimizer needs"
    if "BW" in places:
        del wanted["B"]
    for kind, more in wanted.items():
        if kind not in places:
            return f"rank {rank} never does {kind} of {what}{more if places else ', nor anything else of it'}"
    order = [kind for kind in ("F", "B", "BW", "W") if kind in places]
    first, then = next((a, b) for a, b in pairwise(order) if places[a] > places[b])
    return (
        f"rank {rank} has {then} of {what} (operation {places[then][0]}) before its {first} "
        f"(operation {places[first][0]}), which it needs"
    )


def _limits(limit: int | Mapping[int, int], ranks: int) -> Mapping[int, int]:
    limits = limit if isinstance(limit, Mapping) else dict.fromkeys(range(ranks), limit)
    for rank, most in limits.items():
        if not isinstance(most, int) or isinstance(most, bool) or most < 1:
            raise ValueError(f"limit must be a whole number of at least 1, or one for each rank; got {most!r}")
        if rank not in range(ranks):
            raise ValueError(f"limit[{rank!r}]: there is no such rank, the schedule has 0 to {ranks - 1}")
    return limits


def _check_held(schedule: Table, limits: Mapping[int, int]) -> None:
    for rank, most in limits.items():
        chunks = len({op.stage for op in schedule[rank]})
        for place, held in enumerate(holding(schedule[rank])):
            if held > most * chunks:
                raise ScheduleError(
                    f"rank {rank} holds {Fraction(held, chunks)} microbatches from operation {place} on, "
                    f"{schedule[rank][place]}; the limit is {most}. What F keeps goes with the end of W"
                )


def holding(ops: Sequence[Op]) -> list[int]:
    """How many microbatches a rank holds during each of its operations, each of its stages counted."""
    held, counts = 0, []
    for op in ops:
        held += op.kind == "F"
        counts.append(held)
        held -= op.kind in ("W", "BW")
    return counts
