"""A schedule as text: one row a rank, time to the right.

See also:
    `mlsys.parallel._schedule_plot` (the same as a picture).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlsys.parallel._schedule_ops import KINDS, Op, Table
from mlsys.parallel._schedule_simulate import Simulation, Spans, observed, simulate

IDLE = "·"
Timed = Table | Simulation | Spans


def timed(what: Timed) -> Simulation:
    """A simulation as it is, a schedule with all costs 1, measured spans with their figures."""
    if isinstance(what, Simulation):
        return what
    first: Any = next((ops[0] for ops in what.values() if ops), None) if isinstance(what, Mapping) else None
    if isinstance(first, tuple) and first and isinstance(first[0], Op):
        return observed(what)  # type: ignore[arg-type]
    return simulate(what)  # type: ignore[arg-type]


def show(what: Timed, *, width: int = 120) -> str:
    """The timeline as text, at most `width` columns, with the figures below it.

    what: a schedule (all costs 1), a simulation, or measured spans, {rank: [(Op, start, end)]}.

    An operation is its kind and the microbatch's number, from the column in which it begins. Where there is no room
    for that the number stands below, and the stage below that if a rank has several.
    """
    one = timed(what)
    names = [f"rank {rank}  " for rank in one.spans]
    left = max(map(len, names))
    room = width - left
    if room < 10:
        raise ValueError(f"width must be at least {left + 10}, got {width}")
    scale = room / one.makespan if one.makespan else 0.0
    cells = {
        rank: [(op, round(start * scale), round(end * scale)) for op, start, end in spans]
        for rank, spans in one.spans.items()
    }
    several = one.summary.chunks > 1
    fits = not several and all(
        end - start >= len(f"{op.kind}{op.microbatch}") for row in cells.values() for op, start, end in row
    )
    lines = []
    for name, row in zip(names, cells.values()):
        labels = [[f"{op.kind}{op.microbatch}" if fits else op.kind for op, _, _ in row]]
        if not fits:
            labels.append([str(op.microbatch) for op, _, _ in row])
        if several:
            labels.append([str(op.stage) for op, _, _ in row])
        for number, words in enumerate(labels):
            text = _row([(start, end, word) for (_, start, end), word in zip(row, words)], room, idle=number == 0)
            lines.append(f"{'' if number else name:{left}}{text}".rstrip())
    below = "" if fits else f"\nbelow the kind the microbatch{', below that the stage' if several else ''}"
    kinds = {op.kind for row in cells.values() for op, _, _ in row}
    meaning = ", ".join(f"{kind} {words}" for kind, words in KINDS.items() if kind in kinds)
    return "\n".join([*lines, _axis(left, room, one.makespan), "", f"{meaning}, {IDLE} nothing{below}", figures(one)])


def figures(one: Simulation) -> str:
    """The figures of a simulation, on one line."""
    held = ", ".join(f"{most:g}" for most in one.peak.values())
    return (
        f"makespan {one.makespan:.6g}; bubble {one.bubble:.1%}, within the span of a rank {one.span_bubble:.1%}; "
        f"most microbatches held {held}"
    )


def _row(cells: list[tuple[int, int, str]], room: int, *, idle: bool) -> str:
    """Words from the columns where they begin; one that does not fit is cut to its first letter, a number is left out.

    idle: mark the columns between.
    """
    row = [IDLE if idle else " "] * room
    for start, end, word in cells:
        fitting = word if len(word) <= end - start else "" if word.isdigit() else word[: end - start]
        row[start:end] = fitting.ljust(end - start)
    return "".join(row)


def _axis(left: int, room: int, makespan: float) -> str:
    """Times below the columns, about one in twelve."""
    if not makespan:
        return ""
    step = _round_step(makespan * 12 / room)
    marks = [" "] * (left + room + 12)
    for i in range(int(makespan / step) + 1):
        at, word = left + round(i * step * room / makespan), f"{i * step:g}"
        if at + len(word) <= left + room:
            marks[at : at + len(word)] = word
    return "".join(marks).rstrip()


def _round_step(least: float) -> float:
    """1, 2 or 5 times a power of ten, at least `least`."""
    power = 10.0 ** _exponent(least)
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= least)


def _exponent(value: float) -> int:
    return int(f"{value:e}".partition("e")[2])
