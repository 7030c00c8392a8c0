"""`mlsys train`: train a small language model on real text, within minutes, and survive being killed."""

from __future__ import annotations

import argparse
import copy
import json
import math
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from mlsys.commands import UsageError

if TYPE_CHECKING:
    from mlsys.data.text import Tokenizer, Tokens
    from mlsys.models.training import TrainConfig, Trainer
    from mlsys.models.transformer import Transformer
    from mlsys.perf.configs import Config

EXAMPLES = """examples:
  mlsys train                                      one minute on the standard library's source
  mlsys train --minutes 10 --width 256 --layers 4
  mlsys train --data book.txt --tokenizer bpe --vocab 1000 --out book
  mlsys train --out book --resume                  go on after Ctrl-C, a crash or a kill

DIR then holds checkpoint.safetensors (all that going on needs), tokenizer.json, and at the end model.safetensors
(for mlsys.models.transformer.load). Going on gives the very weights that a run without interruption gives.
"""

EVALUATIONS = 10  # on the way, of WINDOWS validation windows each
WINDOWS = 64
FINAL_WINDOWS = 256
TRAINING_SHARE = 0.92  # of the minutes; the rest is for evaluations and saving


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
    parser.add_argument("--seed", type=natural, metavar="N", help=f"of the weights and the batches ({default.seed})")
    parser.add_argument("--threads", type=count, metavar="N", help="of torch (its own choice; resuming: as before)")
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

    import torch

    from mlsys.models import training

    file = args.out / "checkpoint.safetensors"
    checkpoint = training.read(file) if file.exists() and not args.overwrite else None
    if checkpoint and not args.resume:
        raise UsageError(
            f"{args.out} holds a run at step {checkpoint.done} of {checkpoint.config.steps}: give --resume to go on, "
            "--overwrite to start anew, or another --out"
        )
    if args.resume and not checkpoint:
        say(f"no checkpoint in {args.out} yet: starting")

    settings = stored_settings(checkpoint, args) if checkpoint else chosen_settings(args)
    threads = args.threads or (checkpoint.environment["threads"] if checkpoint else None)
    if threads:
        torch.set_num_threads(threads)
    saved_tokenizer = args.out / "tokenizer.json" if checkpoint else None
    tokenizer, train_tokens, validation_tokens, bytes_per_token = text_of(settings, saved_tokenizer)
    prepare(args.out, tokenizer, fresh=checkpoint is None)
    model = model_of(settings, tokenizer.vocab)
    if checkpoint:
        trainer = training.Trainer(model, train_tokens, checkpoint.config, checkpoint.notes)
        resume(trainer, checkpoint)
    else:
        steps = args.steps or planned_steps(model, train_tokens, settings, 60 * (args.minutes or 1.0))
        trainer = training.Trainer(
            model, train_tokens, train_config(settings, steps), notes={"settings": asdict(settings)}
        )
        trainer.save(file)  # from here on, whatever happens, there is something to go on from
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

    from mlsys.models import transformer

    transformer.save(model, args.out / "model.safetensors")
    loss = training.evaluate(model, validation_tokens, settings.seq, windows=FINAL_WINDOWS)
    report(args, trainer, loss, loss / bytes_per_token, sample(model, tokenizer, args, settings.seed))
    return 0


def prepare(folder: Path, tokenizer: Tokenizer, *, fresh: bool) -> None:
    """Make the folder and remove what a killed save left; for a fresh run, also an earlier one's results."""
    from mlsys.data import text

    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(".*.tmp"):  # as mlsys.files.write_atomic names them
        left_over.unlink(missing_ok=True)
    if fresh:
        for name in ("checkpoint.safetensors", "model.safetensors"):
            (folder / name).unlink(missing_ok=True)
        text.save(tokenizer, folder / "tokenizer.json")


def say(line: str) -> None:
    """A line to the user that is not a result."""
    print(line, file=sys.stderr, flush=True)


# --- what to train ----------------------------------------------------------------------------------------------------


def chosen_settings(args: argparse.Namespace) -> Settings:
    """The settings of a new run: what was given, else the defaults. Paths are made absolute, for going on elsewhere."""
    from mlsys.data.text import SOURCES

    given: dict[str, Any] = {f.name: v for f in fields(Settings) if (v := getattr(args, f.name)) is not None}
    if "data" in given and not (len(given["data"]) == 1 and given["data"][0] in SOURCES):
        given["data"] = tuple(str(Path(path).resolve()) for path in given["data"])
    settings = Settings(**{**given, "data": tuple(given.get("data", Settings.data))})
    if settings.width % settings.heads:
        raise UsageError(f"--width {settings.width} is not a multiple of --heads {settings.heads}")
    if settings.style == "llama" and settings.width // settings.heads % 2:
        raise UsageError(
            f"--width {settings.width} over --heads {settings.heads} gives heads of odd width: rotary positions turn "
            "pairs; choose an even one, or --style gpt"
        )
    return settings


def stored_settings(checkpoint: Any, args: argparse.Namespace) -> Settings:
    """The settings of the run to go on with; UsageError if the user now asks for others."""
    stored = checkpoint.notes.get("settings")
    if not isinstance(stored, dict) or set(stored) != {f.name for f in fields(Settings)}:
        raise UsageError(f"{checkpoint.path} was not written by this version of `mlsys train`: start with --overwrite")
    settings = Settings(**{**stored, "data": tuple(stored["data"])})
    asked = chosen_settings(args)
    for field in fields(Settings):
        if getattr(args, field.name) is not None and getattr(asked, field.name) != getattr(settings, field.name):
            raise UsageError(
                f"--{field.name}: the run in {args.out} has {shown(getattr(settings, field.name))}; leave the option "
                "out to go on, or start anew with --overwrite"
            )
    if args.minutes is not None or (args.steps or checkpoint.config.steps) != checkpoint.config.steps:
        raise UsageError(
            f"{'--minutes' if args.minutes is not None else '--steps'}: the run in {args.out} was planned for "
            f"{checkpoint.config.steps} steps, and its learning rate follows that plan; leave the option out to go on"
        )
    return settings


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


def resume(trainer: Trainer, checkpoint: Any) -> None:
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
    saved = time.monotonic()
    losses: list[float] = []
    with signals() as received, progress(trainer.done, config.steps) as show:
        while not trainer.finished and not received:
            losses.append(trainer.step())
            validation = None
            if trainer.done % every == 0 and not trainer.finished:
                validation = training.evaluate(trainer.model, validation_tokens, config.seq, windows=WINDOWS)
            show.step(trainer.done, losses[-20:], validation)
            if time.monotonic() - saved >= save_every_s:
                trainer.save(file)
                saved = time.monotonic()
                show.saved(trainer.done)
        trainer.save(file)
    return received[0] if received and not trainer.finished else 0


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
        "model": str(args.out / "model.safetensors"),
        "checkpoint": str(args.out / "checkpoint.safetensors"),
        "sample": sample,
    }
    if args.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
        return
    print(
        f"validation loss {per_byte:.3f} nats a byte ({per_byte / math.log(2):.3f} bits), "
        f"perplexity {math.exp(per_token):.2f} a token"
    )
    print(f"model           {results['model']}")
    if sample:
        print(f"sample\n{textwrap.indent(sample, '  ', lambda line: True)}")
