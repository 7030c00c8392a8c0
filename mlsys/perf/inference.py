"""What serving a decoder-only transformer costs: KV cache, batch sizes, the time of a decode step.

A token's keys and values never change, so they are kept: the KV cache. In bytes a
token it is

    2 · layers · kv_heads · head_dim · itemsize        MHA, GQA (fewer kv_heads), MQA (one)
    layers · (kv_rank + rope_dim) · itemsize           MLA, which keeps one compressed vector

A decode step makes one token for each of B sequences. It reads all weights once,
however large the batch, and every sequence's cache; each weight then takes part in
only B multiply-adds. So time is at least

    max( (weights + B · context · cache per token) / bandwidth,   FLOPs / peak )

and the first term rules until B is in the hundreds: batching is nearly free until
the caches weigh as much as the weights, and then stops to help. Prefill, which
reads the whole prompt at once, is the opposite: one pass over the weights serves all
its tokens, and FLOPs rule.

In a mixture of experts a batch reads the experts that it needs. With k of E experts
a token, chosen evenly and independently, B tokens touch E·(1 − (1 − k/E)^B) of them:
a small batch reads few, a large one all. Real routers are less even and touch fewer.

These are lower bounds: no engine reaches the full bandwidth, and launching kernels,
sampling and, over several devices, communication come on top.

Cost:
    decode_step: 2·B·(parameters a token is multiplied with) + 2·B·layers·heads·context·(key + value width) FLOPs.

Memory:
    weight_bytes + B · context · kv_cache_bytes_per_token.

Papers:
    Pope et al. 2022, arXiv:2211.05102, section 2 (weights, KV cache and FLOPs of a decode step).
    Ainslie et al. 2023, arXiv:2305.13245, section 2.2 (grouped queries).
    Kwon et al. 2023, arXiv:2309.06180, Table 1 (slots in the memory that is left).
    DeepSeek-AI 2024, arXiv:2405.04434, section 2.1 and appendix C (latent attention; absorbed projections).

See also:
    `mlsys.perf.transformer` (training), `mlsys.perf.roofline` (bounds), `mlsys.perf.hardware` (bandwidths and peaks).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlsys.perf._checks import amount, whole
from mlsys.perf.configs import Config, Experts
from mlsys.perf.transformer import forward_flops, parameters


def kv_cache_bytes_per_token(config: Config, itemsize: float = 2) -> float:
    """Bytes that one token of one sequence takes in the KV cache of all layers.

    itemsize: bytes of an element; 0.5 for 4 bits. Scales of a quantized cache are not counted.
    """
    amount("itemsize", itemsize, positive=True)
    if config.latent:
        width = config.latent.kv_rank + config.latent.rope_dim
    else:
        width = 2 * config.kv_heads * config.head_dim
    return config.layers * width * itemsize


def kv_slots(memory: float, config: Config, itemsize: float = 2) -> int:
    """How many tokens' keys and values fit in `memory` bytes."""
    return int(amount("memory", memory, positive=True) // kv_cache_bytes_per_token(config, itemsize))


def weight_bytes(config: Config, itemsize: float = 2) -> float:
    """Bytes of all weights, embeddings and every expert included; `itemsize` bytes each."""
    return parameters(config).total * amount("itemsize", itemsize, positive=True)


def expected_experts(experts: Experts, tokens: int) -> float:
    """How many distinct routed experts of a layer `tokens` tokens go through, on average: E·(1 − (1 − k/E)^tokens).

    Each token takes k = per_token different experts, all sets equally likely, whatever the others take.
    """
    missed = 1 - experts.per_token / experts.count
    return experts.count * (1 - missed ** whole("tokens", tokens, at_least=0))


def weight_bytes_read(config: Config, tokens: int, itemsize: float = 2) -> float:
    """Bytes of weights that a step over `tokens` tokens reads: all but the routed experts that no token goes to.

    The embeddings count in full, as in the usual estimate "each parameter is read
    once". A step really looks up one row a token of those that are not also the
    output matrix: 1% less for Llama-2-13B, 7% for Llama-3-8B.
    """
    tokens = whole("tokens", tokens)
    count = parameters(config)
    unread = 0.0
    if config.experts and count.idle:
        one_of_each = count.idle / (config.experts.count - config.experts.per_token)  # an expert in every layer
        unread = one_of_each * (config.experts.count - expected_experts(config.experts, tokens))
    return (count.total - unread) * amount("itemsize", itemsize, positive=True)


@dataclass(frozen=True)
class Decode:
    """The lower bound on a decode step of a batch.

    seconds:           of the step; each sequence gets one token.
    tokens_per_second: of the whole batch.
    weight_bytes:      weights read, on all devices together.
    kv_bytes:          keys and values read, on all devices together.
    flops:             of the matrix products.
    side:              what takes longer: "memory" or "compute".
    """

    seconds: float
    tokens_per_second: float
    weight_bytes: float
    kv_bytes: float
    flops: int
    side: Literal["memory", "compute"]


def decode_step(
    config: Config,
    batch: int,
    context: int,
    hardware_bandwidth: float,
    *,
    peak: float | None = None,
    itemsize: float = 2,
    kv_itemsize: float = 2,
    devices: int = 1,
    parameters: float | None = None,
) -> Decode:
    """The shortest time in which `batch` sequences can each get one more token.

    context:            keys that each new token attends to, itself included.
    hardware_bandwidth: bytes/s of one device.
    peak:               FLOP/s of one device; None: only the bytes are counted.
    itemsize:           bytes of a weight; kv_itemsize: of an element of the cache.
    devices:            share weights and caches evenly; their communication is not counted.
    parameters:         how many the step reads, where that is not what `weight_bytes_read` counts.

    For Llama-2-13B all 13,015,864,320 parameters are read, 2 bytes each: 8.021 ms for one sequence of 1,024 at
    3.35 TB/s. Without the rows of the token embedding that are not looked up it would be 7.923 ms.

    With latent attention the compressed vectors are multiplied directly, the projection up
    absorbed into queries and outputs: that is what makes reading only them possible.
    """
    batch, context, devices = whole("batch", batch), whole("context", context), whole("devices", devices)
    _check_context(config, context)
    amount("kv_itemsize", kv_itemsize, positive=True)
    if parameters is None:
        weights = weight_bytes_read(config, batch, itemsize)
    else:
        weights = amount("parameters", parameters) * amount("itemsize", itemsize, positive=True)
    cache = batch * context * kv_cache_bytes_per_token(config, kv_itemsize)
    memory_seconds = (weights + cache) / (devices * amount("hardware_bandwidth", hardware_bandwidth, positive=True))

    one = forward_flops(config, batch, 1)  # its attention is over one key: replaced by that over the cache
    flops = one.total - one.attention_scores + _cache_flops(config, batch, context)
    compute_seconds = 0.0 if peak is None else flops / (devices * amount("peak", peak, positive=True))

    seconds = max(memory_seconds, compute_seconds)
    return Decode(
        seconds=seconds,
        tokens_per_second=batch / seconds,
        weight_bytes=weights,
        kv_bytes=cache,
        flops=flops,
        side="memory" if memory_seconds >= compute_seconds else "compute",
    )


def _cache_flops(config: Config, batch: int, context: int) -> int:
    """FLOPs of one query a sequence with all cached keys and values."""
    if config.latent:
        widths = (config.latent.kv_rank + config.latent.rope_dim) + config.latent.kv_rank
    else:
        widths = 2 * config.head_dim
    return 2 * batch * context * config.layers * config.heads * widths


def prefill_seconds(
    config: Config,
    batch: int,
    seq: int,
    peak: float,
    *,
    hardware_bandwidth: float | None = None,
    itemsize: float = 2,
    kv_itemsize: float = 2,
    devices: int = 1,
) -> float:
    """The shortest time to read `batch` prompts of `seq` tokens and give each its first new token, seconds.

    peak:               FLOP/s of one device.
    hardware_bandwidth: bytes/s of one device; None: only FLOPs are counted. Otherwise the weights are read and the
                        cache is written once, and the longer time counts.

    Masked pairs are skipped, and logits are computed for the last token only.
    """
    devices = whole("devices", devices)
    amount("kv_itemsize", kv_itemsize, positive=True)
    flops = forward_flops(config, batch, seq, causal=True, logits="last").total
    seconds = flops / (devices * amount("peak", peak, positive=True))
    if hardware_bandwidth is None:
        return seconds
    moved = weight_bytes_read(config, batch * seq, itemsize)
    moved += batch * seq * kv_cache_bytes_per_token(config, kv_itemsize)
    return max(seconds, moved / (devices * amount("hardware_bandwidth", hardware_bandwidth, positive=True)))


def max_batch(
    config: Config,
    memory: float,
    context: int,
    *,
    itemsize: float = 2,
    kv_itemsize: float = 2,
    devices: int = 1,
) -> int:
    """How many sequences of `context` tokens fit beside the weights; 0 if not even one, or not the weights.

    memory: bytes of one device that weights and cache may take; leave out what activations and the runtime need.
    """
    context, devices = whole("context", context), whole("devices", devices)
    _check_context(config, context)
    amount("kv_itemsize", kv_itemsize, positive=True)
    left = devices * amount("memory", memory, positive=True) - weight_bytes(config, itemsize)
    return max(0, int(left // (context * kv_cache_bytes_per_token(config, kv_itemsize))))


def _check_context(config: Config, context: int) -> None:
    if config.positions == "learned" and context > config.context:
        raise ValueError(
            f"context={context} is longer than the {config.context} positions that the model has learned; "
            f"for a longer model use dataclasses.replace(config, context={context})"
        )
