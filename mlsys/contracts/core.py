"""What "correct" means for a technique, for any implementation of it.

A contract is a value: cases, how their inputs are drawn, an oracle in float64,
a tolerance, and the *wrong variants*: implementations with one named mistake
each, which the contract must reject. One contract serves four doors: the
library's own tests, `mlsys check`, `mlsys bench --impl`, and grading.

The wrong variants do two jobs. They show that the check can fail; and when a
student's version fails, the variant that computes the same wrong numbers names
the mistake: "behaves like `no_scale`: divide the scores by √d".

Cost:
    Each case runs once. After a failure, the wrong variants run on the case that failed; if
    several behave alike there, they and the implementation also run on a few of the others.

Papers:
    DeMillo, Lipton & Sayward 1978, "Hints on Test Data Selection" (mutants as the test of a test).

See also:
    `mlsys.contracts.isolate` (the same check in a process that can be killed).
"""

from __future__ import annotations

import inspect
import math
import reprlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlsys.loading import one_line, raised_at

Case = Mapping[str, Any]  # plain settings, so that a case prints as what it is
Inputs = dict[str, Any]  # argument name → tensor, array or plain value
Results = dict[str, Any]  # "out", "q.grad", "scores" … → tensor or array

HINT_CASES = 8  # how many more cases may decide between wrong variants that behave alike on the one that failed


class Mismatch(Exception):
    """An implementation broke the contract in a way that is not a number: the message says how."""


@dataclass(frozen=True)
class Wrong:
    """An implementation with one mistake, and what to tell someone who made it."""

    impl: Callable[..., Any]
    hint: str


@dataclass(frozen=True)
class Failure:
    """The first case that an implementation got wrong."""

    case: dict[str, Any]
    shapes: dict[str, str]
    message: str
    like: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        lines = [f"case    {', '.join(f'{k}={v}' for k, v in self.case.items())}"]
        lines += [f"inputs  {', '.join(f'{k} {v}' for k, v in self.shapes.items())}"] if self.shapes else []
        lines += [f"got     {self.message}"]
        lines += [f"hint    behaves like the wrong variant `{self.like}`: {self.hint}"] if self.like else []
        return "\n".join(lines)


@dataclass(frozen=True)
class Verdict:
    """What `check` found: `passed`, or the first `failure`."""

    contract: str
    cases: int
    failure: Failure | None = None
    seconds: float = field(default=0.0, compare=False)

    @property
    def passed(self) -> bool:
        return self.failure is None

    def __str__(self) -> str:
        if self.failure is None:
            return f"{self.contract}: pass ({self.cases} cases in {self.seconds:.1f} s)"
        return f"{self.contract}: FAIL\n{self.failure}"


