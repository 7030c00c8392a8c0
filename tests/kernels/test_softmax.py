"""Softmax: every variant against float64; rows of any length, with −∞, ∞, NaN, and numbers too large for exp."""

import math

import pytest
import torch

from mlsys.kernels import list_variants, softmax, softmax_cuda
from mlsys.kernels._launch import check_each, profile_each, run

SHAPES = [(1,), (1, 1), (33, 65), (1000, 3), (2, 1000), (3, 4, 257), (0, 5), (5, 0)]


def numbers(*shape, scale=3.0, dtype=torch.float32):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))).to(dtype)


def same(got, x, units=8):
    want = x.double().softmax(-1)
    assert got.dtype == x.dtype
    assert got.shape == x.shape
    eps = torch.finfo(x.dtype).eps
    return torch.allclose(got.double(), want, rtol=units * eps + 1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("variant", list_variants("softmax"))
@pytest.mark.parametrize("shape", SHAPES)
def test_softmax_is_that_of_float64(variant, shape):
    assert same(softmax(numbers(*shape), variant=variant), numbers(*shape))


@pytest.mark.parametrize("variant", list_variants("softmax"))
def test_bfloat16(variant):
    x = numbers(5, 300, dtype=torch.bfloat16)
    assert same(softmax(x, variant=variant), x, units=1)


@pytest.mark.parametrize("variant", list_variants("softmax"))
def test_large_numbers_do_not_overflow(variant):
    assert same(
        softmax(torch.tensor([[1000.0, 999.0], [-1000.0, -1001.0]]), variant=variant), torch.tensor([[1.0, 0]] * 2)
    )


@pytest.mark.parametrize("variant", list_variants("softmax"))
@pytest.mark.parametrize("n", [2, 300])
def test_infinities_and_nan(variant, n):
    x = numbers(6, n)
    x[0, : n // 2] = -math.inf  # where a lane sees nothing else at first
    x[1, n // 2 :] = -math.inf
    x[2] = -math.inf  # no softmax at all
    x[3, 0] = math.nan
    x[4, -1] = math.inf
    x[5, 0], x[5, 1:] = math.nan, -math.inf
    assert same(softmax(x, variant=variant), x)


@pytest.mark.parametrize("rung", softmax_cuda.VARIANTS)
def test_nothing_is_found(rung):
    for shape in ((3, 1), (5, 65), (2, 600)):
        assert check_each(softmax_cuda.launches(numbers(*shape), variant=rung)[1]) == []


@pytest.mark.parametrize("rung", softmax_cuda.VARIANTS)
def test_same_bits_in_any_order_of_threads(rung):
    x, results = numbers(4, 700), []
    for order in (0, 1, 7):
        out, plan = softmax_cuda.launches(x, variant=rung)
        run(plan, order=order)
        results.append(out)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_strided_input():
    x = numbers(70, 40).t()
    for variant in list_variants("softmax"):
        assert same(softmax(x, variant=variant), x)


def test_what_the_rungs_move():
    x = numbers(8, 512)
    for rung, passes in (("three_pass", 3), ("online", 2)):
        (p,) = profile_each(softmax_cuda.launches(x, variant=rung)[1])
        read = sum(a.transactions for a in p.accesses if a.space == "global" and a.kind == "read")
        assert read == passes * x.numel() * 4 // 32
        assert p.tensors["x"] == (4 * x.numel(), 0)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("x", "variant", "error", "named"),
    [
        (None, "auto", TypeError, "x must be a torch.Tensor, got NoneType"),
        (torch.ones(3, dtype=torch.float16), "online", TypeError, "x must be float32 or bfloat16, got torch.float16"),
        (torch.tensor(1.0), "auto", ValueError, "x must have at least one dimension"),
        (torch.ones(3), "cuda.two_pass", ValueError, "variant must be .*cuda.online.*got 'cuda.two_pass'"),
    ],
)
def test_bad_arguments_are_named(x, variant, error, named):
    with pytest.raises(error, match=named):
        softmax(x, variant=variant)


def test_kernels_refuse_what_needs_a_gradient():
    with pytest.raises(ValueError, match="x requires a gradient"):
        softmax_cuda.softmax(torch.ones(2, 2, requires_grad=True))
