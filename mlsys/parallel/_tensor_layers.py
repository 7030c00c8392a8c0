"""Layers of which each rank holds a share: linear by columns, linear by rows, a vocabulary's rows, and the loss on it.

Whole tensors that go in or come out are the same on every rank of the group. With `sequence_parallel`, those between
the layers are cut along their *first* dimension: rank r has the r-th part.

See also:
    `mlsys.parallel.tensor` (what they are for), `mlsys.parallel._tensor_operators` (f, f̄, g, ḡ).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mlsys.models._inputs import check_ids
from mlsys.parallel._tensor_operators import Ranks, f_bar, g_bar, ranks, shared
from mlsys.parallel._tensor_products import columns, rows
from mlsys.parallel._tensor_shards import Cut
from mlsys.parallel.collectives import Group


class ColumnLinear(nn.Module):
    """`linear` with its outputs shared out: this rank computes outputs rank·k … rank·k + k − 1, and no other rank does.

    Weights (out/n, in), bias (out/n,). The input is whole, or with `sequence_parallel` cut along its first dimension;
    the output is this rank's share of the last dimension. `linear` has the same numbers on all ranks and is not
    changed. Layers with one input share their f if they are called by `apply_columns`.

    shares: how many different ones there are (None: one a rank). With fewer shares than ranks, neighbouring ranks
            hold the same one, and their gradients are summed: key/value heads, where they are few.
    """

    def __init__(
        self,
        linear: nn.Linear,
        group: Group | Ranks = None,
        *,
        sequence_parallel: bool = False,
        shares: int | None = None,
    ) -> None:
        super().__init__()
        _check_linear(linear)
        self.ranks, self.sequence_parallel = ranks(group), sequence_parallel
        n = self.ranks.size
        self.shares = n if shares is None else shares
        if n % self.shares or linear.out_features % self.shares:
            raise ValueError(
                f"linear has out_features={linear.out_features}, which {n} ranks do not divide into {self.shares} "
                "equal shares: take a number of ranks that divides it"
            )
        cut = Cut(0, self.shares, linear.out_features)
        self.in_features, self.out_features = linear.in_features, cut.each
        self.weight = _share(linear.weight, cut, self.ranks)
        self.bias = None if linear.bias is None else _share(linear.bias, cut, self.ranks)

    def forward(self, x: Float[Tensor, "*rows inside"]) -> Float[Tensor, "*all_rows share"]:
        return apply_columns(x, [self])[0]

    def parameters_in_use(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, with what sums their gradients where several ranks have them."""
        if self.shares == self.ranks.size:
            return self.weight, self.bias
        options = {"copies": self.shares, "index": self.ranks.rank * self.shares // self.ranks.size}
        bias = None if self.bias is None else shared(self.bias, self.ranks, **options)
        return shared(self.weight, self.ranks, **options), bias

    def extra_repr(self) -> str:
        return _described(self)


def apply_columns(x: Tensor, layers: Sequence[ColumnLinear], *, cut: bool | None = None) -> tuple[Tensor, ...]:
    """The output of each of these layers for one x, with one f (or g) for all: one all-reduce of its gradient.

    cut: whether x is cut along its first dimension; None: if the layers were made with `sequence_parallel`.
    """
    first = layers[0]
    weights, biases = zip(*(layer.parameters_in_use() for layer in layers), strict=True)
    leaves = [*(layer.weight for layer in layers), *(layer.bias for layer in layers)]
    cut = first.sequence_parallel if cut is None else cut
    return columns(x, weights, biases, first.ranks, cut=cut, leaves=leaves)


class RowLinear(nn.Module):
    """`linear` with its inputs shared out: each rank multiplies its share of the input, and the products are summed.

    Weights (out, in/n); the bias (out,) is on every rank, and added once, after the sum. The input is this rank's share
    of the last dimension, as a `ColumnLinear` leaves it; the output is whole, or with `sequence_parallel` cut along its
    first dimension. `linear` has the same numbers on all ranks and is not changed.
    """

    def __init__(self, linear: nn.Linear, group: Group | Ranks = None, *, sequence_parallel: bool = False) -> None:
        super().__init__()
        _check_linear(linear)
        self.ranks, self.sequence_parallel = ranks(group), sequence_parallel
        if linear.in_features % self.ranks.size:
            raise ValueError(
                f"linear has in_features={linear.in_features}, which {self.ranks.size} ranks do not divide: take a "
                "number of ranks that does"
            )
        cut = Cut(1, self.ranks.size, linear.in_features)
        self.in_features, self.out_features = cut.each, linear.out_features
        self.weight = _share(linear.weight, cut, self.ranks)
        self.bias = None if linear.bias is None else _share(linear.bias, Cut(None, 1, 0), self.ranks)

    def forward(self, x: Float[Tensor, "*rows share"], *, cut: bool | None = None) -> Float[Tensor, "*some outside"]:
        return rows(x, self.weight, self.bias, self.ranks, cut=self.sequence_parallel if cut is None else cut)

    def extra_repr(self) -> str:
        return _described(self)


class VocabEmbedding(nn.Module):
    """An embedding, or the output matrix, or both in one, with its rows shared out: ⌈vocab/n⌉ tokens a rank.

    All ranks' weights have one shape; rows past the end of the vocabulary are zeros that nothing reads.
    `forward` looks tokens up: each rank its own, 0 for the others, and f̄ (or ḡ along the first dimension) adds up.
    `logits` are this rank's columns of the scores, after f (or g); `vocab_cross_entropy` takes them as they are.
    """

    def __init__(self, weight: Tensor, group: Group | Ranks = None, *, sequence_parallel: bool = False) -> None:
        super().__init__()
        if weight.ndim != 2:
            raise ValueError(f"weight must have shape (vocab, width), got {tuple(weight.shape)}")
        self.ranks, self.sequence_parallel = ranks(group), sequence_parallel
        self.vocab = weight.shape[0]
        self.start, self.stop = share_of_vocab(self.vocab, self.ranks)
        self.weight = _share(weight, Cut(0, self.ranks.size, self.vocab), self.ranks)

    def forward(self, tokens: Int[Tensor, "*shape"], *, cut: bool | None = None) -> Float[Tensor, "*some width"]:
        here = (tokens >= self.start) & (tokens < self.stop)
        found = F.embedding((tokens - self.start).where(here, 0), self.weight)
        found = found.masked_fill(~here.unsqueeze(-1), 0.0)
        return (g_bar if (self.sequence_parallel if cut is None else cut) else f_bar)(found, self.ranks)

    def logits(self, x: Float[Tensor, "*rows width"], *, cut: bool | None = None) -> Float[Tensor, "*all_rows share"]:
        """The scores of this rank's tokens, x Wᵀ; the last rank may have fewer than the others, or none."""
        here, cut = self.stop - self.start, self.sequence_parallel if cut is None else cut
        weight = self.weight if here == len(self.weight) else self.weight[:here]  # without the padding
        return columns(x, [weight], [None], self.ranks, cut=cut, leaves=[self.weight, None])[0]

    def extra_repr(self) -> str:
        return f"tokens {self.start} … {self.stop - 1} of {self.vocab}, width={self.weight.shape[1]}"


def share_of_vocab(vocab: int, group: Ranks) -> tuple[int, int]:
    """The first token of this rank, and the one after its last."""
    each = -(-vocab // group.size)
    return min(group.rank * each, vocab), min((group.rank + 1) * each, vocab)


def vocab_cross_entropy(
    logits: Float[Tensor, "*rows share"],
    targets: Int[Tensor, "*rows"],
    group: Group | Ranks = None,
    *,
    vocab: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy in nats from logits whose columns are shared out: the logits never travel.

    With z the logits of a row, m their maximum and y the target,

        loss = log Σⱼ exp(zⱼ − m) − (z_y − m)

    needs three numbers a row from all ranks: the maximum, the sum, and z_y − m of the one rank that has token y. These
    are float32, or float64 if the logits are. Each rank's gradient is that of its own columns, softmax(z) − [j = y].

    vocab:        columns of all ranks together, ⌈vocab/n⌉ on each but the last; None: as many on each as here.
    ignore_index: rows with this target have no loss and no gradient, and do not count in the mean.
    reduction:    "mean", "sum" or "none".
    """
    there = ranks(group)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r}: one of mean, sum, none is needed")
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating-point, got {logits.dtype}")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"targets must have the shape {tuple(logits.shape[:-1])} of rows, got {tuple(targets.shape)}")
    total = logits.shape[-1] * there.size if vocab is None else vocab
    start, stop = share_of_vocab(total, there)
    if logits.shape[-1] != stop - start:
        raise ValueError(
            f"logits have {logits.shape[-1]} columns, but of vocab={total} rank {there.rank} of {there.size} has "
            f"{stop - start}: pass vocab=, and this rank's tokens {start} … {stop - 1}"
        )
    flat, ignored = targets.flatten(), targets.flatten() == ignore_index
    check_ids("targets", flat.masked_fill(ignored, 0), 1, total, "vocab", logits.device)
    losses = _CrossEntropy.apply(logits.flatten(0, -2), flat, ignored, start, there)
    if reduction == "none":
        return losses.view(targets.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / (~ignored).sum()


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignored: Tensor, start: int, there: Ranks) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        n, share = logits.shape
        largest = logits.amax(-1).to(wide) if share else logits.new_full((n,), -math.inf, dtype=wide)
        there.reduce(largest, op="max")
        shifted = logits.to(wide) - largest.unsqueeze(-1)  # ≤ 0, so that no exponential overflows

        here = (targets >= start) & (targets < start + share) & ~ignored
        row = here.nonzero().squeeze(-1)
        column = targets[row].long() - start
        of_target = shifted.new_zeros(n)
        of_target[row] = shifted[row, column]
        there.reduce(of_target)
        weights = shifted.exp_()
        denominator = weights.sum(-1)
        there.reduce(denominator)

        ctx.save_for_backward(weights.div_(denominator.unsqueeze(-1)), row, column, ignored)
        ctx.dtype = logits.dtype
        return (denominator.log() - of_target).masked_fill_(ignored, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        probabilities, row, column, ignored = ctx.saved_tensors
        gradient = gradient.masked_fill(ignored, 0.0)
        for_logits = probabilities * gradient.unsqueeze(-1)
        for_logits[row, column] -= gradient[row]
        return for_logits.to(ctx.dtype), None, None, None, None


def _share(tensor: Tensor, cut: Cut, group: Ranks) -> nn.Parameter:
    with torch.no_grad():
        return nn.Parameter(cut.share(tensor.detach(), group.rank, group.size), tensor.requires_grad)


def _check_linear(linear: Any) -> None:
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear must be an nn.Linear with all of its weights, got {type(linear).__name__}")


def _described(layer: Any) -> str:
    cut = ", sequence_parallel" if layer.sequence_parallel else ""
    return (
        f"in_features={layer.in_features}, out_features={layer.out_features}, bias={layer.bias is not None}, rank "
        f"{layer.ranks.rank} of {layer.ranks.size}{cut}"
    )
