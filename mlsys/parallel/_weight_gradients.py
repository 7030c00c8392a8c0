"""The gradient of a linear layer's weights, put off: the backward pass gives that of the input, the other comes later.

For y = x Wᵀ + b the backward pass gets g = ∂L/∂y and works out two products that have nothing to do with each other:

    ∂L/∂x = g W          what the stage before waits for: "B"
    ∂L/∂W = gᵀ x         nobody waits for it before the optimizer: "W", with ∂L/∂b = the sum of g over its rows

Within `deferring(store)` a call of `F.linear`, by `nn.Linear` or by hand, is an autograd function whose backward pass
returns the first and leaves (x, g) in the store; `store.run()` works out the second. It is added to `.grad` by the
autograd engine itself, so hooks on a parameter fire as ever, only later. All other gradients (norms, embedding rows,
convolutions, `x @ W`, `nn.MultiheadAttention`) come with B: they are right, and not put off. So are those of a weight
that is itself computed, as by a parametrization: only leaves can wait; and those of layers under activation
checkpointing.

An autograd function of its own, as those of tensor-parallel layers, asks `store_here(x)` before it is applied where
to leave the second product, and `put`s it there in its backward pass.

A mode and no change of the module: whoever calls the same module outside of it, or has a graph of it from before, is
not concerned.

Memory:
    x is kept by the forward pass anyway; between B and W it is joined by g. All else of the graph goes with B.
    W has the gradients of all the stage's weights beside `.grad` for a moment, where a backward pass has one after the
    other: they go to autograd together, so that a weight that is used twice has its hooks called once, with the sum.

See also:
    `mlsys.parallel.pipeline` (who puts off), `mlsys.parallel.schedules` (what for), `mlsys.parallel._tensor_products`
    (the products of tensor parallelism).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary


class Store:
    """What the weights' gradients of one microbatch will be made of, from B until W."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Sequence[Tensor], Callable[[], Sequence[Tensor]]]] = []

    def put(self, weights: Sequence[Tensor], gradients: Callable[[], Sequence[Tensor]]) -> None:
        """Leave `gradients`, of these weights, until W; what it keeps alive is freed as soon as it has run."""
        self._waiting.append((weights, gradients))

    def run(self) -> None:
        """Add all of them to `.grad`, and be empty. Always in the same order, the last `put` first: some send."""
        weights: list[Tensor] = []
        found: list[Tensor] = []
        with torch.no_grad():
            while self._waiting:
                some, gradients = self._waiting.pop()
                found += [g.to(weight.dtype) for weight, g in zip(some, gradients(), strict=True)]
                weights += some
                del gradients  # and with it what it has kept, before the next
        if weights:  # a leaf that is named twice gets the sum, once
            torch.autograd.backward(weights, found)

    def __len__(self) -> int:
        """How many gradients wait."""
        return sum(len(weights) for weights, _ in self._waiting)


def store_here(x: Tensor) -> Store | None:
    """The store of the `deferring` block in which x is used; None outside, or where nothing can be put off."""
    if has_torch_function_unary(x):  # a mode is active, to which this call goes as one of torch's own would
        return handle_torch_function(store_here, (x,), x)
    return None


class deferring(TorchFunctionMode):
    """Within the block, linear layers of a forward pass will leave their weights' gradients to `store`.

    Where somebody else keeps what the backward pass needs, as activation checkpointing does, nothing is put off: what
    is computed again there must be the same, and autograd runs without modes.
    """

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.linear, store_here) and torch.is_grad_enabled() and not _kept_elsewhere():
            return self.store if func is store_here else _linear(self.store, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(store: Store, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, with its argument names, as far as it can wait."""
    if not waits(weight) or weight.ndim != 2:
        return F.linear(input, weight, bias)
    if bias is not None and bias.requires_grad and not bias.is_leaf:
        return _linear(store, input, weight) + bias
    # The graph must not know the weights, or their hooks would fire in B, without a gradient. It must begin somewhere.
    start = None if input.requires_grad else torch.empty(0, requires_grad=True)
    return _Linear.apply(input, start, (store, weight, bias))


def _kept_elsewhere() -> bool:
    """Whether `torch.autograd.graph.saved_tensors_hooks` are at work, which checkpointing and offloading use."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def waits(parameter: Tensor) -> bool:
    """Whether its gradient can be put off: that of a leaf, to which nothing but `.grad` belongs."""
    return parameter.is_leaf and parameter.requires_grad and type(parameter) in (Tensor, torch.nn.Parameter)


class _Linear(torch.autograd.Function):
    """The linear layer whose backward pass knows only its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, start: Tensor | None, later: tuple[Store, Tensor, Tensor | None]) -> Tensor:
        ctx.store, ctx.weight, ctx.bias = later
        y = F.linear(x, ctx.weight, ctx.bias)
        ctx.save_for_backward(x.to(y.dtype), ctx.weight)  # under autocast that is the x which was multiplied
        ctx.x_dtype = x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        rows_of_x, rows = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        if ctx.bias is not None and ctx.bias.requires_grad:
            ctx.store.put([ctx.weight, ctx.bias], lambda: (rows.T @ rows_of_x, rows.sum(0)))
        else:
            ctx.store.put([ctx.weight], lambda: (rows.T @ rows_of_x,))
        return (g @ weight.to(g.dtype)).to(ctx.x_dtype) if ctx.needs_input_grad[0] else None, None, None
