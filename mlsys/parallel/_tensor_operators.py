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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlsys.parallel._communicator import channel
from mlsys.parallel.collectives import Communicator, Group, Work, all_gather, all_reduce, reduce_scatter


class Ranks:
    """A tensor-parallel group as its layers use it: which rank this is, of how many, and how collectives run.

    algorithm: of all of them, such as "auto", "ring" or "backend".
    overlap:   whether the gradient of a product's input travels while that of its weights is computed.
    owned:     a Communicator that was made for these layers, which `close` ends.

    A copy of a layer has the same: connections are not copied.
    """

    def __init__(
        self,
        group: Group = None,
        *,
        algorithm: str = "auto",
        overlap: bool | None = None,
        owned: Communicator | None = None,
    ) -> None:
        if isinstance(group, Ranks):
            raise TypeError("group is a Ranks already: pass it on as it is")
        there = channel(group)
        self.channel: Any = there  # a Communicator, or a plain group
        self.rank, self.size, self.algorithm = there.rank, there.size, algorithm
        # Comparing calls costs nothing in shared memory, and a message a call over a network.
        self.options: dict[str, Any] = {"algorithm": algorithm, "check": there.shared is not None}
        self.broadcasts = "backend" if algorithm == "backend" else "auto"
        self.overlap = there.shared is None if overlap is None else overlap
        self._owned = owned

    def __deepcopy__(self, memo: Any) -> Ranks:
        return self

    def close(self) -> None:
        """End what is `owned`. Once is enough."""
        if self._owned is not None:
            self._owned.close()

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
    return _Operator.apply(x, ranks(group), _nothing, f_bar)


def f_bar(x: Tensor, group: Group | Ranks = None) -> Tensor:
    """The sum of x over the ranks; backward nothing. Megatron-LM's paper calls it g."""
    return _Operator.apply(x, ranks(group), _summed, f)


def g(x: Tensor, group: Group | Ranks = None) -> Tensor:
    """All ranks' x, one after the other along the first dimension; backward this rank's part of the summed gradient."""
    return _Operator.apply(x, ranks(group), Ranks.gathered, g_bar)


def g_bar(x: Tensor, group: Group | Ranks = None) -> Tensor:
    """This rank's part, along the first dimension, of the sum of x; backward all gradients, one after the other."""
    there = ranks(group)
    check_rows(x, there)
    return _Operator.apply(x, there, Ranks.scattered, g)


def gather(x: Tensor, group: Group | Ranks = None) -> Tensor:
    """All ranks' x, for a computation that every rank repeats; backward this rank's part of its own gradient."""
    return _Operator.apply(x, ranks(group), Ranks.gathered, part)


def part(x: Tensor, group: Group | Ranks = None) -> Tensor:
    """This rank's part of an x that all ranks have; backward the whole gradient, gathered."""
    there = ranks(group)
    check_rows(x, there)
    return _Operator.apply(x, there, _own, gather)


def check_rows(x: Tensor, there: Ranks) -> None:
    """Raise ValueError unless the ranks can have equal parts of x along its first dimension."""
    if x.ndim == 0 or x.shape[0] % there.size:
        raise ValueError(
            f"x of shape {tuple(x.shape)} cannot be cut along its first dimension over {there.size} ranks: pad it to a "
            "multiple"
        )


class _Operator(torch.autograd.Function):
    """Forward `ahead`; backward `back`, the other one of the pair, which can be differentiated in its turn."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        there: Ranks,
        ahead: Callable[[Ranks, Tensor], Tensor],
        back: Callable[[Tensor, Ranks], Tensor],
    ) -> Tensor:
        ctx.there, ctx.back = there, back
        return ahead(there, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.back(gradient, ctx.there), None, None, None


def _nothing(there: Ranks, x: Tensor) -> Tensor:
    return x.view_as(x)


def _summed(there: Ranks, x: Tensor) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    there.reduce(total)
    return total


def _own(there: Ranks, x: Tensor) -> Tensor:
    return there.own(x).clone(memory_format=torch.contiguous_format)


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
