"""`mlsys.models.transformer` is the model its config describes, whatever the attention, the cache and the dtype."""

import json
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mlsys.attention import flash, naive
from mlsys.contracts import models as contract
from mlsys.models._layers import rotate, rotation
from mlsys.models.transformer import Config, KVCache, Transformer, generate, init, load, save
from mlsys.perf import inference
from mlsys.perf import transformer as perf
from mlsys.perf.configs import MODELS, gpt, llama

DENSE = [name for name, config in MODELS.items() if config.latent is None and config.experts is None]
GPT = gpt(2, 12, 3, vocab=19, context=16)
LLAMA = llama(2, 16, 4, 24, vocab=19, context=16, kv_heads=2)
BOTH = pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])


def build(config, seed=0, dtype=torch.float64, **options):
    """A model whose weights are large enough, norms and biases included, that every part of it matters."""
    model = Transformer(config, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.copy_(drawn / weight.shape[-1] ** 0.5 if weight.ndim == 2 else name.endswith("weight") + drawn / 3)
    return model


def draw(config, t, b=2, seed=0):
    return torch.randint(config.vocab, (b, t), generator=torch.Generator().manual_seed(seed))


def sdpa(q, k, v, *, causal):
    """Torch's attention, whose own causal mask is aligned top-left where keys outnumber queries."""
    t, s = q.shape[2], k.shape[2]
    visible = torch.ones(t, s, dtype=torch.bool).tril(s - t) if causal else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)


