"""AWQ: how much of the outputs' error goes away by scaling columns before rounding, and what does the search cost?

All start from the same weights and calibration inputs: correlated ones, of which one column in a hundred is 20 times as
large, as in language models. "nearest" looks at no inputs, GPTQ makes up for errors by xᵀx. The peer torchao searches
as the paper's own code does: for each α it quantizes, and takes all inputs through the layer, twice.

What to look at: the error as a share of that of round-to-nearest. The large columns' errors are most of the error, and
AWQ takes away half of it and more, also in groups of 128, of which nearly each has a large column. GPTQ leaves less
on the inputs that it was shown. "unseen" is the same share for inputs that were not: AWQ's stays as it was, and GPTQ's
is the larger one where it was shown fewer inputs than there are columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlsys.bench import Benchmark, Impl, Plot, Work
from mlsys.quant import QuantizedTensor, Scheme, quantize
from mlsys.quant.awq import awq
from mlsys.quant.gptq import gptq, hessian, loss

Case = Mapping[str, Any]
GRID = 20


def case(scheme: str, rows: int, columns: int, samples: int, **options: bool) -> Case:
    """Options: clip."""
    return {"scheme": scheme, "rows": rows, "columns": columns, "samples": samples, **options}


@dataclass(frozen=True)
class Inputs:
    """Weights (R, K), inputs (n, K); xᵀx of these and of others, and the loss of round-to-nearest on both."""

    w: Tensor
    x: Tensor
    seen: Tensor
    unseen: Tensor
    nearest: tuple[float, float]


def inputs(case: Case, device: str) -> Inputs:
    """Inputs that lie mostly in a quarter of all directions; one column in a hundred is 20 times as large."""
    rows, columns, samples = case["rows"], case["columns"], case["samples"]
    generator = torch.Generator(device).manual_seed(columns)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    few = max(columns // 4, 1)
    mixed, size = draw(few, columns) / math.sqrt(few), torch.exp(0.5 * draw(columns))
    size[torch.randperm(columns, generator=generator, device=device)[: max(columns // 100, 1)]] *= 20
    x, other = ((draw(n, few) @ mixed + 0.3 * draw(n, columns)) * size for n in (samples, columns))
    w = 0.02 * draw(rows, columns)
    seen, unseen = hessian(x), hessian(other)
    plain = quantize(w, case["scheme"]).dequantize()
    return Inputs(w, x, seen, unseen, (loss(w, plain, seen), loss(w, plain, unseen)))


def work(case: Case, given: Inputs) -> Work:
    """Each α: the weights' error through xᵀx, of which half is enough, or through x."""
    rows, columns = given.w.shape
    samples = len(given.x)
    each = 2 * rows * columns * min(samples, columns / 2)
    flops = (GRID + 1) * each + (samples * columns**2 if samples > columns else 0)
    return Work(flops=flops, bytes=given.w.nbytes + given.x.nbytes)


# --- a function (w, x, scheme) → (codes or matrix, s) -----------------------------------------------------------------


def nearest(w: Tensor, x: Tensor, scheme: str) -> tuple[QuantizedTensor, Tensor]:
    return quantize(w, scheme), x.new_ones(w.shape[1])


def by_gptq(w: Tensor, x: Tensor, scheme: str) -> tuple[QuantizedTensor, Tensor]:
    return gptq(w, hessian(x), scheme), x.new_ones(w.shape[1])


def by_torchao(w: Tensor, x: Tensor, scheme: str) -> tuple[QuantizedTensor, Tensor]:
    """Its search, with its quantized tensors; the codes of what it found are ours."""
    from torchao.prototype.awq.core import AWQObserver
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup
    from torchao.quantization.quant_primitives import MappingType

    parsed = Scheme.parse(scheme)
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, parsed.format),
        granularity=PerAxis(0) if parsed.group == "channel" else PerGroup(int(parsed.group)),
        mapping_type=MappingType.ASYMMETRIC if parsed.affine else MappingType.SYMMETRIC,
    )
    observer = AWQObserver(w, None, config, GRID)
    observer(x, x)
    s = observer.calculate_qparams()
    return quantize(w * s, scheme), s


def prepare(function: Callable[..., Any], case: Case, given: Inputs) -> Callable[[], Any]:
    options = {"clip": True} if case.get("clip") and function is awq else {}
    return lambda: function(given.w, given.x, case["scheme"], **options)


def values(got: Any) -> Tensor:
    """What stands in for w."""
    codes, s = got
    matrix: Tensor = codes if isinstance(codes, Tensor) else codes.dequantize()
    return matrix / s


def verify(case: Case, given: Inputs, got: Any, want: Any) -> tuple[float, float]:
    """The loss on the inputs that were shown, as a share of nearest's: at most all of it."""
    return loss(given.w, values(got), given.seen) / given.nearest[0], 1 + 1e-3


def figures(case: Case, given: Inputs, got: Any) -> dict[str, float]:
    """The loss as a share of what round-to-nearest leaves: on the inputs shown, and on others."""
    matrix = values(got)
    return {
        "of nearest": loss(given.w, matrix, given.seen) / given.nearest[0],
        "unseen": loss(given.w, matrix, given.unseen) / given.nearest[1],
    }


SIZES = (512, 1024, 2048)
SCHEMES = ("int4", "int3", "int3:g128", "int2:g64")
DEFAULT = [
    *(case("int4:g128", n, n, 512) for n in SIZES),
    case("int4:g128", 1024, 1024, 64),
    case("int4:g128", 1024, 1024, 4096),
    case("int4:g128", 512, 2048, 512),
    *(case(scheme, 1024, 1024, 512) for scheme in SCHEMES),
    case("int3:g128", 1024, 1024, 512, clip=True),
]
bench = Benchmark(
    __file__,
    cases={
        "quick": [case("int4:g64", 96, 128, 64), case("int3:g128", 192, 256, 512)],
        "default": DEFAULT,
        "full": [
            *DEFAULT,
            case("int4:g128", 4096, 4096, 512),
            case("int4:g128", 4096, 4096, 16384),
            case("int4:g128", 11008, 4096, 512),
        ],
    },
    inputs=inputs,
    work=work,
    impls={
        "nearest": Impl(lambda: nearest, "reference"),
        "awq": Impl(lambda: awq, "ours"),
        "gptq": Impl(lambda: by_gptq, "variant"),
        "torchao": Impl(lambda: by_torchao, "peer", needs="torchao", only=lambda c: not c.get("clip")),
    },
    subject="awq",
    prepare=prepare,
    verify=verify,
    figures=figures,
    yours=lambda c: not c.get("clip"),
    contract="quant.awq",
    plots=(
        Plot(
            x="columns",
            xlabel="rows and columns, int4, groups of 128, 512 inputs",
            only=lambda c: c == case("int4:g128", c["columns"], c["columns"], 512),
        ),
    ),
)

if __name__ == "__main__":
    bench.main()
