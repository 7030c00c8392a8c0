"""The memory that the ranks of one host share: made, mapped, and crossed together.

One file, mapped by every rank and then unlinked, so that it lives exactly as long as a process uses it:

    token | a flag per rank | a state per rank | 3 × n headers | 3 × n slots

Time is cut into epochs by a barrier that all ranks cross. In each epoch a rank may write its own slot of one of the
three buffers; others read it after the next crossing, or the one after that; after the third it is written again. A
rank's flag holds the number of crossings it has reached. It only ever grows, so there is nothing to reset, and a rank
that is slow to look finds a number that is large enough. Waiting for n flags in turn reads n cache lines at most once
each after they were written; a tree of flags, which reads fewer, pays off with more ranks than a host has memory
channels.

A header says what a rank is about to do. It is written before the first crossing of a call and compared after it, when
nothing but slots has been written. Before a call that goes by messages the ranks meet here as well, as some of them may
be in shared memory: that is an "exchange", which says in its header which call is planned.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
import socket
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mlsys.parallel import _atomics
from mlsys.parallel._atomics import LINE

BUFFERS = 3
FOLDERS = ("/dev/shm", tempfile.gettempdir())  # the first keeps its files in memory, where there is one
TOKEN = 16  # bytes
# Turns given away, half a microsecond each, before a waiter sleeps. Being woken takes longer than most waits, so ranks
# with a core each want more turns, and ranks that share cores fewer. From 3 to 200 it matters little.
YIELDS = 20
LOOK = 0.02  # seconds between two looks whether the others are still there
TIMEOUT = 300.0  # seconds
ALIVE, GAVE_UP, CLOSED = range(3)

OPERATIONS = (
    "barrier", "all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all", "gather", "scatter", "exchange",
)  # fmt: skip
OPS = ("sum", "mean", "max", "min", "product")
DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
_OPERATION_CODE = {name: code for code, name in enumerate(OPERATIONS)}
_OP_CODE = {name: code for code, name in enumerate(OPS)}
_DTYPE_CODE = {dtype: code for code, dtype in enumerate(DTYPES)}
PLAN = 3  # words of a header, after its first four, that say which call an exchange is about
ROW = 9  # words that every rank can give to an exchange, however few ranks there are


class Call(NamedTuple):
    """What a rank does; equal on all ranks that do the same.

    detail:  the root of a broadcast, gather or scatter; a hash of sizes.
    planned: it will go by messages, and the ranks compare what they are about to do.
    """

    operation: str
    dtype: torch.dtype = torch.uint8
    elements: int = 0
    op: str = "sum"
    detail: int = 0
    refused: bool = False
    planned: bool = False

    def words(self) -> tuple[int, int, int]:
        """Three 64-bit numbers for a header."""
        code = _OPERATION_CODE[self.operation] | _OP_CODE[self.op] << 8 | _DTYPE_CODE[self.dtype] << 16
        return code | self.refused << 32, self.elements, self.detail

    @classmethod
    def read(cls, words: np.ndarray) -> "Call":
        """The call whose `words` these are."""
        code, elements, detail = (int(word) for word in words[:3])
        if OPERATIONS[code & 255] == "exchange":
            return cls.read(words[4:])._replace(planned=True)
        operation, op, dtype = OPERATIONS[code & 255], OPS[code >> 8 & 255], DTYPES[code >> 16 & 65535]
        return cls(operation, dtype, elements, op, detail, bool(code >> 32))

    def __str__(self) -> str:
        if self.refused:
            return f"{self.operation} with arguments that it refused (its own error says why)"
        if self.operation == "barrier":
            return "barrier"
        text = f"{self.operation} of {self.elements} {str(self.dtype).removeprefix('torch.')}"
        if self.operation in ("all_reduce", "reduce_scatter"):
            text += f", op={self.op!r}"
        if self.operation in ("broadcast", "scatter", "gather"):
            text += f", {'dst' if self.operation == 'gather' else 'src'}={self.detail}"
        return text + (", by messages" if self.planned else "")


_EXCHANGE = Call("exchange").words()


class DifferentCallsError(ValueError):
    """The ranks called different things. All of them know, nothing was written, and the next call may be right."""


class Segment:
    """Shared memory of the ranks of `group`, on one host. Making one is a collective call.

    `slot_bytes` is what a rank can put into one of its three slots; `timeout` the seconds that it waits for the others.
    """

    def __init__(self, group: Any, slot_bytes: int, timeout: float) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("this process is not a rank of `group`: make the object on the group's ranks only")
        self.slot_bytes, self.timeout = slot_bytes, timeout
        self.epoch = 0
        self.broken = ""  # why the segment cannot be used any more
        self._calls = 0
        n = self.size
        # The call, its number, and two sizes per rank, or the plan and the row of an exchange.
        self._header_words = -(-(4 + max(2 * n, PLAN + n, PLAN + ROW)) * 8 // LINE) * LINE // 8
        headers_at = (1 + 2 * n) * LINE
        slots_at = -(-(headers_at + BUFFERS * n * self._header_words * 8) // mmap.PAGESIZE) * mmap.PAGESIZE
        fd = _open_together(group, slots_at + BUFFERS * n * slot_bytes)
        self._fd = fd
        # MAP_POPULATE: the pages are there before the first call that is timed.
        self._map = mmap.mmap(fd, 0, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        with torch.inference_mode(False):
            self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
            self._data = self._bytes[slots_at:]
        words = np.frombuffer(self._map, np.int64)
        self._headers = words[headers_at // 8 :][: BUFFERS * n * self._header_words].reshape(BUFFERS, n, -1)
        self._states = words[(1 + n) * LINE // 8 : headers_at // 8].reshape(n, -1)
        self._count = self._bytes.data_ptr() + TOKEN  # of all arrivals: n in each epoch
        self._flags = self._bytes.data_ptr() + LINE  # the epoch of each rank, to say who is missing
        self._headers_at = self._bytes.data_ptr() + headers_at
        self._slots: dict[torch.dtype, list[list[Tensor]]] = {}
        # Of this rank's own line: its state, its process, and after what time (s, ns) its sleep is to end.
        self._states[self.rank, :4] = ALIVE, os.getpid(), 0, int(LOOK * 1e9)
        self._look_after = self._bytes.data_ptr() + (1 + n + self.rank) * LINE + 2 * 8
        # A lock on one byte of the file, which the system takes back when this process ends, however it ends.
        fcntl.lockf(fd, fcntl.LOCK_EX, 1, self.rank)
        self._release = weakref.finalize(self, os.close, fd)
        dist.barrier(group)

    def slots(self, dtype: torch.dtype) -> list[list[Tensor]]:
        """By buffer and rank, the slots as flat tensors of `dtype`."""
        if dtype not in self._slots:
            with torch.inference_mode(False):  # or a later call outside of that mode could not write to them
                typed = self._data.view(dtype).view(BUFFERS, self.size, -1)
                self._slots[dtype] = [list(buffer) for buffer in typed]
        return self._slots[dtype]

    def meet(self, call: Call, sizes: np.ndarray | None = None) -> np.ndarray:
        """The first crossing of a call: returns the `sizes` of every rank, or raises if the ranks' calls differ.

        Planned calls are not compared here: what the ranks compare are the rows that they give as `sizes`.
        """
        stride = self._header_words * 8
        headers = self._headers[self.epoch % BUFFERS]
        address = self._headers_at + self.epoch % BUFFERS * self.size * stride
        self._calls += 1
        given, words = 4, call.words()
        if call.planned:
            headers[self.rank, 4 : 4 + PLAN] = words
            given, words = 4 + PLAN, _EXCHANGE
        _atomics.announce(address + self.rank * stride, *words, self._calls)
        if sizes is not None:
            headers[self.rank, given : given + sizes.size] = sizes
        self.cross(call)
        if call.refused or _atomics.odd_one(address, self.size, stride) >= 0:
            raise DifferentCallsError(self._difference(headers))
        return headers[:, given:]

    def cross(self, call: Call) -> None:
        """Wait until all ranks are here. What a rank wrote before it crossed, all may read afterwards."""
        self.epoch += 1
        flag = self._flags + self.rank * LINE
        if not _atomics.arrive(flag, self.epoch, self._count, self.size, YIELDS, self._look_after):
            self._wait(call)

    def give_up(self, why: str) -> None:
        """Use the segment no more, and let the others know."""
        self.broken = self.broken or why
        self._states[self.rank, 0] = GAVE_UP

    def close(self) -> None:
        """Unmap the memory. It is freed when the last rank has done so, or has ended."""
        if not self._release.alive:
            return
        if not self.broken:
            self.broken = "it was closed"
            self._states[self.rank, 0] = CLOSED
        self._slots.clear()
        del self._headers, self._states, self._data, self._bytes
        with contextlib.suppress(BufferError):  # a view that someone still holds keeps the memory until it goes
            self._map.close()
        self._release()

    def _wait(self, call: Call) -> None:
        """Sleep until all are here, and wake now and then to look whether that can still be; and for signals."""
        started = looked = time.monotonic()
        while not _atomics.wait(self._count, self.size * self.epoch, 0, self._look_after):
            now = time.monotonic()
            if now - looked >= LOOK or now - started >= self.timeout:
                looked = now
                self._look(call, now - started)

    def _look(self, call: Call, waited: float) -> None:
        """Raise TimeoutError if waiting is of no use, or has taken too long."""
        # In this order: a rank may arrive and end between the two.
        fates = {rank: self._fate(rank) for rank in range(self.size) if rank != self.rank}
        late = [rank for rank in fates if _atomics.load(self._flags + rank * LINE) < self.epoch]
        if not late:
            return
        reasons = [
            f"rank {rank} {fate}" for rank, fate in fates.items() if fate and (rank in late or fate == "gave up")
        ]
        if not reasons:
            if waited < self.timeout:
                return
            reasons = [f"rank {rank} has not come; it was last seen in {self._last_call(rank)}" for rank in late]
        raise TimeoutError(
            f"{call} (call {self._calls}), rank {self.rank}: waited {waited:.3g} s in vain: {'; '.join(reasons)}"
        )

    def _fate(self, rank: int) -> str:
        """Why `rank` will not come, if that is known."""
        if self._states[rank, 0] != ALIVE:
            return "gave up" if self._states[rank, 0] == GAVE_UP else "has closed its shared memory"
        if self._states[rank, 1] == os.getpid():  # ranks that are threads of one process share its locks
            return ""
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except OSError:  # still held
            return ""
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, rank)
        return "has closed its shared memory, or its process has ended"  # or has forgotten it, which closes it too

    def _last_call(self, rank: int) -> str:
        header = max(self._headers[:, rank], key=lambda words: int(words[3]))
        return f"call {header[3]}, {Call.read(header)}" if header[3] else "no call yet"

    def _difference(self, headers: np.ndarray) -> str:
        calls = [Call.read(header) for header in headers]
        other = next((rank for rank, call in enumerate(calls) if call.refused), None)
        if other is None:
            other = next(rank for rank in range(1, self.size) if (headers[rank, :4] != headers[0, :4]).any())
        first = 0 if other else min(1, self.size - 1)
        one, two = str(calls[first]), str(calls[other])
        if one == two:
            two = "the same with other sizes"
        return (
            f"the ranks differ in call {self._calls}: rank {first} calls {one}; rank {other} calls {two}. "
            "All ranks must make the same calls in the same order; nothing was written"
        )


def patience(group: Any) -> float:
    """Seconds that `group` waits in a collective of its own before it gives up; `TIMEOUT` if it does not say."""
    group = dist.group.WORLD if group is None else group
    for device in ("cpu", "cuda"):
        try:
            backend = group._get_backend(torch.device(device))
        except (RuntimeError, AttributeError):  # it serves no such device, or this process is none of its ranks
            continue
        waits = getattr(getattr(backend, "options", None), "_timeout", None)
        if waits is not None:
            return float(waits.total_seconds())
    return TIMEOUT


def _open_together(group: Any, nbytes: int) -> int:
    """A descriptor of one file of `nbytes` that every rank of `group` has open and that no folder lists any more.

    Raises ValueError on all ranks if one of them cannot open it, or finds another file by that name.
    """
    rank = dist.get_rank(group)
    fd, path, token, problem = -1, "", secrets.token_bytes(TOKEN), ""
    if rank == 0:
        try:
            fd, path = _make(nbytes)
            os.pwrite(fd, token, 0)
        except OSError as error:
            problem = str(error)
    answers: list[Any] = [None] * dist.get_world_size(group)
    try:
        said = [(path, token, problem, nbytes)]
        dist.broadcast_object_list(said, group=group, group_src=0)
        path, token, problem, expected = said[0]
        if not problem and nbytes != expected:
            problem = f"asks for {nbytes} bytes and rank 0 for {expected}: give all ranks the same slot_bytes"
        if not problem and rank > 0:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                if os.pread(fd, TOKEN, 0) != token:
                    problem = f"sees another {path}"
            except OSError as error:
                problem = f"cannot open {path}: {error.strerror}"
        dist.all_gather_object(answers, (problem, socket.gethostname()), group=group)
    finally:
        if rank == 0 and path:
            Path(path).unlink()
    if any(problem for problem, _ in answers):
        if fd >= 0:
            os.close(fd)
        where = "; ".join(f"rank {r} on {host} {problem}" for r, (problem, host) in enumerate(answers) if problem)
        raise ValueError(
            f"no memory that all ranks share: {where}. SharedMemory serves the ranks of one host (and one container); "
            "across hosts use the algorithms of mlsys.parallel.collectives"
        )
    return fd


def _make(nbytes: int) -> tuple[int, str]:
    """A new file of `nbytes`, in memory where the system has a folder for that: its descriptor and path."""
    for folder in FOLDERS:
        if not os.access(folder, os.W_OK):
            continue
        fd, path = tempfile.mkstemp(prefix="mlsys-", dir=folder)
        try:
            # With room reserved: a file system that is full says so now, and not by SIGBUS at the first write.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, nbytes)
            else:  # macOS
                os.truncate(fd, nbytes)
        except OSError as error:
            os.close(fd)
            Path(path).unlink()
            if error.errno != errno.ENOSPC:
                raise
        else:
            return fd, path
    raise OSError(
        errno.ENOSPC,
        f"no room for {nbytes} bytes in {' or '.join(FOLDERS)}: take a smaller slot_bytes, or a larger one "
        "of these (docker run --shm-size)",
    )
