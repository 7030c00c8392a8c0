"""Any valid schedule gives the gradients of one process, whatever the stages, the batch and what lies between them."""

import copy
import itertools
import random
import weakref
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from mlsys.contracts import _parallel_pipeline, _parallel_ranks, check, find
from mlsys.models import transformer
from mlsys.models.transformer import Transformer
from mlsys.parallel import LaunchError, _pipeline_messages, launch, ledger
from mlsys.parallel._weight_gradients import Store, deferring
from mlsys.parallel.pipeline import Pipeline, load, measured, operations, partition, split
from mlsys.parallel.schedules import (
    Op,
    ScheduleError,
    gpipe,
    interleaved,
    one_f_one_b,
    sequential,
    simulate,
    validate,
    zb_h1,
    zb_h2,
    zb_v,
)
from mlsys.parallel.timeline import Span, Timeline, gather
from mlsys.perf import pipeline as perf
from mlsys.perf.configs import gpt, llama

DOUBLE = torch.float64


# --- models -----------------------------------------------------------------------------------------------------------


def language_model(tied=True, style="llama", dtype=DOUBLE, layers=4):
    config = (
        llama(layers, 16, 2, 24, vocab=13, context=12) if style == "llama" else gpt(layers, 16, 2, vocab=13, context=12)
    )
    model = Transformer(replace(config, tied=tied), dtype=dtype)
    return transformer.init(model, torch.Generator().manual_seed(0))


def mlp(layers=8, width=6, dtype=DOUBLE, seed=0):
    torch.manual_seed(seed)
    deep = [[nn.Linear(width, width), nn.Tanh()] for _ in range(layers // 2)]
    return nn.Sequential(*itertools.chain(*deep)).to(dtype)


def tokens(rows, seed=1, length=5):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(13, (rows, length + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def rows(n, width=6, seed=1, dtype=DOUBLE):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, n, width, generator=generator, dtype=DOUBLE).to(dtype)
    return x, y


def cross_entropy(logits, targets):
    logits = logits.flatten(0, 1)
    wide = logits.float() if logits.dtype == torch.bfloat16 else logits
    return F.cross_entropy(wide, targets.flatten())


def squares(output, targets):
    return (output - targets).square().mean()


def one_process(model, loss, x, y, before=0):
    """Gradients and loss of the whole batch at once."""
    model = copy.deepcopy(model)
    for _ in range(before + 1):
        value = loss(model(*x) if isinstance(x, tuple) else model(x), y)
        value.backward()
    return {name: p.grad for name, p in model.named_parameters()}, value.item()


def named_gradients(pipe, model):
    """This rank's gradients by the whole model's names; a shared one has the name that stands for it there."""
    names = {name for name, _ in model.named_parameters()}
    found = {}
    for stage in pipe.stages.values():
        for own, parameter in stage.named_parameters(remove_duplicate=False):
            name = getattr(stage, "shared", {}).get(own, own)
            assert name in names
            found[name] = parameter.grad
    return found


def check_gradients(pipe, model, want, tolerance=1e-12):
    got = named_gradients(pipe, model)
    assert got or not list(pipe.parameters())
    for name, gradient in got.items():
        if want[name] is None:
            assert gradient is None, name
        else:
            assert gradient is not None, name
            assert (gradient - want[name]).abs().max() <= tolerance * max(1.0, want[name].abs().max()), name


def schedules(p, m):
    """All that the library makes for p ranks and m microbatches, with the number of stages."""
    yield "sequential", sequential(p, m), p
    yield "gpipe", gpipe(p, m), p
    yield "1f1b", one_f_one_b(p, m), p
    yield "zb-h1", zb_h1(p, m), p
    yield "zb-h2", zb_h2(p, m), p
    yield "zbv", zb_v(p, m), 2 * p
    if m % p == 0:
        yield "interleaved", interleaved(p, m, 2), 2 * p


# --- where to cut -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 8), st.sampled_from([1, 0.1, 1e-300]))
def test_partition_is_the_best_of_all(costs, n, unit):
    if n > len(costs):
        with pytest.raises(ValueError, match=f"n={n}"):
            partition(costs, n)
        return
    got = partition([cost * unit for cost in costs], n)
    assert [part.start for part in got] == [0, *(part.stop for part in got[:-1])]
    assert got[-1].stop == len(costs)

    def judged(ends):
        sums = [sum(costs[a:b]) for a, b in itertools.pairwise((0, *ends, len(costs)))]
        return max(sums), sum(s * s for s in sums), ends

    if unit == 1:
        best = min(map(judged, itertools.combinations(range(1, len(costs)), n - 1)))
        assert judged(tuple(part.stop for part in got[:-1])) == best


def test_partition_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"costs\[1\] must be at least 0"):
        partition([1, -1], 1)
    with pytest.raises(ValueError, match=r"costs\[0\] must be at least 0 and finite"):
        partition([float("nan")], 1)
    with pytest.raises(ValueError, match="n must be at least 1"):
        partition([1], 0)


@pytest.mark.parametrize("style", ["llama", "gpt"])
@pytest.mark.parametrize("tied", [True, False])
def test_stages_one_after_the_other_are_the_model(style, tied):
    model = language_model(tied, style)
    x, _ = tokens(3)
    for n in (1, 2, 4, 6):
        stages = split(model, n)
        out = x
        for stage in stages:
            out = stage(out)
        assert torch.equal(out, model(x))
        whole = model.state_dict()
        part = {name: t for stage in stages for name, t in stage.state_dict().items()}
        assert part.keys() == whole.keys()
        assert all(part[name].data_ptr() == whole[name].data_ptr() for name in whole)  # nothing was copied
        assert stages[0].shared == ({"token_embedding.weight": "token_embedding.weight"} if tied and n > 1 else {})


def test_a_sequential_keeps_its_names_and_knows_what_is_shared():
    first = nn.Linear(6, 6)
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), first, nn.Linear(6, 6))
    model[5].weight = model[2].weight
    stages = split(model, 3, [1] * 6)
    assert [list(stage.state_dict()) for stage in stages] == [
        ["0.weight", "0.bias"],
        ["2.weight", "2.bias"],
        ["4.weight", "4.bias", "5.weight", "5.bias"],
    ]
    assert stages[2].shared == {"4.weight": "0.weight", "4.bias": "0.bias", "5.weight": "2.weight"}
    x, _ = rows(2, dtype=torch.float32)
    assert torch.equal(stages[2](stages[1](stages[0](x))), model(x))


