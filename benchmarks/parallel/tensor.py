"""Tensor parallelism: what does a training step cost when every layer is shared out to n ranks, beside torch's DTensor?

What to look at: all ranks work on the same batch, so time should fall with their number, up to
the number of cores; what it does not fall by are the sums, four a block on the critical path,
and what every rank repeats. "of limit" holds all ranks together against the whole machine.
"TP, backend" sends the same through torch's collectives (gloo); between it and "TP" is shared
memory. "TP, overlapped" sums the gradient of a product's input in another thread while that of
the weights is computed, which pays where the sum does not want the same core.

In the cases with `sequence` the norms and residuals between the layers are shared out too. That
is for memory, not for time: the same bytes travel, and a quarter more for what is gathered again
in the backward pass, where DTensor keeps it.

The case `mlp` is one MLP alone, down(gelu(up(x))) with up four times as wide: what a `TensorMLP`
of your own is measured on (`--impl`), after `mlsys check parallel.tensor`.

The reference is the whole model on every rank, which checks the others' losses; it does n times
their work, and with one rank the same.

Peer: `torch.distributed.tensor.parallel`, with ColwiseParallel, RowwiseParallel, SequenceParallel
and `loss_parallel`, on gloo, as the tutorial of torch lays a Llama out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mlsys.bench import Benchmark, Impl, Plot, Work
from mlsys.bench.ranks import size
from mlsys.models import transformer
from mlsys.models.transformer import Transformer
from mlsys.parallel.collectives import Communicator
from mlsys.parallel.tensor import ColumnLinear, Ranks, RowLinear, parallelize
from mlsys.parallel.traffic import ledger
from mlsys.perf.configs import Config, llama
from mlsys.perf.transformer import training_flops

Case = Mapping[str, Any]
Make = Callable[[nn.Linear, nn.Linear], nn.Module]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Wrap = Callable[[Any], tuple[nn.Module, Loss]]  # of the inputs below
STEPS = 2  # a call; that the losses of later calls agree too checks the optimizer
SEQ, VOCAB, LAYERS = 256, 4096, 2
ALLOWED = 1e-3  # relative error of a loss: float32 roundings, which steps amplify


@dataclass(frozen=True)
class Inputs:
    """The batch, the same on all ranks (tokens, or vectors of an MLP), and how to make the model."""

    case: Case
    tokens: torch.Tensor
    targets: torch.Tensor

    def model(self) -> Transformer:
        """A fresh one, the same each time and on each rank."""
        generator = torch.Generator(self.tokens.device).manual_seed(0)
        return transformer.init(Transformer(config(self.case), device=self.tokens.device), generator)

    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        """Those of the MLP, the same each time and on each rank."""
        generator, width = torch.Generator(self.tokens.device).manual_seed(0), self.case["width"]
        made = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        with torch.no_grad():
            for linear in made:
                linear.to(self.tokens.device).weight.normal_(0.0, linear.in_features**-0.5, generator=generator)
                linear.bias.zero_()
        return made


def config(case: Case) -> Config:
    width = case["width"]
    return llama(LAYERS, width, width // 64, 3 * width, vocab=VOCAB, context=SEQ)


def case(width: int, ranks: int, batch: int, sequence: bool = False, mlp: bool = False) -> Case:
    return {"width": width, "ranks": ranks, "batch": batch, "sequence": sequence, "mlp": mlp}


def inputs(case: Case, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(1)
    if case["mlp"]:
        x, y = torch.randn(2, case["batch"], SEQ, case["width"], generator=generator, device=device)
        return Inputs(case, x, y)
    text = torch.randint(VOCAB, (case["batch"], SEQ + 1), generator=generator, device=device)
    return Inputs(case, text[:, :-1], text[:, 1:])


def work(case: Case, given: Inputs) -> Work:
    if case["mlp"]:
        flops, numbers = 3.0 * 16 * case["batch"] * SEQ * case["width"] ** 2, 8 * case["width"] ** 2
    else:
        flops = training_flops(config(case), case["batch"], SEQ, causal=True).total
        numbers = sum(p.numel() for p in Transformer(config(case), device="meta").parameters())
    # A weight is read forward and backward, its gradient is written and read, it and its momentum are read and written.
    return Work(flops=STEPS * flops, bytes=STEPS * 8 * 4 * numbers, items=STEPS * case["batch"] * SEQ, unit="tokens")


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
        return Result(losses, book.sent / (STEPS - 1))


def steps(wrap: Wrap, given: Inputs) -> Iterator[float]:
    """The losses, the same on every rank."""
    model, loss_of = wrap(given)
    kinds: dict[type, list[torch.Tensor]] = {}
    for parameter in model.parameters():  # foreach wants DTensors and others apart
        kinds.setdefault(type(parameter), []).append(parameter)
    optimizer = torch.optim.SGD([{"params": p} for p in kinds.values()], lr=0.02, momentum=0.9, foreach=True)
    while True:
        optimizer.zero_grad()
        loss = loss_of(given.tokens, given.targets)
        optimizer.step()
        yield loss.item()


@dataclass(frozen=True)
class Two:
    """How an implementation makes the model from the whole one, with its loss, and an MLP from its two layers."""

    model: Callable[[Transformer, bool], tuple[nn.Module, Loss]]
    mlp: Make

    def __call__(self, given: Inputs) -> tuple[nn.Module, Loss]:
        if given.case["mlp"]:
            return mlp_of(self.mlp, given)
        return self.model(given.model(), given.case["sequence"])


def mlp_of(make: Make, given: Inputs) -> tuple[nn.Module, Loss]:
    module = make(*given.linears())

    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(module(x.detach().requires_grad_()), y)

    return module, trained(loss_of)


def prepare(function: Any, case: Case, given: Inputs) -> Call:
    """A user's function makes the MLP from its layers; ours make either."""
    return Call(function if isinstance(function, Two) else partial(mlp_of, function), given)


