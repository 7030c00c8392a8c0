"""LayerNorm and RMSNorm: every variant against float64; equal numbers, rows of one, a mean far beyond the spread."""

import pytest
import torch

from mlsys.kernels import list_variants, norm, norm_cuda
from mlsys.kernels._launch import check_each, profile_each, run
from mlsys.kernels.norm import KINDS, welford

SHAPES = [(1,), (1, 1), (33, 65), (1000, 3), (3, 700), (2, 5, 257), (0, 4)]


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def formula(x, weight, bias, eps, kind):
    x, weight = x.double(), weight.double()
    mean = x.mean(-1, keepdim=True) if kind == "layernorm" else 0.0
    out = (x - mean) / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + eps) * weight
    return out if bias is None else out + bias.double()


def given(*shape, kind, with_bias=True, dtype=torch.float32):
    weight, bias = numbers(shape[-1], seed=1, dtype=dtype), numbers(shape[-1], seed=2, dtype=dtype)
    return numbers(*shape, dtype=dtype), weight, bias if with_bias and kind == "layernorm" else None


def error(got, want):
    return (got.double() - want).abs().max().item() if got.numel() else 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", list_variants("norm"))
def test_norm_is_that_of_float64(variant, kind):
    for shape in SHAPES:
        for with_bias in (True, False):
            x, weight, bias = given(*shape, kind=kind, with_bias=with_bias)
            got = norm(x, weight, bias, eps=0.01, kind=kind, variant=variant)
            assert got.dtype == x.dtype
            assert error(got, formula(x, weight, bias, 0.01, kind)) < 1e-5, shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", list_variants("norm"))
def test_bfloat16_is_rounded_once(variant, kind):
    x, weight, bias = given(7, 300, kind=kind, dtype=torch.bfloat16)
    got = norm(x, weight, bias, kind=kind, variant=variant)
    want = formula(x, weight, bias, 1e-5, kind)
    assert got.dtype == torch.bfloat16
    assert ((got.double() - want).abs() <= 2.0**-8 * want.abs() + 1e-4).all()


@pytest.mark.parametrize("variant", list_variants("norm"))
def test_mean_far_beyond_the_spread(variant):
    """Of Σx² / n − mean² nothing would be left: the variance is below what x² is rounded by."""
    x = 4096 + numbers(3, 600)
    got = norm(x, torch.ones(600), variant=variant)
    assert error(got, formula(x, torch.ones(600), None, 1e-5, "layernorm")) < 1e-2


@pytest.mark.parametrize("variant", list_variants("norm"))
def test_equal_numbers_become_the_bias(variant):
    got = norm(torch.full((2, 40), 3.0), torch.ones(40), torch.arange(40.0), variant=variant)
    torch.testing.assert_close(got, torch.arange(40.0).expand(2, 40))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rung", norm_cuda.VARIANTS)
def test_nothing_is_found(rung, kind):
    for shape in ((5, 65), (2, 1), (1, 300)):
        x, weight, bias = given(*shape, kind=kind)
        assert check_each(norm_cuda.launches(x, weight, bias, kind=kind, variant=rung)[1]) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rung", norm_cuda.VARIANTS)
def test_same_bits_in_any_order_of_threads(rung, kind):
    results = []
    for order in (0, 1, 7):
        out, plan = norm_cuda.launches(*given(9, 333, kind=kind), kind=kind, variant=rung)
        run(plan, order=order)
        results.append(out)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_welford_merges_halves():
    x = numbers(3, 37).double()
    n, mean, squares = welford(x)
    assert n == 37
    torch.testing.assert_close(mean, x.mean(-1, keepdim=True))
    torch.testing.assert_close(squares, 37 * x.var(-1, keepdim=True, unbiased=False))


def test_what_the_rungs_move():
    for rung, kind, passes in (
        ("block", "layernorm", 3),
        ("block", "rmsnorm", 2),
        ("warp", "layernorm", 2),
        ("warp", "rmsnorm", 2),
    ):
        x, weight, bias = given(8, 512, kind=kind)
        (p,) = profile_each(norm_cuda.launches(x, weight, bias, kind=kind, variant=rung)[1])
        read = sum(a.transactions for a in p.accesses if a.space == "global" and a.kind == "read")
        weights = 8 * 512 * 4 // 32 * (2 if kind == "layernorm" else 1)
        assert read - weights == passes * x.numel() * 4 // 32
        assert (p.shared_passes == 0) == (rung == "warp")


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"x": None}, TypeError, "x must be a torch.Tensor, got NoneType"),
        ({"x": torch.ones(2, 4, dtype=torch.float64)}, TypeError, "x must be float32 or bfloat16, got torch.float64"),
        ({"x": torch.ones(2, 0)}, ValueError, "x must have at least one number in its last dimension"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must have at least one number in its last dimension"),
        ({"weight": torch.ones(3)}, ValueError, r"weight must have the shape \(4,\), got \(3,\)"),
        (
            {"weight": torch.ones(4).bfloat16()},
            TypeError,
            "weight must have x's dtype torch.float32, got torch.bfloat16",
        ),
        ({"bias": torch.ones(4, 1)}, ValueError, r"bias must have the shape \(4,\), got \(4, 1\)"),
        ({"bias": torch.ones(4), "kind": "rmsnorm"}, ValueError, "bias must be None for kind='rmsnorm'"),
        ({"eps": -1.0}, ValueError, "eps must be a number that is not negative, got -1.0"),
        ({"kind": "batch"}, ValueError, "kind must be 'layernorm' or 'rmsnorm', got 'batch'"),
        ({"variant": "cuda.fast"}, ValueError, "variant must be .*cuda.warp.*got 'cuda.fast'"),
    ],
)
def test_bad_arguments_are_named(change, error, named):
    with pytest.raises(error, match=named):
        norm(**{"x": torch.ones(2, 4), "weight": torch.ones(4)} | change)


def test_kernels_refuse_what_needs_a_gradient():
    with pytest.raises(ValueError, match="weight requires a gradient"):
        norm_cuda.norm(torch.ones(2, 2), torch.ones(2, requires_grad=True))
