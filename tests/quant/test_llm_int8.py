"""`mlsys.quant.llm_int8`: which columns are taken out, what is left, and the same result as without if none are."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from mlsys.contracts.core import check
from mlsys.contracts.quant import CONTRACTS
from mlsys.quant import llm_int8, prepare, qlinear, quantize

CONTRACT = CONTRACTS["llm_int8"]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(m, k, columns, seed=0):
    x = draw(m, k, seed=seed).clamp(-3, 3)
    x[0, columns] = 50
    return x


def error(y, want):
    return float((y - want).square().sum() / want.square().sum())


@pytest.mark.parametrize("name", sorted(CONTRACT.wrong))
def test_contract_names_the_wrong_variant(name):
    assert check(CONTRACT, CONTRACT.wrong[name].impl, seed=1).failure.like == name


def test_outliers():
    x = torch.tensor([[[1.0, -6, 0, 5.9]], [[-7, 2, 0, 5]]])
    assert llm_int8.outliers(x).tolist() == [0, 1]
    assert llm_int8.outliers(x, 0).tolist() == [0, 1, 2, 3]
    assert llm_int8.outliers(x, math.inf).tolist() == []
    assert llm_int8.outliers(x[:0]).tolist() == []


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    m=st.integers(1, 6),
    n=st.integers(1, 9),
    k=st.integers(1, 40),
    count=st.integers(0, 3),
    scheme=st.sampled_from(["int8", "int8:tensor", "int8:affine", "int4:g8", "int3:g16:sym"]),
    seed=st.integers(0, 99),
)
def test_it_is_two_products(m, n, k, count, scheme, seed):
    columns = sorted({seed % k, (seed * 7 + 1) % k, (seed * 3) % k})[:count]
    x, qw = with_outliers(m, k, columns, seed), quantize(draw(n, k, seed=seed), scheme)
    rest = x.clone()
    rest[:, columns] = 0
    want = qlinear(rest, qw, activations="int8", path="reference") + x[:, columns] @ qw.dequantize()[:, columns].T
    torch.testing.assert_close(llm_int8.linear(x, qw), want, rtol=1e-4, atol=1e-4)
    assert float(x[0, columns].sum()) == 50 * len(columns)


def test_error_is_that_of_inputs_without_outliers():
    w, columns = draw(60, 128, seed=1), [3, 77]
    x = with_outliers(9, 128, columns)
    want, qw = x @ w.T, quantize(w, "int8")
    mixed = error(llm_int8.linear(x, qw), want)
    assert mixed < error(qlinear(x, qw, activations="int8"), want) / 3
    kept = llm_int8.keep(w, llm_int8.outliers(x))
    assert kept.columns.tolist() == columns
    assert kept.nbytes == 60 * 2 * 4
    assert error(llm_int8.linear(x, qw, kept=kept), want) < mixed


def test_kept_columns_need_not_be_outliers_and_others_may_be():
    w = draw(5, 20, seed=1)
    x, qw = with_outliers(4, 20, [2, 9]), quantize(w, "int4")
    kept = llm_int8.keep(w, torch.tensor([9, 11]))
    mixed = qw.dequantize()
    mixed[:, [9, 11]] = w[:, [9, 11]]
    rest = x.clone()
    rest[:, [2, 9, 11]] = 0
    want = qlinear(rest, qw, activations="int8") + x[:, [2, 9, 11]] @ mixed[:, [2, 9, 11]].T
    torch.testing.assert_close(llm_int8.linear(x, qw, kept=kept), want, rtol=1e-4, atol=1e-4)


def test_without_outliers_it_is_qlinear():
    x, qw, bias = draw(3, 4, 24), quantize(draw(7, 24, seed=1), "int8"), draw(7, seed=2)
    want = qlinear(x, qw, bias, activations="int8")
    assert torch.equal(llm_int8.linear(x, qw, bias, threshold=math.inf), want)
    assert torch.equal(llm_int8.linear(x, prepare(qw), bias, threshold=100.0), want)


def test_shapes_dtypes_and_bias():
    qw, bias = quantize(draw(7, 24, seed=1), "int8"), draw(7, seed=2)
    x = with_outliers(6, 24, [4]).reshape(2, 3, 24)
    y = llm_int8.linear(x, qw, bias)
    assert y.shape == (2, 3, 7)
    torch.testing.assert_close(y[1, 2], llm_int8.linear(x, qw)[1, 2] + bias)
    half = llm_int8.linear(x.bfloat16(), qw, bias)
    assert half.dtype == torch.bfloat16
    assert error(half.float(), y) < 1e-4
    assert llm_int8.linear(x[:0], qw).shape == (0, 3, 7)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, qw: llm_int8.linear(x, x), TypeError, "QuantizedTensor"),
        (lambda x, qw: llm_int8.linear(x, quantize(draw(3, 8), "nf4")), ValueError, "integers"),
        (lambda x, qw: llm_int8.linear(x[:, :5], qw), ValueError, "rows of 8"),
        (lambda x, qw: llm_int8.linear(x, qw, torch.ones(2)), ValueError, "bias"),
        (lambda x, qw: llm_int8.linear(x, qw, threshold=-1), ValueError, "at least 0"),
        (lambda x, qw: llm_int8.linear(x, qw, threshold=math.nan), ValueError, "at least 0"),
        (lambda x, qw: llm_int8.linear(x, qw, threshold="6"), TypeError, "threshold"),
        (lambda x, qw: llm_int8.linear(x.int(), qw), TypeError, "floating-point"),
        (lambda x, qw: llm_int8.linear(x.requires_grad_(), qw), ValueError, "gradient"),
        (
            lambda x, qw: llm_int8.linear(x, qw, kept=llm_int8.keep(torch.ones(2, 8), torch.tensor([1]))),
            ValueError,
            "kept must hold columns of the same weight",
        ),
        (lambda x, qw: llm_int8.keep(torch.ones(2, 8), torch.tensor([8])), ValueError, "0 … 7"),
        (lambda x, qw: llm_int8.keep(torch.ones(2, 8), [1]), TypeError, "columns"),
        (lambda x, qw: llm_int8.keep(torch.ones(8), torch.tensor([1])), TypeError, "matrix"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(with_outliers(4, 8, [1]), quantize(draw(3, 8), "int8"))
