"""The loss of a language model without its logits: a chunk of rows at a time, with the gradients at once.

    u = hidden · weightᵀ                       (n × V: with V = 131072, 32 times as large as hidden at d = 4096)
    z = u, or softcap · tanh(u / softcap)
    loss_i = log Σ_v exp z_iv − Σ_v q_iv z_iv,     q_iv = (1 − ε) [v = target_i] + ε / V

A head computed as two operations keeps all of u, what log-softmax makes of it, and their gradients: several n × V. But
a row of u is wanted for a moment only. Its loss needs itself alone, and so does its gradient,

    ∂loss_i / ∂z_iv = softmax(z_i)_v − q_iv         (times 1 − (z / softcap)², with a softcap)

which depends on nothing that comes later but a factor: how much row i counts. For a mean that is known beforehand. So
the forward pass takes a few rows of hidden, computes their logits, writes the gradients over them, multiplies those
with weight and with hidden, and forgets them:

              V                      G = gradient of the chunk's logits
    hidden ┌──────┐                  d hidden[chunk] = G · weight
     chunk │▒▒▒▒▒▒│ u, then G        d weight       += Gᵀ · hidden[chunk]
           │      │
           └──────┘ never there

The backward pass only multiplies by the factor that arrives. Where each row may get its own, reduction="none", the
gradients have to wait for it: the backward pass then computes the logits again.

`weight`'s gradient is a sum over chunks. It is kept in float32, since a sum of many terms in bfloat16 loses the small
ones; wide_sum=False keeps it in the dtype of weight, which halves the largest buffer of all.

Cost:
    6 · n d V FLOPs for loss and gradients, as without chunks; 8 · n d V with reduction="none".

Memory:
    chunk × V logits; the gradients of hidden and weight, which one has anyway, that of weight in float32. By default a
    chunk has about n · d / V rows, so that its logits are about as large as hidden.

Papers:
    Hsu et al. 2024, arXiv:2410.10989 (Liger: section 3.2, FusedLinearCrossEntropy, gradients in the forward pass).
    Wijmans et al. 2024, arXiv:2411.09009 (Cut Your Losses: not even a chunk of logits; table 1: what each way needs).
    Milakov & Gimelshein 2018, arXiv:1805.02867 (the online normaliser, in the kernel's loss).
    Szegedy et al. 2015, arXiv:1512.00567 (section 7: label smoothing).

See also:
    `mlsys.kernels.cross_entropy_triton` (the loss of a chunk in one kernel), `mlsys.kernels.softmax`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mlsys.kernels._inputs import differentiable_once, like, tensor
from mlsys.kernels._variants import CallableModule

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class Options:
    """What the loss of a row depends on, beside its logits and its target."""

    ignore_index: int
    label_smoothing: float
    softcap: float | None


# (logits, targets, factors or None, options) → losses; if there are factors, logits become their gradients times those
Losses = Callable[[Tensor, Tensor, Tensor | None, Options], Tensor]


def cross_entropy(
    hidden: Float[Tensor, "*rows d"],
    weight: Float[Tensor, "v d"],
    targets: Int[Tensor, "*rows"],
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    chunk: int | None = None,
    wide_sum: bool = True,
) -> Tensor:
    """The cross-entropy of softmax(hidden · weightᵀ) at `targets`, float32, without ever holding all logits.

    hidden, weight:  float32 or bfloat16, both the same; the logits are of their dtype, what follows is float32.
    targets:         int64, one for each row of hidden, from 0 to v − 1, or `ignore_index`: no loss, no gradient.
    reduction:       "mean" over the rows that are not ignored (NaN if there are none), "sum", or "none".
    label_smoothing: ε of the formula. softcap: of the formula, or None.
    chunk:           rows whose logits are there at a time; by default `chunk_rows`.
    wide_sum:        whether weight's gradient is summed in float32.
    The gradients of hidden and weight are computed here, in the forward pass, and given away once: a second backward
    pass through the same loss is a RuntimeError. TypeError, ValueError naming the argument.
    """
    rows, marks, options = check_inputs(
        hidden, weight, targets, ignore_index, reduction, label_smoothing, softcap, chunk, wide_sum
    )
    step = chunk or chunk_rows(len(rows), *weight.shape)
    losses: Tensor = ChunkedLoss.apply(rows, weight, marks, options, reduction, step, wide_sum, losses_of)
    return losses.view(targets.shape) if reduction == "none" else losses


def chunk_rows(rows: int, vocabulary: int, width: int) -> int:
    """How many rows a chunk has by default: as many as make its logits about as large as hidden, a power of 2."""
    return 1 << max(math.ceil(rows * width / vocabulary) - 1, 0).bit_length()


def losses_of(logits: Tensor, targets: Tensor, factors: Tensor | None, options: Options) -> Tensor:
    """The loss of each row, float32; if there are factors, logits become their gradients times those.

    logits: (rows, v), overwritten then. targets, factors: (rows,); the factor of an ignored row is taken as 0.
    """
    cap, smooth, v = options.softcap, options.label_smoothing, logits.shape[1]
    kept = targets != options.ignore_index
    at = targets.where(kept, 0)[:, None]
    z = logits.float() if cap is None else cap * torch.tanh(logits.float() / cap)
    lse = torch.logsumexp(z, 1, keepdim=True)
    expected = (1 - smooth) * z.gather(1, at) + (smooth * z.mean(1, keepdim=True) if smooth else 0.0)
    losses = (lse - expected).squeeze(1).where(kept, 0.0)
    if factors is not None:
        slope = None if cap is None else 1 - (z / cap) ** 2
        gradient = (z - lse).exp_().sub_(smooth / v)
        gradient.scatter_add_(1, at, torch.full_like(lse, smooth - 1))
        gradient *= factors.where(kept, 0.0)[:, None]
        # an ignored row has no gradient, not NaN · 0, whatever its logits are
        logits.copy_((gradient if slope is None else gradient * slope).masked_fill_(~kept[:, None], 0.0))
    return losses


class ChunkedLoss(torch.autograd.Function):
    """The loop over chunks, for any way to compute the losses of one."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, options: Options, reduction: str, step: int,
        wide_sum: bool, losses_of: Losses,
    ) -> Tensor:  # fmt: skip
        kept = targets != options.ignore_index
        scale = 1 / kept.sum() if reduction == "mean" else torch.ones((), device=hidden.device)
        wants = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        at_once = any(wants) and reduction != "none"
        factors = scale.expand(len(hidden)).float() if at_once else None
        losses, grads = chunks(hidden, weight, targets, factors, options, step, wide_sum, wants, losses_of)
        ctx.once = grads if at_once else None
        ctx.again = (options, step, wide_sum, wants, losses_of)
        if reduction == "none":
            ctx.save_for_backward(hidden, weight, targets)
            return losses
        ctx.dtype = hidden.dtype
        # nothing kept and a mean: 0 · ∞ is NaN, as a mean of nothing is
        return losses.sum() * scale

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        differentiable_once("cross_entropy", "torch.nn.functional.cross_entropy")
        options, step, wide_sum, wants, losses_of = ctx.again
        if ctx.once is None:
            if not ctx.saved_tensors:
                raise RuntimeError(
                    "this loss has been differentiated before: its gradients were computed in the forward pass and "
                    "given away. Call cross_entropy again, rather than backward(retain_graph=True)"
                )
            hidden, weight, targets = ctx.saved_tensors
            factors = upstream.float()
            _, grads = chunks(hidden, weight, targets, factors, options, step, wide_sum, wants, losses_of)
            dtype = hidden.dtype
        else:
            (grads, ctx.once), dtype = (ctx.once, None), ctx.dtype
            for grad in grads:
                if grad is not None:
                    grad *= upstream  # in place: a copy of weight's gradient may be what does not fit
        d_hidden, d_weight = grads
        return d_hidden, None if d_weight is None else d_weight.to(dtype), *[None] * 6


def chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, factors: Tensor | None, options: Options, step: int,
    wide_sum: bool, wants: tuple[bool, bool], losses_of: Losses,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:  # fmt: skip
    """The loss of each row, and the wanted gradients of the sum of losses times factors, if there are factors."""
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    d_hidden = torch.empty_like(hidden) if factors is not None and wants[0] else None
    wide = torch.float32 if wide_sum else weight.dtype
    d_weight = torch.zeros_like(weight, dtype=wide) if factors is not None and wants[1] else None
    for start in range(0, len(hidden), step):
        part = slice(start, start + step)
        some, logits = hidden[part], hidden[part] @ weight.t()
        losses[part] = losses_of(logits, targets[part], None if factors is None else factors[part], options)
        if d_hidden is not None:
            torch.mm(logits, weight, out=d_hidden[part])
        if d_weight is not None:
            add_product(d_weight, logits, some)
    return losses, (d_hidden, d_weight)


def add_product(total: Tensor, gradients: Tensor, some: Tensor, block: int = 8192) -> None:
    """To the total, add gradientsᵀ · some; where the total is of a wider dtype, some rows of it at a time."""
    if total.dtype == some.dtype:
        total.addmm_(gradients.t(), some)
        return
    for start in range(0, len(total), block):  # the product in the narrow dtype is a temporary: not one of all of V
        part = slice(start, start + block)
        total[part] += gradients[:, part].t() @ some


