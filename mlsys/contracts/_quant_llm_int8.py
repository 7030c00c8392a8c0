"""The contract of `quant.llm_int8`: columns of x with outliers as floats, the rest as integers.

The implementation is called as `linear(x (M, K), codes int8 (N, K), scale (N,), threshold) -> y (M, N)`, float32; the
weights stand for codes · scale, a scale for each row. Which columns are taken out, and what becomes of the others, is
judged by the numbers: x is such that it is clear to which integer each number is to be rounded, and no number is at
the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlsys.contracts._kernels_common import UNIT, result
from mlsys.contracts.core import Case, Contract, Inputs, Results, Wrong, as_array
from mlsys.quant import QuantizedTensor, Scheme, llm_int8

SIGNATURE = "linear(x (M, K), codes int8 (N, K), scale (N,), threshold) -> y (M, N)"


def case(m: int, n: int, k: int, *, outliers: int = 2, threshold: float = 6.0, zeros: int = 0) -> Case:
    """`outliers` columns hold numbers above the threshold, in a row each or two; `zeros` rows of x are 0."""
    return {"m": m, "n": n, "k": k, "outliers": outliers, "threshold": threshold, "zeros": zeros}


CASES = [
    case(1, 3, 8, outliers=1),
    case(4, 5, 16),
    case(6, 3, 24, outliers=3),
    case(5, 7, 40, outliers=0),
    case(5, 30, 40, outliers=4, threshold=2.5),
    case(4, 6, 20, outliers=2, zeros=2),
    case(3, 4, 6, outliers=6),
    case(4, 5, 33, outliers=2, threshold=math.inf),
    case(0, 5, 12, outliers=0),
]


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Rows of unequal size below the threshold, none of whose numbers is halfway between integers, and outliers."""
    rng = np.random.default_rng(seed)
    m, n, k, threshold = case["m"], case["n"], case["k"], case["threshold"]
    finite = threshold if math.isfinite(threshold) else 60.0
    largest = finite * rng.uniform(0.2, 0.9, (m, 1))
    turn = rng.permutation(k)
    columns, rest = turn[: case["outliers"]], turn[case["outliers"] :]
    if math.isinf(threshold):
        rest = turn
    x = rng.uniform(-1, 1, (m, k)) * largest
    if len(rest):
        whole = rng.integers(-126, 127, (m, k)) + rng.uniform(-0.35, 0.35, (m, k))
        whole[np.arange(m), rng.choice(rest, m)] = 127 * rng.choice([-1, 1], m)
        x = np.where(np.isin(np.arange(k), rest), whole * largest / 127, x)
    if math.isfinite(threshold):
        for i, column in enumerate(columns):
            x[i % m, column] = finite * (1.3 + i) * (-1) ** i  # of either sign
    x[: case["zeros"]] = np.where(np.isin(np.arange(k), columns), x[: case["zeros"]], 0)
    scale = np.exp(rng.uniform(-2, 0.1, n)) * 6 / 127  # so that a few weights are at the usual threshold, too
    codes = rng.integers(-127, 128, (n, k))
    return {
        "x": torch.from_numpy(x).float().to(device),
        "codes": torch.from_numpy(codes).to(torch.int8).to(device),
        "scale": torch.from_numpy(scale).float().to(device),
        "threshold": threshold,
    }


def call(impl: Callable[..., Any], given: Inputs) -> Results:
    """The product."""
    y = impl(given["x"], given["codes"], given["scale"], given["threshold"])
    return {"y": result(y, (len(given["x"]), len(given["codes"])), torch.float32)}


