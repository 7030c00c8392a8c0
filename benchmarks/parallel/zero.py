"""ZeRO: what does each stage save in memory and cost in time, beside torch's own sharded training?

What to look at: bytes of model state on a rank against the formula Ψ·(w + g + o), each
term divided by n from its stage on, which `perf.zero` computes; 4, 4 and 8 bytes for
AdamW in float32. Whatever is held beyond it is padding, buckets, and buffers that stay. The
time: stages 1 and 2 send no more than data parallelism and save optimizer work; stage 3
gathers all weights twice a step, which a prefetch has to hide.

"held" is what is still allocated after two steps, by the C library's count from before the
model was made, so that whoever keeps a copy cannot hide it (memory that ranks share is
not in it); "most" is the highest that was seen on the way, with activations and what is
gathered for a moment.

Reference: all state on every rank, gradients averaged one by one.
Peers: ZeroRedundancyOptimizer with DistributedDataParallel for stage 1, FSDP2 (`fully_shard`) for stages 2 and 3, in
stage 2 without resharding after the forward pass, so that the weights are gathered once a step.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

from mlsys.bench import Benchmark, Impl, Plot, Record, Work
from mlsys.bench.memory import Used, used
from mlsys.bench.ranks import rank, size
from mlsys.models import transformer
from mlsys.models.transformer import Transformer
from mlsys.parallel.zero import ZeRO1, ZeRO2
from mlsys.parallel.zero3 import ZeRO3
from mlsys.perf import zero
from mlsys.perf.configs import Config, llama
from mlsys.perf.transformer import training_flops

Case = Mapping[str, Any]
Steps = Callable[["Inputs"], Iterator[float]]
SEQ, VOCAB = 128, 256
STEPS = 2  # a call; that the losses of later calls agree too checks the optimizer
ALLOWED = 1e-3  # relative error of a loss: float32 roundings, which AdamW amplifies
ADAMW: dict[str, Any] = {"lr": 1e-3, "fused": True}


@dataclass(frozen=True)
class Inputs:
    """One rank's batch, the stage, and how to make the model."""

    config: Config
    stage: int
    tokens: torch.Tensor

    def model(self) -> Transformer:
        """A fresh model, the same each time and on each rank."""
        made = Transformer(self.config, device=self.tokens.device)
        return transformer.init(made, torch.Generator(self.tokens.device).manual_seed(0))

    def loss(self, model: nn.Module) -> torch.Tensor:
        """Of this rank's batch."""
        logits = model(self.tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten())


@dataclass(frozen=True)
class Result:
    """Losses of some steps; of the first call also what the model and its steps had allocated."""

    losses: list[float]
    memory: Used | None


def case(stage: int, width: int, ranks: int, batch: int) -> Case:
    return {"stage": stage, "width": width, "ranks": ranks, "batch": batch}


