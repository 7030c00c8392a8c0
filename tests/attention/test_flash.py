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


# --- options ----------------------------------------------------------------------------------------------------------


@st.composite
def any_options(draw, h, t, s):
    """Any combination of the options, each left out as often as not."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    bound = st.integers(-1, 6)
    some = {
        "causal": st.booleans(),
        "window": st.tuples(bound, bound),
        "mask": st.sampled_from([0.0, 0.2, 0.6]).map(lambda p: torch.rand(t, s, generator=generator) < p),
        "alibi": st.just(torch.linspace(0.0, 1.0, h, dtype=torch.float64)),
        "softcap": st.sampled_from([0.5, 3.0]),
        "sinks": st.just(torch.linspace(-2.0, 2.0, h, dtype=torch.float64)),
        "scale": st.floats(-1.0, 2.0),
    }
    return {name: draw(values) for name, values in some.items() if draw(st.booleans())}


def both(function, inputs, **given):
    """Output, lse and all gradients of both, the sinks' included; −∞ stays −∞ and has none."""
    sinks = given.pop("sinks", None)
    leaves = inputs if sinks is None else [*inputs, sinks.clone().requires_grad_()]
    out, lse = function(*inputs, **given, sinks=None if sinks is None else leaves[-1], return_lse=True)
    weights = [torch.linspace(-1, 2, max(x.numel(), 1)).to(x)[: x.numel()].view(x.shape) for x in (out, lse)]
    finite = lse.masked_fill(lse == -math.inf, 0.0)
    grads = torch.autograd.grad((out * weights[0]).sum() + (finite * weights[1]).sum(), leaves)
    return [out, lse, *grads]


@given(
    data=st.data(), b=st.integers(1, 2), h_kv=st.integers(1, 2), group=st.integers(1, 3), t=length, s=length,
    block_q=size, block_k=size, seed=st.integers(0, 99),
)  # fmt: skip
def test_any_combination_of_options_equals_naives(data, b, h_kv, group, t, s, block_q, block_k, seed):
    inputs = qkv(b, h_kv * group, h_kv, t, s, d=3, dv=2, seed=seed)
    given_ = data.draw(any_options(h_kv * group, t, s))
    got = both(flash.attention, inputs, **given_, block_q=block_q, block_k=block_k)
    for g, w in zip(got, both(naive.attention, inputs, **given_), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


ONE_BY_ONE = {
    "window": {"window": (2, 1)},
    "mask": {"mask": torch.arange(20).view(4, 5) % 3 != 0},
    "alibi": {"alibi": torch.tensor([0.5, 0.1])},
    "softcap": {"softcap": 1.0},
    "sinks": {"sinks": torch.tensor([0.3, -0.7], dtype=torch.float64)},
    "lse alone": {},
}


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_gradients_of_every_option_by_finite_differences(name):
    given_ = dict(ONE_BY_ONE[name])
    inputs = qkv(h=2, h_kv=1, t=4, s=5, d=3, dv=2)
    if "sinks" in given_:
        inputs.append(given_.pop("sinks").clone().requires_grad_())

    def function(q, k, v, sinks=None):
        return flash.attention(q, k, v, **given_, sinks=sinks, return_lse=True, block_q=2, block_k=2)

    assert torch.autograd.gradcheck(function, inputs)


def test_a_sink_alone_may_want_a_gradient():
    q, k, v = qkv(requires_grad=False)
    sinks = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    (got,) = torch.autograd.grad(flash.attention(q, k, v, sinks=sinks).sum(), sinks)
    (want,) = torch.autograd.grad(naive.attention(q, k, v, sinks=sinks).sum(), sinks)
    torch.testing.assert_close(got, want)


LARGE = {
    "band": {"window": (100, 30)},
    "causal window": {"window": (100, -1), "causal": True},
    "changed": {"softcap": 3.0, "alibi": torch.tensor([0.5, 0.1, 0.02, 0.0]), "sinks": torch.tensor([0.0, 1, 2, 3])},
    "mask": {"mask": (torch.arange(600 * 700).view(600, 700) * 7919) % 1000 < 400},
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-5), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("name", LARGE)
def test_options_with_default_blocks_in_every_dtype(name, dtype, tolerance):
    inputs = qkv(h=4, h_kv=2, t=600, s=700, d=16, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got, want = both(flash.attention, inputs, **LARGE[name]), both(naive.attention, exact, **LARGE[name])
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w).abs().max() <= tolerance * w.abs().max().clamp(min=1)


@pytest.mark.parametrize("given_", [{"causal": True}, {"mask": torch.zeros(9, 3) > 0}, {"window": (1, 0)}])
def test_who_sees_nothing_gives_zero_and_minus_infinity_or_the_sink(given_):
    q, k, v = qkv(t=9, s=3, requires_grad=False)
    for blocks in ({}, {"block_q": 2, "block_k": 2}):
        out, lse = flash.attention(q, k, v, **given_, return_lse=True, **blocks)
        assert (out[:, :, :6] == 0).all()
        assert (lse[:, :, :6] == -math.inf).all()
        sinks = torch.tensor([0.5, -1.0])
        out, lse = flash.attention(q, k, v, **given_, sinks=sinks, return_lse=True, **blocks)
        assert (out[:, :, :6] == 0).all()
        torch.testing.assert_close(lse[:, :, :6], sinks.double()[None, :, None].expand(1, 2, 6))


def test_extreme_scores_with_options():
    q, k, v = qkv(t=4, s=60, dtype=torch.float32, requires_grad=False)
    q = 1e4 * q
    mask = torch.arange(240).view(4, 60) % 5 != 0
    for given_ in ({"mask": mask}, {"softcap": 1e3}, {"sinks": torch.tensor([-1e30, 1e30])}):
        got = flash.attention(q, k, v, **given_, block_k=7, return_lse=True)
        want = naive.attention(q, k, v, **given_, return_lse=True)
        for g, w in zip(got, want, strict=True):
            assert g.isfinite().all()
            torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-3)