@st.composite
def configs(draw):
    """Small dense configs of every kind, also such as no paper has."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return Config(
        vocab=draw(st.integers(2, 20)),
        context=draw(st.integers(6, 12)),
        layers=draw(st.integers(1, 3)),
        d_model=draw(st.integers(1, 12)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 4)),
        d_ff=draw(st.integers(1, 20)),
        norm=draw(st.sampled_from(["layernorm", "rmsnorm"])),
        activation=draw(st.sampled_from(["gelu", "swiglu"])),
        positions=draw(st.sampled_from(["learned", "rope"])),
        tied=draw(st.booleans()),
        bias=draw(st.booleans()),
        rope_theta=draw(st.sampled_from([100.0, 10_000.0])),
        norm_eps=draw(st.sampled_from([1e-5, 1e-2])),
    )


# --- the numbers ------------------------------------------------------------------------------------------------------


@given(config=configs(), t=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_equals_the_oracle_for_any_config(config, t, seed):
    model = build(config, seed)
    tokens = draw(config, t, seed=seed)
    want = contract.oracle({"weights": model.state_dict(), "config": config, "tokens": tokens})["logits"]
    torch.testing.assert_close(model(tokens), torch.from_numpy(want), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("attention", [flash.attention, partial(flash.attention, block_q=2, block_k=3), sdpa])
@BOTH
def test_any_attention_gives_the_same_logits_and_gradients(config, attention):
    tokens, targets = draw(config, 9), draw(config, 9, seed=1)
    models = build(config), build(config, attention=attention)
    losses = [model.loss(tokens, targets) for model in models]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    wanted, got = (dict(model.named_parameters()) for model in models)
    for name, weight in wanted.items():
        # a softmax takes no notice of what all keys share: the gradient of their bias is 0 but for rounding
        assert weight.grad.abs().max() > 1e-6 or name.endswith("k.bias")
        torch.testing.assert_close(got[name].grad, weight.grad, rtol=1e-7, atol=1e-12, msg=name)


@BOTH
def test_gradient_by_finite_differences(config):
    """The directional derivative of the loss along a random direction of all weights."""
    model, tokens, targets = build(config), draw(config, 6), draw(config, 6, seed=1)
    model.loss(tokens, targets).backward()
    generator = torch.Generator().manual_seed(2)
    weights = list(model.parameters())
    along = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]
    slope = sum((w.grad * a).sum() for w, a in zip(weights, along, strict=True))

    def moved(step):
        with torch.no_grad():
            for w, a in zip(weights, along, strict=True):
                w += step * a
            loss = model.loss(tokens, targets)
            for w, a in zip(weights, along, strict=True):
                w -= step * a
        return loss

    torch.testing.assert_close(slope, (moved(1e-5) - moved(-1e-5)) / 2e-5, rtol=1e-6, atol=1e-8)


@given(config=configs(), data=st.data())
@settings(max_examples=30)
def test_a_token_changes_no_logit_before_it_and_some_from_it_on(config, data):
    model = build(config)
    t = data.draw(st.integers(2, 6))
    j = data.draw(st.integers(0, t - 1))
    tokens = draw(config, t, b=1)
    changed = tokens.clone()
    changed[0, j] = (tokens[0, j] + 1) % config.vocab
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :j], after[:, :j])
    if config.d_model > 2:  # a norm of one or two numbers leaves only their signs
        assert not torch.equal(before[:, j:], after[:, j:])


@BOTH
def test_sequences_of_a_batch_do_not_meet(config):
    model, tokens = build(config), draw(config, 7, b=3)
    alone = torch.cat([model(row[None]) for row in tokens])
    torch.testing.assert_close(model(tokens), alone)


def test_grouped_heads_are_heads_with_repeated_keys_and_values():
    grouped, full = build(LLAMA), build(replace(LLAMA, kv_heads=LLAMA.heads))
    weights = grouped.state_dict()
    for name, weight in weights.items():
        if name.endswith(("attention.k.weight", "attention.v.weight")):
            by_head = weight.unflatten(0, (LLAMA.kv_heads, LLAMA.head_dim))
            weights[name] = by_head.repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    tokens = draw(LLAMA, 8)
    torch.testing.assert_close(full(tokens), grouped(tokens))


def test_tied_output_is_the_embedding():
    tied, untied = build(GPT), build(replace(GPT, tied=False))
    untied.load_state_dict(tied.state_dict() | {"head.weight": tied.token_embedding.weight})
    tokens = draw(GPT, 5)
    torch.testing.assert_close(untied(tokens), tied(tokens))
    assert "head.weight" not in tied.state_dict()


@BOTH
def test_loss_is_the_mean_surprise_in_nats(config):
    model, tokens, targets = build(config), draw(config, 5), draw(config, 5, seed=1)
    probabilities = model(tokens).softmax(-1)
    surprise = [-probabilities[b, i, targets[b, i]].log() for b in range(2) for i in range(5)]
    torch.testing.assert_close(model.loss(tokens, targets), torch.stack(surprise).mean())


@BOTH
def test_bfloat16_is_as_near_as_16_bits_can_be(config):
    model = build(config)
    half = Transformer(config, dtype=torch.bfloat16)
    half.load_state_dict(model.state_dict())
    model.load_state_dict(half.state_dict())  # the same rounded weights
    tokens = draw(config, 12)
    want, got = model(tokens), half(tokens)
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).abs().max() < 0.05 * want.abs().max()
    loss = half.loss(tokens, tokens)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), model.loss(tokens, tokens), rtol=0.05, atol=0.05)
    loss.backward()
    assert all(weight.grad.dtype == torch.bfloat16 for weight in half.parameters())


def test_int32_tokens_and_targets_count_too():
    model, tokens = build(GPT), draw(GPT, 5)
    torch.testing.assert_close(model(tokens.int()), model(tokens))
    torch.testing.assert_close(model.loss(tokens.int(), tokens.int()), model.loss(tokens, tokens))


def test_a_layer_with_some_of_the_heads_computes_their_share():
    """What tensor parallelism needs: heads' rows of q, k, v and their columns of o add up to the whole."""
    whole = build(replace(LLAMA, layers=1)).blocks[0].attention
    x = torch.randn(2, 5, LLAMA.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shares = []
    for rank in range(2):
        part = build(replace(LLAMA, layers=1, heads=2, kv_heads=1)).blocks[0].attention
        for name in "qkv":
            getattr(part, name).weight.data = getattr(whole, name).weight.chunk(2, dim=0)[rank]
        part.o.weight.data = whole.o.weight.chunk(2, dim=1)[rank]
        shares.append(part(x, None, None, 0))
    torch.testing.assert_close(sum(shares), whole(x, None, None, 0))


# --- rotary positions -------------------------------------------------------------------------------------------------


@given(d=st.integers(1, 8).map(lambda n: 2 * n), shift=st.integers(0, 100_000), gap=st.integers(-50, 50))
def test_rotated_products_depend_on_the_distance_only(d, shift, gap):
    generator = torch.Generator().manual_seed(d)
    q, k = (torch.randn(1, 1, 1, d, dtype=torch.float64, generator=generator) for _ in "qk")

    def product(i, j):
        turned = [rotate(x, *rotation(torch.tensor([at]), d, 10_000.0)) for x, at in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product(shift + 50, shift + 50 + gap), product(50, 50 + gap), rtol=1e-9, atol=1e-9)


@given(d=st.integers(1, 8).map(lambda n: 2 * n), position=st.integers(0, 100_000))
def test_a_rotation_keeps_the_norm_and_position_0_keeps_all(d, position):
    x = torch.randn(2, 3, 2, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d))
    turned = rotate(x, *rotation(torch.tensor([0, position]), d, 500.0))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])


