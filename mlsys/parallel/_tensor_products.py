"""The two products of tensor parallelism, with their operators fused in: f and a product by columns, one by rows and f̄.

As one autograd function each they can do what the operators one by one cannot:

- several products of one input (queries, keys and values; gate and up) share one f, whose gradient is summed over them
  where it is computed, in one buffer, and over the ranks once;
- the sum over the ranks can travel while the weights' gradient is computed;
- f̄ sums in place, since the product is new and nobody else has it;
- of an input that is cut, the part is kept for the backward pass, not what was gathered;
- in a pipeline whose schedule has B and W apart, the weights' gradient is put off as that of a plain linear layer
  (`_weight_gradients`). B has the sums that the rank before waits for, and no product to hide them behind; an input
  that is cut is gathered again in W, so that no more than the part is kept until then. By rows it is the gradient
  that was gathered, for B, and it is kept whole: sent once more it would cost as much as the layer's forward pass.

See also:
    `mlsys.parallel._tensor_operators` (f, f̄, g, ḡ), `mlsys.parallel._tensor_layers` (the layers),
    `mlsys.parallel._weight_gradients` (B and W).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mlsys.parallel._tensor_operators import Ranks, check_rows, f
from mlsys.parallel._weight_gradients import Store, store_here, waits
from mlsys.parallel.collectives import Work


def columns(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    group: Ranks,
    *,
    cut: bool,
    leaves: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """For each of this rank's weights, which are rows of W (columns of Wᵀ): x Wᵀ + b, after one f for all of them.

    If x is `cut`, this rank has its part along the first dimension, and g takes the place of f. Only that
    part is kept for the backward pass, where x is gathered once more.

    leaves: the parameters that weights and biases are, or of which they are a slice or `shared` (None: themselves).
            They say what can be put off; a weight that is computed in another way is a leaf of nothing.
    """
    if group.size == 1:  # the weights as they are, so that plain linear layers may be put off and cast
        return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
    leaves = [*weights, *biases] if leaves is None else leaves
    store = store_here(x)
    x, weights, biases = _same_dtype(x, weights, biases)
    late, start, parameters = _put_off(store, x, [*weights, *biases], leaves)
    return _Columns.apply(x, start, group, cut, late, len(weights), *parameters)


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, start: Any, there: Ranks, cut: bool, late: Any, count: int, *parameters: Tensor | None
    ) -> Any:
        weights, biases = parameters[:count], parameters[count:]
        ctx.there, ctx.cut, ctx.late, ctx.count = there, cut, late, count
        ctx.save_for_backward(x, *weights)
        whole = there.gathered(x) if cut else x
        return tuple(F.linear(whole, w, b) for w, b in zip(weights, biases, strict=True))  # type: ignore[arg-type]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x, *weights), there, cut, count = ctx.saved_tensors, ctx.there, ctx.cut, ctx.count
        needs_x, needed = ctx.needs_input_grad[0], ctx.needs_input_grad[6:]
        flat = [_rows_of(gradient) for gradient in gradients]

        def of_parameter(i: int, whole: Tensor) -> Tensor:
            return flat[i].mT @ _rows_of(whole) if i < count else flat[i - count].sum(0)

        def later(indices: Sequence[int]) -> list[Tensor]:
            whole = there.gathered(x) if cut and indices[0] < count else x
            return [of_parameter(i, whole) for i in indices]

        regathered = there.begin_gathered(x) if cut and any(needed[:count]) else (x, None)
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
        found = [of_parameter(i, whole) if need else None for i, need in enumerate(needed)]
        if ctx.late is not None:
            ctx.late.leave(later)
        if travelling is not None:
            travelling.wait()
        return for_x, None, None, None, None, None, *found


def rows(x: Tensor, weight: Tensor, bias: Tensor | None, group: Ranks, *, cut: bool) -> Tensor:
    """Σ over the ranks of x Wᵀ for each one's columns of W, then f̄ (or ḡ), and the bias once, after the sum.

    If `cut`, the result is this rank's part along the first dimension, and the bias, of which every
    rank has a copy but sees its part only, gets the sum of all ranks' gradients.
    """
    if group.size == 1:
        return F.linear(x, weight, bias)
    leaves, store = [weight, bias], store_here(x)
    x, (weight,), (bias,) = _same_dtype(x, [weight], [bias])
    if cut:
        check_rows(x, group)
        bias = None if bias is None else f(bias, group)
    late, start, parameters = _put_off(store, x, [weight, bias], leaves)
    return _Rows.apply(x, start, group, cut, late, *parameters)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, start: Any, there: Ranks, cut: bool, late: Any, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.there, ctx.cut, ctx.late = there, cut, late
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
        needs_x, needed = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        whole = ctx.there.gathered(gradient) if ctx.cut else gradient
        flat = _rows_of(whole)

        def of_parameter(i: int) -> Tensor:
            return _rows_of(gradient).sum(0) if i else flat.mT @ _rows_of(x)

        for_x = (flat @ weight).view(x.shape) if needs_x else None
        found = [of_parameter(i) if need else None for i, need in enumerate(needed)]
        if ctx.late is not None:
            ctx.late.leave(lambda indices: [of_parameter(i) for i in indices])
        return for_x, None, None, None, None, *found


# --- weights' gradients that wait for W -------------------------------------------------------------------------------


class _Late(NamedTuple):
    """Those parameters of a product whose gradients go to `store`: with their places in its list, weights first."""

    store: Store
    parameters: list[Tensor]
    indices: list[int]

    def leave(self, gradients: Callable[[Sequence[int]], list[Tensor]]) -> None:
        """To be worked out in W. All ranks get there in one order, that of their one schedule: so W may send too."""
        self.store.put(self.parameters, lambda: gradients(self.indices))


def _put_off(
    store: Store | None, x: Tensor, parameters: list[Tensor | None], leaves: Sequence[Tensor | None]
) -> tuple[_Late | None, Tensor | None, list[Tensor | None]]:
    """What waits, something for the graph to begin with if x does not, and the parameters as the graph may know them.

    It must not know those that wait, or their hooks would fire in B. In W a gradient begins at the parameter as it was
    used, so that what stands between it and the leaf, a slice, f or `shared`, has its turn then; nothing of it is kept
    for the backward pass, so that it does not matter that the rest of the graph is gone.
    """
    late = [
        (i, parameter)
        for i, (parameter, leaf) in enumerate(zip(parameters, leaves, strict=True))
        if parameter is not None and leaf is not None and waits(leaf)
    ]
    if store is None or not late:
        return None, None, parameters
    known = list(parameters)
    for i, parameter in late:
        known[i] = parameter.detach()
    start = None if x.requires_grad else torch.empty(0, requires_grad=True)
    return _Late(store, [parameter for _, parameter in late], [i for i, _ in late]), start, known


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