def test_a_mask_may_be_any_view_and_stays_as_it_is():
    q, k, v = qkv(b=2, t=6, s=8, requires_grad=False)
    whole = torch.rand(8, 6, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = whole.permute(2, 1, 0)[:, None]  # (2, 1, 6, 8)
    before = whole.clone()
    got = flash.attention(q, k, v, mask=mask, block_q=4, block_k=3)
    torch.testing.assert_close(got, naive.attention(q, k, v, mask=mask))
    assert torch.equal(whole, before)


# --- packed sequences -------------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=5),
    causal=st.booleans(), window=st.sampled_from([(-1, -1), (2, 0)]), seed=st.integers(0, 99),
)  # fmt: skip
def test_packed_sequences_equal_one_call_each(lengths, causal, window, seed):
    generator = torch.Generator().manual_seed(seed)
    totals = [sum(pair[side] for pair in lengths) for side in (0, 1, 1)]
    sizes = [(n, h, d) for n, h, d in zip(totals, (4, 2, 2), (3, 3, 5), strict=True)]
    q, k, v = (torch.randn(x, generator=generator, dtype=torch.float64).requires_grad_() for x in sizes)
    sinks = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    ends = [torch.tensor([0, *(pair[side] for pair in lengths)]).cumsum(0) for side in (0, 1)]
    given_ = {"causal": causal, "window": window, "sinks": sinks}
    out, lse = flash.varlen(q, k, v, *ends, **given_, return_lse=True, block_q=3, block_k=4)
    outs, lses = [], []
    for i in range(len(lengths)):
        a, b = (slice(x[i], x[i + 1]) for x in ends)
        one = naive.attention(*(x.transpose(0, 1)[None] for x in (q[a], k[b], v[b])), **given_, return_lse=True)
        outs.append(one[0][0].transpose(0, 1))
        lses.append(one[1][0].transpose(0, 1))
    torch.testing.assert_close((out, lse), (torch.cat(outs), torch.cat(lses)))
    weights = torch.linspace(-1, 2, max(out.numel(), 1), dtype=torch.float64)[: out.numel()].view(out.shape)
    got = torch.autograd.grad((out * weights).sum() + lse.sum(), (q, k, v, sinks))
    want = torch.autograd.grad((torch.cat(outs) * weights).sum() + torch.cat(lses).sum(), (q, k, v, sinks))
    torch.testing.assert_close(got, want)


