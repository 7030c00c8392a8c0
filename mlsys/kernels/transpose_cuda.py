"""Transpose by CUDA kernels: tiles of 32 × 32 numbers, a block of 32 × 8 threads each.

A warp reads 32 numbers that lie side by side, and so does each of the block's 8 rows of threads, 4 times.

Cost:
    No arithmetic but that of addresses.

Memory:
    Reads and writes each number once; `naive` writes 32 bytes for each 4 that it means. 4 KiB of shared memory a block.

Papers:
    Ruetsch & Micikevicius 2009, "Optimizing Matrix Transpose in CUDA", NVIDIA (the tile, and its padding).

See also:
    `mlsys.kernels.transpose` (the readable version).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mlsys.kernels._inputs import forward_only, tensor, variant_of
from mlsys.kernels._launch import CTYPES, Launch, ceil_div, run
from mlsys.kernels.transpose import RUNGS

VARIANTS = tuple(RUNGS)
TILE, BLOCK = 32, (32, 8)


def transpose(x: Float[Tensor, "m n"], *, variant: str = "padded") -> Float[Tensor, "n m"]:
    """Rows and columns of x exchanged, in memory of its own, by one of `VARIANTS`; on x's device.

    TypeError, ValueError naming the argument.
    """
    out, plan = launches(x, variant=variant)
    run(plan)
    return out


def launches(x: Float[Tensor, "m n"], *, variant: str = "padded") -> tuple[Float[Tensor, "n m"], list[Launch]]:
    """Where the transpose will be, and the launch that puts it there."""
    x = tensor("x", x, shape="(rows, columns)")
    forward_only(x=x)
    variant_of(variant, VARIANTS)
    rows, columns = x.shape
    out = torch.empty((columns, rows), dtype=x.dtype, device=x.device)
    if not x.numel():
        return out, []
    kernel = f"transpose_{variant}<{CTYPES[x.dtype]}>"
    grid = ceil_div(rows, TILE) * ceil_div(columns, TILE)
    return out, [Launch(f"transpose.{variant}", kernel, grid, BLOCK, (rows, columns, x.contiguous(), out))]
