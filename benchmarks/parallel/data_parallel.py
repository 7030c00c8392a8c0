"""Data parallelism: what does a training step on n ranks cost, by when the gradients travel, beside torch's DDP?

What to look at: the ladder from naive (one all-reduce a parameter, after the backward
pass) over flat (one for all) to bucketed (while the backward pass still runs). A
transformer has many small parameters, so that the first step of the ladder shows; a
VGG-like net keeps most of its weights in the last layers, whose gradients come first,
so that the second does. "bucketed, backend" sends the same buckets through
torch's all-reduce (gloo): what is left between it and "bucketed" is shared memory.

Each rank has a batch of its own, so that n ranks do n times the work of one, and on a
machine with fewer cores than ranks a step takes the longer: compare within a case. With
`compress` the gradients are sent in bfloat16, or only their largest hundredth with what
was left out kept for later; on one host, where bytes are cheap, that does not pay.

The images are random ones of the size of scikit-learn's digits, the tokens random bytes:
time does not depend on them. See `parallel.scaling` for training on real ones.

Peer: torch's DistributedDataParallel, in float32: its hook for bfloat16 refuses to run without NCCL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mlsys.bench import Benchmark, Impl, Plot, Work
from mlsys.bench.ranks import rank
from mlsys.models import transformer
from mlsys.models.transformer import Transformer
from mlsys.parallel.compress import BF16, TopK
from mlsys.parallel.data_parallel import DataParallel
from mlsys.parallel.traffic import ledger
from mlsys.perf.configs import llama
from mlsys.perf.transformer import training_flops

Case = Mapping[str, Any]
Wrap = Callable[[nn.Module], nn.Module]
STEPS = 2  # a call; that the losses of later calls agree too checks the optimizer
SEQ = 128
ALLOWED = 1e-3  # relative error of a loss: float32 roundings, which steps amplify
ALLOWED_COMPRESSED = 0.2  # compression is meant to change the gradients; a wrong one would diverge


@dataclass(frozen=True)
class Inputs:
    """One rank's batch, and how to make the net."""

    case: Case
    x: torch.Tensor
    y: torch.Tensor

    def model(self) -> nn.Module:
        """A fresh net, the same each time and on each rank."""
        generator = torch.Generator(self.x.device).manual_seed(0)
        if self.case["model"] == "vgg":
            net = vgg(self.case["width"]).to(self.x.device)
            with torch.no_grad():
                for p in net.parameters():
                    p.normal_(0.0, (2 / p[0].numel()) ** 0.5 if p.ndim > 1 else 0.01, generator=generator)
            return net
        return transformer.init(Transformer(config(self.case), device=self.x.device), generator)


def vgg(width: int) -> nn.Module:
    """Simonyan & Zisserman's net for images of 8 × 8: 3 × 3 convolutions in pairs, and wide layers at the end."""

    def block(inside: int, out: int) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for wide in (inside, out):
            layers += [nn.Conv2d(wide, out, 3, padding=1), nn.ReLU()]
        return [*layers, nn.MaxPool2d(2)]

    dense = [nn.Linear(2 * width * 4, 8 * width), nn.ReLU(), nn.Linear(8 * width, 8 * width), nn.ReLU()]
    return nn.Sequential(*block(1, width), *block(width, 2 * width), nn.Flatten(), *dense, nn.Linear(8 * width, 10))


