"""Through what a collective runs: a plain process group, or a `Communicator`, which knows more and can do more."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import queue
import secrets
import socket
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from mlsys.parallel import _algorithms, _backend, _loops, _measure, _notes, traffic
from mlsys.parallel._call import Call, Exchange, agree, over_wire, refuse
from mlsys.parallel._choose import Choice, Links, choose
from mlsys.parallel._p2p import Wire
from mlsys.parallel._segment import Call as Plan
from mlsys.parallel.shared_memory import DifferentCallsError, SharedMemory
from mlsys.perf import _checks
from mlsys.perf.collectives import ALGORITHMS

TAG = 0x6D6C  # of messages over a plain group
REMEMBERED = 1024  # choices
KNOWN = {operation: ("auto", *names, "shared_memory", "backend") for operation, names in ALGORITHMS.items()}

R = TypeVar("R")


class Work(Protocol):
    """A collective that may still be running."""

    def wait(self) -> object:
        """Until it is done; raises what it raised."""


class Timeline(Protocol):
    """What records when a rank did what, such as `mlsys.parallel.timeline.Timeline`."""

    def add(self, kind: str, name: str, start_s: float, end_s: float) -> Any:
        """One interval, in seconds of time.perf_counter."""


class Channel:
    """A plain process group: messages, the backend's own collectives, and no state."""

    shared: SharedMemory | None = None
    timeline: Timeline | None = None
    links = Links()

    def __init__(self, group: dist.ProcessGroup | None, *, tag: int = TAG) -> None:
        if not dist.is_initialized():
            raise RuntimeError(
                "there is no process group: run inside mlsys.parallel.launch, or call "
                "torch.distributed.init_process_group first"
            )
        found = dist.group.WORLD if group is None else group
        if not isinstance(found, dist.ProcessGroup):
            raise ValueError(
                f"group={group!r} is no process group of this rank: pass None, a Communicator, or what "
                "torch.distributed.new_group returned, and call on its members only"
            )
        self.group = found
        self.wire = Wire(found, tag=tag)
        self.rank, self.size = self.wire.rank, self.wire.size
        # Such as "cpu:gloo,cuda:nccl". What gloo says of CUDA is left out: it copies to the CPU and back.
        self.config = dist.get_backend_config(found)
        self.devices = tuple(name for name, part in (("cpu", "cpu:"), ("cuda", "cuda:nccl")) if part in self.config)

    @property
    def device(self) -> torch.device:
        """Where this package's own small messages live."""
        return torch.device("cpu") if "cpu" in self.devices else torch.device("cuda", torch.cuda.current_device())

    # --- which algorithm ---

    def pick(self, call: Call, algorithm: str) -> str:
        """`algorithm` itself if it can serve the call, or the one that "auto" means here."""
        if algorithm == "auto":
            return next(name for name in self._order(call) if self._serves(call, name))
        if algorithm not in KNOWN[call.operation]:
            _checks.known("algorithm", algorithm, KNOWN[call.operation])
        reason = self._refusal(call, algorithm)
        if reason:
            raise ValueError(f"algorithm={algorithm!r}: {reason}")
        return algorithm

    def _order(self, call: Call) -> Iterable[str]:
        """Candidates, the best first. The same on all ranks; the last of them serve every call."""
        if call.operation == "all_to_all" and not call.even:  # sizes differ from rank to rank: the choice must not
            return ("shared_memory", "backend", "pairwise")
        return self._ranked(call)

    def _ranked(self, call: Call) -> Iterable[str]:
        ours = _default_ranking(call.operation, self.size, call.nbytes)
        # gloo's reduce-scatter takes longer than its all-reduce.
        return (*ours, "backend") if call.operation == "reduce_scatter" and not call.cuda else ("backend", *ours)

    def _serves(self, call: Call, algorithm: str) -> bool:
        """Whether "auto" may take it: the backend's largest of numbers and NaN is for those who ask for it."""
        if algorithm == "backend" and _backend.loses_nan(call):
            return False
        return self._refusal(call, algorithm) is None

    def _refusal(self, call: Call, algorithm: str) -> str | None:
        """Why this algorithm cannot serve this call; None if it can."""
        n = self.size
        if n == 1:  # nothing is left to do
            return None
        if algorithm == "backend":
            return _backend.refusal(call)
        if algorithm == "shared_memory":
            if self.shared is None:
                return "that takes a Communicator all of whose ranks are on one host, as group=…"
            if call.cuda:
                return "shared memory serves CPU tensors; take 'backend'"
            if call.op and not self.shared.supports(call.dtype, call.op):
                return f"shared memory does not serve op={call.op!r} of {call.dtype}; take 'ring'"
        if algorithm in ("halving", "doubling") and n & (n - 1):
            return f"{n} ranks are no power of two; take 'ring'"
        if algorithm == "bruck" and call.operation == "all_to_all" and not call.even:
            return "it moves parts of one size; leave the sizes out, or take 'pairwise'"
        if algorithm == "hierarchical" and (self.links.local is None or n % self.links.local):
            return (
                f"which of the {n} ranks share a host is not known, or hosts have different numbers of them; pass "
                "Communicator(links=Links(local=…)) as group, or take 'ring'"
            )
        return None

    # --- running ---

    def run(self, call: Call, algorithm: str, check: bool, async_op: bool) -> Work | None:
        """The call. A plain group only lets the backend's own go on by itself; the rest is done on return."""
        if async_op and algorithm == "backend":
            return self._start(call, check)
        self._perform(call, algorithm, check)
        return Finished() if async_op else None

    def barrier(self) -> None:
        """Until every rank is here."""
        algorithm = "dissemination" if self.shared is None else "shared_memory"
        self.run(Call("barrier", torch.uint8, 0, None, None), algorithm, True, False)

    def refuse(self, operation: str) -> None:
        """Tell the others, who are comparing their calls, that this rank refused the arguments of its `operation`."""
        # This rank has its own error to raise.
        with contextlib.suppress(ValueError, RuntimeError, OSError), traffic.uncounted():
            refuse(over_wire(self.wire, self.device), self.rank, self.size, operation)

    def _meet(self, call: Call, algorithm: str) -> None:
        """All ranks make the same call, or all raise."""
        with traffic.uncounted():
            agree(self._exchange(call), self.rank, self.size, call, algorithm, self._count())

    def _exchange(self, call: Call) -> Exchange:
        return over_wire(self.wire, self.device)

    def _count(self) -> int:
        return 0

    def _perform(self, call: Call, algorithm: str, check: bool) -> None:
        if _notes.inside_launch():
            _notes.note(f"{call}, {algorithm}")
        if check and algorithm != "shared_memory":  # which compares the calls itself
            self._meet(call, algorithm)
        start = time.perf_counter()
        if algorithm == "shared_memory":
            shared = self.shared
            assert shared is not None
            _algorithms.through(shared, call)
            traffic.note(
                call.operation,
                algorithm,
                call.nbytes,
                self.size,
                sent=lambda: traffic.shared_memory_sent(call, self.rank, self.size, shared.slot_bytes),
            )
        else:
            with traffic.collective(call.operation, algorithm, call.nbytes, self.size):
                if algorithm == "backend":
                    _backend.run(self.group, call)
                else:
                    _algorithms.run(self.wire, call, algorithm, self.links)
        self._record(call, algorithm, start)
        _notes.note(None)

    def _start(self, call: Call, check: bool) -> Work:
        """The backend's own, left running."""
        if check:
            self._meet(call, "backend")
        with traffic.collective(call.operation, "backend", call.nbytes, self.size):
            return Started(_backend.start(self.group, call))

    def _record(self, call: Call, algorithm: str, start: float) -> None:
        if self.timeline is not None:
            size = f"{call.nbytes / 1e6:.1f} MB" if call.nbytes >= 1e5 else f"{call.nbytes} B"
            self.timeline.add("communication", f"{call.operation} {algorithm} {size}", start, time.perf_counter())


