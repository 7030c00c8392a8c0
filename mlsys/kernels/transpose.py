"""Transpose in tiles: rows and columns exchanged in pieces small enough to lie in near memory.

    out[j][i] = x[i][j]

No arithmetic at all; the whole question is in which order memory is touched. Memory is read and written in pieces,
32-byte sectors on a GPU, cache lines of 64 on a processor. Whoever goes along the rows of x jumps down the columns of
the result, and uses 4 bytes of every piece; the other way round it is no better. A tile of T × T numbers has both
kinds of neighbours: read along its rows into near memory (cache, shared memory), write along its columns.

Cost:
    Nothing is computed.

Memory:
    Every number is read once and written once, if T numbers in a row are at least one piece, and a tile fits.

Papers:
    Ruetsch & Micikevicius 2009, "Optimizing Matrix Transpose in CUDA", NVIDIA (the tile in shared memory, and its
    padding).
    Lam, Rothberg & Wolf 1991, "The Cache Performance and Optimizations of Blocked Algorithms", ASPLOS (tiles and
    caches).

See also:
    `mlsys.kernels.transpose_cuda` (the kernels).
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
    "naive": "reads along rows, writes along columns",
    "tiled": "a tile is turned in shared memory",
    "padded": "the same without bank conflicts",
}


def transpose(x: Float[Tensor, "m n"], *, variant: str = "auto") -> Float[Tensor, "n m"]:
    """x, float32 or bfloat16, with rows and columns exchanged, in memory of its own (`x.t()` is another view of the
    same).

    variant: one of `list_variants("transpose")`, or "auto". Of the CUDA kernels no gradient can be had. TypeError,
    ValueError naming the argument.
    """
    return FAMILY.run(variant, tensor("x", x, shape="(rows, columns)"))


def tiles(x: Float[Tensor, "m n"], size: int = 32) -> Float[Tensor, "n m"]:
    """The transpose, one tile of size × size after the other; those at the edges are smaller."""
    rows, columns = x.shape
    out = x.new_empty(columns, rows)
    for i in range(0, rows, size):
        for j in range(0, columns, size):
            tile = x[i : i + size, j : j + size]  # a kernel reads it into shared memory here
            out[j : j + size, i : i + size] = tile.t()
    return out


FAMILY = Family(
    "transpose",
    (
        Variant("torch", "x.t(), copied", lambda x: x.t().clone(memory_format=torch.contiguous_format)),
        Variant("tiles", "the readable one: one tile after the other", tiles),
        *rungs("transpose", "transpose", RUNGS),
    ),
)
sys.modules[__name__].__class__ = CallableModule
