"""Sums: every variant against float64, at sizes that fill no block; the same bits in any order of threads."""

import math

import pytest
import torch

from mlsys.kernels import list_variants, reduction, reduction_cuda
from mlsys.kernels._launch import check_each, profile_each, run

EPS = 2.0**-23
SIZES = [0, 1, 31, 33, 255, 1000, 65537]


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def allowed(x):
    """Rounding errors of a sum of n terms grow with √n; of |x| on the average."""
    return 4 * EPS * math.sqrt(x.numel()) * max(x.double().abs().sum().item() / max(math.sqrt(x.numel()), 1), 1)


@pytest.mark.parametrize("variant", list_variants("reduction"))
@pytest.mark.parametrize("n", SIZES)
def test_sum_is_that_of_float64(variant, n):
    x = numbers(n)
    got = reduction.sum(x, variant=variant)
    assert got.shape == ()
    assert got.dtype == torch.float32
    assert abs(got.item() - x.double().sum().item()) <= allowed(x)


@pytest.mark.parametrize("variant", list_variants("reduction"))
def test_bfloat16_is_added_in_float32(variant):
    x = torch.ones(70_001, dtype=torch.bfloat16)  # in bfloat16 the sum would stop growing at 256
    got = reduction.sum(x, variant=variant)
    assert got.dtype == torch.float32
    assert got.item() == 70_001


@pytest.mark.parametrize("offset", range(1, 5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_loads_begin_at_a_multiple_of_16_bytes(offset, dtype):
    x = torch.arange(40, dtype=torch.float32).to(dtype)[offset:]
    out, plan = reduction_cuda.launches(x, variant="vectorized")
    assert check_each(plan) == []
    assert out.item() == x.double().sum().item()


def test_fewer_numbers_than_lie_before_the_first_16_bytes():
    x = torch.arange(40.0)[1:3]
    assert reduction_cuda.sum(x).item() == 3


@pytest.mark.parametrize("rung", reduction_cuda.VARIANTS)
def test_nothing_is_found(rung):
    plan = reduction_cuda.launches(numbers(5000), variant=rung)[1]
    assert len(plan) == 2
    assert check_each(plan) == []


@pytest.mark.parametrize("rung", reduction_cuda.VARIANTS)
def test_same_bits_in_any_order_of_threads(rung):
    x = numbers(30_011)
    sums = []
    for order in (0, 1, 7):
        out, plan = reduction_cuda.launches(x, variant=rung)
        run(plan, order=order)
        sums.append(out.item())
    assert sums[0] == sums[1] == sums[2]


def test_any_shape_and_any_strides():
    x = numbers(7, 11, 3).transpose(0, 2)
    for variant in list_variants("reduction"):
        assert abs(reduction.sum(x, variant=variant).item() - x.double().sum().item()) <= allowed(x)


def test_module_can_be_called():
    assert reduction(torch.ones(3), variant="cuda.shuffle").item() == 3


def test_gradient_of_the_readable_ones_and_none_of_the_kernels():
    x = numbers(5).requires_grad_()
    assert torch.autograd.grad(reduction.sum(x, variant="tree"), x)[0].tolist() == [1.0] * 5
    with pytest.raises(ValueError, match="x requires a gradient"):
        reduction.sum(x, variant="cuda.shared")
    with torch.no_grad():
        assert reduction.sum(x, variant="cuda.shared").shape == ()


def test_what_the_rungs_move():
    n = 64 * 1024
    shared, shuffle, vectorized = (
        profile_each(reduction_cuda.launches(numbers(n), variant=rung)[1])[0] for rung in reduction_cuda.VARIANTS
    )
    reads = [sum(a.requests for a in p.accesses if a.space == "global" and a.kind == "read") for p in (shared, shuffle)]
    assert reads == [n // 32, n // 32]
    assert sum(a.requests for a in vectorized.accesses if a.space == "global" and a.kind == "read") == n // 128
    for p in (shared, shuffle, vectorized):
        assert p.tensors["x"] == (4 * n, 0)
        assert p.conflicts == 0
    blocks = n // 256
    assert (shared.shared_passes, shuffle.shared_passes) == (45 * blocks, 9 * blocks)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("x", "variant", "error", "named"),
    [
        ([1.0], "auto", TypeError, "x must be a torch.Tensor, got list"),
        (torch.ones(3, dtype=torch.float64), "tree", TypeError, r"x must be float32 or bfloat16, got torch.float64"),
        (torch.ones(3), "cuda.fast", ValueError, "variant must be .*cuda.shuffle.*got 'cuda.fast'"),
    ],
)
def test_bad_arguments_are_named(x, variant, error, named):
    with pytest.raises(error, match=named):
        reduction.sum(x, variant=variant)


@pytest.mark.usefixtures("unchecked_types")
def test_bad_arguments_of_the_kernels_are_named():
    with pytest.raises(ValueError, match=r"variant must be one of 'shared'.*got 'auto'"):
        reduction_cuda.sum(torch.ones(3), variant="auto")
    with pytest.raises(TypeError, match=r"x must be float32 or bfloat16, got torch\.int64"):
        reduction_cuda.sum(torch.arange(3))
