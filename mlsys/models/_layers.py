"""The layers of a decoder-only transformer: norm, rotation, attention with a cache, MLP, and the block of them.

A block adds to the residual stream x (batch, seq, d_model) twice, each time from
a normalised copy of it ("pre-norm"):

    x ← x + attention(norm(x))
    x ← x + mlp(norm(x))

Queries, keys and values have a linear layer each. One fused matrix would be one
matmul instead of three, but with grouped queries its three parts differ in width,
and a split by heads would have to cut inside it; apart, tensor parallelism takes
the same share of each one's rows. No layer stores how many heads it has: it reads
that off the width, so a layer that holds a share of the heads is the same code.

There is no dropout: a model of today sees its data about once.

See also:
    `mlsys.models.transformer` (the model, and the papers).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mlsys.perf.configs import Config

# attention(q, k, v, *, causal) on (batch, heads, seq, head_dim); fewer key/value heads than query heads, and a causal
# mask aligned bottom-right when there are more keys than queries: any `attention` of mlsys.attention.
AttentionFn = Callable[..., Tensor]
Rotation = tuple[Tensor, Tensor]  # cos and sin, (seq, head_dim / 2) or (batch, 1, seq, head_dim / 2)


def embedding(rows: int, width: int, **factory: Any) -> nn.Embedding:
    """A table to look rows up in; not filled, since `init` draws it, and to draw the largest matrix takes a while."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width, **factory), freeze=False)


def norm(config: Config, **factory: Any) -> nn.Module:
    """LayerNorm, (x − mean) / √(variance + eps), or RMSNorm, x / √(mean of squares + eps), times a learned weight."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.d_model, config.norm_eps, **factory)
    return nn.LayerNorm(config.d_model, config.norm_eps, bias=config.bias, **factory)


def rotation(positions: Int[Tensor, "*b t"], head_dim: int, theta: float) -> Rotation:
    """Cosine and sine of position · θ^(−2i / head_dim), for i = 0 … head_dim/2 − 1, in float64.

    In float32 the angle of position 100,000 would already be off by some thousandths.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions[..., None] * theta**-exponents  # (t, head_dim / 2), or (b, t, head_dim / 2)
    return angles.cos(), angles.sin()


def rotate(x: Float[Tensor, "b h t d"], cos: Float[Tensor, "*b1 t half"], sin: Float[Tensor, "*b1 t half"]) -> Tensor:
    """Turn each pair (xᵢ, xᵢ₊d/₂) by the angle of its position: q · k then depends on their distance only.

    The pairs lie half a head apart, as in GPT-NeoX and in checkpoints for the `transformers` library. RoFormer
    and Meta's code pair neighbours (x₂ᵢ, x₂ᵢ₊₁): the same model with the rows of the q and k matrices in another
    order. Worked out in the dtype of cos and sin, since 16 bits would blur nearby positions.
    """
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


