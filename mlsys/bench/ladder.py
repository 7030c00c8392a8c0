"""The benchmark of a family of CUDA kernels: each rung is timed on a GPU, and counted on a processor.

A processor runs the kernels to check and to count them; how long that takes says nothing of a GPU, so no time is shown.
What is counted does carry over: how many bytes the warps ask of the memory system, in how many requests, and how many
passes over shared memory that takes.

See also:
    `mlsys.kernels.cuda` (`profile`, which counts), `mlsys.bench.core` (a benchmark as a value).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mlsys.bench.core import Benchmark, Case, Impl, Plot, Size, Work
from mlsys.kernels._launch import profile_each

ON_PROCESSOR = 1 << 18  # numbers up to which a processor counts in seconds
ROWS: Mapping[Size, Sequence[tuple[int, int]]] = {  # (rows, columns) for families that work row by row
    "quick": ((64, 1024), (8192, 4096)),
    "default": ((64, 1024), (4, 16384), (1 << 16, 1024), (8192, 8192)),
    "full": ((64, 1024), (4, 16384), (1 << 18, 256), (1 << 16, 1024), (8192, 8192), (512, 1 << 17)),
}


@dataclass(frozen=True)
class Output:
    """A result, and what its kernels moved where that was counted."""

    tensor: Tensor
    counts: dict[str, float]


def ladder(
    file: str,
    *,
    family: str,
    function: Callable[..., Tensor],
    launches: Callable[..., Any],
    cases: Mapping[Size, Sequence[Case]],
    inputs: Callable[[Case, str], dict[str, Any]],
    numbers: Callable[[Case], int],
    work: Callable[[Case, dict[str, Any]], Work],
    allowed: float,
    plots: Sequence[Plot] = (),
) -> Benchmark:
    """A benchmark whose cases name a rung: the family's function by that rung, beside torch.

    function, launches: the family's, by keyword. numbers: how many a case has, which decides between counting and
    timing. work: the least bytes, each input and output once. allowed: the largest error, seen against the largest
    result.
    """

    def by_torch(**given: Any) -> Tensor:
        return function(**given, variant="torch")

    def by_kernel(**given: Any) -> Tensor:
        return function(**given)

    def prepare(chosen: Callable[..., Tensor], case: Case, given: dict[str, Any]) -> Callable[[], Output]:
        if chosen is not by_kernel:
            return lambda: Output(chosen(**given), {})
        on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in given.values())
        counts = {} if on_gpu else count(launches(**given, variant=case["rung"])[1], work(case, given).bytes)
        return lambda: Output(chosen(**given, variant=f"cuda.{case['rung']}"), counts)

    def verify(case: Case, given: dict[str, Any], got: Output, want: Output) -> tuple[float, float]:
        a, b = got.tensor.double(), want.tensor.double()
        return ((a - b).abs().max() / b.abs().max()).item(), allowed

    return Benchmark(
        file,
        cases=cases,
        inputs=inputs,
        work=work,
        impls={"torch": Impl(lambda: by_torch, "reference"), "kernel": Impl(lambda: by_kernel, "ours")},
        subject="kernel",
        prepare=prepare,
        verify=verify,
        figures=lambda case, given, got: got.counts,
        counted=lambda impl, device: device == "cpu",
        fits=lambda case, device: (numbers(case) <= ON_PROCESSOR) == (device == "cpu"),
        contract=f"kernels.{family}",
        plots=plots,
    )


def count(launches: Sequence[Any], least: float) -> dict[str, float]:
    """What launches ask of global and of shared memory; `least` bytes have to be moved by any."""
    profiles = profile_each(launches)
    requests, passes = sum(p.requests for p in profiles), sum(p.shared_passes for p in profiles)
    kib = least / 1024
    return {
        "launches": len(profiles),
        "bytes ÷ least": sum(p.bytes for p in profiles) / least,
        "sectors/request": sum(p.sectors for p in profiles) / max(requests, 1),
        "requests/KiB": requests / kib,
        "shared passes/KiB": passes / kib,
        "of them conflicts, %": 100 * sum(p.conflicts for p in profiles) / max(passes, 1),
    }
