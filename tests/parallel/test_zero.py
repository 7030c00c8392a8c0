"""Training with ZeRO is training on one process, and each rank holds and sends what the formulas say."""

import contextlib
import copy
import itertools
import time

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from mlsys.models.transformer import Transformer
from mlsys.parallel import LaunchError, launch
from mlsys.parallel._flat import ALIGN, by_elements, by_tensors, padded
from mlsys.parallel.collectives import Communicator, Links
from mlsys.parallel.traffic import ledger
from mlsys.parallel.zero import ZeRO1, ZeRO2
from mlsys.parallel.zero3 import ZeRO3
from mlsys.perf import zero
from mlsys.perf.configs import gpt, llama

STAGES = {1: ZeRO1, 2: ZeRO2, 3: ZeRO3}
SPLITS = ("elements", "tensors")
ADAM_BYTES = {None: (4, 4, 8), torch.bfloat16: (2, 2, 12)}  # of weights, gradients, optimizer state


# --- models, batches, and the one process to compare with -------------------------------------------------------------


class Net(nn.Module):
    """Blocks of unlike sizes, a scalar, an empty tensor; on request a tied, a frozen and an unused weight."""

    def __init__(self, *, tied=False, frozen=False, unused=False):
        super().__init__()
        self.embedding = nn.Linear(5, 9, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0))
        self.blocks = nn.ModuleList([nn.Linear(9, 9) for _ in range(3)])
        self.norm = nn.LayerNorm(9)
        self.head = nn.Linear(9, 5, bias=False)
        self.register_buffer("offset", torch.full((5,), 0.25))
        if tied:
            self.embedding = nn.Linear(9, 9, bias=False)
            self.blocks[2].weight = self.embedding.weight
        if frozen:
            self.blocks[1].requires_grad_(False)
            self.norm.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(7)) if unused else None

    def forward(self, x):
        x = self.embedding(torch.nn.functional.pad(x, (0, self.embedding.in_features - x.shape[-1])))
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(self.norm(x) * self.scale) + self.offset


def net(dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    return Net(**options).to(dtype)


OPEN = {}  # what a rank opens once for all that it wraps


def shared():
    """One communicator for all models of a launch: opening it takes longer than to train one."""
    if not OPEN:
        OPEN["communicator"] = Communicator(links=Links(1e-5, 1e-9))
    return OPEN["communicator"]


def wrap(stage, module, **options):
    """In a few buckets. Ranks but the first begin with nonsense: rank 0's weights count."""
    if dist.get_rank():
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.fill_(7)
    if stage < 3:
        options = {"bucket_mb": 7e-4} | options
    return STAGES[stage](module, shared(), **options)


def batch(step, each=2, dtype=torch.float64):
    """Inputs and targets: of all ranks together, and this rank's."""
    generator = torch.Generator().manual_seed(100 + step)
    n, rank = dist.get_world_size(), dist.get_rank()
    whole = [torch.randn(each * n, 5, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]
    return whole, [tensor[rank * each : (rank + 1) * each] for tensor in whole]


def loss(model, inputs, targets):
    return ((model(inputs) - targets) ** 2).mean()


def gradients(model):
    """The whole gradients by name, put together from the pieces of all ranks, with how often each number came."""
    mine = [(p.name, p.shape, p.start, p.stop, p.tensor.grad) for p in model.pieces()]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    whole = {}
    for name, shape, start, stop, grad in itertools.chain.from_iterable(everyone):
        if grad is not None:
            total = whole.setdefault(name, torch.zeros(shape, dtype=grad.dtype))
            total.view(-1)[start:stop] += grad.reshape(-1)
    return whole


def close(got, want, tolerance=1e-12, names=None):
    for name in names or want:
        error = (got[name] - want[name]).abs().max() if want[name].numel() else 0
        assert error <= tolerance * (1 + want[name].abs().max() if want[name].numel() else 1), (name, error)


def grads_of(oracle):
    """As ZeRO has them: 0 where one process has none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in oracle.named_parameters()
        if p.requires_grad and p.numel()
    }


def same_everywhere(state):
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, state)
    for other in everyone:
        assert other.keys() == state.keys()
        assert all(torch.equal(other[name], state[name]) for name in state)


def decayed(module):
    """Two groups, by the number of dimensions."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.3},
        {"params": [p for p in parameters if p.ndim < 2], "lr": 0.03},
    ]


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, None, {"lr": 0.2}),
    "momentum": (torch.optim.SGD, None, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, None, {"lr": 0.02, "eps": 1e-4, "amsgrad": True}),
    "adamw": (torch.optim.AdamW, decayed, {"lr": 0.02, "eps": 1e-4, "fused": True}),
}


def train(stage, name, split, steps=2, **options):
    """Weights and gradients after each step, against one process with the whole batch."""
    model_options = {key: options.pop(key) for key in ("tied", "frozen", "unused") if key in options}
    cls, groups, settings = OPTIMIZERS[name]
    oracle, model = net(**model_options), wrap(stage, net(**model_options), split=split, **options)
    want = cls(groups(oracle) if groups else [p for p in oracle.parameters() if p.requires_grad], **settings)
    got = model.optimizer(cls, groups(model.module) if groups else None, **settings)
    close(model.full_state_dict(), oracle.state_dict())
    for step in range(steps):
        whole, mine = batch(step)
        want.zero_grad()
        loss(oracle, *whole).backward()
        for p in oracle.parameters():
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)
        got.zero_grad()
        value = loss(model, *mine)
        value.backward()
        if step:
            close(gradients(model), grads_of(oracle))
        want.step()
        got.step()
    state = model.full_state_dict()
    assert list(state) == list(oracle.state_dict())
    close(state, oracle.state_dict())
    same_everywhere(state)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_and_weights_are_those_of_one_process(stage, n):
    def ranks():
        train(stage, "momentum", "tensors")
        train(stage, "adamw", "elements")
        if n == 2:
            train(stage, "sgd", "elements")
            train(stage, "adam", "tensors")

    launch(ranks, n)


