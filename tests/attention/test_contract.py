"""The attention contracts: a plain low-precision baseline passes, common ways to go wrong get a message that helps."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mlsys.attention import flash, naive
from mlsys.contracts import check, find
from mlsys.contracts.core import as_array

FLASH = find("attention.flash")


def baseline(q, k, v, *, causal=False, scale=None, **blocks):
    """What a student would write first, in the dtype of the inputs."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(k.shape[2] - q.shape[2] + 1)
        scores = scores.masked_fill(hidden, torch.finfo(q.dtype).min)
        return torch.softmax(scores, -1).masked_fill(hidden, 0.0) @ v
    return torch.softmax(scores, -1) @ v


def sdpa(q, k, v, *, causal=False, scale=None, **blocks):
    """Torch's own, with a mask that is aligned as ours is."""
    t, s = q.shape[2], k.shape[2]
    mask = torch.ones(t, s, dtype=torch.bool).tril(s - t) if causal else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def small_blocks(q, k, v, *, causal=False, scale=None, **blocks):
    return flash.attention(q, k, v, causal=causal, scale=scale, block_q=16, block_k=32)


@pytest.mark.parametrize("impl", [baseline, sdpa, small_blocks])
def test_right_implementations_use_at_most_two_thirds_of_the_tolerance(impl):
    for index, case in enumerate(FLASH.cases):
        if case["t"] > 200 or (impl is sdpa and case["t"] > case["s"]):  # there torch gives NaN to who sees nothing
            continue
        given = FLASH.inputs(case, index, "cpu")
        for name, want in FLASH.oracle(given).items():
            error = np.abs(as_array(FLASH.call(impl, given)[name]) - want).max(initial=0.0)
            assert error <= 2 / 3 * FLASH.tolerance(given, name, want), (case, name)


def test_the_tolerance_is_a_small_part_of_the_values():
    widest = {}
    for index, case in enumerate(FLASH.cases):
        given = FLASH.inputs(case, index, "cpu")
        for name, want in FLASH.oracle(given).items():
            if not want.any():  # nothing is visible, or nobody looks
                continue
            share = FLASH.tolerance(given, name, want) / np.abs(want).max()
            widest[case["dtype"]] = max(widest.get(case["dtype"], 0.0), share)
    assert widest["bfloat16"] < 0.1
    assert widest["float32"] < 1e-4
    assert widest["float64"] < 1e-13


def in_16_bits_only(change):
    def attention(q, k, v, **options):
        if q.dtype != torch.bfloat16:
            return flash.attention(q, k, v, **options)
        return change(q, k, v, options)

    return attention


def rescaled(factor):
    return lambda q, k, v, options: flash.attention(q, k, v, **{**options, "scale": factor * q.shape[-1] ** -0.5})


BFLOAT16 = {
    "out × 0.7": lambda q, k, v, options: 0.7 * flash.attention(q, k, v, **options),
    "out × 0.8": lambda q, k, v, options: 0.8 * flash.attention(q, k, v, **options),
    "scale × 0.5": rescaled(0.5),
    "scale × 0.7": rescaled(0.7),
    "scale × 0.8": rescaled(0.8),
    "scale × 1.2": rescaled(1.2),
}


@pytest.mark.parametrize("seed", range(0, 4000, 1000))
@pytest.mark.parametrize("name", BFLOAT16)
def test_a_mistake_in_16_bits_only_is_refused_and_not_taken_for_another(name, seed):
    only = replace(FLASH, cases=[case for case in FLASH.cases if case["dtype"] == "bfloat16"])
    failure = check(only, in_16_bits_only(BFLOAT16[name]), seed=seed).failure
    assert failure is not None
    assert failure.like is None


@pytest.mark.parametrize("seed", range(3))
def test_a_plain_baseline_passes_the_contract_of_naive(seed):
    assert check(find("attention.naive"), baseline, seed=1000 * seed).passed


def test_flash_must_not_hold_the_scores():
    failure = check(find("attention.flash"), baseline).failure
    assert "one tile" in failure.message
    assert "1024, 1024)" in failure.message


