"""`mlsys bench` from the command line: what it prints, saves, refuses, and its exit status."""

import json

import pytest

from mlsys.bench import machine
from mlsys.bench.machine import Limits
from mlsys.cli import main

RIGHT = """
import torch
def attention(q, k, v, *, causal=False, scale=None, block_q=None, block_k=None):
    from mlsys.attention import flash
    return flash.attention(q, k, v, causal=causal, scale=scale, block_q=block_q, block_k=block_k)
"""
WRONG = """
import torch
def attention(q, k, v, *, causal=False, scale=None, block_q=None, block_k=None):
    return torch.softmax(q @ k.mT, -1) @ v
"""


@pytest.fixture(autouse=True)
def known_limits(monkeypatch):
    monkeypatch.setattr(machine, "limits", lambda *_: Limits(flops=1e11, bandwidth=2e10))


def test_smoke_of_one(capsys):
    assert main(["bench", "attention.flash", "--smoke"]) == 0
    captured = capsys.readouterr()
    assert "naive (reference)" in captured.out
    assert "torch sdpa (peer)" in captured.out
    assert "[1/1] attention.flash" in captured.err


def test_json_lines(capsys):
    assert main(["bench", "flash", "--smoke", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["impl"] for r in rows] == ["naive", "flash", "torch sdpa"]


def test_peer_and_dtype_select(capsys):
    assert main(["bench", "attention.flash", "--smoke", "--peer", "none", "--dtype", "bfloat16", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {r["impl"] for r in rows} == {"naive", "flash"}
    assert {r["case"]["dtype"] for r in rows} == {"bfloat16"}


def test_times_saves_and_reports(capsys, tmp_path, monkeypatch):
    from mlsys.bench import find

    bench = find.load("attention.flash")
    monkeypatch.setattr(find, "names", lambda: ["attention.flash"])
    monkeypatch.setattr(bench.__class__, "select", lambda self, size, dtypes=None: [self.cases["quick"][0]])
    results, report = tmp_path / "results", tmp_path / "report"
    arguments = ["bench", "--quick", "--save", "--results", str(results), "--report", str(report)]
    assert main(arguments) == 0
    (saved,) = results.glob("*/attention.flash.jsonl")
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    assert all(r["seconds"] > 0 and r["peak_bytes"] > 0 and r["share"] > 0 for r in rows)
    assert "flash" in (report / "index.html").read_text()
    assert capsys.readouterr().out.rstrip().endswith("index.html")


def test_what_was_measured_is_saved_when_a_later_case_fails(capsys, tmp_path, monkeypatch):
    from mlsys.bench import core

    ran = core._run_case

    def fails_at_the_second(bench, case, *rest):
        if case["n"] != 512:
            raise MemoryError("too large for this test")
        return ran(bench, case, *rest)

    monkeypatch.setattr(core, "_run_case", fails_at_the_second)
    arguments = ["bench", "attention.flash", "--quick", "--dtype", "float32", "--save", "--results", str(tmp_path)]
    with pytest.raises(MemoryError):
        main(arguments)
    (saved,) = tmp_path.glob("*/attention.flash.jsonl")
    assert len(saved.read_text().splitlines()) == 3
    assert "n=512" in capsys.readouterr().out


def test_your_function_joins_the_table_once_it_passes(capsys, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(RIGHT)
    assert main(["bench", "attention.flash", "--smoke", "--impl", f"{mine}:attention", "--json"]) == 0
    roles = {json.loads(line)["role"] for line in capsys.readouterr().out.splitlines()}
    assert "yours" in roles


def test_a_wrong_function_is_refused_with_its_hint(capsys, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(WRONG)
    assert main(["bench", "attention.flash", "--smoke", "--impl", f"{mine}:attention"]) == 2
    message = capsys.readouterr().err
    assert "not timed" in message
    assert "hint" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "attention.flsh"], "did you mean attention.flash"),
        (["bench", "--impl", "x.py:f"], "--impl needs the one technique"),
        (["bench", "--peer", "bm25s"], "--peer needs one technique"),
        (["bench", "attention.flash", "--peer", "bm25s"], "has the peers torch sdpa"),
        (["bench", "attention.flash", "--dtype", "int3"], "has cases in bfloat16, float32"),
        (["bench", "attention.flash", "--smoke", "--threads", "0"], "threads=0"),
        (["bench", "attention.flash", "--impl", "nowhere.py:f"], "nowhere.py"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(capsys, arguments, message):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_cuda_where_there_is_none(capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert main(["bench", "attention.flash", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
