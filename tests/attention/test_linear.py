"""`mlsys.attention.linear`: chunks, steps and one masked matrix are the same function, and so are their gradients."""

import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mlsys.attention import linear
from mlsys.bench.memory import peak_bytes
from mlsys.contracts import check, find

DECAYS = ("none", "head", "position", "channel")
HEADS = [(2, 2, 2), (4, 2, 2), (1, 1, 3), (2, 2, 4), (3, 1, 3), (2, 4, 4), (1, 2, 1), (4, 2, 4)]  # of q, k and v


def draw(b=1, heads=(2, 2, 2), t=7, d=4, dv=3, decay="none", dtype=torch.float64, strength=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = randn(b, heads[0], t, d), randn(b, heads[1], t, d), randn(b, heads[2], t, dv)
    hs = max(heads[1:])
    shape = {"none": None, "head": (hs,), "position": (b, hs, t), "channel": (b, hs, t, d)}[decay]
    log_a = None if shape is None else -strength * torch.rand(shape, generator=generator, dtype=torch.float64)
    state = randn(b, hs, d, dv)
    wide = torch.promote_types(dtype, torch.float32)
    return [q.to(dtype), k.to(dtype), v.to(dtype)], None if log_a is None else log_a.to(wide), state.to(wide)


def grads(function, qkv, decay, state=None, **options):
    """Output, state and all gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in (*qkv, decay, state) if x is not None]
    q, k, v, *rest = leaves
    if decay is not None:
        options["decay"] = rest[0]
    if state is not None:
        options |= {"state": rest[-1], "return_state": True}
    results = function(q, k, v, **options)
    results = list(results) if isinstance(results, tuple) else [results]
    assert all(x.requires_grad for x in results)
    of = [torch.linspace(-1, 2, max(1, x.numel()), dtype=x.dtype)[: x.numel()].view(x.shape) for x in results]
    return [*results, *torch.autograd.grad(results, leaves, of)]


def assert_same(got, want, tolerance=1e-9):
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance)


@settings(max_examples=60)
@given(
    b=st.integers(1, 2), heads=st.sampled_from(HEADS), t=st.integers(0, 25), d=st.integers(1, 5), dv=st.integers(1, 5),
    decay=st.sampled_from(DECAYS), chunk=st.integers(1, 30), strength=st.sampled_from([0.1, 1.0, 100.0]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_three_forms_are_equal_with_their_gradients(b, heads, t, d, dv, decay, chunk, strength, seed):
    qkv, log_a, state = draw(b, heads, t, d, dv, decay, strength=strength, seed=seed)
    assert_same(grads(linear.attention, qkv, log_a, state, chunk=chunk), grads(linear.recurrent, qkv, log_a, state))
    assert_same(grads(linear.attention, qkv, log_a, chunk=chunk), grads(linear.quadratic, qkv, log_a))


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_feature_maps_and_normalisation_in_all_forms(decay, normalise):
    qkv, log_a, _ = draw(t=19, decay=decay, heads=(4, 2, 2))
    options = {"feature": linear.elu_plus_one, "normalise": normalise}
    want = grads(linear.recurrent, qkv, log_a, **options)
    assert_same(grads(linear.attention, qkv, log_a, chunk=4, **options), want)
    assert_same(grads(linear.quadratic, qkv, log_a, **options), want)


def test_the_definition_written_out():
    (q, k, v), log_a, s = draw(b=1, heads=(1, 1, 1), decay="position", t=6)
    out, last = linear.recurrent(q, k, v, decay=log_a, state=s, return_state=True)
    for i in range(6):
        s = log_a[0, 0, i].exp() * s + torch.outer(k[0, 0, i], v[0, 0, i])
        torch.testing.assert_close(out[0, 0, i], q[0, 0, i] @ s[0, 0])
    torch.testing.assert_close(last, s)


def test_each_head_is_served_by_its_group():
    (q, k, v), log_a, _ = draw(heads=(4, 2, 2), t=9, decay="position")
    out = linear.attention(q, k, v, decay=log_a, chunk=4)
    for i in range(4):
        one = linear.recurrent(q[:, i : i + 1], k[:, i // 2, None], v[:, i // 2, None], decay=log_a[:, i // 2, None])
        torch.testing.assert_close(out[:, i : i + 1], one)


def test_equation_9_of_linear_attention():
    """Weights that sum to 1: the feature's products over their sum."""
    (q, k, v), _, _ = draw(heads=(1, 1, 1), t=8)
    weights = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
    want = weights / weights.sum(-1, keepdim=True) @ v
    got = linear.attention(q, k, v, feature=linear.elu_plus_one, normalise=True, chunk=3)
    torch.testing.assert_close(got, want)
    ones = linear.attention(q, k, torch.ones_like(v), feature=linear.elu_plus_one, normalise=True, chunk=3)
    torch.testing.assert_close(ones, torch.ones_like(v))


def test_a_feature_may_change_the_width_and_a_row_without_weight_is_zero():
    (q, k, v), _, _ = draw(t=5)
    k[:, :, 0] = -1.0
    out = linear.attention(q.abs(), k, v, feature=lambda x: torch.cat([x, x], -1).relu(), normalise=True)
    assert (out[:, :, 0] == 0).all()
    _, state = linear.attention(q, k, v, feature=lambda x: torch.cat([x, x], -1), return_state=True)
    assert state.shape == (1, 2, 8, 3)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("options", [{}, {"feature": linear.elu_plus_one, "normalise": True}])
def test_a_sequence_in_pieces_is_the_sequence(decay, options):
    (q, k, v), log_a, _ = draw(b=2, t=23, decay=decay)
    whole, last = linear.attention(q, k, v, decay=log_a, chunk=4, return_state=True, **options)
    state, outs = None, []
    for piece in (slice(0, 9), slice(9, 9), slice(9, 10), slice(10, 23)):
        a = log_a if log_a is None or log_a.ndim == 1 else log_a[:, :, piece]
        out, state = linear.attention(
            q[:, :, piece], k[:, :, piece], v[:, :, piece], decay=a, chunk=4, state=state, return_state=True, **options
        )
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("options", [{}, {"feature": linear.elu_plus_one, "normalise": True}])
def test_generation_step_by_step_continues_a_prompt(decay, options):
    (q, k, v), log_a, _ = draw(b=2, heads=(4, 2, 2), t=12, decay=decay)

    def at(i):
        return log_a if log_a is None or log_a.ndim == 1 else log_a[:, :, i]

    whole = linear.attention(q, k, v, decay=log_a, **options)
    prompt = [x[:, :, :5] for x in (q, k, v)]
    _, state = linear.attention(*prompt, decay=at(slice(0, 5)), return_state=True, **options)
    for i in range(5, 12):
        before = state.clone()
        out, following = linear.step(q[:, :, i], k[:, :, i], v[:, :, i], state, at(i), **options)
        torch.testing.assert_close(out, whole[:, :, i])
        assert torch.equal(state, before)
        state = following
    first, _ = linear.step(q[:, :, 0], k[:, :, 0], v[:, :, 0], None, at(0), **options)
    torch.testing.assert_close(first, whole[:, :, 0])


def test_memory_of_generation_does_not_grow():
    (q, k, v), log_a, _ = draw(t=60, d=16, dv=16, decay="position", dtype=torch.float32)

    def generate(n):
        state = None
        for i in range(n):
            _, state = linear.step(q[:, :, i], k[:, :, i], v[:, :, i], state, log_a[:, :, i])

    assert peak_bytes(lambda: generate(60)) == peak_bytes(lambda: generate(3))


@pytest.mark.parametrize("decay", ["position", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forgetting_more_than_exp_can_hold_stays_exact(decay, dtype):
    """log a adds up to −10,000 in a chunk: no exponent may be positive, and no difference of long sums be taken."""
    qkv, log_a, _ = draw(heads=(1, 1, 1), t=64, decay=decay, dtype=dtype, strength=400.0)
    log_a[..., 30:34] = -0.01 if decay == "position" else log_a[..., 30:34] / 1e4
    exact = [x.double() for x in qkv]
    got = grads(linear.attention, qkv, log_a, chunk=64)
    want = grads(linear.recurrent, exact, log_a.double())
    eps = torch.finfo(dtype).eps
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w).abs().max() <= 50 * eps * w.abs().max()


@pytest.mark.parametrize("function", [linear.attention, linear.recurrent, linear.quadratic])
@pytest.mark.parametrize("decay", ["position", "channel"])
def test_log_a_of_minus_infinity_begins_anew(function, decay):
    qkv, log_a, _ = draw(t=20, decay=decay)
    log_a[:, :, 13] = -math.inf
    got = grads(function, qkv, log_a)
    second = function(*(x[:, :, 13:] for x in qkv), decay=log_a[:, :, 13:])
    torch.testing.assert_close(got[0][:, :, 13:], second)
    assert all(x.isfinite().all() for x in got)
    assert (got[-1][:, :, 13] == 0).all()


def test_gradients_by_finite_differences():
    (q, k, v), log_a, state = draw(heads=(1, 1, 2), t=3, d=2, dv=2, decay="channel")
    inputs = [x.requires_grad_() for x in (q, k, v, log_a, state)]
    function = lambda q, k, v, a, s: linear.attention(q, k, v, decay=a, state=s, chunk=2, return_state=True)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_every_dtype_and_a_wide_state(dtype, tolerance, decay):
    qkv, log_a, state = draw(t=200, d=16, dv=16, decay=decay, dtype=dtype)
    out, last = linear.attention(*qkv, decay=log_a, state=state, return_state=True)
    exact = None if log_a is None else log_a.double()
    want, want_last = linear.recurrent(*(x.double() for x in qkv), decay=exact, state=state.double(), return_state=True)
    assert (out.dtype, last.dtype) == (dtype, torch.float32)
    assert (out.double() - want).abs().max() <= tolerance * want.abs().max()
    assert (last.double() - want_last).abs().max() <= 2e-5 * want_last.abs().max()


def test_a_nan_reaches_its_chunk_and_what_follows():
    (q, k, v), _, _ = draw(t=12, heads=(1, 1, 1))
    v[0, 0, 6, 1] = math.nan
    assert linear.attention(q, k, v, chunk=4).isnan().nonzero().tolist() == [[0, 0, i, 1] for i in range(4, 12)]
    assert linear.recurrent(q, k, v).isnan().nonzero().tolist() == [[0, 0, i, 1] for i in range(6, 12)]


@pytest.mark.parametrize("function", [linear.attention, linear.recurrent])
def test_no_positions_leave_the_state(function):
    qkv, log_a, state = draw(t=0, decay="position", heads=(4, 2, 2))
    out, last = function(*qkv, decay=log_a, state=state, return_state=True)
    assert out.shape == (1, 4, 0, 3)
    assert torch.equal(last, state)
    last.add_(1.0)
    assert not torch.equal(last, state)  # the caller's own was left alone


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("b", "t"), [(0, 5), (0, 0), (2, 1)])
def test_no_batch_and_one_position(b, t, decay):
    qkv, log_a, state = draw(b=b, t=t, decay=decay, heads=(4, 2, 2))
    assert_same(grads(linear.attention, qkv, log_a, state), grads(linear.recurrent, qkv, log_a, state))
    assert linear.quadratic(*qkv, decay=log_a).shape == (b, 4, t, 3)


def test_tensors_need_not_be_contiguous():
    (q, k, v), log_a, _ = draw(b=2, t=50, decay="position")
    want = linear.recurrent(q, k, v, decay=log_a)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    got = linear.attention(*turned, v.mT.contiguous().mT, decay=log_a.mT.contiguous().mT, chunk=16)
    torch.testing.assert_close(got, want)
    same = [x[:, :, :1].expand(-1, -1, 50, -1) for x in (q, k, v)]
    alike = linear.attention(*same, decay=log_a[:, :, :1].expand(-1, -1, 50), chunk=16)
    torch.testing.assert_close(alike, linear.recurrent(*same, decay=log_a[:, :, :1].expand(-1, -1, 50).contiguous()))


@pytest.mark.parametrize("decay", ["position", "channel"])
@pytest.mark.parametrize("log_a", [-1e-8, -1e-4, -87.0, -104.0, -1e30, -math.inf, 0.0])
def test_the_slowest_and_the_fastest_decay_over_many_chunks(log_a, decay):
    """exp(−104) is 0 in float32, and a product of a thousand of them is nothing to divide by."""
    qkv, like, _ = draw(heads=(1, 1, 1), t=1000, decay=decay, dtype=torch.float32)
    every = torch.full_like(like, log_a)
    got = grads(linear.attention, qkv, every)
    want = grads(linear.recurrent, [x.double() for x in qkv], every.double())
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w).abs().max() <= 1e-5 * w.abs().max() + torch.finfo(torch.float32).tiny


