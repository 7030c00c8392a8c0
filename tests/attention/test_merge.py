"""`mlsys.attention.merge`: attention over the union of two sets of keys, whatever is in either."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlsys.attention import flash, naive
from mlsys.attention.merge import merge


def qkv(b=1, h=2, t=4, s=9, d=5, dv=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = (b, h, t, d), (b, h, s, d), (b, h, s, dv)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def part(q, k, v, keys, **options):
    return naive.attention(q, k[:, :, keys], v[:, :, keys], return_lse=True, **options)


def parts(t=3, dv=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    sizes = (1, 2, t, dv), (1, 2, t)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in (*sizes, *sizes)]


@given(b=st.integers(1, 2), t=st.integers(0, 5), s=st.integers(0, 9), cut=st.integers(0, 9), seed=st.integers(0, 99))
def test_two_sets_are_their_union(b, t, s, cut, seed):
    q, k, v = qkv(b=b, t=t, s=s, seed=seed)
    got = merge(*part(q, k, v, slice(0, cut)), *part(q, k, v, slice(cut, None)))
    for g, w in zip(got, part(q, k, v, slice(None)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


def test_any_order_and_any_tree():
    q, k, v = qkv(s=12)
    a, b, c = (part(q, k, v, torch.arange(start, 12, 3)) for start in range(3))
    want = part(q, k, v, slice(None))
    for got in (merge(*merge(*a, *b), *c), merge(*a, *merge(*b, *c)), merge(*c, *merge(*b, *a))):
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


def test_flash_is_this_over_its_tiles():
    """The running state of the online softmax, divided at each step instead of at the end."""
    q, k, v = qkv(t=7, s=20)
    out, lse = torch.zeros(1, 2, 7, 3, dtype=torch.float64), torch.full((1, 2, 7), -math.inf, dtype=torch.float64)
    for j in range(0, 20, 6):
        out, lse = merge(out, lse, *part(q, k, v, slice(j, j + 6)))
    want = flash.attention(q, k, v, block_q=7, block_k=6, return_lse=True)
    torch.testing.assert_close((out, lse), want, rtol=1e-12, atol=1e-12)


def test_a_sink_belongs_to_one_part():
    q, k, v = qkv()
    sinks = torch.tensor([0.5, -1.0], dtype=torch.float64)
    got = merge(*part(q, k, v, slice(0, 4), sinks=sinks), *part(q, k, v, slice(4, None)))
    torch.testing.assert_close(got, part(q, k, v, slice(None), sinks=sinks), rtol=1e-12, atol=1e-12)


def test_keys_that_a_query_does_not_see_are_an_empty_part():
    """Split-KV with a causal mask: the later half is invisible to the first queries."""
    q, k, v = qkv(t=8, s=8)
    first = part(q, k, v, slice(0, 4), window=(-1, 4))  # query i sees keys up to i
    second = naive.attention(q, k[:, :, 4:], v[:, :, 4:], causal=True, return_lse=True)
    assert (second[1][:, :, :4] == -math.inf).all()
    torch.testing.assert_close(merge(*first, *second), part(q, k, v, slice(None), causal=True))


def test_an_empty_part_counts_for_nothing_and_two_make_one():
    out_a, lse_a, out_b, lse_b = parts()
    lse_a[:, :, :2] = -math.inf
    out_a[:, :, :2] = math.nan
    lse_b[:, :, 1] = -math.inf
    for got_out, got_lse in (merge(out_a, lse_a, out_b, lse_b), merge(out_b, lse_b, out_a, lse_a)):
        assert torch.equal(got_out[:, :, 0], out_b[:, :, 0])
        assert torch.equal(got_lse[:, :, 0], lse_b[:, :, 0])
        assert (got_out[:, :, 1] == 0).all()
        assert (got_lse[:, :, 1] == -math.inf).all()


def test_gradients_by_finite_differences():
    assert torch.autograd.gradcheck(merge, [x.requires_grad_() for x in parts()])


def test_gradients_of_empty_parts_are_zero_not_nan():
    given_ = parts()
    given_[1][:, :, :2] = -math.inf
    given_[0][:, :, :2] = math.nan
    given_[3][:, :, 1] = -math.inf
    inputs = [x.requires_grad_() for x in given_]
    out, lse = merge(*inputs)
    grads = torch.autograd.grad(out.sum() + lse[lse.isfinite()].sum(), inputs)
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][:, :, :2] == 0).all()
    assert (grads[1][:, :, :2] == 0).all()
    assert torch.autograd.gradcheck(merge, [x.nan_to_num().requires_grad_() for x in parts()])


@pytest.mark.parametrize("size", [-1e30, -700.0, 700.0, 1e30])
def test_extreme_log_sum_exps(size):
    out_a, lse_a, out_b, lse_b = parts(dtype=torch.float32)
    out, lse = merge(out_a, lse_a + size, out_b, lse_b + size)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    assert (out <= torch.maximum(out_a, out_b) + 1e-6).all()
    assert (out >= torch.minimum(out_a, out_b) - 1e-6).all()


def test_16_bits_are_rounded_once():
    out_a, lse_a, out_b, lse_b = parts(t=200)
    out_a, out_b, lse_a, lse_b = out_a.bfloat16(), out_b.bfloat16(), lse_a.float(), lse_b.float()
    out, lse = merge(out_a, lse_a, out_b, lse_b)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    exact, _ = merge(out_a.double(), lse_a.double(), out_b.double(), lse_b.double())
    assert ((out.double() - exact).abs() <= 1.01 * 2**-8 * exact.abs() + 1e-7).all()


def test_views_stay_as_they_are():
    out_a, lse_a, out_b, lse_b = (x.transpose(1, 2) for x in parts())
    before = [x.clone() for x in (out_a, lse_a, out_b, lse_b)]
    merge(out_a, lse_a, out_b, lse_b)
    for x, y in zip((out_a, lse_a, out_b, lse_b), before, strict=True):
        assert torch.equal(x, y)


BAD = {
    "no tensor": (0, lambda x: x.tolist(), TypeError, r"out_a must be a torch\.Tensor, got list"),
    "ints": (2, lambda x: x.long(), TypeError, r"out_b must be float64.*got torch\.int64"),
    "lse in 16 bits": (1, lambda x: x.bfloat16(), TypeError, r"lse_a must be float32 or float64, got torch\.bfloat16"),
    "rank": (0, lambda x: x[0], ValueError, r"out_a must have 4 dimensions.*got shape \(2, 3, 4\)"),
    "other shape": (2, lambda x: x[:, :1], ValueError, r"out_b must have out_a's shape \(1, 2, 3, 4\), got \(1, 1, 3"),
    "other dtype": (2, lambda x: x.float(), TypeError, r"out_b must have out_a's dtype torch\.float64, got torch\.flo"),
    "lse dtype": (3, lambda x: x.float(), TypeError, r"lse_b must have lse_a's dtype torch\.float64, got torch\.float"),
    "lse shape": (3, lambda x: x[..., :2], ValueError, r"lse_b must have one number a row, \(1, 2, 3\), got shape"),
    "device": (3, lambda x: x.to("meta"), ValueError, "lse_b must be on out_a's device cpu, got meta"),
}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_argument_value_and_remedy(name):
    which, change, error, message = BAD[name]
    given_ = parts()
    given_[which] = change(given_[which])
    with pytest.raises(error, match=message):
        merge(*given_)