class Communicator(Channel):
    """A process group together with what is known about it: pass it as `group` to every collective.

    Making one is collective: all ranks of `group` do it, in the same order as other collectives. It finds out which
    ranks share a host; measures the links, the backend and the shared memory, some tens of ms (so that all ranks know
    the same numbers); and gives collectives with `async_op=True` a thread in which they run in the order of their
    calls. A later call without `async_op` waits for those before it.

    shared_memory: None opens the memory of the host if all ranks are on one; False never; True or an error.
    links:         None measures. Given, nothing is measured: `auto` takes shared memory if it is open, otherwise the
                   fastest by the α-β model; the same on all ranks, or they choose differently.
    timeline:      gets `add("communication", name, start_s, end_s)` of every collective.

    After a TimeoutError or a ConnectionError the ranks are out of step, and every further call is refused. Use it as a
    context manager, or call `close`, which ends the thread and lets go of the memory.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        shared_memory: bool | None = None,
        links: Links | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        if isinstance(group, Channel):
            raise TypeError("group is a Communicator already: pass it on as it is, or its .group")
        if links is not None and not isinstance(links, Links):
            raise TypeError(f"links must be a Links or None, got {links!r}")
        super().__init__(group)
        _loops.calm()  # of this group
        self.timeline = timeline
        with traffic.uncounted():
            hosts, token = self._introductions()
            self.hosts = hosts
            # Several communicators of one group, each with a thread, must not take one another's messages.
            self.wire = Wire(self.group, tag=token)
            together = len(set(hosts)) == 1 and "cpu" in self.devices
            if shared_memory or (shared_memory is None and together and self.size > 1):
                self.shared = _opened(self.group, required=bool(shared_memory))
            self._lines: dict[tuple[str, str], tuple[float, float]] = {}
            if links is not None:
                self.links = links
            elif self.size > 1 and "cpu" in self.devices:
                self._measure()
            else:
                self.links = Links(local=_per_host(hosts))
        self._measured = bool(self._lines)
        self._choices: dict[tuple[str, int], Choice] = {}
        self._calls = 0
        self._broken: str | None = None
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._last: Future[None] | None = None  # of all that the thread was given
        self._ours: Future[None] | None = None  # of what uses messages or shared memory of this communicator
        self._thread: Thread | None = None
        self._closing = weakref.finalize(self, self._jobs.put, None)

    def choose(self, operation: str, nbytes: int) -> Choice:
        """What "auto" takes for `operation` on a whole vector of `nbytes`, and why; says so as a sentence.

        Where the choice cannot serve a call (a dtype, uneven parts), the next of `ranking` is taken.
        """
        choice = self._choices.get((operation, nbytes))
        if choice is None:
            if len(self._choices) >= REMEMBERED:
                self._choices.clear()
            choice = choose(operation, self.size, nbytes, self.links, self._lines)
            self._choices[operation, nbytes] = choice
        return choice

    def _ranked(self, call: Call) -> Iterable[str]:
        if call.cuda:  # NCCL measures by itself
            return super()._ranked(call)
        ranking = self.choose(call.operation, call.nbytes).ranking
        return ranking if self._measured else ("shared_memory", *ranking, "backend")

    def run(self, call: Call, algorithm: str, check: bool, async_op: bool) -> Work | None:
        """The call, here once those before it are done, or with `async_op` in the thread after them."""
        if self._broken is not None:
            raise RuntimeError(f"this Communicator is of no more use, make a new one: {self._broken}")
        if not async_op or call.cuda:  # what is called on a GPU's stream is asynchronous anyway
            self._drain()
            return super().run(call, algorithm, check, async_op)
        if algorithm != "backend":
            self._ours = self._submit(lambda: self._perform(call, algorithm, check))
            return Queued(self._ours)
        # gloo matches collectives by the order in which they begin, the program's own beside ours: so this one begins
        # here, not in the thread. What comes after it waits for it there. Our own before it must be done, or ranks
        # would be in both at once; the backend's need not, and run side by side.
        self._settle()
        start = time.perf_counter()
        work = self._start(call, check)

        def finish() -> None:
            work.wait()
            self._record(call, "backend", start)

        return Queued(self._submit(finish))

    def close(self) -> None:
        """Wait for what is under way, end the thread, and let go of the shared memory. Once is enough."""
        self._drain()
        self._closing()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self.shared is not None:
            self.shared.close()
            self.shared = None
        self._broken = self._broken or "it was closed"

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _introductions(self) -> tuple[list[int], int]:
        """The host of every rank, as a number, and a tag that all agree on."""
        own = torch.tensor([_host(), secrets.randbelow(2**30) + 2**20], device=self.device)
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(everyone, own, group=self.group)
        rows = [[int(value) for value in row] for row in everyone]
        return [host for host, _ in rows], rows[0][1]

    def _measure(self) -> None:
        self.links = _measure.links(self.wire, _per_host(self.hosts))
        candidates: dict[str, Callable[[Call], None]] = {"backend": functools.partial(_backend.run, self.group)}
        if self.shared is not None:
            candidates["shared_memory"] = functools.partial(_algorithms.through, self.shared)
        self._lines = _measure.lines(self.group, candidates)

    def _exchange(self, call: Call) -> Exchange:
        shared = self.shared
        if shared is None:
            return super()._exchange(call)
        # Ranks that disagree may be in shared memory, or on their way there: so that is where they must meet.
        plan = Plan(call.operation, call.dtype, call.elements, call.op or "sum", call.root)
        return lambda rows: shared.exchange(rows[self.rank], plan)

    def refuse(self, operation: str) -> None:
        """Tell the others, who are comparing their calls, that this rank refused the arguments of its `operation`."""
        if self._broken is not None:  # nobody listens
            return
        self._settle()
        if self.shared is None:
            self._count()  # as the others do
            super().refuse(operation)
        else:
            self.shared.refuse(operation)

    def _count(self) -> int:
        if self.shared is not None:  # which counts by itself, also what is refused or differs
            return 0
        self._calls += 1
        return self._calls

    def _perform(self, call: Call, algorithm: str, check: bool) -> None:
        self._guarded(call, algorithm, functools.partial(super()._perform, call, algorithm, check))

    def _start(self, call: Call, check: bool) -> Work:
        work = self._guarded(call, "backend", functools.partial(super()._start, call, check))
        return Started(lambda: self._guarded(call, "backend", work.wait))

    def _guarded(self, call: Call, algorithm: str, run: Callable[[], R]) -> R:
        """What `run` returns; its errors in terms of the call, and remembered if the ranks are out of step now."""
        try:
            return run()
        except DifferentCallsError as error:
            raise ValueError(f"{error} (rank {self.rank} calls {call}, algorithm {algorithm!r})") from error
        except OSError as error:  # TimeoutError and ConnectionError are
            self._broken = self._broken or str(error)
            raise

    def _submit(self, run: Callable[[], None]) -> Future[None]:
        if self._thread is None:
            self._thread = Thread(target=_work, args=(self._jobs,), name="mlsys-communicator", daemon=True)
            self._thread.start()
        if torch.is_inference_mode_enabled():  # a mode of this thread; that one writes to the same tensors
            run = torch.inference_mode()(run)
        future: Future[None] = Future()
        self._last = future
        self._jobs.put((future, traffic.carried(run)))
        return future

    def _settle(self) -> None:
        """Until the thread has done the last of our own collectives; errors are for those who wait for its work."""
        if self._ours is not None:
            wait([self._ours])
            self._ours = None

    def _drain(self) -> None:
        """Until the thread has nothing to do."""
        if self._last is not None:
            wait([self._last])
            self._last = self._ours = None


Job = tuple["Future[None]", Callable[[], None]]


def _work(jobs: queue.SimpleQueue[Job | None]) -> None:
    """The thread: it holds the queue only, so that a forgotten communicator can go."""
    while (job := jobs.get()) is not None:
        future, run = job
        try:
            run()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)
        del job, future, run


class Finished:
    """Work that was done before it was returned."""

    def wait(self) -> None:
        """Nothing to wait for."""


class Queued:
    """Work in the thread of a communicator."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        """Until it is done; raises what it raised."""
        self._future.result()


class Started:
    """Work of the backend that has begun; `finish` waits for it and does what is left."""

    def __init__(self, finish: Callable[[], object]) -> None:
        self._finish = finish

    def wait(self) -> None:
        """Until it is done; may be called again."""
        self._finish()
        self._finish = _nothing


def channel(group: dist.ProcessGroup | Channel | None) -> Channel:
    """`group` as a channel."""
    return group if isinstance(group, Channel) else Channel(group)


@functools.lru_cache(maxsize=REMEMBERED)
def _default_ranking(operation: str, n: int, nbytes: int) -> tuple[str, ...]:
    return tuple(choose(operation, n, nbytes, Channel.links).ranking)


def _opened(group: dist.ProcessGroup, *, required: bool) -> SharedMemory | None:
    """The memory of the host. Ranks on one host may still not see each other's, as in two containers."""
    try:
        return SharedMemory(group)
    except ValueError:  # on every rank, or on none
        if required:
            raise
        return None


def _per_host(hosts: list[int]) -> int | None:
    """Ranks of each host, if they are numbered host by host and all hosts have as many."""
    local = hosts.count(hosts[0])
    blocks = [hosts[start : start + local] for start in range(0, len(hosts), local)]
    even = all(block == [block[0]] * local for block in blocks)
    return local if even and len({block[0] for block in blocks}) == len(blocks) else None


def _host() -> int:
    """A number of this host: its name, this start of it, and the network that its processes see.

    Two network namespaces of one machine count as two hosts, as they do to everything that sends messages.
    """
    parts = [socket.gethostname()]
    for read in (_boot, _network):
        with contextlib.suppress(OSError):  # not on this system
            parts.append(read())
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=7).digest())


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text()


def _network() -> str:
    return str(Path("/proc/self/ns/net").readlink())


def _nothing() -> None:
    pass
