"""Copies of one module on all ranks: that they are of one make, and that they begin with the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlsys.parallel._buckets import DENSE, strides
from mlsys.parallel.collectives import Communicator, Group, broadcast

MB = 2**20


def check_module(module: nn.Module) -> None:
    """Raise ValueError for what data parallelism cannot serve; on one rank as on all."""
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    for name, parameter in module.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ValueError(f"parameter {name} has no shape yet: run one batch through the module before wrapping it")
        if parameter.is_meta:
            raise ValueError(f"parameter {name} is on the meta device: give it memory and values before wrapping it")
    if not trainable:
        raise ValueError("no parameter of the module has requires_grad=True: there are no gradients to average")
    devices = {str(p.device) for p in module.parameters()}
    if len(devices) > 1:
        raise ValueError(
            f"parameters are on {', '.join(sorted(devices))}: a rank has one device, move the module there"
        )
    for name, child in module.named_modules():
        if getattr(child, "sparse", False) is True and isinstance(child, nn.Embedding | nn.EmbeddingBag):
            raise ValueError(f"module {name or type(child).__name__} makes sparse gradients: {DENSE}")


def check_memory(module: nn.Module) -> None:
    """Raise ValueError for a parameter or buffer whose numbers have no places of their own."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.layout == torch.strided and any(
            step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
        ):
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} is expanded: several of its numbers are one in memory, and "
                f"rank 0's cannot be copied into it; give it memory of its own with .clone()"
            )


def agree(module: nn.Module, group: Group) -> None:
    """Raise ValueError, on every rank, if the modules of two ranks differ."""
    mine: list[_Entry] = [
        (name, tuple(p.shape), str(p.dtype), strides(p), p.requires_grad) for name, p in module.named_parameters()
    ]
    mine += [(name, tuple(b.shape), str(b.dtype), (), False) for name, b in module.named_buffers()]
    process_group = group.group if isinstance(group, Communicator) else group
    everyone: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(everyone, mine, group=process_group)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise ValueError(
                f"the modules differ: {_difference(everyone[0], rank, theirs)}; make the same module on every rank"
            )


_Entry = tuple[str, tuple[int, ...], str, tuple[int, ...], bool]  # name, shape, type, strides, whether it is trained


def _difference(first: Sequence[Any], rank: int, other: Sequence[Any]) -> str:
    """The first entry in which two ranks' modules differ, in words."""
    for one, two in zip(first, other, strict=False):
        if one != two:
            return f"rank 0 has {_entry(one)}, rank {rank} has {_entry(two)}"
    longer, rank_of_longer = (first, 0) if len(first) > len(other) else (other, rank)
    extra = longer[min(len(first), len(other))]
    return (
        f"rank {rank_of_longer} has {_entry(extra)}, rank {rank if rank_of_longer == 0 else 0} has nothing in its place"
    )


def _entry(entry: _Entry) -> str:
    name, shape, dtype, strides, trainable = entry
    return f"{name} {shape} {dtype}{f' strides {strides}' if strides else ''}{'' if trainable else ' without gradient'}"


@torch.no_grad()
def broadcast_first(tensors: Sequence[Tensor], group: Group, algorithm: str) -> None:
    """Give rank 0's to all, those of one type in few messages."""
    chunks: list[list[Tensor]] = []
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            by_type.setdefault(tensor.dtype, []).append(tensor)
    for same in by_type.values():
        chunk: list[Tensor] = []
        for tensor in same:
            if chunk and sum(t.nbytes for t in chunk) + tensor.nbytes > 25 * MB:
                chunks.append(chunk)
                chunk = []
            chunk.append(tensor)
        chunks.append(chunk)
    for chunk in chunks:
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in chunk])
        broadcast(flat, group, algorithm=algorithm, check=False)
        for tensor, values in zip(chunk, flat.split([t.numel() for t in chunk]), strict=True):
            # Past the version counter: a forward pass whose backward is still to come may hold this buffer.
            tensor.data.copy_(values.view(tensor.shape))
