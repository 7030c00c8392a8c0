"""The contract of `kernels.cross_entropy`: the loss of a language model's head, and the gradients of both factors.

That the logits of all rows are never there is measured: the tensors that a call's operations make and that are alive
at the same time, forward and backward, must be smaller than those logits in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlsys.contracts._attention_memory import Held
from mlsys.contracts._kernels_common import UNIT, draw, exact, result, rounding
from mlsys.contracts.core import Case, Contract, Inputs, Mismatch, Results, Wrong, accepts

SIGNATURE = (
    "cross_entropy(hidden (n, d), weight (v, d), targets (n,) int64, *, ignore_index=-100, reduction='mean', 'sum' or "
    "'none', label_smoothing=0.0, softcap=None) -> loss, float32, () or (n,), with gradients of hidden and weight"
)
BY_CHUNKS = "compute the logits of a few rows at a time, and their gradients before those of the next"


def case(
    n: int, v: int, d: int, *, reduction: str = "mean", ignored: int = 0, smoothing: float = 0.0,
    softcap: float | None = None, scale: float = 1.0, ignore_index: int = -100, dtype: str = "float32",
    special: str = "none",
) -> Case:  # fmt: skip
    """One case; `ignored` rows have no target, and logits are about `scale` apart.

    special: "strided" tensors, rows that are "alike", so that sums only grow, or "memory", which is measured.
    """
    return {
        "n": n, "v": v, "d": d, "reduction": reduction, "ignored": ignored, "smoothing": smoothing,
        "softcap": softcap, "scale": scale, "ignore_index": ignore_index, "dtype": dtype, "special": special,
    }  # fmt: skip


CASES = [
    case(4, 8, 3),
    case(5, 31, 4, reduction="sum"),
    case(5, 31, 4, reduction="none"),
    case(6, 50, 8, ignored=2),
    case(6, 50, 8, ignored=3, reduction="none"),
    case(7, 40, 8, smoothing=0.2),
    case(7, 40, 8, softcap=1.5),
    case(6, 33, 5, smoothing=0.1, softcap=2.0, ignored=1),
    case(6, 20, 4, ignored=2, ignore_index=3),
    case(40, 1000, 6, ignored=5),
    case(3, 40, 8, scale=100.0),  # exp overflows
    case(1, 1, 3),
    case(3, 17, 4, ignored=3, reduction="sum"),  # a loss of 0, and gradients of 0
    case(3, 17, 4, ignored=3),  # a mean of nothing: NaN
    case(130, 3, 2),
    case(12, 300, 16, dtype="bfloat16"),
    case(12, 300, 16, dtype="bfloat16", smoothing=0.1, softcap=2.0, ignored=3),
    case(6, 20, 4, special="strided"),
    case(6, 20, 4, reduction="none", special="strided"),  # and a gradient that sum() or mean() has expanded
    case(0, 7, 4, reduction="sum"),
    case(0, 7, 4, reduction="none"),
    # in 16 bits a sum of 400 rows grows by less and less, and so do errors of the logarithms that go one way
    case(400, 4, 8, dtype="bfloat16", scale=0.05, reduction="sum", special="alike"),
    case(512, 512, 8, special="memory"),
]


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Normal numbers; gradients that arrive are not 1."""
    generator = torch.Generator().manual_seed(seed)
    n, v, d, dtype = case["n"], case["v"], case["d"], getattr(torch, case["dtype"])
    hidden = draw(generator, n, d, dtype="float64") * case["scale"] / math.sqrt(d)
    weight = draw(generator, v, d, dtype="float64")
    targets = torch.randint(v, (n,), generator=generator)
    if case["ignore_index"] >= 0:
        targets[targets == case["ignore_index"]] = 0
    targets[torch.randperm(n, generator=generator)[: case["ignored"]]] = case["ignore_index"]
    shape = (n,) if case["reduction"] == "none" else ()
    upstream = 1.5 + torch.rand(shape, generator=generator)
    if case["special"] == "alike":
        hidden, targets = hidden.abs(), torch.zeros_like(targets)
    hidden, weight, targets, upstream = (x.to(device) for x in (hidden.to(dtype), weight.to(dtype), targets, upstream))
    if case["special"] == "strided":
        hidden, weight = (x.T.contiguous().T for x in (hidden, weight))
        targets = torch.stack([targets, targets], 1)[:, 0]
        upstream = upstream[:1].expand(n) if upstream.ndim else upstream
    return {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "upstream": upstream,
        "ignore_index": case["ignore_index"],
        "reduction": case["reduction"],
        "label_smoothing": case["smoothing"],
        "softcap": case["softcap"],
        "linear_memory": case["special"] == "memory",
    }


