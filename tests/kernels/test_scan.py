"""Prefix sums: every variant against float64, around the sizes of a block; one block, many, and totals of totals."""

import pytest
import torch

from mlsys.kernels import list_variants, scan, scan_cuda
from mlsys.kernels._launch import check_each, profile_each, run

SIZES = [0, 1, 2, 31, 33, 1000, 1023, 1024, 1025, 5001]


def numbers(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def sums(x, exclusive):
    """In float64, one after the other."""
    total, out = 0.0, []
    for value in x.double().tolist():
        out.append(total if exclusive else total + value)
        total += value
    return torch.tensor(out, dtype=torch.float64)


def close(got, x, exclusive):
    want = sums(x, exclusive)
    assert got.dtype == torch.float32
    assert got.shape == x.shape
    allowed = 2.0**-23 * x.double().abs().cumsum(0) * 20  # as many roundings as levels, and a few
    return bool(((got.double() - want).abs() <= allowed).all())


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("variant", list_variants("scan"))
@pytest.mark.parametrize("n", SIZES)
def test_sums_are_those_of_float64(variant, n, exclusive):
    x = numbers(n, seed=n)
    assert close(scan(x, exclusive=exclusive, variant=variant), x, exclusive)


@pytest.mark.parametrize("variant", list_variants("scan"))
def test_whole_numbers_are_exact(variant):
    x = torch.randint(-3, 9, (70_000,), generator=torch.Generator().manual_seed(1)).float()
    want = x.long().cumsum(0)
    assert torch.equal(scan(x, variant=variant), want.float())
    assert torch.equal(scan(x, exclusive=True, variant=variant)[1:], want[:-1].float())


@pytest.mark.parametrize("rung", ["hillis_steele", "blelloch"])
def test_totals_of_totals(rung):
    n = scan_cuda.PER_BLOCK**2 + 5  # more blocks than one block can scan the totals of
    x = torch.ones(n)
    out, plan = scan_cuda.launches(x, variant=rung)
    assert [launch.kernel for launch in plan] == ["scan_blocks"] * 3 + ["add_offsets"] * 2
    run(plan)
    assert torch.equal(out, torch.arange(1, n + 1).float())


@pytest.mark.parametrize("rung", scan_cuda.VARIANTS)
def test_nothing_is_found(rung):
    for exclusive in (False, True):
        plan = scan_cuda.launches(numbers(3001), exclusive=exclusive, variant=rung)[1]
        assert check_each(plan) == []


@pytest.mark.parametrize("rung", scan_cuda.VARIANTS)
def test_any_order_of_threads(rung):
    x = numbers(40_009)
    results = []
    for order in (0, 1, 7):
        out, plan = scan_cuda.launches(x, variant=rung)
        run(plan, order=order)
        assert close(out, x, False)
        results.append(out)
    if rung != "decoupled":  # whose additions depend on how far a tile has to look back
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def test_looks_back_over_more_tiles_than_a_warp_has_lanes():
    """As if no tile but the first knew the sum up to its end: all totals are added up, 32 tiles at a time."""
    n = 70 * scan_cuda.PER_BLOCK
    x = torch.randint(0, 5, (n,), generator=torch.Generator().manual_seed(2)).float()
    out, plan = scan_cuda.launches(x, variant="decoupled")
    words, drawn = plan[0].args[3:5]
    totals = x.view(70, -1).sum(1)
    flags = torch.full((69,), 1, dtype=torch.int64)
    flags[0] = 2
    words[:69] = flags << 32 | totals[:69].view(torch.int32).long()
    drawn.fill_(69)  # the next tile is the last one
    launch = plan[0]
    type(launch)(launch.file, launch.kernel, 1, launch.block, launch.args).run()
    assert torch.equal(out[-scan_cuda.PER_BLOCK :], x.cumsum(0)[-scan_cuda.PER_BLOCK :])


def test_gradient_of_the_readable_ones_and_none_of_the_kernels():
    x = numbers(6).requires_grad_()
    for variant in ("torch", "steps", "tree"):
        assert torch.autograd.grad(scan(x, variant=variant).sum(), x)[0].tolist() == [6, 5, 4, 3, 2, 1]
    with pytest.raises(ValueError, match="x requires a gradient"):
        scan(x, variant="cuda.blelloch")


def test_what_the_rungs_move():
    n = 64 * 1024
    moved = {}
    for rung in scan_cuda.VARIANTS:
        profiles = profile_each(scan_cuda.launches(numbers(n), variant=rung)[1])
        moved[rung] = sum(p.bytes for p in profiles) / n
        assert sum(p.conflicts for p in profiles) == 0
    for rung in ("hillis_steele", "blelloch"):  # two reads, two writes, and for each warp the sector with its offset
        assert moved[rung] == pytest.approx(17, rel=0.01)
    assert 8 <= moved["decoupled"] < 8.5


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("x", "options", "error", "named"),
    [
        ([1.0], {}, TypeError, "x must be a torch.Tensor, got list"),
        (torch.ones(3, dtype=torch.bfloat16), {}, TypeError, "x must be float32, got torch.bfloat16"),
        (torch.ones(3, 2), {}, ValueError, r"x must have the shape \(n,\), got \(3, 2\)"),
        (torch.ones(3), {"exclusive": 1}, TypeError, "exclusive must be True or False, got 1"),
        (torch.ones(3), {"variant": "cuda.fast"}, ValueError, "variant must be .*cuda.blelloch.*got 'cuda.fast'"),
    ],
)
def test_bad_arguments_are_named(x, options, error, named):
    with pytest.raises(error, match=named):
        scan(x, **options)
    if "variant" not in options:
        with pytest.raises(error, match=named):
            scan_cuda.scan(x, **options)
