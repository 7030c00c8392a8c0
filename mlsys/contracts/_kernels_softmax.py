"""The contract of `kernels.softmax`: over the last dimension, rows of any length, with −∞ and with large numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlsys.contracts._kernels_common import BLOCK, UNIT, draw, exact, result, rounding
from mlsys.contracts.core import Case, Contract, Inputs, Results, Wrong, accepts

SIGNATURE = "softmax(x (…, n)) -> (…, n)"


def case(*shape: int, dtype: str = "float32", special: str = "none") -> Case:
    """One case; `special`: large numbers, rows that begin or end with −∞, or rows of nothing else."""
    return {"shape": shape, "dtype": dtype, "special": special}


CASES = [
    case(2, 8),
    case(4, 4),
    case(3, 31),
    case(5, 33),
    case(2, 1000),
    case(1000, 3),
    case(2, 3, 300),
    case(7),
    case(3, 1),
    case(3, 40, special="large"),
    case(3, 40, special="small"),
    case(3, 600, special="masked first"),
    case(3, 600, special="masked last"),
    case(3, 40, special="masked"),  # no softmax: NaN
    case(3, 600, special="rising"),  # every number is the largest so far
    case(0, 4),
    case(4, 300, dtype="bfloat16"),
    case(2, 2000, dtype="bfloat16", special="equal"),  # a sum in bfloat16 stops growing at 256
]


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Normal numbers, three times as far apart."""
    x = 3 * draw(torch.Generator().manual_seed(seed), *case["shape"], dtype="float64")
    n = case["shape"][-1]
    match case["special"]:
        case "large":
            x += 1000
        case "small":
            x -= 1000
        case "masked first":
            x[0, : n - 3] = x[1, :1] = -math.inf
        case "masked last":
            x[0, 3:] = x[1, -1:] = -math.inf
        case "masked":
            x[1] = -math.inf
        case "rising":
            x = x.sort(-1).values * 5
        case "equal":
            x = x * 0 + 1
    return {"x": x.to(getattr(torch, case["dtype"])).to(device)}


def call(impl: Callable[..., Any], inputs: Inputs) -> Results:
    """The softmax."""
    accepts(impl, 1, {}, SIGNATURE)
    x = inputs["x"]
    return {"out": result(impl(x), tuple(x.shape), x.dtype)}


def oracle(inputs: Inputs) -> Mapping[str, np.ndarray]:
    """Row by row in float64; NaN where all is −∞."""
    x = exact(inputs["x"])
    rows = x.reshape(-1, x.shape[-1])
    out = np.full_like(rows, math.nan)
    for row, target in zip(rows, out, strict=True):
        if np.isfinite(row).any():
            e = np.exp(row - row[np.isfinite(row)].max())
            target[:] = e / e.sum()
    return {"out": out.reshape(x.shape)}


def tolerance(inputs: Inputs, name: str, want: np.ndarray) -> float:
    """A rounding of the result; float32's for the difference x − m, and for a sum of n exponentials."""
    x = exact(inputs["x"])
    finite = np.abs(x[np.isfinite(x)])
    spread = 4 + 2 * float(finite.max(initial=0.0)) + math.sqrt(x.shape[-1])
    return rounding(inputs["x"].dtype, want) * 1.01 + spread * UNIT


# --- wrong variants ---------------------------------------------------------------------------------------------------


def _softmax(
    x: Tensor,
    *,
    axis: int = -1,
    subtract: bool = True,
    exp: Callable[[Tensor], Tensor] = torch.exp,
    padded: bool = False,
    whole_only: bool = False,
    narrow: bool = False,
    normalise: bool = True,
) -> Tensor:
    """The softmax in plain torch, with one knob for each mistake."""
    wide = x if narrow else x.float()
    if not x.numel():
        return x.clone()
    top = wide.amax(axis, keepdim=True) if subtract else torch.zeros_like(wide[..., :1])
    e = exp(wide - top)
    n = x.shape[-1]
    counted = e[..., : n // 32 * 32] if whole_only and n > 32 else e
    d = counted.sum(axis, keepdim=True)
    if narrow and x.dtype != torch.float32:
        d = torch.zeros_like(d)
        for one in e.split(1, -1):  # torch's own sum of bfloat16 numbers is a float32 one
            d = d + one
    if padded:
        d = d + (-n % 32) * exp(-top)
    return (e / d if normalise else e).to(x.dtype)


def _online(x: Tensor, *, rescale: bool = True, guard: bool = True) -> Tensor:
    """In blocks, with the running maximum; `guard`: −∞ − (−∞) counts as 0."""
    if not x.numel():
        return x.clone()
    wide = x.float()
    m = wide.new_full((*x.shape[:-1], 1), -math.inf)
    d = torch.zeros_like(m)
    for part in wide.split(min(BLOCK, max(x.shape[-1] // 4, 1)), -1):
        larger = torch.maximum(m, part.amax(-1, keepdim=True))
        shift = larger.masked_fill(larger == -math.inf, 0.0) if guard else larger
        d = (d * torch.exp(m - shift) if rescale else d) + torch.exp(part - shift).sum(-1, keepdim=True)
        m = larger
    return (torch.exp(wide - m) / d).to(x.dtype)


def _wrong(hint: str, **knobs: Any) -> Wrong:
    return Wrong(lambda x: _softmax(x, **knobs), hint)


WRONG = {
    "no_max": _wrong("subtract the row's maximum before exp, which overflows above 88 in float32", subtract=False),
    "first_axis": _wrong("sum over the last dimension, not over the first", axis=0),
    "base_two": _wrong("exp, not exp2, or multiply by log2(e) first", exp=torch.exp2),
    "padding_counts": _wrong("lanes beyond the row have nothing to add: −∞ for them, not 0", padded=True),
    "whole_warps_only": _wrong("a row need not be a multiple of 32: the rest belongs to the sum, too", whole_only=True),
    "narrow": _wrong(
        "add up in float32: a bfloat16 sum stops growing where one more number is rounded away", narrow=True
    ),
    "not_normalised": _wrong("divide by the sum: a row must add up to 1", normalise=False),
    "no_rescale": Wrong(
        lambda x: _online(x, rescale=False),
        "when a larger maximum comes, multiply what was summed by exp(old maximum − new maximum)",
    ),
    "nan_after_mask": Wrong(
        lambda x: _online(x, guard=False), "−∞ − (−∞) is NaN: where only −∞ has been seen, the sum is 0"
    ),
}


def contract(name: str, reference: Callable[..., Any]) -> Contract:
    """The contract under this name, which `mlsys.contracts.kernels` gives it."""
    return Contract(name, SIGNATURE, reference, CASES, inputs, call, oracle, tolerance, WRONG)
