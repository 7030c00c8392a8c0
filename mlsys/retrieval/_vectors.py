"""What all vector indexes share: the verbs, the checks at the public door, ids, filters, and saving.

An index holds vectors under ids that the caller chooses (or 0, 1, 2, … in order of
arrival). A technique implements a few private methods on *rows*, 0 … n−1 in order
of arrival; everything about ids, metrics, bad input and files is here, once.

    metric     distance of q and x, smaller is nearer      remarks
    "l2"       Σ (q_i − x_i)²                              squared: the root changes no ranking
    "ip"       −Σ q_i x_i                                  maximum inner product; no metric in the mathematical sense
    "cosine"   1 − Σ q_i x_i / (‖q‖ ‖x‖)                   vectors are stored with length 1; a zero vector is refused

Results are `(distances, ids)`, float32 and int64, both (n_queries, k), nearest
first; equal distances are ordered by id, smallest first; with fewer than k hits
the row is filled with id −1 and distance ∞.

See also:
    `_index_file` (the files), `exact`, `ivf`, `pq`, `ivfpq`, `hnsw` (the techniques).
"""

from __future__ import annotations

import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any, ClassVar, Self

import numpy as np

from mlsys.retrieval import _index_file
from mlsys.retrieval._memory import Growing

METRICS = ("l2", "ip", "cosine")
LARGEST = 1e15  # squares of larger numbers, summed, come near the end of float32
MOST_ID = 2**63 - 2
Filter = Callable[[np.ndarray], np.ndarray] | np.ndarray  # ids (n,) → bool (n,), or a mask beside `index.ids`