def call(impl: Callable[..., Any], inputs: Inputs) -> Results:
    """The loss, and the gradients of hidden and weight."""
    options = {name: inputs[name] for name in ("ignore_index", "reduction", "label_smoothing", "softcap")}
    accepts(impl, 3, options, SIGNATURE)
    # the caller's own memory, so that it shows if it is written to; copies of the results, which might lie there
    hidden, weight = (inputs[name].detach().requires_grad_() for name in ("hidden", "weight"))
    held = Held() if inputs["linear_memory"] else None
    with held or nullcontext():
        loss = impl(hidden, weight, inputs["targets"], **options)
        value = result(loss, tuple(inputs["upstream"].shape), torch.float32).clone()
        if not loss.requires_grad:
            raise Mismatch("the loss has no gradient: it must be differentiable with respect to hidden and weight")
        d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight), inputs["upstream"])
    logits = len(hidden) * len(weight) * 4
    if held and held.peak >= logits:
        raise Mismatch(
            f"tensors of {held.peak / 2**20:.1f} MiB were alive at once, and the logits of all rows are "
            f"{logits / 2**20:.1f} MiB: {BY_CHUNKS}"
        )
    return {
        "loss": value,
        "d_hidden": result(d_hidden, tuple(hidden.shape), hidden.dtype).clone(),
        "d_weight": result(d_weight, tuple(weight.shape), weight.dtype).clone(),
    }


def oracle(inputs: Inputs) -> Mapping[str, np.ndarray]:
    """Row by row in float64, gradients by the formula."""
    hidden, weight, targets = exact(inputs["hidden"]), exact(inputs["weight"]), inputs["targets"].cpu().numpy()
    cap, smooth, v = inputs["softcap"], inputs["label_smoothing"], len(weight)
    losses, d_hidden, d_weight = np.zeros(len(hidden)), np.zeros_like(hidden), np.zeros_like(weight)
    for i, factor in enumerate(_factors(inputs)):
        if targets[i] == inputs["ignore_index"]:
            continue
        u = weight @ hidden[i]
        z = u if cap is None else cap * np.tanh(u / cap)
        q = np.full(v, smooth / v)
        q[targets[i]] += 1 - smooth
        p = np.exp(z - z.max())
        losses[i] = z.max() + math.log(p.sum()) - q @ z
        g = factor * (p / p.sum() - q) * (1.0 if cap is None else 1 - (z / cap) ** 2)
        d_hidden[i] = g @ weight
        d_weight += np.outer(g, hidden[i])
    kept = int((targets != inputs["ignore_index"]).sum())
    total = losses.sum() if inputs["reduction"] == "sum" else losses.sum() / kept if kept else math.nan
    loss = losses if inputs["reduction"] == "none" else np.array(total)
    return {"loss": loss, "d_hidden": d_hidden, "d_weight": d_weight}


def _factors(inputs: Inputs) -> np.ndarray:
    """How much each row counts, in float64."""
    n, upstream = len(inputs["hidden"]), exact(inputs["upstream"])
    kept = int((inputs["targets"] != inputs["ignore_index"]).sum())
    return np.broadcast_to(upstream / max(kept, 1) if inputs["reduction"] == "mean" else upstream, (n,))


