"""A small transformer: what do a forward pass and a training step cost, against prediction and plain torch?

What to look at: the share of the limit is the prediction put to the test, FLOPs
over peak FLOP/s against the clock. Every case has the same number of tokens, so
that only attention's share grows with t. The peer is the model written straight
in torch's functions, with `scaled_dot_product_attention`; ours is our module with
`flash.attention`, the reference the same module with `naive.attention`. The
matmuls of all three are the same calls: what differs is attention, and the cost
of the small operations between.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from mlsys.attention import flash, naive
from mlsys.bench import Benchmark, Impl, Plot, Work
from mlsys.models import transformer
from mlsys.perf.configs import Config, gpt, llama
from mlsys.perf.transformer import forward_flops, training_flops

Case = Mapping[str, Any]
TOKENS = 1024  # in a batch
SIZES = {"small": (4, 256, 4), "medium": (8, 512, 8), "124M": (12, 768, 12)}  # layers, d_model, heads
ALLOWED = {
    "float32": 1e-4,
    "bfloat16": 4e-2,
}  # relative: some hundred roundings of float32, five of bfloat16


def case(style: str, t: int, *, dtype: str = "float32", size: str = "small", train: bool = False) -> Case:
    return {"style": style, "size": size, "t": t, "b": TOKENS // t, "dtype": dtype, "train": train}


def config_of(case: Case) -> Config:
    layers, d_model, heads = SIZES[case["size"]]
    vocab = 50257 if case["size"] == "124M" else 1024
    if case["style"] == "gpt":
        return gpt(layers, d_model, heads, vocab=vocab, context=TOKENS)
    # two thirds of the width that GELU has, for three matrices instead of two; two query heads share a key
    d_ff = 8 * d_model // 3 // 64 * 64
    return llama(layers, d_model, heads, d_ff, vocab=vocab, context=TOKENS, kv_heads=heads // 2)


@dataclass(frozen=True)
class Inputs:
    """A model's weights by name, its config, and a batch of tokens with those that follow them."""

    weights: dict[str, Tensor]
    config: Config
    tokens: Tensor
    targets: Tensor


def inputs(case: Case, device: str) -> Inputs:
    config, generator = config_of(case), torch.Generator(device).manual_seed(case["t"])
    model = transformer.init(transformer.Transformer(config, device=device), generator)
    dtype = getattr(torch, case["dtype"])
    weights = {name: w.detach().to(dtype).requires_grad_(case["train"]) for name, w in model.named_parameters()}
    ids = torch.randint(config.vocab, (case["b"], case["t"] + 1), generator=generator, device=device)
    return Inputs(weights, config, ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def work(case: Case, given: Inputs) -> Work:
    # FLOPs of the matrix products; of attention the visible half only. Forward: each weight is read once and the logits
    # are written. A training step reads each weight twice and writes its gradient; the logits need not leave it.
    flops = (training_flops if case["train"] else forward_flops)(given.config, case["b"], case["t"], causal=True).total
    weights = sum(weight.nbytes for weight in given.weights.values())
    logits = TOKENS * given.config.vocab * given.weights["norm.weight"].element_size()
    return Work(flops=flops, bytes=3 * weights if case["train"] else weights + logits, items=TOKENS, unit="tokens")


def prepare(function: Callable[..., Tensor], case: Case, given: Inputs) -> Callable[[], list[Tensor]]:
    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [function(given.weights, given.config, given.tokens)]

    def step() -> list[Tensor]:
        logits = function(given.weights, given.config, given.tokens)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), given.targets.flatten())
        return [loss.detach(), *torch.autograd.grad(loss, list(given.weights.values()))]

    return step if case["train"] else forward


def verify(case: Case, given: Inputs, got: list[Tensor], want: list[Tensor]) -> tuple[float, float]:
    """The relative error of the logits, or the larger of the loss's and of all gradients taken as one vector."""

    def error(a: list[Tensor], b: list[Tensor]) -> float:
        gaps = sum((x.double() - y.double()).square().sum().item() for x, y in zip(a, b, strict=True))
        return float((gaps / sum(y.double().square().sum().item() for y in b)) ** 0.5)

    return max(error(got[:1], want[:1]), error(got[1:], want[1:]) if case["train"] else 0.0), ALLOWED[case["dtype"]]


