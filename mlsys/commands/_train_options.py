"""What `mlsys train` can be asked for, what a run in a folder was asked for, and whether the two agree."""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlsys.commands import UsageError
from mlsys.commands._train_folder import MODEL, RUN, TOKENIZER, naming, say
from mlsys.files import write_atomic

if TYPE_CHECKING:
    from mlsys.models.training import Checkpoint

MOST_RANKS = 128  # as mlsys.parallel.launch


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
    parallel: str | None = None
    ranks: int | None = None

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

    def note_ranks(self, file: Path) -> None:
        """Going on, keep in the file on how many ranks, for the next time: the rest of it stands."""
        there = Order.read(file)
        if there and (there.parallel, there.ranks) != (self.parallel, self.ranks):
            replace(there, parallel=self.parallel, ranks=self.ranks).save(file)

    def save(self, file: Path) -> None:
        """Write it, all at once."""
        with naming(file, "nothing of this run is saved yet"):
            write_atomic(file, json.dumps(asdict(self), indent=2) + "\n")


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


def ranks(text: str) -> int:
    """A whole number from 1 of processes that one may want: more than these are a slip of the finger."""
    value = count(text)
    if value > MOST_RANKS:
        raise argparse.ArgumentTypeError(f"expected at most {MOST_RANKS}, got {text!r}")
    return value


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


def check_divides(settings: Settings, size: int, *, going_on: bool = False) -> None:
    """UsageError if the windows of a batch cannot be divided over the ranks: equal parts have the mean of the whole."""
    if settings.batch % size:
        if going_on:  # with a batch that is settled
            fit = [str(ranks) for ranks in range(1, min(settings.batch, MOST_RANKS) + 1) if settings.batch % ranks == 0]
            raise UsageError(
                f"--ranks {size}: the run has batches of {settings.batch} windows, which cannot be divided evenly; go "
                f"on with --ranks {', '.join(fit[:-1])}{' or ' if fit[1:] else ''}{fit[-1]}"
            )
        near = -(-settings.batch // size) * size
        raise UsageError(
            f"--batch {settings.batch} windows cannot be divided evenly over --ranks {size}: choose a multiple of "
            f"{size}, such as --batch {near}"
        )


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
        check_divides(earlier.settings, args.ranks or 1, going_on=True)
        if not checkpoint:
            say(f"no checkpoint in {args.out} yet: starting what {RUN} asks for")
        return replace(earlier, parallel=args.parallel, ranks=args.ranks)
    if not args.overwrite:
        for name in (MODEL,) if earlier else (MODEL, TOKENIZER):  # a killed run may have got as far as its tokenizer
            if (args.out / name).exists():
                raise UsageError(
                    f"{args.out} holds {name} but no run to go on with: give --overwrite to start anew, or another "
                    "--out"
                )
    settings = chosen_settings(args)
    check_divides(settings, args.ranks or 1)
    order = Order(settings, args.steps, args.minutes, args.threads, args.parallel, args.ranks)
    if args.resume:
        say(f"no checkpoint in {args.out} yet: starting")
    return order
