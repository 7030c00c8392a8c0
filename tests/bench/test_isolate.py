"""Someone's function is timed in a process that can be killed: what it cannot end, and what is known afterwards."""

import itertools
import textwrap

import psutil
import pytest

from mlsys.bench import find, isolate
from mlsys.bench.core import Settings
from mlsys.bench.isolate import Stopped, run_isolated
from mlsys.bench.records import Record
from mlsys.perf import _measure
from mlsys.perf._measure import Limits

TOY = '''
"""How fast is a sum?"""
from mlsys.bench import Benchmark, Impl, Work

CASES = [{"n": n, "dtype": "float32"} for n in (10, 20, 30)]
bench = Benchmark(
    __file__,
    cases=dict.fromkeys(("quick", "default", "full"), CASES),
    inputs=lambda case, device: [float(i) for i in range(case["n"])],
    work=lambda case, numbers: Work(flops=len(numbers), bytes=8 * len(numbers)),
    impls={"sum": Impl(lambda: sum, "reference"), "peer": Impl(lambda: sum, "peer")},
    subject="sum",
    prepare=lambda function, case, numbers: lambda: function(numbers),
    verify=lambda case, numbers, got, want: (abs(got - want), 0.0),
)
'''
SMOKE, TIMED = Settings(smoke=True), Settings(budget_s=0.01)


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """The records of each case, with a function `mine` of this source in it, and that of `Stopped` if it came to it."""
    monkeypatch.setenv("MLSYS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_measure, "_measure", lambda *_: Limits(flops=1e9, bandwidth=1e9))
    _measure.limits("float32", 1)  # the child finds them in the cache
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys" / "sums.py").write_text(TOY.strip())

    def run(source, settings=SMOKE, name="mine", **more):
        (tmp_path / "mine.py").write_text(textwrap.dedent(source))
        bench = find.load_file(tmp_path / "toys" / "sums.py")
        target = f"{tmp_path / 'mine.py'}:{name}"
        cases = run_isolated(bench, bench.select("quick"), target, settings, **{"limit_s": 30.0, **more})
        found = []
        while True:
            try:
                records = next(cases)
            except StopIteration:
                return found, None
            except Stopped as stop:
                return found, stop.record
            found.append({r.impl: r for r in records})

    return run


def test_right_function_is_timed_beside_the_others(measure):
    told = []
    found, stopped = measure("def mine(xs): return sum(xs)", TIMED, announce=told.append)
    assert stopped is None
    assert [set(rows) for rows in found] == [{"sum", "peer", "yours"}] * 3
    assert [rows["yours"].case["n"] for rows in found] == [10, 20, 30]
    assert all(r.seconds > 0 and r.runs >= 5 and r.share > 0 for rows in found for r in rows.values())
    assert isinstance(found[0]["yours"].quartiles, tuple)
    assert told == [f"toys.sums  n={n} float32" for n in (10, 20, 30)]


def test_wrong_and_raising_are_rows_and_all_cases_go_on(measure):
    source = """
        def mine(xs):
            if len(xs) == 20:
                raise SystemExit(0)
            return sum(xs) + (len(xs) == 30)
    """
    found, stopped = measure(source, TIMED)
    assert stopped is None
    assert [rows["yours"].status for rows in found[1:]] == ["failed", "wrong"]
    assert found[0]["yours"].seconds > 0
    assert found[1]["yours"].note == "raised SystemExit: 0, at mine.py:4 in mine: `raise SystemExit(0)`"
    assert all(rows["sum"].seconds > 0 for rows in found)


def test_endless_loop_ends_with_the_line_and_keeps_what_was_finished(measure):
    source = """
        calls = []
        def mine(xs):
            calls.append(1)
            while len(xs) == 20 and calls.count(1) > 3:
                pass
            return sum(xs)
    """
    found, stopped = measure(source, TIMED, limit_s=2.0)
    assert [rows["yours"].case["n"] for rows in found] == [10]
    assert (stopped.impl, stopped.role, stopped.status) == ("yours", "yours", "failed")
    assert stopped.case["n"] == 20
    assert stopped.machine["slug"]
    assert stopped.note.startswith("no answer within 2 s at mine.py:")
    assert "in mine: `" in stopped.note
    assert "an endless loop?" in stopped.note


class Silent:
    """A child that says whose turn it is and then nothing, while an hour passes with each look at the clock."""

    def __init__(self, name):
        self.name = name

    def messages(self):
        for name in ("yours", "", "yours", self.name):
            yield {"event": "turn", "name": name}
        yield None
        yield {"event": "records", "records": []}
        yield {"event": "done"}

    def stuck_at(self, path):
        return f" at {path.name}:1"


def test_the_others_may_take_their_time_but_not_for_ever(monkeypatch, tmp_path):
    clock = itertools.count(0, 1000)
    monkeypatch.setattr(isolate.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(isolate.core, "blank", lambda *_: Record("toys.sums", {"n": 10}, "", "", "ok"))

    def records(name, others_limit_s=2500.0):
        limits = (60.0, 300.0, others_limit_s)
        return list(isolate._records(Silent(name), None, [{"n": 10}], TIMED, tmp_path / "mine.py", *limits, print))

    assert records("sum") == [[]]
    with pytest.raises(Stopped, match=r"within 600 s at mine\.py:1, on the turn of sum, after your function had run"):
        records("sum", 600.0)
    with pytest.raises(Stopped, match=r"no answer within 60 s at mine\.py:1"):
        records("yours")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("os._exit(0)", "the process exited with status 0 before it had answered, on"),
        ("os.abort()", "the process died by signal 6 (aborted) at mine.py:7 in strike: `os.abort()`, on"),
        ("real(iter(int, 1))", "no answer within 3 s at mine.py:"),  # a loop in C, which no other thread ends
    ],
)
def test_what_it_left_behind_strikes_on_anothers_turn(measure, line, says):
    source = f"""
        import builtins, os, threading
        import numba, mlsys.bench.suspect  # not on the others' time
        ran, turn, real = [], threading.Event(), sum
        def strike():
            turn.wait()
            {line}
        def told(xs, *start):
            if ran and isinstance(xs, list) and len(xs) == 20:
                turn.set()
                threading.Event().wait()
            return real(xs, *start)
        threading.Thread(target=strike, daemon=True).start()
        builtins.sum = told  # so that the thread knows whose turn it is
        def mine(xs):
            ran.append(1)
            return real(xs)
    """
    found, stopped = measure(source, others_limit_s=3.0 if "iter" in line else None)
    assert [rows["yours"].case["n"] for rows in found] == [10]
    assert (stopped.impl, stopped.status, stopped.case["n"]) == ("yours", "failed", 20)
    assert stopped.note.startswith(says)
    assert "on the turn of sum, after your function had run" in stopped.note


