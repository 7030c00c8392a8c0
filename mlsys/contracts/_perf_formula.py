"""An exercise in cost: a function of plain values whose answer is a few numbers. One record, one contract."""

from __future__ import annotations

import inspect
import numbers
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlsys.contracts.core import Case, Contract, Inputs, Mismatch, Results, Wrong

# As a share of the result: a thousand roundings of float64, each of half a unit. A formula needs ten, a loop a hundred.
ROUNDING = 1024 * 2.0**-53
DRAWN = [{"drawn": i} for i in (1, 2, 3)]  # the last cases: from the seed, so that no table of answers passes


@dataclass(frozen=True)
class Formula:
    """What a student is asked to write, and how it is checked.

    signature: as a student would write it; arguments are passed by position.
    results:   the names of what is returned, in order: a tuple, or a number if there is one.
    reference: the library's function, wrapped to the signature.
    cases:     arguments by name, in the order of the signature; simple ones first.
    draw:      a generator of random numbers → one more case.
    oracle:    the arguments → the results, by counting, enumerating or searching.
    wrong:     named wrong variants.
    relative:  error allowed, as a share of the result; 0 for counts.
    words:     results that are words, with the words that they can be.
    arguments: a case → what is passed, where that is not the case itself.
    measure:   (what is returned, *arguments) → the result, where the one is not the other; may raise `Mismatch`.
    """

    signature: str
    results: tuple[str, ...]
    reference: Callable[..., Any]
    cases: Sequence[Case]
    draw: Callable[[random.Random], Case]
    oracle: Callable[..., Sequence[float | str]]
    wrong: Mapping[str, Wrong]
    relative: float = ROUNDING
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    arguments: Callable[[Case], Inputs] = dict
    measure: Callable[..., Any] | None = None

    def contract(self, name: str) -> Contract:
        """The contract of the technique `name`."""
        return Contract(
            name=name,
            signature=self.signature,
            reference=self.reference,
            cases=[*self.cases, *DRAWN],
            inputs=self._inputs,
            call=self._call,
            oracle=lambda inputs: self._named(self.oracle(*inputs.values())),
            tolerance=lambda inputs, result, want: self.relative * float(np.abs(want).max()),
            wrong=self.wrong,
            compare={result: self._word(result) for result in self.words},
        )

    def _inputs(self, case: Case, seed: int, device: str) -> Inputs:
        return self.arguments(self.draw(random.Random(seed)) if "drawn" in case else case)

    def _call(self, impl: Callable[..., Any], inputs: Inputs) -> Results:
        try:
            inspect.signature(impl).bind(*inputs.values())
        except TypeError as error:
            raise Mismatch(f"cannot be called as {self.signature.partition(' -> ')[0]}: {error}") from None
        except ValueError:
            pass  # a builtin that does not tell its signature
        answer = impl(*inputs.values())
        if self.measure:
            answer = self.measure(answer, *inputs.values())
        if len(self.results) == 1:
            answer = (answer,)
        wanted = f"expected the tuple ({', '.join(self.results)})"
        if not isinstance(answer, tuple | list | np.ndarray):
            raise Mismatch(f"returned {type(answer).__name__}, {wanted}")
        if len(answer) != len(self.results):
            raise Mismatch(f"returned {len(answer)} values, {wanted}")
        return self._named(list(answer))

    def _named(self, answer: Sequence[Any]) -> dict[str, np.ndarray]:
        """Numbers by the names of the results; a word is the number of its place among the words."""
        named = {}
        for result, value in zip(self.results, answer, strict=True):
            if result in self.words:
                if value not in self.words[result]:
                    raise Mismatch(f"{result} is {value!r}, expected {' or '.join(map(repr, self.words[result]))}")
                named[result] = np.asarray(self.words[result].index(value))
                continue
            number = value.item() if isinstance(value, np.ndarray) and value.size == 1 else value
            if not isinstance(number, numbers.Real) or isinstance(number, bool):
                raise Mismatch(f"{result} is {value!r}, expected a number")
            named[result] = np.asarray(float(number))
        return named

    def _word(self, result: str) -> Callable[[Inputs, np.ndarray, np.ndarray, float], str | None]:
        def compare(inputs: Inputs, got: np.ndarray, want: np.ndarray, tolerance: float) -> str | None:
            mine, right = self.words[result][int(got)], self.words[result][int(want)]
            return None if mine == right else f"{mine!r}, expected {right!r}"

        return compare


def wrong(plain: Callable[..., Any], hint: str, **knobs: Any) -> Wrong:
    """A wrong variant: `plain`, a right implementation with one knob for each mistake, with some of them turned."""

    def impl(*arguments: Any) -> Any:
        return plain(*arguments, **knobs)

    return Wrong(impl, hint)
