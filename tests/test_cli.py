"""The command line: what it answers, how it complains, and that it starts without the heavy libraries."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mlsys
from mlsys import catalog, cli
from mlsys.commands import UsageError
from mlsys.commands import list as list_command

TOY = f"{Path(__file__).parent / 'contracts' / 'toy.py'}:SOFTMAX"
HEAVY = ("torch", "numpy", "numba", "triton", "jaxtyping", "matplotlib", "psutil")


def fails(capsys, *words):
    """The one line of complaint about a bad request."""
    assert cli.main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("mlsys: ")
    assert printed.err.count("\n") == 1
    return printed.err.removeprefix("mlsys: ").strip()


# --- starting ---


@pytest.mark.parametrize(
    "words", [["--help"], ["list"], ["list", "--json"], ["--version"], ["check", "--help"], ["lsit"]]
)
def test_starts_without_the_heavy_libraries(words):
    script = (
        "import sys\nfrom mlsys.cli import main\n"
        f"try: main({words!r})\nexcept SystemExit: pass\n"
        f"sys.exit(','.join(name for name in {HEAVY!r} if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_that_a_heavy_import_would_be_seen():
    script = f"import sys, numpy\nsys.exit(','.join(name for name in {HEAVY!r} if name in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (1, "numpy")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_its_module_and_help(name, capsys):
    module = importlib.import_module(f"mlsys.commands.{name}")
    assert module.__doc__
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: mlsys {name}" in capsys.readouterr().out


def test_every_command_module_is_in_the_table():
    files = {path.stem for path in (catalog.PACKAGE / "commands").glob("*.py")}
    assert {name for name in files if not name.startswith("_")} == set(cli.COMMANDS)


def test_help_names_every_command_and_shows_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)
    assert "examples:" in text


def test_nothing_asked_shows_help(capsys):
    assert cli.main([]) == 2
    assert "usage: mlsys" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"mlsys {mlsys.__version__}\n"
    with pytest.raises(AttributeError, match="no attribute 'no_such'"):
        _ = mlsys.no_such


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "mlsys", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("mlsys ")


# --- complaining ---


def test_bad_requests_are_one_line(capsys):
    assert fails(capsys, "chek") == "no command 'chek'; did you mean check?"
    assert fails(capsys, "zzz").startswith("no command 'zzz'; there are list, show, check")
    assert fails(capsys, "list", "--colour") == "unrecognized arguments: --colour; see `mlsys list --help`"
    assert fails(capsys, "show") == "the following arguments are required: NAME; see `mlsys show --help`"
    assert fails(capsys, "show", "attention.flsh") == "no technique 'attention.flsh'; did you mean attention.flash?"
    assert fails(capsys, "list", "atention") == "no area 'atention'; did you mean attention?"
    assert "expected a positive number of seconds" in fails(capsys, "check", "x", "--limit", "-1")
    assert "invalid" in fails(capsys, "check", "x", "--limit", "soon")


@pytest.fixture
def command(monkeypatch):
    """Make `mlsys list` do something else."""
    return lambda run: monkeypatch.setattr(list_command, "run", run)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (UsageError("two\n  lines"), "two lines"),
        (ValueError("a"), "a"),
        (TypeError("b"), "b"),
        (KeyError("no key"), "no key"),
        (FileNotFoundError(2, "No such file or directory", "x.json"), "x.json: No such file or directory"),
        (ValueError(), "ValueError"),
        (ModuleNotFoundError("No module named 'faiss'", name="faiss"), "No module named 'faiss'; `pip install"),
    ],
)
@pytest.mark.parametrize("where", ["before", "after", "absent"])
def test_expected_errors_are_one_line_unless_debugging(capsys, command, error, says, where):
    def run(args):
        raise error

    command(run)
    if where == "absent":
        assert fails(capsys, "list").startswith(says)
    else:
        with pytest.raises(type(error)):
            cli.main(["--debug", "list"] if where == "before" else ["list", "--debug"])


def test_what_may_be_a_bug_says_how_to_see_it(capsys, monkeypatch):
    def failing(source, module):
        scope = {"__name__": module}
        exec(f"def run(args):\n    {source}", scope)
        monkeypatch.setattr(list_command, "run", scope["run"])
        return fails(capsys, "list")

    hint = "; `--debug` shows where"
    for source in ("{}['key']", "int('x')", "None + 1", "import json; json.loads('{')"):
        assert failing(source, "mlsys.toys").endswith(hint)
    for source in ("raise KeyError('key')", "raise ValueError(\n'x')", "raise TypeError() from OSError()"):
        assert hint not in failing(source, "mlsys.toys")
        assert hint not in failing(source, "mlsys_benchmarks.toys.sums")
        assert failing(source, "mlsystem").endswith(hint)  # somebody else's
    for source in ("open('nowhere')", "import no_such_module"):
        assert hint not in failing(source, "mlsys.toys")


def test_a_bug_of_ours_is_not_hidden(command):
    def run(args):
        raise ZeroDivisionError

    command(run)
    with pytest.raises(ZeroDivisionError):
        cli.main(["list"])


def test_interrupt_is_130(capsys, command):
    def run(args):
        raise KeyboardInterrupt

    command(run)
    assert cli.main(["list"]) == 130
    assert capsys.readouterr().err == "mlsys: interrupted\n"


def test_status_of_the_command_is_the_status(command):
    command(lambda args: 7)
    assert cli.main(["list"]) == 7


def test_closed_pipe_is_quiet():
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "wb") as out:
        command = [sys.executable, "-m", "mlsys", "list"]
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (141, b"")


# --- list and show ---


def test_list_is_a_table_of_a_hundred_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    for technique in catalog.techniques():
        assert technique.name in text
        assert technique.idea.split()[0] in text
    assert max(map(len, text.splitlines())) <= 100
    assert "torch: cpu yes; cuda " in text


def test_list_of_an_area(capsys):
    assert cli.main(["list", "retrieval"]) == 0
    text = capsys.readouterr().out
    assert "retrieval.bm25" in text
    assert "attention.flash" not in text


def test_list_stars_what_cannot_run_here():
    broken = catalog.Backend("triton", Path("x.py"), {"cuda": "no NVIDIA driver found"})
    flash = catalog.Technique("attention.flash", "Tiles", "", ("Dao 2022.",), (broken,), Path("x.py"), *[None] * 4)
    text = list_command.table([flash])
    assert "triton*" in text
    assert "triton: cuda no (no NVIDIA driver found)" in text


def test_list_json_has_everything(capsys):
    assert cli.main(["list", "--json"]) == 0
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    flash = found["attention.flash"]
    assert flash["source"].endswith("flash.py")
    assert flash["papers"]
    assert flash["backends"][0]["devices"]["cpu"] == {"usable": True, "why": None}


def test_show(capsys):
    assert cli.main(["show", "flash"]) == 0
    text = capsys.readouterr().out
    for part in ("attention.flash", "Cost:", "Papers:", "signature", "cases", "mlsys check attention.flash my.py:"):
        assert part in text
    for path in ("mlsys/attention/flash.py", "tests/attention/test_flash.py", "benchmarks/attention/flash.py"):
        assert path in text
    assert "cpu yes" in text


def test_show_keeps_the_hints_to_itself(capsys):
    from mlsys.contracts import find

    cli.main(["show", "attention.flash"])
    text = capsys.readouterr().out
    for name, wrong in find("attention.flash").wrong.items():
        assert name in text
        assert wrong.hint not in text


def test_show_source(capsys):
    assert cli.main(["show", "attention.flash", "--source"]) == 0
    assert capsys.readouterr().out == catalog.find("attention.flash").source.read_text(encoding="utf-8")


# --- check ---

RIGHT = "import numpy as np\ndef f(x, *, temperature=1.0):\n    z = x / temperature\n"
RIGHT += "    e = np.exp(z - z.max(-1, keepdims=True))\n    return e / e.sum(-1, keepdims=True)\n"
FLASH = """
from mlsys.attention.flash import attention

