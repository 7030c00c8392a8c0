"""Scaling: what does it buy to divide one training over 1, 2 and 4 processes, and where does the time of each go?

Two tasks on real data: a VGG-like net on scikit-learn's handwritten digits, and a small
transformer on the source of the standard library. The batch is the same whatever the
number of ranks: each takes its rows of it, so all losses are those of one process, which
is checked, and drawn. "one process" is the first rank alone on the whole batch, while
the others have nothing to do.

What to look at: the time of a rank divided into computing, updating, moving bytes and
waiting; throughput against the ideal line; model state per rank, which the ZeRO stages
divide; and the timeline of two steps, in which communication beneath the backward pass
is free.

Ranks are processes of one machine. With more ranks than cores they share them: they
compute longer, and a rank whose turn it is not lets all the others wait. That is this
machine's limit and not that of the method, so beyond the cores nothing is gained here;
the projection asks what links of real clusters would do to the same step on as many
machines, by the α-β model of `mlsys.perf.collectives`: computing as measured here on one
core, the batch of each rank as large as the whole one here, and of the best all-reduce
what does not fit beneath the backward pass.

Peer: torch's DistributedDataParallel.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from mlsys.bench import Benchmark, Impl, Plot, Work
from mlsys.bench.plots import COLOURS, HATCHES, LINES, MARKERS, new_figure, to_svg
from mlsys.bench.ranks import rank, size
from mlsys.bench.records import Record
from mlsys.data import text
from mlsys.models import transformer
from mlsys.models.training import Batches
from mlsys.models.transformer import Transformer
from mlsys.parallel.data_parallel import DataParallel
from mlsys.parallel.timeline import KINDS, Span, Split, Timeline, gather, split
from mlsys.parallel.zero import ZeRO1, ZeRO2
from mlsys.parallel.zero3 import ZeRO3
from mlsys.perf import collectives
from mlsys.perf.configs import llama
from mlsys.perf.hardware import GB, HARDWARE, NETWORK_LATENCY, Link
from mlsys.perf.zero import Memory

Case = Mapping[str, Any]
SEQ, VOCAB = 128, 256
STEPS = 2  # a timed call
WARM_UP, TRACED, DRAWN = 2, 8, 2  # steps of the run whose time is divided, and those of its timeline that are kept
# Error of a loss, of the largest on the curve: towards its end they are so small that they would magnify it. Sums in
# another order differ by roundings, which AdamW, dividing by the root of tiny squares, and each further step amplify:
# some 1e-7 at first, some 1e-4 after forty steps.
ALLOWED = 5e-3
PARTS = ("compute", "optimizer", "communication", "waiting", "other")

# --- the tasks --------------------------------------------------------------------------------------------------------


class Loss(nn.Module):
    """A net whose forward pass ends in the mean loss of its rows."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.net(inputs).flatten(0, -2), targets.flatten())


