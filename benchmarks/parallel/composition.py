"""Composition: on one global batch, what does a step cost as data, pipeline or tensor parallelism, or as two of them?

What to look at: the same model and the same batch in every row, on 1, 2 or 4 ranks. "tp MB",
"pp MB" and "dp MB" are what the rank that sends most sends in a step, by kind: tensor
parallelism sends sums of activations in every layer, data parallelism the gradients once, a
pipeline one activation and one gradient at each cut for each microbatch. More tokens in a
batch make the first and the last grow, and leave the second as it is; a wider model the
other way round. "model MB" are a rank's weights, gradients and optimizer state after a step,
which is what pipelines, tensor parallelism and ZeRO are for; "peak" is all that a step
allocates on top, activations above all.

Four ranks share two cores here, so no row can be faster than two are: what is compared are
the ways to share four. The pipeline runs 1F1B with 8 microbatches and waits 3/11 of its time
on four stages, 1/9 on two; but a waiting rank leaves its core to another.

Peers: torch's own for each mesh: DistributedDataParallel, `torch.distributed.pipelining`
(1F1B), DTensor tensor parallelism with `loss_parallel`; pipelining over DDP replicas or over
DTensor (with whole logits in the last stage), FSDP2 over DTensor; `ZeroRedundancyOptimizer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Replicate, Shard

from mlsys.bench import Benchmark, Impl, Plot, Work
from mlsys.bench.ranks import size
from mlsys.models import transformer
from mlsys.models.transformer import Transformer
from mlsys.parallel.mesh import Parallel, mesh
from mlsys.parallel.pipeline import one_f_one_b, split
from mlsys.parallel.traffic import Book, ledger
from mlsys.perf.configs import Config, llama
from mlsys.perf.transformer import training_flops

Case = Mapping[str, Any]
Step = Callable[[], torch.Tensor | None]  # a forward and backward pass of this rank; its loss, where it knows it
SEQ, VOCAB, MICROBATCHES = 128, 1024, 8
FIRST = 3  # steps of the first call: one apart, one counted, one more; then one a call
ALLOWED = 1e-3  # relative error of a loss: float32 roundings, which steps amplify


@dataclass(frozen=True)
class Inputs:
    """The global batch, the same on all ranks, and how to make the model."""

    case: Case
    tokens: torch.Tensor
    targets: torch.Tensor

    def model(self) -> Transformer:
        """A fresh one, the same each time and on each rank."""
        generator = torch.Generator(self.tokens.device).manual_seed(0)
        return transformer.init(Transformer(config(self.case), device=self.tokens.device), generator)


def config(case: Case) -> Config:
    width = case["width"]
    return llama(case["layers"], width, width // 64, 3 * width, vocab=VOCAB, context=SEQ)


MESHES = {  # dp, pp, tp, stage of ZeRO
    "one process": (1, 1, 1, 0),
    "dp2": (2, 1, 1, 0),
    "pp2": (1, 2, 1, 0),
    "tp2": (1, 1, 2, 0),
    "dp4": (4, 1, 1, 0),
    "dp4, ZeRO-1": (4, 1, 1, 1),
    "pp4": (1, 4, 1, 0),
    "tp4": (1, 1, 4, 0),
    "dp2 x pp2": (2, 2, 1, 0),
    "dp2 x pp2, ZeRO-1": (2, 2, 1, 1),
    "dp2 x tp2": (2, 1, 2, 0),
    "pp2 x tp2": (1, 2, 2, 0),
}


def case(name: str, *, width: int = 256, layers: int = 4) -> Case:
    return {"mesh": name, "ranks": math.prod(MESHES[name][:3]), "width": width, "layers": layers, "batch": 16}


def inputs(case: Case, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(1)
    text = torch.randint(VOCAB, (case["batch"], SEQ + 1), generator=generator, device=device)
    return Inputs(case, text[:, :-1], text[:, 1:])


def work(case: Case, given: Inputs) -> Work:
    flops = training_flops(config(case), case["batch"], SEQ, causal=True).total
    numbers = sum(p.numel() for p in Transformer(config(case), device="meta").parameters())
    copies, pp, _, _ = MESHES[case["mesh"]]
    passes = 4 * (MICROBATCHES if pp > 1 else 1)
    # A weight is read forward and backward, its gradient written and read; then the optimizer reads and writes.
    return Work(
        flops=flops,
        bytes=copies * (passes + 6) * 4 * numbers,
        items=case["batch"] * SEQ,
        unit="tokens",
    )


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# --- implementations: each makes an optimizer and a step --------------------------------------------------------------


class Ours:
    """The library's: its two halves are counted apart."""

    def __init__(self, given: Inputs) -> None:
        dp, pp, tp, zero = MESHES[given.case["mesh"]]
        schedule = one_f_one_b(pp, MICROBATCHES) if pp > 1 else None
        self.model = Parallel(given.model(), mesh(dp, pp, tp), schedule, zero=zero or None)
        self.optimizer = self.model.optimizer(torch.optim.SGD, lr=0.02, momentum=0.9, foreach=True)
        self.batch = self.model.part(given.tokens, given.targets)

    def __call__(self) -> torch.Tensor:
        return self.model.step(*self.batch)

    def counted(self) -> tuple[torch.Tensor, dict[str, float]]:
        """A step, and the bytes that this rank sent in it by kind."""
        with ledger() as between_layers:
            loss = self.model.backward(*self.batch)
        with ledger() as between_replicas:
            self.model.reduce()
            self.optimizer.step()
        stages = _sent(between_layers, "send")
        return loss, {
            "tp MB": (between_layers.sent - stages) / 1e6,
            "pp MB": stages / 1e6,
            "dp MB": between_replicas.sent / 1e6,
        }

    def memory(self) -> float:
        """MB of weights, gradients and optimizer state."""
        held: dict[int, int] = {}
        parameters = list(self.model.parameters())
        pieces = [p for group in self.optimizer.param_groups for p in group["params"]]
        states = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        for tensor in (*parameters, *pieces, *states, *(p.grad for p in (*parameters, *pieces) if p.grad is not None)):
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
        return sum(held.values()) / 1e6


