"""The contract of `kernels.reduction`: the sum of all elements, in float32, at sizes that fill no block."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlsys.contracts._kernels_common import BLOCK, UNIT, draw, exact, result
from mlsys.contracts.core import Case, Contract, Inputs, Results, Wrong, accepts

SIGNATURE = "sum(x) -> a float32 tensor of no dimensions"


def case(*shape: int, dtype: str = "float32", special: str = "none") -> Case:
    """One case; `special`: ones, or a view that begins between two addresses that wide loads could take."""
    return {"shape": shape, "dtype": dtype, "special": special}


CASES = [
    case(1024),
    case(1000),
    case(1),
    case(31),
    case(33),
    case(257),
    case(4099),
    case(1003, special="shifted"),
    case(7, 11, 13),
    case(70_001),
    case(0),
    case(3000, dtype="bfloat16"),
    case(1005, dtype="bfloat16", special="shifted"),
    case(5000, dtype="bfloat16", special="ones"),  # a sum in bfloat16 stops growing at 256
]


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Normal numbers; "shifted" leaves out the first of them, and so the alignment of the memory."""
    generator = torch.Generator().manual_seed(seed)
    x = draw(generator, *case["shape"], dtype=case["dtype"], device=device)
    if case["special"] == "ones":
        x.fill_(1.0)
    return {"x": x[1:] if case["special"] == "shifted" else x}


def call(impl: Callable[..., Any], inputs: Inputs) -> Results:
    """The sum."""
    accepts(impl, 1, {}, SIGNATURE)
    return {"sum": result(impl(inputs["x"]), (), torch.float32)}


def oracle(inputs: Inputs) -> Mapping[str, np.ndarray]:
    """Each number exactly once: the sum of float64, without an error by `math.fsum`."""
    return {"sum": np.asarray(math.fsum(exact(inputs["x"]).ravel().tolist()))}


def tolerance(inputs: Inputs, name: str, want: np.ndarray) -> float:
    """√n float32 roundings of the sum of magnitudes: what one after the other may lose, not what a tree does."""
    x = exact(inputs["x"])
    return float((4 + math.sqrt(x.size)) * UNIT * np.abs(x).sum() / 2)


def _wrong(hint: str, what: Callable[[Tensor], Tensor]) -> Wrong:
    def impl(x: Tensor) -> Tensor:
        return what(x.flatten()).to(torch.float32)

    return Wrong(impl, hint)


def _whole(x: Tensor, block: int) -> Tensor:
    return x[: x.numel() // block * block]


def _one_by_one(x: Tensor) -> Tensor:
    """In the dtype of x; torch's own sum of bfloat16 numbers is a float32 one."""
    if x.dtype == torch.float32:
        return x.sum()
    total = x.new_zeros(())
    for value in x:
        total = total + value
    return total


def _upper_lanes_lost(x: Tensor) -> Tensor:
    lanes = torch.arange(x.numel(), device=x.device) % 32
    return x[lanes < 16].float().sum()


WRONG = {
    "last_partial_block": _wrong(
        "the last block is not full: launch ⌈n / block⌉ blocks, and test i < n",
        lambda x: _whole(x, BLOCK).float().sum(),
    ),
    "last_partial_load": _wrong(
        "n need not be a multiple of 4: add the numbers after the last whole load one by one",
        lambda x: _whole(x, 4).float().sum(),
    ),
    "first_block_only": _wrong(
        "add up what all blocks have found, not only the first one", lambda x: x[:BLOCK].float().sum()
    ),
    "upper_lanes": _wrong("32 lanes take 5 steps: 16, 8, 4, 2, 1", _upper_lanes_lost),
    "narrow": _wrong("add up in float32: a bfloat16 sum of ones stops at 256", _one_by_one),
    "first_twice": _wrong(
        "each number once: who begins again with a neighbour's number counts it twice",
        lambda x: x.float().sum() + x[:1].float().sum(),
    ),
    "magnitudes": _wrong("numbers have signs", lambda x: x.float().abs().sum()),
    "mean": _wrong("the sum, not the mean", lambda x: x.float().sum() / max(x.numel(), 1)),
}


def contract(name: str, reference: Callable[..., Any]) -> Contract:
    """The contract under this name, which `mlsys.contracts.kernels` gives it."""
    return Contract(name, SIGNATURE, reference, CASES, inputs, call, oracle, tolerance, WRONG)
