"""gloo's event loops, and how a rank keeps them from standing in its own way.

gloo has a thread for each process group that waits for the network. When something arrives it takes the lock of that
connection; if it cannot, it asks the kernel again and is told the same at once, and so it spins. Now let it wake on the
core of the very thread that is in a send and holds that lock: it preempts it, and spins until its time slice ends, some
3 ms later. With as many ranks as cores that happens to every second message.

A thread of the kernel's batch class gets the same share of the CPU, but preempts nobody when it wakes. The loops are
known by their name; torch 2.11 gives them none, and there they stay as they are.
"""

import contextlib
import os
from pathlib import Path


def calm() -> None:
    """Make the event loops that this process has by now batch threads; ours and torch's collectives gain alike."""
    if not hasattr(os, "SCHED_BATCH"):  # Linux only
        return
    for thread in Path("/proc/self/task").iterdir():
        # Its thread has just ended, or the system forbids it: then it is as slow as it was.
        with contextlib.suppress(OSError):
            if (thread / "comm").read_text().startswith("gloo_tcp_loop"):
                os.sched_setscheduler(int(thread.name), os.SCHED_BATCH, os.sched_param(0))
