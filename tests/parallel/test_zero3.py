"""ZeRO-3: weights come when a unit runs and go when it has run, whatever the module does with it."""

import dataclasses
import types

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from mlsys.bench.memory import peak_bytes
from mlsys.models import transformer
from mlsys.models.transformer import Transformer
from mlsys.parallel import launch
from mlsys.parallel.collectives import Communicator, Links
from mlsys.parallel.zero3 import ZeRO3
from mlsys.perf.configs import gpt, llama

OPEN = {}  # what a rank opens once for all that it wraps


def shared():
    if not OPEN:
        OPEN["communicator"] = Communicator(links=Links(1e-5, 1e-9))
    return OPEN["communicator"]


# --- models -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

        self.probe = None

    def forward(self, x):
        inner = torch.tanh(self.up(self.norm(x)))
        if self.probe is not None:
            self.probe()
            inner = Detour.apply(inner, self.probe)
        return x + self.down(inner)


class Stack(nn.Module):
    """Blocks, called the way `run` says."""

    def __init__(self, run=None, blocks=4):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])
        self.run = run

    def forward(self, x):
        x = self.first(x)
        if self.run is None:
            for block in self.blocks:
                x = block(x)
        else:
            x = self.run(self.blocks, x)
        return self.last(x)


class Detour(torch.autograd.Function):
    """The identity, whose backward pass calls `then`."""

    @staticmethod
    def forward(ctx, x, then):
        ctx.then = then
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.then()
        return gradient, None


def stack(run=None, seed=0, prepare=None, **options):
    torch.manual_seed(seed)
    module = Stack(run, **options).double()
    if prepare is not None:
        prepare(module)
    return module


def batch(step=0):
    """Of all ranks together, and of this one."""
    n, rank = dist.get_world_size(), dist.get_rank()
    whole = torch.randn(2 * n, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return whole, whole[2 * rank : 2 * rank + 2]


def loss(outputs):
    return outputs.square().mean()


def compare(run=None, steps=2, prepare=None, value=lambda model, x: loss(model(x)), **options):
    """Weights after some steps of AdamW against one process; returns the model."""
    oracle = stack(run, prepare=prepare)
    model = ZeRO3(stack(run, prepare=prepare), shared(), **options)
    want = torch.optim.AdamW([p for p in oracle.parameters() if p.requires_grad], lr=0.01, eps=1e-4, weight_decay=0)
    got = model.optimizer(torch.optim.AdamW, lr=0.01, eps=1e-4, weight_decay=0)
    for step in range(steps):
        whole, mine = batch(step)
        for optimizer, which, x in ((want, oracle, whole), (got, model, mine)):
            optimizer.zero_grad()
            value(which, x).backward()
            optimizer.step()
        assert live(model) == 0
    state = model.full_state_dict()
    for name, tensor in oracle.state_dict().items():
        torch.testing.assert_close(
            state[name], tensor, rtol=0, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )
    return model


def live(model):
    """Bytes of whole weights that are there now."""
    return sum(flat.weights.untyped_storage().nbytes() for flat in model.flats)


# --- ways to run blocks -----------------------------------------------------------------------------------------------


def twice(blocks, x):
    for block in blocks:
        x = block(torch.sin(block(x)))
    return x


def side_by_side(blocks, x):
    return blocks[0](x) + blocks[0](torch.sin(x)) + blocks[1](x)


def first_again_last(blocks, x):
    for block in (*blocks, blocks[0]):
        x = block(x)
    return x


def leaves_out(blocks, x):
    return blocks[3](blocks[1](x))


def output_unused(blocks, x):
    blocks[2](x)
    return blocks[1](blocks[0](x))


def partly(blocks, x):
    return blocks[1](blocks[0].up(x)[:, :6])


def without_gradient(blocks, x):
    with torch.no_grad():
        y = blocks[3](x)
    return blocks[0](x) + y


def recomputed(blocks, x):
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False)
    return x


def recomputed_in_pairs(blocks, x):
    for i in (0, 2):
        x = checkpoint(lambda x, i=i: blocks[i + 1](blocks[i](x)), x, use_reentrant=False)
    return x


def recomputed_reentrant(blocks, x):
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=True)
    return x


def detached(blocks, x):
    return blocks[1](blocks[0](x).detach())


RUNS = [
    None,
    twice,
    side_by_side,
    first_again_last,
    leaves_out,
    output_unused,
    without_gradient,
    recomputed,
    recomputed_in_pairs,
    recomputed_reentrant,
    detached,
]


