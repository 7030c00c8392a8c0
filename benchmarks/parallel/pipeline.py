"""Pipeline parallelism: what does a training step cost under each schedule, beside torch with the same one?

What to look at: each row is a schedule on 1 to 4 ranks; the reference is plain model
parallelism, where one rank works at a time. "bubble" is the share of the ranks' time with
nothing to do in a measured step, "simulated" what `simulate` says of the same schedule with
the mean times of each stage's operations in that step, and "simulated ÷ measured" compares the
lengths of the two steps. The picture shows both.

Ranks share the machine's cores: on two cores, two ranks have one each, and four take turns,
so that an operation takes as long as its rank was left waiting; there the simulation, which
gives every rank a processor, says too little.

Each step is one of SGD on a transformer. "MB sent" is that of the rank that sends most.

Peer: `torch.distributed.pipelining`: `ScheduleGPipe`, `Schedule1F1B` and `ScheduleInterleaved1F1B`; the zero-bubble
schedules run in its executor from our tables, so that both do the same operations in the same order.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mlsys.bench import Benchmark, Impl, Plot, Record, Work
from mlsys.bench.plots import to_svg
from mlsys.bench.ranks import rank, size
from mlsys.models import transformer
from mlsys.models.transformer import Transformer
from mlsys.parallel.pipeline import Pipeline, measured, operations, split
from mlsys.parallel.schedules import SCHEDULES, Op, Schedule, observed, plot, sequential, simulate
from mlsys.parallel.timeline import Timeline, gather
from mlsys.parallel.traffic import ledger
from mlsys.perf.configs import llama
from mlsys.perf.transformer import training_flops

Case = Mapping[str, Any]
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]
SEQ, VOCAB = 128, 256
FIRST = 7  # steps of the first call: one to learn the shapes, one counted, the others measured
ALLOWED = 1e-3  # relative error of a loss: float32 roundings, which steps amplify
TWO_CHUNKS = ("interleaved", "zbv")


@dataclass(frozen=True)
class Inputs:
    """The batch, the same on all ranks, and how to make the model."""

    case: Case
    x: torch.Tensor
    y: torch.Tensor

    def model(self) -> Transformer:
        """A fresh one, the same each time and on each rank."""
        generator = torch.Generator(self.x.device).manual_seed(0)
        return transformer.init(Transformer(config(self.case), device=self.x.device), generator)


def config(case: Case) -> Any:
    return llama(case["layers"], case["width"], case["width"] // 32, 3 * case["width"], vocab=VOCAB, context=SEQ)


def table(case: Case) -> tuple[Schedule, int]:
    """The schedule, and how many stages it has."""
    name, p, m = case["schedule"], case["ranks"], case["m"]
    if name == "interleaved":
        return SCHEDULES[name](p, m, 2), 2 * p
    return SCHEDULES[name](p, m), (2 if name in TWO_CHUNKS else 1) * p


def case(schedule: str, ranks: int, *, layers: int = 8, width: int = 256, m: int = 8, batch: int = 8) -> Case:
    return {"schedule": schedule, "ranks": ranks, "layers": layers, "width": width, "m": m, "batch": batch}


def inputs(case: Case, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(1)
    tokens = torch.randint(VOCAB, (case["batch"], SEQ + 1), generator=generator, device=device)
    return Inputs(case, tokens[:, :-1], tokens[:, 1:])


def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def work(case: Case, given: Inputs) -> Work:
    flops = training_flops(config(case), case["batch"], SEQ, causal=True).total
    # A weight is read forward and backward for each microbatch, its gradient read and written; then the optimizer.
    bytes_ = (4 * case["m"] + 6) * sum(p.nbytes for p in Transformer(config(case), device="meta").parameters())
    return Work(flops=flops, bytes=bytes_, items=case["batch"] * SEQ, unit="tokens")


# --- the implementations: each makes a step, and the parameters of this rank ------------------------------------------


def ours(given: Inputs, schedule: Schedule, stages: int) -> tuple[Pipeline, list[torch.nn.Parameter]]:
    pipe = Pipeline(split(given.model(), stages), schedule, loss)
    return pipe, list(pipe.parameters())


def pipelined(given: Inputs) -> tuple[Pipeline, list[torch.nn.Parameter]]:
    return ours(given, *table(given.case))


def one_at_a_time(given: Inputs) -> tuple[Pipeline, list[torch.nn.Parameter]]:
    return ours(given, sequential(given.case["ranks"], given.case["m"]), given.case["ranks"])


def by_torch(given: Inputs) -> tuple[Step, list[torch.nn.Parameter]]:
    from torch.distributed.pipelining import (
        PipelineStage,
        Schedule1F1B,
        ScheduleGPipe,
        ScheduleInterleaved1F1B,
        schedules,
    )

    schedule, count = table(given.case)
    name, m, device = given.case["schedule"], given.case["m"], given.x.device
    mine = {op.stage for op in schedule[rank()]}
    modules = split(given.model(), count)
    stages: list[Any] = [PipelineStage(modules[number], number, count, device) for number in sorted(mine)]
    runner: Any
    if name in ("gpipe", "1f1b"):
        runner = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[name](stages[0], m, loss_fn=loss)
    elif name == "interleaved":
        runner = ScheduleInterleaved1F1B(stages, m, loss_fn=loss)
    else:
        runner = schedules._PipelineScheduleRuntime(stages, m, loss_fn=loss)
        kinds = {kind: schedules._ComputationType(word) for kind, word in zip(("F", "B", "W", "BW"), "FIWB")}
        runner.pipeline_order = {
            row: [schedules._Action(op.stage, kinds[op.kind], op.microbatch) for op in ops]
            for row, ops in schedule.items()
        }
        runner._prepare_schedule_with_comms(runner.pipeline_order)

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
        losses: list[torch.Tensor] = []
        last = {"target": y, "losses": losses} if count - 1 in mine else {}
        runner.step(*((x,) if 0 in mine else ()), **last)
        return torch.stack([one.detach() for one in losses]).mean() if losses else None

    return step, [p for number in mine for p in modules[number].parameters()]


# --- calls ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """Losses of some steps, where this rank knows them; of the first call of ours also what was measured."""

    losses: list[float]
    figures: dict[str, float] = field(default_factory=dict)
    spans: list[list[Any]] = field(default_factory=list)


class Call:
    """A step of one implementation; the first call takes some more, and looks at them."""

    def __init__(self, make: Callable[[Inputs], tuple[Any, list[torch.nn.Parameter]]], given: Inputs) -> None:
        self.make, self.given = make, given
        self.pipe: Any = None
        self.losses: Iterator[float] | None = None

    def __call__(self) -> Result:
        if self.losses is not None:
            return Result([next(self.losses)])
        self.losses = self._steps()
        losses = [next(self.losses)]
        if not isinstance(self.pipe, Pipeline):
            return Result(losses + [next(self.losses) for _ in range(FIRST - 1)])
        with ledger() as book:
            losses.append(next(self.losses))
        steps = []
        for _ in range(FIRST - 2):
            self.pipe.timeline = Timeline()
            losses.append(next(self.losses))
            steps.append(gather(self.pipe.timeline))
        self.pipe.timeline = None
        return Result(losses, *self._figures(steps, book.sent))

    def _steps(self) -> Iterator[float]:
        self.pipe, parameters = self.make(self.given)
        step = self.pipe.step if isinstance(self.pipe, Pipeline) else self.pipe
        optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9, foreach=True)
        while True:
            optimizer.zero_grad()
            found = step(self.given.x, self.given.y)
            optimizer.step()
            yield math.nan if found is None else found.item()

    def _figures(self, steps: list[Any], sent: float) -> tuple[dict[str, float], list[list[Any]]]:
        pairs = []
        for ranks in steps:
            step = observed({row: operations(spans) for row, spans in enumerate(ranks)})
            pairs.append((step, simulate(self.pipe.schedule, *measured(ranks))))
        middle, simulated = sorted(pairs, key=lambda pair: pair[0].makespan)[len(pairs) // 2]
        everyone: list[Any] = [None] * size()
        dist.all_gather_object(everyone, sent)
        figures = {
            "MB sent": round(max(everyone) / 1e6, 4),
            "bubble": round(middle.bubble, 3),
            "simulated": round(simulated.bubble, 3),
            "simulated ÷ measured": round(statistics.median(b.makespan / a.makespan for a, b in pairs), 3),
        }
        spans = [
            [label, row, *op, round(start, 6), round(end, 6)]
            for label, one in (("measured", middle), ("simulated", simulated))
            for row, ops in one.spans.items()
            for op, start, end in ops
        ]
        return figures, spans


def verify(case: Case, given: Inputs, got: Result, want: Result) -> tuple[float, float]:
    """The largest relative error of the losses; torch's are known to one rank only."""
    pairs = zip(got.losses, want.losses, strict=True)
    return max(0.0 if math.isnan(g) else abs(g - w) / abs(w) for g, w in pairs), ALLOWED


