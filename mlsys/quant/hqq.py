"""HQQ: round to nearest, then move each group's zero point so that most weights sit on the grid; no data needed.

Rounding to nearest takes its grid from the ends of a group, min and max, and rounds the zero point to a whole
number. But it does not matter where the ends are, it matters where most weights are. So keep the step s, let
the zero point z be any number, and shift the grid to where errors are small. Not their squares, which a few large
errors rule, but a power p < 1, under which many errors near 0 and a few large ones are better than all middling:

    ŵ = s · (q − z)          min over q, z of Σ |w − ŵ|^p           p = 0.7

That is neither smooth nor convex. The half-quadratic trick: give the large errors a variable of their own, e, and
pay for it, so that the rest is an ordinary fit. Then in turn

    q = round(w / s + z)
    e = shrink(w − ŵ)        shrink(u) = sign(u) · max(|u| − |u|^(p−1) / β, 0)
    z = mean(q − (w − e) / s)                                        the best z for w − e
    β = κ · β

Errors below β^(−1/(2−p)) have e = 0 and pull z with all their size; larger ones pull with |u|^(p−1)/β only, the
less, the larger they are. (p = 1 is the soft threshold, β → 0 least squares.) In one line, with errors u in steps:

    z ← z − mean( sign(u) · min(|u|, |u|^(p−1) / β) )

Here u is in units of the step, (w − ŵ) / s. The published code takes w − ŵ as it is, with the same β = 10. Weights of
language models are about 0.02, so that all their errors are below its threshold, 10^(−1/1.3) = 0.17: none is set aside,
all e are 0, and what runs is least squares. In units of the step the method is what its text says, and does not
depend on the unit of w.

Each group keeps the z of its least Σ |u|^p on the way, the start being that of round-to-nearest: so it never loses to
that by this measure.

It is a small gain: of the squared error, about a tenth goes. It loses to methods that know the inputs (`gptq`, `awq`);
and zero points of 16 or 32 bits cost what a whole one of 8 does not: 16 bits a group of 64 are a quarter of a bit a
weight. 0 is not exact any more.

Cost:
    20 times round-to-nearest and one power |u|^(p−1) a weight.

Memory:
    A block of rows at a time; a zero point is float32 if the scheme's scales are, else float16.

Papers:
    Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models", mobiusml.github.io/hqq_blog.
    Geman & Reynolds 1992, "Constrained Restoration and the Recovery of Discontinuities", IEEE TPAMI (half-quadratic).

See also:
    `mlsys.quant.rtn` (where it starts), `mlsys.quant.gptq`, `mlsys.quant.awq` (with calibration inputs).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mlsys.quant._scheme import INTEGERS, Scheme
from mlsys.quant._tensor import Grid, QuantizedTensor, assemble, blocks, check_matrix, choose_grid, encode, of_rows

TINY = 1e-6  # of a step: errors below have the pull of that


def hqq(
    w: Tensor, scheme: Scheme | str, *, steps: int = 20, p: float = 0.7, beta: float = 10.0, kappa: float = 1.01
) -> QuantizedTensor:
    """Codes of w (*rows, K) in an affine integer scheme ("int4:g64:fp16"), with zero points that are no whole numbers.

    steps:  how often codes and zero points are chosen in turn, at most; 0 is round-to-nearest.
    p:      the power of errors whose sum is made small, 0 < p ≤ 1.
    beta:   how dear it is to set an error aside, errors in units of the step; multiplied by kappa ≥ 1 each step.

    w is not changed. TypeError or ValueError for what is not finite, for other schemes, and for settings that are none.
    """
    scheme = Scheme.parse(scheme)
    _check(scheme, steps, p, beta, kappa)
    x = check_matrix("w", w).contiguous()
    grid = choose_grid(x, scheme)
    assert grid.scale is not None
    assert grid.zero is not None
    zero = grid.zero.to(torch.float32 if scheme.scales == "fp32" else torch.float16)
    if x.numel():
        rows = x.reshape(1, -1) if scheme.group == "tensor" else x  # who shares a zero point is in one row
        size = x.numel() if scheme.group == "tensor" else scheme.group_size(x.shape[1])
        divisor = torch.where(grid.scale > 0, grid.scale, math.inf)
        for part in blocks(rows):
            scale, start = of_rows(divisor, part), of_rows(zero, part)
            assert scale is not None
            assert start is not None
            zero[part] = _fit(rows[part], scale, start, size, scheme.element.largest, steps, p, beta, kappa)
    grid = Grid(grid.scale, zero, grid.stored)
    return assemble(encode(x, grid, scheme), grid, tuple(w.shape), scheme)


def _fit(
    x: Tensor, scale: Tensor, zero: Tensor, size: int, largest: float, steps: int, p: float, beta: float, kappa: float
) -> Tensor:
    """Zero points (R, G) for rows x (R, K) in groups of `size`, the last of which may be shorter."""
    whole = x.shape[1] // size
    parts = [x[:, : whole * size].reshape(len(x), whole, size)] + [x[:, None, whole * size :]] * (x.shape[1] % size > 0)
    done, start = [], 0
    for groups in parts:
        own = slice(start, start + groups.shape[1])
        units = groups / scale[:, own, None]
        done.append(zero_points(units, zero[:, own], largest, steps=steps, p=p, beta=beta, kappa=kappa))
        start = own.stop
    return torch.cat(done, dim=1)


def zero_points(
    units: Tensor, zero: Tensor, largest: float, *, steps: int, p: float, beta: float, kappa: float
) -> Tensor:
    """Zero points for weights in units of the step, (…, size), that start from `zero` (…), in its type.

    Stops early when no group got better. `largest` is the largest code.
    """
    kind, now = zero.dtype, zero
    best, least = zero, torch.full(zero.shape, math.inf, dtype=units.dtype, device=units.device)
    for _ in range(steps + 1):
        z = now.to(units.dtype).unsqueeze(-1)
        codes = (units + z).round_().clamp_(0, largest)
        u = units - codes.sub_(z)
        size = u.abs()
        pull = size.clamp(min=TINY).pow_(p - 1)
        error = (size * pull).mean(dim=-1)
        better = error < least
        if not bool(better.any()):
            break
        best, least = torch.where(better, now, best), torch.minimum(error, least)
        fitted = torch.minimum(size, pull.div_(beta), out=pull).copysign_(u)  # u − shrink(u)
        now = (z.squeeze(-1) - fitted.mean(dim=-1)).to(kind)
        beta *= kappa
    return best


def shrink(u: Tensor, beta: float, p: float) -> Tensor:
    """sign(u) · max(|u| − |u|^(p−1) / β, 0): what is set aside of errors u; 0 stays 0."""
    size = u.abs()
    kept = size - size.clamp(min=torch.finfo(u.dtype).tiny) ** (p - 1) / beta
    return kept.clamp(min=0).copysign(u)


def _check(scheme: Scheme, steps: int, p: float, beta: float, kappa: float) -> None:
    """ValueError or TypeError for what does not fit."""
    if not scheme.affine:
        remedy = f'"{scheme.format}:affine"' if scheme.format in INTEGERS else '"int4:g64:fp16"'
        raise ValueError(f"scheme={str(scheme)!r} has no zero point, which is what HQQ fits: take {remedy}")
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps must be a whole number, got {steps!r}")
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, got {steps}")
    if not 0 < p <= 1:
        raise ValueError(f"p must be above 0 and at most 1, got {p}")
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta must be above 0 and finite, got {beta}")
    if not (math.isfinite(kappa) and kappa >= 1):
        raise ValueError(f"kappa must be 1 or more and finite, got {kappa}")