@pytest.mark.parametrize("prefetch", [True, False])
def test_blocks_may_run_in_any_way(prefetch):
    def ranks():
        for run in RUNS:
            compare(run, prefetch=prefetch)

    launch(ranks, 2)


def test_another_way_each_step():
    """What was prefetched in vain is freed, and a new order is learnt."""

    def ranks():
        oracle, model = stack(), ZeRO3(stack(), shared())
        for step, run in enumerate([None, None, first_again_last, leaves_out, leaves_out, None, twice]):
            oracle.run = model.module.run = run
            whole, mine = batch(step)
            oracle.zero_grad()
            for piece in model.pieces():
                piece.tensor.grad = None
            loss(oracle(whole)).backward()
            loss(model(mine)).backward()
            assert live(model) == 0
            squares = [p.grad.norm() ** 2 for p in oracle.parameters() if p.grad is not None]
            assert abs(model.clip_grad_norm(1e9) - sum(squares).sqrt()) < 1e-12

    launch(ranks, 2)


def freeze_some(module):
    module.blocks[1].requires_grad_(False)  # a whole unit
    module.blocks[2].up.requires_grad_(False)  # part of one
    module.first.requires_grad_(False)  # so that the first block's input needs no gradient


def freeze_blocks(module):
    module.blocks.requires_grad_(False)
    module.last.requires_grad_(False)


def tie(module):
    module.blocks[3].up.weight = module.blocks[0].up.weight  # two units: the root has it
    module.blocks[2].down.bias = module.blocks[2].norm.bias  # one unit


def spare(module):
    for block in module.blocks:
        block.spare = nn.Parameter(torch.zeros(1, dtype=torch.float64))


