"""`mlsys.quant.hqq`: the step stays, the zero point moves to where most errors are small."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from mlsys.bench import find
from mlsys.contracts.core import check
from mlsys.contracts.quant import CONTRACTS
from mlsys.quant import hqq, quantize
from mlsys.quant.hqq import shrink, zero_points

CONTRACT = CONTRACTS["hqq"]
SCHEMES = ["int4", "int3:g16", "int2:g7", "int8:affine", "int4:tensor", "int4:g32:fp16", "int4:g16:bf16", "int4:g16:dq"]


def draw(rows, columns, seed=0, size=0.02):
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(rows, columns, generator=generator)


def powers(w, q, p=0.7):
    """Sum of |error|^p of each row, in steps of round-to-nearest."""
    scale = q.scales().double()
    size = q.scheme.group_size(w.shape[1])
    step = scale if scale.shape[1] == 1 else scale.repeat_interleave(size, dim=1)[:, : w.shape[1]]
    return (((w.double() - q.dequantize().double()).abs() / step) ** p).sum(dim=1)


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    rows=st.integers(1, 30),
    columns=st.integers(1, 70),
    scheme=st.sampled_from(SCHEMES),
    shift=st.sampled_from([0.0, 0.03, -1.0]),
    seed=st.integers(0, 1000),
)
def test_it_never_loses_to_nearest_by_its_measure(rows, columns, scheme, shift, seed):
    w = draw(rows, columns, seed) + shift
    before = w.clone()
    found, nearest = hqq(w, scheme), quantize(w, scheme)
    assert torch.equal(w, before)
    assert found.shape == w.shape
    assert torch.equal(found.scales(), nearest.scales())  # the step is round-to-nearest's
    mine, theirs = powers(w, found), powers(w, nearest)
    if scheme == "int4:tensor":
        mine, theirs = mine.sum(), theirs.sum()
    if not scheme.endswith("dq"):  # whose steps may be lost
        assert bool((mine <= theirs * 1.001 + 1e-3 * columns**0.5).all())


def test_every_scheme_of_the_benchmark_is_one_of_hqqs():
    schemes = {case["scheme"] for cases in find.load("quant.hqq").cases.values() for case in cases}
    for scheme in schemes:
        assert hqq(draw(2, 128), scheme).shape == (2, 128)


def test_most_of_the_gain_is_there():
    w = draw(128, 256)
    for scheme, most in (("int4:g64", 0.95), ("int3:g32", 0.93), ("int2:g16", 0.9)):
        found, nearest = hqq(w, scheme), quantize(w, scheme)
        assert float(powers(w, found).sum()) < most * float(powers(w, nearest).sum())
        assert float((w - found.dequantize()).square().sum()) < most * float((w - nearest.dequantize()).square().sum())


def test_shrink_sets_aside_what_is_large():
    u = torch.tensor([-2.0, -0.1, 0.0, 0.17, 0.5], dtype=torch.float64)
    found = shrink(u, 10.0, 0.7)
    want = [-(2 - 2**-0.3 / 10), 0, 0, 0, 0.5 - 0.5**-0.3 / 10]
    torch.testing.assert_close(found, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-3)
    torch.testing.assert_close(shrink(u, 10.0, 1.0), torch.nn.functional.softshrink(u, 0.1))


def test_one_step_is_the_published_one():
    w, largest, beta, p = draw(5, 40, size=3.0).double(), 15, 10.0, 0.7
    zero = torch.full((5,), 7.0, dtype=torch.float64)
    codes = (w + zero[:, None]).round().clamp(0, largest)
    aside = shrink(w - (codes - zero[:, None]), beta, p)
    want = (codes - (w - aside)).mean(dim=1)
    found = zero_points(w, zero, largest, steps=1, p=p, beta=beta, kappa=1.01)
    moved = found != zero
    assert bool(moved.any())  # a group where the step did not help stays where it was
    torch.testing.assert_close(found[moved], want[moved])


def test_errors_of_small_weights_are_all_below_the_published_threshold():
    w = draw(64, 256)  # of size 0.02
    error = w - quantize(w, "int4:g64").dequantize()
    assert not bool(shrink(error, 10.0, 0.7).any())  # so that nothing is set aside, and what is left is least squares
    assert bool(shrink(error / 0.005, 10.0, 0.7).any())


@pytest.mark.parametrize("unit", [2.0**-40, 2.0**40])
def test_the_unit_of_weights_has_no_influence(unit):
    w = draw(8, 64)
    torch.testing.assert_close(hqq(w * unit, "int3:g16").dequantize(), hqq(w, "int3:g16").dequantize() * unit)


def test_no_steps_are_rounding_to_nearest():
    w = draw(9, 50)
    for scheme in ("int4:g16", "int3:tensor"):
        assert torch.equal(hqq(w, scheme, steps=0).dequantize(), quantize(w, scheme).dequantize())


def test_more_steps_do_not_lose():
    w = draw(20, 64)
    sums = [float(powers(w, hqq(w, "int3:g32", steps=steps)).sum()) for steps in (0, 1, 5, 20)]
    assert sums == sorted(sums, reverse=True)
    assert sums[-1] < sums[1]


def test_zeros_and_equal_numbers_are_exact():
    w = torch.zeros(3, 32)
    w[1, :16], w[1, 16:], w[2, :16] = 0.3, -1.7, 5.0
    found = hqq(w, "int4:g16")
    assert torch.equal(found.dequantize(), w)
    assert found.zero.dtype == torch.uint8  # all zero points are still whole


@pytest.mark.parametrize(
    ("scheme", "kind", "bits"),
    [
        ("int4:g64", torch.float32, 4 + 64 / 64),
        ("int4:g64:fp16", torch.float16, 4 + 32 / 64),
        ("int4:g64:bf16", torch.float16, 4 + 32 / 64),
    ],
)
def test_zero_points_take_their_bits(scheme, kind, bits):
    found = hqq(draw(16, 128), scheme)
    assert found.zero.dtype == kind
    assert found.bits_per_weight == bits
    assert found.zero.shape == (16, 2)


def test_groups_that_do_not_divide_are_fitted_alone():
    w = draw(6, 50)
    found = hqq(w, "int3:g20")
    parts = [hqq(w[:, start : start + 20], "int3") for start in (0, 20, 40)]
    torch.testing.assert_close(found.dequantize(), torch.cat([part.dequantize() for part in parts], dim=1))


def test_rows_are_fitted_alone_in_blocks_of_any_size():
    w = draw(70, 2048)  # more than a block
    found = hqq(w, "int2:g64", steps=3).dequantize()
    torch.testing.assert_close(found[40:43], hqq(w[40:43], "int2:g64", steps=3).dequantize())


def test_halves_views_and_more_dimensions():
    w = draw(12, 40)
    want = hqq(w, "int4:g8").dequantize()
    assert torch.equal(hqq(w.reshape(3, 4, 40), "int4:g8").dequantize().reshape(12, 40), want)
    assert torch.equal(hqq(w.t().contiguous().t(), "int4:g8").dequantize(), want)
    half = w.half()
    assert torch.equal(hqq(half, "int4:g8").dequantize(), hqq(half.float(), "int4:g8").dequantize())
    assert hqq(torch.zeros(0, 8), "int4:g4").shape == (0, 8)
    assert hqq(torch.zeros(3, 0), "int4:tensor").shape == (3, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scheme": "int8"}, ValueError, 'take "int8:affine"'),
        ({"scheme": "int4:sym"}, ValueError, 'take "int4:affine"'),
        ({"scheme": "nf4"}, ValueError, 'take "int4:g64:fp16"'),
        ({"w": torch.full((4, 8), math.nan)}, ValueError, "w must be finite"),
        ({"w": torch.ones(4, 8, dtype=torch.int64)}, TypeError, "floating-point"),
        ({"steps": -1}, ValueError, "steps must be 0 or more"),
        ({"steps": 1.5}, TypeError, "steps must be a whole number"),
        ({"p": 0}, ValueError, "p must be above 0"),
        ({"p": 2}, ValueError, "p must be above 0 and at most 1"),
        ({"beta": 0}, ValueError, "beta must be above 0"),
        ({"beta": math.inf}, ValueError, "beta must be above 0 and finite"),
        ({"kappa": 0.9}, ValueError, "kappa must be 1 or more"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    given = {"w": torch.ones(4, 8), "scheme": "int4"} | change
    with pytest.raises(error, match=message):
        hqq(**given)


@pytest.mark.parametrize("seed", range(3))
def test_contract_accepts_the_reference(seed):
    verdict = check(CONTRACT, CONTRACT.reference, seed=seed)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("wrong", sorted(CONTRACT.wrong))
def test_contract_names_the_wrong_variant(wrong):
    failure = check(CONTRACT, CONTRACT.wrong[wrong].impl, seed=1).failure
    assert failure is not None
    assert failure.like == wrong


@pytest.mark.parametrize(
    ("got", "message"),
    [
        (lambda w: w.T, "stand for a matrix"),
        (lambda w: w, "no whole number of their group's steps"),
        (lambda w: hqq(2 * w, "int5:g32").dequantize(), "whole number"),
    ],
)
def test_contract_says_what_is_no_result(got, message):
    failure = check(CONTRACT, lambda w, scheme: got(w)).failure
    assert failure is not None
    assert message in failure.message