def config(case: Case) -> Any:
    return llama(4, case["width"], case["width"] // 32, 3 * case["width"], vocab=256, context=SEQ)


def case(model: str, width: int, ranks: int, batch: int, compress: bool = False) -> Case:
    return {"model": model, "width": width, "ranks": ranks, "batch": batch, "compress": compress}


def inputs(case: Case, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(1 + rank())
    b = case["batch"]
    if case["model"] == "vgg":
        x = torch.rand(b, 1, 8, 8, generator=generator, device=device)
        return Inputs(case, x, torch.randint(10, (b,), generator=generator, device=device))
    tokens = torch.randint(256, (b, SEQ + 1), generator=generator, device=device)
    return Inputs(case, tokens[:, :-1], tokens[:, 1:])


def loss_of(model: nn.Module, given: Inputs) -> torch.Tensor:
    logits = model(given.x)
    return F.cross_entropy(logits.flatten(0, -2), given.y.flatten())


def work(case: Case, given: Inputs) -> Work:
    model = given.model()
    if case["model"] == "vgg":
        with FlopCounterMode(display=False) as counted:
            loss_of(model, given).backward()
        flops = float(counted.get_total_flops())
    else:
        flops = training_flops(config(case), case["batch"], SEQ, causal=True).total
    # On each rank: a weight is read forward and backward, and both it and its momentum are read and written in the
    # step; its gradient is written, sent, received and read.
    bytes_ = 10 * sum(p.nbytes for p in model.parameters())
    n = STEPS * case["ranks"]
    return Work(flops=n * flops, bytes=n * bytes_, items=n * case["batch"], unit="samples")


@dataclass(frozen=True)
class Result:
    """Losses of some steps; of the first call also the bytes that this rank sent in one."""

    losses: list[float]
    sent: float = 0.0


class Call:
    """Some steps of one implementation; of the first call the bytes are counted."""

    def __init__(self, wrap: Wrap, given: Inputs) -> None:
        self.wrap, self.given = wrap, given
        self.losses: Iterator[float] | None = None

    def __call__(self) -> Result:
        if self.losses is not None:
            return Result([next(self.losses) for _ in range(STEPS)])
        self.losses = steps(self.wrap, self.given)
        losses = [next(self.losses)]  # apart, with what is sent once at the start
        with ledger() as book:
            losses += [next(self.losses) for _ in range(STEPS - 1)]
        return Result(losses, sum(book.bytes.values()) / (STEPS - 1))


def steps(wrap: Wrap, given: Inputs) -> Iterator[float]:
    """The losses of this rank; all ranks have the same weights."""
    model = wrap(given.model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, foreach=True)
    while True:
        optimizer.zero_grad()
        loss = loss_of(model, given)
        loss.backward()
        optimizer.step()
        yield loss.item()


def verify(case: Case, given: Inputs, got: Result, want: Result) -> tuple[float, float]:
    """The largest relative error of the losses."""
    error = max(abs(g - w) / abs(w) for g, w in zip(got.losses, want.losses, strict=True))
    return error, ALLOWED_COMPRESSED if case["compress"] else ALLOWED


def figures(case: Case, given: Inputs, got: Result) -> dict[str, float]:
    return {"MB sent / step": round(got.sent / 1e6, 4)}


def ours(**options: Any) -> Callable[[], Wrap]:
    def make() -> Wrap:
        return lambda module: DataParallel(module, **{k: v() if isinstance(v, type) else v for k, v in options.items()})

    return make


def plain(case: Case) -> bool:
    return not case["compress"]


def compressed(case: Case) -> bool:
    return bool(case["compress"])


QUICK = [case("vgg", 32, 2, 8), case("transformer", 128, 2, 2), case("transformer", 128, 4, 2)]
DEFAULT = [case("vgg", 64, n, 32) for n in (1, 2, 4)] + [case("transformer", 256, n, 4) for n in (1, 2, 4)]
COMPRESSED = [case("transformer", 256, 2, 4, compress=True)]
bench = Benchmark(
    __file__,
    cases={
        "quick": QUICK,
        "default": DEFAULT + COMPRESSED,
        "full": [*DEFAULT, *COMPRESSED, case("vgg", 128, 2, 32), case("transformer", 512, 2, 8)],
    },
    inputs=inputs,
    work=work,
    impls={
        "naive": Impl(ours(strategy="naive"), "reference"),
        "flat": Impl(ours(strategy="flat"), "variant", only=plain),
        "bucketed, backend": Impl(ours(algorithm="backend"), "variant", only=plain),
        "bucketed": Impl(ours(), "ours"),
        "bucketed, bfloat16": Impl(ours(compress=BF16), "variant", only=compressed),
        "bucketed, top 1%": Impl(ours(compress=TopK), "variant", only=compressed),
        "torch DDP": Impl(lambda: nn.parallel.DistributedDataParallel, "peer"),
    },
    subject="bucketed",
    prepare=lambda function, case, given: Call(function, given),
    verify=verify,
    figures=figures,
    contract="parallel.data_parallel",
    stateful=True,
    budget_s=20.0,
    ranks=lambda case: case["ranks"],
    plots=(Plot(xlabel="all ranks", y="throughput", panel=("model", "width", "ranks", "compress")),),
)

if __name__ == "__main__":
    bench.main()
