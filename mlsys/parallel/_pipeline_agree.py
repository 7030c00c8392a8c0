"""Before the first step: each rank takes its stages, and all find out that they mean the same pipeline.

See also:
    `mlsys.parallel.pipeline`.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mlsys.parallel._pipeline_messages import Links
from mlsys.parallel._pipeline_tied import shared_here
from mlsys.parallel._schedule_ops import Schedule


def agree(
    stages: Any, schedule: Schedule, rank_of: Sequence[int], links: Links
) -> tuple[dict[int, nn.Module], dict[str, list[int]]]:
    """This rank's stages by number, and which ranks have each weight that stages share.

    Raises on every rank what is wrong on one.
    """
    error: Exception | None = None
    mine: dict[int, nn.Module] = {}
    shared: dict[str, nn.Parameter] = {}
    try:
        if links.size != len(schedule):
            raise ValueError(
                f"schedule is for {len(schedule)} ranks, and the group has {links.size}: make it for as many"
            )
        mine = _own(stages, rank_of, links.rank)
        shared = shared_here(mine)
    except (TypeError, ValueError) as found:
        error = found
    text = repr([list(map(tuple, schedule[rank])) for rank in sorted(schedule)])
    here = (
        hashlib.sha256(text.encode()).hexdigest(),
        {name: (tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in shared.items()},
        None if error is None else f"{type(error).__name__}: {error}",
    )
    everyone = gathered(links, here)
    if error is not None:
        raise error
    users: dict[str, list[int]] = {}
    for rank, (digest, theirs, wrong) in enumerate(everyone):
        if wrong is not None:
            raise ValueError(f"rank {rank} could not make its part of the pipeline: {wrong}")
        if digest != everyone[0][0]:
            raise ValueError(f"ranks 0 and {rank} have different schedules: pass the same on every rank")
        for name, what in theirs.items():
            ranks = users.setdefault(name, [])
            ranks.append(rank)
            first = everyone[ranks[0]][1][name]
            if what != first:
                raise ValueError(
                    f"{name}, which stages share, is {what} on rank {rank} and {first} on rank {ranks[0]} (shape, "
                    "dtype, requires_grad): make the same model on every rank"
                )
    return mine, users


def gathered(links: Links, mine: Any) -> list[Any]:
    """Everybody's object, in rank order."""
    everyone: list[Any] = [mine] * links.size
    if not links.alone:
        dist.all_gather_object(everyone, mine, group=links.group)
    return everyone


def device_of(stages: Mapping[int, nn.Module], links: Links) -> torch.device:
    """Where the stages' parameters lie; without any, where the group's messages are."""
    for stage in stages.values():
        for tensor in itertools.chain(stage.parameters(), stage.buffers()):
            return tensor.device
    return torch.device("cuda", torch.cuda.current_device()) if links.on_gpu else torch.device("cpu")


def _own(stages: Any, rank_of: Sequence[int], rank: int) -> dict[int, nn.Module]:
    if not isinstance(stages, Mapping | Sequence):
        raise TypeError(f"stages must be a mapping from numbers to modules, or a list, got {type(stages).__name__}")
    if isinstance(stages, Sequence) and len(stages) != len(rank_of):
        raise ValueError(f"stages has {len(stages)} modules, and the schedule {len(rank_of)} stages: make as many")
    mine = [number for number, owner in enumerate(rank_of) if owner == rank]
    given = dict(stages) if isinstance(stages, Mapping) else dict(enumerate(stages))
    missing = [number for number in mine if number not in given]
    if missing:
        raise ValueError(f"stages has no stage {missing[0]}, which the schedule gives to rank {rank}: {sorted(given)}")
    for number in mine:
        if not isinstance(given[number], nn.Module):
            raise TypeError(f"stages[{number}] must be a module, got {type(given[number]).__name__}")
        for name, parameter in given[number].named_parameters():
            if parameter.is_meta:
                raise ValueError(f"{name} of stage {number} is on the meta device: fill it first, with `load`")
    return {number: given[number] for number in mine}
