"""What someone else's function may not do while it is timed, and how that shows.

Right on the first call is not right on the calls that are timed. Whether by
mistake or on purpose, a function may remember its last result (`lru_cache`, a
dictionary by `data_ptr`), write into its arguments, return before it has
finished (a thread, an object that computes when it is looked at), or change
what all the others run under. So a function with the role "yours" is verified
four times: its first result; one of the timed results, drawn at random (where
each call goes on from the last, against the reference's of the same round); its
inputs, against a copy; and a last result, after the values in those same inputs
have been changed.

A cache that compares the contents of its inputs is not seen, and code that sets
out to deceive shares a process with the clock: this is no sandbox.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch

SCALAR = (int, float, complex, bool, str, bytes, type(None), np.generic)


class Snapshot:
    """The values of a benchmark's inputs: whether they are still those, other ones in their place, and back again.

    Looks into lists, tuples, dictionaries and, at the top, a dataclass; at tensors, arrays, text and numbers. Anything
    else, such as an index or a model that the benchmark keeps beside its data, is left alone.
    """

    def __init__(self, inputs: Any) -> None:
        self._lists: list[tuple[list[Any], list[Any]]] = []  # each with a copy
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._arrays: list[tuple[Any, Any]] = []
        self._tokens: list[list[list[Any]]] = []  # lists of scalars; those of one outer list together
        self._seen: set[int] = set()
        fields = [getattr(inputs, f.name) for f in dataclasses.fields(inputs)] if _is_record(inputs) else [inputs]
        for value in fields:
            self._take(value)

    def changed(self) -> bool:
        """Whether anything differs from the copy."""
        return not (
            all(_same_items(now, before) for now, before in self._lists)
            and all(
                now.keys() == before.keys() and _same_items([*now.values()], [*before.values()])
                for now, before in self._dicts
            )
            and all(_same_array(now, before) for now, before in self._arrays)
        )

    def restore(self) -> None:
        """Put the values of the copy back, into the same objects."""
        for items, before in self._lists:
            items[:] = before
        for entries, saved in self._dicts:
            entries.clear()
            entries.update(saved)
        for array, copy in self._arrays:
            if isinstance(array, torch.Tensor):
                array.data = copy.clone()  # whatever has become of its shape
            elif array.flags.writeable:
                array[...] = copy

    def shift(self) -> None:
        """Other values of the same kind in the same objects: all move on by one place, and floats grow by a quarter.

        So they keep their ranges (a token stays in the vocabulary, a word a word), their lengths and their addresses.
        """
        for array, _ in self._arrays:
            if isinstance(array, torch.Tensor):
                moved = array.detach().flatten().roll(1).view(array.shape)
                array.detach().copy_(moved * 1.25 if moved.is_floating_point() else moved)
            elif array.flags.writeable:
                moved = np.roll(array, 1)
                array[...] = moved * 1.25 if array.dtype.kind == "f" else moved
        for group in self._tokens:
            flat = list(chain.from_iterable(group))
            moved_on = iter(flat[-1:] + flat[:-1])
            for items in group:
                items[:] = [next(moved_on) for _ in items]

    def _take(self, value: Any) -> bool:
        """Copy what this holds; whether it holds any data."""
        if isinstance(value, SCALAR):
            return True
        if id(value) in self._seen:
            return True
        if isinstance(value, torch.Tensor | np.ndarray):
            self._seen.add(id(value))
            self._arrays.append((value, finished(value)))
            return True
        if isinstance(value, list | tuple):
            self._seen.add(id(value))
            if isinstance(value, list):
                self._lists.append((value, list(value)))
            groups = [item for item in value if isinstance(item, list) and _is_flat(item)]
            if groups:
                self._tokens.append(groups)
                self._lists += [(item, list(item)) for item in groups]
                self._seen |= set(map(id, groups))
            elif isinstance(value, list) and _is_flat(value):
                self._tokens.append([value])
                return True
            holds = [self._take(item) for item in value]  # all of them, not up to the first
            return any(holds)
        if isinstance(value, dict):
            self._seen.add(id(value))
            holds = [self._take(item) for item in value.values()]
            if any(holds):  # a store of indexes, which the benchmark itself adds to, has none
                self._dicts.append((value, dict(value)))
            return any(holds)
        return False


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _is_flat(items: list[Any]) -> bool:
    return bool(items) and isinstance(items[0], SCALAR)


def _same_items(now: list[Any], before: list[Any]) -> bool:
    if len(now) != len(before):
        return False
    return all(a is b or (isinstance(a, SCALAR) and type(a) is type(b) and a == b) for a, b in zip(now, before))


def _same_array(now: Any, before: Any) -> bool:
    if isinstance(now, np.ndarray):
        return now.shape == before.shape and np.array_equal(now, before, equal_nan=now.dtype.kind in "fc")
    if now.shape != before.shape or now.dtype != before.dtype:
        return False
    same = now.detach() == before
    return bool(same.all()) or bool((same | (now.detach().isnan() & before.isnan())).all())


def finished(value: Any) -> Any:
    """A copy of a result as it is at this moment: what a thread still writes into it comes too late."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(map(finished, value))
    if isinstance(value, dict):
        return {key: finished(item) for key, item in value.items()}
    return value


def unfinished(got: Any, want: Any) -> str | None:
    """What is wrong with the kind of a result: it is no number, array or tensor, where the reference's is."""
    odd = _odd(got)
    if odd is None or _odd(want) is not None:
        return None
    return f"returned {'an' if odd[0] in 'AEIOUaeiou' else 'a'} {odd}, expected plain tensors, arrays or numbers"


def _odd(value: Any) -> str | None:
    """The type of the first thing in a result that may still have something to compute, or None."""
    if isinstance(value, list | tuple):
        return next(filter(None, map(_odd, value)), None)
    if isinstance(value, dict):
        return next(filter(None, map(_odd, value.values())), None)
    plain = isinstance(value, SCALAR) or type(value) in (torch.Tensor, torch.nn.Parameter, np.ndarray)
    return None if plain else type(value).__name__


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What all implementations run under, and none may change: it would speed up or slow down the others too."""

    threads: int
    numba_threads: int
    gradients: bool
    dtype: torch.dtype

    @classmethod
    def now(cls) -> Surroundings:
        """As they are at this moment."""
        import numba

        return cls(torch.get_num_threads(), numba.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype())

    def changed(self) -> str | None:
        """What is not as it was, in words."""
        now = Surroundings.now()
        names: Mapping[str, str] = {
            "threads": "torch's number of threads",
            "numba_threads": "numba's number of threads",
            "gradients": "whether torch records gradients",
            "dtype": "torch's default dtype",
        }
        return next((text for name, text in names.items() if getattr(now, name) != getattr(self, name)), None)

    def restore(self) -> None:
        """As they were."""
        import numba

        torch.set_num_threads(self.threads)
        numba.set_num_threads(self.numba_threads)
        torch.set_grad_enabled(self.gradients)
        torch.set_default_dtype(self.dtype)
