"""The methods by name, as `quantize_` calls them: from a matrix and what its layer was given to what replaces it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mlsys.quant._calibrate import Seen
from mlsys.quant._scheme import Scheme
from mlsys.quant._tensor import QuantizedTensor
from mlsys.quant.awq import awq as scale_columns
from mlsys.quant.gptq import gptq_report
from mlsys.quant.hqq import hqq as fit_zeros
from mlsys.quant.llm_int8 import THRESHOLD, Kept, keep, outliers
from mlsys.quant.rtn import quantize
from mlsys.quant.smoothquant import smooth, smooth_scale


@dataclass(frozen=True)
class Given:
    """w: float32 (R, K). seen: what the layer was given; None without calibration."""

    w: Tensor
    seen: Seen | None
    scheme: Scheme


@dataclass(frozen=True)
class Made:
    """As `QuantizedLinear` takes it."""

    quantized: QuantizedTensor
    divisor: Tensor | None = None
    outliers: Kept | None = None
    threshold: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Method:
    """make: with the method's options. calibrated: it needs inputs. second: Σ x xᵀ. integers: it rounds inputs."""

    make: Callable[..., Made]
    calibrated: bool = False
    second: bool = False
    integers: bool = False


def rtn(given: Given) -> Made:
    """The nearest codes."""
    return Made(quantize(given.w, given.scheme))


def hqq(given: Given, **options: Any) -> Made:
    """See `mlsys.quant.hqq`."""
    return Made(fit_zeros(given.w, given.scheme, **options))


def gptq(given: Given, **options: Any) -> Made:
    """See `mlsys.quant.gptq`."""
    assert given.seen is not None
    assert given.seen.hessian is not None
    quantized, report = gptq_report(given.w, given.seen.hessian, given.scheme, **options)
    notes = [f"{report.dead} column{'s' * (report.dead > 1)} without input"] if report.dead else []
    notes += [f"damping {report.damp:g}"] if report.damp != options.get("damp", 0.01) else []
    if given.seen.count < report.columns:
        notes.append(f"{given.seen.count} inputs for {report.columns} columns: give it more")
    return Made(quantized, note=", ".join(notes))


def awq(given: Given, **options: Any) -> Made:
    """See `mlsys.quant.awq`."""
    assert given.seen is not None
    assert given.seen.rows is not None
    quantized, s = scale_columns(given.w, given.seen.rows, given.scheme, **options)
    return Made(quantized, divisor=s)


def smoothquant(given: Given, *, alpha: float = 0.5) -> Made:
    """See `mlsys.quant.smoothquant`."""
    assert given.seen is not None
    assert given.seen.largest is not None
    s = smooth_scale(given.seen.largest, given.w, alpha)
    return Made(quantize(smooth(given.w, s), given.scheme), divisor=s)


def llm_int8(given: Given, *, threshold: float = THRESHOLD) -> Made:
    """See `mlsys.quant.llm_int8`: columns that were outliers while calibrating are kept, others found when running."""
    assert given.seen is not None
    assert given.seen.largest is not None
    columns = outliers(given.seen.largest[None], threshold)
    kept = keep(given.w, columns) if len(columns) else None
    note = f"{len(columns)} outlier columns" if len(columns) else ""
    return Made(quantize(given.w, given.scheme), outliers=kept, threshold=threshold, note=note)


METHODS = {
    "rtn": Method(rtn),
    "hqq": Method(hqq),
    "gptq": Method(gptq, calibrated=True, second=True),
    "awq": Method(awq, calibrated=True),
    "smoothquant": Method(smoothquant, calibrated=True, integers=True),
    "llm_int8": Method(llm_int8, calibrated=True, integers=True),
}
