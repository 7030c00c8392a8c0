"""A case that several processes run together: a collective, or a training step on a model in parts.

`Benchmark(ranks=…)` says for each case on how many. They are started by
`mlsys.parallel.launch`, each loads the benchmark from its file, and each runs the
very same measurement as a single process would (`mlsys.bench.core.measure`); only

    a sample     starts on all ranks together, and takes as long as the slowest of them
    repeats, rounds, the end, the result that is looked at again      are agreed
    an error     is the largest, peak memory that of the largest rank
    a record     is rank 0's; a figure of all ranks is gathered by the benchmark itself

They agree over a process group of their own, outside of the time that is taken, so
that what is measured has the default group to itself. Starting the ranks is in no
time either. An implementation of the user's that raises on one rank ends all of
them, for the others would wait for it; so it gets its row, and the case is run
once more without it.

Work is that of all ranks together, and the limit it is held against is that of the
machine with as many threads as all ranks have, at most one a core. So four ranks on two
cores are measured by what two cores can do. What has no work (no FLOPs, no bytes) has no
share.

See also:
    `mlsys.parallel.launcher` (starting and ending the ranks), `mlsys.bench.timing` (rounds and samples).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlsys import loading
from mlsys.bench import core, find
from mlsys.bench import machine as machines
from mlsys.bench.trial import RaisedOnRank

if TYPE_CHECKING:
    from mlsys.bench.core import Benchmark, Case, Settings
    from mlsys.bench.records import Record

LIMIT_S = 1800.0  # for all of a case: one that takes longer hangs


def rank() -> int:
    """Which rank of the measurement this process is: 0 where there is only one."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many ranks there are: 1 where nothing was launched."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1


@dataclass(frozen=True)
class _Plan:
    """What each rank is told: everything that it needs to measure the same case."""

    file: str
    sources: dict[str, str | None]  # of each implementation: the user's file, or None for one of the benchmark's own
    case: dict[str, Any]
    settings: Settings
    base: Record
    limits: machines.Limits | None
    told_at: str  # the pipe on which rank 0 says what it does


# --- the parent -------------------------------------------------------------------------------------------------------


def run_case(
    bench: Benchmark,
    case: Case,
    settings: Settings,
    *,
    announce: Callable[[str], None],
    watch: Callable[[str], None],
) -> list[Record]:
    """As `core.run_case`, on as many ranks as the benchmark wants for this case."""
    from mlsys.parallel import LaunchError, launch

    assert bench.ranks is not None
    n = bench.ranks(case)
    sources = {name: impl.source for name, impl in bench.impls.items()}
    for name, impl in bench.impls.items():
        if impl.role == "yours" and impl.source is None:
            raise ValueError(
                f"{name!r} has no source: ranks load a function from its file, so name it FILE.py:FUNCTION"
            )
    base = dataclasses.replace(core.blank(bench, case, settings), ranks=n)
    limits = _limits(case, settings, n)
    failed: list[Record] = []
    while True:
        with _listening(announce, watch) as heard:
            file = str(Path(bench.file).resolve())
            plan = _Plan(file, sources, dict(case), settings, base, limits, str(heard.pipe))
            try:
                records: list[Record] = launch(
                    _on_rank, n, plan, timeout=LIMIT_S, backend=_backend(settings, n), threads=settings.n_threads
                )[0]
            except LaunchError as error:
                heard.out()
                name, note = _blame(error, heard.turn)
                if name not in bench.impls or bench.impls[name].role != "yours":
                    raise
                failed.append(dataclasses.replace(base, impl=name, role="yours", status="failed", note=note))
                announce(f"{bench.name}  {name} failed, so there is no time for it: {note}")
                del sources[name]
                continue
        work = {key: getattr(records[0], key) for key in ("flops", "bytes", "items", "unit")}
        return records + [dataclasses.replace(record, **work) for record in failed]


def _limits(case: Case, settings: Settings, n: int) -> machines.Limits | None:
    """Those of the machine that the ranks share: of all their threads or, on GPUs, of all that they use."""
    if settings.device == "cpu":
        return core.limits_for(case, settings, min(n * settings.n_threads, max(machines.cores(), settings.n_threads)))
    import torch

    one = core.limits_for(case, settings)
    gpus = min(n, torch.cuda.device_count())
    return one and machines.Limits(one.flops * gpus, one.bandwidth * gpus)


def _backend(settings: Settings, n: int) -> str | None:
    if settings.device != "cuda":
        return None
    import torch

    return "nccl" if n <= torch.cuda.device_count() else "gloo"


def _blame(error: Exception, turn: str) -> tuple[str, str]:
    """Whose fault the end of a launch is, and what to say of it; ("", …) for nobody's."""
    cause = error.__cause__
    if isinstance(cause, RaisedOnRank):
        return cause.name, f"{cause.note}, on rank {getattr(error, 'rank', '?')}"
    if getattr(error, "kind", "raised") == "raised":  # by ours, whosever turn it was
        return "", ""
    return turn, str(error).partition("\n")[0]


class _Heard:
    """The parent's end of the pipe, read by a thread of its own: whose turn it is on the ranks."""

    def __init__(self, pipe: Path, announce: Callable[[str], None], watch: Callable[[str], None]) -> None:
        self.pipe, self.turn = pipe, ""
        os.mkfifo(pipe)
        self._file = pipe.open("r+b", buffering=0)  # for both, so that it has no end before ours
        self._say = {"announce": announce, "turn": watch}
        self._thread = threading.Thread(target=self._listen, name="mlsys bench ranks", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        with os.fdopen(os.dup(self._file.fileno()), "rb") as lines:
            for line in lines:
                event, text = json.loads(line)
                if event == "out":
                    return
                if event == "turn":
                    self.turn = text
                self._say[event](text)

    def out(self) -> None:
        """All that was said is heard; nothing more is."""
        if self._thread.is_alive():
            _say(self._file, "out", "")
            self._thread.join()

    def close(self) -> None:
        self.out()
        self._file.close()


@contextlib.contextmanager
def _listening(announce: Callable[[str], None], watch: Callable[[str], None]) -> Iterator[_Heard]:
    with tempfile.TemporaryDirectory(prefix="mlsys-bench-") as folder:
        heard = _Heard(Path(folder) / "pipe", announce, watch)
        try:
            yield heard
        finally:
            heard.close()


def _say(file: Any, event: str, text: str) -> None:
    file.write(json.dumps([event, text]).encode() + b"\n")


def _silent(text: str) -> None:
    """Of what all ranks do, one tells."""


# --- a rank -----------------------------------------------------------------------------------------------------------


def _on_rank(plan: _Plan) -> list[Record]:
    import torch.distributed as dist

    bench = find.load_file(Path(plan.file))
    ours = {name: bench.impls[name] for name, source in plan.sources.items() if source is None}
    bench = dataclasses.replace(bench, impls=ours)
    for name, source in plan.sources.items():
        if source is not None:
            bench = bench.with_impl(name, loading.load_function(source), source)
    group = dist.new_group(backend="gloo")

    def everyone(value: Any) -> list[Any]:
        values = [None] * size()
        dist.all_gather_object(values, value, group=group)
        return values

    with contextlib.ExitStack() as stack:
        announce = watch = _silent
        if rank() == 0:
            pipe = stack.enter_context(Path(plan.told_at).open("wb", buffering=0))
            announce, watch = functools.partial(_say, pipe, "announce"), functools.partial(_say, pipe, "turn")
        stack.enter_context(machines.threads(plan.settings.n_threads))
        return core.measure(bench, plan.case, plan.settings, plan.base, plan.limits, announce, watch, everyone)
