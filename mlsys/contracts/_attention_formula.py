"""The formula of attention in float64, with every option, and by how much an honest implementation may miss it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlsys.contracts.core import Inputs, Mismatch, Results, difference, numeric

ROOM = 4.0  # how many times the error of the rounded formula is allowed
DRAWN, DRAWS = 4096, 64  # small cases are drawn again, until there are as many results or as many draws
OPTIONS = ("causal", "window", "mask", "alibi", "softcap", "sinks", "scale")
LEAVES = ("q", "k", "v", "sinks")
SINGLE = 32 * torch.finfo(torch.float32).eps  # an error that steps in float32 leave, as a part of the largest output


def sizes(
    t: int,
    s: int | None = None,
    *,
    b: int = 1,
    h: int = 1,
    h_kv: int | None = None,
    d: int = 8,
    dv: int | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """What every case of attention begins with; what is left out takes the plainest value."""
    heads = {"b": b, "h": h, "h_kv": h_kv or h}
    return heads | {"t": t, "s": t if s is None else s, "d": d, "dv": dv or d, "dtype": dtype}


def oracle(inputs: Inputs) -> Mapping[str, np.ndarray]:
    """The formula in float64, with gradients by autograd through it: what is given a gradient decides which."""
    backward = "grad_out" in inputs
    leaves = {
        name: inputs[name].detach().double().cpu().requires_grad_(backward)
        for name in LEAVES
        if inputs.get(name) is not None
    }
    with torch.enable_grad():
        out, lse = formula(**{**_options(inputs), **leaves})
    results = {"out": out} | ({"lse": lse} if inputs.get("return_lse") else {})
    found = {name: x.detach().numpy() for name, x in results.items()}
    if backward:
        weights = {name: inputs[f"grad_{name}"].double().cpu() for name in results}
        found |= {name: grad.numpy() for name, grad in gradients(results, leaves, weights).items()}
    return found


def _options(inputs: Inputs) -> dict[str, Any]:
    return {name: inputs[name] for name in OPTIONS if name in inputs}


def formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    mask: Tensor | None = None,
    alibi: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    rounded: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; `rounded` is applied to the result of each step. Sinks are (h,) or (b, h)."""
    h, t, d = q.shape[1:]
    h_kv, s = k.shape[1:3]
    reads = torch.tensor([head * h_kv // h for head in range(h)])
    q = rounded(q * (1 / math.sqrt(d) if scale is None else scale))
    scores = rounded(torch.einsum("bhtd,bhsd->bhts", q, rounded(k)[:, reads]))
    ahead = torch.arange(s)[None, :] - (torch.arange(t)[:, None] + s - t)  # how far key j is after query i
    if softcap is not None:
        scores = rounded(torch.tanh(scores / softcap) * softcap)
    if alibi is not None:
        scores = rounded(scores - alibi.double().cpu()[:, None, None] * ahead.abs())
    visible = torch.ones(t, s, dtype=torch.bool)
    for hidden in (causal & (ahead > 0), window[0] >= 0 and ahead < -window[0], window[1] >= 0 and ahead > window[1]):
        visible = visible & ~torch.as_tensor(hidden)
    visible = visible if mask is None else visible & mask.cpu()
    # exp(score − largest visible score), and 0 for a row that sees nothing
    top = torch.where(visible, scores, -math.inf).amax(-1, keepdim=True) if s else scores.new_full((1, 1, t, 1), -1e300)
    sink = None if sinks is None else sinks[..., None, None]
    top = top.clamp(min=-1e300).detach() if sink is None else torch.maximum(top, sink).detach()
    weights = torch.where(visible, torch.exp(torch.where(visible, scores - top, 0.0)), 0.0)
    total = weights.sum(-1, keepdim=True)
    total = total if sink is None else total + torch.exp(sink - top)
    some = torch.where(total > 0, total, 1.0)
    lse = torch.where(total > 0, some.log() + top, -math.inf)[..., 0]
    weights = rounded(weights / some)
    return rounded(torch.einsum("bhts,bhse->bhte", weights, rounded(v)[:, reads])), lse.expand(q.shape[:-1])


class _Rounded(torch.autograd.Function):
    """x, and backward its gradient, each element off by a random part of a rounding unit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unit: float, generator: torch.Generator) -> Tensor:
        ctx.unit, ctx.generator = unit, generator
        return x * (1 + unit * _uniform(x, generator))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * (1 + ctx.unit * _uniform(grads[0], ctx.generator)), None, None


def _uniform(x: Tensor, generator: torch.Generator) -> Tensor:
    """Between −1 and 1, in the shape of x."""
    return torch.rand(x.shape, generator=generator, dtype=x.dtype).mul_(2).sub_(1)


def rounding_error(inputs: Inputs, name: str, want: np.ndarray) -> float:
    """The largest error of the formula over many elements if each step is rounded to the dtype of the inputs."""
    draws = max(1, min(DRAWS, DRAWN // want.size))
    unit = torch.finfo(inputs["q"].dtype).eps / 2
    generator = torch.Generator().manual_seed(0)
    leaf = name.removesuffix(".grad") if name.endswith(".grad") else None
    options = _options(inputs)
    b, h, t, _ = inputs["q"].shape
    if options.get("mask") is not None:
        options["mask"] = options["mask"].expand(b, h, t, inputs["k"].shape[2]).repeat(draws, 1, 1, 1)
    leaves = {x: inputs[x].detach().double().cpu().repeat(draws, 1, 1, 1) for x in "qkv"}
    if options.get("sinks") is not None:
        leaves["sinks"] = options["sinks"].detach().double().cpu().repeat(draws * b, 1)  # one for each, to tell apart
    if leaf:
        leaves[leaf].requires_grad_()
    with torch.enable_grad():
        out, lse = formula(**{**options, **leaves}, rounded=lambda x: _Rounded.apply(x, unit, generator))
    got = lse if name == "lse" else out
    if leaf:
        results = {"out": out} | ({"lse": lse} if inputs.get("return_lse") and lse.requires_grad else {})
        weights = {x: inputs[f"grad_{x}"].double().cpu().repeat(draws, *[1] * (results[x].ndim - 1)) for x in results}
        got = gradients(results, {leaf: leaves[leaf]}, weights)[name]
    got = got.detach().unflatten(0, (draws, -1))
    got = (got.sum(1) if leaf == "sinks" else got).flatten(1)
    finite = np.isfinite(want)
    return float(np.abs(got.numpy()[:, finite.ravel()] - want[finite]).max(initial=0.0))


def tolerance(inputs: Inputs, name: str, want: np.ndarray) -> float:
    """ROOM × the error of the rounded formula, and what sums of n terms add in the dtype that hardware sums in."""
    if not want.size:
        return 0.0
    terms = sum(inputs["q"].shape[2:]) + inputs["k"].shape[2]
    summed = torch.finfo(torch.promote_types(inputs["q"].dtype, torch.float32)).eps
    largest = max(float(np.abs(want[np.isfinite(want)]).max(initial=0.0)), 1e-3)
    return ROOM * rounding_error(inputs, name, want) + 4 * math.sqrt(terms) * summed * largest


def compare(inputs: Inputs, got: np.ndarray, want: np.ndarray, tolerance: float) -> str | None:
    """As numbers; and what is wrong where the digits that are printed are the same."""
    problem = numeric(inputs, got, want, tolerance)
    if not problem or got.shape != want.shape or inputs["q"].dtype != torch.float64:
        return problem
    if difference(got, want).max(initial=0.0) > SINGLE * np.abs(want).max(initial=0.0):
        return problem
    return (
        f"{problem}: that is as exact as float32, but the inputs are float64, and so must be every step: "
        "compute in the wider of their dtype and float32"
    )


# --- calling ----------------------------------------------------------------------------------------------------------


def gradients(results: Mapping[str, Tensor], leaves: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Results:
    """The gradients of Σ result · weight, by name of the leaf; Mismatch if there are none to be had."""
    for name, result in results.items():
        if result.requires_grad is False:
            what = "the output" if name == "out" else name
            raise Mismatch(f"{what} has no gradient: it was computed outside autograd (detach, no_grad or NumPy?)")
        if result.shape != weights[name].shape:
            raise Mismatch(f"{name}: shape {tuple(result.shape)}, expected {tuple(weights[name].shape)}")
    grads = torch.autograd.grad(
        list(results.values()), list(leaves.values()), [weights[name] for name in results], allow_unused=True
    )
    missing = [name for name, grad in zip(leaves, grads, strict=True) if grad is None]
    if missing:
        raise Mismatch(f"no gradient reaches {', '.join(missing)}")
    return {f"{name}.grad": grad for name, grad in zip(leaves, grads, strict=True)}
