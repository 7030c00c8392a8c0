"""Every command and every piece of code in the README runs, in a folder of its own."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [line.partition("#")[0].strip() for kind, body in BLOCKS if kind == "sh" for line in body.splitlines()]
PYTHON = [body for kind, body in BLOCKS if kind == "python"]
EXPECTED_STATUS = {  # the README's examples are wrong on purpose
    "mlsys check attention.flash my_attention.py:my_flash": (1, "hint"),
    "mlsys cuda check my_sum.cu --grid 4 --block 256 --size x=1024,out=4": (1, "missing between line 4 and line 6"),
}


@pytest.fixture
def folder(tmp_path):
    """An empty folder with the README's example files in it."""
    for _, body in BLOCKS:
        named = re.match(r"(?:#|//) (\w+\.(?:py|cu))\n", body)
        if named:
            (tmp_path / named[1]).write_text(body)
    return tmp_path


def run(command, folder):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 9
    assert "make bench" in COMMANDS
    assert "make test" in COMMANDS


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_target_exists(command):
    done = run([*shlex.split(command), "--dry-run", "-C", str(ROOT)], ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith("make ")])
def test_command_runs(command, folder):
    words = shlex.split(command)
    assert words[0] == "mlsys", f"teach this test to run {command!r}"
    if words[1] == "bench":  # the smallest case stands for the rest: nothing is timed in tests
        words = [w for w in words if w != "--quick"] + ["--smoke"]
    if words[1] == "train":  # the shortest run there is
        words = ["mlsys", "train", "--steps", "2", "--layers", "1", "--width", "16", "--heads", "1"]
    done = run([sys.executable, "-m", *words], folder)
    status, said = EXPECTED_STATUS.get(command, (0, ""))
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert said in done.stdout


@pytest.mark.parametrize("body", PYTHON, ids=lambda body: body.splitlines()[0][:40])
def test_code_runs(body, folder):
    done = run([sys.executable, "-c", body], folder)
    assert done.returncode == 0, done.stderr


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / target).exists(), target
