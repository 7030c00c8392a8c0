"""`mlsys.attention.flash_triton` computes what `flash` does, and touches nothing but its results.

Where there is no GPU, Triton's interpreter runs the kernels, a tile in some milliseconds: shapes are small.
"""

import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys.attention import _flash_triton_launch, flash_triton, naive
from mlsys.contracts import check, find
from mlsys.kernels._triton import INTERPRETED, config

DEVICE = "cpu" if INTERPRETED.value else "cuda"
SMALL = flash_triton.Configs(*[config(BLOCK_M=16, BLOCK_N=16)] * 3)
# few tiles, which is what the interpreter's time goes with
WIDE = flash_triton.Configs(*[config(BLOCK_M=128, BLOCK_N=128)] * 3) if INTERPRETED.value else SMALL
OTHERS = ("mask", "alibi", "softcap", "sinks")


def qkv(b=1, h=2, h_kv=None, t=20, s=37, d=8, dv=6, dtype=torch.float32, seed=0, requires_grad=True):
    generator = torch.Generator().manual_seed(seed)
    shapes = (b, h, t, d), (b, h_kv or h, s, d), (b, h_kv or h, s, dv)
    drawn = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
    return [x.requires_grad_(requires_grad) for x in drawn]


def both(function, inputs, **options):
    """Output, lse, and the gradients of a weighted sum of the two."""
    out, lse = function(*inputs, return_lse=True, **options)
    weights = [torch.linspace(-1, 2, max(x.numel(), 1)).to(x)[: x.numel()].view(x.shape) for x in (out, lse)]
    finite = lse.masked_fill(lse == -math.inf, 0.0)
    return [out, lse, *torch.autograd.grad((out * weights[0]).sum() + (finite * weights[1]).sum(), inputs)]


def exact(inputs):
    return [x.detach().double().requires_grad_() for x in inputs]


def close(got, want, tolerance=2e-5):
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g.isfinite(), w.isfinite())
        gap = (g.double() - w.double()).masked_fill(~w.isfinite(), 0.0)
        scale = w.double().masked_fill(~w.isfinite(), 0.0).abs().amax().clamp(min=1) if w.numel() else 1
        assert not w.numel() or gap.abs().max() <= tolerance * scale


# --- the contracts ----------------------------------------------------------------------------------------------------


def supported(case):
    plain = not any(case.get(name) for name in OTHERS)
    return plain and case["dtype"] != "float64" and "block_q" not in case


def test_the_contract_of_flash_but_for_float64_and_block_sizes():
    contract = find("attention.flash")
    cases = [case for case in contract.cases if supported(case)]
    assert len(cases) > 20
    wide = partial(flash_triton.attention, config=WIDE)
    verdict = check(replace(contract, cases=cases), wide, device=DEVICE)
    assert verdict.passed, str(verdict)


def test_memory_is_linear():
    contract = find("attention.flash")
    (case,) = (case for case in contract.cases if case.get("linear_memory"))
    case = {name: x for name, x in case.items() if name not in ("block_q", "block_k")} | {"t": 768, "s": 768}
    verdict = check(replace(contract, cases=[case]), partial(flash_triton.attention, config=WIDE), device=DEVICE)
    assert verdict.passed, str(verdict)


def test_the_contract_of_the_options_as_far_as_windows_go():
    contract = find("attention.variants")
    cases = [case for case in contract.cases if supported(case)]
    assert sum(case["window"] != (-1, -1) for case in cases) >= 6
    verdict = check(replace(contract, cases=cases), partial(flash_triton.attention, config=SMALL), device=DEVICE)
    assert verdict.passed, str(verdict)


# --- numbers ----------------------------------------------------------------------------------------------------------

length, size, bound = st.integers(0, 40), st.integers(1, 20), st.integers(-1, 25)


