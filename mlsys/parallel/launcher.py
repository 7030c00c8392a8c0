"""Run a function in n processes that can talk to each other, in a tenth of a second, and get n results back.

    def mean(x):                                            # runs once in each process, a *rank*
        dist.all_reduce(x)                                  # the default process group is ready
        return x / dist.get_world_size()

    launch(mean, 4, torch.ones(3))                          # → [tensor, tensor, tensor, tensor]

`torchrun` starts a program n times, and takes ten seconds for it, most of which is n times `import torch`. `launch` is
for everything smaller than a program: a test, a benchmark, a cell of a notebook. A process that has torch loaded is
kept warm, and each launch forks its ranks from it (`mlsys.parallel._server`). The function is sent by value, so it may
be a closure or a lambda, and a script needs no `if __name__ == "__main__":`. Inside `torchrun` the same call runs the
function in the processes that are there, on as many hosts as there are.

**One error, the right one.** When a rank fails, the others fail soon after: what they wait for does not come. The
first failure ends the launch, and the echoes are named in one line each:

- *raised*: the rank's own exception is the cause of the `LaunchError`, with its traceback.
- *died*: which signal, or exit status; the Python stack if it was a segmentation fault.
- *hung*: after `timeout` seconds, where each rank is: its last collective, with shape, line and count, and the stack.

**Nothing stays behind.** When `launch` returns or raises, its ranks and whatever they have spawned are gone. So they
are when the caller is killed, even by kill -9.

Cost:
    About a tenth of a second for 2 ranks on two cores, more with more ranks than cores. The first launch of a process
    also waits for a fresh Python to import torch, with what a first optimizer needs: some seconds. A collective called
    through torch.distributed costs a few µs more, to write down where the rank is.

Communication:
    The function and its arguments are copied once; a result of b bytes takes 3 b on its way: pickled, sent, unpickled.
    Tensors come back as copies, those of a GPU on the CPU.

Papers:
    Li et al. 2020, arXiv:2006.15704, section 3.3 (process groups, which form when the last rank arrives).

See also:
    `mlsys.parallel.collectives` (what ranks say to each other), `torchrun` (many hosts, restarts),
    `torch.multiprocessing.start_processes`, `mlsys.parallel._notes` (how a hung rank's last collective is known).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import linecache
import math
import os
import pickle
import re
import selectors
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from mlsys.parallel import _loops, _notes, _travel
from mlsys.parallel._caller import FINAL_S, Output, Server, flush, surroundings
from mlsys.parallel._notes import note
from mlsys.parallel._server import FRAME, RESULT, send_request

T = TypeVar("T")

__all__ = ["LaunchError", "launch", "note"]

MOST_RANKS = 128
GRACE_S = 0.1  # after a failure: for ranks that fail at the same moment
LONGEST_S = 3650 * 86400.0  # ten years stand for no limit: a larger one overflows inside torch
ECHO_GRACE_S = 2.0  # after a failure that looks like the echo of another: until that one is known


class LaunchError(RuntimeError):
    """A launch that has no results.

    rank:           the rank that failed first; of a hang, the one that is furthest behind.
    kind:           "raised", "died" or "hung".
    rank_traceback: of that rank: of its exception, or its stack when it crashed or hung; may be empty.

    `__cause__` is the exception that the rank raised; if it cannot be sent, a RuntimeError that says what it said.
    """

    def __init__(self, message: str, rank: int = -1, kind: str = "raised", rank_traceback: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.kind = kind
        self.rank_traceback = rank_traceback


def launch(
    fn: Callable[..., T],
    n: int,
    *args: Any,
    timeout: float | None = 300.0,
    backend: str | None = None,
    threads: int = 1,
) -> list[T]:
    """Results of `fn(*args)` in each of n processes, in order of rank.

    The default process group is initialised: `dist.get_rank()`, and every collective, work at once. What `fn` returns
    is copied: tensors by value, those of a GPU onto the CPU.

    timeout: seconds for the whole launch; None for ever. A rank that has not finished by then is hung.
    backend: of the process group; None is "gloo", on the CPU. With "nccl", rank r has GPU r.
    threads: that torch may use in each rank.

    Inside `torchrun`, `fn` runs once in each process that torchrun has started, n must be their number, and each of
    them gets all the results; failures are torchrun's to handle.

    LaunchError if a rank raises, dies or hangs; then no rank is left running. ValueError or TypeError if the arguments
    make no sense, or `fn` or its arguments cannot be sent. If `sys.stdout` is an object whose `write` raises, that
    error, when all ranks are gone.
    """
    backend = _check(fn, n, timeout, backend, threads)
    timeout = LONGEST_S if timeout is None else min(timeout, LONGEST_S)
    if "TORCHELASTIC_RUN_ID" in os.environ and not _notes.inside_launch():
        return _under_torchrun(fn, n, args, timeout, backend, threads)
    try:
        parcel = _travel.pack((fn, args))
    except Exception as error:
        name = getattr(fn, "__qualname__", type(fn).__name__)
        raise TypeError(
            f"{name} or its arguments cannot be sent to other processes ({type(error).__name__}: {error}); "
            "open files, locks and the like must be made inside the function"
        ) from error
    with tempfile.TemporaryDirectory(prefix="mlsys-launch-", ignore_cleanup_errors=True) as folder:
        running = _Launch(Path(folder), n, timeout)
        request = {
            "parcel": parcel,
            "folder": folder,
            "ranks": n,
            "timeout": timeout,
            "backend": backend,
            "threads": threads,
        } | surroundings()
        try:
            running.start(request)
            results = running.results()
        finally:
            running.close()
        running.check_outputs()
        return results


def _check(fn: Any, n: Any, timeout: Any, backend: str | None, threads: Any) -> str:
    """The backend, if all arguments of `launch` make sense."""
    if os.name != "posix":
        raise NotImplementedError("launch forks processes, which Windows cannot; use torchrun, or WSL")
    if not callable(fn):
        raise TypeError(f"fn={fn!r} cannot be called; launch(fn, n, *args) runs fn(*args) in n processes")
    for name, value, most in (("n", n, MOST_RANKS), ("threads", threads, math.inf)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r}: a whole number is needed")
        if not 1 <= value <= most:
            limit = f" and at most {most}, on one host; torchrun starts more on several" if name == "n" else ""
            raise ValueError(f"{name}={value}: at least 1{limit}")
    if timeout is not None:
        if isinstance(timeout, bool) or not isinstance(timeout, int | float):
            raise TypeError(f"timeout={timeout!r}: seconds, or None, are needed")
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout={timeout}: a positive number of seconds is needed, or None for no limit")
    if backend is None:
        return "gloo"
    import torch
    import torch.distributed as dist

    names = [part.partition(":")[2] or part for part in backend.split(",")]
    for name in names:
        if not dist.is_backend_available(name):
            raise ValueError(f"backend={backend!r}: this torch has no {name!r}; None is gloo, on the CPU")
    if "nccl" in names and n > torch.cuda.device_count():
        raise ValueError(f"backend={backend!r}: {n} ranks need {n} GPUs, and there are {torch.cuda.device_count()}")
    return backend


# --- one launch -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Failure:
    """How a rank failed."""

    kind: str  # "raised" or "died"
    when: float  # time.monotonic()
    summary: str
    trace: str
    pickled: bytes | None = None  # the exception
    echo: bool = False  # it looks like the consequence of another rank's failure


@dataclass
class _Rank:
    """What is known of a rank."""

    channel: socket.socket
    received: bytearray = field(default_factory=bytearray)
    size: int = 0  # of the whole message, once its head is here
    result: memoryview | None = None
    failure: _Failure | None = None
    ended: int | None = None  # exit status, or minus the signal

    @property
    def settled(self) -> bool:
        return self.result is not None or self.failure is not None or self.ended is not None


class _Launch:
    """The caller's side of one launch: sends it off, collects, decides what went wrong, and sees that all is gone."""

    def __init__(self, folder: Path, n: int, timeout: float) -> None:
        self.folder = folder
        self.timeout = timeout
        self.supervisor, self.supervisor_end = socket.socketpair()
        pairs = [socket.socketpair() for _ in range(n)]
        self.ranks = [_Rank(own) for own, _ in pairs]
        for rank in self.ranks:
            rank.channel.setblocking(False)
        self.far_ends = [far for _, far in pairs]
        self.outputs = [Output("stdout"), Output("stderr")]
        self.selector = selectors.DefaultSelector()
        self.lines = b""  # from the supervisor, not yet whole
        self.over = False  # the supervisor is gone
        _notes.create(folder / "notes", n)

    def start(self, request: dict[str, Any]) -> None:
        """Have the server make the ranks; if it turns out to be dead, another one."""
        flush()
        try:
            self._ask(request)
        except OSError:  # it was killed, perhaps a moment ago; nothing has run yet
            for end in (self.supervisor, self.supervisor_end):
                end.close()
            self.supervisor, self.supervisor_end = socket.socketpair()
            try:
                self._ask(request)
            except OSError as error:
                raise RuntimeError(f"the launch server ended twice before it forked ({error})") from error
        for far in self.far_ends:
            far.close()
        for output in self.outputs:
            output.close_far()
        self.selector.register(self.supervisor, selectors.EVENT_READ, self._hear_supervisor)
        for rank in self.ranks:
            self.selector.register(rank.channel, selectors.EVENT_READ, lambda rank=rank: self._hear_rank(rank))
        for output in self.outputs:
            if output.near is not None:
                self.selector.register(output.near, selectors.EVENT_READ, lambda output=output: self._print(output))

    def _ask(self, request: dict[str, Any]) -> None:
        """Hand the request to the server; an OSError if that died before it forked."""
        server = Server.current(request["environ"])
        descriptors = [output.far for output in self.outputs] + [far.fileno() for far in self.far_ends]
        try:
            server.hand_over(self.supervisor_end)
            self.supervisor_end.close()
            send_request(self.supervisor, request, descriptors)
        except OSError:
            server.settle()
            raise

    def results(self) -> list[Any]:
        """What each rank returned; LaunchError if one did not."""
        deadline = time.monotonic() + self.timeout
        while not all(rank.result is not None for rank in self.ranks):
            now = time.monotonic()
            failed = self._failed()
            if failed or self.over:
                until = self._until()
                if self.over or all(rank.settled for rank in self.ranks) or now >= until:
                    raise self._failure(failed)
            elif now >= deadline:
                raise self._hang()
            else:
                until = deadline
            self._hear(min(until - now, 3600.0))
            self.check_outputs()
        loaded = []
        for number, rank in enumerate(self.ranks):
            assert rank.result is not None
            try:
                loaded.append(_travel.loads(rank.result))
            except Exception as error:
                raise LaunchError(
                    f"rank {number} returned something that cannot be loaded here: {type(error).__name__}: {error}",
                    number,
                ) from error
            rank.result = memoryview(b"")
        return loaded

    def close(self) -> None:
        """Let finished ranks go and kill the others; return when all are gone."""
        finished = all(rank.result is not None for rank in self.ranks)
        for rank in self.ranks:
            if self._listens_to(rank.channel):
                self.selector.unregister(rank.channel)
            with contextlib.suppress(OSError):
                rank.channel.shutdown(socket.SHUT_RDWR)  # also if a fork of this process holds a copy
            rank.channel.close()
        for end in (self.supervisor_end, *self.far_ends):
            end.close()
        if not finished:
            with contextlib.suppress(OSError):
                self.supervisor.shutdown(socket.SHUT_WR)
        started = self._listens_to(self.supervisor)
        until = time.monotonic() + FINAL_S
        while started and not self.over and time.monotonic() < until:
            self._hear(0.5)
            if time.monotonic() > until - FINAL_S / 2:  # a rank that does not leave when told to
                with contextlib.suppress(OSError):
                    self.supervisor.shutdown(socket.SHUT_WR)
        for output in self.outputs:
            output.close()
        self.selector.close()
        self.supervisor.close()

    def check_outputs(self) -> None:
        """Raise what the caller's stdout or stderr has raised."""
        for output in self.outputs:
            if output.error is not None:
                raise output.error

    # What the others say.

    def _listens_to(self, end: socket.socket) -> bool:
        return end.fileno() >= 0 and end.fileno() in self.selector.get_map()

    def _print(self, output: Output) -> None:
        if output.near is not None and not output.forward():
            self.selector.unregister(output.near)

    def _hear(self, seconds: float) -> None:
        for key, _ in self.selector.select(seconds):
            if self.selector.get_map().get(key.fd) is key:  # else one before it in the list has heard the last of it
                key.data()

    def _hear_rank(self, rank: _Rank) -> bool:
        """Take in what a rank has sent; False if that was all for now."""
        missing = max(rank.size - len(rank.received), 0) or FRAME.size
        try:
            data = rank.channel.recv(min(max(missing, 1 << 16), 1 << 22))
        except BlockingIOError:
            return False
        except ConnectionError:
            data = b""
        if not data:
            self.selector.unregister(rank.channel)  # the supervisor will say how it ended
            return False
        rank.received += data
        if not rank.size and len(rank.received) >= FRAME.size:
            rank.size = FRAME.size + FRAME.unpack_from(rank.received)[1]
        if rank.size and len(rank.received) >= rank.size:
            body = memoryview(rank.received)[FRAME.size :]
            if rank.received[:1] == RESULT:
                rank.result = body
            else:
                rank.failure = _Failure("raised", *pickle.loads(body))
        return True

    def _hear_supervisor(self) -> None:
        try:
            data = self.supervisor.recv(1 << 16)
        except ConnectionError:
            data = b""
        if not data:
            self.over = True
            self.selector.unregister(self.supervisor)
            return
        *whole, self.lines = (self.lines + data).split(b"\n")
        for line in filter(None, whole):
            number, status, moment = json.loads(line)
            rank = self.ranks[number]
            rank.ended = status
            while self._listens_to(rank.channel) and self._hear_rank(rank):
                pass  # what it said before it ended
            if rank.result is None and rank.failure is None:
                rank.failure = _Failure("died", moment, *self._death(number, status))

    # What went wrong.

    def _failed(self) -> list[int]:
        """Ranks with a failure, the cause first: echoes of another's failure come after what is none."""
        failed = [(rank.failure.echo, rank.failure.when, i) for i, rank in enumerate(self.ranks) if rank.failure]
        return [number for _, _, number in sorted(failed)]

    def _until(self) -> float:
        """When to stop waiting for what else fails."""
        failures = [failure for rank in self.ranks if (failure := rank.failure)]
        only_echoes = all(failure.echo for failure in failures)
        first = min((failure.when for failure in failures), default=0.0)
        return first + (ECHO_GRACE_S if only_echoes else GRACE_S)

    def _death(self, number: int, status: int) -> tuple[str, str]:
        """What happened to a rank that ended without a word, and its Python stack if it left one."""
        if status >= 0:
            how = f"exited with status {status} before the function returned"
        else:
            how = f"was killed by {_signal_name(-status)}"
            if -status == signal.SIGKILL:
                how += ": by someone, or by the system when memory ran out"
        last = self._last(number)
        return f"{how}; {last}" if last else how, self._stack(number)

    def _failure(self, failed: list[int]) -> LaunchError:
        total = len(self.ranks)
        if not failed:
            return LaunchError("the launch's supervisor was killed, and its ranks with it", -1, "died")
        first, *others = failed
        failure = self.ranks[first].failure
        assert failure is not None
        lines = [f"rank {first} of {total} {failure.summary}"]
        if failure.trace:
            lines += ["", failure.trace.rstrip()]
        for number in others:
            other = self.ranks[number].failure
            assert other is not None
            lines += [""] * (number == others[0]) + [f"then rank {number}: {_shorten(other.summary)}"]
        error = LaunchError("\n".join(lines), first, failure.kind, failure.trace)
        if failure.kind == "raised":
            error.__cause__ = _cause(failure)
        return error

    def _hang(self) -> LaunchError:
        stuck = [number for number, rank in enumerate(self.ranks) if not rank.settled]
        self._ask_for_stacks(stuck)
        notes = _notes.read(self.folder / "notes", len(self.ranks))
        behind, remark = _notes.suspect({number: notes[number][0] for number in stuck})
        lines = [f"{len(stuck)} of {len(self.ranks)} ranks had not finished after {self.timeout:g} s{remark}"]
        for number in range(len(self.ranks)):
            where = self._last(number) or "has called no collective"
            lines.append(f"  rank {number} " + (where if number in stuck else f"has returned; {where}"))
        stacks = {number: self._stack(number) for number in stuck}
        for number, stack in stacks.items():
            lines += ["", f"rank {number}, most recent call first:", stack or "  (gave no answer; is it stopped?)"]
        return LaunchError("\n".join(lines), behind, "hung", stacks[behind])

    def _last(self, number: int) -> str:
        return _notes.in_words(_notes.read(self.folder / "notes", len(self.ranks))[number])

    def _ask_for_stacks(self, stuck: list[int]) -> None:
        """Have each stuck rank write its stack; wait until they have, but not for ever."""
        with contextlib.suppress(OSError):
            self.supervisor.sendall(b"d")
        sizes: list[int] = []
        until = time.monotonic() + 2.0
        while time.monotonic() < until:
            time.sleep(0.05)
            before, sizes = (
                sizes,
                [self._stack_file(number).stat().st_size for number in stuck if self._stack_file(number).exists()],
            )
            if len(sizes) == len(stuck) and all(sizes) and sizes == before:
                return

    def _stack_file(self, number: int) -> Path:
        return self.folder / f"stack-{number}"

    def _stack(self, number: int) -> str:
        """What faulthandler wrote in the rank, with source lines, without our own frames."""
        with contextlib.suppress(OSError):
            return _readable(self._stack_file(number).read_text(encoding="utf-8", errors="replace"))
        return ""


