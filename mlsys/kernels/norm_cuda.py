"""LayerNorm and RMSNorm by CUDA kernels: a block a row, or a warp a row.

The rows are those of the last dimension. `block`: as many threads as the row has numbers, in whole warps, up to 256,
and LayerNorm's variance in a pass after the mean. `warp`: 4 rows a block, and both in one pass.

Cost:
    Some 8 operations a number; `warp` has a division a number besides.

Memory:
    Traffic between caches and processors: LayerNorm reads each number three times (`block`) or twice (`warp`), RMSNorm
    twice; both write it once. Rows that fit into the caches come from memory once.

Papers:
    Ba, Kiros & Hinton 2016, arXiv:1607.06450 (LayerNorm: equations 3 and 4).
    Zhang & Sennrich 2019, arXiv:1910.07467 (RMSNorm: equation 4).
    Welford 1962, "Note on a Method for Calculating Corrected Sums of Squares and Products", Technometrics 4(3).
    Chan, Golub & LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances",
    STAN-CS-79-773.

See also:
    `mlsys.kernels.norm` (the readable version).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mlsys.kernels._inputs import forward_only, variant_of
from mlsys.kernels._launch import CTYPES, Launch, ceil_div, run, warps
from mlsys.kernels.norm import RUNGS, check_inputs

VARIANTS = tuple(RUNGS)
ROWS = 4  # of a block, in `warp`


def norm(
    x: Float[Tensor, "... n"],
    weight: Float[Tensor, " n"],
    bias: Float[Tensor, " n"] | None = None,
    *,
    eps: float = 1e-5,
    kind: str = "layernorm",
    variant: str = "warp",
) -> Float[Tensor, "... n"]:
    """LayerNorm or RMSNorm over x's last dimension, computed in float32, by one of `VARIANTS`; on x's device.

    bias: for `layernorm` only. eps: added to the variance, or to the mean square. TypeError, ValueError naming the
    argument.
    """
    out, plan = launches(x, weight, bias, eps=eps, kind=kind, variant=variant)
    run(plan)
    return out


def launches(
    x: Float[Tensor, "... n"],
    weight: Float[Tensor, " n"],
    bias: Float[Tensor, " n"] | None = None,
    *,
    eps: float = 1e-5,
    kind: str = "layernorm",
    variant: str = "warp",
) -> tuple[Float[Tensor, "... n"], list[Launch]]:
    """Where the result will be, and the launch that puts it there."""
    check_inputs(x, weight, bias, eps, kind)
    forward_only(x=x, weight=weight, bias=bias)
    variant_of(variant, VARIANTS)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return out, []
    columns = x.shape[-1]
    rows = x.numel() // columns
    kernel = f"{kind}_{variant}<{CTYPES[x.dtype]}>"
    weights: list[Tensor | None] = [weight.contiguous()]
    if kind == "layernorm":
        weights.append(bias if bias is None else bias.contiguous())
    args = (columns, x.contiguous(), *weights, float(eps), out)
    if variant == "block":
        return out, [Launch("norm.block", kernel, rows, warps(columns), args)]
    return out, [Launch("norm.warp", kernel, ceil_div(rows, ROWS), (32, ROWS), (rows, *args))]