@pytest.mark.parametrize("stage", STAGES)
def test_tied_frozen_and_unused_parameters(stage):
    def ranks():
        for options in ({"tied": True}, {"frozen": True}, {"unused": True}):
            train(stage, "momentum", "elements", **options)
        train(stage, "adamw", "tensors", tied=True, frozen=True, unused=True)

    launch(ranks, 3)


@pytest.mark.parametrize("stage", [1, 2])
def test_parameter_that_one_rank_alone_uses_has_its_share_of_the_mean(stage):
    def ranks():
        torch.manual_seed(0)
        layers = nn.ModuleList([nn.Linear(5, 5) for _ in range(3)]).double()
        model = wrap(stage, layers)
        (_, _), (x, _) = batch(0)
        rank = dist.get_rank()
        # In another order on every rank, too.
        chosen = [layers[i](x) for i in ((0, 2), (2, 1))[rank]]
        sum(chosen).sum().backward()
        own = torch.autograd.grad(
            sum(layers[i](x) for i in ((0, 2), (2, 1))[rank]).sum(), layers.parameters(), allow_unused=True
        )
        everyone = [None] * 2
        dist.all_gather_object(
            everyone, [torch.zeros(p.shape) if g is None else g for g, p in zip(own, layers.parameters())]
        )
        want = {name: (a + b) / 2 for (name, _), a, b in zip(layers.named_parameters(), *everyone)}
        close(gradients(model), want)

    launch(ranks, 2)


@pytest.mark.parametrize("stage", STAGES)
def test_accumulated_gradients_are_those_of_the_whole_batch(stage):
    def ranks():
        for quiet, none in ((True, True), (False, True), (True, False), (False, False)):
            oracle, model = net(), wrap(stage, net())
            optimizer = model.optimizer(torch.optim.SGD, lr=0.1)
            want = torch.optim.SGD(oracle.parameters(), lr=0.1)
            for step in range(2):
                optimizer.zero_grad(set_to_none=none)
                want.zero_grad()
                for part in range(3):
                    whole, mine = batch(10 * step + part)
                    loss(oracle, *whole).backward()
                    with model.no_sync() if quiet and part < 2 else contextlib.nullcontext():
                        loss(model, *mine).backward()
                close(gradients(model), grads_of(oracle))
                want.step()
                optimizer.step()
                close(model.full_state_dict(), oracle.state_dict())
            # More after a reduced one, some of it quiet.
            for part, silent in enumerate((False, True, True, False)):
                whole, mine = batch(50 + part)
                loss(oracle, *whole).backward()
                with model.no_sync() if silent else contextlib.nullcontext():
                    loss(model, *mine).backward()
            close(gradients(model), grads_of(oracle))

    launch(ranks, 3)


@pytest.mark.parametrize("stage", STAGES)
def test_gradient_norm_is_over_all_ranks(stage):
    def ranks():
        for kind, most, split in (
            (2.0, 0.05, "elements"),
            (1.0, 0.3, "tensors"),
            (float("inf"), 0.01, "elements"),
            (2.0, 1e6, "tensors"),
        ):
            oracle, model = net(frozen=True), wrap(stage, net(frozen=True), split=split)
            whole, mine = batch(0)
            loss(oracle, *whole).backward()
            loss(model, *mine).backward()
            want = nn.utils.clip_grad_norm_(oracle.parameters(), most, norm_type=kind)
            got = model.clip_grad_norm(most, norm_type=kind)
            assert got.dtype == want.dtype
            assert abs(got - want) < 1e-12 * want
            close(gradients(model), grads_of(oracle))

    launch(ranks, 3)


def test_norm_of_nothing_of_nan_and_of_infinity():
    def ranks():
        for value in (float("nan"), float("inf")):
            oracle, model = net(), wrap(2, net())
            assert model.clip_grad_norm(1.0) == 0
            whole, mine = batch(0)
            loss(oracle, *whole).backward()
            loss(model, *mine).backward()
            oracle.embedding.weight.grad.view(-1)[0] = value
            for piece in model.pieces():
                if piece.name == "embedding.weight" and piece.start == 0:
                    piece.tensor.grad[0] = value
            for kind in (2.0, float("inf")):
                want = nn.utils.clip_grad_norm_(oracle.parameters(), 0.1, norm_type=kind)
                got = model.clip_grad_norm(0.1, norm_type=kind)
                torch.testing.assert_close(got, want, equal_nan=True)
            whole = gradients(model)
            for name, grad in grads_of(oracle).items():
                torch.testing.assert_close(whole[name], grad, equal_nan=True)

    launch(ranks, 2)


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_weights_follow_float32_masters(stage):
    def ranks():
        oracle = net(torch.float32)  # the masters
        model = wrap(stage, net(torch.float32), dtype=torch.bfloat16)
        optimizer = model.optimizer(torch.optim.SGD, lr=0.05, momentum=0.9)
        want = torch.optim.SGD(oracle.parameters(), lr=0.05, momentum=0.9)
        n = dist.get_world_size()
        for step in range(3):
            whole, mine = batch(step, dtype=torch.float32)
            optimizer.zero_grad()
            want.zero_grad()
            parts = zip(*(tensor.chunk(n) for tensor in whole))
            for inputs, targets in parts:  # each rank's gradient in bfloat16, their mean in float32
                low = copy.deepcopy(oracle)
                low.requires_grad_(True)
                for p in low.parameters():
                    p.data, p.grad = p.data.bfloat16(), None
                loss(low, inputs.bfloat16(), targets).backward()
                for p, q in zip(oracle.parameters(), low.parameters()):
                    if q.numel():
                        p.grad = q.grad.float() / n + (0 if p.grad is None else p.grad)
            output = model(mine[0])
            ((output - mine[1]) ** 2).mean().backward()
            for piece in model.pieces():
                assert piece.tensor.dtype == torch.float32
                assert piece.tensor.grad.dtype == torch.bfloat16
            close({k: g.float() for k, g in gradients(model).items()}, grads_of(oracle), 2**-6)
            clipped = model.clip_grad_norm(0.2)
            assert abs(clipped - nn.utils.clip_grad_norm_(oracle.parameters(), 0.2)) < 0.02 * clipped
            want.step()
            optimizer.step()
            state = model.full_state_dict()
            assert state["scale"].dtype == torch.float32
            close(state, oracle.state_dict(), 2**-8)
            if stage < 3:  # what the module computes with are the masters, rounded
                for name, p in model.module.named_parameters():
                    assert torch.equal(p, state[name].bfloat16())

    launch(ranks, 3)


