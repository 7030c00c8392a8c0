"""`mlsys schedule`: timelines of the library's schedules and of a student's file, and what it refuses."""

import importlib
import json

import pytest

from mlsys.cli import Parser
from mlsys.commands import UsageError
from mlsys.parallel.schedules import SCHEDULES, one_f_one_b, show, simulate, zb_h1

schedule = importlib.import_module("mlsys.commands.schedule")

MINE = """
from mlsys.parallel.schedules import Op, one_f_one_b


def right(p, m):
    return {r: [Op(kind, r, i) for i in range(m) for kind in ("F", "BW")] for r in range(p)}


def stuck(p, m):
    return {r: ops[1:] for r, ops in one_f_one_b(p, m).items()}


def broken(p, m):
    return 1 / 0


def unlike(p):
    return {}


def plain(p, m):
    return {r: [(kind, r, i) for i in range(m) for kind in ("F", "BW")] for r in range(p)}


TABLE = right(2, 2)
"""


@pytest.fixture
def run(capsys):
    def call(*words):
        parser = Parser()
        schedule.configure(parser)
        assert schedule.run(parser.parse_args(words)) == 0
        return capsys.readouterr().out

    return call


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return str(path)


def test_timelines(run):
    out = run("1f1b", "zb-h1", "-p", "2", "-m", "3", "--costs", "1,2,1", "--comm", "0.5")
    first, second = (simulate(make(2, 3), 1, 2, 1, comm=0.5) for make in (one_f_one_b, zb_h1))
    assert out == f"1f1b\n{show(first)}\n\nzb-h1\n{show(second)}\n"


def test_every_schedule_has_its_name(run):
    assert tuple(SCHEDULES) == schedule.SHOWN
    told = json.loads(run(*schedule.SHOWN, "--json"))
    assert [told[name]["makespan"] for name in schedule.SHOWN] == [96, 33, 33, 28.5, 27, 27, 25.5]
    assert told["1f1b"]["spans"][3][0] == ["F", 3, 0, 3, 4]


def test_plain_tuples_as_the_contract_takes_them(run, mine):
    assert "makespan 24; bubble 50.0%" in run("--file", f"{mine}:plain", "-p", "2", "-m", "4")


def test_ones_own(run, mine):
    assert "makespan 24; bubble 50.0%" in run("--file", f"{mine}:right", "-p", "2", "-m", "4")
    assert "makespan 12;" in run("--file", f"{mine}:TABLE")


def test_picture(run, tmp_path):
    run("gpipe", "--plot", str(tmp_path / "a.svg"))
    assert "gpipe: 33 long" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a schedule, sequential, gpipe"),
        (["1f2b"], "NAME='1f2b' is not known; did you mean '1f1b'?"),
        (["gpipe", "--costs", "1,2"], "--costs must be three numbers, F,B,W, as 1,1.2,0.8 is; got '1,2'"),
        (["gpipe", "--costs", "1,a,2"], "--costs must be three numbers"),
        (["gpipe", "--costs", "1,-1,2"], "b must be at least 0 and finite, got -1.0"),
        (["gpipe", "-p", "0"], "p must be at least 1, got 0"),
        (["interleaved", "-m", "6"], "m=6: interleaved sends microbatches in groups of p=4"),
        (["gpipe", "--limit", "4"], "rank 0 holds 5 microbatches"),
        (["gpipe", "--plot", "a.gif"], "--plot must end in .svg, .png or .pdf, got 'a.gif'"),
    ],
)
def test_bad_requests(run, words, message):
    with pytest.raises((ValueError, UsageError)) as raised:
        run(*words)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stuck", "rank 0 never does F of microbatch 0 in stage 0"),
        ("broken", "mine.py:14 in broken: `return 1 / 0`: ZeroDivisionError: division by zero"),
        ("unlike", "cannot be called with p and m: too many positional arguments"),
    ],
)
def test_what_is_wrong_with_ones_own(run, mine, name, message):
    with pytest.raises((ValueError, UsageError)) as raised:
        run("--file", f"{mine}:{name}", "-p", "2", "-m", "2")
    assert message in str(raised.value)
