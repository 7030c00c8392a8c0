"""LayerNorm and RMSNorm: a row is divided by how large its numbers are, and why the variance takes some care.

    layernorm   (x − μ) / √(σ² + ε) · weight + bias,   μ = mean of x,   σ² = mean of (x − μ)²
    rmsnorm     x / √(mean of x² + ε) · weight

σ² is that of the row itself, divided by n and not by n − 1. ε stands inside of the root, so that a row of equal numbers
becomes 0 rather than NaN.

The mean has to be known before the variance, unless one takes σ² = mean of x² − μ². That is right on paper: where μ
is large beside σ the two terms agree in most of their digits, and the difference is what their roundings left; it can
even be negative. Welford's rule keeps mean and sum of squares right number by number instead, in one pass and without
that loss:

    n' = n + 1,   μ' = μ + (x − μ) / n',   S' = S + (x − μ)(x − μ')

and two such triples (n, μ, S) are merged, as the lanes of a warp do, by

    n = n_a + n_b,   δ = μ_b − μ_a,   μ = μ_a + δ · n_b / n,   S = S_a + S_b + δ² · n_a n_b / n

Cost:
    Some 8 FLOPs a number for LayerNorm, 4 for RMSNorm.

Memory:
    One read and one write of x, if the row stays near: bound by memory. Backward passes keep x, and μ and 1/σ of each
    row.

Papers:
    Ba, Kiros & Hinton 2016, arXiv:1607.06450 (equations 3 and 4).
    Zhang & Sennrich 2019, arXiv:1910.07467 (equation 4: without the mean).
    Welford 1962, "Note on a Method for Calculating Corrected Sums of Squares and Products", Technometrics 4(3).
    Chan, Golub & LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances",
    STAN-CS-79-773.

See also:
    `mlsys.kernels.norm_cuda` (the kernels), `mlsys.models.transformer` (where they stand).
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mlsys.kernels._inputs import like, tensor
from mlsys.kernels._rungs import rungs, triton
from mlsys.kernels._variants import CallableModule, Family, Variant

KINDS = ("layernorm", "rmsnorm")
RUNGS = {
    "block": "a block a row, a pass for each number that is wanted of it",
    "warp": "a warp a row, mean and variance in one pass",
}


def norm(
    x: Float[Tensor, "... n"],
    weight: Float[Tensor, " n"],
    bias: Float[Tensor, " n"] | None = None,
    *,
    eps: float = 1e-5,
    kind: str = "layernorm",
    variant: str = "auto",
) -> Float[Tensor, "... n"]:
    """LayerNorm or RMSNorm over the last dimension of x, float32 or bfloat16; computed in float32.

    weight, bias: of x's dtype; a bias for `layernorm` only. eps: inside of the root. kind: "layernorm" or "rmsnorm".
    variant: one of `list_variants("norm")`, or "auto". Of the CUDA kernels no gradient can be had. TypeError,
    ValueError naming the argument.
    """
    check_inputs(x, weight, bias, eps, kind)
    given = (x, weight) if bias is None else (x, weight, bias)
    return FAMILY.run(variant, *given, eps=eps, kind=kind)


def check_inputs(x: Any, weight: Any, bias: Any, eps: Any, kind: Any) -> None:
    """TypeError or ValueError naming what is wrong."""
    if kind not in KINDS:
        raise ValueError(f"kind must be 'layernorm' or 'rmsnorm', got {kind!r}")
    x = tensor("x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have at least one number in its last dimension, got shape {tuple(x.shape)}")
    like("weight", weight, x, tuple(x.shape[-1:]))
    if bias is not None and kind == "rmsnorm":
        raise ValueError("bias must be None for kind='rmsnorm', which has none: add it to the result")
    if bias is not None:
        like("bias", bias, x, tuple(x.shape[-1:]))
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be a number that is not negative, got {eps!r}")


def formula(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float, kind: str, one_pass: bool = False
) -> Tensor:
    """The formula, with the mean first and then the variance, or, if `one_pass`, both by Welford's rule."""
    wide, n = x.float(), x.shape[-1]
    if kind == "rmsnorm":
        mean, squares = torch.zeros_like(wide[..., :1]), (wide**2).sum(-1, keepdim=True)
    elif one_pass:
        _, mean, squares = welford(wide)
    else:
        mean = wide.mean(-1, keepdim=True)
        squares = ((wide - mean) ** 2).sum(-1, keepdim=True)
    out = (wide - mean) / torch.sqrt(squares / n + eps) * weight.float()
    return (out if bias is None else out + bias.float()).to(x.dtype)


def _torch(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float, kind: str) -> Tensor:
    if kind == "layernorm":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def welford(x: Float[Tensor, "... n"]) -> tuple[int, Float[Tensor, "... 1"], Float[Tensor, "... 1"]]:
    """How many numbers a row has, their mean, and the sum of their squares about it: halves are merged."""
    n = x.shape[-1]
    if n == 1:
        return 1, x, torch.zeros_like(x)
    (n_a, mean_a, s_a), (n_b, mean_b, s_b) = welford(x[..., : n // 2]), welford(x[..., n // 2 :])
    away = mean_b - mean_a
    return n, mean_a + away * (n_b / n), s_a + s_b + away**2 * (n_a * n_b / n)


FAMILY = Family(
    "norm",
    (
        Variant("torch", "layer_norm and rms_norm", _torch),
        Variant("formula", "readable: the mean, then the variance", formula),
        Variant("welford", "readable: both in one pass", partial(formula, one_pass=True)),
        *rungs("norm", "norm", RUNGS),
        triton("norm", "norm", "a tile of whole rows in registers; with its gradients, in two kernels"),
    ),
)
sys.modules[__name__].__class__ = CallableModule
