"""GELU of x + bias, and why two elementwise operations should be one kernel.

    gelu(x) = x · Φ(x) = x/2 · (1 + erf(x/√2))          Φ: the share of a normal distribution below x
            ≈ x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))

An elementwise operation reads a number, computes for a nanosecond, and writes it: its time is that of a copy. A chain
of k of them, one by one, takes k copies, and only the first read and the last write were needed. Fused, the numbers
between stay in registers. It saves nothing but traffic, and traffic is all that it costs.

The two forms differ by at most 0.0005. They are not interchangeable in a model that was trained with one of them.

Cost:
    A function value and some 5 operations a number.

Memory:
    Traffic of 8 bytes a float32 number in one kernel, 16 in two. The backward pass keeps x + bias, or recomputes it.

Papers:
    Hendrycks & Gimpel 2016, arXiv:1606.08415 (section 2: definition and approximation).

See also:
    `mlsys.kernels.gelu_cuda` (the kernels), `mlsys.kernels.norm` (where there is a sum between two such steps).
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mlsys.kernels._inputs import like, tensor
from mlsys.kernels._rungs import rungs
from mlsys.kernels._variants import CallableModule, Family, Variant

APPROXIMATE = ("none", "tanh")
RUNGS = {
    "separate": "a kernel for the bias, another one for the GELU",
    "bias_fused": "both in one",
}


def gelu(
    x: Float[Tensor, "... n"],
    bias: Float[Tensor, " n"] | None = None,
    *,
    approximate: str = "none",
    variant: str = "auto",
) -> Float[Tensor, "... n"]:
    """GELU(x + bias) for x in float32 or bfloat16; the bias, of the same dtype, goes along the last dimension.

    approximate: "none", by erf, or "tanh". variant: one of `list_variants("gelu")`, or "auto". Of the CUDA kernels no
    gradient can be had. TypeError, ValueError naming the argument.
    """
    check_inputs(x, bias, approximate)
    return FAMILY.run(variant, *((x,) if bias is None else (x, bias)), approximate=approximate)


def check_inputs(x: Any, bias: Any, approximate: Any) -> None:
    """TypeError or ValueError naming what is wrong."""
    x = tensor("x", x)
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension, got a single number: give x[None]")
    if bias is not None:
        like("bias", bias, x, tuple(x.shape[-1:]))
    if approximate not in APPROXIMATE:
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")


def formula(x: Tensor, bias: Tensor | None = None, *, approximate: str) -> Tensor:
    """The formula, in float32."""
    v = x.float() if bias is None else x.float() + bias.float()
    if approximate == "tanh":
        phi = (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2
    else:
        phi = torch.special.erfc(-v / math.sqrt(2)) / 2  # 1 + erf cancels for large negative v, erfc does not
    return (v * phi).to(x.dtype)


def _torch(x: Tensor, bias: Tensor | None = None, *, approximate: str) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate=approximate)


FAMILY = Family(
    "gelu",
    (
        Variant("torch", "x + bias, then gelu", _torch),
        Variant("formula", "the readable one", formula),
        *rungs("gelu", "gelu", RUNGS),
    ),
)
sys.modules[__name__].__class__ = CallableModule