def test_float32_sums_of_bfloat16_microbatches():
    """256 and eight ones: in bfloat16, 256 + 1 is 256."""

    def ranks():
        for stage in (2, 3):
            model = wrap(stage, nn.Linear(1, 1, bias=False), dtype=torch.bfloat16)
            for value in (256.0, *[1.0] * 8):
                model(torch.full((1, 1), value)).sum().backward()
            grads = [piece.tensor.grad for piece in model.pieces()]
            assert [g.item() for g in grads] == ([264.0] if dist.get_rank() == 0 else [])

    launch(ranks, 2)


@pytest.mark.parametrize("stage", STAGES)
def test_optimizers_of_whole_tensors(stage):
    def ranks():
        for cls, settings in ((torch.optim.Adafactor, {"lr": 0.05}), (torch.optim.Muon, {"lr": 0.05})):
            oracle, model = net(torch.float32), wrap(stage, net(torch.float32), split="tensors")
            pick = [name for name, p in oracle.named_parameters() if p.ndim == 2 or cls is torch.optim.Adafactor]
            pick = [name for name in pick if dict(oracle.named_parameters())[name].numel()]
            want = cls([dict(oracle.named_parameters())[name] for name in pick], **settings)
            got = model.optimizer(cls, [dict(model.module.named_parameters())[name] for name in pick], **settings)
            for step in range(2):
                whole, mine = batch(step, dtype=torch.float32)
                for optimizer, which, data in ((want, oracle, whole), (got, model, mine)):
                    optimizer.zero_grad()
                    loss(which, *data).backward()
                    optimizer.step()
                close(model.full_state_dict(), oracle.state_dict(), 2e-3 if cls is torch.optim.Muon else 1e-5)

    launch(ranks, 3)


def test_two_optimizers_schedulers_and_closures():
    def ranks():
        for stage in STAGES:
            oracle, model = net(), wrap(stage, net())
            made = []
            for owner, module in ((None, oracle), (model, model.module)):
                matrices, rest = ([p for p in module.parameters() if (p.ndim == 2) is two] for two in (True, False))
                pair = [
                    cls(group, **options) if owner is None else owner.optimizer(cls, group, **options)
                    for cls, group, options in (
                        (torch.optim.SGD, matrices, {"lr": 0.1, "momentum": 0.5}),
                        (
                            torch.optim.Adam,
                            [{"params": rest[:1]}, {"params": rest[1:], "lr": 0.01}],
                            {"lr": 0.02, "eps": 1e-4},
                        ),
                    )
                ]
                made.append([(o, torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5)) for o in pair])
            for step in range(3):
                whole, mine = batch(step)
                for which, data, pairs in ((oracle, whole, made[0]), (model, mine, made[1])):

                    def closure(which=which, data=data, pairs=pairs):
                        for optimizer, _ in pairs:
                            optimizer.zero_grad()
                        value = loss(which, *data)
                        value.backward()
                        return value

                    (first, one), (second, two) = pairs
                    first.step(closure)  # computes the gradients
                    second.step()
                    one.step()
                    two.step()
                close(model.full_state_dict(), oracle.state_dict())
            assert [g["lr"] for o, _ in made[1] for g in o.param_groups] == [
                g["lr"] for o, _ in made[0] for g in o.param_groups
            ]

    launch(ranks, 3)


@pytest.mark.parametrize("stage", STAGES)
def test_uneven_batches_count_each_sample_once(stage):
    def ranks():
        oracle, model = net(), wrap(stage, net())
        (inputs, targets), _ = batch(0)
        sizes = [1, 0, 5]
        begin = sum(sizes[: dist.get_rank()])
        mine = slice(begin, begin + sizes[dist.get_rank()])
        loss(oracle, inputs, targets).backward()
        losses = ((model(inputs[mine]) - targets[mine]) ** 2).mean(dim=1)
        (losses.sum() * model.scale(len(losses))).backward()
        close(gradients(model), grads_of(oracle))
        with pytest.raises(ValueError, match="no mean over no samples"):
            model.scale(0)

    launch(ranks, 3)


def test_closure_with_bfloat16_gradients():
    def ranks():
        model = wrap(2, net(torch.float32), dtype=torch.bfloat16)
        optimizer = model.optimizer(torch.optim.AdamW, lr=0.01, fused=False)
        _, mine = batch(0, dtype=torch.float32)

        def closure():
            optimizer.zero_grad()
            value = loss(model, *mine)
            value.backward()
            return value

        values = [float(optimizer.step(closure).detach()) for _ in range(5)]
        assert values == sorted(values, reverse=True)

    launch(ranks, 2)


