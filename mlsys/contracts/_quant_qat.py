"""The contract of `quant.qat`: rounding on a given grid, whose gradient goes straight through.

The implementation is called as `fake_quantize(x (R, K), scale (R, G), zero (R, G) or None, *, bits, group) -> (R, K)`;
`group` neighbours of a row share a scale. Without zero points, codes are −(2^(bits−1) − 1) … 2^(bits−1) − 1, and with
them 0 … 2^bits − 1. Wanted are the numbers on the grid, whether a gradient is asked for or not, and the gradient in x:
that of the result where x was only rounded, 0 where it was clamped. Numbers are drawn such that neither is in doubt.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlsys.contracts._kernels_common import exact, result
from mlsys.contracts.core import Case, Contract, Inputs, Results, Wrong
from mlsys.quant import Scheme, qat
from mlsys.quant._tensor import Grid

SIGNATURE = "fake_quantize(x (R, K), scale (R, G), zero (R, G) or None, *, bits, group) -> (R, K)"


def case(
    rows: int, columns: int, *, bits: int = 4, group: int | None = None, zero: bool = False, gradient: bool = True
) -> Case:
    """`gradient`: whether one is asked for; else the function runs under `torch.no_grad`."""
    return {
        "rows": rows, "columns": columns, "bits": bits, "group": group or columns, "zero": zero, "gradient": gradient,
    }  # fmt: skip


CASES = [
    case(2, 6),
    case(3, 24, bits=2),
    case(3, 30, bits=3, zero=True),
    case(4, 32, bits=8, group=8),
    case(2, 30, bits=4, group=8, zero=True),
    case(3, 24, bits=3, gradient=False),
    case(5, 21, bits=2, group=7, zero=True, gradient=False),
    case(0, 8),
]


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Numbers all over the range and a third beyond it, none near the middle of two steps or the range's ends."""
    rng = np.random.default_rng(seed)
    rows, columns, bits, group = (case[name] for name in ("rows", "columns", "bits", "group"))
    groups = -(-columns // group)
    low, high = (0, 2**bits - 1) if case["zero"] else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    scale = np.exp(rng.standard_normal((rows, groups))) / 4
    zero = rng.integers(1, high + 1, (rows, groups)) if case["zero"] else np.zeros((rows, groups))
    whole = rng.integers(low, high + 1, (rows, columns))
    part = rng.uniform(-0.4, 0.4, (rows, columns))
    part = np.where(whole == high, -np.abs(part), np.where(whole == low, np.abs(part), part))
    beyond = rng.uniform(0.7, 3, (rows, columns))
    codes = np.where(rng.random((rows, columns)) < 0.15, high + beyond, whole + part)
    codes = np.where(rng.random((rows, columns)) < 0.15, low - beyond, codes)
    which = np.arange(columns) // group
    x = (codes - zero[:, which]) * scale[:, which]

    def tensor(a: np.ndarray) -> Tensor:
        return torch.from_numpy(a).float().to(device)

    return {
        "x": tensor(x), "scale": tensor(scale), "zero": tensor(zero) if case["zero"] else None, "bits": bits,
        "group": group, "gradient": tensor(rng.standard_normal((rows, columns))) if case["gradient"] else None,
    }  # fmt: skip


def call(impl: Callable[..., Any], given: Inputs) -> Results:
    """The numbers, and their gradient."""
    options = {"bits": given["bits"], "group": given["group"]}
    shape = tuple(given["x"].shape)
    if given["gradient"] is None:
        with torch.no_grad():
            out = impl(given["x"], given["scale"], given["zero"], **options)
        return {"out": result(out, shape, torch.float32)}
    x = given["x"].detach().requires_grad_()
    out = impl(x, given["scale"], given["zero"], **options)
    values = result(out, shape, torch.float32).clone()
    gradient = None
    if out.requires_grad:
        (gradient,) = torch.autograd.grad(out, x, given["gradient"], allow_unused=True)
    return {"out": values, "x.grad": torch.zeros_like(values) if gradient is None else gradient}


class _Rounding(torch.autograd.Function):
    """Two given results: forward the first, backward the gradient times the second."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return gradients[0] * slope, None, None


def plain(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    bits: int,
    group: int,
    slope: str = "inside",
    clamped: bool = True,
    evaluation: bool = True,
    training: bool = True,
    truncated: bool = False,
    lowest: bool = False,
    zero_added: bool = True,
    zero_taken_off: bool = True,
    next_scale: bool = False,
    in_place: bool = False,
) -> Tensor:
    """The definition. Each option is one place to go wrong."""
    wide, wanted = x.detach().double(), x.requires_grad and torch.is_grad_enabled()
    which = torch.arange(x.shape[1], device=x.device) // group
    each = scale.double()[:, which]
    if next_scale and len(scale):
        each = scale.double().flatten().roll(1).reshape(scale.shape)[:, which]
    offset = torch.zeros_like(each) if zero is None else zero.double()[:, which]
    low, high = (0, 2**bits - 1) if zero is not None else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    low -= lowest and zero is None
    codes = wide / each + offset * zero_added
    codes = codes.trunc() if truncated else codes.round()
    inside = ((codes >= low) & (codes <= high)).double()
    if clamped:
        codes = codes.clamp(low, high)
    out = (codes - offset * zero_taken_off) * each
    slopes = {
        "inside": inside, "zero": torch.zeros_like(out), "all": torch.ones_like(out), "scale": inside * each,
        "over": inside / each, "outside": 1 - inside, "rounded": inside * codes,
    }  # fmt: skip
    if not (training if wanted else evaluation):
        out = wide
    if in_place:
        x.data.copy_(out)
    rounded: Tensor = _Rounding.apply(x, out.float(), slopes[slope].float())
    return rounded


def oracle(given: Inputs) -> dict[str, np.ndarray]:
    """The grid's number nearest to each, and the gradient of those within."""
    x, scale, bits = exact(given["x"]), exact(given["scale"]), given["bits"]
    which = np.arange(x.shape[1]) // given["group"]
    scale = scale[:, which]
    signed = given["zero"] is None
    zero = np.zeros_like(scale) if signed else exact(given["zero"])[:, which]
    most = 2 ** (bits - 1) - 1
    low, high = (-most, most) if signed else (0, 2**bits - 1)
    codes = np.round(x / scale + zero)
    want = {"out": (np.clip(codes, low, high) - zero) * scale}
    if given["gradient"] is not None:
        want["x.grad"] = exact(given["gradient"]) * ((codes >= low) & (codes <= high))
    return want


def tolerance(given: Inputs, name: str, want: np.ndarray) -> float:
    """A few roundings of float32."""
    return 1e-6 * float(np.abs(want).max(initial=0.0)) + 1e-9


def _wrong(hint: str, **knobs: Any) -> Wrong:
    return Wrong(partial(plain, **knobs), hint)


WRONG = {
    "no_gradient": _wrong("the derivative of round() is 0: let the gradient through it as it is", slope="zero"),
    "gradient_times_scale": _wrong("x / s, then times s: the gradient is 1 in all", slope="scale"),
    "gradient_over_scale": _wrong("times s follows x / s: the gradient is 1 in all", slope="over"),
    "gradient_of_clamped": _wrong("a number beyond the range changes nothing: its gradient is 0", slope="all"),
    "gradient_of_clamped_only": _wrong("the gradient is 1 within the range and 0 beyond it", slope="outside"),
    "gradient_times_code": _wrong("the scale is given, and has no gradient here; that in x is 1", slope="rounded"),
    "not_clamped": _wrong("codes have a range: clamp them", clamped=False),
    "not_in_evaluation": _wrong("round in evaluation too: it is the network that will be used", evaluation=False),
    "not_in_training": _wrong("round while training: the loss must see the rounded weights", training=False),
    "truncated": _wrong("round to the nearest, do not cut off", truncated=True),
    "one_code_more": _wrong("signed codes are −(2^(bits−1) − 1) … 2^(bits−1) − 1: −2^(bits−1) is none", lowest=True),
    "zero_point_not_added": _wrong("add the zero point before you round and clamp", zero_added=False),
    "zero_point_stays": _wrong("take the zero point off the code before it is scaled", zero_taken_off=False),
    "scale_of_the_wrong_group": _wrong("column k belongs to group ⌊k / group⌋ of its own row", next_scale=True),
    "in_place": _wrong("return a new tensor: x are the weights that are trained", in_place=True),
}  # fmt: skip


def reference(x: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, group: int) -> Tensor:
    """`fake_quantize` on this grid."""
    return qat.fake_quantize(x, Scheme(f"int{bits}", group, affine=zero is not None), Grid(scale, zero, scale))


def contract(name: str) -> Contract:
    """The contract of rounding with a straight-through gradient."""
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