class Twofold(nn.Module):
    """Its weight's gradient is there before its input's, which needs the weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(6) + 0.1)

    def forward(self, x):
        x = x @ self.weight.detach()
        return x + torch.tanh(x) @ self.weight


def read_after_gradient(module):
    module.blocks[1] = Twofold()
    module.double()


def use_part(module):
    class Part(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            return x + self.block.up(x)[:, :6]

    module.blocks[1] = Part(module.blocks[1])


@pytest.mark.parametrize("prepare", [freeze_some, freeze_blocks, tie, use_part, read_after_gradient])
def test_frozen_tied_and_unused_parameters(prepare):
    def ranks():
        for run in (None, twice):
            compare(run, prepare=prepare)

    launch(ranks, 2)


def test_units_are_chosen():
    def ranks():
        def names(**options):
            model = ZeRO3(stack(), shared(), **options)
            return {unit.name: sum(p.numel() for flat in unit.flats for p in flat.parameters) for unit in model.units}

        block = sum(p.numel() for p in Block().parameters())
        assert names() == {"": 78, **{f"blocks.{i}": block for i in range(4)}}
        assert names(units=[]) == {"": 78 + 4 * block}
        linear = names(units=lambda part: isinstance(part, nn.Linear))
        assert linear.pop("") == 4 * 12
        assert len(linear) == 10
        nested = compare(units=lambda part: isinstance(part, (Block, nn.LayerNorm)))
        assert {unit.name for unit in nested.units} >= {"", "blocks.0", "blocks.0.norm"}
        compare(units=[])
        compare(twice, units=lambda part: isinstance(part, nn.Linear))
        tied = ZeRO3(stack(prepare=tie), shared())
        root, *blocks = (sum(len(flat.parameters) for flat in unit.flats) for unit in tied.units)
        assert (root, blocks) == (4, [5, 6, 5, 5])
        sequential = ZeRO3(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)), shared())
        assert [unit.name for unit in sequential.units] == ["", "0", "2"]
        with pytest.raises(ValueError, match="units must be modules within module, got Linear"):
            ZeRO3(stack(), shared(), units=[nn.Linear(2, 2)])
        with pytest.raises(ValueError, match="got str"):
            ZeRO3(stack(), shared(), units="blocks")

    launch(ranks, 2)


def test_results_in_containers():
    @dataclasses.dataclass
    class Pair:
        good: torch.Tensor
        bad: torch.Tensor

    class Packs(nn.Module):
        def __init__(self, pack):
            super().__init__()
            self.linear, self.pack = nn.Linear(6, 6), pack

        def forward(self, inputs, *, scale):
            x = self.linear(inputs[0]) * scale["by"]
            return self.pack(x, x.detach())

    class Opaque:
        def __init__(self, x, y):
            self.x = x

    def ranks():
        packs = {
            tuple: (lambda x, y: (y, x), lambda r: r[1]),
            dict: (lambda x, y: {"a": [x, None], "b": 3}, lambda r: r["a"][0]),
            Pair: (Pair, lambda r: r.good),
        }
        for pack, unpack in packs.values():
            torch.manual_seed(0)
            layers = nn.ModuleList([Packs(pack), Packs(pack)])
            x = torch.ones(1, 6)
            total = unpack(layers[1]([unpack(layers[0]((x,), scale={"by": 2}))], scale={"by": 3})).sum()
            want = torch.autograd.grad(total, list(layers.parameters()))
            model = ZeRO3(layers, shared())
            unpack(layers[1]([unpack(layers[0]((x,), scale={"by": 2}))], scale={"by": 3})).sum().backward()
            assert live(model) == 0
            assert abs(model.clip_grad_norm(1e9) - sum(g.norm() ** 2 for g in want).sqrt()) < 1e-4
        opaque = ZeRO3(nn.ModuleList([Packs(Opaque)]), shared())
        with pytest.raises(TypeError, match="0 returns a Opaque, in which ZeRO3 can see no tensors"):
            opaque.module[0]([x], scale={"by": 1})
        with torch.no_grad():
            opaque.module[0]([x], scale={"by": 1})

    launch(ranks, 2)


# --- what is there when -----------------------------------------------------------------------------------------------


def test_root_and_two_units_are_the_most_that_is_there():
    def look(prefetch, prepare=None):
        model = ZeRO3(stack(blocks=6, prepare=prepare), shared(), prefetch=prefetch)
        root, block = (sum(flat.weights.numel() * 8 for flat in unit.flats) for unit in model.units[:2])
        seen = []
        for one in model.module.blocks:
            one.probe = lambda: seen.append((live(model) - root) // block)
        for _ in range(2):
            seen.clear()
            value = loss(model(batch()[1]))
            assert live(model) == 0
            value.backward()
            assert live(model) == 0
        return seen

    def ranks():
        return look(True), look(False), look(False, spare), look(True, freeze_blocks)

    for ahead, alone, partly_unused, frozen in launch(ranks, 2):
        assert ahead == 2 * [2, 2, 2, 2, 2, 1]  # forward, backward
        assert alone == 2 * [1, 1, 1, 1, 1, 1]
        assert partly_unused == alone
        # Only the end of a block without gradients shows: the next is fetched then, and is there for the one after.
        assert frozen == [2, 2, 2, 2, 2, 1, 1, 2, 2, 2, 2, 1]


def test_no_step_needs_the_memory_of_the_whole_model():
    def ranks():
        torch.manual_seed(0)
        model = ZeRO3(nn.ModuleList([nn.Linear(64, 64) for _ in range(24)]), shared())
        optimizer = model.optimizer(torch.optim.SGD, lr=0.01)

        def step():
            x = torch.ones(1, 64)
            for layer in model.module:
                x = torch.tanh(layer(x))
            loss(x).backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        step()
        return peak_bytes(step) / sum(flat.weights.numel() * 4 for flat in model.flats)

    for share in launch(
        ranks, 4
    ):  # a quarter of the gradients stays; two layers' weights and three gradients come and go
        assert 0.25 < share < 0.25 + 7 / 24


def test_next_unit_is_on_its_way_while_one_runs():
    def ranks():
        log = []

        class Watched(ZeRO3):
            def _gather(self, unit):
                if not unit.live:
                    log.append(f"gather {unit.name}")
                super()._gather(unit)

            def _free(self, unit):
                if unit.live:
                    log.append(f"free {unit.name}")
                super()._free(unit)

        model = Watched(stack(blocks=3), shared())
        for block, name in zip(model.module.blocks, "012"):
            block.register_forward_pre_hook(lambda *_, name=name: log.append(f"run {name}"))
        for _ in range(2):
            log.clear()
            value = loss(model(batch()[1]))
            forward = list(log)
            log.clear()
            value.backward()
        assert forward == [
            "gather ", "gather blocks.0", "gather blocks.1", "run 0", "free blocks.0", "gather blocks.2", "run 1",
            "free blocks.1", "run 2", "free blocks.2", "free ",
        ]  # fmt: skip
        assert log == [
            "gather ", "gather blocks.2", "gather blocks.1", "free blocks.2", "gather blocks.0", "free blocks.1",
            "free blocks.0", "free ",
        ]  # fmt: skip

    launch(ranks, 2)


def test_weights_out_of_turn_are_nan_and_state_dicts_say_where_to_look():
    def ranks():
        oracle = stack()
        model = ZeRO3(stack(), shared())
        x = batch()[1]
        assert all(p.isnan().all() for p in model.module.parameters())
        assert [p.shape for p in model.module.parameters()] == [p.shape for p in oracle.parameters()]
        assert model.module.last(x).isnan().all()
        with pytest.raises(RuntimeError, match="full_state_dict"):
            model.state_dict()
        with pytest.raises(RuntimeError, match="full_state_dict"):
            model.module.state_dict()
        with pytest.raises(RuntimeError, match="load_full_state_dict"):
            model.module.load_state_dict(oracle.state_dict())
        with model.gathered() as module:
            assert torch.equal(module.last(x), oracle.last(x))
            assert torch.equal(model(x), oracle(x))
            state = module.state_dict()
            assert all(torch.equal(state[name], tensor) for name, tensor in oracle.state_dict().items())
        assert live(model) == 0

    launch(ranks, 2)


def test_passes_without_a_backward_pass():
    def ranks():
        oracle, model = stack(), ZeRO3(stack(), shared())
        whole, mine = batch()
        with torch.no_grad():
            assert torch.equal(model(mine), oracle(mine))
        model.eval()
        one, two = model(mine), model(mine * 2)  # two graphs
        model(mine)  # a third, which nobody wants
        assert live(model) == 0
        loss(two).backward()
        loss(one).backward()
        (loss(oracle(whole)) + loss(oracle(whole * 2))).backward()
        want = sum(p.grad.norm() ** 2 for p in oracle.parameters()).sqrt()
        assert abs(model.clip_grad_norm(1e9) - want) < 1e-12
        model.module.run = lambda blocks, x: 1 / 0
        with pytest.raises(ArithmeticError):
            model(mine)
        assert live(model) == 0

    launch(ranks, 2)


def test_a_forward_pass_that_was_refused_leaves_no_trace():
    """Warnings are errors here, and torch warns of a hook that raises after a forward pass that did."""

    def ranks():
        oracle, model = stack(), ZeRO3(stack(), shared())
        whole, mine = batch()
        loss(oracle(whole)).backward()

        def refuse(*_):
            raise ArithmeticError("as told")

        def by_the_door():
            model.module.last.weight.requires_grad_(False)
            return lambda: model.module.last.weight.requires_grad_(True), ValueError, r"requires_grad of last\.weight"

        def before_the_root():
            return model.module.register_forward_pre_hook(refuse, prepend=True).remove, ArithmeticError, "as told"

        def before_a_unit():
            block = model.module.blocks[2]
            return block.register_forward_pre_hook(refuse, prepend=True).remove, ArithmeticError, "as told"

        for reason in (by_the_door, before_the_root, before_a_unit):
            undo, error, text = reason()
            with pytest.raises(error, match=text):
                model(mine)
            undo()
            with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
                model(mine, nonsense=1)
            assert live(model) == 0
            assert not any(unit.calls for unit in model.units)
            model.zero_grad()
            loss(model(mine)).backward()
            assert live(model) == 0
            want = sum(p.grad.norm() ** 2 for p in oracle.parameters()).sqrt()
            assert abs(model.clip_grad_norm(1e9) - want) < 1e-12

    launch(ranks, 2)


# --- models that begin on meta ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [gpt(2, 16, 2, vocab=40, context=8), llama(2, 16, 2, 32, vocab=40, context=8)])
def test_transformer_on_meta_gets_the_weights_of_one_process(config):
    def ranks():
        generator = torch.Generator().manual_seed(5)
        want = transformer.init(Transformer(config), generator)

        generator = torch.Generator().manual_seed(5)

        def init(name, tensor):
            one = types.SimpleNamespace(config=config, named_parameters=lambda: [(name, tensor)])
            transformer.init(one, generator)

        model = ZeRO3(Transformer(config, device="meta"), shared(), init=init)
        state = model.full_state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in want.state_dict().items())
        tokens = torch.arange(6).view(2, 3)
        torch.testing.assert_close(model(tokens), want(tokens))
        optimizer = model.optimizer(torch.optim.SGD, lr=0.1)
        before = model.module.loss(tokens, tokens)
        before.backward()
        optimizer.step()
        assert model.module.loss(tokens, tokens) < before

    launch(ranks, 2)


def test_initialisation_holds_the_shards_and_one_parameter():
    def ranks():
        def build():
            layers = nn.ModuleList([nn.Linear(64, 64, bias=False, device="meta") for _ in range(24)])
            OPEN["model"] = ZeRO3(layers, shared(), init=lambda name, tensor: tensor.fill_(1))

        shared()
        return peak_bytes(build) / (24 * 64 * 64 * 4)

    for share in launch(ranks, 4):  # initialised, broadcast, cut: a copy or two of one parameter
        assert 0.25 < share < 0.25 + 3.5 / 24


def test_without_init_modules_reset_themselves():
    def ranks():
        def build(device):
            torch.manual_seed(3)
            with torch.device(device):
                module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4))
                module.append(nn.Linear(6, 4, bias=False))
                module[4].weight = module[3].weight
                return module

        want = build("cpu")
        torch.manual_seed(3 + dist.get_rank())  # rank 0's count
        with torch.random.fork_rng():
            model = ZeRO3(build("meta"), shared())
        state = model.full_state_dict()
        assert list(state) == list(want.state_dict())
        assert not any(tensor.isnan().any() for tensor in state.values())
        assert (state["1.weight"] == 1).all()
        assert (state["1.running_var"] == 1).all()
        assert state["0.weight"].std() > 0.05
        assert torch.equal(state["3.weight"], state["4.weight"])
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, state)
        assert all(torch.equal(everyone[0][name], tensor) for name, tensor in state.items())
        x = torch.randn(3, 4)
        model.module[:4](x).sum().backward()

    launch(ranks, 2)


class Lazy(nn.Module):
    """Has something on meta that nobody sets."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, device="meta"))
        self.register_buffer("table", torch.empty(3, device="meta"))


