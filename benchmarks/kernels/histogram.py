"""Histogram: where do the atomics go, and what if all numbers are the same?

On a GPU both rungs are timed beside torch's bincount with a cold L2, on numbers that are spread evenly and on
numbers of which nine in ten are the same. On a processor nothing is timed: what each asks of the memory is counted.

What to look at: sectors a request. The 32 lanes of a warp go to as many sectors as they have different bins between
them; in shared memory they go to banks instead, with some conflicts. And on a GPU the case where all meet in one
bin.
"""

from __future__ import annotations

from typing import Any

import torch

from mlsys.bench import Work
from mlsys.bench.core import Case, Size
from mlsys.bench.ladder import ladder
from mlsys.kernels import histogram, histogram_cuda


def case(rung: str, n: int, bins: int, spread: str) -> Case:
    return {"rung": rung, "n": n, "bins": bins, "spread": spread}


def inputs(case: Case, device: str) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(case["n"])
    x = torch.randint(0, case["bins"], (case["n"],), generator=generator, device=device, dtype=torch.int32)
    if case["spread"] == "one bin":
        x[torch.rand(case["n"], generator=generator, device=device) < 0.9] = 0
    return {"x": x, "bins": case["bins"]}


def work(case: Case, given: dict[str, Any]) -> Work:
    return Work(flops=0, bytes=4 * (case["n"] + case["bins"]), items=4 * case["n"], unit="B")


SPREADS = ("even", "one bin")


RUNGS = histogram_cuda.VARIANTS
CASES: dict[Size, list[Case]] = {
    "quick": [
        case(rung, n, bins, spread)
        for n in (1 << 16, 1 << 24)
        for bins in (256,)
        for spread in SPREADS
        for rung in RUNGS
    ],
    "default": [
        case(rung, n, bins, spread)
        for n in (1 << 18, 1 << 26)
        for bins in (256,)
        for spread in SPREADS
        for rung in RUNGS
    ],
    "full": [
        case(rung, n, bins, spread)
        for n in (1 << 16, 1 << 18, 1 << 26)
        for bins in (16, 256, 4096)
        for spread in SPREADS
        for rung in RUNGS
    ],
}
bench = ladder(
    __file__,
    family="histogram",
    function=histogram.histogram,
    launches=histogram_cuda.launches,
    cases=CASES,
    inputs=inputs,
    numbers=lambda case: int(case["n"]),
    work=work,
    allowed=0.0,
)

if __name__ == "__main__":
    bench.main()
