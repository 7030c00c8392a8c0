"""`mlsys train`: train a small language model on real text, within minutes, and survive being killed."""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import re
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from mlsys.commands import UsageError
from mlsys.files import write_atomic

if TYPE_CHECKING:
    from mlsys.data.text import Tokenizer, Tokens
    from mlsys.models.training import Checkpoint, TrainConfig, Trainer
    from mlsys.models.transformer import Transformer
    from mlsys.perf.configs import Config

EXAMPLES = """examples:
  mlsys train                                      one minute on the standard library's source
  mlsys train --minutes 10 --width 256 --layers 4
  mlsys train --data book.txt --tokenizer bpe --vocab 1000 --out book
  mlsys train --out book --resume                  go on after Ctrl-C, a crash or a kill

DIR then holds run.json (what was asked for), checkpoint.safetensors and tokenizer.json (all that going on needs),
and at the end model.safetensors (for mlsys.models.transformer.load). Going on gives the very weights that a run
without interruption gives. One run at a time works in DIR.
"""

EVALUATIONS = 10  # on the way, of WINDOWS validation windows each
WINDOWS = 64
FINAL_WINDOWS = 256
TRAINING_SHARE = 0.92  # of the minutes; the rest is for evaluations and saving

RUN, CHECKPOINT, TOKENIZER, MODEL = "run.json", "checkpoint.safetensors", "tokenizer.json", "model.safetensors"
LEFT_OVER = re.compile(rf"\.({'|'.join(map(re.escape, (RUN, CHECKPOINT, TOKENIZER, MODEL)))})\.[0-9a-f]{{12}}\.tmp")


@dataclass(frozen=True)
class Settings:
    """What the user may choose that the weights depend on; it travels in the checkpoint."""

    data: tuple[str, ...] = ("stdlib",)
    tokenizer: str = "bytes"
    vocab: int = 4096
    style: str = "llama"
    layers: int = 2
    width: int = 128
    heads: int = 4
    seq: int = 128
    batch: int = 4
    lr: float = 4e-3
    seed: int = 0

    @classmethod
    def of(cls, stored: object, file: Path) -> Settings:
        """What `asdict` made of some; UsageError, naming the file, if it is anything else."""
        if not isinstance(stored, dict) or set(stored) != {f.name for f in fields(cls)}:
            raise UsageError(f"{file} was not written by this version of `mlsys train`: start with --overwrite")
        return cls(**{**stored, "data": tuple(stored["data"])})


