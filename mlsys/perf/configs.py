"""The shape of a transformer in one frozen record, and the shapes of models that papers publish.

Everything that can be counted about a decoder-only transformer follows from
about a dozen numbers. `mlsys.perf.transformer` counts from them;
`mlsys.models.transformer` builds the module from the same record, so the two can
be compared. A block is

    x ← x + attention(norm(x))
    x ← x + mlp(norm(x))            mlp: two matrices (GELU) or three (SwiGLU), or a mixture of experts

with one more norm before the output matrix, which may be the token embedding
itself (`tied`).

Cost:
    None: records only.

Memory:
    None.

Papers:
    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", Table 2 (GPT-2 sizes).
    Brown et al. 2020, arXiv:2005.14165, Table 2.1 (GPT-3 sizes).
    Zhang et al. 2022, arXiv:2205.01068, Table 1 (OPT sizes).
    Touvron et al. 2023, arXiv:2302.13971, Table 2 (widths of Llama 7B and 13B, which Llama 2 keeps).
    Touvron et al. 2023, arXiv:2307.09288, section 2.2 (Llama 2: RoPE, RMSNorm, SwiGLU, grouped queries at 70B).
    Llama Team 2024, arXiv:2407.21783, Table 3 (Llama 3 sizes).
    Jiang et al. 2023, arXiv:2310.06825, Table 1 (Mistral 7B).
    Jiang et al. 2024, arXiv:2401.04088, Table 1 (Mixtral 8x7B).
    DeepSeek-AI 2024, arXiv:2412.19437, section 4.2 (DeepSeek-V3: latent attention, 256 routed experts).

See also:
    `mlsys.perf.transformer` (what a config costs), `mlsys.models.transformer` (the module of a config).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, get_args

from mlsys.perf._checks import amount, known, whole

Norm = Literal["layernorm", "rmsnorm"]
Activation = Literal["gelu", "swiglu"]
Positions = Literal["learned", "rope"]


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (MLA): keys and values are rebuilt from one small vector a token.

    query_rank: width of the compressed query; 0: queries are not compressed.
    kv_rank:    width of the compressed keys and values: this and `rope_dim` are all that a KV cache keeps.
    nope_dim:   width of a head's query and key without position.
    rope_dim:   width of the rotated part; its key is shared by all heads.
    value_dim:  width of a head's value.
    """

    query_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "query_rank", whole("query_rank", self.query_rank, at_least=0))
        for name in ("kv_rank", "nope_dim", "rope_dim", "value_dim"):
            object.__setattr__(self, name, whole(name, getattr(self, name)))
        if self.rope_dim % 2:
            raise ValueError(f"rope_dim={self.rope_dim}: rotary positions turn pairs, so it must be even")


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP.

    count:        routed experts in a layer.
    per_token:    how many of them a token goes through.
    d_ff:         hidden width of one expert.
    shared:       experts of the same width that every token goes through.
    first_dense:  this many layers at the start keep the plain MLP of width `Config.d_ff`.
    interval:     of the remaining layers every `interval`-th has experts, the others the plain MLP.
    router_bias:  a number for each expert that is added to its score (balancing without a loss).
    """

    count: int
    per_token: int
    d_ff: int
    shared: int = 0
    first_dense: int = 0
    interval: int = 1
    router_bias: bool = False

    def __post_init__(self) -> None:
        for name in ("count", "per_token", "d_ff", "interval"):
            object.__setattr__(self, name, whole(name, getattr(self, name)))
        for name in ("shared", "first_dense"):
            object.__setattr__(self, name, whole(name, getattr(self, name), at_least=0))
        if self.per_token > self.count:
            raise ValueError(f"per_token={self.per_token}: a layer has only count={self.count} experts")


@dataclass(frozen=True)
class Config:
    """A decoder-only transformer.

    vocab:      rows of the token embedding, padding included.
    context:    longest sequence; rows of the position embedding where positions are learned.
    layers:     number of blocks.
    d_model:    width of the residual stream.
    heads:      query heads.
    kv_heads:   key/value heads: `heads` is MHA, 1 is MQA, between them GQA.
    head_dim:   width of one head; usually d_model / heads.
    d_ff:       hidden width of the MLP.
    tied:       the output matrix is the token embedding.
    bias:       linear layers, and LayerNorm, have biases; the output matrix and an expert router never do.
    latent:     latent attention instead; `kv_heads` and `head_dim` are then not used.
    experts:    a mixture of experts instead of the MLP.
    source:     where the numbers are printed.
    """

    vocab: int
    context: int
    layers: int
    d_model: int
    heads: int
    kv_heads: int
    head_dim: int
    d_ff: int
    norm: Norm = "layernorm"
    activation: Activation = "gelu"
    positions: Positions = "learned"
    tied: bool = True
    bias: bool = True
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    latent: LatentAttention | None = None
    experts: Experts | None = None
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("vocab", "context", "layers", "d_model", "heads", "kv_heads", "head_dim", "d_ff"):
            object.__setattr__(self, name, whole(name, getattr(self, name)))
        for name in ("rope_theta", "norm_eps"):
            amount(name, getattr(self, name), positive=True)
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        known("norm", self.norm, get_args(Norm))
        known("activation", self.activation, get_args(Activation))
        known("positions", self.positions, get_args(Positions))
        if self.positions == "rope" and self.latent is None and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: rotary positions turn pairs, so it must be even")

    @property
    def expert_layers(self) -> int:
        """How many blocks have experts instead of the plain MLP."""
        if self.experts is None:
            return 0
        return sum(self.has_experts(layer) for layer in range(self.layers))

    def has_experts(self, layer: int) -> bool:
        """Whether block `layer` (from 0) has experts: every `interval`-th after `first_dense`, the last of each run."""
        if self.experts is None or layer < self.experts.first_dense:
            return False
        return (layer - self.experts.first_dense + 1) % self.experts.interval == 0


def gpt(
    layers: int,
    d_model: int,
    heads: int,
    *,
    vocab: int = 50257,
    context: int = 1024,
    bias: bool = True,
    source: str = "",
) -> Config:
    """A config in the style of GPT-2: MLP four times as wide, learned positions, tied output."""
    if d_model % heads:
        raise ValueError(f"d_model={d_model} is not a multiple of heads={heads}")
    return Config(
        vocab=vocab,
        context=context,
        layers=layers,
        d_model=d_model,
        heads=heads,
        kv_heads=heads,
        head_dim=d_model // heads,
        d_ff=4 * d_model,
        bias=bias,
        source=source,
    )


def llama(
    layers: int,
    d_model: int,
    heads: int,
    d_ff: int,
    *,
    vocab: int,
    context: int,
    kv_heads: int | None = None,
    rope_theta: float = 10_000.0,
    tied: bool = False,
    experts: Experts | None = None,
    latent: LatentAttention | None = None,
    norm_eps: float = 1e-5,
    source: str = "",
) -> Config:
    """A config in the style of Llama: RoPE, RMSNorm, SwiGLU, no biases, an output matrix of its own."""
    if d_model % heads:
        raise ValueError(f"d_model={d_model} is not a multiple of heads={heads}")
    return Config(
        vocab=vocab,
        context=context,
        layers=layers,
        d_model=d_model,
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=d_model // heads,
        d_ff=d_ff,
        norm="rmsnorm",
        activation="swiglu",
        positions="rope",
        tied=tied,
        bias=False,
        rope_theta=rope_theta,
        norm_eps=norm_eps,
        experts=experts,
        latent=latent,
        source=source,
    )


LLAMA_2 = "Touvron et al. 2023, arXiv:2307.09288; widths: arXiv:2302.13971, Table 2"
LLAMA_3 = "Llama Team 2024, arXiv:2407.21783, Table 3"
GPT_2 = "Radford et al. 2019, Table 2; heads: the released weights"

# By the names that `mlsys cost --model` takes. What a record cannot say: OPT uses ReLU and keeps two unused rows
# before its positions (10,240 parameters more), Mistral attends to the last 4,096 tokens only.
MODELS: Mapping[str, Config] = {
    "gpt2": gpt(12, 768, 12, source=GPT_2),
    "gpt2-medium": gpt(24, 1024, 16, source=GPT_2),
    "gpt2-large": gpt(36, 1280, 20, source=GPT_2),
    "gpt2-xl": gpt(48, 1600, 25, source=GPT_2),
    "gpt3": gpt(96, 12288, 96, context=2048, source="Brown et al. 2020, arXiv:2005.14165, Table 2.1"),
    "opt-13b": gpt(40, 5120, 40, vocab=50272, context=2048, source="Zhang et al. 2022, arXiv:2205.01068, Table 1"),
    "llama-2-7b": llama(32, 4096, 32, 11008, vocab=32000, context=4096, source=LLAMA_2),
    "llama-2-13b": llama(40, 5120, 40, 13824, vocab=32000, context=4096, source=LLAMA_2),
    "llama-2-70b": llama(
        80,
        8192,
        64,
        28672,
        vocab=32000,
        context=4096,
        kv_heads=8,
        source="Touvron et al. 2023, arXiv:2307.09288; widths: the released params.json",
    ),
    "llama-3-8b": llama(
        32, 4096, 32, 14336, vocab=128256, context=8192, kv_heads=8, rope_theta=500_000.0, source=LLAMA_3
    ),
    "llama-3-70b": llama(
        80, 8192, 64, 28672, vocab=128256, context=8192, kv_heads=8, rope_theta=500_000.0, source=LLAMA_3
    ),
    "mistral-7b": llama(
        32,
        4096,
        32,
        14336,
        vocab=32000,
        context=8192,
        kv_heads=8,
        source="Jiang et al. 2023, arXiv:2310.06825, Table 1",
    ),
    "mixtral-8x7b": llama(
        32,
        4096,
        32,
        14336,
        vocab=32000,
        context=32768,
        kv_heads=8,
        rope_theta=1_000_000.0,
        experts=Experts(count=8, per_token=2, d_ff=14336),
        source="Jiang et al. 2024, arXiv:2401.04088, Table 1",
    ),
    "deepseek-v3": llama(
        61,
        7168,
        128,
        18432,
        vocab=129280,
        context=131072,
        norm_eps=1e-6,
        latent=LatentAttention(query_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128),
        experts=Experts(count=256, per_token=8, d_ff=2048, shared=1, first_dense=3, router_bias=True),
        source="DeepSeek-AI 2024, arXiv:2412.19437, section 4.2",
    ),
}


def describe(config: Config) -> dict[str, object]:
    """The fields that say something, as a dictionary to print: what is None or empty is left out."""
    return {f.name: value for f in fields(config) if (value := getattr(config, f.name)) not in (None, "")}
