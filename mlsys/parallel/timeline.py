"""Where the time of a rank goes: it computes, it moves bytes, it updates, or it waits for the others.

Each rank notes *spans* while it runs: what kind of thing, its name, start and end. Afterwards the spans of all ranks
are laid beside each other, and that shows what no rank can see alone. A collective that takes a rank 40 ms may be 40 ms
of moving bytes, or 39 ms of waiting for a slower rank. With s_r and e_r the start and the end on rank r:

    arrival         S = max over ranks of s_r
    waiting of r    from s_r to S            nothing can be finished before all are there
    communication   from S to e_r

(A rank that leaves before the last one arrives, as the root of a broadcast may, has waited for nobody.)

The other distinction is *exposed* or *hidden*. A collective that runs in a thread of its own while the rank computes
costs no time; it is paid only while the rank stands still for it. So a rank's wall time is divided into

    compute         in "compute" spans
    optimizer       in "optimizer" spans
    communication   standing still while bytes move
    waiting         standing still otherwise: others are not there yet, or nothing has begun
    other           none of these: reading data, Python

which sum to the whole, and *hidden* communication comes on top, beneath compute or optimizer.

A rank stands still in a "waiting" span (it is blocked until an asynchronous collective ends), and in a "communication"
span of a thread that also computes: that call blocks it. Both are taken out of the span around them, so one span over
the whole backward pass may stay one span. "communication" spans of other threads are asynchronous. The k-th
"communication" span of a name is the same collective on all ranks.

Cost:
    Two readings of a clock and one append for a span, about a microsecond. Merging sorts all spans of all ranks.

Communication:
    `gather` sends all spans to all ranks, once, at the end. Where ranks are on several hosts, the clocks are compared
    first: some messages to and fro with rank 0, of which the quickest says how far apart the two clocks are, up to
    half of its way.

Papers:
    Wolf & Mohr 2003, "Automatic performance analysis of hybrid MPI/OpenMP applications", JSA 49 (waiting in a
    collective, told from its communication).
    Cristian 1989, "Probabilistic clock synchronization", Distributed Computing 3 (two clocks and a round trip).

See also:
    `mlsys.parallel.data_parallel`, `mlsys.parallel.zero` (which take a `timeline=`), `mlsys.parallel.traffic` (bytes
    instead of seconds), `mlsys train --parallel ddp --timeline trace.json`.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mlsys.files import write_atomic

KINDS = ("compute", "communication", "waiting", "optimizer")
ROUND_TRIPS = 32  # to compare two clocks; the quickest counts
Interval = tuple[float, float]


class Span(NamedTuple):
    """Something that took from `start` to `end`, seconds of one clock; `thread` tells the threads of a rank apart."""

    kind: str
    name: str
    start: float
    end: float
    thread: int = 0


Ranks = Sequence[Sequence[Span]]  # the spans of each rank, in rank order


class Timeline:
    """The spans of one rank. Any thread may add to it.

    clock: seconds; of all processes of one host the same, as `time.perf_counter` is on Linux, macOS and Windows.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.recording = True  # set it to False, and what comes is forgotten
        self._spans: list[Span] = []

    def add(self, kind: str, name: str, start: float, end: float) -> None:
        """Note what this thread did, or saw end; `start` and `end` are seconds of `clock`."""
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}: a span is one of {', '.join(KINDS)}")
        if not start <= end:
            raise ValueError(f"end={end!r} is before start={start!r}: both are seconds of the timeline's clock")
        if self.recording:
            self._spans.append(Span(kind, name, start, end, threading.get_ident()))  # an append is atomic

    @contextmanager
    def span(self, kind: str, name: str) -> Iterator[None]:
        """Note how long the block takes, also if it raises."""
        start = self.clock()
        try:
            yield
        finally:
            self.add(kind, name, start, self.clock())

    @property
    def spans(self) -> list[Span]:
        """All that is noted so far, in the order of the ends."""
        return list(self._spans)

    def clear(self) -> None:
        """Forget everything."""
        self._spans.clear()

    def __len__(self) -> int:
        return len(self._spans)


# --- all ranks --------------------------------------------------------------------------------------------------------


