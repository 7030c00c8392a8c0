"""Memory: the peak of one call, exactly, or what a call leaves behind, whichever threads it has.

`peak_bytes` is exact, not sampled: on a CPU torch's allocator reports every
allocation to the profiler, including those inside C++ kernels, and the peak is the
maximum of the running sum; on a GPU the caching allocator keeps that maximum itself.
Memory that numpy or numba allocate is not seen: a benchmark of such code reports the
size of what it built instead. Nor are other threads: the profiler follows the one that
called and autograd's, so that what one allocates and another frees seems to stay.

`used` is for code that hands tensors to threads of its own, as what overlaps computing
with sending does. It asks the C library, which knows of all allocations but keeps no
maximum: so what is held is exact, but for some kilobytes of Python's, and the peak the largest of samples.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SAMPLE_S = 0.001


@dataclass(frozen=True)
class Used:
    """Bytes beyond what was there before a call: the most seen at any moment, and what is still held after it."""

    peak: int
    held: int


def peak_bytes(run: Callable[[], Any], device: str = "cpu") -> int:
    """Run once; the largest total of bytes allocated by torch during the call and not yet freed."""
    if device == "cuda":
        return used(run, device).peak
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler's library talks to stderr on every start
    from torch.profiler import ProfilerActivity, profile

    # Kept until the end. What is freed here but was there before would count as less than nothing, if an earlier call
    # of this function saw it allocated; if none did, the allocator complains.
    before = _tensors()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        run()
    del before
    held = most = 0
    events = recorded.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def _tensors() -> list[Any]:
    """All tensors that there are, with their gradients and memory: such as those that a training step replaces."""
    import torch

    found: list[Any] = []
    for one in gc.get_objects():
        if issubclass(type(one), torch.Tensor):  # not isinstance: a lazy object would make up its mind
            found.append(one)
            if type(one) in (torch.Tensor, torch.nn.Parameter) and one.layout == torch.strided:
                found.append(one.untyped_storage())  # `one` may get another
                found.append(one.grad if one.is_leaf else None)
    return found


def used(run: Callable[[], Any], device: str = "cpu") -> Used:
    """Run once; what was allocated for it, by any thread: torch's on a GPU, the whole process's on a CPU.

    Its result is not among what is held, unless `run` keeps it. What is mapped rather than allocated, such as memory
    shared with other processes, is not counted.
    """
    gc.collect()  # what is garbage already, if it were freed during the call, would count against it
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return Used(int(torch.cuda.max_memory_allocated() - before), int(torch.cuda.memory_allocated() - before))
    before = allocated_bytes()
    most, done = before, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(SAMPLE_S):
            most = max(most, allocated_bytes())

    watcher = threading.Thread(target=watch, name="mlsys bench memory", daemon=True)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    held = allocated_bytes()
    return Used(max(most, held) - before, held - before)


def allocated_bytes() -> int:
    """What this process has allocated and not freed: by glibc's count, and elsewhere the memory that is resident."""
    ask = _mallinfo()
    if ask is not None:
        found = ask()
        return int(found.uordblks + found.hblkhd)  # in the heaps, and in mappings of their own
    import psutil

    return int(psutil.Process().memory_info().rss)


class _MallInfo(ctypes.Structure):
    """`struct mallinfo2` of malloc.h: as of glibc 2.33."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


@functools.cache
def _mallinfo() -> Callable[[], Any] | None:
    function = getattr(ctypes.CDLL(None), "mallinfo2", None) if os.name == "posix" else None
    if function is not None:
        function.restype = _MallInfo
    return function
