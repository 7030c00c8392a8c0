"""The sum of a tensor by CUDA kernels: where each rung is launched, and on what.

Two launches of the same kernel. The first leaves one number a block, the second has one block, which adds those. The
grid is no larger than the GPU holds at once: a thread then has many numbers of its own to add before it meets others.

Cost:
    n − 1 additions. Two launches: a few microseconds, which show below some hundred thousand numbers.

Memory:
    Reads n numbers once, and writes and reads one float a block.

Papers:
    Harris 2007, "Optimizing Parallel Reduction in CUDA", NVIDIA (kernels 3, 5 and 7: what the first two rungs start
    from).
    Luitjens 2014, "Faster Parallel Reductions on Kepler", NVIDIA developer blog (shuffles in place of shared memory).

See also:
    `mlsys.kernels.reduction` (the readable version), `mlsys.kernels.scan_cuda` (all partial sums).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mlsys.kernels._inputs import forward_only, tensor, variant_of
from mlsys.kernels._launch import CTYPES, Launch, ceil_div, fill, run
from mlsys.kernels.reduction import RUNGS

VARIANTS = tuple(RUNGS)
THREADS = 256


def sum(x: Float[Tensor, ...], *, variant: str = "vectorized") -> Float[Tensor, ""]:
    """The sum of all elements, float32 whatever x is, by one of `VARIANTS`; on x's device.

    The same numbers give the same bits on every run. TypeError, ValueError naming the argument.
    """
    out, plan = launches(x, variant=variant)
    run(plan)
    return out


def launches(x: Float[Tensor, ...], *, variant: str = "vectorized") -> tuple[Float[Tensor, ""], list[Launch]]:
    """Where the sum will be, and the launches that put it there."""
    x = tensor("x", x)
    forward_only(x=x)
    variant_of(variant, VARIANTS)
    out = torch.zeros((), dtype=torch.float32, device=x.device)
    if not x.numel():
        return out, []
    x = x.contiguous()

    def launch(x: Tensor, out: Tensor, blocks: int) -> Launch:
        kernel = f"sum_{variant}<{CTYPES[x.dtype]}>"
        return Launch(f"reduction.{variant}", kernel, blocks, THREADS, (x.numel(), x, out))

    per_thread = 2 * 16 // x.element_size() if variant == "vectorized" else 1
    blocks = fill(x, THREADS, ceil_div(x.numel(), THREADS * per_thread))
    if blocks == 1:
        return out, [launch(x, out, 1)]
    partial = torch.empty(blocks, dtype=torch.float32, device=x.device)
    return out, [launch(x, partial, blocks), launch(partial, out, 1)]