def gather(timeline: Timeline, group: Any = None, *, align: bool | None = None) -> list[list[Span]]:
    """The spans of every rank, in rank order and in seconds of rank 0's clock; a collective call, equal on all ranks.

    align: compare the clocks. By default only if the ranks are on different hosts, since one host has one clock.
    """
    import torch.distributed as dist

    group = getattr(group, "group", group)  # of a Communicator
    own = timeline.spans
    n = dist.get_world_size(group)
    hosts: list[Any] = [None] * n
    dist.all_gather_object(hosts, socket.gethostname(), group=group)
    if len(set(hosts)) > 1 if align is None else align:
        ahead = _ahead(timeline.clock, group)
        own = [span._replace(start=span.start - ahead, end=span.end - ahead) for span in own]
    everyone: list[Any] = [None] * n
    dist.all_gather_object(everyone, [tuple(span) for span in own], group=group)
    return [[Span(*values) for values in spans] for spans in everyone]


def _ahead(clock: Callable[[], float], group: Any) -> float:
    """By how many seconds this rank's clock is ahead of rank 0's."""
    import torch
    import torch.distributed as dist

    rank = dist.get_rank(group)
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    told = torch.zeros(1, dtype=torch.float64, device=device)
    best, ahead = float("inf"), 0.0
    for other in range(1, dist.get_world_size(group)):
        for _ in range(ROUND_TRIPS if rank in (0, other) else 0):
            if rank == 0:
                dist.recv(told, group=group, group_src=other)
                told.fill_(clock())
                dist.send(told, group=group, group_dst=other)
                continue
            start = clock()
            dist.send(told, group=group, group_dst=0)
            dist.recv(told, group=group, group_src=0)
            theirs, end = told.item(), clock()
            if end - start < best:  # rank 0 read its clock somewhere between the two: at most half of this off
                best, ahead = end - start, (start + end) / 2 - theirs
    return ahead


@dataclass(frozen=True)
class Collective:
    """One collective call as all of its ranks saw it: seconds by rank, of those that took part."""

    name: str
    starts: dict[int, float]
    ends: dict[int, float]

    @property
    def arrival(self) -> float:
        """When the last rank was there, s."""
        return max(self.starts.values())

    @property
    def last(self) -> int:
        """The rank that the others waited for."""
        return max(self.starts, key=self.starts.__getitem__)

    def waiting(self, rank: int) -> float:
        """How long this rank waited for the last one, s; 0 if it had left before."""
        return 0.0 if self.ends[rank] < self.arrival else self.arrival - self.starts[rank]

    def communication(self, rank: int) -> float:
        """How long it took this rank from then on, s."""
        return self.ends[rank] - self.starts[rank] - self.waiting(rank)


def collectives(ranks: Ranks) -> list[Collective]:
    """Every collective of these timelines, in order of arrival: the k-th span of a name on each rank that has it.

    If ranks have a name unequally often, nobody knows which is which: then each of its spans stands for itself.
    """
    found: dict[str, dict[int, list[Span]]] = defaultdict(lambda: defaultdict(list))
    for rank, spans in enumerate(ranks):
        for span in sorted(spans, key=lambda span: span.start):
            if span.kind == "communication":
                found[span.name][rank].append(span)
    calls = []
    for name, of_rank in found.items():
        if len({len(spans) for spans in of_rank.values()}) == 1:
            for k in range(len(next(iter(of_rank.values())))):
                k_th = {rank: spans[k] for rank, spans in of_rank.items()}
                calls.append(_collective(name, k_th))
        else:
            calls += [_collective(name, {rank: span}) for rank, spans in of_rank.items() for span in spans]
    return sorted(calls, key=lambda call: call.arrival)


def _collective(name: str, spans: dict[int, Span]) -> Collective:
    return Collective(name, {r: span.start for r, span in spans.items()}, {r: span.end for r, span in spans.items()})


@dataclass(frozen=True)
class Split:
    """What became of a rank's wall time, seconds. The first five sum to it; `hidden` runs beneath the first two."""

    compute: float
    optimizer: float
    communication: float
    waiting: float
    other: float
    hidden: float

    @property
    def total(self) -> float:
        """All that was divided, s."""
        return self.compute + self.optimizer + self.communication + self.waiting + self.other


