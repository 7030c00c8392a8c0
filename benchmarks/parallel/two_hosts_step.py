"""Two hosts and a thin cable: which way of sending gradients makes the training step fastest?

Run it by `benchmarks/parallel/two_hosts.sh`, as `parallel.two_hosts`, which asks the same of the all-reduce alone.

What to look at: through 100 Mbit/s a step is all communication. Overlap hides at most the backward pass, a small part;
sending fewer bytes is what counts, half with bfloat16, some fiftieth with the largest hundredth of the gradients. At
10 Gbit/s the computation is the longer part, overlap has something to hide behind, and compression costs more than it
saves. Where one stops and the other begins is the point of having measured.

"predicted" is the step without communication, measured here, and then: for naive and flat the α-β time of their
all-reduces on top; for the overlapped ones the longer of the two, which is the least that it can be.

Peer: torch's DistributedDataParallel; for bfloat16, with its own hook for that.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from mlsys.bench import Benchmark, Impl, Work, find
from mlsys.bench.ranks import rank, size
from mlsys.models import transformer
from mlsys.models.transformer import Transformer
from mlsys.parallel import Communicator
from mlsys.parallel.compress import BF16, Compressor, TopK
from mlsys.parallel.data_parallel import DataParallel
from mlsys.perf.configs import Config, llama
from mlsys.perf.transformer import training_flops

network = find.beside(__file__, "_network")

Case = Mapping[str, Any]
SEQ, BATCH = 128, 4
ALLOWED, ALLOWED_COMPRESSED = 1e-3, 0.3  # relative error of a loss; compression is meant to change the gradients


@dataclass(frozen=True)
class Inputs:
    """One rank's batch, and the model."""

    config: Config
    tokens: torch.Tensor

    def model(self) -> Transformer:
        """A fresh one, the same each time and on each rank."""
        made = Transformer(self.config, device=self.tokens.device)
        return transformer.init(made, torch.Generator(self.tokens.device).manual_seed(0))

    @cached_property
    def communicator(self) -> Communicator:
        """Without shared memory: this is about networks."""
        return Communicator(shared_memory=False)

    @cached_property
    def alone_s(self) -> float:
        """Seconds of a step that sends nothing, on all ranks at once: the median of five."""
        losses, taken = steps(self.model(), self), []
        for _ in range(6):
            start = time.perf_counter()
            next(losses)
            taken.append(time.perf_counter() - start)
        return statistics.median(taken[1:])


@dataclass(frozen=True)
class Ours:
    """Data parallelism of ours."""

    strategy: str = "bucketed"
    compress: type[Compressor] | None = None

    def __call__(self, module: nn.Module, given: Inputs) -> nn.Module:
        compress = None if self.compress is None else self.compress()
        return DataParallel(
            module, given.communicator, strategy=self.strategy, bucket_mb=4.0, first_bucket_mb=1.0, compress=compress
        )


@dataclass(frozen=True)
class Torch:
    """Data parallelism of torch's."""

    hook: Callable[..., Any] | None = None

    def __call__(self, module: nn.Module, given: Inputs) -> nn.Module:
        model = nn.parallel.DistributedDataParallel(module, bucket_cap_mb=4.0)
        if self.hook is not None:
            model.register_comm_hook(None, self.hook)
        return model


def in_bfloat16(state, bucket):  # type: ignore[no-untyped-def]  # torch compares annotations with classes, not names
    """Torch's own hook, which it refuses to run over gloo under its own name, although gloo adds bfloat16."""
    return bf16_compress_hook(state, bucket)


def predicted(function: Any, given: Inputs) -> float | None:
    """Seconds of a step by the α-β model with the cable's bandwidth; None without one."""
    bandwidth = network.cable(size())
    if bandwidth is None:
        return None
    weights = [p.nbytes for p in given.model().parameters()]
    n, s = size(), sum(weights)
    if getattr(function, "compress", None) is TopK:  # from each rank of one host, 1 % of values, with their places
        sent = 2 * 0.01 * s * n / 2
    else:
        half = getattr(function, "compress", None) is BF16 or getattr(function, "hook", None) is not None
        sent = network.crossing("ring" if isinstance(function, Torch) else "hierarchical", n, s / 2 if half else s)
    calls = len(weights) if getattr(function, "strategy", "") == "naive" else 1
    communication = calls * 2 * (n - 1) * given.communicator.links.alpha + sent / bandwidth
    if getattr(function, "strategy", "bucketed") in ("naive", "flat"):
        return given.alone_s + communication
    return max(given.alone_s, communication)


class Call:
    """A step."""

    def __init__(self, function: Any, given: Inputs) -> None:
        self.predicted_s = predicted(function, given)
        self.losses = steps(function(given.model(), given), given)

    def __call__(self) -> tuple[float, float | None]:
        return next(self.losses), self.predicted_s


def steps(model: nn.Module, given: Inputs) -> Iterator[float]:
    """The losses of this rank."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, foreach=True)
    x, y = given.tokens[:, :-1], given.tokens[:, 1:]
    while True:
        optimizer.zero_grad()
        logits = model(x)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        yield loss.item()


def case(width: int) -> Case:
    return network.case(model="transformer", width=width)


def config(case: Case) -> Config:
    return llama(4, case["width"], case["width"] // 32, 3 * case["width"], vocab=256, context=SEQ)


def inputs(case: Case, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(1 + rank())
    return Inputs(config(case), torch.randint(256, (BATCH, SEQ + 1), generator=generator, device=device))


def work(case: Case, given: Inputs) -> Work:
    flops = training_flops(given.config, BATCH, SEQ, causal=True).total
    # A weight is read forward and backward, and it and its momentum are read and written in the step; its gradient is
    # written, sent, received and read.
    bytes_ = 10 * sum(p.nbytes for p in given.model().parameters())
    n = case["ranks"]
    return Work(flops=n * flops, bytes=n * bytes_, items=n * BATCH * SEQ, unit="tokens")


def verify(case: Case, given: Inputs, got: Any, want: Any) -> tuple[float, float]:
    """The relative error of the loss."""
    return abs(got[0] - want[0]) / abs(want[0]), ALLOWED_COMPRESSED


bench = Benchmark(
    __file__,
    cases={"quick": [case(128)], "default": [case(256)], "full": [case(256), case(512)]},
    inputs=inputs,
    work=work,
    impls={
        "naive": Impl(lambda: Ours("naive"), "reference"),
        "flat": Impl(lambda: Ours("flat"), "variant"),
        "bucketed": Impl(lambda: Ours(), "ours"),
        "bucketed, bfloat16": Impl(lambda: Ours(compress=BF16), "variant"),
        "bucketed, top 1%": Impl(lambda: Ours(compress=TopK), "variant"),
        "torch DDP": Impl(lambda: Torch(), "peer"),
        "torch DDP, bfloat16": Impl(lambda: Torch(in_bfloat16), "peer"),
    },
    subject="bucketed",
    prepare=lambda function, case, given: Call(function, given),
    verify=verify,
    figures=lambda case, given, got: network.figures(got[1]),
    stateful=True,
    ranks=lambda case: case["ranks"],
    pictures={"bandwidth": lambda records: network.picture(records, "width", "step, transformer of width {}, 4 ranks")},
)

if __name__ == "__main__":
    bench.main()
