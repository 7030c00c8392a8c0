"""`mlsys.quant.gptq`: the paper's algorithm without its inverse; what H is allowed to be; and what is said about it."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from mlsys.contracts.core import check
from mlsys.contracts.quant import CONTRACTS
from mlsys.quant import QuantizedTensor, Scheme, quantize
from mlsys.quant._hessian import factorise
from mlsys.quant._tensor import choose_grid
from mlsys.quant.gptq import gptq, gptq_report, hessian, loss, rounding

CONTRACT = CONTRACTS["gptq"]
SCHEMES = [
    "int4", "int3:g16", "int2:g7:sym", "int8", "int4:tensor", "int4:g32:fp16", "int4:g16:bf16:sym", "int4:g16:dq",
    "nf4:g16", "nf4:g16:dq", "e2m1:g8", "fp8_e4m3", "fp8_e5m2:tensor", "mxfp4", "mxfp8_e5m2", "nvfp4", "bf16", "fp16",
]  # fmt: skip


def draw(rows, columns, samples=None, seed=0):
    """Weights, and inputs that are correlated."""
    generator = torch.Generator().manual_seed(seed)
    few = max(columns // 4, 1)
    samples = samples or 3 * columns
    x = torch.randn(samples, few, generator=generator) @ torch.randn(few, columns, generator=generator) / math.sqrt(few)
    x = x + 0.2 * torch.randn(samples, columns, generator=generator)
    x = x * torch.exp(0.5 * torch.randn(columns, generator=generator))
    return torch.randn(rows, columns, generator=generator), x


def original(w, H, scheme, groups="static", damp=0.01):
    """Algorithm 1 of the paper in float64, column by column, for any format: what the codes stand for."""
    scheme = Scheme.parse(scheme)
    left, H, columns = w.double().clone(), H.double(), w.shape[1]
    size = scheme.group_size(columns)
    H = H + damp * H.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(H)).T
    grid = choose_grid(w, scheme)
    scale = grid.scale.double().expand(len(w), -1).clone()
    zero = torch.zeros_like(scale) if grid.zero is None else grid.zero.double().expand(len(w), -1).clone()
    element, done = scheme.element, torch.empty_like(left)
    for k in range(columns):
        g = k // size
        if groups == "dynamic" and k % size == 0:
            now = choose_grid(left[:, k : k + size].float(), scheme)
            scale[:, g] = now.scale[:, 0]
            zero[:, g] = 0 if now.zero is None else now.zero[:, 0]
        code = element.encode((left[:, k] / scale[:, g] + zero[:, g]).float())
        done[:, k] = (element.decode(code).double() - zero[:, g]) * scale[:, g]
        left[:, k + 1 :] -= ((left[:, k] - done[:, k]) / factor[k, k])[:, None] * factor[k, k + 1 :]
    return done


def same(a, b, share=0.999):
    """As many numbers equal, up to float32's rounding."""
    near = torch.isclose(a.double(), b.double(), rtol=1e-5, atol=1e-6)
    return float(near.double().mean()) >= share


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    rows=st.integers(1, 30),
    columns=st.integers(1, 70),
    scheme=st.sampled_from(["int4", "int3:g16", "int2:g7:sym", "int3:g20:fp16", "nf4:g16", "e2m1:g8", "mxfp4"]),
    groups=st.sampled_from(["static", "dynamic"]),
    block=st.sampled_from([1, 3, 16, 128]),
    seed=st.integers(0, 1000),
)
def test_it_is_the_papers_algorithm(rows, columns, scheme, groups, block, seed):
    w, x = draw(rows, columns, seed=seed)
    H = hessian(x.double())
    got = gptq(w, H, scheme, groups=groups, block=block).dequantize()
    want = original(w, H, scheme, groups)
    assert same(got, want, share=0.99)  # a number halfway between two may go either way, and those after it follow
    assert loss(w, got, H) == pytest.approx(loss(w, want, H), rel=0.03, abs=1e-9)


