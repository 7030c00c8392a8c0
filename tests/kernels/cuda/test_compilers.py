"""Each C++ compiler of the machine runs, checks and counts alike: g++, clang++, and the newest clang++-<version>."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

FILES = Path(__file__).parent / "files"
VERSIONS = [f"clang++-{n}" for n in range(15, 40) if shutil.which(f"clang++-{n}")]
COMPILERS = ["g++", "clang++", *VERSIONS[-1:]]

# Planted mistakes of each kind that hangs on what the compiler instruments, their twins, a sum, a profile.
SCRIPT = """
import sys, torch
from mlsys.kernels.cuda import check, load, profile
cases = [
    ("barriers", "running_sum", 1, 128, [torch.arange(128, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)]),
    ("bounds", "add", 2, 64, [torch.ones(100), torch.ones(100), torch.zeros(100), 100]),
    ("bounds", "smooth", 1, (16, 8), [torch.ones(8, 17), torch.zeros(8, 17), 17]),
    ("bounds", "scale_rows", 3, 32, [torch.ones(3, 67), torch.ones(3), torch.zeros(3, 67), 3, 67]),
    ("barriers", "stencil", 2, 64, [torch.ones(100), torch.zeros(100), 100]),
    ("blocks", "histogram", 4, 64, [torch.zeros(99, dtype=torch.int32), torch.zeros(16, dtype=torch.int32), 99]),
    ("barriers", "volatile_sum", 1, 64, [torch.ones(64), torch.zeros(1)]),
    ("divergence", "mirror", 2, 64, [torch.ones(100), torch.zeros(100), 100]),
    ("moves", "copy_items", 2, 32, [torch.arange(250.0), torch.zeros(250), 50]),
    ("moves", "reverse_items", 1, 64, [torch.arange(320.0), torch.zeros(320)]),
    ("moves", "reverse_pairs", 2, 32, [torch.arange(101.0), torch.zeros(101), 50]),
    ("moves", "count", 1, 256, [torch.arange(600, dtype=torch.int32) % 200, torch.zeros(256), 600]),
    ("moves", "reverse_row", 1, 256, [torch.arange(256.0), torch.zeros(256)]),
    ("moves", "pad", 1, 256, [torch.arange(100.0), torch.zeros(256), 100]),
]
for file, name, grid, block, args in cases:
    kernels = load(f"{sys.argv[1]}/{file}.cu")
    kernels[name](grid, block, *args)
    print(name, [round(float(x.double().sum()), 3) for x in args if isinstance(x, torch.Tensor)])
    print(check(kernels[name], grid, block, *args))
    for finding in check(kernels[name + "_wrong"], grid, block, *args):
        print(finding.kind, finding.line, finding.other_line, finding.source)
    if file == "moves":
        print(profile(kernels[name], grid, block, *args).accesses)
kernel = load(f"{sys.argv[1]}/barriers.cu")["matmul"]
counted = profile(kernel, (3, 2), (16, 16), 19, 35, 50, torch.ones(19, 50), torch.ones(50, 35), torch.zeros(19, 35))
print(counted.flops, counted.tensors)
"""


def need(compiler: str) -> None:
    """Skip where it is not installed."""
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed: apt install {compiler.replace('clang++', 'clang')}")


@cache
def words(compiler: str) -> str:
    """What the script prints with this compiler."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(FILES)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CXX": compiler},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def first() -> str:
    return words(next(compiler for compiler in COMPILERS if shutil.which(compiler)))


def test_the_first_finds_each_mistake_and_no_other(first):
    assert first.count("[]") == SCRIPT.count('    ("')
    assert {line.split()[0] for line in first.splitlines() if " // MISTAKE " in line} == {
        "race", "out-of-bounds", "misaligned", "uninitialised", "divergent-barrier"
    }  # fmt: skip
    moves = re.findall(r"// MISTAKE ([\w-]+)", (FILES / "moves.cu").read_text())
    assert all(f"// MISTAKE {kind}" in first for kind in moves)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_each_finds_the_same(first, compiler):
    need(compiler)
    assert words(compiler) == first


@pytest.mark.parametrize("compiler", COMPILERS)
def test_no_constructor_runs_for_a_shared_variable(tmp_path, compiler):
    need(compiler)
    path = tmp_path / "shared.cu"
    path.write_text(
        "struct Counter { int n; __device__ Counter() { n = clock() + 7; } };\n"
        "__global__ void k(int *x) {\n  __shared__ Counter c;\n  x[0] = c.n;\n}\n"
    )
    code = f"import torch; from mlsys.kernels.cuda import load; load({str(path)!r})['k'](1, 1, torch.zeros(1).int())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "CXX": compiler})
    assert "CompileError" in done.stderr
    assert "constructor" in done.stderr or "constant initializer" in done.stderr
