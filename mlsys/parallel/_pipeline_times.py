"""How long the operations of a pipeline took, out of its timeline: to draw them, and to simulate with real costs.

See also:
    `mlsys.parallel.pipeline`, `mlsys.parallel.schedules` (`simulate`, `plot`), `mlsys.parallel.timeline` (`gather`).
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from mlsys.parallel._schedule_ops import Op
from mlsys.parallel.timeline import Ranks, Span

_NAME = re.compile(r"(F|B|W|BW) of microbatch (\d+) in stage (\d+)")  # as Op prints


class Measured(NamedTuple):
    """Seconds of each stage: `simulate(schedule, *measured(ranks))`. Where B and W are one, BW is `b`, and `w` 0."""

    f: list[float]
    b: list[float]
    w: list[float]


def operations(spans: Sequence[Span]) -> list[tuple[Op, float, float]]:
    """The operations among a rank's spans, with start and end."""
    found = []
    for span in spans:
        name = _NAME.fullmatch(span.name) if span.kind == "compute" else None
        if name:
            found.append((Op(name[1], int(name[3]), int(name[2])), span.start, span.end))
    return found


def measured(ranks: Ranks) -> Measured:
    """The mean time of each stage's operations in the spans of all ranks (`mlsys.parallel.timeline.gather`).

    A step is as long as the sum of what lies on its longest path, to which a mean is true and a median is not: it
    would leave out the operations that were interrupted. Give the spans of one step, to compare with that step.
    """
    seconds: dict[tuple[str, int], list[float]] = {}
    for spans in ranks:
        for op, start, end in operations(spans):
            seconds.setdefault((op.kind, op.stage), []).append(end - start)
    if not seconds:
        raise ValueError("ranks has no spans of a pipeline's operations: pass Pipeline(…, timeline=…), and run a step")
    stages = 1 + max(stage for _, stage in seconds)
    means = {place: statistics.fmean(each) for place, each in seconds.items()}

    f, w = ([means.get((kind, stage), 0.0) for stage in range(stages)] for kind in ("F", "W"))
    b = []
    for stage in range(stages):  # of a stage that has both, BW is taken for B and W one after the other
        apart, whole = seconds.get(("B", stage), []), seconds.get(("BW", stage), [])
        rest = sum(apart) + sum(whole) - len(whole) * w[stage]
        b.append(max(0.0, rest / max(1, len(apart) + len(whole))))
    return Measured(f, b, w)
