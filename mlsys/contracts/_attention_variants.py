"""The contract of `attention.variants`: attention with the options that models add, one by one and together.

A case passes only the options that it is about, so that an implementation without the others gets as far as it goes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mlsys.attention import flash
from mlsys.contracts import _attention_formula as formula
from mlsys.contracts.core import Case, Contract, Inputs, Mismatch, Results, Wrong, accepts

SIGNATURE = (
    "attention(q, k, v, *, causal=False, window=(-1, -1), mask=None, alibi=None, softcap=None, sinks=None, scale=None, "
    "return_lse=False) -> out (b, h, t, dv), and lse (b, h, t) if return_lse"
)
PLAIN = {"causal": False, "window": (-1, -1), "softcap": None, "scale": None}


def case(
    t: int,
    s: int | None = None,
    *,
    h: int = 2,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    mask: str | None = None,
    alibi: bool = False,
    softcap: float | None = None,
    sinks: bool = False,
    scale: float | None = None,
    lse: bool = False,
    large: bool = False,
    backward: bool = False,
    **sizes: Any,
) -> Case:
    """One case; `mask` is its shape as letters of "bhts", an axis of length 1 left out: "ts", "bs"."""
    return formula.sizes(t, s, h=h, **sizes) | {
        "causal": causal,
        "window": window,
        "mask": mask,
        "alibi": alibi,
        "softcap": softcap,
        "sinks": sinks,
        "scale": scale,
        "lse": lse,
        "large": large,
        "backward": backward,
    }


EVERYTHING: dict[str, Any] = {
    "causal": True,
    "window": (6, -1),
    "mask": "ts",
    "alibi": True,
    "softcap": 2.0,
    "sinks": True,
}
CASES = [
    case(5, 7, lse=True),
    case(5, 7, lse=True, causal=True, scale=0.5),
    case(9, 4, lse=True, causal=True),  # the first five queries see nothing: 0, and −∞
    case(6, 8, lse=True, large=True),
    case(9, window=(2, 3)),
    case(12, window=(3, 0)),
    case(12, window=(3, 2), causal=True),  # causal: right is 0
    case(6, 11, window=(4, -1)),
    case(6, 11, window=(-1, 1)),
    case(11, 6, window=(1, 2), lse=True),  # the first queries see nothing
    case(8, window=(0, 0)),
    case(5, 9, mask="ts"),
    case(5, 9, b=2, mask="bs"),
    case(6, b=2, h=4, h_kv=2, mask="bhts", causal=True, lse=True),
    case(6, 7, mask="none", lse=True),  # every third query sees nothing
    case(7, softcap=1.5, scale=1.0),
    case(7, softcap=2.0, causal=True),
    case(5, 8, softcap=3.0, mask="ts", large=True),
    case(7, h=4, alibi=True, causal=True, lse=True),
    case(5, 9, h=4, alibi=True, lse=True),
    case(7, h=4, h_kv=2, alibi=True, softcap=2.0),
    case(6, 8, h=3, sinks=True, lse=True),
    case(9, 4, sinks=True, causal=True, lse=True),  # nothing to see: 0, and the sink
    case(6, h=4, h_kv=2, sinks=True, scale=0.2),
    case(70, 150, h=4, h_kv=2, **EVERYTHING, lse=True),
    case(33, 70, d=32, dtype="bfloat16", window=(20, 0), sinks=True, lse=True),
    case(33, 70, d=32, dtype="bfloat16", softcap=5.0, alibi=True),
    case(12, 20, h=4, h_kv=2, dtype="float64", **EVERYTHING, lse=True),
    case(6, 8, backward=True, lse=True),
    case(7, backward=True, softcap=1.0),
    case(8, backward=True, sinks=True, lse=True),
    case(9, 12, backward=True, window=(3, 1), alibi=True),
    case(6, 7, backward=True, mask="none", lse=True),
    case(12, 20, b=2, h=4, h_kv=2, dv=6, backward=True, **EVERYTHING, lse=True),
]


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """q, k, v, the options that differ from nothing, and the gradients of the results for a backward case."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, case["dtype"])
    wide = torch.promote_types(dtype, torch.float32)
    b, h, h_kv, t, s = (case[name] for name in ("b", "h", "h_kv", "t", "s"))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    drawn = {"q": draw(b, h, t, case["d"]), "k": draw(b, h_kv, s, case["d"]), "v": draw(b, h_kv, s, case["dv"])}
    if case["large"]:
        drawn["q"] *= 100
    named: Inputs = {name: x.to(dtype) for name, x in drawn.items()}
    named |= {name: case[name] for name in ("causal", "window", "softcap", "scale") if case[name] != PLAIN[name]}
    if case["mask"] == "none":
        named["mask"] = (torch.arange(t) % 3 != 1)[:, None].expand(t, s).clone()
    elif case["mask"]:
        sizes = {"b": b, "h": h, "t": t, "s": s}
        shape = [sizes[axis] if axis in case["mask"] else 1 for axis in "bhts"]
        named["mask"] = torch.rand(shape, generator=generator) < 0.6
    if case["alibi"]:
        named["alibi"] = torch.tensor([2.0 ** -(1 + i) for i in range(h)])
    if case["sinks"]:
        named["sinks"] = draw(h).to(wide)
    if case["lse"]:
        named["return_lse"] = True
    if case["backward"]:
        named["grad_out"] = draw(b, h, t, case["dv"]).to(dtype)
        named["grad_lse"] = draw(b, h, t).to(wide)
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in named.items()}


