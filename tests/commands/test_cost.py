"""`mlsys cost` prints every formula with its numbers, and plain JSON of the same."""

import json

import pytest

from mlsys import cli
from mlsys.commands import cost


@pytest.fixture
def mlsys(capsys):
    def run(*arguments):
        status = cli.main(["cost", *arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_train_shows_formula_numbers_and_result(mlsys):
    status, out, err = mlsys("train", "--model", "gpt3", "--gpus", "1024", "--tp", "8", "--pp", "16")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.strip().startswith("N_device"))
    assert "1,364,095,776" in lines[at]
    assert lines[at + 1].strip() == "= N/(t·p)"
    assert lines[at + 2].strip() == "= 1.746e11/(8·16)"
    assert "Time of a step (bfloat16)" in lines


def test_json_has_the_same_lines(mlsys):
    status, out, _ = mlsys("serve", "--model", "llama-2-13b", "--batch", "1", "--context", "1024", "--json")
    assert status == 0
    rows = {row["name"]: row for row in map(json.loads, out.splitlines())}
    assert rows["memory"]["value"] == pytest.approx(8.021e-3, rel=1e-3)
    assert rows["memory"]["formula"] == "(read + cache)/(n·bandwidth)"
    assert rows["memory"]["section"].startswith("A decode step")


def test_allreduce_ranks_the_algorithms(mlsys):
    status, out, _ = mlsys("allreduce", "--ranks", "8", "--size", "4KiB", "--latency", "5us", "--bandwidth", "25GB")
    assert status == 0
    table = [line for line in out.splitlines() if "fastest" in line]
    assert len(table) == 1
    assert table[0].startswith("recursive_doubling")  # small: few steps win
    _, out, _ = mlsys("allreduce", "--ranks", "8", "--size", "1GiB", "--bandwidth", "25GB", "--json")
    best = next(row for row in map(json.loads, out.splitlines()) if row["fastest"])
    assert best["algorithm"] in ("ring", "halving_doubling")
    assert best["bytes_formula"] == "2·S·(n − 1)/n"


def test_models_are_listed(mlsys):
    _, out, _ = mlsys("models", "--json")
    sizes = {row["model"]: row["parameters"] for row in map(json.loads, out.splitlines())}
    assert sizes["llama-3-8b"] == 8_030_261_248
    _, out, _ = mlsys("models")
    assert "Touvron et al. 2023" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "train|serve|allreduce|models"),
        (["train", "--model", "gpt33"], "did you mean gpt3"),
        (["train", "--hardware", "h1000"], "h100"),
        (["train", "--gpus", "7", "--tp", "2"], "gpus=7"),
        (["train", "--hardware", "tpu-v1"], "int8"),
        (["serve", "--gpus", "5"], "gpus=5"),
        (["allreduce", "--size", "3x"], "64MiB"),
        (["allreduce", "--bandwidth", "400Gb"], "bits"),
        (["allreduce", "--bandwidth", "0"], "bandwidth=0"),
        (["train", "--tokens", "inf"], "tokens=inf"),
        (["train", "--tokens", "nan"], "tokens=nan"),
        (["serve", "--model", "llama-3-70b", "--gpus", "12"], "gpus=12"),
        (["allreduce", "--latency", "soon"], "5us"),
        (["allreduce", "--hardware", "tpu-v1"], "--bandwidth"),
        (["allreduce", "--hardware", "tpu-v4"], "--latency"),
        (["allreduce", "--ranks", "0"], "n"),
    ],
)
def test_bad_request_is_one_line(mlsys, arguments, says):
    status, out, err = mlsys(*arguments)
    assert status == 2
    assert out == ""
    assert err.startswith("mlsys: ")
    assert err.count("\n") == 1
    assert says in err


@pytest.mark.parametrize(
    ("text", "value"),
    [("4096", 4096), ("4KiB", 4096), ("64 MiB", 2**26), ("25GB", 25e9), ("1e6", 1e6), ("1.5kB", 1500)],
)
def test_size(text, value):
    assert cost.size(text) == value


@pytest.mark.parametrize(("text", "value"), [("5us", 5e-6), ("1.5 ms", 1.5e-3), ("0.1", 0.1), ("2µs", 2e-6)])
def test_duration(text, value):
    assert cost.duration(text) == pytest.approx(value)