def tolerance(inputs: Inputs, name: str, want: np.ndarray) -> float:
    """Of logits that are rounded to the dtype, and of float32 sums; carried on to what is computed of them."""
    hidden, weight = exact(inputs["hidden"]), exact(inputs["weight"])
    if not len(hidden):
        return 0.0
    dtype = inputs["hidden"].dtype
    narrow = torch.finfo(dtype).eps / 2
    products = float((np.abs(hidden) @ np.abs(weight).T).max())
    largest = float(np.abs(hidden @ weight.T).max())
    logit = narrow * largest * 1.01 + UNIT * (4 + math.sqrt(hidden.shape[1])) * products
    row = 2 * logit + UNIT * (8 + math.sqrt(len(weight))) * (1 + largest + math.log(len(weight)))
    if name == "loss":
        return row * (len(hidden) if inputs["reduction"] == "sum" else 1)
    # an error of p is p times that of the exponent; then G is rounded to the dtype, and so are sums of its products
    factors = np.abs(_factors(inputs))
    each = 2 * (row + 2 * narrow)
    if name == "d_hidden":
        return each * float(factors.max()) * float(np.abs(weight).max()) + 2 * rounding(dtype, want)
    carried = float((factors[:, None] * np.abs(hidden)).sum(0).max())
    return each * carried + 2 * rounding(dtype, want)


# --- wrong variants ---------------------------------------------------------------------------------------------------


class _Changed(torch.autograd.Function):
    """The identity, with another gradient than it has: upstream² / upstream times a factor, or the factor alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, alone: bool) -> Tensor:
        ctx.factor, ctx.alone = factor, alone
        return x.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return (torch.full_like(upstream, ctx.factor) if ctx.alone else upstream * ctx.factor), None, None


class _Logits(torch.autograd.Function):
    """hidden · weightᵀ, and backward what a loop over rows may do wrong: "narrow" sums, or gradients "over hidden"."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, mistake: str) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.mistake = mistake
        return hidden @ weight.t()

    @staticmethod
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight = ctx.saved_tensors
        d_hidden = gradients @ weight
        if ctx.mistake == "narrow":
            d_weight = torch.zeros_like(weight)
            for row, gradient in zip(hidden, gradients, strict=True):
                d_weight += torch.outer(gradient, row)
            return d_hidden, d_weight, None
        d_weight = gradients.t() @ hidden
        return hidden.data.copy_(d_hidden), d_weight, None


def _loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    ignores: bool = True,
    counts_all: bool = False,
    mean_of_chunks: bool = False,
    smooths: bool = True,
    others_only: bool = False,
    caps: bool = True,
    cap_slope: bool = True,
    no_max: bool = False,
    upstream: bool = True,
    scaled: bool = True,
    last_chunk_only: bool = False,
    no_target: bool = False,
    nothing_is_zero: bool = False,
    fixed_index: bool = False,
    as_if_contiguous: bool = False,
    backward: str = "",
) -> Tensor:
    """Loss and gradients in plain torch, with one knob for each mistake."""
    half = (len(hidden) + 1) // 2 + 1
    if as_if_contiguous:
        hidden, weight = (x if x.is_contiguous() else x.T.reshape(x.shape) for x in (hidden, weight))
    if backward:
        logits = _Logits.apply(hidden, weight, backward).float()
    elif last_chunk_only:
        logits = torch.cat([hidden[:half] @ weight.detach().t(), hidden[half:] @ weight.t()]).float()
    else:
        logits = (hidden @ weight.t()).float()
    if softcap is not None and caps:
        capped = softcap * torch.tanh(logits / softcap)
        logits = capped if cap_slope else logits + (capped - logits).detach()
    kept = targets != (-100 if fixed_index else ignore_index)
    at = torch.where(kept, targets, 0)[:, None]
    lse = logits.exp().sum(1).log() if no_max else logits.logsumexp(1)
    at_target = logits.gather(1, at).squeeze(1)
    at_target = at_target.detach() if no_target else at_target
    smooth, v = label_smoothing if smooths else 0.0, logits.shape[1]
    spread = (logits.sum(1) - at_target) / max(v - 1, 1) if others_only else logits.mean(1)
    losses = lse - (1 - smooth) * at_target - (smooth * spread if smooth else 0.0)
    losses = torch.where(kept, losses, 0.0) if ignores else losses
    count = len(kept) if counts_all else max(int(kept.sum()), int(nothing_is_zero))
    if reduction == "none":
        loss = losses
    elif reduction == "sum":
        loss = losses.sum()
    elif mean_of_chunks and len(losses) > half:
        parts = ((losses[:half], kept[:half]), (losses[half:], kept[half:]))
        loss = torch.stack([part.sum() / mine.sum() for part, mine in parts]).mean()
    else:
        loss = losses.sum() / count if count else losses.sum() * math.nan
    if not upstream:
        loss = _Changed.apply(loss, 1.0, True)
    if not scaled and reduction == "mean":
        loss = _Changed.apply(loss, float(count), False)
    return loss