def right(q, k, v, **settings):
    return attention(q, k, v, **settings)

def unscaled(q, k, v, **settings):
    return attention(q * q.shape[-1] ** 0.5, k, v, **settings)
"""


@pytest.fixture
def mine(tmp_path):
    def write(source, name="f"):
        (tmp_path / "mine.py").write_text(source)
        return f"{tmp_path / 'mine.py'}:{name}"

    return write


def test_check_passes(capsys, mine):
    assert cli.main(["check", TOY, mine(RIGHT)]) == 0
    assert "mine.py:f against toy.softmax: pass (5 cases in " in capsys.readouterr().out


def test_check_fails_with_case_shapes_error_and_hint(capsys, mine):
    assert cli.main(["check", TOY, mine(RIGHT.replace("/ temperature", "/ 1"))]) == 1
    text = capsys.readouterr().out
    assert "against toy.softmax: FAIL" in text
    assert "rows=2, columns=5, temperature=0.5" in text
    assert "x (2, 5) float32" in text
    assert "largest error" in text
    assert "behaves like the wrong variant `no_temperature`: divide by the temperature" in text


def test_check_reports_an_endless_loop(capsys, mine):
    assert cli.main(["check", TOY, mine("def f(x, **_):\n    while True: pass\n"), "--limit", "1"]) == 1
    assert "no answer within 1 s at mine.py:2 in f: `while True: pass`; an endless loop?" in capsys.readouterr().out


def test_check_json(capsys, mine):
    assert cli.main(["check", TOY, mine("def f(x, **_):\n    print('x')\n    return 1 / 0\n"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is False
    assert found["contract"] == "toy.softmax"
    assert found["failure"]["case"] == {"rows": 1, "columns": 1}
    assert "ZeroDivisionError: division by zero, at mine.py:3 in f: `return 1 / 0`" in found["failure"]["message"]


def test_check_that_cannot_be_made_is_two(capsys, mine):
    assert fails(capsys, "check", TOY, mine("def f(:\n")).startswith("mine.py:1: `def f(:`: SyntaxError")
    assert fails(capsys, "check", TOY, mine("def g(): pass\n")) == "mine.py has no 'f'; it defines g"
    assert fails(capsys, "check", TOY, "mine.py").startswith("expected FILE.py:FUNCTION, got 'mine.py'")
    assert fails(capsys, "check", "attention.flsh").startswith("no technique 'attention.flsh'; did you mean")


def test_check_on_cuda_without_it(capsys, monkeypatch):
    monkeypatch.setattr(catalog, "devices", lambda backend: {"cpu": None, "cuda": "no NVIDIA driver found"})
    assert fails(capsys, "check", TOY, "--device", "cuda") == "--device cuda: no NVIDIA driver found"


def test_check_of_a_technique_without_a_contract(monkeypatch):
    only = catalog.Backend("torch", Path("bare.py"), {"cpu": None})
    bare = catalog.Technique("attention.bare", "", "", (), (only,), Path("bare.py"), *[None] * 4)
    monkeypatch.setattr(catalog, "techniques", lambda package_root=None: [bare])
    check = importlib.import_module("mlsys.commands.check")
    with pytest.raises(UsageError, match=r"attention\.bare has no contract; these have: none"):
        check.run(argparse.Namespace(name="bare", target=None, device="cpu"))


def test_check_of_attention(capsys, mine):
    assert cli.main(["check", "flash", mine(FLASH, "right")]) == 0
    assert "against attention.flash: pass" in capsys.readouterr().out
    assert cli.main(["check", "attention.flash", mine(FLASH, "unscaled")]) == 1
    text = capsys.readouterr().out
    assert "largest error" in text
    assert "hint    behaves like the wrong variant" in text


@pytest.mark.parametrize("name", ["attention.flash", "retrieval.bm25"])
def test_check_of_the_librarys_own(capsys, name):
    assert cli.main(["check", name]) == 0
    assert f"the reference against {name}: pass" in capsys.readouterr().out
