"""What a mesh's ranks must agree about before anything is built, what they build it from, and what a batch must be.

See also:
    `mlsys.parallel.mesh`, `mlsys.parallel._mesh_stages`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlsys.attention import naive
from mlsys.models._inputs import check_ids
from mlsys.models._layers import AttentionFn
from mlsys.models.transformer import Transformer
from mlsys.parallel._mesh_grid import Grid
from mlsys.parallel._mesh_stages import check_whole, opened, take
from mlsys.parallel._tensor_model import TensorParallel, counted, header, that_count
from mlsys.parallel.collectives import broadcast
from mlsys.perf.configs import Config


class Source:
    """Where the weights come from: rank 0's model, or a file."""

    def __init__(self, model: Any, attention: AttentionFn | None) -> None:
        self.problem, self.frozen, self.training = "", frozenset[str](), True
        self.config: Any = None
        self.dtype: Any = None
        self.device = torch.device("cpu")
        self.attention = attention or naive.attention
        self.model = model
        if isinstance(model, Transformer) and not isinstance(model, TensorParallel):
            weight: Any = model.token_embedding.weight
            self.config, self.dtype, self.training = model.config, weight.dtype, model.training
            self.frozen = frozenset(name for name, p in model.named_parameters() if not p.requires_grad)
            first: Any = model.blocks[0]
            self.attention = attention or first.attention.attend
            if dist.get_rank() == 0 and weight.is_meta:
                self.problem = "its model is on the meta device, and its weights count: give them values, or a file"
            if not weight.is_meta:
                self.device = weight.device
        elif isinstance(model, str | os.PathLike):
            try:
                found = header(Path(model))
                self.config, self.dtype = Config(**found["config"]), found["dtype"]
            except (OSError, ValueError, TypeError, json.JSONDecodeError) as error:  # the others must hear of it
                self.problem = f"{type(error).__name__}: {error}"
        else:
            self.problem = f"model must be a Transformer or the path of a saved one, got {type(model).__name__}"

    @torch.no_grad()
    def fill(self, shares: Mapping[str, nn.Parameter], rank: int, n: int) -> None:
        """Give this rank's parameters their values."""
        if not isinstance(self.model, Transformer):
            with opened(self.model) as (shapes, read):
                check_whole(self.config, shapes)
                take(shares, self.config, read, rank, n)
            return
        for name, parameter in self.model.named_parameters():
            first = dist.get_rank() == 0
            whole = (
                parameter.detach().clone().contiguous()
                if first
                else torch.empty(parameter.shape, dtype=self.dtype, device=self.device)
            )
            broadcast(whole, None, check=False)
            if name in shares:
                take({name: shares[name]}, self.config, {name: whole}.__getitem__, rank, n)


def agreed(source: Source, settings: tuple[Any, ...]) -> Source:
    """ValueError on every rank if one of them cannot build its part, or means another model."""
    kind = "a model" if isinstance(source.model, Transformer) else "a path"
    digest = hashlib.sha256(repr(settings).encode()).hexdigest()
    mine = (source.problem, source.config, source.dtype, kind, sorted(source.frozen), digest)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for rank, theirs in enumerate(everyone):
        if theirs[0]:
            raise ValueError(f"rank {rank} cannot take part: {theirs[0]}")
        names = ("config", "dtype", "model (a model or a path)", "frozen parameters", "schedule or options (digest)")
        for name, one, other in zip(names, everyone[0][1:], theirs[1:], strict=True):
            if one != other:
                raise ValueError(
                    f"the ranks disagree about {name}: rank 0 has {one}, rank {rank} has {other}; make the same on all"
                )
    return source


def check_zero(zero: int | None, grid: Grid, microbatches: int) -> None:
    if zero not in (None, 1, 2, 3):
        raise ValueError(f"zero={zero!r}: None, 1 or 2 is needed")
    if zero == 3:
        raise ValueError(
            "zero=3 would gather every weight twice for each microbatch, and free what tensor-parallel layers keep "
            "views of: take zero=1 and a larger tp or pp, which cut the weights too, or mlsys.parallel.zero3 without a "
            "mesh"
        )
    if zero == 2 and grid.pp > 1:
        raise ValueError(
            f"zero=2 with pp={grid.pp} would reduce gradients in each of {microbatches} backward passes, and send "
            f"{microbatches} times the bytes: take zero=1, which sends them once a step, or pp=1"
        )


def check_batch(tokens: Any, targets: Any, config: Config, microbatches: int, n: int) -> int:
    """How many targets count; TypeError or ValueError for a batch that some rank would stumble over."""
    some = tokens if isinstance(tokens, list) else [tokens]
    for one in some:
        if not isinstance(one, Tensor) or one.ndim != 2:
            raise TypeError(f"tokens must be a tensor (b, t), or a list of such, got {type(one).__name__}")
        if not 0 < one.shape[1] <= config.context:
            raise ValueError(f"tokens must be 1 to {config.context} a sequence, got shape {tuple(one.shape)}")
        if one.shape[1] % n:
            raise ValueError(
                f"tokens of shape {tuple(one.shape)}: sequence parallelism needs a length that {n} divides"
            )
    if isinstance(tokens, list) and len(tokens) != microbatches:
        raise ValueError(f"tokens is a list of {len(tokens)}, and the schedule has {microbatches} microbatches")
    if not isinstance(tokens, list) and len(tokens) < microbatches:
        raise ValueError(f"tokens has {len(tokens)} sequences, too few for {microbatches} microbatches: take more")
    if any(len(one) == 0 for one in some):
        raise ValueError("tokens has a microbatch without sequences: leave it out, with a schedule of fewer")
    wanted = targets if isinstance(targets, list) else [targets]
    for one in wanted:  # of a rank that does not count them the others would wait for ever
        if not isinstance(one, Tensor) or one.is_meta:
            what = "a tensor without numbers" if isinstance(one, Tensor) else type(one).__name__
            raise TypeError(f"targets must be tensors (b, t), on every rank, as each counts them, got {what}")
    if [one.shape for one in wanted] != [one.shape for one in some]:
        raise ValueError(
            f"targets must have the shapes of tokens {[tuple(one.shape) for one in some]}, got "
            f"{[tuple(one.shape) for one in wanted]}"
        )
    for one, other in zip(some, wanted, strict=True):
        if not one.is_meta:
            check_ids("tokens", one, 2, config.vocab, "vocab", one.device)
        check_ids("targets", that_count(other), 2, config.vocab, "vocab", other.device)
    return sum(counted(one) for one in wanted)
