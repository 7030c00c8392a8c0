"""The loop of `mlsys train`: steps, evaluations, saves, what the user sees of them, and how it is stopped."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from mlsys.commands._train_folder import CHECKPOINT, naming, say

if TYPE_CHECKING:
    from mlsys.data.text import Tokens
    from mlsys.models.training import TrainConfig, Trainer
    from mlsys.models.transformer import Transformer

EVALUATIONS = 10  # on the way, of WINDOWS validation windows each
WINDOWS = 64

T = TypeVar("T")


class Crew(Protocol):
    """The processes that train together: what they have to do alike, and what only one of them does."""

    first: bool  # whether this is the one that speaks, and that keeps the folder
    file: str  # the checkpoint in it

    def once(self, function: Callable[[], T]) -> T:
        """The first one calls it; what it returns or raises, all return or raise."""

    def most(self, *values: float) -> list[float]:
        """Of each value, the largest that any of them gives."""

    def told(self) -> int:
        """The signal that whoever started them has passed on, or 0."""

    def trainer(self, model: Transformer, stream: Tokens, config: TrainConfig, notes: dict[str, Any]) -> Trainer:
        """What runs the steps."""

    def dismiss(self, trainer: Trainer) -> None:
        """This one runs no more."""

    def finish(self, trainer: Trainer) -> tuple[Transformer, dict[str, Any]]:
        """The model with all its weights, and what is to be added to the results; both on the first one only."""


class Alone:
    """A crew of one."""

    first = True
    file = CHECKPOINT

    def once(self, function: Callable[[], T]) -> T:
        """Its result."""
        return function()

    def most(self, *values: float) -> list[float]:
        """These."""
        return list(values)

    def told(self) -> int:
        """0: nobody started it but the user."""
        return 0

    def trainer(self, model: Transformer, stream: Tokens, config: TrainConfig, notes: dict[str, Any]) -> Trainer:
        """A plain one."""
        from mlsys.models.training import Trainer

        return Trainer(model, stream, config, notes)

    def dismiss(self, trainer: Trainer) -> None:
        """There is nothing to do."""

    def finish(self, trainer: Trainer) -> tuple[Transformer, dict[str, Any]]:
        """The model, and nothing."""
        return trainer.model, {}


def train(trainer: Trainer, crew: Crew, validation_tokens: Tokens, file: Path, save_every_s: float) -> int:
    """Step until the plan is done; returns 0, or the signal that ended it early. The last step is saved either way."""
    config = trainer.config
    every = max(config.steps // EVALUATIONS, 1)
    saved, saved_step, stop = time.monotonic(), trainer.done, 0
    losses: list[float] = []
    received: list[int] = []
    with first_signal(received.append), progress(trainer.done, config.steps, crew.first) as show:
        while not trainer.finished and not stop:
            losses.append(trainer.step())
            validation = None
            if trainer.done % every == 0 and not trainer.finished:
                validation = trainer.evaluate(validation_tokens, windows=WINDOWS)
            show.step(trainer.done, losses[-20:], validation)
            asked = received[0] if received else crew.told()
            stop, due = map(int, crew.most(asked, time.monotonic() - saved >= save_every_s))
            if due:
                with naming(file, still_there(saved_step, file)):
                    trainer.save(file)
                saved, saved_step = time.monotonic(), trainer.done
                show.saved(trainer.done)
        with naming(file, still_there(saved_step, file)):
            trainer.save(file)
    return stop if not trainer.finished else 0


def still_there(step: int, file: Path) -> str:
    """What the user has when a save fails."""
    return f"the checkpoint of step {step} is intact; to go on from it: mlsys train --out {file.parent} --resume"


@contextmanager
def first_signal(tell: Callable[[int], object]) -> Iterator[None]:
    """The first SIGINT or SIGTERM is told instead of acted on, so that a step and its save are not torn.

    A second one raises KeyboardInterrupt at once. Only the main thread may set handlers: in another, nothing changes.
    """
    told = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal told
        if told:
            raise KeyboardInterrupt
        told = True
        tell(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Shown(Protocol):
    """How the user sees the training go on."""

    def step(self, done: int, losses: list[float], validation: float | None) -> None:
        """After each step: the last losses, and a validation loss if there is a new one."""

    def saved(self, done: int) -> None:
        """After each save."""


@contextmanager
def progress(done: int, steps: int, first: bool = True) -> Iterator[Shown]:
    """A bar if stderr is a terminal and rich is there; else lines. Only the first of several processes shows any."""
    if not first:
        yield Silent()
        return
    if sys.stderr.isatty():
        try:
            import rich.console
            import rich.progress
        except ModuleNotFoundError:
            pass
        else:
            bar = rich.progress.Progress(
                rich.progress.TextColumn("step {task.completed:,.0f} of {task.total:,.0f}"),
                rich.progress.BarColumn(),
                rich.progress.TimeRemainingColumn(),
                rich.progress.TextColumn("{task.description}"),
                console=rich.console.Console(stderr=True),
            )
            with bar:
                yield Bar(bar, done, steps)
            return
    yield Lines(done, steps)


class Silent:
    """Nothing."""

    def step(self, done: int, losses: list[float], validation: float | None) -> None:
        """Nothing."""

    def saved(self, done: int) -> None:
        """Nothing."""


class Bar:
    """One line that is drawn again and again."""

    def __init__(self, bar: Any, done: int, steps: int) -> None:
        self.bar, self.task = bar, bar.add_task("", total=steps, completed=done)
        self.validation = ""

    def step(self, done: int, losses: list[float], validation: float | None) -> None:
        """Move on."""
        if validation is not None:
            self.validation = f", validation {validation:.3f}"
        shown = f"loss {sum(losses) / len(losses):.3f}{self.validation} nats a token"
        self.bar.update(self.task, completed=done, description=shown)

    def saved(self, done: int) -> None:
        """Nothing: the bar has no room for it."""


class Lines:
    """Some twenty lines in all, and one for each save."""

    def __init__(self, done: int, steps: int) -> None:
        self.first, self.steps, self.start = done, steps, time.monotonic()

    def step(self, done: int, losses: list[float], validation: float | None) -> None:
        """A line now and then."""
        if validation is None and done % max(self.steps // 20, 1) and done != self.steps:
            return
        per_step = (time.monotonic() - self.start) / (done - self.first)
        left = f", {round((self.steps - done) * per_step)} s left" if done < self.steps else ""
        found = f", validation {validation:.3f}" if validation is not None else ""
        say(f"step {done} of {self.steps}: loss {sum(losses) / len(losses):.3f}{found} nats a token{left}")

    def saved(self, done: int) -> None:
        """A line."""
        say(f"saved at step {done}")