def series(case: Case, given: Inputs, got: Result) -> dict[str, list[Any]]:
    return {"spans": got.spans} if got.spans else {}


def timelines(records: Sequence[Record]) -> str | None:
    """Measured steps above the same steps simulated with the measured times of their operations; milliseconds."""
    panels: dict[str, Any] = {}
    for record in records:
        if record.impl != "pipeline" or record.case["ranks"] != 2 or not record.series.get("spans"):
            continue
        for label in ("measured", "simulated"):
            rows: dict[int, list[tuple[Op, float, float]]] = {}
            for which, row, kind, stage, i, start, end in record.series["spans"]:
                if which == label:
                    rows.setdefault(row, []).append((Op(kind, stage, i), 1e3 * start, 1e3 * end))
            panels[f"{record.case['schedule']}, {label}"] = rows
    return to_svg(plot(panels, unit="ms")) if panels else None


def small(schedule: str, ranks: int) -> Case:
    return case(schedule, ranks, layers=4, width=64, m=4, batch=4)


QUICK = [small("1f1b", 2), small("zb-h1", 2), small("zbv", 2), {**small("interleaved", 4), "layers": 8}]
DEFAULT = [
    case("1f1b", 1),
    *(case(name, 2) for name in ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zbv")),
    case("1f1b", 3),
    *(case(name, 4) for name in ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zbv")),
]
bench = Benchmark(
    __file__,
    cases={"quick": QUICK, "default": DEFAULT, "full": [*DEFAULT, case("1f1b", 2, width=512)]},
    inputs=inputs,
    work=work,
    impls={
        "sequential": Impl(lambda: one_at_a_time, "reference"),
        "pipeline": Impl(lambda: pipelined, "ours"),
        "torch pipelining": Impl(lambda: by_torch, "peer"),
    },
    subject="pipeline",
    prepare=lambda function, case, given: Call(function, given),
    verify=verify,
    figures=lambda case, given, got: got.figures,
    series=series,
    yours=lambda case: False,  # the contract's step has stages of its own
    stateful=True,
    memory=True,
    budget_s=15.0,
    ranks=lambda case: case["ranks"],
    plots=(Plot(xlabel="all ranks", y="throughput", panel=("ranks", "schedule", "width")),),
    pictures={"timelines": timelines},
)

if __name__ == "__main__":
    bench.main()
