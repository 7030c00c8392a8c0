"""The contract of `attention.merge`: two averages with their log-sum-exps become the one over all keys.

The oracle works in float64 on the parts themselves: what came before, and how it was rounded, is not this
function's business. Parts are drawn as numbers, not computed by an attention; any are possible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlsys.attention.merge import merge
from mlsys.contracts import _attention_formula as formula
from mlsys.contracts.core import Case, Contract, Inputs, Mismatch, Results, Wrong, accepts

SIGNATURE = "merge(out_a, lse_a, out_b, lse_b) -> (out (b, h, t, dv), lse (b, h, t))"
ARGUMENTS = ("out_a", "lse_a", "out_b", "lse_b")


def case(
    t: int = 5,
    *,
    b: int = 1,
    h: int = 2,
    dv: int = 8,
    dtype: str = "float32",
    lse: str = "near",
    empty: str = "none",
    backward: bool = False,
) -> Case:
    """One case; `lse`: near 0, far from each other, or large; `empty`: which part has rows without keys."""
    return {"b": b, "h": h, "t": t, "dv": dv, "dtype": dtype, "lse": lse, "empty": empty, "backward": backward}


CASES = [
    case(),
    case(7, b=2, h=3, dv=4, lse="far"),  # one part outweighs the other
    case(lse="large"),  # exp overflows unless the maximum is subtracted
    case(lse="small"),  # or underflows, and both weights are 0
    case(empty="a"),
    case(empty="b"),
    case(empty="both"),
    case(empty="nan"),  # what stands in the output of no keys counts for nothing
    case(0),
    case(9, dtype="bfloat16", lse="far"),
    case(9, dtype="float64"),
    case(backward=True),
    case(6, b=2, dtype="float64", lse="far", backward=True),
    case(lse="large", backward=True),
    case(empty="both", backward=True),
]


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Two parts; the log-sum-exps in float32 at least, as attention gives them."""
    generator = torch.Generator().manual_seed(seed)
    shape = case["b"], case["h"], case["t"], case["dv"]
    dtype = getattr(torch, case["dtype"])

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    parts = {"out_a": draw(*shape), "lse_a": draw(*shape[:-1]), "out_b": draw(*shape), "lse_b": draw(*shape[:-1])}
    if case["lse"] == "far":
        parts["lse_a"] *= 6
    if case["lse"] in ("large", "small"):
        for name in ("lse_a", "lse_b"):
            parts[name] += 300 if case["lse"] == "large" else -300
    if case["empty"] != "none":
        rows = {"a": ("a",), "b": ("b",), "both": ("a", "b"), "nan": ("a",)}[case["empty"]]
        for row, part in enumerate(rows):  # a row of one, a row of the other, a row of both
            parts[f"lse_{part}"][:, :, [row, 3]] = -math.inf
            parts[f"out_{part}"][:, :, [row, 3]] = math.nan if case["empty"] == "nan" else 0.0
    wide = torch.promote_types(dtype, torch.float32)
    named: Inputs = {name: x.to(wide if "lse" in name else dtype).to(device) for name, x in parts.items()}
    if case["backward"]:
        named["grad_out"] = draw(*shape).to(dtype).to(device)
        named["grad_lse"] = draw(*shape[:-1]).to(wide).to(device)
    return named


def call(impl: Callable[..., Any], inputs: Inputs) -> Results:
    """Both results and, where asked for, all four gradients."""
    accepts(impl, 4, {}, SIGNATURE)
    parts = {name: inputs[name].requires_grad_("grad_out" in inputs) for name in ARGUMENTS}
    got = impl(*parts.values())
    if not isinstance(got, tuple | list) or len(got) != 2 or not all(isinstance(x, Tensor) for x in got):
        raise Mismatch(f"returned {type(got).__name__}, expected two tensors (out, lse)")
    out, lse = got
    if (out.shape, lse.shape) == (inputs["lse_a"].shape, inputs["out_a"].shape):
        raise Mismatch("returned (lse, out), expected (out, lse): exchange the two")
    for name, x, like in (("out", out, inputs["out_a"]), ("lse", lse, inputs["lse_a"])):
        if x.dtype != like.dtype:
            raise Mismatch(f"{name} is {x.dtype}, but that of the parts is {like.dtype}: return the same")
    results: Results = {"out": out.detach(), "lse": lse.detach()}
    if "grad_out" in inputs:
        weights = {name: inputs[f"grad_{name}"] for name in ("out", "lse")}
        results |= formula.gradients({"out": out, "lse": lse}, parts, weights)
    for x in parts.values():
        x.requires_grad_(False)
    return results


