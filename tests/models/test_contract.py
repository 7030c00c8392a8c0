"""The transformer's contract: a plain baseline passes on any seed, common ways to go wrong get a message that helps."""

import re

import pytest
import torch
from torch.nn import functional as F

from mlsys.contracts import check, find
from mlsys.contracts.models import _plain

CONTRACT = find("models.transformer")


def baseline(weights, config, tokens):
    """What a student would write first, with torch's own norms and attention."""

    def linear(name, x):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name, x):
        shape, weight = x.shape[-1:], weights[f"{name}.weight"]
        if config.norm == "rmsnorm":
            return F.rms_norm(x, shape, weight, config.norm_eps)
        return F.layer_norm(x, shape, weight, weights.get(f"{name}.bias"), config.norm_eps)

    t, d = tokens.shape[1], config.head_dim
    angle = torch.outer(torch.arange(t).double(), config.rope_theta ** -(torch.arange(0, d, 2).double() / d))
    cos, sin = (torch.cat((f(angle), f(angle)), -1) for f in (torch.cos, torch.sin))

    def turn(x):
        return x * cos.to(x) + torch.cat((-x[..., d // 2 :], x[..., : d // 2]), -1) * sin.to(x)

    x = weights["token_embedding.weight"][tokens]
    if config.positions == "learned":
        x = x + weights["position_embedding.weight"][:t]
    for layer in range(config.layers):
        block = f"blocks.{layer}"
        y = norm(f"{block}.attention_norm", x)
        q, k, v = (linear(f"{block}.attention.{n}", y).unflatten(-1, (-1, d)).transpose(1, 2) for n in "qkv")
        if config.positions == "rope":
            q, k = turn(q), turn(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + linear(f"{block}.attention.o", y.transpose(1, 2).flatten(2))
        y = norm(f"{block}.mlp_norm", x)
        up = linear(f"{block}.mlp.up", y)
        gated = config.activation == "swiglu"
        y = F.silu(linear(f"{block}.mlp.gate", y)) * up if gated else F.gelu(up, approximate="tanh")
        x = x + linear(f"{block}.mlp.down", y)
    return norm("norm", x) @ weights["token_embedding.weight" if config.tied else "head.weight"].T


@pytest.mark.parametrize("seed", range(3))
def test_a_plain_baseline_passes(seed):
    verdict = check(CONTRACT, baseline, seed=1000 * seed)
    assert verdict.passed, verdict


@pytest.mark.parametrize("seed", range(3))
def test_the_code_behind_the_wrong_variants_passes_without_a_mistake(seed):
    verdict = check(CONTRACT, _plain, seed=1000 * seed)
    assert verdict.passed, verdict


@pytest.mark.parametrize("name", CONTRACT.wrong)
def test_wrong_variants_are_named_on_another_seed_too(name):
    failure = check(CONTRACT, CONTRACT.wrong[name].impl, seed=1000).failure
    assert failure is not None
    assert failure.like == name


HELPFUL = {
    "an array": (lambda w, c, x: baseline(w, c, x).numpy(), "returned ndarray, expected a tensor of logits"),
    "float32": (lambda w, c, x: baseline(w, c, x).float(), r"returned torch\.float32 for weights of torch\.float64"),
    "last position": (lambda w, c, x: baseline(w, c, x)[:, -1], "shape"),
    "probabilities": (lambda w, c, x: baseline(w, c, x).softmax(-1), "largest error"),
    "no config": (lambda w, x: x, "cannot be called as forward.weights, config, tokens.: too many positional"),
    "name": (lambda w, c, x: w["embedding"], "raised KeyError: 'embedding'"),
    "in place": (lambda w, c, x: (baseline(w, c, x), w["norm.weight"].add_(1))[0], "modified its argument weights"),
}


@pytest.mark.parametrize("name", HELPFUL)
def test_other_mistakes_are_told_plainly(name):
    impl, message = HELPFUL[name]
    failure = check(CONTRACT, impl).failure
    assert failure is not None
    assert re.search(message, failure.message), failure.message


def test_the_weights_print_in_a_line():
    failure = check(CONTRACT, lambda w, c, x: w).failure
    assert failure.shapes["weights"] == "20 tensors by name"
