"""`mlsys.attention.flash` computes what `naive` computes, forward and backward, without ever holding the scores."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mlsys.attention import flash, naive
from mlsys.bench.memory import peak_bytes

size = st.integers(1, 9)
length = st.integers(0, 13)


def qkv(b=1, h=2, h_kv=None, t=5, s=7, d=8, dv=6, dtype=torch.float64, seed=0, requires_grad=True):
    generator = torch.Generator().manual_seed(seed)
    shapes = (b, h, t, d), (b, h_kv or h, s, d), (b, h_kv or h, s, dv)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [x.requires_grad_(requires_grad) for x in drawn]


def grads(function, inputs, **options):
    out = function(*inputs, **options)
    weights = (
        torch.linspace(-1, 2, max(out.numel(), 1), dtype=torch.float64)[: out.numel()].view(out.shape).to(out.dtype)
    )
    return [out, *torch.autograd.grad(out, inputs, weights)]


@given(
    b=st.integers(1, 3), h_kv=st.integers(1, 3), group=st.integers(1, 3), t=length, s=length, d=size, dv=size,
    block_q=size, block_k=size, causal=st.booleans(), scale=st.none() | st.floats(-1.0, 2.0), seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_naive_for_any_shape_and_block(b, h_kv, group, t, s, d, dv, block_q, block_k, causal, scale, seed):
    inputs = qkv(b, h_kv * group, h_kv, t, s, d, dv, seed=seed)
    got = grads(flash.attention, inputs, causal=causal, scale=scale, block_q=block_q, block_k=block_k)
    want = grads(naive.attention, inputs, causal=causal, scale=scale)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
def test_default_blocks_in_every_dtype(dtype, tolerance, causal):
    inputs = qkv(h=4, h_kv=2, t=600, s=700, d=16, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    for g, w in zip(
        grads(flash.attention, inputs, causal=causal), grads(naive.attention, exact, causal=causal), strict=True
    ):
        assert g.dtype == dtype
        assert (g.double() - w).abs().max() <= tolerance * w.abs().max().clamp(min=1)


def test_longer_than_the_default_blocks():
    inputs = qkv(h=1, t=300, s=4500, d=8, dtype=torch.float32, requires_grad=False)
    torch.testing.assert_close(
        flash.attention(*inputs, causal=True), naive.attention(*inputs, causal=True), rtol=1e-4, atol=1e-5
    )


def test_gradients_by_finite_differences():
    inputs = qkv(h=2, h_kv=1, t=4, s=5, d=3, dv=2)
    assert torch.autograd.gradcheck(lambda *x: flash.attention(*x, causal=True, block_q=2, block_k=2), inputs)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_inputs_only(wanted):
    inputs = qkv(requires_grad=False)
    for i in wanted:
        inputs[i].requires_grad_()
    some = [inputs[i] for i in wanted]
    got = torch.autograd.grad(flash.attention(*inputs).sum(), some)
    want = torch.autograd.grad(naive.attention(*inputs).sum(), some)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_no_second_derivative_is_said_not_silent():
    q, k, v = qkv()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(flash.attention(q, k, v).sum(), q, create_graph=True)


def test_scores_that_rise_along_the_keys_and_overflow_exp():
    q, k, v = qkv(t=4, s=60, dtype=torch.float32, requires_grad=False)
    q, k = 50 * q.abs(), k.abs() * torch.linspace(0, 20, 60)[:, None]
    out = flash.attention(q, k, v, block_k=7)
    assert out.isfinite().all()
    torch.testing.assert_close(out, naive.attention(q, k, v), rtol=1e-3, atol=1e-4)


def test_a_query_that_sees_nothing_gives_zero_and_no_gradient():
    inputs = qkv(t=9, s=3)
    out, dq, dk, dv = grads(flash.attention, inputs, causal=True, block_q=2, block_k=2)
    assert (out[:, :, :6] == 0).all()
    assert (dq[:, :, :6] == 0).all()
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_inputs_that_are_not_contiguous_and_stay_unchanged(dtype, causal):
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(2, 10, 3, 4, 8, generator=generator, dtype=torch.float64).to(dtype)
    q, k, v = packed.permute(2, 0, 3, 1, 4)  # as a fused projection leaves them
    before = packed.clone()
    expanded = v[:, :1].expand(-1, 4, -1, -1)
    for value in (v, expanded):
        got = flash.attention(q, k, value, causal=causal, block_q=3, block_k=4)
        torch.testing.assert_close(
            got, naive.attention(q, k, value, causal=causal), rtol=2e-2, atol=4e-2 if dtype == torch.bfloat16 else 1e-5
        )
    assert torch.equal(packed, before)


def test_an_expanded_gradient_as_sum_gives_it():
    inputs = qkv()
    got = torch.autograd.grad(flash.attention(*inputs).sum(), inputs)
    want = torch.autograd.grad(naive.attention(*inputs).sum(), inputs)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_nan_stays_in_the_rows_that_see_it():
    q, k, v = qkv(requires_grad=False)
    q[0, 1, 2, 3] = math.nan
    assert flash.attention(q, k, v, block_q=2, block_k=3).isnan().any(-1).nonzero().tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_nan_behind_the_causal_mask_reaches_only_tiles_that_hold_it(dtype):
    q, k, v = qkv(t=8, s=8, dtype=dtype, requires_grad=False)
    bad_k, bad_v = k.clone(), v.clone()
    bad_k[0, 1, 5, 0] = bad_v[0, 1, 5, 0] = math.nan
    for block_k in (3, 8):
        with_bad_key = flash.attention(q, bad_k, v, causal=True, block_q=2, block_k=block_k).isnan().any(-1)
        assert with_bad_key.nonzero().tolist() == [[0, 1, i] for i in range(5, 8)]
        with_bad_value = flash.attention(q, k, bad_v, causal=True, block_q=2, block_k=block_k).isnan()
        assert with_bad_value.nonzero().tolist() == [[0, 1, i, 0] for i in range(4, 8)]  # query 4 shares 5's tile


@pytest.mark.parametrize("size", [100.0, 1000.0])
def test_large_scores_keep_their_probabilities_in_the_backward_pass(size):
    """L as large as the scores must not be converted between logarithms: its rounding would be each row's error."""
    inputs = qkv(h=1, t=64, s=64, d=16, dv=16, dtype=torch.float32, requires_grad=False)
    inputs[0].mul_(size)
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got, want = grads(flash.attention, inputs)[3], grads(naive.attention, exact)[3]
    assert (got - want).abs().max() <= 3e-7 * size**0.6 * want.abs().max()


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returned."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.most = max(self.most, x.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_no_tensor_of_all_scores_is_ever_made(dtype, causal):
    inputs = qkv(h=1, t=2048, s=2048, d=16, dv=16, dtype=dtype)
    with Largest() as seen:
        grads(flash.attention, inputs, causal=causal, block_q=128)
    assert seen.most <= 2 * 128 * 2048
    with Largest() as seen:
        grads(naive.attention, inputs, causal=causal)
    assert seen.most >= 2048 * 2048  # the measure can tell


