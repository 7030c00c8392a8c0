"""Someone's function in our table, measured in a process that can be killed.

To be timed fairly it has to take turns with the others in one process; to be
stopped when it loops, hoards memory or crashes, that process must not be ours. So the
benchmark runs in a child, with the reference, ours and the peers in it, and the
child says over a pipe whose turn it is and, after each case, the records. When
it is the function's turn for too long, or the child dies, the parent has the
records of all finished cases and can say what happened, and where. A function may
also leave a thread behind that holds the interpreter or ends the process when it is
another's turn: the others' turns have a limit too, which is far above what they need.

See also:
    `mlsys.contracts.isolate` (the process itself), `mlsys.bench.suspect` (wrong results and modified inputs).
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlsys import loading
from mlsys.bench import core, find
from mlsys.bench.core import Benchmark, Case, Settings
from mlsys.bench.records import Record, from_json
from mlsys.contracts import isolate

YOURS = "yours"  # what it is called in the table


class Stopped(Exception):
    """The function ran too long or took the process with it: `record` says so of the case that it happened in."""

    def __init__(self, record: Record) -> None:
        super().__init__(record.note)
        self.record = record


def run_isolated(
    bench: Benchmark,
    cases: Sequence[Case],
    target: str,
    settings: Settings,
    *,
    limit_s: float = 60.0,
    start_limit_s: float = 300.0,
    others_limit_s: float | None = None,
    memory_bytes: int | None = None,
    announce: Callable[[str], None] = lambda text: None,
) -> Iterator[list[Record]]:
    """The records of each case in turn, with `target`, "FILE.py:FUNCTION", beside the benchmark's own implementations.

    Importing the file and each sample of the function may take `limit_s` seconds, each sample of the others
    `others_limit_s` (None: ten times that, and at least 300 s) and, on the CPU, the process `memory_bytes` beyond what
    Python and torch take (None: three quarters of the machine's memory).

    Raises Stopped where that takes longer, or the process ends while the function runs or, by what it left behind,
    later; what `loading.load_function` raises; and RuntimeError if the benchmark itself breaks.
    """
    if os.name != "posix":
        raise OSError(f"--impl needs POSIX process groups, and this is {os.name!r}")
    if not limit_s > 0:
        raise ValueError(f"limit_s must be positive, got {limit_s}")
    if others_limit_s is None:
        others_limit_s = max(10 * limit_s, 300.0)
    if not others_limit_s > 0:
        raise ValueError(f"others_limit_s must be positive, got {others_limit_s}")
    path = loading.split(target)[0]
    spec = {
        "file": str(Path(bench.file).resolve()),
        "impls": list(bench.impls),
        "target": target,
        "cases": [dict(case) for case in cases],
        "settings": dataclasses.asdict(settings),
        "memory_bytes": memory_bytes,
    }
    with isolate.child(__name__, spec) as child:
        yield from _records(child, bench, cases, settings, path, limit_s, start_limit_s, others_limit_s, announce)


# --- the parent -------------------------------------------------------------------------------------------------------


def _records(
    child: isolate.Child,
    bench: Benchmark,
    cases: Sequence[Case],
    settings: Settings,
    path: Path,
    limit_s: float,
    start_limit_s: float,
    others_limit_s: float,
    announce: Callable[[str], None],
) -> Iterator[list[Record]]:
    done = 0
    started = False
    had = ""  # what of the user's came before another's turn
    turn = ""
    deadline = time.monotonic() + start_limit_s

    def stopped(note: str) -> Stopped:
        blank = core.blank(bench, cases[done], settings)
        return Stopped(dataclasses.replace(blank, impl=YOURS, role=YOURS, status="failed", note=note))

    def after() -> str:
        return f"on the turn of {turn or 'the benchmark'}, after {had}"

    for message in child.messages():
        if message is None:  # nothing new
            if time.monotonic() < deadline:
                continue
            if not started:
                raise RuntimeError(f"the benchmark did not start within {start_limit_s:g} s")
            if turn == YOURS:
                raise stopped(f"no answer within {limit_s:g} s{child.stuck_at(path)}; an endless loop?")
            where = child.stuck_at(path)
            raise stopped(f"no answer within {others_limit_s:g} s{where}, {after()}; a thread that it left behind?")
        match message["event"]:
            case "turn":  # a reference may take its time, but not for ever
                if turn == YOURS and message["name"] != YOURS:
                    had = "your function had run" if had else "your file had been imported"
                started, turn = True, message["name"]
                deadline = time.monotonic() + (limit_s if turn == YOURS else others_limit_s)
            case "announce":
                announce(message["text"])
            case "error":
                isolate.reraise(message)
            case "records":
                done += 1
                yield [from_json(values) for values in message["records"]]
            case "done":
                return
    how, where = f"the process {child.ending()}", child.last_line(path)
    if turn == YOURS:
        raise stopped(how + where)
    if had and (where or child.exited()):  # none of ours exits; a signal may be a peer's, or for want of memory
        raise stopped(f"{how}{where}, {after()}")
    raise RuntimeError(f"the benchmark was cut short: {how}{where}")


# --- the child --------------------------------------------------------------------------------------------------------


def serve(spec: dict[str, Any]) -> None:
    """Measure what `spec` asks for; does not return."""
    isolate.answer(spec, _measure)


def _measure(spec: dict[str, Any], send: Callable[..., None]) -> None:
    settings = Settings(**spec["settings"])
    bench = find.load_file(Path(spec["file"]))
    bench = dataclasses.replace(bench, impls={name: bench.impls[name] for name in spec["impls"]})
    if settings.device == "cpu":
        isolate.limit_memory(spec["memory_bytes"])
    send("turn", name=YOURS)
    bench = bench.with_impl(YOURS, loading.load_function(spec["target"]), spec["target"])
    send("turn", name="")
    for case in spec["cases"]:
        records = core.run_case(
            bench,
            case,
            settings,
            announce=lambda text: send("announce", text=text),
            watch=lambda name: send("turn", name=name),
        )
        send("turn", name="")
        send("records", records=[dataclasses.asdict(record) for record in records])
    send("done")
