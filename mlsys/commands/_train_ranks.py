"""`mlsys train --parallel`: the same training on several processes, and where the time of each of them goes.

Every rank runs what one process would (`mlsys.commands.train.work`), with a trainer that takes this rank's rows of
each batch. The first rank alone reads the text, keeps the folder and speaks; what it finds out it tells the others.
"""

from __future__ import annotations

import abc
import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor, nn

from mlsys.cli import EXPECTED
from mlsys.commands import UsageError
from mlsys.commands._train_folder import CHECKPOINT, SHARDS
from mlsys.commands._train_loop import first_signal
from mlsys.data.text import Tokens
from mlsys.models import training
from mlsys.models.training import Checkpoint, TrainConfig, Trainer
from mlsys.models.transformer import Transformer
from mlsys.parallel import Communicator, LaunchError, launch
from mlsys.parallel.collectives import Links, all_reduce
from mlsys.parallel.timeline import Timeline, gather, split, to_chrome
from mlsys.perf.zero import Memory

T = TypeVar("T")
Work = Callable[[argparse.Namespace, Any], tuple[int, dict[str, Any] | None]]

WARM_UP, TRACED = 2, 500  # steps whose time is not divided, and then how many are: a timeline may not grow for hours


def launched(work: Work, args: argparse.Namespace) -> tuple[int, dict[str, Any] | None]:
    """`work` on `args.ranks` processes; what it returns on the first. Under torchrun, None for results elsewhere."""
    threads = args.threads or max(1, (os.cpu_count() or 1) // args.ranks)
    with relayed() as told_at:
        try:
            results = launch(on_rank, args.ranks, work, args, str(told_at), timeout=None, threads=threads)
        except LaunchError as error:
            if isinstance(error.__cause__, EXPECTED):
                raise error.__cause__ from None
            if error.kind == "raised":
                raise
            raise UsageError(
                f"{str(error).splitlines()[0]}; what was saved is whole, to go on from it: "
                f"mlsys train --out {args.out} --resume"
            ) from error
    status, found = results[0]
    return status, found if os.environ.get("RANK", "0") == "0" else None


def on_rank(work: Work, args: argparse.Namespace, told_at: str) -> tuple[int, dict[str, Any] | None]:
    """What each process runs."""
    try:
        return work(args, Ranks(args.parallel, Path(told_at), args.timeline))
    except _FirstFailed:
        return 2, None


@contextmanager
def relayed() -> Iterator[Path]:
    """A file that names the signal which this process, that started the ranks, got. A second one acts at once."""
    with tempfile.TemporaryDirectory(prefix="mlsys-train-") as folder:
        file = Path(folder) / "signal"
        with first_signal(lambda number: file.write_text(str(number))):
            yield file


class _FirstFailed(Exception):
    """The first rank has raised an error, and says so: the others have nothing to add."""


class Ranks:
    """The crew of `mlsys train` on several processes."""

    def __init__(self, kind: str, told_at: Path, trace: Path | None) -> None:
        self.kind, self.told_at, self.trace = kind, told_at, trace
        self.first = dist.get_rank() == 0
        self.file = CHECKPOINT if kind == "ddp" else SHARDS

    def once(self, function: Callable[[], T]) -> T:
        """The first rank calls it and sends the others the result, or that there is none."""
        box: list[Any] = [None]
        if not self.first:
            dist.broadcast_object_list(box, src=0)
            if not box[0][0]:
                raise _FirstFailed
            return cast(T, box[0][1])
        try:
            result = function()
        except BaseException:
            dist.broadcast_object_list([(False, None)], src=0)
            raise
        dist.broadcast_object_list([(True, result)], src=0)
        return result

    def most(self, *values: float) -> list[float]:
        """Of each value, the largest on any rank."""
        together = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(together, op=dist.ReduceOp.MAX)
        return cast(list[float], together.tolist())

    def told(self) -> int:
        """The signal that the process which started the ranks got."""
        try:
            return int(self.told_at.read_text() or 0)
        except FileNotFoundError:
            return 0

    def trainer(self, model: Transformer, stream: Tokens, config: TrainConfig, notes: dict[str, Any]) -> RanksTrainer:
        """One that divides each batch over the ranks."""
        kind = ReplicaTrainer if self.kind == "ddp" else ShardTrainer
        return kind(self.kind, model, stream, config, notes)

    def dismiss(self, trainer: Trainer) -> None:
        """End what it has in the background."""
        assert isinstance(trainer, RanksTrainer)
        trainer.close()

    def finish(self, trainer: Trainer) -> tuple[Transformer, dict[str, Any]]:
        """The whole model on the first rank, and where the time and the memory of each rank went."""
        assert isinstance(trainer, RanksTrainer)
        model, spans = trainer.whole(), gather(trainer.timeline)
        own = dist.get_rank(), asdict(trainer.memory()), trainer.traced
        rows: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(rows, own)
        trainer.close()
        if self.first and self.trace:
            to_chrome(spans, self.trace)
        measured = {
            "parallel": self.kind,
            "tokens_per_second": trainer.tokens / trainer.seconds if trainer.seconds else None,
            "traced_steps": len(trainer.traced),
            "ranks": [
                {"rank": rank, "model_state_bytes": memory, "seconds": asdict(part)}
                for (rank, memory, _), part in zip(rows, split(spans, [steps for *_, steps in rows]), strict=True)
            ],
        }
        return model, measured


def table(results: dict[str, Any]) -> str:
    """What `Ranks.finish` measured, to be read."""
    parts = ("compute", "optimizer", "communication", "waiting", "other", "hidden")
    rows = []
    for row in results["ranks"]:
        total = sum(row["seconds"][part] for part in parts[:-1]) or 1.0
        times = [f"{row['seconds'][part] / total:.0%}" for part in parts]
        rows.append([row["rank"], *times, f"{sum(row['model_state_bytes'].values()) / 2**20:.2f} MiB"])
    headers = ("rank", *parts, "model state")
    speed = results["tokens_per_second"]
    told = f"{len(rows)} {results['parallel']}" + (f", {speed:,.0f} tokens/s" if speed else "")
    if results["traced_steps"]:
        steps = results["traced_steps"]
        told += f"; where the time of {steps:,} step{'s' * (steps > 1)} went:"
    lines = tabulate(rows, headers, tablefmt="simple", colalign=["right"] * len(headers)).splitlines()
    return "\n".join([f"ranks           {told}", *(f"  {line}" for line in lines)])


def read(folder: Path) -> Checkpoint:
    """What the checkpoint in shards says of its run; each rank reads its tensors later."""
    from mlsys.parallel import sharded_checkpoint

    return Checkpoint.of(folder / SHARDS, sharded_checkpoint.read_notes(folder / SHARDS), {})


# --- trainers ---------------------------------------------------------------------------------------------------------


class Loss(nn.Module):
    """A model whose forward pass ends in the loss: what is wrapped, so that wrappers see the whole of it."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.model.loss(inputs, targets)


class _Through(nn.Module):
    """The wrapped model as `evaluate` wants one: its loss goes through the wrapper, which may have weights to fetch."""

    def __init__(self, parallel: nn.Module) -> None:
        super().__init__()
        self.parallel = parallel

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return cast(Tensor, self.parallel(inputs, targets))


class RanksTrainer(Trainer, abc.ABC):
    """A trainer of several processes: each takes its rows of the batch that one process would take.

    timeline: of this rank, for a bounded number of steps.
    traced:   when these began and ended, seconds of the timeline's clock.
    """

    parallel: Any  # the wrapped model

    def __init__(
        self, kind: str, model: Transformer, stream: Tokens, config: TrainConfig, notes: dict[str, Any]
    ) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.timeline = Timeline()
        self.seconds, self.steps = 0.0, 0
        self.traced: list[tuple[float, float]] = []
        # Links by default, not measured: another choice of algorithm would add in another order, and a run that goes on
        # would not be the same run. Where ranks share a host, they share its memory in any case.
        self.group = Communicator(links=Links(), timeline=self.timeline)
        self.parallel = self.wrap(kind, Loss(model))
        super().__init__(model, stream, config, notes)

    @abc.abstractmethod
    def wrap(self, kind: str, loss: Loss) -> nn.Module:
        """The model as it is on ranks."""

    @abc.abstractmethod
    def clip(self) -> Tensor:
        """Shorten the gradient to `config.clip`; its norm before."""

    @abc.abstractmethod
    def whole(self) -> Transformer:
        """The model with all its weights, on the first rank; a collective call."""

    @abc.abstractmethod
    def memory(self) -> Memory:
        """Bytes of model state that this rank holds."""

    @property
    def tokens(self) -> int:
        """How many were trained on, by all ranks, in `seconds`."""
        return self.steps * self.config.batch * self.config.seq

    def step(self) -> float:
        """As of one process, and noted where its time goes."""
        self.timeline.recording = WARM_UP <= self.steps < WARM_UP + TRACED
        start = self.timeline.clock()
        loss = super().step()
        end = self.timeline.clock()
        if self.timeline.recording:
            self.traced.append((start, end))
        self.seconds += end - start
        self.timeline.recording = False
        self.steps += 1
        return loss

    def gradients(self, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
        """Of the mean loss of the whole batch, from this rank's rows and the others'."""
        rows = slice(self.rank * len(inputs) // self.size, (self.rank + 1) * len(inputs) // self.size)
        with self.timeline.span("compute", "forward"):
            loss = self.parallel(inputs[rows].to(self.device), targets[rows].to(self.device))
        with self.timeline.span("compute", "backward"):
            loss.backward()
        with self.timeline.span("optimizer", "clip"):
            norm = self.clip()
        mean = loss.detach().double() / self.size
        all_reduce(mean, self.group, check=False)
        return mean.item(), norm.item()

    def update(self) -> None:
        """As of one process."""
        with self.timeline.span("optimizer", "update"):
            super().update()

    def evaluate(self, stream: training.Stream, *, windows: int | None = None) -> float:
        """All ranks evaluate all windows, since none may be missing when weights are fetched."""
        through = cast(Transformer, _Through(self.parallel))
        return training.evaluate(through, stream, self.config.seq, windows=windows)

    def check_same(self, checkpoint: Checkpoint, *, exact: bool = True) -> None:
        """Also refuse, or warn of, another number of ranks: sums are then of other parts."""
        super().check_same(checkpoint, exact=exact)
        then, now = ({key: notes.get(key) for key in ("parallel", "ranks")} for notes in (checkpoint.notes, self.notes))
        training.check_alike(checkpoint, then, now, exact=exact)

    def close(self) -> None:
        """End what runs in the background."""
        self.parallel.close()
        self.group.close()


class ReplicaTrainer(RanksTrainer):
    """Everything on every rank: `mlsys.parallel.data_parallel`."""

    def wrap(self, kind: str, loss: Loss) -> nn.Module:
        """Gradients are averaged while they are computed."""
        from mlsys.parallel.data_parallel import DataParallel

        return DataParallel(loss, self.group, timeline=self.timeline)

    def clip(self) -> Tensor:
        """As of one process: all ranks have the whole gradient."""
        return nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)

    def save(self, path: str | os.PathLike[str]) -> None:
        """The first rank's is everyone's."""
        if self.rank == 0:
            super().save(path)

    def whole(self) -> Transformer:
        """It is."""
        return self.model

    def memory(self) -> Memory:
        """Weights, gradients and AdamW's means, whole."""
        parameters = list(self.model.parameters())
        return Memory(
            weights=sum(p.nbytes for p in parameters),
            gradients=sum(p.grad.nbytes for p in parameters if p.grad is not None),
            optimizer=sum(t.nbytes for state in self.optimizer.state.values() for t in state.values()),
        )


class ShardTrainer(RanksTrainer):
    """Model state divided over the ranks: `mlsys.parallel.zero` and `zero3`. A checkpoint is a folder."""

    def wrap(self, kind: str, loss: Loss) -> nn.Module:
        """By the stage."""
        from mlsys.parallel import zero, zero3

        stage = {"zero1": zero.ZeRO1, "zero2": zero.ZeRO2, "zero3": zero3.ZeRO3}[kind]
        return stage(loss, self.group, timeline=self.timeline)

    def make_optimizer(self, groups: list[dict[str, Any]], options: dict[str, Any]) -> torch.optim.Optimizer:
        """AdamW over this rank's part of the parameters."""
        return cast(torch.optim.Optimizer, self.parallel.optimizer(torch.optim.AdamW, groups=groups, **options))

    def clip(self) -> Tensor:
        """By the norm of all parts together."""
        return torch.as_tensor(self.parallel.clip_grad_norm(self.config.clip))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Each rank its part, and the first the list of them."""
        from mlsys.parallel import sharded_checkpoint

        sharded_checkpoint.save(path, self.parallel, self.optimizer, notes=self.information())

    def restore(self, checkpoint: Checkpoint, *, exact: bool = True) -> None:
        """Each rank reads what is now its part, whichever parts were saved."""
        from mlsys.parallel import sharded_checkpoint

        self.check_same(checkpoint, exact=exact)
        sharded_checkpoint.load(checkpoint.path, self.parallel, self.optimizer)
        self.done = checkpoint.done

    def whole(self) -> Transformer:
        """Gathered into a model of its own."""
        state = self.parallel.full_state_dict(rank0_only=True)
        model = Transformer(self.model.config)
        if self.rank == 0:
            model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
        return model

    def memory(self) -> Memory:
        """What the stage says that it holds."""
        return cast(Memory, self.parallel.memory())
