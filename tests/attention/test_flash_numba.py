"""`mlsys.attention.flash_numba` passes the tests of `flash.attention`; its 2^x and its maximum are what they say."""

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from mlsys.attention import _vector_numba, flash, flash_numba, naive

_spec = importlib.util.spec_from_file_location("tests_of_flash", Path(__file__).with_name("test_flash.py"))
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)
_shared.flash = SimpleNamespace(**{**vars(flash), "attention": flash_numba.attention})
_OF_FLASH_ALONE = ("packed", "lengths", "tiles", "window_visits", "traffic", "shapes_are_checked")
globals().update(
    {
        name: value
        for name, value in vars(_shared).items()
        if name.startswith("test_") and not any(part in name for part in _OF_FLASH_ALONE)
    }
)

FINITE = st.floats(-(2.0**127), 2.0**127, width=32)


@njit
def exp2_of(x):
    out = np.empty_like(x)
    for i in range(x.shape[0]):
        out[i] = _vector_numba.exp2(x[i])
    return out


@njit
def largest_of(x, so_far):
    return _vector_numba.largest(x.view(np.int32), so_far)


def test_exp2_is_exact_to_three_roundings_over_its_range():
    x = np.linspace(-125.9, 0.0, 1_000_003, dtype=np.float32)
    want = np.exp2(x.astype(np.float64))
    assert np.abs(exp2_of(x) / want - 1).max() < 3 * 2**-24


def test_exp2_of_whole_numbers_is_exact_and_of_the_lowest_zero():
    x = np.arange(-126, 2, dtype=np.float32)
    np.testing.assert_allclose(exp2_of(x), np.exp2(x), rtol=3e-9 + 2**-24)
    far = np.array([-127, -128, -1e30, -np.inf], np.float32)
    assert exp2_of(far).tolist() == [0.0] * 4
    assert math.isnan(exp2_of(np.array([np.nan], np.float32))[0])


@given(st.lists(FINITE, max_size=40), FINITE)
def test_largest_is_the_maximum(xs, so_far):
    x = np.array(xs, np.float32)
    assert largest_of(x, np.float32(so_far)) == max([*x.tolist(), so_far])


@pytest.mark.parametrize("values", [[-np.inf, -3.0], [np.inf, 1.0], [-0.0, -1e-45], [-1e-45, -1.0]])
def test_largest_of_special_numbers(values):
    x = np.array(values, np.float32)
    assert largest_of(x, np.float32(-3e38)) == x.max()


@njit
def read_and_stored(bits, out, again):
    for i in range(bits.shape[0]):
        out[i] = _vector_numba.number(bits[i])
        again[i] = _vector_numba.stored(out[i], bits[i])
    return _vector_numba.peak(bits[:0]), _vector_numba.peak(bits)


def test_every_bfloat16_is_read_as_torch_reads_it_and_stored_again():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[~every.isnan()]
    out, again = np.empty(len(every), np.float32), np.empty(len(every), np.uint16)
    lowest, top = read_and_stored(every.view(torch.uint16).numpy(), out, again)
    assert torch.equal(torch.from_numpy(out), every.float())
    assert torch.equal(torch.from_numpy(again).view(torch.bfloat16), every)
    assert (lowest, top) == (-np.inf, np.inf)


def test_peak_number_and_stored_say_the_same_uncompiled():
    """With NUMBA_DISABLE_JIT=1 their own bodies run."""
    x = torch.tensor([-3.5, 1.25, 300.0, -0.0]).bfloat16()
    bits = x.view(torch.uint16).numpy()
    assert (_vector_numba.peak(bits), _vector_numba.peak(bits[:0])) == (300.0, -np.inf)
    assert [_vector_numba.number(b) for b in bits] == x.tolist()
    assert [_vector_numba.stored(_vector_numba.number(b), b) for b in bits] == bits.tolist()
    wide = x.float().numpy()
    assert (_vector_numba.peak(wide), _vector_numba.number(wide[0]), _vector_numba.stored(wide[0], wide[0])) == (
        300.0, -3.5, -3.5,
    )  # fmt: skip


