"""The contract of `kernels.gelu`: GELU of x + bias by erf and by tanh, which are not the same function."""

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

SIGNATURE = "gelu(x (…, n), bias (n,) or None, *, approximate='none' or 'tanh') -> (…, n)"


def case(*shape: int, bias: bool = True, approximate: str = "none", dtype: str = "float32", mean: float = 0.0) -> Case:
    """One case; the numbers of x lie about `mean`."""
    return {"shape": shape, "bias": bias, "approximate": approximate, "dtype": dtype, "mean": mean}


CASES = [
    case(2, 8, bias=False),
    case(4, 8),
    case(2, 8, bias=False, approximate="tanh"),
    case(4, 8, approximate="tanh"),
    case(33, 65),
    case(1000, 3),
    case(3, 3),  # rows and columns can be mistaken for each other
    case(2, 700),
    case(2, 3, 40),
    case(7),
    case(1, 1),
    case(3, 40, mean=30.0),
    case(3, 40, mean=-30.0),
    case(0, 4),
    case(4, 0),
    case(4, 300, dtype="bfloat16"),
    case(4, 300, dtype="bfloat16", approximate="tanh"),
]


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Normal numbers, twice as far apart."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, case["dtype"])
    x = (2 * draw(generator, *case["shape"], dtype="float64") + case["mean"]).to(dtype).to(device)
    named: Inputs = {"x": x}
    if case["bias"]:
        named["bias"] = draw(generator, case["shape"][-1], dtype=case["dtype"], device=device)
    return named | {"approximate": case["approximate"]}


def call(impl: Callable[..., Any], inputs: Inputs) -> Results:
    """The result; the option is given only where it is not the default."""
    tensors = [inputs[name] for name in ("x", "bias") if name in inputs]
    options = {"approximate": "tanh"} if inputs["approximate"] == "tanh" else {}
    accepts(impl, len(tensors), options, SIGNATURE)
    return {"out": result(impl(*tensors, **options), tuple(inputs["x"].shape), inputs["x"].dtype)}


def _sum(inputs: Inputs) -> np.ndarray:
    return exact(inputs["x"]) + (exact(inputs["bias"]) if "bias" in inputs else 0.0)


def oracle(inputs: Inputs) -> Mapping[str, np.ndarray]:
    """The formula in float64, number by number."""
    v = _sum(inputs)
    if inputs["approximate"] == "tanh":
        return {"out": v / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))}
    phi = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in v.ravel().tolist()]).reshape(v.shape)
    return {"out": v * phi}


def tolerance(inputs: Inputs, name: str, want: np.ndarray) -> float:
    """Roundings of x + bias, which may be stored, and of the result, in their dtype; a few of float32."""
    v = _sum(inputs)
    return rounding(inputs["x"].dtype, want) * 1.01 + 1.13 * rounding(inputs["x"].dtype, v) + 16 * UNIT


# --- wrong variants ---------------------------------------------------------------------------------------------------


def _gelu(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    approximate: str = "none",
    always: str | None = None,
    phi: Callable[[Tensor], Tensor] | None = None,
    bias_after: bool = False,
    no_bias: bool = False,
    bias_of_row: bool = False,
    twice: bool = False,
) -> Tensor:
    """GELU in plain torch, with one knob for each mistake."""
    wide = x.float()
    b = torch.zeros_like(wide[..., :1]) if bias is None or no_bias or not x.numel() else bias.float()
    if bias_of_row and bias is not None and x.numel():
        b = b[torch.arange(x.numel(), device=x.device) // x.shape[-1] % x.shape[-1]].view(x.shape)
    v = wide if bias_after else wide + b
    if phi is not None:
        share = phi(v)
    elif (always or approximate) == "tanh":
        share = (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2
    else:
        share = torch.special.erfc(-v / math.sqrt(2)) / 2
    out = v * share * (2 if twice else 1)
    return (out + b if bias_after else out).to(x.dtype)


def _wrong(hint: str, **knobs: Any) -> Wrong:
    return Wrong(partial(_gelu, **knobs), hint)


WRONG = {
    "always_tanh": _wrong('approximate="none" is the exact form, by erf', always="tanh"),
    "always_erf": _wrong('approximate="tanh" is another function, up to 0.0005 from the exact one', always="none"),
    "sigmoid": _wrong("x · σ(1.702 x) is a third, coarser form", phi=lambda v: torch.sigmoid(1.702 * v)),
    "silu": _wrong("x · σ(x) is SiLU", phi=torch.sigmoid),
    "relu": _wrong("Φ rises smoothly from 0 to 1, it does not jump", phi=lambda v: (v > 0).float()),
    "no_root_of_two": _wrong("erf(x / √2), not erf(x)", phi=lambda v: torch.special.erfc(-v) / 2),
    "twice": _wrong("half of x · (1 + erf(x / √2))", twice=True),
    "no_bias": _wrong("add the bias", no_bias=True),
    "bias_after": _wrong("add the bias before the GELU, not after it", bias_after=True),
    "bias_of_row": _wrong("the bias goes along the columns: bias[i % n], not bias[i / n]", bias_of_row=True),
}


def contract(name: str, reference: Callable[..., Any]) -> Contract:
    """The contract under this name, which `mlsys.contracts.kernels` gives it."""
    return Contract(name, SIGNATURE, reference, CASES, inputs, call, oracle, tolerance, WRONG)