def _sent(book: Book, operation: str) -> float:
    return sum(row.sent for row in book.rows if row.operation == operation)


class Whole:
    """The whole model and batch on every rank: it checks the others, and with one rank does the same work."""

    def __init__(self, given: Inputs) -> None:
        self.model, self.given = given.model(), given
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.02, momentum=0.9, foreach=True)

    def __call__(self) -> torch.Tensor:
        loss = loss_of(self.model(self.given.tokens), self.given.targets)
        loss.backward()
        return loss.detach()


class Torch:
    """Torch's own parts, put together as its tutorials do."""

    def __init__(self, given: Inputs) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.given = given
        self.dp, self.pp, self.tp, zero = MESHES[given.case["mesh"]]
        self.mesh = init_device_mesh("cpu", (self.pp, self.dp, self.tp), mesh_dim_names=("pp", "dp", "tp"))
        replica = self.mesh.get_local_rank("dp")
        self.x, self.y = (one.chunk(self.dp)[replica] for one in (given.tokens, given.targets))
        model: Any = given.model()
        self.runner: Any = None
        if self.pp > 1:
            module = self._pipelined(model)
        else:
            module = self._replicated(self._cut(_Called(model), "model.", Shard(-1)) if self.tp > 1 else model)
        self.module = module
        self.optimizer = self._optimizer(module, zero)

    def _optimizer(self, module: nn.Module, zero: int) -> torch.optim.Optimizer:
        options: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "foreach": True}
        if zero:
            from torch.distributed.optim import ZeroRedundancyOptimizer

            replicas = self.mesh.get_group("dp")
            return ZeroRedundancyOptimizer(module.parameters(), torch.optim.SGD, process_group=replicas, **options)
        kinds: dict[type, list[torch.Tensor]] = {}
        for parameter in module.parameters():  # foreach wants DTensors and others apart
            kinds.setdefault(type(parameter), []).append(parameter)
        return torch.optim.SGD([{"params": some} for some in kinds.values()], **options)

    def _replicated(self, model: nn.Module) -> nn.Module:
        if self.dp == 1:
            return model
        if self.tp > 1:
            from torch.distributed.fsdp import fully_shard

            fully_shard(model, mesh=self.mesh["dp"], reshard_after_forward=False)
            return model
        return nn.parallel.DistributedDataParallel(model, process_group=self.mesh.get_group("dp"))

    def _pipelined(self, model: Transformer) -> nn.Module:
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B

        index, count = self.mesh.get_local_rank("pp"), self.pp
        part = split(model, count)[index]
        module = self._replicated(self._cut(_CalledStage(part), "stage.", Replicate()) if self.tp > 1 else part)
        stage = PipelineStage(module, index, count, self.given.tokens.device, group=self.mesh.get_group("pp"))
        self.runner = Schedule1F1B(stage, MICROBATCHES, loss_fn=loss_of)
        return module

    def _cut(self, module: nn.Module, layers: str, logits: Any) -> nn.Module:
        """The module with its matrices as DTensors; those of its layers have names that begin with `layers`."""
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            PrepareModuleInput,
            RowwiseParallel,
            parallelize_module,
        )

        plan: dict[str, Any] = {
            f"{layers}token_embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
            "head": ColwiseParallel(output_layouts=logits, use_local_output=logits == Replicate()),
        }
        for layer in range(self.given.case["layers"]):
            here = f"{layers}blocks.{layer}."
            for name in ("attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up"):
                plan[here + name] = ColwiseParallel()
            for name, extra in (("attention", 3), ("mlp", 0)):
                # One gather for the three (two) that read it, and one sum of their gradients.
                plan[here + name] = PrepareModuleInput(
                    input_layouts=(Replicate(), *[None] * extra), desired_input_layouts=(Replicate(), *[None] * extra)
                )
                plan[here + {"attention": "attention.o", "mlp": "mlp.down"}[name]] = RowwiseParallel()
        there = {name for name, _ in module.named_modules(remove_duplicate=False)}
        return parallelize_module(module, self.mesh["tp"], {name: how for name, how in plan.items() if name in there})

    def __call__(self) -> torch.Tensor | None:
        if self.pp > 1:
            losses: list[torch.Tensor] = []
            first, last = self.mesh.get_local_rank("pp") == 0, self.mesh.get_local_rank("pp") == self.pp - 1
            self.runner.step(*((self.x,) if first else ()), **({"target": self.y, "losses": losses} if last else {}))
            if not last:
                return None
            loss = torch.stack([one.detach() for one in losses]).mean()
        elif self.tp > 1:
            from torch.distributed.tensor.parallel import loss_parallel

            logits: Any = self.module(self.x)
            with loss_parallel():
                found: Any = loss_of(logits, self.y)
                found.backward()
            loss = found.detach().full_tensor()
        else:
            loss = loss_of(self.module(self.x), self.y)
            loss.backward()
            loss = loss.detach()
        if self.dp > 1:
            dist.all_reduce(loss, group=self.mesh.get_group("dp"))
            loss = loss / self.dp
        return loss