@njit
def stored_of(x, like):
    out = np.empty(x.shape[0], np.uint16)
    for i in range(x.shape[0]):
        out[i] = _vector_numba.stored(x[i], like[0])
    return out


def test_float32_is_rounded_to_bfloat16_as_torch_rounds_it():
    upper = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16().float().view(torch.int32)
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)  # a tie, and what lies around it
    x = (upper[:, None] | lower).flatten().view(torch.float32)
    got = stored_of(x.numpy(), np.zeros(1, np.uint16))
    assert torch.equal(torch.from_numpy(got).view(torch.bfloat16), x.bfloat16())


@given(st.lists(FINITE, min_size=1, max_size=80))
def test_the_peak_of_bfloat16_is_the_maximum(xs):
    x = torch.tensor(xs).bfloat16()
    _, top = read_and_stored(x.view(torch.uint16).numpy(), np.empty(len(xs), np.float32), np.empty(len(xs), np.uint16))
    assert top == x.max().float().item()


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (20, 3)])
@pytest.mark.parametrize(("t", "s"), [(70, 70), (9, 50), (60, 21)])
def test_narrow_tiles_are_as_exact_as_16_bits_allow(t, s, window):
    """Several tiles a row, scores of some size: hardly more error than `naive` has in 16 bits."""
    generator = torch.Generator().manual_seed(0)
    q = (3 * torch.randn(2, 4, t, 12, generator=generator)).bfloat16()
    k, v = (torch.randn(2, 2, s, 12, generator=generator).bfloat16() for _ in "kv")
    want = naive.attention(q.float(), k.float(), v.float(), window=window, return_lse=True)
    allowed = naive.attention(q, k, v, window=window, return_lse=True)
    got = flash_numba.attention(q, k, v, window=window, return_lse=True, block_q=16, block_k=8)
    for x, by_naive, exact in zip(got, allowed, want, strict=True):
        seen = exact.isfinite()
        assert torch.equal(x.isfinite(), seen)
        assert (x - exact)[seen].abs().max() < 1.5 * (by_naive - exact)[seen].abs().max()


