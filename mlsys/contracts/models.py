"""Contracts of `mlsys.models`: what a transformer's forward pass must compute from a config, its weights and tokens.

An implementation is one function, `forward(weights, config, tokens)`. The
weights have the names of the library's own module:

    token_embedding.weight     (vocab, d_model)
    position_embedding.weight  (context, d_model), where positions are learned
    blocks.0.attention_norm    .weight, and .bias where config.bias and the norm is LayerNorm; so mlp_norm and norm
    blocks.0.attention.q       .weight (outputs, inputs), and .bias where config.bias; so k, v, o
    blocks.0.mlp.up            the same; so down, and gate where the activation is SwiGLU
    norm                       before the output matrix
    head.weight                (vocab, d_model), unless config.tied: then it is token_embedding.weight

The oracle is written apart from the module: NumPy in float64, one sequence, one
head and one position at a time, with rotary positions as multiplication by
complex numbers. The tolerance is a number of rounding units of the dtype that
grows with the logarithm of the longest sum and with the number of layers, times
the largest logit.

The weights drawn are larger than a model's at the start of training, norms and
biases are not 1 and 0, and eps is large in two cases: otherwise many a mistake
would compute the right numbers.

Cost:
    Under two seconds for all cases.

Papers:
    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3 (the GPT-2 style).
    Touvron et al. 2023, arXiv:2302.13971, section 2.2 (the Llama style).
    Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 4.2 (error of sums).

See also:
    `mlsys.contracts.core` (how a contract is run), `mlsys.perf.configs` (the fields of a config).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from mlsys.contracts.core import Case, Contract, Inputs, Mismatch, Results, Wrong
from mlsys.models.transformer import Transformer
from mlsys.perf.configs import Config

SIGNATURE = "forward(weights, config, tokens)"
ROUNDINGS = 8  # rounding units allowed per level of a pairwise sum and layer

GPT = {"norm": "layernorm", "activation": "gelu", "positions": "learned", "tied": True, "bias": True}
LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "positions": "rope", "tied": False, "bias": False}


class Weights(dict[str, Tensor]):
    """Tensors by name, which print as how many they are."""

    def __repr__(self) -> str:
        return f"{len(self)} tensors by name"


def case(style: str, t: int, *, b: int = 1, dtype: str = "float32", **changes: Any) -> Case:
    """One case: the style's small config with `changes`."""
    sizes = {"vocab": 17, "context": 12, "layers": 2, "d_model": 12, "heads": 2, "head_dim": 6, "d_ff": 20}
    sizes["kv_heads"] = changes.get("heads", sizes["heads"])
    settings = {"style": style, "b": b, "t": t, "dtype": dtype, "peak": 1}
    return settings | sizes | (GPT if style == "gpt" else LLAMA) | changes


CASES = [
    case("gpt", 1, layers=1),
    case("gpt", 5),
    case("gpt", 12, b=2, heads=3, head_dim=4, vocab=23),  # the whole context
    case("gpt", 6, tied=False, bias=False),
    case("gpt", 5, norm_eps=0.2),
    case("llama", 1, layers=1),
    case("llama", 6),
    case("llama", 7, b=2, heads=4, kv_heads=2, head_dim=4),
    case("llama", 8, heads=4, kv_heads=1, head_dim=8, rope_theta=50.0),  # heads · head_dim is not d_model
    case("llama", 5, norm_eps=0.2, tied=True),
    case("gpt", 4, positions="rope", activation="swiglu"),  # the styles mix
    case("llama", 70, context=80, heads=4, kv_heads=2, head_dim=4),
    case("gpt", 70, context=80),
    case("llama", 8, layers=1, peak=15),  # scores of some hundreds, whose exponential overflows
    case("llama", 9, heads=6, kv_heads=2, head_dim=4, layers=3, dtype="float64"),
    case("gpt", 9, layers=3, dtype="float64"),
]