def oracle(inputs: Inputs) -> Mapping[str, np.ndarray]:
    """The weights as a softmax of two logits in float64; the gradients by hand, from its Jacobian."""
    a, la, b, lb = (inputs[name].detach().double().cpu().numpy() for name in ARGUMENTS)
    top = np.maximum(la, lb)
    with np.errstate(invalid="ignore", divide="ignore"):
        wa, wb = (np.where(np.isneginf(x), 0.0, np.exp(x - top)) for x in (la, lb))
        total = wa + wb
        lse = np.where(total > 0, top + np.log(total), -math.inf)
        wa, wb = (np.where(total > 0, x / total, 0.0) for x in (wa, wb))
    a, b = (np.where(np.isneginf(x)[..., None], 0.0, y) for x, y in ((la, a), (lb, b)))
    out = wa[..., None] * a + wb[..., None] * b
    if "grad_out" not in inputs:
        return {"out": out, "lse": lse}
    g, gl = (inputs[name].double().cpu().numpy() for name in ("grad_out", "grad_lse"))
    return {
        "out": out,
        "lse": lse,
        "out_a.grad": wa[..., None] * g,
        "lse_a.grad": wa * ((g * (a - out)).sum(-1) + gl),
        "out_b.grad": wb[..., None] * g,
        "lse_b.grad": wb * ((g * (b - out)).sum(-1) + gl),
    }


def tolerance(inputs: Inputs, name: str, want: np.ndarray) -> float:
    """Some roundings of the output's dtype, and of that of lse, where a large lse has a large rounding error."""
    finite = np.abs(want[np.isfinite(want)])
    if not finite.size:
        return 0.0
    lse = torch.cat([inputs["lse_a"].flatten(), inputs["lse_b"].flatten()])
    exact = torch.finfo(lse.dtype).eps * max(8.0, float(lse[lse.isfinite()].abs().max()))
    if name == "lse":
        return 2 * exact
    rounded = 2 * torch.finfo(inputs["out_a"].dtype).eps
    terms = math.sqrt(inputs["out_a"].shape[-1]) if name.startswith("lse") else 1.0
    return (rounded + 4 * exact) * terms * max(float(finite.max()), 1.0)


# --- wrong variants ---------------------------------------------------------------------------------------------------


def _merge(
    a: Tensor,
    lse_a: Tensor,
    b: Tensor,
    lse_b: Tensor,
    *,
    exp: Callable[[Tensor], Tensor] = torch.exp,
    log: Callable[[Tensor], Tensor] = torch.log,
    subtract_max: bool = True,
    normalise: bool = True,
    guard: bool = True,
    skip_empty: bool = True,
    swap: bool = False,
    detach: bool = False,
    halves: bool = False,
    keep_max: bool = False,
) -> tuple[Tensor, Tensor]:
    """The merge in plain torch, with one knob for each mistake."""
    top = torch.maximum(lse_a, lse_b).detach() if subtract_max else torch.zeros_like(lse_a)
    if guard:
        top = top.masked_fill(top == -math.inf, 0.0)
    za, zb = exp(lse_a - top), exp(lse_b - top)
    z = za + zb
    none = z == 0
    safe = z.masked_fill(none, 1.0) if guard else z
    lse = top if keep_max else (top + log(safe)).masked_fill(none, -math.inf)
    if normalise:
        za, zb = za / safe, zb / safe
    if detach:
        za, zb = za.detach(), zb.detach()
    if halves:
        za, zb = torch.full_like(za, 0.5), torch.full_like(zb, 0.5)
    if skip_empty:
        a, b = _without_empty(a, lse_a), _without_empty(b, lse_b)
    if swap:
        za, zb = zb, za
    return (za[..., None] * a + zb[..., None] * b).to(a.dtype), lse