def test_rotation_by_hand():
    """The first pair turns by the position itself, in radians; the second by position / √θ."""
    x = torch.tensor([1.0, 2.0, 0.0, 0.0], dtype=torch.float64).view(1, 1, 1, 4)
    got = rotate(x, *rotation(torch.tensor([3]), 4, 100.0)).flatten()
    want = [np.cos(3), 2 * np.cos(0.3), np.sin(3), 2 * np.sin(0.3)]
    torch.testing.assert_close(got, torch.tensor(want))


def test_angles_of_far_positions_are_exact():
    """In float32 this angle, of some 100,800, would be off by up to 0.01."""
    cos, sin = rotation(torch.tensor([123_457]), 4, 1.5)
    angle = 123_457 / np.sqrt(1.5)
    np.testing.assert_allclose([cos[0, 1].item(), sin[0, 1].item()], [np.cos(angle), np.sin(angle)], atol=1e-9)


def test_bfloat16_is_rotated_in_float32():
    x = torch.ones(1, 1, 1, 2, dtype=torch.bfloat16)
    cos, sin = (part.float() for part in rotation(torch.tensor([1001]), 2, 10_000.0))
    got = rotate(x, cos, sin).flatten()
    want = torch.tensor([np.cos(1001.0) - np.sin(1001.0), np.cos(1001.0) + np.sin(1001.0)])
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want.bfloat16())


def test_shifting_all_positions_changes_nothing_with_rope_and_much_with_learned_ones():
    tokens, later = draw(LLAMA, 5), torch.arange(4, 9)
    model = build(LLAMA)
    torch.testing.assert_close(model(tokens, positions=later), model(tokens))
    model = build(GPT)
    assert (model(tokens, positions=later) - model(tokens)).abs().max() > 0.1


@BOTH
def test_positions_count_from_0_by_default(config):
    model, tokens = build(config), draw(config, 5)
    assert torch.equal(model(tokens, positions=torch.arange(5)), model(tokens))


# --- the cache --------------------------------------------------------------------------------------------------------


@given(config=configs(), pieces=st.lists(st.integers(1, 3), min_size=1, max_size=4), use=st.sampled_from("nf"))
@settings(max_examples=40)
def test_cached_logits_are_those_of_the_whole_sequence(config, pieces, use):
    """Prefill, decoding one by one and anything between: the sequence in pieces."""
    pieces = pieces if sum(pieces) <= config.context else pieces[:2]
    model = build(config, attention={"n": naive.attention, "f": flash.attention}[use])
    tokens = draw(config, sum(pieces))
    with torch.no_grad():
        whole, cache = model(tokens), model.cache(2, sum(pieces))
        parts = [model(piece, cache=cache) for piece in tokens.split(pieces, dim=1)]
    assert cache.length == sum(pieces)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-9)


