"""`mlsys.quant.awq`: columns with large inputs get a finer grid; on what it saw it never loses to nearest."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from mlsys.contracts.core import check
from mlsys.contracts.quant import CONTRACTS
from mlsys.quant import Scheme, awq, quantize
from mlsys.quant.awq import LEAST, OutputError, column_scale
from mlsys.quant.gptq import hessian, loss

CONTRACT = CONTRACTS["awq"]
SCHEMES = [
    "int4", "int3:g16", "int2:g7:sym", "int8", "int4:tensor", "int4:g32:fp16", "int4:g16:bf16:sym", "int4:g16:dq",
    "nf4:g16", "e2m1:g8", "fp8_e4m3", "mxfp4", "nvfp4", "bf16",
]  # fmt: skip


def draw(rows, columns, samples, seed=0, large=8):
    """Weights, and inputs of which every `large`-th column is 15 times as large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, columns, generator=generator)
    x[:, ::large] *= 15
    return 0.05 * torch.randn(rows, columns, generator=generator), x


def output_loss(w, x, found):
    q, s = found
    return loss(w, q.dequantize() / s, hessian(x.double()))


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    rows=st.integers(1, 30),
    columns=st.integers(1, 70),
    samples=st.integers(1, 120),
    scheme=st.sampled_from(SCHEMES),
    clip=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_it_never_loses_to_nearest_on_the_inputs_it_saw(rows, columns, samples, scheme, clip, seed):
    w, x = draw(rows, columns, samples, seed)
    before = w.clone(), x.clone()
    q, s = awq(w, x, scheme)
    assert torch.equal(w, before[0])
    assert torch.equal(x, before[1])
    assert q.shape == w.shape
    assert s.shape == (columns,)
    assert s.dtype == torch.float32
    assert bool((s > 0).all())
    nearest = loss(w, quantize(w, scheme), hessian(x.double()))
    found = output_loss(w, x, (q, s))
    assert found <= nearest * 1.0001 + 1e-10
    # the codes are those of round-to-nearest of w · diag(s)
    assert torch.equal(q.dequantize(), quantize(w * s, scheme).dequantize())
    if clip:
        clipped, t = awq(w, x, scheme, clip=True)
        assert torch.equal(s, t)
        plain, fewer = (group_errors(w, s, x, found, scheme) for found in (q, clipped))
        # each group alone gets better, with a range of its own; with all of them together it need not
        assert bool((fewer <= plain * 1.001 + 1e-6 * plain.mean()).all())


def group_errors(w, s, x, q, scheme):
    """‖x_g E_gᵀ‖² of each row and group for the weights' errors E; their sum where groups have one range in common."""
    scheme = Scheme.parse(scheme)
    size = scheme.group_size(w.shape[1])
    error = (w.double() * s.double() - q.dequantize().double()).split(size, dim=1)
    inputs = (x.double() / s.double()).split(size, dim=1)
    found = torch.stack([(e @ part.T).square().sum(dim=1) for e, part in zip(error, inputs, strict=True)], dim=1)
    return found.sum() if scheme.group == "tensor" or scheme.scales in ("dq", "e4m3") else found


def test_outputs_are_those_of_inputs_divided_by_s():
    w, x = draw(24, 64, 100)
    q, s = awq(w, x, "int8:g16")
    torch.testing.assert_close((x / s) @ q.dequantize().T, x @ w.T, rtol=0.02, atol=0.02 * float((x @ w.T).std()))


def test_columns_with_large_inputs_are_scaled_up_and_the_error_falls():
    w, x = draw(48, 128, 300, large=32)
    q, s = awq(w, x, "int4")
    assert float(s[::32].min()) > 1.5 * float(s[1:32].max())
    assert output_loss(w, x, (q, s)) < 0.6 * loss(w, quantize(w, "int4"), hessian(x))


def test_equal_columns_are_rounded_to_nearest():
    w = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    x = torch.ones(30, 20)
    q, s = awq(w, x, "int4:g10")
    assert torch.equal(s, torch.ones(20))
    assert torch.equal(q.dequantize(), quantize(w, "int4:g10").dequantize())


@pytest.mark.parametrize("samples", [20, 90])  # by x itself, and by xᵀx
def test_the_error_is_that_of_the_outputs(samples):
    x, error = torch.randn(2, samples, 600, generator=torch.Generator().manual_seed(0)).double()[:, :, :60]
    error = error[:11]
    assert OutputError(x)(error) == pytest.approx(float((x @ error.T).square().sum()), rel=1e-9)


def test_the_error_by_blocks_of_columns_is_that_of_all():
    x = torch.randn(700, 600, generator=torch.Generator().manual_seed(0)).double()
    error = torch.randn(3, 600, generator=torch.Generator().manual_seed(1)).double()
    found = OutputError(x)
    assert found.squared
    assert found(error) == pytest.approx(float((x @ error.T).square().sum()), rel=1e-9)


