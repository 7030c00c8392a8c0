"""AWQ: scale up the columns that meet large inputs before they are rounded, and scale their inputs down.

A layer's output is a sum of weights times inputs, so a rounding error counts as much as its input is
large; and a few input channels of a language model are ten to a hundred times as large as others. One could
keep their weights in 16 bits, but then two formats lie mixed in one matrix. Instead, give them a finer grid:

    y = x Wᵀ = (x / s) (W diag(s))ᵀ          for any s > 0, one number a column
    y ≈ (x / s) Q(W diag(s))ᵀ

The step Δ of a group is set by its largest weight. While that stays the same, a column's error is still about
Δ/4, but after the division by s it is Δ/(4s). If all columns are scaled up, steps grow with them, and nothing is
gained. So how much? By the inputs' size, to a power that is searched for on calibration inputs:

    m_k = mean |x_k|         s = m^α        α = argmin over 0, 1/20, … 1 of ‖x Wᵀ − (x / s) Q(W diag(s))ᵀ‖²

α = 0 is rounding to nearest, so it never loses to that on the inputs it was shown. There are no gradients and
only one number is fitted, so that it hardly can fit the calibration inputs too closely.

At run time x / s costs nothing where the layer before can take it over: a normalisation's weight, divided by s,
or the rows of a linear layer (the next one's s for the MLP's inner width, if what is between them is linear in it).

The search needs no pass over the inputs for each α. With E the error of the weights, W − Q(W diag(s)) diag(1/s),

    ‖x Eᵀ‖² = tr(E G Eᵀ),  G = xᵀ x (K, K)

which is cheaper if there are more inputs than columns. G is symmetric, so that a product of a block of
columns with itself and those before is enough, a little more than half of E G.

**Clipping** (`clip=True`). A group's range may also be too large: a single large weight makes the step of all. For
each group the range is shrunk by up to a half, and the share kept whose error is least, with errors weighed by G
within the group.

It loses to GPTQ where inputs are correlated and there are enough of them, as it only rounds to nearest; and where no
channel stands out it *is* rounding to nearest. One s serves a whole layer: small groups, which separate large columns
from others anyway, leave less to gain.

Cost:
    21 times round-to-nearest and R K min(n, K/2) multiply-adds (R rows, K columns, n inputs), and n K² for G if n > K.

Memory:
    Beside w, x and the result: three copies of w, and G if n > K. A number for each column stays, s.

Papers:
    Lin, Tang, Tang, Yang, Dang & Han 2023, arXiv:2306.00978 (salient weights; scaling; the search for α).

See also:
    `mlsys.quant.gptq` (makes up for errors), `mlsys.quant.smoothquant` (the same identity, to make activations easy).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mlsys.quant._scheme import Scheme
from mlsys.quant._tensor import (
    Grid,
    QuantizedTensor,
    apply_grid,
    assemble,
    blocks,
    check_matrix,
    choose_grid,
    encode,
    of_rows,
)

LEAST = 1e-4  # of the largest mean |x|: channels that are smaller, or without any input, count as that
BLOCK = 256  # columns of G that are multiplied at once
SHRUNK = tuple(1 - i / 20 for i in range(11))  # shares of a group's range that are tried


def awq(
    w: Tensor, x: Tensor, scheme: Scheme | str, *, grid: int = 20, clip: bool = False
) -> tuple[QuantizedTensor, Tensor]:
    """Codes Q of w · diag(s), and s (K,), such that x @ w.T ≈ (x / s) @ Q.T on calibration inputs.

    w:      (*rows, K), as in nn.Linear.
    x:      (*samples, K), inputs of the layer: a few hundred are enough.
    grid:   how many steps of α from 0 to 1 are tried.
    clip:   shrink the range of groups where that lowers the error.

    s is float32, around 1 (its largest times its smallest is 1). Nothing is changed. TypeError or ValueError for what
    is not finite, no scheme, does not fit, or no inputs.
    """
    scheme = Scheme.parse(scheme)
    weights = check_matrix("w", w)
    inputs = _check(x, weights, grid)
    strength = inputs.abs().mean(dim=0)
    output_error = OutputError(inputs)
    best, scale = math.inf, torch.ones_like(strength)
    for step in range(grid + 1):
        s = column_scale(strength, step / grid)
        scaled = weights * s
        near = _read(scaled, choose_grid(scaled, scheme), scheme)
        found = output_error(weights - near.div_(s))
        if found < best:
            best, scale = found, s
    scaled = weights * scale
    chosen = choose_grid(scaled, scheme)
    if clip and chosen.scale is not None and scaled.numel():
        chosen = _clipped(scaled, inputs / scale, scheme)
    return assemble(encode(scaled, chosen, scheme), chosen, tuple(w.shape), scheme), scale


def column_scale(strength: Tensor, alpha: float) -> Tensor:
    """The scale s = strength^α, over the root of its largest times its smallest; 1 if there was no input at all."""
    most = strength.max() if strength.numel() else strength.new_zeros(())
    if not most > 0:
        return torch.ones_like(strength)
    s = (strength / most).clamp(min=LEAST) ** alpha
    return s / (s.max() * s.min()).sqrt()


class OutputError:
    """E (R, K) → ‖x Eᵀ‖², by x itself or by G = xᵀ x, whichever is smaller."""

    def __init__(self, x: Tensor) -> None:
        self.x = x if len(x) <= x.shape[1] else x.t() @ x
        self.squared = len(x) > x.shape[1]

    def __call__(self, error: Tensor) -> float:
        """The error of the outputs, summed over inputs and rows."""
        if not self.squared:
            return float((error @ self.x.t()).square_().sum(dtype=torch.float64))
        total = 0.0
        for start in range(0, error.shape[1], BLOCK):
            own = error[:, start : start + BLOCK]
            product = own @ self.x[start : start + BLOCK, start : start + BLOCK]
            if start:  # what is before the block counts twice, for G's other half
                product.addmm_(error[:, :start], self.x[:start, start : start + BLOCK], alpha=2)
            total += float(product.mul_(own).sum(dtype=torch.float64))
        return total


def _check(x: Tensor, weights: Tensor, grid: int) -> Tensor:
    """The inputs, float32 (n, K), at most 1 in size: their unit is of no influence."""
    inputs = check_matrix("x", x)
    if inputs.shape[1] != weights.shape[1]:
        raise ValueError(
            f"x must hold inputs of {weights.shape[1]} numbers, as w has columns, got {tuple(x.shape)}: "
            "w is (out, in), as in nn.Linear"
        )
    if not len(inputs):
        raise ValueError(f"x must hold at least one input, got shape {tuple(x.shape)}: calibrate on a few hundred")
    if inputs.device != weights.device:
        raise ValueError(f"x must be on {weights.device} as w is, got {inputs.device}")
    if isinstance(grid, bool) or not isinstance(grid, int):
        raise TypeError(f"grid must be a number of steps, got {grid!r}")
    if grid < 1:
        raise ValueError(f"grid must be at least 1, got {grid}")
    most = float(inputs.abs().max()) if inputs.numel() else 0.0
    return inputs / most if most > 0 else inputs


def _read(x: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """What the nearest codes of x (R, K) stand for."""
    near, element = torch.empty_like(x), scheme.element
    for part in blocks(x):
        own = Grid(of_rows(grid.scale, part), of_rows(grid.zero, part), None)
        near[part] = apply_grid(element.decode(encode(x[part], own, scheme)), own.scale, own.zero, scheme)
    return near


def _clipped(scaled: Tensor, inputs: Tensor, scheme: Scheme) -> Grid:
    """The grid with each group's range shrunk to the share that errs least; for all groups alike if scales depend."""
    columns = scaled.shape[1]
    size = columns if scheme.group == "tensor" else scheme.group_size(columns)
    together = scheme.group == "tensor" or scheme.scales in ("dq", "e4m3")
    top = _peaks(scaled, size)
    least = torch.full_like(top, math.inf)
    share = torch.ones_like(top)
    for part in SHRUNK:
        tried = _read(scaled, choose_grid(_limited(scaled, top * part, size), scheme), scheme)
        found = _group_errors(scaled - tried, inputs, size)
        if together:
            found = found.sum().expand_as(found)
        better = found < least
        least = torch.where(better, found, least)
        share = torch.where(better, part, share)
    return choose_grid(_limited(scaled, top * share, size), scheme)


def _peaks(x: Tensor, size: int) -> Tensor:
    """The largest magnitude of each group, (R, G)."""
    return torch.stack([group.abs().amax(dim=1) for group in x.split(size, dim=1)], dim=1)


def _limited(x: Tensor, limit: Tensor, size: int) -> Tensor:
    """The matrix x with each group cut off at ± its limit (R, G)."""
    wide = limit.repeat_interleave(size, dim=1)[:, : x.shape[1]]
    return torch.minimum(torch.maximum(x, -wide), wide)


def _group_errors(error: Tensor, inputs: Tensor, size: int) -> Tensor:
    """‖x_g E_gᵀ‖² of each row and group alone, (R, G)."""
    parts = zip(error.split(size, dim=1), inputs.split(size, dim=1), strict=True)
    return torch.stack([((own @ (x.t() @ x)) * own).sum(dim=1) for own, x in parts], dim=1)
