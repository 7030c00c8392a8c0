"""`mlsys.perf.inference` against published figures, against decode steps that torch counts, and by enumeration."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mlsys.perf.configs import MODELS, Config, Experts, LatentAttention, gpt, llama
from mlsys.perf.inference import (
    decode_step,
    expected_experts,
    kv_cache_bytes_per_token,
    kv_slots,
    max_batch,
    prefill_seconds,
    weight_bytes,
    weight_bytes_read,
)
from mlsys.perf.transformer import forward_flops, parameters

H100_BANDWIDTH, H100_PEAK = 3.35e12, 989.4e12
GPT = gpt(2, 24, 3, vocab=50, context=64)
GQA = llama(3, 24, 6, 40, vocab=50, context=64, kv_heads=2)
MOE = llama(5, 16, 2, 24, vocab=50, context=64, experts=Experts(4, 2, 12, shared=1, first_dense=1, interval=2))
MLA = llama(
    3, 24, 4, 40, vocab=50, context=64,
    latent=LatentAttention(query_rank=10, kv_rank=8, nope_dim=6, rope_dim=4, value_dim=5),
)  # fmt: skip
SMALL = {"gpt": GPT, "gqa": GQA, "moe": MOE, "mla": MLA}


# --- the KV cache -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("llama-2-7b", 524_288),
        ("llama-2-13b", 819_200),
        ("opt-13b", 819_200),
        ("llama-2-70b", 327_680),
        ("llama-3-8b", 131_072),
        ("mistral-7b", 131_072),
        ("deepseek-v3", 70_272),
    ],
)
def test_kv_cache_bytes_per_token(name, size):
    assert kv_cache_bytes_per_token(MODELS[name]) == size
    assert kv_cache_bytes_per_token(MODELS[name], itemsize=0.5) == size / 4


def test_sharing_heads_divides_the_cache():
    config = MODELS["llama-2-7b"]
    for kv_heads in (1, 2, 8, 32):
        assert kv_cache_bytes_per_token(replace(config, kv_heads=kv_heads)) * 32 == 524_288 * kv_heads


def test_vllm_table_1_slots():
    assert kv_slots(12 * 2**30, MODELS["opt-13b"]) == 15_728
    opt_175b = gpt(96, 12288, 96, vocab=50272, context=2048)
    assert round(kv_slots(264 * 2**30, opt_175b) / 1e3, 1) == 60.1


@given(st.sampled_from(list(SMALL)), st.floats(1, 1e9), st.sampled_from((0.5, 1, 2, 4)))
def test_slots_fit_and_one_more_does_not(name, memory, itemsize):
    slots, token = kv_slots(memory, SMALL[name], itemsize), kv_cache_bytes_per_token(SMALL[name], itemsize)
    assert slots * token <= memory < (slots + 1) * token


# --- experts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "k"), [(4, 1), (4, 2), (5, 3), (3, 3)])
@pytest.mark.parametrize("tokens", [0, 1, 2, 3])
def test_expected_experts_by_enumeration(count, k, tokens):
    """Every way in which so many tokens can choose their sets."""
    sets = list(itertools.combinations(range(count), k))
    ways = list(itertools.product(sets, repeat=tokens))
    mean = Fraction(sum(len(set().union(*way)) for way in ways), len(ways))
    assert expected_experts(Experts(count, k, 8), tokens) == pytest.approx(float(mean), rel=1e-12)


def test_weights_read_by_enumeration():
    """Two tokens, two of four experts each, in each of the layers that have them: the mean over all choices."""
    expert = 3 * 16 * 12
    layers = MOE.expert_layers
    sets = [set(s) for s in itertools.combinations(range(4), 2)]
    read = [len(a | b) for a, b in itertools.product(sets, repeat=2)]
    mean = sum(read) / len(read)
    expected = parameters(MOE).total - layers * (4 - mean) * expert
    assert layers == 2
    assert weight_bytes_read(MOE, 2, itemsize=1) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v3"])
def test_one_token_reads_the_active_weights_and_many_read_all(name):
    config = MODELS[name]
    assert weight_bytes_read(config, 1) == pytest.approx(2 * parameters(config).active)
    assert weight_bytes_read(config, 10_000) == pytest.approx(weight_bytes(config))
    sizes = [weight_bytes_read(config, tokens) for tokens in (1, 2, 4, 8, 16, 32)]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("config", [GPT, replace(MOE, experts=replace(MOE.experts, per_token=4))])
def test_without_idle_experts_all_weights_are_read(config):
    assert weight_bytes_read(config, 1) == weight_bytes(config) == 2 * parameters(config).total


# --- a decode step ----------------------------------------------------------------------------------------------------


def attend(q, k, v):
    """(b, h, 1, d), (b, h_kv, s, d), (b, h_kv, s, dv) → (b, h, 1, dv)."""
    b, h, _, d = q.shape
    grouped = q.reshape(b, k.shape[1], h // k.shape[1], d)
    return (torch.softmax(grouped @ k.mT / math.sqrt(d), -1) @ v).reshape(b, h, 1, -1)


def decode(config: Config, batch: int, context: int) -> None:
    """One token a sequence through every product, with `context` cached keys; norms and rotations left out."""
    d, h = config.d_model, config.heads

    def mlp(x, d_ff):
        if config.activation == "gelu":
            return F.gelu(x @ torch.ones(d, d_ff)) @ torch.ones(d_ff, d)
        return F.silu(x @ torch.ones(d, d_ff)) * (x @ torch.ones(d, d_ff)) @ torch.ones(d_ff, d)

    x = torch.ones(batch, d)
    for layer in range(config.layers):
        if config.latent:
            m = config.latent
            q = (x @ torch.ones(d, m.query_rank)) @ torch.ones(m.query_rank, h * (m.nope_dim + m.rope_dim))
            q = q.view(batch, h, -1)
            cache = torch.ones(batch, context, m.kv_rank + m.rope_dim)
            cache[:, -1] = x @ torch.ones(d, m.kv_rank + m.rope_dim)
            out = absorbed(m, q, cache, torch.ones(h, m.nope_dim, m.kv_rank), torch.ones(h, m.kv_rank, m.value_dim))
        else:
            q = (x @ torch.ones(d, h * config.head_dim)).view(batch, h, 1, -1)
            keys, values = torch.ones(2, batch, config.kv_heads, context, config.head_dim)
            for cached in (keys, values):
                new = x @ torch.ones(d, config.kv_heads * config.head_dim)
                cached[:, :, -1] = new.view(batch, config.kv_heads, -1)
            out = attend(q, keys, values)
        out = out.reshape(batch, -1)
        x = x + out @ torch.ones(out.shape[1], d)
        if config.has_experts(layer):
            x @ torch.ones(d, config.experts.count)
            for _ in range(config.experts.per_token + config.experts.shared):
                x = x + mlp(x, config.experts.d_ff)
        else:
            x = x + mlp(x, config.d_ff)
    x @ torch.ones(d, config.vocab)


def absorbed(latent, q, cache, k_up, v_up):
    """Latent attention of one query over the compressed cache: (b, h, dq), (b, s, kv_rank + rope_dim) → (b, h, dv)."""
    q = torch.cat([torch.einsum("bhn,hnr->bhr", q[..., : latent.nope_dim], k_up), q[..., latent.nope_dim :]], -1)
    weights = torch.softmax(q @ cache.mT / math.sqrt(latent.nope_dim + latent.rope_dim), -1)
    return torch.einsum("bhr,hrv->bhv", weights @ cache[..., : latent.kv_rank], v_up)


def test_absorbed_projections_give_the_attention_of_expanded_keys():
    """The counted decode step of latent attention computes the right thing."""
    latent, heads, s = MLA.latent, 4, 9
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, cache = draw(2, heads, latent.nope_dim + latent.rope_dim), draw(2, s, latent.kv_rank + latent.rope_dim)
    k_up, v_up = draw(heads, latent.nope_dim, latent.kv_rank), draw(heads, latent.kv_rank, latent.value_dim)
    compressed, rotated = cache.split([latent.kv_rank, latent.rope_dim], -1)
    keys = torch.cat([torch.einsum("bsr,hnr->bhsn", compressed, k_up), rotated[:, None].expand(-1, heads, -1, -1)], -1)
    values = torch.einsum("bsr,hrv->bhsv", compressed, v_up)
    expanded = attend(q[:, :, None], keys, values)[:, :, 0]
    torch.testing.assert_close(absorbed(latent, q, cache, k_up, v_up), expanded)


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize(("batch", "context"), [(1, 1), (3, 20)])
def test_decode_flops_are_those_that_torch_counts(config, batch, context):
    with FlopCounterMode(display=False) as counter:
        decode(config, batch, context)
    assert decode_step(config, batch, context, 1e9).flops == counter.get_total_flops()


@pytest.mark.parametrize(("batch", "per_second"), [(1, 124.7), (64, 2689.5), (256, 3561.8)])
def test_llama_2_13b_on_an_h100(batch, per_second):
    step = decode_step(MODELS["llama-2-13b"], batch, 1024, H100_BANDWIDTH, peak=H100_PEAK)
    assert round(step.tokens_per_second, 1) == per_second
    assert step.side == "memory"
    assert step.weight_bytes == 2 * 13_015_864_320
    assert step.kv_bytes == batch * 1024 * 819_200


def test_llama_2_13b_one_sequence_milliseconds():
    config = MODELS["llama-2-13b"]
    assert round(1e3 * decode_step(config, 1, 1024, H100_BANDWIDTH).seconds, 3) == 8.021
    count = parameters(config)
    fewer = count.total - count.token_embedding + config.d_model  # one row is looked up
    assert round(1e3 * decode_step(config, 1, 1024, H100_BANDWIDTH, parameters=fewer).seconds, 3) == 7.923


def test_a_large_batch_is_bound_by_compute():
    config = MODELS["llama-3-8b"]
    sides = [
        decode_step(config, batch, 16, H100_BANDWIDTH, peak=H100_PEAK).side for batch in (1, 64, 256, 512, 1024, 4096)
    ]
    assert sides == sorted(sides, reverse=True)
    assert set(sides) == {"memory", "compute"}
    step = decode_step(config, 4096, 16, H100_BANDWIDTH, peak=H100_PEAK)
    assert step.seconds == pytest.approx(step.flops / H100_PEAK)


@given(
    st.sampled_from(list(SMALL)),
    st.integers(1, 64),
    st.integers(1, 63),
    st.integers(1, 8),
    st.sampled_from((None, 1e9, 1e12)),
)
def test_decode_is_a_bound_that_grows(name, batch, context, devices, peak):
    config, bandwidth = SMALL[name], 1e9
    step = decode_step(config, batch, context, bandwidth, peak=peak, devices=devices)
    assert step.seconds * devices * bandwidth >= (step.weight_bytes + step.kv_bytes) * (1 - 1e-12)
    assert step.tokens_per_second * step.seconds == pytest.approx(batch)
    if peak:
        assert step.seconds * devices * peak >= step.flops * (1 - 1e-12)
    else:
        assert step.side == "memory"
    alone = decode_step(config, batch, context, bandwidth, peak=peak)
    assert alone.seconds == pytest.approx(devices * step.seconds)  # shards sum to the whole
    for more in (
        decode_step(config, batch + 1, context, bandwidth, peak=peak),
        decode_step(config, batch, context + 1, bandwidth, peak=peak),
        decode_step(replace(config, layers=config.layers + 1), batch, context, bandwidth, peak=peak),
    ):
        assert more.seconds > alone.seconds
    wider = decode_step(config, batch, context, bandwidth, itemsize=4, kv_itemsize=1)
    assert wider.weight_bytes == 2 * step.weight_bytes
    assert 2 * wider.kv_bytes == step.kv_bytes


# --- prefill and memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_prefill_is_a_causal_forward_pass_with_one_row_of_logits(config):
    flops = forward_flops(config, 3, 20, causal=True, logits="last").total
    assert prefill_seconds(config, 3, 20, 1e12) == pytest.approx(flops / 1e12)
    assert prefill_seconds(config, 3, 20, 1e12, devices=4) == pytest.approx(flops / 4e12)
    slow = prefill_seconds(config, 3, 20, 1e12, hardware_bandwidth=1e3, devices=2)
    moved = weight_bytes_read(config, 60) + 60 * kv_cache_bytes_per_token(config)
    assert slow == pytest.approx(moved / 2e3)
    assert prefill_seconds(config, 3, 20, 1e12, hardware_bandwidth=1e15) == pytest.approx(flops / 1e12)


def test_prefill_of_a_long_prompt_costs_about_2n_flops_a_token():
    config = MODELS["llama-2-7b"]
    seconds = prefill_seconds(config, 1, 2048, 1e15, hardware_bandwidth=H100_BANDWIDTH)
    assert seconds * 1e15 / 2048 == pytest.approx(2 * parameters(config).total, rel=0.05)


@given(
    st.sampled_from(list(SMALL)),
    st.floats(1e4, 1e8),
    st.integers(1, 64),
    st.integers(1, 4),
    st.sampled_from((0.5, 1, 2, 4)),
)
def test_max_batch_fits_and_one_more_does_not(name, memory, context, devices, itemsize):
    config = SMALL[name]
    batch = max_batch(config, memory, context, itemsize=itemsize, kv_itemsize=itemsize, devices=devices)

    def needed(batch):
        return weight_bytes(config, itemsize) + batch * context * kv_cache_bytes_per_token(config, itemsize)

    assert batch >= 0
    assert needed(batch + 1) > devices * memory
    assert batch == 0 or needed(batch) <= devices * memory


def test_max_batch_of_a_model_that_does_not_fit_is_zero():
    assert max_batch(MODELS["llama-2-70b"], 80e9, 4096) == 0
    assert max_batch(MODELS["llama-2-70b"], 80e9, 4096, devices=2) == 16


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: kv_cache_bytes_per_token(GPT, itemsize=0), "itemsize"),
        (lambda: kv_slots(-1, GPT), "memory"),
        (lambda: weight_bytes(GPT, itemsize=-2), "itemsize"),
        (lambda: weight_bytes_read(GPT, 0), "tokens"),
        (lambda: expected_experts(MOE.experts, -1), "tokens"),
        (lambda: decode_step(GPT, 0, 1, 1e9), "batch"),
        (lambda: decode_step(GPT, 1, 0, 1e9), "context"),
        (lambda: decode_step(GPT, 1, 65, 1e9), r"context=65 is longer than the 64 positions.*context=65"),
        (lambda: decode_step(GPT, 1, 1, 0), "hardware_bandwidth"),
        (lambda: decode_step(GPT, 1, 1, math.nan), "hardware_bandwidth"),
        (lambda: decode_step(GPT, 1, 1, 1e9, peak=0), "peak"),
        (lambda: decode_step(GPT, 1, 1, 1e9, devices=0), "devices"),
        (lambda: decode_step(GPT, 1, 1, 1e9, kv_itemsize=0), "kv_itemsize"),
        (lambda: max_batch(GPT, 1e9, 1, kv_itemsize=-1), "kv_itemsize"),
        (lambda: prefill_seconds(GPT, 1, 1, 1e9, hardware_bandwidth=1e9, kv_itemsize=0), "kv_itemsize"),
        (lambda: decode_step(GPT, 1, 1, 1e9, parameters=-1), "parameters"),
        (lambda: prefill_seconds(GPT, 1, 65, 1e9), "seq=65"),
        (lambda: prefill_seconds(GPT, 1, 1, 0), "peak"),
        (lambda: prefill_seconds(GPT, 1, 1, 1e9, hardware_bandwidth=0), "hardware_bandwidth"),
        (lambda: max_batch(GPT, math.inf, 1), "memory"),
        (lambda: max_batch(GPT, 1e9, 65), "context=65"),
        (lambda: max_batch(GPT, 1e9, 1, devices=1.5), "devices"),
    ],
)
def test_errors_name_the_argument(call, named):
    with pytest.raises((ValueError, TypeError), match=named):
        call()