def whole() -> Two:
    return Two(lambda model, _: (model, trained(model.loss)), lambda up, down: nn.Sequential(up, nn.GELU(), down))


def ours(**options: Any) -> Callable[[], Two]:
    def model(model: Transformer, sequence: bool) -> tuple[nn.Module, Loss]:
        made = parallelize(model, sequence_parallel=sequence, **options)
        return made, trained(made.loss)

    def mlp(up: nn.Linear, down: nn.Linear) -> nn.Module:
        algorithm = options.get("algorithm", "auto")
        ranks = Ranks(None if algorithm == "backend" else Communicator(), algorithm=algorithm)
        return nn.Sequential(ColumnLinear(up, ranks), nn.GELU(), RowLinear(down, ranks))

    return lambda: Two(model, mlp)


def trained(loss_of: Loss) -> Loss:
    """The loss, after its backward pass."""

    def run(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = loss_of(tokens, targets)
        loss.backward()
        return loss.detach()

    return run


def dtensor() -> Two:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        loss_parallel,
        parallelize_module,
    )

    def wrap(model: Transformer, sequence: bool) -> tuple[nn.Module, Loss]:
        mesh = init_device_mesh("cpu", (size(),))
        stream = Shard(1) if sequence else Replicate()
        plan: dict[str, Any] = {
            "token_embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=stream),
            "head": ColwiseParallel(input_layouts=stream, output_layouts=Shard(-1), use_local_output=False),
        }
        if sequence:
            plan["norm"] = SequenceParallel()
        for layer in range(LAYERS):
            here = f"blocks.{layer}."
            for name in ("attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up"):
                plan[here + name] = ColwiseParallel()
            for name in ("attention.o", "mlp.down"):
                plan[here + name] = RowwiseParallel(output_layouts=stream)
            # One gather for the three (two) that read it, and one sum of their gradients.
            for name, extra in (("attention", 3), ("mlp", 0)):
                plan[here + name] = PrepareModuleInput(
                    input_layouts=(stream, *[None] * extra), desired_input_layouts=(Replicate(), *[None] * extra)
                )
                if sequence:
                    plan[f"{here}{name}_norm"] = SequenceParallel()
        parallelize_module(model, mesh, plan)

        def run(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            assert model.head is not None
            logits = model.head(model.hidden(tokens)).flatten(0, 1)  # a DTensor, cut along the vocabulary
            with loss_parallel():
                loss = F.cross_entropy(logits, targets.flatten())
                loss.backward()
            full: Any = loss.detach()
            return full.full_tensor()

        return model, run

    def mlp(up: nn.Linear, down: nn.Linear) -> nn.Module:
        mesh = init_device_mesh("cpu", (size(),))
        plan: dict[str, Any] = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        return parallelize_module(nn.Sequential(up, nn.GELU(), down), mesh, plan)

    return Two(wrap, mlp)


def verify(case: Case, given: Inputs, got: Result, want: Result) -> tuple[float, float]:
    """The largest relative error of the losses."""
    return max(abs(g - w) / abs(w) for g, w in zip(got.losses, want.losses, strict=True)), ALLOWED


def figures(case: Case, given: Inputs, got: Result) -> dict[str, float]:
    return {"MB sent / step": round(got.sent / 1e6, 4)}


def several(case: Case) -> bool:
    return case["ranks"] > 1


def overlaps(case: Case) -> bool:
    return several(case) and not case["mlp"]


QUICK = [case(256, 2, 1), case(256, 2, 1, sequence=True), case(256, 2, 1, mlp=True)]
DEFAULT = (
    [case(512, n, 2) for n in (1, 2, 4)]
    + [case(512, n, 2, sequence=True) for n in (2, 4)]
    + [case(512, 2, 2, mlp=True)]
)
bench = Benchmark(
    __file__,
    cases={"quick": QUICK, "default": DEFAULT, "full": [*DEFAULT, case(1024, 2, 2), case(1024, 2, 2, sequence=True)]},
    inputs=inputs,
    work=work,
    impls={
        "whole model": Impl(whole, "reference"),
        "TP, backend": Impl(ours(algorithm="backend", overlap=False), "variant", only=several),
        "TP, overlapped": Impl(ours(overlap=True), "variant", only=overlaps),
        "TP": Impl(ours(), "ours"),
        "torch DTensor": Impl(dtensor, "peer"),
    },
    subject="TP",
    prepare=prepare,
    compared=lambda case: case["ranks"] == 1,
    yours=lambda case: case["mlp"],
    verify=verify,
    figures=figures,
    contract="parallel.tensor",
    stateful=True,
    memory=True,
    budget_s=25.0,
    ranks=lambda case: case["ranks"],
    plots=(
        Plot(x="ranks", xlabel="ranks, on one batch", panel=("sequence", "width"), only=lambda case: not case["mlp"]),
        Plot(
            x="ranks",
            xlabel="ranks, on one batch",
            y="memory",
            panel=("sequence", "width"),
            only=lambda case: not case["mlp"],
        ),
    ),
)

if __name__ == "__main__":
    bench.main()