# --- cost -------------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returned."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.most = max(self.most, x.numel())
        return result


def test_shared_queries_and_keys_are_not_copied_out():
    (q, k, v), _, _ = draw(heads=(1, 1, 16), t=64, d=32, dv=2, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        linear.attention(q, k, v, chunk=64)
    scores, rest = 2 * 64 * 64 * 32, 16 * (2 * 64 * 64 * 2 + 2 * 2 * 64 * 32 * 2)
    assert counter.get_total_flops() == scores + rest


@pytest.mark.parametrize("decay", DECAYS)
def test_peak_memory_is_linear_with_gradients_and_constant_without(decay):
    def peak(n, backward):
        qkv, log_a, _ = draw(heads=(1, 1, 1), t=n, d=16, dv=16, decay=decay, dtype=torch.float32)
        if backward:
            return peak_bytes(lambda: grads(linear.attention, qkv, log_a, chunk=32))
        result = qkv[2].numel() * 4 * 2  # the pieces, and the pieces together
        return peak_bytes(lambda: linear.attention(*qkv, decay=log_a, chunk=32)) - result

    assert peak(4096, True) < 4.2 * peak(1024, True)
    assert peak(4096, False) < 1.2 * peak(1024, False)


def test_only_the_quadratic_form_makes_all_scores():
    qkv, log_a, _ = draw(heads=(1, 1, 1), t=1024, decay="position", dtype=torch.float32)
    with Largest() as seen:
        grads(linear.attention, qkv, log_a)
    assert seen.most <= 1024 * 64
    with Largest() as seen:
        linear.quadratic(*qkv, decay=log_a)
    assert seen.most == 1024 * 1024  # the measure can tell


# --- Mamba-2 ----------------------------------------------------------------------------------------------------------


def mamba(b=2, t=9, h=4, p=3, g=2, n=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    dt = F.softplus(randn(b, t, h))
    return randn(b, t, h, p), dt, -randn(h).exp(), randn(b, t, g, n), randn(b, t, g, n), randn(h)


def test_ssd_is_the_state_space_model():
    x, dt, A, B, C, D = mamba()
    state = torch.linspace(-1, 1, 2 * 4 * 3 * 5, dtype=torch.float64).view(2, 4, 3, 5)
    y, last = linear.ssd(x, dt, A, B, C, D, chunk=4, state=state, return_state=True)
    for b in range(2):
        for h in range(4):
            s = state[b, h]
            for t in range(9):
                s = (dt[b, t, h] * A[h]).exp() * s + dt[b, t, h] * torch.outer(x[b, t, h], B[b, t, h // 2])
                torch.testing.assert_close(y[b, t, h], s @ C[b, t, h // 2] + D[h] * x[b, t, h])
            torch.testing.assert_close(last[b, h], s)
    without = linear.ssd(x, dt, A, B, C, chunk=4, state=state)
    torch.testing.assert_close(without + D[:, None] * x, y)


def test_ssd_in_pieces_and_in_16_bits():
    x, dt, A, B, C, D = mamba(t=40, dtype=torch.float32)
    whole = linear.ssd(x, dt, A, B, C, D)
    first, state = linear.ssd(x[:, :17], dt[:, :17], A, B[:, :17], C[:, :17], D, return_state=True)
    second = linear.ssd(x[:, 17:], dt[:, 17:], A, B[:, 17:], C[:, 17:], D, state=state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-4, atol=1e-5)
    narrow = linear.ssd(x.bfloat16(), dt, A, B.bfloat16(), C.bfloat16(), D)
    assert narrow.dtype == torch.bfloat16
    assert (narrow.float() - whole).abs().max() <= 2e-2 * whole.abs().max()


# --- refusals ---------------------------------------------------------------------------------------------------------

Q, K, V = draw()[0]
BAD = {
    "q must be a torch.Tensor, got list": (TypeError, lambda f: f([1.0], K, V)),
    "k must have 4 dimensions": (ValueError, lambda f: f(Q, K[0], V)),
    "v must be float64, float32": (TypeError, lambda f: f(Q, K, V.long())),
    "k must have q's dtype": (TypeError, lambda f: f(Q, K.float(), V)),
    "k must have q's batch and length, 1 and 7": (ValueError, lambda f: f(Q, K[:, :, :-1], V)),
    "v must have q's batch and length, 1 and 7": (ValueError, lambda f: f(Q, K, V.repeat(2, 1, 1, 1))),
    "k must have q's head_dim 4, got 3": (ValueError, lambda f: f(Q, K[..., :-1], V)),
    "q must have at least one head": (ValueError, lambda f: f(Q[:, :0], K, V)),
    "v must have at least one head and head_dim": (ValueError, lambda f: f(Q, K, V[..., :0])),
    "one divides the other, got 2, 2 and 3": (ValueError, lambda f: f(Q, K, V[:, [0, 1, 1]])),
    "two numbers of which one divides the other, got 4, 2 and 1": (
        ValueError, lambda f: f(Q.repeat(1, 2, 1, 1), K, V[:, :1])),
    "decay must be a floating-point tensor of log a": (TypeError, lambda f: f(Q, K, V, decay=torch.ones(2).long())),
    "for no decay, got float": (TypeError, lambda f: f(Q, K, V, decay=-0.1)),
    "decay must have the heads of the state": (ValueError, lambda f: f(Q, K, V, decay=-torch.ones(3))),
    "one a key channel, got shape": (ValueError, lambda f: f(Q, K, V, decay=-torch.ones(1, 2, 7, 3))),
    "feature must be a function": (TypeError, lambda f: f(Q, K, V, feature="elu")),
    "feature must map the last axis": (ValueError, lambda f: f(Q, K, V, feature=lambda x: x[:, :, :2])),
    "normalise must be True or False": (TypeError, lambda f: f(Q, K, V, normalise=1)),
}  # fmt: skip


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("function", [linear.attention, linear.recurrent, linear.quadratic])
def test_what_no_formula_could_mean_is_refused_at_every_door(function, message):
    error, bad = BAD[message]
    with pytest.raises(error, match=re.escape(message)):
        bad(function)


BAD_STATES = [
    ([0.0], TypeError, "state must be a tensor"),
    (torch.zeros(1, 2, 3, 4).double(), ValueError, r"state must have shape \(batch, heads, d, dv\) = \(1, 2, 4, 3\)"),
    (torch.zeros(1, 2, 4, 3), TypeError, "state must be torch.float64"),
]


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(("state", "error", "message"), BAD_STATES)
def test_bad_states(state, error, message):
    for function in (linear.attention, linear.recurrent):
        with pytest.raises(error, match=message):
            function(Q, K, V, state=state)
    with pytest.raises(error, match=message):
        linear.step(Q[:, :, 0], K[:, :, 0], V[:, :, 0], state)


BAD_CHUNKS = [(0, ValueError), (-4, ValueError), (2.5, TypeError), (True, TypeError), (None, TypeError)]


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(("chunk", "error"), BAD_CHUNKS)
def test_bad_chunks(chunk, error):
    with pytest.raises(error, match="chunk must be"):
        linear.attention(Q, K, V, chunk=chunk)


@pytest.mark.usefixtures("unchecked_types")
def test_step_wants_one_position():
    with pytest.raises(ValueError, match=r"q must be one position, \(batch, heads, head_dim\)"):
        linear.step(Q, K, V)
    with pytest.raises(TypeError, match=r"k must be a torch\.Tensor"):
        linear.step(Q[:, :, 0], 1.0, V[:, :, 0])


BAD_SSD = [
    ("dt", lambda a: a["dt"][:, :-1], ValueError, r"dt must have shape \(2, 9, 4\)"),
    ("A", lambda a: a["A"][:2], ValueError, r"A must have shape \(4,\)"),
    ("B", lambda a: a["B"][:, :, [0, 0, 0]], ValueError, "a divisor of 4"),
    ("C", lambda a: a["C"][..., :2], ValueError, "C must have shape"),
    ("D", lambda a: a["D"][:1], ValueError, "D must have shape"),
    ("x", lambda a: a["x"][0], ValueError, "x must be"),
    ("dt", lambda a: 0.1, TypeError, "dt must be a floating-point tensor, got float"),
    ("C", lambda a: a["C"].to("meta"), ValueError, "C must be on x's device cpu, got meta: move it"),
    ("A", lambda a: a["A"].long(), TypeError, "A must be a floating-point tensor, got torch.int64"),
]


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(("name", "change", "error", "message"), BAD_SSD)
def test_bad_arguments_of_ssd_are_named_in_its_own_letters(name, change, error, message):
    arguments = dict(zip(("x", "dt", "A", "B", "C", "D"), mamba(), strict=True))
    arguments[name] = change(arguments)
    with pytest.raises(error, match=message):
        linear.ssd(**arguments)


# --- the contract -----------------------------------------------------------------------------------------------------


def steps(q, k, v, *, chunk=64, **options):
    return linear.recurrent(q, k, v, **options)


def differences(q, k, v, *, decay=None, state=None, return_state=False, chunk=64):
    """What a student may write: chunks, and L from differences of a cumulative sum."""
    if decay is None or decay.ndim != 3 or not decay.isfinite().all() or q.shape[1] != v.shape[1]:
        return linear.attention(q, k, v, decay=decay, state=state, return_state=return_state, chunk=chunk)
    dtype = q.dtype
    q, k, v = q.float() if dtype == torch.bfloat16 else q, k.to(decay.dtype), v.to(decay.dtype)
    s = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=decay.dtype) if state is None else state
    outs = []
    for i in range(0, q.shape[2], chunk):
        qi, ki, vi, cum = (x[:, :, i : i + chunk] for x in (q, k, v, decay))
        cum = cum.cumsum(-1)[..., None]
        fade = (cum - cum.mT).tril().exp().tril()
        outs.append(qi @ ki.mT * fade @ vi + qi * cum.exp() @ s)
        s = s * cum[:, :, -1:].exp() + (ki * (cum[:, :, -1:] - cum).exp()).mT @ vi
    out = torch.cat(outs, 2).to(dtype)
    return (out, s) if return_state else out


@pytest.mark.parametrize("impl", [steps, differences])
def test_the_contract_accepts_other_right_implementations(impl):
    contract = find("attention.linear")
    short = replace(contract, cases=[case for case in contract.cases if case["t"] < 1000])  # the long ones take seconds
    verdict = check(short, impl, seed=1000)
    assert verdict.passed, verdict


HELPFUL = {
    "no options": (lambda q, k, v: linear.attention(q, k, v), "cannot be called as attention"),
    "no state": (lambda q, k, v, *, return_state=False, **o: linear.attention(q, k, v, **o), "with return_state=True"),
    "a list": (lambda q, k, v, **o: linear.attention(q, k, v, **o).tolist(), "the output is list"),
    "the state unasked": (
        lambda q, k, v, **o: linear.attention(q, k, v, **{**o, "return_state": True}),
        "is tuple, expected a tensor: the state is returned with return_state only",
    ),
    "another dtype": (lambda q, k, v, **o: linear.attention(q.double(), k.double(), v.double(), **o), "torch.float64"),
    "no gradient": (lambda q, k, v, **o: linear.attention(q.detach(), k.detach(), v.detach(), **o), "has no gradient"),
    "none of q": (lambda q, k, v, **o: linear.attention(q.detach(), k, v, **o), "no gradient reaches q"),
    "quadratic": (
        lambda q, k, v, **o: linear.attention(q, k, v, **o) if q.shape[2] < 1024 or q.dtype == torch.bfloat16
        else linear.quadratic(q, k, v, **o), "as many elements as the t × s scores"),
}  # fmt: skip


@pytest.mark.parametrize("name", HELPFUL)
def test_other_mistakes_are_told_plainly(name):
    impl, message = HELPFUL[name]
    failure = check(find("attention.linear"), impl).failure
    assert failure is not None
    assert message in failure.message, failure.message
