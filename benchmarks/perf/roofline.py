"""The roofline: is it ever broken on this machine, and how near does real work come?

What to look at: a share of the limit above 100% breaks the roof. That is allowed
only where the operands stay in cache, as the small addition's do: the bound counts
bytes from memory. Down the rows m the matmul moves from one side of the ridge to
the other: compare the shares far from it with those around it, where arithmetic
and memory would both have to be at their best. `torch out=` writes where it wrote
before; what it gains over `torch` is the price of fresh memory, which no formula
here has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlsys.bench import Benchmark, Impl, Plot, Work
from mlsys.perf import hardware, roofline

Case = Mapping[str, Any]
DTYPES = ("float32", "bfloat16")
SIDE = 4096  # of the weights: 64 MiB of float32
ALLOWED = {"float32": 1e-4, "bfloat16": 2e-2}  # relative to the largest value: sums may be taken in any order
ELSEWHERE = hardware.find("h100")  # the bound of the same work on another machine, for comparison


def matmul(m: int, dtype: str) -> Case:
    return {"op": "matmul", "m": m, "n": SIDE, "dtype": dtype}


def add(elements: int, dtype: str) -> Case:
    return {"op": "add", "m": 1, "n": elements, "dtype": dtype}


def softmax(rows: int, dtype: str) -> Case:
    return {"op": "softmax", "m": rows, "n": SIDE, "dtype": dtype}


def inputs(case: Case, device: str) -> list[Tensor]:
    """The operands, m × n and, of a matmul, n × n. The result is always m × n."""
    generator = torch.Generator(device).manual_seed(case["m"] + case["n"])
    m, n = case["m"], case["n"]
    shapes = {"matmul": [(m, n), (n, n)], "add": [(m, n), (m, n)], "softmax": [(m, n)]}[case["op"]]
    dtype = getattr(torch, case["dtype"])
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]


def work(case: Case, operands: list[Tensor]) -> Work:
    m, n, itemsize = case["m"], case["n"], operands[0].element_size()
    if case["op"] == "matmul":
        flops, bytes_ = roofline.matmul_work(m, n, n, itemsize)
        return Work(flops=flops, bytes=bytes_)
    # an addition; a maximum, a difference, an exponential (counted as one), a sum and a quotient
    flops_per_element = {"add": 1, "softmax": 5}[case["op"]]
    return Work(flops=flops_per_element * m * n, bytes=(len(operands) + 1) * m * n * itemsize)


def figures(case: Case, operands: list[Tensor], got: Tensor) -> dict[str, float]:
    """Where the case lies, and the least time that the same work takes on another machine."""
    todo = work(case, operands)
    there = roofline.bound(todo.flops, todo.bytes, ELSEWHERE, case["dtype"])
    return {"FLOP/B": there.intensity, f"bound on {ELSEWHERE.name} (µs)": there.seconds * 1e6}


def prepare(function: Callable[..., Tensor], case: Case, operands: list[Tensor]) -> Callable[[], Tensor]:
    out = torch.empty_like(operands[0])
    return lambda: function(case["op"], operands, out)


def verify(case: Case, operands: list[Tensor], got: Tensor, want: Tensor) -> tuple[float, float]:
    """Largest difference relative to the reference's largest value."""
    scale = want.double().abs().max()
    return ((got.double() - want.double()).abs().max() / scale).item(), ALLOWED[case["dtype"]]


def fresh(op: str, operands: list[Tensor], out: Tensor) -> Tensor:
    """The plain expression: each call's result is a new tensor."""
    if op == "matmul":
        return operands[0] @ operands[1]
    return operands[0] + operands[1] if op == "add" else torch.softmax(operands[0], -1)


def in_place(op: str, operands: list[Tensor], out: Tensor) -> Tensor:
    """The same kernels, writing to memory that is already there."""
    if op == "matmul":
        return torch.mm(*operands, out=out)
    return torch.add(*operands, out=out) if op == "add" else torch.softmax(operands[0], -1, out=out)


def in_numpy(op: str, operands: list[Tensor], out: Tensor) -> Tensor:
    """NumPy, writing to the same memory; its softmax is one pass over it for each step."""
    if out.device.type != "cpu":
        raise ValueError("NumPy runs on the CPU: leave it out with --peer none")
    arrays, result = [x.numpy() for x in operands], out.numpy()
    if op == "matmul":
        np.matmul(arrays[0], arrays[1], out=result)
    elif op == "add":
        np.add(arrays[0], arrays[1], out=result)
    else:
        np.subtract(arrays[0], arrays[0].max(axis=-1, keepdims=True), out=result)
        np.exp(result, out=result)
        result /= result.sum(axis=-1, keepdims=True)
    return out


bench = Benchmark(
    __file__,
    cases={
        "quick": [
            *(matmul(m, dtype) for dtype in DTYPES for m in (1, 16, 256)),
            *(add(n, dtype) for dtype in DTYPES for n in (2**16, 2**24)),
            *(softmax(2048, dtype) for dtype in DTYPES),
        ],
        "default": [
            *(matmul(m, dtype) for dtype in DTYPES for m in (1, 2, 4, 8, 16, 32, 64, 256, 1024)),
            *(add(n, dtype) for dtype in DTYPES for n in (2**16, 2**20, 2**24)),
            *(softmax(rows, dtype) for dtype in DTYPES for rows in (16, 4096)),
        ],
        "full": [
            *(matmul(m, dtype) for dtype in DTYPES for m in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, SIDE)),
            *(add(n, dtype) for dtype in DTYPES for n in (2**12, 2**14, 2**16, 2**18, 2**20, 2**22, 2**24, 2**26)),
            *(softmax(rows, dtype) for dtype in DTYPES for rows in (1, 16, 256, 4096, 16384)),
        ],
    },
    inputs=inputs,
    work=work,
    impls={
        "torch": Impl(lambda: fresh, "reference"),
        "torch out=": Impl(lambda: in_place, "ours"),
        "numpy": Impl(lambda: in_numpy, "peer", only=lambda case: case["dtype"] == "float32"),
    },
    subject="torch out=",
    prepare=prepare,
    verify=verify,
    figures=figures,
    plots=(
        Plot(y="roofline"),
        Plot(
            x="m",
            xlabel="rows m of an m × 4096 by 4096 × 4096 matmul",
            panel=("dtype",),
            only=lambda c: c["op"] == "matmul",
        ),
        Plot(x="n", xlabel="elements added", panel=("dtype",), only=lambda c: c["op"] == "add"),
    ),
)

if __name__ == "__main__":
    bench.main()
