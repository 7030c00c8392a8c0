"""`mlsys.quant.smoothquant`: the formula, the same function before and after, and less error with outliers."""

import copy

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn

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