def test_peak_memory_is_linear_in_the_length():
    def peak(n):
        inputs = qkv(h=1, t=n, s=n, d=64, dv=64, dtype=torch.float32)
        return peak_bytes(lambda: grads(flash.attention, inputs, causal=True, block_q=64, block_k=64))

    assert peak(4096) < 4.4 * peak(1024)


BAD_BLOCKS = [(0, ValueError), (-1, ValueError), (2.5, TypeError), (True, TypeError), ("8", TypeError)]


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", ["block_q", "block_k"])
@pytest.mark.parametrize(("value", "error"), BAD_BLOCKS)
def test_bad_block_sizes(name, value, error):
    with pytest.raises(error, match=f"{name} must be"):
        flash.attention(*qkv(), **{name: value})


@pytest.mark.usefixtures("unchecked_types")
def test_bad_shapes_are_refused_at_the_same_door_as_naives():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="v must have as many positions as k, 7, got 6"):
        flash.attention(q, k, v[:, :, :-1])
    with pytest.raises(TypeError, match="k must have q's dtype"):
        flash.attention(q, k.float(), v)
    with pytest.raises(ValueError, match="got 0 heads in q and 1 in k"):
        flash.attention(q[:, :0], k[:, :1], v[:, :1])
    with pytest.raises(ValueError, match="v must have head_dim at least 1"):
        flash.attention(q, k, v[..., :0])


def test_shapes_are_checked_by_name_in_the_test_run():
    q, k, v = qkv()
    with pytest.raises(Exception, match=r"(?i)type"):
        flash.attention(q, k, v[:, :, :-1])
