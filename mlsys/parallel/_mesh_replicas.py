"""Gradients of pipelines that stand beside each other: averaged over the replicas once a step, in whole or in shards.

A pipeline runs many backward passes a step, and the hooks of `DataParallel` and `ZeRO1` would send in each. So nothing
is hooked here. Gradients add up in `.grad`; when the last microbatch is done, `reduce` sends them, a bucket at a time,
with the next one being packed meanwhile. On the last ranks of a pipeline, which finish first, that lies in the bubble.

**Tied weights** that several stages have are averaged first, each copy over its own replicas, and the copies' averages
are then added up between the stages, in one order: so the copies get the same gradient to the bit, whatever the
all-reduce does, and stay equal.

See also:
    `mlsys.parallel.mesh`, `mlsys.parallel.data_parallel`, `mlsys.parallel.zero` (for one backward pass a step).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlsys.parallel._buckets import plan
from mlsys.parallel._flat import Flat
from mlsys.parallel._pipeline_messages import Links
from mlsys.parallel._pipeline_tied import Tied
from mlsys.parallel._replicas import MB
from mlsys.parallel.collectives import Group, all_reduce
from mlsys.parallel.zero import MOST_IN_FLIGHT, ZeRO2


class TiedOfReplicas(Tied):
    """The `tied` weights of a pipeline, whose gradients are averaged over replicas before the stages add them up."""

    def __init__(self, tied: Tied, group: Group, algorithm: str) -> None:
        self._one, self._here, self._group, self._algorithm = tied, tied._here, group, algorithm

    def make_equal(self, links: Links) -> None:
        self._one.make_equal(links)

    def begin(self) -> None:
        self._one.begin()

    @torch.no_grad()
    def add_up(self, links: Links) -> None:
        for parameter in self._here.values():
            if parameter.requires_grad:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
                all_reduce(gradient, self._group, op="mean", algorithm=self._algorithm, check=False)
                parameter.grad = gradient
        self._one.add_up(links)


class Replicas:
    """Plain data parallelism: every rank keeps the mean of all gradients, apart from those of `tied`."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        tied: Sequence[nn.Parameter],
        group: Group,
        *,
        bucket_mb: float,
        algorithm: str,
    ) -> None:
        known = {id(parameter) for parameter in tied}
        own = [p for p in parameters if p.requires_grad and id(p) not in known]
        self._buckets = plan(own[::-1], "bucketed", bucket_mb * MB, bucket_mb * MB) if own else []
        self._group, self._algorithm = group, algorithm

    @torch.no_grad()
    def reduce(self) -> None:
        """Replace every `.grad` by the mean over the replicas."""
        works: list[Any] = []
        for parameters in self._buckets:
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            for parameter, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                parameter.grad = piece.view(parameter.shape)
            grads.clear()
            options: Any = {"op": "mean", "algorithm": self._algorithm, "check": False, "async_op": True}
            works.append(all_reduce(flat, self._group, **options))
        for work in works:
            if work is not None:
                work.wait()


class ShardedReplicas(ZeRO2):
    """ZeRO-1: of the mean gradients and of the optimizer's state, each replica keeps its slice.

    Gradients are whole while microbatches add to them, and given up bucket by bucket as they are reduced. Those of
    `tied` are averages already, of which the slice is only cut out.
    """

    def __init__(self, module: nn.Module, tied: Sequence[nn.Parameter], group: Any, *, bucket_mb: float) -> None:
        self._tied = {id(parameter) for parameter in tied}
        super().__init__(module, group, bucket_mb=bucket_mb)

    def _plan(self, module: nn.Module, bucket_mb: float) -> list[list[nn.Parameter]]:
        found = []
        for bucket in super()._plan(module, bucket_mb):
            rest = [parameter for parameter in bucket if id(parameter) not in self._tied]
            found += [[parameter] for parameter in bucket if id(parameter) in self._tied] + ([rest] if rest else [])
        return found

    def _watch(self, flat: Flat) -> None:
        """No hooks: `reduce` is called once a step."""

    def optimizer(self, *args: Any, **options: Any) -> torch.optim.Optimizer:
        """As of `ZeRO1`; its `zero_grad` also clears what backward passes have left and `reduce` has not taken."""
        made = super().optimizer(*args, **options)
        clear = made.zero_grad

        def zero_grad(set_to_none: bool = True) -> None:
            clear(set_to_none)
            for parameter in self.module.parameters():
                parameter.grad = None

        made.zero_grad = zero_grad  # type: ignore[method-assign]
        return made

    @torch.no_grad()
    def reduce(self) -> None:
        """Take all gradients from the parameters, and leave the pieces their slices of the mean."""
        for flat in self.flats:
            for index, parameter in enumerate(flat.parameters):
                gradient, parameter.grad = parameter.grad, None
                if gradient is not None:
                    flat.put(index, gradient)
            if id(flat.parameters[0]) in self._tied:
                flat.receive(flat.layout.own(flat.take(), self.rank).clone())
                flat.gradients = None
            else:
                self._land(MOST_IN_FLIGHT - 1)
                self._reduce(flat)
        self._land()


class HookedReplicas(ZeRO2):
    """ZeRO-2, whose hooks reduce in every backward pass: there is nothing left to do at the end of a step."""

    def reduce(self) -> None:
        """Nothing."""


def gradients_of(sharded: ZeRO2) -> list[tuple[str, Tensor]]:
    """The slices of gradients that this rank has, by the name in the whole model."""
    pieces = [piece for flat in sharded.flats for piece in flat.pieces]
    return [(piece.name.split(".", 1)[1], piece.tensor.grad) for piece in pieces if piece.tensor.grad is not None]
