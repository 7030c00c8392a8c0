"""Launch kernels on the processor: blocks are spread over its cores, each with a copy of the kernel's library."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from pathlib import Path

OUT = 1 << 18  # bytes for what is found
RUN, CHECK, PROFILE = 0, 1, 2


class _Region(ctypes.Structure):
    _fields_ = (
        ("lo", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("unit", ctypes.c_uint32),
        ("index", ctypes.c_uint32),
    )


class _Launch(ctypes.Structure):  # scheduler.h has the same
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint64),
        ("args", ctypes.c_void_p),
        ("next", ctypes.POINTER(ctypes.c_int64)),
        ("order", ctypes.c_uint32),
        ("mode", ctypes.c_uint32),
        ("regions", ctypes.POINTER(_Region)),
        ("symbols", ctypes.POINTER(ctypes.c_uint64)),
        ("n_regions", ctypes.c_uint64),
        ("n_symbols", ctypes.c_uint64),
        ("out", ctypes.c_char_p),
        ("out_size", ctypes.c_uint64),
        ("stop", ctypes.POINTER(ctypes.c_int32)),
        ("workers", ctypes.c_uint32),
        ("arrived", ctypes.POINTER(ctypes.c_uint32)),
        ("finished", ctypes.POINTER(ctypes.c_uint32)),
        ("notes", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Memory:
    """A tensor among the arguments: where it lies, how long it is, the size of its elements, which argument it is."""

    address: int
    bytes: int
    unit: int
    index: int


@dataclass(frozen=True)
class Line:
    """What a worker found, as the runtime wrote it, and where that worker's copy of the library lies."""

    fields: tuple[str, ...]
    base: int


class Library:
    """A kernel's library, loaded once a worker. Copies: the same file would be loaded only once."""

    def __init__(self, path: Path, runtime: ctypes.CDLL) -> None:
        self.path, self.runtime = path, runtime
        self._copies: list[ctypes.CDLL] = []
        self._lock = threading.Lock()
        self._busy = (os.getpid(), threading.Lock())

    @property
    def busy(self) -> threading.Lock:
        """Held while it runs: another launch at the same time would write over the blocks' shared memory."""
        if self._busy[0] != os.getpid():  # a fork: whoever held it is not there
            self._busy = (os.getpid(), threading.Lock())
        return self._busy[1]

    def copies(self, count: int) -> list[ctypes.CDLL]:
        """At least so many."""
        with self._lock:
            while len(self._copies) < count:
                with tempfile.TemporaryDirectory() as scratch:
                    copy = Path(scratch) / f"{len(self._copies)}.so"
                    shutil.copyfile(self.path, copy)
                    self._copies.append(ctypes.CDLL(str(copy)))
                self._share(self._copies[-1], first=len(self._copies) == 1)
            return self._copies[:count]

    def _share(self, copy: ctypes.CDLL, first: bool) -> None:
        """Let all copies have the same `__device__` variables, if there are any."""
        copy.mlsys_module.restype = ctypes.c_void_p
        module = copy.mlsys_module()
        begin, end = (ctypes.c_size_t * 11).from_address(module)[9:]  # scheduler.h: device_lo, device_hi
        if begin == end:
            return
        if first:
            self._file = os.memfd_create("mlsys-device")
        if self.runtime.mlsys_share(ctypes.c_void_p(module), self._file, int(first)):
            raise OSError("the __device__ variables of a kernel file could not be shared between cores: out of memory?")

    def signature(self, number: int) -> list[str]:
        """The codes of an instance's parameters."""
        out = ctypes.create_string_buffer(4096)
        getattr(self.copies(1)[0], f"mlsys_signature_{number}")(out)
        return out.value.decode().split()


def base(library: ctypes.CDLL) -> int:
    """Where a library was loaded: the first field of glibc's link map."""
    return ctypes.c_size_t.from_address(library._handle).value


def launch(
    library: Library,
    number: int,
    grid: Sequence[int],
    block: Sequence[int],
    args: ctypes.Array[ctypes.c_void_p],
    *,
    shared: int,
    order: int,
    mode: int,
    memory: Sequence[Memory],
    symbols: Sequence[int],
    threads: int,
    limit: float,
) -> list[Line]:
    """Run a grid; what went wrong, or was found. The call waits; time above `limit` seconds stops the kernel."""
    blocks = grid[0] * grid[1] * grid[2]
    threads = max(1, min(threads, blocks))
    libraries = library.copies(threads)
    following, stop, counts = ctypes.c_int64(0), ctypes.c_int32(0), (ctypes.c_uint32(0), ctypes.c_uint32(0))
    notes = (ctypes.c_void_p * threads)()
    regions = (_Region * max(len(memory), 1))(*(_Region(m.address, m.bytes, m.unit, m.index) for m in memory))
    table = (ctypes.c_uint64 * max(len(symbols), 1))(*symbols)
    outs = [ctypes.create_string_buffer(OUT) for _ in libraries]
    workers: list[int] = []

    def work(i: int) -> int:
        workers.append(threading.get_ident())
        record = _Launch(
            (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block), shared, ctypes.addressof(args),
            ctypes.pointer(following), order, mode, regions, table, len(memory), len(symbols) // 2,
            ctypes.cast(outs[i], ctypes.c_char_p), OUT, ctypes.pointer(stop),
            threads, ctypes.pointer(counts[0]), ctypes.pointer(counts[1]), ctypes.addressof(notes),
        )  # fmt: skip
        return int(getattr(libraries[i], f"mlsys_kernel_{number}")(ctypes.byref(record), args))

    with library.busy:
        running = [_pool(os.getpid()).submit(work, i) for i in range(threads)]
        try:
            _wait(running, limit)
        finally:
            while wait(running, 0.005).not_done:  # time is up; a signal within the runtime is passed over: again
                stop.value = 1
                for worker in workers:
                    library.runtime.mlsys_stop(ctypes.c_uint64(worker))
    for done in running:
        done.result()
    lines = []
    for loaded, out in zip(libraries, outs, strict=True):
        lines += [
            Line(tuple(text.split("\t")), base(loaded)) for text in out.value.decode(errors="replace").splitlines()
        ]
    return lines


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads to run blocks, started as they are needed and kept, since each has a thousand stacks. A fork has none."""
    return ThreadPoolExecutor(64, "mlsys-cuda")


def _wait(running: list[Future[int]], limit: float) -> None:
    end = time.monotonic() + limit
    while wait(running, min(0.1, max(end - time.monotonic(), 0))).not_done and time.monotonic() < end:
        pass  # in steps, so that an interrupt from the keyboard is heard


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