def test_costs_move_the_cut():
    model = mlp(8)
    assert [len(stage._modules) for stage in split(model, 2)] == [3, 5]  # a Tanh costs nothing; fewer to the first
    assert [len(stage._modules) for stage in split(model, 2, [9, 1, 1, 1, 1, 1, 1, 1])] == [1, 7]
    wide = language_model(layers=4)  # its output is cheap beside a block: two blocks each
    assert [len(stage.blocks) for stage in split(wide, 2)] == [2, 2]
    dear = Transformer(replace(llama(4, 16, 2, 24, vocab=3000, context=12)), device="meta")
    assert [len(stage.blocks) for stage in split(dear, 2)] == [4, 0]  # an output of 3000 is more than four blocks


def test_split_says_what_is_wrong():
    with pytest.raises(TypeError, match=r"model must be a Transformer or an nn\.Sequential, got Linear"):
        split(nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="n=9: there are only 8 layers"):
        split(mlp(8), 9)
    with pytest.raises(ValueError, match="costs must have one entry for each of its 8 layers: 8, got 2"):
        split(mlp(8), 2, [1, 2])


def test_a_rank_fills_only_its_own_stages(tmp_path):
    model = language_model()
    transformer.save(model, tmp_path / "model")
    for weights in (model.state_dict(), tmp_path / "model"):
        stages = split(Transformer(model.config, device="meta", dtype=DOUBLE), 3)
        load([stages[0], stages[2]], weights)
        assert stages[0].token_embedding.weight is stages[2].token_embedding.weight  # still one
        assert all(p.is_meta for p in stages[1].parameters())
        load([stages[1]], weights)
        x, _ = tokens(2)
        assert torch.equal(stages[2](stages[1](stages[0](x))), model(x))
        with torch.no_grad():
            stages[0].token_embedding.weight.zero_()
        assert model.token_embedding.weight.abs().sum() > 0  # the checkpoint is nobody's weight
        load(stages, weights)  # over what is there
        assert torch.equal(stages[0].token_embedding.weight, model.token_embedding.weight)
    broken = model.state_dict()
    del broken["blocks.0.mlp.up.weight"]
    with pytest.raises(ValueError, match=r"weights have no blocks.0.mlp.up.weight"):
        load(stages, broken)
    with pytest.raises(ValueError, match=r"weights have norm.weight of shape \(2,\), the model's is \(16,\)"):
        load(stages, model.state_dict() | {"norm.weight": torch.zeros(2)})
    (tmp_path / "model").write_bytes(b"no")
    with pytest.raises(ValueError, match="is damaged"):
        load(stages, tmp_path / "model")


# --- weight gradients put off -----------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Linear layers in every way that a model uses them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.matrix = nn.Parameter(torch.randn(6, 6))
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.half_frozen = nn.Linear(6, 6)
        self.half_frozen.weight.requires_grad_(False)

    def forward(self, x):
        x = self.norm(self.a(x) + F.linear(input=x, weight=self.b.weight))
        x = self.half_frozen(self.frozen(self.b(x))) @ self.matrix  # b for a second time
        return self.c(x + F.linear(x, self.matrix, bias=2 * self.c.bias))  # a bias that is computed


def put_off(module, x, call=None):
    """Gradients by B and W; which parameters had one after B; and that of the input."""
    x = x.detach().clone().requires_grad_(x.requires_grad)
    store = Store()
    with deferring(store):
        torch.autograd.backward((call or module)(x).square().sum())
    early = {name for name, p in module.named_parameters() if p.grad is not None}
    store.run()
    assert len(store) == 0
    return early, x.grad


