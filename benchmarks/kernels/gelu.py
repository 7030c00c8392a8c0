"""GELU of x + bias: what is fusing two elementwise operations worth?

On a GPU both are timed beside torch's two operations with a cold L2, and held against the bandwidth of a copy. On a
processor nothing is timed: what each asks of the memory is counted.

What to look at: half the bytes, and half the launches.
"""

from __future__ import annotations

from typing import Any

import torch

from mlsys.bench import Work
from mlsys.bench.core import Case
from mlsys.bench.ladder import ROWS, ladder
from mlsys.kernels import gelu, gelu_cuda


def case(rung: str, rows: int, columns: int) -> Case:
    return {"rung": rung, "rows": rows, "columns": columns, "dtype": "float32"}


def inputs(case: Case, device: str) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(case["columns"])
    x = 2 * torch.randn(case["rows"], case["columns"], generator=generator, device=device)
    return {"x": x, "bias": torch.randn(case["columns"], generator=generator, device=device)}


def work(case: Case, given: dict[str, Any]) -> Work:
    n = case["rows"] * case["columns"]
    return Work(flops=10 * n, bytes=4 * (2 * n + case["columns"]), items=8 * n, unit="B")


CASES = {size: [case(rung, *shape) for shape in shapes for rung in gelu_cuda.VARIANTS] for size, shapes in ROWS.items()}
bench = ladder(
    __file__,
    family="gelu",
    function=gelu.gelu,
    launches=gelu_cuda.launches,
    cases=CASES,
    inputs=inputs,
    numbers=lambda case: int(case["rows"] * case["columns"]),
    work=work,
    allowed=1e-5,
)

if __name__ == "__main__":
    bench.main()