def library(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The library's module with this attention, as a function of its weights."""

    @functools.cache
    def shape(config: Config) -> transformer.Transformer:
        return transformer.Transformer(config, attention=attention, device="meta")

    def forward(weights: dict[str, Tensor], config: Config, tokens: Tensor) -> Tensor:
        logits: Tensor = functional_call(shape(config), weights, (tokens,))
        return logits

    return forward


def plain(w: dict[str, Tensor], config: Config, tokens: Tensor) -> Tensor:
    """The same model in torch's own functions."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        if config.norm == "rmsnorm":
            return F.rms_norm(x, x.shape[-1:], w[f"{name}.weight"], config.norm_eps)
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], config.norm_eps)

    (t, d), device = (tokens.shape[1], config.head_dim), tokens.device
    speed = config.rope_theta ** -(torch.arange(0, d, 2, device=device) / d)
    angles = torch.outer(torch.arange(t, device=device), speed)
    cos, sin = angles.cos(), angles.sin()

    def turn(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)

    x = F.embedding(tokens, w["token_embedding.weight"])
    if config.positions == "learned":
        x = x + w["position_embedding.weight"][:t]
    for layer in range(config.layers):
        block = f"blocks.{layer}"
        y = norm(f"{block}.attention_norm", x)
        q, k, v = (linear(f"{block}.attention.{n}", y).unflatten(-1, (-1, d)).transpose(1, 2) for n in "qkv")
        if config.positions == "rope":
            q, k = turn(q), turn(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=config.kv_heads < config.heads)
        x = x + linear(f"{block}.attention.o", y.transpose(1, 2).flatten(2))
        y = norm(f"{block}.mlp_norm", x)
        up = linear(f"{block}.mlp.up", y)
        if config.activation == "swiglu":
            y = F.silu(linear(f"{block}.mlp.gate", y)) * up
        else:
            y = F.gelu(up, approximate="tanh")
        x = x + linear(f"{block}.mlp.down", y)
    return F.linear(norm("norm", x), w["token_embedding.weight" if config.tied else "head.weight"])


STYLES = ("gpt", "llama")
bench = Benchmark(
    __file__,
    cases={
        "quick": [
            *(case(style, t) for style in STYLES for t in (128, 1024)),
            *(case(style, 256, train=True) for style in STYLES),
            case("llama", 1024, dtype="bfloat16"),
        ],
        "default": [
            *(
                case(style, t, train=train)
                for style in STYLES
                for train in (False, True)
                for t in (64, 128, 256, 512, 1024)
            ),
            *(case(style, 512, dtype="bfloat16") for style in STYLES),
            *(case(style, 512, size="medium", train=train) for style in STYLES for train in (False, True)),
        ],
        "full": [
            *(
                case(style, t, train=train, dtype=dtype)
                for style in STYLES
                for train in (False, True)
                for dtype in ("float32", "bfloat16")
                for t in (64, 128, 256, 512, 1024)
            ),
            *(case(style, 512, size="medium", train=train) for style in STYLES for train in (False, True)),
            *(case("gpt", 1024, size="124M", train=train) for train in (False, True)),
        ],
    },
    inputs=inputs,
    work=work,
    impls={
        "naive": Impl(lambda: library(naive.attention), "reference"),
        "flash": Impl(lambda: library(flash.attention), "ours"),
        "torch sdpa": Impl(lambda: plain, "peer"),
    },
    subject="flash",
    prepare=prepare,
    verify=verify,
    contract="models.transformer",
    memory=True,
    plots=(
        Plot(
            x="t",
            xlabel="tokens in a sequence (1024 in the batch)",
            panel=("style", "train"),
            only=lambda case: case["size"] == "small" and case["dtype"] == "float32",
        ),
        Plot(
            x="t",
            xlabel="tokens in a sequence (1024 in the batch)",
            panel=("style", "train"),
            y="memory",
            only=lambda case: case["size"] == "small" and case["dtype"] == "float32",
        ),
    ),
)

if __name__ == "__main__":
    bench.main()
