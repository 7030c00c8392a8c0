"""`mlsys.attention.paged`: whatever the tables say, attention to each sequence's own tokens; `paged_numba` likewise.

What is asked of both modules is asked here, with `MODULES`; what the compiled loops alone do is in `test_paged_numba`.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys.attention import _paged_copied, flash, naive, paged, paged_numba
from mlsys.attention._kv_quant import FORMATS, dequantize, quantize
from mlsys.attention._paged_copied import copied
from mlsys.attention._paged_items import Items, common_prefixes
from mlsys.attention.kv_cache import PagedKVCache
from mlsys.contracts import check, find

MODULES = pytest.mark.parametrize("module", [paged, paged_numba], ids=["torch", "numba"])
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def scene(lengths, *, h=4, h_kv=2, d=5, dv=3, block=4, seed=0, dtype=torch.float64, shared=0, spare=1):
    """Blocks in any order, with NaN wherever no sequence has a token; and each sequence's keys and values in a row."""
    generator = torch.Generator().manual_seed(seed)
    widths = [-(-n // block) for n in lengths]
    blocks = shared + sum(max(0, width - shared) for width in widths) + 2
    numbers = torch.randperm(blocks, generator=generator).tolist()
    keys, values = (torch.full((blocks, h_kv, block, size), math.nan, dtype=dtype) for size in (d, dv))
    tables = torch.full((len(lengths), max(widths, default=0) + spare), -1, dtype=torch.int32)
    common = [numbers.pop() for _ in range(shared)]
    k, v = [], []
    for i, n in enumerate(lengths):
        table = (common + [numbers.pop() for _ in range(widths[i] - shared)])[: widths[i]]
        tables[i, : widths[i]] = torch.tensor(table)
        for place in range(n):
            at = table[place // block], slice(None), place % block
            if keys[at].isnan().any():
                for x in (keys, values):
                    x[at] = torch.randn(x[at].shape, generator=generator, dtype=torch.float64).to(dtype)
        rows = [(table[p // block], p % block) for p in range(n)]
        for x, gathered in ((keys, k), (values, v)):
            row = [x[b, :, p] for b, p in rows]
            gathered.append(torch.stack(row, 1) if row else x.new_zeros(h_kv, 0, x.shape[3]))
    q = torch.randn(len(lengths), h, d, generator=generator, dtype=torch.float64).to(dtype)
    return SimpleNamespace(
        q=q, keys=keys, values=values, tables=tables, lengths=torch.tensor(lengths, dtype=torch.int32), k=k, v=v,
        cache=(keys, values, tables, torch.tensor(lengths, dtype=torch.int32)),
    )  # fmt: skip


def expected(s, **options):
    """`naive.attention` of each sequence alone, in float64."""
    found = [
        naive.attention(
            q[None, :, None].double(), k[None].double(), v[None].double(), causal=True, return_lse=True, **options
        )
        for q, k, v in zip(s.q, s.k, s.v, strict=True)
    ]
    return torch.stack([out[0, :, 0] for out, _ in found]), torch.stack([lse[0, :, 0] for _, lse in found])


LENGTHS = [9, 4, 0, 1, 13, 8]
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
SINKS = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)
OPTIONS = {
    "nothing": {},
    "scale": {"scale": 0.9},
    "window of 0": {"window": (0, -1)},
    "window": {"window": (5, 0)},
    "longer window": {"window": (100, -1)},
    "softcap": {"softcap": 0.7},
    "alibi": {"alibi": SLOPES},
    "sinks": {"sinks": SINKS},
    "all": {"window": (6, 3), "softcap": 1.5, "alibi": SLOPES, "sinks": SINKS, "scale": 1.1},
}
WAYS = {
    "": {},
    "split": {"splits": 3},
    "shared": {"share_prefixes": True},
    "both": {"splits": 2, "share_prefixes": True},
}


@MODULES
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_in_every_way_is_naive_attention_of_each_sequence(module, name, way):
    s = scene([9, 4, 13, 8], shared=1) if "share_prefixes" in WAYS[way] else scene(LENGTHS)
    got = module.decode(s.q, *s.cache, return_lse=True, **OPTIONS[name], **WAYS[way])
    torch.testing.assert_close(got, expected(s, **OPTIONS[name]), **EXACT)


@MODULES
@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=6), block=st.integers(1, 9), group=st.sampled_from([1, 2, 4, 5, 8]),
    h_kv=st.integers(1, 3), window=st.integers(-1, 12), splits=st.integers(1, 5), share=st.booleans(),
    common=st.integers(0, 3), seed=st.integers(0, 999),
)  # fmt: skip
def test_any_tables(module, lengths, block, group, h_kv, window, splits, share, common, seed):
    lengths = [max(n, common * block) for n in lengths]
    s = scene(lengths, h=group * h_kv, h_kv=h_kv, block=block, seed=seed, shared=common)
    got = module.decode(s.q, *s.cache, window=(window, -1), splits=splits, share_prefixes=share, return_lse=True)
    if lengths:
        torch.testing.assert_close(got, expected(s, window=(window, -1)), **EXACT)
    assert got[0].shape == (len(lengths), group * h_kv, 3)


@MODULES
@pytest.mark.parametrize("splits", [1, 3])
def test_what_is_before_the_window_may_be_anything_too(module, splits):
    """NaN in the places of the first visible block that no query sees, and no block at all before it."""
    s = scene([11, 18])
    want = expected(s, window=(5, -1))
    for i, n in enumerate((11, 18)):
        start = n - 6
        for x in (s.keys, s.values):
            x[s.tables[i, start // 4], :, : start % 4] = math.nan
        s.tables[i, : start // 4] = -1
    got = module.decode(s.q, *s.cache, window=(5, -1), splits=splits, return_lse=True)
    torch.testing.assert_close(got, want, **EXACT)


@MODULES
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999))
def test_where_the_blocks_lie_is_of_no_consequence(module, seed):
    s = scene(LENGTHS)
    order = torch.randperm(s.keys.shape[0], generator=torch.Generator().manual_seed(seed))
    tables = torch.where(s.tables < 0, s.tables, order.int()[s.tables.long()])
    keys, values = (torch.empty_like(x) for x in (s.keys, s.values))
    keys[order], values[order] = s.keys, s.values
    assert torch.equal(module.decode(s.q, keys, values, tables, s.lengths), module.decode(s.q, *s.cache))


@MODULES
def test_long_sequences_come_in_pieces_that_fit_the_scratch(module, monkeypatch):
    monkeypatch.setattr(_paged_copied, "SCRATCH", 1000)
    s = scene([150, 7, 90, 90, 31])
    for options in OPTIONS.values():
        got = module.decode(s.q, *s.cache, return_lse=True, **options)
        torch.testing.assert_close(got, expected(s, **options), **EXACT)


@MODULES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_dtypes(module, dtype):
    s = scene([60, 33, 0, 1], h=8, h_kv=2, d=32, dv=16, block=16, dtype=dtype)
    out, lse = module.decode(s.q, *s.cache, return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    want, want_lse = expected(s)
    allowed = {torch.bfloat16: 0.03, torch.float16: 4e-3, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(out.double(), want, rtol=0, atol=allowed)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=allowed)


@MODULES
@pytest.mark.parametrize("code", ["int8", "fp8"])
def test_codes_of_8_bits_are_what_they_stand_for(module, code):
    s = scene([9, 4, 20], h=8, h_kv=2, d=16, dv=16, dtype=torch.float32)
    (keys, ks), (values, vs) = (quantize(x.nan_to_num(1e30), FORMATS[code]) for x in (s.keys, s.values))
    wide = [dequantize(x, scale, torch.float32) for x, scale in ((keys, ks), (values, vs))]
    for options in ({}, {"sinks": SINKS.repeat(2), "window": (6, -1)}, {"splits": 2}):
        got = module.decode(s.q, keys, values, s.tables, s.lengths, scales=(ks, vs), return_lse=True, **options)
        want = module.decode(s.q, *wide, s.tables, s.lengths, return_lse=True, **options)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@MODULES
def test_views_are_read_as_they_are_and_nothing_is_changed(module):
    s = scene(LENGTHS)
    big = s.q.new_full((len(LENGTHS), 5, 8), math.nan).transpose(1, 2)[:, ::2]  # (seqs, 4, 5), strided
    big.copy_(s.q)
    before = [x.clone() for x in (big, *s.cache)]
    want = module.decode(s.q, *s.cache)
    assert torch.equal(module.decode(big, *s.cache), want)
    assert torch.equal(module.decode(s.q, s.keys, s.values, s.tables.long(), s.lengths.long()), want)
    for x, y in zip((big, *s.cache), before, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@MODULES
def test_a_nan_of_ones_own_spreads_and_reaches_nobody_else(module):
    s = scene([6, 6, 6])
    s.values[s.tables[1, 0], 0, 2] = math.nan
    out = module.decode(s.q, *s.cache)
    assert out[1, :2].isnan().all()
    assert out[[0, 2]].isfinite().all()
    assert out[1, 2:].isfinite().all()


@MODULES
@pytest.mark.parametrize("shift", [-2000.0, 2000.0])
def test_extreme_scores(module, shift):
    s = scene([40, 5], dtype=torch.float32)
    s.q[:, :, 0] = shift
    s.keys[..., 0] += 1
    s.k = [torch.stack([s.keys[s.tables[i, p // 4], :, p % 4] for p in range(n)], 1) for i, n in enumerate((40, 5))]
    got = module.decode(s.q, *s.cache, return_lse=True, splits=2)
    torch.testing.assert_close(tuple(x.double() for x in got), expected(s), rtol=1e-4, atol=1e-3)


# --- shared prefixes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [0, 1, 3])
def test_tokens_read_counts_a_shared_prefix_once(shared):
    s = scene([13, 16, 22, 12], shared=shared)
    assert paged.tokens_read(s.tables, s.lengths, 4) == 63
    assert paged.tokens_read(s.tables, s.lengths, 4, share_prefixes=True) == 63 - 3 * 4 * shared


def test_only_full_blocks_of_those_who_see_them_from_the_beginning_are_shared():
    table = np.array([[7, 3, 5], [7, 3, 5], [7, 3, 6], [9, 3, 5], [7, 2, 5]])
    stop = np.array([11, 12, 9, 12, 3])
    items = Items(table, np.zeros(5, int), stop, stop - 1)
    ((members, count),) = common_prefixes(items, 4)
    assert (members.tolist(), count) == ([0, 1, 2], 2)
    ((members, count),) = common_prefixes(items._replace(start=np.array([1, 0, 0, 0, 0])), 4)
    assert (members.tolist(), count) == ([1, 2], 2)


@MODULES
def test_a_shared_prefix_is_scored_once(module, monkeypatch):
    seen = []

    def noted(read):
        return lambda queries, stored, items: (seen.append(items), read(queries, stored, items))[1]

    monkeypatch.setattr(paged, "copied", noted(copied))
    s = scene([13, 16, 22, 12], shared=3)
    options = {} if module is paged else {"reader": noted(paged_numba.compiled)}
    module.decode(s.q, *s.cache, share_prefixes=True, **options)
    assert sum(int((items.stop - items.start).sum()) for items in seen) == 63 - 3 * 12


# --- prefill ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=4), window=st.integers(-1, 9),
    causal=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_prefill_is_flash_of_each_sequence(pairs, window, causal, seed):
    """(queries, tokens before them): a whole prompt, a piece, one token, none."""
    s = scene([t + before for t, before in pairs], seed=seed)
    counts = [t for t, _ in pairs]
    q = torch.randn(sum(counts), 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ends = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
    options = {"causal": causal, "window": (window, -1), "alibi": SLOPES, "softcap": 3.0, "sinks": SINKS}
    out, lse = paged.prefill(q, ends, *s.cache, return_lse=True, **options)
    for i, rows in enumerate(q.split(counts)):
        want = flash.attention(rows[None].transpose(1, 2), s.k[i][None], s.v[i][None], return_lse=True, **options)
        got = out[ends[i] : ends[i + 1]], lse[ends[i] : ends[i + 1]]
        torch.testing.assert_close(got, tuple(x[0].transpose(0, 1) for x in want), **EXACT)


def test_prefill_of_one_token_each_is_decode():
    s = scene([5, 8, 1])
    one = torch.arange(4, dtype=torch.int32)
    torch.testing.assert_close(paged.prefill(s.q, one, *s.cache), paged.decode(s.q, *s.cache), **EXACT)


# --- from a cache -----------------------------------------------------------------------------------------------------


def filled(lengths, *, window=None, quantized=None, dtype=torch.float64, heads=2, dim=4):
    """A cache of two layers, a token at a time, and what was appended: layer → keys and values of each sequence."""
    cache = PagedKVCache(2, heads, dim, 60, 4, window=window, quantized=quantized, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    seqs = [cache.pool.start() for _ in lengths]
    written = [[torch.randn(2, heads, n, dim, generator=generator).to(dtype) for n in lengths] for _ in range(2)]
    for i, n in enumerate(lengths):
        for p in range(n):
            for layer in range(2):
                cache.append(layer, seqs[i : i + 1], *(x[None, :, p : p + 1] for x in written[layer][i]))
            if p < n - 1:
                cache.advance(seqs[i : i + 1], 1)
    return cache, seqs, written


@MODULES
@pytest.mark.parametrize("window", [None, 6])
def test_a_step_of_a_layer(module, window):
    """The last token is appended and not counted: pending. Blocks that have left the window are gone."""
    cache, seqs, written = filled([9, 14, 1, 27], window=window)
    q = torch.randn(4, 4, 1, 4, dtype=torch.float64)
    for layer in range(2):
        out, lse = module.attention(q, cache, layer, seqs, 1, return_lse=True)
        for i, (k, v) in enumerate(written[layer]):
            want = naive.attention(
                q[i : i + 1], k[None], v[None], causal=True, window=(-1 if window is None else window, -1),
                return_lse=True,
            )  # fmt: skip
            torch.testing.assert_close((out[i : i + 1], lse[i : i + 1]), want, **EXACT)
    assert torch.equal(module.attention(q, cache, 1, iter(seqs), 1), out)


@MODULES
@pytest.mark.parametrize("quantized", ["int8", "fp8"])
def test_a_quantized_cache(module, quantized):
    cache, seqs, _ = filled([9, 14], quantized=quantized, dtype=torch.float32)
    for t in (1, 3):
        q = torch.randn(2, 4, t, 4)
        out = module.attention(q, cache, 0, seqs, 1, share_prefixes=True)
        for i, seq in enumerate(seqs):
            k, v = cache.gather(0, seq, 1)
            want = naive.attention(q[i : i + 1], k[None], v[None], causal=True)
            torch.testing.assert_close(out[i : i + 1], want, rtol=1e-5, atol=1e-5)


@MODULES
def test_a_prompt_in_pieces_is_the_prompt_at_once(module):
    cache = PagedKVCache(1, 2, 4, 30, 4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, h, 13, 4, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    seqs, outs = [cache.pool.start(), cache.pool.start()], []
    for start, stop in ((0, 5), (5, 12), (12, 13)):
        cache.append(0, seqs, k[:, :, start:stop], v[:, :, start:stop])
        outs.append(module.attention(q[:, :, start:stop], cache, 0, seqs, stop - start))
        cache.advance(seqs, stop - start)
    assert module.attention(q[:, :, :0], cache, 0, seqs).shape == (2, 4, 0, 4)
    torch.testing.assert_close(torch.cat(outs, 2), naive.attention(q, k, v, causal=True), **EXACT)


@MODULES
@pytest.mark.parametrize("module_is", ["attention", "decode"])
def test_blocks_are_read_by_whom_one_says(module, module_is):
    """A reader gets each query with its blocks; what it returns is merged as its own."""
    seen = []

    def reader(queries, stored, items):
        seen.append((tuple(queries.rows.shape), items.stop.tolist(), queries.need_lse))
        return copied(queries, stored, items)

    if module_is == "decode":
        s = scene([9, 4, 1])
        got = module.decode(s.q, *s.cache, splits=2, reader=reader)
        torch.testing.assert_close(got, paged.decode(s.q, *s.cache), **EXACT)
        assert seen == [((6, 2, 2, 5), [8, 4, 1, 1, 0, 0], True)]
        return
    cache, seqs, _ = filled([9, 14])
    q = torch.randn(2, 4, 1, 4, dtype=torch.float64)
    got = module.attention(q, cache, 1, seqs, 1, reader=reader)
    torch.testing.assert_close(got, paged.attention(q, cache, 1, seqs, 1), **EXACT)
    assert seen == [((2, 2, 2, 4), [9, 14], False)]


def test_forks_share_their_prefix():
    cache, (seq,), written = filled([10])
    cache.advance([seq], 1)
    seqs = [seq, cache.pool.fork(seq), cache.pool.fork(seq)]
    new = torch.randn(2, 3, 2, 1, 4, dtype=torch.float64)
    cache.append(0, seqs, *new)
    q = torch.randn(3, 4, 1, 4, dtype=torch.float64)
    out = paged.attention(q, cache, 0, seqs, 1, share_prefixes=True)
    k, v = (torch.cat([x.expand(3, -1, -1, -1), y], 2) for x, y in zip(written[0][0], new, strict=True))
    torch.testing.assert_close(out, naive.attention(q, k, v, causal=True), **EXACT)
    assert paged.tokens_read(*cache.tables(seqs, 1), 4, share_prefixes=True) == 3 * 11 - 2 * 8


# --- bad input --------------------------------------------------------------------------------------------------------

BAD = {
    "q a list": ("q", lambda x: x.tolist(), TypeError, r"q must be a torch\.Tensor, got list"),
    "q of 4 dimensions": ("q", lambda x: x[None], ValueError, r"q must have 3 dimensions.*got shape \(1, 6, 4, 5\)"),
    "q of ints": ("q", lambda x: x.int(), TypeError, r"q must be float64.*got torch\.int32"),
    "more queries": ("q", lambda x: x.repeat(2, 1, 1), ValueError, r"one query for each of 6 sequences.*use prefill"),
    "heads": ("q", lambda x: x[:, :3], ValueError, "q must have a multiple of the heads of keys, got 3 heads"),
    "head_dim": ("q", lambda x: x[..., :4], ValueError, r"keys must have q's head_dim 4, got 5"),
    "other dtype": ("keys", lambda x: x.float(), TypeError, r"keys must have q's dtype torch\.float64, got torch\.fl"),
    "codes, no scales": ("values", lambda x: x.char(), TypeError, "values must have .* pass their scales"),
    "keys of 3 dimensions": ("keys", lambda x: x[0], ValueError, r"keys must be a tensor \(blocks, kv_heads, block, h"),
    "keys in another order": ("keys", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), ValueError,
                              r"keys must be contiguous.*keys\.contiguous\(\)"),
    "some of the heads": ("values", lambda x: x.repeat(1, 2, 1, 1)[:, :2], ValueError, "values must be contiguous"),
    "values of others": ("values", lambda x: x[1:], ValueError, "values must have the blocks, heads and block size"),
    "device": ("keys", lambda x: x.to("meta"), ValueError, "keys must be on q's device cpu, got meta"),
    "tables of floats": ("tables", lambda x: x.float(), TypeError, r"tables must be an int32 or int64.*tables\.int"),
    "tables of 1 dimension": ("tables", lambda x: x[0], ValueError, r"tables must be \(seqs, max_blocks\), got shape"),
    "a table less": ("tables", lambda x: x[1:], ValueError, "tables must have a row for each of 6 sequences, got"),
    "tables too short": ("tables", lambda x: x[:, :3], ValueError,
                         "tables must have a block of 4 tokens for each .*sequence, 13, that is 4 columns, got"),
    "entry too large": ("tables", lambda x: x.where(x != x[4, 2], 99), ValueError,
                        r"got 99 for sequence 4 at column 2, tokens 8 to 11: there are \d+ blocks"),
    "entry of −1": ("tables", lambda x: x.where(x != x[4, 0], -1), ValueError,
                    "got -1 for sequence 4 at column 0, tokens 0 to 3: a block that has left the cache's window"),
    "lengths of bools": ("lengths", lambda x: x > 0, TypeError, r"lengths must be an int32 or int64.*got torch\.bool"),
    "negative length": ("lengths", lambda x: -x, ValueError, "lengths must be numbers of tokens, at least 0, got -13"),
}  # fmt: skip


@MODULES
@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_argument_value_and_remedy(module, name):
    argument, change, error, message = BAD[name]
    s = scene(LENGTHS)
    given_ = {"q": s.q, "keys": s.keys, "values": s.values, "tables": s.tables, "lengths": s.lengths}
    given_[argument] = change(given_[argument])
    with pytest.raises(error, match=message):
        module.decode(**given_)


WRONG_OPTIONS = {
    "splits": ({"splits": 0}, ValueError, "splits must be at least 1, got 0"),
    "splits as a float": ({"splits": 2.0}, TypeError, "splits must be an int"),
    "window": ({"window": 3}, TypeError, "window must be two ints"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap must be positive"),
    "sinks": ({"sinks": torch.zeros(3)}, ValueError, "sinks must have one number a query head"),
    "scale": ({"scale": math.inf}, ValueError, "scale must be finite"),
    "one scale": ({"scales": (torch.ones(1),)}, TypeError, "scales must be None or two tensors"),
    "a scale alone": ({"scales": torch.ones(2)}, TypeError, "scales must be None or two tensors.*got Tensor"),
    "scales of numbers": ({"scales": (torch.ones(1), torch.ones(1))}, TypeError, "keys must be int8 or float8_e4m3fn"),
}


@MODULES
@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_bad_options(module, name):
    options, error, message = WRONG_OPTIONS[name]
    s = scene(LENGTHS)
    with pytest.raises(error, match=message):
        module.decode(s.q, *s.cache, **options)


@pytest.mark.usefixtures("unchecked_types")
def test_scales_must_be_those_of_the_blocks():
    s = scene(LENGTHS)
    (keys, ks), (values, vs) = (quantize(x, FORMATS["int8"]) for x in (s.keys, s.values))
    for scales in ((ks[1:], vs), (ks, vs.double())):
        with pytest.raises(ValueError, match="scales must be two float32 tensors"):
            paged.decode(s.q.float(), keys, values, s.tables, s.lengths, scales=scales)


@MODULES
def test_no_gradient_is_promised(module):
    s = scene(LENGTHS)
    with pytest.raises(RuntimeError, match=r"paged attention is for inference.*torch\.no_grad\(\)"):
        module.decode(s.q.requires_grad_(), *s.cache)
    with torch.no_grad():
        module.decode(s.q, *s.cache)


@MODULES
@pytest.mark.parametrize("name", ["keys", "values", "sinks"])
def test_no_gradient_is_lost_in_silence(module, name):
    s = scene(LENGTHS)
    given_ = {"keys": s.keys.clone(), "values": s.values.clone(), "sinks": torch.zeros(4)}
    given_[name].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{name} is part of a gradient"):
        module.decode(s.q, tables=s.tables, lengths=s.lengths, **given_)


PACKED = {
    "floats": (lambda x: x.float(), TypeError, r"cu_seqlens_q must be an int32 or int64 tensor, got torch\.float32"),
    "too few": (lambda x: x[1:], ValueError, r"cu_seqlens_q must have one number more than sequences, 7, got shape"),
    "not to the end": (lambda x: x - 1, ValueError, r"cu_seqlens_q must go up from 0 to the rows of q, 6, got \[-1, 0"),
    "more than tokens": (lambda x: torch.tensor([0, 1, 2, 3, 4, 5, 6]), ValueError,
                         "lengths must count the queries too, 1 in sequence 2, got 0"),
}  # fmt: skip


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", PACKED)
def test_bad_packing(name):
    change, error, message = PACKED[name]
    s = scene(LENGTHS)
    with pytest.raises(error, match=message):
        paged.prefill(s.q, change(torch.arange(7)), *s.cache)


@MODULES
@pytest.mark.usefixtures("unchecked_types")
def test_bad_use_of_a_cache(module):
    cache, seqs, _ = filled([9, 14], window=6)
    q = torch.zeros(2, 4, 1, 4, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"q must be \(seqs, heads, t, head_dim\) with 1 sequences, got \(2, 4, 1, 4\)"
    ):
        module.attention(q, cache, 0, seqs[:1])
    with pytest.raises(ValueError, match="layer must be below 2, the number of layers, got 2"):
        module.attention(q, cache, 2, seqs)
    with pytest.raises(TypeError, match=r"q must be a torch\.Tensor, got list"):
        module.attention([1], cache, 0, seqs)
    with pytest.raises(ValueError, match="splits must be at least 1, got 0"):
        module.attention(torch.zeros(2, 4, 0, 4, dtype=torch.float64), cache, 0, seqs, splits=0)
    with pytest.raises(ValueError, match="pending must lie between 0 and 1, got 2"):
        module.attention(q, cache, 0, seqs, 2)
    with pytest.raises(ValueError, match=r"left the cache's window is visible.*pass the window that the cache has"):
        module.attention(q, cache, 0, seqs, 1, window=(13, -1))


@MODULES
@pytest.mark.parametrize("seed", [1000, 2000])
def test_the_contract_with_other_numbers(module, seed):
    contract = find(f"attention.{module.__name__.rpartition('.')[2]}")
    assert check(contract, module.decode, seed=seed).passed
    assert check(contract, lambda *x, scale=None: module.decode(*x, scale=scale, splits=2), seed=seed).passed


@MODULES
@pytest.mark.parametrize("share", [False, True])
def test_a_scale_is_applied_to_scores_in_float32(module, share):
    """In float16, scaled queries would be infinite, and the difference of their scores no number."""
    s = scene([9, 6, 12], shared=1, dtype=torch.float16)
    out, lse = module.decode(s.q, *s.cache, scale=1e5, share_prefixes=share, return_lse=True)
    wide = module.decode(s.q.double(), *(x.double() for x in s.cache[:2]), *s.cache[2:], scale=1e5, return_lse=True)
    assert out.isfinite().all()
    torch.testing.assert_close(lse.double(), wide[1], rtol=1e-3, atol=50)
    torch.testing.assert_close(out.double(), wide[0], rtol=1e-2, atol=1e-2)


@MODULES
def test_tables_may_change_after_they_are_checked(module):
    s = scene([9, 4])
    tables = s.cache[2].long()
    seen = []

    def reader(queries, stored, items):
        tables.fill_(10**9)
        seen.append(items.table.max() < len(stored.keys))
        return copied(queries, stored, items)

    module.decode(s.q, *s.cache[:2], tables, s.cache[3], reader=reader)
    assert seen == [True]
