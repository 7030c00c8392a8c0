"""`mlsys train`: train a small language model on real text, within minutes, and survive being killed."""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import signal
import sys
import textwrap
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlsys.commands import UsageError
from mlsys.commands._train_folder import (
    CHECKPOINT,
    MANIFEST,
    MODEL,
    RUN,
    TOKENIZER,
    claimed,
    naming,
    noted,
    say,
    start,
)
from mlsys.commands._train_loop import Alone, Crew, train
from mlsys.commands._train_options import (
    Order,
    Settings,
    count,
    natural,
    order_of,
    positive,
    ranks,
    seconds,
    seed,
    threads,
)

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
  mlsys train --parallel ddp --ranks 4 --batch 8   the same training on four processes, and where their time goes
  torchrun --nproc-per-node 4 -m mlsys train --parallel zero3 --ranks 4

DIR then holds run.json (what was asked for), checkpoint.safetensors and tokenizer.json (all that going on needs),
and at the end model.safetensors (for mlsys.models.transformer.load). Going on gives the very weights that a run
without interruption gives. One run at a time works in DIR.

With --parallel, the windows of each batch are divided over the ranks, so that the losses are those of one process.
ddp keeps a copy of everything on each rank; zero1 divides the optimizer's state, zero2 the gradients as well, zero3
also the weights, and their checkpoint is a folder, checkpoint/. A run goes on with any number of ranks; with the same
number it gives the very same weights.
"""

KINDS = ("ddp", "zero1", "zero2", "zero3")
FINAL_WINDOWS = 256
TRAINING_SHARE = 0.92  # of the minutes; the rest is for evaluations and saving


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
    parser.add_argument("--parallel", choices=KINDS, help="train on several processes (resuming: as before)")
    parser.add_argument("--ranks", type=ranks, metavar="N", help="how many (2, or as many as torchrun started)")
    parser.add_argument("--timeline", type=Path, metavar="FILE", help="of all ranks, for ui.perfetto.dev")
    parser.add_argument("--out", type=Path, default=Path("mlsys-train"), metavar="DIR", help="results (mlsys-train)")
    parser.add_argument("--resume", action="store_true", help="go on from DIR's checkpoint; without one, start")
    parser.add_argument("--overwrite", action="store_true", help="start anew although DIR holds a run")
    parser.add_argument("--save-every", type=seconds, default=15.0, metavar="S", help="seconds between saves (15)")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what the sample begins with (a new file)")
    parser.add_argument("--sample-tokens", type=natural, default=400, metavar="N", help="length of the sample (400)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


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
    args.parallel, args.ranks = spread(args)
    if args.parallel:
        from mlsys.commands import _train_ranks

        status, results = _train_ranks.launched(work, args)
    else:
        status, results = work(args, Alone())
    if results:
        report(args, results)
    return status


def spread(args: argparse.Namespace) -> tuple[str | None, int | None]:
    """How the work is divided, and over how many ranks: as asked for, else as before; (None, None) for not at all."""
    earlier = Order.read(args.out / RUN) if args.resume else None
    kind = args.parallel or (earlier.parallel if earlier else None)
    started = int(os.environ.get("WORLD_SIZE", 0))  # by torchrun
    if kind is None:
        for option in ("ranks", "timeline"):
            if getattr(args, option) is not None:
                raise UsageError(f"--{option} {getattr(args, option)} is for several processes: add --parallel ddp")
        if started > 1:
            raise UsageError(f"torchrun started {started} processes, which would all do the same: add --parallel ddp")
        return None, None
    if args.timeline and (args.timeline.is_dir() or not args.timeline.absolute().parent.is_dir()):
        raise UsageError(f"--timeline {args.timeline}: name a file in a folder that there is")
    return kind, args.ranks or started or (earlier.ranks if earlier else None) or 2


def work(args: argparse.Namespace, crew: Crew) -> tuple[int, dict[str, Any] | None]:
    """What `run` does on each process: the exit status, and on the first one the results of a run that is done."""
    import torch

    from mlsys.models import training, transformer

    with ExitStack() as folder:
        crew.once(lambda: folder.enter_context(claimed(args.out)))
        checkpoint = crew.once(lambda: standing(args, crew))
        order = crew.once(lambda: order_of(args, checkpoint))
        settings, chosen_threads = order.settings, args.threads or order.threads
        if chosen_threads:
            torch.set_num_threads(chosen_threads)
        with ExitStack() as note:
            # While an earlier checkpoint stands, so does its run: a new one takes the folder over in `start`.
            if not crew.once(lambda: saved_in(args.out)):
                crew.once(lambda: note.enter_context(noted(order, args.out / RUN)))
            saved_tokenizer = args.out / TOKENIZER if checkpoint else None
            tokenizer, train_tokens, validation_tokens, bytes_per_token = crew.once(
                lambda: text_of(settings, saved_tokenizer)
            )
            model = model_of(settings, tokenizer.vocab)
            notes: dict[str, Any] = {"settings": asdict(settings)}
            if args.parallel:
                notes |= {"parallel": args.parallel, "ranks": args.ranks}
            if checkpoint:
                trainer = crew.trainer(model, train_tokens, checkpoint.config, notes)
                resume(trainer, checkpoint, crew)
            else:
                steps = order.steps or planned_steps(model, train_tokens, settings, 60 * (order.minutes or 1.0), crew)
                trainer = crew.trainer(model, train_tokens, train_config(settings, steps), notes)
        file = args.out / crew.file
        if not checkpoint:
            crew.once(lambda: start(args.out, order, tokenizer))
            with naming(file, "nothing of this run is saved yet"):
                trainer.save(file)
        else:
            crew.once(lambda: order.note_ranks(args.out / RUN))
        if crew.first:
            say(
                f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train_tokens):,} training tokens, "
                f"{trainer.config.steps - trainer.done:,} steps of {settings.batch} × {settings.seq} tokens, "
                + (f"{args.ranks} rank{'s' * (args.ranks > 1)} ({args.parallel}) of " if args.parallel else "")
                + f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
            )

        stopped = train(trainer, crew, validation_tokens, file, args.save_every)
        if stopped:
            if crew.first:
                say(
                    f"stopped by {signal.Signals(stopped).name} at step {trainer.done} of {trainer.config.steps}, "
                    f"which is saved; to go on: mlsys train --out {args.out} --resume"
                )
            return 128 + stopped, None

        model, measured = crew.finish(trainer)
        if not crew.first:
            return 0, None
        with naming(args.out / MODEL, f"all {trainer.done} steps are in {file}"):
            transformer.save(model, args.out / MODEL)
        loss = training.evaluate(model, validation_tokens, settings.seq, windows=FINAL_WINDOWS)
        text = sample(model, tokenizer, args, settings.seed)
        return 0, results_of(args, trainer, file, loss, loss / bytes_per_token, text) | measured


# --- what to train ----------------------------------------------------------------------------------------------------


def saved_in(folder: Path) -> bool:
    """Whether a checkpoint is there, of whichever kind."""
    return (folder / CHECKPOINT).exists() or (folder / MANIFEST).exists()


def standing(args: argparse.Namespace, crew: Crew) -> Checkpoint | None:
    """The checkpoint to go on from, if there is one; UsageError if it is not to be gone on from, or not so."""
    if args.overwrite or not saved_in(args.out):
        return None
    whole = (args.out / CHECKPOINT).exists()
    if whole:
        from mlsys.models import training

        checkpoint = training.read(args.out / CHECKPOINT)
    else:
        from mlsys.commands import _train_ranks

        checkpoint = _train_ranks.read(args.out)
    if not args.resume:
        raise UsageError(
            f"{args.out} holds a run at step {checkpoint.done} of {checkpoint.config.steps}: give --resume to go on, "
            "--overwrite to start anew, or another --out"
        )
    if whole != (crew.file == CHECKPOINT):
        form, kinds = ("in one piece", "ddp") if whole else ("in shards", "zero1, zero2 or zero3")
        raise UsageError(f"the checkpoint in {args.out} is {form}: to go on from it, give --parallel {kinds}")
    return checkpoint


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


def planned_steps(model: Transformer, stream: Tokens, settings: Settings, budget_s: float, crew: Crew) -> int:
    """How many steps fit into so many seconds, from a few on a copy of the model.

    Decided once and kept in the checkpoint: the learning rate depends on the plan, so a plan made anew after a kill,
    on a busier machine, would lead to other weights.
    """
    trial = crew.trainer(copy.deepcopy(model), stream, train_config(settings, 10_000), {})
    end = time.perf_counter() + min(3.0, 0.1 * budget_s)
    durations: list[float] = []
    while len(durations) < 6 or (crew.most(time.perf_counter() < end)[0] and not trial.finished):
        begun = time.perf_counter()
        trial.step()
        durations.append(time.perf_counter() - begun)
    crew.dismiss(trial)
    usual = sorted(durations[2:])[len(durations[2:]) // 2]  # the first ones warm up
    return max(1, int(TRAINING_SHARE * budget_s / crew.most(usual)[0]))


def resume(trainer: Trainer, checkpoint: Checkpoint, crew: Crew) -> None:
    """Put the trainer where the checkpoint was; a machine that rounds otherwise is told, not refused."""
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.restore(checkpoint, exact=False)
    if crew.first:
        for warning in caught:
            say(f"note: {warning.message}")
        say(f"going on from step {trainer.done} of {trainer.config.steps}")


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


def results_of(
    args: argparse.Namespace, trainer: Trainer, file: Path, per_token: float, per_byte: float, sample: str
) -> dict[str, Any]:
    """The results, by the names that --json gives them."""
    return {
        "steps": trainer.done,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "validation_nats_per_token": per_token,
        "validation_nats_per_byte": per_byte,
        "validation_bits_per_byte": per_byte / math.log(2),
        "validation_perplexity": math.exp(per_token),
        "model": str(args.out / MODEL),
        "checkpoint": str(file),
        "sample": sample,
    }


def report(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Print the results."""
    if args.json:
        readable = json.dumps(results, indent=2, ensure_ascii=False)
        print(readable if readable == shown_by_stdout(readable) else json.dumps(results, indent=2))
        return
    print(
        f"validation loss {results['validation_nats_per_byte']:.3f} nats a byte "
        f"({results['validation_bits_per_byte']:.3f} bits), perplexity {results['validation_perplexity']:.2f} a token"
    )
    print(shown_by_stdout(f"model           {results['model']}"))
    if "ranks" in results:
        from mlsys.commands import _train_ranks

        print(shown_by_stdout(_train_ranks.table(results)))
    if results["sample"]:
        print(shown_by_stdout(f"sample\n{textwrap.indent(results['sample'], '  ', lambda line: True)}"))


def shown_by_stdout(text: str) -> str:
    """The text, with a question mark for what stdout's encoding does not have: after minutes of training, no error."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
