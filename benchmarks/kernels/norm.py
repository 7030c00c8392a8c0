"""LayerNorm and RMSNorm: a block a row or a warp a row, and what does a second pass cost?

On a GPU every rung is timed beside torch's layer_norm and rms_norm with a cold L2, and held against the bandwidth
of a copy. On a processor nothing is timed: what each rung asks of the memory is counted.

What to look at: LayerNorm's passes, three or two, and shared memory, which a warp a row does without.
"""

from __future__ import annotations

from typing import Any

import torch

from mlsys.bench import Work
from mlsys.bench.core import Case
from mlsys.bench.ladder import ROWS, ladder
from mlsys.kernels import norm, norm_cuda
from mlsys.kernels.norm import KINDS


def case(rung: str, rows: int, columns: int, kind: str) -> Case:
    return {"rung": rung, "rows": rows, "columns": columns, "dtype": "float32", "kind": kind}


def inputs(case: Case, device: str) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(case["columns"])
    x = torch.randn(case["rows"], case["columns"], generator=generator, device=device) + 1
    weight = torch.randn(case["columns"], generator=generator, device=device)
    return {"x": x, "weight": weight, "kind": case["kind"]}


def work(case: Case, given: dict[str, Any]) -> Work:
    n = case["rows"] * case["columns"]
    return Work(flops=8 * n, bytes=4 * (2 * n + case["columns"]), items=8 * n, unit="B")


CASES = {
    size: [case(rung, *shape, kind) for kind in KINDS for shape in shapes for rung in norm_cuda.VARIANTS]
    for size, shapes in ROWS.items()
}
bench = ladder(
    __file__,
    family="norm",
    function=norm.norm,
    launches=norm_cuda.launches,
    cases=CASES,
    inputs=inputs,
    numbers=lambda case: int(case["rows"] * case["columns"]),
    work=work,
    allowed=1e-5,
)

if __name__ == "__main__":
    bench.main()
