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
    assert [r["impl"] for r in rows] == ["naive", "flash", "flash numba", "torch sdpa"]


def test_peer_and_dtype_select(capsys):
    assert main(["bench", "attention.flash", "--smoke", "--peer", "none", "--dtype", "bfloat16", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {r["impl"] for r in rows} == {"naive", "flash", "flash numba"}
    assert {r["case"]["dtype"] for r in rows} == {"bfloat16"}


def test_times_saves_and_reports(capsys, tmp_path, monkeypatch):
    from mlsys.bench import find

    bench = find.load("attention.flash")
    monkeypatch.setattr(find, "names", lambda: ["attention.flash"])
    monkeypatch.setattr(bench.__class__, "select", lambda self, size, *_: [self.cases["quick"][0]])
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

    ran = core.measure

    def fails_at_the_second(bench, case, *rest):
        if case["n"] != 512:
            raise MemoryError("too large for this test")
        return ran(bench, case, *rest)

    monkeypatch.setattr(core, "measure", fails_at_the_second)
    arguments = ["bench", "attention.flash", "--quick", "--dtype", "float32", "--save", "--results", str(tmp_path)]
    with pytest.raises(MemoryError):
        main(arguments)
    (saved,) = tmp_path.glob("*/attention.flash.jsonl")
    assert len(saved.read_text().splitlines()) == 4
    assert "n=512" in capsys.readouterr().out


def test_your_function_joins_the_table_once_it_passes(capsys, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(RIGHT)
    assert main(["bench", "attention.flash", "--smoke", "--impl", f"{mine}:attention", "--json"]) == 0
    roles = {json.loads(line)["role"] for line in capsys.readouterr().out.splitlines()}
    assert "yours" in roles


def test_a_wrong_function_is_not_timed_and_its_verdict_is_printed_as_check_prints_it(capsys, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(WRONG)
    assert main(["bench", "attention.flash", "--smoke", "--impl", f"{mine}:attention"]) == 1
    benched = capsys.readouterr()
    assert main(["check", "attention.flash", f"{mine}:attention"]) == 1
    assert benched.out == capsys.readouterr().out
    assert "\nhint    behaves like" in benched.out
    assert benched.err == "not timed: it has to be right first\n"
    assert main(["bench", "attention.flash", "--smoke", "--impl", f"{mine}:attention", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is False
    assert found["failure"]["hint"]


TOY = '''"""How fast is a sum?"""
from mlsys.bench import Benchmark, Impl, Work

bench = Benchmark(
    __file__,
    cases=dict.fromkeys(("quick", "default", "full"), [{"n": n} for n in (10, 20, 30)]),
    inputs=lambda case, device: list(range(case["n"])),
    work=lambda case, numbers: Work(flops=len(numbers), bytes=8 * len(numbers)),
    impls={"sum": Impl(lambda: sum, "reference"), "peer": Impl(lambda: sum, "peer")},
    subject="sum",
    prepare=lambda function, case, numbers: lambda: function(numbers),
    verify=lambda case, numbers, got, want: (abs(got - want), 0.0),
)
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """There is one benchmark, of sums, in a folder of its own; `mine.py:f` with the source it is called with."""
    from mlsys.bench import find
    from mlsys.perf import _measure

    (tmp_path / "benchmarks" / "toys").mkdir(parents=True)
    (tmp_path / "benchmarks" / "toys" / "sums.py").write_text(TOY)
    monkeypatch.setattr(find, "folder", lambda: tmp_path / "benchmarks")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLSYS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_measure, "_measure", lambda *_: Limits(flops=1e9, bandwidth=1e9))
    _measure.limits("float32", 1)  # so that the child finds them

    def mine(*lines):
        (tmp_path / "mine.py").write_text("import os\ncalls = []\ndef f(xs):\n    " + "\n    ".join(lines))
        return ["bench", "sums", "--impl", "mine.py:f"]

    return mine


def test_right_once_is_not_right(capsys, toy):
    arguments = toy("calls.append(1)", "return sum(xs) if len(xs) < 20 or len(calls) < 2 else 0")
    assert main([*arguments, "--json"]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    yours = {r["case"]["n"]: r for r in rows if r["impl"] == "yours"}
    assert yours[10]["seconds"] > 0
    assert (yours[20]["status"], yours[20]["seconds"], yours[20]["share"]) == ("wrong", None, None)
    assert all(r["seconds"] > 0 for r in rows if r["impl"] != "yours")


def test_exit_is_a_failure(capsys, toy):
    assert main([*toy("raise SystemExit(0)"), "--smoke"]) == 1
    printed = capsys.readouterr()
    assert "raised SystemExit: 0, at mine.py:4 in f" in printed.out
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("while len(xs) == 20: pass", "no answer within 2 s at mine.py:4 in f: `while len(xs) == 20: pass`"),
        ("os._exit(0) if len(xs) == 20 else 0", "the process exited with status 0 before it had answered"),
    ],
)
def test_what_has_to_be_stopped_ends_the_command_with_what_was_measured(capsys, toy, tmp_path, line, says):
    assert main([*toy(line, "return sum(xs)"), "--limit", "2", "--save", "--report", "report"]) == 1
    printed = capsys.readouterr()
    assert f"mlsys: mine.py:f is stopped: {says}" in printed.err
    assert says in printed.out
    assert "[3/3]" not in printed.err
    (saved,) = (tmp_path / "results").glob("*/toys.sums.jsonl")
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [(r["case"]["n"], r["impl"]) for r in rows] == [(10, "sum"), (10, "peer"), (10, "yours"), (20, "yours")]
    assert rows[2]["seconds"] > 0
    assert "n=20" in (tmp_path / "report" / "index.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--report", "afile"], "--report afile: "),
        (["--report", "afile/below"], "afile is not a folder"),
        (["--save", "--results", "afile"], "--results afile: "),
        (["--save", "--results", "old"], "toys.sums.jsonl:1 is not a benchmark record"),
    ],
)
def test_where_nothing_can_be_written_nothing_is_measured(capsys, toy, tmp_path, arguments, message):
    (tmp_path / "afile").write_text("")
    (tmp_path / "old" / "toy").mkdir(parents=True)
    (tmp_path / "old" / "toy" / "toys.sums.jsonl").write_text("{\n")
    assert main(["bench", "sums", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "[1/3]" not in printed.err
    assert (tmp_path / "afile").read_text() == ""


def test_results_are_not_looked_at_unless_they_are_to_be_saved(toy, tmp_path, capsys):
    (tmp_path / "results").write_text("a file")
    assert main(["bench", "sums", "--smoke", "--save"]) == 0


def test_a_backend_stands_for_its_technique(capsys):
    for name in ("bm25_numba", "retrieval.bm25_numba", "bm25"):
        assert main(["bench", name, "--smoke", "--peer", "none", "--json"]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert {r["benchmark"] for r in rows} == {"retrieval.bm25"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "attention.flsh"], "did you mean attention.flash"),
        (["bench", "attention.naive"], "attention.naive has no benchmark of its own; these have: attention.flash"),
        (["bench", "attention.flash", "--limit", "0"], "expected a positive number of seconds"),
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


def test_cuda_where_there_is_none(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", "attention.flash", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