def _wrong(hint: str, **knobs: Any) -> Wrong:
    def impl(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
        return _loss(hidden, weight, targets, **options, **knobs)

    return Wrong(impl, hint)


WRONG = {
    "counts_ignored": _wrong("a mean is over the rows that are not ignored: divide by their number", counts_all=True),
    "nothing_ignored": _wrong("rows whose target is ignore_index have no loss and no gradient", ignores=False),
    "mean_of_means": _wrong(
        "the mean of the chunks' means is not the mean: count the rows of all chunks first", mean_of_chunks=True
    ),
    "no_smoothing": _wrong("label smoothing: q = (1 − ε) at the target, and ε / V everywhere", smooths=False),
    "smooths_others": _wrong("ε / V for each word of the vocabulary, the target too", others_only=True),
    "no_softcap": _wrong("softcap · tanh(logits / softcap) before the softmax", caps=False),
    "no_slope": _wrong("the gradient goes through tanh: times 1 − (z / softcap)²", cap_slope=False),
    "no_max": _wrong("subtract the maximum before exp, which overflows above 88 in float32", no_max=True),
    "ignores_upstream": _wrong("multiply the gradients by the one that arrives", upstream=False),
    "sum_of_gradients": _wrong(
        "the mean's gradients have the factor 1 / number of rows, as the loss has", scaled=False
    ),
    "last_chunk": _wrong("weight's gradient is the sum over all chunks: add, do not overwrite", last_chunk_only=True),
    "softmax_only": _wrong("the gradient of the logits is softmax − q: subtract at the target", no_target=True),
    "zero_for_nothing": _wrong(
        "a mean over no rows is 0 / 0 = NaN, as in torch: do not clamp the number of rows to 1", nothing_is_zero=True
    ),
    "ignore_index_fixed": _wrong(
        "compare the targets with `ignore_index`, whatever it is: −100 is its default", fixed_index=True
    ),
    "strides_ignored": _wrong(
        "hidden and weight may be views with strides of their own: call contiguous() before a kernel gets their memory",
        as_if_contiguous=True,
    ),
    "overwrites_hidden": _wrong(
        "gradients may be written over the logits, which are yours; hidden is the caller's: give its gradient memory "
        "of its own",
        backward="over hidden",
    ),
    "narrow_sums": _wrong(
        "weight's gradient is a sum over all rows: keep it in float32 to the end, since in bfloat16 it stops growing",
        backward="narrow",
    ),
    "materialises_logits": _wrong(BY_CHUNKS),
}


def contract(name: str, reference: Callable[..., Any]) -> Contract:
    """The contract under this name, which `mlsys.contracts.kernels` gives it."""
    return Contract(name, SIGNATURE, reference, CASES, inputs, call, oracle, tolerance, WRONG)
