"""Buckets: flat vectors of which gradients are views, and which parameters share one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from mlsys.parallel.collectives import Work

DENSE = "an all-reduce adds dense vectors; make the embedding with sparse=False"


class Bucket:
    """Gradients that travel together: `flat` holds them end to end, and after them, in the last bucket, the flags."""

    def __init__(self, index: int, parameters: Sequence[nn.Parameter], first: int, flags: int) -> None:
        self.index, self.parameters, self.first = index, list(parameters), first
        numbers = sum(p.numel() for p in parameters)
        self.flat = torch.zeros(numbers + flags, dtype=parameters[0].dtype, device=parameters[0].device)
        self.gradient, self.flags = self.flat[:numbers], self.flat[numbers:]
        self.views, start = [], 0
        for parameter in parameters:
            # With the parameter's own strides (channels last), as optimizers expect.
            self.views.append(torch.as_strided(self.flat, parameter.shape, strides(parameter), start))
            start += parameter.numel()
        self.works: list[Work | None] = []
        self.restart()

    def restart(self) -> None:
        """Count anew."""
        self.is_ready = [False] * len(self.parameters)
        self.missing = len(self.parameters)

    def take(self, slot: int) -> None:
        """Make `.grad` of this parameter a view of the bucket, with its numbers."""
        parameter, view = self.parameters[slot], self.views[slot]
        gradient = parameter.grad
        if gradient is view or gradient is None:
            return
        if gradient.layout != torch.strided:
            raise ValueError(f"a gradient of shape {tuple(gradient.shape)} is sparse: {DENSE}")
        if gradient.requires_grad:
            raise RuntimeError("backward(create_graph=True) cannot go through DataParallel: use torch.autograd.grad")
        if (gradient.dtype, gradient.device) != (view.dtype, view.device):
            raise RuntimeError(
                f"a gradient is {gradient.dtype} on {gradient.device}, and was {view.dtype} on {view.device} when "
                "DataParallel was made: convert and move the module before wrapping it"
            )
        # Copied even if it is alone in its bucket: it may share memory with a gradient that the backward pass has yet
        # to read, and that would be averaged under its eyes.
        with torch.no_grad():
            view.copy_(gradient)
        parameter.grad = view

    def complete(self) -> None:
        """What this pass brought no gradient for: 0, or what was there before."""
        for slot, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                self.views[slot].zero_()
            else:
                self.take(slot)

    def wait(self) -> None:
        """Until all that was sent of it has come back as the mean."""
        while self.works:
            if (work := self.works.pop(0)) is not None:
                work.wait()


def plan(parameters: Iterable[nn.Parameter], strategy: str, first_cap: float, cap: float) -> list[list[nn.Parameter]]:
    """Which parameters share a bucket, in the order in which the buckets are to be sent.

    `parameters` are in the order in which their gradients appear; `first_cap` and `cap` are bytes. Buckets do not mix
    types. A parameter that does not fit any more closes its bucket, and one above the cap has one of its own.
    """
    if strategy == "naive":
        return [[parameter] for parameter in parameters]
    closed: list[list[nn.Parameter]] = []
    filling: dict[torch.dtype, list[nn.Parameter]] = {}
    room: dict[torch.dtype, float] = {}
    place: dict[nn.Parameter, int] = {}
    for i, parameter in enumerate(parameters):
        place[parameter] = i
        kind, nbytes = parameter.dtype, parameter.numel() * parameter.element_size()
        if strategy == "bucketed" and kind in filling and nbytes > room[kind]:
            closed.append(filling.pop(kind))
        if kind not in filling:
            filling[kind], room[kind] = [], cap if closed else first_cap
        filling[kind].append(parameter)
        room[kind] -= nbytes
    # A bucket is full with its last gradient, so that is what orders them.
    return sorted([*closed, *filling.values()], key=lambda bucket: place[bucket[-1]])


def strides(parameter: Tensor) -> tuple[int, ...]:
    """Those of a dense tensor in this one's order of dimensions: autograd gives them to the gradient."""
    return torch.empty_like(parameter, device="meta").stride()
