"""Histogram by CUDA kernels: atomics on the counts that all share, or on a copy a block.

The grid is no larger than the GPU holds at once, so that a block has many numbers for each bin that it adds at the end.

Cost:
    An atomic a number.

Memory:
    Reads n numbers once. `shared_atomics`: 4 bytes of shared memory a bin.

Papers:
    Podlozhnyuk 2007, "Histogram calculation in CUDA", NVIDIA (a histogram a block, or a warp, in shared memory).

See also:
    `mlsys.kernels.histogram` (the readable version).
"""

from __future__ import annotations

import torch
from jaxtyping import Int, Integer
from torch import Tensor

from mlsys.kernels._inputs import variant_of
from mlsys.kernels._launch import CTYPES, Launch, ceil_div, fill, run
from mlsys.kernels.histogram import RUNGS, check_inputs

VARIANTS = tuple(RUNGS)
THREADS = 256
MOST_BINS = 12_288  # of 4 bytes, in the 48 KiB of shared memory that every GPU gives unasked


def histogram(x: Integer[Tensor, ...], bins: int, *, variant: str = "shared_atomics") -> Int[Tensor, " bins"]:
    """How many of x's numbers are 0, 1, …, bins − 1, int32, by one of `VARIANTS`; on x's device.

    x: int32 or uint8; other numbers than these are not counted. TypeError, ValueError naming the argument.
    """
    out, plan = launches(x, bins, variant=variant)
    run(plan)
    return out


def launches(
    x: Integer[Tensor, ...], bins: int, *, variant: str = "shared_atomics"
) -> tuple[Int[Tensor, " bins"], list[Launch]]:
    """Where the counts will be, all 0, and the launch that adds to them."""
    check_inputs(x, bins)
    variant_of(variant, VARIANTS)
    if why := refuse(x, bins=bins, variant=variant):
        raise ValueError(why)
    out = torch.zeros(bins, dtype=torch.int32, device=x.device)
    if not x.numel():
        return out, []
    kernel = f"histogram_{variant.removesuffix('_atomics')}<{CTYPES[x.dtype]}>"
    blocks = fill(x, THREADS, ceil_div(x.numel(), THREADS))
    shared = 4 * bins if variant == "shared_atomics" else 0
    args = (x.numel(), x.contiguous(), bins, out)
    return out, [Launch(f"histogram.{variant}", kernel, blocks, THREADS, args, shared)]


def refuse(x: Tensor, *, bins: int, variant: str) -> str | None:
    """Why this rung cannot compute what it is given, or None."""
    if variant == "shared_atomics" and bins > MOST_BINS:
        return f"bins must be at most {MOST_BINS} for shared_atomics, got {bins}: take global_atomics"
    return None