class HalfAtATime(torch.autograd.Function):
    """Half of the queries against all keys: no tensor of t × s, and nothing kept, but quadratic all the same."""

    @staticmethod
    def forward(ctx, q, k, v, options):
        ctx.save_for_backward(q, k, v)
        ctx.options = options
        t, s = q.shape[2], k.shape[2]
        halves = [(0, t // 2), (t // 2, t)]
        return torch.cat([baseline(q[:, :, a:b], k[:, :, : s - t + b], v[:, :, : s - t + b], **options)
                          for a, b in halves], 2)  # fmt: skip

    @staticmethod
    def backward(ctx, grad_out):
        qkv = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            return *torch.autograd.grad(flash.attention(*qkv, **ctx.options), qkv, grad_out), None


def test_memory_that_is_quadratic_in_parts_is_refused():
    def half_at_a_time(q, k, v, **options):
        if q.shape[2] < 256:
            return flash.attention(q, k, v, **options)
        return HalfAtATime.apply(q, k, v, options)

    failure = check(FLASH, half_at_a_time).failure
    assert failure.case["linear_memory"]
    assert re.search(r"MiB were alive at once at t = 1024, s = 1024, 1\d\.\d times as many", failure.message)
    assert "one tile" in failure.message


def test_tiles_that_autograd_keeps_are_refused_and_told_so():
    failure = check(FLASH, FLASH.wrong["autograd_tiles"].impl).failure
    assert failure.case["linear_memory"]
    assert "autograd keeps every tile" in failure.message


def test_a_workspace_made_before_the_call_and_ignored_blocks_are_no_quadratic_memory():
    workspace = torch.empty(2**21)

    def attention(q, k, v, *, block_q=None, block_k=None, **options):
        return flash.attention(q, k, v, **options) + 0 * workspace[:4].sum(0).nan_to_num().to(q.dtype)

    assert check(FLASH, attention).passed


class FirstEntryBackward(torch.autograd.Function):
    """Gradients of the first entry of the batch only."""

    @staticmethod
    def forward(ctx, q, k, v, options):
        ctx.save_for_backward(q, k, v)
        ctx.options = options
        return flash.attention(q, k, v, **options)

    @staticmethod
    def backward(ctx, grad_out):
        qkv = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = flash.attention(*(x[:1] for x in qkv), **ctx.options)
        return *torch.autograd.grad(out, qkv, grad_out[:1]), None


def views(q, k, v, **options):
    return flash.attention(q.view(-1, *q.shape[2:]).view(q.shape), k, v, **options)


def narrow_heads(q, k, v, **options):
    return flash.attention(q, k, v, **options) * (q.shape[-1] < 64 and v.shape[-1] <= q.shape[-1])


@pytest.mark.parametrize(
    ("impl", "message"),
    [
        (lambda q, k, v, **options: FirstEntryBackward.apply(q, k, v, options), r"q\.grad: largest error .* at \[1, "),
        (views, "view size is not compatible"),
        (narrow_heads, "out: largest error"),
    ],
)
def test_what_a_transformer_sends_is_sent(impl, message):
    failure = check(FLASH, impl).failure
    assert failure.case["layout"] == "transposed"
    assert re.search(message, failure.message), failure.message


def test_torchs_own_attention_fails_only_where_its_meaning_differs():
    def sdpa(q, k, v, *, causal=False, scale=None):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )

    failure = check(find("attention.naive"), sdpa).failure
    assert failure.like == "top_left_causal"
    assert "bottom-right" in failure.hint


HELPFUL = {
    "a list": (lambda q, k, v, **o: baseline(q, k, v, **o).tolist(), "returned list, expected a tensor"),
    "another dtype": (lambda q, k, v, **o: baseline(q, k, v, **o).double(), r"returned torch\.float64 for inputs of"),
    "no gradient": (lambda q, k, v, **o: baseline(q.detach(), k.detach(), v.detach(), **o), "output has no gradient"),
    "no gradient of k": (lambda q, k, v, **o: baseline(q, k.detach(), v, **o), "no gradient reaches k"),
    "wrong shape": (lambda q, k, v, **o: baseline(q, k, v, **o)[:, :, :1], "shape"),
    "no options": (lambda q, k, v: baseline(q, k, v), "cannot be called as .*unexpected keyword argument 'causal'"),
    "no blocks": (lambda q, k, v, *, causal=False, scale=None: baseline(q, k, v, causal=causal, scale=scale),
                  "block_q"),
    "nan": (lambda q, k, v, **o: baseline(q, k, v, **o) * float("nan"), "nan"),
}  # fmt: skip


@pytest.mark.parametrize("name", HELPFUL)
def test_other_mistakes_are_told_plainly(name):
    impl, message = HELPFUL[name]
    failure = check(find("attention.flash"), impl).failure
    assert failure is not None
    assert re.search(message, failure.message), failure.message


def test_an_expanded_view_is_not_an_allocation():
    def views(q, k, v, *, causal=False, scale=None, block_q=None, block_k=None):
        torch.zeros(1, 1, dtype=q.dtype).expand(q.shape[2], k.shape[2])
        return flash.attention(q, k, v, causal=causal, scale=scale, block_q=block_q, block_k=block_k)

    assert check(find("attention.flash"), views).passed


def test_an_online_softmax_in_float32_is_told_what_is_wrong_in_float64_and_no_fairy_tale():
    def narrow(q, k, v, **options):
        return baseline(q.float(), k.float(), v.float(), **options).to(q.dtype)

    failure = check(find("attention.naive"), narrow).failure
    assert failure.case["dtype"] == "float64"
    assert failure.like is None
    assert "as exact as float32, but the inputs are float64" in failure.message


@pytest.mark.parametrize("name", ["attention.naive", "attention.flash", "attention.paged"])
def test_a_scale_of_zero_is_a_scale(name):
    contract = find(name)

    def scale_or(q, *rest, scale=None, **options):
        return contract.reference(q, *rest, scale=scale or q.shape[-1] ** -0.5, **options)

    failure = check(contract, scale_or).failure
    assert (failure.case["scale"], failure.like) == (0.0, "zero_is_no_scale")


@pytest.mark.parametrize("empty", ["s", "t", "b"])
def test_nothing_is_a_size_too(empty):
    def attention(q, k, v, **options):
        sizes = {"b": q.shape[0], "t": q.shape[2], "s": k.shape[2]}
        if not sizes[empty]:
            raise RuntimeError("max of nothing")
        return flash.attention(q, k, v, **options)

    failure = check(FLASH, attention).failure
    assert failure.case[empty] == 0
    assert "max of nothing" in failure.message


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["attention.variants", "attention.merge", "attention.paged"])
def test_other_seeds_pass_and_every_mistake_is_named(name, seed):
    contract = find(name)
    assert check(contract, contract.reference, seed=1000 * seed).passed
    for mistake, wrong in contract.wrong.items():
        failure = check(contract, wrong.impl, seed=1000 * seed).failure
        assert failure is not None, mistake
        assert failure.like == mistake, (mistake, failure)