# --- scaled losses ----------------------------------------------------------------------------------------------------


def wide(stage, n_weights=64, **options):
    """One weight, of which rank 1 of two has the second half; rank 0 has all of it with split="tensors"."""
    torch.manual_seed(0)
    return STAGES[stage](nn.Linear(n_weights, 1, bias=False), shared(), **options)


SCALED = {  # optimizer, its settings, settings of the model
    "plain": (torch.optim.Adam, {"eps": 1e-4}, {}),
    "fused": (torch.optim.AdamW, {"eps": 1e-4, "fused": True}, {}),
    "a rank without a piece": (torch.optim.SGD, {"momentum": 0.9}, {"split": "tensors"}),
    "float16": (torch.optim.Adam, {"eps": 1e-4}, {"dtype": torch.float16}),
    "float16, fused": (torch.optim.SGD, {"fused": True}, {"dtype": torch.float16}),
}


@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_in_one_ranks_slice_leaves_the_step_out_on_all(stage):
    def ranks():
        for (cls, settings, options), first in itertools.product(SCALED.values(), (True, False)):
            model, oracle = wide(stage, **options), nn.Linear(64, 1, bias=False)
            oracle.load_state_dict(model.full_state_dict())
            optimizer = model.optimizer(cls, lr=0.01, **settings)
            want = cls(oracle.parameters(), lr=0.01, **settings)
            scaler = ShardedGradScaler("cpu", init_scale=8.0)
            dtype = options.get("dtype", torch.float32)
            for step, scale_after in enumerate((8.0, 4.0, 4.0)):
                before = model.full_state_dict()["weight"]
                x = torch.linspace(-1, 1, 64).view(1, 64) * (step + 1)
                if step == 1:
                    x[0, 63] = torch.finfo(dtype).max / 4  # 8 times that is too large
                optimizer.zero_grad()
                scaler.scale(model(x).float().sum()).backward()
                if first:
                    scaler.unscale_(optimizer)
                finite = [bool(piece.tensor.grad.isfinite().all()) for piece in model.pieces()]
                everyone = [None] * 2
                dist.all_gather_object(everyone, finite)
                assert sum(all(of_rank) for of_rank in everyone) == (1 if step == 1 else 2)
                if first and step != 1:
                    norm = model.clip_grad_norm(1.0)
                    assert abs(norm - x.norm()) < 1e-2 * norm
                scaler.step(optimizer)
                scaler.update()
                assert scaler.get_scale() == scale_after
                after = model.full_state_dict()["weight"]
                if step == 1:
                    assert torch.equal(after, before)
                    continue
                want.zero_grad()
                oracle(x).sum().backward()
                if first:
                    nn.utils.clip_grad_norm_(oracle.parameters(), 1.0)
                want.step()
                torch.testing.assert_close(
                    after, oracle.weight.detach(), rtol=0, atol=1e-6 if dtype.itemsize == 4 else 1e-3
                )

    launch(ranks, 2)


def test_what_is_unscaled_from_float16_is_float32():
    """1.37 · 2⁻²⁰ has five bits in float16."""

    def ranks():
        for stage in STAGES:
            model = wide(stage, dtype=torch.float16)
            optimizer = model.optimizer(torch.optim.SGD, lr=1.0)
            scaler = ShardedGradScaler("cpu", init_scale=2.0**16)
            x = torch.full((1, 64), 1.37 * 2**-8).half()
            scaler.scale(model(x).float().sum() * 2**-12).backward()
            scaler.unscale_(optimizer)
            for piece in model.pieces():
                assert piece.tensor.grad.dtype == torch.float32
                assert (piece.tensor.grad == x[0, 0].float() * 2**-12).all()

    launch(ranks, 2)


@pytest.mark.parametrize("stage", STAGES)
def test_a_scaler_that_asks_one_rank_alone_is_refused_on_all(stage):
    def ranks():
        for fused, first in itertools.product((False, True), repeat=2):
            model = wide(stage, split="tensors")  # rank 1 has nothing that could overflow
            before = model.full_state_dict()["weight"]
            optimizer = model.optimizer(torch.optim.Adam, lr=0.01, fused=fused)
            scaler = torch.amp.GradScaler("cpu")
            scaler.scale(model(torch.ones(1, 64)).sum()).backward()
            if first:
                scaler.unscale_(optimizer)
            with pytest.raises(TypeError, match=r"GradScaler would leave this step out on .* ShardedGradScaler"):
                scaler.step(optimizer)
            assert torch.equal(model.full_state_dict()["weight"], before)
            torch.amp.GradScaler("cpu", enabled=False).step(optimizer)  # it does nothing
            assert not torch.equal(model.full_state_dict()["weight"], before)

    launch(ranks, 2)


# --- what goes wrong --------------------------------------------------------------------------------------------------


