"""Depthwise 1-D convolution by CUDA kernels: each thread reads all it needs, or the block reads it once for all.

A block has 256 results of one row, that is, of one channel of one sequence.

Cost:
    2 · width FLOPs a result.

Memory:
    `depthwise_naive`: width reads a result, most of them from L1; `depthwise_shared`: 1 + (width − 1) / 256.

Papers:
    Gu & Dao 2023, arXiv:2312.00752 (section 3.4: the short causal convolution of a Mamba block).

See also:
    `mlsys.kernels.conv1d` (the readable version).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mlsys.kernels._inputs import forward_only, variant_of
from mlsys.kernels._launch import CTYPES, Launch, ceil_div, run, warps
from mlsys.kernels.conv1d import RUNGS, check_inputs, geometry

VARIANTS = tuple(RUNGS)
WIDEST = 4096  # so that filter, tile and halo fit into the 48 KiB of shared memory that every GPU gives unasked


def conv1d(
    x: Float[Tensor, "b c n"],
    weight: Float[Tensor, "c w"],
    bias: Float[Tensor, " c"] | None = None,
    *,
    padding: int | str = 0,
    variant: str = "depthwise_shared",
) -> Float[Tensor, "b c m"]:
    """Each channel with its own filter, sums in float32, by one of `VARIANTS`; on x's device.

    padding: zeros on both sides, or "causal": width − 1 before the sequence and none after. TypeError, ValueError
    naming the argument.
    """
    out, plan = launches(x, weight, bias, padding=padding, variant=variant)
    run(plan)
    return out


def launches(
    x: Float[Tensor, "b c n"],
    weight: Float[Tensor, "c w"],
    bias: Float[Tensor, " c"] | None = None,
    *,
    padding: int | str = 0,
    variant: str = "depthwise_shared",
) -> tuple[Float[Tensor, "b c m"], list[Launch]]:
    """Where the result will be, and the launch that puts it there."""
    check_inputs(x, weight, bias, padding)
    forward_only(x=x, weight=weight, bias=bias)
    variant_of(variant, VARIANTS)
    batch, channels, width = x.shape[0], x.shape[1], weight.shape[1]
    if why := refuse(x, weight, padding=padding, variant=variant):
        raise ValueError(why)
    left, length = geometry(x, weight, padding)
    out = torch.empty((batch, channels, length), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out, []
    threads = warps(length)
    across = ceil_div(length, threads)
    bias = None if bias is None else bias.contiguous()
    args = (channels, x.shape[2], length, width, left, across, x.contiguous(), weight.contiguous(), bias, out)
    kernel = f"conv1d_{variant.removeprefix('depthwise_')}<{CTYPES[x.dtype]}>"
    shared = 4 * (2 * width + threads - 1) if variant == "depthwise_shared" else 0
    return out, [Launch(f"conv1d.{variant}", kernel, across * channels * batch, threads, args, shared)]


def refuse(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: int | str, variant: str) -> str | None:
    """Why this rung cannot compute what it is given, or None."""
    if variant == "depthwise_shared" and weight.shape[1] > WIDEST:
        return f"weight must be at most {WIDEST} wide for depthwise_shared, got {weight.shape[1]}: take depthwise_naive"
    return None
