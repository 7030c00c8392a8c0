"""A real language model for whoever needs one: small, trained on this machine at first use, then kept.

Random weights give flat attention and tokens without pattern: nothing that compresses, drafts or evicts can be
judged on them. These weights know Python's spelling, indentation and commonest phrases, which is enough for a
quantized model to get worse, and for a draft model to guess right.

    >>> model, tokenizer = trained("small")

Training is seeded and runs on one thread, so one machine always makes the same weights. The file's name is a digest
of all they depend on: shape, settings, text, torch's version, the CPU's vector width and this module's `VERSION`.

Cost:
    "small" takes about 20 s of one core, "tiny" 7 s; once. Later calls read the text (for the digest) and the file.

Memory:
    Some MB while training; 0.5 MB on disk.

Papers:
    Touvron et al. 2023, arXiv:2302.13971, section 2.2 (the shape: RMSNorm, SwiGLU, rotary positions).

See also:
    `mlsys train` (a model of your own), `mlsys.data.text` (the text), `mlsys.models.training` (the loop).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mlsys.attention import naive
from mlsys.data import text
from mlsys.files import cache_folder
from mlsys.models import training, transformer
from mlsys.models.training import TrainConfig, Trainer
from mlsys.models.transformer import AttentionFn, Transformer
from mlsys.perf.configs import Config, llama

log = logging.getLogger(__name__)

VERSION = 1  # raise when the same recipe gives other weights: old files are then not read


@dataclass(frozen=True)
class Recipe:
    """All that a trained model follows from: its shape, the settings of its training, and the text's source."""

    config: Config
    train: TrainConfig
    source: str = "stdlib"

    def __post_init__(self) -> None:
        if self.config.vocab != text.Bytes.vocab:
            raise ValueError(f"config.vocab={self.config.vocab}: recipes read bytes, so it must be {text.Bytes.vocab}")
        if self.train.seq > self.config.context:
            raise ValueError(f"train.seq={self.train.seq} is longer than config.context={self.config.context}")


# With the validation loss to expect, in nats a byte (a uniform guess has 5.55).
RECIPES = {
    # 117,056 parameters: 1.78
    "small": Recipe(
        llama(2, 64, 4, 176, vocab=256, context=128, tied=True), TrainConfig(steps=1200, batch=4, seq=128, lr=6e-3)
    ),
    # 20,064 parameters: 2.07; drafts for "small"
    "tiny": Recipe(
        llama(1, 32, 2, 80, vocab=256, context=128, tied=True), TrainConfig(steps=1000, batch=4, seq=128, lr=1e-2)
    ),
}


def trained(
    recipe: str | Recipe = "small",
    *,
    attention: AttentionFn = naive.attention,
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[Transformer, text.Bytes]:
    """The trained model of a recipe, "small" or "tiny" or one's own, and its tokenizer.

    The first call trains, and tells on stderr how far it is; later ones read the file in the cache, or in `cache_dir`.
    A damaged file is read as none. torch's global generator is left as it is. ValueError for an unknown name.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ValueError(f"recipe={recipe!r}: there are {', '.join(RECIPES)}; or pass a Recipe")
        name, recipe = recipe, RECIPES[recipe]
    else:
        name = "own"
    files = text.corpus(recipe.source)
    folder = (Path(cache_dir) if cache_dir is not None else cache_folder()) / "trained"
    path = folder / f"{name}-{_key(recipe, files)}.safetensors"
    with torch.random.fork_rng(devices=[]):  # a model draws weights when it is built, on the CPU
        return _model(recipe, files, name, path, attention).eval(), text.Bytes()


def _model(recipe: Recipe, files: list[text.File], name: str, path: Path, attention: AttentionFn) -> Transformer:
    try:
        return transformer.load(path, attention=attention)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        log.warning("the cache file %s cannot be read (%s); training again", path, error)

    folder = path.parent
    model = _train(recipe, files, name, folder.with_name("text"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        transformer.save(model, path)
        model = transformer.load(path, attention=attention)
    except OSError as error:
        log.warning("cannot keep the model in %s (%s); it will be trained again next time", folder, error)
        weights = model.state_dict()
        model = Transformer(recipe.config, attention=attention)
        model.load_state_dict(weights)
    return model


def _key(recipe: Recipe, files: list[text.File]) -> str:
    machine = training.environment(torch.device("cpu")) | {"threads": 1}
    parts = [VERSION, asdict(recipe.config), asdict(recipe.train), text.digest(files), machine]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _train(recipe: Recipe, files: list[text.File], name: str, text_cache: Path) -> Transformer:
    train_files, validation_files = text.split(files)
    tokenizer = text.Bytes()
    stream = text.tokens(train_files, tokenizer, cache_dir=text_cache)
    held_out = text.tokens(validation_files, tokenizer, cache_dir=text_cache)
    steps = recipe.train.steps
    with _one_thread():
        model = Transformer(recipe.config)
        transformer.init(model, torch.Generator().manual_seed(recipe.train.seed))
        trainer = Trainer(model, stream, recipe.train)
        while not trainer.finished:
            loss = trainer.step()
            if trainer.done % max(steps // 5, 1) == 0 or trainer.finished:
                told = f"training the model {name!r} (once): step {trainer.done} of {steps}, {loss:.2f} nats a byte"
                print(told, file=sys.stderr, flush=True)
        loss = training.evaluate(model, held_out, recipe.train.seq, windows=200)
    print(f"trained the model {name!r}: {loss:.2f} nats a byte on held-out files", file=sys.stderr, flush=True)
    return model


@contextmanager
def _one_thread() -> Iterator[None]:
    """The order of sums depends on the number of threads; a small model gains nothing from a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
