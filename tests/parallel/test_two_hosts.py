"""`two_hosts.sh`: refusals, and where the machine lets it run, two hosts with a cable between them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "parallel" / "two_hosts.sh"
CANNOT = 77
PROGRAM = """
import os, socket, sys
import torch, torch.distributed as dist

dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
line = f"{socket.gethostname()} rank {dist.get_rank()}: {total.item():g} {sys.argv[1:]}"
os.write(1, line.encode() + b"\\n")  # whole: both hosts write to one pipe
dist.barrier()
dist.destroy_process_group()
"""


def run(*arguments, path=None):
    environ = os.environ | ({"PATH": path} if path is not None else {})
    bash = "/bin/bash" if Path("/bin/bash").exists() else "bash"
    return subprocess.run(
        [bash, SCRIPT, "--python", sys.executable, *arguments], env=environ, capture_output=True, text=True, timeout=240
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--mbit", "0"), "--mbit 0: expected whole numbers above 0"),
        (("--mbit", "fast"), "--mbit fast"),
        (("--mbit",), "--mbit needs a value"),
        (("--ranks-per-host", "0"), "--ranks-per-host 0"),
        (("--latency-ms", "-1"), "--latency-ms -1"),
        (("--python", "/no/python"), "--python /no/python: there is no such program"),
        (("--quick", "--", "mine.py"), "unknown option --quick"),
    ],
)
def test_bad_arguments_are_named(arguments, said):
    done = run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout == ""


def test_help_names_the_options():
    done = run("--help")
    assert done.returncode == 0
    assert "--ranks-per-host" in done.stdout


def test_a_missing_tool_is_named(tmp_path):
    for name in ("uname", "dirname", "basename", "id"):
        found = next(p for folder in ("/usr/bin", "/bin") if (p := Path(folder) / name).exists())
        (tmp_path / name).symlink_to(found)
    done = run("--check", path=str(tmp_path))
    assert done.returncode == CANNOT
    if sys.platform == "linux":
        assert "needs the program ip: install the package iproute2" in done.stderr


def test_two_hosts_run_the_same_program_and_nothing_is_left(tmp_path):
    """Where the system forbids it, the script says so, and why."""
    allowed = run("--check")
    if allowed.returncode:
        assert allowed.returncode == CANNOT
        assert allowed.stderr.startswith("two_hosts.sh: ")
        return
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = run("--mbit", "1000", "--ranks-per-host", "1", "--", str(program), "--its", "option")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        f"mlsys-host-{rank} rank {rank}: 2 ['--its', 'option']" for rank in (0, 1)
    ]
    left = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout
    assert "mlsys" not in left
