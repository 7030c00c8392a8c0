"""Number formats: what does it cost to round by hand, beside a cast that the compiler knows?

Encoding here is a handful of torch operations for any float format: cut off the power of two, divide, round, add. The
peers are a cast each: ml_dtypes in NumPy, loops in C++ over one number at a time, and torch's own for the formats
that it has (with a clamp before it, since its casts saturate in some versions and not in others).

What to look at: numbers a second, and that they hardly depend on the format. A cast that reads once and writes once is
bound by the memory; here each operation is a pass over the numbers, which is why `quant.quantize` works on pieces that
stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mlsys.bench import Benchmark, Impl, Work
from mlsys.quant import formats

Case = Mapping[str, Any]
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
ML_DTYPES = {
    "bf16": "bfloat16", "e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2",
    "e3m2": "float6_e3m2fn", "e2m3": "float6_e2m3fn", "e2m1": "float4_e2m1fn",
}  # fmt: skip


def case(do: str, name: str, n: int) -> Case:
    return {"do": do, "format": name, "n": n}


def cases(n: int, *names: str) -> list[Case]:
    return [case(do, name, n) for do in ("encode", "decode") for name in names]


def inputs(case: Case, device: str) -> dict[str, Tensor]:
    """Normal numbers up to the largest of the format, or 100 if that is less, and their codes."""
    form = formats.named(case["format"])
    generator = torch.Generator(device).manual_seed(case["n"])
    x = torch.randn(case["n"], generator=generator, device=device)
    x = x / x.abs().max() * min(form.largest, 100.0)
    return {"x": x, "codes": form.encode(x)}


def work(case: Case, given: dict[str, Tensor]) -> Work:
    codes = case["n"] * (1 if formats.named(case["format"]).bits <= 8 else 2)
    return Work(flops=0, bytes=given["x"].nbytes + codes, items=case["n"], unit="numbers")


def with_ml_dtypes(name: str) -> Any:
    """Through NumPy."""
    import ml_dtypes
    import numpy as np

    kind: Any = getattr(ml_dtypes, ML_DTYPES[name])
    raw = np.uint8 if np.dtype(kind).itemsize == 1 else np.uint16
    return SimpleNamespace(
        encode=lambda x: x.numpy().astype(kind).view(raw),
        codes=lambda codes: codes.numpy().astype(raw).view(kind),
        decode=lambda codes: codes.astype(np.float32),
    )


def with_torch(name: str) -> Any:
    """A clamp and a cast."""
    kind, raw = TORCH[name], torch.uint8 if TORCH[name].itemsize == 1 else torch.int16
    most = torch.finfo(kind).max
    return SimpleNamespace(
        encode=lambda x: x.clamp(-most, most).to(kind).view(raw),
        codes=lambda codes: codes.to(raw).view(kind),
        decode=lambda codes: codes.float(),
    )


def prepare(function: Callable[..., Any], case: Case, given: dict[str, Tensor]) -> Callable[[], Any]:
    form = function(case["format"])
    if case["do"] == "encode":
        return lambda: form.encode(given["x"])
    codes = form.codes(given["codes"]) if hasattr(form, "codes") else given["codes"]
    return lambda: form.decode(codes)


def verify(case: Case, given: dict[str, Tensor], got: Any, want: Any) -> tuple[float, float]:
    """How many differ, as codes or as numbers."""
    got, want = (torch.as_tensor(x) for x in (got, want))
    if case["do"] == "encode":
        mask = (1 << formats.named(case["format"]).bits) - 1
        got, want = got.int() & mask, want.int() & mask
    return float((got != want).sum()), 0.0


ALL = (*TORCH, "e3m2", "e2m3", "e2m1", "nf4", "int8")
bench = Benchmark(
    __file__,
    cases={
        "quick": [case("encode", "e4m3", 1 << 14), case("decode", "e2m1", 1 << 14)],
        "default": cases(1 << 20, "e4m3", "e5m2", "e2m1", "bf16", "nf4", "int8"),
        "full": cases(1 << 20, *ALL) + cases(1 << 24, *ALL),
    },
    inputs=inputs,
    work=work,
    impls={
        "by hand": Impl(lambda: formats.named, "reference"),
        "ml_dtypes": Impl(
            lambda: with_ml_dtypes, "peer", needs="ml_dtypes", only=lambda case: case["format"] in ML_DTYPES
        ),
        "torch cast": Impl(lambda: with_torch, "peer", only=lambda case: case["format"] in TORCH),
    },
    subject="by hand",
    prepare=prepare,
    verify=verify,
    fits=lambda case, device: device == "cpu",
    contract="quant.formats",
)

if __name__ == "__main__":
    bench.main()
