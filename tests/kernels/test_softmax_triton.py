"""Softmax in Triton: values and gradients beside float64 and beside plain low precision, guarded memory, refusals."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys.kernels import _triton, softmax, softmax_triton
from mlsys.kernels._triton import config
from mlsys.loading import import_file

Fences = import_file(Path(__file__).with_name("guards.py")).Fences
DEVICE = "cpu" if _triton.INTERPRETED.value else "cuda"
SHORT = (config(ROWS=1, BLOCK=128, warps=4, stages=1), config(ROWS=4, BLOCK=128, warps=4, stages=1))
LONG = config(BLOCK=32, warps=1, stages=2)


def numbers(*shape, dtype=torch.float32, seed=0):
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype).to(DEVICE)


def both(function, x, dy):
    """The result and x's gradient, in float64."""
    x = x.detach().clone().requires_grad_()
    y = function(x)
    (dx,) = torch.autograd.grad(y, x, dy.to(y.dtype))
    return y.detach().double(), dx.double()


def no_worse(ours, plain, exact, dtype):
    """Errors at most twice those of the plain version; float32 sums may come in another order."""
    for a, b, want in zip(ours, plain, exact, strict=True):
        floor = 16 * torch.finfo(torch.float32).eps * want.abs().max() + torch.finfo(dtype).eps / 2 * want.abs().max()
        assert (a - want).abs().max() <= 2 * (b - want).abs().max() + floor


@pytest.fixture
def long_rows(monkeypatch):
    """Rows of more than 64 numbers do not fit."""
    monkeypatch.setattr(softmax_triton, "FITS", 64)
    monkeypatch.setattr(softmax_triton, "LONG", (LONG,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 123, 123), (1,), (300, 3), (2, 1025), (3, 1), (0, 4), (4, 0)])
def test_values_and_gradients_are_no_worse_than_plain_ones(shape, dtype):
    x, dy = numbers(*shape, dtype=dtype), numbers(*shape, dtype=dtype, seed=1)
    if not x.numel():
        assert softmax_triton.softmax(x).shape == x.shape
        return
    no_worse(
        both(softmax_triton.softmax, x, dy), both(lambda x: x.softmax(-1), x, dy),
        both(lambda x: x.softmax(-1), x.double(), dy.double()), dtype,
    )  # fmt: skip


@pytest.mark.usefixtures("long_rows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [65, 96, 123])
def test_rows_that_do_not_fit(columns, dtype):
    x, dy = numbers(3, columns, dtype=dtype), numbers(3, columns, dtype=dtype, seed=1)
    exact = both(lambda x: x.softmax(-1), x.double(), dy.double())
    no_worse(both(softmax_triton.softmax, x, dy), both(lambda x: x.softmax(-1), x, dy), exact, dtype)
    x[0, :90], x[1], x[2, 3] = -math.inf, -math.inf, math.nan  # at first nothing else; nothing else at all
    want = x.double().softmax(-1)
    torch.testing.assert_close(softmax_triton.softmax(x).double(), want, rtol=8e-3, atol=1e-6, equal_nan=True)


@settings(max_examples=12)
@given(rows=st.integers(1, 9), columns=st.integers(1, 70), seed=st.integers(0, 99), narrow=st.booleans())
def test_any_shape(rows, columns, seed, narrow):
    x = numbers(rows, columns, dtype=torch.bfloat16 if narrow else torch.float32, seed=seed)
    want = x.double().softmax(-1)
    torch.testing.assert_close(softmax_triton.softmax(x).double(), want, rtol=8e-3 if narrow else 1e-5, atol=1e-7)


@pytest.mark.parametrize("one", SHORT)
def test_every_config_computes_the_same(one):
    x = numbers(7, 123)
    torch.testing.assert_close(softmax_triton.softmax(x, config=one), softmax_triton.softmax(x), rtol=1e-6, atol=0)


def test_configs_hold_whole_rows():
    for columns in (1, 3, 100, 4096, 5000, softmax_triton.FITS):
        for one in softmax_triton.configs(columns):
            assert one["BLOCK"] >= columns
            assert one["ROWS"] >= 1
    assert softmax_triton.configs(softmax_triton.FITS + 1) == softmax_triton.LONG


def test_views_need_no_copy_and_are_right():
    x = numbers(12, 40)
    for view in (
        x[:, 3:20],
        x[::3],
        x.t(),
        x[:1].expand(5, 40),
        numbers(2, 3, 50)[..., :7],
        numbers(4, 6).as_strided((3, 3), (1, 2)),
    ):
        torch.testing.assert_close(softmax_triton.softmax(view), view.softmax(-1))
    assert softmax_triton.rows_of(x[:, 3:20]).data_ptr() == x[:, 3:].data_ptr()


def test_gradient_that_is_expanded():
    x = numbers(4, 9).requires_grad_()
    softmax_triton.softmax(x).sum().backward()
    assert x.grad.abs().max() < 1e-6  # a softmax always adds up to 1


def test_gradcheck_by_differences():
    x = numbers(2, 5).requires_grad_()
    weights = numbers(2, 5, seed=1)
    (softmax_triton.softmax(x) * weights).sum().backward()
    y = x.detach().double().requires_grad_()
    (y.softmax(-1) * weights.double()).sum().backward()
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fits", [True, False])
def test_nothing_beyond_the_tensors_is_read_or_written(fits, request):
    if not fits:
        request.getfixturevalue("long_rows")
    given_x, given_dy = numbers(5, 100), numbers(5, 100, seed=1)
    with Fences() as fences:
        x = fences.around(given_x.requires_grad_())
        y = softmax_triton.softmax(x)
        (dx,) = torch.autograd.grad(y, x, fences.around(given_dy))
    assert not y.isnan().any()
    assert not dx.isnan().any()
    torch.testing.assert_close(y, given_x.softmax(-1))


def test_family_knows_it():
    x = numbers(3, 5)
    torch.testing.assert_close(softmax(x, variant="triton"), x.softmax(-1))


def test_refusals():
    with pytest.raises(TypeError, match=r"x must be float32 or bfloat16, got torch.float64: convert it"):
        softmax_triton.softmax(torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="x must have at least one dimension"):
        softmax_triton.softmax(torch.tensor(1.0))
    with pytest.raises(ValueError, match="x must be on a CUDA device, got meta"):
        softmax_triton.softmax(torch.ones(3, device="meta"))
    x = numbers(2, 3).requires_grad_()
    with pytest.raises(RuntimeError, match="the Triton softmax is differentiable once, and create_graph=True asks"):
        torch.autograd.grad(softmax_triton.softmax(x).sum(), x, create_graph=True)
