"""`mlsys.quant.smoothquant`: the formula, the same function before and after, and less error with outliers."""

import copy

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from mlsys.contracts.core import check
from mlsys.contracts.quant import CONTRACTS
from mlsys.quant import qlinear, quantize
from mlsys.quant.smoothquant import absmax, balance_, fold_, smooth, smooth_scale

CONTRACT = CONTRACTS["smoothquant"]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", sorted(CONTRACT.wrong))
def test_contract_names_the_wrong_variant(name):
    assert check(CONTRACT, CONTRACT.wrong[name].impl, seed=1).failure.like == name


def test_the_papers_picture():
    x = torch.tensor([[1.0, -16, 2, 6], [-2, 8, -1, -9]])
    w = torch.tensor([[2.0, 1, 2, -1], [1, -1, -1, -1], [-2, -1, -2, 1]])
    s = smooth_scale(absmax(x), w)
    torch.testing.assert_close(s, torch.tensor([1.0, 4, 1, 3]))
    torch.testing.assert_close(absmax(x / s), torch.tensor([2.0, 4, 2, 3]))
    torch.testing.assert_close(absmax(smooth(w, s)), torch.tensor([2.0, 4, 2, 3]))


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    columns=st.integers(1, 30),
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    alpha=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_nothing_but_the_rounding_changes(columns, rows, alpha, seed):
    x = draw(7, columns, seed=seed) * torch.exp(2 * draw(columns, seed=seed + 1))
    weights = [draw(n, columns, seed=seed + n) for n in rows]
    before = [w.clone() for w in weights]
    s = smooth_scale(absmax(x), weights, alpha)
    for w, old in zip(weights, before, strict=True):
        torch.testing.assert_close((x / s) @ smooth(w, s).T, x @ w.T, rtol=1e-4, atol=1e-4)
        assert torch.equal(w, old)


def test_alpha_at_its_ends():
    x, w = draw(50, 12).abs().amax(0), draw(9, 12, seed=1)
    torch.testing.assert_close(absmax(smooth(w, smooth_scale(x, w, 0))), torch.ones(12))
    torch.testing.assert_close(x / smooth_scale(x, w, 1), torch.ones(12))


def test_outliers_no_longer_ruin_8_bits():
    x, w = draw(64, 96), draw(40, 96, seed=1)
    x[:, 5] *= 80
    want = x @ w.T
    s = smooth_scale(absmax(x), w)
    rough = (qlinear(x, quantize(w, "int8"), activations="int8") - want).square().mean()
    fine = (qlinear(x / s, quantize(smooth(w, s), "int8"), activations="int8") - want).square().mean()
    assert fine < rough / 10


def test_columns_of_zeros_get_1():
    x, w = torch.tensor([0.0, 4, 4, 0]), torch.tensor([[1.0, 0, 1, 0]])
    assert smooth_scale(x, w).tolist() == [1, 1, 2, 1]
    assert smooth_scale(torch.tensor([1e38]), torch.tensor([[1e-45]]), 0).isfinite().all()


@pytest.mark.parametrize(
    "before",
    [nn.LayerNorm(12), nn.LayerNorm(12, bias=False), nn.RMSNorm(12), nn.Linear(12, 12), nn.Linear(12, 12, bias=False)],
)
def test_balance_keeps_what_modules_compute(before):
    for number, parameter in enumerate(before.parameters()):
        parameter.data = draw(*parameter.shape, seed=number)
    layers = [nn.Linear(12, 5), nn.Linear(12, 9)]
    x = draw(20, 12, seed=9)
    y = before(x).detach()
    want = [layer(y).detach() for layer in layers]
    s = balance_(before, layers, absmax(y))
    torch.testing.assert_close(before(x), y / s, rtol=1e-4, atol=1e-5)
    for layer, old in zip(layers, want, strict=True):
        torch.testing.assert_close(layer(before(x)), old, rtol=1e-4, atol=1e-4)
    assert absmax(before(x)).max() < absmax(y).max()


def test_nothing_is_changed_if_anything_is_refused():
    norm, good, bad = nn.LayerNorm(6), nn.Linear(6, 3), nn.Linear(6, 3)
    with torch.no_grad():
        bad.weight[0, 0] = torch.nan
    old = copy.deepcopy((norm, good))
    with pytest.raises(ValueError, match=r"w\[1\] must be finite"):
        balance_(norm, [good, bad], torch.ones(6))
    for module, was in zip((norm, good), old, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), was.parameters(), strict=True))


