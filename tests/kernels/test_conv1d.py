"""Depthwise convolution: every variant against a float64 loop; padding, halos, filters wider than a block."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys.kernels import conv1d, conv1d_cuda, list_variants
from mlsys.kernels._launch import check_each, profile_each, run

CASES = [  # batch, channels, length, width, padding
    (1, 1, 1, 1, 0),
    (2, 3, 300, 4, "causal"),
    (2, 3, 300, 4, 0),
    (1, 2, 33, 7, 3),
    (1, 2, 5, 9, "causal"),
    (1, 2, 5, 9, 2),
    (3, 1, 256, 2, 1),
    (1, 1, 700, 400, 0),
    (1, 2, 4, 3, 9),
    (0, 2, 5, 2, 0),
    (1, 2, 0, 2, "causal"),
]


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def tensors(batch, channels, length, width, dtype=torch.float32):
    return (
        numbers(batch, channels, length, dtype=dtype),
        numbers(channels, width, seed=1, dtype=dtype),
        numbers(channels, seed=2, dtype=dtype),
    )


def formula(x, weight, bias, padding):
    """Place by place, from a row with its zeros written out."""
    width = weight.shape[1]
    before, after = (width - 1, 0) if padding == "causal" else (padding, padding)
    row = torch.cat([x.new_zeros(*x.shape[:2], before), x, x.new_zeros(*x.shape[:2], after)], -1).double()
    length = row.shape[-1] - width + 1
    out = torch.zeros(*x.shape[:2], length, dtype=torch.float64)
    for t in range(length):
        out[..., t] = (row[..., t : t + width] * weight.double()).sum(-1)
    return out if bias is None else out + bias.double()[:, None]


@pytest.mark.parametrize("variant", list_variants("conv1d"))
@pytest.mark.parametrize(("batch", "channels", "length", "width", "padding"), CASES)
def test_conv1d_is_that_of_float64(variant, batch, channels, length, width, padding):
    x, weight, bias = tensors(batch, channels, length, width)
    for b in (bias, None):
        got = conv1d(x, weight, b, padding=padding, variant=variant)
        want = formula(x, weight, b, padding)
        assert got.dtype == x.dtype
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6 * width**0.5 + 2e-6)


@settings(max_examples=30)
@given(
    length=st.integers(1, 600),
    width=st.integers(1, 40),
    padding=st.one_of(st.just("causal"), st.integers(20, 45)),
    variant=st.sampled_from(["shifts", "cuda.depthwise_naive", "cuda.depthwise_shared"]),
)
def test_any_length_and_width(length, width, padding, variant):
    x, weight, bias = tensors(1, 2, length, width)
    got = conv1d(x, weight, bias, padding=padding, variant=variant)
    torch.testing.assert_close(got.double(), formula(x, weight, bias, padding), rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", list_variants("conv1d"))
def test_bfloat16(variant):
    x, weight, bias = tensors(2, 3, 70, 4, dtype=torch.bfloat16)
    got = conv1d(x, weight, bias, padding="causal", variant=variant)
    want = formula(x, weight, bias, "causal")
    assert got.dtype == torch.bfloat16
    assert ((got.double() - want).abs() <= 2.0**-8 * want.abs() + 1e-5).all()


@pytest.mark.parametrize("variant", list_variants("conv1d"))
def test_causal_sees_nothing_that_comes_later(variant):
    x, weight, bias = tensors(1, 2, 300, 5)
    later = x.clone()
    later[..., 200:] = 99.0
    a, b = (conv1d(y, weight, bias, padding="causal", variant=variant) for y in (x, later))
    assert torch.equal(a[..., :200], b[..., :200])
    assert not torch.equal(a, b)


def test_strided_inputs():
    x, weight = numbers(3, 2, 50).transpose(0, 1), numbers(4, 3).t()
    for variant in list_variants("conv1d"):
        got = conv1d(x, weight, variant=variant)
        torch.testing.assert_close(got.double(), formula(x, weight, None, 0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rung", conv1d_cuda.VARIANTS)
def test_nothing_is_found(rung):
    for batch, channels, length, width, padding in CASES[1:6]:
        plan = conv1d_cuda.launches(*tensors(batch, channels, length, width), padding=padding, variant=rung)[1]
        assert check_each(plan) == []


@pytest.mark.parametrize("rung", conv1d_cuda.VARIANTS)
def test_same_bits_in_any_order_of_threads(rung):
    results = []
    for order in (0, 1, 7):
        out, plan = conv1d_cuda.launches(*tensors(2, 3, 301, 4), padding="causal", variant=rung)
        run(plan, order=order)
        results.append(out)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_what_the_rungs_move():
    x, weight, _ = tensors(1, 4, 1024, 8)
    least = x.numel() * 4
    read = {}
    for rung in conv1d_cuda.VARIANTS:
        (p,) = profile_each(conv1d_cuda.launches(x, weight, padding="causal", variant=rung)[1])
        assert p.tensors["x"] == (least, 0)
        assert p.conflicts == 0
        read[rung] = p.bytes / least
    assert read["depthwise_naive"] > 8  # width
    assert read["depthwise_shared"] < 2.4  # one read, one write, halos and filters


def test_widest_filter():
    x, weight = numbers(1, 1, 5000), numbers(1, conv1d_cuda.WIDEST + 1)
    with pytest.raises(ValueError, match=r"weight must be at most 4096 wide.*take depthwise_naive"):
        conv1d(x, weight, variant="cuda.depthwise_shared")
    with pytest.raises(ValueError, match=r"weight must be at most 4096 wide.*take depthwise_naive"):
        conv1d_cuda.conv1d(x, weight)
    got = conv1d_cuda.conv1d(x[..., :4100], weight[:, 1:], variant="depthwise_shared")
    torch.testing.assert_close(got.double(), formula(x[..., :4100], weight[:, 1:], None, 0), rtol=0, atol=1e-3)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"x": torch.ones(3, 5)}, ValueError, r"x must have the shape \(batch, channels, length\), got \(3, 5\)"),
        ({"weight": torch.ones(3, 1, 2)}, ValueError, r"weight must have the shape \(channels, width\)"),
        ({"weight": torch.ones(2, 2)}, ValueError, r"weight must have the shape \(3, 2\), got \(2, 2\)"),
        ({"weight": torch.ones(3, 0)}, ValueError, "weight must be at least 1 wide"),
        (
            {"weight": torch.ones(3, 6)},
            ValueError,
            r"weight must be no wider than the padded sequence, 5 \+ 2 · 0, got 6",
        ),
        ({"weight": [1.0]}, TypeError, "weight must be a torch.Tensor, got list"),
        ({"bias": torch.ones(2)}, ValueError, r"bias must have the shape \(3,\), got \(2,\)"),
        ({"padding": -1}, ValueError, "padding must be 'causal' or an int that is not negative, got -1"),
        ({"padding": "same"}, ValueError, "padding must be 'causal' or an int that is not negative, got 'same'"),
        ({"variant": "cuda.fast"}, ValueError, "variant must be .*cuda.depthwise_shared.*got 'cuda.fast'"),
    ],
)
def test_bad_arguments_are_named(change, error, named):
    with pytest.raises(error, match=named):
        conv1d(**{"x": torch.ones(1, 3, 5), "weight": torch.ones(3, 2)} | change)
