"""Published numbers about kernels, counted while our own kernels run on the processor."""

from __future__ import annotations

from functools import cache

from mlsys.claims import _kernels_cross_entropy, _kernels_families
from mlsys.claims.core import Claim

BOEHM = "Boehm 2022, How to Optimize a CUDA Matmul Kernel for cuBLAS-like Performance: a Worklog"
SIZE = 128  # rows, columns and products of a sum, of the run that is counted
LONG = 4096  # of the sums that are spoken of
SIDE = 4092  # of the matrices that the worklog begins with


@cache
def _accesses(rung: str) -> dict[tuple[str, str], float]:
    """Accesses of single threads for each element of the result, by memory and kind."""
    import torch

    from mlsys.kernels import matmul_cuda
    from mlsys.kernels.cuda import profile

    a, b = torch.randn(2, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    kernel, how, args = matmul_cuda.arguments(a, b, rung)
    counted: dict[tuple[str, str], float] = {}
    for access in profile(kernel, how.grid, how.block, *args, shared=how.shared).accesses:
        of = access.space, access.kind
        counted[of] = counted.get(of, 0.0) + access.lanes / SIZE**2
    return counted


def loads(rung: str, space: str) -> float:
    """Loads for each element of the result, where its sum has 4096 products."""
    return _accesses(rung)[space, "read"] * LONG / SIZE


def naive_gigabytes() -> float:
    """What the naive kernel asks of the memory for matrices of 4092 × 4092, without any cache."""
    counted = _accesses("naive")
    each = counted["global", "read"] * SIDE / SIZE + counted["global", "write"]
    return each * 4 * SIDE**2 / 1e9


def _per_result(name: str, rung: str, space: str, published: float, formula: str, what: str) -> Claim:
    return Claim(
        name=name,
        area="kernels.matmul",
        source=f"{BOEHM}, {what} ({formula} a result)",
        what=f"loads from {space} memory for each result, k = {LONG}, by the rung {rung}, counted at {SIZE}",
        unit="",
        published=published,
        digits=0,
        compute=lambda: loads(rung, space),
        formula=True,
    )


CLAIMS = [
    *_kernels_families.CLAIMS,
    *_kernels_cross_entropy.CLAIMS,
    Claim(
        name="matmul-naive-traffic",
        area="kernels.matmul",
        source=f"{BOEHM}, kernel 1 (548 GB of traffic if nothing is cached)",
        what=f"bytes that the naive kernel asks for, matrices of {SIDE} × {SIDE}, counted at {SIZE}",
        unit="GB",
        published=548,
        digits=0,
        compute=naive_gigabytes,
    ),
    _per_result("matmul-tiled-global", "tiled", "global", 256, "K/16", "kernel 4, of the kernel before it"),
    _per_result("matmul-tiled-shared", "tiled", "shared", 8192, "K·2", "kernel 4, of the kernel before it"),
    _per_result("matmul-1d-global", "tiled_1d", "global", 128, "K/32", "kernel 4"),
    _per_result("matmul-1d-shared", "tiled_1d", "shared", 4608, "K·9/8", "kernel 4"),
    _per_result("matmul-2d-global", "tiled_2d", "global", 64, "K/64", "kernel 5"),
    _per_result("matmul-2d-shared", "tiled_2d", "shared", 1024, "K/4", "kernel 5"),
]
