"""The attention contracts: a plain low-precision baseline passes, common ways to go wrong get a message that helps."""

import re

import pytest
import torch
from torch.nn import functional as F

from mlsys.attention import flash
from mlsys.contracts import check, find


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


@pytest.mark.parametrize("seed", range(3))
def test_a_plain_baseline_passes_the_contract_of_naive(seed):
    assert check(find("attention.naive"), baseline, seed=1000 * seed).passed


def test_flash_must_not_hold_the_scores():
    failure = check(find("attention.flash"), baseline).failure
    assert "one tile" in failure.message
    assert "1024, 1024)" in failure.message


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