@settings(max_examples=14)
@given(
    h_kv=st.integers(1, 2), group=st.integers(1, 2), t=length, s=length, d=size, dv=size, causal=st.booleans(),
    window=st.tuples(bound, bound), scale=st.none() | st.floats(-1.0, 1.0), seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_naive_for_any_shape_band_and_scale(h_kv, group, t, s, d, dv, causal, window, scale, seed):
    inputs = qkv(1, h_kv * group, h_kv, t, s, d, dv, seed=seed)
    options = {"causal": causal, "window": window, "scale": scale}
    got = both(flash_triton.attention, inputs, config=SMALL, **options)
    close(got, both(naive.attention, exact(inputs), **options))


@pytest.mark.parametrize("window", [(20, -1), (-1, 20), (37, 21), (40, 0)])
@pytest.mark.parametrize(("t", "s"), [(80, 80), (50, 90), (90, 50)])
def test_tiles_on_both_edges_of_a_window_are_masked_and_those_between_are_whole(t, s, window):
    inputs = qkv(h=1, t=t, s=s)
    got = both(flash_triton.attention, inputs, window=window, config=SMALL)
    close(got, both(naive.attention, exact(inputs), window=window))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_more_than_twice_the_error_of_plain_torch_in_that_dtype(dtype, causal):
    inputs = qkv(1, 4, 2, 70, 123, 32, 24, dtype=dtype)
    want = both(naive.attention, exact(inputs), causal=causal)
    plain = [x.detach().requires_grad_() for x in inputs]
    allowed = both(naive.attention, plain, causal=causal)
    got = both(flash_triton.attention, inputs, causal=causal)
    for g, a, w, name in zip(got, allowed, want, ("out", "lse", "dq", "dk", "dv"), strict=True):
        assert g.dtype == (torch.float32 if name == "lse" else dtype)
        error, baseline = ((x.double() - w).abs().max().item() for x in (g, a))
        assert error <= 2 * baseline + 4e-7 * w.abs().max().item(), name


@pytest.mark.parametrize("name", ["d", "t", "permuted", "expanded", "flipped heads"])
def test_any_strides_will_do(name):
    views = {
        "d": lambda x: x.mT.contiguous().mT,
        "t": lambda x: torch.stack([x, torch.full_like(x, math.nan)], 3)[:, :, :, 0],
        "permuted": lambda x: x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
        "expanded": lambda x: x[:, :1].expand(x.shape),
        "flipped heads": lambda x: x.flip(1).flip(1)[..., : x.shape[3]],
    }
    inputs = [views[name](x).requires_grad_() for x in qkv(2, 2, 2, 19, 23, 5, 7, requires_grad=False)]
    before = [x.clone() for x in inputs]
    close(
        both(flash_triton.attention, inputs, causal=True, config=SMALL),
        both(naive.attention, exact(inputs), causal=True),
    )
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_an_expanded_gradient_as_sum_gives_it():
    inputs = qkv()
    got = torch.autograd.grad(flash_triton.attention(*inputs).sum(), inputs)
    leaves = exact(inputs)
    want = torch.autograd.grad(naive.attention(*leaves).sum(), leaves)
    close(got, want)


def test_a_query_that_sees_nothing_gives_zero_minus_infinity_and_no_gradient():
    inputs = qkv(t=40, s=17)
    out, lse, dq, dk, dv = both(flash_triton.attention, inputs, causal=True, config=SMALL)
    assert (out[:, :, :23] == 0).all()
    assert (lse[:, :, :23] == -math.inf).all()
    assert (dq[:, :, :23] == 0).all()
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))


