"""What GPTQ must compute: codes on the grid of round-to-nearest, whose outputs err as little as the paper's do.

The implementation is anything called as `gptq(w, H, scheme)` that gives an object with `dequantize()`, or the matrix
itself. Schemes are "int<bits>[:g<group>][:sym|:affine]". Two things are judged:

- the grid: scales and zero points are those of round-to-nearest, of w as it is given: all are chosen before the first
  column is rounded. Symmetric: max |w| of the group gets the largest code, 2^(bits−1) − 1, and the smallest is minus
  that. Affine: min(w, 0) … max(w, 0) are spanned by 0 … 2^bits − 1. A group of zeros has the scale 1;
- the loss tr((w − ŵ) H (w − ŵ)ᵀ), which may be a few per cent above that of the paper's Algorithm 1 in float64, with
  1% of H's mean diagonal added to it. A lower one is welcome.

See also:
    `mlsys.quant.gptq`, `mlsys.contracts.core`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from mlsys.contracts.core import Case, Contract, Inputs, Mismatch, Results, Wrong

SIGNATURE = "gptq(w (R, K), H (K, K), scheme) -> object with dequantize() -> (R, K); the grid that of w as given: symmetric to ±(2^(b−1) − 1), or affine over a range with 0 in it; H damped by 1% of its mean diagonal"  # noqa: E501
MORE = 0.03  # of the original's loss
DAMP = 0.01
BLOCK = 16  # of the wrong variants, so that small matrices have several blocks


def case(
    rows: int,
    columns: int,
    scheme: str,
    *,
    samples: int | None = None,
    dead: int = 0,
    batch: int = 1,
    zeros: bool = False,
) -> Case:
    """`samples` inputs (default 4K), `dead` of whose columns are 0; H is divided by `batch`; `zeros`: groups of w."""
    settings = {
        "rows": rows, "columns": columns, "scheme": scheme, "samples": samples or 4 * columns, "dead": dead,
        "batch": batch,
    }  # fmt: skip
    return settings | ({"zeros": True} if zeros else {})


CASES = [
    case(12, 24, "int4"),
    case(12, 24, "int3:g8"),
    case(20, 48, "int2:sym"),
    case(8, 50, "int3:g20"),
    case(30, 20, "int4:g8:sym"),
    case(8, 40, "int3:g16", batch=1000),
    case(9, 40, "int3", dead=5),
    case(16, 40, "int3:g10", samples=15),
    case(6, 160, "int3:g32"),
    case(3, 1, "int2"),
    case(1, 33, "int4"),
    case(12, 24, "int4:g8", zeros=True),
    case(12, 24, "int4:g8:sym", zeros=True),
]


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Correlated inputs with columns of unequal size; normal weights, those of each column about a mean of its own."""
    rng = np.random.default_rng(seed)
    rows, columns, samples = case["rows"], case["columns"], case["samples"]
    few = max(columns // 4, 1)
    x = rng.standard_normal((samples, few)) @ rng.standard_normal((few, columns)) / np.sqrt(few)
    x = (x + 0.2 * rng.standard_normal((samples, columns))) * np.exp(0.6 * rng.standard_normal(columns))
    x[:, rng.permutation(columns)[: case["dead"]]] = 0
    w = rng.standard_normal((rows, columns)) * np.exp(0.3 * rng.standard_normal((1, columns)))
    if case.get("zeros"):
        w[1], w[2, :8] = 0, 0
    H = torch.from_numpy(2 * x.T @ x / case["batch"]).float()
    return {"w": torch.from_numpy(w).float().to(device), "H": H.to(device), "scheme": case["scheme"]}


def call(impl: Callable[..., Any], given: Inputs) -> Results:
    """What the codes stand for, where on the grid that is, and the loss."""
    got = impl(given["w"], given["H"], given["scheme"])
    found = got.dequantize() if hasattr(got, "dequantize") and not isinstance(got, torch.Tensor) else got
    if not isinstance(found, torch.Tensor | np.ndarray) or tuple(found.shape) != tuple(given["w"].shape):
        what = tuple(found.shape) if hasattr(found, "shape") else type(found).__name__
        raise Mismatch(f"got {what}, expected codes of a matrix {tuple(given['w'].shape)}, with dequantize()")
    values = found.detach().cpu().double().numpy() if isinstance(found, torch.Tensor) else found.astype(np.float64)
    w, H = exact(given)
    return {"levels": levels(values, w, given["scheme"]), "loss": np.array([output_error(w, values, H)])}


def exact(given: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """W and H in float64."""
    return given["w"].cpu().double().numpy(), given["H"].cpu().double().numpy()


def output_error(w: np.ndarray, values: np.ndarray, H: np.ndarray) -> float:
    """tr((w − ŵ) H (w − ŵ)ᵀ) / tr(w H wᵀ)."""
    return float((((w - values) @ H) * (w - values)).sum() / ((w @ H) * w).sum())


# --- the grid, and the algorithm as the paper has it ------------------------------------------------------------------


def parse(scheme: str, columns: int) -> tuple[int, int, bool]:
    """Bits, group size, whether symmetric."""
    name, *options = scheme.split(":")
    sizes = [int(option[1:]) for option in options if option[0] == "g"]
    return int(name[3:]), sizes[0] if sizes else columns, "sym" in options


def grid(w: np.ndarray, scheme: str, *, guarded: bool = True) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Scale and zero point of each weight (R, K), and the range of codes. The scale of a group of zeros is 1."""
    bits, size, symmetric = parse(scheme, w.shape[1])
    scale, zero = np.empty_like(w), np.empty_like(w)
    for start in range(0, w.shape[1], size):
        part = slice(start, start + size)
        scale[:, part], zero[:, part] = span(w[:, part], bits, symmetric, guarded=guarded)
    most = 2 ** (bits - 1) - 1
    return (scale, zero, -most, most) if symmetric else (scale, zero, 0, 2**bits - 1)


def span(group: np.ndarray, bits: int, symmetric: bool, *, guarded: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point (R, 1) of a group."""
    low, high = np.minimum(group.min(axis=1), 0), np.maximum(group.max(axis=1), 0)
    if symmetric:
        step = np.maximum(-low, high) / (2 ** (bits - 1) - 1)
    elif group.shape[1] == 1:  # a number alone is exact: the code beside the zero point
        step = high - low
    else:
        step = (high - low) / (2**bits - 1)
    if guarded:
        step = np.where(step > 0, step, 1)
    if symmetric:
        zero = np.zeros_like(step)
    elif group.shape[1] == 1:
        zero = np.where(low < 0, 1.0, 0.0)
    else:
        with np.errstate(invalid="ignore"):  # 0 / 0, if it is not guarded
            zero = np.round(-low / step)
    return step[:, None], zero[:, None]


def levels(values: np.ndarray, w: np.ndarray, scheme: str) -> np.ndarray:
    """The codes that the values stand for; whole numbers, where they are on the grid."""
    scale, zero, _, _ = grid(w, scheme)
    return values / scale + zero


def plain(
    w: torch.Tensor,
    H: torch.Tensor,
    scheme: str,
    *,
    block: int = BLOCK,
    damp: float = DAMP,
    alone: bool = False,
    stale: bool = False,
    within: bool = False,
    undivided: bool = False,
    weights_error: bool = False,
    not_flipped: bool = False,
    factor_of_h: bool = False,
    backwards: bool = False,
    sign: float = 1.0,
    late_group: bool = False,
    shuffled: bool = False,
    unclamped: bool = False,
    wider_grid: bool = False,
    dynamic: bool = False,
    full_range: bool = False,
    unguarded: bool = False,
    as_codes: bool = False,
) -> torch.Tensor:
    """Algorithm 1 of the paper in float64, column by column. Options but block and damp are places to go wrong."""
    matrix, weight = w.double().numpy(), H.double().numpy()
    columns = matrix.shape[1]
    scale, zero, low, high = grid(matrix, scheme, guarded=not unguarded)
    bits, size, symmetric = parse(scheme, columns)
    if late_group:  # the scales of the group before, from the second on
        before = np.maximum(np.arange(columns) - size, 0)
        scale, zero = scale[:, before], zero[:, before]
    if wider_grid:
        low -= 1
    if full_range and symmetric:
        scale, low = scale * high / (high + 1), low - 1
    turn = np.argsort(-weight.diagonal(), kind="stable") if shuffled else np.arange(columns)
    matrix, weight = matrix[:, turn], weight[np.ix_(turn, turn)]
    scale, zero = scale[:, turn], zero[:, turn]
    damped = weight + damp * weight.diagonal().mean() * np.eye(columns)
    try:
        factor = np.linalg.cholesky(damped if factor_of_h else np.linalg.inv(damped)).T  # upper: H⁻¹ = factorᵀ factor
    except np.linalg.LinAlgError:  # without damping only: there a library that does not check goes on with NaN
        factor = np.full_like(damped, np.nan)
    if not_flipped:
        unit = np.linalg.cholesky(damped)
        unit = (unit / unit.diagonal()).T
    done = np.empty_like(matrix)
    left = matrix.copy()
    for k in range(columns)[:: -1 if backwards else 1]:
        stop = min((k // block + 1) * block, columns)
        if dynamic and k % size == 0:
            part = slice(k, k + size)
            scale[:, part], zero[:, part] = span(left[:, part], bits, symmetric)
        with np.errstate(invalid="ignore"):  # 0 / 0, if it is not guarded
            codes = np.round(left[:, k] / scale[:, k] + zero[:, k])
        codes = codes if unclamped else np.clip(codes, low, high)
        done[:, k] = (codes - zero[:, k]) * scale[:, k]
        if alone:
            continue
        error = (matrix if weights_error else left)[:, k] - done[:, k]
        tell = np.zeros(columns)
        tell[k + 1 :] = factor[k, k + 1 :]
        if backwards:
            tell = np.where(np.arange(columns) < k, factor[:, k], 0)
        if stale:
            tell[k + 1 : stop] = 0
        if within:
            tell[stop:] = 0
        if not_flipped:
            left += np.outer(matrix[:, k] - done[:, k], np.where(np.arange(columns) > k, unit[k], 0))
            continue
        left -= sign * np.outer(error / (1 if undivided else factor[k, k]), tell)
    if as_codes:
        done = np.round(done / scale + zero)
    if not shuffled:
        done[:, turn] = done.copy()
    return torch.from_numpy(done).float()


def oracle(given: Inputs) -> dict[str, np.ndarray]:
    """The original's codes and loss. Other codes are as good, if they are codes and their loss is no larger."""
    w, H = exact(given)
    values = plain(given["w"].cpu(), given["H"].cpu(), given["scheme"]).double().numpy()
    return {"levels": levels(values, w, given["scheme"]), "loss": np.array([output_error(w, values, H)])}


def tolerance(given: Inputs, name: str, want: np.ndarray) -> float:
    """A level to a hundredth, for scales in float32; the loss within `MORE`."""
    return 0.01 if name == "levels" else MORE * float(want[0]) + 1e-9


def on_the_grid(given: Inputs, got: np.ndarray, want: np.ndarray, tolerance: float) -> str | None:
    """Whole numbers in the range of codes."""
    _, _, low, high = grid(exact(given)[0], given["scheme"])
    near = np.clip(np.round(np.nan_to_num(got, nan=low - 1)), low, high)
    off = ~(np.abs(got - near) <= tolerance)
    if not off.any():
        return None
    row, column = (int(i) for i in np.argwhere(off)[0])
    return (
        f"{int(off.sum())} of {off.size} weights are on no step of their group's grid ({low} … {high}); "
        f"the first, [{row}, {column}], is at {got[row, column]:.4g}"
    )


def no_larger(given: Inputs, got: np.ndarray, want: np.ndarray, tolerance: float) -> str | None:
    """Lower is welcome."""
    if got[0] <= want[0] + tolerance:
        return None
    w, H = exact(given)
    nearest = output_error(
        w, plain(given["w"].cpu(), given["H"].cpu(), given["scheme"], alone=True).double().numpy(), H
    )
    return (
        f"the outputs err by {got[0]:.4g} (relative, squared); by the paper's algorithm it is {want[0]:.4g}, "
        f"by rounding to nearest {nearest:.4g}"
    )


def _wrong(hint: str, **knobs: Any) -> Wrong:
    return Wrong(partial(plain, **knobs), hint)


WRONG = {
    "nearest": _wrong(
        "this is rounding to nearest: no column hears of an error (a lower factor's row k is 0 after the diagonal)",
        alone=True,
    ),
    "stale_block": _wrong(
        "the columns of the same block must hear of an error before they are rounded, not only those after it",
        stale=True,
    ),
    "block_alone": _wrong("when a block is done, its errors go to all columns after it too", within=True),
    "not_divided": _wrong("divide the error by the factor's diagonal, T_kk, before it is carried on", undivided=True),
    "error_of_weights": _wrong(
        "with factors of the inverse, the error is c − q, of the column as it is now; w − q goes with U of H = U D Uᵀ",
        weights_error=True,
    ),
    "not_flipped": _wrong(
        "U of H = U D Uᵀ is not Lᵀ of H = L D Lᵀ: turn H's rows and columns round, factor, turn the factor round",
        not_flipped=True,
    ),
    "factor_of_H": _wrong("the factor is that of H⁻¹; for H itself see H = U D Uᵀ, whose U is upper", factor_of_h=True),
    "columns_before": _wrong("carry errors on to columns not rounded yet, in the order of the factor", backwards=True),
    "wrong_sign": _wrong("subtract (c − q) T_kj / T_kk from the others, so that they cancel the error", sign=-1.0),
    "group_before": _wrong("column k belongs to group ⌊k / g⌋: take its scale and zero point", late_group=True),
    "dynamic_groups": _wrong(
        "choose all scales and zero points from w as it is given, before the first column is rounded: chosen when a "
        'group\'s turn comes, they are those of groups="dynamic"',
        dynamic=True,
    ),
    "zero_group_nan": _wrong("max |w| of a group of zeros is 0: do not divide by it, take the scale 1", unguarded=True),
    "codes_returned": _wrong(
        "return what the codes stand for, (code − zero) · scale, or an object with dequantize()", as_codes=True
    ),
    "full_range": _wrong(
        "symmetric codes end at ±(2^(bits−1) − 1), and the largest |w| of a group gets the last", full_range=True
    ),
    "block_of_128_alone": _wrong(
        "when a block is done, its errors go to all columns after it too: at more than 128 columns it shows",
        within=True,
        block=128,
    ),
    "much_damping": _wrong(
        "add 1% of the mean diagonal to H, not more: what is damped makes up for less of the errors", damp=10 * DAMP
    ),
    "order_kept": _wrong("put the columns back in their order when all are rounded", shuffled=True),
    "not_clamped": _wrong("clamp codes to their range: c leaves the range that w had", unclamped=True),
    "one_code_more": _wrong("codes begin at 0, or at −(2^(bits−1) − 1) if symmetric", wider_grid=True),
    "no_damping": _wrong("add 1% of the mean diagonal to H: with too few inputs it has no inverse", damp=0.0),
}  # fmt: skip


def contract(name: str, reference: Callable[..., Any]) -> Contract:
    """The contract of GPTQ, for this implementation."""
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
        compare={"levels": on_the_grid, "loss": no_larger},
    )
