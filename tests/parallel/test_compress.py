"""Compressed gradients: one estimate on all ranks, the promised bytes, nothing lost where errors are fed back."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mlsys.claims.parallel import power_sgd_ratio, resnet18_shapes
from mlsys.parallel import launch
from mlsys.parallel.collectives import Communicator
from mlsys.parallel.compress import BF16, PowerSGD, TopK
from mlsys.parallel.data_parallel import DataParallel
from mlsys.parallel.traffic import ledger


def on_all(tensor):
    """This tensor of every rank."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return torch.stack(parts)


def random_gradient(size, seed=0, dtype=torch.float32):
    return torch.randn(size, generator=torch.Generator().manual_seed(1000 * seed + dist.get_rank())).to(dtype)


def average(compressor, gradient, shapes=None, key=0, book=None):
    """What a compressor makes of a gradient; what it sends is added to the list `book`."""
    estimate = gradient.clone()
    shapes = shapes or [gradient.shape]
    parts = [p.view(s) for p, s in zip(estimate.split([math.prod(s) for s in shapes]), shapes, strict=True)]
    with ledger() as sent:
        compressor.start(key, estimate, parts, dist.group.WORLD).wait()
    if book is not None:
        book.extend(sent.rows)
    same = on_all(estimate)
    torch.testing.assert_close(same, same[:1].expand_as(same), rtol=0, atol=0, equal_nan=True, msg="ranks differ")
    return estimate


def bf16():
    n = dist.get_world_size()
    gradient = random_gradient(1001)
    exact = on_all(gradient).mean(dim=0)
    estimate = average(BF16(), gradient)
    assert (estimate - exact).abs().max() < 2**-7 * on_all(gradient).abs().max()  # n roundings of 2⁻⁹ each, and a sum's
    assert not torch.equal(estimate, exact)
    rows = []
    average(BF16(), random_gradient(1001, dtype=torch.float64), book=rows)
    assert [row.size for row in rows] == [2 * 1001] * (n > 1)
    assert sum(row.sent for row in rows) == pytest.approx(2 * 2 * 1001 * (n - 1) / n)
    narrow = random_gradient(64, dtype=torch.bfloat16)
    torch.testing.assert_close(
        average(BF16(), narrow), on_all(narrow).float().mean(dim=0).bfloat16(), rtol=2e-2, atol=2e-2
    )


def top_k():
    n = dist.get_world_size()
    for dtype, ratio in ((torch.float32, 0.1), (torch.float64, 0.01), (torch.bfloat16, 0.05)):
        gradient = random_gradient(301, dtype=dtype)  # 301: the parts of odd ranks do not begin at a multiple of 8
        k = math.ceil(ratio * 301)
        kept = torch.zeros_like(gradient)
        largest = gradient.abs().argsort(descending=True, stable=True)[:k]
        kept[largest] = gradient[largest]
        if dtype != torch.bfloat16:  # which has ties
            torch.testing.assert_close(average(TopK(ratio), gradient), on_all(kept).mean(dim=0))
        rows = []
        estimate = average(TopK(ratio), gradient, book=rows)
        assert estimate.count_nonzero() <= n * k
        assert [row.sent for row in rows] == [(n - 1) * k * (4 + gradient.element_size())] * (n > 1)
    everything = random_gradient(50)
    torch.testing.assert_close(average(TopK(1.0), everything), on_all(everything).mean(dim=0))


def what_is_not_sent_is_sent_later():
    """The sum of what was sent is the sum of the gradients, but for what is still kept."""
    shapes = [(20, 15), (7,), (6, 4, 5)]
    size = sum(map(math.prod, shapes))
    for compressor in (TopK(0.05), PowerSGD(1)):
        sent, given = torch.zeros(size), torch.zeros(size)
        for step in range(6):
            gradient = random_gradient(size, seed=step)
            sent += average(compressor, gradient, shapes)
            given += on_all(gradient).mean(dim=0)
        kept = on_all(compressor._residuals[0]).mean(dim=0)
        torch.testing.assert_close(sent + kept, given, rtol=1e-4, atol=1e-5)
        assert kept.norm() > 0.1 * given.norm()
        if isinstance(compressor, PowerSGD):  # the vector is sent whole each time, so nothing of it is kept
            assert compressor._residuals[0][300:307].count_nonzero() == 0
        compressor.reset()
        assert compressor._residuals == {}
        average(compressor, random_gradient(size), shapes)
        with pytest.raises(ValueError, match="serves one model"):
            average(compressor, random_gradient(size + 1))
    without = TopK(0.05, error_feedback=False)
    average(without, random_gradient(size))
    assert without._residuals == {}


