"""What a pipeline schedule is made of.

See also:
    `mlsys.parallel.schedules` (the schedules, and the words used here).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

KINDS = {
    "F": "the forward pass",
    "B": "the gradient of the input",
    "W": "the gradients of the weights",
    "BW": "both gradients",
}


class Op(NamedTuple):
    """One thing a rank does: `kind` of `KINDS`, for one microbatch, in one stage. Both are counted from 0."""

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind} of microbatch {self.microbatch} in stage {self.stage}"


Schedule = dict[int, list[Op]]  # rank → what it does, in order
Table = Mapping[int, Sequence[Op]]  # the same, as an argument: whatever can be read like one


class ScheduleError(ValueError):
    """A schedule that no pipeline can run, and why."""
