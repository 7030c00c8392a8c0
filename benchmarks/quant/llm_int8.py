"""LLM.int8(): what do outliers do to an 8-bit product, and how long does it take to keep them apart?

Inputs are normal, with a few columns 30 times larger; weights have 8 bits, a scale for each row. "all in int8" is the
same product without the decomposition, as in `qlinear` with `activations="int8"`; "kept" has the columns of the weights
that outliers meet as they were. The peers: bitsandbytes, which multiplies as its paper has it, with torch on a
processor; and torch's product of floats, which rounds nothing.

What to look at: the errors, and that they are the same as bitsandbytes'. Then the time beside "all in int8": finding
outliers, taking their columns out and a second product cost more than the integers gain at few rows of x. Without
outliers it is the same product, after a look at x. SmoothQuant reaches about the same error and costs nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlsys.bench import Benchmark, Impl, Plot, Work
from mlsys.quant import PreparedWeight, QuantizedTensor, llm_int8, qlinear, quantize
from mlsys.quant import prepare as prepare_weight

Case = Mapping[str, Any]
LARGER = 30.0


def case(m: int, n: int, k: int, outliers: int = 6) -> Case:
    return {"m": m, "n": n, "k": k, "outliers": outliers}


@dataclass(frozen=True)
class Inputs:
    """x (M, K), W (N, K), its codes, what outliers meet of it, and the exact product."""

    x: Tensor
    w: Tensor
    qw: PreparedWeight
    kept: llm_int8.Kept
    want: Tensor

    @property
    def codes(self) -> QuantizedTensor:
        return self.qw.weight


def inputs(case: Case, device: str) -> Inputs:
    m, n, k = case["m"], case["n"], case["k"]
    generator = torch.Generator(device).manual_seed(k)
    x = torch.randn(m, k, generator=generator, device=device)
    columns = torch.randperm(k, generator=generator, device=device)[: case["outliers"]]
    x[:, columns] = x[:, columns].sign() * LARGER + x[:, columns]
    w = torch.randn(n, k, generator=generator, device=device) * k**-0.5
    qw = prepare_weight(quantize(w, "int8"))
    return Inputs(x, w, qw, llm_int8.keep(w, columns), (x.double() @ w.double().T).float())


def work(case: Case, given: Inputs) -> Work:
    m, n, k = case["m"], case["n"], case["k"]
    return Work(flops=2 * m * n * k, bytes=given.codes.nbytes + 4 * m * (n + k), items=m, unit="rows")


Product = Callable[[Inputs], Callable[[], Tensor]]  # what is to be multiplied → the product, to be timed


def ours(given: Inputs) -> Callable[[], Tensor]:
    return lambda: llm_int8.linear(given.x, given.qw)


def kept(given: Inputs) -> Callable[[], Tensor]:
    return lambda: llm_int8.linear(given.x, given.qw, kept=given.kept)


def all_integers(given: Inputs) -> Callable[[], Tensor]:
    return lambda: qlinear(given.x, given.qw, activations="int8")


def floats(given: Inputs) -> Callable[[], Tensor]:
    return lambda: torch.nn.functional.linear(given.x, given.w)


def bitsandbytes(given: Inputs) -> Callable[[], Tensor]:
    """Its own steps, without its layer: that rounds x to float16 first, for which processors are slow."""
    import bitsandbytes as library

    weight = given.codes
    codes, scale = weight.codes.view(torch.int8), weight.scales()
    assert scale is not None
    rows = (127 * scale[:, 0]).contiguous()  # it keeps the largest magnitude of a row

    def call() -> Tensor:
        integers, largest, columns = library.functional.int8_vectorwise_quant(given.x, threshold=6.0)
        y, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(given.x, integers, codes, largest, rows, columns, None)
        return y.float()

    return call


OURS: tuple[Product, ...] = (ours, kept, all_integers, floats, bitsandbytes)


def prepare(function: Any, case: Case, given: Inputs) -> Callable[[], Tensor]:
    if function in OURS:
        made: Callable[[], Tensor] = function(given)
        return made
    scale = given.codes.scales()
    assert scale is not None
    codes, rows = given.codes.codes.view(torch.int8), scale[:, 0]
    return lambda: function(given.x, codes, rows, llm_int8.THRESHOLD)


def error(given: Inputs, y: Tensor) -> float:
    """Squared, relative to the exact product."""
    return float((y - given.want).double().square().sum() / given.want.double().square().sum())


def verify(case: Case, given: Inputs, got: Tensor, want: Tensor) -> tuple[float, float]:
    """The error, as a share of what it is with all of x rounded: at most that. (The contract asks for the numbers.)"""
    return error(given, got) / error(given, all_integers(given)()), 1.05


def figures(case: Case, given: Inputs, got: Tensor) -> dict[str, float]:
    return {"error": error(given, got)}


bench = Benchmark(
    __file__,
    cases={
        "quick": [case(8, 96, 128, 2), case(8, 96, 128, 0)],
        "default": [
            *(case(m, 4096, 4096) for m in (1, 16, 128, 512)),
            case(128, 4096, 4096, 0),
            case(128, 4096, 4096, 40),
            case(128, 1024, 4096),
        ],
        "full": [
            *(case(m, 4096, 4096) for m in (1, 4, 16, 64, 128, 512, 2048)),
            *(case(128, 4096, 4096, outliers) for outliers in (0, 1, 40, 400)),
            case(128, 11008, 4096),
            case(128, 4096, 11008),
        ],
    },
    inputs=inputs,
    work=work,
    impls={
        "mlsys": Impl(lambda: ours, "reference"),
        "kept": Impl(lambda: kept, "variant", only=lambda c: c["outliers"] > 0),
        "all in int8": Impl(lambda: all_integers, "variant"),
        "bitsandbytes": Impl(lambda: bitsandbytes, "peer", needs="bitsandbytes"),
        "floats": Impl(lambda: floats, "peer"),
    },
    subject="mlsys",
    prepare=prepare,
    verify=verify,
    figures=figures,
    contract="quant.llm_int8",
    plots=(
        Plot(
            x="m",
            xlabel="rows of x, 4096 × 4096, 6 columns with outliers",
            per="m",
            only=lambda c: (c["n"], c["k"], c["outliers"]) == (4096, 4096, 6),
        ),
    ),
)

if __name__ == "__main__":
    bench.main()
