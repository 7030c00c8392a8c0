"""SmoothQuant: hand the activations' outliers over to the weights, so that both can be rounded to 8 bits.

A linear layer's inputs have a few columns that are a hundred times larger than the rest, always
the same ones. Rounded with one scale, the other columns get two or three of 255 levels. The
weights have no such columns. A column of x may be divided by any s_j if the weights' column is
multiplied by it, and nothing else changes:

    y = x Wᵀ = (x / s) (W · diag(s))ᵀ

    s_j = max|x_j|^α / max|w_j|^(1−α)              largest number of column j: of x over all tokens, of W over its rows

    α = 0    all weights' columns get the maximum 1, the outliers stay in x
    α = 1    all columns of x get the maximum 1, the weights have the outliers
    α = ½    both get √(max|x_j| · max|w_j|): the same in each column

          x  | 1 −16  2   6 |                    x / s  | 1  −4  2   2 |
             |−2   8 −1  −9 |      s = 1 4 1 3          |−2   2 −1  −3 |
    max|x_j|   2  16  2   9                     max      2   4  2   3
    max|w_j|   2   1  2   1                     max      2   4  2   3        of W · diag(s), for α = ½

The division costs nothing when the model runs: it is put into what makes x, a norm's weight or a
linear layer (`fold_`). Layers that read the same x (query, key and value) must share one s, with
the maximum over all their weights.

Where it does not help: activations without outliers, which with a scale for each token and each row
of W are nearly as good without it; weights of 4 bits, to which it adds outliers; and a layer whose input
nobody can divide beforehand (behind a GELU, say), where dividing takes a pass over x.

Cost:
    A pass over the calibration inputs for their maxima, two over the weights. Nothing afterwards.

Memory:
    K numbers of maxima while calibrating. `smooth` makes a new matrix; `fold_` and `balance_` change modules.

Papers:
    Xiao et al. 2022, arXiv:2211.10438, "Review of Quantization Difficulty" (outliers) and "SmoothQuant"
    (the formula of s; the picture above is that of its main idea with α = 0.5).

See also:
    `mlsys.quant.qlinear` (`activations="int8"` is what it is for), `mlsys.quant.llm_int8` (keeps outliers apart),
    `mlsys.quant.awq` (the same identity, for weights alone).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mlsys.quant._tensor import check_matrix

LIMITS = torch.finfo(torch.float32)


def absmax(x: Tensor, running: Tensor | None = None) -> Tensor:
    """max|x_j| over the rows of x (*tokens, K), float32 (K,): call it once a batch, `running` from the last.

    No rows leave `running`, or zeros. TypeError or ValueError for what is not finite, or of another K.
    """
    rows = check_matrix("x", x)
    if len(rows):
        low, high = torch.aminmax(rows, dim=0)
        largest = torch.maximum(-low, high)
    else:
        largest = rows.new_zeros(rows.shape[1])
    if running is None:
        return largest
    if running.shape != largest.shape:
        raise ValueError(
            f"running must be the maxima of the batches before, {tuple(largest.shape)}, got {tuple(running.shape)}"
        )
    return torch.maximum(running, largest)


def smooth_scale(activation_absmax: Tensor, w: Tensor | Sequence[Tensor], alpha: float = 0.5) -> Tensor:
    """How far to divide columns of the input and multiply those of the weights: s (K,), float32.

    activation_absmax: max|x_j| of calibration inputs, (K,): see `absmax`.
    w:                 the matrix (N, K) that reads x, or all of them (N_i, K) that read the same x.
    alpha:             how much of the outliers the weights take over, 0 … 1.

    A column that is 0 in all inputs, or in all weights, gets 1: nothing is to be balanced, and the formula has 0 or ∞.
    TypeError or ValueError for shapes that do not fit, negative or infinite maxima, or alpha outside of 0 … 1.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise TypeError(f"alpha must be a number in 0 … 1, got {alpha!r}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in 0 … 1 (0.5 is usual), got {alpha}")
    if not isinstance(activation_absmax, Tensor):
        raise TypeError(
            f"activation_absmax must be a torch tensor, got {type(activation_absmax).__name__}: see absmax()"
        )
    if activation_absmax.ndim != 1:
        raise ValueError(
            f"activation_absmax must be (K,), one number for each input column, got {tuple(activation_absmax.shape)}"
        )
    x = check_matrix("activation_absmax", activation_absmax)[0].double()
    if bool((x < 0).any()):
        raise ValueError("activation_absmax must hold maxima of |x|, which are at least 0: see absmax()")
    matrices = [w] if isinstance(w, Tensor) else list(w)
    if not matrices:
        raise ValueError("w must be a matrix or a list of at least one")
    largest = torch.zeros_like(x)
    for number, matrix in enumerate(matrices):
        name = "w" if isinstance(w, Tensor) else f"w[{number}]"
        rows = check_matrix(name, matrix)
        if matrix.ndim != 2 or rows.shape[1] != len(x):
            raise ValueError(f"{name} must be (N, {len(x)}), a column for each of x, got {tuple(matrix.shape)}")
        if rows.device != x.device:
            raise ValueError(f"{name} must be on {x.device} as activation_absmax is, got {rows.device}")
        largest = torch.maximum(largest, absmax(rows).double())
    scale = x**alpha / largest ** (1 - alpha)
    scale = torch.where((x > 0) & (largest > 0), scale, 1.0)
    return scale.clamp(LIMITS.tiny, LIMITS.max).float()