@pytest.mark.parametrize("needs", [True, False])
def test_b_and_w_are_an_ordinary_backward_pass(needs):
    torch.manual_seed(0)
    one = Plain().to(DOUBLE)
    two = copy.deepcopy(one)
    x = torch.randn(3, 4, 6, dtype=DOUBLE, requires_grad=needs)
    one(x).square().sum().backward()
    early, gradient = put_off(two, x)
    assert early == {"norm.weight", "norm.bias", "half_frozen.bias", "matrix", "c.bias"}
    if needs:
        torch.testing.assert_close(gradient, x.grad)
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_what_waits_for_w():
    """The weights of linear layers; a weight that is computed from others does not."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    assert put_off(layer, torch.randn(2, 6))[0] == set()

    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    parametrize.register_parametrization(layer[1], "weight", Double())
    layer.zero_grad()
    x = torch.randn(2, 6)
    early, _ = put_off(layer, x)
    assert early == {"1.parametrizations.weight.original", "1.bias"}
    got = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(x).square().sum().backward()
    torch.testing.assert_close(got, [p.grad for p in layer.parameters()])


def test_hooks_fire_once_in_w_and_gradients_add_up():
    layer = nn.Linear(6, 6).to(DOUBLE)
    seen = []
    layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append("after"))
    layer.weight.register_hook(lambda g: seen.append("before"))
    x, _ = rows(3)
    store = Store()
    with deferring(store):
        (layer(x) + layer(2 * x)).sum().backward()
    assert seen == []
    store.run()
    assert seen == ["before", "after"]
    once = layer.weight.grad.clone()
    buffer = layer.weight.grad
    put_off(layer, x, lambda x: layer(x) + layer(2 * x) - layer(x))
    assert layer.weight.grad is buffer  # in place, as ever
    assert not torch.equal(buffer, once)


def test_autocast_and_checkpointing_are_as_without():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))
    other = copy.deepcopy(net)
    x = torch.randn(4, 6, requires_grad=True)

    def half(x, module):
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    half(x, net).square().sum().backward()
    _, gradient = put_off(other, x, lambda x: half(x, other))
    torch.testing.assert_close(gradient, x.grad, rtol=2e-2, atol=2e-2)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert q.grad.dtype == torch.float32
        torch.testing.assert_close(q.grad, p.grad, rtol=2e-2, atol=2e-2)

    net.zero_grad(), other.zero_grad()
    x.grad = None
    net(x).square().sum().backward()
    early, gradient = put_off(other, x, lambda x: checkpoint(other, x, use_reentrant=False))
    assert early == {name for name, _ in other.named_parameters()}  # nothing is put off there
    torch.testing.assert_close(gradient, x.grad)
    torch.testing.assert_close([p.grad for p in net.parameters()], [p.grad for p in other.parameters()])


def test_b_frees_what_w_does_not_need():
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    kept = []
    net[1].register_forward_hook(lambda module, args, out: kept.append(weakref.ref(out)))
    net[2].register_forward_hook(lambda module, args, out: kept.append(weakref.ref(out)))
    store = Store()
    with deferring(store):
        net(torch.randn(2, 6)).sum().backward()
    assert kept[1]() is None
    assert len(store) == 4
    store.run()
    assert kept[0]() is None


# --- what is sent when ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("make", [gpipe, one_f_one_b, zb_h1, zb_h2])
def test_receives_are_posted_in_the_order_in_which_they_are_sent(make, p):
    table = make(p, 8)
    summary = validate(table)
    for rank in table:
        plan = _pipeline_messages.plan(table, summary.rank_of, rank)
        wanted = [k for op in table[rank] if (k := _pipeline_messages.taken(op, p)) is not None]
        assert sorted(key for key, _ in plan.receives) == sorted(wanted)
        for peer, ops in table.items():
            sent = [k for op in ops if (k := _pipeline_messages.given(op, p)) and summary.rank_of[k.stage] == rank]
            if peer != rank:
                assert [key for key, sender in plan.receives if sender == peer] == sent


def held_by_sends(table, rank):
    """The most messages that a rank keeps because it cannot know yet that they have arrived."""
    summary = validate(table)
    plan = _pipeline_messages.plan(table, summary.rank_of, rank)
    kept, most = set(), 0
    for op in plan.ops:
        kept -= set(plan.released.get(_pipeline_messages.taken(op, summary.stages), ()))
        key = _pipeline_messages.given(op, summary.stages)
        if key and summary.rank_of[key.stage] != rank:
            kept.add(key)
        most = max(most, len(kept))
    return most


def test_sent_tensors_are_let_go_as_activations_are():
    for p, m in ((2, 32), (4, 32)):
        for rank in range(p):
            assert held_by_sends(one_f_one_b(p, m), rank) <= 2 * (p - rank) + 2
            assert held_by_sends(zb_h1(p, m), rank) <= 2 * p + 2
    assert held_by_sends(gpipe(4, 32), 0) == 32  # nothing comes back before all has gone


# --- the step of one process ------------------------------------------------------------------------------------------


def every_schedule(p, m, n, tied):
    """All schedules of p ranks: gradients, losses, and the whole checkpoint."""
    model = language_model(tied)
    x, y = tokens(n)
    want, loss = one_process(model, cross_entropy, x, y)
    for name, table, stages in schedules(p, m):
        if stages > 6:
            whole, call, data = mlp(16), squares, rows(n)
            target, value = one_process(whole, call, *data)
        else:
            whole, call, data, target, value = copy.deepcopy(model), cross_entropy, (x, y), want, loss
        pipe = Pipeline(split(copy.deepcopy(whole), stages), table, call)
        got = pipe.step(*data)
        assert abs(got.item() - value) < 1e-12, name
        assert got.dtype == DOUBLE
        assert not got.requires_grad
        check_gradients(pipe, whole, target)
        assert abs(pipe.evaluate(*data).item() - value) < 1e-12, name
        full = pipe.full_state_dict()
        assert full.keys() == whole.state_dict().keys()
        assert all(torch.equal(full[key], tensor) for key, tensor in whole.state_dict().items())
    return True


@pytest.mark.parametrize(
    ("p", "m", "n", "tied"),
    [(1, 1, 1, True), (1, 3, 7, False), (2, 1, 3, True), (2, 4, 4, False), (2, 4, 9, True), (4, 2, 5, True),
     (4, 8, 19, True), (3, 5, 6, False)],
)  # fmt: skip
def test_gradients_are_those_of_one_process(p, m, n, tied):
    assert all(launch(every_schedule, p, p, m, n, tied))


def test_without_a_process_group():
    model = mlp(4)
    x, y = rows(5)
    want, loss = one_process(model, squares, x, y)
    pipe = Pipeline(split(model, 4), one_rank(4, 3), squares)
    assert abs(pipe.step(x, y).item() - loss) < 1e-12
    check_gradients(pipe, mlp(4), want)


def one_rank(stages, m):
    """All stages on one rank, the backward passes of the microbatches in an odd order."""
    forward = [Op("F", s, k) for k in range(m) for s in range(stages)]
    return {
        0: forward + [Op("BW", s, k) for k in sorted(range(m), key=lambda k: k % 2) for s in reversed(range(stages))]
    }


def random_schedule(seed, p, stages, m):
    """A valid schedule without rhyme or reason: stages on any ranks, any operation that is possible comes next."""
    draw = random.Random(seed)
    owners = [*range(p), *(draw.randrange(p) for _ in range(stages - p))]
    draw.shuffle(owners)
    apart = {(s, k): draw.random() < 0.5 for s in range(stages) for k in range(m)}
    todo = {Op("F", s, k) for s in range(stages) for k in range(m)}
    for (s, k), split_up in apart.items():
        todo |= {Op("B", s, k), Op("W", s, k)} if split_up else {Op("BW", s, k)}
    done, table = set(), {rank: [] for rank in range(p)}
    while todo:
        possible = [
            op
            for op in sorted(todo)
            if (op.kind == "F" and (not op.stage or ("F", op.stage - 1, op.microbatch) in done))
            or (op.kind == "W" and ("B", op.stage, op.microbatch) in done)
            or (op.kind in ("B", "BW") and ("F", op.stage, op.microbatch) in done
                and (op.stage == stages - 1 or ("B", op.stage + 1, op.microbatch) in done))
        ]  # fmt: skip
        op = draw.choice(possible)
        todo.discard(op)
        done |= {("B" if op.kind == "BW" else op.kind, op.stage, op.microbatch)}
        table[owners[op.stage]].append(op)
    return table


def odd_schedules(seeds, p):
    for seed in seeds:
        stages, m = p + seed % 4, 1 + seed % 5
        model = mlp(2 * stages)
        x, y = rows(m + seed % 3)
        want, loss = one_process(model, squares, x, y)
        pipe = Pipeline(
            split(copy.deepcopy(model), stages, [1] * (2 * stages)), random_schedule(seed, p, stages, m), squares
        )
        for _ in range(2):  # the second time without headers
            for parameter in pipe.parameters():
                parameter.grad = None
            assert abs(pipe.step(x, y).item() - loss) < 1e-12
            check_gradients(pipe, model, want)
    return True


@settings(deadline=None, max_examples=4, derandomize=True)
@given(st.lists(st.integers(0, 10**6), min_size=12, max_size=12, unique=True), st.sampled_from([2, 3, 4]))
def test_any_valid_schedule_runs_and_is_right(seeds, p):
    assert all(launch(odd_schedules, p, seeds, p, timeout=60.0))


# --- weights that stages share ----------------------------------------------------------------------------------------


def thrice():
    """One layer in three places, and a tie between two others."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 6), layer, nn.Linear(6, 6), layer).to(DOUBLE)
    model[4].weight = model[2].weight
    return model


