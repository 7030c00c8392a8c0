"""GPTQ: round one column after the other, and let those still to come make up for the error.

Rounding to nearest minimises the error of the *weights*. What matters is the error of
the layer's outputs, and with H = Σ x xᵀ over calibration inputs x that is

    Σ_x ‖(w − ŵ) x‖² = tr((w − ŵ) H (w − ŵ)ᵀ)

Inputs are correlated, so the error of one column can be cancelled by changing others.
Factor H = U D Uᵀ (U upper triangular with a diagonal of ones, D diagonal), and round
each column not where it is, but where the errors before it want it to be:

    c_k = w_k + Σ_{j<k} (w_j − q_j) U_jk        q_k = nearest(c_k)

With E = w − q that is c = q + E U, and so the loss falls apart into columns:

    tr(E H Eᵀ) = tr((E U) D (E U)ᵀ) = Σ_k D_k ‖c_k − q_k‖²

Each column's rounding error counts with D_k ≤ H_kk alone: the rest is made up for.

**It is the paper's algorithm.** That one takes T with H⁻¹ = Tᵀ T (T upper triangular),
subtracts (c_j − q_j) T_jk / T_jj from all columns k > j, and never looks back.

    V = T, each row over its T_jj:      H⁻¹ = Vᵀ D⁻¹ V, so V = U⁻¹ and D_k = 1 / T_kk²
    what it subtracts, with F = c − q:  c = w − F (V − 1)
    so                                  F V = w − q = E, F = E U
    and                                 c = q + E U, as above

Here c is computed from the weights' own errors E, not from errors of errors F. So one
factorisation does: no inverse, no second factor, no division by a small T_jj. All
of it works on wᵀ, in which a column of w lies in one piece.

**Order of work.** A half of the columns is rounded, then the other half hears of all
its errors at once in one large product, and so on within each half, down to `block`
columns that are done one by one. The block changes the time, not the result.

**Groups.** With "static" groups all scales are those of round-to-nearest, taken from w
before it starts. With "dynamic" ones a group's scales are chosen when its first column
is reached, for what the group would be by then: c, where columns of the group that are
not yet rounded hand on what they were given, c_k = w_k + (what came from before) U⁻¹.
Only static ones go with `order="activation"`, which rounds the columns with the largest
H_kk first, while all others can still make up for them.

**Where H is not well.** H is damped, H + damp · mean(H_kk) · 1, as in the paper, ten
times more if it has no factors even then. Columns without any input (H_kk = 0) are
rounded to nearest; so are all if there is no input. Fewer inputs than columns are
well for the damped H, but it then fits those few inputs: `gptq_report` says so.

It loses where columns are not correlated (it is then rounding to nearest, number for
number), and where the calibration inputs are not those of use: it trades errors on
directions it has not seen for those it has. At 8 bits the gain is as large, of an
error that no longer matters.

Cost:
    K³/6 multiply-adds for the factor, K²R/2 for the errors (R rows, K columns); in the original, inverse and second
    factor make it 2K³/3, and it carries errors on within a block column by column. H itself: K² a calibration input.

Memory:
    Beside w, H and the result: three copies of H while it is factored, then one, and two or three of w.

Papers:
    Frantar, Ashkboos, Hoefler & Alistarh 2022, arXiv:2210.17323, section 4 and Algorithm 1.
    Chee, Cai, Kuleshov & De Sa 2023, arXiv:2307.13304 (the form with U and D, as LDLQ; that it equals GPTQ).
    Chen, Shabanzadeh, Crnčević, Hoefler & Alistarh 2025, arXiv:2507.18553 (it is Babai's nearest plane algorithm).
    Hassibi & Stork 1993, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon", NIPS (where it began).

See also:
    `mlsys.quant.rtn` (the grid, and what it is measured against), `mlsys.quant.awq`, `mlsys.quant.hqq` (without H).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mlsys.quant._hessian import Factors, check_hessian, factorise, hessian, loss, relative, sums
from mlsys.quant._scheme import Scheme
from mlsys.quant._tensor import Grid, QuantizedTensor, assemble, check_matrix, choose_grid, encode
from mlsys.quant.formats import Format, Integer
from mlsys.quant.rtn import quantize

__all__ = ["Report", "gptq", "gptq_report", "hessian", "loss"]

ROUNDING = 1e-6  # of the outputs: sums of squares that are less than 0 by this much
DEPENDENT = 10.0  # times the damping: a pivot below it says little but that there was damping


@dataclass(frozen=True)
class Report:
    """How it went.

    loss:     error of the outputs on the calibration inputs, relative (see `loss`).
    nearest:  that of round-to-nearest.
    damp:     as asked for, or what it took until H had factors.
    dead:     columns that no calibration input ever used.
    rank:     about how many directions of the columns the inputs tell apart: those that damping does not decide. They
              are counted in the order in which columns are rounded, and another order may find some more or fewer.
    columns:  how many there are.
    negative: whether a sum of squares, of errors or outputs, came out below 0, and was taken as 0: then H is no Σ x xᵀ,
              and the losses are of no inputs.
    """

    loss: float
    nearest: float
    damp: float
    dead: int
    rank: int
    columns: int
    negative: bool = False

    def __str__(self) -> str:
        text = f"loss {self.loss:.3g} (nearest: {self.nearest:.3g}), damp {self.damp:g}"
        if self.dead:
            text += f", {self.dead} of {self.columns} columns without input"
        if self.rank < self.columns - self.dead:
            text += f", inputs tell about {self.rank} of {self.columns} directions apart: more of them may help"
        if self.negative:
            text += ", H is no sum Σ x xᵀ: it gives errors or outputs a square below 0, which counts as 0"
        return text


def gptq(
    w: Tensor,
    H: Tensor,
    scheme: Scheme | str,
    *,
    block: int = 16,
    damp: float = 0.01,
    groups: str = "static",
    order: str = "natural",
) -> QuantizedTensor:
    """Codes of w (*rows, K) in `scheme` ("int4:g128") such that outputs for inputs with Σ x xᵀ = H err little.

    H:       (K, K), or any multiple of it; see `hessian`. float64 is factored in float64.
    block:   columns that are rounded one by one before others hear of it; of no influence on the result.
    damp:    what is added to H's diagonal, as a share of its mean.
    groups:  "static" or "dynamic": scales from w, or from what w is when its turn comes.
    order:   "natural", or "activation": the columns with the largest inputs first.

    w and H are not changed. TypeError or ValueError for what is not finite, no scheme, no Σ x xᵀ, or does not fit.
    """
    return _solve(w, H, scheme, block, damp, groups, order)[0]


def gptq_report(
    w: Tensor,
    H: Tensor,
    scheme: Scheme | str,
    *,
    block: int = 16,
    damp: float = 0.01,
    groups: str = "static",
    order: str = "natural",
) -> tuple[QuantizedTensor, Report]:
    """What `gptq` returns, and how it went: the loss, the damping it took, columns without input, too few inputs."""
    quantized, factors = _solve(w, H, scheme, block, damp, groups, order)
    rank = int((factors.pivots > DEPENDENT * factors.floor).sum()) if factors.floor else factors.pivots.numel()
    ours, nearest = sums(w, quantized, H), sums(w, quantize(w, scheme), H)
    report = Report(
        loss=relative(*ours),
        nearest=relative(*nearest),
        damp=factors.damp,
        dead=int((H.diagonal() == 0).sum()),
        rank=rank,
        columns=H.shape[0],
        negative=any(size < 0 or error < -ROUNDING * size for error, size in (ours, nearest)),
    )
    return quantized, report


def _solve(
    w: Tensor, H: Tensor, scheme: Scheme | str, block: int, damp: float, groups: str, order: str
) -> tuple[QuantizedTensor, Factors]:
    """Checks, the grid, the factors, and the columns in their order."""
    scheme = Scheme.parse(scheme)
    x = check_matrix("w", w)
    columns = x.shape[1]
    weight = check_hessian(H, columns, x.device)
    dynamic = _check(scheme, block, damp, groups, order) and scheme.groups(columns) > 1
    if dynamic and order == "activation":
        raise ValueError('groups="dynamic" needs order="natural": a group is met in one piece; or take groups="static"')
    turn = None
    if order == "activation":
        turn = torch.argsort(weight.diagonal(), descending=True, stable=True)
        weight = weight[turn][:, turn]
    if not x.numel():
        grid = choose_grid(x, scheme)
        none = weight.new_ones(columns)
        return assemble(encode(x, grid, scheme), grid, tuple(w.shape), scheme), Factors(weight, none, damp, 0.0)
    factors = factorise(weight, damp)
    del weight
    rounds = _Rounds(x, factors.upper.float(), scheme, turn, dynamic, block)
    rounds.solve(0, columns)
    levels, grid = rounds.results()
    return assemble(encode(levels, Grid(None, None, None), scheme), grid, tuple(w.shape), scheme), factors


def _check(scheme: Scheme, block: int, damp: float, groups: str, order: str) -> bool:
    """ValueError or TypeError for options that are none; whether groups are dynamic."""
    if isinstance(block, bool) or not isinstance(block, int):
        raise TypeError(f"block must be a number of columns, got {block!r}")
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    if isinstance(damp, bool) or not isinstance(damp, (int, float)):
        raise TypeError(f"damp must be a number, got {damp!r}")
    if not (math.isfinite(damp) and damp >= 0):
        raise ValueError(f"damp must be a share of H's mean diagonal, 0 or more (the paper: 0.01), got {damp}")
    if groups not in ("static", "dynamic"):
        raise ValueError(f"groups={groups!r} must be 'static' or 'dynamic'")
    if order not in ("natural", "activation"):
        raise ValueError(f"order={order!r} must be 'natural' or 'activation'")
    if groups == "dynamic" and scheme.scales in ("dq", "e4m3"):
        raise ValueError(
            f'groups="dynamic": the scales of {scheme} are quantized together, so that all must be known before; '
            'take groups="static"'
        )
    return groups == "dynamic"


class _Rounds:
    """The columns of w, one after the other, in the order `turn`. All matrices are transposed: a row is a column of w.

    now:    (K, R) c_k as far as known; of columns that are done, their level: a number of the element format.
    error:  (K, R) w_k − q_k of columns that are done, w_k of the others.
    """

    def __init__(
        self, x: Tensor, upper: Tensor, scheme: Scheme, turn: Tensor | None, dynamic: bool, block: int
    ) -> None:
        columns = x.shape[1]
        self.upper, self.scheme, self.turn, self.dynamic, self.block = upper, scheme, turn, dynamic, block
        self.now = (x.t() if turn is None else x.t()[turn]).clone(memory_format=torch.contiguous_format)
        self.error = self.now.clone()
        self.size = scheme.group_size(columns)
        self.group = [k // self.size for k in (range(columns) if turn is None else turn.tolist())]
        self.grids = [] if dynamic else [choose_grid(x, scheme)]
        self.scale: list[Tensor] = []  # of group g, (R,) or (1,)
        self.divisor: list[Tensor] = []  # the same, but ∞ for a scale that was lost: then the level is that of 0
        self.zero: list[Tensor] = []
        for grid in self.grids:
            self._keep(grid)
        self.nearest = rounding(scheme.element)

    def _keep(self, grid: Grid) -> None:
        """The scales of one more group, or of all."""
        if grid.scale is not None:
            scale = grid.scale.t().contiguous()
            self.scale += list(scale)
            self.divisor += list(torch.where(scale > 0, scale, math.inf))
        if grid.zero is not None:
            self.zero += list(grid.zero.t().contiguous())

    def solve(self, start: int, stop: int) -> None:
        """Columns start … stop − 1, which have heard of all errors before `start`."""
        if self.dynamic and stop - start <= self.size and self.group[start] == len(self.grids):
            self.choose(start, stop)
        if stop - start <= self.block and (not self.dynamic or stop - start <= self.size):
            for k in range(start, stop):
                self.column(start, k)
            return
        unit = self.size if self.dynamic and stop - start > self.size else self.block
        middle = start + -(-(stop - start) // (2 * unit)) * unit  # a group is never cut, unless it is all there is
        self.solve(start, middle)
        self.now[middle:stop].addmm_(self.upper[start:middle, middle:stop].t(), self.error[start:middle])
        self.solve(middle, stop)

    def column(self, start: int, k: int) -> None:
        """Round column k, which has heard of all errors before `start`, and tell its own."""
        now, error, g = self.now[k], self.error[k], self.group[k]
        if k > start:
            now.addmv_(self.error[start:k].t(), self.upper[start:k, k])
        if not self.scale:
            now.copy_(self.nearest(now))
            error.sub_(now)
            return
        now.div_(self.divisor[g])
        level = self.nearest(now.add_(self.zero[g]) if self.zero else now)
        now.copy_(level)
        error.addcmul_(level - self.zero[g] if self.zero else level, self.scale[g], value=-1)

    def choose(self, start: int, stop: int) -> None:
        """The scales of the group of these columns, for what they would be now if none of them were rounded."""
        given = self.now[start:stop] - self.error[start:stop]
        inner = self.upper[start:stop, start:stop].t()
        handed = torch.linalg.solve_triangular(inner, given, upper=False, unitriangular=True)
        grid = choose_grid((self.error[start:stop] + handed).t().contiguous(), self.scheme)
        self.grids.append(grid)
        self._keep(grid)

    def results(self) -> tuple[Tensor, Grid]:
        """Levels (R, K) in the order of w, and the grid."""
        levels = self.now if self.turn is None else torch.empty_like(self.now).index_copy_(0, self.turn, self.now)
        return levels.t().contiguous(), self.grids[0] if len(self.grids) == 1 else _beside(self.grids)


def _beside(grids: list[Grid]) -> Grid:
    """The grids of groups as that of the matrix."""

    def joined(parts: list[Tensor | QuantizedTensor | None]) -> Tensor | None:
        tensors = [part for part in parts if isinstance(part, Tensor)]
        return torch.cat(tensors, dim=1) if tensors else None

    return Grid(joined([g.scale for g in grids]), joined([g.zero for g in grids]), joined([g.stored for g in grids]))


def rounding(element: Format) -> Callable[[Tensor], Tensor]:
    """A function of float32 numbers: decode(encode(x)) of this format, in few operations. It may overwrite x."""
    if isinstance(element, Integer):
        smallest, largest = element.smallest, element.largest
        return lambda x: x.round_().clamp_(smallest, largest)
    if element.bits > 8:
        return lambda x: element.decode(element.encode(x))
    values = element.decode(torch.arange(1 << element.bits, dtype=torch.uint8))
    values = values[values.isfinite()].unique()  # in ascending order
    lower, higher = values[:-1], values[1:]
    middles = (lower + higher) / 2
    up = element.decode(element.encode(middles)) == higher  # halfway between two, the format says which
    edges = torch.where(up, torch.nextafter(middles, lower), middles)

    def nearest(x: Tensor) -> Tensor:
        return values.to(x.device)[torch.bucketize(x, edges.to(x.device))]

    return nearest