@pytest.mark.parametrize(("scheme", "groups"), [("int4", "static"), ("int3:g32", "static"), ("int3:g40", "dynamic")])
def test_float32_is_enough(scheme, groups):
    w, x = draw(100, 300)
    H = hessian(x)
    got, want = gptq(w, H, scheme, groups=groups).dequantize(), original(w, H, scheme, groups)
    assert same(got, want, share=0.998)
    assert loss(w, got, H) == pytest.approx(loss(w, want, H), rel=1e-3)
    assert loss(w, got, H) < 0.6 * loss(w, quantize(w, scheme), H)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_correlation_it_is_rounding_to_nearest(scheme):
    w, x = draw(12, 50)
    w[0, :20] = 0
    w[3] = 0.5
    for H in (torch.diag(x.square().sum(0)), torch.zeros(50, 50)):
        for order in ("natural", "activation"):
            got = gptq(w, H, scheme, order=order)
            want = quantize(w, scheme)
            torch.testing.assert_close(got.dequantize(), want.dequantize(), rtol=0, atol=0)
            assert got.bits_per_weight == want.bits_per_weight
            assert got.scheme == want.scheme


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_gains_where_there_is_correlation(scheme):
    w, x = draw(40, 64)
    H = hessian(x)
    assert loss(w, gptq(w, H, scheme), H) < 0.8 * loss(w, quantize(w, scheme), H)


@pytest.mark.parametrize("scheme", ["int3", "int3:g16", "nf4:g16"])
def test_the_block_changes_nothing(scheme):
    w, x = draw(20, 100)
    H = hessian(x.double())
    for groups in ("static", "dynamic"):
        first, *others = (gptq(w, H, scheme, block=b, groups=groups).dequantize() for b in (1, 5, 16, 33, 1000))
        for other in others:
            assert same(first, other)


def test_the_loss_is_the_sum_of_pivots_times_rounding_errors():
    w, x = draw(30, 60)
    H = hessian(x.double())
    got = gptq(w, H, "int8", damp=0.01).dequantize().double()
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(60)
    factors = factorise(damped.clone(), 0.0)
    upper, pivots = factors.upper, factors.pivots
    torch.testing.assert_close(upper @ torch.diag(pivots) @ upper.T, damped)
    assert torch.equal(upper, upper.triu())
    assert torch.equal(upper.diagonal(), torch.ones(60))
    error = w.double() - got
    rounded = error @ upper  # c − q
    step = choose_grid(w, Scheme.parse("int8")).scale.double()
    inside = rounded.abs() <= step / 2 * (1 + 1e-4)
    assert inside.double().mean() > 0.97  # the rest was clamped
    total = float(((error @ damped) * error).sum())
    assert total == pytest.approx(float((pivots * rounded.square().sum(0)).sum()), rel=1e-9)
    assert total <= float(pivots.sum() * step.square().sum() / 4) * 1.1


def test_activation_order_is_the_order_of_the_columns():
    w, x = draw(20, 64)
    x = x * torch.linspace(0.2, 3, 64)
    H = hessian(x)
    turn = torch.argsort(H.diagonal(), descending=True)
    got = gptq(w, H, "int3", order="activation").dequantize()
    turned = gptq(w[:, turn].contiguous(), H[turn][:, turn], "int3").dequantize()
    assert same(got[:, turn], turned)
    # with groups, each column keeps the scale of the group that it lies in
    grouped = gptq(w, H, "int3:g16", order="activation")
    assert torch.equal(grouped.scales(), quantize(w, "int3:g16").scales())
    assert loss(w, grouped, H) < loss(w, quantize(w, "int3:g16"), H)


def test_static_groups_have_the_scales_of_nearest_and_dynamic_ones_their_own():
    w, x = draw(20, 64)
    H = hessian(x)
    static, dynamic = (gptq(w, H, "int3:g16", groups=groups) for groups in ("static", "dynamic"))
    nearest = quantize(w, "int3:g16")
    assert torch.equal(static.scales(), nearest.scales())
    assert torch.equal(static.zero, nearest.zero)
    assert torch.equal(dynamic.scales()[:, 0], nearest.scales()[:, 0])
    assert not torch.isclose(dynamic.scales()[:, 1:], nearest.scales()[:, 1:]).all()
    one_group = gptq(w, H, "int3", groups="dynamic", order="activation")
    assert torch.equal(one_group.codes, gptq(w, H, "int3", order="activation").codes)


