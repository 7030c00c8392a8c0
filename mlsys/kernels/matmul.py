"""Matrix product in tiles: what is loaded into fast memory is used many times before it leaves.

The formula says it all and hides the cost:

    C[i, j] = Σₖ A[i, k] · B[k, j]

Computed an element at a time, each of the m·n sums reads 2·k numbers, and two numbers are moved for one
multiplication and one addition. But every number of A is needed n times, every one of B m times. So cut C into tiles
of block_m × block_n.
A tile needs block_m rows of A and block_n columns of B, a slice of block_k of them at a time:

    for each tile of C:
        S = 0
        for each slice of k:
            S += A[tile's rows, slice] · B[slice, tile's columns]
        C[tile] = S

A number of A that is loaded for a tile now serves block_n products. What is loaded is m·n·k · (1/block_m + 1/block_n)
numbers instead of 2·m·n·k: larger, squarer tiles move less, until they no longer fit into the fast memory.

That one step, applied again at each level of the machine, is the whole ladder of kernels: the L2 cache's tile of
blocks, a block's tile in shared memory, a warp's tile, a thread's tile in registers, and a tensor core's 16 × 8. Each
`.cu` file beside this one takes one step, in the order of `list_variants("matmul")`.

Cost:
    2·m·n·k FLOPs however it is tiled; `traffic` counts what the tiles load and store.

Memory:
    One tile of C and the slices of A and B beside inputs and result: block_m·block_n + block_k·(block_m + block_n)
    numbers.

Where it loses: `tiled` is for reading, and for its counts. A BLAS library does the same with tiles for each cache and
in assembly; a loop over tiles in Python adds its own cost to each.

Papers:
    Hong & Kung 1981, "I/O Complexity: The Red-Blue Pebble Game", STOC (no order of the products moves less, up to a
    constant).
    Goto & van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34(3) (a tile for each
    cache).
    Volkov & Demmel 2008, "Benchmarking GPUs to Tune Dense Linear Algebra", SC (tiles in registers, not in shared
    memory alone).

See also:
    `mlsys.kernels.matmul_cuda` (the ladder), `mlsys.kernels.matmul_triton` (in Triton, with an epilogue and
    gradients), `mlsys.kernels.cuda` (how to run, check and count a kernel),
    `mlsys.perf.roofline` (what bytes per FLOP are good for).
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import torch
from torch import Tensor

from mlsys.kernels._variants import CallableModule, Chosen, Family, Variant

__all__ = ["FAMILY", "chosen", "matmul", "tiled", "traffic"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RUNGS = {
    "naive": "one thread an element, neighbours in a column",
    "coalesced": "neighbouring threads take neighbouring columns",
    "tiled": "a block's tile in shared memory",
    "tiled_1d": "a thread computes a column of elements",
    "tiled_2d": "a thread computes a square of elements",
    "vectorized": "four floats an instruction",
    "warp_tiled": "a tile for each warp, and the next one on its way",
    "wmma": "tensor cores, by the portable way",
    "mma": "tensor cores by their own instructions, fed by asynchronous copies",
    "hopper": "TMA, wgmma, specialised warps, a persistent grid",
}
TRITON = {
    "tiled": "in Triton: a program a tile, in an order that suits the second-level cache",
    "persistent": "a program a multiprocessor, which walks along the tiles",
    "descriptor": "the same walk, and tiles that are copied by TMA",
}


def matmul(a: Tensor, b: Tensor, *, variant: str = "auto") -> Tensor:
    """The product (m, n) of a (m, k) and b (k, n), in their dtype: float32, bfloat16, float16 or float64.

    variant: "auto", or one of `list_variants("matmul")`; `chosen(a, b)` says which "auto" takes. The CUDA kernels run
    on the processor if that is where the tensors are; they take float32 (those up to "cuda.warp_tiled") or bfloat16
    (the rest), sum in float32, and have no gradient. Tensors that are not contiguous are copied for them. The Triton
    kernels take all but float64, and any strides but for "triton.descriptor", and have a gradient.
    With k = 0 the result is zeros. NaN and infinity pass through, as in the formula: 0 · NaN is NaN.
    TypeError or ValueError naming the argument if shapes, dtypes or devices do not fit, or the variant cannot do it.
    """
    check_inputs(a, b)
    if not isinstance(variant, str):
        raise TypeError(f"variant must be a name, got {variant!r}")
    return FAMILY.run(variant, a, b)


def chosen(a: Tensor, b: Tensor) -> Chosen:
    """Which variant "auto" takes for these tensors, and why."""
    check_inputs(a, b)
    return FAMILY.choose(a, b)


def tiled(a: Tensor, b: Tensor, *, block_m: int = 128, block_n: int = 128, block_k: int = 32) -> Tensor:
    """The product (m, n) of a (m, k) and b (k, n), tile by tile: sums in float32 at least, rounded once.

    Sizes need not be multiples of the blocks. TypeError or ValueError as in `matmul`, and for blocks that are not
    positive.
    """
    check_inputs(a, b)
    _check_blocks(block_m, block_n, block_k)
    (m, k), n = a.shape, b.shape[1]
    wide = torch.promote_types(a.dtype, torch.float32)
    c = a.new_empty(m, n)
    for i in range(0, m, block_m):
        for j in range(0, n, block_n):
            a_rows, b_columns = a[i : i + block_m], b[:, j : j + block_n]
            total = a.new_zeros(len(a_rows), b_columns.shape[1], dtype=wide)  # a tile of C, in registers
            for first in range(0, k, block_k):
                a_tile = a_rows[:, first : first + block_k].to(wide)  # in shared memory
                b_tile = b_columns[first : first + block_k].to(wide)
                total += a_tile @ b_tile
            c[i : i + block_m, j : j + block_n] = total.to(c.dtype)
    return c


def traffic(m: int, n: int, k: int, block_m: int = 1, block_n: int = 1) -> int:
    """Numbers that are loaded and stored when C is computed in tiles of block_m × block_n; 1 × 1 is the plain formula.

    Each tile loads its rows of A and its columns of B once; what lies beyond an edge is not there to be loaded. The
    length of the slices does not matter. ValueError for a size below 0 or a block below 1.
    """
    if min(m, n, k) < 0:
        raise ValueError(f"m, n and k must be at least 0, got {m}, {n}, {k}")
    _check_blocks(block_m, block_n, 1)
    loads_of_a, loads_of_b = -(-n // block_n), -(-m // block_m)  # how often each is read in full
    return m * k * loads_of_a + k * n * loads_of_b + m * n


def check_inputs(a: Any, b: Any) -> None:
    """TypeError or ValueError naming the argument, what it is and what to do, unless a · b is a matrix product."""
    for name, x in (("a", a), ("b", b)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch tensor, got {type(x).__name__}")
        if x.dim() != 2:
            raise ValueError(
                f"{name} must be a matrix, got shape {tuple(x.shape)}: "
                + (
                    "give its rows and columns two dimensions"
                    if x.dim() < 2
                    else "flatten its first dimensions into one"
                )
            )
        if x.layout != torch.strided:
            raise TypeError(f"{name} must be dense, got the layout {x.layout}: give {name}.to_dense()")
    if a.dtype not in DTYPES:
        raise TypeError(f"a must be float32, bfloat16, float16 or float64, got {a.dtype}: convert it, as by a.float()")
    if a.dtype != b.dtype:
        raise TypeError(f"a and b must have one dtype, got {a.dtype} and {b.dtype}: give b.to({a.dtype})")
    if a.device != b.device:
        raise ValueError(f"a and b must be on one device, got {a.device} and {b.device}: give b.to({str(a.device)!r})")
    if a.shape[1] != b.shape[0]:
        remedy = "; b.mT would fit" if a.shape[1] == b.shape[1] else ""
        raise ValueError(
            f"a must have as many columns as b has rows, got {tuple(a.shape)} and {tuple(b.shape)}: "
            f"{a.shape[1]} and {b.shape[0]}{remedy}"
        )


def _check_blocks(*blocks: int) -> None:
    for name, block in zip(("block_m", "block_n", "block_k"), blocks, strict=True):
        if not isinstance(block, int) or isinstance(block, bool) or block < 1:
            raise ValueError(f"{name} must be a positive int, got {block!r}")


def _cuda(rung: str, idea: str) -> Variant:
    def run(a: Tensor, b: Tensor) -> Tensor:
        from mlsys.kernels import matmul_cuda

        return matmul_cuda.matmul(a, b, variant=rung)

    def refuse(a: Tensor, b: Tensor) -> str | None:
        from mlsys.kernels import matmul_cuda

        return matmul_cuda.refuse(a, b, rung)

    return Variant(f"cuda.{rung}", idea, run, refuse)


def _triton(variant: str, idea: str) -> Variant:
    def run(a: Tensor, b: Tensor) -> Tensor:
        from mlsys.kernels import matmul_triton

        return matmul_triton.matmul(a, b, variant=variant)

    def refuse(a: Tensor, b: Tensor) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: pip install triton"
        from mlsys.kernels import matmul_triton

        return matmul_triton.refuse(a, b, variant=variant)

    return Variant(f"triton.{variant}", idea, run, refuse)


FAMILY = Family(
    "matmul",
    (
        Variant("torch", "the library's: cuBLAS on a GPU, MKL or OpenBLAS on a CPU", torch.matmul),
        Variant("tiled", "the readable one, in torch", tiled),
        *(_cuda(rung, idea) for rung, idea in RUNGS.items()),
        *(_triton(variant, idea) for variant, idea in TRITON.items()),
    ),
)
sys.modules[__name__].__class__ = CallableModule