def call(impl: Callable[..., Any], inputs: Inputs) -> Results:
    """The output, lse and gradients, as far as they are asked for."""
    options = {name: inputs[name] for name in (*formula.OPTIONS, "return_lse") if name in inputs}
    accepts(impl, 3, options, SIGNATURE)
    backward = "grad_out" in inputs
    leaves = {name: inputs[name].requires_grad_(backward) for name in formula.LEAVES if name in inputs}
    got = impl(inputs["q"], inputs["k"], inputs["v"], **options)
    wanted = ("out", "lse") if "return_lse" in options else ("out",)
    parts = (got,) if isinstance(got, Tensor) else got
    tensors = isinstance(parts, tuple | list) and all(isinstance(x, Tensor) for x in parts)
    if not tensors or len(parts) != len(wanted):
        kind = "two tensors (out, lse), for return_lse" if len(wanted) == 2 else "a tensor (batch, heads, t, dv)"
        raise Mismatch(f"returned {type(got).__name__}, expected {kind}")
    results = dict(zip(wanted, parts, strict=True))
    if results["out"].dtype != inputs["q"].dtype:
        raise Mismatch(f"out is {results['out'].dtype} for inputs of {inputs['q'].dtype}: the output has their dtype")
    if "lse" in results and results["lse"].element_size() == 2:
        raise Mismatch(f"lse is {results['lse'].dtype}: keep it in float32 at least, it is an exponent")
    found: Results = {name: x.detach() for name, x in results.items()}
    if backward:
        weights = {name: inputs[f"grad_{name}"].to(results[name]) for name in results}
        found |= formula.gradients(results, leaves, weights)
    for x in leaves.values():
        x.requires_grad_(False)
    return found


# --- wrong variants ---------------------------------------------------------------------------------------------------