def config_of(case: Case) -> Config:
    """The config of a case."""
    return Config(**{name: value for name, value in case.items() if name not in ("style", "b", "t", "dtype", "peak")})


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Random weights of the config's shapes, the config, and random tokens."""
    generator = torch.Generator().manual_seed(seed)
    config, dtype = config_of(case), getattr(torch, case["dtype"])
    weights = Weights()
    for name, like in Transformer(config, device="meta").state_dict().items():
        drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        if like.ndim == 2 and "embedding" not in name:
            drawn = drawn / math.sqrt(like.shape[1])
        elif name.endswith("norm.weight"):
            drawn = 1 + drawn / 2
        elif like.ndim == 1:
            drawn = drawn / 2
        if name.endswith(("attention.q.weight", "attention.k.weight")):
            drawn = drawn * case["peak"]
        weights[name] = drawn.to(dtype).to(device)
    tokens = torch.randint(config.vocab, (case["b"], case["t"]), generator=generator).to(device)
    return {"weights": weights, "config": config, "tokens": tokens, "peak": case["peak"]}


def call(impl: Callable[..., Any], inputs: Inputs) -> Results:
    """The logits."""
    try:
        inspect.signature(impl).bind(None, None, None)
    except TypeError as error:
        raise Mismatch(f"cannot be called as {SIGNATURE}: {error}") from None
    except ValueError:
        pass  # a builtin that does not tell its signature
    out = impl(inputs["weights"], inputs["config"], inputs["tokens"])
    if not isinstance(out, Tensor):
        raise Mismatch(f"returned {type(out).__name__}, expected a tensor of logits (batch, t, vocab)")
    want = _dtype(inputs)
    if out.dtype != want:
        raise Mismatch(f"returned {out.dtype} for weights of {want}: the logits have the dtype of the weights")
    return {"logits": out.detach()}


def _dtype(inputs: Inputs) -> torch.dtype:
    dtype: torch.dtype = inputs["weights"]["token_embedding.weight"].dtype
    return dtype


# --- the oracle -------------------------------------------------------------------------------------------------------


def oracle(inputs: Inputs) -> Mapping[str, np.ndarray]:
    """The logits in float64, sequence by sequence."""
    w = {name: weight.detach().double().cpu().numpy() for name, weight in inputs["weights"].items()}
    return {"logits": np.stack([_sequence(w, inputs["config"], row.tolist()) for row in inputs["tokens"]])}


def _sequence(w: Mapping[str, np.ndarray], config: Config, tokens: list[int]) -> np.ndarray:
    """Logits (t, vocab) of one sequence."""
    stream = np.array([w["token_embedding.weight"][token] for token in tokens])
    if config.positions == "learned":
        stream = stream + w["position_embedding.weight"][: len(tokens)]
    for layer in range(config.layers):
        block = f"blocks.{layer}"
        stream = stream + _attention(
            w, config, f"{block}.attention", _norm(w, config, f"{block}.attention_norm", stream)
        )
        stream = stream + _mlp(w, config, f"{block}.mlp", _norm(w, config, f"{block}.mlp_norm", stream))
    output = w["token_embedding.weight"] if config.tied else w["head.weight"]
    return np.einsum("td,vd->tv", _norm(w, config, "norm", stream), output)