def check_inputs(
    hidden: Any, weight: Any, targets: Any, ignore_index: Any, reduction: Any, label_smoothing: Any, softcap: Any,
    chunk: Any, wide_sum: Any,
) -> tuple[Tensor, Tensor, Options]:  # fmt: skip
    """Rows of hidden and their targets, and the options. TypeError or ValueError naming what is wrong."""
    hidden = tensor("hidden", hidden)
    if hidden.ndim == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden must have at least one number in a row, got shape {tuple(hidden.shape)}")
    weight = tensor("weight", weight, shape="(v, d)")
    like("weight", weight, hidden, (weight.shape[0], hidden.shape[-1]), "hidden")
    if not len(weight):
        raise ValueError("weight must have at least one row, one for each word of the vocabulary: got none")
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
        got = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"targets must be a tensor of torch.int64, got {got}: convert it")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets must have the shape {tuple(hidden.shape[:-1])}, got {tuple(targets.shape)}")
    if targets.device != hidden.device:
        raise ValueError(f"targets must be on hidden's device {hidden.device}, got {targets.device}: move it")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
    wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= len(weight)))]
    if wrong.numel():
        raise ValueError(
            f"targets must be from 0 to {len(weight) - 1}, or ignore_index={ignore_index}, got {int(wrong[0])}"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    if (
        isinstance(label_smoothing, bool)
        or not isinstance(label_smoothing, int | float)
        or not 0 <= label_smoothing < 1
    ):
        raise ValueError(f"label_smoothing must be at least 0 and less than 1, got {label_smoothing!r}")
    if softcap is not None and (isinstance(softcap, bool) or not isinstance(softcap, int | float) or not softcap > 0):
        raise ValueError(f"softcap must be a number above 0, or None, got {softcap!r}")
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"chunk must be a number of rows, at least 1, or None, got {chunk!r}")
    if not isinstance(wide_sum, bool):
        raise TypeError(f"wide_sum must be True or False, got {wide_sum!r}")
    options = Options(ignore_index, float(label_smoothing), None if softcap is None else float(softcap))
    return hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), options


def peak_bytes(rows: int, vocabulary: int, width: int, itemsize: int, chunk: int | None = None) -> dict[str, int]:
    """What one holds at most beside hidden and weight, in bytes: by chunks, and by two operations as torch has them.

    "chunked": a chunk's logits and gradients. "whole": all logits, their log-softmax and its gradient in float32, as
    `F.cross_entropy(logits.float(), targets)` keeps them, and the logits' gradient in their own dtype. "gradients" of
    hidden and weight come to both.
    """
    step = chunk or chunk_rows(rows, vocabulary, width)
    return {
        "chunked": step * vocabulary * itemsize,
        "whole": rows * vocabulary * (3 * 4 + itemsize),
        "gradients": (rows + vocabulary) * width * itemsize,
    }


sys.modules[__name__].__class__ = CallableModule