PACKED_BAD = {
    "not from 0": ([1, 5], [0, 7], ValueError, r"cu_seqlens_q must go up from 0 to the rows of q, 5, got \[1, 5\]"),
    "not to the end": ([0, 5], [0, 6], ValueError, r"cu_seqlens_k must go up from 0 to the rows of k, 7"),
    "down": ([0, 4, 2, 5], [0, 7, 7, 7], ValueError, "cu_seqlens_q must go up"),
    "one": ([0], [0, 7], ValueError, r"cu_seqlens_q must have one number more than sequences.*\(1,\)"),
    "unequal": ([0, 2, 5], [0, 7], ValueError, "cu_seqlens_k must name as many sequences as cu_seqlens_q, 2, got 1"),
    "floats": ([0.0, 5.0], [0, 7], TypeError, r"cu_seqlens_q must be an int32 or int64 tensor, got torch\.float32"),
}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", PACKED_BAD)
def test_bad_lengths_are_named(name):
    ends_q, ends_k, error, message = PACKED_BAD[name]
    q, k = torch.zeros(5, 2, 3), torch.zeros(7, 2, 3)
    with pytest.raises(error, match=message):
        flash.varlen(q, k, k, torch.tensor(ends_q), torch.tensor(ends_k))


@pytest.mark.usefixtures("unchecked_types")
def test_packed_tensors_that_are_not_are_named():
    q, k, ends = torch.zeros(5, 2, 3), torch.zeros(7, 2, 3), torch.tensor([0, 5])
    with pytest.raises(ValueError, match=r"q must be a packed tensor \(total, heads, head_dim\), got \(1, 5, 2, 3\)"):
        flash.varlen(q[None], k, k, ends, ends)
    with pytest.raises(ValueError, match="v must have as many rows as k, 7, got 5"):
        flash.varlen(q, k, q, ends, torch.tensor([0, 7]))


# --- tiles and traffic ------------------------------------------------------------------------------------------------


@given(
    t=length, s=length, causal=st.booleans(), window=st.tuples(st.integers(-1, 5), st.integers(-1, 5)),
    masked=st.booleans(), block_q=size, block_k=size, seed=st.integers(0, 99),
)  # fmt: skip
def test_tiles_cover_what_is_visible_and_none_is_in_vain(t, s, causal, window, masked, block_q, block_k, seed):
    mask = torch.rand(t, s, generator=torch.Generator().manual_seed(seed)) < 0.2 if masked else None
    visible = torch.zeros(t, s, dtype=torch.bool)
    ahead = torch.arange(s) - (torch.arange(t)[:, None] + s - t)
    visible = ~visible if not causal else ahead <= 0
    visible = visible & (ahead >= -window[0]) if window[0] >= 0 else visible
    visible = visible & (ahead <= window[1]) if window[1] >= 0 else visible
    visible = visible if mask is None else visible & mask
    covered = torch.zeros(t, s, dtype=torch.int)
    for queries, keys in flash.tiles(t, s, causal=causal, window=window, mask=mask, block_q=block_q, block_k=block_k):
        assert len(queries) <= block_q
        assert len(keys) <= block_k
        place = slice(queries.start, queries.stop), slice(keys.start, keys.stop)
        assert (visible[place] if mask is None else mask[place]).any()
        covered[place] += 1
    assert (covered <= 1).all()
    assert (covered[visible] == 1).all()


def test_tiles_are_those_that_are_computed():
    """The counter walks as the forward pass does: as many tiles of scores, of the same shapes."""
    made = []

    def counted(scores, *others):
        made.append(tuple(scores.shape))
        return flash.SWEEPS.softmax(scores, *others)

    sweeps = flash.SWEEPS._replace(softmax=counted)
    q, k, v = qkv(h=1, t=40, s=50, requires_grad=False)
    mask = torch.ones(40, 50, dtype=torch.bool)
    mask[:20, :25] = False
    for given_ in ({}, {"causal": True}, {"window": (7, 2)}, {"mask": mask, "causal": True}):
        made.clear()
        flash.attention(q, k, v, **given_, block_q=8, block_k=10, sweeps=sweeps)
        assert made == [(len(a), len(b)) for a, b in flash.tiles(40, 50, **given_, block_q=8, block_k=10)]