def all_equal(modules, others):
    pairs = ((a, b) for m, o in zip(modules, others, strict=True)
             for a, b in zip(m.parameters(), o.parameters(), strict=True))  # fmt: skip
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize(("value", "s"), [(60000.0, 0.5), (1e-7, 1000.0)])
def test_a_norm_that_would_leave_its_dtype_is_refused_before_anything_is_changed(part, value, s):
    norm, layer = nn.LayerNorm(4).half(), nn.Linear(4, 3).half()
    with torch.no_grad():
        norm.bias.fill_(1)
        getattr(norm, part)[2] = value
    old = copy.deepcopy((norm, layer))
    with pytest.raises(ValueError, match=r"LayerNorm holds does not fit into torch\.float16 once divided by s"):
        fold_(norm, torch.full((4,), s))
    with pytest.raises(ValueError, match=r"does not fit into torch\.float16"):
        balance_(norm, layer, torch.full((4,), s), alpha=1.0)
    assert all_equal((norm, layer), old)


def test_weights_that_are_computed_are_refused():
    """What is written to them would be lost with the next call."""

    class Doubled(nn.Module):
        def forward(self, w):
            return 2 * w

    norm, plain, computed = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)
    parametrize.register_parametrization(computed, "weight", Doubled())
    modules = norm, plain, computed
    old = copy.deepcopy(modules)
    with pytest.raises(TypeError, match="linears: the weight of this ParametrizedLinear is computed"):
        balance_(norm, [plain, computed], torch.ones(4))
    with pytest.raises(TypeError, match="before: the weight of this ParametrizedLinear is computed"):
        balance_(computed, plain, torch.ones(4))
    with pytest.raises(TypeError, match="before: the weight of this ParametrizedLinear is computed"):
        fold_(computed, torch.ones(4))
    assert all_equal(modules, old)


@pytest.mark.parametrize("linears", [nn.Conv1d(4, 4, 1), [nn.Linear(4, 4), nn.LayerNorm(4)], 5])
def test_only_linear_layers_are_balanced(linears):
    norm = nn.LayerNorm(4)
    with pytest.raises(TypeError, match=r"linears must be Linear layers, got (Conv1d|LayerNorm|int)"):
        balance_(norm, linears, torch.full((4,), 3.0))
    assert torch.equal(norm.weight, torch.ones(4))


def test_running_maximum():
    x = draw(10, 4)
    assert torch.equal(absmax(x[6:], absmax(x[:6])), x.abs().amax(0))
    assert absmax(x[:0]).tolist() == [0] * 4
    assert torch.equal(absmax(x.reshape(2, 5, 4)), absmax(x))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: smooth_scale(torch.ones(3), torch.ones(2, 4)), ValueError, r"w must be \(N, 3\)"),
        (lambda: smooth_scale(torch.ones(3), []), ValueError, "at least one"),
        (lambda: smooth_scale(torch.ones(3), torch.ones(2, 3), 1.5), ValueError, "alpha must be in 0 … 1"),
        (lambda: smooth_scale(torch.ones(3), torch.ones(2, 3), True), TypeError, "alpha"),
        (lambda: smooth_scale(-torch.ones(3), torch.ones(2, 3)), ValueError, "at least 0"),
        (lambda: smooth_scale(torch.ones(2, 3), torch.ones(2, 3)), ValueError, r"must be \(K,\)"),
        (lambda: smooth_scale([1.0], torch.ones(2, 1)), TypeError, "absmax"),
        (lambda: smooth_scale(torch.tensor([torch.inf]), torch.ones(2, 1)), ValueError, "finite"),
        (lambda: smooth(torch.ones(2, 3), torch.tensor([1.0, 0, 1])), ValueError, "positive"),
        (lambda: smooth(torch.ones(2, 3), torch.ones(2)), ValueError, r"s must be \(3,\)"),
        (lambda: smooth(torch.ones(2, 3), [1, 1, 1]), TypeError, "s must be"),
        (lambda: smooth(torch.ones(1, 1).half(), torch.tensor([1e6])), ValueError, "beyond torch.float16"),
        (lambda: fold_(nn.GELU(), torch.ones(3)), TypeError, "GELU"),
        (lambda: fold_(nn.LayerNorm(3, elementwise_affine=False), torch.ones(3)), ValueError, "elementwise_affine"),
        (lambda: fold_(nn.LayerNorm((2, 3)), torch.ones(2)), ValueError, "one dimension"),
        (lambda: absmax(torch.ones(2, 3), torch.ones(2)), ValueError, "running"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
