"""`mlsys.perf.transformer` against published figures, and modules that torch counts: numel, FLOPs, optimizer state."""

import doctest
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mlsys.loading import import_file
from mlsys.perf import transformer
from mlsys.perf.configs import MODELS, Config
from mlsys.perf.transformer import (
    backward_flops,
    forward_flops,
    key_value_dims,
    megatron_flops,
    megatron_training_days,
    mfu,
    optimizer_bytes,
    palm_flops_per_token,
    parameters,
    state_bytes,
    token_count,
    training_flops,
    training_seconds,
)

oracle = import_file(Path(__file__).parent / "oracle.py")


def numel(config):
    with torch.device("meta"):
        return sum(p.numel() for p in oracle.Model(config).parameters())


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


# --- parameters -------------------------------------------------------------------------------------------------------

# All parameters of the released weights. DeepSeek-V3 without the multi-token-prediction module; OPT-13B's file holds
# 12,853,473,280: two rows of positions more than the record has.
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt3": 174_604_259_328,  # not released; Table D.1 prints 174,600 million
    "opt-13b": 12_853_473_280 - 2 * 5120,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v3": 671_026_419_200,
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_of_named_models_are_the_published_ones(name):
    assert parameters(MODELS[name]).total == PUBLISHED[name]


@pytest.mark.parametrize("name", [name for name, config in MODELS.items() if not config.experts])
def test_parameters_of_named_models_are_those_of_the_module(name):
    assert parameters(MODELS[name]).total == numel(MODELS[name])


@pytest.mark.parametrize("config", oracle.SMALL.values(), ids=oracle.SMALL)
def test_parameters_of_each_kind_are_those_of_the_module(config):
    assert parameters(config).total == numel(config)


@given(oracle.configs())
@settings(max_examples=60)
def test_parameters_of_any_config_are_those_of_the_module(config):
    count = parameters(config)
    assert count.total == numel(config)
    assert count.total == sum(getattr(count, f.name) for f in fields(count)) - count.idle
    assert 0 <= count.idle <= count.experts


def test_parameters_part_by_part():
    with torch.device("meta"):
        model = oracle.Model(oracle.MLA)

    def held(*names):
        return sum(p.numel() for name, p in model.named_parameters() if any(n in name for n in names))

    count = parameters(oracle.MLA)
    assert count.token_embedding == held("tokens")
    assert count.output == held("output")
    assert count.norms == held("norm")
    assert count.attention == held("attention") - held("attention.q_norm", "attention.kv_norm")
    assert count.router == held("router", "balance")
    assert count.experts == held("mlp.experts", "mlp.shared")
    assert count.mlp == held("blocks.0.mlp")
    assert count.idle * 2 == count.experts  # three of six, none shared
    assert count.position_embedding == 0


def test_active_and_embedding_counts():
    mixtral, deepseek = parameters(MODELS["mixtral-8x7b"]), parameters(MODELS["deepseek-v3"])
    assert mixtral.active == 12_879_925_248
    assert round(deepseek.active / 1e9, 1) == 37.6
    assert round((deepseek.active - deepseek.token_embedding) / 1e9, 1) == 36.6
    gpt2 = parameters(MODELS["gpt2"])
    assert gpt2.active == gpt2.total
    assert gpt2.output == 0
    assert gpt2.non_embedding == 12 * (12 * 768**2 + 13 * 768) + 2 * 768
    assert gpt2.total - gpt2.position_embedding == 123_653_376  # what nanoGPT prints, with biases and without padding
    assert parameters(replace(MODELS["gpt2"], bias=False)).total == 124_337_664


# --- FLOPs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", oracle.SMALL.values(), ids=oracle.SMALL)
@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (3, 7)])
def test_flops_are_those_that_torch_counts(config, batch, seq):
    torch.manual_seed(0)
    model, tokens = oracle.Model(config), oracle.draw_tokens(config, batch, seq)
    assert forward_flops(config, batch, seq).total == counted(lambda: model(tokens))
    assert forward_flops(config, batch, seq, logits="last").total == counted(lambda: model(tokens, last=True))
    result = oracle.loss(model, tokens)
    assert backward_flops(config, batch, seq).total == counted(result.backward)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("config", [oracle.GPT, oracle.GQA, oracle.MOE, oracle.MLA], ids=["gpt", "gqa", "moe", "mla"])
def test_training_flops_with_recomputation_are_those_that_torch_counts(config, recompute):
    torch.manual_seed(0)
    model, tokens = oracle.Model(config), oracle.draw_tokens(config, 2, 5)
    model.recompute = recompute
    expected = counted(lambda: oracle.loss(model, tokens).backward())
    assert training_flops(config, 2, 5, recompute=recompute).total == expected


