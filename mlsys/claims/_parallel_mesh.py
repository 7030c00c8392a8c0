"""Published numbers about pipelines that run, and about several kinds of parallelism together."""

from __future__ import annotations

from mlsys.claims._parallel_time import MEGATRON
from mlsys.claims.core import Claim

DEPTH, MICROBATCHES = 4, 6
RANKS, SAMPLES = 32, 128  # n and b' = B / b of the paper's figure about data and pipeline parallelism
REPLICAS = 4
BOTH = f"{MEGATRON}, data and pipeline parallelism: (n − d) / b' at n = {RANKS}, b' = {SAMPLES}, d = {REPLICAS}"


def in_flight(name: str) -> int:
    """The most forward passes of the first stage whose backward pass is still to come, in a pipeline that runs."""
    from mlsys.parallel import launch

    return max(launch(_run, DEPTH, name, MICROBATCHES))


def _run(name: str, m: int) -> int:
    """One step on this rank's stage; how many microbatches it held."""
    import torch
    from torch import nn

    from mlsys.parallel.pipeline import SCHEDULES, Pipeline

    torch.manual_seed(0)
    stages = [nn.Linear(2, 2) for _ in range(DEPTH)]
    held = most = 0

    def forward(*_: object) -> None:
        nonlocal held, most
        held += 1
        most = max(most, held)

    def backward(*_: object) -> None:
        nonlocal held
        held -= 1

    for stage in stages:
        stage.register_forward_hook(forward)
        stage.register_full_backward_hook(backward)
    x = torch.ones(m, 2, requires_grad=True)
    Pipeline(stages, SCHEDULES[name](DEPTH, m), nn.functional.mse_loss).step(x, torch.zeros(m, 2))
    return most


def over_work(replicas: int) -> float:
    """Waiting over working, of each pipeline if the ranks are so many replicas of it, simulated."""
    from mlsys.parallel.mesh import Grid
    from mlsys.parallel.schedules import one_f_one_b, simulate

    grid = Grid(dp=replicas, pp=RANKS // replicas)
    first = simulate(one_f_one_b(grid.pp, SAMPLES // grid.dp)).ranks[0]
    return first.idle / first.busy


RUN = [
    Claim(
        name="pipeline-in-flight-1f1b",
        area="parallel.pipeline",
        source=f"{MEGATRON}, section 2.2.1: at most p microbatches in flight, p = {DEPTH}",
        what=f"microbatches that a rank holds in a step that runs, m = {MICROBATCHES}",
        unit="",
        published=DEPTH,
        digits=0,
        compute=lambda: in_flight("1f1b"),
    ),
    Claim(
        name="pipeline-in-flight-gpipe",
        area="parallel.pipeline",
        source=f"{MEGATRON}, section 2.2.1: all m microbatches in flight, m = {MICROBATCHES}",
        what=f"microbatches that a rank holds in a step that runs, p = {DEPTH}",
        unit="",
        published=MICROBATCHES,
        digits=0,
        compute=lambda: in_flight("gpipe"),
    ),
    Claim(
        name="mesh-bubble-with-replicas",
        area="parallel.mesh",
        source=BOTH,
        what="bubble over work, if 32 ranks are 4 replicas of pipelines of 8, and 128 samples go one by one",
        unit="",
        published=0.21875,
        digits=5,
        formula=True,
        compute=lambda: over_work(REPLICAS),
    ),
]
