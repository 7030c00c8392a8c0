"""One case on trial: every implementation is called, checked, timed with the others, and the user's looked at again.

What goes wrong has someone to blame. An exception of ours or of a peer's is a crash of the benchmark. A function with
the role "yours" is trusted less: what it raises, computes wrongly, or does that it may not (`mlsys.bench.suspect`) is a
`Refused` that names it, after which the trial goes on without it. On several ranks (`mlsys.bench.ranks`) all come to
the same end: what one of them finds is shared with the others. Only where the function raises on one rank, the others
may be waiting for it within a collective and cannot be told; then `RaisedOnRank` ends them all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mlsys.bench.memory import peak_bytes
from mlsys.bench.timing import Everyone, Sample, alone, interleave
from mlsys.loading import one_line, raised_at

if TYPE_CHECKING:
    from mlsys.bench.core import Benchmark, Case
    from mlsys.bench.suspect import Snapshot, Surroundings


class RaisedOnRank(Exception):
    """On one of several ranks the user's function raised: the others wait for it in vain, so that all have to end."""

    def __init__(self, name: str, note: str) -> None:
        super().__init__(name, note)
        self.name, self.note = name, note


class Refused(Exception):
    """An implementation is out of this case: as what, and why, for its record."""

    def __init__(self, name: str, status: Literal["wrong", "failed"], note: str, error: float | None = None) -> None:
        super().__init__(note)
        self.name, self.status, self.note, self.error = name, status, note, error


