"""Training does what the formulas say, and a run that was stopped goes on to the very same bits."""

import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mlsys.models import training, transformer
from mlsys.models.training import Batches, CheckpointError, Diverged, TrainConfig, Trainer
from mlsys.perf.configs import gpt, llama

VOCAB, SEQ = 29, 12
CONFIGS = {
    "gpt": gpt(2, 16, 2, vocab=VOCAB, context=SEQ),
    "llama": llama(1, 16, 4, 24, vocab=VOCAB, context=SEQ, kv_heads=2),
}
SETTINGS = TrainConfig(steps=10, batch=3, seq=SEQ, lr=0.01, seed=5)


def stream(n=500, seed=0):
    """Tokens with something to learn: each is mostly the one before plus 3."""
    random = np.random.default_rng(seed)
    jumps = np.where(random.random(n) < 0.8, 3, random.integers(0, VOCAB, n))
    return (jumps.cumsum() % VOCAB).astype(np.uint16)


def model(style="gpt", seed=0, dtype=None):
    made = transformer.Transformer(CONFIGS[style], dtype=dtype)
    return transformer.init(made, torch.Generator().manual_seed(seed))


def trainer(style="gpt", seed=0, dtype=None, **changes):
    return Trainer(model(style, seed, dtype), stream(), replace(SETTINGS, **changes), notes={"from": "test"})


def run(trainer, steps):
    return [trainer.step() for _ in range(steps)]


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- the schedule -----------------------------------------------------------------------------------------------------


def test_schedule_rises_in_a_line_and_falls_in_a_cosine():
    config = TrainConfig(steps=101, lr=2.0, warmup=20 / 101, floor=0.1)
    rates = [training.learning_rate(step, config) for step in range(101)]
    assert rates[:20] == pytest.approx([2.0 * (i + 1) / 20 for i in range(20)])
    assert rates[20] == pytest.approx(2.0)
    assert rates[60] == pytest.approx((2.0 + 0.2) / 2)  # half way from 20 to 100
    assert rates[40] == pytest.approx(0.2 + 1.8 * (1 + math.sqrt(0.5)) / 2)
    assert rates[100] == pytest.approx(0.2)
    assert rates[20:] == sorted(rates[20:], reverse=True)


@given(st.integers(1, 300), st.floats(0, 1), st.floats(0, 1))
def test_schedule_stays_within_its_bounds(steps, warmup, floor):
    config = TrainConfig(steps=steps, lr=1.0, warmup=warmup, floor=floor)
    rates = [training.learning_rate(step, config) for step in range(steps)]
    assert all(0 < rate <= 1 + 1e-12 for rate in rates) or floor == 0
    assert max(rates) == pytest.approx(1.0)
    rising = round(warmup * steps)
    assert min(rates[rising:], default=1.0) >= floor - 1e-12


# --- the step ---------------------------------------------------------------------------------------------------------


def test_matrices_are_decayed_and_vectors_are_not():
    for style in CONFIGS:
        made = model(style)
        names = {id(parameter): name for name, parameter in made.named_parameters()}
        matrices, vectors = training.decay_groups(made)
        assert sorted(names[id(p)] for p in matrices + vectors) == sorted(names.values())
        assert all(p.ndim == 2 for p in matrices)
        assert all(names[id(p)].endswith("bias") or "norm" in names[id(p)] for p in vectors)
        assert any("embedding" in names[id(p)] for p in matrices)