class Index(ABC):
    """Vectors under ids, and a search for the nearest: `fit`, `add`, `remove`, `search`, `save`, `load`, `len(index)`.

    A technique sets FORMAT and the names of its constructor's arguments in SETTINGS, and implements `_build`,
    `_insert`, `_delete`, `_find`, `_arrays` and `_restore`. They get input that is checked; what they refuse all the
    same (`_build`, too few vectors for its clusters), they refuse before they change anything. The row of a vector is
    its place in order of arrival; `_delete` closes the gaps.
    """

    FORMAT: ClassVar[str]  # of a saved index: "mlsys.exact/1"
    SETTINGS: ClassVar[tuple[str, ...]]  # arguments of the constructor that make the index what it is

    def __init__(self, metric: str = "l2") -> None:
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}")
        self.metric = metric
        self.dim: int | None = None  # None until the first vectors come
        self._ids = np.empty(0, np.int64)  # of each row
        self._next = 0  # the id that the next vector without one gets
        self._rows: dict[int, int] | None = None  # id → row, made when it is first asked for
        self._torn = ""  # the verb that was interrupted while it changed what is here

    # --- the verbs ----------------------------------------------------------------------------------------------------

    def fit(self, x: np.ndarray, ids: np.ndarray | None = None) -> Self:
        """Replace what the index holds by the vectors `x` (n, d), under `ids` (n,), 0 … n−1 if None.

        TypeError or ValueError for what cannot be indexed: the index is then as it was, as it is after Ctrl-C.
        """
        x = self._checked("x", x, None)
        fresh = _checked_ids(ids, len(x), 0)
        before = vars(self).copy()
        try:
            self._build(x)
            self.dim, self._ids, self._rows, self._torn = x.shape[1], fresh, None, ""
            self._next = int(fresh.max(initial=-1)) + 1
        except BaseException:
            self.__dict__ = before
            raise
        return self

    def add(self, x: np.ndarray, ids: np.ndarray | None = None) -> Self:
        """Add the vectors `x` (n, d), or one vector (d,), under `ids`; None counts on from the largest id so far.

        An index without vectors is fitted on them. ValueError for an id that is there already: remove it first.
        If it is interrupted (Ctrl-C) while it changes the index, all but `fit` raise RuntimeError from then on.
        """
        if self.dim is None:
            return self.fit(as_rows(x), ids)
        self._require_vectors()
        x = self._checked("x", as_rows(x), self.dim)
        fresh = _checked_ids(ids, len(x), self._next)
        if ids is not None:
            known = self._row_of
            there = [i for i in fresh.tolist() if i in known]
            if there:
                raise ValueError(f"ids: {_some(there)} already in the index; remove them first, or choose other ids")
        if len(x):
            with self._changing("add"):
                self._insert(x)
                if self._rows is not None:
                    self._rows.update(zip(fresh.tolist(), range(len(self._ids), len(self._ids) + len(x)), strict=True))
                self._stored_ids.append(fresh)
                self._next = max(self._next, int(fresh.max()) + 1)
        return self

    def remove(self, ids: np.ndarray) -> Self:
        """Take the vectors with these ids out. ValueError, and nothing removed, if one is not there or named twice.

        If it is interrupted (Ctrl-C), as `add`.
        """
        self._require_whole()
        gone = _checked_ids(np.atleast_1d(np.asarray(ids)), None, 0)
        known = self._row_of
        missing = [i for i in gone.tolist() if i not in known]
        if missing:
            raise ValueError(f"ids: {_some(missing)} not in the index, which holds {len(self)} vectors; none removed")
        if len(gone):
            rows = np.sort(np.array([known[i] for i in gone.tolist()], np.int64))
            with self._changing("remove"):
                self._delete(rows)
                self._ids, self._rows = np.delete(self._ids, rows), None
        return self

    def search(
        self, queries: np.ndarray, k: int = 10, *, filter: Filter | None = None, **how: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """The `k` nearest vectors of each query: distances float32 and ids int64, both (n_queries, k), nearest first.

        queries: (n_queries, d), or one vector (d,).
        k:       how many, ≥ 1. With fewer hits the row ends in id −1 and distance ∞.
        filter:  only vectors for which it is True: a function of ids int64 (n,) that gives bool (n,), or such a mask
                 beside `index.ids`.
        how:     what the technique lets one choose for each search, as `ef` of HNSW.

        Raises TypeError or ValueError for anything else; the index is never changed, and several threads may search it.
        """
        self._require_vectors()
        queries = self._checked("queries", as_rows(queries), self.dim)
        k = whole("k", k, 1)
        allowed = None if filter is None else self._mask(filter)
        distances, ids = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        distances.fill(np.inf)
        ids.fill(-1)
        how = self._options(k, **how)
        if len(self) and len(queries) and (allowed is None or allowed.any()):
            self._find(queries, k, allowed, distances, ids, **how)
        return distances, ids

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Save the index in `folder` (safetensors and JSON), in place of one of its kind there: whole, or not at all.

        ValueError if it holds no vectors yet, or if the folder has an index.json of another kind.
        """
        self._require_vectors()
        own = {name: getattr(self, name) for name in self.SETTINGS}
        settings = {**own, "dim": self.dim, "next_id": self._next}
        _index_file.write(folder, self.FORMAT, settings, {"ids": self._ids, **self._arrays()})

    @classmethod
    def load(cls, folder: str | os.PathLike[str], **options: Any) -> Self:
        """The index saved in `folder`. `options`: arguments of the constructor that are not saved, such as `threads`.

        Raises ValueError (IndexFileError) if there is none or a file is damaged; files are left as they are. TypeError
        or ValueError for options that the constructor refuses, or that are not what the index was saved with.
        """
        settings, arrays = _index_file.read(folder, cls.FORMAT)
        for name in options.keys() & settings.keys() & set(cls.SETTINGS):
            if options[name] != settings[name]:
                raise ValueError(
                    f"{name} = {options[name]!r} is not what the index in {folder} was saved with, {settings[name]!r}: "
                    "leave it out, or fit a new index"
                )
            del options[name]
        cls(**options)  # so that what is wrong with them is not put down to the file
        try:
            index = cls(**{name: settings[name] for name in cls.SETTINGS}, **options)
            index.dim = whole("dim", settings["dim"], 1)
            index._next = whole("next_id", settings["next_id"], 0)
            index._ids = _checked_ids(array(arrays, "ids", np.int64, (None,)), None, 0)
            index._restore(arrays)
        except (KeyError, TypeError, ValueError) as error:
            why = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise _index_file.IndexFileError(f"the index in {folder} cannot be used: {why}; save it again") from None
        return index

    def __len__(self) -> int:
        """How many vectors it holds."""
        return len(self._ids)

    @property
    def ids(self) -> np.ndarray:
        """The ids, int64 (n,), in order of arrival; a mask given as `filter` lies beside them."""
        return self._ids.copy()

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that it keeps, ids and room to grow included: what a search needs in memory."""
        return sum(part.nbytes for part in vars(self).values() if hasattr(part, "nbytes"))

    @property
    def _ids(self) -> np.ndarray:
        return self._stored_ids.view

    @_ids.setter
    def _ids(self, ids: np.ndarray) -> None:
        self._stored_ids = Growing(ids)

    # --- what a technique implements ----------------------------------------------------------------------------------

    def _options(self, k: int, **how: Any) -> dict[str, Any]:
        """The search's own options, checked and with their defaults. TypeError for an unknown one."""
        if how:
            raise TypeError(f"{type(self).__name__}.search has no option {', '.join(how)}")
        return how

    @abstractmethod
    def _build(self, x: np.ndarray) -> None:
        """Replace everything by x: float32 (n, d), contiguous, finite; of length 1 if the metric is cosine.

        x may be the caller's own memory: what is kept of it is a copy.
        """

    @abstractmethod
    def _insert(self, x: np.ndarray) -> None:
        """Add x, of the same kind, as rows len(self) …."""

    @abstractmethod
    def _delete(self, rows: np.ndarray) -> None:
        """Take out these rows (ascending, distinct); later rows move up."""

    @abstractmethod
    def _find(
        self,
        queries: np.ndarray,
        k: int,
        allowed: np.ndarray | None,
        distances: np.ndarray,
        ids: np.ndarray,
        **how: Any,
    ) -> None:
        """Fill distances and ids (n_queries, k), which are all ∞ and −1. allowed: bool (n,) by row, or None for all."""

    @abstractmethod
    def _arrays(self) -> dict[str, np.ndarray]:
        """What is saved beside ids; nothing is copied."""

    @abstractmethod
    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """The inverse of `_arrays`; dim and ids are there. ValueError or KeyError for arrays that are none of its own.

        Compiled code must never see rows or offsets that lead nowhere: everything is checked here.
        """

    # --- the checks ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _changing(self, verb: str) -> Iterator[None]:
        """Where arrays are written to: whatever ends it but a refusal, such as Ctrl-C, may leave half of it done."""
        self._torn = verb
        try:
            yield
        except (TypeError, ValueError):
            self._torn = ""
            raise
        self._torn = ""

    def _require_whole(self) -> None:
        if self._torn:
            raise RuntimeError(
                f"{self._torn} was interrupted and may have left this {type(self).__name__} index half changed: "
                "call fit(x) again, or load a saved index"
            )

    def _require_vectors(self) -> None:
        self._require_whole()
        if self.dim is None:
            raise ValueError(f"this {type(self).__name__} index holds no vectors yet: call fit(x) or add(x) first")

    @property
    def _row_of(self) -> dict[int, int]:
        if self._rows is None:
            self._rows = {i: row for row, i in enumerate(self._ids.tolist())}
        return self._rows

    def _checked(self, name: str, x: Any, dim: int | None) -> np.ndarray:
        """Float32 (n, d), contiguous, finite, of length 1 under cosine."""
        x = _as_array(x)
        if x.dtype.kind not in "fiu":
            raise TypeError(f"{name} must hold numbers (float32), got {x.dtype}")
        if x.ndim != 2 or not x.shape[1]:
            raise ValueError(f"{name} must be (n, d) with d ≥ 1, got shape {x.shape}")
        if dim is not None and x.shape[1] != dim:
            raise ValueError(f"{name} must have dimension {dim}, as the vectors in the index, got {x.shape[1]}")
        if x.dtype == np.float32:
            x = np.ascontiguousarray(x)
        else:
            with np.errstate(over="ignore"):  # what does not fit into float32 becomes ∞, which is refused
                x = np.ascontiguousarray(x, np.float32)
        if not np.isfinite(x).all():
            bad = ~np.isfinite(x).all(axis=1)
            row = int(bad.argmax())
            raise ValueError(f"{name}[{row}] holds NaN or infinity (as float32); {int(bad.sum())} such vectors in all")
        if self.metric == "cosine":
            length = np.sqrt(np.einsum("nd,nd->n", x, x, dtype=np.float64))
            if not length.all():
                row = int((length == 0).argmax())
                raise ValueError(
                    f"{name}[{row}] is a zero vector, which has no direction: cosine is not defined for it"
                )
            x = (x / length[:, None]).astype(np.float32)
        return x

    def _mask(self, filter: Filter) -> np.ndarray:
        """The filter as bool (n,), beside the rows."""
        mask = np.asarray(filter(self._ids.copy()) if callable(filter) else filter)
        if mask.dtype != np.bool_ or mask.shape != (len(self),):
            made = "must return" if callable(filter) else "must be"
            raise ValueError(
                f"filter {made} a bool mask ({len(self)},) beside index.ids, got {mask.dtype} {mask.shape}"
            )
        return mask


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """`value` as an int that is at least `least`, and at most `most`. TypeError or ValueError naming the argument."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None
    if number < least or (most is not None and number > most):
        raise ValueError(
            f"{name} must be at least {least}{f' and at most {most}' if most is not None else ''}, got {number}"
        )
    return number


def number(name: str, value: Any) -> float:
    """`value` as a float; NumPy's numbers are some, True and "1" are not. TypeError naming the argument."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def array(arrays: Mapping[str, np.ndarray], name: str, dtype: type, shape: tuple[int | None, ...]) -> np.ndarray:
    """One array of a saved index, if it has this dtype and shape (None: any length). KeyError or ValueError."""
    found = arrays[name]
    fits = len(found.shape) == len(shape) and all(want in (None, n) for want, n in zip(shape, found.shape, strict=True))
    if found.dtype != dtype or not fits:
        wanted = tuple("any" if n is None else n for n in shape)
        raise ValueError(f"{name} is {found.dtype} {found.shape}, expected {np.dtype(dtype)} {wanted}")
    return found


def modest(name: str, x: np.ndarray) -> np.ndarray:
    """`x` if its numbers can be squared in float32. ValueError otherwise."""
    largest = max(float(x.max(initial=0.0)), -float(x.min(initial=0.0)))
    if largest > LARGEST:
        raise ValueError(f"{name} holds {largest:.3g}; distances need numbers up to {LARGEST:g}: scale the data")
    return x


def as_rows(x: Any) -> np.ndarray:
    """`x` as an array; one vector (d,) as (1, d)."""
    x = _as_array(x)
    return x[None] if x.ndim == 1 else x


def _as_array(x: Any) -> np.ndarray:
    return np.asarray(x.detach() if hasattr(x, "detach") else x)  # a tensor with a gradient does not become one else


def _checked_ids(ids: Any, n: int | None, start: int) -> np.ndarray:
    """Distinct int64 ids ≥ 0, n of them; None counts from `start`."""
    if ids is None:
        assert n is not None
        if start + n > MOST_ID + 1:
            raise ValueError(f"ids: counting on from {start - 1} leads beyond 2⁶³ − 2; pass ids for the new vectors")
        return np.arange(start, start + n, dtype=np.int64)
    ids = np.asarray(ids)
    if not ids.size and ids.ndim == 1:
        ids = ids.astype(np.int64)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"ids must be whole numbers (int64), got {ids.dtype}")
    if ids.ndim != 1 or (n is not None and len(ids) != n):
        raise ValueError(f"ids must be ({'n' if n is None else n},), one for each vector, got shape {ids.shape}")
    if ids.size and (ids.min() < 0 or ids.max() > MOST_ID):
        raise ValueError(f"ids must be from 0 to 2⁶³ − 2 (−1 is padding), got {ids.min()} … {ids.max()}")
    ids = ids.astype(np.int64)
    distinct, counts = np.unique(ids, return_counts=True)
    if len(distinct) < len(ids):
        raise ValueError(f"ids must be distinct: {_some(distinct[counts > 1].tolist())} more than once")
    return ids


def _some(ids: list[int]) -> str:
    """A few ids in words: "3, 5 and 12 more are"."""
    few = ", ".join(map(str, ids[:3]))
    return f"{few} is" if len(ids) == 1 else f"{few} are" if len(ids) <= 3 else f"{few} and {len(ids) - 3} more are"
