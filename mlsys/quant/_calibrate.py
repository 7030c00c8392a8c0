"""What layers are given while a module reads calibration inputs: Σ x xᵀ, the largest inputs, and some of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mlsys.quant._hessian import hessian
from mlsys.quant._tensor import check_matrix

SAMPLES = 1024  # inputs of a layer that are kept as they are


@dataclass
class Seen:
    """The inputs of one layer so far.

    hessian:  Σ x xᵀ (K, K), if `second`.
    largest:  max |x| of each column, float32 (K,).
    rows:     up to `SAMPLES` of all inputs, float32 (n, K): each is as likely to be there as any other.
    count:    how many inputs there were.
    """

    second: bool
    hessian: Tensor | None = None
    largest: Tensor | None = None
    rows: Tensor | None = None
    count: int = 0
    _ranks: Tensor | None = None
    _generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def add(self, x: Tensor) -> None:
        """Take in inputs x (*rows, K), which are not kept or changed. ValueError if they are not finite."""
        x = check_matrix("inputs", x)
        if not len(x):
            return
        self.count += len(x)
        if self.second:
            self.hessian = hessian(x, self.hessian)
        top = x.abs().amax(dim=0)
        self.largest = top if self.largest is None else torch.maximum(self.largest, top)
        # Each input draws a rank, and the SAMPLES smallest ranks of all stay: a uniform sample, however many there are
        ranks = torch.rand(len(x), generator=self._generator)
        first = ranks.argsort()[:SAMPLES]
        rows, ranks = x[first.to(x.device)], ranks[first]
        if self.rows is not None and self._ranks is not None:
            rows, ranks = torch.cat((self.rows, rows)), torch.cat((self._ranks, ranks))
            first = ranks.argsort()[:SAMPLES]
            rows, ranks = rows[first.to(x.device)], ranks[first]
        self.rows, self._ranks = rows.clone(), ranks


def watch(module: nn.Module, layers: Mapping[str, nn.Module], inputs: Iterable[Any], second: bool) -> dict[str, Seen]:
    """What each of `layers` is given while `module` reads all `inputs`, in the order in which they are reached.

    In eval mode, without gradients; module, inputs and modes are as before afterwards, whatever happens.
    """
    seen: dict[str, Seen] = {}

    def hook_of(name: str) -> Any:
        def hook(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = arguments[0] if arguments else named["input"]
            try:
                seen.setdefault(name, Seen(second)).add(x)
            except ValueError as error:
                raise ValueError(f"while calibrating, layer {name}: {error}") from None

        return hook

    handles = []
    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(hook_of(name), with_kwargs=True))
        with evaluating(module), torch.no_grad():
            for batch in inputs:
                run(module, batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def run(module: nn.Module, batch: Any) -> None:
    """A tensor is the module's argument, a tuple or list its arguments, a dict its named ones."""
    if isinstance(batch, Mapping):
        module(**batch)
    elif isinstance(batch, tuple | list):
        module(*batch)
    else:
        module(batch)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode (no dropout) for now; each part's own mode afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
