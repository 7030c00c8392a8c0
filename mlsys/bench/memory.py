"""Peak memory of one call: the most that was allocated at once, beyond what was there before.

Exact, not sampled: on a CPU torch's allocator reports every allocation to the
profiler, including those inside C++ kernels, and the peak is the maximum of the
running sum; on a GPU the caching allocator keeps that maximum itself. Memory
that numpy or numba allocate is not seen: a benchmark of such code reports the
size of what it built instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def peak_bytes(run: Callable[[], Any], device: str = "cpu") -> int:
    """Run once; the largest total of bytes allocated by torch during the call and not yet freed."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler's library talks to stderr on every start
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = most = 0
    events = recorded.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