@settings(deadline=None, max_examples=25)
@given(
    t=st.integers(1, 70),
    s=st.integers(1, 70),
    left=st.integers(-1, 40),
    right=st.integers(-1, 40),
    block_q=st.integers(1, 40),
    block_k=st.integers(1, 40),
    group=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_a_band_hides_is_never_computed(t, s, left, right, block_q, block_k, group, seed):
    """Scores of hidden keys would overflow any exponential, and gradients get no part of them."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, 2 * group, t, 8, generator=generator, requires_grad=True)
    k, v = (torch.randn(1, 2, s, 8, generator=generator, requires_grad=True) for _ in "kv")
    results = []
    for function, blocks in (
        (naive.attention, {}),
        (flash_numba.attention, {"block_q": block_q, "block_k": block_k}),
    ):
        out, lse = function(q, k, v, window=(left, right), return_lse=True, **blocks)
        grads = torch.autograd.grad(out.sin().sum() + lse[lse.isfinite()].sum(), (q, k, v))
        results.append((out, lse, *grads))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_the_compiled_sweep_is_the_one_that_runs(monkeypatch):
    """float32 on a CPU never calls torch's sweeps; float64, which has no compiled one, does."""

    def refuse(*_):
        raise AssertionError("torch's sweep was called")

    monkeypatch.setattr(flash, "SWEEPS", flash.SWEEPS._replace(softmax=refuse, gradient=refuse))
    q = torch.randn(1, 2, 9, 4, requires_grad=True)
    flash_numba.attention(q, q, q, causal=True, softcap=3.0).sum().backward()
    with pytest.raises(AssertionError, match="sweep was called"):
        flash_numba.attention(*[q.detach().double()] * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rise", [0.0, 1.0, 5.0, 30.0])
def test_a_maximum_that_rises_a_little_is_left_behind_and_the_result_is_the_same(dtype, rise):
    """A column of ones in q and steps of `rise` in k: the scores of each block of keys lie so much higher."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 8, generator=generator) for _ in "qkv")
    q = 0.3 * q
    q[..., 0], k[..., 0] = 1.0, torch.arange(64) // 8 * rise
    rescaled = []

    def counted(*given):
        rescaled.append(flash_numba._SWEEPS.softmax(*given))
        return rescaled[-1]

    q, k, v = (x.to(dtype) for x in (q, k, v))
    options = {"scale": 1.0, "return_lse": True}
    want = naive.attention(q.double(), k.double(), v.double(), **options)
    sweeps = flash_numba._SWEEPS._replace(softmax=counted)
    got = flash.attention(q, k, v, **options, block_q=64, block_k=8, sweeps=sweeps)
    by_naive = naive.attention(q, k, v, **options)
    for x, y, allowed in zip(got, want, by_naive, strict=True):
        assert (x - y).abs().max() < 1.5 * (allowed - y).abs().max() + 2e-5
    first, *later = rescaled[:8]
    assert first is True
    assert {0.0: sum(later) == 0, 1.0: 0 < sum(later) < 7, 5.0: sum(later) > 0, 30.0: all(later)}[rise]


@pytest.mark.parametrize("module", [flash, flash_numba])
@pytest.mark.parametrize("blocks", [{}, {"block_q": 16, "block_k": 24}])
@pytest.mark.parametrize("size", [1, 4, 16])
def test_gradients_in_16_bits_err_as_those_of_naive(module, blocks, size):
    """The backward pass rounds the scores as the forward pass has: else P would not sum to 1, the less the larger."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, 2, 64, 64, generator=generator) for _ in range(4))
    given = [x.bfloat16() for x in (size * q, k, v)]
    grads = []
    for function, dtype, options in (
        (naive.attention, torch.float64, {}),
        (naive.attention, torch.bfloat16, {}),
        (module.attention, torch.bfloat16, blocks),
    ):
        leaves = [x.to(dtype).requires_grad_() for x in given]
        out = function(*leaves, causal=True, **options)
        grads.append(torch.autograd.grad(out, leaves, grad.to(dtype)))
    for exact, by_naive, got in zip(*grads, strict=True):
        assert (got - exact).abs().max() < 1.6 * (by_naive - exact).abs().max()


def test_huge_scores_in_16_bits_stay_finite():
    generator = torch.Generator().manual_seed(0)
    q, k = (1e6 * torch.randn(1, 1, n, 8, generator=generator).bfloat16() for n in (40, 100))
    got = flash_numba.attention(q, k, torch.ones(1, 1, 100, 8).bfloat16(), scale=1.0)
    assert torch.equal(got, torch.ones_like(got))


@pytest.mark.parametrize("module", [flash, flash_numba])
def test_the_lowest_sink_and_a_tile_that_is_hidden_are_no_nan(module):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 8, 4, generator=generator) for _ in "qkv")
    mask = (torch.arange(8) >= 4).expand(8, 8)
    sinks = torch.full((2,), -3e38)
    got = module.attention(q, k, v, mask=mask, sinks=sinks, block_q=8, block_k=1)
    torch.testing.assert_close(got, naive.attention(q, k, v, mask=mask, sinks=sinks))


def test_16_bits_with_options_take_the_compiled_sweep_too():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 33, 8, generator=generator).bfloat16() for _ in range(3))
    got = flash_numba.attention(q, k, v, causal=True, softcap=2.0)
    torch.testing.assert_close(got, flash.attention(q, k, v, causal=True, softcap=2.0), rtol=2e-2, atol=2e-2)