def test_a_signal_that_nothing_of_the_users_explains_is_ours(measure, tmp_path):
    toy = tmp_path / "toys" / "sums.py"
    crash = "lambda: lambda xs: __import__('os').abort() if len(xs) == 20 else sum(xs)"
    toy.write_text(toy.read_text().replace('"peer": Impl(lambda: sum', f'"peer": Impl({crash}'))
    with pytest.raises(RuntimeError, match="the benchmark was cut short: the process died by signal 6"):
        measure("def mine(xs): return sum(xs)")


def test_death_of_the_process_is_told_and_nothing_is_left(measure, tmp_path):
    source = f"""
        import os, subprocess, sys
        def mine(xs):
            if len(xs) == 20:
                subprocess.Popen([sys.executable, "-c", "input()", "{tmp_path}"], stdin=-1, start_new_session=True)
                os._exit(0)
            return sum(xs)
    """
    found, stopped = measure(source)
    assert len(found) == 1
    assert stopped.note == "the process exited with status 0 before it had answered"
    left = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in (p.info["cmdline"] or [])]
    assert left == []


def test_what_it_prints_is_not_mistaken_for_a_record(measure, capfd):
    found, stopped = measure('def mine(xs):\n    print(\'{"event": "done"}\')\n    return sum(xs)')
    assert (len(found), stopped) == (3, None)
    printed = capfd.readouterr()
    assert "event" not in printed.out
    assert "event" in printed.err


def test_what_cannot_be_loaded_is_said_at_once(measure):
    with pytest.raises(LookupError, match=r"mine\.py has no 'other'"):
        measure("def mine(xs): return sum(xs)", name="other")
    with pytest.raises(ImportError, match=r"mine\.py:1"):
        measure("1 / 0")
    with pytest.raises(ValueError, match="limit_s must be positive"):
        measure("def mine(xs): return sum(xs)", limit_s=0)
    with pytest.raises(ValueError, match="others_limit_s must be positive"):
        measure("def mine(xs): return sum(xs)", others_limit_s=0)


def test_trouble_of_our_own_is_not_blamed_on_it(measure, tmp_path):
    toy = tmp_path / "toys" / "sums.py"
    toy.write_text(toy.read_text().replace('"reference")', '"reference"), "bad": Impl(lambda: max, "ours")'))
    found, _ = measure("def mine(xs): return sum(xs)")
    assert [rows["bad"].status for rows in found] == ["wrong"] * 3
    toy.write_text(toy.read_text().replace("lambda: max", "lambda: lambda xs: 1 / 0"))
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        measure("def mine(xs): return sum(xs)")
