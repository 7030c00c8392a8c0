"""A trained model is made once, is the same each time, and is made again when anything it depends on has changed."""

import logging
import math
from dataclasses import replace

import pytest
import torch

from mlsys.attention import naive
from mlsys.data import text, trained
from mlsys.data.trained import Recipe
from mlsys.models import training
from mlsys.models.training import TrainConfig
from mlsys.perf.configs import gpt


@pytest.fixture
def recipe(tmp_path):
    folder = tmp_path / "words"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.txt").write_text("".join(f"the cat sat on mat {i * j % 7}.\n" for j in range(30)))
    shape = gpt(1, 16, 2, vocab=256, context=16)
    return Recipe(shape, TrainConfig(steps=25, batch=4, seq=16, lr=0.02), source=str(folder))


@pytest.fixture
def get(tmp_path):
    def call(recipe, **options):
        return trained.trained(recipe, cache_dir=tmp_path / "cache", **options)

    return call


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_first_call_trains_and_the_next_one_reads(recipe, get, capsys, monkeypatch):
    model, tokenizer = get(recipe)
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("training the model 'own' (once): step 5 of 25, ")
    assert told[-1].startswith("trained the model 'own': ")
    assert tokenizer == text.Bytes()
    assert not model.training
    assert model.config == recipe.config

    monkeypatch.setattr(training.Trainer, "step", None)
    again, _ = get(recipe)
    assert capsys.readouterr().err == ""
    assert same(model, again)


def test_training_is_reproducible_whatever_the_threads(recipe, get, tmp_path):
    one, _ = get(recipe)
    torch.set_num_threads(2)
    two, _ = trained.trained(recipe, cache_dir=tmp_path / "other")
    assert torch.get_num_threads() == 2
    assert same(one, two)


def test_seed_decides_the_first_weights(recipe, get):
    still = replace(recipe.train, steps=1, lr=1e-12)  # as good as untrained
    models = [get(replace(recipe, train=replace(still, seed=seed)))[0] for seed in (0, 1)]
    assert not torch.allclose(*(model.token_embedding.weight for model in models), atol=1e-3)


def test_it_has_learnt_something(recipe, get):
    model, tokenizer = get(recipe)
    _, held_out = text.split(text.corpus(recipe.source))
    loss = training.evaluate(model, tokenizer.encode(held_out[0].text), 16)
    assert loss < math.log(256) - 1.5


def test_anything_it_depends_on_makes_another(recipe, get, tmp_path, monkeypatch):
    made = [get(recipe)]
    made.append(get(replace(recipe, train=replace(recipe.train, seed=1))))
    made.append(get(replace(recipe, config=replace(recipe.config, layers=2))))
    (tmp_path / "words" / "new.txt").write_text("another file\n")
    made.append(get(recipe))
    with monkeypatch.context() as later:
        later.setattr(trained, "VERSION", trained.VERSION + 1)
        made.append(get(recipe))
    with monkeypatch.context() as later:
        later.setattr(training, "environment", lambda device: {"torch": "99.0"})
        made.append(get(recipe))
    assert len(list((tmp_path / "cache" / "trained").iterdir())) == len(made)


def test_damaged_file_is_made_again(recipe, get, tmp_path, caplog, capsys):
    model, _ = get(recipe)
    (path,) = (tmp_path / "cache" / "trained").iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with caplog.at_level(logging.WARNING):
        again, _ = get(recipe)
    assert "training again" in caplog.text
    assert same(model, again)
    capsys.readouterr()
    get(recipe)
    assert capsys.readouterr().err == ""


def test_folder_that_cannot_be_written_is_done_without(recipe, get, tmp_path, caplog):
    model, _ = get(recipe)
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        unkept, _ = trained.trained(recipe, cache_dir=tmp_path / "file")
    assert "cannot keep the model" in caplog.text
    assert same(model, unkept)


def test_only_the_folder_that_was_given_is_written_to(recipe, tmp_path, monkeypatch):
    (tmp_path / "x" / "mine").mkdir(parents=True)
    trained.trained(recipe, cache_dir=tmp_path / "x" / "mine")
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["mine"]
    assert sorted(path.name for path in (tmp_path / "x" / "mine").iterdir()) == ["text", "trained"]
    monkeypatch.chdir(tmp_path / "x" / "mine")
    monkeypatch.setattr(training.Trainer, "step", None)
    trained.trained(recipe, cache_dir=".")  # found there, so not trained again


def test_global_generator_is_left_as_it_is(recipe, get, tmp_path):
    (tmp_path / "file").touch()
    for call in (get, get, lambda recipe: trained.trained(recipe, cache_dir=tmp_path / "file")):  # made, read, not kept
        before = torch.random.get_rng_state()
        call(recipe)
        assert torch.equal(torch.random.get_rng_state(), before)


def test_attention_can_be_chosen(recipe, get):
    calls = []

    def counted(q, k, v, *, causal):
        calls.append(causal)
        return naive.attention(q, k, v, causal=causal)

    for _ in range(2):  # just trained, and read
        calls.clear()
        model, tokenizer = get(recipe, attention=counted)
        model(torch.tensor([tokenizer.encode("the cat").tolist()]))
        assert calls == [True]


@pytest.mark.parametrize(("name", "parameters"), [("small", 117_056), ("tiny", 20_064)])
def test_named_recipes_have_the_sizes_they_state(name, parameters):
    from mlsys.models.transformer import Transformer

    assert sum(p.numel() for p in Transformer(trained.RECIPES[name].config, device="meta").parameters()) == parameters


def test_recipes_that_cannot_be_are_named(recipe):
    with pytest.raises(ValueError, match="recipe='large': there are small, tiny"):
        trained.trained("large")
    with pytest.raises(ValueError, match=r"config\.vocab=300"):
        replace(recipe, config=replace(recipe.config, vocab=300))
    with pytest.raises(ValueError, match=r"train\.seq=16 is longer than config\.context=8"):
        replace(recipe, config=replace(recipe.config, context=8))
