"""The matmul ladder, and Triton's: what does each rung move, and how near does it come to cuBLAS?

On a GPU every rung is timed beside torch's product, which is cuBLAS there, with TF32 off, random factors and a cold L2;
and the Triton kernels beside it and torch.compile, alone, with bias and GELU behind the product, and with the backward
pass. On a processor nothing is timed, since an emulator's time says nothing of a GPU: what each rung asks of the memory
is counted.

What to look at: bytes of global memory fall first (coalesced, then tiled), then requests (the sums of a thread, then
float4), then passes over shared memory (a warp's tile). The tensor cores' rungs ask for a thousandth of the bytes per
FLOP that the first asked for, which is what it takes to feed sixteen times the FLOPs. In Triton, what staying on the
chip, and then TMA, are worth; and the epilogue, which costs torch a read and a write of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mlsys.bench import Benchmark, Impl, Plot, Work
from mlsys.kernels import matmul_cuda
from mlsys.kernels.cuda import profile
from mlsys.kernels.matmul import TRITON

Case = Mapping[str, Any]
ON_PROCESSOR = 512  # rows and columns up to which a processor counts in seconds
# of the largest element: roundings of long sums, one of 16 bits
ALLOWED = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 2e-3}


@dataclass(frozen=True)
class Product:
    """A result, with gradients if the case has them, and what its kernel moved where that was counted."""

    tensors: list[Tensor]
    counts: dict[str, float]


def case(rung: str, n: int) -> Case:
    dtype = matmul_cuda.LADDER[rung].dtype
    return {"rung": rung, "n": n, "dtype": str(dtype).removeprefix("torch.")}


def triton_case(n: int, dtype: str = "bfloat16", *, epilogue: str = "none", backward: bool = False) -> Case:
    """epilogue: "none", or "bias, GELU"."""
    return {"n": n, "dtype": dtype, "epilogue": epilogue, "backward": backward}


def in_cuda(case: Case) -> bool:
    return "rung" in case


def in_triton(case: Case) -> bool:
    return "epilogue" in case


def inputs(case: Case, device: str) -> list[Tensor]:
    """Both factors; for the Triton kernels also the bias, and the gradient that arrives."""
    generator = torch.Generator(device).manual_seed(case["n"])
    n, dtype = case["n"], getattr(torch, case["dtype"])
    shapes = [(n, n), (n, n)] + [(n,), (n, n)] * in_triton(case)
    drawn = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
    if in_triton(case):
        drawn[1] /= n**0.5  # sums of the size of one, where the GELU bends
    drawn = [x.to(dtype) for x in drawn]
    for x in drawn[:3] if case.get("backward") else ():
        x.requires_grad_()
    return drawn


def work(case: Case, given: list[Tensor]) -> Work:
    backward = case.get("backward")
    n, flops = case["n"], 2 * case["n"] ** 3 * (3 if backward else 1)
    # a, b and the result; and the gradients of all three
    return Work(flops=flops, bytes=(6 if backward else 3) * n * n * given[0].element_size(), items=flops, unit="FLOP")


def blas(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return a @ b if bias is None else F.gelu(torch.addmm(bias, a, b))


def inductor() -> Callable[..., Tensor]:
    # each case anew and for its very sizes: after some recompilations torch would go on without compiling
    torch.compiler.reset()
    compiled: Callable[..., Tensor] = torch.compile(blas, fullgraph=True, dynamic=False)
    return compiled


def kernel(a: Tensor, b: Tensor, rung: str) -> Tensor:
    return matmul_cuda.matmul(a, b, variant=rung)


def triton(variant: str) -> Callable[..., Tensor]:
    from mlsys.kernels import matmul_triton

    def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        activation = None if bias is None else "gelu"
        result: Tensor = matmul_triton.matmul(a, b, bias, activation=activation, variant=variant)
        return result

    return product


def role(variant: str) -> Literal["ours", "variant"]:
    """The others are steps on the way."""
    return "ours" if variant == "descriptor" else "variant"


def prepare(function: Callable[..., Tensor], case: Case, given: list[Tensor]) -> Callable[[], Product]:
    a, b = given[:2]
    if function is kernel:
        counts = {} if a.is_cuda else count(case["rung"], a, b)
        return lambda: Product([function(a, b, case["rung"])], counts)
    wanted = given[:2] if case.get("epilogue", "none") == "none" else given[:3]

    def forward() -> Product:
        with torch.no_grad():
            return Product([function(*wanted)], {})

    def both() -> Product:
        c = function(*wanted)
        return Product([c.detach(), *torch.autograd.grad(c, wanted, given[3])], {})

    return both if case.get("backward") else forward


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


def verify(case: Case, given: list[Tensor], got: Product, want: Product) -> tuple[float, float]:
    """Largest error relative to the reference's largest element, of the result and each gradient."""
    errors = [
        ((x.float() - y.float()).abs().max() / y.float().abs().max()).item()
        for x, y in zip(got.tensors, want.tensors, strict=True)
    ]
    return max(errors), ALLOWED[case["dtype"]]


EPILOGUE = "bias, GELU"
IN_TRITON = [
    triton_case(8192),
    triton_case(4096, epilogue=EPILOGUE),
    triton_case(4096, backward=True),
    triton_case(4096, epilogue=EPILOGUE, backward=True),
]
RUNGS = list(matmul_cuda.LADDER)
bench = Benchmark(
    __file__,
    cases={
        "quick": [
            *(case(rung, 128) for rung in RUNGS),
            triton_case(4096),
            *IN_TRITON,
            *(case(rung, 2048) for rung in RUNGS),
        ],
        "default": [
            *(case(rung, 256) for rung in RUNGS),
            *(case(rung, 4096) for rung in RUNGS),
            *(triton_case(n) for n in (2048, 4096)),
            *IN_TRITON,
        ],
        "full": [
            *(case(rung, n) for n in (256, 512, 1024, 2048, 4096, 8192) for rung in RUNGS),
            *(triton_case(n) for n in (1024, 2048, 4096)),
            *IN_TRITON,
            *(triton_case(n, epilogue=EPILOGUE, backward=True) for n in (2048, 8192)),
            triton_case(4096, "float16"),
            triton_case(4096, "float32"),
        ],
    },
    inputs=inputs,
    work=work,
    impls={
        "torch": Impl(lambda: blas, "reference"),
        "torch.compile": Impl(inductor, "peer", only=in_triton),
        "kernel": Impl(lambda: kernel, "ours", only=in_cuda),
        **{
            f"triton {variant}": Impl(partial(triton, variant), role(variant), needs="triton", only=in_triton)
            for variant in TRITON
        },
    },
    subject="kernel",
    prepare=prepare,
    verify=verify,
    figures=lambda case, given, got: got.counts,
    counted=lambda impl, device: device == "cpu",
    fits=lambda case, device: (case["n"] <= ON_PROCESSOR) == (device == "cpu"),
    contract="kernels.matmul",
    plots=(
        Plot(
            x="n",
            xlabel="rows and columns",
            panel=("dtype", "rung"),
            y="throughput",
            only=lambda case: in_cuda(case) and case["n"] >= 1024,
        ),
        Plot(x="n", xlabel="rows and columns", panel=("dtype", "epilogue", "backward"), y="throughput", only=in_triton),
    ),
)
if __name__ == "__main__":
    bench.main()
