"""`mlsys.attention.paged_triton`: what `paged` computes, in parts, with or without a look at the tables first."""

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys.attention import paged, paged_triton
from mlsys.attention._kv_quant import FORMATS, dequantize, quantize
from mlsys.attention.kv_cache import PagedKVCache
from mlsys.contracts import check, find
from mlsys.kernels._triton import INTERPRETED, config

_spec = importlib.util.spec_from_file_location("tests_of_paged", Path(__file__).with_name("test_paged.py"))
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)
LENGTHS, OPTIONS = _shared.LENGTHS, _shared.OPTIONS

DEVICE = "cpu" if INTERPRETED.value else "cuda"
SMALL = config(BLOCK_N=16, warps=4, stages=2)
EXACT = {"rtol": 2e-5, "atol": 2e-5}


def scene(lengths, dtype=torch.float32, **how):
    s = _shared.scene(lengths, dtype=dtype, **how)
    for name in ("q", "keys", "values", "tables", "lengths"):
        setattr(s, name, getattr(s, name).to(DEVICE))
    s.cache = s.keys, s.values, s.tables, s.lengths
    return s


def expected(s, **options):
    return _shared.expected(SimpleNamespace(q=s.q.cpu(), k=s.k, v=s.v), **options)


def narrow(options):
    return {name: x.float().to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}


def close(got, want, **allowed):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double().cpu(), w, **(allowed or EXACT))


def test_the_contract_of_paged_but_for_float64():
    contract = find("attention.paged")
    contract = replace(contract, cases=[case for case in contract.cases if case["dtype"] != "float64"])
    assert len(contract.cases) > 15
    verdict = check(contract, paged_triton.decode, device=DEVICE)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("splits", [None, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_in_one_part_and_in_several(name, splits):
    s = scene(LENGTHS)
    options = OPTIONS[name]
    got = paged_triton.decode(*(s.q, *s.cache), splits=splits, return_lse=True, config=SMALL, **narrow(options))
    close(got, expected(s, **options))


def test_shared_prefixes_and_the_parts_of_the_door_itself():
    s = scene([9, 4, 13, 8], shared=1)
    for options in ({"share_prefixes": True}, {"share_prefixes": True, "splits": 2}):
        got = paged_triton.decode(s.q, *s.cache, return_lse=True, **options, **narrow(OPTIONS["alibi"]))
        close(got, expected(s, **OPTIONS["alibi"]))
    by_paged = paged.decode(
        s.q, *s.cache, return_lse=True, splits=3, reader=paged_triton.compiled, **narrow(OPTIONS["alibi"])
    )
    close(by_paged, expected(s, **OPTIONS["alibi"]))


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=3), block=st.integers(1, 9),
    group=st.sampled_from([1, 3, 8, 17]), h_kv=st.integers(1, 2), window=st.integers(-1, 12),
    splits=st.none() | st.integers(1, 7), seed=st.integers(0, 999),
)  # fmt: skip
def test_any_tables_by_either_door(lengths, block, group, h_kv, window, splits, seed):
    s = scene(lengths, h=group * h_kv, h_kv=h_kv, block=block, seed=seed)
    how = {"window": (window, -1), "splits": splits, "return_lse": True, "config": SMALL}
    want = expected(s, window=(window, -1))
    close(paged_triton.decode(s.q, *s.cache, **how), want)
    close(paged_triton.step(s.q, *s.cache, **how), want)


