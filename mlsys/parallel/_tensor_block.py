"""A block of the transformer of which each rank holds its share: norms, attention by heads, the MLP by hidden units.

With sequence parallelism the stream x is (b, t/n, d): rank r has positions r·t/n … of every sequence. Gathered along
the first dimension of the flat matrix, rows come ordered by (rank, sequence, position). No product minds; only
attention has to see sequences, and puts them together while it divides heads, which moves every number anyway.

See also:
    `mlsys.parallel.tensor`, `mlsys.parallel._tensor_layers`, `mlsys.models._layers` (the same in one process).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mlsys.models._layers import AttentionFn, Cache, Rotation, rotate
from mlsys.parallel._tensor_layers import ColumnLinear, RowLinear, apply_columns
from mlsys.parallel._tensor_operators import Ranks, f
from mlsys.perf.configs import Config


class ParallelNorm(nn.Module):
    """A LayerNorm or RMSNorm that every rank has in full; of a part of the sequence, if that is cut.

    Then each rank's gradient of weight and bias is that of its positions only, and f sums it: one all-reduce for both.
    """

    def __init__(self, norm: Any, group: Ranks, sequence_parallel: bool) -> None:
        super().__init__()
        self.ranks, self.sequence_parallel = group, sequence_parallel
        self.shape, self.eps, self.centred = norm.normalized_shape, norm.eps, isinstance(norm, nn.LayerNorm)
        self.weight = norm.weight
        self.bias = getattr(norm, "bias", None)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        weight, bias = self.weight, self.bias
        if self.sequence_parallel:
            if bias is None:
                weight = f(weight, self.ranks)
            else:
                weight, bias = f(torch.stack((weight, bias)), self.ranks)
        if self.centred:
            return F.layer_norm(x, self.shape, weight, bias, self.eps)
        return F.rms_norm(x, self.shape, weight, self.eps)


class ParallelAttention(nn.Module):
    """Attention of this rank's heads: q, k and v cut by columns, that is by heads, and o by rows."""

    def __init__(
        self,
        q: ColumnLinear,
        k: ColumnLinear,
        v: ColumnLinear,
        o: RowLinear,
        head_dim: int,
        attention: AttentionFn,
    ) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = q, k, v, o
        self.head_dim, self.attend = head_dim, attention

    def forward(
        self, x: Float[Tensor, "b t_part d_model"], rotation: Rotation | None, cache: Cache | None, layer: int
    ) -> Float[Tensor, "b t_part d_model"]:
        n, b = self.q.ranks.size, x.shape[0]
        cut = self.q.sequence_parallel and cache is None and n > 1
        q, k, v = (
            self._to_heads(y.unflatten(-1, (-1, self.head_dim)), b, n, cut)  # (b, heads, t, head_dim)
            for y in apply_columns(x.flatten(0, 1), [self.q, self.k, self.v], cut=cut)
        )
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is None:
            heads = self.attend(q, k, v, causal=True)
        else:
            heads = cache.attend(layer, q, k, v, self.attend)
        return self.o(self._from_heads(heads, n, cut), cut=cut).view(x.shape)

    @staticmethod
    def _to_heads(rows: Tensor, b: int, n: int, cut: bool) -> Tensor:
        """(b·t, heads, head_dim), with rows ordered by rank if `cut`, to (b, heads, t, head_dim)."""
        if not cut:
            return rows.unflatten(0, (b, -1)).transpose(1, 2)
        return rows.unflatten(0, (n, b, -1)).permute(1, 3, 0, 2, 4).flatten(2, 3)

    @staticmethod
    def _from_heads(heads: Tensor, n: int, cut: bool) -> Tensor:
        """The way back, to (b·t, heads · head_dim)."""
        if not cut:
            return heads.transpose(1, 2).flatten(2).flatten(0, 1)
        return heads.unflatten(2, (n, -1)).permute(2, 0, 3, 1, 4).flatten(3).flatten(0, 2)


class ParallelMLP(nn.Module):
    """The MLP of this rank's hidden units: gate and up cut by columns, down by rows."""

    def __init__(self, gate: ColumnLinear | None, up: ColumnLinear, down: RowLinear) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down

    def forward(self, x: Float[Tensor, "b t_part d_model"], *, cut: bool) -> Float[Tensor, "b t_part d_model"]:
        flat = x.flatten(0, 1)
        if self.gate is None:
            (up,) = apply_columns(flat, [self.up], cut=cut)
            hidden = F.gelu(up, approximate="tanh")
        else:
            gate, up = apply_columns(flat, [self.gate, self.up], cut=cut)
            hidden = F.silu(gate) * up
        return self.down(hidden, cut=cut).view(x.shape)


class ParallelBlock(nn.Module):
    """A block of the transformer, called as the library's own; with sequence parallelism x is (b, t/n, d)."""

    def __init__(self, block: Any, config: Config, group: Ranks, sequence_parallel: bool) -> None:
        super().__init__()
        attention, mlp = block.attention, block.mlp
        options: dict[str, Any] = {"sequence_parallel": sequence_parallel}
        kv = min(group.size, config.kv_heads)
        self.attention_norm = ParallelNorm(block.attention_norm, group, sequence_parallel)
        self.attention = ParallelAttention(
            ColumnLinear(attention.q, group, **options),
            ColumnLinear(attention.k, group, **options, shares=kv),
            ColumnLinear(attention.v, group, **options, shares=kv),
            RowLinear(attention.o, group, **options),
            config.head_dim,
            attention.attend,
        )
        self.mlp_norm = ParallelNorm(block.mlp_norm, group, sequence_parallel)
        self.mlp = ParallelMLP(
            None if mlp.gate is None else ColumnLinear(mlp.gate, group, **options),
            ColumnLinear(mlp.up, group, **options),
            RowLinear(mlp.down, group, **options),
        )

    def forward(
        self, x: Float[Tensor, "b t_part d_model"], rotation: Rotation | None, cache: Cache | None, layer: int
    ) -> Float[Tensor, "b t_part d_model"]:
        cut = self.mlp.up.sequence_parallel and cache is None
        x = x + self.attention(self.attention_norm(x), rotation, cache, layer)
        return x + self.mlp(self.mlp_norm(x), cut=cut)
