"""The contract of `kernels.scan`: all prefix sums, inclusive and exclusive, within a block and over many."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlsys.contracts._kernels_common import BLOCK, UNIT, draw, exact, result
from mlsys.contracts.core import Case, Contract, Inputs, Results, Wrong, accepts

SIGNATURE = "scan(x (n,), *, exclusive=False) -> (n,)"


def case(n: int, *, exclusive: bool = False) -> Case:
    """One case."""
    return {"n": n, "exclusive": exclusive}


CASES = [
    case(8),
    case(8, exclusive=True),
    *(case(n, exclusive=exclusive) for n in (1, 31, 33, 1000, 1025, 5000) for exclusive in (False, True)),
    case(70_000),
    case(0),
    case(0, exclusive=True),
]


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Normal numbers."""
    return {"x": draw(torch.Generator().manual_seed(seed), case["n"], device=device), "exclusive": case["exclusive"]}


def call(impl: Callable[..., Any], inputs: Inputs) -> Results:
    """The sums; the option is given only where it is not the default."""
    x, options = inputs["x"], {"exclusive": True} if inputs["exclusive"] else {}
    accepts(impl, 1, options, SIGNATURE)
    return {"sums": result(impl(x, **options), tuple(x.shape), x.dtype)}


def oracle(inputs: Inputs) -> Mapping[str, np.ndarray]:
    """One after the other, in float64."""
    total, sums = 0.0, []
    for value in exact(inputs["x"]).tolist():
        sums.append(total if inputs["exclusive"] else total + value)
        total += value
    return {"sums": np.asarray(sums)}


def tolerance(inputs: Inputs, name: str, want: np.ndarray) -> float:
    """√n float32 roundings of the sum of magnitudes."""
    x = exact(inputs["x"])
    return float((4 + math.sqrt(x.size)) * UNIT * np.abs(x).sum() / 2)


def _wrong(hint: str, sums: Callable[[Tensor], Tensor]) -> Wrong:
    """`sums`: the inclusive ones, with the mistake."""

    def impl(x: Tensor, *, exclusive: bool = False) -> Tensor:
        return _shifted(sums(x)) if exclusive else sums(x)

    return Wrong(impl, hint)


def _shifted(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:1]), x[:-1]])


def _blocks(x: Tensor, join: Callable[[Tensor], Tensor]) -> Tensor:
    """Each block by itself, plus what `join` makes of the blocks' totals."""
    rows = torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    within = rows.cumsum(1)
    return (within + join(within[:, -1])[:, None]).flatten()[: x.numel()]


def _steps_in_place(x: Tensor) -> Tensor:
    """Steps of 1, 2, 4 …, in which a number reads a neighbour that has already been added to."""
    row, distance = x.tolist(), 1
    while distance < min(len(row), 64):
        for i in range(distance, len(row)):
            row[i] += row[i - distance]
        distance *= 2
    return x.new_tensor(row)


def _power_of_two(x: Tensor) -> Tensor:
    """Scanned up to the largest power of two, and left as it was behind it."""
    n = 2 ** int(math.log2(max(x.numel(), 1)))
    return torch.cat([x[:n].cumsum(0), x[n:]])


WRONG = {
    "always_inclusive": Wrong(
        lambda x, *, exclusive=False: x.cumsum(0), "exclusive: the sum before each number, which begins with 0"
    ),
    "always_exclusive": Wrong(
        lambda x, *, exclusive=False: _shifted(x.cumsum(0)), "inclusive: each sum has the number of its own place, too"
    ),
    "blocks_apart": _wrong(
        "add to each block the total of all blocks before it", lambda x: _blocks(x, torch.zeros_like)
    ),
    "own_total_added": _wrong(
        "what is added to a block is the total *before* it: scan the totals exclusively",
        lambda x: _blocks(x, lambda totals: totals.cumsum(0)),
    ),
    "total_before_only": _wrong(
        "the totals must be scanned, too: all blocks before count, not only the last one",
        lambda x: _blocks(x, _shifted),
    ),
    "last_partial_block": _wrong(
        "the last block is not full: launch ⌈n / block⌉ blocks, and test i < n",
        lambda x: torch.cat([x[: len(x) // BLOCK * BLOCK].cumsum(0), torch.zeros_like(x[len(x) // BLOCK * BLOCK :])]),
    ),
    "in_place": _wrong(
        "a step must read what the step before has left: two buffers in turn, or a barrier between reading and writing",
        _steps_in_place,
    ),
    "power_of_two_only": _wrong("the tree wants a power of two: fill up with zeros", _power_of_two),
    "backwards": _wrong("from the first number on, not from the last", lambda x: x.flip(0).cumsum(0).flip(0)),
}


def contract(name: str, reference: Callable[..., Any]) -> Contract:
    """The contract under this name, which `mlsys.contracts.kernels` gives it."""
    return Contract(name, SIGNATURE, reference, CASES, inputs, call, oracle, tolerance, WRONG)
