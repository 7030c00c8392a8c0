"""GELU of x + bias by CUDA kernels: in two, as operations run one by one, or fused into one.

Cost:
    Some 30 operations a number for erfc or tanh: still less than the time its 8 bytes take.

Memory:
    `separate` reads and writes each number twice, `bias_fused` once.

Papers:
    Hendrycks & Gimpel 2016, arXiv:1606.08415 (section 2: GELU and its approximation by tanh).

See also:
    `mlsys.kernels.gelu` (the readable version).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mlsys.kernels._inputs import forward_only, variant_of
from mlsys.kernels._launch import CTYPES, Launch, ceil_div, fill, run, warps
from mlsys.kernels.gelu import RUNGS, check_inputs

VARIANTS = tuple(RUNGS)
THREADS = 256


def gelu(
    x: Float[Tensor, "... n"],
    bias: Float[Tensor, " n"] | None = None,
    *,
    approximate: str = "none",
    variant: str = "bias_fused",
) -> Float[Tensor, "... n"]:
    """GELU(x + bias), the bias along x's last dimension, by one of `VARIANTS`; on x's device.

    approximate: "none", with erf, or "tanh". TypeError, ValueError naming the argument.
    """
    out, plan = launches(x, bias, approximate=approximate, variant=variant)
    run(plan)
    return out


def launches(
    x: Float[Tensor, "... n"],
    bias: Float[Tensor, " n"] | None = None,
    *,
    approximate: str = "none",
    variant: str = "bias_fused",
) -> tuple[Float[Tensor, "... n"], list[Launch]]:
    """Where the result will be, and the launches that put it there."""
    check_inputs(x, bias, approximate)
    forward_only(x=x, bias=bias)
    variant_of(variant, VARIANTS)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return out, []
    x, n, columns, kind = x.contiguous(), x.numel(), x.shape[-1], CTYPES[x.dtype]
    bias = None if bias is None else bias.contiguous()
    rows, threads, tanh = n // columns, warps(columns), int(approximate == "tanh")
    if variant == "bias_fused":
        return out, [Launch("gelu.bias_fused", f"gelu_bias<{kind}>", rows, threads, (columns, x, bias, out, tanh))]
    plan = []
    if bias is not None:
        moved = torch.empty_like(x)
        plan.append(Launch("gelu.separate", f"add_bias<{kind}>", rows, threads, (columns, x, bias, moved)))
        x = moved
    blocks = fill(x, THREADS, ceil_div(n, THREADS))
    plan.append(Launch("gelu.separate", f"gelu<{kind}>", blocks, THREADS, (n, x, out, tanh)))
    return out, plan
