"""A sharded checkpoint is whole at every moment, loads on any ranks, and refuses what is not its own."""

import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from mlsys.parallel import sharded_checkpoint
from mlsys.parallel.data_parallel import DataParallel
from mlsys.parallel.launcher import LaunchError, launch
from mlsys.parallel.sharded_checkpoint import CheckpointError, load, read_notes, save
from mlsys.parallel.zero import ZeRO1, ZeRO2
from mlsys.parallel.zero3 import ZeRO3

KINDS = {
    "plain": lambda module, group=None: module,
    "DataParallel": DataParallel,
    "ZeRO1": ZeRO1,
    "ZeRO2": ZeRO2,
    "ZeRO3": ZeRO3,
}


class Net(nn.Module):
    """What real models have: tied and frozen weights, a buffer, sizes that do not divide."""

    def __init__(self, seed=0, width=7, tied=True, more=False):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        if more:
            self.more = nn.Linear(2, 2)
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.blocks[1].requires_grad_(False)
        self.register_buffer("seen", torch.zeros(3, dtype=torch.int64))

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        self.seen += 1
        return self.head(x) * self.temperature


def module_of(model):
    return getattr(model, "module", model)


def make(kind, seed=0, optimizer=torch.optim.AdamW, group=None, **options):
    """A model of this kind and its optimizer, with two groups."""
    model = KINDS[kind](Net(seed), group, **options)
    module = module_of(model)
    matrices = [p for p in module.parameters() if p.ndim >= 2 and p.requires_grad]
    vectors = [p for p in module.parameters() if p.ndim < 2 and p.requires_grad]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "lr": 0.01, "weight_decay": 0.0}]
    if kind.startswith("ZeRO"):
        return model, model.optimizer(optimizer, groups, lr=0.03)
    return model, optimizer(groups, lr=0.03)


