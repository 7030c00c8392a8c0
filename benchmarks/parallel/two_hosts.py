"""Two hosts and a thin cable: which all-reduce is fastest when the ranks are not all on one machine?

Run it by `benchmarks/parallel/two_hosts.sh`, which makes two hosts out of one machine, joined by a cable of a chosen
bandwidth, or by torchrun on two real ones; alone, the ranks are on one host and talk over its loopback.

What to look at: how often the vector crosses the cable. Each way, a ring sends 2S(n−1)/n bytes over it, for only one
of its links leads out of a host. Halving-doubling and recursive doubling pair every rank with one of the other host, so
that with k ranks a host k·S bytes must pass, each pair fast and all together slow. Hierarchical adds up inside the
hosts first, and S bytes cross: with two ranks a host, two thirds of the ring's. The thinner the cable, the nearer the
times to these ratios; at 10 Gbit/s the processors are the bound, and steps and copies count.

"predicted" is steps·α + (bytes that cross the cable)/bandwidth, with the α that this run measured.

Peer: torch's own all-reduce, over gloo.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from mlsys.bench import Benchmark, Impl, Work, find
from mlsys.bench.ranks import rank, size
from mlsys.parallel import Communicator, collectives
from mlsys.perf.collectives import bus_bandwidth, cost

network = find.beside(__file__, "_network")

Case = Mapping[str, Any]
KB, MB = 1024, 1024**2


@dataclass(frozen=True)
class Inputs:
    """One rank's vector, and the ranks."""

    case: Case
    vector: torch.Tensor

    @cached_property
    def communicator(self) -> Communicator:
        """Without shared memory: this is about networks."""
        return Communicator(shared_memory=False)


@dataclass(frozen=True)
class Result:
    """The sum, and how long the model says that it takes (None: it cannot say)."""

    tensor: torch.Tensor
    predicted_s: float | None


class Call:
    """An all-reduce of this implementation's own vector, in place."""

    def __init__(self, function: Callable[..., Any], given: Inputs) -> None:
        self.function, self.given, self.tensor = function, given, given.vector.clone()
        algorithm = function.algorithm if isinstance(function, Ours) else "ring" if function is gloo else ""
        self.predicted_s = predicted(algorithm, given) if algorithm else None

    def __call__(self) -> Result:
        if isinstance(self.function, Ours):
            self.function(self.tensor, self.given.communicator)
        else:
            self.function(self.tensor)
        return Result(self.tensor, self.predicted_s)

    def reset(self) -> None:
        """As before the first call."""
        self.tensor.copy_(self.given.vector)


def predicted(algorithm: str, given: Inputs) -> float | None:
    """Seconds by the α-β model, where ranks of a host share its cable; None without one."""
    bandwidth = network.cable(size())
    if bandwidth is None:
        return None
    if algorithm == "auto":
        algorithm = given.communicator.choose("all_reduce", given.case["bytes"]).algorithm
    if algorithm == "backend":
        algorithm = "ring"
    n, s = size(), given.case["bytes"]
    steps = cost("all_reduce", algorithm, n, s, local=n // 2 if algorithm == "hierarchical" else None).steps
    return steps * given.communicator.links.alpha + network.crossing(algorithm, n, s) / bandwidth


def case(n_bytes: int) -> Case:
    return network.case(bytes=n_bytes)


def inputs(case: Case, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(1 + rank())
    return Inputs(case, torch.randn(case["bytes"] // 4, generator=generator, device=device))


def work(case: Case, given: Inputs) -> Work:
    n, s = case["ranks"], case["bytes"]  # of all ranks: each reads its vector and writes the sum
    return Work(flops=(n - 1) * s / 4, bytes=2 * n * s, items=bus_bandwidth("all_reduce", n, s, 1.0), unit="B")


def verify(case: Case, given: Inputs, got: Result, want: Result) -> tuple[float, float]:
    """The largest error, of the largest number: a rounding for each rank."""
    return float((got.tensor - want.tensor).abs().max() / want.tensor.abs().max()), case["ranks"] * 2.0**-23


@dataclass(frozen=True)
class Ours:
    """One of our algorithms."""

    algorithm: str

    def __call__(self, tensor: torch.Tensor, communicator: Communicator) -> None:
        collectives.all_reduce(tensor, communicator, algorithm=self.algorithm, check=False)


def gloo(tensor: torch.Tensor) -> None:
    dist.all_reduce(tensor)


def two(case: Case) -> bool:
    """Whether there are two hosts, so that something can be added up inside one."""
    return network.mbit_of(case) is not None


# A case takes its time from the cable, so that less is sent through a thin one.
SMALL, LARGE = [case(64 * KB), case(MB)], [case(16 * MB)]
bench = Benchmark(
    __file__,
    cases={
        "quick": [case(MB)],
        "default": SMALL if (network.link_mbit() or 1e9) < 500 else SMALL + LARGE,
        "full": SMALL + LARGE,
    },
    inputs=inputs,
    work=work,
    impls={
        "ring": Impl(lambda: Ours("ring"), "reference"),
        "halving_doubling": Impl(lambda: Ours("halving_doubling"), "variant"),
        "recursive_doubling": Impl(lambda: Ours("recursive_doubling"), "variant"),
        "hierarchical": Impl(lambda: Ours("hierarchical"), "variant", only=two),
        "auto": Impl(lambda: Ours("auto"), "ours"),
        "torch": Impl(lambda: gloo, "peer"),
    },
    subject="auto",
    prepare=lambda function, case, given: Call(function, given),
    verify=verify,
    figures=lambda case, given, got: network.figures(got.predicted_s),
    ranks=lambda case: case["ranks"],
    pictures={"bandwidth": lambda records: network.picture(records, "bytes", "all-reduce of {} bytes, 4 ranks")},
)

if __name__ == "__main__":
    bench.main()