def test_a_truncated_cache_goes_on_from_there():
    model, tokens, other = build(LLAMA), draw(LLAMA, 8), draw(LLAMA, 8, seed=1)
    with torch.no_grad():
        cache = model.cache(2)
        model(tokens, cache=cache)
        cache.truncate(3)
        got = model(other[:, :4], cache=cache)
        want = model(torch.cat((tokens[:, :3], other[:, :4]), dim=1))[:, 3:]
    assert cache.length == 7
    torch.testing.assert_close(got, want)


def test_a_pass_that_fails_leaves_the_cache_as_it_was():
    calls = []

    def breaks(q, k, v, *, causal):
        calls.append(q.shape[2])
        if len(calls) == 4:  # the second layer of the second pass
            raise KeyboardInterrupt
        return naive.attention(q, k, v, causal=causal)

    model, tokens = build(LLAMA, attention=breaks), draw(LLAMA, 6)
    with torch.no_grad():
        cache = model.cache(2)
        model(tokens[:, :4], cache=cache)
        with pytest.raises(KeyboardInterrupt):
            model(tokens[:, 4:], cache=cache)
        assert cache.length == 4
        torch.testing.assert_close(model(tokens[:, 4:], cache=cache), build(LLAMA)(tokens)[:, 4:])


def test_the_cache_holds_what_the_formula_says_in_the_models_dtype():
    model = Transformer(LLAMA, dtype=torch.bfloat16)
    cache = model.cache(3, 10)
    assert cache.keys.dtype == cache.values.dtype == torch.bfloat16
    assert (cache.batch, cache.capacity, cache.length) == (3, 10, 0)
    assert cache.nbytes == 3 * 10 * inference.kv_cache_bytes_per_token(LLAMA)
    assert model.cache(1).capacity == LLAMA.context


def full(model, tokens):
    cache = model.cache(2, 4)
    model(tokens[:, :3], cache=cache)
    model(tokens[:, 3:5], cache=cache)


BAD_CACHE = {
    "full": (full, ValueError, "the cache is full: it holds 3 of 4 tokens, 2 more were given; make it with a larger"),
    "batch": (lambda m, x: m(x, cache=m.cache(3)), ValueError,
              r"k must have the cache's .* = \(3, 2, 8, 4\), got \(2, 2, 8, 4\)"),
    "dtype": (lambda m, x: m(x, cache=KVCache(LLAMA, 2)), ValueError, r"k must be torch\.float32 on cpu.*got torch\.f"),
    "layers": (lambda m, x: m(x, cache=KVCache(replace(LLAMA, layers=3), 2)), ValueError, "model's 2 layers, got 3"),
    "heads": (lambda m, x: m(x, cache=KVCache(replace(LLAMA, kv_heads=1), 2)), ValueError, "k must have the cache's"),
    "no capacity": (lambda m, x: m.cache(2, 0), ValueError, "capacity must be a positive int, got 0"),
    "no batch": (lambda m, x: m.cache(True), ValueError, "batch must be a positive int, got True"),
    "truncated up": (lambda m, x: m.cache(2).truncate(1), ValueError, "length must lie between 0 and 0.*got 1"),
    "advanced": (lambda m, x: m.cache(2, 4).advance(5), ValueError, "tokens must lie between 0 and 4, got 5"),
}  # fmt: skip


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", BAD_CACHE)
def test_misused_caches_say_what_is_wrong(name):
    use, error, message = BAD_CACHE[name]
    with torch.no_grad(), pytest.raises(error, match=message):
        use(build(LLAMA), draw(LLAMA, 8))


