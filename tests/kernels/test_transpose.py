"""Transpose: every variant is exact at any shape; what its reads and writes touch is what its file says."""

import pytest
import torch

from mlsys.kernels import list_variants, transpose, transpose_cuda
from mlsys.kernels._launch import check_each, profile_each, run

SHAPES = [(1, 1), (1, 40), (40, 1), (33, 65), (1000, 3), (3, 1000), (64, 96), (0, 5), (5, 0)]


def numbers(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("variant", list_variants("transpose"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transpose_is_exact(variant, dtype):
    for shape in SHAPES:
        x = numbers(*shape, dtype=dtype)
        out = transpose(x, variant=variant)
        assert torch.equal(out, x.t()), shape
        assert out.is_contiguous()


@pytest.mark.parametrize("variant", list_variants("transpose"))
def test_result_has_memory_of_its_own(variant):
    x = numbers(1, 5)  # whose transpose is laid out like x itself
    out = transpose(x, variant=variant)
    x.zero_()
    assert bool((out != 0).all())


def test_strided_input():
    x = numbers(40, 70)[::2, 1:]
    for variant in list_variants("transpose"):
        assert torch.equal(transpose(x, variant=variant), x.t())


@pytest.mark.parametrize("rung", transpose_cuda.VARIANTS)
def test_nothing_is_found(rung):
    for shape in ((33, 65), (64, 7)):
        assert check_each(transpose_cuda.launches(numbers(*shape), variant=rung)[1]) == []


@pytest.mark.parametrize("rung", transpose_cuda.VARIANTS)
@pytest.mark.parametrize("order", [1, 7])
def test_any_order_of_threads(rung, order):
    x = numbers(70, 45)
    out, plan = transpose_cuda.launches(x, variant=rung)
    run(plan, order=order)
    assert torch.equal(out, x.t())


def test_what_the_rungs_move():
    x = numbers(128, 96)
    sectors = x.numel() * 4 // 32
    profiles = {rung: profile_each(transpose_cuda.launches(x, variant=rung)[1])[0] for rung in transpose_cuda.VARIANTS}
    written = {
        rung: sum(a.transactions for a in p.accesses if a.space == "global" and a.kind == "write")
        for rung, p in profiles.items()
    }
    assert written == {"naive": 8 * sectors, "tiled": sectors, "padded": sectors}
    reads = [a for a in profiles["tiled"].accesses if a.space == "shared" and a.kind == "read"]
    assert [(a.transactions // a.requests, a.ideal // a.requests) for a in reads] == [(32, 1)]
    assert profiles["padded"].conflicts == 0


def test_two_byte_numbers_have_conflicts_in_every_second_column():
    x = numbers(64, 64, dtype=torch.bfloat16)
    (padded,) = profile_each(transpose_cuda.launches(x, variant="padded")[1])
    reads = [a for a in padded.accesses if a.space == "shared" and a.kind == "read"]
    assert [(a.transactions, a.ideal) for a in reads] == [(192, 128)]
    (tiled,) = profile_each(transpose_cuda.launches(x, variant="tiled")[1])
    assert [a.transactions for a in tiled.accesses if a.space == "shared" and a.kind == "read"] == [16 * 128]


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("x", "variant", "error", "named"),
    [
        (5, "auto", TypeError, "x must be a torch.Tensor, got int"),
        (torch.ones(3, 2).int(), "tiles", TypeError, "x must be float32 or bfloat16, got torch.int32"),
        (torch.ones(3), "auto", ValueError, r"x must have the shape \(rows, columns\), got \(3,\)"),
        (torch.ones(3, 2), "tiled", ValueError, "variant must be .*cuda.tiled.*got 'tiled'"),
    ],
)
def test_bad_arguments_are_named(x, variant, error, named):
    with pytest.raises(error, match=named):
        transpose(x, variant=variant)


def test_kernels_refuse_what_needs_a_gradient():
    with pytest.raises(ValueError, match="x requires a gradient"):
        transpose_cuda.transpose(torch.ones(2, 2, requires_grad=True))
