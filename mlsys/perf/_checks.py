"""What the public doors of `mlsys.perf` ask of their arguments, said in one way."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


def whole(name: str, value: object, at_least: int = 1) -> int:
    """`value`, if it is a whole number of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    return value


def amount(name: str, value: float, *, positive: bool = False) -> float:
    """`value`, if it is finite and not negative; with `positive` not zero either."""
    try:
        finite = math.isfinite(value)
    except TypeError:
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not finite or value < 0 or (positive and value == 0):
        raise ValueError(f"{name} must be {'positive' if positive else 'at least 0'} and finite, got {value!r}")
    return value


def known(name: str, value: str, names: Iterable[str]) -> str:
    """`value`, if it is one of `names`; otherwise the error names the nearest."""
    names = list(names)
    if value in names:
        return value
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"{name}={value!r} is not known; {hint}known are {', '.join(map(repr, names))}")