@dataclass(frozen=True)
class Inputs:
    """The task: how to make the net, and its batches, of which each rank takes its rows."""

    case: Case
    images: Tensor
    labels: Tensor
    stream: Any
    device: str

    def net(self) -> Loss:
        """A fresh one, the same each time and on each rank."""
        generator = torch.Generator(self.device).manual_seed(0)
        if self.case["task"] == "text":
            return Loss(transformer.init(Transformer(CONFIG, device=self.device), generator))
        net = vgg().to(self.device)
        with torch.no_grad():
            for p in net.parameters():
                p.normal_(0.0, (2 / p[0].numel()) ** 0.5 if p.ndim > 1 else 0.01, generator=generator)
        return Loss(net)

    def rows(self, step: int, part: int, parts: int) -> tuple[Tensor, Tensor]:
        """This part of the batch of a step, the same for any number of parts taken together."""
        batch = self.case["batch"]
        mine = slice(part * batch // parts, (part + 1) * batch // parts)
        if self.case["task"] == "text":
            inputs, targets = Batches(self.stream, batch, SEQ)(step)
            return inputs[mine].to(self.device), targets[mine].to(self.device)
        chosen = torch.from_numpy(np.random.default_rng((0, step)).integers(0, len(self.images), batch))[mine]
        return self.images[chosen].to(self.device), self.labels[chosen].to(self.device)


def vgg(width: int = 32) -> nn.Module:
    """Simonyan & Zisserman's net for images of 8 × 8: 3 × 3 convolutions in pairs, and wide layers at the end."""
    layers: list[nn.Module] = []
    for inside, out in ((1, width), (width, 2 * width)):
        layers += [nn.Conv2d(inside, out, 3, padding=1), nn.ReLU(), nn.Conv2d(out, out, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    dense = [nn.Linear(8 * width, 8 * width), nn.ReLU(), nn.Linear(8 * width, 10)]
    return nn.Sequential(*layers, nn.Flatten(), *dense)


CONFIG = llama(2, 128, 4, 344, vocab=VOCAB, context=SEQ, tied=True)
BATCH = {"digits": 128, "text": 8}
LEARNING_RATE = {"digits": 1e-3, "text": 2e-3}


def inputs(case: Case, device: str) -> Inputs:
    nothing = torch.zeros(0)
    if case["task"] == "text":
        files, _ = text.split(text.corpus("stdlib"))
        return Inputs(case, nothing, nothing, text.tokens(files, text.Bytes()), device)
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 16  # (1797, 1, 8, 8), from 0 to 1
    return Inputs(case, images, torch.from_numpy(found.target), None, device)


def work(case: Case, given: Inputs) -> Work:
    net = given.net()
    with FlopCounterMode(display=False) as counted:
        net(*given.rows(0, 0, 1)).backward()
    # A weight is read forward and backward and its gradient written; AdamW reads weight, gradient and two means and
    # writes three of them. That, once, is the task; copies are the price of dividing it.
    weights = sum(p.nbytes for p in net.parameters())
    items = case["batch"] * (SEQ if case["task"] == "text" else 1)
    return Work(
        flops=STEPS * counted.get_total_flops(),
        bytes=STEPS * 10 * weights,
        items=STEPS * items,
        unit="tokens" if case["task"] == "text" else "images",
    )


# --- the ways to train ------------------------------------------------------------------------------------------------


class Training:
    """The textbook loop, with what a way of parallelism puts in its place.

    model:     called with this rank's rows, gives their mean loss; after `backward`, gradients are there.
    optimizer: moves the weights by them.
    memory:    bytes of model state on this rank.
    share:     which part of each batch this rank takes, of how many.
    """

    def __init__(
        self,
        given: Inputs,
        timeline: Timeline | None,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        share: tuple[int, int],
    ) -> None:
        self.given, self.timeline, self.model, self.optimizer, self.share = given, timeline, model, optimizer, share
        self.done = 0

    def span(self, kind: str, name: str) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.timeline is None else self.timeline.span(kind, name)

    def step(self) -> Tensor:
        """One step; the loss of this rank's rows."""
        rows = self.given.rows(self.done, *self.share)
        with self.span("compute", "forward"):
            loss: Tensor = self.model(*rows)
        self.backward(loss)
        with self.span("optimizer", "update"):
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        return loss.detach()

    def backward(self, loss: Tensor) -> None:
        with self.span("compute", "backward"):
            loss.backward()

    def run(self, steps: int) -> list[float]:
        """So many steps: the losses of the whole batches, equal on all ranks."""
        losses = torch.stack([self.step() for _ in range(steps)]) / self.share[1]
        dist.all_reduce(losses)
        return list(losses.tolist())

    def memory(self) -> Memory:
        parameters = list(self.model.parameters())
        self.backward(self.model(*self.given.rows(0, *self.share)))  # after a step, there are no gradients to count
        gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
        self.optimizer.zero_grad()
        states = (t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
        return Memory(sum(p.nbytes for p in parameters), gradients, sum(t.nbytes for t in states))

    def close(self) -> None:
        """Nothing runs in the background of a plain net."""


def adamw(parameters: Any, given: Inputs) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE[given.case["task"]], fused=True)


class OneProcess(Training):
    """The first rank alone; the others take part in nothing but the end of `run`."""

    def __init__(self, given: Inputs, timeline: Timeline | None) -> None:
        net = given.net()
        super().__init__(given, timeline, net, adamw(net.parameters(), given), (0, 1))

    def step(self) -> Tensor:
        return super().step() if rank() == 0 else torch.zeros((), device=self.given.device)


class Replicas(Training):
    """`mlsys.parallel.data_parallel`, by strategy."""

    def __init__(self, given: Inputs, timeline: Timeline | None, strategy: str) -> None:
        # Small buckets for small nets: of torch's 25 MB, there would be one.
        model = DataParallel(given.net(), strategy=strategy, bucket_mb=0.5, first_bucket_mb=0.1, timeline=timeline)
        super().__init__(given, timeline, model, adamw(model.parameters(), given), (rank(), size()))
        self.close = model.close  # type: ignore[method-assign]


class Shards(Training):
    """`mlsys.parallel.zero` and `zero3`."""

    def __init__(self, given: Inputs, timeline: Timeline | None, stage: Callable[..., Any]) -> None:
        model = stage(given.net(), timeline=timeline)
        optimizer = model.optimizer(torch.optim.AdamW, lr=LEARNING_RATE[given.case["task"]], fused=True)
        super().__init__(given, timeline, model, optimizer, (rank(), size()))
        self.close = model.close  # type: ignore[method-assign]

    def memory(self) -> Memory:
        self.backward(self.model(*self.given.rows(0, *self.share)))
        found: Memory = self.model.memory()  # type: ignore[operator]
        self.optimizer.zero_grad()
        return found


class TorchDDP(Training):
    """torch's; to see into it, a communication hook that does what its own does, and notes when."""

    def __init__(self, given: Inputs, timeline: Timeline | None) -> None:
        model = DistributedDataParallel(given.net(), bucket_cap_mb=0.5, gradient_as_bucket_view=True)
        self.sent_last = 0.0
        if timeline is not None:
            # By a lambda, since torch compares annotations with types, and here they are text.
            model.register_comm_hook(timeline, lambda state, bucket: self.hook(state, bucket))
        super().__init__(given, timeline, model, adamw(model.parameters(), given), (rank(), size()))

    def hook(self, timeline: Timeline, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        start = self.sent_last = timeline.clock()
        work = dist.all_reduce(bucket.buffer().div_(size()), async_op=True)
        assert work is not None

        def done(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            timeline.add("communication", f"bucket {bucket.index()}", start, timeline.clock())
            return future.value()[0]

        return work.get_future().then(done)

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        if self.timeline is not None and size() > 1:  # once the last bucket is sent, all that is left is to wait
            self.timeline.add("waiting", "last bucket", self.sent_last, self.timeline.clock())


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """Losses; of the first call also the time of each rank divided, seconds a step, its memory, and a timeline."""

    losses: list[float]
    split: Sequence[Split] = ()
    memory: Sequence[Memory] = ()
    spans: Sequence[Sequence[Span]] = ()


class Call:
    """The first call draws the loss curve, and divides the time of another run of the same; later ones are timed."""

    def __init__(self, make: Callable[[Inputs, Timeline | None], Training], case: Case, given: Inputs) -> None:
        self.make, self.case, self.given = make, case, given
        self.training: Training | None = None

    def __call__(self) -> Result:
        if self.training is not None:
            return Result(self.training.run(STEPS))
        self.training = self.make(self.given, None)
        losses = self.training.run(self.case["steps"])
        timeline = Timeline()
        traced = self.make(self.given, timeline)
        traced.run(WARM_UP)
        timeline.clear()
        windows: list[tuple[float, float]] = []
        for _ in range(min(TRACED, self.case["steps"])):
            dist.barrier()
            start = timeline.clock()
            traced.step()
            windows.append((start, timeline.clock()))
        timeline.recording = False
        everyone: list[Any] = [None] * size()
        dist.all_gather_object(everyone, (windows, traced.memory()))
        spans = gather(timeline)
        traced.close()
        parts = split(spans, [mine for mine, _ in everyone])
        return Result(
            losses,
            [Split(*(value / len(windows) for value in dataclasses.astuple(part))) for part in parts],
            [memory for _, memory in everyone],
            [_last_steps(mine, of) for mine, (of, _) in zip(spans, everyone, strict=True)],
        )


def _last_steps(spans: Sequence[Span], windows: Sequence[tuple[float, float]]) -> list[Span]:
    return [span for span in spans if span.start >= windows[-DRAWN][0]]


def verify(case: Case, given: Inputs, got: Result, want: Result) -> tuple[float, float]:
    """The largest error of a loss, of the largest loss."""
    return max(abs(g - w) for g, w in zip(got.losses, want.losses, strict=True)) / max(want.losses), ALLOWED


def figures(case: Case, given: Inputs, got: Result) -> dict[str, float]:
    """Milliseconds a step, mean over the ranks that work; MiB of model state on the fullest rank."""
    working = [part for part in got.split if part.compute > 0]
    found = {f"{kind} ms": 1e3 * sum(getattr(p, kind) for p in working) / len(working) for kind in (*PARTS, "hidden")}
    found["model state MiB"] = max(memory.total for memory in got.memory) / 2**20
    found["gradient bytes"] = float(sum(p.nbytes for p in given.net().parameters()))
    return found


def series(case: Case, given: Inputs, got: Result) -> dict[str, list[Any]]:
    """The loss curve; seconds a step of each rank, in the order of `Split`; and the spans of two steps."""
    first = min((span.start for spans in got.spans for span in spans), default=0.0)
    spans: list[Any] = []
    for number, mine in enumerate(got.spans):
        program = {span.thread for span in mine if span.kind != "communication"}
        spans += [
            [number, s.kind, s.name, round(s.start - first, 7), round(s.end - first, 7), int(s.thread not in program)]
            for s in mine
        ]
    return {
        "losses": [round(loss, 6) for loss in got.losses],
        "seconds": [[round(value, 7) for value in dataclasses.astuple(part)] for part in got.split],
        "state bytes": [list(dataclasses.astuple(memory)) for memory in got.memory],
        "spans": spans,
    }


# --- pictures ---------------------------------------------------------------------------------------------------------

KIND_COLOURS = dict(zip((*KINDS, "other"), (COLOURS[2], COLOURS[1], COLOURS[5], COLOURS[0], COLOURS[7]), strict=True))
KIND_HATCHES = dict(zip((*KINDS, "other"), HATCHES, strict=False))


def _tasks(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Those with figures, by task."""
    found: dict[str, list[Record]] = {}
    for r in records:
        if r.figures:
            found.setdefault(r.case["task"], []).append(r)
    return found


def _names(records: Sequence[Record]) -> list[str]:
    return [name for name in bench.impls if any(r.impl == name for r in records)]


def draw_split(records: Sequence[Record]) -> str | None:
    """Where a step's time goes: stacked bars, the mean over ranks."""
    tasks = _tasks(records)
    if not tasks:
        return None
    rows = max(len(mine) for mine in tasks.values())
    figure, axes = new_figure(len(tasks), width=5.2, height=1.2 + 0.21 * rows)
    for ax, (task, mine) in zip(axes, tasks.items(), strict=True):
        ordered = [r for n in sorted({r.case["ranks"] for r in mine}) for i in _names(mine) for r in mine
                   if (r.case["ranks"], r.impl) == (n, i)]  # fmt: skip
        left = [0.0] * len(ordered)
        for kind in PARTS:
            widths = [r.figures[f"{kind} ms"] for r in ordered]
            ax.barh(range(len(ordered)), widths, left=left, color=KIND_COLOURS[kind], hatch=KIND_HATCHES[kind],
                    edgecolor="white", linewidth=0.4, label=kind)  # fmt: skip
            left = [a + b for a, b in zip(left, widths, strict=True)]
        ax.set_yticks(range(len(ordered)), [f"{r.impl}, {r.case['ranks']}" for r in ordered], fontsize=7)
        ax.invert_yaxis()
        ax.set(title=f"{task}: a step by what it goes into, on 1, 2, … ranks", xlabel="ms a step, mean over ranks")
        ax.grid(True, axis="x", alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return to_svg(figure)


def draw_throughput(records: Sequence[Record]) -> str | None:
    """Throughput against ranks, beside the ideal."""
    tasks = {task: [r for r in mine if r.seconds] for task, mine in _tasks(records).items()}
    tasks = {task: mine for task, mine in tasks.items() if len({r.case["ranks"] for r in mine}) > 1}
    if not tasks:
        return None
    figure, axes = new_figure(len(tasks))
    for ax, (task, mine) in zip(axes, tasks.items(), strict=True):
        counts = sorted({r.case["ranks"] for r in mine})
        alone = [_rate(r) for r in mine if r.impl == bench.reference and r.case["ranks"] == counts[0]]
        if alone:
            ax.plot(counts, [alone[0] * n for n in counts], color="black", linestyle=":", label="ideal")
        for style, name in enumerate(_names(mine)):
            points = sorted((r.case["ranks"], _rate(r)) for r in mine if r.impl == name)
            ax.plot(*zip(*points, strict=True), color=COLOURS[style % 8], marker=MARKERS[style % 8],
                    linestyle=LINES[style % 8], label=name)  # fmt: skip
        ax.set_xticks(counts, [str(n) for n in counts])
        cores = mine[0].machine.get("cores")
        shared = f", on {cores} cores" if cores else ""
        ax.set(title=task, xlabel=f"ranks of one thread{shared}", ylabel=f"{mine[0].unit} per second", ylim=(0, None))
        ax.grid(True, alpha=0.3)
        ax.legend(fontsize=7, frameon=False)
    return to_svg(figure)


def _rate(record: Record) -> float:
    return record.items / (record.seconds or 1.0)


def draw_losses(records: Sequence[Record]) -> str | None:
    """The loss curves, laid over each other: of one process, and of the subject and the last stage on every n."""
    tasks = {task: [r for r in mine if r.series.get("losses")] for task, mine in _tasks(records).items()}
    tasks = {task: mine for task, mine in tasks.items() if mine}
    if not tasks:
        return None
    figure, axes = new_figure(len(tasks))
    for ax, (task, mine) in zip(axes, tasks.items(), strict=True):
        longest = max(r.case["steps"] for r in mine)
        mine = [r for r in mine if r.case["steps"] == longest]
        alone = [r for r in mine if r.impl == bench.reference][:1]
        curves = alone + [r for name in (bench.subject, "ZeRO-3") for r in mine if r.impl == name]
        for style, r in enumerate(curves):
            # The first is drawn widest, and the others over it: where all are equal, each is seen within the last.
            label = r.impl if r in alone else f"{r.impl}, n = {r.case['ranks']}"
            ax.plot(r.series["losses"], color=COLOURS[style % 8], linestyle=LINES[style % 8] if style else "-",
                    linewidth=7.0 if not style else 1.6, alpha=0.35 if not style else 1.0, label=label)  # fmt: skip
        largest = max((r.error or 0.0) for r in curves)
        ax.set(title=f"{task}: relative difference at most {largest:.0e}", xlabel="step", ylabel="loss, nats")
        ax.grid(True, alpha=0.3)
        ax.legend(fontsize=7, frameon=False)
    return to_svg(figure)


def draw_timeline(records: Sequence[Record]) -> str | None:
    """Two steps of each rank: what the program does, and under it what its communication thread does."""
    tasks = {task: [r for r in mine if r.series.get("spans")] for task, mine in _tasks(records).items()}
    chosen = []
    for mine in tasks.values():
        counts = sorted({r.case["ranks"] for r in mine})
        few = next((n for n in counts if n > 1), None)
        chosen += [r for name in ("flat", bench.subject, "ZeRO-3") for r in mine
                   if (r.impl, r.case["ranks"]) == (name, few)]  # fmt: skip
    if not chosen:
        return None
    columns = len({r.case["task"] for r in chosen})
    rows = -(-len(chosen) // columns)
    figure, axes = new_figure(columns, rows, width=5.6, height=1.6)
    for index, r in enumerate(chosen):
        ax = axes[(index % rows) * columns + index // rows]
        for number, kind, _, start, end, lane in sorted(r.series["spans"], key=lambda s: s[3] - s[4]):  # short on top
            height = 0.36 if lane else 0.44
            ax.barh(number + (0.42 if lane else 0.0), 1e3 * (end - start), left=1e3 * start, height=height,
                    color=KIND_COLOURS[kind], edgecolor="white", linewidth=0.3)  # fmt: skip
        ax.set_yticks(range(r.case["ranks"]), [f"rank {n}" for n in range(r.case["ranks"])], fontsize=7)
        ax.invert_yaxis()
        ax.set_title(f"{r.case['task']}, {r.impl}", fontsize=9)
        ax.set_xlabel("ms", fontsize=8)
    for ax in axes[len(chosen) :]:
        ax.set_axis_off()
    from matplotlib.patches import Patch

    keys = [Patch(color=KIND_COLOURS[kind], label=kind) for kind in KINDS]
    figure.legend(handles=keys, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return to_svg(figure)


def draw_memory(records: Sequence[Record]) -> str | None:
    """Model state on the fullest rank, against ranks."""
    tasks = {task: mine for task, mine in _tasks(records).items() if len({r.case["ranks"] for r in mine}) > 1}
    if not tasks:
        return None
    shown = (bench.subject, "ZeRO-1", "ZeRO-2", "ZeRO-3")
    figure, axes = new_figure(len(tasks))
    for ax, (task, mine) in zip(axes, tasks.items(), strict=True):
        counts = sorted({r.case["ranks"] for r in mine})
        for place, name in enumerate(shown):
            found = {r.case["ranks"]: r.figures["model state MiB"] for r in mine if r.impl == name}
            at = [i + (place - 1.5) * 0.2 for i, n in enumerate(counts) if n in found]
            label = "a copy on each (bucketed)" if name == bench.subject else name
            ax.bar(at, [found[n] for n in counts if n in found], 0.18, color=COLOURS[place], hatch=HATCHES[place],
                   edgecolor="white", label=label)  # fmt: skip
        ax.set_xticks(range(len(counts)), [str(n) for n in counts])
        ax.set(title=task, xlabel="ranks", ylabel="model state a rank (MiB)")
        ax.grid(True, axis="y", alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return to_svg(figure)


# No data sheet prints the latency of Ethernet with its software; that which NCCL assumes of a network is taken for all.
_H100 = HARDWARE["h100"]
LINKS: tuple[tuple[Link, int | None], ...] = (
    (Link("1 Gbit/s Ethernet", 0.125 * GB, NETWORK_LATENCY), None),
    (Link("10 Gbit/s Ethernet", 1.25 * GB, NETWORK_LATENCY), None),
    (Link("InfiniBand NDR, 400 Gbit/s a device", 50 * GB, NETWORK_LATENCY), None),
    (_H100.link or Link("", 1.0), 8),  # a box has eight
)
AT = (2, 8, 64, 1024)


def project(size: float, n: int, link: Link, algorithm: str | None = None) -> float:
    """Seconds of an all-reduce of `size` bytes over `n` machines by the α-β model; None is the fastest algorithm."""
    alpha, beta = link.latency or 0.0, 1 / link.bandwidth
    seconds = collectives.ranking("all_reduce", n, size, alpha, beta)
    return seconds[algorithm] if algorithm else min(seconds.values())


def draw_projection(records: Sequence[Record]) -> str | None:
    """A projection, not a measurement: the step measured on one core, on up to 1,024 of them with published links.

    In the best case: all of the backward pass hides communication, and nobody is late.
    """
    alone = {task: [r for r in mine if r.impl == bench.reference and r.case["ranks"] == 1 and r.series.get("spans")]
             for task, mine in _tasks(records).items()}  # fmt: skip
    alone = {task: mine for task, mine in alone.items() if mine}
    if not alone:
        return None
    figure, axes = new_figure(len(alone), 2, width=5.0, height=3.2)
    for column, (task, (one, *_)) in enumerate(alone.items()):
        reduce, step = axes[column], axes[len(alone) + column]
        sent = one.figures["gradient bytes"]
        compute = sum(one.figures[f"{kind} ms"] for kind in PARTS)
        backward = 1e3 * sum(s[4] - s[3] for s in one.series["spans"] if s[2] == "backward") / DRAWN
        for style, (link, most) in enumerate(LINKS):
            counts = [n for n in AT if most is None or n <= most]
            for algorithm in (None, "ring"):
                times = [1e3 * project(sent, n, link, algorithm) for n in counts]
                look: dict[str, Any] = {"color": COLOURS[style], "marker": MARKERS[style], "markersize": 4}
                look |= {"linestyle": "--" if algorithm else "-", "label": None if algorithm else link.name}
                reduce.plot(counts, times, **look)
                step.plot(counts, [compute + max(0.0, time - backward) for time in times], **look)
        reduce.axhline(backward, color="black", linestyle=":", linewidth=1.0)
        reduce.set_yscale("log")
        low, high = reduce.get_ylim()
        reduce.set_ylim(low, max(high, 4 * backward))
        reduce.text(AT[0], 1.15 * backward, "backward pass: what is below is hidden", fontsize=7)
        title = f"PROJECTION, {task}: {sent / 1e6:.1f} MB of gradients, {compute:.0f} ms of computing"
        reduce.set_title(title, fontsize=9)
        reduce.set_ylabel("ms an all-reduce")
        step.set(xlabel="ranks, a batch each (dashed: by a ring)", ylabel="ms a step", ylim=(0, None))
        for ax in (reduce, step):
            ax.set_xscale("log", base=2)
            ax.set_xticks(AT, [f"{n:,}" for n in AT])
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.minorticks_off()
            ax.grid(True, alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return to_svg(figure)


# --- the benchmark ----------------------------------------------------------------------------------------------------


def case(task: str, ranks: int, steps: int, batch: int | None = None) -> Case:
    return {"task": task, "ranks": ranks, "batch": batch or BATCH[task], "steps": steps}


DEFAULT = [case(task, n, 40) for task in BATCH for n in (1, 2, 4)]
bench = Benchmark(
    __file__,
    cases={
        "quick": [case("digits", n, 4, batch=32) for n in (2, 1)],
        "default": DEFAULT,
        "full": [case(task, n, 200) for task in BATCH for n in (1, 2, 3, 4) if BATCH[task] % n == 0],
    },
    inputs=inputs,
    work=work,
    impls={
        "one process": Impl(lambda: OneProcess, "reference"),
        "naive": Impl(lambda: partial(Replicas, strategy="naive"), "variant"),
        "flat": Impl(lambda: partial(Replicas, strategy="flat"), "variant"),
        "bucketed": Impl(lambda: partial(Replicas, strategy="bucketed"), "ours"),
        "ZeRO-1": Impl(lambda: partial(Shards, stage=ZeRO1), "ours"),
        "ZeRO-2": Impl(lambda: partial(Shards, stage=ZeRO2), "ours"),
        "ZeRO-3": Impl(lambda: partial(Shards, stage=ZeRO3), "ours"),
        "torch DDP": Impl(lambda: TorchDDP, "peer"),
    },
    subject="bucketed",
    prepare=Call,
    verify=verify,
    figures=figures,
    series=series,
    budget_s=8.0,
    ranks=lambda case: int(case["ranks"]),
    stateful=True,
    plots=(Plot(y="throughput", xlabel="the whole batch", panel=("task", "ranks")),),
    pictures={
        "split": draw_split,
        "throughput": draw_throughput,
        "losses": draw_losses,
        "timeline": draw_timeline,
        "memory": draw_memory,
        "projection": draw_projection,
    },
)

if __name__ == "__main__":
    bench.main()
