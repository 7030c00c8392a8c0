"""LLM.int8(): multiply in 8-bit integers, but for the few columns of x that hold outliers.

Large transformers have a handful of columns in their hidden states that are up to a hundred times
larger than all others. A row of x that is rounded to integers gets its scale from its largest
number; with an outlier in it, the rest becomes −1, 0 and 1. So take these columns out, and multiply
them as floats:

    O = { k : |x_mk| ≥ 6 in any row m }

    y_mn = Σ_{k∈O} x_mk ŵ_nk  +  t_m s_n Σ_{k∉O} q_mk c_nk              t_m = max_{k∉O} |x_mk| / 127, q = round(x / t)

                 K columns, two of them in O
             | ·  ·  ▓  ·  ·  ·  ▓  · |
        x =  | ·  ·  ▓  ·  ·  ·  ▓  · |      ▓  floats, times the same columns of Ŵ
             | ·  ·  ▓  ·  ·  ·  ▓  · |      ·  integers with a scale for each row, times integers

Whole columns go, not single numbers: a dense product of a narrow matrix is fast, one of scattered
numbers is not. What is taken out leaves zeros behind, which add nothing to a sum of integers, so
the rest keeps its place and W is not touched. Which columns are outliers is found anew for each x;
weights are stored in 8 bits only, and a few columns of them are decoded for the product of floats.
If it is known which ones will be needed, `keep` holds them as they were: their errors are those
that outliers multiply.

Where it loses: time. Looking for outliers, taking them out and a second product each are a pass
over memory, more than the product itself at one row of x. Without outliers the result is that of
`qlinear(x, qw, activations="int8")`, later. And in a large batch, one token's outlier takes its
column out for all.

Cost:
    2·M·N·K operations on integers and 2·M·N·|O| on floats, |O| ≪ K; two passes over x.

Memory:
    The codes, once. In a call: a copy of x, and N·|O| floats. `keep`: N·|O| floats for good.

Papers:
    Dettmers et al. 2022, arXiv:2208.07339, section 3.1 (a scale for each row of x and of W);
    section 3.2 (the mixed-precision decomposition and its threshold); section 4 (where outliers are).

See also:
    `mlsys.quant.smoothquant` (hands outliers to the weights beforehand: no cost in the call), `mlsys.quant.qlinear`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlsys.quant._tensor import QuantizedTensor
from mlsys.quant.formats import Integer
from mlsys.quant.qlinear import PreparedWeight, qlinear

THRESHOLD = 6.0  # of the paper


@dataclass(frozen=True, eq=False)
class Kept:
    """Columns of a weight as they were before it was quantized: indices (C,), ascending, and W[:, columns] (N, C)."""

    columns: Tensor
    weights: Tensor

    @property
    def nbytes(self) -> int:
        """Of the weights; indices are not counted."""
        return self.weights.nbytes


def outliers(x: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Which columns of x (*tokens, K) hold a number of at least `threshold` in magnitude: int64 (C,), ascending.

    0 names all columns, infinity none but those that hold infinities.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.ndim == 0:
        raise ValueError("x must have a dimension of columns, got a single number")
    _check_threshold(threshold)
    rows = x.detach().reshape(x.shape[:-1].numel(), x.shape[-1])
    if not rows.numel():
        return torch.zeros(0, dtype=torch.int64, device=x.device)
    low, high = torch.aminmax(rows, dim=0)
    return (torch.maximum(-low, high) >= threshold).nonzero()[:, 0]


def keep(w: Tensor, columns: Tensor) -> Kept:
    """Columns of w (N, K) that always go through the product of floats, unrounded; `columns` as from `outliers`."""
    if not isinstance(w, Tensor) or w.ndim != 2 or not w.is_floating_point():
        got = tuple(w.shape) if isinstance(w, Tensor) else type(w).__name__
        raise TypeError(f"w must be a floating-point matrix (N, K), got {got}")
    if not isinstance(columns, Tensor) or columns.ndim != 1 or columns.dtype != torch.int64:
        raise TypeError("columns must be indices, int64 (C,): see outliers()")
    columns = columns.unique()
    if columns.numel() and not (int(columns[0]) >= 0 and int(columns[-1]) < w.shape[1]):
        raise ValueError(f"columns must be in 0 … {w.shape[1] - 1}, got {int(columns[0])} … {int(columns[-1])}")
    return Kept(columns, w.detach()[:, columns].clone())


def linear(
    x: Tensor,
    qw: QuantizedTensor | PreparedWeight,
    bias: Tensor | None = None,
    *,
    threshold: float = THRESHOLD,
    kept: Kept | None = None,
) -> Tensor:
    """Multiply x (*rows, K) with qw (N, K): columns with outliers as floats, the rest as integers; (*rows, N).

    qw:        integers, usually quantize(w, "int8"); also prepared, which saves time (`mlsys.quant.prepare`).
    bias:      (N,).
    threshold: from which magnitude on a number makes an outlier of its column; infinity: none.
    kept:      columns that are always taken as floats, with weights as they were.

    The result has the dtype of x. There is no gradient in x. ValueError or TypeError for what does not fit.
    """
    weight = qw.weight if isinstance(qw, PreparedWeight) else qw
    if not isinstance(weight, QuantizedTensor):
        raise TypeError(f"qw must be a QuantizedTensor (see mlsys.quant.quantize) or prepared, got {type(qw).__name__}")
    if not isinstance(weight.scheme.element, Integer):
        raise ValueError(f'qw must hold integers, as from quantize(w, "int8"), got {weight.scheme}')
    columns = outliers(x, threshold)
    if x.shape[-1] != weight.columns or len(weight.shape) != 2 or not (columns.numel() or kept is not None):
        return qlinear(x, qw, bias, activations="int8")  # which says what does not fit
    if kept is not None:
        if tuple(kept.weights.shape) != (weight.rows, len(kept.columns)):
            raise ValueError(
                f"kept must hold columns of the same weight, ({weight.rows}, {len(kept.columns)}), "
                f"got {tuple(kept.weights.shape)}"
            )
        columns = columns[~torch.isin(columns, kept.columns)]
    taken = columns if kept is None else torch.cat((kept.columns, columns))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # Sums of integers do not see zeros, so the other columns can stay where they are
    y = qlinear(wide.index_fill(-1, taken, 0), qw, bias, activations="int8")
    if columns.numel():
        y = y + wide[..., columns] @ _decode(weight, columns).to(wide.dtype).T
    if kept is not None:
        y = y + wide[..., kept.columns] @ kept.weights.to(wide.dtype).T
    return y.to(x.dtype)


def _decode(qw: QuantizedTensor, columns: Tensor) -> Tensor:
    """Ŵ[:, columns], float32: no other column is decoded."""
    scheme = qw.scheme
    codes = qw.codes if scheme.bits == 8 else qw.unpacked()
    values = scheme.element.decode(codes[:, columns])
    group = columns // scheme.group_size(qw.columns)
    scale, zero = qw.scales(), qw.zero
    assert scale is not None
    if zero is not None:
        zero = zero.float()[:, group if zero.shape[1] > 1 else slice(None)]
        if scheme.affine:
            values = values - zero
    values = values * scale[:, group if scale.shape[1] > 1 else slice(None)]
    return values + zero if zero is not None and not scheme.affine else values


def _check_threshold(threshold: float) -> None:
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise TypeError(f"threshold must be a number, got {threshold!r}")
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0 (6 is usual), got {threshold}")
