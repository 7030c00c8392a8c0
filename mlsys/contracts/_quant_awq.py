"""What AWQ must compute: scales of columns, and nearest codes of the scaled weights, whose outputs err little.

The implementation is anything called as `awq(w, x, scheme)` that gives the codes Q of w · diag(s) (an object with
`dequantize()`, or the matrix itself) and s (K,), such that x @ w.T ≈ (x / s) @ Q.T. Schemes are
"int<bits>[:g<group>][:sym|:affine]". Two things are judged:

- the error of the outputs on x, which may be a few per cent above that of a plain search in float64: s = mean |x| to
  the powers 0, 1/20, … 1. A lower one is welcome;
- that Q lies on the grid of round-to-nearest of w · diag(s), where each weight has its nearest code.

See also:
    `mlsys.quant.awq`, `mlsys.contracts.core`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from mlsys.contracts._quant_gptq import grid
from mlsys.contracts.core import Case, Contract, Inputs, Mismatch, Results, Wrong, as_array

SIGNATURE = "awq(w (R, K), x (n, K), scheme) -> (object with dequantize() -> (R, K), s (K,))"
MORE = 0.05  # of the plain search's error
HALFWAY = 0.02  # of a step: so near to the middle of two codes, either is right
POWERS = tuple(i / 20 for i in range(21))


def case(rows: int, columns: int, scheme: str, samples: int, *, of: str = "outliers", dead: int = 0) -> Case:
    """`dead` columns have no input. of: "outliers", a few large ones; "all", of many sizes; "shifted", with a mean."""
    return {"rows": rows, "columns": columns, "scheme": scheme, "samples": samples, "of": of, "dead": dead}


CASES = [
    case(24, 48, "int4", 200),
    case(20, 64, "int3:g16", 200),
    case(24, 50, "int3:g20:sym", 30),
    case(16, 40, "int4:g8", 100, of="all"),
    case(24, 48, "int3", 100, of="shifted"),
    case(16, 48, "int4:g16", 60, dead=7),
    case(16, 40, "int2:g20", 90, of="all"),
    case(5, 30, "int4", 1),
    case(1, 33, "int4", 50),
]


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Inputs with columns of unequal size; normal weights, small where inputs are large, but not in proportion."""
    rng = np.random.default_rng(seed)
    rows, columns, samples = case["rows"], case["columns"], case["samples"]
    size = np.exp(0.3 * rng.standard_normal(columns))
    mean: np.ndarray = np.zeros(columns)
    if case["of"] == "all":
        size = np.exp(1.5 * rng.standard_normal(columns))
    else:
        size[rng.permutation(columns)[: max(columns // 16, 1)]] *= 15
    if case["of"] == "shifted":
        mean = 4 * rng.permutation(np.exp(1.2 * rng.standard_normal(columns)))
    x = rng.standard_normal((samples, columns)) * size + mean * rng.choice([-1, 1], columns)
    x[:, rng.permutation(columns)[: case["dead"]]] = 0
    w = rng.standard_normal((rows, columns)) * np.exp(0.5 * rng.standard_normal(columns))
    return {
        "w": torch.from_numpy(0.05 * w).float().to(device),
        "x": torch.from_numpy(x).float().to(device),
        "scheme": case["scheme"],
    }


def call(impl: Callable[..., Any], given: Inputs) -> Results:
    """The error of the outputs, and how far each weight's code is from the nearest."""
    got = impl(given["w"], given["x"], given["scheme"])
    if not isinstance(got, tuple | list) or len(got) != 2:
        raise Mismatch(f"got {type(got).__name__}, expected two results: codes of w · diag(s), and s")
    found, s = got
    values = as_array(
        found.dequantize() if hasattr(found, "dequantize") and not isinstance(found, torch.Tensor) else found
    )
    s = as_array(s).astype(np.float64)
    w, x = exact(given)
    if values.shape != w.shape:
        raise Mismatch(f"codes stand for a matrix {values.shape}, expected {w.shape}, as w is")
    if s.size != w.shape[1]:
        raise Mismatch(f"s has shape {s.shape}, expected ({w.shape[1]},): one number for each column of w (out, in)")
    s = s.reshape(-1)
    if not (np.isfinite(s).all() and (s > 0).all()):
        raise Mismatch("s holds a number that is not above 0 and finite; what of columns without any input?")
    return {"loss": np.array([output_error(w, values / s, x)]), "off": off_nearest(values, w * s, given["scheme"])}


def exact(given: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """W and x in float64."""
    return given["w"].cpu().double().numpy(), given["x"].cpu().double().numpy()


def output_error(w: np.ndarray, values: np.ndarray, x: np.ndarray) -> float:
    """‖x (w − ŵ)ᵀ‖² / ‖x wᵀ‖²."""
    return float(np.square(x @ (w - values).T).sum() / np.square(x @ w.T).sum())


def off_nearest(values: np.ndarray, scaled: np.ndarray, scheme: str) -> np.ndarray:
    """How far each value is from that of the nearest code, in steps; 0 where another code is as near."""
    scale, zero, low, high = grid(scaled, scheme)
    exactly = scaled / scale + zero
    level = values / scale + zero
    codes = np.clip(np.round(exactly), low, high)
    near = np.abs(level - codes)
    other = np.abs(level - np.clip(np.round(exactly + np.where(exactly > codes, 0.5, -0.5)), low, high))
    either = np.abs(np.abs(exactly - codes) - 0.5) < HALFWAY
    return np.where(either, np.minimum(near, other), near)


def plain(
    w: torch.Tensor,
    x: torch.Tensor,
    scheme: str,
    *,
    powers: tuple[float, ...] = POWERS,
    by: str = "inputs",
    shift: int = 0,
    first_grid: bool = False,
    twice: bool = False,
    undivided: bool = False,
    clamp: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The search in float64. Options are places to go wrong."""
    matrix, sample = w.cpu().double().numpy(), x.cpu().double().numpy()
    strength = np.abs(sample).mean(axis=0)
    if by == "weights":
        strength = np.abs(matrix).mean(axis=0)
    elif by == "mean":
        strength = np.abs(sample.mean(axis=0))
    if clamp:
        strength = np.maximum(strength, 1e-4 * strength.max())
    strength = np.roll(strength, shift)
    best, result = np.inf, (matrix, np.ones(len(strength)))
    for power in powers:
        s = strength**power
        s = s / np.sqrt(s.max() * s.min()) if clamp else s
        scale, zero, low, high = grid(matrix if first_grid else matrix * s, scheme)
        values = (np.clip(np.round(matrix * s / scale + zero), low, high) - zero) * scale
        if twice:
            values = values / s
        with np.errstate(divide="ignore", invalid="ignore"):
            loss = output_error(matrix, values if twice else values / s, sample)
        if loss < best:
            best, result = loss, (values, s)
    values, s = result
    if undivided:
        s = np.ones_like(s)
    return torch.from_numpy(values), torch.from_numpy(s)


def oracle(given: Inputs) -> dict[str, np.ndarray]:
    """The plain search."""
    w, x = exact(given)
    values, s = plain(given["w"], given["x"], given["scheme"])
    return {"loss": np.array([output_error(w, (values / s).numpy(), x)]), "off": np.zeros_like(w)}


def tolerance(given: Inputs, name: str, want: np.ndarray) -> float:
    """`MORE` of the error; a hundredth of a step, for scales in float32."""
    return MORE * float(want[0]) + 1e-9 if name == "loss" else 0.01


def no_larger(given: Inputs, got: np.ndarray, want: np.ndarray, tolerance: float) -> str | None:
    """Lower is welcome."""
    if got[0] <= want[0] + tolerance:
        return None
    w, x = exact(given)
    values, s = plain(given["w"], given["x"], given["scheme"], powers=(0.0,))
    nearest = output_error(w, (values / s).numpy(), x)
    return (
        f"(x / s) @ Q.T errs by {got[0]:.4g} (relative, squared); a plain search for α reaches {want[0]:.4g}, "
        f"rounding to nearest {nearest:.4g}"
    )


def nearest_codes(given: Inputs, got: np.ndarray, want: np.ndarray, tolerance: float) -> str | None:
    """Each weight at its nearest code."""
    off = ~(got <= tolerance)
    if not off.any():
        return None
    row, column = (int(i) for i in np.argwhere(off)[0])
    return (
        f"{int(off.sum())} of {off.size} weights of Q are not at the nearest code of w · diag(s), whose groups have "
        f"scales of their own; the first, [{row}, {column}], is {got[row, column]:.3g} steps away"
    )


def _wrong(hint: str, **knobs: Any) -> Wrong:
    return Wrong(partial(plain, **knobs), hint)


WRONG = {
    "nearest": _wrong(
        "this is rounding to nearest, α = 0: search for the α of s = mean |x|^α whose outputs err least", powers=(0.0,)
    ),
    "alpha_one": _wrong("α = 1 makes all inputs alike and their weights unlike: search between 0 and 1", powers=(1.0,)),
    "by_weights": _wrong("the inputs say which columns matter, not the weights: s = mean |x|^α", by="weights"),
    "mean_without_abs": _wrong("the size of a column is mean |x|, not |mean x|", by="mean"),
    "other_column": _wrong(
        "column k is multiplied by the size of input k: dimension 1 of w is in, as in nn.Linear", shift=1
    ),
    "grid_of_unscaled": _wrong("choose the groups' scales after the columns were multiplied by s", first_grid=True),
    "divided_twice": _wrong("return the codes of w · diag(s) as they are: it is x that is divided by s", twice=True),
    "scale_lost": _wrong(
        "what was multiplied into w must be divided out of x: return the s that was used", undivided=True
    ),
    "dead_columns": _wrong("a column without input has mean |x| = 0: bound s from below", clamp=False),
}  # fmt: skip


def contract(name: str, reference: Callable[..., Any]) -> Contract:
    """The contract of AWQ, for this implementation."""
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
        compare={"loss": no_larger, "off": nearest_codes},
    )
