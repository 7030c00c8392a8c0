"""Softmax in one pass less: the maximum and the sum can be found together.

    softmax(x)_i = exp(x_i − m) / Σ_j exp(x_j − m),   m = max_j x_j

Without m, exp overflows above 88 in float32; m changes nothing else, since it cancels. But it is known only when all of
the row has been seen, so there are three passes: the maximum, the sum, the quotients.

The sum can be kept relative to the largest number *so far*. When a larger one comes, what was summed is rescaled:

    m' = max(m, x),   d' = d · exp(m − m') + exp(x − m')

In the end m is the maximum and d the sum: one pass for both. The pair (m, d) of one part of a row and that of another
part are merged by the same rule, in any order, which is what lets warps and blocks share a row, and attention work in
tiles.

Cost:
    3 FLOPs and 2 exponentials a number; `online` rescales, which costs a third.

Memory:
    Reads the row three times (`three_pass`) or twice (`online`), writes it once: three quarters of the traffic where
    a row does not fit into a cache.

Papers:
    Milakov & Gimelshein 2018, arXiv:1805.02867 (Algorithm 2: the safe softmax; Algorithm 3: the online one).

See also:
    `mlsys.kernels.softmax_cuda` (the kernels), `mlsys.attention.merge` (the same rule, with values to be averaged).
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mlsys.kernels._inputs import tensor
from mlsys.kernels._rungs import rungs, triton
from mlsys.kernels._variants import CallableModule, Family, Variant

RUNGS = {
    "three_pass": "maximum, sum, quotients",
    "online": "maximum and sum in one pass",
}


def softmax(x: Float[Tensor, "... n"], *, variant: str = "auto") -> Float[Tensor, "... n"]:
    """The softmax over the last dimension of x, float32 or bfloat16; computed in float32.

    −∞ becomes 0; a row of nothing but −∞ has no softmax and becomes NaN, as in torch. variant: one of
    `list_variants("softmax")`, or "auto". Of the CUDA kernels no gradient can be had. TypeError, ValueError naming
    the argument.
    """
    check_inputs(x)
    return FAMILY.run(variant, x)


def check_inputs(x: Any) -> None:
    """TypeError or ValueError naming what is wrong."""
    if tensor("x", x).ndim == 0:
        raise ValueError("x must have at least one dimension, got a single number: give x[None]")


def three_pass(x: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
    """Maximum, sum, quotients."""
    wide = x.float()
    m = wide.amax(-1, keepdim=True) if x.shape[-1] else wide
    d = torch.exp(wide - m).sum(-1, keepdim=True)
    return (torch.exp(wide - m) / d).to(x.dtype)


def online(x: Float[Tensor, "... n"], block: int = 128) -> Float[Tensor, "... n"]:
    """Maximum and sum in one pass, `block` numbers at a time; then the quotients."""
    wide = x.float()
    m = wide.new_full((*x.shape[:-1], 1), -math.inf)
    d = torch.zeros_like(m)
    for part in wide.split(block, -1) if x.shape[-1] else ():
        larger = torch.maximum(m, part.amax(-1, keepdim=True))
        shift = larger.masked_fill(larger == -math.inf, 0.0)  # only −∞ so far: −∞ − 0 and not −∞ − −∞, which is NaN
        d = d * torch.exp(m - shift) + torch.exp(part - shift).sum(-1, keepdim=True)
        m = larger
    return (torch.exp(wide - m) / d).to(x.dtype)


FAMILY = Family(
    "softmax",
    (
        Variant("torch", "torch.softmax", lambda x: x.softmax(-1)),
        Variant("three_pass", "readable: maximum, sum, quotients", three_pass),
        Variant("online", "readable: maximum and sum in one pass", online),
        *rungs("softmax", "softmax", RUNGS),
        triton("softmax", "softmax", "a tile of whole rows in registers, or the online rule; with its gradient"),
    ),
)
sys.modules[__name__].__class__ = CallableModule