def test_flops_part_by_part():
    flops = forward_flops(oracle.MOE, 2, 8)
    tokens = 2 * 8
    assert flops.attention_projections == 2 * tokens * 5 * 4 * 16 * 16
    assert flops.attention_scores == 2 * (2 * 8 * 8 * 16) * 2 * 5  # two products of b·t·t·h, five layers
    assert flops.mlp == 2 * tokens * 3 * 16 * (3 * 24 + 2 * 3 * 12)  # three plain layers, two with three experts
    assert flops.router == 2 * tokens * 2 * 16 * 4
    assert flops.logits == 2 * tokens * 16 * 50
    assert flops.embedding == 0
    assert flops.total == sum(getattr(flops, f.name) for f in fields(flops))


def test_widths_of_keys_and_values_and_numbers_of_tokens():
    assert key_value_dims(oracle.GQA) == (4, 4)
    assert key_value_dims(oracle.MLA) == (6 + 4, 5)  # a key has a part that is rotated
    assert token_count(oracle.GPT, 3, 16) == 48
    assert token_count(oracle.GQA, 3, 17) == 51  # rotary positions do not end


@given(oracle.configs(), st.integers(1, 4), st.integers(1, 31))
def test_costs_grow_with_batch_sequence_and_layers(config, batch, seq):
    deeper = replace(config, layers=config.layers + 1)
    for cost in (forward_flops, training_flops):
        here = cost(config, batch, seq)
        assert cost(config, batch + 1, seq).total > here.total
        assert cost(config, batch, seq + 1).total > here.total
        assert cost(deeper, batch, seq).total > here.total
        assert cost(config, 2 * batch, seq) == 2 * here
    assert parameters(deeper).total > parameters(config).total


@given(oracle.configs(), st.integers(1, 4), st.integers(1, 32))
def test_causal_counts_the_pairs_that_the_mask_leaves(config, batch, seq):
    full, half = forward_flops(config, batch, seq), forward_flops(config, batch, seq, causal=True)
    pairs = sum(1 for query in range(seq) for key in range(seq) if key <= query)
    assert half.attention_scores * seq * seq == full.attention_scores * pairs
    assert replace(half, attention_scores=0) == replace(full, attention_scores=0)
    assert training_flops(config, batch, seq, causal=True) == 3 * half


def test_nanogpt_figures():
    config = replace(MODELS["gpt2"], bias=False)
    assert forward_flops(config, 1, 1024).total == 291_648_307_200
    assert palm_flops_per_token(config, 1024) * 1024 == 875_062_886_400
    per_second = 100 * 1024 / 0.755  # transformer_sizing.ipynb: batches of 100 in 755 ms on an A100
    flops = training_flops(config, 1, 1024).total / 1024
    assert mfu(per_second, flops, 312e12) == pytest.approx(0.3714, abs=5e-5)


def test_palm_540b_utilization():
    """Appendix B: 238.3 K tokens/s on 6,144 chips of 275 TFLOP/s is 46.2%, 45.7% without attention."""
    palm = Config(
        vocab=256_000, context=2048, layers=118, d_model=18432, heads=48, kv_heads=1, head_dim=256, d_ff=4 * 18432,
        activation="swiglu", positions="rope", bias=False,
    )  # fmt: skip
    assert parameters(palm).total == pytest.approx(540.35e9, rel=2e-5)  # its block has one norm, not two
    assert round(100 * mfu(238_300, palm_flops_per_token(palm, 2048), 6144 * 275e12), 1) == 46.2
    assert round(100 * mfu(238_300, 6 * parameters(palm).total, 6144 * 275e12), 1) == 45.7


@pytest.mark.parametrize("name", ["gpt2", "gpt3", "llama-3-8b", "mixtral-8x7b", "deepseek-v3"])
def test_palm_formula_is_a_little_above_the_products(name):
    config = MODELS[name]
    count, seq = parameters(config), 512
    exact = training_flops(config, 1, seq).total / seq
    beyond = count.norms + (0 if config.tied else count.token_embedding)
    if config.bias:
        beyond += config.layers * (3 * config.d_model + config.d_model + config.d_ff + config.d_model)
    if config.experts and config.experts.router_bias:
        beyond += config.expert_layers * config.experts.count
    assert palm_flops_per_token(config, seq) - exact == pytest.approx(6 * beyond)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_megatron_formula_is_the_exact_count(recompute):
    config = MODELS["gpt3"]
    exact = training_flops(config, 4, 2048, recompute=recompute).total
    assert megatron_flops(config, 4, 2048, recompute) == pytest.approx(exact, rel=1e-12)


