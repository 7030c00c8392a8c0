"""`generate` gives the same tokens whatever is kept, shared, cut in pieces or interrupted; nothing is done twice."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys.attention import flash, naive, paged, paged_numba
from mlsys.attention.kv_cache import Batch, OutOfBlocks, PagedKVCache
from mlsys.models.transformer import Cache, KVCache, Transformer, generate
from mlsys.perf import inference
from mlsys.perf.configs import gpt, llama

GPT = gpt(2, 12, 3, vocab=19, context=40)
LLAMA = llama(2, 16, 4, 24, vocab=19, context=40, kv_heads=2)
BOTH = pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])
BLOCK = 4


def build(config, seed=0, dtype=torch.float64, **options):
    """A model whose weights are large enough that tokens depend on all that is before them."""
    model = Transformer(config, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.copy_(drawn / weight.shape[-1] ** 0.5 if weight.ndim == 2 else name.endswith("weight") + drawn / 3)
    return model


def draw(config, t, b=2, seed=0):
    return torch.randint(config.vocab, (b, t), generator=torch.Generator().manual_seed(seed))


def sampled(model, prompt, n, seed=5, **options):
    return generate(model, prompt, n, generator=torch.Generator().manual_seed(seed), **options)


def plain(q, k, v, *, causal):
    """Somebody's own attention, which no cache knows."""
    return naive.attention(q, k, v, causal=causal)


class Counted:
    """An attention of one's own that notes how many queries and keys each call has."""

    def __init__(self):
        self.queries, self.keys = [], []

    def __call__(self, q, k, v, *, causal):
        self.queries.append(q.shape[2])
        self.keys.append(k.shape[2])
        return naive.attention(q, k, v, causal=causal)


def idle(cache):
    """Nobody holds a block, and the books balance."""
    cache.pool.check()
    return cache.pool.used == 0


# --- the same tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.7, "top_k": 4}], ids=["greedy", "drawn"])
@pytest.mark.parametrize("attention", [naive.attention, flash.attention, plain], ids=["naive", "flash", "own"])
@BOTH
def test_the_same_tokens_with_any_cache_and_chunk(config, attention, options):
    model, prompt = build(config, attention=attention), draw(config, 11, b=2)
    want = sampled(model, prompt, 10, cache=False, **options)
    assert len(want[:, 11:].unique()) > 1  # not one token over and over
    assert torch.equal(sampled(model, prompt, 10, cache=True, **options), want)
    assert torch.equal(sampled(model, prompt, 10, cache=True, chunk=3, **options), want)
    for chunk in (None, 3, BLOCK):
        cache = model.paged_cache(30, BLOCK)
        assert torch.equal(sampled(model, prompt, 10, cache=cache, chunk=chunk, **options), want)
        assert torch.equal(sampled(model, prompt, 10, cache=cache, chunk=chunk, **options), want)  # all is known now
        assert idle(cache)