def not_a_number_does_not_stay():
    compressor = TopK(0.1)
    gradient = random_gradient(100)
    gradient[3] = math.inf
    assert not average(compressor, gradient).isfinite().all()
    assert average(compressor, random_gradient(100, seed=1)).isfinite().all()


def one_infinite_step_is_as_if_it_had_not_been():
    """All ranks see it and leave it out; then residuals, factors and weights are those of a run without it."""
    n, rank = dist.get_world_size(), dist.get_rank()
    targets = torch.randn(n, 12, 9, generator=torch.Generator().manual_seed(3))

    def train(compress, bad):
        module = nn.ParameterList([torch.zeros(12, 9), torch.zeros(9)])
        model = DataParallel(module, compress=compress, algorithm="backend")
        losses = []
        for step in range(6):
            model.zero_grad()
            if step == 2 and bad is None:
                continue
            loss = (module[0] + module[1] - targets[rank]).square().sum() / 2
            # Most of the gradient, more than TopK sends; on the last rank alone.
            factor = bad if step == 2 and rank == n - 1 else 1.0
            (loss if factor == 1 else loss + factor * module[0][2:].sum()).backward()
            finite = all(p.grad.isfinite().all() for p in module)
            alike = on_all(torch.tensor([float(finite)]))
            assert alike.tolist() == [[float(step != 2)]] * n, (type(compress), bad, step)
            if finite:
                losses.append(on_all(loss.detach()).mean().item())
                with torch.no_grad():
                    for parameter in module:
                        parameter -= 0.05 * parameter.grad
        model.close()
        kept = [*getattr(compress, "_residuals", {}).values(), *getattr(compress, "_factors", {}).values()]
        assert losses == sorted(losses, reverse=True), losses
        return [*module, *kept]

    for make in (
        BF16,
        lambda: TopK(0.1),
        lambda: TopK(1.0),
        lambda: TopK(0.1, error_feedback=False),
        lambda: PowerSGD(1),
        lambda: PowerSGD(1, error_feedback=False),
    ):
        want = train(make(), None)
        for bad in (math.inf, -math.inf, math.nan):
            for got, one in zip(train(make(), bad), want, strict=True):
                assert torch.equal(got, one), (type(make()), bad)


def finite_gradients_that_overflow():
    """In a factor, in the rounding of the product, and of a sent number: again the state stays as it was."""
    for make in (lambda: PowerSGD(1), lambda: TopK(0.5)):
        for dtype, large in ((torch.float32, 3e38), (torch.float16, 6e4)):
            compressor = make()
            average(compressor, random_gradient(120, dtype=dtype), [(12, 10)])
            compressor._residuals[0].fill_(large)
            state = [*compressor._residuals.values(), *getattr(compressor, "_factors", {}).values()]
            before = [tensor.clone() for tensor in state]
            assert not average(compressor, torch.full((120,), large, dtype=dtype), [(12, 10)]).isfinite().all()
            after = [*compressor._residuals.values(), *getattr(compressor, "_factors", {}).values()]
            assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))


def power_sgd():
    # The mean of ranks' matrices of one common direction has rank 1: nothing is lost but rounding.
    torch.manual_seed(0)
    left, right = torch.randn(30, 1, dtype=torch.float64), torch.randn(1, 20, dtype=torch.float64)
    matrix = (left @ right * (1 + dist.get_rank())).reshape(-1)
    vector = random_gradient(9, dtype=torch.float64)
    gradient = torch.cat((matrix, vector))
    rows = []
    estimate = average(PowerSGD(1), gradient, [(30, 20), (9,)], book=rows)
    torch.testing.assert_close(estimate, on_all(gradient).mean(dim=0))
    assert [(row.calls, row.size) for row in rows] == [(2, 8 * (30 + 20 + 9))] * (dist.get_world_size() > 1)
    # A matrix of higher rank: the iteration goes on from step to step, and ends at the best approximation.
    gradient = random_gradient(600, seed=5, dtype=torch.float64)
    gradient += (left @ right).reshape(-1) + (torch.randn(30, 1).double() @ torch.randn(1, 20).double()).reshape(-1)
    mean = on_all(gradient).mean(dim=0).view(30, 20)
    compressor = PowerSGD(2, error_feedback=False)
    for _ in range(30):
        estimate = average(compressor, gradient, [(30, 20)])
    best = torch.linalg.svdvals(mean)[2:].norm()
    assert (estimate.view(30, 20) - mean).norm() == pytest.approx(best.item(), rel=1e-3)
    # Where factors are no smaller, the matrix goes as it is.
    small = random_gradient(12, dtype=torch.float64)
    torch.testing.assert_close(average(PowerSGD(2), small, [(3, 4)]), on_all(small).mean(dim=0))


