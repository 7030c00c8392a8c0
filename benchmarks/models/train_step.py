"""A training step: what does it cost to be able to go on after a kill, and what does a fused optimizer save?

What to look at: ours against torch's fused loop, the same model and optimizer
without batches by counter, checks and a learning rate that follows a plan. All
that makes `mlsys.models.training` resumable lies outside the gradient, so the
two should be equal but for noise. The textbook loop updates one tensor at a
time in Python: that shows in a small model of many tensors, and vanishes in a
larger one, where matmuls are all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mlsys.bench import Benchmark, Impl, Plot, Work
from mlsys.models import training, transformer
from mlsys.models.training import Batches, TrainConfig, Trainer
from mlsys.models.transformer import Transformer
from mlsys.perf.configs import Config, llama
from mlsys.perf.transformer import training_flops

Case = Mapping[str, Any]
VOCAB, SEQ, STEPS = 256, 128, 4  # the loss after some steps also checks what the optimizer did
ALLOWED = 1e-4  # relative error of those losses: some hundred roundings of float32
# Far more steps than will be timed, and no warm-up: the rate stays at its peak for all.
PLAN = TrainConfig(steps=10**9, seq=SEQ, lr=1e-3, warmup=0.0)


@dataclass(frozen=True)
class Inputs:
    """The model's config, the settings, random tokens, and where to compute."""

    config: Config
    plan: TrainConfig
    stream: np.ndarray[Any, np.dtype[np.uint16]]
    device: str

    def model(self) -> Transformer:
        """A fresh model, the same each time."""
        made = Transformer(self.config, device=self.device)
        return transformer.init(made, torch.Generator(self.device).manual_seed(0))


def case(layers: int, d_model: int, batch: int) -> Case:
    return {"layers": layers, "d_model": d_model, "batch": batch}


def inputs(case: Case, device: str) -> Inputs:
    width = case["d_model"]
    config = llama(case["layers"], width, width // 32, 8 * width // 3 // 8 * 8, vocab=VOCAB, context=SEQ, tied=True)
    plan = TrainConfig(**{**vars(PLAN), "batch": case["batch"]})
    stream = np.random.default_rng(width).integers(0, VOCAB, 100_000).astype(np.uint16)
    return Inputs(config, plan, stream, device)


def work(case: Case, given: Inputs) -> Work:
    # Each weight is read forward and backward and its gradient written; AdamW reads weight, gradient and two means and
    # writes three of them.
    flops = training_flops(given.config, case["batch"], SEQ, causal=True).total
    weights = sum(p.nbytes for p in Transformer(given.config, device="meta").parameters())
    tokens = STEPS * case["batch"] * SEQ
    return Work(flops=STEPS * flops, bytes=STEPS * 10 * weights, items=tokens, unit="tokens")


def prepare(function: Callable[[Inputs], Iterator[float]], case: Case, given: Inputs) -> Callable[[], list[float]]:
    losses = function(given)
    return lambda: [next(losses) for _ in range(STEPS)]


def verify(case: Case, given: Inputs, got: list[float], want: list[float]) -> tuple[float, float]:
    """The largest relative error of the first losses."""
    return max(abs(g - w) / w for g, w in zip(got, want, strict=True)), ALLOWED


def ours(given: Inputs) -> Iterator[float]:
    trainer = Trainer(given.model(), given.stream, given.plan)
    while True:
        yield trainer.step()


def loop(given: Inputs, **kind: bool) -> Iterator[float]:
    """The loop that everyone writes first."""
    model, plan = given.model(), given.plan
    batches = Batches(given.stream, plan.batch, plan.seq, plan.seed)
    matrices, vectors = training.decay_groups(model)
    groups = [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=plan.lr, betas=plan.betas, eps=plan.eps, **kind)
    step = 0
    while True:
        tokens, targets = (t.to(given.device) for t in batches(step))
        loss = model.loss(tokens, targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        optimizer.step()
        step += 1
        yield loss.item()


SMALL = [case(2, 64, 4), case(2, 128, 4), case(4, 256, 4)]
bench = Benchmark(
    __file__,
    cases={
        "quick": SMALL,
        "default": [*SMALL, case(4, 256, 16), case(8, 64, 4)],
        "full": [*SMALL, case(4, 256, 16), case(8, 64, 4), case(8, 512, 8)],
    },
    inputs=inputs,
    work=work,
    impls={
        "one tensor at a time": Impl(lambda: lambda given: loop(given, foreach=False), "reference"),
        "training": Impl(lambda: ours, "ours"),
        "torch foreach": Impl(lambda: lambda given: loop(given, foreach=True), "peer"),
        "torch fused": Impl(lambda: lambda given: loop(given, fused=True), "peer"),
    },
    subject="training",
    prepare=prepare,
    verify=verify,
    stateful=True,
    plots=(
        Plot(
            xlabel="one pinned thread",
            y="throughput",
            panel=("layers", "d_model", "batch"),
        ),
    ),
)

if __name__ == "__main__":
    bench.main()