def test_columns_without_input_count_as_the_smallest():
    w, x = draw(12, 40, 80)
    x[:, 3] = 0
    q, s = awq(w, x, "int4:g20")
    assert torch.isfinite(s).all()
    assert float(s[3]) == float(s.min())
    assert math.isfinite(output_loss(w, x, (q, s)))
    strength = x.abs().mean(dim=0)
    assert float(column_scale(strength, 1.0)[3] / column_scale(strength, 1.0).max()) == pytest.approx(LEAST)


def test_inputs_of_zeros_say_nothing():
    w, _ = draw(4, 10, 1)
    q, s = awq(w, torch.zeros(3, 10), "int4")
    assert torch.equal(s, torch.ones(10))
    assert torch.equal(q.dequantize(), quantize(w, "int4").dequantize())


@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_the_unit_of_inputs_has_no_influence(unit):
    w, x = draw(8, 24, 40)
    (q, s), (r, t) = awq(w, x, "int3:g8"), awq(w, x * unit, "int3:g8")
    torch.testing.assert_close(s, t)
    torch.testing.assert_close(q.dequantize(), r.dequantize(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "scheme", ["int3", "int3:g16", "int3:g24:sym", "nf4:g16", "int3:tensor", "int3:g16:dq", "mxfp4"]
)
def test_clipping_helps_where_a_single_weight_is_large(scheme):
    w, x = draw(20, 56, 200)
    w[:, 5] *= 12
    x[:, 5] *= 0.02  # large weights, but of no weight in the outputs: scaling finds that too, if it may
    plain, clipped = (output_loss(w, x, awq(w, x, scheme, clip=clip)) for clip in (False, True))
    assert clipped <= plain * 1.02


def test_clipping_lowers_the_error_of_heavy_tails():
    w, x = draw(64, 96, 400)
    w = w / torch.rand(64, 96, generator=torch.Generator().manual_seed(2)).clamp(min=0.05)
    plain, clipped = (output_loss(w, x, awq(w, x, "int3", clip=clip)) for clip in (False, True))
    assert clipped < 0.97 * plain


def test_halves_views_and_more_dimensions():
    w, x = draw(12, 40, 60)
    want = awq(w, x, "int4:g8")
    stacked = awq(w.reshape(3, 4, 40), x.reshape(6, 10, 40), "int4:g8")
    assert torch.equal(stacked[0].dequantize().reshape(12, 40), want[0].dequantize())
    views = awq(w.t().contiguous().t(), x.t().contiguous().t(), "int4:g8")
    torch.testing.assert_close(views[1], want[1])
    half = w.to(torch.bfloat16)
    assert torch.equal(awq(half, x, "int4:g8")[0].dequantize(), awq(half.float(), x, "int4:g8")[0].dequantize())


def test_empty_matrices():
    q, s = awq(torch.zeros(0, 6), torch.ones(2, 6), "int4")
    assert q.shape == (0, 6)
    assert s.shape == (6,)
    assert awq(torch.zeros(3, 0), torch.ones(2, 0), "int4", clip=True)[1].shape == (0,)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3, 6)}, ValueError, "x must hold inputs of 8 numbers"),
        ({"x": torch.ones(0, 8)}, ValueError, "at least one input"),
        ({"x": torch.full((2, 8), math.nan)}, ValueError, "x must be finite"),
        ({"x": torch.ones(2, 8, dtype=torch.int32)}, TypeError, "x must be a floating-point tensor"),
        ({"w": torch.full((4, 8), math.inf)}, ValueError, "w must be finite"),
        ({"scheme": "int9"}, ValueError, "int9"),
        ({"grid": 0}, ValueError, "grid must be at least 1"),
        ({"grid": 2.5}, TypeError, "grid must be a number of steps"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    given = {"w": torch.ones(4, 8), "x": torch.ones(3, 8), "scheme": "int4"} | change
    with pytest.raises(error, match=message):
        awq(**given)


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
        (lambda w, x: w, "two results"),
        (lambda w, x: (w.T, torch.ones(w.shape[1])), "stand for a matrix"),
        (lambda w, x: (w, torch.ones(w.shape[0])), "one number for each column"),
        (lambda w, x: (w, torch.zeros(w.shape[1])), "not above 0"),
        (lambda w, x: (w, torch.ones(w.shape[1])), "not at the nearest code"),
    ],
)
def test_contract_says_what_is_no_result(got, message):
    failure = check(CONTRACT, lambda w, x, scheme: got(w, x)).failure
    assert failure is not None
    assert message in failure.message
