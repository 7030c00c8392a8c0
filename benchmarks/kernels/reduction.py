"""Sum: what does each rung ask of memory, and how near does it come to a copy?

On a GPU every rung is timed beside torch's sum on random numbers with a cold L2, and held against the bandwidth of
a copy. On a processor nothing is timed: what each rung asks of the memory is counted.

What to look at: every rung moves the same bytes; what falls is the number of requests, and of passes over shared
memory.
"""

from __future__ import annotations

from typing import Any

import torch

from mlsys.bench import Work
from mlsys.bench.core import Case, Size
from mlsys.bench.ladder import ladder
from mlsys.kernels import reduction, reduction_cuda


def case(rung: str, n: int) -> Case:
    return {"rung": rung, "n": n, "dtype": "float32"}


def inputs(case: Case, device: str) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(case["n"])
    return {"x": torch.randn(case["n"], generator=generator, device=device) + 1}  # a sum that is not nearly 0


def work(case: Case, given: dict[str, Any]) -> Work:
    return Work(flops=case["n"] - 1, bytes=4 * case["n"], items=4 * case["n"], unit="B")


RUNGS = reduction_cuda.VARIANTS
CASES: dict[Size, list[Case]] = {
    "quick": [case(rung, n) for n in (1 << 16, 1 << 24) for rung in RUNGS],
    "default": [case(rung, n) for n in (1 << 18, 1 << 26) for rung in RUNGS],
    "full": [case(rung, n) for n in (1 << 16, 1 << 18, 1 << 22, 1 << 26, 1 << 30) for rung in RUNGS],
}
bench = ladder(
    __file__,
    family="reduction",
    function=reduction.sum,
    launches=reduction_cuda.launches,
    cases=CASES,
    inputs=inputs,
    numbers=lambda case: int(case["n"]),
    work=work,
    allowed=1e-5,
)

if __name__ == "__main__":
    bench.main()
