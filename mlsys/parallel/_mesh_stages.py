"""Stages of a transformer of which this rank holds its share, and how they get their numbers from a whole model.

The model is built on the meta device, cut into shares (`_tensor_shards`), then into stages (`_pipeline_stages`). Only
the stages of this rank get memory, and of a file only their slices are read.

See also:
    `mlsys.parallel.mesh`, `mlsys.parallel._pipeline_stages`, `mlsys.parallel._tensor_model` (the same without stages).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlsys.models._inputs import check_ids
from mlsys.models._layers import rotation
from mlsys.models.transformer import Transformer
from mlsys.parallel._pipeline_stages import Stage, TransformerStage, split
from mlsys.parallel._tensor_layers import VocabEmbedding, vocab_cross_entropy
from mlsys.parallel._tensor_model import IGNORED, TensorParallel, counted, that_count
from mlsys.parallel._tensor_operators import Ranks, part
from mlsys.parallel._tensor_shards import cut_of
from mlsys.perf.configs import Config


class ParallelStage(TransformerStage):
    """A stage of a `TensorParallel`: tokens or x → x, or of the last stage this rank's columns of the logits.

    With sequence parallelism x is (b, t/n, d) between stages too, so that each rank sends and receives 1/n of it.
    """

    def __init__(self, stage: TransformerStage, whole: TensorParallel) -> None:
        nn.Module.__init__(self)
        self.ranks, self.cut = whole.ranks, whole.sequence_parallel
        self.config, self.first, self.last, self.shared = stage.config, stage.first, stage.last, stage.shared
        self.token_embedding, self.position_embedding = stage.token_embedding, stage.position_embedding
        self.blocks, self.norm, self.head = stage.blocks, stage.norm, stage.head

    def forward(self, x: Tensor) -> Tensor:
        config = self.config
        if self.first:
            x = self._embedded(x)
        cos_sin = None
        if config.positions != "learned" and len(self.blocks):
            t = x.shape[1] * (self.ranks.size if self.cut else 1)
            cos, sin = rotation(torch.arange(t, device=x.device), config.head_dim, config.rope_theta)
            wide = torch.promote_types(x.dtype, torch.float32)
            cos_sin = cos.to(wide), sin.to(wide)
        for i, block in self.blocks.items():
            x = block(x, cos_sin, None, int(i))
        if self.norm is not None:
            output = cast(VocabEmbedding, self.token_embedding if self.head is None else self.head)
            x = output.logits(self.norm(x).flatten(0, 1))  # (b·t, share), if cut ordered by rank
        return x

    def _embedded(self, tokens: Tensor) -> Tensor:
        embedding = cast(VocabEmbedding, self.token_embedding)
        check_ids("tokens", tokens, 2, self.config.vocab, "vocab", embedding.weight.device)
        (b, t), n = tokens.shape, self.ranks.size
        if not 0 < t <= self.config.context:
            raise ValueError(f"tokens must be 1 to {self.config.context} a sequence, got shape {(b, t)}")
        if self.cut and t % n:
            raise ValueError(f"tokens of shape {(b, t)}: sequence parallelism cuts {t} into {n} equal parts: pad it")
        x = embedding((by_rank(tokens, n) if self.cut else tokens).flatten()).unflatten(0, (b, -1))
        if self.position_embedding is not None:
            learned = self.position_embedding(torch.arange(t, device=tokens.device))
            x = x + (part(learned, self.ranks) if self.cut else learned)
        return x


def by_rank(tokens: Tensor, n: int) -> Tensor:
    """(b, t) as (n, b, t/n): first what rank 0 has of every sequence."""
    return tokens.unflatten(1, (n, -1)).transpose(0, 1)


def loss_of(config: Config, ranks: Ranks | None, sequence_parallel: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean cross-entropy of what the last stage gives, over the targets that count: 0, and no NaN, if none does."""

    def whole(logits: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        rows = logits.flatten(0, 1).to(wide)
        return F.cross_entropy(rows, targets.flatten().long(), ignore_index=IGNORED, reduction="sum")

    def shared(logits: Tensor, targets: Tensor) -> Tensor:
        assert ranks is not None
        wanted = (by_rank(targets, ranks.size) if sequence_parallel else targets).flatten()
        return vocab_cross_entropy(logits, wanted, ranks, vocab=config.vocab, ignore_index=IGNORED, reduction="sum")

    total = whole if ranks is None else shared

    def mean(logits: Tensor, targets: Tensor) -> Tensor:
        check_ids("targets", that_count(targets), 2, config.vocab, "vocab", logits.device)
        return total(logits, targets) / max(1, counted(targets))

    return mean


def stages_of(whole: Transformer, n: int, costs: Sequence[float] | None) -> list[Stage]:
    """`whole`, a Transformer or a TensorParallel, in `n` stages."""
    stages = split(whole, n, costs)
    if not isinstance(whole, TensorParallel):
        return stages
    return [ParallelStage(cast(TransformerStage, stage), whole) for stage in stages]


# --- numbers ----------------------------------------------------------------------------------------------------------

Whole = Transformer | Mapping[str, Tensor] | str | os.PathLike[str]


@contextlib.contextmanager
def opened(weights: Mapping[str, Tensor] | str | os.PathLike[str]) -> Iterator[tuple[dict[str, Any], Any]]:
    """Shapes by name, and what reads one: of a file, slice by slice."""
    if isinstance(weights, Mapping):
        yield {name: tuple(tensor.shape) for name, tensor in weights.items()}, weights.__getitem__
        return
    with Path(weights).open("rb"):
        pass  # a missing file or a folder is told as Python tells it
    try:
        with safetensors.safe_open(weights, framework="pt") as file:
            yield {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, file.get_slice  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{weights} is damaged, or no safetensors file ({error}): save the model again") from None


def check_whole(config: Config, shapes: Mapping[str, Any]) -> None:
    """ValueError unless names and shapes are those of a whole model of `config`."""
    wanted = {name: tuple(p.shape) for name, p in Transformer(config, device="meta").named_parameters()}
    missing, unknown = sorted(wanted.keys() - shapes.keys()), sorted(shapes.keys() - wanted.keys())
    if missing or unknown:
        raise ValueError(
            f"weights must have the whole model's names: missing {missing or 'none'}, unknown {unknown or 'none'}"
        )
    for name, shape in wanted.items():
        if tuple(shapes[name]) != shape:
            raise ValueError(f"weights have {name} of shape {tuple(shapes[name])}, the model's is {shape}")


@torch.no_grad()
def take(parameters: Mapping[str, nn.Parameter], config: Config, read: Any, rank: int, n: int) -> None:
    """Copy this rank's share of what `read` gives for each name, and nothing else."""
    for name, parameter in parameters.items():
        parameter.copy_(cut_of(name, config, n).share(read(name), rank, n))