def shared_weights():
    model = thrice()
    with torch.no_grad():
        for parameter in model.parameters():  # rank 0's count, for those that are shared
            if dist.get_rank():
                parameter.add_(dist.get_rank())
        for i in (2, 4):  # and what is not shared is each rank's own
            model[i].bias.copy_(thrice()[i].bias)
    if dist.get_rank() == 1:
        with torch.no_grad():  # stage 1 is the first to have this weight
            model[2].weight.copy_(thrice()[2].weight)
    x, y = rows(5)
    oracle = thrice()
    ours = torch.optim.AdamW
    want = ours(oracle.parameters(), lr=0.01)
    pipe = Pipeline(split(model, 3, [1] * 6), one_f_one_b(3, 4), squares)
    optimizer = ours(pipe.parameters(), lr=0.01)
    for step in range(3):
        want.zero_grad(), optimizer.zero_grad()
        for _ in range(1 + step):  # gradients add up, and shared ones no faster
            squares(oracle(x), y).backward()
            pipe.step(x, y)
        check_gradients(pipe, oracle, {name: p.grad for name, p in oracle.named_parameters()})
        want.step(), optimizer.step()
    return {name: p.detach() for stage in pipe.stages.values() for name, p in stage.named_parameters()}


def test_copies_of_a_weight_stay_equal():
    first, second, third = launch(shared_weights, 3)
    assert torch.equal(first["0.weight"], second["3.weight"])
    assert torch.equal(first["0.weight"], third["5.weight"])
    assert torch.equal(first["0.bias"], third["5.bias"])
    assert torch.equal(second["2.weight"], third["4.weight"])


def gradient_buffers():
    """`.grad` stays the tensor that it was, as gradients in buckets need."""
    pipe = Pipeline(split(language_model(), 2), gpipe(2, 2), cross_entropy)
    for parameter in pipe.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = [parameter.grad for parameter in pipe.parameters()]
    pipe.step(*tokens(4))
    assert all(p.grad is b for p, b in zip(pipe.parameters(), before, strict=True))
    return True


def test_gradients_are_accumulated_where_they_are():
    assert all(launch(gradient_buffers, 2))


# --- what lies between stages -----------------------------------------------------------------------------------------


class Several(nn.Module):
    """Passes on two tensors with a gradient, one of whole numbers, and one that is not contiguous."""

    def __init__(self, last=False):
        super().__init__()
        self.linear, self.last = nn.Linear(6, 6).to(DOUBLE), last

    def forward(self, x, y=None, order=None, turned=None):
        if y is None:
            y, order, turned = x, torch.arange(6), x.t()
        x = torch.tanh(self.linear(x[:, order])) + turned.t()
        y = y + x.sum(1, keepdim=True)
        order = order.roll(1)
        return x + y if self.last else (x, y.expand_as(x), order, (2 * x).t())


class Chain(nn.Module):
    """Modules that take what the last one returned as arguments."""

    def __init__(self, *stages):
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, *x):
        for stage in self.stages:
            x = stage(*x) if isinstance(x, tuple) else stage(x)
        return x


class Raw(nn.Module):
    """No parameters, and the input itself is the output."""

    def forward(self, x):
        return x


