"""A claim is a published number that the library reproduces: what the paper printed, and what we get.

The status is computed, never declared: *exact* when the two agree to the digits
that the paper printed, *approximate* within the stated tolerance, *disagrees*
otherwise. A claim that disagrees carries the reason: that is teaching material,
not a failure to hide. No claim may be computed from the published value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Status = Literal["exact", "approximate", "disagrees"]


@dataclass(frozen=True)
class Claim:
    """One published number.

    name:      a short handle, `flash-traffic`.
    area:      the technique it belongs to, `attention.flash`.
    source:    paper, table or figure.
    what:      what is computed, in a line.
    published: the value as printed; `digits` of it count after the point.
    compute:   our value, from our own code.
    tolerance: the relative error that still counts as approximate.
    expected:  the status that the tests insist on.
    reason:    why ours differs, where it does.
    formula:   the source prints a formula; `published` is that formula, evaluated at the numbers given.
    """

    name: str
    area: str
    source: str
    what: str
    unit: str
    published: float
    digits: int
    compute: Callable[[], float]
    tolerance: float = 0.0
    expected: Status = "exact"
    reason: str = ""
    formula: bool = False

    def status(self, ours: float) -> Status:
        """How `ours` stands to the published value."""
        if abs(ours - self.published) <= 0.5 * 10**-self.digits:
            return "exact"
        scale = max(abs(self.published), 10**-self.digits)
        return (
            "approximate"
            if math.isfinite(ours) and abs(ours - self.published) <= self.tolerance * scale
            else "disagrees"
        )


@dataclass(frozen=True)
class Reproduced:
    """A claim with our value beside it."""

    claim: Claim
    ours: float
    status: Status


def reproduce(claim: Claim) -> Reproduced:
    """Compute our value and compare."""
    ours = float(claim.compute())
    return Reproduced(claim, ours, claim.status(ours))