def test_a_cache_refuses_to_cut_a_gradient():
    model = build(LLAMA)
    with pytest.raises(RuntimeError, match=r"a cache is for inference: call the model under torch\.no_grad"):
        model(draw(LLAMA, 3), cache=model.cache(2))


# --- generating -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"temperature": 0.7, "top_k": 4}], ids=str)
@pytest.mark.parametrize("attention", [naive.attention, flash.attention], ids=["naive", "flash"])
@BOTH
def test_the_same_tokens_with_and_without_a_cache(config, attention, options):
    model, prompt = build(config, attention=attention), draw(config, 4, b=3)
    got, want = (
        generate(model, prompt, 12, cache=cache, generator=torch.Generator().manual_seed(5), **options)
        for cache in (True, False)
    )
    assert got.shape == (3, 16)
    assert torch.equal(got, want)
    assert torch.equal(got[:, :4], prompt)
    assert len(got[:, 4:].unique()) > 1  # not one token over and over


@pytest.mark.parametrize(("cache", "lengths"), [(True, [3, 1, 1, 1]), (False, [3, 4, 5, 6])])
def test_with_a_cache_each_step_runs_the_new_token_only(cache, lengths):
    seen = []

    def counts(q, k, v, *, causal):
        seen.append(q.shape[2])
        return naive.attention(q, k, v, causal=causal)

    generate(build(GPT, attention=counts), draw(GPT, 3), 4, cache=cache)
    assert seen == [length for length in lengths for _ in range(GPT.layers)]


@BOTH
def test_greedy_takes_the_likeliest_token_each_time(config):
    model = build(config)
    tokens = generate(model, draw(config, 3), 6, temperature=0.0)
    assert torch.equal(model(tokens)[:, 2:-1].argmax(-1), tokens[:, 3:])
    assert torch.equal(generate(model, draw(config, 3), 6, top_k=1), tokens)
    assert torch.equal(generate(model, draw(config, 3), 6, temperature=5e-324), tokens)
    assert torch.equal(generate(model.float(), draw(config, 3), 6, temperature=5e-324), tokens)


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_from_the_softmax(temperature, top_k):
    model, prompt = build(GPT), draw(GPT, 3, b=1)
    logits = model(prompt)[0, -1] / temperature
    want = logits.softmax(-1)
    if top_k:
        kept = want >= want.topk(top_k).values[-1]
        want = want * kept / want[kept].sum()
    n = 20_000
    generator = torch.Generator().manual_seed(0)
    drawn = generate(model, prompt.expand(n, -1), 1, temperature=temperature, top_k=top_k, generator=generator)[:, -1]
    share = torch.bincount(drawn, minlength=GPT.vocab) / n
    assert ((share - want).abs() <= 5 * (want * (1 - want) / n).sqrt()).all()  # five standard deviations


