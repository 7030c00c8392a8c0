"""Histogram: how to count from many places at once.

    counts[v] = how many of the x_i are v

One counter for each value, and every number adds 1 to its own. In sequence that is one line. At the same time it
loses counts: two read 7, both add 1, both write 8. Either the addition is atomic, then those who meet at a counter
wait for each other; or everyone counts in a row of counters of their own, and the rows are added up in the end. What
a GPU does is both: a block has its own counters, in shared memory, its threads add to them atomically, and blocks are
added up.

How long it takes depends on the data as no other kernel here does: numbers that are all the same all meet at one
counter.

Cost:
    n additions, and one for each counter and each row of counters.

Memory:
    Reads n numbers once; a row of counters for each of those who count apart.

Papers:
    Podlozhnyuk 2007, "Histogram calculation in CUDA", NVIDIA (counters in shared memory).

See also:
    `mlsys.kernels.histogram_cuda` (the kernels), `mlsys.kernels.scan` (counts become places: a counting sort).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from jaxtyping import Int, Integer
from torch import Tensor

from mlsys.kernels._inputs import tensor
from mlsys.kernels._rungs import rungs
from mlsys.kernels._variants import CallableModule, Family, Variant

RUNGS = {
    "global_atomics": "an atomic on the shared counts for each number",
    "shared_atomics": "a block counts for itself first",
}


def histogram(x: Integer[Tensor, ...], bins: int, *, variant: str = "auto") -> Int[Tensor, " bins"]:
    """How many of x's numbers, int32 or uint8, are 0, 1, …, bins − 1, as int32; others are not counted.

    variant: one of `list_variants("histogram")`, or "auto". TypeError, ValueError naming the argument.
    """
    check_inputs(x, bins)
    return FAMILY.run(variant, x, bins=bins)


def check_inputs(x: Any, bins: Any) -> None:
    """TypeError or ValueError naming what is wrong."""
    x = tensor("x", x, (torch.int32, torch.uint8))
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins must be a positive int, got {bins!r}")
    if x.numel() >= 2**31:
        raise ValueError(f"x must have fewer than 2³¹ numbers, which int32 counts hold, got {x.numel()}: add up parts")


def _bincount(x: Tensor, *, bins: int) -> Tensor:
    x = x.long()  # a uint8 compared with 256 would be compared with 0
    return torch.bincount(x[(x >= 0) & (x < bins)], minlength=bins).int()


def rows(x: Integer[Tensor, ...], *, bins: int, parts: int = 8) -> Int[Tensor, " bins"]:
    """Each part of x is counted in a row of its own, without looking at the others; then the rows are added."""
    values = torch.arange(bins, device=x.device)[:, None]
    counts = [(part == values).sum(1) for part in x.flatten().chunk(parts)]
    return torch.stack(counts).sum(0).int()


FAMILY = Family(
    "histogram",
    (
        Variant("torch", "torch.bincount of the numbers that are bins", _bincount),
        Variant("rows", "the readable one: a row of counters for each part", rows),
        *rungs("histogram", "histogram", RUNGS),
    ),
)
sys.modules[__name__].__class__ = CallableModule