@dataclass
class Trial:
    """A case while it is measured: its inputs, who is ready to run on them, and an eye on the user's functions."""

    bench: Benchmark
    case: Case
    device: str
    watch: Callable[[str], None]
    inputs: Any
    everyone: Everyone = alone
    calls: dict[str, Callable[[], Any]] = field(default_factory=dict)
    want: Any = None  # the reference's result
    snapshot: Snapshot | None = None  # of the inputs, made when someone else's function is about to get them
    surroundings: Surroundings | None = None

    def start(self, name: str) -> tuple[float, dict[str, float], dict[str, list[Any]]]:
        """Prepare it and call it once: its error, which is small enough, figures and series. From now in `calls`."""
        from mlsys.bench.suspect import Snapshot, Surroundings, finished  # torch, which reading records does without

        if self._suspect(name) and self.snapshot is None:
            self.snapshot, self.surroundings = Snapshot(self.inputs), Surroundings.now()
        with self._blaming(name):
            call = self._prepared(name)
            got = call()
        if name == self.bench.reference:
            self.want = finished(got) if _reset(call) else got  # in place, the next call writes over it
        result = finished(got) if self._suspect(name) else got
        self._undisturbed(name)
        error = self._error(name, result, self.want)
        with self._blaming(name):
            figures = self.bench.figures(self.case, self.inputs, got)
            series = self.bench.series(self.case, self.inputs, got)
        self.calls[name] = call
        return error, figures, series

    def refuse(self, name: str) -> None:
        """It takes no further part, and what it has changed is put back."""
        self.calls.pop(name, None)
        if self._suspect(name) and self.snapshot and self.surroundings:
            self.snapshot.restore()
            self.surroundings.restore()

    def time(self, budget_s: float) -> tuple[dict[str, Sample], dict[str, int]]:
        """Times and peak memory of all in `calls`, and a second look at the results and doings of the user's."""
        from mlsys.bench.suspect import finished

        if not self.calls:
            return {}, {}
        suspects = [name for name in self.calls if self._suspect(name)]
        kept = dict.fromkeys(name for name in suspects if not _reset(self.calls[name]))
        if self.bench.stateful and suspects:  # the reference's result of the very same round is what theirs should be
            kept[self.bench.reference] = None
            for name in self.calls:  # from the start, for after a refusal some have been called more often than others
                with self._blaming(name):
                    self.calls[name] = self._prepared(name)
        turn = [""]

        def before(name: str) -> None:
            turn[0] = name
            self.watch(name)
            if reset := _reset(self.calls[name]):
                reset()

        with self._blaming(turn):
            samples = interleave(
                self.calls,
                budget_s=budget_s,
                max_repeats=1 if self.bench.stateful else 1000,
                device=self.device,
                before=before,
                keep=kept,
                everyone=self.everyone,
            )
        for name in suspects:
            self._undisturbed(name)
            want = kept[self.bench.reference] if self.bench.stateful else self.want
            if name in kept:
                self._error(name, kept[name], want, "while it was timed: ")
            else:
                with self._blaming(name):
                    again = finished(self._again(name))
                self._error(name, again, want, "after it was timed: ")
            self._not_remembered(name)
        peaks = {}
        for name, call in self.calls.items() if self.bench.memory else ():
            with self._blaming(name):
                peaks[name] = max(self.everyone(peak_bytes(call, self.device)))
        return samples, peaks

    def _not_remembered(self, name: str) -> None:
        """Change the values in the very inputs it knows: its results must follow."""
        from mlsys.bench.suspect import finished

        assert self.snapshot is not None
        self.snapshot.shift()
        try:
            with self._blaming(self.bench.reference):
                want = self._again(self.bench.reference)
            with self._blaming(name):
                got = finished(self._again(name))
            self._error(name, got, want, "with other values in the same inputs (does it remember its results?): ")
        finally:
            self.snapshot.restore()

    def _again(self, name: str) -> Any:
        """One more result from the same inputs; where it depends on earlier calls, that of a first one."""
        if reset := _reset(self.calls[name]):
            reset()
        return self._prepared(name)() if self.bench.stateful else self.calls[name]()

    def _prepared(self, name: str) -> Callable[[], Any]:
        """A call of it that nothing has come before."""
        return self.bench.prepare(self.bench.impls[name].load(), self.case, self.inputs)

    def _error(self, name: str, got: Any, want: Any, when: str = "") -> float:
        """The error of a result, if that is small enough."""
        from mlsys.bench.suspect import unfinished

        if self._suspect(name) and (odd := self._any(unfinished(got, want))):
            raise Refused(name, "wrong", when + odd)
        with self._blaming(name):
            mine, allowed = self.bench.verify(self.case, self.inputs, got, want)
        # The worst of all: of those that are too large, else of those that are not; and a NaN is the largest.
        bad, _, error, allowed = max(self.everyone((not mine <= allowed, mine != mine, mine, allowed)))
        if bad:
            raise Refused(name, "wrong", f"{when}error {error:.3g} is above the {allowed:.2g} allowed", error)
        return float(error)

    def _any(self, what: str | None) -> str | None:
        """What was found, here or by another rank: all of them come to the same end."""
        return next(filter(None, self.everyone(what)), None)

    def _undisturbed(self, name: str) -> None:
        """What the user's function shares with the others must be as it was."""
        if not self._suspect(name):
            return
        assert self.snapshot is not None
        assert self.surroundings is not None
        if what := self._any(self.surroundings.changed()):
            raise Refused(name, "wrong", f"changed {what}, for the others too")
        if what := self._any("modified its inputs in place" if self.snapshot.changed() else None):
            raise Refused(name, "wrong", what)

    def _suspect(self, name: str) -> bool:
        return self.bench.impls[name].role == "yours"

    @contextlib.contextmanager
    def _blaming(self, name: str | list[str]) -> Iterator[None]:
        """An exception in here is this one's (of a list: whoever stands in it by then); one of ours passes through."""
        if isinstance(name, str):
            self.watch(name)
        try:
            yield
        except (Exception, SystemExit) as error:
            culprit = name if isinstance(name, str) else name[0]
            if isinstance(error, Refused) or not culprit or not self._suspect(culprit):
                raise
            from mlsys.contracts.core import source_file

            file = source_file(self.bench.impls[culprit].load())
            where = raised_at(error, file) if file else None
            note = f"raised {one_line(error)}" + (f", at {where}" if where else "")
            if self.everyone is not alone:
                raise RaisedOnRank(culprit, note) from error
            raise Refused(culprit, "failed", note) from error


def _reset(call: Callable[[], Any]) -> Callable[[], None] | None:
    """What puts the values back that a call in place works on; None for one that leaves its inputs as they are."""
    return getattr(call, "reset", None)