def train(model, optimizer, steps, first=0):
    """Steps on a batch that is the same however many ranks there are."""
    for step in range(first, first + steps):
        tokens = torch.randint(11, (6,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(tokens), tokens.roll(1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model):
    """All parameters and buffers, whole, on every rank."""
    state = model.full_state_dict() if hasattr(model, "full_state_dict") else module_of(model).state_dict()
    return {name: tensor.clone() for name, tensor in state.items()}


def content(folder):
    """What a checkpoint says, put together without the library: tensors by key, and the rest of the manifest."""
    manifest = json.loads((Path(folder) / "manifest.json").read_text())
    files = [load_file(Path(folder) / facts["name"]) for facts in manifest["files"]]
    tensors = {}
    for key, entry in manifest["tensors"].items():
        parts = [files[rank][f"{key}[{start}:{stop}]"] for rank, start, stop in entry["parts"]]
        tensors[key] = torch.cat(parts).view(entry["shape"])
    return tensors, manifest["optimizer"], manifest["notes"]


def equal(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# --- any ranks, any stage ---------------------------------------------------------------------------------------------


def for_each_number_of_ranks(work, folder):
    """`work(folder, group, n)` in groups of 1 to 4 ranks; what the ranks of each found."""
    groups = {n: dist.new_group(list(range(n))) for n in (1, 2, 3, 4)}
    found = {}
    for n, group in groups.items():
        if dist.get_rank() < n:
            found[n] = work(folder, group, n)
        dist.barrier()
    return found


def save_all(folder, group, n):
    """In each rank: train and save one model of each kind; what rank 0 then knows of it."""
    found = {}
    for kind in KINDS:
        model, optimizer = make(kind, group=group)
        train(model, optimizer, 2)
        mine = {"group": group} if kind == "plain" else {}
        save(f"{folder}/{kind}-{n}", model, optimizer, notes={"kind": kind}, **mine)
        found[kind] = weights(model)
    return found


def load_all(folder, group, m):
    """In each rank: load into each kind what each number of ranks has saved, and save it again."""
    found = {}
    for number, kind in enumerate(KINDS):
        for n in (1, 2, 3, 4):
            if (number + n + m) % 2:  # every pair of numbers of ranks by two or three kinds
                continue
            source = f"{list(KINDS)[(number + n + m) % len(KINDS)]}-{n}"
            model, optimizer = make(kind, seed=5, group=group)
            mine = {"group": group} if kind == "plain" else {}
            notes = load(f"{folder}/{source}", model, optimizer, **mine)
            again = f"{folder}/{source}-again-{kind}-{m}"
            save(again, model, optimizer, notes=notes, **mine)
            found[source, again] = weights(model)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of checkpoints by 1 to 4 ranks, and the weights that each of them is of."""
    folder = tmp_path_factory.mktemp("saved")
    rank_0 = launch(for_each_number_of_ranks, 4, save_all, str(folder))[0]
    return folder, {f"{kind}-{n}": state for n, states in rank_0.items() for kind, state in states.items()}


def test_a_checkpoint_has_every_number_once(saved):
    folder, known = saved
    for name, state in known.items():
        tensors, optimizer, notes = content(folder / name)
        mine = {key: t for key, t in tensors.items() if not key.startswith("optimizer/")}
        tied = {"head.weight"}
        assert {key.partition("/")[2] for key in mine} == set(state) - tied
        for key, tensor in mine.items():
            assert torch.equal(tensor, state[key.partition("/")[2]]), (name, key)
        assert notes == {"kind": name.partition("-")[0]}
        assert optimizer["class"] == "AdamW"
        assert optimizer["groups"][0]["parameters"] == ["blocks.0.weight", "blocks.2.weight", "embedding.weight"]
        assert [group["options"]["lr"] for group in optimizer["groups"]] == [0.03, 0.01]
        assert optimizer["state"]["temperature"]["step"]["number"] == 2.0
        assert tensors["optimizer/blocks.0.weight/exp_avg"].shape == (7, 7)
        assert not any("blocks.1" in key for key in tensors if key.startswith("optimizer/"))


def test_moments_are_those_of_one_process(saved):
    folder, _ = saved
    model, optimizer = make("plain")
    train(model, optimizer, 2)
    for name in ("plain-3", "DataParallel-2", "ZeRO1-3", "ZeRO2-4", "ZeRO3-3"):
        tensors, _, _ = content(folder / name)
        for parameter_name, parameter in model.named_parameters():
            for entry in ("exp_avg", "exp_avg_sq") if parameter.requires_grad else ():
                mine = optimizer.state[parameter][entry]
                torch.testing.assert_close(tensors[f"optimizer/{parameter_name}/{entry}"], mine)


def test_loads_on_any_number_of_ranks_and_into_any_stage(saved):
    folder, known = saved
    ranks = launch(for_each_number_of_ranks, 4, load_all, str(folder))
    assert [len(found) for found in ranks] == [4, 3, 2, 1]
    for m, found in ranks[0].items():
        assert len(found) == 10
        for (source, again), state in found.items():
            assert equal(state, known[source]), (source, again)
            first, second = content(folder / source), content(again)
            assert equal(first[0], second[0]), (source, again)
            assert first[1:] == second[1:], (source, again)
        for other in ranks[1:m]:
            assert all(equal(other[m][key], found[key]) for key in found)


def continue_all(folder):
    """For each kind and optimizer: 4 steps, and 2 steps, a save, a load elsewhere, and 2 more."""
    differ = []
    settings = [(kind, torch.optim.AdamW, {}) for kind in KINDS]
    settings += [
        ("ZeRO1", torch.optim.SGD, {}),
        ("ZeRO2", torch.optim.Adafactor, {"split": "tensors"}),
        ("ZeRO3", torch.optim.Adafactor, {"split": "tensors"}),
        ("ZeRO3", torch.optim.AdamW, {"dtype": torch.bfloat16}),
        ("plain", torch.optim.Adafactor, {}),
        ("plain", torch.optim.NAdam, {}),
    ]
    for number, (kind, optimizer_class, options) in enumerate(settings):
        model, optimizer = make(kind, optimizer=optimizer_class, **options)
        train(model, optimizer, 2)
        save(f"{folder}/{number}", model, optimizer, notes=number)
        train(model, optimizer, 2, first=2)
        other, its_optimizer = make(kind, seed=9, optimizer=optimizer_class, **options)
        assert load(f"{folder}/{number}", other, its_optimizer) == number
        train(other, its_optimizer, 2, first=2)
        if not equal(weights(model), weights(other)):
            differ.append((kind, optimizer_class.__name__, options))
    return differ


def test_training_goes_on_to_the_same_bits(tmp_path):
    assert launch(continue_all, 2, str(tmp_path)) == [[], []]


def test_adafactor_moves_between_whole_tensors_and_one_process(tmp_path):
    def two(folder):
        model, optimizer = make("ZeRO2", optimizer=torch.optim.Adafactor, split="tensors")
        train(model, optimizer, 2)
        save(folder, model, optimizer)
        return weights(model)

    state, _ = launch(two, 2, str(tmp_path))
    model, optimizer = make("plain", seed=3, optimizer=torch.optim.Adafactor)
    load(tmp_path, model, optimizer)
    assert equal(weights(model), state)
    assert optimizer.state[model.blocks[0].weight]["row_var"].shape == (7, 1)
    twin, its_optimizer = make("plain", optimizer=torch.optim.Adafactor)
    train(twin, its_optimizer, 2)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        for entry, value in its_optimizer.state.get(other, {}).items():
            torch.testing.assert_close(optimizer.state[parameter][entry], value)


# --- one process ------------------------------------------------------------------------------------------------------


@pytest.fixture
def one(tmp_path):
    """A folder with a checkpoint of a plain model, the model, and its optimizer."""
    model, optimizer = make("plain")
    train(model, optimizer, 2)
    save(tmp_path / "run", model, optimizer, notes={"step": 2, "of": [1, None, "text"]})
    return tmp_path / "run", model, optimizer


def test_files_are_plain_safetensors_beside_a_manifest(one):
    folder, model, _ = one
    (data,) = folder.glob("*.safetensors")
    assert sorted(path.name for path in folder.iterdir()) == sorted([data.name, "manifest.json"])
    assert torch.equal(load_file(data)["weights/blocks.0.weight[0:49]"].view(7, 7), model.blocks[0].weight)
    manifest = json.loads((folder / "manifest.json").read_text())
    facts = {"name": data.name, "bytes": data.stat().st_size, "sha256": hashlib.sha256(data.read_bytes()).hexdigest()}
    assert manifest["files"] == [facts]


def test_notes_come_back_and_can_be_read_alone(one):
    folder, model, optimizer = one
    assert read_notes(folder) == {"step": 2, "of": [1, None, "text"]}
    assert load(folder, model, optimizer) == {"step": 2, "of": [1, None, "text"]}
    assert load(folder, model) == {"step": 2, "of": [1, None, "text"]}
    save(folder, model, notes={10: "ten", 9: "nine"})  # JSON's keys are text
    assert read_notes(folder) == {"10": "ten", "9": "nine"}


def test_a_schedule_goes_on_and_how_the_optimizer_computes_stays(one):
    folder, model, optimizer = one
    optimizer.param_groups[0]["lr"] = 0.5
    save(folder, model, optimizer)
    module = Net(1)
    fresh = torch.optim.AdamW(make_groups(module), lr=1.0, foreach=False)
    load(folder, module, fresh)
    assert [group["lr"] for group in fresh.param_groups] == [0.5, 0.01]
    assert [group["foreach"] for group in fresh.param_groups] == [False, False]
    assert [group["betas"] for group in fresh.param_groups] == [(0.9, 0.999)] * 2


def make_groups(module):
    trained = [p for p in module.parameters() if p.requires_grad]
    return [{"params": [p for p in trained if p.ndim >= 2]}, {"params": [p for p in trained if p.ndim < 2]}]


def test_empty_and_odd_tensors_survive(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.empty = nn.Parameter(torch.zeros(0, 3))
            self.number = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
            self.halves = nn.Parameter(torch.randn(3, 5).bfloat16().t())  # not contiguous
            self.register_buffer("flags", torch.tensor([True, False, True]))
            self.register_buffer("every_other", torch.arange(5, dtype=torch.uint8)[::2])
            self.register_buffer("passing", torch.ones(2), persistent=False)

    first, second = Odd(), Odd()
    save(tmp_path, first)
    load(tmp_path, second)
    assert equal(dict(first.state_dict()), dict(second.state_dict()))
    assert "buffers/passing" not in content(tmp_path)[0]


def test_an_optimizer_that_has_not_stepped(tmp_path):
    model, optimizer = make("plain")
    save(tmp_path, model, optimizer)
    other, its_optimizer = make("plain", seed=1)
    train(other, its_optimizer, 1)
    load(tmp_path, other, its_optimizer)
    assert equal(weights(model), weights(other))
    assert not its_optimizer.state


# --- what is refused, with nothing changed ----------------------------------------------------------------------------


def rewrite(folder, change, *, sign=True):
    """Change the manifest; with its checksum made right again, as who forges it would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    del manifest["sha256"]
    if sign:
        manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def data_file(folder):
    (found,) = folder.glob("*.safetensors")
    return found


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": (
        lambda f: data_file(f).write_bytes(data_file(f).read_bytes()[:-1]),
        r"safetensors has \d+ bytes, and",
    ),
    "flipped bit": (lambda f: flip(data_file(f), -5), r"safetensors is damaged: its checksum is wrong"),
    "flipped header": (lambda f: flip(data_file(f), 30), r"safetensors is damaged: its checksum is wrong"),
    "missing": (lambda f: data_file(f).unlink(), r"safetensors is missing: the checkpoint was copied"),
    "manifest cut": (
        lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text()[:-9]),
        "is no manifest, or is damaged",
    ),
    "manifest a list": (lambda f: (f / "manifest.json").write_text("[]"), "is no manifest, or is damaged"),
    "manifest changed": (
        lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text().replace("AdamW", "Adam ")),
        "manifest.json is damaged: its checksum is wrong",
    ),
    "unsigned": (lambda f: rewrite(f, lambda m: None, sign=False), "is no manifest, or is damaged"),
    "newer format": (lambda f: rewrite(f, lambda m: m.update(format=2)), "has format 2, this version reads 1"),
    "foreign file": (
        lambda f: rewrite(f, lambda m: m["files"][0].update(name="../../etc/passwd")),
        "names a file '../../etc/passwd' that is none of ours",
    ),
    "too few files": (lambda f: rewrite(f, lambda m: m["files"].clear()), "names 0 files for 1 ranks"),
    "a range gone": (
        lambda f: rewrite(f, lambda m: m["tensors"]["weights/temperature"]["parts"].clear()),
        "numbers 0:1 of weights/temperature are in no file",
    ),
    "a range elsewhere": (
        lambda f: rewrite(f, lambda m: m["tensors"]["weights/temperature"].update(parts=[[0, 0, 3]])),
        r"cannot read weights/temperature\[0:3\]",
    ),
    "a dtype of its own": (
        lambda f: rewrite(f, lambda m: m["tensors"]["weights/temperature"].update(dtype="nn")),
        "names a dtype 'nn' that this torch does not know",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_changes_nothing(one, name):
    folder, _, _ = one
    damage, message = DAMAGE[name]
    damage(folder)
    refused(folder, *make("plain", seed=4), message)


def refused(folder, model, optimizer, message, error=CheckpointError):
    """`load` raises this and leaves the weights, the state and the groups as they were."""
    before = weights(model)
    state = [dict(entries) for entries in optimizer.state.values()] if optimizer else None
    options = (
        [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] if optimizer else 0
    )
    with pytest.raises(error, match=message):
        load(folder, model, optimizer)
    assert equal(before, weights(model))
    if optimizer:
        assert [dict(entries) for entries in optimizer.state.values()] == state
        assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == options


def sgd(model, *groups):
    return torch.optim.SGD(list(groups) or [p for p in model.parameters() if p.requires_grad], lr=0.1)


def adamw(model, groups):
    return torch.optim.AdamW(groups, lr=0.1)


def swapped(groups):
    return [{"params": groups[1]["params"]}, {"params": groups[0]["params"]}]


OTHERS = {
    "missing weight": (lambda: (Net(more=True), None), "weight more.bias is missing from the checkpoint, and 1 more"),
    "untied": (lambda: (Net(tied=False), None), "weight head.weight is missing from the checkpoint; a tied weight"),
    "surplus weights": (
        lambda: (nn.Linear(2, 2), None),
        "is of another model: weight bias is missing from the checkpoint, and 1 more",
    ),
    "shape": (lambda: (Net(width=5), None), r"weights/embedding.weight has shape \(11, 7\) there and \(11, 5\) here"),
    "dtype": (
        lambda: (Net().double(), None),
        r"weights/temperature is torch.float32 there and torch.float64 here; make the model in torch.float32",
    ),
    "optimizer": (lambda: (model := Net(), sgd(model)), "has the state of AdamW, and the optimizer is SGD"),
    "one group": (
        lambda: (model := Net(), adamw(model, [p for p in model.parameters() if p.requires_grad])),
        "the optimizer had 2 groups of parameters, and has 1",
    ),
    "other groups": (
        lambda: (model := Net(), adamw(model, swapped(make_groups(model)))),
        "blocks.0.bias is in group 0 of the optimizer, and was not when it was saved",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_refused_and_not_changed(one, name):
    make_other, message = OTHERS[name]
    refused(one[0], *make_other(), message)


def test_weights_alone_have_no_optimizer_to_give(tmp_path):
    model, optimizer = make("plain")
    save(tmp_path, model)
    refused(tmp_path, model, optimizer, "was saved without an optimizer: load it without one")


def test_frozen_weights_are_converted(one):
    folder, model, _ = one
    other = Net(seed=8)
    other.blocks[1].bfloat16()
    load(folder, other)
    assert torch.equal(other.blocks[1].weight, model.blocks[1].weight.bfloat16())


def test_no_checkpoint_is_said_to_be_none(tmp_path):
    refused(tmp_path / "nowhere", Net(), None, "there is no manifest.json", FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="there is no manifest"):
        read_notes(tmp_path)


def test_what_cannot_be_saved_is_refused_before_anything_is_written(one):
    folder, model, optimizer = one
    before = sorted(folder.iterdir())
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(folder, model, optimizer, notes={1, 2})
    with pytest.raises(
        ValueError, match=r"group 0 of the optimizer has a parameter \(11, 7\) that is not of the model"
    ):
        save(folder, Net(), optimizer)
    optimizer.param_groups[1]["hook"] = print
    with pytest.raises(TypeError, match="group 1, hook is builtin_function_or_method"):
        save(folder, model, optimizer)
    with pytest.raises(TypeError, match=r"weights/weight has dtype torch.complex64, which safetensors does not know"):
        save(folder, nn.Linear(2, 2, dtype=torch.complex64))
    assert sorted(folder.iterdir()) == before
    assert load(folder, model)["step"] == 2


def ranges(*bounds):
    return [sharded_checkpoint._Range("weights/w", (10,), torch.float32, start, stop) for start, stop in bounds]


def test_ranges_that_do_not_make_the_whole_are_named():
    divide = sharded_checkpoint._divided
    with pytest.raises(ValueError, match="hold the numbers 0:4, 5:10 of weights/w, of 10: every rank must call save"):
        divide([ranges((0, 4)), ranges((5, 10))])
    with pytest.raises(ValueError, match="hold the numbers 0:6, 5:10"):
        divide([ranges((0, 6)), ranges((5, 10))])
    with pytest.raises(ValueError, match="hold the numbers 0:5 of"):
        divide([ranges((0, 5))])
    assert set(divide([ranges((0, 10)), ranges((0, 10))]).values()) == {0}


def test_what_all_ranks_have_is_written_by_whoever_has_least():
    def named(name, numel):
        return sharded_checkpoint._Range(name, (numel,), torch.float32, 0, numel)

    shared = [named("weights/a", 8), named("weights/b", 3), named("weights/c", 4), named("buffers/d", 90)]
    own = named("weights/own", 5)
    writers = sharded_checkpoint._divided([shared, [*shared, own]])
    assert {one.key: rank for one, rank in writers.items()} == {
        "weights/own": 1,
        "weights/a": 0,
        "weights/b": 1,
        "weights/c": 0,
        "buffers/d": 0,
    }


# --- faults -----------------------------------------------------------------------------------------------------------


def filled(number):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(number)
    return model


def what_is_in(folder):
    """The number that all weights of the checkpoint are, read by one process."""
    model = filled(-1.0)
    notes = load(folder, model)
    values = {float(value) for parameter in model.parameters() for value in parameter.detach().flatten()}
    assert values == {notes}
    return notes


def save_and_fail(folder, number, victim, moment, how):
    """Save; at the `moment`-th operation on files rank `victim` dies, or finds the disk full. How many there were."""
    count = 0

    def watched(function):
        def call(*args, **settings):
            nonlocal count
            if dist.get_rank() == victim:
                count += 1
                if count == moment + 1:
                    if how == "dies":
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise OSError(28, "No space left on device")
            return function(*args, **settings)

        return call

    blocks = sharded_checkpoint._blocks

    def halves(header, held):
        for block in blocks(header, held):
            yield block[: len(block) // 2]
            yield watched(lambda block=block: block[len(block) // 2 :])()

    sharded_checkpoint._blocks = halves
    for name in ("open", "fsync", "replace"):
        setattr(os, name, watched(getattr(os, name)))
    Path.unlink = watched(Path.unlink)
    try:
        save(folder, filled(number), notes=number)
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    except CheckpointError as error:
        return str(error)
    return count


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_checkpoint(tmp_path):
    launch(save_and_fail, 2, tmp_path, 1.0, -1, -1, "")
    (tmp_path / "mine.txt").write_text("stays")
    moments = [launch(save_and_fail, 2, tmp_path, 2.0, victim, -1, "")[victim] for victim in (0, 1)]
    assert what_is_in(tmp_path) == 2.0
    found = {0: [], 1: []}
    number = 2.0
    for victim in (0, 1):
        for moment in range(moments[victim]):
            before, number = what_is_in(tmp_path), number + 1
            with pytest.raises(LaunchError) as caught:
                launch(save_and_fail, 2, tmp_path, number, victim, moment, "dies")
            assert caught.value.kind == "died"
            now = what_is_in(tmp_path)
            assert now in (before, number)
            found[victim].append(now == number)
    assert found[0] == sorted(found[0])  # the old one up to some moment, from there on the new one
    assert found[0][0] is False
    assert found[0][-1] is True
    assert not any(found[1])
    assert len(list(tmp_path.iterdir())) > 4  # the killed ones' files
    launch(save_and_fail, 2, tmp_path, 99.0, -1, -1, "")
    assert what_is_in(tmp_path) == 99.0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    names = {"manifest.json", "mine.txt", *(facts["name"] for facts in manifest["files"])}
    assert {path.name for path in tmp_path.iterdir()} == names


def fail_to_write(folder, victim, kinds):
    """Save, while rank `victim` meets each of these errors; what each rank is told."""
    found = []
    for kind in kinds:

        def write(path, held, kind=kind):
            if dist.get_rank() == victim:
                raise kind("as told")
            return {"bytes": 0, "sha256": ""}

        sharded_checkpoint._write = write
        try:
            save(folder, filled(1.0))
        except Exception as error:
            found.append((type(error), str(error)))
    return found


def test_errors_of_the_system_keep_their_kind_on_every_rank(tmp_path):
    kinds = {  # on the rank that met it: on the others
        PermissionError: OSError,
        IsADirectoryError: OSError,
        TimeoutError: OSError,
        OSError: OSError,
        FileNotFoundError: FileNotFoundError,
        CheckpointError: CheckpointError,
        TypeError: TypeError,
        UnicodeError: ValueError,
    }
    for victim in (0, 1):
        told = launch(fail_to_write, 2, tmp_path, victim, list(kinds))
        assert told[victim] == [(kind, "as told") for kind in kinds]
        assert told[1 - victim] == [(kind, f"rank {victim}: as told") for kind in kinds.values()]
        assert not list(tmp_path.iterdir())


def save_into(paths):
    """What this rank is told of each."""
    found = []
    for path in paths:
        try:
            save(path, filled(1.0))
        except OSError as error:
            found.append((type(error), str(error)))
    return found


def test_a_folder_that_is_none_is_the_same_error_on_every_rank(tmp_path):
    (tmp_path / "file").write_text("stays")
    (tmp_path / "folder" / "manifest.json").mkdir(parents=True)
    first, second = launch(save_into, 2, [tmp_path / "file", tmp_path / "file" / "below", tmp_path / "folder"])
    assert [kind for kind, _ in first] == [FileExistsError, NotADirectoryError, IsADirectoryError]
    assert second == [(OSError, f"rank 0: {text}") for _, text in first]


def test_a_full_disk_on_one_rank_stops_all_and_leaves_nothing(tmp_path):
    launch(save_and_fail, 2, tmp_path, 1.0, -1, -1, "")
    before = sorted(tmp_path.iterdir())
    for victim in (0, 1):
        said = launch(save_and_fail, 2, tmp_path, 2.0, victim, 2, "full")
        assert said[victim] == "OSError: [Errno 28] No space left on device"
        assert f"rank {victim}: [Errno 28] No space left on device" in said[1 - victim]
        assert what_is_in(tmp_path) == 1.0
        assert sorted(tmp_path.iterdir()) == before


# --- manifests of others, and damaged ones of ours --------------------------------------------------------------------

FOREIGN = {
    "web app": '{"name": "my page", "icons": [], "display": "standalone"}',
    "our words in it": json.dumps({"sha256": "0" * 64, "save": "all", "format": 1}, indent=1),
    "format first": '{\n "format": 1,\n "save": true,\n "sha256": ""\n}',
    "list": '["format", "save", "sha256"]',
    "text": "the cargo of the ship",
    "a space": " ",
    "bytes": "\x00\x01\ufffe",
}


def save_where(folder, files):
    """Save beside each of these manifests: what each rank is told, and that the folder is as it was."""
    found = []
    for index, text in enumerate(files):
        path = Path(folder) / str(index)
        if dist.get_rank() == 0:
            path.mkdir()
            (path / "manifest.json").write_text(text)
        dist.barrier()
        try:
            save(path, filled(1.0))
        except ValueError as error:
            found.append((type(error).__name__, str(error)))
        dist.barrier()
        assert [file.name for file in path.iterdir()] == ["manifest.json"]
        assert (path / "manifest.json").read_text() == text
    return found


def test_a_manifest_that_is_not_ours_is_left_alone(tmp_path):
    for rank, found in enumerate(launch(save_where, 2, str(tmp_path), list(FOREIGN.values()))):
        assert len(found) == len(FOREIGN)
        for kind, text in found:
            assert kind == "ValueError"
            assert text.startswith("rank 0: " if rank else str(tmp_path))
            assert "is no manifest of a checkpoint, and would be replaced: save into another folder" in text


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_may_be_replaced(one, name):
    folder, model, optimizer = one
    DAMAGE[name][0](folder)
    save(folder, model, optimizer, notes="again")
    other = Net(seed=4)
    assert load(folder, other) == "again"
    assert equal(weights(model), weights(other))
    assert len(list(folder.iterdir())) == 2


def test_a_manifest_of_ours_may_be_replaced_wherever_it_is_cut_or_changed(tmp_path):
    save(tmp_path, filled(0.0), notes=0.0)
    whole = (tmp_path / "manifest.json").read_bytes()
    cuts = [whole[:size] for size in (0, 1, 5, 17, 60, 200, len(whole) // 2, len(whole) - 1)]
    flips = [whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :] for at in (0, 4, 20, 40, len(whole) // 2)]
    number = 0.0
    for text in (*cuts, *flips, bytes(len(whole)), whole):  # zeros: the size was on disk before the contents
        number += 1
        (tmp_path / "manifest.json").write_bytes(text)
        save(tmp_path, filled(number), notes=number)
        assert what_is_in(tmp_path) == number


def test_without_its_data_files_a_manifest_is_known_by_how_it_begins(tmp_path):
    save(tmp_path, filled(0.0))
    whole = (tmp_path / "manifest.json").read_bytes()
    for text, ours in (
        (whole, True),
        (whole[:60], True),
        (whole[:300] + b"\xff" + whole[300:], True),
        (b"", True),
        (bytes(100), True),
        (whole[:30], False),  # it might be anyone's
    ):
        for file in tmp_path.iterdir():
            file.unlink()
        (tmp_path / "manifest.json").write_bytes(text)
        if ours:
            save(tmp_path, filled(1.0), notes=1.0)
            assert what_is_in(tmp_path) == 1.0
        else:
            with pytest.raises(ValueError, match="would be replaced"):
                save(tmp_path, filled(1.0))
            assert (tmp_path / "manifest.json").read_bytes() == text


# --- what one rank finds ----------------------------------------------------------------------------------------------


def test_damage_that_one_rank_finds_stops_all(saved, tmp_path):
    folder, _ = saved
    source = folder / "ZeRO2-2"
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((source / "manifest.json").read_text())
    flip(tmp_path / manifest["files"][1]["name"], -1)

    def attempt(path):
        model = ZeRO1(Net(seed=6))
        before = weights(model)
        try:
            load(path, model)
        except CheckpointError as error:
            return str(error), equal(before, weights(model))

    said = launch(attempt, 3, tmp_path)
    assert all("is damaged: its checksum is wrong" in message for message, _ in said)
    assert [message.startswith("rank 1: ") for message, _ in said] == [True, False, True]
    assert all(same for _, same in said)


def test_a_group_is_for_plain_modules_only():
    def attempt(path):
        try:
            save(path, DataParallel(Net()), group=dist.group.WORLD)
        except ValueError as error:
            return str(error)

    assert launch(attempt, 1, "nowhere") == ["group is for plain modules: DataParallel has its own, leave it out"]


def test_a_checkpoint_that_is_not_there_is_missing_on_every_rank(tmp_path):
    def attempt(path):
        try:
            load(path, nn.Linear(2, 2))
        except FileNotFoundError as error:
            return str(error)

    assert all("there is no manifest.json" in said for said in launch(attempt, 2, tmp_path))
