"""All prefix sums of n numbers at once: what looks like a loop is a tree.

    inclusive   y_i = x_0 + … + x_i
    exclusive   y_i = x_0 + … + x_{i−1}, and y_0 = 0

Each sum continues the one before, so it seems that nothing can be done at the same time. Two ways out:

`steps` (Hillis & Steele): add to each number the one 1 place before it, then the one 2 places before it, then 4, 8, …
After the step of distance d each place holds the sum of 2d numbers. log2(n) steps, n additions in each.

`tree` (Blelloch): the sums of pairs are half as many numbers. Scan those, by the same rule; then every second result is
there already, and the others are one addition away. As many additions as numbers, twice, in 2 · log2(n) steps.

Prefix sums give every one of many parallel writers its place: where do the survivors of a filter go, where does the
bucket of a sort begin, where does a sequence start in a packed batch? Any associative operation will do in place of
+; for the recurrence h_t = a_t · h_{t−1} + b_t of a state-space model it is the composition of two such steps.

Cost:
    `steps`: n · log2(n) additions in log2(n) steps. `tree`: 2n in 2 · log2(n).

Memory:
    n numbers to read and n to write: the least traffic is that of a copy.

Papers:
    Hillis & Steele 1986, "Data Parallel Algorithms", Communications of the ACM 29(12) (`steps`).
    Blelloch 1990, "Prefix Sums and Their Applications", CMU-CS-90-190 (`tree`, and what it is good for).

See also:
    `mlsys.kernels.scan_cuda` (the kernels), `mlsys.kernels.reduction` (the total only).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mlsys.kernels._inputs import tensor
from mlsys.kernels._rungs import rungs
from mlsys.kernels._variants import CallableModule, Family, Variant

RUNGS = {
    "hillis_steele": "log2(n) steps, all threads in each",
    "blelloch": "up a tree and down again, linear work",
    "decoupled": "one pass: tiles look back at their predecessors",
}


def scan(x: Float[Tensor, " n"], *, exclusive: bool = False, variant: str = "auto") -> Float[Tensor, " n"]:
    """The sum of x, float32, up to each place, or, if `exclusive`, before it.

    variant: one of `list_variants("scan")`, or "auto". Of the CUDA kernels no gradient can be had. TypeError,
    ValueError naming the argument.
    """
    check_inputs(x, exclusive)
    return FAMILY.run(variant, x, exclusive=exclusive)


def check_inputs(x: Any, exclusive: Any) -> None:
    """TypeError or ValueError naming what is wrong."""
    tensor("x", x, (torch.float32,), "(n,)")
    if not isinstance(exclusive, bool):
        raise TypeError(f"exclusive must be True or False, got {exclusive!r}")


def steps(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The inclusive scan in log2(n) steps."""
    distance = 1
    while distance < len(x):
        x = torch.cat([x[:distance], x[distance:] + x[:-distance]])
        distance *= 2
    return x


def tree(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The exclusive scan by pairs: those of the pairs' sums are every second result."""
    if len(x) <= 1:
        return torch.zeros_like(x)
    pairs = torch.nn.functional.pad(x, (0, len(x) % 2)).view(-1, 2)
    before = tree(pairs.sum(1))  # what comes before each pair
    return torch.stack([before, before + pairs[:, 0]], 1).flatten()[: len(x)]


def _cumsum(x: Tensor, *, exclusive: bool) -> Tensor:
    return _shifted(x.cumsum(0)) if exclusive else x.cumsum(0)


def _by_steps(x: Tensor, *, exclusive: bool) -> Tensor:
    return _shifted(steps(x)) if exclusive else steps(x)


def _by_tree(x: Tensor, *, exclusive: bool) -> Tensor:
    return tree(x) if exclusive else tree(x) + x


def _shifted(up_to: Tensor) -> Tensor:
    return torch.cat([up_to.new_zeros(min(1, len(up_to))), up_to[:-1]])


FAMILY = Family(
    "scan",
    (
        Variant("torch", "torch.cumsum", _cumsum),
        Variant("steps", "readable: add what lies 1, 2, 4 … places before", _by_steps),
        Variant("tree", "readable: scan the sums of pairs", _by_tree),
        *rungs("scan", "scan", RUNGS),
    ),
)
sys.modules[__name__].__class__ = CallableModule