def power_sgd_on_resnet_18():
    """The published ratio, out of the bytes really sent."""
    matrices, vectors = resnet18_shapes()
    shapes = [*matrices, (vectors,)]
    numbers = sum(map(math.prod, shapes))
    gradient = torch.ones(numbers)
    parts = [p.view(s) for p, s in zip(gradient.split([math.prod(s) for s in shapes]), shapes, strict=True)]
    with ledger() as book:
        PowerSGD(2, error_feedback=False).start(0, gradient, parts, dist.group.WORLD).wait()
    return 4 * numbers / book.size["all_reduce"]


def descend(group, compress, steps, lr):
    """Distance to the optimum of a quadratic over its start, after plain gradient descent on all ranks.

    Rank r's loss is ½Σ aᵢ(xᵢ − tᵣᵢ)², with targets that differ by a lot: at the optimum of the mean, ranks' own
    gradients are large and only cancel out.
    """
    n, rank = dist.get_world_size(), dist.get_rank()
    curvature = torch.linspace(0.5, 2, 40, dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    targets = torch.randn(n, 40, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, 40).double()
    optimum = targets.mean(dim=0)
    module = nn.ParameterList([torch.zeros(40, dtype=torch.float64)])
    model = DataParallel(module, group, compress=compress)
    for _ in range(steps):
        model.zero_grad()
        (0.5 * curvature * (module[0] - targets[rank]).square()).sum().backward()
        with torch.no_grad():
            module[0] -= lr * module[0].grad
    model.close()
    weights = module[0].detach()
    assert (on_all(weights) == weights).all()
    return ((weights - optimum).norm() / optimum.norm()).item()


def converges_with_feedback_only():
    with Communicator() as group:
        return {
            "exact": descend(group, None, 100, lr=0.4),
            "with": descend(group, TopK(0.1), 800, lr=0.01),
            "without": descend(group, TopK(0.1, error_feedback=False), 800, lr=0.01),
            "bf16": descend(group, BF16(), 100, lr=0.4),
        }


def in_data_parallel():
    """Several buckets, unused parameters, accumulation: a compressor that keeps everything changes nothing."""
    n, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    whole = torch.randn(2 * n, 6, dtype=torch.float64)
    part = whole[2 * rank : 2 * rank + 2]
    for compress in (TopK(1.0), PowerSGD(64)):
        torch.manual_seed(1)
        module = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 10), nn.Tanh(), nn.Linear(10, 3)).double()
        module.unused = nn.Linear(3, 3)
        module.forward = lambda x, layers=list(module)[:5]: nn.Sequential(*layers)(x)
        want = torch.autograd.grad(module(whole).square().mean(), list(module.parameters())[:6])
        for communicator in (None, Communicator()):
            model = DataParallel(module, communicator, compress=compress, bucket_mb=1e-3, first_bucket_mb=3e-4)
            for _ in range(3):
                model.zero_grad()
                with model.no_sync():
                    (model(part).square().mean() / 2).backward()
                (model(part).square().mean() / 2).backward()
                for exact, parameter in zip(want, list(module.parameters())[:6], strict=True):
                    torch.testing.assert_close(parameter.grad, exact)
                assert module.unused.weight.grad is None
            model.close()


def run_all():
    torch.use_deterministic_algorithms(True)
    bf16()
    top_k()
    what_is_not_sent_is_sent_later()
    not_a_number_does_not_stay()
    one_infinite_step_is_as_if_it_had_not_been()
    finite_gradients_that_overflow()
    power_sgd()
    in_data_parallel()
    return converges_with_feedback_only(), power_sgd_on_resnet_18() if dist.get_world_size() == 2 else None


@pytest.mark.parametrize("n", [1, 2, 3])
def test_on_ranks(n):
    for found, ratio in launch(run_all, n, timeout=120.0):
        assert found["exact"] < 1e-8
        assert found["bf16"] < 0.02
        assert found["with"] < 0.03
        if n > 1:  # one rank alone descends along its largest numbers until all are small
            assert found["without"] > 10 * found["with"]
        if n == 2:
            assert ratio == pytest.approx(power_sgd_ratio(2))
            assert round(ratio) == 136


@pytest.mark.parametrize("ratio", [0, -0.1, 1.5, math.nan])
def test_top_k_refuses_ratio(ratio):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        TopK(ratio)


@pytest.mark.parametrize("rank", [0, -1, 1.5, True])
def test_power_sgd_refuses_rank(rank):
    with pytest.raises(ValueError, match="whole number of at least 1"):
        PowerSGD(rank)