@dataclass(frozen=True)
class Order:
    """All that was asked for. It is in run.json from a run's first moment on, when there is no checkpoint yet."""

    settings: Settings
    steps: int | None = None
    minutes: float | None = None
    threads: int | None = None

    @classmethod
    def read(cls, file: Path) -> Order | None:
        """The order in a file; None if there is no file."""
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            return cls(**{**stored, "settings": Settings.of(stored["settings"], file)})
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError):
            raise UsageError(
                f"{file} was not written by this version of `mlsys train`: give --overwrite, or another --out"
            ) from None

    def save(self, file: Path) -> None:
        """Write it, all at once."""
        with naming(file, "nothing of this run is saved yet"):
            write_atomic(file, json.dumps(asdict(self), indent=2) + "\n")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    default = Settings()
    parser.description = "Train a small decoder-only transformer on text, and print its validation loss and a sample."
    parser.epilog = EXAMPLES
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=positive, metavar="M", help="how long (1): a few steps are timed at first")
    budget.add_argument("--steps", type=count, metavar="N", help="how many steps, instead")
    parser.add_argument(
        "--data", nargs="+", metavar="PATH", help="text files or folders; or one of stdlib, docs (stdlib)"
    )
    parser.add_argument("--tokenizer", choices=("bytes", "characters", "bpe"), help=f"({default.tokenizer})")
    parser.add_argument("--vocab", type=count, metavar="N", help=f"tokens of bpe ({default.vocab})")
    parser.add_argument("--style", choices=("gpt", "llama"), help=f"of the model ({default.style})")
    for name, what in (
        ("layers", "blocks"),
        ("width", "of the residual stream"),
        ("heads", "of attention"),
        ("seq", "tokens in a window, and the model's context"),
        ("batch", "windows in a batch"),
    ):
        parser.add_argument(f"--{name}", type=count, metavar="N", help=f"{what} ({getattr(default, name)})")
    parser.add_argument("--lr", type=positive, metavar="X", help=f"highest learning rate ({default.lr})")
    parser.add_argument("--seed", type=seed, metavar="N", help=f"of the weights and the batches ({default.seed})")
    parser.add_argument("--threads", type=threads, metavar="N", help="of torch (its own choice; resuming: as before)")
    parser.add_argument("--out", type=Path, default=Path("mlsys-train"), metavar="DIR", help="results (mlsys-train)")
    parser.add_argument("--resume", action="store_true", help="go on from DIR's checkpoint; without one, start")
    parser.add_argument("--overwrite", action="store_true", help="start anew although DIR holds a run")
    parser.add_argument("--save-every", type=seconds, default=15.0, metavar="S", help="seconds between saves (15)")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what the sample begins with (a new file)")
    parser.add_argument("--sample-tokens", type=natural, default=400, metavar="N", help="length of the sample (400)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def count(text: str) -> int:
    """A whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def natural(text: str) -> int:
    """A whole number from 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return value


def seed(text: str) -> int:
    """A whole number that torch's generators take."""
    value = natural(text)
    if value >= 2**64:
        raise argparse.ArgumentTypeError(f"expected a whole number below 2**64, got {text!r}")
    return value


def threads(text: str) -> int:
    """A whole number from 1 that the machine can stand: the system may kill a process with far too many."""
    value, most = count(text), 4 * (os.cpu_count() or 1)
    if value > most:
        raise argparse.ArgumentTypeError(f"expected at most {most}, four a processor, got {text!r}")
    return value


def positive(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def seconds(text: str) -> float:
    """A number from 0."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds, got {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    """Train, and print the results; exit status 128 + the signal's number if Ctrl-C or SIGTERM ended it early."""
    if args.resume and args.overwrite:
        raise UsageError("--resume goes on with the run in --out and --overwrite discards it: give one of them")
    if args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out {args.out} is a file; name a folder")
    try:
        args.prompt.encode()
    except UnicodeEncodeError:
        raise UsageError(f"--prompt {args.prompt!a} is not UTF-8 text: convert it first") from None
    with claimed(args.out):
        return run_alone(args)


def run_alone(args: argparse.Namespace) -> int:
    """What `run` does, in a folder where no other run is at work."""
    import torch

    from mlsys.models import training, transformer

    file = args.out / CHECKPOINT
    checkpoint = training.read(file) if file.exists() and not args.overwrite else None
    if checkpoint and not args.resume:
        raise UsageError(
            f"{args.out} holds a run at step {checkpoint.done} of {checkpoint.config.steps}: give --resume to go on, "
            "--overwrite to start anew, or another --out"
        )
    order = order_of(args, checkpoint)
    settings, chosen_threads = order.settings, args.threads or order.threads
    if chosen_threads:
        torch.set_num_threads(chosen_threads)
    # While an earlier checkpoint stands, so does its run: a new one takes the folder over in `start`.
    with nullcontext() if file.exists() else noted(order, args.out / RUN):
        saved_tokenizer = args.out / TOKENIZER if checkpoint else None
        tokenizer, train_tokens, validation_tokens, bytes_per_token = text_of(settings, saved_tokenizer)
        model = model_of(settings, tokenizer.vocab)
        if checkpoint:
            trainer = training.Trainer(model, train_tokens, checkpoint.config, checkpoint.notes)
            resume(trainer, checkpoint)
        else:
            steps = order.steps or planned_steps(model, train_tokens, settings, 60 * (order.minutes or 1.0))
            notes = {"settings": asdict(settings)}
            trainer = training.Trainer(model, train_tokens, train_config(settings, steps), notes)
    if not checkpoint:
        start(args.out, order, tokenizer, trainer)
    say(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train_tokens):,} training tokens, "
        f"{trainer.config.steps - trainer.done:,} steps of {settings.batch} × {settings.seq} tokens, "
        f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    )

    stopped = train(trainer, validation_tokens, file, args.save_every)
    if stopped:
        say(
            f"stopped by {signal.Signals(stopped).name} at step {trainer.done} of {trainer.config.steps}, which is "
            f"saved; to go on: mlsys train --out {args.out} --resume"
        )
        return 128 + stopped

    with naming(args.out / MODEL, f"all {trainer.done} steps are in {file}"):
        transformer.save(model, args.out / MODEL)
    loss = training.evaluate(model, validation_tokens, settings.seq, windows=FINAL_WINDOWS)
    report(args, trainer, loss, loss / bytes_per_token, sample(model, tokenizer, args, settings.seed))
    return 0