def test_what_stays_unset_is_an_error():
    def ranks():
        with pytest.raises(ValueError, match=r"\(Lazy\) has tensors on meta and no reset_parameters\(\): pass init="):
            ZeRO3(Lazy(), shared())
        with pytest.raises(ValueError, match="init has left numbers of weight unset"):
            ZeRO3(Lazy(), shared(), init=lambda name, tensor: tensor[:2].zero_())
        with pytest.raises(ValueError, match="init has left numbers of table unset"):
            ZeRO3(Lazy(), shared(), init=lambda name, tensor: name == "weight" and tensor.zero_())
        module = Lazy()
        module.reset_parameters = lambda: module.weight.data.zero_()
        with pytest.raises(ValueError, match=r"Lazy\.reset_parameters\(\) has left numbers of table unset"):
            ZeRO3(module, shared())
        with pytest.raises(ValueError, match="leave init out"):
            ZeRO3(stack(), shared(), init=lambda name, tensor: None)
        model = ZeRO3(Lazy(), shared(), init=lambda name, tensor: tensor.fill_(len(name)))
        state = model.full_state_dict()
        assert torch.equal(state["weight"], torch.full((3,), 6.0))
        assert torch.equal(state["table"], torch.full((3,), 5.0))

    launch(ranks, 2)


