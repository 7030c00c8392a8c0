"""An exercise that runs on several ranks: someone's code in each of them, and what went wrong in their terms.

A case starts n processes (`mlsys.parallel.launch`) and runs the implementation in each. What only one rank does wrong
leaves the others waiting for it, so whatever is raised in a rank ends the case at once, and a silence ends it after
`TIMEOUT_S`. The wrong variants are the library's own and known not to hang: all of them run in one launch, and its
results serve both the test that they fail and the search for a hint.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mlsys.contracts.core import Case, Contract, Inputs, Mismatch, Results, Wrong, as_array, source_file
from mlsys.loading import one_line, raised_at
from mlsys.parallel.launcher import LaunchError, launch

TIMEOUT_S = 30.0  # a case takes a second; a rank that waits for another would wait for ever
WRONG_TIMEOUT_S = 300.0  # for all wrong variants one after the other, on a busy machine
Work = Callable[[Callable[..., Any], Inputs, Any, int], Results]
Compare = Callable[[Inputs, np.ndarray, np.ndarray, float], str | None]


@dataclass(frozen=True, eq=False)
class Exercise:
    """What a student is asked to write, and how it is checked.

    signature: as a student would write it.
    reference: the library's own, imported when it is called.
    cases:     settings; `n` ranks, of which `members` (all, if it is not there) call the implementation as a group.
    inputs:    (case, seed) → NumPy arrays and plain values, the same on every rank.
    work:      (implementation, inputs, group, rank in the group) → what this rank found; runs in the ranks.
    oracle:    inputs → the results of all members, stacked.
    tolerance: (inputs, result, oracle's value) → largest absolute error allowed.
    wrong:     named wrong variants; none of them may hang.
    finish:    the stacked results → more of them, which compare ranks.
    incidental: as of `Contract`.
    """

    signature: str
    reference: Callable[..., Any]
    cases: Sequence[Case]
    inputs: Callable[[Case, int], Inputs]
    work: Work
    oracle: Callable[[Inputs], Mapping[str, np.ndarray]]
    tolerance: Callable[[Inputs, str, np.ndarray], float]
    wrong: Mapping[str, Wrong]
    compare: Mapping[str, Compare] = field(default_factory=dict)
    finish: Callable[[Results], Results] = dict
    incidental: Sequence[str] = ()

    def contract(self, name: str) -> Contract:
        """The contract of the technique `name`."""
        return Contract(
            name=name,
            signature=self.signature,
            reference=self.reference,
            cases=self.cases,
            inputs=self._inputs,
            call=self._call,
            oracle=lambda inputs: _expected(self, pickle.dumps(inputs)),
            tolerance=self.tolerance,
            wrong=self.wrong,
            compare=self.compare,
            incidental=self.incidental,
        )

    def _inputs(self, case: Case, seed: int, device: str) -> Inputs:
        members = case.get("members", tuple(range(case["n"])))
        return {"ranks": case["n"], "members": members, **self.inputs(case, seed)}

    def _call(self, impl: Callable[..., Any], inputs: Inputs) -> Results:
        for name, wrong in self.wrong.items():
            if impl is wrong.impl:
                outcome = _all_wrong(self, pickle.dumps(inputs))[name]
                if isinstance(outcome, str):
                    raise Mismatch(outcome)
                return outcome
        return self.finish(_stacked(_launched(impl, self.work, inputs)))


def seats(inputs: Inputs) -> int:
    """How many ranks call the implementation."""
    return len(inputs["members"])


def numbers(value: Any) -> np.ndarray:
    """What a rank sends back: a tensor as float64, whatever it was."""
    return as_array(value)


def _stacked(found: Sequence[Results]) -> Results:
    return {name: np.stack([one[name] for one in found]) for name in found[0]}


@lru_cache(maxsize=32)
def _expected(exercise: Exercise, inputs: bytes) -> Mapping[str, np.ndarray]:
    """The oracle's results: a search for a hint asks for them once for each wrong variant."""
    return exercise.oracle(pickle.loads(inputs))


@lru_cache(maxsize=32)
def _all_wrong(exercise: Exercise, inputs: bytes) -> dict[str, Results | str]:
    """For each wrong variant its results in this case, or the message of what it raised."""
    given: Inputs = pickle.loads(inputs)
    impls = {name: wrong.impl for name, wrong in exercise.wrong.items()}
    found = launch(_each_in_rank, given["ranks"], impls, exercise.work, given, timeout=WRONG_TIMEOUT_S)
    members = [found[rank] for rank in given["members"]]
    outcomes: dict[str, Results | str] = {}
    for name in impls:
        raised = [one[name] for one in members if isinstance(one[name], str)]
        outcomes[name] = raised[0] if raised else exercise.finish(_stacked([one[name] for one in members]))
    return outcomes


def _each_in_rank(impls: Mapping[str, Callable[..., Any]], work: Work, inputs: Inputs) -> dict[str, Results | str]:
    outcomes: dict[str, Results | str] = {}
    for name, impl in impls.items():
        try:
            outcomes[name] = _member(impl, work, inputs)
        except Exception as error:
            outcomes[name] = f"raised {one_line(error)}"
    return outcomes


def _launched(impl: Callable[..., Any], work: Work, inputs: Inputs) -> list[Results]:
    """What each member found; Mismatch for whatever went wrong in one of them."""
    try:
        found = launch(_in_rank, inputs["ranks"], impl, work, source_file(impl), inputs, timeout=TIMEOUT_S)
    except LaunchError as error:
        raise Mismatch(_told(error)) from None
    except TypeError as error:
        raise Mismatch(f"cannot be sent to the ranks: {one_line(error.__cause__ or error)}") from None
    return [found[rank] for rank in inputs["members"]]


def _in_rank(impl: Callable[..., Any], work: Work, file: Path | None, inputs: Inputs) -> Results:
    try:
        return _member(impl, work, inputs)
    except Mismatch as broken:
        raise Told(str(broken)) from None
    except (Exception, SystemExit) as error:
        where = raised_at(error, file) if file else None
        raise Told(f"raised {one_line(error)}" + (f", at {where}" if where else "")) from None


def _member(impl: Callable[..., Any], work: Work, inputs: Inputs) -> Results:
    members = list(inputs["members"])
    everyone = members == list(range(inputs["ranks"]))
    group = None if everyone else dist.new_group(members)
    rank = dist.get_rank()
    found = work(impl, inputs, group, members.index(rank)) if rank in members else {}
    dist.barrier()  # whoever is done first must not close connections that others still use
    return {name: numbers(value) for name, value in found.items()}


class Told(RuntimeError):
    """What went wrong in a rank, already in words: for the launcher still the error that it was, such as gloo's."""


def _told(error: LaunchError) -> str:
    """A failed launch in a line: what the rank told, or how the launcher puts it."""
    if isinstance(error.__cause__, Told):
        told = str(error.__cause__)
        return f"rank {error.rank} {told}" if told.startswith("raised") else f"rank {error.rank}: {told}"
    return "; ".join(line.strip() for line in str(error).partition("\n\n")[0].splitlines())


def tensor(array: np.ndarray, dtype: str | torch.dtype = torch.float64) -> torch.Tensor:
    """A tensor of its own memory with these values."""
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return torch.tensor(array).to(kind)
