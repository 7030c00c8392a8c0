"""When each operation of a schedule begins and ends, or why some never do.

Every operation waits for at most one of another rank: F for F of the stage before, B and BW for the gradient from the
stage after. So a rank runs down its list until it meets an operation whose message is not there, and leaves word that
it waits for it; whoever produces it calls the rank again. Each operation is looked at once or twice, whatever the order
of the ranks: linear time.

See also:
    `mlsys.parallel.schedules`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlsys.parallel._schedule_ops import ScheduleError, Table

Awaited = tuple[bool, int, int]  # forward (or backward), stage, microbatch


def run(
    schedule: Table, rank_of: Sequence[int], ticks: Mapping[tuple[str, int], int], comm: int
) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """The start and the end of each rank's operations, in the order of its list; ScheduleError if they never end.

    ticks: how long an operation takes, by kind and stage. comm: how long a message between ranks does.
    The schedule is complete, and each stage's own operations are in an order that makes sense.
    """
    last = len(rank_of) - 1
    starts: dict[int, list[int]] = {rank: [] for rank in schedule}
    ends: dict[int, list[int]] = {rank: [] for rank in schedule}
    ended: dict[Awaited, int] = {}
    waiting: dict[Awaited, int] = {}  # for what, and which rank
    ready = list(schedule)
    while ready:
        rank = ready.pop()
        ops, begins, stops = schedule[rank], starts[rank], ends[rank]
        now = stops[-1] if stops else 0
        for place in range(len(stops), len(ops)):
            kind, stage, microbatch = ops[place]
            start, forward = now, kind == "F"
            if kind != "W" and stage != (0 if forward else last):
                other = stage - 1 if forward else stage + 1
                awaited = (forward, other, microbatch)
                if awaited not in ended:
                    waiting[awaited] = rank
                    break
                there = ended[awaited]
                if rank_of[other] != rank:
                    there = there + comm
                if there > start:
                    start = there
            now = start + ticks[kind, stage]
            begins.append(start)
            stops.append(now)
            if kind != "W":
                ended[forward, stage, microbatch] = now
                waiter = waiting.pop((forward, stage, microbatch), None)
                if waiter is not None:
                    ready.append(waiter)
    if waiting:
        raise ScheduleError(_deadlock(schedule, rank_of, {rank: awaited for awaited, rank in waiting.items()}, ends))
    return starts, ends


def _deadlock(
    schedule: Table, rank_of: Sequence[int], awaited: Mapping[int, Awaited], ends: Mapping[int, Sequence[int]]
) -> str:
    """The ranks that wait for each other in a circle, and for what."""
    ranks = [min(awaited)]
    while ranks.count(ranks[-1]) < 2:  # whoever is waited for waits too, or it would have got there
        ranks.append(rank_of[awaited[ranks[-1]][1]])
    circle = ranks[ranks.index(ranks[-1]) : -1]
    circle = circle[circle.index(min(circle)) :] + circle[: circle.index(min(circle))]
    clauses = []
    for rank in circle:
        forward, stage, microbatch = awaited[rank]
        place = len(ends[rank])
        other = rank_of[stage]
        needed = next(
            position
            for position, op in enumerate(schedule[other])
            if (op.stage, op.microbatch) == (stage, microbatch) and (op.kind == "F" if forward else "B" in op.kind)
        )
        whose = "its own" if other == rank else f"rank {other}'s"
        clauses.append(
            f"rank {rank} waits at operation {place}, {schedule[rank][place]}, "
            f"for {whose} operation {needed}, {schedule[other][needed]}"
        )
    return f"deadlock: {'; '.join(clauses)}. Operations are counted from 0"
