"""`mlsys.perf.tensor_parallel`: shards sum to the whole, the cut computes the same, and the bytes are counted."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys.perf import tensor_parallel
from mlsys.perf.collectives import cost
from mlsys.perf.configs import MODELS, Config, Experts, gpt

DENSE = {name: config for name, config in MODELS.items() if config.experts is None and config.latent is None}


# --- parameters -------------------------------------------------------------------------------------------------------


def matrices(config, vocab):
    """Every array of the model as (name, shape, axis along which it is cut, or None), layer by layer."""
    d, h, kv = config.d_model, config.heads * config.head_dim, config.kv_heads * config.head_dim
    yield "token embedding", (vocab, d), 0
    if config.positions == "learned":
        yield "position embedding", (config.context, d), None
    norms = ["scale"] + ["shift"] * (config.norm == "layernorm" and config.bias)
    for _ in range(config.layers):
        for name in norms * 2:
            yield name, (d,), None
        for width in (h, kv, kv):
            yield "query, key or value", (d, width), 1
            if config.bias:
                yield "its bias", (width,), 0
        yield "attention output", (h, d), 0
        for _ in range(2 if config.activation == "swiglu" else 1):
            yield "up or gate", (d, config.d_ff), 1
            if config.bias:
                yield "its bias", (config.d_ff,), 0
        yield "down", (config.d_ff, d), 0
        if config.bias:
            yield "biases after the sums", (2 * d,), None
    for name in norms:
        yield name, (d,), None
    if not config.tied:
        yield "output", (d, vocab), 1


def counted(config, tp):
    """Numbers of the model, and of one device, array by array."""
    whole = sum(math.prod(shape) for _, shape, _ in matrices(config, config.vocab))
    device = 0
    for name, shape, axis in matrices(config, -(-config.vocab // tp) * tp):
        if axis is not None:
            assert shape[axis] % tp == 0, name
        device += math.prod(shape) // (1 if axis is None else tp)
    return whole, device


@st.composite
def configs(draw, tp=1):
    kv = tp * draw(st.integers(1, 3))
    return Config(
        vocab=draw(st.integers(1, 1000)),
        context=draw(st.integers(1, 64)),
        layers=draw(st.integers(1, 4)),
        d_model=8 * draw(st.integers(1, 8)),
        heads=kv * draw(st.integers(1, 3)),
        kv_heads=kv,
        head_dim=2 * draw(st.integers(1, 8)),
        d_ff=tp * draw(st.integers(1, 50)),
        norm=draw(st.sampled_from(["layernorm", "rmsnorm"])),
        activation=draw(st.sampled_from(["gelu", "swiglu"])),
        positions=draw(st.sampled_from(["learned", "rope"])),
        tied=draw(st.booleans()),
        bias=draw(st.booleans()),
    )


@given(data=st.data(), tp=st.integers(1, 9))
def test_shards_are_counted_and_sum_to_the_whole(data, tp):
    config = data.draw(configs(tp))
    shard = tensor_parallel.shard_parameters(config, tp)
    whole, device = counted(config, tp)
    assert shard.total == device
    assert shard.whole == whole


@pytest.mark.parametrize(
    ("name", "parameters"), [("gpt2", 124_439_808), ("llama-2-7b", 6_738_415_616), ("llama-3-8b", 8_030_261_248)]
)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_shards_sum_to_published_counts(name, parameters, tp):
    shard = tensor_parallel.shard_parameters(MODELS[name], tp)
    assert shard.whole == parameters
    assert parameters / tp <= shard.total <= parameters / tp + shard.replicated + shard.padding


@pytest.mark.parametrize("name", DENSE)
def test_one_device_has_everything(name):
    shard = tensor_parallel.shard_parameters(DENSE[name], 1)
    assert shard.total == shard.whole
    assert shard.padding == 0


def test_an_odd_vocabulary_is_padded():
    shard = tensor_parallel.shard_parameters(MODELS["gpt2"], 4)  # 50,257 rows become 50,260
    assert shard.token_embedding == 50_260 // 4 * 768
    assert shard.padding == 3 * 768
    assert tensor_parallel.shard_parameters(replace(MODELS["gpt2"], tied=False), 4).padding == 2 * 3 * 768


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_columns_then_rows_needs_one_sum(tp):
    """The identity that the layout rests on, for an MLP with a nonlinearity."""
    generator = np.random.default_rng(0)
    x, a, b = (generator.standard_normal(shape) for shape in ((5, 8), (8, 16), (16, 8)))
    shares = [np.tanh(x @ a_i) @ b_i for a_i, b_i in zip(np.split(a, tp, axis=1), np.split(b, tp, axis=0))]
    np.testing.assert_allclose(sum(shares), np.tanh(x @ a) @ b)


# --- bytes ------------------------------------------------------------------------------------------------------------

SIZES = st.integers(1, 64)


@given(batch=SIZES, seq=SIZES, d_model=SIZES, tp=st.integers(1, 16))
def test_published_volume(batch, seq, d_model, tp):
    bsh = batch * seq * tp * d_model
    for sequence_parallel, multiple in ((False, 8), (True, 10)):
        got = tensor_parallel.elements_per_layer(batch, seq * tp, d_model, tp, sequence_parallel=sequence_parallel)
        assert got == pytest.approx(multiple * bsh * (tp - 1) / tp)
        full = tensor_parallel.elements_per_layer(
            batch, seq * tp, d_model, tp, sequence_parallel=sequence_parallel, recompute="full"
        )
        assert full == pytest.approx((multiple + 4) * bsh * (tp - 1) / tp)


def test_bytes_are_elements_times_their_size():
    elements = tensor_parallel.elements_per_layer(1, 2048, 12288, 8)
    assert elements == 7 * 2048 * 12288
    traffic = tensor_parallel.layer_traffic(1, 2048, 12288, 8, itemsize=2)
    assert traffic.total == 2 * elements
    assert traffic.forward_bytes == traffic.backward_bytes == elements
    parallel = tensor_parallel.layer_traffic(1, 2048, 12288, 8, sequence_parallel=True)
    assert parallel.forward_bytes == traffic.forward_bytes
    assert parallel.backward_bytes == pytest.approx(1.5 * traffic.backward_bytes)


def test_selective_recomputation_sends_nothing():
    for sequence_parallel in (False, True):
        none, selective = (
            tensor_parallel.layer_traffic(1, 16, 8, 4, sequence_parallel=sequence_parallel, recompute=recompute)
            for recompute in ("none", "selective")
        )
        assert none == selective


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_model_is_its_layers_and_its_ends(sequence_parallel):
    config, tp, batch, seq = gpt(6, 64, 8, vocab=96, context=32), 4, 3, 32
    options = {"sequence_parallel": sequence_parallel, "recompute": "full"}
    model = tensor_parallel.model_traffic(config, batch, seq, tp, **options)
    layer = tensor_parallel.layer_traffic(batch, seq, 64, tp, **options)
    one_pass = batch * seq * 64 * 2 * (tp - 1) / tp  # an all-gather or a reduce-scatter of activations
    loss = 3 * 2 * batch * seq * 4 * (tp - 1) / tp
    assert model.forward_bytes == pytest.approx(6 * layer.forward_bytes + 2 * one_pass + loss)
    assert model.backward_bytes == pytest.approx(6 * layer.backward_bytes + (3 if sequence_parallel else 2) * one_pass)


@given(tp=st.integers(2, 16), alpha=st.floats(0, 1e-3), beta=st.floats(0, 1e-8))
def test_seconds_are_those_of_the_rings(tp, alpha, beta):
    traffic = tensor_parallel.layer_traffic(2, 8 * tp, 16, tp, sequence_parallel=True)
    size = 2 * 8 * tp * 16 * 2
    gather, scatter = (cost(name, "ring", tp, size).seconds(alpha, beta) for name in ("all_gather", "reduce_scatter"))
    assert traffic.seconds(alpha, beta) == pytest.approx((2 + 4) * gather + (2 + 2) * scatter)


@given(batch=SIZES, seq=SIZES, d_model=SIZES, tp=st.integers(1, 16))
def test_more_devices_send_more_and_one_sends_nothing(batch, seq, d_model, tp):
    def sent(n):
        return tensor_parallel.layer_traffic(batch, seq, d_model, n).total

    assert sent(1) == 0
    assert sent(tp) < sent(tp + 1)
    assert tensor_parallel.layer_traffic(2 * batch, seq, d_model, tp).total == pytest.approx(2 * sent(tp))


BAD = {
    "heads": (gpt(1, 12, 3), 2, "config.heads=3 is not a multiple of tp=2: take a tp that divides 3"),
    "kv heads": (MODELS["llama-3-8b"], 16, "config.kv_heads=8 is not a multiple of tp=16: .* or copy key/value heads"),
    "d_ff": (replace(gpt(1, 16, 8), d_ff=30), 4, "config.d_ff=30 is not a multiple of tp=4"),
    "experts": (replace(gpt(1, 16, 8), experts=Experts(4, 2, 16)), 2, "config.experts: only plain"),
    "latent": (MODELS["deepseek-v3"], 2, "config.latent: only plain"),
    "tp": (gpt(1, 16, 8), 0, "tp must be at least 1, got 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_configs_are_named(name):
    config, tp, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        tensor_parallel.shard_parameters(config, tp)
    with pytest.raises(ValueError, match=message):
        tensor_parallel.model_traffic(config, 1, 64, tp)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="seq=10 is not a multiple of tp=4, as sequence parallelism needs"):
        tensor_parallel.layer_traffic(1, 10, 8, 4, sequence_parallel=True)
    with pytest.raises(ValueError, match="recompute='ful' is not known; did you mean 'full'"):
        tensor_parallel.layer_traffic(1, 8, 8, 4, recompute="ful")
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        tensor_parallel.elements_per_layer(0, 8, 8, 4)