def test_generating_takes_the_generator_it_is_given_and_no_gradient():
    model, prompt = build(GPT), draw(GPT, 3)
    state = torch.get_rng_state()
    first, second, third = (
        generate(model, prompt, 9, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert all(weight.grad is None for weight in model.parameters())


def test_nothing_and_the_whole_context_can_be_generated():
    model, prompt = build(GPT), draw(GPT, 3)
    assert torch.equal(generate(model, prompt, 0), prompt)
    assert generate(model, prompt.int(), GPT.context - 3).shape == (2, GPT.context)
    assert generate(model, prompt.int(), 2).dtype == torch.int32


BAD_GENERATE = {
    "too long": ({"n": 14}, ValueError, r"prompt and n must fit in the context of 16 tokens, got 3 \+ 14: shorten"),
    "negative n": ({"n": -1}, ValueError, "n must be an int of at least 0, got -1"),
    "n of text": ({"n": "5"}, ValueError, "n must be an int of at least 0, got '5'"),
    "temperature": ({"temperature": -1.0}, ValueError, "temperature must be a finite number of at least 0, got -1.0"),
    "nan": ({"temperature": float("nan")}, ValueError, "temperature must be a finite number"),
    "top_k": ({"top_k": 0}, ValueError, "top_k must be None or an int between 1 and vocab = 19, got 0"),
    "top_k too large": ({"top_k": 20}, ValueError, "between 1 and vocab = 19, got 20"),
    "top_k of text": ({"top_k": "3"}, ValueError, "between 1 and vocab = 19, got '3'"),
    "prompt": ({"prompt": [1, 2]}, TypeError, r"prompt must be a torch\.Tensor, got list"),
    "one sequence": (
        {"prompt": torch.tensor([1, 2])},
        ValueError,
        r"prompt must have shape \(batch, seq\), got \(2,\)",
    ),
    "no prompt": ({"prompt": torch.zeros(1, 0, dtype=torch.long)}, ValueError, "at least one token"),
}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", BAD_GENERATE)
def test_generate_names_what_is_wrong(name):
    changes, error, message = BAD_GENERATE[name]
    with pytest.raises(error, match=message):
        generate(build(GPT), **({"prompt": draw(GPT, 3), "n": 2} | changes))


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DENSE)
def test_named_configs_have_the_parameters_that_perf_counts(name):
    model = Transformer(MODELS[name], device="meta")
    assert all(weight.is_meta for weight in model.parameters())
    assert sum(weight.numel() for weight in model.parameters()) == perf.parameters(MODELS[name]).total


def test_the_models_are_as_large_as_published():
    sizes = {"gpt2": 124_439_808, "llama-2-7b": 6_738_415_616, "llama-3-8b": 8_030_261_248}
    for name, size in sizes.items():
        assert sum(weight.numel() for weight in Transformer(MODELS[name], device="meta").parameters()) == size


@given(config=configs(), b=st.integers(1, 3), t=st.integers(1, 6))
@settings(max_examples=15)
def test_any_config_has_the_parameters_and_flops_that_perf_counts(config, b, t):
    model = Transformer(config, device="meta")
    assert sum(weight.numel() for weight in model.parameters()) == perf.parameters(config).total
    tokens = torch.zeros(b, t, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(tokens)
    assert counter.get_total_flops() == perf.forward_flops(config, b, t).total
    with FlopCounterMode(display=False) as counter:
        model.logits(model.hidden(tokens)[:, -1])
    assert counter.get_total_flops() == perf.forward_flops(config, b, t, logits="last").total
    with FlopCounterMode(display=False) as counter:
        model.loss(tokens, tokens).backward()
    assert counter.get_total_flops() == perf.training_flops(config, b, t).total


def test_gpt3_runs_on_the_meta_device():
    model = Transformer(MODELS["gpt3"], device="meta", dtype=torch.bfloat16)
    logits = model(torch.zeros(1, 2048, dtype=torch.long, device="meta"))
    assert (logits.shape, logits.dtype, logits.is_meta) == ((1, 2048, 50257), torch.bfloat16, True)


# --- initialisation ---------------------------------------------------------------------------------------------------


def test_init_draws_as_gpt2_does():
    config = gpt(8, 64, 4, vocab=300, context=200)
    model = init(Transformer(config), torch.Generator().manual_seed(0))
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            assert (weight == 0).all(), name
        elif "norm" in name:
            assert (weight == 1).all(), name
        else:
            want = 0.02 / 4 if name.endswith(("attention.o.weight", "mlp.down.weight")) else 0.02  # 4 = √(2 · 8)
            assert abs(weight.std().item() / want - 1) < 0.05, name
            assert abs(weight.mean().item()) < 5 * want / weight.numel() ** 0.5, name


@BOTH
def test_init_is_the_same_for_the_same_seed_and_leaves_torchs_generator_alone(config):
    model, state = Transformer(config), torch.get_rng_state()
    drawn = [
        torch.cat([w.flatten() for w in init(model, torch.Generator().manual_seed(seed)).parameters()]).clone()
        for seed in (7, 7, 8)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@BOTH
def test_a_new_model_knows_nothing(config):
    """The loss at the start is that of guessing: log(vocab)."""
    torch.manual_seed(0)
    model = Transformer(config)
    assert abs(model.loss(draw(config, 16, b=8), draw(config, 16, b=8, seed=1)).item() - np.log(config.vocab)) < 0.05


@BOTH
def test_it_learns_to_repeat(config):
    torch.manual_seed(0)
    model = Transformer(config, dtype=torch.float32)
    tokens = torch.arange(12).remainder(3)[None]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
    assert model.loss(tokens[:, :-1], tokens[:, 1:]).item() < 0.1
    assert generate(model, tokens[:, :4], 6, temperature=0.0)[0].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@BOTH
def test_a_saved_model_comes_back(tmp_path, config, dtype):
    model, path = build(config, dtype=dtype), tmp_path / "model.safetensors"
    save(model, path)
    again = load(path)
    assert again.config == config
    assert again.state_dict().keys() == model.state_dict().keys()
    tokens = draw(config, 6)
    assert torch.equal(again(tokens), model(tokens))
    assert all(weight.requires_grad for weight in again.parameters())


def test_load_takes_attention_and_dtype(tmp_path):
    model, path = build(LLAMA, dtype=torch.float32), tmp_path / "model.safetensors"
    save(model, path)
    again = load(path, attention=flash.attention, dtype=torch.float64)
    assert {weight.dtype for weight in again.parameters()} == {torch.float64}
    assert again.blocks[0].attention.attend is flash.attention
    torch.testing.assert_close(again(draw(LLAMA, 5)), model.double()(draw(LLAMA, 5)))


def test_the_file_is_plain_safetensors_with_tied_weights_once(tmp_path):
    model, path = build(GPT), tmp_path / "model.safetensors"
    save(model, path)
    tensors = safetensors.torch.load_file(path)
    assert sum(tensor.numel() for tensor in tensors.values()) == perf.parameters(GPT).total
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["config"])["d_model"] == GPT.d_model


def test_a_loaded_model_does_not_hang_on_its_file(tmp_path):
    model, path = build(GPT), tmp_path / "model.safetensors"
    save(model, path)
    again, data = load(path), path.read_bytes()
    path.write_bytes(bytes(len(data)))  # in place, as no careful program would
    assert torch.equal(again(draw(GPT, 5)), model(draw(GPT, 5)))


def test_saving_replaces_the_old_file_whole_or_not_at_all(tmp_path, monkeypatch):
    old, new, path = build(GPT), build(GPT, seed=1), tmp_path / "model.safetensors"
    save(old, path)
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        save(new, path)
    monkeypatch.undo()
    assert torch.equal(load(path)(draw(GPT, 5)), old(draw(GPT, 5)))
    save(new, path)
    assert torch.equal(load(path)(draw(GPT, 5)), new(draw(GPT, 5)))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@given(data=st.data())
@settings(max_examples=60)
def test_any_changed_byte_and_any_missing_end_is_found(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("models") / "model.safetensors"
    save(Transformer(gpt(1, 4, 2, vocab=5, context=4)), path)
    whole = path.read_bytes()
    if data.draw(st.booleans()):
        damaged = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        at, flip = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(1, 255))
        damaged = whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :]
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load(path)


def test_a_changed_dtype_of_the_same_width_is_found(tmp_path):
    path = tmp_path / "model.safetensors"
    save(build(GPT, dtype=torch.bfloat16), path)
    path.write_bytes(path.read_bytes().replace(b'"BF16"', b'"F16" '))
    with pytest.raises(ValueError, match="wrong checksum"):
        load(path)


def test_other_files_are_refused_by_name(tmp_path):
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="holds no model that"):
        load(path)
    path.write_text("hello")
    with pytest.raises(ValueError, match="damaged, or no safetensors file"):
        load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent")
    with pytest.raises(IsADirectoryError):
        load(tmp_path)


