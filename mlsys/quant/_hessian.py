"""What a layer's inputs say about its weights: H = Σ x xᵀ, how it weighs errors, and its factors H = U D Uᵀ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlsys.quant._tensor import QuantizedTensor, check_matrix

TILE = 256  # rows and columns of H that are compared with their mirror image at once
ASYMMETRY = 1e-3  # of the largest number in H; sums in another order differ by far less
LEAST_DAMPING = 1e-6  # where none was asked for, and none does not do


def hessian(x: Tensor, H: Tensor | None = None) -> Tensor:
    """H + Σ x xᵀ over the rows of x (*samples, K), float32 or float64 (K, K): call it once a batch, H from the last.

    x are inputs of a linear layer, which errs by E x if its weights err by E: Σ ‖E x‖² = tr(E H Eᵀ). (The papers have
    2/n Σ x xᵀ; a factor changes nothing.) H is not changed. Errors for what is not finite, or of another K than H.
    """
    wide = x.dtype == torch.float64 if isinstance(x, Tensor) else False
    rows = check_matrix("x", x)
    if wide:
        rows = x.detach().reshape(rows.shape)
    if H is None:
        return rows.t() @ rows
    if not isinstance(H, Tensor) or not H.is_floating_point():
        kind = str(H.dtype) if isinstance(H, Tensor) else type(H).__name__
        raise TypeError(f"H must be that of the batches before, a floating-point tensor, got {kind}")
    if H.shape != (rows.shape[1], rows.shape[1]):
        got = tuple(H.shape)
        raise ValueError(f"H must be that of the batches before, ({rows.shape[1]}, {rows.shape[1]}), got {got}")
    if H.device != rows.device:
        raise ValueError(f"H must be on {rows.device} as x is, got {H.device}")
    rows = rows.to(H.dtype)
    return torch.addmm(H, rows.t(), rows)


def loss(w: Tensor, q: Tensor | QuantizedTensor, H: Tensor) -> float:
    """tr((w − ŵ) H (w − ŵ)ᵀ) / tr(w H wᵀ): the squared error of the layer's outputs, as a share of the outputs.

    0 for no error; also where H has no weight on any, and ∞ where outputs of 0 have an error. Sums of squares are never
    below 0: where an H that is no Σ x xᵀ (rounded, or made otherwise) makes them so, they count as 0.
    """
    return relative(*sums(w, q, H))


def relative(error: float, size: float) -> float:
    """The loss of these two sums."""
    error = max(error, 0.0)
    if size > 0:
        return error / size
    return math.inf if error > 0 else 0.0


def sums(w: Tensor, q: Tensor | QuantizedTensor, H: Tensor) -> tuple[float, float]:
    """tr((w − ŵ) H (w − ŵ)ᵀ) and tr(w H wᵀ), as they come out, for H over its largest number."""
    x = check_matrix("w", w)
    approximate = q.dequantize() if isinstance(q, QuantizedTensor) else q
    if not isinstance(approximate, Tensor):
        raise TypeError(f"q must be a QuantizedTensor or a torch tensor, got {type(q).__name__}")
    if approximate.shape != w.shape:
        raise ValueError(f"q must have the shape of w, {tuple(w.shape)}, got {tuple(approximate.shape)}")
    H = check_hessian(H, x.shape[1], x.device)
    return _weighted(x - approximate.detach().float().reshape(x.shape), H), _weighted(x, H)


def _weighted(m: Tensor, H: Tensor) -> float:
    """tr(m H mᵀ)."""
    m = m.to(H.dtype)
    return float(((m @ H) * m).sum(dtype=torch.float64))


@dataclass(frozen=True)
class Factors:
    """H + damp · mean(diagonal of H) · 1 = U D Uᵀ, U (K, K) with ones on its diagonal and zeros below.

    pivots:  the diagonal of D, (K,): what is left of column k's weight in H when the columns after it make up for it.
    damp:    what it took.
    floor:   damp · mean(diagonal of H), what was added to each column's own.
    """

    upper: Tensor
    pivots: Tensor
    damp: float
    floor: float


def factorise(H: Tensor, damp: float) -> Factors:
    """The factors of H, damped ten times more each time that H has none; H may be overwritten.

    A Cholesky factor L Lᵀ starts from the first column; seen from the last column, the same is U D Uᵀ. So flip, factor,
    flip.
    """
    mean = float(H.diagonal().mean()) or 1.0  # no inputs but zeros: then all errors count alike
    diagonal = H.diagonal().clone()
    while True:
        H.diagonal().copy_(diagonal + damp * mean)
        lower, failed = torch.linalg.cholesky_ex(H.flip(0, 1))
        root = lower.diagonal().clone()
        if not int(failed) and bool((root > 0).all()):
            upper = lower.div_(root).flip(0, 1)
            return Factors(upper, root.square().flip(0), damp, damp * mean)
        damp = max(10 * damp, LEAST_DAMPING)


def check_hessian(H: Any, columns: int, device: torch.device) -> Tensor:
    """A copy of H over its largest number, float32 or float64. Errors for what is no Σ x xᵀ of so many columns."""
    if not isinstance(H, Tensor):
        raise TypeError(f"H must be a torch tensor, got {type(H).__name__}: see hessian()")
    if not H.is_floating_point():
        raise TypeError(f"H must be a floating-point tensor, got {H.dtype}")
    if H.layout != torch.strided:
        raise TypeError(f"H must be a dense tensor, got {H.layout}: call .to_dense() first")
    if H.shape != (columns, columns):
        raise ValueError(f"H must be ({columns}, {columns}), as w has {columns} columns, got {tuple(H.shape)}")
    if H.device != device:
        raise ValueError(f"H must be on {device} as w is, got {H.device}")
    copy = H.detach().to(torch.promote_types(H.dtype, torch.float32), copy=True)
    if not columns:
        return copy
    low, high = (float(end) for end in torch.aminmax(copy))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("H must be finite: it holds NaN or infinity; look at the calibration inputs")
    most = max(high, -low)
    for i in range(0, columns, TILE):
        for j in range(i, columns, TILE):
            there, mirrored = copy[i : i + TILE, j : j + TILE], copy[j : j + TILE, i : i + TILE].t()
            if float((there - mirrored).abs().max()) > ASYMMETRY * most:
                raise ValueError("H must be symmetric, Σ x xᵀ over calibration inputs: see hessian()")
    if float(copy.diagonal().min()) < 0 or most > float(copy.diagonal().max()) * (1 + ASYMMETRY):
        raise ValueError(
            "H is no sum Σ x xᵀ: its diagonal holds a number below 0, or another number is larger than all of it"
        )
    return copy.div_(most) if most > 0 else copy