def numeric(inputs: Inputs, got: np.ndarray, want: np.ndarray, tolerance: float) -> str | None:
    """What is wrong with `got`, or None: same shape, same NaNs and infinities, largest error within `tolerance`."""
    if got.shape != want.shape:
        return f"shape {got.shape}, expected {want.shape}"
    if not want.size:
        return None
    error = difference(got, want)
    worst = np.unravel_index(int(np.argmax(error)), error.shape)
    if error[worst] <= tolerance:
        return None
    at = f" at [{', '.join(str(int(i)) for i in worst)}]" if worst else ""
    wrong = int((~(error <= tolerance)).sum())
    return (
        f"largest error {error[worst]:.3g}{at}: {got[worst]:.6g}, expected {want[worst]:.6g} "
        f"(tolerance {tolerance:.2g}; {wrong} of {error.size} elements are off)"
    )


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a − b| for each element: 0 where both are NaN or the same infinity, inf where only one is."""
    a, b = _wide(a), _wide(b)
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.abs(a - b)
    alike = (a == b) | (np.isnan(a) & np.isnan(b))
    return np.where(alike, 0.0, np.where(np.isfinite(a) & np.isfinite(b), gap, math.inf))


def _wide(array: np.ndarray) -> np.ndarray:
    """As float64 or complex128: unsigned integers would wrap around when subtracted, and booleans refuse."""
    return array if array.dtype.kind == "c" else array.astype(np.float64)


@dataclass(frozen=True)
class Contract:
    """What a technique must compute.

    name:       "attention.flash", the technique's name in `mlsys list`.
    signature:  one line that a student's callable must answer to.
    reference:  the library's own implementation.
    cases:      plain settings, simple ones first: the first failing case is what a student sees.
    inputs:     (case, seed, device) → named inputs, the same for the same seed.
    call:       (implementation, inputs) → named results; may raise `Mismatch`.
    oracle:     inputs → the same results, float64.
    tolerance:  (inputs, result name, oracle's result) → largest absolute error allowed.
    wrong:      named wrong variants; each must fail at least one case.
    compare:    (inputs, got, want, tolerance) → what is wrong, or None.
    incidental: results in which two right implementations may differ widely, and so two with the same mistake: they do
                not count when an implementation is likened to a wrong variant, unless nothing else is wrong with it.
    """

    name: str
    signature: str
    reference: Callable[..., Any]
    cases: Sequence[Case]
    inputs: Callable[[Case, int, str], Inputs]
    call: Callable[[Callable[..., Any], Inputs], Results]
    oracle: Callable[[Inputs], Mapping[str, np.ndarray]]
    tolerance: Callable[[Inputs, str, np.ndarray], float]
    wrong: Mapping[str, Wrong]
    compare: Mapping[str, Callable[[Inputs, np.ndarray, np.ndarray, float], str | None]] = field(default_factory=dict)
    incidental: Sequence[str] = ()

    def verify(self, inputs: Inputs, got: Results, *, aside: Sequence[str] = ()) -> str | None:
        """The first thing wrong with these results, or None; those named in `aside` are not looked at."""
        for name, value in self.oracle(inputs).items():
            if name in aside:
                continue
            if name not in got:
                return f"no result {name!r}"
            want = np.asarray(value)
            compare = self.compare.get(name, numeric)
            problem = compare(inputs, as_array(got[name]), want, self.tolerance(inputs, name, want))
            if problem:
                return f"{name}: {problem}"
        return None


def check(
    contract: Contract,
    impl: Callable[..., Any],
    *,
    seed: int = 0,
    device: str = "cpu",
    on_case: Callable[[int, Case], None] | None = None,
    on_failure: Callable[[Failure], None] | None = None,
) -> Verdict:
    """Run every case of `contract` on `impl`, up to the first that fails.

    Inputs are drawn anew for each case from `seed`, and must come back unchanged; a second call must leave the result
    of the first as it is.
    `on_case(index, case)` is called before each case (progress, or a watchdog's mark);
    `on_failure(failure)` as soon as one has failed, before the search for a hint.
    An exception or `sys.exit` in `impl` is a failure of that case; KeyboardInterrupt passes through.
    """
    started = time.perf_counter()
    for index, case in enumerate(contract.cases):
        if on_case:
            on_case(index, case)
        kept: dict[str, Any] = {}
        got, conduct = _run(contract, impl, index, seed, device, kept)
        problem = conduct if got is None or conduct else contract.verify(_inputs(contract, index, seed, device), got)
        if index == 0 and got is not None and not problem:
            problem = conduct = _overwritten(contract, impl, seed, device, got, kept)
        if problem:
            failure = Failure(dict(case), shapes(_inputs(contract, index, seed, device)), problem)
            if on_failure:
                on_failure(failure)
            like = None if got is None else _alike(contract, impl, index, got, conduct, seed, device)
            if like:
                failure = Failure(failure.case, failure.shapes, problem, like, contract.wrong[like].hint)
            return Verdict(contract.name, index + 1, failure, time.perf_counter() - started)
    return Verdict(contract.name, len(contract.cases), None, time.perf_counter() - started)


def _inputs(contract: Contract, index: int, seed: int, device: str) -> Inputs:
    return contract.inputs(contract.cases[index], seed + index, device)


def _run(
    contract: Contract, impl: Callable[..., Any], index: int, seed: int, device: str, kept: dict[str, Any] | None = None
) -> tuple[Results | None, str | None]:
    """One case: the results (None if there are none), and what broke the contract before any number was looked at.

    kept: gets the results as they were returned.
    """
    inputs = _inputs(contract, index, seed, device)
    try:
        got = contract.call(impl, inputs)
        arrays = {name: np.array(_result(name, value)) for name, value in got.items()}
        if kept is not None:
            kept |= got
    except Mismatch as broken:
        return None, str(broken)
    except (Exception, SystemExit) as error:  # whatever someone's code raises is an answer, not a crash of the check
        file = source_file(impl)
        where = raised_at(error, file) if file else None
        told = f", at {where}" if where else ""
        if isinstance(error, TypeError) and file and not where:  # on the way in or out
            told = f"; it is called as {contract.signature}"
        return None, f"raised {one_line(error)}{told}"
    fresh = _inputs(contract, index, seed, device)
    changed = [name for name in fresh if not unchanged(fresh[name], inputs[name])]
    return arrays, f"modified its argument {', '.join(changed)} in place" if changed else None


def _overwritten(
    contract: Contract, impl: Callable[..., Any], seed: int, device: str, first: Results, kept: Mapping[str, Any]
) -> str | None:
    """What is wrong if a second call, with other numbers, changes the tensors that the first returned."""
    tensors = {name: value for name, value in kept.items() if hasattr(value, "detach")}
    if not tensors:
        return None
    _run(contract, impl, 0, seed + 1, device)
    changed = [name for name, value in tensors.items() if not unchanged(first[name], _result(name, value))]
    if not changed:
        return None
    return f"a second call changes what the first returned ({', '.join(changed)}): return new memory each time"


def _alike(
    contract: Contract,
    impl: Callable[..., Any],
    index: int,
    got: Results,
    conduct: str | None,
    seed: int,
    device: str,
) -> str | None:
    """The wrong variant that computes what `impl` does, if one does on the case that failed.

    It must break the contract in the same way, and where that is by its numbers, leave at most half of
    the error unexplained: where the tolerance is wide, something less wrong is within it by chance.
    If several do (on a small case many mistakes look the same), the one that agrees with `impl` on
    the most of the other cases, then the nearest.
    """
    aside = contract.incidental
    if aside and not conduct and not contract.verify(_inputs(contract, index, seed, device), got, aside=aside):
        aside = ()  # what is wrong is one of these

    def telling(results: Results) -> Results:
        return {name: value for name, value in results.items() if name not in aside}

    want, allowed = _expected(contract, _inputs(contract, index, seed, device))
    most = 1.0 if conduct else min(1.0, _distance(telling(got), want, allowed, shared=True) / 2)
    distances = {}
    for name, wrong in contract.wrong.items():
        theirs, problem = _run(contract, wrong.impl, index, seed, device)
        if theirs is None or problem != conduct:
            continue
        distance = _distance(telling(got), telling(theirs), allowed)
        if distance <= most and (conduct or contract.verify(_inputs(contract, index, seed, device), theirs)):
            distances[name] = distance
    if len(distances) < 2:
        return next(iter(distances), None)

    agreed = dict.fromkeys(distances, 0)
    others = [other for other in range(len(contract.cases)) if other != index]
    for other in others[:: max(1, math.ceil(len(others) / HINT_CASES))]:
        mine, _ = _run(contract, impl, other, seed, device)
        if mine is None:
            continue
        _, allowed = _expected(contract, _inputs(contract, other, seed, device))
        for name in agreed:
            theirs, _ = _run(contract, contract.wrong[name].impl, other, seed, device)
            agreed[name] += theirs is not None and _distance(telling(mine), telling(theirs), allowed) <= 1.0
    return max(distances, key=lambda name: (agreed[name], -distances[name]))


def _expected(contract: Contract, inputs: Inputs) -> tuple[Results, dict[str, float]]:
    """The oracle's results, and by how much two right ones may differ."""
    want: Results = {name: np.asarray(value) for name, value in contract.oracle(inputs).items()}
    return want, {name: 2 * contract.tolerance(inputs, name, value) for name, value in want.items()}


def _distance(a: Results, b: Results, allowed: Mapping[str, float], *, shared: bool = False) -> float:
    """The largest difference between two results of a case, in units of what is allowed; inf if they differ in kind.

    `shared`: look only at the results that both have.
    """
    if a.keys() != b.keys() and not shared:
        return math.inf
    distance = 0.0
    for name in a.keys() & b.keys():
        if a[name].shape != b[name].shape:
            return math.inf
        gap = float(difference(a[name], b[name]).max(initial=0.0))
        if gap > 0:
            distance = max(distance, gap / allowed[name] if allowed.get(name, 0.0) > 0 else math.inf)
    return distance


def source_file(impl: Callable[..., Any]) -> Path | None:
    """The file that an implementation is written in, if it is written in Python."""
    while isinstance(impl, partial):
        impl = impl.func
    impl = inspect.unwrap(impl)
    code = getattr(impl, "__code__", None)
    if code is not None:
        return Path(code.co_filename)
    owner = impl if inspect.isclass(impl) else type(impl)
    file = getattr(sys.modules.get(owner.__module__), "__file__", None)
    return Path(file) if file else None


def _result(name: str, value: Any) -> np.ndarray:
    try:
        return as_array(value)
    except Mismatch as broken:
        raise Mismatch(f"{name}: {broken}") from None


def as_array(value: Any) -> np.ndarray:
    """A tensor, array or nested list as a NumPy array: floats as float64, integers as they are.

    Mismatch for anything else: None, a ragged list, text.
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.double().numpy() if value.is_floating_point() else value.numpy()
    try:
        array = np.asarray(value)
    except ValueError:  # a list whose rows differ in length
        raise Mismatch(f"{_kind(value)} is not a rectangular array of numbers") from None
    if array.dtype.kind not in "biufc":
        raise Mismatch(f"{_kind(value)} is not a rectangular array of numbers")
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def _kind(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {reprlib.repr(value)}"


def accepts(impl: Callable[..., Any], tensors: int, options: Mapping[str, Any], signature: str) -> None:
    """Mismatch, with the signature that is wanted, if `impl` cannot take so many tensors and these options."""
    try:
        inspect.signature(impl).bind(*[None] * tensors, **options)
    except TypeError as error:
        raise Mismatch(f"cannot be called as {signature}: {error}") from None
    except ValueError:
        return  # a builtin that does not tell its signature


def unchanged(before: Any, after: Any) -> bool:
    """Whether two inputs hold the same values (NaN equals NaN); what cannot be compared counts as unchanged."""
    if hasattr(before, "detach") or isinstance(before, np.ndarray):
        a, b = as_array(before), as_array(after)
        return a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=a.dtype.kind in "fc"))
    if isinstance(before, list | tuple):
        return len(before) == len(after) and all(map(unchanged, before, after))
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(unchanged(before[key], after[key]) for key in before)
    if "__eq__" not in {
        name for kind in type(before).__mro__[:-1] for name in vars(kind)
    }:  # two draws of a model or a generator are never equal
        return True
    return bool(before == after) or (before != before and after != after)


def shapes(inputs: Inputs) -> dict[str, str]:
    """Each array input's shape and dtype, for messages; small plain values as they are."""
    found = {}
    for name, value in inputs.items():
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            found[name] = f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        elif isinstance(value, list | tuple):
            found[name] = f"{len(value)} items"
        else:
            found[name] = reprlib.repr(value)
    return found
