"""Starting ranks: how long is it until n processes have added up a number, and their results are back?

What to look at: importing torch takes a second or two, and whoever starts Python anew does that n times, on the cores
that there are. A warm process that forks does it once for all launches. "fork" is the least: the caller forks itself,
which is safe only as long as it has no threads, and copies whatever it holds.

Peers: `torch.multiprocessing` with a forkserver that has torch preloaded, and with spawn (in the full size, for it
takes seconds); what they start has to be importable, and `__main__` is run again.
"""

from __future__ import annotations

import atexit
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mlsys.bench import Benchmark, Impl, Plot, Work
from mlsys.parallel.launcher import launch

Case = Mapping[str, Any]
HEAD = "from pathlib import Path\nimport torch\nimport torch.distributed as dist\n\n"


def add(number: float) -> float:
    """What each rank does."""
    total = torch.tensor(number)
    dist.all_reduce(total)
    return total.item()


def ours(n: int, number: float) -> list[float]:
    return launch(add, n, number)


def fork(n: int, number: float) -> list[float]:
    """The smallest thing that works: no error of a rank is reported."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(n):
            child = os.fork()
            if child == 0:
                _rank(rank, n, folder, number)
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        return [float((Path(folder) / str(rank)).read_text()) for rank in range(n)]


def by_multiprocessing(method: str) -> Callable[[int, float], list[float]]:
    """What its processes run travels by name: so it has to be in a module that they can import, made here."""
    import multiprocessing
    import sys

    folder = tempfile.mkdtemp(prefix="mlsys-startup-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (Path(folder) / "mlsys_startup.py").write_text(HEAD + inspect.getsource(add) + "\n\n" + inspect.getsource(_rank))
    if folder not in sys.path:
        sys.path.insert(0, folder)
    multiprocessing.set_forkserver_preload(["torch", "torch.distributed"])

    def run(n: int, number: float) -> list[float]:
        import mlsys_startup  # type: ignore[import-not-found]

        with tempfile.TemporaryDirectory() as results:
            torch.multiprocessing.start_processes(
                mlsys_startup._rank, args=(n, results, number), nprocs=n, start_method=method
            )
            return [float((Path(results) / str(rank)).read_text()) for rank in range(n)]

    return run


def _rank(rank: int, n: int, folder: str, number: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n)
    (Path(folder) / str(rank)).write_text(str(add(number)))
    dist.barrier()
    dist.destroy_process_group()


def case(ranks: int) -> Case:
    return {"ranks": ranks}


def verify(case: Case, number: float, got: list[float], want: list[float]) -> tuple[float, float]:
    """The largest error of a rank's sum."""
    return max(abs(g - case["ranks"] * number) for g in [*got, *want]), 0.0


SMALL = [case(1), case(2), case(4)]
bench = Benchmark(
    __file__,
    cases={"quick": [case(2)], "default": SMALL, "full": [*SMALL, case(8)]},
    inputs=lambda case, device: 0.5,
    # There is nothing that any implementation must compute: so there is no share of a limit either.
    work=lambda case, number: Work(flops=0, bytes=0, items=case["ranks"], unit="ranks"),
    impls={
        "fork": Impl(lambda: fork, "reference"),
        "launch": Impl(lambda: ours, "ours"),
        "torch forkserver": Impl(lambda: by_multiprocessing("forkserver"), "peer"),
        "torch spawn": Impl(lambda: by_multiprocessing("spawn"), "peer", only=lambda case: case["ranks"] == 8),
    },
    subject="launch",
    prepare=lambda function, case, number: lambda: function(case["ranks"], number),
    verify=verify,
    plots=(Plot(x="ranks", xlabel="ranks"),),
)

if __name__ == "__main__":
    bench.main()