@pytest.mark.parametrize("clip", [0.05, 1e9])
@pytest.mark.parametrize("style", CONFIGS)
def test_steps_follow_the_formula(style, clip):
    """Against the docstring's equations, spelled out in float64."""
    ours = trainer(style, dtype=torch.float64, clip=clip, weight_decay=0.3)
    twin, config = model(style, dtype=torch.float64), ours.config
    parameters = list(twin.parameters())
    mean, square = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for i in range(4):
        inputs, targets = ours.batches(i)
        log_p = twin(inputs).log_softmax(-1)
        loss = -log_p.gather(-1, targets[..., None]).mean()
        gradient = torch.autograd.grad(loss, parameters)
        norm = math.sqrt(sum((g**2).sum().item() for g in gradient))
        rate = training.learning_rate(i, config)
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradient, mean, square, strict=True):
                g = g * min(1.0, clip / norm)
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.95).add_(0.05 * g**2)
                m_hat, v_hat = m / (1 - 0.9 ** (i + 1)), v / (1 - 0.95 ** (i + 1))
                decay = 0.3 if p.ndim == 2 else 0.0
                p.sub_(rate * (m_hat / (v_hat.sqrt() + config.eps) + decay * p))
        assert ours.step() == pytest.approx(loss.item(), rel=1e-9)
        for p, q in zip(ours.model.parameters(), parameters, strict=True):
            assert torch.allclose(p, q, rtol=1e-5, atol=1e-7)
    assert ours.done == 4


def test_one_batch_is_learnt_by_heart():
    tokens = np.arange(SEQ + 1, dtype=np.int64)[::-1].copy()  # a single window
    taught = Trainer(model("llama"), tokens, TrainConfig(steps=80, batch=2, seq=SEQ, lr=0.02))
    losses = run(taught, 80)
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.3)
    assert losses[-1] < 0.05


def test_loss_on_unseen_tokens_falls():
    taught, held_out = trainer(steps=80), stream(seed=1)
    before = training.evaluate(taught.model, held_out, SEQ)
    run(taught, 80)
    assert before == pytest.approx(math.log(VOCAB), abs=0.2)
    assert training.evaluate(taught.model, held_out, SEQ) < before - 0.6


def test_run_ends_where_it_was_planned_to():
    done = trainer(steps=2)
    run(done, 2)
    assert done.finished
    with pytest.raises(ValueError, match="all 2 steps are done"):
        done.step()


def test_loss_that_is_no_number_stops_before_the_weights_do():
    broken = trainer()
    run(broken, 2)
    with torch.no_grad():
        broken.model.norm.weight[0] = math.inf
    before = weights(broken)
    with pytest.raises(Diverged, match=r"step 2: the loss is .* learning rate below lr=0\.01"):
        broken.step()
    assert broken.done == 2
    assert equal(weights(broken), before)


# --- batches and evaluation -------------------------------------------------------------------------------------------


def test_batch_depends_on_seed_and_step_alone():
    tokens = np.arange(1000, dtype=np.uint16)
    batches, again = Batches(tokens, 4, 7, seed=3), Batches(tokens, 4, 7, seed=3)
    forward = [batches(i) for i in range(5)]
    for i in reversed(range(5)):  # in another order, from another object
        for a, b in zip(forward[i], again(i), strict=True):
            assert torch.equal(a, b)
    everything = [batch[0] for batch in forward] + [Batches(tokens, 4, 7, seed=4)(0)[0]]
    assert len({str(batch.tolist()) for batch in everything}) == 6


def test_batches_are_the_same_on_every_machine():
    inputs, _ = Batches(np.arange(10_000), 4, 1, seed=3)(5)
    raw = np.random.Philox(counter=[0, 5, 0, 0], key=[3, 0]).random_raw(4)
    assert inputs[:, 0].tolist() == [int(bits) % 9_999 for bits in raw]


def test_targets_are_the_next_tokens_and_every_place_is_drawn():
    tokens = np.arange(20, dtype=np.int64)
    batches = Batches(tokens, 8, 5)
    starts = []
    for step in range(100):
        inputs, targets = batches(step)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.shape == targets.shape == (8, 5)
        assert torch.equal(targets, inputs + 1)
        starts += inputs[:, 0].tolist()
    counts = np.bincount(starts, minlength=15)
    assert len(counts) == 15  # the last window ends with the last token
    assert counts.min() > 30  # of 53 expected
    assert counts.max() < 80