def split(ranks: Ranks, windows: Sequence[Sequence[Interval]] | None = None) -> list[Split]:
    """The time of each rank, divided as the module says.

    windows: for each rank, which time is to be divided: starts and ends, such as those of its steps. By default all,
             from its first span to the end of its last.
    """
    calls = collectives(ranks)
    if windows is None:
        windows = [[(min(s.start for s in spans), max(s.end for s in spans))] if spans else [] for spans in ranks]
    return [
        _split(rank, spans, calls, _merged(window))
        for rank, (spans, window) in enumerate(zip(ranks, windows, strict=True))
    ]


def _split(rank: int, spans: Sequence[Span], calls: Sequence[Collective], window: Sequence[Interval]) -> Split:
    moving = _merged((call.starts[rank] + call.waiting(rank), call.ends[rank]) for call in calls if rank in call.starts)
    threads = _foreground(spans)
    still = _merged(
        (span.start, span.end)
        for span in spans
        if span.kind == "waiting" or (span.kind == "communication" and span.thread in threads)
    )
    still = _both(still, window)
    optimizer = _without(_both(_merged((s.start, s.end) for s in spans if s.kind == "optimizer"), window), still)
    compute = _without(_both(_merged((s.start, s.end) for s in spans if s.kind == "compute"), window), still)
    compute = _without(compute, optimizer)
    seconds = {
        "compute": _length(compute),
        "optimizer": _length(optimizer),
        "communication": _length(_both(still, moving)),
        "waiting": _length(_without(still, moving)),
    }
    # Of rounding, a sum of the parts may be a hair above the whole.
    other = max(_length(window) - sum(seconds.values()), 0.0)
    return Split(**seconds, other=other, hidden=_length(_both(moving, _merged([*compute, *optimizer]))))


def _foreground(spans: Sequence[Span]) -> set[int]:
    """The threads that do the rank's work; where no span says so, all of them."""
    return {span.thread for span in spans if span.kind != "communication"} or {span.thread for span in spans}


# --- sets of seconds: sorted intervals that do not touch --------------------------------------------------------------


def _merged(intervals: Iterator[Interval] | Sequence[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _both(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            found.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def _without(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    edges = [float("-inf"), *(edge for interval in b for edge in interval), float("inf")]
    return _both(a, list(zip(edges[::2], edges[1::2], strict=True)))  # the gaps between those of b


def _length(intervals: Sequence[Interval]) -> float:
    return sum(end - start for start, end in intervals)


# --- a picture --------------------------------------------------------------------------------------------------------


def to_chrome(ranks: Ranks, path: str | os.PathLike[str]) -> Path:
    """Write a trace that https://ui.perfetto.dev and chrome://tracing open: a process for each rank.

    The file is written all at once, in the Trace Event Format. A collective's arguments say which rank came last, and
    how many milliseconds this one waited for it.
    """
    first = min((span.start for spans in ranks for span in spans), default=0.0)
    waits = {
        (rank, call.name, call.starts[rank]): {"last to arrive": call.last, "waited ms": 1e3 * call.waiting(rank)}
        for call in collectives(ranks)
        for rank in call.starts
    }
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(ranks):
        events.append(_label("process_name", rank, 0, f"rank {rank}"))
        threads = sorted({span.thread for span in spans}, key=lambda t: (t not in _foreground(spans), t))
        for number, thread in enumerate(threads):
            name = "program" if thread in _foreground(spans) else "communication"
            events.append(_label("thread_name", rank, number, name))
        events += [
            {
                "name": span.name,
                "cat": span.kind,
                "ph": "X",  # a complete event: a start and a duration, microseconds
                "ts": round(1e6 * (span.start - first), 3),
                "dur": round(1e6 * (span.end - span.start), 3),
                "pid": rank,
                "tid": threads.index(span.thread),
                "args": waits.get((rank, span.name, span.start), {}) if span.kind == "communication" else {},
            }
            for span in spans
        ]
    return write_atomic(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")


def _label(what: str, rank: int, thread: int, text: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": rank, "tid": thread, "args": {"name": text}}