def test_transformer_trains_in_bfloat16_from_meta():
    def ranks():
        config = llama(2, 16, 2, 32, vocab=40, context=8)

        def init(name, tensor):
            transformer.init(types.SimpleNamespace(config=config, named_parameters=lambda: [(name, tensor)]))

        torch.manual_seed(0)
        model = ZeRO3(Transformer(config, device="meta"), shared(), init=init, dtype=torch.bfloat16)
        optimizer = model.optimizer(torch.optim.AdamW, lr=0.01)
        tokens = torch.arange(8).view(1, 8) * (dist.get_rank() + 1)
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            value = model.module.loss(tokens, tokens.roll(-1, 1))
            value.backward()
            optimizer.step()
            losses.append(value.item())
        assert losses[-1] < 0.5 * losses[0]

    launch(ranks, 2)


class Nested(nn.Module):
    """Lists and dictionaries of layers in a list: none of these containers is ever called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        inner = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.stages = nn.ModuleList([inner, nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.LayerNorm(4)})])

    def forward(self, x):
        for stage in self.stages:
            for layer in stage.values() if isinstance(stage, nn.ModuleDict) else stage:
                x = layer(x)
        return x


def test_containers_within_containers_are_not_units():
    def ranks():
        x = torch.ones(2, 4)
        model = ZeRO3(Nested())
        refused = ""
        try:
            ZeRO3(Nested(), units=lambda part: isinstance(part, nn.ModuleDict))
        except ValueError as error:
            refused = str(error)
        return torch.equal(model(x), Nested()(x)), refused

    for equal, refused in launch(ranks, 2):
        assert equal
        assert "ModuleDict, which is never called" in refused