def inputs(case: Case, device: str) -> Inputs:
    width = case["width"]
    config = llama(4, width, width // 32, 3 * width, vocab=VOCAB, context=SEQ)
    generator = torch.Generator(device).manual_seed(1 + rank())
    tokens = torch.randint(VOCAB, (case["batch"], SEQ + 1), generator=generator, device=device)
    return Inputs(config, case["stage"], tokens)


def work(case: Case, given: Inputs) -> Work:
    # On each rank a weight is read forward and backward and its gradient written. The optimizer, once for all ranks,
    # reads weight, gradient and two means, and writes three of them.
    flops = training_flops(given.config, case["batch"], SEQ, causal=True).total
    weights = sum(p.nbytes for p in Transformer(given.config, device="meta").parameters())
    n = case["ranks"]
    tokens = STEPS * n * case["batch"] * SEQ
    return Work(STEPS * n * flops, STEPS * (3 * n + 7) * weights, items=tokens, unit="tokens")


class Call:
    """Some steps of one implementation; the first call makes it, and looks at its memory."""

    def __init__(self, function: Steps | type, given: Inputs) -> None:
        # someone's own is a class, as ours are
        self.function: Steps = functools.partial(sharded, function) if isinstance(function, type) else function
        self.given = given
        self.losses: Iterator[float] | None = None

    def __call__(self) -> Result:
        if self.losses is not None:
            return Result(self.steps(), None)
        next(replicated(self.given))  # what torch keeps from its first use is nobody's
        self.losses = self.function(self.given)
        found: list[list[float]] = []

        def run() -> None:
            found.append(self.steps())
            gc.collect()  # what only a cycle of references keeps alive is not held

        memory = used(run, self.given.tokens.device.type)
        return Result(found[0], memory)

    def steps(self) -> list[float]:
        assert self.losses is not None
        return [next(self.losses) for _ in range(STEPS)]


def verify(case: Case, given: Inputs, got: Result, want: Result) -> tuple[float, float]:
    """The largest relative error of the losses."""
    return max(abs(g - w) / w for g, w in zip(got.losses, want.losses, strict=True)), ALLOWED


def figures(case: Case, given: Inputs, got: Result) -> dict[str, float]:
    """Of the rank that holds most, MiB."""
    assert got.memory is not None
    held: list[Any] = [None] * size()
    dist.all_gather_object(held, (got.memory.held, got.memory.peak))
    return {
        "held MiB": max(h for h, _ in held) / 2**20,
        "formula MiB": formula(given, case["stage"], size()) / 2**20,
        "most MiB": max(p for _, p in held) / 2**20,
    }


def formula(given: Inputs, stage: int, n: int) -> float:
    numbers = sum(p.numel() for p in Transformer(given.config, device="meta").parameters())
    return zero.memory(numbers, n, stage, bytes_weights=4, bytes_gradients=4, bytes_optimizer=8).total


# --- who does it ------------------------------------------------------------------------------------------------------


def train(given: Inputs, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[float]:
    # Gradients stay until the next backward pass, so that they are counted between steps.
    while True:
        optimizer.zero_grad()
        loss = given.loss(model)
        loss.backward()
        optimizer.step()
        yield loss.item()


def replicated(given: Inputs) -> Iterator[float]:
    """No stage at all: everything everywhere."""
    model = given.model()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    while True:
        optimizer.zero_grad()
        loss = given.loss(model)
        loss.backward()
        for p in model.parameters():
            assert p.grad is not None
            dist.all_reduce(p.grad)
            p.grad /= size()
        optimizer.step()
        yield loss.item()


def sharded(kind: Callable[[nn.Module], Any], given: Inputs) -> Iterator[float]:
    model = kind(given.model())
    yield from train(given, model, model.optimizer(torch.optim.AdamW, **ADAMW))


def ours(given: Inputs) -> Iterator[float]:
    return sharded({1: ZeRO1, 2: ZeRO2, 3: ZeRO3}[given.stage], given)


def redundancy_optimizer(given: Inputs) -> Iterator[float]:
    model = nn.parallel.DistributedDataParallel(given.model(), gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, parameters_as_bucket_view=True, **ADAMW)
    yield from train(given, model, optimizer)


def fsdp2(given: Inputs) -> Iterator[float]:
    model = given.model()
    for block in [*model.blocks, model]:
        fully_shard(block, reshard_after_forward=given.stage == 3)
    yield from train(given, model, torch.optim.AdamW(model.parameters(), **ADAMW))


# --- the picture ------------------------------------------------------------------------------------------------------


def memory_picture(records: Sequence[Record]) -> str | None:
    """Bytes held on a rank by stage and number of ranks, beside the formula."""
    from mlsys.bench.plots import COLOURS, HATCHES, new_figure, to_svg
    from mlsys.bench.tables import implementations

    shown = [r for r in records if "held MiB" in r.figures]
    widths = sorted({r.case["width"] for r in shown})
    if not shown:
        return None
    stages = sorted({r.case["stage"] for r in shown})
    names = implementations(shown)
    figure, axes = new_figure(len(stages), len(widths), width=4.2, height=3.4)
    for ax, (width, stage) in zip(axes, [(w, s) for w in widths for s in stages], strict=True):
        group = [r for r in shown if (r.case["width"], r.case["stage"]) == (width, stage)]
        present = [name for name in names if any(r.impl == name for r in group)]
        ranks = sorted({r.case["ranks"] for r in group})
        for number, name in enumerate(present):
            style = names.index(name)
            found = {r.case["ranks"]: r.figures["held MiB"] for r in group if r.impl == name}
            at = [i + (number - (len(present) - 1) / 2) * 0.8 / len(present) for i, n in enumerate(ranks) if n in found]
            look: dict[str, Any] = {
                "color": COLOURS[style],
                "hatch": HATCHES[style],
                "alpha": 0.75,
                "edgecolor": "white",
            }
            ax.bar(at, [found[n] for n in ranks if n in found], 0.8 / len(present), label=name, **look)
        for i, n in enumerate(ranks):
            value = next(r.figures["formula MiB"] for r in group if r.case["ranks"] == n)
            ax.plot([i - 0.45, i + 0.45], [value] * 2, color="black", linestyle="--", label="formula" * (i == 0))
        ax.set_xticks(range(len(ranks)), [str(n) for n in ranks])
        ax.set(title=f"stage {stage}, width {width}", xlabel="ranks", ylabel="MiB held on a rank")
        ax.set_ylim(0, 1.5 * max(r.figures["held MiB"] for r in group))  # room for the key
        ax.legend(fontsize=7, frameon=False, loc="upper right")
        ax.grid(True, axis="y", alpha=0.3)
    return to_svg(figure)


def only(*stages: int) -> Callable[[Case], bool]:
    return lambda case: case["stage"] in stages


QUICK = [case(stage, 128, 2, 2) for stage in (3, 1, 2)]
DEFAULT = [case(stage, 256, n, 4) for stage in (1, 2, 3) for n in (2, 4)]
DEFAULT += [case(3, 256, n, 1) for n in (2, 4)]  # a quarter of the tokens, the same weights to gather
bench = Benchmark(
    __file__,
    cases={
        "quick": QUICK,
        "default": DEFAULT,
        "full": [*DEFAULT, *(case(stage, 512, 2, 8) for stage in (1, 2, 3))],
    },
    inputs=inputs,
    work=work,
    impls={
        "replicated": Impl(lambda: replicated, "reference"),
        "zero": Impl(lambda: ours, "ours"),
        "torch ZeRO optimizer": Impl(lambda: redundancy_optimizer, "peer", only=only(1)),
        "torch FSDP2": Impl(lambda: fsdp2, "peer", only=only(2, 3)),
    },
    subject="zero",
    prepare=lambda function, case, given: Call(function, given),
    verify=verify,
    figures=figures,
    contract="parallel.zero",
    yours=only(1, 2),
    stateful=True,
    budget_s=15.0,
    ranks=lambda case: case["ranks"],
    plots=(Plot(xlabel="all ranks", y="throughput", panel=("stage", "width", "ranks", "batch")),),
    pictures={"memory": memory_picture},
)

if __name__ == "__main__":
    bench.main()