@given(
    seed=st.integers(0, 99),
    rows=st.lists(st.integers(0, 2), min_size=1, max_size=3),
    t=st.integers(1, 13),
    n=st.integers(1, 5),
    block=st.integers(1, 6),
    chunk=st.none() | st.integers(1, 6),
    style=st.sampled_from([GPT, LLAMA]),
)
@settings(max_examples=20)
def test_prompts_that_begin_alike_in_a_cache_that_is_in_use(seed, rows, t, n, block, chunk, style):
    """Three calls one after the other on the same cache; rows are equal, begin alike, or differ."""
    model, bases = build(style), draw(style, t, b=3, seed=seed)
    bases[1, : t // 2] = bases[0, : t // 2]
    cache = model.paged_cache(4 * -(-(t + n) // block) + 4, block)
    for call in (rows, rows[::-1], [0]):
        want = sampled(model, bases[call], n, seed, cache=False)
        assert torch.equal(sampled(model, bases[call], n, seed, cache=cache, chunk=chunk), want)
        assert idle(cache)


@given(cuts=st.lists(st.integers(1, 5), min_size=1, max_size=6), spare=st.integers(0, 4), stolen=st.booleans())
@settings(max_examples=8)
def test_an_interrupted_sequence_goes_on_as_if_nothing_had_been(cuts, spare, stolen):
    """Preempted: its blocks are given back, perhaps to others, and what is missing then is computed again."""
    model, prompt = build(LLAMA), draw(LLAMA, 9, b=1)
    want = sampled(model, prompt, sum(cuts), cache=False)
    cache = model.paged_cache(10 + spare, BLOCK)
    tokens, generator = prompt, torch.Generator().manual_seed(5)
    for number, cut in enumerate(cuts):
        tokens = generate(model, tokens, cut, generator=generator, cache=cache)
        if stolen:
            sampled(model, draw(LLAMA, 5 * (number + 1), b=1, seed=number + 1), 4, cache=cache)
    assert torch.equal(tokens, want)
    assert idle(cache)


@pytest.mark.parametrize("attention", [naive.attention, flash.attention], ids=["naive", "flash"])
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 2.0},
        {"alibi": torch.tensor([0.5, 0.1, 1.0, 0.0])},
        {"sinks": torch.tensor([0.5, 3.0, -1.0, 0.0], dtype=torch.float64)},
        {"scale": 0.9, "causal": True, "mask": None},
        {"window": (5, 0)},
        {"mask": torch.tensor(True)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_options_of_a_models_attention_hold_for_its_paged_cache(attention, options):
    model, prompt = build(LLAMA, attention=partial(attention, **options)), draw(LLAMA, 10)
    want = sampled(model, prompt, 15, cache=False)
    assert torch.equal(sampled(model, prompt, 15, cache=model.paged_cache(30, BLOCK)), want)
    if "mask" not in options and "scale" not in options:
        assert not torch.equal(sampled(build(LLAMA), prompt, 15), want)


def test_a_window_needs_no_more_blocks_than_it_spans():
    model, prompt = build(LLAMA, attention=partial(naive.attention, window=(6, 0))), draw(LLAMA, 10, b=1)
    want = sampled(model, prompt, 30, cache=False)
    cache = model.paged_cache(4, BLOCK, window=6)  # 7 tokens and one partly filled block at either end
    assert torch.equal(sampled(model, prompt, 30, cache=cache, chunk=BLOCK), want)
    assert idle(cache)


@pytest.mark.parametrize("attention", [naive.attention, plain, partial(flash.attention, window=(5, 0))])
def test_a_window_that_the_model_does_not_have_is_refused(attention):
    model = build(LLAMA, attention=attention)
    cache = model.paged_cache(9, BLOCK, window=6)
    with pytest.raises(ValueError, match=r"attention must have the cache's window, got .*window=\(6, 0\)"):
        sampled(model, draw(LLAMA, 10), 2, cache=cache)
    assert idle(cache)


@BOTH
def test_eight_bits_are_near_and_may_choose_another_token(config):
    model, prompt = build(config), draw(config, 20)
    want = model(prompt)
    for quantized, allowed in (("int8", 0.05), ("fp8", 0.3)):
        cache = model.paged_cache(20, BLOCK, quantized=quantized)
        batch = cache.batch([cache.pool.start() for _ in prompt])
        with torch.no_grad():
            got = torch.cat([model(part, cache=batch) for part in prompt.split(6, dim=1)], dim=1)
        assert 0 < (got - want).abs().max() < allowed * want.abs().max()
        cache = model.paged_cache(20, BLOCK, quantized=quantized)
        assert sampled(model, prompt, 12, cache=cache).shape == (2, 32)


# --- nothing twice ----------------------------------------------------------------------------------------------------


def test_a_known_prefix_is_not_computed_again_and_one_token_always_is():
    attention = Counted()
    model, prompt = build(GPT, attention=attention), draw(GPT, 12, b=1)
    cache = model.paged_cache(20, BLOCK)
    tokens = generate(model, prompt, 5, cache=cache, temperature=0.0)
    assert attention.queries[:: GPT.layers] == [12, 1, 1, 1, 1]
    assert attention.keys[:: GPT.layers] == [12, 13, 14, 15, 16]
    attention.queries.clear()
    generate(model, prompt, 1, cache=cache)  # 12 tokens in three full blocks, of which the last is computed again
    assert attention.queries == [BLOCK] * GPT.layers
    attention.queries.clear()
    generate(model, tokens, 1, cache=cache)  # 16 of 17 tokens were computed, in four full blocks
    assert attention.queries == [1] * GPT.layers


def test_equal_prompts_are_computed_once_and_hold_the_same_blocks():
    used = []

    class Watching(Counted):
        def __call__(self, *qkv, causal):
            used.append(cache.pool.used)
            return super().__call__(*qkv, causal=causal)

    attention = Watching()
    model, prompt = build(GPT, attention=attention), draw(GPT, 10, b=1)
    cache = model.paged_cache(40, BLOCK)
    tokens = sampled(model, prompt.expand(4, -1), 2, cache=cache)
    assert attention.queries == [10] * GPT.layers + [1] * GPT.layers * 4  # one prompt; an own attention sees rows apart
    assert used[0] == 3  # of the one prompt
    assert used[-1] == 6  # two full blocks of it for all, and each its own copy of the third
    assert torch.equal(tokens, sampled(build(GPT), prompt.expand(4, -1), 2, cache=False))


def test_a_prompt_in_chunks_is_never_longer_than_a_chunk():
    attention = Counted()
    model, prompt = build(GPT, attention=attention), draw(GPT, 10, b=1)
    for cache in (True, model.paged_cache(10, BLOCK)):
        attention.queries.clear()
        generate(model, prompt, 1, cache=cache, chunk=4)
        assert attention.queries[:: GPT.layers] == [4, 4, 2]


@pytest.mark.parametrize("attention", [naive.attention, flash.attention], ids=["naive", "flash"])
def test_decoding_reads_the_blocks_where_they_lie(attention, monkeypatch):
    """No copy of a whole sequence is made, of which `gather` is the only maker."""
    model, prompt = build(LLAMA, attention=attention), draw(LLAMA, 10)
    want = sampled(model, prompt, 8, cache=False)
    for name in ("gather", "_gather"):
        monkeypatch.delattr(PagedKVCache, name)
    assert torch.equal(sampled(model, prompt, 8, cache=model.paged_cache(20, BLOCK)), want)


# --- lengths that differ ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [naive.attention, plain], ids=["naive", "own"])
@BOTH
@torch.no_grad()
def test_sequences_of_different_lengths_are_decoded_together(config, attention):
    model, tokens = build(config, attention=attention), draw(config, 20, b=3)
    cache, lengths = model.paged_cache(30, BLOCK), [13, 1, 8]
    seqs = [cache.pool.start() for _ in lengths]
    for row, seq, length in zip(tokens, seqs, lengths, strict=True):
        model(row[None, :length], cache=cache.batch([seq]))
    batch = cache.batch(seqs)
    assert (batch.lengths, batch.length, batch.layers) == (lengths, 13, 2)
    assert batch.positions(2).tolist() == [[13, 14], [1, 2], [8, 9]]
    for step in (1, 2, 3):
        new = torch.stack([row[seq.length : seq.length + step] for row, seq in zip(tokens, seqs, strict=True)])
        got = model(new, cache=batch)
        for row, seq, logits in zip(tokens, seqs, got, strict=True):
            torch.testing.assert_close(logits, model(row[None, : seq.length])[0, -step:], rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"same length, got \[7, 14, 19\]: use attend"):
        batch.append(0, *torch.zeros(2, 3, config.kv_heads, 1, config.head_dim, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"fit in the context of 40, got 22 after 19 in the cache"):
        model(torch.zeros(3, 22, dtype=torch.long), cache=batch)


@torch.no_grad()
def test_blocks_are_read_by_whom_one_says():
    calls = []

    def reader(q, cache, layer, seqs, pending, **options):
        calls.append((layer, pending, options))
        return paged.attention(q, cache, layer, seqs, pending, **options)

    model, tokens = build(LLAMA, attention=partial(flash.attention, softcap=2.0)), draw(LLAMA, 9)
    cache = model.paged_cache(9, BLOCK)
    got = model(tokens, cache=Batch(cache, [cache.pool.start() for _ in tokens], reader))
    assert calls == [(0, 9, {"softcap": 2.0}), (1, 9, {"softcap": 2.0})]
    torch.testing.assert_close(got, model(tokens))


@pytest.mark.parametrize("reader", [None, paged_numba.attention], ids=["torch", "numba"])
@torch.no_grad()
def test_two_batches_on_one_cache_take_turns_and_a_step_that_died_is_made_again(reader):
    fails = []

    def attention(q, k, v, *, causal):
        raise AssertionError("the blocks are read where they lie")

    def mortal(*arguments, **options):
        if fails and arguments[2] == 1:
            raise RuntimeError(fails.pop())
        return (reader or paged.attention)(*arguments, **options)

    attention.__module__, attention.__name__ = naive.attention.__module__, "attention"
    model, tokens = build(LLAMA, attention=attention), draw(LLAMA, 14, b=3)
    want = build(LLAMA)(tokens)
    cache = model.paged_cache(30, BLOCK)
    turns = [slice(0, 2), slice(2, 3)]
    batches = [Batch(cache, [cache.pool.start() for _ in tokens[rows]], mortal) for rows in turns]
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 9), (9, 10), (10, 14)):
        for rows, batch in zip(turns, batches, strict=True):
            fails.append("died in the second layer")
            with pytest.raises(RuntimeError, match="died"):
                model(tokens[rows, start:stop] * 0, cache=batch)  # other tokens, of which nothing may be left
            got = model(tokens[rows, start:stop], cache=batch)
            torch.testing.assert_close(got, want[rows, start:stop], rtol=1e-9, atol=1e-9)
    cache.pool.check()


def test_a_cache_of_ones_own_is_asked_for_no_more_than_the_protocol_says():
    class Growing:
        """Keys and values that `torch.cat` lets grow."""

        layers, length = 2, 0

        def __init__(self):
            self.kept = {}

        def positions(self, tokens):
            return torch.arange(self.length, self.length + tokens)

        def attend(self, layer, q, k, v, attention):
            old = self.kept.get(layer, (k[:, :, :0], v[:, :, :0]))
            self.kept[layer] = torch.cat((old[0], k), 2), torch.cat((old[1], v), 2)
            return attention(q, *self.kept[layer], causal=True)

        def advance(self, tokens):
            self.length += tokens

    model, tokens, cache = build(LLAMA), draw(LLAMA, 9), Growing()
    paged = model.paged_cache(9, BLOCK)
    assert all(isinstance(each, Cache) for each in (cache, model.cache(1), paged.batch([paged.pool.start()])))
    with torch.no_grad():
        got = torch.cat([model(part, cache=cache) for part in tokens.split(4, dim=1)], dim=1)
    torch.testing.assert_close(got, model(tokens))


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_cache_that_is_too_small_says_so_before_a_token_is_sampled():
    model, prompt = build(LLAMA), draw(LLAMA, 10)
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    cache = model.paged_cache(7, BLOCK)  # two sequences of 3 blocks each, and of 4 when 13 tokens are held
    assert generate(model, prompt, 3, generator=generator, cache=cache).shape == (2, 13)
    generator.set_state(state)
    with pytest.raises(OutOfBlocks, match="2 more blocks of 4 tokens are needed, 1 of 7 are left"):
        generate(model, prompt, 4, generator=generator, cache=cache)
    assert torch.equal(generator.get_state(), state)
    assert idle(cache)


def test_a_call_that_fails_holds_nothing_and_the_next_one_is_right():
    calls = []

    def breaks(q, k, v, *, causal):
        calls.append(q.shape[2])
        if len(calls) == 12:
            raise KeyboardInterrupt
        return naive.attention(q, k, v, causal=causal)

    model, prompt = build(LLAMA, attention=breaks), draw(LLAMA, 10)
    cache = model.paged_cache(20, BLOCK)
    with pytest.raises(KeyboardInterrupt):
        sampled(model, prompt, 6, cache=cache)
    assert idle(cache)
    assert torch.equal(sampled(model, prompt, 6, cache=cache), sampled(build(LLAMA), prompt, 6, cache=False))


def test_a_paged_cache_is_made_as_the_model_needs_it():
    model = Transformer(LLAMA, dtype=torch.bfloat16)
    cache = model.paged_cache(5, 8)
    assert (cache.dtype, cache.pool.blocks, cache.pool.block) == (torch.bfloat16, 5, 8)
    assert cache.nbytes == 5 * 8 * inference.kv_cache_bytes_per_token(LLAMA)
    assert isinstance(cache.batch([cache.pool.start()]), Batch)
    assert model.paged_cache(5, window=3).pool.window == 3
    assert model.paged_cache(5, 8, quantized="int8").nbytes == 5 * 8 * 2 * 2 * 2 * (4 + 4)  # a scale for each head


LAYERS_3 = llama(3, 16, 4, 24, vocab=19, context=40, kv_heads=2)
BAD = {
    "name": ({"cache": "paged"}, TypeError, r"cache must be True, False or a cache of model\.paged_cache, got str"),
    "contiguous": ({"cache": KVCache(LLAMA, 2)}, TypeError, "cache must be True, False or .* got KVCache"),
    "layers": ({"cache": build(LAYERS_3).paged_cache(9)}, ValueError, "the model's 2 layers, got 3"),
    "dtype": (
        {"cache": Transformer(LLAMA).paged_cache(9)},
        ValueError,
        r"k must be torch\.float32 on cpu as the cache",
    ),
    "heads": ({"cache": build(GPT).paged_cache(9)}, ValueError, "k must have the cache's"),
    "no chunk": ({"chunk": 0}, ValueError, "chunk must be None or an int of at least 1, got 0"),
    "chunk of text": ({"chunk": "4"}, ValueError, "chunk must be None or an int of at least 1, got '4'"),
    "chunk is true": ({"chunk": True}, ValueError, "chunk must be None or an int of at least 1, got True"),
    "chunk without": ({"chunk": 4, "cache": False}, ValueError, "chunk must be None without a cache, got 4"),
    "no prompt": (
        {"prompt": torch.zeros(1, 0, dtype=torch.long), "cache": build(LLAMA).paged_cache(9)},
        ValueError,
        "at least one token",
    ),
}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", BAD)
def test_generate_names_what_is_wrong_with_a_cache(name):
    changes, error, message = BAD[name]
    with pytest.raises(error, match=message):
        generate(build(LLAMA), **({"prompt": draw(LLAMA, 3), "n": 2} | changes))
