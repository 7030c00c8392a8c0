"""`mlsys.attention.naive` is the formula: torch agrees where its meaning is the same; every option is as documented."""

import math

import pytest
import torch
from torch.nn import functional as F

from mlsys.attention import naive


def qkv(b=2, h=4, h_kv=None, t=5, s=7, d=8, dv=6, dtype=torch.float64, seed=0, **more):
    generator = torch.Generator().manual_seed(seed)
    shapes = (b, h, t, d), (b, h_kv or h, s, d), (b, h_kv or h, s, dv)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(**more)
        for shape in shapes
    ]


@pytest.mark.parametrize("scale", [None, 0.3])
def test_equals_torch(scale):
    q, k, v = qkv(requires_grad=False)
    torch.testing.assert_close(
        naive.attention(q, k, v, scale=scale), F.scaled_dot_product_attention(q, k, v, scale=scale)
    )


def test_equals_torch_causal_square():
    q, k, v = qkv(t=9, s=9, requires_grad=False)
    torch.testing.assert_close(
        naive.attention(q, k, v, causal=True), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    )


def test_equals_torch_with_grouped_heads():
    q, k, v = qkv(h=6, h_kv=2, requires_grad=False)
    torch.testing.assert_close(naive.attention(q, k, v), F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def test_causal_is_aligned_bottom_right():
    """Decoding the last query alone is the last row of the whole."""
    q, k, v = qkv(t=7, s=7, requires_grad=False)
    whole = naive.attention(q, k, v, causal=True)
    torch.testing.assert_close(naive.attention(q[:, :, 6:], k, v, causal=True), whole[:, :, 6:])


def test_a_query_that_sees_nothing_gives_zero_and_no_gradient():
    q, k, v = qkv(t=6, s=2)
    out = naive.attention(q, k, v, causal=True)
    assert (out[:, :, :4] == 0).all()
    assert (out[:, :, 4:] != 0).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][:, :, :4] == 0).all()


@pytest.mark.parametrize(("t", "s"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("causal", [False, True])
def test_empty_sequences(t, s, causal):
    q, k, v = qkv(t=t, s=s, requires_grad=False)
    out = naive.attention(q, k, v, causal=causal)
    assert out.shape == (2, 4, t, 6)
    assert (out == 0).all()


def test_gradients_by_finite_differences():
    inputs = qkv(b=1, h=2, h_kv=1, t=3, s=4, d=3, dv=2)
    assert torch.autograd.gradcheck(lambda *x: naive.attention(*x, causal=True), inputs)


def test_large_scores_do_not_overflow():
    q, k, v = qkv(dtype=torch.float32, requires_grad=False)
    assert naive.attention(1e4 * q, k, v).isfinite().all()


def test_nan_spreads_to_the_rows_that_see_it():
    q, k, v = qkv(requires_grad=False)
    q[0, 1, 2, 3] = math.nan
    bad = naive.attention(q, k, v).isnan().any(-1)
    assert bad.nonzero().tolist() == [[0, 1, 2]]


def test_a_nan_behind_the_causal_mask():
    """Hidden keys become −∞ before the softmax; hidden values are multiplied by 0, and 0 · NaN is NaN."""
    q, k, v = qkv(b=1, h=2, t=8, s=8, requires_grad=False)
    bad_k, bad_v = k.clone(), v.clone()
    bad_k[0, 1, 5, 0] = bad_v[0, 1, 5, 0] = math.nan
    with_bad_key = naive.attention(q, bad_k, v, causal=True).isnan().any(-1)
    assert with_bad_key.nonzero().tolist() == [[0, 1, i] for i in range(5, 8)]
    with_bad_value = naive.attention(q, k, bad_v, causal=True).isnan()
    assert with_bad_value.nonzero().tolist() == [[0, 1, i, 0] for i in range(8)]


BAD = {
    "rank": (lambda q, k, v: (q[0], k, v), {}, ValueError, r"q must have 4 dimensions.*got shape \(4, 5, 8\)"),
    "no tensor": (lambda q, k, v: (q, k.tolist(), v), {}, TypeError, r"k must be a torch\.Tensor, got list"),
    "ints": (lambda q, k, v: (q, k, v.long()), {}, TypeError, r"v must be float64.*got torch\.int64: convert it"),
    "dtypes": (lambda q, k, v: (q, k.float(), v), {}, TypeError, r"k must have q's dtype torch\.float64"),
    "devices": (lambda q, k, v: (q, k, v.to("meta")), {}, ValueError, "v must be on q's device cpu, got meta"),
    "batch": (lambda q, k, v: (q, k[:1], v), {}, ValueError, "k must have q's batch size 2, got 1"),
    "kv heads": (lambda q, k, v: (q, k, v[:, :2]), {}, ValueError, "v must have as many heads as k, 4, got 2"),
    "heads": (lambda q, k, v: (q, k[:, :3], v[:, :3]), {}, ValueError, "got 4 heads in q and 3 in k"),
    "no heads": (lambda q, k, v: (q, k[:, :0], v[:, :0]), {}, ValueError, "got 4 heads in q and 0 in k"),
    "no query heads": (lambda q, k, v: (q[:, :0], k[:, :1], v[:, :1]), {}, ValueError, "got 0 heads in q and 1 in k"),
    "lengths": (lambda q, k, v: (q, k, v[:, :, 1:]), {}, ValueError, "v must have as many positions as k, 7, got 6"),
    "head_dim": (lambda q, k, v: (q, k[..., 1:], v), {}, ValueError, "k must have q's head_dim 8, got 7"),
    "no head_dim": (lambda q, k, v: (q[..., :0], k[..., :0], v), {}, ValueError, "q must have head_dim at least 1"),
    "no values": (lambda q, k, v: (q, k, v[..., :0]), {}, ValueError, "v must have head_dim at least 1"),
    "mask for causal": (
        lambda *x: x,
        {"causal": torch.ones(5, 7)},
        TypeError,
        "causal must be True or False, got Tensor",
    ),
    "nan scale": (lambda *x: x, {"scale": math.nan}, ValueError, "scale must be finite, got nan"),
    "scale of text": (lambda *x: x, {"scale": "1"}, TypeError, "scale must be a number or None"),
}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_argument_value_and_remedy(name):
    change, options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        naive.attention(*change(*qkv(requires_grad=False)), **options)