class Again(nn.Module):
    """Keeps its input, and computes the rest again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6)).to(DOUBLE)

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


class Add(nn.Module):
    def forward(self, a, b):
        return a + 2 * b


def between(kind):
    torch.manual_seed(0)
    stages = {
        "several": [Several(), Several(), Several(), Several(last=True)],
        "raw": [nn.Linear(6, 6).to(DOUBLE), Raw(), Raw(), nn.Linear(6, 6).to(DOUBLE)],
        "bare first": [nn.Tanh(), nn.Linear(6, 6).to(DOUBLE), nn.Linear(6, 6).to(DOUBLE), nn.Tanh()],
        "two inputs": [Add(), nn.Linear(6, 6).to(DOUBLE), nn.Tanh(), nn.Linear(6, 6).to(DOUBLE)],
        "checkpointed": [Again() for _ in range(4)],
        "frozen": [nn.Linear(6, 6).to(DOUBLE).requires_grad_(i in (1, 3)) for i in range(4)],
    }[kind]
    model = Chain(*stages)
    oracle = copy.deepcopy(model)
    x, y = rows(7)
    x = (x, x.flip(0)) if kind == "two inputs" else x
    for table in (
        one_f_one_b(4, 3), zb_h1(4, 3), zb_v(2, 3),
        {0: [*one_rank(4, 3)[0]]},
    ):  # fmt: skip
        ranks = len(table)
        group = dist.new_group(list(range(ranks)))
        if dist.get_rank() >= ranks:
            continue
        oracle.zero_grad(), model.zero_grad()
        want = squares(oracle(*x) if isinstance(x, tuple) else oracle(x), y)
        want.backward()
        pipe = Pipeline(stages, table, squares, group)
        for size in (7, 4, 7):  # shapes change from step to step
            part = tuple(t[:size] for t in x) if isinstance(x, tuple) else x[:size]
            model.zero_grad()
            got = pipe.step(part, y[:size])
        assert abs(got.item() - want.item()) < 1e-12
        for number, stage in pipe.stages.items():
            for p, q in zip(stage.parameters(), oracle.stages[number].parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad)
    return True


@pytest.mark.parametrize("kind", ["several", "raw", "bare first", "two inputs", "frozen", "checkpointed"])
def test_whatever_stages_pass_on(kind):
    assert all(launch(between, 4, kind))


def ways_to_pass_a_batch():
    model = language_model()
    x, y = tokens(9)
    want, loss = one_process(model, cross_entropy, x, y)
    rank = dist.get_rank()
    forms = [
        (x, y),
        (list(x.split([1, 5, 3])), list(y.split([1, 5, 3]))),
        (x.to("meta") if rank else x, y if rank == 1 else None),  # what a rank does not read it need not have
        ((x,), (y,)),
    ]
    pipe = Pipeline(dict(enumerate(split(model, 2))), gpipe(2, 3), cross_entropy)
    for inputs, targets in forms:
        for parameter in pipe.parameters():
            parameter.grad = None
        assert abs(pipe.step(inputs, targets).item() - loss) < 1e-12
        check_gradients(pipe, model, want)
        assert abs(pipe.evaluate(inputs, targets).item() - loss) < 1e-12
    return True


def test_ways_to_pass_a_batch():
    assert all(launch(ways_to_pass_a_batch, 2))


def padded():
    """A mean over the tokens that are not padding, of which microbatches have unequal many, or none."""
    model = language_model()
    x, y = tokens(6)
    y = y.clone()
    y[0, 2:] = y[3] = y[4, 1:] = -100

    def loss(logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)

    want, value = one_process(model, loss, x, y)
    pipe = Pipeline(split(model, 2), one_f_one_b(2, 6), loss, count=lambda targets: (targets != -100).sum())
    assert abs(pipe.step(x, y).item() - value) < 1e-12
    check_gradients(pipe, model, want)
    return True


def test_count_says_of_what_a_loss_is_the_mean():
    assert all(launch(padded, 2))


class Bad(nn.Module):
    """Of the last microbatch of three, the result is `value`."""

    def __init__(self, value):
        super().__init__()
        self.value, self.calls = value, 0

    def forward(self, x):
        self.calls += 1
        return x if self.calls % 3 else x + self.value


def infinite_and_not_counted():
    """A microbatch of which nothing counts adds nothing, whatever its numbers are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, dtype=DOUBLE), nn.Tanh(), nn.Linear(6, 6, dtype=DOUBLE))
    x, y = rows(6)
    twin = copy.deepcopy(model)
    F.mse_loss(twin(x[:4]), y[:4]).backward()
    for bad in (torch.inf, torch.nan):
        stages = [model[:2], nn.Sequential(model[2], Bad(bad))]
        model.zero_grad()
        marked = torch.cat([y, torch.tensor([[1.0], [1], [1], [1], [0], [0]], dtype=DOUBLE)], dim=1)
        for table in (one_f_one_b(2, 3), zb_h1(2, 3)):
            pipe = Pipeline(
                stages, table, lambda out, to: F.mse_loss(out, to[:, :6]), count=lambda to: float(to[:, 6].sum())
            )
            model.zero_grad()
            loss = pipe.step(x, marked)
            torch.testing.assert_close(loss, F.mse_loss(twin(x[:4]), y[:4]))
            torch.testing.assert_close(pipe.evaluate(x, marked), loss)
            for mine, want in zip(model[2 * dist.get_rank()].parameters(), twin[2 * dist.get_rank()].parameters()):
                torch.testing.assert_close(mine.grad, want.grad)


def test_what_does_not_count_may_be_infinite():
    launch(infinite_and_not_counted, 2)


def half_precision():
    model = language_model(dtype=torch.bfloat16)
    x, y = tokens(8)
    want, _ = one_process(model, cross_entropy, x, y)
    for table in (one_f_one_b(2, 4), zb_h1(2, 4)):
        pipe = Pipeline(split(copy.deepcopy(model), 2), table, cross_entropy)
        pipe.step(x, y)
        got = named_gradients(pipe, model)
        for name, gradient in got.items():
            assert gradient.dtype == torch.bfloat16
            torch.testing.assert_close(
                gradient, want[name], rtol=0.1, atol=0.02, msg=lambda m, name=name: f"{name} {m}"
            )
    return True


def test_bfloat16():
    assert all(launch(half_precision, 2))


def the_same_twice():
    found = []
    for _ in range(2):
        pipe = Pipeline(split(language_model(), 2), zb_h2(2, 5), cross_entropy)
        pipe.step(*tokens(7))
        found.append([p.grad for p in pipe.parameters()])
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_step_is_the_same_to_the_bit_each_time():
    assert all(launch(the_same_twice, 2))


def freezes():
    model = mlp(4)
    pipe = Pipeline(split(model, 2, [1] * 4), one_f_one_b(2, 2), squares)
    x, y = rows(4)
    pipe.step(x, y)
    model[0].requires_grad_(False)
    pipe.forget()
    model.zero_grad()
    pipe.step(x, y)
    want, _ = one_process(model, squares, x, y)
    check_gradients(pipe, model, want)
    model[0].requires_grad_(True)
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match=r"without gradient.*call forget\(\) on every rank"):
            pipe.step(x, y)
        with pytest.raises(RuntimeError, match="an earlier step of this pipeline raised half-way"):
            pipe.step(x, y)
    return True