def test_a_field_of_a_later_version_is_told_as_such(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    monkeypatch.setattr("mlsys.models.transformer.asdict", lambda config: {"width": 3})
    save(build(GPT), path)
    with pytest.raises(ValueError, match=r"written by another version of mlsys.*unexpected keyword argument 'width'"):
        load(path)


# --- errors -----------------------------------------------------------------------------------------------------------

BAD = {
    "list": (lambda m, x: m(x.tolist()), TypeError, r"tokens must be a torch\.Tensor, got list"),
    "floats": (lambda m, x: m(x.float()), TypeError, r"tokens must be int64 or int32, got torch\.float32: convert it"),
    "bytes": (lambda m, x: m(x.to(torch.uint8)), TypeError, r"int64 or int32, got torch\.uint8"),
    "rank": (lambda m, x: m(x[0]), ValueError, r"tokens must have shape \(batch, seq\), got \(5,\)"),
    "negative": (lambda m, x: m(x - 19), ValueError, "tokens must lie between 0 and vocab − 1 = 18, got -"),
    "out of range": (lambda m, x: m(x + 19), ValueError, "tokens must lie between 0 and vocab − 1 = 18, got"),
    "empty": (lambda m, x: m(x[:, :0]), ValueError, r"tokens must hold at least one token, got shape \(2, 0\)"),
    "no sequence": (lambda m, x: m(x[:0]), ValueError, r"at least one token, got shape \(0, 5\)"),
    "too long": (lambda m, x: m(x.repeat(1, 4)), ValueError, "tokens must fit in the context of 16, got 20"),
    "too long after a cache": (lambda m, x: m(x.repeat(1, 3), cache=partly_full(m)), ValueError,
                               "fit in the context of 16, got 15 after 2 in the cache"),
    "device": (lambda m, x: m(x.to("meta")), ValueError, "tokens must be on cpu, got meta: move it"),
    "positions": (lambda m, x: m(x, positions=torch.arange(4)), ValueError, "one entry for each of 5 tokens, got 4"),
    "far positions": (lambda m, x: m(x, positions=torch.arange(12, 17)), ValueError,
                      r"positions must lie between 0 and context − 1 = 15, got 12 … 16"),
    "positions of floats": (lambda m, x: m(x, positions=torch.arange(5.0)), TypeError, "positions must be int64"),
    "positions by row": (lambda m, x: m(x, positions=x), ValueError, r"positions must have shape \(seq,\), got"),
    "targets": (lambda m, x: m.loss(x, x[:, 1:]), ValueError,
                r"targets must have the shape of tokens \(2, 5\), got \(2, 4\)"),
    "targets out of range": (lambda m, x: m.loss(x, x - 100), ValueError, "targets must lie between 0 and vocab"),
    "config": (lambda m, x: Transformer({"layers": 2}), TypeError, r"config must be a Config .*got dict"),
    "attention": (lambda m, x: Transformer(GPT, attention="flash"), TypeError, "attention must be a function.*got str"),
    "experts": (lambda m, x: Transformer(MODELS["mixtral-8x7b"], device="meta"), ValueError,
                r"config\.experts must be None, got Experts\(count=8"),
    "latent": (lambda m, x: Transformer(MODELS["deepseek-v3"], device="meta"), ValueError,
               r"config\.latent must be None"),
    "save": (lambda m, x: save(m.state_dict(), "unused"), TypeError, "model must be a Transformer, got OrderedDict"),
}  # fmt: skip


def partly_full(model):
    cache = model.cache(2)
    cache.advance(2)
    return cache


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_argument_value_and_remedy(name):
    use, error, message = BAD[name]
    with pytest.raises(error, match=message):
        use(build(GPT), draw(GPT, 5))
