"""The contract of `quant.smoothquant`: one s for all layers that read the same x, and their weights times it.

The implementation is called as `smooth(absmax (K,), weights, alpha) -> (s (K,), [weights times s])`; `weights` is a
list of matrices (N_i, K), `absmax` holds max|x_j| of what they all read. Where a column of x, or of all weights, is 0,
any finite s above 0 is right.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlsys.contracts.core import Case, Contract, Inputs, Mismatch, Results, Wrong, as_array
from mlsys.quant.smoothquant import smooth, smooth_scale

SIGNATURE = "smooth(absmax (K,), weights [(N_i, K), ...], alpha) -> (s (K,), [weights times s, ...])"


def case(columns: int, *rows: int, alpha: float = 0.5, dead: int = 0, unread: int = 0) -> Case:
    """`dead` columns of x are 0, and `unread` columns of all weights."""
    return {"columns": columns, "rows": rows, "alpha": alpha, "dead": dead, "unread": unread}


CASES = [
    case(5, 3),
    case(24, 7, alpha=0.75),
    case(16, 5, alpha=0.0),
    case(16, 20, alpha=1.0),
    case(20, 6, 9, 4),
    case(20, 6, 2, alpha=0.3),
    case(18, 7, dead=3),
    case(18, 7, unread=2),
    case(18, 7, 3, alpha=0.9, dead=2, unread=2),
]


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Columns of x that differ by factors up to a hundred, matrices of unequal size."""
    rng = np.random.default_rng(seed)
    columns = case["columns"]
    largest = np.exp(1.5 * rng.standard_normal(columns)) * 3
    turn = rng.permutation(columns)
    largest[turn[: case["dead"]]] = 0
    unread = turn[columns - case["unread"] :]
    weights = []
    for rows in case["rows"]:
        w = rng.standard_normal((rows, columns)) * np.exp(0.7 * rng.standard_normal(columns)) * rng.uniform(0.3, 2)
        w[:, unread] = 0
        weights.append(torch.from_numpy(0.1 * w).float().to(device))
    return {"absmax": torch.from_numpy(largest).float().to(device), "weights": weights, "alpha": case["alpha"]}


def call(impl: Callable[..., Any], given: Inputs) -> Results:
    """The scale, and each result over it: the weight, again."""
    got = impl(given["absmax"], given["weights"], given["alpha"])
    if not isinstance(got, tuple) or len(got) != 2 or len(got[1]) != len(given["weights"]):
        raise Mismatch(f"expected (s, [{len(given['weights'])} matrices]), got {type(got).__name__}")
    s, scaled = as_array(got[0]), [as_array(w) for w in got[1]]
    if s.shape != tuple(given["absmax"].shape):
        raise Mismatch(f"s has the shape {s.shape}, expected {tuple(given['absmax'].shape)}: one number a column")
    with np.errstate(divide="ignore", invalid="ignore"):
        return {"s": s, "weights": np.concatenate(scaled) / s}


