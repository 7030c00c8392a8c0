"""A weight that stages on several ranks use: one copy on each, which begin equal and get the same gradient.

The gradient of a weight used twice is the sum over its uses. In one process autograd adds them up; here each rank has
the part of its own stages, so after the backward passes the ranks that have a copy send one another theirs, and all add
them in the same order. Then any optimizer takes the same step on every copy, to the bit.

What was in `.grad` before the step is put aside meanwhile, or it would be counted once for each rank.

See also:
    `mlsys.parallel.pipeline`, `mlsys.parallel._pipeline_stages` (which says which weights these are).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlsys.parallel._pipeline_messages import Links


def shared_here(stages: Mapping[int, nn.Module]) -> dict[str, nn.Parameter]:
    """The weights of these stages that other stages use too, by their names in the whole model."""
    found: dict[str, nn.Parameter] = {}
    users: dict[str, int] = {}
    for number, stage in stages.items():
        named = dict(stage.named_parameters(remove_duplicate=False))
        for own, name in getattr(stage, "shared", {}).items():
            if found.setdefault(name, named[own]) is not named[own]:
                raise ValueError(
                    f"stages {users[name]} and {number} are both on this rank and have a {name} each, where the model "
                    "has one: take both from one call of split, and fill them in one call of load"
                )
            users[name] = number
    return found


class Tied:
    """The weights of which this rank has a copy and others too: `ranks` by name, in order, this one among them."""

    def __init__(self, here: Mapping[str, nn.Parameter], ranks: Mapping[str, Sequence[int]], tag: int) -> None:
        names = sorted(name for name, some in ranks.items() if len(some) > 1)
        self._tags = {name: tag + i for i, name in enumerate(names)}
        self._here = {name: here[name] for name in names if name in here}
        self._ranks = ranks
        self._before: dict[str, Tensor | None] = {}

    @torch.no_grad()
    def make_equal(self, links: Links) -> None:
        """Take over the copy of the lowest rank."""
        for name, parameter in self._here.items():
            first, *others = self._ranks[name]
            values = parameter.detach().contiguous()
            if links.rank == first:
                works = [(links.send(values, peer, self._tags[name]), peer) for peer in others]
            else:
                values = torch.empty_like(values)
                works = [(links.receive(values, first, self._tags[name]), first)]
            for work, peer in works:
                links.wait(work, name, peer)
            parameter.copy_(values)

    def begin(self) -> None:
        """Put aside what has been accumulated before."""
        for name, parameter in self._here.items():
            self._before[name], parameter.grad = parameter.grad, None

    @torch.no_grad()
    def add_up(self, links: Links) -> None:
        """Give every copy the gradient of all of them, and add what was there before."""
        pending: list[tuple[nn.Parameter, dict[int, Tensor], list[Any], str]] = []
        for name, parameter in self._here.items():
            if not parameter.requires_grad:
                continue
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parts, works = {links.rank: own.contiguous()}, []
            for peer in self._ranks[name]:
                if peer != links.rank:
                    parts[peer] = torch.empty_like(parts[links.rank])
                    works.append((links.receive(parts[peer], peer, self._tags[name]), peer))
                    works.append((links.send(parts[links.rank], peer, self._tags[name]), peer))
            pending.append((parameter, parts, works, name))
        for parameter, parts, works, name in pending:
            for work, peer in works:
                links.wait(work, f"the gradient of {name}", peer)
            first, *others = (parts[rank] for rank in sorted(parts))
            total = first.add_(others[0])  # neither is needed any more
            for part in others[1:]:
                total.add_(part)
            before = self._before[name]
            parameter.grad = total if before is None else before.add_(total)
        self._before.clear()
