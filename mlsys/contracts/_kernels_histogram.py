"""The contract of `kernels.histogram`: exact counts of whole numbers, at the first and the last bin and beyond them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlsys.contracts._kernels_common import BLOCK, result
from mlsys.contracts.core import Case, Contract, Inputs, Results, Wrong, accepts

SIGNATURE = "histogram(x int32 or uint8, bins) -> (bins,) int32"


def case(n: int, bins: int, *, low: int = 0, high: int | None = None, dtype: str = "int32") -> Case:
    """One case: numbers from `low` up to and without `high`, which is `bins` if None."""
    return {"n": n, "bins": bins, "low": low, "high": bins if high is None else high, "dtype": dtype}


CASES = [
    case(1024, 8),
    case(1000, 10),
    case(1, 1),
    case(31, 4),
    case(33, 300),
    case(5000, 37),
    case(3000, 10, low=-5, high=15),  # some are no bin
    case(70_001, 256, dtype="uint8"),
    case(500, 100, high=256, dtype="uint8"),
    case(2000, 5, low=3, high=4),  # all in one bin
    case(20, 5000),
    case(0, 3),
]


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Numbers that are all equally likely."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(case["low"], case["high"], (case["n"],), generator=generator)
    return {"x": x.to(getattr(torch, case["dtype"])).to(device), "bins": case["bins"]}


def call(impl: Callable[..., Any], inputs: Inputs) -> Results:
    """The counts."""
    accepts(impl, 1, {"bins": inputs["bins"]}, SIGNATURE)
    return {"counts": result(impl(inputs["x"], bins=inputs["bins"]), (inputs["bins"],), torch.int32)}


def oracle(inputs: Inputs) -> Mapping[str, np.ndarray]:
    """One after the other, in plain Python."""
    counts = Counter(inputs["x"].tolist())
    return {"counts": np.array([counts[bin] for bin in range(inputs["bins"])], dtype=np.float64)}


def tolerance(inputs: Inputs, name: str, want: np.ndarray) -> float:
    """Counts are exact."""
    return 0.0


def _count(x: Tensor, bins: int) -> Tensor:
    x = x.long()
    return torch.bincount(x[(x >= 0) & (x < bins)], minlength=bins).int()


def _without(x: Tensor, bins: int, bin: int) -> Tensor:
    counts = _count(x, bins)
    counts[bin] = 0
    return counts


def _lost(x: Tensor, bins: int) -> Tensor:
    """Of the lanes of a warp that add to the same bin at the same time, one is counted."""
    counts = torch.zeros(bins, dtype=torch.int32, device=x.device)
    for warp in x.long().split(32):
        counts[warp[(warp >= 0) & (warp < bins)].unique()] += 1
    return counts


WRONG = {
    "lost_counts": Wrong(_lost, "counts[v] += 1 from many threads loses counts: use atomicAdd"),
    "last_bin": Wrong(lambda x, bins: _without(x, bins, -1), "bins are 0 … bins − 1: the last one counts, too"),
    "first_bin": Wrong(lambda x, bins: _without(x, bins, 0), "0 is a bin like any other"),
    "last_partial_block": Wrong(
        lambda x, bins: _count(x[: len(x) // BLOCK * BLOCK], bins),
        "the last block is not full: launch ⌈n / block⌉ blocks, and test i < n",
    ),
    "clamped": Wrong(
        lambda x, bins: _count(x.long().clamp(0, bins - 1), bins),
        "what is no bin is not counted: it does not belong to the nearest one",
    ),
    "wrapped": Wrong(lambda x, bins: _count(x.long() % bins, bins), "what is no bin is not counted: no v % bins"),
    "block_twice": Wrong(
        lambda x, bins: _count(x, bins) + _count(x[:BLOCK], bins) * (len(x) > BLOCK),
        "each number is counted by one block: a grid-stride loop steps by gridDim · blockDim",
    ),
}


def contract(name: str, reference: Callable[..., Any]) -> Contract:
    """The contract under this name, which `mlsys.contracts.kernels` gives it."""
    return Contract(name, SIGNATURE, reference, CASES, inputs, call, oracle, tolerance, WRONG)
