"""The contract of `kernels.norm`: LayerNorm and RMSNorm over the last dimension, also where the mean is large."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlsys.contracts._kernels_common import UNIT, draw, exact, result, rounding
from mlsys.contracts.core import Case, Contract, Inputs, Results, Wrong, accepts

SIGNATURE = "norm(x (…, n), weight (n,), bias (n,) or None, *, eps=1e-5, kind='layernorm' or 'rmsnorm') -> (…, n)"


def case(
    *shape: int, kind: str = "layernorm", bias: bool = True, eps: float = 1e-5, mean: float = 0.0, scale: float = 1.0,
    dtype: str = "float32",
) -> Case:  # fmt: skip
    """One case; the numbers of x lie about `mean`, `scale` apart."""
    bias = bias and kind == "layernorm"
    return {"shape": shape, "kind": kind, "bias": bias, "eps": eps, "mean": mean, "scale": scale, "dtype": dtype}


CASES = [
    case(2, 8),
    case(2, 8, kind="rmsnorm"),
    case(4, 8, bias=False),
    case(3, 33, eps=0.1),
    case(3, 33, eps=0.1, kind="rmsnorm"),
    case(4, 65, mean=1.0),
    case(4, 65, mean=1.0, kind="rmsnorm"),
    case(2, 700),
    case(2, 700, kind="rmsnorm"),
    case(200, 3),
    case(200, 3, kind="rmsnorm"),
    case(5, 1, mean=2.0),
    case(5, 1, mean=2.0, kind="rmsnorm"),
    case(2, 3, 40),
    case(40),
    case(3, 500, mean=2000.0),  # Σx² / n − mean² has no digit left
    case(3, 40, scale=0.001, eps=1e-6),
    case(3, 40, scale=0.0, mean=1.0),  # nothing but ε under the root
    case(0, 4),
    case(4, 300, dtype="bfloat16"),
    case(4, 300, dtype="bfloat16", kind="rmsnorm"),
    case(4, 300, dtype="bfloat16", mean=20.0),
]


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Normal numbers; weights and biases about 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    dtype, n = getattr(torch, case["dtype"]), case["shape"][-1]
    x = draw(generator, *case["shape"], dtype="float64") * case["scale"] + case["mean"]
    weight = 1 + 0.5 * draw(generator, n, dtype="float64")
    bias = draw(generator, n, dtype="float64")
    named: Inputs = {"x": x.to(dtype).to(device), "weight": weight.to(dtype).to(device)}
    if case["bias"]:
        named["bias"] = bias.to(dtype).to(device)
    return named | {"eps": case["eps"], "kind": case["kind"]}


def call(impl: Callable[..., Any], inputs: Inputs) -> Results:
    """The normalised rows."""
    tensors = [inputs[name] for name in ("x", "weight", "bias") if name in inputs]
    options = {"eps": inputs["eps"], "kind": inputs["kind"]}
    accepts(impl, len(tensors), options, SIGNATURE)
    x = inputs["x"]
    return {"out": result(impl(*tensors, **options), tuple(x.shape), x.dtype)}


def oracle(inputs: Inputs) -> Mapping[str, np.ndarray]:
    """The formula in float64."""
    x, weight = exact(inputs["x"]), exact(inputs["weight"])
    mean = x.mean(-1, keepdims=True) if inputs["kind"] == "layernorm" and x.size else np.zeros_like(x[..., :1])
    size = np.sqrt(((x - mean) ** 2).sum(-1, keepdims=True) / x.shape[-1] + inputs["eps"])
    out = (x - mean) / size * weight
    return {"out": out + exact(inputs["bias"]) if "bias" in inputs else out}


def tolerance(inputs: Inputs, name: str, want: np.ndarray) -> float:
    """A rounding of the result; float32's of sums of n terms, and of the mean, seen against the spread."""
    x = exact(inputs["x"])
    if not x.size:
        return 0.0
    mean = np.abs(x.mean(-1)) if inputs["kind"] == "layernorm" else np.zeros(x.shape[:-1])
    spread = np.sqrt(x.var(-1) + inputs["eps"])
    lost = 8 + math.sqrt(x.shape[-1]) + 4 * float((mean / spread).max())
    sizes = float(np.abs(want).max()) + float(np.abs(exact(inputs["weight"])).max())
    return rounding(inputs["x"].dtype, want) * 1.01 + lost * UNIT * sizes


# --- wrong variants ---------------------------------------------------------------------------------------------------


def _norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    kind: str = "layernorm",
    unbiased: bool = False,
    eps_outside: bool = False,
    no_eps: bool = False,
    cancelling: bool = False,
    no_root: bool = False,
    other_kind: bool = False,
    no_weight: bool = False,
    no_bias: bool = False,
    narrow: bool = False,
    first_axis: bool = False,
    whole_only: bool = False,
) -> Tensor:
    """Both norms in plain torch, with one knob for each mistake."""
    if not x.numel():
        return x.clone()
    axis, wide = 0 if first_axis else -1, x if narrow else x.float()
    seen = wide[..., : max(x.shape[-1] // 32 * 32, 1)] if whole_only else wide
    n = seen.shape[axis]
    centred = (kind == "layernorm") != other_kind
    mean = seen.mean(axis, keepdim=True) if centred else torch.zeros_like(seen.sum(axis, keepdim=True))
    squares = (
        (seen**2).sum(axis, keepdim=True) - n * mean**2 if cancelling else ((seen - mean) ** 2).sum(axis, keepdim=True)
    )
    variance = squares / max(n - 1, 1) if unbiased else squares / n
    if no_root:
        size = variance + eps
    elif eps_outside:
        size = variance.sqrt() + eps
    else:
        size = (variance + (0.0 if no_eps else eps)).sqrt()
    out = (wide - mean) / size
    out = out if no_weight else out * weight.to(out.dtype)
    return (out if bias is None or no_bias else out + bias.to(out.dtype)).to(x.dtype)


def _wrong(hint: str, **knobs: Any) -> Wrong:
    return Wrong(partial(_norm, **knobs), hint)


WRONG = {
    "unbiased": _wrong("divide the sum of squares by n, not by n − 1: it is the variance of this row", unbiased=True),
    "eps_outside": _wrong("ε belongs under the root: √(σ² + ε), not √σ² + ε", eps_outside=True),
    "no_eps": _wrong("add ε under the root, or a row of equal numbers divides by 0", no_eps=True),
    "cancelling": _wrong(
        "Σx² / n − mean² cancels where the mean is large: subtract the mean first, or use Welford's rule",
        cancelling=True,
    ),
    "no_root": _wrong("divide by the root of the variance", no_root=True),
    "other_kind": _wrong("LayerNorm subtracts the mean, RMSNorm does not", other_kind=True),
    "no_weight": _wrong("multiply by the weight", no_weight=True),
    "no_bias": _wrong("add the bias", no_bias=True),
    "narrow": _wrong("compute in float32, and round once at the end", narrow=True),
    "first_axis": _wrong("mean and variance are those of a row: over the last dimension", first_axis=True),
    "whole_warps_only": _wrong(
        "a row need not be a multiple of 32: the rest belongs to the sums, too", whole_only=True
    ),
}


def contract(name: str, reference: Callable[..., Any]) -> Contract:
    """The contract under this name, which `mlsys.contracts.kernels` gives it."""
    return Contract(name, SIGNATURE, reference, CASES, inputs, call, oracle, tolerance, WRONG)
