"""A case on several ranks: they agree on all that they do, the slowest counts, and one that fails ends as a row."""

import dataclasses
import textwrap

import psutil
import pytest

from mlsys.bench import find, isolate, ranks, run
from mlsys.bench.core import Settings
from mlsys.bench.ranks import _blame, _listening, _say
from mlsys.bench.timing import MIN_RUNS, interleave
from mlsys.bench.trial import RaisedOnRank
from mlsys.perf import _measure
from mlsys.perf._measure import Limits

# The ranks add up what each of them has. `seen` keeps what a rank did, so that the figures of the last one show it.
TOY = '''
"""How fast is a sum over ranks?"""
import torch
import torch.distributed as dist

from mlsys.bench import Benchmark, Impl, Work
from mlsys.bench.ranks import rank, size

CASES = [{"ranks": ranks, "n": 10} for ranks in (2, 1, 3)]
calls = {"reference": 0, "peer": 0}


def counted(name):
    def total(numbers):
        calls[name] += 1
        out = numbers.clone()
        dist.all_reduce(out)
        return out

    return total


def figures(case, numbers, got):
    every = [None] * size()
    dist.all_gather_object(every, (rank(), torch.get_num_threads()))
    return {"ranks": len(set(every)), "threads": max(t for _, t in every), "mine": rank()}


def off(case, numbers, got, want):
    return float((got - want).abs().max()) + (rank() == size() - 1) * case.get("off", 0.0), 1e-6


bench = Benchmark(
    __file__,
    cases=dict.fromkeys(("quick", "default", "full"), CASES),
    inputs=lambda case, device: torch.arange(case["n"], dtype=torch.float32) + rank(),
    work=lambda case, numbers: Work(flops=0, bytes=8 * size() * len(numbers)),
    impls={
        "reference": Impl(lambda: counted("reference"), "reference"),
        "peer": Impl(lambda: counted("peer"), "peer"),
    },
    subject="reference",
    prepare=lambda function, case, numbers: lambda: function(numbers),
    verify=off,
    figures=figures,
    series=lambda case, numbers, got: {"sums": got.tolist(), "calls": [dict(calls)]},
    ranks=lambda case: case["ranks"],
    memory=True,
)
'''
SMOKE, TIMED = Settings(smoke=True), Settings(budget_s=0.01)
CASE = {"ranks": 2, "n": 10}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The benchmark, on a machine whose limits are known; with parts of its source replaced."""
    monkeypatch.setenv("MLSYS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_measure, "_measure", lambda *_: Limits(flops=1e9, bandwidth=1e9))

    def load(**changes):
        source = TOY.strip()
        for old, new in changes.items():
            assert old in source
            source = source.replace(old, new)
        file = tmp_path / "toys" / "sums.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(source)
        return find.load_file(file)

    return load


@pytest.fixture
def mine(toy, tmp_path):
    """The records of one case with a function `mine` of this source in it, in this process."""

    def measure(source, settings=SMOKE, case=CASE, name="mine"):
        file = tmp_path / "mine.py"
        file.write_text("import os, torch, torch.distributed as dist\n" + textwrap.dedent(source))
        bench = toy().with_impl("yours", lambda numbers: None, f"{file}:{name}")
        told = []
        rows = run(bench, [case], smoke=settings.smoke, budget_s=settings.budget_s, announce=told.append)
        return {r.impl: r for r in rows}, told

    return measure


# --- agreement, without processes ---


def test_every_decision_of_the_timing_is_agreed_and_the_slowest_counts():
    asked = []

    def everyone(value):  # with another rank, which takes twice as long and keeps the rounds that we do not
        asked.append(value)
        return [not value, value] if isinstance(value, bool) else [value, None if value is None else 2 * value + 1]

    runs = []
    kept = {"a": None}
    samples = interleave({"a": lambda: runs.append(1) or len(runs)}, budget_s=0.0, keep=kept, everyone=everyone)
    assert runs == [1] * (1 + MIN_RUNS)  # each took a second on the other rank, so that none is repeated
    assert all(taken > 1.0 for taken in samples["a"].seconds)
    assert asked[0] is None  # together from the very first
    choices = [value for value in asked if isinstance(value, bool)]
    assert len(choices) == MIN_RUNS
    last = max((i for i, value in enumerate(choices) if not value), default=None)
    assert kept["a"] == (None if last is None else last + 2)


def test_all_are_there_before_a_clock_is_looked_at(monkeypatch):
    from mlsys.bench import timing

    told = []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: told.append("clock") or 0.0)
    interleave(
        {"a": lambda: told.append("run")},
        budget_s=0.0,
        max_repeats=1,
        everyone=lambda value: told.append("all" if value is None else "agree") or [value],
    )
    starts = [i for i, word in enumerate(told) if word == "run"]
    assert len(starts) > MIN_RUNS
    assert all(told[i - 2 : i + 3] == ["all", "clock", "run", "clock", "agree"] for i in starts)


# --- what is said on a pipe, and whose fault an end is ---


def test_all_that_was_said_is_heard_before_it_is_judged():
    announced, turns = [], []
    with _listening(announced.append, turns.append) as heard:
        with heard.pipe.open("wb", buffering=0) as pipe:
            for n in range(200):
                _say(pipe, "turn", f"name {n}")
            _say(pipe, "announce", "two\nlines")
        heard.out()
        assert heard.turn == "name 199"
    assert turns == [f"name {n}" for n in range(200)]
    assert announced == ["two\nlines"]
    assert not heard.pipe.exists()


class Ended(RuntimeError):
    """As a LaunchError is."""

    rank = 1

    def __init__(self, kind, cause=None):
        super().__init__("rank 1 was killed by SIGKILL\nand more")
        self.kind, self.__cause__ = kind, cause


def test_whose_fault_an_end_is():
    assert _blame(Ended("raised", RaisedOnRank("yours", "raised E: x")), "") == ("yours", "raised E: x, on rank 1")
    assert _blame(Ended("raised", ValueError("ours")), "yours") == ("", "")
    assert _blame(Ended("died"), "yours") == ("yours", "rank 1 was killed by SIGKILL")
    assert _blame(Ended("hung"), "peer") == ("peer", "rank 1 was killed by SIGKILL")


# --- on ranks ---


def test_outside_of_a_launch_there_is_one_rank():
    assert (ranks.rank(), ranks.size()) == (0, 1)


def test_records_are_of_all_ranks(toy):
    rows = run(toy(), [{"ranks": 3, "n": 10}], budget_s=0.0)
    assert [(r.impl, r.ranks) for r in rows] == [("reference", 3), ("peer", 3)]
    for r in rows:
        assert r.status in ("ok", "noisy")
        assert r.runs >= MIN_RUNS
        assert r.seconds > 0
        assert r.bytes == 240
        assert r.share == pytest.approx(240 / 1e9 / r.seconds)
        assert r.peak_bytes >= 40
        assert r.figures == {"ranks": 3, "threads": 1, "mine": 0}
        assert r.series["sums"] == [3 * i + 3 for i in range(10)]
        assert r.machine["slug"]


def test_limits_are_those_of_all_threads_but_no_more_than_there_are_cores(toy, monkeypatch):
    asked = []
    monkeypatch.setattr(_measure, "limits", None)
    monkeypatch.setattr(ranks.machines, "limits", lambda dtype, n, device: asked.append(n) or Limits(1e9, 1e9))
    monkeypatch.setattr(ranks.machines, "cores", lambda: 3)
    for n, threads in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 3), (1, 3)):
        ranks._limits({}, Settings(n_threads=threads), n)
    assert asked == [1, 2, 3, 3, 3, 3]
    assert ranks._limits({}, SMOKE, 4) is None


def test_an_error_on_any_rank_is_one(toy):
    rows = {r.impl: r for r in run(toy(), [{**CASE, "off": 0.5}], smoke=True)}
    assert [rows[name].status for name in ("reference", "peer")] == ["wrong", "wrong"]
    assert rows["peer"].error == 0.5


def test_what_of_ours_raises_is_a_crash(toy):
    bench = toy(**{'lambda: counted("peer")': "lambda: lambda numbers: 1 / (1 - rank())"})
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        run(bench, [CASE], smoke=True)


def test_a_users_function_is_loaded_by_each_rank(mine):
    rows, _ = mine("def mine(numbers):\n    out = numbers.clone()\n    dist.all_reduce(out)\n    return out", TIMED)
    assert set(rows) == {"reference", "peer", "yours"}
    assert rows["yours"].role == "yours"
    assert rows["yours"].seconds > 0


def test_without_a_file_ranks_cannot_have_it(toy):
    with pytest.raises(ValueError, match=r"'yours' has no source.*FILE\.py:FUNCTION"):
        run(toy().with_impl("yours", sum), [CASE], smoke=True)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("raise KeyError(3)", "raised KeyError: 3, at mine.py:5 in mine: `raise KeyError(3)`, on rank 1"),
        ("os._exit(3)", "rank 1"),
    ],
)
def test_one_rank_that_fails_is_a_row_and_the_others_have_theirs(mine, line, says):
    source = f"""
        def mine(numbers):
            if dist.get_rank() == 1:
                {line}
            dist.all_reduce(numbers.clone())
    """
    rows, told = mine(source)
    assert rows["yours"].status == "failed"
    assert says in rows["yours"].note
    assert rows["yours"].bytes == rows["peer"].bytes
    assert rows["reference"].status == rows["peer"].status == "smoke"
    assert any("yours failed" in line for line in told)


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("if dist.get_rank() == 1: numbers.zero_()", "modified its inputs in place"),
        ("if dist.get_rank() == 1: torch.set_num_threads(2)", "changed torch's number of threads, for the others too"),
        ("if dist.get_rank() == 1: out = iter(out)", "returned a tuple_iterator, expected plain tensors"),
        ("if dist.get_rank() == 1: out = out + 1", "error 1 is above the 1e-06 allowed"),
    ],
)
def test_what_one_rank_does_wrong_is_wrong_for_all(mine, line, note):
    source = f"""
        def mine(numbers):
            out = numbers.clone()
            dist.all_reduce(out)
            {line}
            return out
    """
    rows, _ = mine(source)
    assert rows["yours"].status == "wrong"
    assert rows["yours"].note.startswith(note)


def test_isolated_it_says_whose_turn_it_is_and_ends_what_hangs(toy, tmp_path):
    bench = toy()
    bench = dataclasses.replace(bench, cases={"quick": bench.cases["quick"][:2]})
    target = tmp_path / "mine.py"
    target.write_text(
        "import time, torch.distributed as dist\n"
        "def mine(numbers):\n"
        "    while dist.get_world_size() == 1: pass\n"
        "    out = numbers.clone()\n"
        "    dist.all_reduce(out)\n"
        "    return out\n"
    )
    cases = isolate.run_isolated(bench, bench.select("quick"), f"{target}:mine", SMOKE, limit_s=4.0)
    assert {r.impl: r.status for r in next(cases)} == dict.fromkeys(("reference", "peer", "yours"), "smoke")
    with pytest.raises(isolate.Stopped, match="no answer within 4 s") as stopped:
        next(cases)
    assert stopped.value.record.case["ranks"] == 1
    left = [p for p in psutil.process_iter(["environ"]) if "mlsys-bench-" in str(p.info["environ"])]
    assert left == []