def test_evaluation_is_the_mean_over_windows_side_by_side():
    made, tokens = model(), stream(5 * SEQ + 3)
    each = [
        made.loss(*(torch.from_numpy(tokens[i * SEQ + s :][:SEQ].astype(np.int64))[None] for s in (0, 1))).item()
        for i in range(5)
    ]
    assert training.evaluate(made, tokens, SEQ) == pytest.approx(np.mean(each), rel=1e-5)
    assert training.evaluate(made, tokens, SEQ, batch=2) == pytest.approx(np.mean(each), rel=1e-5)
    assert training.evaluate(made, tokens, SEQ, windows=2) == pytest.approx((each[0] + each[4]) / 2, rel=1e-5)
    assert training.evaluate(made, tokens, SEQ, windows=99) == pytest.approx(np.mean(each), rel=1e-5)


def test_evaluation_changes_nothing():
    looked, unlooked = trainer(), trainer()
    run(looked, 2)
    training.evaluate(looked.model, stream(), SEQ)
    assert looked.model.training
    run(looked, 2)
    run(unlooked, 4)
    assert equal(weights(looked), weights(unlooked))


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stopped_after", [0, 1, 4, 9, 10])
@pytest.mark.parametrize("style", CONFIGS)
def test_resumed_run_is_bit_equal(style, stopped_after, tmp_path):
    straight = trainer(style)
    losses = run(straight, 10)
    straight.save(tmp_path / "straight")

    first = trainer(style)
    run(first, stopped_after)
    first.save(tmp_path / "half")
    run(first, min(2, 10 - stopped_after))  # steps after the save are lost in a kill
    second = Trainer.resume(tmp_path / "half", model(style, seed=77), stream())
    assert second.done == stopped_after
    assert second.notes == {"from": "test"}
    assert run(second, 10 - stopped_after) == losses[stopped_after:]
    assert equal(weights(second), weights(straight))
    second.save(tmp_path / "resumed")
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "straight").read_bytes()


def test_resumed_again_and_again(tmp_path):
    straight = trainer()
    run(straight, 10)
    current = trainer()
    for _ in range(10):
        run(current, 1)
        current.save(tmp_path / "c")
        current = Trainer.resume(tmp_path / "c", model(seed=1), stream())
    assert equal(weights(current), weights(straight))


def test_restored_trainer_forgets_what_it_did(tmp_path):
    one = trainer()
    run(one, 3)
    one.save(tmp_path / "c")
    before = weights(one)
    run(one, 4)
    one.restore(training.read(tmp_path / "c"))
    assert equal(weights(one), before)
    straight = trainer()
    run(straight, 5)
    run(one, 2)
    assert equal(weights(one), weights(straight))


def test_checkpoint_is_one_plain_safetensors_file(tmp_path):
    saved = trainer()
    run(saved, 3)
    saved.save(tmp_path / "c")
    with safe_open(tmp_path / "c", framework="pt") as file:
        assert list(file.metadata()) == ["training"]  # several would be written in any order
        information = json.loads(file.metadata()["training"])
        names = set(file.keys())
    parameters = {name for name, _ in saved.model.named_parameters()}
    assert names == {f"{part}.{name}" for part in ("model", "mean", "square") for name in parameters}
    assert (information["done"], information["config"]["steps"]) == (3, 10)
    assert information["environment"]["threads"] == torch.get_num_threads()
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """The path of a checkpoint of some 4 KB."""
    tiny = transformer.Transformer(gpt(1, 2, 1, vocab=2, context=2))
    path = tmp_path_factory.mktemp("small") / "whole"
    Trainer(tiny, np.zeros(9, np.uint16), TrainConfig(3, 1, 2)).save(path)
    return path


@settings(max_examples=200)
@given(st.data())
def test_any_changed_bit_and_any_missing_end_is_noticed(small_file, data):
    whole, damaged = small_file.read_bytes(), small_file.with_name("damaged")
    at, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    damaged.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
    with pytest.raises(CheckpointError, match="damaged"):
        training.read(damaged)
    damaged.write_bytes(whole[:at])
    with pytest.raises(CheckpointError, match="damaged"):
        training.read(damaged)