def _affine(w: Mapping[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return np.einsum("ti,oi->to", x, w[f"{name}.weight"]) + w.get(f"{name}.bias", 0.0)


def _norm(w: Mapping[str, np.ndarray], config: Config, name: str, x: np.ndarray) -> np.ndarray:
    if config.norm == "layernorm":
        x = x - x.sum(-1, keepdims=True) / x.shape[-1]
    power = (x * x).sum(-1, keepdims=True) / x.shape[-1]
    return x / (power + config.norm_eps) ** 0.5 * w[f"{name}.weight"] + w.get(f"{name}.bias", 0.0)


def _mlp(w: Mapping[str, np.ndarray], config: Config, name: str, x: np.ndarray) -> np.ndarray:
    hidden = _affine(w, f"{name}.up", x)
    if config.activation == "swiglu":
        gate = _affine(w, f"{name}.gate", x)
        hidden = hidden * gate / (1 + np.exp(-gate))
    else:
        hidden = hidden / (
            1 + np.exp(-2 * math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3))
        )  # tanh as a logistic
    return _affine(w, f"{name}.down", hidden)


def _attention(w: Mapping[str, np.ndarray], config: Config, name: str, x: np.ndarray) -> np.ndarray:
    width, heads = config.head_dim, []
    projected = {letter: _affine(w, f"{name}.{letter}", x) for letter in "qkv"}
    for head in range(config.heads):
        shared = head * config.kv_heads // config.heads
        q = _turned(config, projected["q"][:, head * width : (head + 1) * width])
        k = _turned(config, projected["k"][:, shared * width : (shared + 1) * width])
        v = projected["v"][:, shared * width : (shared + 1) * width]
        rows = []
        for i in range(len(x)):
            scores = np.array([q[i] @ k[j] for j in range(i + 1)]) / math.sqrt(width)
            weights = np.exp(scores - scores.max())
            rows.append(weights @ v[: i + 1] / weights.sum())
        heads.append(np.array(rows))
    return _affine(w, f"{name}.o", np.concatenate(heads, axis=1))


def _turned(config: Config, x: np.ndarray) -> np.ndarray:
    """Rotary positions: component i and component i + d/2 are one complex number, turned by its position's angle."""
    if config.positions != "rope":
        return x
    half = config.head_dim // 2
    speed = config.rope_theta ** (-np.arange(half) / half)
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * np.arange(len(x))[:, None] * speed)
    return np.concatenate([turned.real, turned.imag], axis=1)


def tolerance(inputs: Inputs, name: str, want: np.ndarray) -> float:
    """Rounding units × levels of the longest sum × layers × largest logit; × peak², the size of the scores."""
    config = inputs["config"]
    longest = max(config.d_ff, config.heads * config.head_dim, config.d_model)
    eps = torch.finfo(_dtype(inputs)).eps
    levels = math.log2(longest) * config.layers * inputs["peak"] ** 2
    return ROUNDINGS * eps * levels * float(np.abs(want).max(initial=1e-3))


# --- wrong variants ---------------------------------------------------------------------------------------------------


