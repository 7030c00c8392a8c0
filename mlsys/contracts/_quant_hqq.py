"""What HQQ must compute: the step of round-to-nearest, and zero points that make Σ |error|^0.7 small.

The implementation is anything called as `hqq(w, scheme)` that gives an object with `dequantize()`, or the matrix
itself. Schemes are "int<bits>[:g<group>]", affine. p = 0.7, β = 10, κ = 1.01, 20 steps, as published; but errors are in
units of the step, (w − ŵ) / s, so that the result does not depend on the unit of w. Two things are judged:

- the grid: within a group values are whole multiples of its step apart, (max(w, 0) − min(w, 0)) / (2^bits − 1), and
  span no more than 2^bits of them;
- the mean of |error|^0.7, in steps, which may be a little above that of a plain version in float64.

See also:
    `mlsys.quant.hqq`, `mlsys.contracts.core`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from mlsys.contracts._quant_gptq import grid, parse
from mlsys.contracts.core import Case, Contract, Inputs, Mismatch, Results, Wrong, as_array

SIGNATURE = "hqq(w (R, K), scheme) -> object with dequantize() -> (R, K)"
POWER, BETA, KAPPA, STEPS = 0.7, 10.0, 1.01, 20
MORE = 0.006  # of the plain version's error


def case(rows: int, columns: int, scheme: str, *, size: float = 1.0, of: str = "normal") -> Case:
    """Weights of this size; of: "normal", "outliers", a few of them far out, or "constant", groups of equal numbers."""
    return {"rows": rows, "columns": columns, "scheme": scheme, "size": size, "of": of}


CASES = [
    case(60, 128, "int4:g32", size=5.0),
    case(60, 128, "int3:g64", size=3.0),
    case(80, 100, "int2:g20", size=1.0),
    case(70, 150, "int3:g64", size=3.0, of="outliers"),
    case(90, 64, "int4", size=5.0),
    case(60, 128, "int3:g32", size=0.02),
    case(60, 96, "int2:g32", size=0.02, of="outliers"),
    case(8, 32, "int4:g16", of="constant"),
]


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Weights, the groups of each row about a mean of their own."""
    rng = np.random.default_rng(seed)
    shape = case["rows"], case["columns"]
    w = rng.standard_normal(shape) * np.exp(0.3 * rng.standard_normal((shape[0], 1)))
    if case["of"] == "outliers":
        w += 4 * rng.standard_normal(shape) * (rng.random(shape) < 0.03)
    if case["of"] == "constant":
        w[:] = np.repeat(rng.standard_normal((shape[0], 2)), shape[1] // 2, axis=1)
    return {"w": torch.from_numpy(case["size"] * w).float().to(device), "scheme": case["scheme"]}


def call(impl: Callable[..., Any], given: Inputs) -> Results:
    """How far values are from whole steps apart, how many they span, and the mean of |error|^p."""
    got = impl(given["w"], given["scheme"])
    found = as_array(got.dequantize() if hasattr(got, "dequantize") and not isinstance(got, torch.Tensor) else got)
    w = given["w"].cpu().double().numpy()
    if found.shape != w.shape:
        raise Mismatch(f"codes stand for a matrix {found.shape}, expected {w.shape}, as w is")
    bits, size, _ = parse(given["scheme"], w.shape[1])
    scale, *_ = grids(w, given["scheme"])
    level = found / scale
    apart, span = [], []
    for start in range(0, w.shape[1], size):
        group = level[:, start : start + size]
        apart.append(group - group[:, :1] - np.round(group - group[:, :1]))
        span.append(np.maximum(np.ptp(group, axis=1) - (2**bits - 1), 0))
    return {
        "between steps": np.abs(np.concatenate(apart, axis=1)),
        "too many codes": np.stack(span, axis=1),
        "error": np.array([power_error(w, found, scale)]),
    }


def grids(w: np.ndarray, scheme: str) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Scale and zero point of each weight by round-to-nearest, and the range of codes; a constant group's is exact."""
    scale, zero, low, high = grid(w, scheme)
    _, size, _ = parse(scheme, w.shape[1])
    for start in range(0, w.shape[1], size):
        own = np.s_[:, start : start + size]
        equal = (np.ptp(w[own], axis=1) == 0)[:, None]
        scale[own] = np.where(equal, np.abs(w[own]), scale[own])
        zero[own] = np.where(equal, (w[own] < 0).astype(float), zero[own])
    return scale, zero, low, high


def power_error(w: np.ndarray, values: np.ndarray, scale: np.ndarray) -> float:
    """Mean of |w − ŵ|^p, in steps."""
    return float((np.abs((w - values) / scale) ** POWER).mean())


def plain(
    w: torch.Tensor,
    scheme: str,
    *,
    steps: int = STEPS,
    aside: str = "power",
    sign: float = 1.0,
    fit_scale: bool = False,
    over: str = "group",
    in_steps: bool = True,
) -> torch.Tensor:
    """Codes and zero points in turn, in float64. Options are places to go wrong."""
    x = w.cpu().double().numpy()
    scale, zero, low, high = grids(x, scheme)
    _, size, _ = parse(scheme, x.shape[1])
    beta = BETA
    for _ in range(steps):
        codes = np.clip(np.round(x / scale + zero), low, high)
        u = x / scale - (codes - zero)
        unit = np.ones_like(scale) if in_steps else scale
        e = np.zeros_like(u) if aside == "none" else shrunk(u * unit, beta) / unit
        if aside == "all the rest":
            e = u - e
        target = zero - sign * (u - e)
        for start in range(0, x.shape[1], size):
            own = np.s_[:, start : start + size]
            if fit_scale:
                level = codes[own] - zero[own]
                top, bottom = (x[own] * level).sum(axis=1), (level * level).sum(axis=1)
                scale[own] = np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1), scale[own][:, 0])[:, None]
            else:
                at = np.s_[:, :] if over == "row" else own
                zero[own] = target[at].mean(axis=1, keepdims=True)
        beta *= KAPPA
    codes = np.clip(np.round(x / scale + zero), low, high)
    return torch.from_numpy((codes - zero) * scale)