@runtime_checkable
class Cache(Protocol):
    """What a model asks of a cache: `KVCache`, the `Batch` of a paged one, or yours.

    In a forward pass each layer calls `attend` once, and then the model `advance`.
    """

    @property
    def layers(self) -> int:
        """Of the model that it is for."""

    @property
    def length(self) -> int:
        """Tokens that the longest of its sequences holds."""

    def positions(self, tokens: int) -> Tensor:
        """Where so many tokens more will stand: (t,), or (batch, t) where lengths differ."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attention: AttentionFn) -> Tensor:
        """Take in k and v (b, kv_heads, t, d) of a layer; attention of q (b, heads, t, d) to these and all before."""

    def advance(self, tokens: int) -> None:
        """Count so many tokens as seen, after every layer has taken them in."""


class KVCache:
    """The keys and values of the tokens seen so far: what decoding would otherwise compute again for each new token.

    Room for `capacity` tokens in each of `batch` sequences is taken at once: 2 · layers · kv_heads · head_dim
    numbers a token. A forward pass appends to every layer, then advances `length`; one that fails in between
    leaves the cache as it was. For sequences whose lengths differ or are not known there is the cache in blocks,
    `mlsys.attention.kv_cache`.
    """

    def __init__(
        self,
        config: Config,
        batch: int,
        capacity: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        capacity = config.context if capacity is None else capacity
        for name, value in (("batch", batch), ("capacity", capacity)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        shape = (config.layers, batch, config.kv_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    @property
    def layers(self) -> int:
        """Of the model that it is for."""
        return self.keys.shape[0]

    @property
    def batch(self) -> int:
        """How many sequences it holds."""
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        """How many tokens of each sequence fit."""
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, used or not."""
        return self.keys.nbytes + self.values.nbytes

    def positions(self, tokens: int) -> Int[Tensor, " t"]:
        """Where so many tokens more will stand, the same in all sequences."""
        return torch.arange(self.length, self.length + tokens, device=self.keys.device)

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "b h t d"],
        k: Float[Tensor, "b h_kv t d"],
        v: Float[Tensor, "b h_kv t d"],
        attention: AttentionFn,
    ) -> Float[Tensor, "b h t d"]:
        """`append`, and the attention of q to all keys and values of that layer."""
        return attention(q, *self.append(layer, k, v), causal=True)

    def append(self, layer: int, k: Float[Tensor, "b h t d"], v: Float[Tensor, "b h t d"]) -> tuple[Tensor, Tensor]:
        """Write t new positions of one layer; returns views of all its keys and values, (b, h, length + t, d).

        Raises ValueError if they do not fit or are of another shape, dtype or device; RuntimeError if they are
        part of a gradient, which cannot flow through a buffer that is overwritten.
        """
        end = self.length + k.shape[2]
        if end > self.capacity:
            raise ValueError(
                f"the cache is full: it holds {self.length} of {self.capacity} tokens, {k.shape[2]} more were given; "
                "make it with a larger capacity, or truncate it"
            )
        for name, new, old in (("k", k, self.keys), ("v", v, self.values)):
            want = (*old.shape[1:3], k.shape[2], old.shape[4])
            if new.shape != want:
                raise ValueError(
                    f"{name} must have the cache's (batch, kv_heads, t, head_dim) = {want}, got {tuple(new.shape)}"
                )
            if new.dtype != old.dtype or new.device != old.device:
                raise ValueError(
                    f"{name} must be {old.dtype} on {old.device} as the cache is, got {new.dtype} on {new.device}"
                )
            if torch.is_grad_enabled() and new.requires_grad:
                raise RuntimeError("a cache is for inference: call the model under torch.no_grad()")
            old[layer, :, :, self.length : end] = new
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` more positions as seen, after every layer has appended them."""
        if not 0 <= tokens <= self.capacity - self.length:
            raise ValueError(f"tokens must lie between 0 and {self.capacity - self.length}, got {tokens}")
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on (a rejected draft, or a prompt to go on from again)."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length must lie between 0 and {self.length}, the tokens held, got {length}")
        self.length = length


class Attention(nn.Module):
    """Project to heads, rotate, attend to this and all earlier positions, project back."""

    def __init__(self, config: Config, attention: AttentionFn, **factory: Any) -> None:
        super().__init__()
        q_width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = nn.Linear(config.d_model, q_width, config.bias, **factory)
        self.k = nn.Linear(config.d_model, kv_width, config.bias, **factory)
        self.v = nn.Linear(config.d_model, kv_width, config.bias, **factory)
        self.o = nn.Linear(q_width, config.d_model, config.bias, **factory)
        self.head_dim = config.head_dim
        self.attend = attention

    def forward(
        self, x: Float[Tensor, "b t d_model"], rotation: Rotation | None, cache: Cache | None, layer: int
    ) -> Float[Tensor, "b t d_model"]:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (b, heads, t, head_dim)
            for project in (self.q, self.k, self.v)
        )
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is None:
            heads = self.attend(q, k, v, causal=True)
        else:
            heads = cache.attend(layer, q, k, v, self.attend)
        return self.o(heads.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """down(gelu(up(x))), or SwiGLU's down(silu(gate(x)) · up(x)): a gate decides how much of each hidden unit passes.

    GELU is the tanh form, x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))), which GPT-2 was trained with; it
    differs from the exact x · Φ(x) by up to 5e-4.
    """

    def __init__(self, config: Config, **factory: Any) -> None:
        super().__init__()
        gated = config.activation == "swiglu"
        self.gate = nn.Linear(config.d_model, config.d_ff, config.bias, **factory) if gated else None
        self.up = nn.Linear(config.d_model, config.d_ff, config.bias, **factory)
        self.down = nn.Linear(config.d_ff, config.d_model, config.bias, **factory)

    def forward(self, x: Float[Tensor, "b t d_model"]) -> Float[Tensor, "b t d_model"]:
        if self.gate is None:
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention mixes positions, the MLP mixes features; each adds to the residual stream."""

    def __init__(self, config: Config, attention: AttentionFn, **factory: Any) -> None:
        super().__init__()
        self.attention_norm = norm(config, **factory)
        self.attention = Attention(config, attention, **factory)
        self.mlp_norm = norm(config, **factory)
        self.mlp = MLP(config, **factory)

    def forward(
        self, x: Float[Tensor, "b t d_model"], rotation: Rotation | None, cache: Cache | None, layer: int
    ) -> Float[Tensor, "b t d_model"]:
        x = x + self.attention(self.attention_norm(x), rotation, cache, layer)
        return x + self.mlp(self.mlp_norm(x))
