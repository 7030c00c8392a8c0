"""Softmax over rows by CUDA kernels: a block a row, in three passes or in two.

The rows are those of the last dimension. A block has as many threads as the row has numbers, in whole warps, up to 256.

Cost:
    An exponential and a division a number for each pass that needs them: `three_pass` two exponentials, `online` three.

Memory:
    Traffic between caches and processors: `three_pass` reads each number three times and writes it once, `online` reads
    it twice. Rows that fit into the caches come from memory once.

Papers:
    Milakov & Gimelshein 2018, arXiv:1805.02867 (Algorithms 2 and 3: the safe softmax, and the online one).

See also:
    `mlsys.kernels.softmax` (the readable version), `mlsys.attention.merge` (the same merge, for attention).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mlsys.kernels._inputs import forward_only, variant_of
from mlsys.kernels._launch import CTYPES, Launch, run, warps
from mlsys.kernels.softmax import RUNGS, check_inputs

VARIANTS = tuple(RUNGS)


def softmax(x: Float[Tensor, "... n"], *, variant: str = "online") -> Float[Tensor, "... n"]:
    """The softmax over x's last dimension, computed in float32, by one of `VARIANTS`; on x's device.

    A row of nothing but −∞ becomes NaN, as in torch. TypeError, ValueError naming the argument.
    """
    out, plan = launches(x, variant=variant)
    run(plan)
    return out


def launches(x: Float[Tensor, "... n"], *, variant: str = "online") -> tuple[Float[Tensor, "... n"], list[Launch]]:
    """Where the softmax will be, and the launch that puts it there."""
    check_inputs(x)
    forward_only(x=x)
    variant_of(variant, VARIANTS)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return out, []
    columns = x.shape[-1]
    kernel = f"softmax_{variant}<{CTYPES[x.dtype]}>"
    return out, [
        Launch(f"softmax.{variant}", kernel, x.numel() // columns, warps(columns), (columns, x.contiguous(), out))
    ]