def test_columns_without_input_are_rounded_to_nearest_and_reported():
    w, x = draw(10, 40)
    x[:, [3, 17, 39]] = 0
    quantized, report = gptq_report(w, hessian(x), "int4")
    assert torch.equal(quantized.dequantize()[:, [3, 17, 39]], quantize(w, "int4").dequantize()[:, [3, 17, 39]])
    assert (report.dead, report.columns, report.damp) == (3, 40, 0.01)
    assert report.loss < report.nearest
    assert "3 of 40 columns without input" in str(report)
    harder, more = gptq_report(w, hessian(x), "int4", damp=0.0)
    assert more.damp > 0
    assert harder.dequantize().isfinite().all()


def test_too_few_inputs_are_reported():
    w, x = draw(10, 60, samples=12)
    few = gptq_report(w, hessian(x), "int4")[1]
    assert 6 <= few.rank <= 20
    assert "more of them may help" in str(few)
    generator = torch.Generator().manual_seed(1)
    many = gptq_report(w, hessian(torch.randn(600, 60, generator=generator)), "int4")[1]
    assert many.rank == 60
    assert "more of them" not in str(many)


def test_an_indefinite_h_is_damped_until_it_has_factors():
    w, x = draw(10, 40)
    values, vectors = torch.linalg.eigh(hessian(x.double()))
    values[0] = -values[-1] / 1000
    bent = vectors @ values.diag() @ vectors.T
    quantized, report = gptq_report(w, bent.float(), "int4", damp=1e-4)
    assert report.damp > 1e-4
    assert quantized.dequantize().isfinite().all()


def test_an_h_that_is_no_sum_of_squares_gives_no_loss_below_0_and_is_reported():
    H = torch.full((8, 8), -0.9).fill_diagonal_(1.0)  # (1, …, 1) H (1, …, 1)ᵀ = -42.4
    w = torch.eye(8)[:4] - torch.eye(8)[4:]  # and w H wᵀ = 3.8 for each row
    assert loss(w, w + 0.1, H) == 0
    assert loss(w, w * 1.1, H) == pytest.approx(0.01, rel=1e-4)
    quantized, report = gptq_report(1 + 0.01 * draw(4, 8)[0], H, "int3")
    assert quantized.dequantize().isfinite().all()
    assert report.negative
    assert report.loss >= 0
    assert report.nearest >= 0
    assert "a square below 0, which counts as 0" in str(report)
    w, x = draw(10, 40, samples=12)
    assert not gptq_report(w, hessian(x), "int4")[1].negative


def test_multiples_of_h_and_batches_are_the_same():
    w, x = draw(10, 40)
    H = hessian(x)
    torch.testing.assert_close(hessian(x[50:], hessian(x[:50].reshape(5, 10, 40))), H)
    assert torch.equal(gptq(w, H * 2**-10, "int3").codes, gptq(w, H, "int3").codes)
    for factor in (1e-30, 1e30):
        assert same(gptq(w, H.double() * factor, "int3").dequantize(), gptq(w, H.double(), "int3").dequantize())
    assert loss(w, w, H) == 0
    assert loss(w, torch.zeros_like(w), H) == pytest.approx(1)
    assert loss(torch.zeros(2, 40), torch.ones(2, 40), H) == math.inf
    assert hessian(torch.zeros(0, 4)).equal(torch.zeros(4, 4))
    assert hessian(x.double()).dtype == torch.float64
    assert hessian(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (1, 1), (4, 1), (5,), (2, 3, 8)])
def test_all_shapes(shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = torch.randn(20, shape[-1], generator=torch.Generator().manual_seed(1))
    for groups in ("static", "dynamic"):
        got, report = gptq_report(w, hessian(x), "int4:g4", groups=groups)
        assert isinstance(got, QuantizedTensor)
        assert got.dequantize().shape == w.shape
        assert (got.dequantize() - w).abs().max() < 1 if w.numel() else True
        assert report.columns == shape[-1]


def test_nothing_that_is_given_is_changed():
    w, x = draw(10, 40)
    H = hessian(x)
    before = w.clone(), x.clone(), H.clone()
    for options in ({}, {"groups": "dynamic"}, {"order": "activation"}):
        gptq_report(w, H, "int3:g8", **options)
    hessian(x, H)
    for was, now in zip(before, (w, x, H), strict=True):
        assert torch.equal(was, now)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if "bf16" not in s and s != "fp16"])