class _Called(nn.Module):
    """A transformer whose output matrix is called as a module, which is where DTensor sees it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.head = model, model.head

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.model.hidden(tokens))
        return logits


class _CalledStage(nn.Module):
    """The same of a pipeline's stage."""

    def __init__(self, stage: Any) -> None:
        super().__init__()
        self.stage, self.norm, self.head = stage, stage.norm, stage.head
        stage.norm = stage.head = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stage(x)
        return x if self.head is None else self.head(self.norm(x))


# --- calls ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """Losses of some steps, where this rank knows them; of the first call of ours also what was counted."""

    losses: list[float]
    figures: dict[str, float] = field(default_factory=dict)


class Call:
    """A step of one implementation; the first call takes some, and looks at one of them."""

    def __init__(self, make: Callable[[Inputs], Any], given: Inputs) -> None:
        self.make, self.given = make, given
        self.losses: Iterator[float] | None = None
        self.sent: dict[str, float] = {}
        self.made: Any = None

    def __call__(self) -> Result:
        if self.losses is not None:
            return Result([next(self.losses)])
        self.losses = self._steps()
        losses = [next(self.losses) for _ in range(FIRST)]
        if not isinstance(self.made, Ours):
            return Result(losses)
        everyone: list[Any] = [None] * size()
        dist.all_gather_object(everyone, {**self.sent, "model MB": self.made.memory()})
        return Result(losses, {name: round(max(one[name] for one in everyone), 3) for name in everyone[0]})

    def _steps(self) -> Iterator[float]:
        self.made = self.make(self.given)
        for number in range(1_000_000):
            self.made.optimizer.zero_grad()
            if number == 1 and isinstance(self.made, Ours):  # without what is sent once at the start
                found, self.sent = self.made.counted()
            else:
                found = self.made()
                self.made.optimizer.step()
            yield math.nan if found is None else found.item()


def verify(case: Case, given: Inputs, got: Result, want: Result) -> tuple[float, float]:
    """The largest relative error of the losses; those of torch's pipelines are known to some ranks only."""
    pairs = zip(got.losses, want.losses, strict=True)
    return max(0.0 if math.isnan(g) else abs(g - w) / abs(w) for g, w in pairs), ALLOWED


QUICK = [case(name, width=128, layers=2) for name in ("dp2", "dp2 x pp2", "pp2 x tp2")]
DEFAULT = [case(name) for name in MESHES]
WIDER = [case(name, width=512) for name in ("dp4", "tp4", "dp2 x tp2")]
bench = Benchmark(
    __file__,
    cases={
        "quick": QUICK,
        "default": DEFAULT,
        "full": [*DEFAULT, *WIDER],
    },
    inputs=inputs,
    work=work,
    impls={
        "one process": Impl(lambda: Whole, "reference"),
        "mesh": Impl(lambda: Ours, "ours"),
        "torch": Impl(lambda: Torch, "peer", only=lambda case: case["ranks"] > 1),
    },
    subject="mesh",
    prepare=lambda function, case, given: Call(function, given),
    compared=lambda case: case["ranks"] == 1,
    yours=lambda case: False,  # the contract asks for the groups
    verify=verify,
    figures=lambda case, given, got: got.figures,
    stateful=True,
    memory=True,
    budget_s=15.0,
    ranks=lambda case: case["ranks"],
    plots=(
        Plot(xlabel="all ranks", y="throughput", panel=("ranks", "mesh", "width")),
        Plot(xlabel="a rank", y="memory", panel=("ranks", "mesh", "width")),
    ),
)

if __name__ == "__main__":
    bench.main()