def _plain(
    weights: Mapping[str, Tensor],
    config: Config,
    tokens: Tensor,
    *,
    post_norm: bool = False,
    final_norm: bool = True,
    residual: bool = True,
    norm_mean: str = "as the config says",
    unbiased: bool = False,
    eps_inside: bool = True,
    eps: float | None = None,
    first_position: int = 0,
    scale_embedding: bool = False,
    pairs: str = "halves",
    theta: float | None = None,
    rotate: str = "qk",
    rotate_before_split: bool = False,
    causal: bool = True,
    scaled: bool = True,
    stable: bool = True,
    interleave: bool = False,
    merge_transposed: bool = True,
    gelu: str = "tanh",
    gate: str = "silu",
    swap_gate: bool = False,
    bias: bool = True,
    output: str = "as the config says",
) -> Tensor:
    """The forward pass in plain torch, with one knob for each mistake."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias") if bias else None)

    def norm(name: str, x: Tensor) -> Tensor:
        subtracts = config.norm == "layernorm" if norm_mean == "as the config says" else norm_mean == "subtracted"
        epsilon = config.norm_eps if eps is None else eps
        x = x - x.mean(-1, keepdim=True) if subtracts else x
        mean_square = x.square().sum(-1, keepdim=True) / (x.shape[-1] - unbiased)
        root = (mean_square + epsilon).sqrt() if eps_inside else mean_square.sqrt() + epsilon
        return x / root * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0.0)

    def turn(x: Tensor) -> Tensor:  # (…, t, width)
        width = x.shape[-1]
        speed = (config.rope_theta if theta is None else theta) ** -(torch.arange(0, width, 2).double() / width)
        angle = (torch.arange(x.shape[-2])[:, None] + first_position) * speed
        cos, sin = angle.cos().to(x), angle.sin().to(x)
        if pairs == "neighbours":
            a, b = x[..., 0::2], x[..., 1::2]
            return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)

    def attention(name: str, x: Tensor) -> Tensor:
        heads = []
        for letter in "qkv":
            y = linear(f"{name}.{letter}", x)
            turns = config.positions == "rope" and letter in rotate
            if turns and rotate_before_split:
                y = turn(y)
            y = y.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
            heads.append(turn(y) if turns and not rotate_before_split else y)
        q, k, v = heads
        group, t = config.heads // config.kv_heads, x.shape[1]
        k, v = (y.repeat(1, group, 1, 1) if interleave else y.repeat_interleave(group, 1) for y in (k, v))
        scores = q @ k.mT / (math.sqrt(config.head_dim) if scaled else 1.0)
        if causal:
            scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1), -math.inf)
        out = (scores.softmax(-1) if stable else scores.exp() / scores.exp().sum(-1, keepdim=True)) @ v
        return linear(
            f"{name}.o", out.transpose(1, 2).flatten(2) if merge_transposed else out.reshape(*x.shape[:2], -1)
        )

    def mlp(name: str, x: Tensor) -> Tensor:
        up = linear(f"{name}.up", x)
        if config.activation == "gelu":
            return linear(f"{name}.down", F.gelu(up, approximate=gelu))
        opened = linear(f"{name}.gate", x)
        if swap_gate:
            up, opened = opened, up
        activations: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "sigmoid": torch.sigmoid}
        return linear(f"{name}.down", activations[gate](opened) * up)

    x = weights["token_embedding.weight"][tokens]
    if scale_embedding:
        x = x * math.sqrt(config.d_model)
    if config.positions == "learned":
        positions = (torch.arange(tokens.shape[1]) + first_position) % config.context
        x = x + weights["position_embedding.weight"][positions.to(tokens.device)]
    for layer in range(config.layers):
        for part, function in (("attention", attention), ("mlp", mlp)):
            name = f"blocks.{layer}.{part}"
            kept = x if residual else torch.zeros_like(x)
            x = (
                norm(f"{name}_norm", kept + function(name, x))
                if post_norm
                else kept + function(name, norm(f"{name}_norm", x))
            )
    x = norm("norm", x) if final_norm else x
    tied = config.tied if output == "as the config says" else output == "tied"
    return F.linear(x, weights["token_embedding.weight" if tied else "head.weight"])


def _wrong(**knobs: Any) -> Callable[..., Tensor]:
    def forward(weights: Mapping[str, Tensor], config: Config, tokens: Tensor) -> Tensor:
        return _plain(weights, config, tokens, **knobs)

    return forward


def _shifted(weights: Mapping[str, Tensor], config: Config, tokens: Tensor) -> Tensor:
    """The right logits, moved on by one position."""
    return _plain(weights, config, tokens).roll(1, dims=1)


def _narrow(weights: Mapping[str, Tensor], config: Config, tokens: Tensor) -> Tensor:
    dtype = weights["token_embedding.weight"].dtype
    return _plain({name: weight.float() for name, weight in weights.items()}, config, tokens).to(dtype)


WRONG = {
    "post_norm": Wrong(
        _wrong(post_norm=True), "normalise what goes into attention and MLP, not the sum that comes out: x + f(norm(x))"
    ),
    "no_final_norm": Wrong(_wrong(final_norm=False), "apply `norm` once more after the last block, before the output"),
    "no_residual": Wrong(_wrong(residual=False), "add what attention and MLP compute to x; do not put it in x's place"),
    "rmsnorm_subtracts_mean": Wrong(
        _wrong(norm_mean="subtracted"), "RMSNorm divides by the root of the mean square and subtracts no mean"
    ),
    "layernorm_keeps_mean": Wrong(_wrong(norm_mean="kept"), "LayerNorm subtracts the mean before it divides"),
    "unbiased_variance": Wrong(
        _wrong(unbiased=True), "a norm's mean of squares divides by d_model, not by d_model − 1 (torch.var's default)"
    ),
    "eps_outside_root": Wrong(_wrong(eps_inside=False), "eps goes under the root: x / √(mean of squares + eps)"),
    "eps_fixed": Wrong(_wrong(eps=1e-5), "take eps from config.norm_eps"),
    "positions_from_one": Wrong(
        _wrong(first_position=1), "positions count from 0: the first token takes row 0 of the position embedding"
    ),
    "embedding_scaled": Wrong(
        _wrong(scale_embedding=True),
        "the embedding is not multiplied by √d_model here (the first Transformer did that)",
    ),
    "rope_neighbours": Wrong(
        _wrong(pairs="neighbours"),
        "rotary pairs lie half a head apart, (x[i], x[i + head_dim/2]); pairs of neighbours need permuted weights",
    ),
    "rope_theta_fixed": Wrong(_wrong(theta=10_000.0), "take the base of the rotary angles from config.rope_theta"),
    "rope_on_queries_only": Wrong(_wrong(rotate="q"), "rotate the keys as well as the queries"),
    "rope_on_values": Wrong(_wrong(rotate="qkv"), "rotate queries and keys, but not the values"),
    "rope_before_split": Wrong(
        _wrong(rotate_before_split=True), "split into heads first: each head has the same head_dim/2 angles"
    ),
    "not_causal": Wrong(_wrong(causal=False), "position i must not see the positions after it"),
    "overflows": Wrong(
        _wrong(stable=False), "subtract each row's largest score before the exponential, or use torch.softmax"
    ),
    "no_scale": Wrong(_wrong(scaled=False), "divide the scores by √head_dim"),
    "heads_interleaved": Wrong(
        _wrong(interleave=True),
        "query head i reads key/value head i // (heads // kv_heads): repeat_interleave, not repeat",
    ),
    "heads_not_transposed": Wrong(
        _wrong(merge_transposed=False),
        "bring (batch, heads, t, head_dim) back to (batch, t, heads, head_dim) before the heads are joined",
    ),
    "exact_gelu": Wrong(_wrong(gelu="none"), "GPT-2's GELU is the tanh form: F.gelu(x, approximate='tanh')"),
    "gate_and_up_swapped": Wrong(_wrong(swap_gate=True), "SwiGLU is silu(gate(x)) · up(x): SiLU goes on the gate"),
    "geglu": Wrong(_wrong(gate="gelu"), "SwiGLU's gate goes through SiLU, x · sigmoid(x), not GELU"),
    "sigmoid_gate": Wrong(_wrong(gate="sigmoid"), "SwiGLU's gate goes through SiLU, x · sigmoid(x), not sigmoid alone"),
    "biases_left_out": Wrong(_wrong(bias=False), "add the biases of the linear layers where there are any"),
    "always_tied": Wrong(
        _wrong(output="tied"), "the output matrix is head.weight unless config.tied, where it is token_embedding.weight"
    ),
    "shifted": Wrong(_shifted, "logits at position i are for the token after i: do not shift them, the targets are"),
    "narrowed": Wrong(_narrow, "compute in the dtype of the weights: float32 throws half of float64's digits away"),
}


def reference(weights: Mapping[str, Tensor], config: Config, tokens: Tensor) -> Tensor:
    """`mlsys.models.transformer.Transformer` as one function of its weights."""
    logits: Tensor = functional_call(Transformer(config, device="meta"), dict(weights), (tokens,))
    return logits


CONTRACTS = {
    "transformer": Contract(
        name="models.transformer",
        signature=f"{SIGNATURE} -> logits (batch, t, vocab); weights by name, config: mlsys.perf.configs.Config",
        reference=reference,
        cases=CASES,
        inputs=inputs,
        call=call,
        oracle=oracle,
        tolerance=tolerance,
        wrong=WRONG,
    ),
}
