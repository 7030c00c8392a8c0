"""Transpose: what do strided writes cost, and what do bank conflicts?

On a GPU every rung is timed beside torch's copy of x.t() with a cold L2, and held against the bandwidth of a copy.
On a processor nothing is timed: what each rung asks of the memory is counted.

What to look at: sectors a request, 18 on the average in the first rung and 4 in the others; and conflicts, which
the second rung has in 31 of 33 passes, and the third does not have.
"""

from __future__ import annotations

from typing import Any

import torch

from mlsys.bench import Work
from mlsys.bench.core import Case, Size
from mlsys.bench.ladder import ladder
from mlsys.kernels import transpose, transpose_cuda


def case(rung: str, n: int) -> Case:
    return {"rung": rung, "n": n, "dtype": "float32"}


def inputs(case: Case, device: str) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(case["n"])
    return {"x": torch.randn(case["n"], case["n"], generator=generator, device=device)}


def work(case: Case, given: dict[str, Any]) -> Work:
    return Work(flops=0, bytes=8 * case["n"] ** 2, items=8 * case["n"] ** 2, unit="B")


RUNGS = transpose_cuda.VARIANTS
CASES: dict[Size, list[Case]] = {
    "quick": [case(rung, n) for n in (256, 4096) for rung in RUNGS],
    "default": [case(rung, n) for n in (512, 8192) for rung in RUNGS],
    "full": [case(rung, n) for n in (256, 512, 2048, 8192, 16384) for rung in RUNGS],
}
bench = ladder(
    __file__,
    family="transpose",
    function=transpose.transpose,
    launches=transpose_cuda.launches,
    cases=CASES,
    inputs=inputs,
    numbers=lambda case: int(case["n"] ** 2),
    work=work,
    allowed=0.0,
)

if __name__ == "__main__":
    bench.main()