@pytest.mark.parametrize(("t", "s"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_attend_to_or_nobody_who_attends(t, s):
    inputs = qkv(t=t, s=s)
    got = both(flash_triton.attention, inputs)
    close(got, both(naive.attention, exact(inputs)))


def test_scores_that_overflow_exp():
    q, k, v = qkv(t=4, s=60, requires_grad=False)
    q, k = 50 * q.abs(), k.abs() * torch.linspace(0, 20, 60, device=DEVICE)[:, None]
    out = flash_triton.attention(q, k, v, config=SMALL)
    close([out], [naive.attention(q.double(), k.double(), v.double())], 1e-3)


def test_the_same_inputs_give_the_same_bits_whatever_the_gradients_are_summed_over():
    inputs = qkv(1, 4, 1, 50, 70, dtype=torch.bfloat16)
    first, second = (both(flash_triton.attention, inputs, causal=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_gradients_of_some_inputs_and_of_lse_alone():
    q, k, v = qkv()
    want_q, want_k = (x.double().detach().requires_grad_() for x in (q, k))
    (got,) = torch.autograd.grad(flash_triton.attention(q, k.detach(), v.detach(), return_lse=True)[1].sum(), q)
    (want,) = torch.autograd.grad(naive.attention(want_q, want_k, v.double(), return_lse=True)[1].sum(), want_q)
    close([got], [want])


def test_tf32_is_taken_where_it_is_asked_for():
    """Under the interpreter it is float32 too; compiled, "ieee" has no tensor cores, as the compile check shows."""
    q, k, v = qkv(requires_grad=False)
    got = flash_triton.attention(q, k, v, precision="tf32")
    close([got], [naive.attention(q, k, v)], 1e-2)


BY_TMA = flash_triton.Configs(*[config(BLOCK_M=16, BLOCK_N=16, TMA=1)] * 3)


@pytest.mark.parametrize("options", [{"causal": True}, {"window": (20, 5), "scale": 0.5}])
def test_tiles_by_descriptors_are_the_same_tiles(options):
    inputs = qkv(2, 4, 2, 37, 45, 24, 12)
    by_pointers = both(flash_triton.attention, inputs, config=SMALL, **options)
    by_tma = both(flash_triton.attention, inputs, config=BY_TMA, **options)
    assert all(torch.equal(x, y) for x, y in zip(by_tma, by_pointers, strict=True))


def test_descriptors_are_refused_where_rows_begin_between():
    inputs = qkv(d=9)
    with pytest.raises(
        ValueError, match=r"config must have no TMA for the kernel 'forward' here, got BLOCK_M=16 .*16 bytes"
    ):
        flash_triton.attention(*inputs, config=BY_TMA)
    x, ends = torch.zeros(5, 2, 8, device=DEVICE), torch.tensor([0, 5], device=DEVICE)
    with pytest.raises(ValueError, match="not packed"):
        flash_triton.varlen(x, x, x, ends, ends, config=BY_TMA)


# --- packed sequences -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (5, 3)}])
def test_packed_sequences_equal_one_call_each(options):
    lengths = (17, 9), (0, 5), (4, 0), (20, 33), (1, 1)
    ends = [torch.tensor([0, *(pair[side] for pair in lengths)], device=DEVICE).cumsum(0) for side in (0, 1)]
    totals = [int(ends[side][-1]) for side in (0, 1, 1)]
    generator = torch.Generator().manual_seed(0)
    sizes = zip(totals, (4, 2, 2), (6, 6, 5), strict=True)
    inputs = [torch.randn(n, h, d, generator=generator).to(DEVICE).requires_grad_() for n, h, d in sizes]
    varlen = partial(flash_triton.varlen, config=SMALL)
    got = both(lambda q, k, v, **how: varlen(q, k, v, *ends, **how), inputs, **options)
    leaves = exact(inputs)

    def one_by_one(q, k, v, **how):
        parts = []
        for i in range(len(lengths)):
            a, b = (slice(int(x[i]), int(x[i + 1])) for x in ends)
            parts.append(naive.attention(*(x.transpose(0, 1)[None] for x in (q[a], k[b], v[b])), **how))
        return [torch.cat([x[i][0].transpose(0, 1) for x in parts]) for i in (0, 1)]

    close(got, both(one_by_one, leaves, **options))


def test_nan_of_one_sequence_reaches_no_other():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(30, 2, 8, generator=generator).to(DEVICE) for _ in "qkv")
    ends = torch.tensor([0, 9, 21, 30], dtype=torch.int32, device=DEVICE)
    want = flash_triton.varlen(q, k, v, ends, ends, causal=True)
    for x in (q, k, v):
        x[9:21] = math.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    got = flash_triton.varlen(*leaves, ends, ends, causal=True)
    others = [*range(9), *range(21, 30)]
    assert torch.equal(got[others], want[others])
    assert got[9:21].isnan().all()
    for grad in torch.autograd.grad(got[others].sum(), leaves):
        assert grad[others].isfinite().all()


# --- guards -----------------------------------------------------------------------------------------------------------


def guarded(x, fill=math.nan):
    """The same numbers as a view in the middle of a larger tensor that holds `fill`, and that tensor."""
    around = torch.full([n + 2 for n in x.shape], fill, dtype=x.dtype, device=x.device)
    inside = around[tuple(slice(1, -1) for _ in x.shape)]
    inside.copy_(x)
    return inside, around


@pytest.mark.parametrize("shape", [(5, 7, 3, 5), (33, 41, 16, 20)])
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_beside_the_inputs_is_read_and_nothing_beside_the_results_is_written(shape, packed):
    """NaN around the inputs would spread; canaries around the results would be gone; no number is left unwritten."""
    t, s, d, dv = shape
    q, k, v = qkv(1, 2, 1, t, s, d, dv, requires_grad=False)
    grad = torch.randn(1, 2, t, dv, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ends = [torch.tensor([0, n], dtype=torch.int32, device=DEVICE) for n in (t, s)] if packed else []
    call = _flash_triton_launch.Call(1, t, s, -1, 0, 0.3, "ieee", SMALL, *ends)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    want = naive.attention(*leaves, causal=True, scale=0.3)
    wanted = [want, *torch.autograd.grad(want, leaves, grad.double())]

    inputs = [guarded(x)[0] for x in (q, k, v, grad)]
    places = [guarded(torch.full_like(x, math.nan), 7.0) for x in (grad, q, k, v)]
    lse, around = guarded(torch.full((1, 2, t), math.nan, device=DEVICE), 7.0)
    out, *grads = (inside for inside, _ in places)
    _flash_triton_launch.forward(*inputs[:3], out, lse, call)
    _flash_triton_launch.backward(*inputs[:3], out, lse, inputs[3], None, tuple(grads), call)
    close([out, *grads], wanted)
    for inside, whole in (*places, (lse, around)):
        kept = whole.clone()
        kept[tuple(slice(1, -1) for _ in inside.shape)] = 7.0
        assert (kept == 7.0).all()


# --- what is refused --------------------------------------------------------------------------------------------------

X = torch.zeros(1, 2, 4, 8)
REFUSED = {
    "float64": (
        {},
        TypeError,
        r"float32, bfloat16 or float16 for the Triton kernels, got float64: use mlsys\.attention",
    ),
    "mixed": ({}, TypeError, r"k must have q's dtype torch\.float64, got torch\.float32"),
    "head_dim": ({}, ValueError, r"q must have head_dim at most 256 .*, got 300: use mlsys\.attention\.flash"),
    "mask": (
        {"mask": torch.ones(4, 4) > 0},
        ValueError,
        r"mask is not for the Triton kernels.*mlsys\.attention\.flash",
    ),
    "alibi": ({"alibi": torch.ones(2)}, ValueError, r"alibi is not for the Triton kernels"),
    "softcap": ({"softcap": 3.0}, ValueError, r"softcap is not for the Triton kernels"),
    "sinks": ({"sinks": torch.ones(2)}, ValueError, r"sinks is not for the Triton kernels"),
    "block_q": ({"block_q": 3}, ValueError, r"block_q is not for the Triton kernels, got 3: force BLOCK_M"),
    "precision": ({"precision": "bf16"}, ValueError, r'precision must be "ieee" or "tf32", got \'bf16\''),
    "config": ({"config": config(BLOCK_M=16)}, TypeError, r"config must be Configs or None, got Config"),
    "window": ({"window": (1, 2, 3)}, TypeError, r"window must be two ints"),
    "device": ({}, ValueError, r"q must be on a CUDA device, got meta"),
}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_cannot_do_is_refused_by_name(name):
    options, error, message = REFUSED[name]
    inputs = {
        "float64": [X.double()] * 3,
        "mixed": [X.double(), X, X],
        "head_dim": [torch.zeros(1, 1, 2, 300)] * 3,
        "device": [X.to("meta")] * 3,
    }.get(name, [X.to(DEVICE)] * 3)
    with pytest.raises(error, match=message):
        flash_triton.attention(*inputs, **options)


@pytest.mark.usefixtures("unchecked_types")
def test_packed_lengths_are_checked_as_flash_checks_them():
    x = torch.zeros(5, 2, 8)
    with pytest.raises(ValueError, match=r"cu_seqlens_q must go up from 0 to the rows of q, 5, got \[1, 5\]"):
        flash_triton.varlen(x, x, x, torch.tensor([1, 5]), torch.tensor([0, 5]))


def test_no_second_derivative_is_said_not_silent():
    q, k, v = qkv()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(flash_triton.attention(q, k, v).sum(), q, create_graph=True)


@pytest.mark.skipif(DEVICE != "cpu", reason="there is a GPU")
def test_on_a_cpu_without_the_interpreter_the_error_says_what_to_do():
    code = (
        "import torch; from mlsys.attention import flash_triton as f; x = torch.zeros(1, 1, 4, 8); f.attention(x, x, x)"
    )
    kept = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=kept, check=False)
    assert done.returncode == 1
    assert "RuntimeError: q is on a CPU" in done.stderr
    assert "set TRITON_INTERPRET=1" in done.stderr
    assert "mlsys.attention.flash" in done.stderr


def test_every_kernel_has_specimens():
    found = flash_triton.specimens()
    assert {one.name.split()[0] for one in found} == {"flash.forward", "flash.keys", "flash.queries", "flash.row_sums"}
    assert len({(one.name, one.config) for one in found}) == len(found)
    assert {kind for one in found for kind in ("window", "packed", "tf32") if kind in one.name} == {
        "window",
        "packed",
        "tf32",
    }


def test_typical_calls_can_be_made():
    calls = dict(flash_triton.typical(torch.device(DEVICE), torch.float32, (1, 2, 20, 16)))
    assert len(calls) == 2
    for call in calls.values():
        call()
    with pytest.raises(ValueError, match="it must be"):
        list(flash_triton.typical(torch.device(DEVICE), torch.float32, (3, 4)))
