"""Gradients on n ranks are those of one process on the whole batch, whatever the model, the strategy and the step."""

import contextlib
import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mlsys.parallel import launch
from mlsys.parallel.collectives import Communicator, Links
from mlsys.parallel.data_parallel import STRATEGIES, DataParallel
from mlsys.parallel.traffic import ledger
from mlsys.perf import zero
from mlsys.perf.collectives import ALGORITHMS

SMALL = {"bucket_mb": 1e-3, "first_bucket_mb": 3e-4}  # about a layer of the models below
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}


# --- models -----------------------------------------------------------------------------------------------------------


def mlp(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 10), nn.Tanh(), nn.Linear(10, 3)).to(dtype)


class Tied(nn.Module):
    """A matrix at both ends, as in language models."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.middle(self.embedding(tokens))))


class Branches(nn.Module):
    """Uses one of two layers, and never the third."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.never = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x, *, right):
        return self.last((self.right if right else self.left)(x))


class Backwards(nn.Module):
    """Registers its layers in the opposite order of their use."""

    def __init__(self):
        super().__init__()
        self.third, self.second, self.first = nn.Linear(20, 3), nn.Linear(10, 20), nn.Linear(6, 10)

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Raises(torch.autograd.Function):
    """The identity, whose backward pass fails when told to."""

    armed = False

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if Raises.armed:
            raise ArithmeticError("as told")
        return gradient


# --- what every scenario needs ----------------------------------------------------------------------------------------


def batch(each=2, dtype=torch.float64, features=6, seed=1):
    """The whole batch, and this rank's equal part of it."""
    rank, n = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(each * n, features, generator=generator, dtype=torch.float64).to(dtype)
    return whole, whole[rank * each : (rank + 1) * each]


SHARED = []  # in the ranks: one Communicator for all scenarios


def wrap(module, **options):
    """The module in parallel, with small buckets."""
    return DataParallel(module, **({"group": SHARED[0]} | SMALL | options))


def pair(module, **options):
    """A copy for the one-process oracle, and the module in parallel."""
    oracle = copy.deepcopy(module)
    if dist.get_rank():  # rank 0's weights count: others begin with nonsense
        for parameter in module.parameters():
            parameter.data.fill_(7)
    return oracle, wrap(module, **options)


def same_gradients(oracle, model, dtype=torch.float64):
    """Also that gradients which one process does not have are not there."""
    for (name, want), got in zip(oracle.named_parameters(), model.module.parameters(), strict=True):
        assert (want.grad is None) == (got.grad is None), name
        if want.grad is not None:
            assert got.grad.dtype == want.dtype
            error = (got.grad - want.grad).abs().max() / want.grad.abs().max().clamp_min(1e-30)
            assert error < TOLERANCE[dtype], (name, error)


def same_everywhere(model):
    """Bit for bit."""
    parameters = list(model.module.parameters())
    mine = torch.cat([t.detach().reshape(-1) for p in parameters for t in (p, p.grad) if t is not None])
    first = mine.clone()
    dist.broadcast(first, 0)
    assert torch.equal(first, mine)


def loss_of(output):
    return output.square().mean()


# --- scenarios: each runs on every rank -------------------------------------------------------------------------------

SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


def each_strategy(function):
    for strategy in STRATEGIES:
        SCENARIOS[f"{function.__name__}-{strategy}"] = partial(function, strategy)
    return function


@each_strategy
def gradients(strategy):
    for dtype in (torch.float64, torch.float32):
        oracle, model = pair(mlp(dtype), strategy=strategy)
        whole, part = batch(dtype=dtype)
        for step in range(4):
            oracle.zero_grad()
            model.zero_grad(set_to_none=step % 2 == 0)
            loss_of(oracle(whole)).backward()
            loss_of(model(part)).backward()
            same_gradients(oracle, model, dtype)
        same_everywhere(model)
        model.close()