def test_a_window_visits_tiles_in_proportion_to_its_width():
    full = flash.tiles(4096, 4096, causal=True, block_q=64, block_k=64)
    window = flash.tiles(4096, 4096, causal=True, window=(255, 0), block_q=64, block_k=64)
    assert len(full) == 64 * 65 // 2
    assert len(window) <= 64 * 5
    assert sum(len(a) * len(b) for a, b in window) <= 4096 * (256 + 64)


@given(t=st.integers(0, 50), s=st.integers(0, 50), d=st.integers(1, 8), sram=st.integers(1, 300))
def test_traffic_is_the_closed_form(t, s, d, sram):
    """K and V once; Q, O and the sums once for each block of keys, O and the sums both ways."""
    blocks = -(-s // -(-sram // (4 * d)))
    assert flash.traffic(t, s, d, sram) == 2 * s * d + blocks * (3 * t * d + 4 * t)
    both_ways = flash.traffic(t, s, d, sram, backward=True)
    assert both_ways == 6 * s * d + blocks * (8 * t * d + 6 * t)


def test_traffic_falls_with_the_fast_memory():
    """Theorem 2: Θ(n²d²/M)."""
    for sram in (2**13, 2**14, 2**15):
        half, whole = (flash.traffic(8192, 8192, 64, m) for m in (sram, 2 * sram))
        assert half / whole == pytest.approx(2, rel=0.04)


@pytest.mark.usefixtures("unchecked_types")
def test_bad_sizes_of_tiles_and_traffic():
    with pytest.raises(ValueError, match="block_k must be at least 1, got 0"):
        flash.tiles(4, 4, block_k=0)
    with pytest.raises(TypeError, match=r"sram must be an int, got float 1000\.0"):
        flash.traffic(4, 4, 4, 1000.0)
    with pytest.raises(ValueError, match="d and sram at least 1, got t=4, s=4, d=4, sram=0"):
        flash.traffic(4, 4, 4, 0)


# --- memory -----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("given_", [{"window": (63, 0)}, {"softcap": 5.0}, {"sinks": torch.zeros(1)}])
def test_no_tensor_of_all_scores_with_options(given_):
    inputs = qkv(h=1, t=2048, s=2048, d=16, dv=16, dtype=torch.float32)
    with Largest() as seen:
        grads(flash.attention, inputs, **given_, block_q=64, block_k=64)
    assert seen.most <= 2048 * 16


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


@given(
    b=st.integers(0, 3),
    h_kv=st.integers(1, 3),
    group=st.integers(1, 3),
    s=st.integers(1, 40),
    causal=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_single_query_over_part_of_a_cache(b, h_kv, group, s, causal, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(b, 1, h_kv * group, 8, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
    k, v = (torch.randn(b, h_kv, 50, 8, generator=generator).to(dtype)[:, :, :s].requires_grad_() for _ in "kv")
    got, lse = flash.attention(q, k, v, causal=causal, return_lse=True)
    want, want_lse = naive.attention(q, k, v, causal=causal, return_lse=True)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, want_lse, rtol=tolerance, atol=tolerance)
    for mine, wanted in zip(
        torch.autograd.grad(got.sum(), (q, k, v)), torch.autograd.grad(want.sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(mine, wanted, rtol=tolerance, atol=4 * tolerance)


def test_a_single_query_with_fewer_visible_keys_takes_the_tiles():
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 30, 8)
    for options in ({"window": (5, 0)}, {"softcap": 2.0}, {"mask": torch.arange(30) < 20}, {"block_k": 7}):
        got = flash.attention(q, k, k, **options)
        want = naive.attention(q, k, k, **{name: x for name, x in options.items() if name != "block_k"})
        torch.testing.assert_close(got, want)