# --- the folder -------------------------------------------------------------------------------------------------------


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """The folder for this process alone; made if need be, and cleared of what a killed save left in it.

    A folder that is made and stays empty is removed again. The lock belongs to the process, so a kill ends it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder / ".lock"):
            for path in folder.iterdir():
                if LEFT_OVER.fullmatch(path.name):
                    path.unlink(missing_ok=True)
            yield
    finally:
        with suppress(OSError):  # not empty: the usual case
            for path in made:
                path.rmdir()


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock; UsageError if another process does. Without fcntl (Windows), or where locks are not to be had: none.

    The file is removed at the end. Whoever opened it before that and locks it after has locked a file without a name,
    sees so, and tries again.
    """
    try:
        import fcntl
    except ModuleNotFoundError:
        yield
        return
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(descriptor, 20).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise UsageError(
                f"another `mlsys train` (pid {pid}) is at work in {file.parent}: wait for it, or give another --out"
            ) from None
        except OSError:  # some network file systems have no locks
            pass
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                break
        os.close(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def noted(order: Order, file: Path) -> Iterator[None]:
    """What was asked for is in the file; if it proves impossible, the file is as it was. A kill leaves it there."""
    before = file.read_bytes() if file.exists() else None
    order.save(file)
    try:
        yield
    except Exception:
        file.unlink() if before is None else write_atomic(file, before)
        raise


def start(folder: Path, order: Order, tokenizer: Tokenizer, trainer: Trainer) -> None:
    """Make the folder that of a new run. From here on, whatever happens, there is something to go on from.

    A kill before the old checkpoint is gone leaves the old run; one after it leaves run.json, to begin the new one.
    """
    from mlsys.data import text

    order.save(folder / RUN)
    for name in (MODEL, CHECKPOINT):
        (folder / name).unlink(missing_ok=True)
    with naming(folder / TOKENIZER, "nothing of this run is saved yet"):
        text.save(tokenizer, folder / TOKENIZER)
    with naming(folder / CHECKPOINT, "nothing of this run is saved yet"):
        trainer.save(folder / CHECKPOINT)


@contextmanager
def naming(file: Path, safe: str) -> Iterator[None]:
    """An OSError inside, such as a full disk, names the file and says what is saved in spite of it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; {safe}", str(file)) from error


def say(line: str) -> None:
    """A line to the user that is not a result."""
    print(line, file=sys.stderr, flush=True)


# --- what to train ----------------------------------------------------------------------------------------------------


def order_of(args: argparse.Namespace, checkpoint: Checkpoint | None) -> Order:
    """What to do: go on from the checkpoint, begin what run.json holds, or begin anew.

    UsageError if the user now asks for something else, or if the folder holds what a beginning would destroy.
    """
    earlier = None if args.overwrite else Order.read(args.out / RUN)
    if checkpoint:
        settings = Settings.of(checkpoint.notes.get("settings"), checkpoint.path)
        earlier = Order(settings, checkpoint.config.steps, threads=checkpoint.environment["threads"])
    if args.resume and earlier:
        check_same(args, earlier)
        if not checkpoint:
            say(f"no checkpoint in {args.out} yet: starting what {RUN} asks for")
        return earlier
    if not args.overwrite:
        for name in (MODEL,) if earlier else (MODEL, TOKENIZER):  # a killed run may have got as far as its tokenizer
            if (args.out / name).exists():
                raise UsageError(
                    f"{args.out} holds {name} but no run to go on with: give --overwrite to start anew, or another "
                    "--out"
                )
    order = Order(chosen_settings(args), args.steps, args.minutes, args.threads)
    if args.resume:
        say(f"no checkpoint in {args.out} yet: starting")
    return order


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the user typed. Paths are made absolute, for going on elsewhere."""
    from mlsys.data.text import SOURCES

    given: dict[str, Any] = {f.name: v for f in fields(Settings) if (v := getattr(args, f.name)) is not None}
    if "data" in given:
        named = len(given["data"]) == 1 and given["data"][0] in SOURCES
        given["data"] = tuple(given["data"]) if named else tuple(map(absolute, given["data"]))
    return given


def absolute(path: str) -> str:
    """The path without links, except to what is neither file nor folder: a pipe has no other name."""
    found = Path(path)
    return str(found.resolve() if found.is_file() or found.is_dir() else found.absolute())


def chosen_settings(args: argparse.Namespace) -> Settings:
    """The settings of a new run: what was given, else the defaults."""
    settings = Settings(**given_settings(args))
    check_vocab(args, settings)
    if settings.width % settings.heads:
        raise UsageError(f"--width {settings.width} is not a multiple of --heads {settings.heads}")
    if settings.style == "llama" and settings.width // settings.heads % 2:
        raise UsageError(
            f"--width {settings.width} over --heads {settings.heads} gives heads of odd width: rotary positions turn "
            "pairs; choose an even one, or --style gpt"
        )
    return settings


def check_vocab(args: argparse.Namespace, settings: Settings) -> None:
    """UsageError if a size is asked of a tokenizer that has its own."""
    if args.vocab is not None and settings.tokenizer != "bpe":
        raise UsageError(
            f"--vocab {args.vocab}: the vocabulary of --tokenizer {settings.tokenizer} has a size of its own; "
            "leave the option out, or give --tokenizer bpe"
        )


def check_same(args: argparse.Namespace, order: Order) -> None:
    """UsageError if the user now asks for something else than the run to go on with has."""
    for name, value in given_settings(args).items():
        if value != getattr(order.settings, name):
            raise UsageError(
                f"--{name}: the run in {args.out} has {shown(getattr(order.settings, name))}; leave the option "
                "out to go on, or start anew with --overwrite"
            )
    check_vocab(args, order.settings)
    for name in ("steps", "minutes"):
        if getattr(args, name) not in (None, getattr(order, name)):
            plan = f"{order.steps} steps" if order.steps else f"{order.minutes or 1.0:g} minutes"
            raise UsageError(
                f"--{name}: the run in {args.out} was planned for {plan}, and its learning rate follows that plan; "
                "leave the option out to go on"
            )


def shown(value: object) -> str:
    """A setting as it is typed."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def text_of(settings: Settings, saved_tokenizer: Path | None) -> tuple[Tokenizer, Tokens, Tokens, float]:
    """Tokenizer, training tokens, validation tokens, and bytes a validation token."""
    from mlsys.data import text

    source = settings.data[0] if settings.data[0] in text.SOURCES else settings.data
    train_files, validation_files = text.split(text.corpus(source))
    if saved_tokenizer:
        tokenizer = text.load(saved_tokenizer)
    else:
        tokenizer = text.fit(settings.tokenizer, train_files, vocab=settings.vocab)
    train_tokens, validation_tokens = (text.tokens(files, tokenizer) for files in (train_files, validation_files))
    for name, stream in (("training", train_tokens), ("validation", validation_tokens)):
        if len(stream) <= settings.seq:
            raise UsageError(
                f"the {name} text has {len(stream)} tokens, fewer than --seq {settings.seq} needs: "
                "give more text or a smaller --seq"
            )
    return tokenizer, train_tokens, validation_tokens, text.size(validation_files) / len(validation_tokens)


def model_of(settings: Settings, vocab: int) -> Transformer:
    """The model at its first weights, which follow from the seed."""
    import torch

    from mlsys.models import transformer

    model = transformer.Transformer(config_of(settings, vocab))
    return transformer.init(model, torch.Generator().manual_seed(settings.seed))


def config_of(settings: Settings, vocab: int) -> Config:
    """The shape; a SwiGLU's three matrices are 8/3 as wide as the stream, so as many weights as GPT's two."""
    from mlsys.perf.configs import gpt, llama

    layers, width, heads = settings.layers, settings.width, settings.heads
    if settings.style == "gpt":
        return gpt(layers, width, heads, vocab=vocab, context=settings.seq)
    return llama(layers, width, heads, -(-8 * width // 3 // 8) * 8, vocab=vocab, context=settings.seq, tied=True)


def train_config(settings: Settings, steps: int) -> TrainConfig:
    """The settings of the training loop."""
    from mlsys.models.training import TrainConfig

    return TrainConfig(steps, batch=settings.batch, seq=settings.seq, lr=settings.lr, seed=settings.seed)


def planned_steps(model: Transformer, stream: Tokens, settings: Settings, budget_s: float) -> int:
    """How many steps fit into so many seconds, from a few on a copy of the model.

    Decided once and kept in the checkpoint: the learning rate depends on the plan, so a plan made anew after a kill,
    on a busier machine, would lead to other weights.
    """
    from mlsys.models.training import Trainer

    trial = Trainer(copy.deepcopy(model), stream, train_config(settings, 10_000))
    end = time.perf_counter() + min(3.0, 0.1 * budget_s)
    durations: list[float] = []
    while len(durations) < 6 or (time.perf_counter() < end and not trial.finished):
        start = time.perf_counter()
        trial.step()
        durations.append(time.perf_counter() - start)
    usual = sorted(durations[2:])[len(durations[2:]) // 2]  # the first ones warm up
    return max(1, int(TRAINING_SHARE * budget_s / usual))


def resume(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Put the trainer where the checkpoint was; a machine that rounds otherwise is told, not refused."""
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.restore(checkpoint, exact=False)
    for warning in caught:
        say(f"note: {warning.message}")
    say(f"going on from step {trainer.done} of {trainer.config.steps}")


# --- training ---------------------------------------------------------------------------------------------------------


def train(trainer: Trainer, validation_tokens: Tokens, file: Path, save_every_s: float) -> int:
    """Step until the plan is done; returns 0, or the signal that ended it early. The last step is saved either way."""
    from mlsys.models import training

    config = trainer.config
    every = max(config.steps // EVALUATIONS, 1)
    saved, saved_step = time.monotonic(), trainer.done
    losses: list[float] = []
    with signals() as received, progress(trainer.done, config.steps) as show:
        while not trainer.finished and not received:
            losses.append(trainer.step())
            validation = None
            if trainer.done % every == 0 and not trainer.finished:
                validation = training.evaluate(trainer.model, validation_tokens, config.seq, windows=WINDOWS)
            show.step(trainer.done, losses[-20:], validation)
            if time.monotonic() - saved >= save_every_s:
                with naming(file, still_there(saved_step, file)):
                    trainer.save(file)
                saved, saved_step = time.monotonic(), trainer.done
                show.saved(trainer.done)
        with naming(file, still_there(saved_step, file)):
            trainer.save(file)
    return received[0] if received and not trainer.finished else 0


def still_there(step: int, file: Path) -> str:
    """What the user has when a save fails."""
    return f"the checkpoint of step {step} is intact; to go on from it: mlsys train --out {file.parent} --resume"


@contextmanager
def signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted instead of acted on, so that a step and its save are not torn; a second one acts."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield received
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
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
def progress(done: int, steps: int) -> Iterator[Shown]:
    """A bar if stderr is a terminal and rich is there; else lines."""
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


# --- results ----------------------------------------------------------------------------------------------------------


def sample(model: Transformer, tokenizer: Tokenizer, args: argparse.Namespace, seed: int) -> str:
    """The prompt and what the model makes of it; beyond its context, it sees the latest half of one."""
    import torch

    from mlsys.data.text import END
    from mlsys.models.transformer import generate

    context, left = model.config.context, args.sample_tokens
    tokens = torch.from_numpy(tokenizer.encode(END + args.prompt).astype("int64"))[None]
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    while left > 0:
        seen = tokens if tokens.shape[1] < context else tokens[:, -max(context // 2, 1) :]
        n = min(left, context - seen.shape[1])
        if n < 1:  # a context of one token
            break
        more = generate(model, seen, n, temperature=0.8, generator=generator)[:, seen.shape[1] :]
        tokens, left = torch.cat((tokens, more), dim=1), left - n
    text = tokenizer.decode(tokens[0].tolist()).removeprefix(END)
    # A byte model may write an escape sequence; a terminal would obey it.
    return "".join(c if c.isprintable() or c in "\n\t" else "·" for c in text)


def report(args: argparse.Namespace, trainer: Trainer, per_token: float, per_byte: float, sample: str) -> None:
    """Print the results."""
    results = {
        "steps": trainer.done,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "validation_nats_per_token": per_token,
        "validation_nats_per_byte": per_byte,
        "validation_bits_per_byte": per_byte / math.log(2),
        "validation_perplexity": math.exp(per_token),
        "model": str(args.out / MODEL),
        "checkpoint": str(args.out / CHECKPOINT),
        "sample": sample,
    }
    if args.json:
        readable = json.dumps(results, indent=2, ensure_ascii=False)
        print(readable if readable == shown_by_stdout(readable) else json.dumps(results, indent=2))
        return
    print(
        f"validation loss {per_byte:.3f} nats a byte ({per_byte / math.log(2):.3f} bits), "
        f"perplexity {math.exp(per_token):.2f} a token"
    )
    print(shown_by_stdout(f"model           {results['model']}"))
    if sample:
        print(shown_by_stdout(f"sample\n{textwrap.indent(sample, '  ', lambda line: True)}"))


def shown_by_stdout(text: str) -> str:
    """The text, with a question mark for what stdout's encoding does not have: after minutes of training, no error."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