@each_strategy
def weights_after_steps(strategy):
    makes = (
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=0.01),
    )
    for make in makes:
        oracle, model = pair(mlp(), strategy=strategy)
        ours, theirs = make(model.parameters()), make(oracle.parameters())
        for step in range(4):
            whole, part = batch(seed=step)
            ours.zero_grad()
            theirs.zero_grad()
            loss_of(oracle(whole)).backward()
            loss_of(model(part)).backward()
            ours.step()
            theirs.step()
        for want, got in zip(oracle.parameters(), model.module.parameters(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
        same_everywhere(model)
        model.close()


@each_strategy
def tied_weights(strategy):
    torch.manual_seed(0)
    oracle, model = pair(Tied().double(), strategy=strategy)
    n, rank = dist.get_world_size(), dist.get_rank()
    tokens = torch.randint(0, 11, (2 * n, 5), generator=torch.Generator().manual_seed(3))
    for _ in range(2):
        oracle.zero_grad()
        model.zero_grad()
        loss_of(oracle(tokens)).backward()
        loss_of(model(tokens[2 * rank : 2 * rank + 2])).backward()
        same_gradients(oracle, model)
    assert model.module.head.weight is model.module.embedding.weight
    model.close()


@each_strategy
def frozen_from_the_start_then_freed_then_frozen_again(strategy):
    module = mlp()
    module[2].requires_grad_(False)
    oracle, model = pair(module, strategy=strategy)
    whole, part = batch()
    for trained in (False, True, False):
        for each in (oracle, model.module):
            each[2].requires_grad_(trained)
            each.zero_grad()
        for _ in range(2):
            loss_of(oracle(whole)).backward()
            loss_of(model(part)).backward()
            same_gradients(oracle, model)
    model.close()


@scenario
def thawed_past_the_door():
    """`model.module(…)` is called rather than `model(…)`, which would have noticed."""
    module = mlp()
    module[2].requires_grad_(False)
    oracle, model = pair(module)
    whole, part = batch()
    for each in (oracle, model.module):
        each[2].requires_grad_(True)
    loss_of(oracle(whole)).backward()
    loss_of(model.module(part)).backward()
    same_gradients(oracle, model)
    model.close()


@each_strategy
def unused_on_some_ranks_and_on_all(strategy):
    torch.manual_seed(0)
    oracle, model = pair(Branches().double(), strategy=strategy)
    n, rank = dist.get_world_size(), dist.get_rank()
    whole, part = batch()
    for step in range(4):
        uses_right = [(r + step) % 2 == 1 and step < 2 for r in range(n)]  # from step 2 on, nobody does
        oracle.zero_grad()
        model.zero_grad()
        outputs = [oracle(whole[2 * r : 2 * r + 2], right=uses_right[r]) for r in range(n)]
        loss_of(torch.cat(outputs)).backward()
        loss_of(model(part, right=uses_right[rank])).backward()
        same_gradients(oracle, model)
        assert model.module.never.weight.grad is None
    model.close()


@each_strategy
def accumulation(strategy):
    oracle, model = pair(mlp(), strategy=strategy)
    for step in range(2):
        oracle.zero_grad()
        model.zero_grad(set_to_none=step == 0)
        for micro in range(3):
            whole, part = batch(seed=10 * step + micro)
            loss_of(oracle(whole)).backward()
            with model.no_sync() if micro < 2 else contextlib.nullcontext(), ledger() as book:
                loss_of(model(part)).backward()
            assert (book.calls["all_reduce"] == 0) == (micro < 2 or dist.get_world_size() == 1)
        same_gradients(oracle, model)
    model.close()


@scenario
def accumulated_but_unused_in_the_last_microbatch():
    torch.manual_seed(0)
    oracle, model = pair(Branches().double())
    whole, part = batch()
    loss_of(oracle(whole, right=True)).backward()
    loss_of(oracle(whole, right=False)).backward()
    with model.no_sync():
        loss_of(model(part, right=True)).backward()
    loss_of(model(part, right=False)).backward()
    same_gradients(oracle, model)
    model.close()


@scenario
def uneven_batches():
    n, rank = dist.get_world_size(), dist.get_rank()
    oracle, model = pair(mlp())
    sizes = [3 * r if n > 1 else 4 for r in range(n)]  # rank 0 has nothing
    whole = torch.randn(sum(sizes), 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    part = whole.split(sizes)[rank]
    F.mse_loss(oracle(whole), torch.ones(len(whole), 3).double()).backward()
    losses = (model(part) - 1).square().mean(dim=1)
    (losses.sum() * model.scale(len(losses))).backward()
    same_gradients(oracle, model)
    with pytest.raises(ValueError, match="no mean over no samples"):
        model.scale(0)
    model.close()


@scenario
def two_types():
    for narrow, wide in ((torch.float32, torch.float64), (torch.bfloat16, torch.float32)):
        torch.manual_seed(0)
        module = nn.ModuleList([nn.Linear(6, 8).to(wide), nn.Linear(8, 8).to(narrow), nn.Linear(8, 2).to(wide)])

        def run(net, x, narrow=narrow, wide=wide):
            return net[2](torch.tanh(net[1](torch.tanh(net[0](x)).to(narrow))).to(wide))

        oracle, model = pair(module)
        whole, part = batch(dtype=wide)
        for _ in range(2):
            oracle.zero_grad()
            model.zero_grad()
            loss_of(run(oracle, whole)).backward()
            loss_of(run(model.module, part)).backward()
            same_gradients(oracle, model, narrow)
        model.close()


@each_strategy
def channels_last(strategy):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).double()
    oracle, model = pair(module.to(memory_format=torch.channels_last), strategy=strategy)
    whole, part = (x.view(-1, 3, 8, 8).contiguous(memory_format=torch.channels_last) for x in batch(features=192))
    for _ in range(2):
        oracle.zero_grad()
        model.zero_grad()
        loss_of(oracle(whole)).backward()
        loss_of(model(part)).backward()
        same_gradients(oracle, model)
        assert model.module[0].weight.grad.is_contiguous(memory_format=torch.channels_last)
    model.close()


@scenario
def buffers_are_those_of_rank_0():
    torch.manual_seed(dist.get_rank())
    model = wrap(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double())
    norm = model.module[1]
    _, part = batch(each=4)
    first, second = model(part), model(part * 2)  # two passes before one backward: the first still needs its buffers
    loss_of(first + second).backward()
    model.sync_buffers()
    mean = norm.running_mean.clone()
    dist.broadcast(mean, 0)
    assert torch.equal(mean, norm.running_mean)
    assert norm.num_batches_tracked.item() == 2
    whole, _ = batch(each=4)
    oracle = nn.BatchNorm1d(4).double()
    for factor in (1, 2):
        oracle(model.module[0](whole[:4] * factor))
    torch.testing.assert_close(norm.running_mean, oracle.running_mean)
    torch.testing.assert_close(norm.running_var, oracle.running_var)
    norm.num_batches_tracked.fill_(10 * dist.get_rank())
    model(part)
    assert norm.num_batches_tracked.item() == 1  # rank 0's, before the pass counted
    model.eval()
    if dist.get_rank() == 0:  # evaluating on one rank alone must not wait for the others
        model(part)
    model.close()


@each_strategy
def two_forwards_then_two_backwards(strategy):
    oracle, model = pair(mlp(), strategy=strategy)
    (whole, part), (whole_2, part_2) = batch(seed=1), batch(seed=2)
    (loss_of(oracle(whole)) * loss_of(oracle(whole_2)).detach() + loss_of(oracle(whole_2))).backward()
    one, two = model(part), model(part_2)
    # The factor is the mean over the whole batch, as a number.
    (loss_of(one) * loss_of(oracle(whole_2)).item() + loss_of(two)).backward()
    same_gradients(oracle, model)
    loss_of(oracle(whole)).backward()
    loss_of(model(part)).backward()  # adds to averages
    same_gradients(oracle, model)
    model.close()


@each_strategy
def backward_that_raises_leaves_it_usable(strategy):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(6, 20), nn.Linear(20, 20), nn.Linear(20, 3)

        def forward(self, x):
            return self.last(self.second(Raises.apply(self.first(x))))

    torch.manual_seed(0)
    oracle, model = pair(Net().double(), strategy=strategy)
    whole, part = batch()
    for _ in range(2):
        Raises.armed = True
        with pytest.raises(ArithmeticError, match="as told"):
            loss_of(model(part)).backward()
        Raises.armed = False
        oracle.zero_grad()
        model.zero_grad()
        loss_of(oracle(whole)).backward()
        loss_of(model(part)).backward()
        same_gradients(oracle, model)
    model.close()


@scenario
def checkpointed_segments():
    class Net(nn.Module):
        def __init__(self, *, reentrant):
            super().__init__()
            self.layers, self.reentrant = nn.ModuleList(nn.Linear(6, 6) for _ in range(4)), reentrant

        def forward(self, x):
            for layer in self.layers:
                x = torch.tanh(checkpoint(layer, x, use_reentrant=self.reentrant))
            return x

    for reentrant in (False, True):
        torch.manual_seed(0)
        oracle, model = pair(Net(reentrant=reentrant).double())
        whole, part = (x.requires_grad_() for x in batch())
        for _ in range(2):
            oracle.zero_grad()
            model.zero_grad()
            loss_of(oracle(whole)).backward()
            loss_of(model(part)).backward()
            same_gradients(oracle, model)
        model.close()


@scenario
def second_gradient_in_one_pass_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.shared(self.other(checkpoint(self.shared, x, use_reentrant=True)))

    model = wrap(Net().double())
    _, part = batch()
    if dist.get_world_size() > 1:
        with pytest.raises(RuntimeError, match=r"shared\.(weight|bias) got a second gradient.*use_reentrant=False"):
            loss_of(model(part.requires_grad_())).backward()
    model.close()


@scenario
def buckets_leave_while_backward_runs():
    """Events in order: the last layers' bucket is under way before the first layer's gradient exists."""
    from mlsys.parallel import data_parallel

    events = []
    send = data_parallel.all_reduce

    def recording(tensor, *args, **kwargs):
        events.append("send")
        return send(tensor, *args, **kwargs)

    model = wrap(mlp())
    model.module[0].weight.register_post_accumulate_grad_hook(lambda _: events.append("first layer"))
    _, part = batch()
    data_parallel.all_reduce = recording
    try:
        for _ in range(2):
            events.clear()
            loss_of(model(part)).backward()
    finally:
        data_parallel.all_reduce = send
    model.close()
    if dist.get_world_size() > 1:
        assert events.index("send") < events.index("first layer")
        assert events.count("send") == len(model._buckets) >= 3


@scenario
def buckets_follow_the_order_of_rank_0():
    torch.manual_seed(0)
    oracle, model = pair(Backwards().double())
    whole, part = batch()
    for _ in range(3):
        oracle.zero_grad()
        model.zero_grad()
        loss_of(oracle(whole)).backward()
        loss_of(model(part)).backward()
        same_gradients(oracle, model)
    names = {parameter: name.split(".")[0] for name, parameter in model.module.named_parameters()}
    if dist.get_world_size() > 1:
        layers = [names[bucket.parameters[-1]] for bucket in model._buckets]
        assert layers == sorted(layers, key=["third", "second", "first"].index)
    model.close()


@scenario
def hooks_in_another_order_on_each_rank():
    """Two towers, of which odd ranks run the second first: buckets must still meet their like."""

    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 12), nn.Linear(6, 12)

        def forward(self, x, *, swap):
            first, second = (self.b, self.a) if swap else (self.a, self.b)
            return first(x).square() + second(x).cos()  # not symmetric: a mix-up of the towers shows

    torch.manual_seed(0)
    oracle, model = pair(Towers().double())
    n, rank = dist.get_world_size(), dist.get_rank()
    whole, part = batch()
    for _ in range(3):
        oracle.zero_grad()
        model.zero_grad()
        loss_of(torch.cat([oracle(whole[2 * r : 2 * r + 2], swap=bool(r % 2)) for r in range(n)])).backward()
        loss_of(model(part, swap=bool(rank % 2))).backward()
        same_gradients(oracle, model)
    model.close()


@each_strategy
def gradients_that_share_memory(strategy):
    """Autograd hands one tensor to two readers: reducing it in place for one would corrupt it for the other."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 300)
            self.added = nn.Parameter(torch.ones(2, 150))

        def forward(self, x):
            return torch.tanh(self.first(x).sum(dim=0) + self.added.view(-1))

    torch.manual_seed(0)
    oracle, model = pair(Net().double(), strategy=strategy)
    whole, part = batch()
    for _ in range(3):
        oracle.zero_grad()
        model.zero_grad()
        n = dist.get_world_size()
        torch.stack([loss_of(oracle(whole[2 * r : 2 * r + 2])) for r in range(n)]).mean().backward()
        loss_of(model(part)).backward()
        same_gradients(oracle, model)
    model.close()


@scenario
def gradients_are_views_of_the_buckets():
    if dist.get_world_size() == 1:
        return
    model = wrap(mlp(), strategy="flat")
    _, part = batch()
    for _ in range(2):
        model.zero_grad()
        loss_of(model(part)).backward()
        (bucket,) = model._buckets
        inside = range(bucket.flat.data_ptr(), bucket.flat.data_ptr() + bucket.flat.nbytes)
        assert all(p.grad.data_ptr() in inside for p in model.module.parameters())
    for parameter in model.module.parameters():
        parameter.grad = torch.ones_like(parameter)  # a stranger's tensor is taken in
    loss_of(model(part)).backward()
    assert all(p.grad.data_ptr() in inside for p in model.module.parameters())
    model.close()


@scenario
def sends_what_the_formula_says():
    n = dist.get_world_size()
    module = mlp(torch.float32)
    numbers = sum(p.numel() for p in module.parameters()) + len(list(module.parameters()))  # one flag a parameter
    _, part = batch(dtype=torch.float32)
    for strategy in STRATEGIES:
        model = wrap(copy.deepcopy(module), strategy=strategy, group=None, algorithm="backend")
        for _ in range(2):
            with ledger() as book:
                loss_of(model(part)).backward()
        want = zero.communication(numbers, n, 0, bytes_gradients=4)
        assert book.bytes["all_reduce"] == pytest.approx(want, rel=1e-12)
        assert book.calls["all_reduce"] == (len(model._buckets) if n > 1 else 0)
        assert sum(book.calls.values()) == book.calls["all_reduce"]
        model.close()


@scenario
def given_groups():
    n = dist.get_world_size()
    whole, part = batch()
    for options in ({"group": None}, {"group": dist.group.WORLD}, {"group": None, "algorithm": "backend"}):
        oracle, model = pair(mlp(), **options)
        assert model.size == n
        loss_of(oracle(whole)).backward()
        loss_of(model(part)).backward()
        same_gradients(oracle, model)
        model.close()
    with pytest.raises(ValueError, match="strategy='ring'"):
        DataParallel(mlp(), strategy="ring")


@scenario
def each_algorithm_of_all_reduces():
    whole, part = batch()
    for algorithm in ("auto", *ALGORITHMS["all_reduce"], "shared_memory", "backend"):
        oracle, model = pair(nn.Sequential(mlp(), nn.BatchNorm1d(3, affine=False).double()), algorithm=algorithm)
        oracle.eval()
        model.eval()  # which sends no buffers by itself
        for _ in range(2):
            oracle.zero_grad()
            model.zero_grad()
            model.sync_buffers()
            loss_of(oracle(whole)).backward()
            (loss_of(model(part)) * model.scale(1)).backward()
            same_gradients(oracle, model)
        same_everywhere(model)
        with ledger() as book:
            loss_of(model(part)).backward()
        if algorithm != "auto" and dist.get_world_size() > 1:
            assert {row.algorithm for row in book.rows} == {algorithm}
        model.close()
    with pytest.raises(ValueError, match="algorithm='pairwise' is not known"):
        wrap(mlp(), algorithm="pairwise")
    if dist.get_world_size() > 1:  # refused where it is made, not in a hook
        with (
            Communicator(shared_memory=False, links=Links()) as group,
            pytest.raises(ValueError, match="'shared_memory': that takes a Communicator"),
        ):
            wrap(mlp(), group=group, algorithm="shared_memory")


@scenario
def replaced_parameters_are_refused():
    _, part = batch()

    def layer(net):
        net[0] = nn.Linear(6, 20).double()

    def parameter(net):
        net[2].weight = nn.Parameter(net[2].weight.detach().clone())

    def load(net):
        net.load_state_dict(mlp(seed=3).state_dict(), assign=True)

    def another(net):
        net.extra = nn.Parameter(torch.zeros(2))

    def fewer(net):
        net[4].bias = None

    names = {layer: "0.bias, 0.weight", parameter: "2.weight", load: "0.bias.*4.weight", another: "extra", fewer: "4.b"}
    for replace, name in names.items():
        for sync in (contextlib.nullcontext, DataParallel.no_sync):
            model = wrap(mlp())
            replace(model.module)
            with sync(model) if sync is DataParallel.no_sync else sync():
                with pytest.raises(RuntimeError, match=f"^{name}.* changed since DataParallel was made.*make another"):
                    model(part)
                with torch.no_grad():  # nothing to average
                    model(part)
            model.close()
    model = wrap(mlp())
    parameter(model.module)
    if dist.get_world_size() > 1:  # past the door: the hooks that are left notice
        with pytest.raises(RuntimeError, match=r"2\.weight changed"):
            loss_of(model.module(part)).backward()
    model.close()
    oracle, model = pair(mlp())
    state = mlp(seed=3).state_dict()
    with pytest.raises(ValueError, match=r"assign=True replaces the parameters.*before wrapping"):
        model.load_state_dict(state, assign=True)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})
    model.load_state_dict({}, strict=False)
    oracle.load_state_dict(state)
    model.load_state_dict(state)
    whole, part = batch()
    loss_of(oracle(whole)).backward()
    loss_of(model(part)).backward()
    same_gradients(oracle, model)
    model.close()


@scenario
def subgroups():
    """Two halves of the ranks, each with a model of its own."""
    n, rank = dist.get_world_size(), dist.get_rank()
    groups = [dist.new_group(list(range(start, n, 2))) for start in range(min(n, 2))]
    members = list(range(rank % 2, n, 2))
    whole, part = batch()
    oracle = mlp(seed=rank % 2)
    model = wrap(mlp(seed=rank % 2), group=groups[rank % 2])
    loss_of(oracle(torch.cat([whole[2 * r : 2 * r + 2] for r in members]))).backward()
    loss_of(model(part)).backward()
    same_gradients(oracle, model)
    model.close()


@scenario
def waiting_is_told_to_the_timeline():
    class Timeline:
        def __init__(self):
            self.kinds = []

        @contextlib.contextmanager
        def span(self, kind, name):
            self.kinds.append((kind, name))
            yield

        def add(self, kind, name, start_s, end_s):
            pass

    timeline = Timeline()
    model = wrap(mlp(), timeline=timeline)
    loss_of(model(batch()[1])).backward()
    if dist.get_world_size() > 1:
        assert {kind for kind, _ in timeline.kinds} == {"waiting"}
        assert ("waiting", "bucket 0") in timeline.kinds
    model.close()


@scenario
def state_dict_has_the_names_of_one_process():
    model = wrap(mlp())
    state = model.state_dict()
    assert list(state) == list(mlp().state_dict())
    model.load_state_dict(mlp(seed=5).state_dict())
    assert torch.equal(model.module[0].weight, mlp(seed=5)[0].weight)
    model.close()


@scenario
def closed_it_no_longer_reduces():
    _, part = batch()
    model = wrap(mlp())
    model.close()
    with ledger() as book:
        loss_of(model.module(part)).backward()
    assert book.rows == ()


@scenario
def different_modules_are_refused_on_every_rank():
    n, rank = dist.get_world_size(), dist.get_rank()
    if n == 1:
        return
    last = n - 1
    with pytest.raises(ValueError, match=rf"rank 0 has 0.weight \(6, 6\).*, rank {last} has 0.weight \(7, 6\)"):
        DataParallel(nn.Sequential(nn.Linear(6, 7 if rank == last else 6)))
    with pytest.raises(ValueError, match=rf"0.weight.*float32.*, rank {last} has 0.weight.*float64"):
        DataParallel(nn.Sequential(nn.Linear(6, 6)).to(torch.float64 if rank == last else torch.float32))
    with pytest.raises(ValueError, match=rf"rank {last} has 1.weight .*, rank 0 has nothing in its place"):
        DataParallel(nn.Sequential(nn.Linear(6, 6), *([nn.Linear(6, 6)] if rank == last else [])))
    with pytest.raises(ValueError, match=rf"rank 0 has b .*, rank {last} has a "):
        DataParallel(nn.ParameterDict({"a" if rank == last else "b": torch.ones(3)}))
    with pytest.raises(
        ValueError, match=rf"strides \(18, 9, 3, 1\), rank {last} has weight .* strides \(18, 1, 6, 2\)"
    ):
        DataParallel(
            nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last if rank == last else torch.contiguous_format)
        )
    module = nn.Linear(6, 6)
    module.bias.requires_grad_(rank != last)
    with pytest.raises(ValueError, match="without gradient"):
        DataParallel(module)


@scenario
def what_cannot_be_reduced_is_refused():
    refused = {
        "sparse=False": nn.Embedding(4, 3, sparse=True),
        "no parameter of the module has requires_grad": nn.Linear(3, 3).requires_grad_(False),
        "has no shape yet": nn.LazyLinear(3),
        "meta device": nn.Linear(3, 3, device="meta"),
    }
    for message, module in refused.items():
        with pytest.raises(ValueError, match=message):
            DataParallel(module)
    expanded = nn.Linear(3, 3)
    expanded.register_buffer("table", torch.zeros(1).expand(4))
    with pytest.raises(ValueError, match=r"table of shape \(4,\) is expanded.*\.clone\(\)"):
        DataParallel(expanded)
    expanded.table = expanded.table.clone()
    expanded.single = torch.zeros(1).expand(1)  # of one number: nothing is shared
    DataParallel(expanded).close()
    expanded.weight = nn.Parameter(torch.zeros(3, 1).expand(3, 3))
    with pytest.raises(ValueError, match=r"weight of shape \(3, 3\) is expanded"):
        DataParallel(expanded)
    for options in ({"bucket_mb": 0}, {"first_bucket_mb": -1}):
        with pytest.raises(ValueError, match="MB above 0"):
            DataParallel(nn.Linear(3, 3), **options)
    with pytest.raises(TypeError, match="instance of a Compressor"):
        DataParallel(nn.Linear(3, 3), compress="bf16")
    if dist.get_world_size() == 1:
        return
    _, part = batch()
    model = wrap(mlp())
    with pytest.raises(RuntimeError, match=r"use torch\.autograd\.grad"):
        loss_of(model(part)).backward(create_graph=True)
    model.close()
    model = wrap(mlp(torch.float32))
    model.double()
    with pytest.raises(RuntimeError, match="before wrapping"):
        loss_of(model(part)).backward()
    model.close()


# --- the tests --------------------------------------------------------------------------------------------------------


def run_all():
    """What went wrong on this rank, by scenario. One that fails on a rank must not leave the others waiting for it."""
    problems = {}
    SHARED.append(Communicator())
    for name, run in SCENARIOS.items():
        try:
            run()
        except AssertionError as error:
            problems[name] = str(error) or repr(error)
        dist.barrier()
    return problems


@pytest.fixture(scope="module", params=range(1, 6))
def problems(request):
    """What went wrong on each of n ranks."""
    return launch(run_all, request.param, timeout=120.0)


@pytest.mark.parametrize("name", SCENARIOS)
def test_on_ranks(problems, name):
    assert [problems_of_rank.get(name) for problems_of_rank in problems] == [None] * len(problems)