def smooth(w: Tensor, s: Tensor) -> Tensor:
    """W · diag(s): a new matrix (N, K), in the dtype of w, which is not changed. Inputs are x / s from then on.

    TypeError or ValueError for s that are not K positive, finite numbers, or if w · s is beyond the dtype of w.
    """
    rows = check_matrix("w", w)
    s = _check_scale(s, rows.shape[1], rows.device)
    scaled = (w.detach().to(torch.promote_types(w.dtype, torch.float32)) * s).to(w.dtype)
    if scaled.numel() and not all(math.isfinite(end) for end in torch.aminmax(scaled)):
        raise ValueError(f"w · s holds numbers beyond {w.dtype}: smooth in float32, or with a smaller alpha")
    return scaled


@torch.no_grad()
def fold_(before: nn.Module, s: Tensor) -> None:
    """Divide what `before` puts out by s (K,), in its own parameters: weight and bias of a norm, or a linear layer.

    All that reads this output gets x / s from then on: smooth the weights of each with the same s, or the model is
    another. ValueError for a norm without a weight; TypeError for modules whose output parameters do not scale.
    """
    _check_foldable(before)
    assert isinstance(before.weight, Tensor)
    s = _check_scale(s, len(before.weight), before.weight.device)
    for parameter, new in _folded(before, s):
        parameter.copy_(new)


@torch.no_grad()
def balance_(
    before: nn.Module,
    linears: nn.Linear | Sequence[nn.Linear],
    activation_absmax: Tensor,
    alpha: float = 0.5,
) -> Tensor:
    """Smooth all linear layers that read the output of `before`, and divide it there; returns their s (K,).

    What the modules compute together stays the same, up to rounding. Nothing is changed if anything is refused; see
    `smooth_scale` and `fold_` for what is.
    """
    layers = list(linears) if isinstance(linears, Sequence) else [linears]
    _check_foldable(before)
    for layer in layers:
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"linears must be Linear layers, got {type(layer).__name__}")
        _check_own_weight("linears", layer)
    weights = [layer.weight for layer in layers]
    s = smooth_scale(activation_absmax, weights, alpha)
    assert isinstance(before.weight, Tensor)
    _check_scale(s, len(before.weight), before.weight.device)
    smoothed = [(weight, smooth(weight, s)) for weight in weights]
    for parameter, new in [*_folded(before, s), *smoothed]:
        parameter.copy_(new)
    return s


def _folded(before: nn.Module, s: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The parameters of `before`, and what they become. ValueError if that does not fit into their dtype."""
    found = []
    for parameter in (before.weight, getattr(before, "bias", None)):
        if isinstance(parameter, Tensor):  # RMSNorm has no bias
            by = s.double().reshape(-1, *[1] * (parameter.ndim - 1))
            new = (parameter.double() / by).to(parameter.dtype)
            if not bool((new.isfinite() & ((new != 0) | (parameter == 0))).all()):
                kind = type(before).__name__
                raise ValueError(f"what the {kind} holds does not fit into {parameter.dtype} once divided by s")
            found.append((parameter, new))
    return found


def _check_own_weight(name: str, layer: nn.Module) -> None:
    """TypeError where `weight` is computed anew at each call: what is written there would be lost."""
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        raise TypeError(
            f"{name}: the weight of this {type(layer).__name__} is computed from other parameters; make it plain first "
            "(torch.nn.utils.parametrize.remove_parametrizations)"
        )


def _check_foldable(before: nn.Module) -> None:
    if not isinstance(before, nn.LayerNorm | nn.RMSNorm | nn.Linear):
        raise TypeError(
            f"before must be a LayerNorm, RMSNorm or Linear, whose outputs scale with their weights, got "
            f"{type(before).__name__}; divide the input by s where it is read instead"
        )
    if before.weight is None:
        raise ValueError(f"before must have a weight to divide: make the {type(before).__name__} elementwise_affine")
    _check_own_weight("before", before)
    if not isinstance(before, nn.Linear) and before.weight.ndim != 1:
        raise ValueError(f"before must be a norm over one dimension, got {tuple(before.weight.shape)}")


def _check_scale(s: Tensor, columns: int, device: torch.device) -> Tensor:
    if not isinstance(s, Tensor) or not s.is_floating_point():
        raise TypeError(f"s must be a floating-point tensor, got {getattr(s, 'dtype', type(s).__name__)}")
    if tuple(s.shape) != (columns,):
        raise ValueError(f"s must be ({columns},), one number for each column, got {tuple(s.shape)}")
    if s.device != device:
        raise ValueError(f"s must be on {device}, got {s.device}")
    if s.numel() and not (float(s.min()) > 0 and math.isfinite(float(s.max()))):
        raise ValueError("s must hold positive, finite numbers: see smooth_scale()")
    return s
