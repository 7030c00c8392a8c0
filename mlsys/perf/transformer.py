"""What training a decoder-only transformer costs: parameters, FLOPs, optimizer state, days.

All of it is a sum over the matrices of a block. A matrix of m × n holds m·n
parameters and costs 2·m·n FLOPs a token (a multiply-add is two), so parameters
and FLOPs are counted here from one list of shapes. Only the product of queries
with keys and of weights with values has no parameters: it costs
2·t²·heads·(width of a key + width of a value) a sequence, and outgrows the
matrices when t is several times the model's width.

Training is three forward passes: the backward pass multiplies each matrix
twice, once for the gradient of its input, once for its own. Recomputing what the
forward pass did not keep (`mlsys.perf.activations`) costs up to a fourth.

Formulas that papers use instead of the exact sum are here under their names
(`palm_flops_per_token`, `megatron_flops`, `megatron_training_days`).

What is not counted: FLOPs outside of matrix products (norms, softmax, biases:
a few percent), padding of the vocabulary.

Cost:
    forward_flops per token: 2·(parameters of the matrices) + 4·layers·heads·head_dim·seq; training: three times that,
    four with full recomputation.

Memory:
    state_bytes: 16 bytes a parameter for Adam in mixed precision. Activations come on top.

Papers:
    Kaplan et al. 2020, arXiv:2001.08361, section 2.1 (parameters without embeddings; 2N FLOPs a token).
    Chowdhery et al. 2022, arXiv:2204.02311, appendix B (model FLOPs utilization).
    Narayanan et al. 2021, arXiv:2104.04473, section 5.1 and appendix (FLOPs with recomputation, days to train).
    Korthikanti et al. 2022, arXiv:2205.05198, section 5 (what selective recomputation repeats).
    Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1 (16 bytes a parameter).
    DeepSeek-AI 2024, arXiv:2412.19437, section 2.1 (latent attention, shared and routed experts).

See also:
    `mlsys.perf.configs` (the records), `mlsys.perf.activations` (the rest of training memory), `mlsys.perf.inference`
    (serving), `mlsys.perf.roofline` (FLOPs to seconds), `mlsys.perf.zero`, `mlsys.perf.pipeline` (state and layers over
    many devices).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from mlsys.perf._checks import amount, known, whole
from mlsys.perf.configs import Config

Recompute = Literal["none", "selective", "full"]
Logits = Literal["all", "last"]
Optimizer = Literal["adam", "momentum", "sgd"]

SECONDS_PER_DAY = 86_400


# --- parameters -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameters:
    """How many parameters each part of a model has.

    token_embedding:    vocab × d_model.
    position_embedding: context × d_model where positions are learned, else 0.
    attention:          projections of all blocks; with latent attention also its down- and up-projections.
    mlp:                the plain MLPs.
    experts:            routed and shared experts.
    router:             d_model × experts, and the balancing bias where there is one.
    norms:              of the blocks, of latent attention, and the last one.
    output:             the output matrix; 0 if it is the token embedding.
    idle:               of `experts`, those that one token does not go through.
    """

    token_embedding: int
    position_embedding: int
    attention: int
    mlp: int
    experts: int
    router: int
    norms: int
    output: int
    idle: int = 0

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "idle")

    @property
    def non_embedding(self) -> int:
        """All but the token and position embeddings, as Kaplan et al. count; an output matrix of its own remains.

        nanoGPT prints another number under this name: it subtracts the positions
        only, because its token embedding is also the output matrix and multiplies.
        """
        return self.total - self.token_embedding - self.position_embedding

    @property
    def active(self) -> int:
        """What one token uses: all but the experts that it is not routed to.

        Both embeddings count in full although a token only reads a row of each. So
        counted, Mixtral has the 12.9 B that its paper prints and DeepSeek-V3
        37.6 B; without its input embedding the latter has 36.6 B.
        """
        return self.total - self.idle


def parameters(config: Config) -> Parameters:
    """The parameters of `config`, to the last one: `.total` is what `numel()` of the module adds up to."""
    latent, experts = config.latent, config.experts
    norm = config.d_model * _norm_vectors(config)
    norms = (2 * config.layers + 1) * norm
    if latent:
        norms += config.layers * (latent.query_rank + latent.kv_rank) * _norm_vectors(config)
    routed = shared = router = idle = 0
    if experts:
        expert = _weights(_mlp_matrices(config, experts.d_ff), config.bias)
        routed = config.expert_layers * experts.count * expert
        shared = config.expert_layers * experts.shared * expert
        idle = config.expert_layers * (experts.count - experts.per_token) * expert
        router = config.expert_layers * experts.count * (config.d_model + experts.router_bias)
    return Parameters(
        token_embedding=config.vocab * config.d_model,
        position_embedding=config.context * config.d_model if config.positions == "learned" else 0,
        attention=config.layers * _weights(_attention_matrices(config), config.bias),
        mlp=_dense_layers(config) * _weights(_mlp_matrices(config, config.d_ff), config.bias),
        experts=routed + shared,
        router=router,
        norms=norms,
        output=0 if config.tied else config.vocab * config.d_model,
        idle=idle,
    )


def _attention_matrices(config: Config) -> list[tuple[int, int]]:
    """(inputs, outputs) of every projection of one block."""
    d, heads, latent = config.d_model, config.heads, config.latent
    if latent is None:
        q, kv = heads * config.head_dim, config.kv_heads * config.head_dim
        return [(d, q), (d, kv), (d, kv), (q, d)]
    query = heads * (latent.nope_dim + latent.rope_dim)
    queries = [(d, latent.query_rank), (latent.query_rank, query)] if latent.query_rank else [(d, query)]
    return [
        *queries,
        (d, latent.kv_rank + latent.rope_dim),  # one rotated key for all heads, next to the compressed vector
        (latent.kv_rank, heads * (latent.nope_dim + latent.value_dim)),
        (heads * latent.value_dim, d),
    ]


def _mlp_matrices(config: Config, d_ff: int) -> list[tuple[int, int]]:
    up = [(config.d_model, d_ff)] * (2 if config.activation == "swiglu" else 1)
    return [*up, (d_ff, config.d_model)]


def _weights(matrices: list[tuple[int, int]], bias: bool) -> int:
    return sum(m * n + bias * n for m, n in matrices)


def _products(matrices: list[tuple[int, int]]) -> int:
    return sum(m * n for m, n in matrices)


def _norm_vectors(config: Config) -> int:
    """A scale, and for LayerNorm with biases a shift."""
    return 2 if config.norm == "layernorm" and config.bias else 1


def _dense_layers(config: Config) -> int:
    return config.layers - config.expert_layers


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def key_value_dims(config: Config) -> tuple[int, int]:
    """Widths of one head's key and value while attention multiplies them."""
    if config.latent:
        return config.latent.nope_dim + config.latent.rope_dim, config.latent.value_dim
    return config.head_dim, config.head_dim