def test_freezing_between_steps():
    assert all(launch(freezes, 2))


# --- torch's executor -------------------------------------------------------------------------------------------------


def in_torchs_executor(p, m):
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import _Action, _ComputationType, _PipelineScheduleRuntime

    kinds = {"F": "FORWARD", "B": "BACKWARD_INPUT", "W": "BACKWARD_WEIGHT", "BW": "FULL_BACKWARD"}
    x, y = rows(2 * m)
    for _, table, stages in schedules(p, m):
        model = mlp(2 * stages)
        want, _ = one_process(model, squares, x, y)
        actions = {
            rank: [_Action(op.stage, getattr(_ComputationType, kinds[op.kind]), op.microbatch) for op in ops]
            for rank, ops in table.items()
        }
        pipe = Pipeline(split(copy.deepcopy(model), stages, [1] * 2 * stages), table, squares)
        theirs = {
            number: PipelineStage(copy.deepcopy(stage), number, stages, torch.device("cpu"))
            for number, stage in pipe.stages.items()
        }
        runtime = _PipelineScheduleRuntime(list(theirs.values()), m, loss_fn=squares)
        runtime.pipeline_order = actions
        runtime._prepare_schedule_with_comms(actions)
        runtime.step(*([x] if 0 in theirs else []), target=y if stages - 1 in theirs else None)
        pipe.step(x, y)
        for number, stage in pipe.stages.items():
            for (name, p_), q in zip(stage.named_parameters(), theirs[number].submod.parameters(), strict=True):
                torch.testing.assert_close(q.grad, want[name])
                torch.testing.assert_close(p_.grad, q.grad)
    return True


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8)])
def test_our_schedules_run_in_torchs_executor(p, m):
    assert all(launch(in_torchs_executor, p, p, m))


# --- bytes and seconds ------------------------------------------------------------------------------------------------


def bytes_sent(p, m):
    found = {}
    names = {
        "gpipe": (gpipe, 1),
        "1f1b": (one_f_one_b, 1),
        "zb-h1": (zb_h1, 1),
        "interleaved": (interleaved, 2),
        "zbv": (zb_v, 2),
    }
    x, y = rows(2 * m)
    for name, (make, v) in names.items():
        table = make(p, m, v) if name == "interleaved" else make(p, m)
        pipe = Pipeline(split(mlp(4 * p), v * p), table, squares)
        for _ in range(2):  # headers travel the first time, and do not count
            with ledger() as book:
                pipe.step(x, y)
            chunks = {"chunks": 2} if name == "interleaved" else {}
            want = perf.bytes_sent(name, p, m, dist.get_rank(), perf.boundary_bytes(2, 1, 6, itemsize=8), **chunks)
            assert book.sent == want, (name, book.sent, want)
        found[name] = book.sent
    return found


def test_bytes_are_those_of_the_formula():
    for p, m in ((2, 4), (3, 6)):
        found = launch(bytes_sent, p, p, m)
        assert sum(rank["1f1b"] for rank in found) == 2 * (p - 1) * m * 2 * 6 * 8


def timed():
    timeline = Timeline()
    table = zb_h1(2, 3)
    pipe = Pipeline(split(mlp(4), 2), table, squares, timeline=timeline)
    pipe.step(*rows(6))
    own = [op for op, _, _ in operations(timeline.spans)]
    assert own == table[dist.get_rank()]
    assert {span.kind for span in timeline.spans} <= {"compute", "waiting"}
    seconds = measured(gather(timeline))
    assert [len(part) for part in seconds] == [2, 2, 2]
    assert all(value > 0 for part in seconds for value in part)
    return simulate(table, *seconds).makespan


def test_what_was_measured_can_be_simulated():
    first, second = launch(timed, 2)
    assert first == second > 0
    with pytest.raises(ValueError, match="ranks has no spans of a pipeline's operations"):
        measured([[], []])


def test_measured_times_keep_the_sum_of_each_stage():
    """An operation that was interrupted is part of a step's length; a BW is a B and a W where a stage has all three."""
    spans, now = [], 0.0
    for op, took in (
        (Op("F", 0, 0), 1), (Op("F", 0, 1), 1), (Op("F", 0, 2), 4), (Op("B", 0, 0), 2), (Op("BW", 0, 1), 6),
        (Op("B", 0, 2), 2), (Op("W", 0, 0), 1), (Op("W", 0, 2), 3),
    ):  # fmt: skip
        spans.append(Span("compute", str(op), now, now + took))
        now += took
    f, b, w = measured([spans])
    assert (f, b, w) == ([2.0], [8 / 3], [2.0])
    table = {0: [op for op, _, _ in operations(spans)]}
    assert simulate(table, f, b, w).makespan == pytest.approx(now)


def held():
    """What a rank keeps of a step while it runs: as many graphs as the schedule says, and few tensors under way."""
    x, y = rows(32)
    pipe = Pipeline(split(mlp(8), 4), one_f_one_b(4, 16), squares)
    alive, most, sends = 0, 0, 0

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            nonlocal alive, sends
            alive -= 1
            sends = max(sends, len(pipe._messages._leaving))
            return g

    for stage in pipe.stages.values():
        stage.register_forward_hook(lambda module, args, out: Count.apply(out))
    pipe.step(x, y)
    messages = pipe._messages
    assert [len(kept) for kept in (messages._leaving, messages._arriving, messages._here)] == [0, 0, 0]
    return most, sends