def _plain(
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
    return_lse: bool = False,
    mistake: str = "",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with all options in plain torch, and one mistake, by its name in `WRONG`."""
    h, t, d = q.shape[1:]
    group, s = h // k.shape[1], k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    if mistake == "heads_interleaved":
        k, v = (x.repeat(1, group, 1, 1) for x in (k, v))
    else:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = (q @ k.mT).to(wide) * (1.0 if mistake == "no_scale" else d**-0.5 if scale is None else scale)
    shift = 0 if mistake == "top_left" else s - t
    ahead = torch.arange(s, device=q.device) - torch.arange(t, device=q.device)[:, None] - shift

    hidden = torch.zeros(t, s, dtype=torch.bool, device=q.device)
    left, right = window
    left += {"window_left_short": -1, "window_left_long": 1}.get(mistake, 0) * (left > 0)
    right += {"window_right_short": -1, "window_right_long": 1}.get(mistake, 0) * (right > 0)
    if mistake == "window_unbounded_is_zero" and (left >= 0 or right >= 0):
        left, right = max(left, 0), max(right, 0)
    if causal and not (mistake == "window_replaces_causal" and window != (-1, -1)):
        right = 0
    hidden = hidden if left < 0 else hidden | (ahead < -left)
    hidden = hidden if right < 0 else hidden | (ahead > right)
    if mask is not None:
        seen = ~mask if mistake == "mask_inverted" else mask
        hidden = hidden & ~seen if mistake == "mask_instead" and hidden.any() else hidden | ~seen

    def cap(x: Tensor) -> Tensor:
        if softcap is None:
            return x
        if mistake == "softcap_not_scaled_back":
            return torch.tanh(x / softcap)
        capped = softcap * torch.tanh(x / softcap)
        return x + (capped - x).detach() if mistake == "softcap_without_derivative" else capped

    def bias(x: Tensor) -> Tensor:
        if alibi is None:
            return x
        distance = ahead if mistake == "alibi_signed" else ahead.abs()
        sign = 1 if mistake in ("alibi_rewards_distance", "alibi_signed") else -1
        return x + sign * alibi[:, None, None] * distance

    def hide(x: Tensor) -> Tensor:
        return x.masked_fill(hidden, -math.inf)

    steps = {"softcap_after_mask": (hide, cap, bias), "softcap_after_alibi": (bias, cap, hide)}
    for step in steps.get(mistake, (cap, bias, hide)):
        scores = step(scores)

    full = scores
    if sinks is not None and mistake != "sink_ignored":
        logit = 2 * sinks.detach() - sinks if mistake == "sink_gradient_positive" else sinks
        logit = logit * (d**-0.5 if scale is None else scale) if mistake == "sink_scaled" else logit
        full = torch.cat([scores, logit.to(wide)[:, None, None].expand(q.shape[0], h, t, 1)], -1)
    weights = torch.softmax(full, -1)
    sink_weight = weights[..., s:].sum(-1, keepdim=True)
    weights = weights[..., :s]
    if mistake not in ("nan_rows", "softcap_after_mask"):
        weights = weights.masked_fill(hidden, 0.0)
    out = weights.to(v.dtype) @ v
    if mistake == "sink_in_the_output":
        out = out + sink_weight.to(out.dtype)
    if not return_lse:
        return out
    lse = torch.logsumexp(scores if mistake == "lse_without_sink" else full, -1)
    if mistake == "lse_base_two":
        lse = lse / math.log(2)
    if mistake == "lse_without_max":
        lse = lse - full.amax(-1).nan_to_num(neginf=0.0)
    return out, lse.detach().requires_grad_() if mistake == "lse_without_gradient" and lse.requires_grad else lse


HINTS = {
    "no_scale": "multiply the scores by 1/√d, or their spread grows with √d",
    "heads_interleaved": "query head i reads key head i // (h // h_kv): repeat_interleave, not repeat",
    "top_left": "align bottom-right: query i stands at key p = i + s − t, for causal, windows and ALiBi alike",
    "window_left_short": "the window is off by one: with left = n a query sees n keys before its own, and its own",
    "window_left_long": "the window is off by one: with left = n a query sees n keys before its own, not n + 1",
    "window_right_short": "the window is off by one: with right = n a query sees n keys after its own",
    "window_right_long": "the window is off by one: with right = n a query sees n keys after its own, not n + 1",
    "window_unbounded_is_zero": "−1 in the window is no bound on that side, not a bound of 0",
    "window_replaces_causal": "causal with a window: right is the smaller of both, so no key after the query's own",
    "mask_inverted": "True in the mask is a visible key",
    "mask_instead": "a key must be visible by the mask and by causal and window: and, not or",
    "nan_rows": "a query that the mask leaves nothing is 0/0: set it to 0",
    "softcap_after_mask": "cap first, then hide: c · tanh(−∞ / c) is −c, a score like others",
    "softcap_after_alibi": "cap first, then add the bias of ALiBi, which must not be capped",
    "softcap_not_scaled_back": "the capped score is c · tanh(score / c): multiply by c again",
    "softcap_without_derivative": "the gradient goes through tanh: dS is multiplied by 1 − tanh²(score / c)",
    "alibi_rewards_distance": "ALiBi subtracts slope · distance: far keys count less",
    "alibi_signed": "the distance is |p − j|: keys after the query are far as well",
    "sink_ignored": "a sink is one more term, exp(sink), of each row's denominator",
    "sink_scaled": "a sink is a logit as it is: it is no product of q and k, and is not scaled",
    "sink_in_the_output": "a sink joins the denominator and nothing else: no value stands for it",
    "sink_gradient_positive": "the sink has no value, so its dP is 0 and its gradient −p_sink · D, summed over rows",
    "lse_base_two": "lse is a natural logarithm: multiply one of base 2 by log 2",
    "lse_without_max": "lse is m + log z: add the maximum that was subtracted before exp",
    "lse_without_sink": "lse is the logarithm of the whole denominator, the sink's term included",
    "lse_without_gradient": "lse has a gradient too: ∂lse/∂S = P, so dS = P ∘ (dP − D + dlse)",
}


def _wrong(mistake: str) -> Callable[..., Any]:
    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return _plain(q, k, v, **options, mistake=mistake)

    return attention


def contract(name: str) -> Contract:
    """The contract under this name, which `mlsys.contracts.attention` gives it."""
    return Contract(
        name=name,
        signature=SIGNATURE,
        reference=flash.attention,
        cases=CASES,
        inputs=inputs,
        call=call,
        oracle=formula.oracle,
        tolerance=formula.tolerance,
        wrong={mistake: Wrong(_wrong(mistake), hint) for mistake, hint in HINTS.items()},
    )
