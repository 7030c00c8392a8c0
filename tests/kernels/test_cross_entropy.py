"""Cross-entropy without logits, readable and in Triton: float64, plain low precision, memory, refusals."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mlsys.bench.memory import peak_bytes
from mlsys.contracts import check, find
from mlsys.kernels import _triton, cross_entropy, cross_entropy_triton
from mlsys.kernels._triton import config
from mlsys.loading import import_file

Fences = import_file(Path(__file__).with_name("guards.py")).Fences
DEVICE = "cpu" if _triton.INTERPRETED.value else "cuda"
WAYS = [cross_entropy.cross_entropy, cross_entropy_triton.cross_entropy]
BY = pytest.mark.parametrize("way", WAYS, ids=["torch", "triton"])
OPTIONS = [
    {}, {"reduction": "sum"}, {"reduction": "none"}, {"label_smoothing": 0.2}, {"softcap": 2.0},
    {"label_smoothing": 0.1, "softcap": 1.5, "reduction": "none"},
]  # fmt: skip


def draw(n, v, d, dtype=torch.float32, ignored=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, d, generator=generator), torch.randn(v, d, generator=generator)
    targets = torch.randint(v, (n,), generator=generator)
    targets[:ignored] = -100
    return hidden.to(dtype).to(DEVICE), weight.to(dtype).to(DEVICE), targets.to(DEVICE)


def plain(hidden, weight, targets, *, softcap=None, **options):
    logits = hidden @ weight.t()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, **options)


def plain_in_float32(hidden, weight, targets, **options):
    return plain(hidden.float(), weight.float(), targets, **options)


def all_of(way, hidden, weight, targets, **options):
    """Loss and gradients, in float64; each row has a factor of its own, where it has a loss of its own."""
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    loss = way(hidden, weight, targets, **options)
    upstream = torch.linspace(0.5, 2, max(loss.numel(), 1)).reshape(loss.shape).to(loss)
    return [x.detach().double() for x in (loss, *torch.autograd.grad(loss, (hidden, weight), upstream))]


@BY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_loss_and_gradients_are_no_worse_than_plain_ones(way, options, dtype):
    hidden, weight, targets = draw(37, 501, 16, dtype)
    exact = all_of(plain, hidden.double(), weight.double(), targets, **options)
    for a, b, want in zip(
        all_of(way, hidden, weight, targets, **options),
        all_of(plain, hidden, weight, targets, **options),
        exact,
        strict=True,
    ):
        floor = (64 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps / 2) * want.abs().max()
        assert (a - want).abs().max() <= 2 * (b - want).abs().max() + floor


@BY
@settings(max_examples=10)
@given(n=st.integers(1, 9), v=st.integers(1, 70), d=st.integers(1, 9), chunk=st.integers(1, 10), seed=st.integers(0, 9))
def test_any_shape_and_chunk(way, n, v, d, chunk, seed):
    hidden, weight, targets = draw(n, v, d, ignored=n // 3, seed=seed)
    exact = all_of(plain, hidden.double(), weight.double(), targets)
    for a, want in zip(all_of(way, hidden, weight, targets, chunk=chunk), exact, strict=True):
        torch.testing.assert_close(a, want, rtol=1e-4, atol=1e-5)


@BY
def test_rows_of_any_leading_shape_and_strides(way):
    hidden, weight, targets = draw(12, 30, 8)
    want = plain(hidden, weight, targets, reduction="none")
    got = way(hidden.view(3, 4, 8), weight, targets.view(3, 4), reduction="none")
    torch.testing.assert_close(got, want.view(3, 4))
    wide = torch.cat([hidden, hidden], 1)[:, :8]
    tall = weight.t().contiguous().t()
    twice = torch.stack([targets, targets], 1)[:, 0]
    exact = all_of(plain, hidden.double(), weight.double(), targets)
    for a, b in zip(all_of(way, wide, tall, twice, chunk=5), exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@BY
def test_large_logits_and_masked_ones(way):
    hidden, weight, targets = draw(5, 40, 4)
    for a, b in zip(
        all_of(way, 200 * hidden, weight, targets), all_of(plain, 200 * hidden, weight, targets), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@BY
def test_an_ignored_row_is_not_looked_at(way):
    hidden, weight, targets = draw(6, 20, 4, ignored=2)
    hidden[0] = float("nan")
    loss, d_hidden, _ = all_of(way, hidden, weight, targets)
    assert torch.isfinite(loss)
    assert (d_hidden[:2] == 0).all()


@BY
def test_nothing_kept(way):
    hidden, weight, targets = draw(3, 5, 4, ignored=3)
    assert all_of(way, hidden, weight, targets)[0].isnan()
    assert [x.abs().max().item() for x in all_of(way, hidden, weight, targets, reduction="sum")] == [0, 0, 0]


@BY
def test_only_the_gradient_that_is_wanted_and_none(way):
    hidden, weight, targets = draw(6, 20, 4)
    loss = way(hidden.requires_grad_(), weight, targets)
    loss.backward()
    assert weight.grad is None
    with torch.no_grad():
        assert not way(hidden, weight, targets).requires_grad
    torch.testing.assert_close(way(hidden.detach(), weight, targets), loss.detach())


@BY
def test_gradients_are_given_away_once(way):
    hidden, weight, targets = draw(6, 20, 4)
    loss = way(hidden.requires_grad_(), weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiated before: .* Call cross_entropy again"):
        loss.backward()
    rows = way(hidden, weight, targets, reduction="none")  # here they are computed each time
    (first,) = torch.autograd.grad(rows.sum(), hidden, retain_graph=True)
    (second,) = torch.autograd.grad(rows.sum(), hidden)
    assert torch.equal(first, second)


@BY
def test_second_derivatives_are_refused(way):
    hidden, weight, targets = draw(6, 20, 4)
    with pytest.raises(RuntimeError, match="cross_entropy is differentiable once"):
        torch.autograd.grad(way(hidden.requires_grad_(), weight, targets), hidden, create_graph=True)


def test_sum_over_many_chunks_loses_less_in_float32():
    hidden, weight, targets = draw(256, 8, 4, torch.bfloat16, ignored=0)
    exact = all_of(plain, hidden.double(), weight.double(), targets)[2]
    wide, narrow = (
        (all_of(cross_entropy.cross_entropy, hidden, weight, targets, chunk=1, wide_sum=w)[2] - exact).norm()
        for w in (True, False)
    )
    assert wide < narrow / 2


def test_a_chunk_has_logits_as_large_as_hidden():
    assert cross_entropy.chunk_rows(8192, 131072, 4096) == 256
    assert cross_entropy.chunk_rows(8192, 256000, 2304) == 128
    assert cross_entropy.chunk_rows(1, 10, 4) == 1
    for n, v, d in ((100, 1000, 10), (4096, 50257, 768)):
        assert n * d / 2 <= cross_entropy.chunk_rows(n, v, d) * v <= 2 * (n * d + v)


def test_peak_memory_is_that_of_a_chunk():
    n, v, d = 512, 4096, 16
    hidden, weight, targets = draw(n, v, d)

    def loss():
        return all_of(cross_entropy.cross_entropy, hidden, weight, targets, chunk=8)

    def whole():
        return all_of(plain, hidden, weight, targets)

    if DEVICE == "cpu":
        assert peak_bytes(loss) < n * v * 4 / 4  # a quarter of the logits alone
        assert peak_bytes(whole) > 2 * n * v * 4


def test_every_config_computes_the_same():
    hidden, weight, targets = draw(5, 300, 8)
    want = all_of(plain, hidden, weight, targets)
    for block in (16, 64, 512):
        one = config(BLOCK=block, warps=1, stages=1)
        got = all_of(cross_entropy_triton.cross_entropy, hidden, weight, targets, config=one)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "label_smoothing": 0.1, "reduction": "none"}])
def test_nothing_beyond_the_tensors_is_read_or_written(options):
    hidden, weight, targets = draw(6, 45, 4)
    one = config(BLOCK=16, warps=1, stages=1)
    with Fences() as fences:
        h, w = (fences.around(x.requires_grad_()) for x in (hidden, weight))
        loss = cross_entropy_triton.cross_entropy(h, w, fences.around(targets), config=one, chunk=4, **options)
        grads = torch.autograd.grad(loss.sum(), (h, w))
    want = plain(hidden, weight, targets, **options)
    torch.testing.assert_close(loss, want)
    for a, b in zip(grads, torch.autograd.grad(want.sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- the contract -----------------------------------------------------------------------------------------------------


def chunked(chunk, **fixed):
    return lambda *x, **options: cross_entropy.cross_entropy(*x, chunk=chunk, **options, **fixed)


def in_parts(hidden, weight, targets, *, reduction="mean", **options):
    """Chunks whose logits autograd keeps until the backward pass."""
    parts = hidden.split(64), targets.split(64)
    losses = [plain(h, weight, t, reduction="none", **options).float() for h, t in zip(*parts, strict=True)]
    losses = torch.cat(losses)
    kept = (targets != options["ignore_index"]).sum()
    return losses if reduction == "none" else losses.sum() / (kept if reduction == "mean" else 1)


def low_precision(hidden, weight, targets, **options):
    return plain(hidden, weight, targets, **options).float()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_of_any_size_pass_the_contract(chunk, seed):
    verdict = check(find("kernels.cross_entropy"), chunked(chunk), seed=seed)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("impl", "special", "message"),
    [
        (
            plain_in_float32,
            "memory",
            r"MiB were alive at once, .* 1\.0 MiB: compute the logits of a few rows at a time",
        ),
        (in_parts, "memory", "MiB were alive at once"),
        (chunked(512), "memory", "MiB were alive at once"),
        (low_precision, "alike", "loss: largest error"),
        (chunked(1, wide_sum=False), "alike", "d_weight: largest error"),
    ],
)
def test_the_contract_refuses(impl, special, message, seed):
    contract = find("kernels.cross_entropy")
    failure = check(replace(contract, cases=[c for c in contract.cases if c["special"] == special]), impl, seed=seed)
    assert re.search(message, failure.failure.message), str(failure)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked_types")
@BY
@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"hidden": None}, TypeError, "hidden must be a torch.Tensor, got NoneType"),
        ({"hidden": torch.ones(3, 4, dtype=torch.float64)}, TypeError, "hidden must be float32 or bfloat16"),
        ({"weight": torch.ones(5, 4).bfloat16()}, TypeError, "weight must have hidden's dtype"),
        ({"weight": torch.ones(5, 3)}, ValueError, r"weight must have the shape \(5, 4\), got \(5, 3\)"),
        ({"weight": torch.ones(0, 4)}, ValueError, "weight must have at least one row"),
        ({"weight": torch.ones(5, 4, device="meta")}, ValueError, "weight must be on hidden's device"),
        ({"targets": torch.zeros(3)}, TypeError, "targets must be a tensor of torch.int64, got torch.float32"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, ValueError, r"targets must have the shape \(3,\), got \(4,\)"),
        ({"targets": torch.tensor([0, 5, 1])}, ValueError, "targets must be from 0 to 4, or ignore_index=-100, got 5"),
        ({"targets": torch.tensor([0, -1, 1])}, ValueError, "targets must be from 0 to 4, or .*, got -1"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index must be an int, got 1.0"),
        ({"reduction": "max"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'max'"),
        ({"label_smoothing": 1.0}, ValueError, "label_smoothing must be at least 0 and less than 1, got 1.0"),
        ({"softcap": 0}, ValueError, "softcap must be a number above 0, or None, got 0"),
        ({"chunk": 0}, ValueError, "chunk must be a number of rows, at least 1, or None, got 0"),
        ({"wide_sum": 1}, TypeError, "wide_sum must be True or False, got 1"),
    ],
)
def test_bad_arguments_are_named(way, change, error, named):
    given = {"hidden": torch.ones(3, 4), "weight": torch.ones(5, 4), "targets": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(error, match=named):
        way(**given | change)
