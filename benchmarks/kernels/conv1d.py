"""Depthwise convolution: what is reading each number once worth?

On a GPU both rungs are timed beside torch's grouped conv1d with a cold L2, and held against the bandwidth of a
copy. On a processor nothing is timed: what each asks of the memory is counted.

What to look at: bytes over the least grow with the width where each thread reads for itself, and stay where they
are where a block reads for all of its threads.
"""

from __future__ import annotations

from typing import Any

import torch

from mlsys.bench import Work
from mlsys.bench.core import Case, Size
from mlsys.bench.ladder import ladder
from mlsys.kernels import conv1d, conv1d_cuda


def case(rung: str, batch: int, channels: int, length: int, width: int) -> Case:
    size = {"batch": batch, "channels": channels, "length": length, "width": width}
    return {"rung": rung, **size, "dtype": "float32"}


def inputs(case: Case, device: str) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(case["length"])

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    channels = case["channels"]
    x, weight = draw(case["batch"], channels, case["length"]), draw(channels, case["width"])
    return {"x": x, "weight": weight, "bias": draw(channels), "padding": "causal"}


def work(case: Case, given: dict[str, Any]) -> Work:
    n, width = given["x"].numel(), case["width"]
    return Work(flops=2 * width * n, bytes=4 * (2 * n + case["channels"] * (width + 1)), items=8 * n, unit="B")


RUNGS = conv1d_cuda.VARIANTS
CASES: dict[Size, list[Case]] = {
    "quick": [
        case(rung, *size, width) for size in ((1, 16, 2048), (8, 1024, 4096)) for width in (4,) for rung in RUNGS
    ],
    "default": [
        case(rung, *size, width) for size in ((1, 16, 2048), (8, 2048, 4096)) for width in (4, 32) for rung in RUNGS
    ],
    "full": [
        case(rung, *size, width)
        for size in ((1, 16, 2048), (8, 2048, 4096), (1, 4096, 1 << 15))
        for width in (4, 8, 32, 128)
        for rung in RUNGS
    ],
}
bench = ladder(
    __file__,
    family="conv1d",
    function=conv1d.conv1d,
    launches=conv1d_cuda.launches,
    cases=CASES,
    inputs=inputs,
    numbers=lambda case: int(case["batch"] * case["channels"] * case["length"]),
    work=work,
    allowed=1e-5,
)

if __name__ == "__main__":
    bench.main()
