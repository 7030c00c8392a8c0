"""Collectives: what does it cost to add a vector over ranks, by size and algorithm, beside torch's own?

What to look at: each algorithm has its range. A small vector costs steps, so that
few steps win (recursive doubling, tree); a large one costs bytes, so that those win
which send the fewest (ring, halving-doubling). On one host neither matters as much as
not sending at all: through shared memory each rank copies its vector in once and
the sum out once. `auto` takes the one that its measured α and β say is fastest; see
how often that is right. "checked" is what it costs that all ranks first compare
what they are about to do, which torch does not: with gloo, ranks that disagree hang,
or get wrong numbers.

The rate is bus bandwidth, as nccl-tests count it: the bytes that the best algorithm
would send over each link in the time that was taken. On one host a link is memory.
Sums are made in place, as torch makes them, and the vector is only put back
between samples: within one it grows, up to infinity, which adds no slower.

Peer: torch's own collectives, over gloo on a CPU and NCCL on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from mlsys.bench import Benchmark, Impl, Plot, Work
from mlsys.bench.ranks import rank, size
from mlsys.parallel import Communicator, collectives
from mlsys.parallel.shared_memory import SharedMemory
from mlsys.perf.collectives import bus_bandwidth

Case = Mapping[str, Any]
Tensors = tuple[torch.Tensor, ...]
KB, MB = 1024, 1024**2
IN_PLACE = ("all_reduce", "broadcast")
REDUCES = ("all_reduce", "reduce_scatter")


@dataclass(frozen=True)
class Inputs:
    """One rank's vector, what it is for, and the ranks."""

    operation: str
    vector: torch.Tensor

    @cached_property
    def communicator(self) -> Communicator:
        """One for all implementations: what belongs to the group is measured and set up once."""
        return Communicator()

    def tensors(self) -> Tensors:
        """New ones for one implementation: what it works on in place, or (output, input)."""
        if self.operation in IN_PLACE:
            return (self.vector.clone(),)
        if self.operation == "all_gather":
            return torch.empty_like(self.vector), self.vector.chunk(size())[rank()].clone()
        if self.operation == "reduce_scatter":
            return torch.empty_like(self.vector.chunk(size())[0]), self.vector
        return torch.empty_like(self.vector), self.vector


def case(operation: str, ranks: int, n_bytes: int) -> Case:
    return {"operation": operation, "ranks": ranks, "bytes": n_bytes}