def plain(
    absmax: Tensor,
    weights: list[Tensor],
    alpha: float,
    *,
    inverted: bool = False,
    swapped: bool = False,
    applied: str = "times",
    first_only: bool = False,
    per_tensor: bool = False,
    signed: bool = False,
    mean: bool = False,
    norm: bool = False,
    dead: bool = False,
    unread: bool = False,
    product: bool = False,
    half: bool = False,
    in_place: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """The formula in float64. Each option is one place to go wrong."""
    wide = torch.cat(weights[:1] if first_only else weights).double()
    largest = (wide if signed else wide.abs()).amax(dim=0)
    if mean:
        largest = wide.abs().mean(dim=0)
    if norm:
        largest = wide.norm(dim=0)
    if per_tensor:
        largest = wide.abs().max().expand_as(largest)
    if half:
        alpha = 0.5
    if swapped:
        alpha = 1 - alpha
    x = absmax.double()
    s = x**alpha * largest ** (1 - alpha) if product else x**alpha / largest ** (1 - alpha)
    if not dead:
        s = torch.where(x > 0, s, 1.0)
    if not unread:
        s = torch.where(largest > 0, s, 1.0)
    s = (1 / s if inverted else s).float()
    if in_place:
        return s, [w.mul_(s) for w in weights]
    return s, [{"times": w * s, "over": w / s, "not": w.clone()}[applied] for w in weights]


def oracle(given: Inputs) -> dict[str, np.ndarray]:
    """The formula; the weights as they are."""
    weights = [w.cpu() for w in given["weights"]]
    s, _ = plain(given["absmax"].cpu(), weights, given["alpha"])
    return {"s": as_array(s), "weights": np.concatenate([as_array(w) for w in weights])}


def tolerance(given: Inputs, name: str, want: np.ndarray) -> float:
    """A few roundings, and a small number that is added lest one divides by 0."""
    return 2e-5 * float(np.abs(want).max())


def right_scale(given: Inputs, got: np.ndarray, want: np.ndarray, limit: float) -> str | None:
    """Relative to each; any positive number where there is nothing to balance."""
    largest = np.max([as_array(w.abs().amax(dim=0)) for w in given["weights"]], axis=0)
    free = (as_array(given["absmax"]) == 0) | (largest == 0)
    bad = ~(np.isfinite(got) & (got > 0))
    with np.errstate(invalid="ignore"):
        off = bad | (~free & ~(np.abs(got - want) <= 2e-5 * want))
    if not off.any():
        return None
    at = int(np.flatnonzero(off)[0])
    wanted = "a finite number above 0" if free[at] else f"{want[at]:.6g}"
    return f"{got[at]:.6g} for column {at}, expected {wanted} ({int(off.sum())} of {off.size} are off)"


def _wrong(hint: str, **knobs: Any) -> Wrong:
    return Wrong(partial(plain, **knobs), hint)


WRONG = {
    "inverted": _wrong("x is divided by s, so s is large where x is: max|x_j|^α on top", inverted=True),
    "alpha_on_the_wrong_factor": _wrong("α goes with the activations' maximum, 1 − α with the weights'", swapped=True),
    "times_both": _wrong("the weights' maximum divides: s = max|x_j|^α / max|w_j|^(1−α)", product=True),
    "alpha_forgotten": _wrong("this takes the square root of both whatever α is", half=True),
    "weights_as_they_were": _wrong("x / s needs W · diag(s), or the layer is another", applied="not"),
    "weights_divided": _wrong("x is divided by s, the weights are multiplied by it", applied="over"),
    "first_layer_only": _wrong("all that read x share one s: take the maximum over all their weights", first_only=True),
    "one_maximum_for_all": _wrong("max|w_j| is that of column j, not of the matrix", per_tensor=True),
    "largest_without_abs": _wrong("the maximum is of |w|, not of w", signed=True),
    "mean_for_maximum": _wrong("max|w_j| is the largest number of the column, not its mean magnitude", mean=True),
    "norm_for_maximum": _wrong("max|w_j| is the largest number of the column, not its length", norm=True),
    "dead_inputs": _wrong("a column of zeros in x has s = 0, and x / s is NaN: take 1", dead=True),
    "dead_weights": _wrong("a column of zeros in W has s = ∞, and s · 0 is NaN: take 1", unread=True),
    "in_place": _wrong("return new matrices: the caller's weights may be read by others", in_place=True),
}  # fmt: skip


def reference(absmax: Tensor, weights: list[Tensor], alpha: float) -> tuple[Tensor, list[Tensor]]:
    """`smooth_scale`, then `smooth` for each."""
    s = smooth_scale(absmax, weights, alpha)
    return s, [smooth(w, s) for w in weights]


def contract(name: str) -> Contract:
    """The contract of smoothing."""
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
        compare={"s": right_scale},
    )
