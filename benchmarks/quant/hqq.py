"""HQQ: what is a zero point that is no whole number worth, and how long does it take to fit it without any data?

The peer torchao runs the published code, whose errors are in units of the weights; here they are in units of the step.
"nearest" is where both start. GPTQ needs inputs, which HQQ does not: its figure is what they are worth.

What to look at: "squares" and "powers", the sums of |error|² and |error|^0.7 as shares of round-to-nearest's, and bits
per weight: zero points of 16 bits rather than 8. Weights are about 0.02, as in language models; the published code then
sets no error aside and is least squares. "outputs" is the error of the layer's outputs for correlated inputs with
outlier columns, as a share too: what HQQ does not see, and GPTQ makes small, with larger errors of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mlsys.bench import Benchmark, Impl, Plot, Work
from mlsys.quant import QuantizedTensor, Scheme, quantize
from mlsys.quant.gptq import gptq, hessian, loss
from mlsys.quant.hqq import hqq

Case = Mapping[str, Any]
POWER = 0.7


def case(scheme: str, rows: int, columns: int | None = None, of: str = "normal") -> Case:
    """of: "normal" weights, or with "heavy" tails (Student's t with 4 degrees of freedom)."""
    return {"scheme": scheme, "rows": rows, "columns": columns or rows, "of": of}


@dataclass(frozen=True)
class Inputs:
    """Weights (R, K), Σ x xᵀ of correlated inputs with outlier columns, and what round-to-nearest makes of w."""

    w: Tensor
    H: Tensor
    nearest: QuantizedTensor


def inputs(case: Case, device: str) -> Inputs:
    """Weights of size 0.02."""
    rows, columns = case["rows"], case["columns"]
    generator = torch.Generator(device).manual_seed(columns)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    w = 0.02 * draw(rows, columns)
    if case["of"] == "heavy":  # a normal number over the root of a χ² of 4
        w = w / draw(4, rows, columns).square().mean(dim=0).sqrt()
    few = max(columns // 4, 1)
    size = torch.exp(0.5 * draw(columns))
    size[torch.randperm(columns, generator=generator, device=device)[: max(columns // 100, 1)]] *= 20
    x = (draw(512, few) @ draw(few, columns) / math.sqrt(few) + 0.3 * draw(512, columns)) * size
    return Inputs(w, hessian(x), quantize(w, case["scheme"]))


def work(case: Case, given: Inputs) -> Work:
    """Read once, written once; a weight is rounded in each step."""
    bits = Scheme.parse(case["scheme"]).bits
    return Work(flops=0, bytes=given.w.nbytes + given.w.numel() * bits / 8, items=given.w.numel(), unit="weights")


# --- the peer: a function (w, scheme) → an object with `dequantize()` -------------------------------------------------


def by_torchao(w: Tensor, scheme: str) -> Any:
    from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq

    parsed = Scheme.parse(scheme)
    size = parsed.group_size(w.shape[1])
    codes, scale, zero, _ = _choose_qparams_and_quantize_affine_hqq(
        w, parsed.bits, size, compute_dtype=torch.float32, device="cpu", raw_output=True
    )
    groups = (len(w), -1, size)
    return SimpleNamespace(
        dequantize=lambda: ((codes.reshape(groups) - zero[..., None]) * scale[..., None]).reshape(w.shape)
    )


def prepare(function: Callable[..., Any], case: Case, given: Inputs) -> Callable[[], Any]:
    if function is gptq:
        return lambda: gptq(given.w, given.H, case["scheme"])
    return lambda: function(given.w, case["scheme"])


def errors(given: Inputs, got: Any) -> tuple[float, float]:
    """Sums of |error|² and |error|^0.7, in steps of round-to-nearest."""
    scale = given.nearest.scales()
    assert scale is not None
    size = given.nearest.scheme.group_size(given.w.shape[1])
    step = scale.repeat_interleave(size, dim=1)[:, : given.w.shape[1]]
    found: Tensor = got if isinstance(got, Tensor) else got.dequantize()
    error = (given.w - found).abs() / step
    return float((error * step).double().square().sum()), float(error.double().pow(POWER).sum())


def verify(case: Case, given: Inputs, got: Any, want: Any) -> tuple[float, float]:
    """|error|^0.7 as a share of nearest's: at most all of it. GPTQ's errors are another matter: the outputs'."""
    if isinstance(got, QuantizedTensor) and got.zero is not None and not got.zero.is_floating_point():
        return loss(given.w, got, given.H) / loss(given.w, given.nearest, given.H), 1 + 1e-6
    return errors(given, got)[1] / errors(given, given.nearest)[1], 1.0


def figures(case: Case, given: Inputs, got: Any) -> dict[str, float]:
    """Shares of what round-to-nearest leaves; bits per weight."""
    squares, powers = (a / b for a, b in zip(errors(given, got), errors(given, given.nearest), strict=True))
    outputs = loss(given.w, got if isinstance(got, Tensor) else got.dequantize(), given.H)
    bits = {"bits per weight": got.bits_per_weight} if isinstance(got, QuantizedTensor) else {}
    return {
        "squares": squares,
        "powers": powers,
        "outputs": outputs / loss(given.w, given.nearest, given.H),
        **bits,
    }


SIZES = (512, 1024, 2048)
DEFAULT = [
    *(case("int4:g64:fp16", n) for n in SIZES),
    case("int4:g64:fp16", 1024, 4096),
    *(case(f"int{bits}:g{size}:fp16", 1024) for bits in (2, 3) for size in (16, 64)),
    case("int8:affine:fp16", 1024),
    *(case(f"int{bits}:g64:fp16", 1024, of="heavy") for bits in (2, 3, 4)),
]
bench = Benchmark(
    __file__,
    cases={
        "quick": [case("int4:g64:fp16", 96, 128), case("int2:g32:fp16", 384, 512, "heavy")],
        "default": DEFAULT,
        "full": [
            *DEFAULT,
            case("int4:g64:fp16", 4096),
            case("int4:g64:fp16", 11008, 4096),
            case("int2:g16:fp16", 4096),
        ],
    },
    inputs=inputs,
    work=work,
    impls={
        "nearest": Impl(lambda: quantize, "reference"),
        "hqq": Impl(lambda: hqq, "ours"),
        "gptq": Impl(lambda: gptq, "variant"),
        "torchao": Impl(lambda: by_torchao, "peer", needs="torchao"),
    },
    subject="hqq",
    prepare=prepare,
    verify=verify,
    figures=figures,
    fits=lambda case, device: device == "cpu",
    contract="quant.hqq",
    plots=(
        Plot(
            x="columns",
            xlabel="rows and columns, int4, groups of 64",
            only=lambda c: c == case("int4:g64:fp16", c["columns"]),
        ),
    ),
)

if __name__ == "__main__":
    bench.main()
