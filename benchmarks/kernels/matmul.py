"""The matmul ladder: what does each rung move, and how near does it come to cuBLAS?

On a GPU every rung is timed beside torch's product, which is cuBLAS there, with TF32 off, random factors and a cold L2.
On a processor nothing is timed, since an emulator's time says nothing of a GPU: what each rung asks of the memory is
counted.

What to look at: bytes of global memory fall first (coalesced, then tiled), then requests (the sums of a thread, then
float4), then passes over shared memory (a warp's tile). The tensor cores' rungs ask for a thousandth of the bytes per
FLOP that the first asked for, which is what it takes to feed sixteen times the FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlsys.bench import Benchmark, Impl, Plot, Work
from mlsys.kernels import matmul_cuda
from mlsys.kernels.cuda import profile
from mlsys.kernels.matmul import matmul

Case = Mapping[str, Any]
ON_PROCESSOR = 512  # rows and columns up to which a processor counts in seconds
ALLOWED = {"float32": 1e-4, "bfloat16": 1e-2}  # of the largest element: roundings of long sums, one of bfloat16


@dataclass(frozen=True)
class Product:
    """A result, and what its kernel moved where that was counted."""

    c: Tensor
    counts: dict[str, float]


def case(rung: str, n: int) -> Case:
    dtype = matmul_cuda.LADDER[rung].dtype
    return {"rung": rung, "n": n, "dtype": str(dtype).removeprefix("torch.")}


def inputs(case: Case, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(case["n"])
    n, dtype = case["n"], getattr(torch, case["dtype"])
    a, b = (torch.randn(n, n, generator=generator, device=device).to(dtype) for _ in range(2))
    return a, b


def work(case: Case, ab: tuple[Tensor, Tensor]) -> Work:
    n, flops = case["n"], 2 * case["n"] ** 3
    return Work(flops=flops, bytes=3 * n * n * ab[0].element_size(), items=flops, unit="FLOP")


def blas(a: Tensor, b: Tensor) -> Tensor:
    return matmul(a, b, variant="torch")


def kernel(a: Tensor, b: Tensor, rung: str) -> Tensor:
    return matmul_cuda.matmul(a, b, variant=rung)


def prepare(function: Callable[..., Tensor], case: Case, ab: tuple[Tensor, Tensor]) -> Callable[[], Product]:
    if function is not kernel:
        return lambda: Product(function(*ab), {})
    counts = {} if ab[0].is_cuda else count(case["rung"], *ab)
    return lambda: Product(function(*ab, case["rung"]), counts)


def count(rung: str, a: Tensor, b: Tensor) -> dict[str, float]:
    """What a rung asks of global and of shared memory, for each thing it computes."""
    run, how, args = matmul_cuda.arguments(a, b, rung)
    p = profile(run, how.grid, how.block, *args, shared=how.shared)
    kflops = 2 * a.shape[0] * a.shape[1] * b.shape[1] / 1000
    return {
        "bytes/FLOP": p.bytes / kflops / 1000,
        "of sectors wanted, %": 100 * p.ideal_bytes / p.bytes,
        "requests/kFLOP": sum(access.requests for access in p.accesses) / kflops,
        "shared passes/kFLOP": p.shared_passes / kflops,
        "of them conflicts, %": 100 * p.conflicts / max(p.shared_passes, 1),
    }


def verify(case: Case, ab: tuple[Tensor, Tensor], got: Product, want: Product) -> tuple[float, float]:
    """Largest error relative to the reference's largest element."""
    error = (got.c.float() - want.c.float()).abs().max() / want.c.float().abs().max()
    return error.item(), ALLOWED[case["dtype"]]


RUNGS = list(matmul_cuda.LADDER)
bench = Benchmark(
    __file__,
    cases={
        "quick": [*(case(rung, 128) for rung in RUNGS), *(case(rung, 2048) for rung in RUNGS)],
        "default": [*(case(rung, 256) for rung in RUNGS), *(case(rung, 4096) for rung in RUNGS)],
        "full": [case(rung, n) for n in (256, 512, 1024, 2048, 4096, 8192) for rung in RUNGS],
    },
    inputs=inputs,
    work=work,
    impls={"torch": Impl(lambda: blas, "reference"), "kernel": Impl(lambda: kernel, "ours")},
    subject="kernel",
    prepare=prepare,
    verify=verify,
    figures=lambda case, ab, got: got.counts,
    counted=lambda impl, device: device == "cpu",
    fits=lambda case, device: (case["n"] <= ON_PROCESSOR) == (device == "cpu"),
    contract="kernels.matmul",
    plots=(
        Plot(x="n", xlabel="rows and columns", panel=("dtype", "rung"), y="throughput", only=lambda c: c["n"] >= 1024),
    ),
)
if __name__ == "__main__":
    bench.main()