def _wrong(hint: str, **knobs: Any) -> Wrong:
    def impl(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        return _merge(out_a, lse_a, out_b, lse_b, **knobs)

    return Wrong(impl, hint)


def _textbook(
    a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor, *, then: Callable[[Tensor, Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The two lines of a textbook; `then` repairs the output, given the log-sum-exp."""
    lse = torch.logaddexp(lse_a, lse_b)
    out = (torch.exp(lse_a - lse)[..., None] * a + torch.exp(lse_b - lse)[..., None] * b).to(a.dtype)
    return then(out, lse) if then else out, lse


def _nan_made_zero(*parts: Tensor) -> tuple[Tensor, Tensor]:
    return _textbook(*parts, then=lambda out, lse: out.nan_to_num())


def _nan_gradients(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return _nan_made_zero(a.nan_to_num(), lse_a, b.nan_to_num(), lse_b)


def _nan_gradients_of_lse(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    a, b = _without_empty(a, lse_a), _without_empty(b, lse_b)
    return _textbook(a, lse_a, b, lse_b, then=_without_empty)


def _without_empty(out: Tensor, lse: Tensor) -> Tensor:
    return out.masked_fill((lse == -math.inf)[..., None], 0.0)


WRONG = {
    "not_normalised": _wrong("divide the weights by their sum: they must add up to 1", normalise=False),
    "no_max": _wrong(
        "subtract the larger log-sum-exp before exp, which overflows above 88 in float32", subtract_max=False
    ),
    "nan_for_two_empties": _wrong(
        "−∞ − (−∞) is NaN: where both parts are empty the output is 0 and the log-sum-exp −∞", guard=False
    ),
    "nan_weights_for_two_empties": Wrong(
        _textbook,
        "the log-sum-exp of two empty parts is right, but exp(lse_a − lse) is exp(−∞ − (−∞)) = NaN: subtract 0 there",
    ),
    "nan_gradients": Wrong(
        _nan_gradients,
        "NaN that is replaced in the result comes back in the gradients: replace −∞ before it is subtracted from −∞",
    ),
    "nan_gradients_of_lse": Wrong(
        _nan_gradients_of_lse,
        "masks keep NaN out of the output, but 0 · NaN is in the gradient of exp(−∞ − (−∞)): replace −∞ before it",
    ),
    "nan_made_zero": Wrong(
        _nan_made_zero,
        "NaN made 0 at the end takes the other part with it: leave the output of an empty part out before the sum",
    ),
    "base_two": _wrong(
        "the log-sum-exp is in natural logarithms: exp and log, not exp2 and log2", exp=torch.exp2, log=torch.log2
    ),
    "plain_average": _wrong("weigh each part by exp of its log-sum-exp: the parts do not count alike", halves=True),
    "weights_swapped": _wrong("the weight of a part is exp of its own log-sum-exp, not of the other's", swap=True),
    "lse_is_max": _wrong("the merged log-sum-exp is log(exp a + exp b), not the larger of the two", keep_max=True),
    "zero_times_nan": _wrong(
        "leave the output of an empty part out: its weight is 0, but 0 · NaN is NaN", skip_empty=False
    ),
    "weights_without_gradient": _wrong(
        "the output depends on both log-sum-exps: no detach() on the weights", detach=True
    ),
}


def contract(name: str) -> Contract:
    """The contract under this name, which `mlsys.contracts.attention` gives it."""
    return Contract(
        name=name,
        signature=SIGNATURE,
        reference=merge,
        cases=CASES,
        inputs=inputs,
        call=call,
        oracle=oracle,
        tolerance=tolerance,
        wrong=WRONG,
    )