def _cause(failure: _Failure) -> BaseException:
    """The exception that a rank raised, or what stands for one that does not travel."""
    if failure.pickled is not None:
        with contextlib.suppress(Exception):  # of a class that is known only there
            found: BaseException = _travel.loads(failure.pickled)
            return found
    said = failure.summary.removeprefix("raised ")
    return RuntimeError(f"{said} (in place of the exception itself, which could not be sent)")


def _readable(dump: str) -> str:
    """Faulthandler's dump as frames with their source lines; threads that are only ours are left out."""
    threads: list[list[str]] = []
    for line in dump.splitlines():
        match = re.match(r'  File "(.*)", line (\d+) in (.*)$', line)
        if match is None:
            if "most recent call first" in line:
                threads.append([])
        elif threads and not match[1].startswith(_OWN_FILES):
            source = linecache.getline(match[1], int(match[2])).strip()
            threads[-1].append(
                f'  File "{match[1]}", line {match[2]} in {match[3]}' + (f"\n    {source}" if source else "")
            )
    found = ["\n".join(frames) for frames in threads if frames]
    return "\n  and in another thread:\n".join(reversed(found))  # the main thread comes last


_OWN_FILES = ("<string>", *(str(Path(__file__).with_name(name)) for name in ("_server.py", "_notes.py")))


def _signal_name(number: int) -> str:
    try:
        return f"{signal.Signals(number).name} (signal {number})"
    except ValueError:
        return f"signal {number}"


def _shorten(text: str, most: int = 200) -> str:
    return text if len(text) <= most else text[:most] + "…"


# --- inside torchrun --------------------------------------------------------------------------------------------------


def _under_torchrun(
    fn: Callable[..., T], n: int, args: tuple[Any, ...], timeout: float, backend: str, threads: int
) -> list[T]:
    import torch
    import torch.distributed as dist

    world = int(os.environ["WORLD_SIZE"])
    if world != n:
        raise ValueError(f"n={n}, but torchrun has started {world} processes; make the two equal")
    if not dist.is_initialized():
        if "nccl" in backend:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        _loops.calm()
        atexit.register(_leave)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        own = _travel.dumps(fn(*args))
    finally:
        torch.set_num_threads(before)
    everyone: list[Any] = [None] * n
    dist.all_gather_object(everyone, own)
    return [_travel.loads(data) for data in everyone]


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
