"""GELU of x + bias: both forms in every variant against float64, the tail of erf, and half the traffic when fused."""

import math

import pytest
import torch

from mlsys.kernels import gelu, gelu_cuda, list_variants
from mlsys.kernels._launch import check_each, profile_each, run
from mlsys.kernels.gelu import APPROXIMATE

SHAPES = [(1,), (1, 1), (33, 65), (1000, 3), (3, 700), (2, 5, 257), (0, 4), (4, 0)]


def numbers(*shape, seed=0, dtype=torch.float32):
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))).to(dtype)


def formula(x, bias, approximate):
    v = x.double() if bias is None else x.double() + bias.double()
    if approximate == "tanh":
        return v / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
    return v / 2 * torch.special.erfc(-v / math.sqrt(2))


@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("variant", list_variants("gelu"))
def test_gelu_is_that_of_float64(variant, approximate):
    for shape in SHAPES:
        x = numbers(*shape)
        for bias in (None, numbers(shape[-1], seed=1)):
            got = gelu(x, bias, approximate=approximate, variant=variant)
            assert got.dtype == x.dtype
            torch.testing.assert_close(got.double(), formula(x, bias, approximate), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("variant", list_variants("gelu"))
def test_bfloat16(variant):
    x, bias = numbers(7, 300, dtype=torch.bfloat16), numbers(300, seed=1, dtype=torch.bfloat16)
    got = gelu(x, bias, variant=variant)
    want = formula(x, bias, "none")
    once = variant in ("formula", "cuda.bias_fused")  # the others round x + bias, too
    size = want.abs() if once else want.abs() + (x.double() + bias.double()).abs()
    assert got.dtype == torch.bfloat16
    assert ((got.double() - want).abs() <= 2.0**-8 * size + 1e-6).all()


@pytest.mark.parametrize("variant", ["formula", "cuda.separate", "cuda.bias_fused"])
def test_small_values_of_large_negative_numbers_are_kept(variant):
    """1 + erf is 0 from −5.6 on in float32; the true value at −6 is −6e−9."""
    x = torch.tensor([-5.0, -6.0, -8.0])
    torch.testing.assert_close(gelu(x, variant=variant).double(), formula(x, None, "none"), rtol=1e-4, atol=0)


@pytest.mark.parametrize("variant", list_variants("gelu")[1:])  # torch makes NaN of an infinite number on a CPU
def test_infinite_and_nan(variant):
    got = gelu(torch.tensor([math.inf, math.nan, 0.0]), variant=variant)
    assert got[0] == math.inf
    assert got[1].isnan()
    assert got[2] == 0


@pytest.mark.parametrize("rung", gelu_cuda.VARIANTS)
def test_nothing_is_found(rung):
    for shape in ((5, 65), (2, 300)):
        plan = gelu_cuda.launches(numbers(*shape), numbers(shape[-1]), variant=rung)[1]
        assert check_each(plan) == []


@pytest.mark.parametrize("rung", gelu_cuda.VARIANTS)
def test_same_bits_in_any_order_of_threads(rung):
    results = []
    for order in (0, 1, 7):
        out, plan = gelu_cuda.launches(numbers(9, 333), numbers(333), variant=rung)
        run(plan, order=order)
        results.append(out)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_fused_moves_half():
    x, bias = numbers(64, 256), numbers(256)
    moved = {}
    for rung in gelu_cuda.VARIANTS:
        profiles = profile_each(gelu_cuda.launches(x, bias, variant=rung)[1])
        of_bias = x.numel() * 4  # the bias is read for each row, from a cache
        moved[rung] = (sum(p.bytes for p in profiles) - of_bias) / x.numel()
    assert moved == {"separate": 16, "bias_fused": 8}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"x": 1.0}, TypeError, "x must be a torch.Tensor, got float"),
        ({"x": torch.ones(4).int()}, TypeError, "x must be float32 or bfloat16, got torch.int32"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must have at least one dimension"),
        ({"bias": torch.ones(3)}, ValueError, r"bias must have the shape \(4,\), got \(3,\)"),
        ({"bias": torch.ones(4).bfloat16()}, TypeError, "bias must have x's dtype torch.float32, got torch.bfloat16"),
        ({"approximate": True}, ValueError, "approximate must be 'none' or 'tanh', got True"),
        ({"variant": "cuda.fast"}, ValueError, "variant must be .*cuda.bias_fused.*got 'cuda.fast'"),
    ],
)
def test_bad_arguments_are_named(change, error, named):
    with pytest.raises(error, match=named):
        gelu(**{"x": torch.ones(2, 4)} | change)


def test_kernels_refuse_what_needs_a_gradient():
    with pytest.raises(ValueError, match="bias requires a gradient"):
        gelu_cuda.gelu(torch.ones(2, 2), torch.ones(2, requires_grad=True))