def token_count(config: Config, batch: int, seq: int) -> int:
    """batch·seq, once both are known to make sense for this model: ValueError beyond the positions it has learned."""
    batch, seq = whole("batch", batch), whole("seq", seq)
    if config.positions == "learned" and seq > config.context:
        raise ValueError(
            f"seq={seq} is longer than the {config.context} positions that the model has learned; "
            f"for a longer model use dataclasses.replace(config, context={seq})"
        )
    return batch * seq


@dataclass(frozen=True)
class Flops:
    """FLOPs of the matrix products, by part; a multiply-add is two. They add, and multiply with a whole number.

    attention_scores: queries with keys, and weights with values; the projections are apart.
    mlp:              plain MLPs and the experts that tokens go through.
    embedding:        0: a lookup.
    """

    attention_projections: int = 0
    attention_scores: int = 0
    mlp: int = 0
    router: int = 0
    logits: int = 0
    embedding: int = 0

    @property
    def total(self) -> int:
        """All parts."""
        return sum(getattr(self, f.name) for f in fields(self))

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, factor: int) -> Flops:
        return Flops(*(getattr(self, f.name) * factor for f in fields(self)))

    __rmul__ = __mul__


def forward_flops(config: Config, batch: int, seq: int, *, causal: bool = False, logits: Logits = "all") -> Flops:
    """FLOPs of one forward pass over `batch` sequences of `seq` tokens.

    causal: count only the seq·(seq+1)/2 pairs that a causal mask leaves, as a kernel that skips the others does.
            False counts all seq² of them, as the papers and torch's FlopCounterMode do.
    logits: "all" positions (training), or the "last" of each sequence (prefill).

    Tokens are not dropped: each goes through exactly `per_token` routed experts.
    """
    tokens = token_count(config, batch, seq)
    known("logits", logits, get_args(Logits))
    pairs = batch * (seq * (seq + 1) // 2 if causal else seq * seq)
    mlp = _dense_layers(config) * _products(_mlp_matrices(config, config.d_ff))
    router = 0
    if config.experts:
        used = config.experts.per_token + config.experts.shared
        mlp += config.expert_layers * used * _products(_mlp_matrices(config, config.experts.d_ff))
        router = config.expert_layers * config.d_model * config.experts.count
    return Flops(
        attention_projections=2 * tokens * config.layers * _products(_attention_matrices(config)),
        attention_scores=2 * pairs * config.layers * config.heads * sum(key_value_dims(config)),
        mlp=2 * tokens * mlp,
        router=2 * tokens * router,
        logits=2 * (tokens if logits == "all" else batch) * config.vocab * config.d_model,
    )


def backward_flops(config: Config, batch: int, seq: int, *, causal: bool = False, logits: Logits = "all") -> Flops:
    """Twice `forward_flops`: each product has two factors, and each factor's gradient is a product of the same size."""
    return 2 * forward_flops(config, batch, seq, causal=causal, logits=logits)


def training_flops(
    config: Config, batch: int, seq: int, *, causal: bool = False, recompute: Recompute = "none"
) -> Flops:
    """FLOPs of a training step: forward, backward, and what is computed again.

    recompute: "selective" repeats the two products of attention, "full" the forward pass of every block (the logits
               belong to no block and are not repeated).
    """
    known("recompute", recompute, get_args(Recompute))
    forward = forward_flops(config, batch, seq, causal=causal)
    again = {
        "none": Flops(),
        "selective": Flops(attention_scores=forward.attention_scores),
        "full": replace(forward, logits=0),
    }
    return 3 * forward + again[recompute]


def palm_flops_per_token(config: Config, seq: int) -> float:
    """PaLM's formula for a training step's FLOPs a token: 6·N + 12·L·H·Q·T, the denominator of MFU.

    N is all parameters but learned positions, as nanoGPT counts them; with experts,
    those that a token uses. Q is a head's width (latent attention: the mean of a key's
    and a value's). N contains norms, biases and, where the output matrix is another,
    the token embedding, which multiply nothing: so this lies above `training_flops`,
    by a hair for GPT-2 and by 6·V·h for Llama.
    """
    seq = token_count(config, 1, seq)
    count = parameters(config)
    return 6 * (count.active - count.position_embedding) + 6 * config.layers * config.heads * seq * sum(
        key_value_dims(config)
    )


def megatron_flops(config: Config, batch: int, seq: int, recompute: Recompute = "full") -> float:
    """Megatron's closed form for a training step of `batch` sequences, FLOPs.

    full:      96·B·s·l·h²·(1 + s/6h + V/16lh)     the paper's, which always recomputed
    none:      72·B·s·l·h²·(1 + s/6h + V/12lh)
    selective: 72·B·s·l·h²·(1 + 2s/9h + V/12lh)    attention's two products three plus one times

    For the paper's block only: heads as wide as the model, MLP four times as wide, two
    matrices. ValueError for another; `training_flops` counts any.
    """
    known("recompute", recompute, get_args(Recompute))
    token_count(config, batch, seq)
    h, layers, vocab = config.d_model, config.layers, config.vocab
    gpt = (
        config.activation == "gelu"
        and config.latent is None
        and config.experts is None
        and config.kv_heads * config.head_dim == config.heads * config.head_dim == h
        and config.d_ff == 4 * h
    )
    if not gpt:
        raise ValueError(
            "config is not a GPT block (GELU, d_ff = 4·d_model, heads·head_dim = kv_heads·head_dim = d_model), which "
            "Megatron's formula is for; use training_flops"
        )
    block = batch * seq * layers * h**2
    if recompute == "full":
        return 96 * block * (1 + seq / (6 * h) + vocab / (16 * layers * h))
    scores = seq / (6 * h) if recompute == "none" else 2 * seq / (9 * h)
    return 72 * block * (1 + scores + vocab / (12 * layers * h))


# --- state and time ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """Bytes that stay from step to step: weights and gradients, and what the optimizer adds.

    master: the float32 copy of the weights in mixed precision, which the optimizer updates.
    """

    weights: int
    gradients: int
    master: int
    momentum: int
    variance: int

    @property
    def optimizer(self) -> int:
        """The optimizer's part: master copy, momentum and variance."""
        return self.master + self.momentum + self.variance

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer


def state_bytes(parameters: Parameters | int, *, kind: Optimizer = "adam", mixed: bool = True) -> State:
    """Bytes of weights, gradients and optimizer for so many parameters, on one device that holds all of them.

    mixed: weights and gradients in 16 bits with a float32 master copy; False: everything in float32.

    Adam in mixed precision: 2 + 2 + (4 + 4 + 4) = 16 bytes a parameter; in float32 also 16: 4 + 4 + (4 + 4).
    """
    known("kind", kind, get_args(Optimizer))
    count = whole("parameters", parameters.total if isinstance(parameters, Parameters) else parameters, at_least=0)
    width = 2 if mixed else 4
    return State(
        weights=width * count,
        gradients=width * count,
        master=4 * count if mixed else 0,
        momentum=0 if kind == "sgd" else 4 * count,
        variance=4 * count if kind == "adam" else 0,
    )


def optimizer_bytes(parameters: Parameters | int, *, kind: Optimizer = "adam", mixed: bool = True) -> int:
    """The optimizer's part of `state_bytes`: 12 bytes a parameter for Adam in mixed precision."""
    return state_bytes(parameters, kind=kind, mixed=mixed).optimizer


def mfu(tokens_per_second: float, flops_per_token: float, peak: float) -> float:
    """Model FLOPs utilization: the share of `peak` (FLOP/s of all devices together) that the model's FLOPs take.

    flops_per_token: what the model needs, without recomputation: `palm_flops_per_token`.
    """
    return (
        amount("tokens_per_second", tokens_per_second, positive=True)
        * amount("flops_per_token", flops_per_token, positive=True)
        / amount("peak", peak, positive=True)
    )


def training_seconds(flops: float, devices: int, flops_per_device: float) -> float:
    """Seconds for `flops` on `devices` that each achieve `flops_per_device` FLOP/s (not their peak: peak × MFU)."""
    return amount("flops", flops, positive=True) / (
        whole("devices", devices) * amount("flops_per_device", flops_per_device, positive=True)
    )


def megatron_training_days(parameters: float, tokens: float, gpus: int, flops_per_gpu: float) -> float:
    """Days to train: 8·T·P / (n·X), four forward passes of 2·P FLOPs a token (so with full recomputation).

    flops_per_gpu: FLOP/s that a GPU achieves, the recomputation's included.
    """
    flops = 8 * amount("tokens", tokens, positive=True) * amount("parameters", parameters, positive=True)
    return training_seconds(flops, gpus, flops_per_gpu) / SECONDS_PER_DAY
