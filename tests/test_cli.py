"""The command line: what it answers, how it complains, and that it starts without the heavy libraries."""

import importlib
import os
import subprocess
import sys

import pytest

import mlsys
from mlsys import catalog, cli
from mlsys.commands import UsageError
from mlsys.commands import list as list_command

HEAVY = ("torch", "numpy", "numba", "triton", "jaxtyping", "matplotlib", "psutil")


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


def test_bad_requests_are_one_line(fails):
    assert fails("chek") == "no command 'chek'; did you mean check?"
    assert fails("zzz").startswith("no command 'zzz'; there are list, show, check")
    assert fails("list", "--colour") == "unrecognized arguments: --colour; see `mlsys list --help`"
    assert fails("show") == "the following arguments are required: NAME; see `mlsys show --help`"
    assert fails("show", "attention.flsh") == "no technique 'attention.flsh'; did you mean attention.flash?"
    assert fails("list", "atention") == "no area 'atention'; did you mean attention?"
    assert "expected a positive number of seconds" in fails("check", "x", "--limit", "-1")
    assert "invalid" in fails("check", "x", "--limit", "soon")


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
def test_expected_errors_are_one_line_unless_debugging(fails, command, error, says, where):
    def run(args):
        raise error

    command(run)
    if where == "absent":
        assert fails("list").startswith(says)
    else:
        with pytest.raises(type(error)):
            cli.main(["--debug", "list"] if where == "before" else ["list", "--debug"])


def test_what_may_be_a_bug_says_how_to_see_it(fails, monkeypatch):
    def failing(source, module):
        scope = {"__name__": module}
        exec(f"def run(args):\n    {source}", scope)
        monkeypatch.setattr(list_command, "run", scope["run"])
        return fails("list")

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
