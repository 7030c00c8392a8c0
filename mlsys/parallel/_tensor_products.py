"""The two products of tensor parallelism, with their operators fused in: f and a product by columns, one by rows and f̄.

As one autograd function each they can do what the operators one by one cannot:

- several products of one input (queries, keys and values; gate and up) share one f, whose gradient is summed over them
  where it is computed, in one buffer, and over the ranks once;
- the sum over the ranks can travel while the weights' gradient is computed;
- f̄ sums in place, since the product is new and nobody else has it;
- of an input that is cut, the part is kept for the backward pass, not what was gathered.

See also:
    `mlsys.parallel._tensor_operators` (f, f̄, g, ḡ), `mlsys.parallel._tensor_layers` (the layers).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mlsys.parallel._tensor_operators import Ranks, check_rows, f
from mlsys.parallel.collectives import Work


def columns(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], group: Ranks, *, cut: bool
) -> tuple[Tensor, ...]:
    """For each of this rank's weights, which are rows of W (columns of Wᵀ): x Wᵀ + b, after one f for all of them.

    If x is `cut`, this rank has its part along the first dimension, and g takes the place of f. Only that
    part is kept for the backward pass, where x is gathered once more.
    """
    x, weights, biases = _same_dtype(x, weights, biases)
    if group.size == 1:
        return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
    return _Columns.apply(x, group, cut, len(weights), *weights, *biases)


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Ranks, cut: bool, count: int, *parameters: Tensor | None) -> Any:
        weights, biases = parameters[:count], parameters[count:]
        ctx.there, ctx.cut, ctx.count = there, cut, count
        ctx.save_for_backward(x, *weights)
        whole = there.gathered(x) if cut else x
        return tuple(F.linear(whole, w, b) for w, b in zip(weights, biases, strict=True))  # type: ignore[arg-type]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x, *weights), there, cut = ctx.saved_tensors, ctx.there, ctx.cut
        wanted = ctx.needs_input_grad
        needs_x, needs_weight, needs_bias = wanted[0], wanted[4 : 4 + ctx.count], wanted[4 + ctx.count :]
        flat = [_rows_of(gradient) for gradient in gradients]
        regathered = there.begin_gathered(x) if cut and any(needs_weight) else (x, None)

        for_x: Tensor | None = None
        travelling: Work | None = None
        if needs_x:
            total = flat[0] @ weights[0]
            for gradient, weight in zip(flat[1:], weights[1:], strict=True):
                total.addmm_(gradient, weight)
            total = total.view(*gradients[0].shape[:-1], x.shape[-1])
            if cut:
                for_x, travelling = there.begin_scattered(total)
            else:
                for_x, travelling = total, there.begin_reduce(total)
        whole, arriving = regathered
        if arriving is not None:
            arriving.wait()
        rows_of_x = _rows_of(whole)
        for_weights = [g.mT @ rows_of_x if need else None for g, need in zip(flat, needs_weight, strict=True)]
        for_biases = [g.sum(0) if need else None for g, need in zip(flat, needs_bias, strict=True)]
        if travelling is not None:
            travelling.wait()
        return for_x, None, None, None, *for_weights, *for_biases


def rows(x: Tensor, weight: Tensor, bias: Tensor | None, group: Ranks, *, cut: bool) -> Tensor:
    """Σ over the ranks of x Wᵀ for each one's columns of W, then f̄ (or ḡ), and the bias once, after the sum.

    If `cut`, the result is this rank's part along the first dimension, and the bias, of which every
    rank has a copy but sees its part only, gets the sum of all ranks' gradients.
    """
    x, (weight,), (bias,) = _same_dtype(x, [weight], [bias])
    if group.size == 1:
        return F.linear(x, weight, bias)
    if cut:
        check_rows(x, group)
        bias = None if bias is None else f(bias, group)
    return _Rows.apply(x, weight, bias, group, cut)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, there: Ranks, cut: bool) -> Tensor:
        ctx.there, ctx.cut = there, cut
        ctx.save_for_backward(x, weight)
        total = F.linear(x, weight)
        if cut:
            total = there.scattered(total)
        else:
            there.reduce(total)  # in place: it is new
        return total if bias is None else total.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        for_bias = _rows_of(gradient).sum(0) if needs_bias else None
        whole = ctx.there.gathered(gradient) if ctx.cut else gradient
        flat = _rows_of(whole)
        for_x = (flat @ weight).view(x.shape) if needs_x else None
        for_weight = flat.mT @ _rows_of(x) if needs_weight else None
        return for_x, for_weight, for_bias, None, None


def _same_dtype(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Any:
    """Under autocast, all in its dtype, as `F.linear` would: a Function's backward pass does not know of autocast."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, list(weights), list(biases)
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)

    return cast(x), [cast(weight) for weight in weights], [cast(bias) for bias in biases]


def _rows_of(x: Tensor) -> Tensor:
    """As a matrix: a single vector is one row."""
    return x[None] if x.ndim == 1 else x.flatten(0, -2)
