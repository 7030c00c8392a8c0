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


# --- options ----------------------------------------------------------------------------------------------------------


def options(h=4, t=5, s=7, seed=1):
    """Each option by itself, and all of them."""
    generator = torch.Generator().manual_seed(seed)
    one = {
        "causal": {"causal": True},
        "window": {"window": (2, 1)},
        "left": {"window": (1, -1)},
        "right": {"window": (-1, 1)},
        "mask": {"mask": torch.rand(2, 1, t, s, generator=generator) < 0.5},
        "alibi": {"alibi": torch.linspace(0.1, 1.0, h, dtype=torch.float64)},
        "softcap": {"softcap": 1.5},
        "sinks": {"sinks": torch.randn(h, generator=generator, dtype=torch.float64)},
        "scale": {"scale": 0.3},
    }
    one["all"] = {name: value for case in one.values() for name, value in case.items()} | {"window": (3, 2)}
    return one


def by_the_letter(q, k, v, *, causal=False, window=(-1, -1), mask=None, alibi=None, softcap=None, sinks=None,
                  scale=None):  # fmt: skip
    """The definition, key by key, in Python's own numbers."""
    (b, h, t, d), (h_kv, s) = q.shape, k.shape[1:3]
    scale = d**-0.5 if scale is None else scale
    mask = torch.ones(b, h, t, s, dtype=torch.bool) if mask is None else mask.expand(b, h, t, s)
    out, lse = torch.zeros(b, h, t, v.shape[3], dtype=torch.float64), torch.zeros(b, h, t, dtype=torch.float64)
    for batch, head, i in ((x, y, z) for x in range(b) for y in range(h) for z in range(t)):
        p, kv = i + s - t, head // (h // h_kv)
        terms = {}
        for j in range(s):
            seen = mask[batch, head, i, j] and not (causal and j > p)
            seen = seen and (window[0] == -1 or j >= p - window[0]) and (window[1] == -1 or j <= p + window[1])
            if not seen:
                continue
            score = scale * float(q[batch, head, i] @ k[batch, kv, j])
            score = score if softcap is None else softcap * math.tanh(score / softcap)
            terms[j] = math.exp(score - (0 if alibi is None else float(alibi[head]) * abs(p - j)))
        total = sum(terms.values()) + (0 if sinks is None else math.exp(float(sinks[head])))
        lse[batch, head, i] = math.log(total) if total else -math.inf
        for j, term in terms.items():
            out[batch, head, i] += term / total * v[batch, kv, j]
    return out, lse


@pytest.mark.parametrize("name", options())
@pytest.mark.parametrize(("t", "s"), [(5, 7), (7, 4)])
def test_every_option_is_its_definition(name, t, s):
    q, k, v = qkv(h_kv=2, t=t, s=s, requires_grad=False)
    given = options(t=t, s=s)[name]
    torch.testing.assert_close(naive.attention(q, k, v, **given, return_lse=True), by_the_letter(q, k, v, **given))


@pytest.mark.parametrize("name", options())
def test_gradients_of_every_option_by_finite_differences(name):
    inputs = qkv(b=2, h=2, h_kv=1, t=3, s=4, d=3, dv=2)
    given = options(h=2, t=3, s=4)[name]
    if "sinks" in given:
        inputs.append(given.pop("sinks").requires_grad_())

    def function(q, k, v, sinks=None):
        out, lse = naive.attention(q, k, v, **given, sinks=sinks, return_lse=True)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(function, inputs)