def test_what_is_no_checkpoint_is_named(tmp_path):
    transformer.save(model(), tmp_path / "model")
    with pytest.raises(CheckpointError, match="model is no checkpoint"):
        training.read(tmp_path / "model")
    with pytest.raises(FileNotFoundError):
        training.read(tmp_path / "none")


def test_other_version_of_the_format_is_named(tmp_path, monkeypatch):
    with monkeypatch.context() as later:
        later.setattr(training, "FORMAT", 2)
        trainer().save(tmp_path / "c")
    with pytest.raises(CheckpointError, match="has format 2, this version reads 1"):
        training.read(tmp_path / "c")


def test_checkpoint_of_another_run_is_refused(tmp_path):
    trainer().save(tmp_path / "c")
    checkpoint = training.read(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"other settings: steps, lr$"):
        trainer(steps=11, lr=0.5).restore(checkpoint)
    with pytest.raises(CheckpointError, match="other tokens"):
        Trainer.resume(tmp_path / "c", model(), stream(seed=1))


def test_checkpoint_of_another_model_is_refused(tmp_path):
    trainer().save(tmp_path / "c")
    for other, told in (
        (gpt(1, 16, 2, vocab=VOCAB, context=SEQ), r"mean\.blocks\.1\.attention.* and missing here"),
        (gpt(3, 16, 2, vocab=VOCAB, context=SEQ), r"mean\.blocks\.2\.attention.* is missing there"),
        (
            gpt(2, 8, 2, vocab=VOCAB, context=SEQ),
            r"mean\.blocks.* is \(16,.* there and \(8,.* here",
        ),
    ):
        with pytest.raises(CheckpointError, match=told):
            Trainer.resume(tmp_path / "c", transformer.Transformer(other), stream())


def test_other_rounding_is_refused_or_told(tmp_path):
    trainer().save(tmp_path / "c")
    torch.set_num_threads(2)
    with pytest.raises(CheckpointError, match="bit-equally: threads 1 then, 2 now; restore them, or"):
        Trainer.resume(tmp_path / "c", model(), stream())
    with pytest.warns(UserWarning, match="threads 1 then, 2 now"):
        resumed = Trainer.resume(tmp_path / "c", model(), stream(), exact=False)
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trainer.resume(tmp_path / "c", model(), stream(), exact=False)
    assert resumed.done == 0


def test_failed_save_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    saved = trainer()
    saved.save(tmp_path / "c")
    before = (tmp_path / "c").read_bytes()
    run(saved, 1)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as faulty:
        faulty.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            saved.save(tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": 2.0},
        {"batch": True},
        {"seq": -1},
        {"seed": -1},
        {"seed": 2**64},
        {"lr": 0.0},
        {"lr": math.nan},
        {"eps": -1.0},
        {"clip": 0.0},
        {"weight_decay": -0.1},
        {"warmup": 1.5},
        {"floor": -0.1},
        {"betas": (0.9, 1.0)},
        {"betas": (0.9,)},
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_settings_that_cannot_be_are_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name}="):
        TrainConfig(**({"steps": 5} | wrong))


@pytest.mark.usefixtures("unchecked_types")
def test_streams_that_cannot_be_are_named():
    with pytest.raises(ValueError, match="holds 12 tokens: a window of seq=12"):
        Batches(np.zeros(12, np.uint16), 1, 12)
    with pytest.raises(ValueError, match="flat array of integers, got float64"):
        Batches(np.zeros(50), 1, 12)
    with pytest.raises(ValueError, match=r"of shape \(5, 10\)"):
        Batches(np.zeros((5, 10), np.uint16), 1, 12)
    with pytest.raises(ValueError, match="holds 12 tokens: seq=12 needs 13"):
        training.evaluate(model(), np.zeros(12, np.uint16), 12)