class Raises(torch.autograd.Function):
    """The identity, whose backward pass fails."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ArithmeticError("as told")


@pytest.mark.parametrize("stage", STAGES)
def test_after_a_backward_pass_that_raised_the_next_is_right(stage):
    def ranks():
        oracle, model = net(), wrap(stage, net())
        optimizer = model.optimizer(torch.optim.SGD, lr=0.1)
        whole, mine = batch(0)
        handle = model.module.blocks[1].register_forward_hook(lambda *a: Raises.apply(a[-1]))
        with pytest.raises(ArithmeticError):
            loss(model, *mine).backward()
        handle.remove()
        optimizer.zero_grad()
        loss(oracle, *whole).backward()
        loss(model, *mine).backward()
        close(gradients(model), grads_of(oracle))

    launch(ranks, 2)


@pytest.mark.parametrize("stage", STAGES)
def test_backward_through_weights_of_before_the_step_is_refused(stage):
    def ranks():
        model = wrap(stage, net())
        optimizer = model.optimizer(torch.optim.SGD, lr=0.1)
        _, mine = batch(0)
        value = loss(model, *mine)
        value.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()

    launch(ranks, 2)


@pytest.mark.parametrize("stage", STAGES)
def test_the_wrapper_has_no_parameters_and_stays_where_it_is(stage):
    def ranks():
        oracle, model = net(), wrap(stage, net())
        for ask in (
            lambda: torch.optim.SGD(model.parameters(), lr=0.1),
            model.named_parameters,
            lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
            lambda: model.requires_grad_(False),
        ):
            with pytest.raises(TypeError, match=rf"ZeRO{stage}\.parameters\(\): .* by model\.optimizer\(cls, lr=…\)"):
                ask()
        for move in (
            lambda: model.to("cpu"),
            lambda: model.to(torch.float64),
            model.double,
            model.cuda,
            lambda: model.to_empty(device="cpu"),
            model.share_memory,
        ):
            with pytest.raises(RuntimeError, match=rf"ZeRO{stage} .* convert the module before it is wrapped"):
                move()
        assert [p.shape for p in model.module.parameters()] == [p.shape for p in oracle.parameters()]
        assert [p.requires_grad for p in model.module.parameters()] == [True] * len(list(oracle.parameters()))
        assert model.train() is model
        assert model.module.norm.training
        assert model.eval() is model
        assert not model.module.norm.training
        assert repr(model).startswith(f"ZeRO{stage}(\n  (module): Net(")
        whole, mine = batch(0)
        loss(model, *mine).backward()
        model.zero_grad()
        assert all(piece.tensor.grad is None for piece in model.pieces())
        with contextlib.nullcontext() if stage < 3 else model.gathered():
            close(model.state_dict(), oracle.state_dict(), 0)
        optimizer, want = model.optimizer(torch.optim.SGD, lr=0.1), torch.optim.SGD(oracle.parameters(), lr=0.1)
        for which, one, data in ((model, optimizer, mine), (oracle, want, whole)):
            loss(which, *data).backward()
            one.step()
        close(model.full_state_dict(), oracle.state_dict())

    launch(ranks, 2)


@pytest.mark.parametrize("stage", [1, 2])
def test_weights_that_were_converted_inside_are_refused(stage):
    def ranks():
        def copy_weight(layer):
            layer.weight.data = layer.weight.data.clone()

        for change in (nn.Module.float, copy_weight):
            model = wrap(stage, net())
            model.module.to(torch.float64)  # they are: nothing changes
            model(batch(0)[1][0])
            change(model.module.blocks[1])
            with pytest.raises(RuntimeError, match=rf"blocks\.1\.\w+ was .* no step of ZeRO{stage} would change it"):
                model(batch(0)[1][0])

    launch(ranks, 2)


@pytest.mark.parametrize("stage", STAGES)
def test_running_means_of_another_precision_are_refused(stage):
    def ranks():
        def build(norm):
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(5, 4), norm)

        x = torch.arange(15.0).view(3, 5).sin()
        for norm in (nn.BatchNorm1d(4), nn.SyncBatchNorm(4), nn.InstanceNorm1d(4, track_running_stats=True)):
            for dtype in (torch.bfloat16, torch.float16):
                with pytest.raises(
                    ValueError, match=rf"dtype={dtype}: 1 \({type(norm).__name__}\) keeps its running mean"
                ):
                    STAGES[stage](build(norm), shared(), dtype=dtype)
        with pytest.raises(ValueError, match=r"dtype=torch.bfloat16: module \(BatchNorm1d\) keeps"):
            STAGES[stage](nn.BatchNorm1d(4), shared(), dtype=torch.bfloat16)
        for options in ({}, {"dtype": torch.float32}):
            model, oracle = STAGES[stage](build(nn.BatchNorm1d(4)), shared(), **options), build(nn.BatchNorm1d(4))
            assert torch.equal(model(x), oracle(x))
            assert torch.equal(model.module[1].running_mean, oracle[1].running_mean)
        for norm in (nn.BatchNorm1d(4, track_running_stats=False), nn.GroupNorm(2, 4)):
            model = STAGES[stage](build(norm), shared(), dtype=torch.bfloat16)
            assert model(x).dtype == torch.bfloat16

    launch(ranks, 2)


def test_errors_name_the_argument_and_the_remedy():
    def ranks():
        model = wrap(2, net())
        for cls in (torch.optim.Adafactor, torch.optim.Muon):
            with pytest.raises(ValueError, match='split="tensors"'):
                model.optimizer(cls)
        for cls in (torch.optim.LBFGS, torch.optim.SparseAdam):
            with pytest.raises(ValueError, match=cls.__name__):
                model.optimizer(cls)
        with pytest.raises(TypeError, match="cls must be an optimizer class"):
            model.optimizer("AdamW")
        with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer, got list"):
            model.optimizer(lambda groups: [])
        with pytest.raises(ValueError, match="groups names a parameter"):
            model.optimizer(torch.optim.SGD, [nn.Parameter(torch.zeros(3))], lr=1)
        head = model.module.head.weight
        with pytest.raises(ValueError, match=r"groups names head\.weight twice"):
            model.optimizer(torch.optim.SGD, [{"params": [head]}, {"params": head}], lr=1)
        with pytest.raises(ValueError, match="groups is empty"):
            model.optimizer(torch.optim.SGD, [], lr=1)
        with pytest.raises(RuntimeError, match="before it is wrapped"):
            model.half()
        model.module.head.weight.requires_grad_(False)
        with pytest.raises(ValueError, match=r"requires_grad of head\.weight was True"):
            model(batch(0)[1][0])
        with torch.no_grad():
            model(batch(0)[1][0])
        state = model.full_state_dict()
        with pytest.raises(ValueError, match="missing"):
            model.load_full_state_dict({k: v for k, v in state.items() if k != "scale"})
        with pytest.raises(ValueError, match=r"state\['scale'\] must have shape \(\), got \(1,\)"):
            model.load_full_state_dict(state | {"scale": torch.zeros(1)})
        for wrong, error, text in (
            ({"dtype": torch.int8}, TypeError, "dtype must be None or a floating-point"),
            ({"split": "rows"}, ValueError, "split must be"),
            ({"bucket_mb": 0}, ValueError, "bucket_mb must be above 0"),
        ):
            with pytest.raises(error, match=text):
                ZeRO1(net(), **wrong)
        with pytest.raises(TypeError, match=r"module must be an nn\.Module"):
            ZeRO3([1])
        with pytest.raises(ValueError, match="requires_grad=True"):
            ZeRO3(net().requires_grad_(False))
        with pytest.raises(ValueError, match="meta"):
            ZeRO1(nn.Linear(2, 2, device="meta"))
        with pytest.raises(ValueError, match="sparse"):
            ZeRO2(nn.Embedding(3, 2, sparse=True))
        with pytest.raises(ValueError, match="the modules differ"):
            ZeRO2(nn.Linear(2, 2 + dist.get_rank()))

    launch(ranks, 2)


def test_sparse_gradient_of_a_function_is_refused():
    def ranks():
        model = ZeRO1(nn.Linear(3, 4))
        with pytest.raises(TypeError, match="gradient of weight is sparse"):
            torch.nn.functional.embedding(torch.tensor([1]), model.module.weight, sparse=True).sum().backward()

    launch(ranks, 1)


def test_without_a_process_group_it_says_what_to_do():
    with pytest.raises((RuntimeError, ValueError), match="process group"):
        ZeRO1(net())


# --- state ------------------------------------------------------------------------------------------------------------


def test_pieces_of_all_ranks_make_every_parameter_once():
    def ranks():
        for stage, split in itertools.product(STAGES, SPLITS):
            oracle, model = net(tied=True, frozen=True), wrap(stage, net(tied=True, frozen=True), split=split)
            mine = [
                (p.names, p.shape, p.start, p.stop, p.tensor.detach().reshape(-1), p.tensor.requires_grad)
                for p in model.pieces()
            ]
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
            whole, count = {}, {}
            for names, shape, start, stop, values, trained in itertools.chain.from_iterable(everyone):
                assert ("embedding.weight" in names) == ("blocks.2.weight" in names)
                assert trained == dict(oracle.named_parameters())[names[0]].requires_grad
                assert values.numel() == stop - start
                for name in names:
                    whole.setdefault(name, torch.zeros(shape, dtype=torch.float64)).view(-1)[start:stop] = values
                    count.setdefault(name, torch.zeros(shape)).view(-1)[start:stop] += 1
            want = dict(oracle.named_parameters(remove_duplicate=False))
            assert whole.keys() == {name for name, p in want.items() if p.numel()}
            for name, times in count.items():
                replicated = stage < 3 and not want[name].requires_grad
                assert (times == (len(everyone) if replicated else 1)).all()
                assert torch.equal(whole[name], want[name])
                if split == "tensors" and stage == 3:
                    assert all(p.tensor.shape == p.shape for p in model.pieces())

    launch(ranks, 3)


def test_whole_state_goes_from_stage_to_stage():
    def ranks():
        source = wrap(1, net(torch.float32, tied=True, frozen=True, seed=3))
        state = source.full_state_dict()
        want = net(torch.float32, tied=True, frozen=True, seed=3).state_dict()
        assert list(state) == list(want)
        assert all(torch.equal(state[name], want[name]) for name in want)
        assert source.full_state_dict(rank0_only=True).keys() == (want.keys() if dist.get_rank() == 0 else set())
        for stage, dtype in itertools.product(STAGES, (None, torch.bfloat16)):
            model = wrap(stage, net(torch.float32, tied=True, frozen=True), dtype=dtype)
            model.load_full_state_dict(state)
            low = net(torch.float32, tied=True, frozen=True, seed=3)
            if dtype is not None:
                for p in low.parameters():
                    p.data = p.data.to(dtype)
            (x, _), _ = batch(0, dtype=torch.float32)
            assert torch.equal(model(x), low(x.to(dtype or x.dtype)))
            got = model.full_state_dict()
            trained = {name for name, p in low.named_parameters(remove_duplicate=False) if p.requires_grad}
            assert all(torch.equal(got[name], want[name]) for name in (want if dtype is None else trained))

    launch(ranks, 3)


def test_state_dicts_have_the_names_of_one_process():
    def ranks():
        want = net(torch.float32, seed=3).state_dict()
        for dtype in (None, torch.bfloat16):
            model = wrap(2, net(torch.float32), dtype=dtype)
            model.load_state_dict(want)
            state = model.state_dict()
            assert list(state) == list(want)
            assert torch.equal(state["head.weight"], want["head.weight"].to(dtype or torch.float32))
        with pytest.raises(RuntimeError, match="ZeRO2 trains are in shards: use load_full_state_dict"):
            model.module.load_state_dict(want)
        model = wrap(1, net())
        model.module.load_state_dict(net(seed=3).state_dict())  # weights and shards are the same memory
        optimizer = model.optimizer(torch.optim.SGD, lr=0.0)
        loss(model, *batch(0)[1]).backward()
        optimizer.step()
        close(model.full_state_dict(), net(seed=3).state_dict(), 0)

    launch(ranks, 2)


def test_weights_written_into_pieces_are_shared():
    def ranks():
        for stage in STAGES:
            model = wrap(stage, net(torch.float32), dtype=torch.bfloat16)
            for piece in model.pieces():
                piece.tensor.data.fill_(0.5)
            model.sync_weights()
            (x, _), _ = batch(0, dtype=torch.float32)
            low = net(torch.float32)
            for p in low.parameters():
                p.data = torch.full_like(p, 0.5, dtype=torch.bfloat16)
            assert torch.equal(model(x), low(x.bfloat16()))

    launch(ranks, 2)


def within(got, want, padding):
    assert want <= got <= want + padding, (got, want, padding)


@pytest.mark.parametrize("dtype", ADAM_BYTES)
@pytest.mark.parametrize("n", [2, 4])
def test_memory_is_that_of_the_formula(n, dtype):
    config = gpt(4, 32, 4, vocab=64, context=16)
    weights, gradients, optimizer = ADAM_BYTES[dtype]

    def ranks():
        found = []
        for stage in STAGES:
            torch.manual_seed(0)
            options = {"bucket_mb": 0.02} if stage < 3 else {}
            model = STAGES[stage](Transformer(config), shared(), dtype=dtype, **options)
            adam = model.optimizer(torch.optim.Adam, lr=0.01)
            tokens = torch.arange(8).view(1, 8) + dist.get_rank()
            for _ in range(2):
                adam.zero_grad()
                model(tokens).float().square().mean().backward()
                before = model.memory()
                adam.step()
            found.append((before, model.memory(), sum(p.numel() for p in model.module.parameters()), model.flats))
        return [(*memories, count, sum(f.layout.total for f in flats)) for *memories, count, flats in found]

    for rank in launch(ranks, n):
        for stage, (got, after, count, padded_count) in zip(STAGES, rank):
            want = zero.memory(
                count, n, stage, bytes_weights=weights, bytes_gradients=gradients, bytes_optimizer=optimizer
            )
            assert got.total == pytest.approx(want.total, rel=0.05)
            spare = padded_count - count  # numbers
            assert got.weights <= want.weights + spare * weights
            assert got.gradients <= want.gradients + spare * gradients
            assert got.optimizer <= want.optimizer + spare * optimizer + 8 * 200  # Adam's step counters
            wide = (4 if stage == 1 else 2) * count / n if dtype else 0  # the step's float32 gradients
            assert after.gradients == pytest.approx(want.gradients + wide, rel=0.05)


@pytest.mark.parametrize("n", [2, 3])
def test_bytes_are_those_of_the_formula(n):
    def ranks():
        found = []
        communicator = Communicator(shared_memory=False, links=Links())
        for stage, microbatches in ((1, 1), (1, 3), (2, 1), (2, 3), (3, 1), (3, 3)):
            torch.manual_seed(0)
            module = Transformer(llama(2, 48, 4, 96, vocab=48, context=16))
            model = STAGES[stage](module, communicator)
            optimizer = model.optimizer(torch.optim.SGD, lr=0.01)
            tokens = torch.arange(8).view(1, 8)
            with ledger() as book:
                for part in range(microbatches):
                    with model.no_sync() if part < microbatches - 1 else contextlib.nullcontext():
                        model(tokens).square().mean().backward()
                optimizer.step()
            numbers = sum(flat.layout.total for flat in model.flats)
            want = zero.communication(numbers, n, stage, bytes_weights=4, bytes_gradients=4, microbatches=microbatches)
            found.append(
                (
                    stage,
                    microbatches,
                    sum(book.bytes.values()),
                    want,
                    numbers,
                    sum(p.numel() for p in module.parameters()),
                )
            )
        return found

    for rank in launch(ranks, n):
        for stage, microbatches, got, want, numbers, parameters in rank:
            assert got == pytest.approx(want, rel=1e-9), (stage, microbatches)
            assert parameters <= numbers <= 1.05 * parameters


def test_no_sync_sends_nothing_in_stage_1():
    def ranks():
        model = wrap(1, net())
        with ledger() as book, model.no_sync():
            loss(model, *batch(0)[1]).backward()
        assert not any(book.calls.values())

    launch(ranks, 2)


def test_buckets_are_sent_while_backward_runs_and_stage_2_frees_them():
    def ranks(stage):
        torch.manual_seed(0)
        layers = nn.Sequential(*[nn.Linear(16, 16) for _ in range(8)])
        model = STAGES[stage](layers, shared(), bucket_mb=0.0013)  # a layer each
        assert len(model.flats) == 8
        held = []

        def look(_):
            buffers = [flat.gradients for flat in model.flats if flat.gradients is not None]
            held.append(sum(t.numel() for t in buffers) + sum(full.numel() for *_, full in model._in_flight))

        x = torch.randn(2, 16)
        for i, layer in enumerate(layers):
            x = layer(x)
            if i < 7:
                x.register_hook(look)
        x.sum().backward()
        return held, max(flat.layout.total for flat in model.flats)

    for held, one in launch(lambda: ranks(2), 2):
        assert len(held) == 7
        assert max(held) <= 3 * one  # one filling, two on their way
        assert held[-1] > 0
    for held, one in launch(lambda: ranks(1), 2):
        assert held[-1] > 6 * one


def test_timeline_hears_of_waiting_and_of_the_optimizer():
    class Book:
        def __init__(self):
            self.kinds = set()

        def add(self, kind, name, start_s, end_s):
            assert start_s <= end_s <= time.perf_counter()
            self.kinds.add(kind)

        @contextlib.contextmanager
        def span(self, kind, name):
            self.kinds.add(kind)
            yield

    def ranks():
        for stage in STAGES:
            book = Book()
            communicator = Communicator(links=Links(), timeline=book)
            model = STAGES[stage](net(), communicator, timeline=book)
            optimizer = model.optimizer(torch.optim.SGD, lr=0.1)
            loss(model, *batch(0)[1]).backward()
            optimizer.step()
            assert book.kinds == {"waiting", "communication", "optimizer"}

    launch(ranks, 2)


def test_communicator_of_the_caller_is_used_and_left_open():
    def ranks():
        pair = dist.new_group([1, 2])
        if dist.get_rank() == 0:
            return None
        with Communicator(pair, links=Links()) as communicator:
            for stage in STAGES:
                model = STAGES[stage](nn.Linear(3, 3).double(), communicator)
                assert (model.size, model.rank) == (2, dist.get_rank() - 1)
                model(torch.ones(1, 3).double() * dist.get_rank()).sum().backward()
                model.close()
                total = torch.zeros(3, 3, dtype=torch.float64)
                for piece in model.pieces():
                    if piece.name == "weight":
                        total.view(-1)[piece.start : piece.stop] = piece.tensor.grad
                dist.all_reduce(total, group=pair)
                assert torch.equal(total, torch.full((3, 3), 1.5, dtype=torch.float64))
        return True

    assert launch(ranks, 3) == [None, True, True]


def test_buffers_are_rank_0s():
    def ranks():
        for stage in STAGES:
            model = wrap(stage, net())
            assert torch.equal(model.module.offset, torch.full((5,), 0.25, dtype=torch.float64))
            model.module.offset.fill_(dist.get_rank() + 2)
            assert (model.full_state_dict()["offset"] == 2).all()

    launch(ranks, 2)


def test_error_of_one_rank_reaches_the_caller():
    def ranks():
        model = wrap(2, net())
        if dist.get_rank() == 1:
            raise ArithmeticError("rank 1 has enough")
        loss(model, *batch(0)[1]).backward()

    with pytest.raises(LaunchError, match="rank 1 has enough"):
        launch(ranks, 2)


# --- layouts ----------------------------------------------------------------------------------------------------------

NUMELS = st.lists(st.integers(0, 200), min_size=1, max_size=12)


@given(NUMELS, st.integers(1, 7), st.sampled_from([by_elements, by_tensors]))
def test_layout_holds_every_number_once(numels, n, build):
    layout = build(numels, n)
    flat = torch.full((layout.total,), -1)
    for rank in range(n):
        for cut in layout.cuts(rank):
            begin = layout.first(rank) + cut.offset
            assert (flat[begin : begin + cut.stop - cut.start] == -1).all()
            flat[begin : begin + cut.stop - cut.start] = cut.tensor
            assert begin - layout.offsets[cut.tensor] == cut.start
            assert begin + cut.stop - cut.start <= layout.first(rank) + layout.sizes[rank]
            if build is by_tensors:
                assert (cut.start, cut.stop) == (0, numels[cut.tensor])
    for index, numel in enumerate(numels):
        assert (layout.view(flat, index, torch.Size([numel])) == index).all()
        assert (flat == index).sum() == numel
        assert layout.offsets[index] % ALIGN == 0
    empty = torch.zeros(layout.total, dtype=torch.bool)
    for begin, end in layout.gaps():
        empty[begin:end] = True
    assert torch.equal(empty, flat == -1)


@given(NUMELS, st.integers(1, 7))
def test_equal_slices_waste_less_than_a_line_a_tensor_and_rank(numels, n):
    layout = by_elements(numels, n)
    assert layout.uneven is None
    assert layout.sizes == (layout.sizes[0],) * n
    assert layout.total - sum(numels) < ALIGN * (len(numels) + n)


@given(st.lists(NUMELS, min_size=1, max_size=6), st.integers(1, 5))
def test_whole_tensors_are_balanced_over_all_buffers(buffers, n):
    loads = [0] * n
    layouts = [by_tensors(numels, n, loads) for numels in buffers]
    assert loads == [sum(layout.sizes[rank] for layout in layouts) for rank in range(n)]
    largest = max(padded(numel) for numels in buffers for numel in numels)
    assert max(loads) - min(loads) <= largest


@pytest.mark.parametrize("stage", [ZeRO1, ZeRO2, ZeRO3])
def test_zero_grad_of_model_and_optimizer_forget_all(stage):
    def ranks():
        torch.manual_seed(0)
        model = stage(nn.Linear(3, 2))
        optimizer = model.optimizer(torch.optim.SGD, lr=0.1)
        found = []
        for clear in (model.zero_grad, model.zero_grad, optimizer.zero_grad):
            with model.no_sync():
                (100 * model(torch.ones(1, 3)).sum()).backward()
            clear()
            model(torch.ones(1, 3)).sum().backward()
            found.append(sum(float(p.tensor.grad.sum()) for p in model.pieces() if p.tensor.numel()))
            clear()
        with pytest.raises(ValueError, match="make another one"):
            optimizer.add_param_group({"params": list(model.module.parameters())})
        return found

    totals = [sum(of_ranks) for of_ranks in zip(*launch(ranks, 2), strict=True)]
    assert totals == [8.0, 8.0, 8.0]  # 6 weights and 2 biases with a gradient of 1
