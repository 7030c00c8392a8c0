"""What the public doors of `mlsys.perf` ask of their arguments, said in one way."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable


def whole(name: str, value: object, at_least: int = 1) -> int:
    """`value` as an int, if it is a whole number of at least `at_least`; NumPy's integers are, True and 8.0 are not."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    number = int(value)  # of any size: a product of NumPy's integers can wrap around
    if number < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {number}")
    return number


def amount(name: str, value: float, *, positive: bool = False) -> float:
    """`value`, if it is finite and not negative; with `positive` not zero either."""
    try:
        finite = math.isfinite(value)
    except TypeError:
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    except OverflowError:
        raise ValueError(f"{name} must be finite, got a whole number beyond the largest float, 1.8e308") from None
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
