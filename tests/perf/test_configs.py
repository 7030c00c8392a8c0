"""`mlsys.perf.configs`: what a record refuses, which layers have experts, and that nothing heavy is imported."""

import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from mlsys.perf.configs import MODELS, Config, Experts, LatentAttention, describe, gpt, llama

LATENT = LatentAttention(query_rank=0, kv_rank=8, nope_dim=6, rope_dim=4, value_dim=5)
GPT = gpt(2, 24, 3, vocab=50, context=16)


@pytest.mark.parametrize(
    ("layers", "first_dense", "interval", "having"),
    [
        (4, 0, 1, [0, 1, 2, 3]),
        (5, 2, 1, [2, 3, 4]),
        (6, 0, 2, [1, 3, 5]),
        (6, 1, 2, [2, 4]),
        (7, 3, 3, [5]),
        (2, 2, 1, []),
        (2, 5, 1, []),
        (2, 0, 3, []),
    ],
)
def test_layers_with_experts(layers, first_dense, interval, having):
    config = replace(GPT, layers=layers, experts=Experts(4, 2, 8, first_dense=first_dense, interval=interval))
    assert [layer for layer in range(layers) if config.has_experts(layer)] == having
    assert config.expert_layers == len(having)


def test_no_experts():
    assert GPT.expert_layers == 0
    assert not GPT.has_experts(0)


@pytest.mark.parametrize("name", ["vocab", "context", "layers", "d_model", "heads", "kv_heads", "head_dim", "d_ff"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "4", None])
def test_sizes_are_whole_numbers_above_zero(name, value):
    with pytest.raises((ValueError, TypeError), match=name):
        replace(GPT, **{name: value})


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: replace(GPT, kv_heads=2), "heads=3 is not a multiple of kv_heads=2"),
        (lambda: replace(GPT, norm="batchnorm"), "norm='batchnorm'.*rmsnorm"),
        (lambda: replace(GPT, activation="relu"), "activation='relu'.*gelu"),
        (lambda: replace(GPT, positions="alibi"), "positions='alibi'.*learned"),
        (lambda: replace(GPT, positions="rope", head_dim=7), "head_dim=7.*even"),
        (lambda: replace(GPT, rope_theta=0.0), "rope_theta"),
        (lambda: replace(GPT, norm_eps=-1e-5), "norm_eps"),
        (lambda: gpt(2, 25, 3), "d_model=25 is not a multiple of heads=3"),
        (lambda: llama(2, 25, 3, 40, vocab=9, context=9), "d_model=25 is not a multiple of heads=3"),
        (lambda: Experts(4, 5, 8), "per_token=5.*count=4"),
        (lambda: Experts(0, 0, 8), "count"),
        (lambda: Experts(4, 0, 8), "per_token"),
        (lambda: Experts(4, 2, 0), "d_ff"),
        (lambda: Experts(4, 2, 8, shared=-1), "shared"),
        (lambda: Experts(4, 2, 8, first_dense=-1), "first_dense"),
        (lambda: Experts(4, 2, 8, interval=0), "interval"),
        (lambda: replace(LATENT, query_rank=-1), "query_rank"),
        (lambda: replace(LATENT, kv_rank=0), "kv_rank"),
        (lambda: replace(LATENT, nope_dim=0), "nope_dim"),
        (lambda: replace(LATENT, rope_dim=0), "rope_dim"),
        (lambda: replace(LATENT, rope_dim=3), "rope_dim=3.*even"),
        (lambda: replace(LATENT, value_dim=2.5), "value_dim"),
    ],
)
def test_what_makes_no_model_is_refused(make, named):
    with pytest.raises((ValueError, TypeError), match=named):
        make()


def test_latent_attention_does_not_use_head_dim():
    assert replace(GPT, positions="rope", head_dim=7, latent=LATENT).latent is LATENT


def test_records_do_not_change_and_can_be_keys():
    with pytest.raises(FrozenInstanceError):
        GPT.layers = 3
    assert len({GPT, gpt(2, 24, 3, vocab=50, context=16), replace(GPT, layers=3)}) == 2


def test_families():
    config = gpt(3, 48, 4, bias=False)
    assert (config.d_ff, config.head_dim, config.kv_heads, config.tied, config.bias) == (192, 12, 4, True, False)
    config = llama(3, 48, 4, 100, vocab=9, context=9, kv_heads=2, tied=True)
    assert (config.norm, config.activation, config.positions) == ("rmsnorm", "swiglu", "rope")
    assert (config.d_ff, config.head_dim, config.kv_heads, config.tied, config.bias) == (100, 12, 2, True, False)
    assert llama(3, 48, 4, 100, vocab=9, context=9).kv_heads == 4


# layers, d_model, heads, kv_heads, head_dim, d_ff, vocab, context: as the sources print them
SHAPES = {
    "gpt2": (12, 768, 12, 12, 64, 3072, 50257, 1024),
    "gpt2-medium": (24, 1024, 16, 16, 64, 4096, 50257, 1024),
    "gpt2-large": (36, 1280, 20, 20, 64, 5120, 50257, 1024),
    "gpt2-xl": (48, 1600, 25, 25, 64, 6400, 50257, 1024),
    "gpt3": (96, 12288, 96, 96, 128, 49152, 50257, 2048),
    "opt-13b": (40, 5120, 40, 40, 128, 20480, 50272, 2048),
    "llama-2-7b": (32, 4096, 32, 32, 128, 11008, 32000, 4096),
    "llama-2-13b": (40, 5120, 40, 40, 128, 13824, 32000, 4096),
    "llama-2-70b": (80, 8192, 64, 8, 128, 28672, 32000, 4096),
    "llama-3-8b": (32, 4096, 32, 8, 128, 14336, 128256, 8192),
    "llama-3-70b": (80, 8192, 64, 8, 128, 28672, 128256, 8192),
    "mistral-7b": (32, 4096, 32, 8, 128, 14336, 32000, 8192),
    "mixtral-8x7b": (32, 4096, 32, 8, 128, 14336, 32000, 32768),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_named_models(name):
    c = MODELS[name]
    assert (c.layers, c.d_model, c.heads, c.kv_heads, c.head_dim, c.d_ff, c.vocab, c.context) == SHAPES[name]


def test_deepseek_v3():
    c = MODELS["deepseek-v3"]
    assert (c.layers, c.d_model, c.heads, c.d_ff, c.vocab) == (61, 7168, 128, 18432, 129280)
    assert c.latent == LatentAttention(query_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)
    assert c.experts == Experts(256, 8, 2048, shared=1, first_dense=3, router_bias=True)
    assert c.expert_layers == 58


@pytest.mark.parametrize("name", MODELS)
def test_named_models_have_a_source(name):
    config = MODELS[name]
    assert isinstance(config, Config)
    assert config.source
    assert name in SHAPES or name == "deepseek-v3"


def test_describe_leaves_out_what_says_nothing():
    described = describe(GPT)
    assert set(described) == {f.name for f in fields(Config)} - {"latent", "experts", "source"}
    assert described["d_model"] == 24
    assert described["bias"] is True
    assert describe(replace(GPT, bias=False))["bias"] is False
    assert describe(MODELS["deepseek-v3"])["latent"].kv_rank == 512


def test_counting_imports_neither_torch_nor_numpy():
    code = (
        "import sys; import mlsys.perf.transformer, mlsys.perf.inference as i; from mlsys.perf.configs import MODELS; "
        "i.decode_step(MODELS['deepseek-v3'], 1, 9, 1e9); print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