def test_naive_with_all_options_passes_too():
    assert check(find("attention.variants"), naive.attention, seed=5).passed


def test_an_implementation_without_an_option_is_told_the_signature():
    def attention(q, k, v, *, causal=False, scale=None, return_lse=False):
        return naive.attention(q, k, v, causal=causal, scale=scale, return_lse=return_lse)

    failure = check(find("attention.variants"), attention).failure
    assert failure.case["window"] == (2, 3)
    assert "cannot be called as attention(q, k, v, *, causal=False, window=(-1, -1), mask=None" in failure.message
    assert "unexpected keyword argument 'window'" in failure.message
    assert check(find("attention.naive"), lambda q, k, v, *, causal=False, scale=None: naive.attention(
        q, k, v, causal=causal, scale=scale)).passed  # fmt: skip


def textbook(a, lse_a, b, lse_b):
    """How a merge is written on a blackboard."""
    lse = torch.logaddexp(lse_a, lse_b)
    return (torch.exp(lse_a - lse)[..., None] * a + torch.exp(lse_b - lse)[..., None] * b).to(a.dtype), lse


def sigmoid(a, lse_a, b, lse_b):
    w = torch.sigmoid(lse_a - lse_b)[..., None].to(a.dtype)
    return w * a + (1 - w) * b, torch.logaddexp(lse_a, lse_b)


def nan_to_num(*parts):
    out, lse = textbook(*parts)
    return out.nan_to_num(), lse


def where_not_nan(*parts):
    out, lse = textbook(*parts)
    return torch.where(out.isnan(), 0, out), lse


def all_nan_to_num(a, lse_a, b, lse_b):
    return nan_to_num(a.nan_to_num(), lse_a, b.nan_to_num(), lse_b)


def all_where(a, lse_a, b, lse_b):
    a, b = (torch.where(lse[..., None] == -torch.inf, 0, x) for x, lse in ((a, lse_a), (b, lse_b)))
    out, lse = textbook(a, lse_a, b, lse_b)
    return torch.where(lse[..., None] == -torch.inf, 0, out), lse


MERGES = {
    "textbook": (textbook, "nan_weights_for_two_empties", "both", False),
    "sigmoid": (sigmoid, "nan_weights_for_two_empties", "both", False),
    "nan_to_num": (nan_to_num, "nan_made_zero", "nan", False),
    "where_not_nan": (where_not_nan, "nan_made_zero", "nan", False),
    "nan_to_num everywhere": (all_nan_to_num, "nan_gradients", "both", True),
    "where everywhere": (all_where, "nan_gradients_of_lse", "both", True),
}