def test_rounding_is_the_formats_own(scheme):
    element = Scheme.parse(scheme).element
    x = torch.linspace(-1.3 * element.largest, 1.3 * element.largest, 4001)
    values = element.decode(element.encode(x))
    steps = values.unique()
    x = torch.cat((x, (steps[1:] + steps[:-1]) / 2, steps))  # and what lies halfway between two
    assert torch.equal(rounding(element)(x.clone()), element.decode(element.encode(x)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"H": [1.0]}, TypeError, "H must be a torch tensor"),
        ({"H": torch.eye(8, dtype=torch.int64)}, TypeError, "floating-point"),
        ({"H": torch.eye(6)}, ValueError, r"\(8, 8\), as w has 8 columns, got \(6, 6\)"),
        ({"H": torch.eye(8).fill_(math.nan)}, ValueError, "H must be finite"),
        ({"H": torch.ones(8, 8).triu()}, ValueError, "symmetric"),
        ({"H": -torch.eye(8)}, ValueError, "below 0"),
        ({"H": torch.ones(8, 8) - torch.eye(8) * 0.5}, ValueError, "larger than all of it"),
        ({"H": torch.eye(8).to_sparse()}, TypeError, "H must be a dense tensor"),
        ({"w": torch.ones(4, 8, device="meta")}, TypeError, "w must hold numbers"),
        ({"damp": None}, TypeError, "damp must be a number, got None"),
        ({"damp": True}, TypeError, "damp must be a number, got True"),
        ({"H": torch.eye(8, device="meta")}, ValueError, "on cpu as w is, got meta"),
        ({"w": torch.full((4, 8), math.inf)}, ValueError, "w must be finite"),
        ({"scheme": "int9"}, ValueError, "int9"),
        ({"block": 0}, ValueError, "block must be at least 1"),
        ({"block": 2.5}, TypeError, "block must be a number"),
        ({"damp": -0.1}, ValueError, "damp must be"),
        ({"damp": math.nan}, ValueError, "damp must be"),
        ({"groups": "some"}, ValueError, "'static' or 'dynamic'"),
        ({"order": "random"}, ValueError, "'natural' or 'activation'"),
        ({"groups": "dynamic", "order": "activation", "scheme": "int4:g4"}, ValueError, 'groups="static"'),
        ({"groups": "dynamic", "scheme": "nf4:g4:dq"}, ValueError, 'groups="static"'),
        ({"groups": "dynamic", "scheme": "nvfp4"}, ValueError, 'groups="static"'),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    given = {"w": torch.ones(4, 8), "H": torch.eye(8), "scheme": "int4"} | change
    with pytest.raises(error, match=message):
        gptq(**given)


def test_batches_and_approximations_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"H must be that of the batches before, \(4, 4\)"):
        hessian(torch.ones(3, 4), torch.eye(5))
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.int64"):
        hessian(torch.ones(3, 4), torch.eye(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="H must be on cpu as x is, got meta"):
        hessian(torch.ones(3, 4), torch.eye(4, device="meta"))
    with pytest.raises(TypeError, match="q must be a QuantizedTensor or a torch tensor, got list"):
        loss(torch.ones(3, 4), [1.0], torch.eye(4))
    with pytest.raises(ValueError, match="x must be finite"):
        hessian(torch.tensor([[math.nan]]))
    with pytest.raises(ValueError, match="q must have the shape of w"):
        loss(torch.ones(3, 4), torch.ones(4, 3), torch.eye(4))


@pytest.mark.parametrize("seed", range(6))
def test_contract_accepts_the_reference(seed):
    verdict = check(CONTRACT, CONTRACT.reference, seed=seed)
    assert verdict.passed, str(verdict)


def test_contract_accepts_another_order():
    verdict = check(CONTRACT, lambda w, H, scheme: gptq(w, H.double(), scheme, block=5).dequantize(), seed=1)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("wrong", sorted(CONTRACT.wrong))
def test_contract_names_the_wrong_variant(wrong):
    failure = check(CONTRACT, CONTRACT.wrong[wrong].impl, seed=1).failure
    assert failure is not None
    assert failure.like == wrong
