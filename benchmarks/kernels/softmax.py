"""Softmax: what is a pass over the row worth?

On a GPU every rung is timed beside torch's softmax with a cold L2, and held against the bandwidth of a copy. On a
processor nothing is timed: what each rung asks of the memory is counted.

What to look at: 2.0 times the least bytes in three passes, 1.5 in two. On a GPU short rows hide the difference,
since they come from a cache the second time; very long ones show it.
"""

from __future__ import annotations

from typing import Any

import torch

from mlsys.bench import Work
from mlsys.bench.core import Case
from mlsys.bench.ladder import ROWS, ladder
from mlsys.kernels import softmax, softmax_cuda


def case(rung: str, rows: int, columns: int) -> Case:
    return {"rung": rung, "rows": rows, "columns": columns, "dtype": "float32"}


def inputs(case: Case, device: str) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(case["columns"])
    return {"x": 3 * torch.randn(case["rows"], case["columns"], generator=generator, device=device)}


def work(case: Case, given: dict[str, Any]) -> Work:
    n = case["rows"] * case["columns"]
    return Work(flops=5 * n, bytes=8 * n, items=8 * n, unit="B")


CASES = {
    size: [case(rung, *shape) for shape in shapes for rung in softmax_cuda.VARIANTS] for size, shapes in ROWS.items()
}
bench = ladder(
    __file__,
    family="softmax",
    function=softmax.softmax,
    launches=softmax_cuda.launches,
    cases=CASES,
    inputs=inputs,
    numbers=lambda case: int(case["rows"] * case["columns"]),
    work=work,
    allowed=1e-5,
)

if __name__ == "__main__":
    bench.main()
