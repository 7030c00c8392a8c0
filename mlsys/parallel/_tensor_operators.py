"""The operators that stand where a tensor-parallel layer meets the rest: what they do forward, and what backward.

Between the ranks of a tensor-parallel group a tensor is in one of three states: *whole* on every rank, *cut*, or
*partial*, which is as large as the whole and has to be summed over the ranks. An operator turns one into another, and
its backward pass is the transpose of its forward pass. So they come in conjugate pairs:

                 forward                          backward              in Megatron-LM
    f            nothing                          all-reduce            f
    f̄ (f_bar)    all-reduce                       nothing               g
    g            all-gather    cut → whole        reduce-scatter
    ḡ (g_bar)    reduce-scatter partial → cut     all-gather

The letters are those of Korthikanti et al. (Figures 4 and 5). Beware: the g of Megatron-LM's paper (Figure 3) is their
f̄, and their g is something else. A fifth pair serves what lies outside, where every rank computes the same from the
whole, and so has the whole gradient: `gather` (all-gather; backward each keeps its part) and `part` (the other way).

Two faults are common in code of this kind. A backward pass may not change the gradient that it is given, even if an
in-place all-reduce would save a copy: autograd hands the same tensor to whoever else reads it. And a collective takes a
tensor's memory as it lies, so a transposed or expanded gradient (as of `y.sum()`) must be made contiguous first.

Cut is always the first dimension, as the sequence is in Megatron-LM: only so do parts lie one after the other in
memory.

See also:
    `mlsys.parallel.tensor` (the layers, and the papers), `mlsys.parallel._tensor_products` (fused with products).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlsys.parallel._communicator import channel
from mlsys.parallel.collectives import Group, Work, all_gather, all_reduce, reduce_scatter


class Ranks:
    """A tensor-parallel group as its layers use it: which rank this is, of how many, and how collectives run.

    algorithm: of all of them, such as "auto", "ring" or "backend".
    overlap:   whether the gradient of a product's input travels while that of its weights is computed.
    """

    def __init__(self, group: Group = None, *, algorithm: str = "auto", overlap: bool | None = None) -> None:
        if isinstance(group, Ranks):
            raise TypeError("group is a Ranks already: pass it on as it is")
        there = channel(group)
        self.channel: Any = there  # a Communicator, or a plain group
        self.rank, self.size, self.algorithm = there.rank, there.size, algorithm
        # Comparing calls costs nothing in shared memory, and a message a call over a network.
        self.options: dict[str, Any] = {"algorithm": algorithm, "check": there.shared is not None}
        self.broadcasts = "backend" if algorithm == "backend" else "auto"
        self.overlap = there.shared is None if overlap is None else overlap

    def reduce(self, tensor: Tensor, op: str = "sum") -> None:
        """Replace `tensor`, which must be the caller's own, by the sum (or the largest) over the ranks."""
        all_reduce(tensor, self.channel, op=op, **self.options)

    def gathered(self, part: Tensor) -> Tensor:
        """All ranks' parts, one after the other along the first dimension."""
        whole, part = self._whole_of(part)
        all_gather(whole, part, self.channel, **self.options)
        return whole

    def scattered(self, partial: Tensor) -> Tensor:
        """This rank's part, along the first dimension, of the sum over the ranks."""
        part, partial = self._part_of(partial)
        reduce_scatter(part, partial, self.channel, **self.options)
        return part

    # The same begun, with what to wait for: None if it is done already.

    def begin_reduce(self, tensor: Tensor) -> Work | None:
        """`reduce`, begun."""
        return all_reduce(tensor, self.channel, async_op=self.overlap, **self.options)

    def begin_gathered(self, part: Tensor) -> tuple[Tensor, Work | None]:
        """`gathered`, begun."""
        whole, part = self._whole_of(part)
        return whole, all_gather(whole, part, self.channel, async_op=self.overlap, **self.options)

    def begin_scattered(self, partial: Tensor) -> tuple[Tensor, Work | None]:
        """`scattered`, begun."""
        part, partial = self._part_of(partial)
        return part, reduce_scatter(part, partial, self.channel, async_op=self.overlap, **self.options)

    def _whole_of(self, part: Tensor) -> tuple[Tensor, Tensor]:
        return part.new_empty((part.shape[0] * self.size, *part.shape[1:])), part.contiguous()

    def _part_of(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        return whole.new_empty((whole.shape[0] // self.size, *whole.shape[1:])), whole.contiguous()

    def own(self, whole: Tensor) -> Tensor:
        """This rank's part along the first dimension."""
        each = whole.shape[0] // self.size
        return whole[self.rank * each : (self.rank + 1) * each]


def ranks(group: Group | Ranks) -> Ranks:
    """`group` as `Ranks`."""
    return group if isinstance(group, Ranks) else Ranks(group)


# --- the operators ----------------------------------------------------------------------------------------------------


def f(x: Tensor, group: Group | Ranks = None) -> Tensor:
    """Nothing; backward, the sum of the gradient over the ranks, each of which used x for a part of the result."""
    return _F.apply(x, ranks(group))


def f_bar(x: Tensor, group: Group | Ranks = None) -> Tensor:
    """The sum of x over the ranks; backward nothing. Megatron-LM's paper calls it g."""
    return _FBar.apply(x, ranks(group))


def g(x: Tensor, group: Group | Ranks = None) -> Tensor:
    """All ranks' x, one after the other along the first dimension; backward this rank's part of the summed gradient."""
    return _G.apply(x, ranks(group))


def g_bar(x: Tensor, group: Group | Ranks = None) -> Tensor:
    """This rank's part, along the first dimension, of the sum of x; backward all gradients, one after the other."""
    there = ranks(group)
    check_rows(x, there)
    return _GBar.apply(x, there)


def gather(x: Tensor, group: Group | Ranks = None) -> Tensor:
    """All ranks' x, for a computation that every rank repeats; backward this rank's part of its own gradient."""
    return _Gather.apply(x, ranks(group))


def part(x: Tensor, group: Group | Ranks = None) -> Tensor:
    """This rank's part of an x that all ranks have; backward the whole gradient, gathered."""
    there = ranks(group)
    check_rows(x, there)
    return _Part.apply(x, there)


def check_rows(x: Tensor, there: Ranks) -> None:
    """Raise ValueError unless the ranks can have equal parts of x along its first dimension."""
    if x.ndim == 0 or x.shape[0] % there.size:
        raise ValueError(
            f"x of shape {tuple(x.shape)} cannot be cut along its first dimension over {there.size} ranks: pad it to a "
            "multiple"
        )


class _F(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Ranks) -> Tensor:
        ctx.there = there
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return f_bar(gradient, ctx.there), None


class _FBar(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Ranks) -> Tensor:
        ctx.there = there
        total = x.clone(memory_format=torch.contiguous_format)
        there.reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return f(gradient, ctx.there), None


class _G(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Ranks) -> Tensor:
        ctx.there = there
        return there.gathered(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return g_bar(gradient, ctx.there), None


class _GBar(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Ranks) -> Tensor:
        ctx.there = there
        return there.scattered(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return g(gradient, ctx.there), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Ranks) -> Tensor:
        ctx.there = there
        return there.gathered(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return part(gradient, ctx.there), None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Ranks) -> Tensor:
        ctx.there = there
        return there.own(x).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gather(gradient, ctx.there), None


# --- gradients of weights that several ranks have a copy of -----------------------------------------------------------


def shared(parameter: Tensor, group: Group | Ranks, *, copies: int, index: int) -> Tensor:
    """A parameter of which there are `copies` different ones; ranks of one `index` have the same, and sum gradients.

    One all-reduce over the whole group of all `copies` gradients in a row, this rank's in its place: no process group
    of those that share one is needed, which every rank of the world would have to help to make.
    """
    return _Shared.apply(parameter, ranks(group), copies, index)


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Ranks, copies: int, index: int) -> Tensor:
        ctx.there, ctx.copies, ctx.index = there, copies, index
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        row = gradient.new_zeros((ctx.copies, *gradient.shape))
        row[ctx.index] = gradient
        ctx.there.reduce(row)
        return row[ctx.index], None, None, None