def plain(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    threshold: float,
    *,
    where: str = "columns",
    by: str = "both",
    twice: bool = False,
    lost: bool = False,
    scale_of_all: bool = False,
    per_tensor: bool = False,
    per_column: bool = False,
    one_row_scale: bool = False,
    truncated: bool = False,
    rounded: bool = False,
    six: bool = False,
    steps: int = 127,
    zero_over_zero: bool = False,
) -> Tensor:
    """The decomposition in float64. Each option is one place to go wrong."""
    wide, w = x.double(), codes.double() * scale.double()[:, None]
    threshold = 6.0 if six else threshold
    size = {"both": wide.abs(), "above": wide, "weights": w.abs()}[by]
    large = size >= threshold
    if where == "none":
        out = torch.zeros_like(wide, dtype=torch.bool)
    elif where == "elements":
        out = large
    elif where == "rows":
        out = large.any(dim=1, keepdim=True).expand_as(wide)
    elif where == "all":
        out = torch.ones_like(wide, dtype=torch.bool)
    else:
        out = large.any(dim=0).expand_as(wide)
    floats = torch.where(out, wide, 0)
    rest = torch.where(out & (not twice), 0, wide)
    seen = wide.abs() if scale_of_all else torch.where(out, 0, wide).abs()
    if wide.numel():
        largest = seen.amax(dim=1, keepdim=True)
        if per_tensor:
            largest = seen.max().expand_as(largest)
        if per_column:
            largest = seen.amax(dim=0, keepdim=True)
        t = largest / steps
        t = t if zero_over_zero else torch.where(t > 0, t, 1.0)
        whole = (rest / t).trunc() if truncated else (rest / t).round()
        rest = whole.clamp(-127, 127) * t
        if rounded:
            floats = (floats / t).round() * t
    if one_row_scale:
        w = codes.double() * scale.double().max() if len(scale) else w
    y = rest @ w.T
    return (y if lost else y + floats @ w.T).float()


def oracle(given: Inputs) -> dict[str, np.ndarray]:
    """As the paper has it."""
    tensors = (given[name].cpu().double() for name in ("x", "codes", "scale"))
    x, codes, scale = tensors
    w, out = codes * scale[:, None], (x.abs() >= given["threshold"]).any(dim=0)
    rest = torch.where(out, 0, x)
    t = rest.abs().amax(dim=1, keepdim=True) / 127
    t = torch.where(t > 0, t, 1.0)
    return {"y": as_array(torch.where(out, x, 0) @ w.T + (rest / t).round() * t @ w.T)}


def tolerance(given: Inputs, name: str, want: np.ndarray) -> float:
    """Roundings of sums in float32."""
    if not want.size:
        return 0.0
    size = as_array(given["x"].abs()) @ (as_array(given["codes"].double().abs()) * as_array(given["scale"])[:, None]).T
    return 8 * UNIT * math.sqrt(given["x"].shape[1]) * float(size.max())


def _wrong(hint: str, **knobs: Any) -> Wrong:
    return Wrong(partial(plain, **knobs), hint)


WRONG = {
    "no_outliers": _wrong("columns with outliers are taken out before x is rounded", where="none"),
    "outliers_by_tokens": _wrong("outliers are taken out by columns of x, not by rows", where="rows"),
    "outliers_by_elements": _wrong("the whole column goes: its other numbers are not rounded either", where="elements"),
    "all_in_floats": _wrong("only columns with outliers are floats, the rest is rounded", where="all"),
    "threshold_on_weights": _wrong("outliers are looked for in x, not in the weights", by="weights"),
    "large_negative_missed": _wrong("the threshold is for |x|: outliers may be negative", by="above"),
    "counted_twice": _wrong("columns that were multiplied as floats must be 0 in the product of integers", twice=True),
    "outliers_lost": _wrong("add the product of the columns that were taken out", lost=True),
    "scale_with_outliers": _wrong("take outliers out before you look for the row's largest number", scale_of_all=True),
    "one_scale_for_x": _wrong("each row of x has a scale of its own", per_tensor=True),
    "scale_of_columns": _wrong("scales of x are for rows: those of columns stay in the sum", per_column=True),
    "one_scale_for_w": _wrong("each row of the weights has a scale of its own", one_row_scale=True),
    "truncated": _wrong("round to the nearest integer, do not cut off", truncated=True),
    "outliers_rounded": _wrong("the columns taken out stay as they are", rounded=True),
    "threshold_fixed": _wrong("the threshold is an argument; 6 is its usual value", six=True),
    "steps_of_128": _wrong("the largest number of a row gets 127: t = max|x| / 127", steps=128),
    "zero_over_zero": _wrong("a row of zeros has scale 0, and 0 / 0 is NaN: take another scale", zero_over_zero=True),
}  # fmt: skip


def reference(x: Tensor, codes: Tensor, scale: Tensor, threshold: float) -> Tensor:
    """`llm_int8.linear` of the record that these make."""
    record = QuantizedTensor(
        codes.view(torch.uint8), scale[:, None], None, tuple(codes.shape), Scheme.parse("int8:channel")
    )
    return llm_int8.linear(x, record, threshold=threshold)


def contract(name: str) -> Contract:
    """The contract of the decomposed product."""
    return Contract(
        name=name,
        signature=SIGNATURE,
        reference=reference,
        cases=CASES,
        inputs=inputs,
        call=call,
        oracle=oracle,
        tolerance=tolerance,
        wrong=WRONG,
    )