@pytest.mark.parametrize("name", [name for name, options in OPTIONS.items() if "sinks" not in options])
def test_a_step_has_the_options_too(name):
    s = scene(LENGTHS)
    out = paged_triton.step(s.q, *s.cache, splits=2, config=SMALL, **narrow(OPTIONS[name]))
    close([out], expected(s, **OPTIONS[name])[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_more_than_twice_the_error_of_plain_torch_in_that_dtype(dtype):
    s = scene([60, 33, 1, 17], h=8, h_kv=2, d=32, dv=16, block=16, dtype=dtype)
    want = expected(s)
    plain = _shared.paged.decode(s.q.cpu(), *(x.cpu() for x in s.cache), return_lse=True)
    for splits in (1, 3):
        got = paged_triton.decode(s.q, *s.cache, splits=splits, return_lse=True)
        assert [x.dtype for x in got] == [dtype, torch.float32]
        for g, a, w in zip(got, plain, want, strict=True):
            error, baseline = ((x.double().cpu() - w).abs().max().item() for x in (g, a))
            assert error <= 2 * baseline + 4e-7 * w.abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("code", ["int8", "fp8"])
def test_codes_of_8_bits_are_what_they_stand_for(code, dtype):
    s = scene([9, 4, 20], h=8, h_kv=2, d=16, dv=16)
    (keys, ks), (values, vs) = (quantize(x.nan_to_num(1e30), FORMATS[code]) for x in (s.keys, s.values))
    wide = [dequantize(x, scale, torch.float32) for x, scale in ((keys, ks), (values, vs))]
    q, sinks = s.q.to(dtype), narrow(OPTIONS["sinks"])["sinks"].repeat(2)
    allowed = EXACT if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for options in ({}, {"sinks": sinks, "window": (6, -1)}, {"splits": 2}):
        got = paged_triton.decode(q, keys, values, s.tables, s.lengths, scales=(ks, vs), return_lse=True, **options)
        want = paged.decode(q.float(), *wide, s.tables, s.lengths, return_lse=True, **options)
        close(got, [x.double().cpu() for x in want], **allowed)
    got = paged_triton.step(q, keys, values, s.tables, s.lengths, scales=(ks, vs))
    close([got], [paged.decode(q.float(), *wide, s.tables, s.lengths).double().cpu()], **allowed)


def test_every_code_of_e4m3_is_read_as_torch_reads_it():
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = values[values.float().isfinite()].view(1, 1, 1, -1).to(DEVICE)[..., :252]
    keys, ones = torch.zeros(1, 1, 1, 16, device=DEVICE).to(values.dtype), torch.ones(1, 1, 1, device=DEVICE)
    where = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE), torch.ones(1, dtype=torch.int32, device=DEVICE)
    out = paged_triton.decode(torch.ones(1, 1, 16, device=DEVICE), keys, values, *where, scales=(ones, ones))
    assert torch.equal(out.flatten(), values.float().flatten())


@pytest.mark.parametrize("softcap", [1e-3, 3.0, 1e4])
def test_a_soft_cap_of_any_size(softcap):
    """Far from 0 by an exponential, near it by a series: what a difference loses would be multiplied by the cap."""
    s = scene([70, 1, 33])
    close(paged_triton.decode(s.q, *s.cache, softcap=softcap, return_lse=True), expected(s, softcap=softcap))


def test_views_are_read_as_they_are_and_nothing_is_changed():
    s = scene(LENGTHS)
    big = s.q.new_full((len(LENGTHS), 5, 8), math.nan).transpose(1, 2)[:, ::2]  # (seqs, 4, 5), strided
    big.copy_(s.q)
    wide = torch.full((len(LENGTHS), 2 * s.tables.shape[1]), -7, dtype=torch.int64, device=DEVICE)[:, ::2]
    wide.copy_(s.tables)
    before = [x.clone() for x in (big, *s.cache)]
    want = paged_triton.decode(s.q, *s.cache)
    assert torch.equal(paged_triton.decode(big, s.keys, s.values, wide, s.lengths.long()), want)
    torch.testing.assert_close(paged_triton.step(big, s.keys, s.values, wide, s.lengths.long()), want, **EXACT)
    for x, y in zip((big, *s.cache), before, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_a_nan_of_ones_own_spreads_and_reaches_nobody_else():
    s = scene([6, 6, 6])
    s.values[s.tables[1, 0], 0, 2] = math.nan
    out = paged_triton.decode(s.q, *s.cache, splits=2, config=SMALL)
    assert out[1, :2].isnan().all()
    assert out[[0, 2]].isfinite().all()
    assert out[1, 2:].isfinite().all()


def test_entries_that_are_no_blocks_are_named_by_decode_and_not_followed_by_a_step():
    for entry in (-1, 10**6, -(10**6)):
        s = scene([9, 12])
        want = paged_triton.step(s.q, *s.cache)
        s.tables[1, 1] = entry
        with pytest.raises(ValueError, match=rf"got {entry} for sequence 1 at column 1, tokens 4 to 7"):
            paged_triton.decode(s.q, *s.cache)
        got = paged_triton.step(s.q, *s.cache)
        assert torch.equal(got[0], want[0])
        assert got[1].isnan().all()
    s = scene([9, 12], spare=0)
    s.lengths[1] = 13  # one more than the table has places for
    got = paged_triton.step(s.q, *s.cache)
    assert torch.equal(got[0], want[0])
    assert got[1].isnan().all()


def test_no_number_is_left_unwritten_and_none_written_beside(monkeypatch):
    """Results begin as NaN, in the middle of a larger tensor of canaries."""
    made, original = [], torch.Tensor.new_empty

    def empty(self, *shape, dtype=None, **how):
        if shape == (0,):  # the interpreter's own
            return original(self, 0, dtype=dtype, **how)
        n = math.prod(shape)
        around = torch.full((n + 64,), 7.0, dtype=dtype or self.dtype, device=self.device)
        around[32 : 32 + n] = math.nan
        made.append((around, n))
        return around[32 : 32 + n].view(shape)

    s = scene([9, 4, 0, 30], d=5, dv=3)
    want = expected(s)
    monkeypatch.setattr(torch.Tensor, "new_empty", empty)
    for splits in (1, 4):
        made.clear()
        close(paged_triton.step(s.q, *s.cache, splits=splits, return_lse=True, config=SMALL), want)
        assert len(made) == (2 if splits == 1 else 4)
        for around, n in made:
            assert not around.isnan().any()
            assert (around[:32] == 7.0).all()
            assert (around[32 + n :] == 7.0).all()


def test_a_layer_of_a_cache():
    generator = torch.Generator().manual_seed(0)
    cache = PagedKVCache(layers=1, kv_heads=2, head_dim=8, blocks=20, block=4, device=DEVICE)
    seqs = [cache.pool.start(), cache.pool.start()]
    for n in (9, 1):
        q, k, v = (torch.randn(2, h, n, 8, generator=generator).to(DEVICE) for h in (4, 2, 2))
        cache.append(0, seqs, k, v)
        got = paged_triton.attention(q, cache, 0, seqs, pending=n)
        torch.testing.assert_close(got, paged.attention(q, cache, 0, seqs, pending=n), **EXACT)
        cache.advance(seqs, n)


def test_no_sequences_no_tokens():
    s = scene([0, 0], spare=0)
    for function in (paged_triton.decode, paged_triton.step):
        out, lse = function(s.q, *s.cache, return_lse=True)
        assert (out == 0).all()
        assert (lse == -math.inf).all()
        none = function(s.q[:0], s.keys, s.values, s.tables[:0], s.lengths[:0])
        assert none.shape == (0, 4, 3)


def test_how_many_parts():
    def parts(programs, longest):
        return paged_triton._parts(programs, longest, torch.device("cpu"))  # one processor, EACH programs for it

    assert parts(1, 10_000) == paged_triton.EACH
    assert parts(2, 10_000) == paged_triton.EACH // 2
    assert parts(1, 2 * paged_triton.SHORTEST_PART) == 2
    assert parts(1, 5) == parts(100, 10_000) == parts(0, 0) == 1


@pytest.mark.usefixtures("unchecked_types")
def test_what_the_kernel_cannot_do_is_refused_by_name():
    s = scene([5])
    for function in (paged_triton.decode, paged_triton.step):
        with pytest.raises(TypeError, match=r"float32, bfloat16 or float16 for the Triton kernel, got float64"):
            function(s.q.double(), s.keys.double(), s.values.double(), s.tables, s.lengths)
        with pytest.raises(TypeError, match=r"keys must have q's dtype torch\.bfloat16"):
            function(s.q.bfloat16(), *s.cache)
        with pytest.raises(ValueError, match=r"q must have head_dim at most 256 for the Triton kernel, got 300"):
            function(s.q.new_zeros(1, 4, 300), *s.cache)
        with pytest.raises(ValueError, match=r"splits must be at least 1, got 0"):
            function(s.q, *s.cache, splits=0)
        with pytest.raises(ValueError, match=r"keys must be on q's device"):
            function(s.q.to("meta"), *s.cache)
    with pytest.raises(ValueError, match=r"lengths must be int32 or int64, with a row for each of 1 sequences"):
        paged_triton.step(s.q, *s.cache[:3], torch.tensor([1, 2], device=DEVICE))


def test_every_kernel_has_specimens():
    found = paged_triton.specimens()
    assert {one.name.split()[0] for one in found} == {"paged.attend", "paged.merge"}
    assert len({(one.name, one.config) for one in found}) == len(found)


def test_typical_calls_can_be_made():
    calls = dict(paged_triton.typical(torch.device(DEVICE), torch.float32, (2, 4, 2, 20, 16)))
    assert len(calls) == 1
    for call in calls.values():
        call()
    with pytest.raises(ValueError, match="it must be"):
        list(paged_triton.typical(torch.device(DEVICE), torch.float32, (3, 4)))