def test_who_sees_nothing_gives_zero_and_minus_infinity_or_the_sink():
    q, k, v = qkv(t=6, s=2)
    sinks = torch.tensor([0.5, -2.0, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    _, lse = naive.attention(q, k, v, causal=True, return_lse=True)
    assert (lse[:, :, :4] == -math.inf).all()
    assert lse[:, :, 4:].isfinite().all()
    with_sinks, lse = naive.attention(q, k, v, causal=True, sinks=sinks, return_lse=True)
    assert (with_sinks[:, :, :4] == 0).all()
    assert (lse[:, :, :4] == sinks[:, None]).all()
    nothing, lse = naive.attention(q, k[:, :, :0], v[:, :, :0], return_lse=True)
    assert (nothing == 0).all()
    assert (lse == -math.inf).all()
    (grad,) = torch.autograd.grad(naive.attention(q, k, v, causal=True, sinks=sinks, return_lse=True)[1].sum(), sinks)
    assert (grad >= 2 * 4).all()  # 1 for each of the rows that see nothing, in both entries of the batch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lse_is_float32_at_least_and_out_as_the_inputs(dtype):
    q, k, v = qkv(dtype=dtype, requires_grad=False)
    sinks = torch.zeros(4)
    for given in ({}, {"softcap": 5.0, "alibi": torch.ones(4), "sinks": sinks.to(dtype), "causal": True}):
        out, lse = naive.attention(q, k, v, **given, return_lse=True)
        assert (out.dtype, lse.dtype) == (dtype, torch.float32)


def test_a_window_as_wide_as_the_keys_hides_nothing():
    q, k, v = qkv(requires_grad=False)
    want = naive.attention(q, k, v)
    for window in ((-1, -1), (6, 4), (100, 100)):
        torch.testing.assert_close(naive.attention(q, k, v, window=window), want)
    assert not torch.allclose(naive.attention(q, k, v, window=(5, -1)), want)
    assert not torch.allclose(naive.attention(q, k, v, window=(-1, 3)), want)


BAD = {
    "window of one": (lambda *x: x, {"window": 3}, TypeError, r"window must be two ints \(left, right\).*got 3"),
    "window of floats": (lambda *x: x, {"window": (1.0, 2)}, TypeError, "window must be two ints"),
    "window below": (lambda *x: x, {"window": (-2, 0)}, ValueError, r"or −1 for no bound, got \(-2, 0\)"),
    "mask of numbers": (lambda *x: x, {"mask": torch.zeros(5, 7)}, TypeError, r"mask must be bool.*got torch\.float32"),
    "mask no tensor": (lambda *x: x, {"mask": True}, TypeError, "mask must be a bool tensor or None, got bool"),
    "mask shape": (lambda *x: x, {"mask": torch.ones(2, 7) > 0}, ValueError, r"= \(2, 4, 5, 7\), got shape \(2, 7\)"),
    "mask device": (lambda *x: x, {"mask": torch.ones(5, 7, device="meta") > 0}, ValueError, "mask must be on q's dev"),
    "cap of zero": (lambda *x: x, {"softcap": 0.0}, ValueError, "softcap must be positive and finite, got 0.0"),
    "cap without reciprocal": (
        lambda *x: x,
        {"softcap": 1e-310},
        ValueError,
        "softcap must be positive and finite, got 1",
    ),
    "cap of text": (lambda *x: x, {"softcap": "50"}, TypeError, "softcap must be a number or None"),
    "slopes of kv heads": (lambda *x: x, {"alibi": torch.ones(2)}, ValueError, r"alibi must have one.*\(4,\), got"),
    "slopes to learn": (lambda *x: x, {"alibi": torch.ones(4, requires_grad=True)}, ValueError, "alibi must not requ"),
    "sinks of ints": (
        lambda *x: x,
        {"sinks": torch.ones(4).int()},
        TypeError,
        r"sinks must be float64.*got torch\.int",
    ),
    "sinks no tensor": (lambda *x: x, {"sinks": 0.0}, TypeError, r"sinks must be a tensor \(heads,\) or None, got"),
    "sinks device": (lambda *x: x, {"sinks": torch.ones(4, device="meta")}, ValueError, "sinks must be on q's device"),
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


@pytest.mark.parametrize("options", [{"scale": 1e39}, {"softcap": 1e-40}, {"softcap": 1e39}])
def test_numbers_that_the_scores_cannot_hold_are_refused(options):
    q = torch.ones(1, 1, 2, 4)
    with pytest.raises(ValueError, match=r"must be .*finite, got 1e.*torch\.float32"):
        naive.attention(q, q, q, **options)
    assert naive.attention(*[q.double()] * 3, **options).isfinite().all()
