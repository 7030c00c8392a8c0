"""`two_hosts.sh`: refusals, and where the machine lets it run, two hosts with a cable; what benchmarks say of it."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from mlsys.bench import find
from mlsys.parallel.collectives import Communicator, Links, all_reduce
from mlsys.parallel.launcher import launch

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


def test_the_benchmarks_know_the_cable(monkeypatch):
    network = find.beside(str(SCRIPT), "_network")
    monkeypatch.delenv(network.VARIABLE, raising=False)
    assert network.case(bytes=1) == {"network": network.LOOPBACK, "ranks": 4, "bytes": 1}
    assert network.mbit_of(network.case()) is None
    assert network.cable(4) is None
    monkeypatch.setenv(network.VARIABLE, "250")
    assert network.mbit_of(network.case()) == 250
    assert network.cable(4) == 250e6 / 8
    assert network.cable(3) is None  # no half of them on each side


def crossed(algorithms, elements):
    """Bytes that this rank sends to the other half of the ranks, counted message by message, for each algorithm."""
    n, rank, send, sent = dist.get_world_size(), dist.get_rank(), dist.ProcessGroup.send, Counter()

    def counted(group, tensors, to, tag):
        sent[algorithm] += sum(t.nbytes for t in tensors if (to < n // 2) != (rank < n // 2))
        return send(group, tensors, to, tag)

    with Communicator(shared_memory=False, links=Links(local=n // 2)) as group:
        for algorithm in algorithms:
            with mock.patch.object(dist.ProcessGroup, "send", counted):
                all_reduce(torch.ones(elements), group, algorithm=algorithm, check=False)
    return sent


def test_what_crosses_the_cable_is_what_ranks_send():
    network = find.beside(str(SCRIPT), "_network")
    algorithms = ("ring", "hierarchical", "halving_doubling", "recursive_doubling")
    ranks = launch(crossed, 4, algorithms, 1000)
    for algorithm in algorithms:
        for host in (ranks[:2], ranks[2:]):
            assert sum(sent[algorithm] for sent in host) == network.crossing(algorithm, 4, 4000), algorithm