@pytest.mark.parametrize("name", MERGES)
def test_the_ways_of_students_to_merge_nothing_are_named(name):
    impl, like, empty, backward = MERGES[name]
    failure = check(find("attention.merge"), impl).failure
    assert (failure.like, failure.case["empty"], failure.case["backward"]) == (like, empty, backward)


def gathered(q, keys, values, tables, lengths, *, scale=None, less=0, wide=None, interleave=False, columns=None):
    """A decode step over all columns of the tables at once, hidden beyond each length."""
    group, (block, d) = q.shape[1] // keys.shape[1], keys.shape[2:]
    at = torch.arange(tables.shape[1] * block)
    column, place = (at % tables.shape[1], at // tables.shape[1]) if interleave else (at // block, at % block)
    column = column if columns is None else columns(at, tables.shape[1])
    hidden = at >= lengths[:, None] - less
    k, v = (x[tables[:, column].long(), :, place].masked_fill(hidden[..., None, None], 0) for x in (keys, values))
    k, v = (x.transpose(1, 2).repeat_interleave(group, 1).to(wide or q.dtype) for x in (k, v))
    scores = (k @ q.to(k.dtype)[..., None])[..., 0] * (d**-0.5 if scale is None else scale)
    weights = torch.softmax(scores.masked_fill(hidden[:, None], -torch.inf), -1).nan_to_num()
    return (weights[..., None, :] @ v)[..., 0, :].to(q.dtype)


def changed(**options):
    return lambda *x, scale=None: gathered(*x, scale=scale, **options)


DECODES = {
    "without the last token": (changed(less=1), "last_token_dropped"),
    "column j % columns": (changed(columns=lambda j, n: j % n), "column_modulo"),
    "blocks in turns": (changed(interleave=True), "columns_interleaved"),
}


def test_gathered_blocks_pass():
    assert check(find("attention.paged"), changed()).passed


@pytest.mark.parametrize("seed", [0, 1000, 2000])
@pytest.mark.parametrize("name", DECODES)
def test_the_ways_of_students_to_read_a_table_are_named(name, seed):
    impl, like = DECODES[name]
    failure = check(find("attention.paged"), impl, seed=seed).failure
    assert failure.like == like


def test_a_decode_in_float32_is_told_that_the_inputs_are_not():
    failure = check(find("attention.paged"), changed(wide=torch.float32)).failure
    assert (failure.case["dtype"], failure.like) == ("float64", None)
    assert "as exact as float32, but the inputs are float64" in failure.message
    only = replace(find("attention.paged"), cases=[failure.case])
    assert "float32" not in check(only, changed(less=1)).failure.message


def test_a_decode_is_called_with_views_and_for_nobody():
    def views(q, keys, values, tables, lengths, *, scale=None):
        return gathered(q.view(-1).view(q.shape), keys, values, tables, lengths, scale=scale)

    def longest(q, keys, values, tables, lengths, *, scale=None):
        return gathered(q, keys, values, tables[:, : lengths.max()], lengths, scale=scale)

    failure = check(find("attention.paged"), views).failure
    assert failure.case["layout"] == "strided"
    failure = check(find("attention.paged"), longest).failure
    assert failure.case["lengths"] == ()


OTHER = {
    "no lse": (lambda *x, return_lse=False, **o: naive.attention(*x, **o), "expected two tensors"),
    "a pair unasked": (lambda *x, **o: naive.attention(*x, **{**o, "return_lse": True}), "expected a tensor"),
    "out in another dtype": (
        lambda *x, **o: tuple(y.double() for y in naive.attention(*x, **{**o, "return_lse": True})),
        r"out is torch\.float64 for inputs of torch\.float32",
    ),
    "merge in the other order": (lambda *x: textbook(*x)[::-1], r"returned \(lse, out\), expected \(out, lse\)"),
    "merge of three": (lambda a, b, c: a, "cannot be called as merge"),
    "merge gives out only": (lambda a, la, b, lb: a, r"expected two tensors \(out, lse\)"),
    "merge widens": (lambda a, la, b, lb: (a, la.double()), r"lse is torch\.float64, but that of the parts"),
}


@pytest.mark.parametrize("name", OTHER)
def test_results_of_another_kind_are_told_plainly(name):
    impl, message = OTHER[name]
    failure = check(find("attention.merge" if "merge" in name else "attention.variants"), impl).failure
    assert re.search(message, failure.message), failure.message