def test_megatron_days():
    assert round(megatron_training_days(175e9, 300e9, 1024, 140e12), 1) == 33.9
    assert round(megatron_training_days(1e12, 450e9, 3072, 163e12), 1) == 83.2


# --- state and time ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "mixed", "per_parameter", "optimizer"),
    [
        ("adam", True, 16, 12),
        ("adam", False, 16, 8),
        ("momentum", True, 12, 8),
        ("momentum", False, 12, 4),
        ("sgd", True, 8, 4),
        ("sgd", False, 8, 0),
    ],
)
def test_state_bytes(kind, mixed, per_parameter, optimizer):
    state = state_bytes(1000, kind=kind, mixed=mixed)
    assert state.total == 1000 * per_parameter
    assert state.optimizer == optimizer_bytes(1000, kind=kind, mixed=mixed) == 1000 * optimizer
    assert state.weights == state.gradients == 1000 * (2 if mixed else 4)


@pytest.mark.parametrize(("kind", "lr"), [("adam", {}), ("momentum", {"momentum": 0.9}), ("sgd", {})])
def test_state_bytes_are_those_of_torch_in_float32(kind, lr):
    model = oracle.Model(oracle.GPT)
    make = torch.optim.Adam if kind == "adam" else torch.optim.SGD
    optimizer = make(model.parameters(), lr=1e-3, **lr)
    oracle.loss(model, oracle.draw_tokens(oracle.GPT, 1, 4)).backward()
    optimizer.step()
    held = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v) and v.ndim > 0]
    assert sum(v.numel() * v.element_size() for v in held) == optimizer_bytes(
        parameters(oracle.GPT), kind=kind, mixed=False
    )
    gradients = sum(p.grad.numel() * 4 for p in model.parameters())
    assert gradients == state_bytes(parameters(oracle.GPT), kind=kind, mixed=False).gradients


def test_zero_paper_state_of_7_5_billion():
    assert state_bytes(7_500_000_000).total == 120e9


def test_training_seconds_and_mfu_are_inverse():
    """At a utilization u of the peak, tokens/s times seconds is the number of tokens."""
    per_token, tokens, devices, peak = 6e9, 20e9, 8, 1e14
    seconds = training_seconds(per_token * tokens, devices, 0.4 * peak)
    assert mfu(tokens / seconds, per_token, devices * peak) == pytest.approx(0.4)


# --- errors and documentation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: forward_flops(oracle.GPT, 0, 4), "batch"),
        (lambda: forward_flops(oracle.GPT, 1, -4), "seq"),
        (lambda: forward_flops(oracle.GPT, 1.5, 4), "batch"),
        (lambda: forward_flops(oracle.GPT, True, 4), "batch"),
        (lambda: forward_flops(oracle.GPT, 1, 17), r"seq=17 is longer than the 16 positions.*context=17"),
        (lambda: forward_flops(oracle.GPT, 1, 4, logits="first"), "logits='first'.*last"),
        (lambda: training_flops(oracle.GPT, 1, 4, recompute="some"), "recompute='some'.*selective"),
        (lambda: megatron_flops(oracle.GPT, 1, 4, "some"), "recompute"),
        (lambda: megatron_flops(oracle.GQA, 1, 4), "not a GPT block.*training_flops"),
        (lambda: megatron_flops(replace(oracle.GPT, d_ff=95), 1, 4), "not a GPT block"),
        (lambda: palm_flops_per_token(oracle.GPT, 0), "seq"),
        (lambda: state_bytes(-1), "parameters"),
        (lambda: state_bytes(1, kind="lion"), "kind='lion'.*adam"),
        (lambda: mfu(0, 1, 1), "tokens_per_second"),
        (lambda: mfu(1, math.nan, 1), "flops_per_token"),
        (lambda: mfu(1, 1, math.inf), "peak"),
        (lambda: training_seconds(1e9, 0, 1e9), "devices"),
        (lambda: training_seconds(1e9, 1, -1e9), "flops_per_device"),
        (lambda: megatron_training_days(0, 1, 1, 1), "parameters"),
        (lambda: megatron_training_days("many", 1, 1, 1), "parameters"),
    ],
)
def test_errors_name_the_argument(call, named):
    with pytest.raises((ValueError, TypeError), match=named):
        call()


def test_examples_in_the_documentation():
    page = Path(__file__).parents[2] / "docs" / "perf" / "transformer.md"
    result = doctest.testfile(str(page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 10
    assert result.failed == 0
    assert transformer.SECONDS_PER_DAY == 24 * 60 * 60
