"""The sum of n numbers in log2(n) steps: fold the second half onto the first until one number is left.

One after the other, n numbers take n − 1 additions that each wait for the one before. Addition is associative, so it
may be done in any order, and a tree of additions has as many, but only log2(n) of them in a row:

    x₀ + x₁ + … + x₇  =  ((x₀ + x₄) + (x₂ + x₆)) + ((x₁ + x₅) + (x₃ + x₇))

All additions of a level can be done at the same time. A GPU does so three times over: between the lanes of a warp, the
warps of a block, the blocks of a grid; and each thread first adds up many numbers by itself, because a tree as deep as
the numbers are many would keep most threads idle in most of its levels.

Floating-point addition is only nearly associative. The tree is the better order: every number takes part in log2(n)
roundings rather than up to n, so errors grow with √log n or log n, not with √n or n.

Cost:
    n − 1 additions, in ⌈log2(n)⌉ steps.

Memory:
    Reads n numbers: bound by memory on any machine, a quarter of a FLOP per byte. This version makes a copy of half the
    size in each step.

Papers:
    Harris 2007, "Optimizing Parallel Reduction in CUDA", NVIDIA (the tree on a GPU, step by step).
    Higham 1993, "The Accuracy of Floating Point Summation", SIAM J. Sci. Comput. 14(4) (section 3: pairwise summation).

See also:
    `mlsys.kernels.reduction_cuda` (the kernels), `mlsys.kernels.scan` (all partial sums).
"""

from __future__ import annotations

import sys

import torch
from jaxtyping import Float
from torch import Tensor

from mlsys.kernels._inputs import tensor
from mlsys.kernels._rungs import rungs
from mlsys.kernels._variants import CallableModule, Family, Variant

RUNGS = {
    "shared": "folded in shared memory, a barrier a step",
    "shuffle": "lanes hand each other registers, one barrier is left",
    "vectorized": "16 bytes a load",
}


def sum(x: Float[Tensor, ...], *, variant: str = "auto") -> Float[Tensor, ""]:
    """The sum of all elements of x, float32 or bfloat16, as a float32 number of no dimensions; 0 if there are none.

    variant: one of `list_variants("reduction")`, or "auto". Of the CUDA kernels no gradient can be had. TypeError,
    ValueError naming the argument.
    """
    return FAMILY.run(variant, tensor("x", x))


reduction = sum  # what the module does when it is called


def tree(x: Float[Tensor, ...]) -> Float[Tensor, ""]:
    """The sum by folding: in each step the upper half is added to the lower half."""
    part = x.flatten().float()
    if not part.numel():
        return part.sum()
    while (n := part.numel()) > 1:
        half = (n + 1) // 2  # if n is odd, the number in the middle has no partner and stays as it is
        part = torch.cat([part[: n - half] + part[half:], part[n - half : half]])
    return part[0]


FAMILY = Family(
    "reduction",
    (
        Variant("torch", "torch.sum", lambda x: x.sum(dtype=torch.float32)),
        Variant("tree", "the readable one: the upper half is added to the lower half", tree),
        *rungs("reduction", "sum", RUNGS),
    ),
)
sys.modules[__name__].__class__ = CallableModule
