"""Depthwise 1-D convolution: every channel has a filter of its own, and a result needs its neighbours only.

    out[b][c][t] = bias[c] + Σ_k weight[c][k] · x[b][c][t + k − left]

with 0 in place of what lies outside of the sequence. As everywhere in deep learning the filter is not turned round:
what mathematics calls a correlation. With left = width − 1, and as many results as numbers, no result sees what comes
after it: a causal convolution, as the short ones before a state-space or linear-attention layer are.

It is width shifted copies of the sequence, each multiplied by one number, added up. Channels do not mix, so there is no
matrix product in it: 2 · width FLOPs for a number that is read and one that is written. With the width of 4 that is
usual, one FLOP per byte: all depends on reading each number once.

Cost:
    2 · width FLOPs a result.

Memory:
    One read and one write of the sequence, if neighbours share what they read; width reads if not.

Papers:
    Gu & Dao 2023, arXiv:2312.00752 (section 3.4 and Figure 3: a causal convolution before the selective scan).

See also:
    `mlsys.kernels.conv1d_cuda` (the kernels), `mlsys.attention.linear` (what such a convolution comes before).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mlsys.kernels._inputs import like, tensor
from mlsys.kernels._rungs import rungs
from mlsys.kernels._variants import CallableModule, Family, Variant

RUNGS = {
    "depthwise_naive": "each thread reads all that it needs",
    "depthwise_shared": "a block reads it once for all of its threads",
}


def conv1d(
    x: Float[Tensor, "b c n"],
    weight: Float[Tensor, "c w"],
    bias: Float[Tensor, " c"] | None = None,
    *,
    padding: int | str = 0,
    variant: str = "auto",
) -> Float[Tensor, "b c m"]:
    """Each channel of x (batch, channels, length; float32 or bfloat16) with its own filter, `weight[channel]`.

    padding: zeros before and after the sequence, m = n + 2 · padding − width + 1; or "causal", width − 1 before it
    and none after, m = n. variant: one of `list_variants("conv1d")`, or "auto". Of the CUDA kernels no gradient can
    be had. TypeError, ValueError naming the argument.
    """
    check_inputs(x, weight, bias, padding)
    return FAMILY.run(variant, *((x, weight) if bias is None else (x, weight, bias)), padding=padding)


def check_inputs(x: Any, weight: Any, bias: Any, padding: Any) -> None:
    """TypeError or ValueError naming what is wrong."""
    x = tensor("x", x, shape="(batch, channels, length)")
    weight = tensor("weight", weight, shape="(channels, width)")
    if weight.shape[1] == 0:
        raise ValueError(f"weight must be at least 1 wide, got shape {tuple(weight.shape)}")
    like("weight", weight, x, (x.shape[1], weight.shape[1]))
    if bias is not None:
        like("bias", bias, x, (x.shape[1],))
    if padding != "causal" and (isinstance(padding, bool) or not isinstance(padding, int) or padding < 0):
        raise ValueError(f"padding must be 'causal' or an int that is not negative, got {padding!r}")
    if geometry(x, weight, padding)[1] < (x.shape[2] > 0):
        raise ValueError(
            f"weight must be no wider than the padded sequence, {x.shape[2]} + 2 · {padding}, got {weight.shape[1]}"
        )


def geometry(x: Tensor, weight: Tensor, padding: int | str) -> tuple[int, int]:
    """The zeros before the sequence, and the length of the result."""
    length, width = x.shape[2], weight.shape[1]
    if isinstance(padding, str):
        return width - 1, length
    return padding, length + 2 * padding - width + 1


def shifts(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: int | str) -> Tensor:
    """`width` shifted copies, each times one number of the filter."""
    padded, length = _padded(x, weight, padding), geometry(x, weight, padding)[1]
    out = x.new_zeros((*x.shape[:2], length), dtype=torch.float32)
    for k in range(weight.shape[1]):
        out = out + weight[:, k, None].float() * padded[:, :, k : k + length].float()
    return (out if bias is None else out + bias[:, None].float()).to(x.dtype)


def _torch(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: int | str) -> Tensor:
    if not x.numel():  # which torch's refuses
        return shifts(x, weight, bias, padding=padding)
    return F.conv1d(_padded(x, weight, padding), weight[:, None], bias, groups=x.shape[1])


def _padded(x: Tensor, weight: Tensor, padding: int | str) -> Tensor:
    left, length = geometry(x, weight, padding)
    return F.pad(x, (left, length + weight.shape[1] - 1 - left - x.shape[2]))


FAMILY = Family(
    "conv1d",
    (
        Variant("torch", "conv1d with as many groups as channels", _torch),
        Variant("shifts", "the readable one: shifted copies, added up", shifts),
        *rungs("conv1d", "conv1d", RUNGS),
    ),
)
sys.modules[__name__].__class__ = CallableModule
