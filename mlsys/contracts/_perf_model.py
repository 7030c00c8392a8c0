"""Exercises about one model: its parameters, and the time of a decoding step."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

from mlsys.contracts._perf_formula import Formula, wrong
from mlsys.contracts.core import Case, Inputs
from mlsys.perf import inference, transformer
from mlsys.perf.configs import Config, Experts, LatentAttention

# --- transformer ------------------------------------------------------------------------------------------------------


def _parameters(config: Config) -> tuple[int, int]:
    count = transformer.parameters(config)
    return count.total, count.active


def _tensors(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the model, one by one, by name and shape: what a checkpoint would list."""
    width, experts = config.d_model, config.experts

    def linear(name: str, outputs: int, inputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (outputs, inputs)
        if config.bias:
            yield f"{name}.bias", (outputs,)

    def norm(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (width,)
        if config.norm == "layernorm" and config.bias:
            yield f"{name}.bias", (width,)

    def mlp(name: str, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        if config.activation == "swiglu":
            yield from linear(f"{name}.gate", hidden, width)
        yield from linear(f"{name}.up", hidden, width)
        yield from linear(f"{name}.down", width, hidden)

    yield "token_embedding", (config.vocab, width)
    if config.positions == "learned":
        yield "position_embedding", (config.context, width)
    run = 0  # layers since the last one with experts
    for layer in range(config.layers):
        yield from norm(f"{layer}.attention_norm")
        yield from linear(f"{layer}.q", config.heads * config.head_dim, width)
        yield from linear(f"{layer}.k", config.kv_heads * config.head_dim, width)
        yield from linear(f"{layer}.v", config.kv_heads * config.head_dim, width)
        yield from linear(f"{layer}.o", width, config.heads * config.head_dim)
        yield from norm(f"{layer}.mlp_norm")
        run += experts is not None and layer >= experts.first_dense
        if experts is None or run < experts.interval:
            yield from mlp(f"{layer}.mlp", config.d_ff)
            continue
        run = 0
        yield f"{layer}.router.weight", (experts.count, width)
        if experts.router_bias:
            yield f"{layer}.router.bias", (experts.count,)
        for shared in range(experts.shared):
            yield from mlp(f"{layer}.shared.{shared}", experts.d_ff)
        for routed in range(experts.count):
            yield from mlp(f"{layer}.routed.{routed}", experts.d_ff)
    yield from norm("norm")
    if not config.tied:
        yield "head", (config.vocab, width)


def _parameters_oracle(config: Config) -> tuple[int, int]:
    """The sizes of all tensors, added; a token goes through the first `per_token` routed experts of a layer."""
    total = active = 0
    for name, shape in _tensors(config):
        total += math.prod(shape)
        layer, _, rest = name.partition(".routed.")
        idle = layer and rest and config.experts and int(rest.partition(".")[0]) >= config.experts.per_token
        active += 0 if idle else math.prod(shape)
    return total, active


def _parameters_plain(
    config: Config,
    *,
    all_heads: bool = False,
    head_dim: bool = True,
    output: bool | None = None,
    table: Callable[[Config], bool] = lambda config: config.positions == "learned",
    gate: Callable[[Config], bool] = lambda config: config.activation == "swiglu",
    bias: bool = True,
    shift: Callable[[Config], bool] = lambda config: config.norm == "layernorm" and config.bias,
    norms_each: int = 2,
    final_norm: bool = True,
    interval: bool = True,
    first_dense: bool = True,
    dense_too: bool = False,
    router: bool = True,
    router_bias: Callable[[Config, Experts], bool] = lambda config, experts: experts.router_bias,
    shared: bool = True,
    expert_width: bool = True,
    active: str = "per token",
) -> tuple[int, int]:
    d, b = config.d_model, int(config.bias and bias)
    width = config.head_dim if head_dim else d // config.heads
    q, kv = config.heads * width, (config.heads if all_heads else config.kv_heads) * width
    attention = q * (d + b) + 2 * kv * (d + b) + d * (q + b)

    def mlp(hidden: int) -> int:
        return (1 + gate(config)) * hidden * (d + b) + d * (hidden + b)

    total = config.vocab * d + config.layers * attention
    total += (norms_each * config.layers + final_norm) * d * (1 + shift(config))
    total += config.context * d * table(config)
    total += config.vocab * d * (not config.tied if output is None else output)
    sparse = idle = 0
    if config.experts:
        e = config.experts
        start = e.first_dense if first_dense else 0
        sparse = (config.layers - start) // (e.interval if interval else 1)
        one = mlp(e.d_ff if expert_width else config.d_ff)
        total += sparse * (e.count + (e.shared if shared else 0)) * one
        total += sparse * e.count * (d * router + router_bias(config, e))
        idle = sparse * one * {"per token": e.count - e.per_token, "one": e.count - 1, "all": 0}[active]
    total += (config.layers if dense_too else config.layers - sparse) * mlp(config.d_ff)
    return total, total - idle


GPT = {"norm": "layernorm", "activation": "gelu", "positions": "learned", "tied": True, "bias": True}
LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "positions": "rope", "tied": False, "bias": False}


def _model(
    style: str, layers: int, d_model: int, heads: int, d_ff: int, vocab: int, context: int, **other: Any
) -> Case:
    """A config as a plain dict: what is not among `other` has the style's value."""
    sizes = {"layers": layers, "d_model": d_model, "heads": heads, "d_ff": d_ff, "vocab": vocab, "context": context}
    plain = {"kv_heads": heads, "head_dim": d_model // heads}
    return {"style": style} | sizes | plain | (GPT if style == "gpt" else LLAMA) | other


def _config(case: Case) -> Config:
    fields = {name: value for name, value in case.items() if name != "style"}
    for name, record in (("experts", Experts), ("latent", LatentAttention)):
        if name in fields:
            fields[name] = record(**fields[name])
    return Config(**fields)


def _draw_model(rng: random.Random) -> Case:
    heads, width = rng.choice([2, 4, 8]), 2 * rng.randint(1, 6)
    other: dict[str, Any] = {"kv_heads": heads // rng.choice([1, 2]), "head_dim": width}
    for name in GPT:  # each on its own, so that none can stand in for another
        other[name] = rng.choice([GPT[name], LLAMA[name]])
    if rng.random() < 0.6:
        count = rng.randint(2, 6)
        other["experts"] = {
            "count": count,
            "per_token": rng.randint(1, count - 1),
            "d_ff": rng.randint(3, 20),
            "shared": rng.randint(0, 2),
            "first_dense": rng.randint(0, 2),
            "interval": rng.randint(1, 3),
            "router_bias": rng.random() < 0.5,
        }
    return _model(
        "gpt",
        rng.randint(3, 7),
        rng.randint(6, 30),
        heads,
        rng.randint(5, 60),
        rng.randint(9, 99),
        rng.randint(5, 30),
        **other,
    )


TRANSFORMER = Formula(
    signature="parameters(config) -> (total, active); config has the fields of mlsys.perf.configs.Config",
    results=("total", "active"),
    relative=0.0,
    reference=_parameters,
    oracle=_parameters_oracle,
    arguments=lambda case: {"config": _config(case)},
    draw=_draw_model,
    cases=[
        _model("gpt", 1, 4, 1, 16, 10, 8),
        _model("gpt", 12, 768, 12, 3072, 50257, 1024),  # GPT-2
        _model("gpt", 2, 6, 2, 20, 11, 9, bias=False),
        _model("gpt", 2, 6, 2, 20, 11, 9, tied=False),
        _model("llama", 1, 4, 1, 11, 10, 8),
        _model("llama", 3, 16, 4, 20, 17, 8, kv_heads=2),
        _model("llama", 3, 16, 4, 20, 17, 8, kv_heads=1, head_dim=8),  # heads · head_dim is not d_model
        _model("llama", 2, 16, 4, 20, 17, 8, tied=True),
        # Halves of both styles: every two of norm, activation, positions and bias that go together, once apart.
        _model("llama", 2, 8, 2, 20, 11, 9, bias=True),
        _model("llama", 2, 8, 2, 20, 11, 9, activation="gelu"),
        _model("gpt", 2, 8, 2, 20, 11, 9, positions="rope"),  # GELU and LayerNorm, as in GPT-NeoX
        _model("gpt", 2, 8, 2, 20, 11, 9, norm="rmsnorm"),
        _model("gpt", 2, 8, 2, 20, 11, 9, activation="swiglu", tied=False, bias=False),
        _model("llama", 32, 4096, 32, 14336, 128256, 8192, kv_heads=8),  # Llama-3-8B
        _model("llama", 2, 8, 2, 24, 17, 8, experts={"count": 4, "per_token": 2, "d_ff": 24}),
        _model("llama", 4, 8, 2, 24, 17, 8, experts={"count": 4, "per_token": 2, "d_ff": 10}),
        _model("llama", 5, 8, 2, 24, 17, 8, experts={"count": 4, "per_token": 2, "d_ff": 10, "interval": 2}),
        _model("llama", 5, 8, 2, 24, 17, 8, experts={"count": 5, "per_token": 2, "d_ff": 10, "shared": 1}),
        _model("llama", 2, 8, 2, 24, 17, 8, experts={"count": 4, "per_token": 2, "d_ff": 10, "router_bias": True}),
        _model("gpt", 2, 8, 2, 24, 17, 8, experts={"count": 4, "per_token": 1, "d_ff": 10}),  # no bias of the router
        _model(
            "llama",
            9,
            8,
            2,
            24,
            17,
            8,
            experts={"count": 6, "per_token": 3, "d_ff": 7, "shared": 2, "first_dense": 2, "interval": 3},
        ),
    ],
    wrong={
        "output_counted_when_tied": wrong(
            _parameters_plain,
            "where config.tied, the output matrix is the token embedding: count it once",
            output=True,
        ),
        "output_forgotten": wrong(
            _parameters_plain,
            "unless config.tied, the output matrix of vocab × d_model is one more tensor",
            output=False,
        ),
        "positions_forgotten": wrong(
            _parameters_plain,
            "learned positions are a table of context × d_model: count it",
            table=lambda config: False,
        ),
        "positions_with_rope": wrong(
            _parameters_plain,
            "rotary positions have no parameters: no table of context × d_model",
            table=lambda config: True,
        ),
        "positions_by_activation": wrong(
            _parameters_plain,
            "whether positions are learned is for config.positions to say, not for config.activation",
            table=lambda config: config.activation == "gelu",
        ),
        "positions_by_norm": wrong(
            _parameters_plain,
            "whether positions are learned is for config.positions to say, not for config.norm",
            table=lambda config: config.norm == "layernorm",
        ),
        "all_heads_have_keys": wrong(
            _parameters_plain,
            "keys and values have kv_heads heads, not heads: with grouped queries their matrices are smaller",
            all_heads=True,
        ),
        "head_dim_derived": wrong(
            _parameters_plain,
            "take the width of a head from config.head_dim: it need not be d_model / heads",
            head_dim=False,
        ),
        "no_gate": wrong(
            _parameters_plain,
            "SwiGLU has three matrices, gate, up and down; GELU has two",
            gate=lambda config: False,
        ),
        "always_three_matrices": wrong(
            _parameters_plain,
            "an MLP with GELU has two matrices, up and down; only SwiGLU has a gate",
            gate=lambda config: True,
        ),
        "gate_by_positions": wrong(
            _parameters_plain,
            "the MLP has a gate where config.activation is 'swiglu', whatever config.positions is",
            gate=lambda config: config.positions == "rope",
        ),
        "gate_by_norm": wrong(
            _parameters_plain,
            "the MLP has a gate where config.activation is 'swiglu', whatever config.norm is",
            gate=lambda config: config.norm == "rmsnorm",
        ),
        "biases_forgotten": wrong(
            _parameters_plain, "where config.bias, each linear layer has as many biases as outputs", bias=False
        ),
        "rmsnorm_shifts": wrong(
            _parameters_plain,
            "RMSNorm has a scale only, and so has LayerNorm where config.bias is False",
            shift=lambda config: True,
        ),
        "layernorm_has_no_shift": wrong(
            _parameters_plain,
            "LayerNorm with biases has a shift beside its scale: 2·d_model",
            shift=lambda config: False,
        ),
        "shift_by_bias_alone": wrong(
            _parameters_plain,
            "RMSNorm has no shift, in a model with biases neither: look at config.norm as well as config.bias",
            shift=lambda config: config.bias,
        ),
        "shift_by_norm_alone": wrong(
            _parameters_plain,
            "LayerNorm has a shift only where config.bias: look at config.bias as well as config.norm",
            shift=lambda config: config.norm == "layernorm",
        ),
        "one_norm_a_block": wrong(_parameters_plain, "a block has two norms, before attention and MLP", norms_each=1),
        "last_norm_forgotten": wrong(
            _parameters_plain, "one more norm stands before the output matrix", final_norm=False
        ),
        "interval_ignored": wrong(
            _parameters_plain,
            "only every interval-th of the layers that may have experts has them; the others keep a plain MLP",
            interval=False,
        ),
        "first_dense_ignored": wrong(
            _parameters_plain, "the first experts.first_dense layers keep a plain MLP", first_dense=False
        ),
        "experts_on_top": wrong(
            _parameters_plain, "experts stand in place of the plain MLP of their layer, not beside it", dense_too=True
        ),
        "router_forgotten": wrong(
            _parameters_plain, "each layer with experts has a router, a matrix of count × d_model", router=False
        ),
        "router_bias_forgotten": wrong(
            _parameters_plain,
            "where config.experts.router_bias, a router has one more number for each expert: count of them a layer",
            router_bias=lambda config, experts: False,
        ),
        "router_has_the_models_bias": wrong(
            _parameters_plain,
            "config.bias is not for the router: it has a bias where config.experts.router_bias, and only there",
            router_bias=lambda config, experts: config.bias,
        ),
        "shared_forgotten": wrong(
            _parameters_plain, "shared experts are parameters too, and every token uses them", shared=False
        ),
        "experts_of_d_ff": wrong(
            _parameters_plain, "an expert's hidden width is experts.d_ff, not the plain MLP's d_ff", expert_width=False
        ),
        "all_active": wrong(
            _parameters_plain,
            "a token goes through per_token of the routed experts: the others are not active",
            active="all",
        ),
        "one_expert_active": wrong(
            _parameters_plain, "a token goes through per_token routed experts, not through one", active="one"
        ),
    },
)


# --- inference --------------------------------------------------------------------------------------------------------


def _decode(
    config: Config, parameters: int, batch: int, cached: int, itemsize: float, kv_itemsize: float, bandwidth: float
) -> tuple[float, float, float]:
    step = inference.decode_step(
        config, batch, cached, bandwidth, itemsize=itemsize, kv_itemsize=kv_itemsize, parameters=parameters
    )
    return step.kv_bytes, step.seconds, step.tokens_per_second


def _decode_oracle(
    config: Config, parameters: int, batch: int, cached: int, itemsize: float, kv_itemsize: float, bandwidth: float
) -> tuple[float, float, float]:
    """The vectors that a token has in the cache, one by one; then those of all sequences, and the weights."""
    numbers = 0
    for _ in range(config.layers):
        if config.latent:
            numbers += config.latent.kv_rank  # keys and values of all heads, compressed together
            numbers += config.latent.rope_dim  # the one rotated key that all heads share
            continue
        for _ in range(config.kv_heads):
            numbers += config.head_dim  # its key
            numbers += config.head_dim  # its value
    cache = sum(numbers * cached for _ in range(batch)) * kv_itemsize
    seconds = (cache + parameters * itemsize) / bandwidth
    return cache, seconds, sum(1 / seconds for _ in range(batch))


def _decode_plain(
    config: Config,
    parameters: int,
    batch: int,
    cached: int,
    itemsize: float,
    kv_itemsize: float,
    bandwidth: float,
    *,
    kept: int = 2,
    heads: str = "kv_heads",
    head_dim: bool = True,
    latent: str = "compressed",
    layers: bool = True,
    sequences: bool = True,
    own_itemsize: bool = True,
    weights: str = "once",
    cache_read: bool = True,
    giga: float = 1.0,
    throughput: str = "batch",
) -> tuple[float, float, float]:
    mla = config.latent
    if mla and latent != "ignored":
        numbers = {
            "compressed": mla.kv_rank + mla.rope_dim,
            "no rope": mla.kv_rank,
            "twice": 2 * mla.kv_rank + mla.rope_dim,
            "rope of each head": mla.kv_rank + config.heads * mla.rope_dim,
            "expanded": config.heads * (mla.nope_dim + mla.rope_dim + mla.value_dim),
        }[latent]
    else:
        numbers = kept * getattr(config, heads) * (config.head_dim if head_dim else config.d_model // config.heads)
    numbers *= (config.layers if layers else 1) * cached * (batch if sequences else 1)
    cache = numbers * (kv_itemsize if own_itemsize else itemsize)
    read = parameters * itemsize * {"once": 1, "each": batch, "never": 0}[weights] + (cache if cache_read else 0)
    seconds = read / (bandwidth * giga)
    return cache, seconds, {"batch": batch, "one": 1, "cache": batch * cached}[throughput] / seconds


def _serving(
    model: Case,
    parameters: int,
    batch: int,
    cached: int,
    itemsize: float = 2,
    kv_itemsize: float = 2,
    bandwidth: float = 1e12,
) -> Case:
    numbers: dict[str, Any] = {"parameters": parameters, "batch": batch, "cached": cached, "itemsize": itemsize}
    return dict(model) | numbers | {"kv_itemsize": kv_itemsize, "bandwidth": bandwidth}


def _serving_arguments(case: Case) -> Inputs:
    names = ("parameters", "batch", "cached", "itemsize", "kv_itemsize", "bandwidth")
    model = {name: value for name, value in case.items() if name not in names}
    return {"config": _config(model)} | {name: case[name] for name in names}


def _draw_serving(rng: random.Random) -> Case:
    heads = rng.choice([4, 8])
    other: dict[str, Any] = {"kv_heads": heads // rng.choice([1, 2, 4]), "head_dim": 2 * rng.randint(8, 40)}
    if rng.random() < 0.4:
        ranks = {"query_rank": 0, "kv_rank": rng.randint(20, 99), "nope_dim": 16, "rope_dim": 8, "value_dim": 24}
        other["latent"] = ranks
    model = _model("llama", rng.randint(2, 90), 64 * heads, heads, 512, 1000, 8192, **other)
    return _serving(
        model, rng.randint(10**6, 10**8), rng.randint(2, 60), rng.randint(100, 8000), 2, rng.choice([1, 4]), 1e12
    )


LLAMA_2_13B = _model("llama", 40, 5120, 40, 13824, 32000, 4096)
LLAMA_3_8B = _model("llama", 32, 4096, 32, 14336, 128256, 8192, kv_heads=8)
WITH_LATENT = _model(
    "llama",
    61,
    7168,
    128,
    18432,
    129280,
    131072,
    latent={"query_rank": 1536, "kv_rank": 512, "nope_dim": 128, "rope_dim": 64, "value_dim": 128},
)

INFERENCE = Formula(
    signature="decode(config, parameters, batch, cached, itemsize, kv_itemsize, bandwidth)"
    " -> (cache_bytes, seconds, tokens_per_second)",
    results=("cache_bytes", "seconds", "tokens_per_second"),
    reference=_decode,
    oracle=_decode_oracle,
    arguments=_serving_arguments,
    draw=_draw_serving,
    cases=[
        _serving(_model("llama", 2, 8, 2, 24, 17, 64), 1000, 1, 1, 4, 4, 100.0),
        _serving(_model("llama", 2, 8, 2, 24, 17, 64), 1000, 3, 10, 4, 4, 100.0),
        _serving(LLAMA_2_13B, 13_015_864_320, 1, 1024, bandwidth=3.35e12),
        _serving(LLAMA_2_13B, 13_015_864_320, 64, 1024, bandwidth=3.35e12),
        _serving(LLAMA_3_8B, 8_030_261_248, 16, 8192, bandwidth=3.35e12),
        _serving(_model("llama", 4, 24, 4, 24, 17, 4096, kv_heads=2, head_dim=16), 40_000, 8, 4000),
        _serving(LLAMA_3_8B, 8_030_261_248, 32, 4096, 2, 1, 3.35e12),  # the cache in 8 bits
        _serving(LLAMA_3_8B, 8_030_261_248, 32, 4096, 0.5, 2, 3.35e12),  # the weights in 4
        _serving(WITH_LATENT, 37_552_000_000, 8, 32768, 1, 2, 4.8e12),
    ],
    wrong={
        "keys_only": wrong(_decode_plain, "a token leaves a key and a value: twice as much", kept=1),
        "heads_for_kv_heads": wrong(
            _decode_plain, "only kv_heads heads have keys and values; query heads share them", heads="heads"
        ),
        "head_dim_derived": wrong(
            _decode_plain,
            "take the width of a head from config.head_dim: it need not be d_model / heads",
            head_dim=False,
        ),
        "one_layer": wrong(_decode_plain, "each layer has keys and values of its own", layers=False),
        "one_sequence": wrong(_decode_plain, "each sequence of the batch has a cache of its own", sequences=False),
        "cache_in_the_weights_format": wrong(
            _decode_plain,
            "a number of the cache takes kv_itemsize bytes, one of the weights itemsize",
            own_itemsize=False,
        ),
        "latent_ignored": wrong(
            _decode_plain,
            "with latent attention the cache has the compressed vector and the rotated key, and no heads",
            latent="ignored",
        ),
        "latent_expanded": wrong(
            _decode_plain,
            "latent attention caches what is compressed; keys and values of the heads are rebuilt, not kept",
            latent="expanded",
        ),
        "latent_twice": wrong(
            _decode_plain, "keys and values come from the same compressed vector: it is kept once", latent="twice"
        ),
        "rotated_key_forgotten": wrong(
            _decode_plain, "latent attention also keeps the rotated key, rope_dim numbers", latent="no rope"
        ),
        "rotated_key_of_each_head": wrong(
            _decode_plain,
            "all heads share one rotated key: rope_dim numbers, not heads times as many",
            latent="rope of each head",
        ),
        "weights_for_each_sequence": wrong(
            _decode_plain, "a step reads the weights once for the whole batch: that is why one batches", weights="each"
        ),
        "weights_not_read": wrong(_decode_plain, "a step reads all weights besides the cache", weights="never"),
        "cache_not_read": wrong(_decode_plain, "a step reads the whole cache besides the weights", cache_read=False),
        "throughput_of_one": wrong(
            _decode_plain, "in one step every sequence of the batch gets a token: count them all", throughput="one"
        ),
        "throughput_of_the_context": wrong(
            _decode_plain,
            "a step makes one token a sequence; the tokens in the cache were made before",
            throughput="cache",
        ),
        "gib_for_gb": wrong(
            _decode_plain,
            "bandwidth is in bytes a second already, and a GB is 10⁹ bytes: no factor of 1024 belongs here",
            giga=1024**3 / 1e9,
        ),
    },
)