def inputs(case: Case, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(1 + rank())
    return Inputs(case["operation"], torch.randn(case["bytes"] // 4, generator=generator, device=device))


def work(case: Case, given: Inputs) -> Work:
    # Of all ranks: each reads its input and writes its output once, however they meet; n vectors take n − 1 additions.
    n, s = case["ranks"], case["bytes"]
    moved = {"all_reduce": 2 * n, "broadcast": n, "all_to_all": 2 * n}.get(case["operation"], n + 1) * s
    adds = (n - 1) * s / 4 if case["operation"] in REDUCES else 0.0
    return Work(flops=adds, bytes=moved, items=bus_bandwidth(case["operation"], n, s, 1.0), unit="B")


# Renamed in torch 2.13, which warns of the old names.
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
# A broadcast by scatter_all_gather ends with a ring; a pairwise exchange goes around one, further each time.
RING = {"broadcast": "scatter_all_gather", "all_to_all": "pairwise"}


@dataclass(frozen=True)
class Ours:
    """Each operation by one algorithm; where it has no ring, by what is nearest to one."""

    algorithm: str
    check: bool = False

    def __call__(self, given: Inputs, *tensors: torch.Tensor) -> None:
        algorithm = RING.get(given.operation, "ring") if self.algorithm == "ring" else self.algorithm
        getattr(collectives, given.operation)(*tensors, given.communicator, algorithm=algorithm, check=self.check)


@dataclass(frozen=True)
class Direct:
    """Each operation through shared memory, without the door before it."""

    def __call__(self, given: Inputs, *tensors: torch.Tensor) -> None:
        memory = given.communicator.shared
        assert isinstance(memory, SharedMemory), "the ranks are on several hosts"
        getattr(memory, given.operation)(*tensors)


@dataclass(frozen=True)
class Torch:
    """Each operation by torch."""

    def __call__(self, given: Inputs, *tensors: torch.Tensor) -> None:
        out, *rest = tensors
        match given.operation:
            case "all_reduce":
                dist.all_reduce(out)
            case "broadcast":
                dist.broadcast(out, src=0)
            case "all_to_all":
                dist.all_to_all_single(out, rest[0])
            case "all_gather":
                ALL_GATHER(out, *rest)
            case "reduce_scatter":
                REDUCE_SCATTER(out, *rest)


class Call:
    """What is timed: the operation on this implementation's own tensors."""

    def __init__(self, function: Callable[..., Any], given: Inputs) -> None:
        self.tensors = given.tensors()
        own = isinstance(function, Ours | Direct | Torch)  # else someone's `all_reduce(tensor)`
        self.function, self.arguments = function, ((given, *self.tensors) if own else self.tensors)

    def __call__(self) -> torch.Tensor:
        self.function(*self.arguments)
        return self.tensors[0]


class InPlace(Call):
    """The same where the result takes the place of the input, so that this has to be put back."""

    def __init__(self, function: Callable[..., Any], given: Inputs) -> None:
        super().__init__(function, given)
        self.vector = given.vector

    def reset(self) -> None:
        """As before the first call."""
        self.tensors[0].copy_(self.vector)


def prepare(function: Callable[..., Any], case: Case, given: Inputs) -> Callable[[], torch.Tensor]:
    return (InPlace if case["operation"] in IN_PLACE else Call)(function, given)


def verify(case: Case, given: Inputs, got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """The largest error, of the largest number: what is only moved has none, a sum has a rounding for each rank."""
    allowed = case["ranks"] * 2.0**-23 if case["operation"] in REDUCES else 0.0
    return float((got - want).abs().max() / want.abs().max()), allowed


def chosen(case: Case, given: Inputs, got: torch.Tensor) -> dict[str, list[Any]]:
    return {"auto": [given.communicator.choose(case["operation"], case["bytes"]).algorithm]}


def does(*operations: str) -> Callable[[Case], bool]:
    return lambda case: case["operation"] in operations


def ours(algorithm: str, *operations: str, check: bool = False) -> Impl:
    return Impl(lambda: Ours(algorithm, check), "variant", only=does(*operations))


ALL = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast")
SIZES = [4, 4 * KB, 64 * KB, 256 * KB, MB, 4 * MB, 16 * MB, 64 * MB]
QUICK = [case("all_reduce", 2, n) for n in (64 * KB, 4 * MB)] + [
    case("all_reduce", 4, 4 * KB),
    case("reduce_scatter", 2, 4 * MB),
    case("all_gather", 2, 4 * MB),
]
DEFAULT = [case("all_reduce", n, s) for n in (2, 4) for s in SIZES]
DEFAULT += [case(o, n, s) for o in ALL[1:3] for n in (2, 4) for s in (4 * KB, 256 * KB, 4 * MB, 16 * MB)]
DEFAULT += [case(o, n, s) for o in ALL[3:] for n in (2, 4) for s in (4 * KB, 4 * MB)]
bench = Benchmark(
    __file__,
    cases={
        "quick": QUICK,
        "default": DEFAULT,
        "full": [*DEFAULT, *(case("all_reduce", n, s) for n in (3, 8) for s in SIZES[:-1])],
    },
    inputs=inputs,
    work=work,
    impls={
        "ring": Impl(lambda: Ours("ring"), "reference"),
        "halving_doubling": ours("halving_doubling", "all_reduce"),
        "recursive_doubling": ours("recursive_doubling", "all_reduce"),
        "tree": ours("tree", "all_reduce", "broadcast"),
        "shared_memory": Impl(Direct, "variant"),
        "auto, checked": ours("auto", *ALL, check=True),
        "auto": Impl(lambda: Ours("auto"), "ours"),
        "torch": Impl(Torch, "peer"),
    },
    subject="auto",
    prepare=prepare,
    verify=verify,
    series=chosen,
    contract="parallel.collectives",
    yours=does("all_reduce"),
    budget_s=4.0,
    ranks=lambda case: case["ranks"],
    plots=(Plot(x="bytes", xlabel="bytes of the vector", panel=("operation", "ranks")),),
)

if __name__ == "__main__":
    bench.main()