def shrunk(u: np.ndarray, beta: float) -> np.ndarray:
    """What is set aside of errors u."""
    size = np.abs(u)
    return np.sign(u) * np.maximum(size - np.maximum(size, 1e-300) ** (POWER - 1) / beta, 0)


def oracle(given: Inputs) -> dict[str, np.ndarray]:
    """The plain version's error; nothing between steps."""
    w = given["w"].cpu().double().numpy()
    _, size, _ = parse(given["scheme"], w.shape[1])
    scale, *_ = grids(w, given["scheme"])
    groups = -(-w.shape[1] // size)
    return {
        "between steps": np.zeros_like(w),
        "too many codes": np.zeros((len(w), groups)),
        "error": np.array([power_error(w, plain(given["w"], given["scheme"]).numpy(), scale)]),
    }


def tolerance(given: Inputs, name: str, want: np.ndarray) -> float:
    """`MORE` of the error (a constant group has none); a hundredth of a step, for scales and zeros in float32."""
    return MORE * float(want[0]) + 1e-4 if name == "error" else 0.01


def whole_steps(given: Inputs, got: np.ndarray, want: np.ndarray, tolerance: float) -> str | None:
    """Values of a group are whole steps apart."""
    off = ~(got <= tolerance)
    if not off.any():
        return None
    row, column = (int(i) for i in np.argwhere(off)[0])
    return (
        f"{int(off.sum())} of {off.size} weights are no whole number of their group's steps from its first weight; "
        f"the first, [{row}, {column}], is {got[row, column]:.3g} of a step between"
    )


def few_codes(given: Inputs, got: np.ndarray, want: np.ndarray, tolerance: float) -> str | None:
    """No group spans more than 2^bits values."""
    worst = float(got.max(initial=0.0)) if not np.isnan(got).any() else float("nan")
    if worst <= tolerance:
        return None
    return f"a group's values span {worst:.3g} steps more than its codes can"


def no_larger(given: Inputs, got: np.ndarray, want: np.ndarray, tolerance: float) -> str | None:
    """Lower is welcome."""
    if got[0] <= want[0] + tolerance:
        return None
    w = given["w"].cpu().double().numpy()
    scale, *_ = grids(w, given["scheme"])
    nearest = power_error(w, plain(given["w"], given["scheme"], steps=0).numpy(), scale)
    return (
        f"mean |error|^{POWER} is {got[0]:.5g} (errors in steps); the plain version reaches {want[0]:.5g}, rounding to "
        f"nearest {nearest:.5g}"
    )


def _wrong(hint: str, **knobs: Any) -> Wrong:
    return Wrong(partial(plain, **knobs), hint)


WRONG = {
    "nearest": _wrong(
        "this is rounding to nearest: z must become mean(q − (w − e) / s), again and again, and must not be rounded: "
        "it hardly ever moves by more than half a step",
        steps=0,
    ),
    "no_shrinkage": _wrong(
        "this is least squares: the large errors must be set aside, e = shrink(w − ŵ), before z is fitted to w − e",
        aside="none",
    ),
    "beta_of_weights": _wrong(
        "small weights have small errors, of which β = 10 sets none aside: divide errors by the step, u = (w − ŵ) / s",
        in_steps=False,
    ),
    "small_set_aside": _wrong(
        "e is shrink(w − ŵ), what is left of large errors; z is fitted to w − e, not to e", aside="all the rest"
    ),
    "wrong_sign": _wrong("z is the mean of q − (w − e) / s: where w is above ŵ, z gets smaller", sign=-1.0),
    "scale_fitted": _wrong("the step s stays as it is: the zero point is what is fitted", fit_scale=True),
    "mean_of_row": _wrong("each group has a zero point of its own: take the mean over the group", over="row"),
}  # fmt: skip


def contract(name: str, reference: Callable[..., Any]) -> Contract:
    """The contract of HQQ, for this implementation."""
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
        compare={"between steps": whole_steps, "too many codes": few_codes, "error": no_larger},
    )
