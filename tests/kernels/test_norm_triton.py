"""LayerNorm and RMSNorm in Triton: values and all gradients beside float64 and plain low precision, guarded memory."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from mlsys.kernels import _triton, norm, norm_triton
from mlsys.loading import import_file

Fences = import_file(Path(__file__).with_name("guards.py")).Fences
DEVICE = "cpu" if _triton.INTERPRETED.value else "cuda"


@pytest.fixture(autouse=True)
def few_groups(monkeypatch):
    """The interpreter takes its time for each program."""
    monkeypatch.setattr(norm_triton, "GROUPS", 8)


def plain(x, weight, bias, kind):
    n = x.shape[-1:]
    return F.layer_norm(x, n, weight, bias, 1e-5) if kind == "layernorm" else F.rms_norm(x, n, weight, 1e-5)


def ours(x, weight, bias, kind):
    return norm_triton.norm(x, weight, bias, kind=kind)


def draw(shape, dtype, kind, biased=True):
    generator = torch.Generator().manual_seed(sum(shape))
    x = 1 + 3 * torch.randn(shape, generator=generator)
    weight, bias = torch.randn(2, shape[-1], generator=generator)
    given = [x, weight] + ([bias] if kind == "layernorm" and biased else [])
    return [y.to(dtype).to(DEVICE) for y in given], torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def all_of(function, given, dy, kind):
    """The result and the gradients of x, weight and bias, in float64."""
    given = [x.detach().clone().requires_grad_() for x in given]
    y = function(given[0], given[1], given[2] if len(given) > 2 else None, kind)
    return [y.detach().double(), *(g.double() for g in torch.autograd.grad(y, given, dy.to(y.dtype)))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("shape", [(5, 12, 123), (7,), (300, 3), (2, 1025), (70, 17)])
def test_values_and_gradients_are_no_worse_than_plain_ones(shape, kind, dtype):
    given, dy = draw(shape, dtype, kind)
    exact = all_of(plain, [x.double() for x in given], dy.double(), kind)
    for a, b, want in zip(all_of(ours, given, dy, kind), all_of(plain, given, dy, kind), exact, strict=True):
        floor = (16 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps / 2) * want.abs().max()
        assert (a - want).abs().max() <= 2 * (b - want).abs().max() + floor


def test_without_bias():
    given, dy = draw((4, 33), torch.float32, "layernorm", biased=False)
    for a, b in zip(all_of(ours, given, dy, "layernorm"), all_of(plain, given, dy, "layernorm"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_mean_far_from_zero():
    given, _ = draw((3, 500), torch.float32, "layernorm")
    given[0] += 4096
    want = plain(*(x.double() for x in given), "layernorm")
    torch.testing.assert_close(ours(*given, "layernorm").double(), want, rtol=1e-3, atol=2e-3)


def test_gradients_have_the_same_bits_every_time():
    given, dy = draw((70, 40), torch.float32, "layernorm")
    first, second = (all_of(ours, given, dy, "layernorm") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("groups", [1, 3, 7, 264])
def test_any_number_of_groups(groups, monkeypatch):
    monkeypatch.setattr(norm_triton, "GROUPS", groups)
    given, dy = draw((10, 20), torch.float32, "layernorm")
    for a, b in zip(all_of(ours, given, dy, "layernorm"), all_of(plain, given, dy, "layernorm"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("one", norm_triton.configs("forward", 123))
def test_every_config_computes_the_same(one):
    (x, weight, bias), _ = draw((9, 123), torch.float32, "layernorm")
    want = plain(x, weight, bias, "layernorm")
    torch.testing.assert_close(norm_triton.norm(x, weight, bias, config=one), want, rtol=1e-5, atol=1e-5)


def test_views():
    (x, weight, bias), _ = draw((12, 40), torch.float32, "layernorm")
    for view, n in ((x[:, 3:20], 17), (x[::3], 40), (x.t()[:, :9], 9)):
        want = plain(view, weight[:n], bias[:n], "layernorm")
        torch.testing.assert_close(norm_triton.norm(view, weight[:n], bias[:n]), want, rtol=1e-5, atol=1e-5)
    strided = torch.stack([weight, weight], 1)[:, 0]
    torch.testing.assert_close(norm_triton.norm(x, strided), plain(x, weight, None, "layernorm"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_nothing_beyond_the_tensors_is_read_or_written(kind):
    given, dy = draw((6, 100), torch.float32, kind)
    with Fences() as fences:
        fenced = [fences.around(x.requires_grad_()) for x in given]
        y = norm_triton.norm(*fenced, kind=kind)
        grads = torch.autograd.grad(y, fenced, fences.around(dy))
    for a, b in zip((y, *grads), all_of(plain, given, dy, kind), strict=True):
        torch.testing.assert_close(a.detach().double(), b, rtol=1e-4, atol=1e-4)


def test_only_the_gradient_that_is_wanted():
    (x, weight, bias), dy = draw((5, 20), torch.float32, "rmsnorm")[0] + [None], None
    y = norm_triton.norm(x.requires_grad_(), weight, kind="rmsnorm")
    y.sum().backward()
    assert weight.grad is None
    assert bias is dy is None
    assert x.grad.shape == x.shape


def test_family_knows_it_and_empty_input():
    (x, weight, bias), _ = draw((4, 8), torch.float32, "layernorm")
    torch.testing.assert_close(norm(x, weight, bias, variant="triton"), norm(x, weight, bias), rtol=1e-5, atol=1e-5)
    assert norm_triton.norm(x[:0], weight, bias).shape == (0, 8)


def test_refusals():
    x, weight = torch.ones(2, 4, device=DEVICE), torch.ones(4, device=DEVICE)
    with pytest.raises(
        ValueError, match="x must have at most 16384 numbers in a row for the Triton kernels, got 16385"
    ):
        norm_triton.norm(torch.ones(1, 16385), torch.ones(16385))
    with pytest.raises(ValueError, match="variant 'triton' cannot compute this: x must have at most 16384"):
        norm(torch.ones(1, 16385), torch.ones(16385), variant="triton")
    with pytest.raises(TypeError, match=r"weight must have x's dtype torch.float32, got torch.bfloat16"):
        norm_triton.norm(x, weight.bfloat16())
    with pytest.raises(ValueError, match="weight must be on x's device"):
        norm_triton.norm(x, weight.to("meta"))
    with pytest.raises(ValueError, match="bias must be None for kind='rmsnorm'"):
        norm_triton.norm(x, weight, weight, kind="rmsnorm")