def test_no_more_microbatches_are_held_than_the_schedule_says():
    found = launch(held, 4)
    assert [most for most, _ in found] == [4, 3, 2, 1]
    assert all(sends <= 2 * (4 - rank) + 2 for rank, (_, sends) in enumerate(found))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_bad_schedule_is_refused_before_anything_runs():
    with pytest.raises(ScheduleError):
        Pipeline([mlp(2)], {0: [Op("BW", 0, 0), Op("F", 0, 0)]}, squares)
    with pytest.raises(ScheduleError):
        Pipeline([mlp(2)], gpipe(1, 4), squares, limit=3)
    with pytest.raises(TypeError):
        Pipeline([mlp(2)], [Op("F", 0, 0)], squares)


def refused(stages, table=None, **options):
    try:
        Pipeline(stages, table or gpipe(1, 2), squares, **options)
    except (TypeError, ValueError) as error:
        return str(error)
    return "nothing"


def test_bad_stages_are_named():
    assert "schedule is for 2 ranks, and the group has 1" in refused(split(mlp(4), 2), gpipe(2, 2))
    assert "stages has 2 modules, and the schedule 1 stages" in refused(split(mlp(4), 2))
    assert "stages has no stage 0, which the schedule gives to rank 0: [1]" in refused({1: mlp(2)})
    assert "stages[0] must be a module, got str" in refused({0: "x"})
    assert "stages must be a mapping from numbers to modules, or a list, got Tanh" in refused(nn.Tanh())
    assert "0.weight of stage 0 is on the meta device: fill it first" in refused([mlp(2).to("meta")])
    one, two = split(thrice(), 3, [1] * 6), split(thrice(), 3, [1] * 6)
    assert "have a 2.weight each, where the model has one" in refused([one[0], one[1], two[2]], one_rank(3, 2))


def groups():
    """One dimension of a mesh is a group; several are none, nor is anything else."""
    from torch.distributed.device_mesh import init_device_mesh

    x, y = rows(4)
    model = mlp(4)
    want = squares(model(x), y)
    both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "pp"))
    loss = Pipeline(split(model, 2), gpipe(2, 2), squares, both["pp"]).step(x, y)
    torch.testing.assert_close(loss, want.detach())
    for group, error, message in (
        (both, ValueError, r"group is a mesh of 2 dimensions \('dp', 'pp'\): pass .*, such as mesh\[.pp.\]"),
        ([0, 1], TypeError, r"group must be a process group of this rank, .* got \[0, 1\]"),
        (dist.GroupMember.NON_GROUP_MEMBER, TypeError, "only its members may use it"),
    ):
        with pytest.raises(error, match=message):
            Pipeline(split(model, 2), gpipe(2, 2), squares, group)


def test_what_may_be_a_group():
    launch(groups, 2)


def on_one_rank():
    """What only one rank does wrong is raised on both."""
    rank = dist.get_rank()
    cases = {
        "schedules": (split(mlp(4), 2), gpipe(2, 2) if rank else one_f_one_b(2, 2)),
        "missing": ({0: mlp(2)}, gpipe(2, 2)),
        "tied": (split(language_model(dtype=(DOUBLE, torch.float32)[rank]), 2), gpipe(2, 2)),
    }
    return {name: refused(*case) for name, case in cases.items()}


def test_what_one_rank_does_wrong_is_raised_on_all():
    first, second = launch(on_one_rank, 2)
    assert first["schedules"] == second["schedules"] == (
        "ranks 0 and 1 have different schedules: pass the same on every rank"
    )  # fmt: skip
    assert second["missing"].startswith("stages has no stage 1")
    assert first["missing"].startswith("rank 1 could not make its part of the pipeline: ValueError: stages has no")
    assert first["tied"] == second["tied"]
    assert first["tied"].startswith("token_embedding.weight, which stages share, is ((13, 16), 'torch.float32', True)")


@pytest.mark.parametrize(
    ("inputs", "targets", "error", "message"),
    [
        (torch.zeros(1, 6), torch.zeros(1, 6), ValueError, "inputs has 1 samples, too few for 2 microbatches"),
        ([torch.zeros(1, 6)], torch.zeros(2, 6), ValueError, "inputs is a list of 1, and the schedule has 2"),
        ([torch.zeros(0, 6)] * 2, torch.zeros(2, 6), ValueError, r"inputs\[0\] has no samples"),
        ("x", torch.zeros(2, 6), TypeError, "inputs must be a tensor, a tuple of tensors or a list of microbatches"),
        (torch.zeros(()), torch.zeros(2, 6), ValueError, "inputs is a scalar"),
        ((torch.zeros(2, 6), torch.zeros(3, 6)), torch.zeros(2, 6), ValueError, "must be tensors of equally many"),
        (torch.zeros(2, 6), None, ValueError, "targets=None, and rank 0 has the last stage"),
        (torch.zeros(2, 6), torch.zeros(1, 6), ValueError, "targets has 1 samples, too few for 2 microbatches"),
        (torch.zeros(2, 6, device="meta"), torch.zeros(2, 6), ValueError, "inputs are on the meta device, and rank 0"),
    ],
)  # fmt: skip
def test_a_bad_batch_is_named_and_changes_nothing(inputs, targets, error, message):
    pipe = Pipeline([mlp(2, dtype=torch.float32)], gpipe(1, 2), squares)
    with pytest.raises(error, match=message):
        pipe.step(inputs, targets)
    assert all(p.grad is None for p in pipe.parameters())
    pipe.step(torch.zeros(2, 6), torch.zeros(2, 6))


class Wrong(nn.Module):
    """Returns what cannot be passed on."""

    def forward(self, x):
        return {"x": x}


def test_stages_whose_names_collide_have_no_state_of_a_whole_model():
    pipe = Pipeline([nn.Linear(6, 6), nn.Linear(6, 6)], _two_stages(), squares)
    for of in (pipe.state_dict, pipe.full_state_dict):
        with pytest.raises(ValueError, match="stages 0 and 1 both have a weight"):
            of()
    assert len(list(pipe.parameters())) == 4


def _two_stages():
    return {0: [Op("F", 0, 0), Op("F", 1, 0), Op("BW", 1, 0), Op("BW", 0, 0)]}


