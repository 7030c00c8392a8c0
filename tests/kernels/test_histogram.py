"""Histogram: every variant counts exactly; the first and the last bin, numbers that are no bin, all in one bin."""

import pytest
import torch

from mlsys.kernels import histogram, histogram_cuda, list_variants
from mlsys.kernels._launch import check_each, profile_each, run


def numbers(n, low, high, dtype=torch.int32):
    return torch.randint(low, high, (n,), generator=torch.Generator().manual_seed(n)).to(dtype)


def counted(x, bins):
    """One after the other."""
    counts = [0] * bins
    for value in x.flatten().tolist():
        if 0 <= value < bins:
            counts[value] += 1
    return counts


@pytest.mark.parametrize("variant", list_variants("histogram"))
@pytest.mark.parametrize(
    ("n", "bins", "dtype"),
    [
        (0, 3, torch.int32),
        (1, 1, torch.int32),
        (1000, 10, torch.int32),
        (33, 300, torch.uint8),
        (65_537, 256, torch.uint8),
    ],
)
def test_counts_are_exact(variant, n, bins, dtype):
    x = numbers(n, 0, min(bins, 256), dtype)
    got = histogram(x, bins, variant=variant)
    assert got.dtype == torch.int32
    assert got.tolist() == counted(x, bins)


@pytest.mark.parametrize("variant", list_variants("histogram"))
def test_numbers_that_are_no_bin_are_not_counted(variant):
    x = torch.tensor([-1, 0, 1, 9, 10, -(2**31), 2**31 - 1, 9], dtype=torch.int32)
    assert histogram(x, 10, variant=variant).tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0, 2]


@pytest.mark.parametrize("variant", list_variants("histogram"))
def test_all_in_one_bin(variant):
    assert histogram(torch.full((30, 100), 4, dtype=torch.uint8), 5, variant=variant).tolist() == [0, 0, 0, 0, 3000]


@pytest.mark.parametrize("rung", histogram_cuda.VARIANTS)
def test_nothing_is_found(rung):
    plan = histogram_cuda.launches(numbers(3001, -2, 40), 37, variant=rung)[1]
    assert check_each(plan) == []


@pytest.mark.parametrize("rung", histogram_cuda.VARIANTS)
@pytest.mark.parametrize("order", [1, 7])
def test_any_order_of_threads(rung, order):
    x = numbers(9001, 0, 600)
    out, plan = histogram_cuda.launches(x, 600, variant=rung)
    run(plan, order=order)
    assert out.tolist() == counted(x, 600)


def test_more_bins_than_a_block_has_shared_memory_for():
    x = numbers(500, 0, 20_000)
    with pytest.raises(ValueError, match=r"bins must be at most 12288.*take global_atomics"):
        histogram(x, 20_000, variant="cuda.shared_atomics")
    with pytest.raises(ValueError, match=r"bins must be at most 12288.*take global_atomics"):
        histogram_cuda.histogram(x, 20_000)
    assert histogram(x, 20_000, variant="cuda.global_atomics").tolist() == counted(x, 20_000)
    most = histogram_cuda.MOST_BINS
    assert histogram(x, most, variant="cuda.shared_atomics").tolist() == counted(x, most)


def test_atomics_move_from_memory_to_the_block():
    x = numbers(1 << 16, 0, 16)
    lanes = {}
    for rung in histogram_cuda.VARIANTS:
        (p,) = profile_each(histogram_cuda.launches(x, 16, variant=rung)[1])
        lanes[rung] = {
            space: sum(a.lanes for a in p.accesses if a.kind == "atomic" and a.space == space)
            for space in ("global", "shared")
        }
    blocks = (1 << 16) // 256
    assert lanes["global_atomics"] == {"global": 1 << 16, "shared": 0}
    assert lanes["shared_atomics"]["shared"] == 1 << 16
    assert lanes["shared_atomics"]["global"] <= 16 * blocks


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("x", "bins", "variant", "error", "named"),
    [
        ([1], 3, "auto", TypeError, "x must be a torch.Tensor, got list"),
        (torch.ones(3), 3, "auto", TypeError, "x must be int32 or uint8, got torch.float32"),
        (torch.arange(3), 3, "rows", TypeError, "x must be int32 or uint8, got torch.int64"),
        (torch.ones(3).int(), 0, "auto", ValueError, "bins must be a positive int, got 0"),
        (torch.ones(3).int(), 2.0, "auto", ValueError, "bins must be a positive int, got 2.0"),
        (torch.ones(3).int(), 2, "cuda.fast", ValueError, "variant must be .*cuda.shared_atomics.*got 'cuda.fast'"),
    ],
)
def test_bad_arguments_are_named(x, bins, variant, error, named):
    with pytest.raises(error, match=named):
        histogram(x, bins, variant=variant)