def test_inputs_and_targets_are_cut_alike():
    pipe = Pipeline([nn.Linear(6, 6), nn.Linear(6, 6)], _two_stages(), squares)
    with pytest.raises(ValueError, match="inputs have 4 samples and targets 7"):
        pipe.step(torch.ones(4, 6), torch.ones(7, 6))


def test_what_stages_and_losses_must_return():
    x, y = rows(2, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"loss gave shape \(1, 6\) for microbatch 0: a scalar tensor is needed"):
        Pipeline([mlp(2, dtype=torch.float32)], gpipe(1, 2), lambda out, target: out - target).step(x, y)
    with pytest.raises(ValueError, match="loss gave float for microbatch 0"):
        Pipeline([mlp(2, dtype=torch.float32)], gpipe(1, 2), lambda out, target: 0.5).step(x, y)
    with pytest.raises(TypeError, match="stage 0 returned dict: a tensor, or a tuple of tensors, is needed"):
        Pipeline([Wrong(), nn.Tanh()], one_rank(2, 2), squares).step(x, y)
    with pytest.raises(RuntimeError, match="the loss has no gradient: no parameter"):
        Pipeline([nn.Tanh()], gpipe(1, 2), squares).step(x, y)
    with pytest.raises(ValueError, match=r"count gave \[0.0, 0.0\] for the microbatches"):
        Pipeline([mlp(2, dtype=torch.float32)], gpipe(1, 2), squares, count=lambda t: 0).step(x, y)


class Fails(nn.Module):
    def forward(self, x):
        raise ArithmeticError("as told")


def fails():
    stages = [*split(mlp(4), 2), Fails(), nn.Tanh()]
    Pipeline(stages, one_f_one_b(4, 8), squares).step(*rows(16))


def test_an_error_in_a_stage_ends_all_ranks_with_that_error():
    with pytest.raises(LaunchError, match="as told") as failed:
        launch(fails, 4, timeout=60.0)
    assert failed.value.rank == 2
    assert isinstance(failed.value.__cause__, ArithmeticError)


# --- the contract -----------------------------------------------------------------------------------------------------

CONTRACT = find("parallel.pipeline")


def test_the_contract_accepts_the_library():
    verdict = check(CONTRACT, CONTRACT.reference)
    assert verdict.passed, verdict


@pytest.mark.parametrize("name", CONTRACT.wrong)
def test_the_contract_names_every_mistake(name):
    wrong = CONTRACT.wrong[name]
    verdict = check(CONTRACT, wrong.impl)
    assert verdict.failure is not None
    assert verdict.failure.like == name
    assert verdict.failure.hint == wrong.hint


TOLD = _parallel_pipeline.TOLD
WAITING = {"sends", "waits_at_once", "dropped"}
RAISED = {
    "global_ranks": " raised ValueError: ",
    "sends_strided": " has to be contiguous. ",
    "receives_strided": " has to be contiguous. ",
    "chunks": " raised IndexError: tuple index out of range. ",
    "no_grad_asked": " raised AttributeError: 'NoneType' object has no attribute 'contiguous'. ",
}


@pytest.mark.parametrize("name", RAISED)
def test_the_words_of_an_error_are_followed_by_what_to_do(name):
    failure = check(CONTRACT, TOLD[name].impl).failure
    assert RAISED[name] in failure.message
    assert TOLD[name].hint in failure.message
    assert TOLD.keys() == RAISED.keys() | WAITING


def test_whoever_takes_ranks_of_all_for_those_of_a_group_is_told():
    failure = check(CONTRACT, TOLD["global_ranks"].impl).failure
    assert failure.case == {"n": 3, "microbatches": 4, "rows": 9, "members": (1, 2)}


@pytest.mark.parametrize("name", sorted(WAITING))
def test_ranks_that_wait_for_each_other_are_told_what_for(name, monkeypatch):
    monkeypatch.setattr(_parallel_ranks, "TIMEOUT_S", 10.0)  # they start and get stuck within it on a busy machine too
    message = check(replace(CONTRACT, cases=CONTRACT.cases[1:2]), TOLD[name].impl).failure.message
    assert message.startswith("2 of 2 ranks had not finished after 10 s; rank 0 ")
    assert message.endswith(f". {TOLD[name].hint}")


def test_ranks_that_wait_for_something_else_are_not_told_about_messages():
    advice = _parallel_pipeline.advice_for_waiting
    stuck = "3 of 3 ranks had not finished after 30 s; they are in different collectives"
    sent = "has issued its 6th message, isend of float64 (2, 4) at my.py:18"
    barrier = "is in its 1st collective, barrier at their.py:161"
    received = "is in its 2nd message, recv of float64 (2, 4) at my.py:24"
    assert advice(f"{stuck}; rank 0 is in its 1st collective, all_reduce at my.py:66; {sent}; rank 1 {barrier}") is None
    assert advice(f"{stuck}; rank 0 {sent}; rank 1 {barrier}; {sent}") is None  # waits at the end, for one who has left
    assert advice(f"{stuck}; rank 0 {sent}; rank 1 {received}") is None
    assert advice("rank 1 raised ValueError: 5; rank 0 is in its 2nd message, recv of float64 (2, 4)") is None
    assert advice(f"{stuck}; rank 0 {received}; rank 1 {barrier}; {sent}") == _parallel_pipeline.NOBODY_SENDS


class Guarded:
    """An activation's gradient is sent if there is one; there is none."""

    def __call__(self, stage, loss, inputs, targets, microbatches, group=None):
        if dist.get_rank() == 0:
            y = stage(inputs)
            gradient = torch.empty_like(y)
            dist.send(y.detach(), 1)
            dist.recv(gradient, 1)
            return y.backward(gradient)
        x = torch.empty_like(inputs)
        dist.recv(x, 0)
        value = loss(stage(x), targets)
        value.backward()
        if x.grad is not None:
            dist.send(x.grad, 0)
        return value.detach()


def test_an_activation_without_a_gradient_is_told_even_if_nothing_raises():
    failure = check(CONTRACT, Guarded()).failure
    assert failure.message == f"rank 1: {_parallel_pipeline.NO_GRAD_ASKED}"
