"""NVIDIA's compute-sanitizer on the planted mistakes, beside what `check` says of them: where it looks, both agree.

The comparison needs a GPU and compute-sanitizer, which comes with the CUDA toolkit. How its output is read is tested
everywhere.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent
TOOLKIT = Path("/usr/local/cuda/bin")

# Which tool has to see which planted mistake, by what its manual says of it.
SEEN = {
    **dict.fromkeys(
        (
            "barriers.transpose",
            "barriers.matmul",
            "barriers.block_sum",
            "barriers.warp_sum",
            "barriers.volatile_sum",
            "barriers.reverse_in_warp",
            "barriers.softmax",
            "barriers.double_buffer",
            "barriers.running_sum",
            "blocks.histogram_shared",
            "copies.pipeline",
            "copies.one_tile",
        ),
        "racecheck",
    ),
    **dict.fromkeys(
        (
            "bounds.add",
            "bounds.row_sums",
            "bounds.difference",
            "bounds.reverse",
            "bounds.scale_rows",
            "bounds.twice",
            "bounds.count_pairs",
        ),
        "memcheck",
    ),
    **dict.fromkeys(("divergence.reverse", "divergence.column_maxima"), "synccheck"),
}

# Which ones no tool promises to see, and why not.
_GLOBAL = "racecheck watches shared memory only, and this race is on a tensor"
_INSIDE = "the index leaves the array but not the memory that the block or the thread has, which is what memcheck knows"
_SHARED = "initcheck watches global memory only, and this is shared memory"
_SHUFFLE = "synccheck watches barriers, and this is the mask of a shuffle or a vote"
_NEVER = "it may never end on a GPU, and no tool stops it"
UNSEEN = {
    "barriers.block_largest": _SHARED,
    "barriers.stencil": _SHARED,
    "blocks.histogram": _GLOBAL,
    "blocks.grid_sum": _GLOBAL,
    "blocks.tiles": _GLOBAL,
    "blocks.smooth": _GLOBAL,
    "blocks.largest_float": _GLOBAL,
    "blocks.count_negative": "the manual does not say whether an atomic operation and a plain read are a hazard",
    "blocks.largest": _NEVER,
    "blocks.rank": _NEVER,
    "bounds.smooth": _INSIDE,
    "bounds.look_up": _INSIDE,
    "divergence.mirror": "a thread that has returned counts as arrived since Volta",
    "divergence.halves": "both branches have a __syncthreads(), which is barrier 0 to the GPU in both",
    "divergence.warp_sums": _SHUFFLE,
    "divergence.even_sum": _SHUFFLE,
    "divergence.broadcast_last": _SHUFFLE,
    "divergence.compact": _SHUFFLE,
    "copies.phases": "it waits for the wrong phase, and the manual promises nothing for an mbarrier of inline PTX",
    "copies.rows": _NEVER,
    "copies.counted": _NEVER,
}


@dataclass(frozen=True)
class Report:
    """One report of compute-sanitizer: its first line, and the places in source files that it names."""

    text: str
    places: tuple[tuple[str, int], ...]


_HEAD = re.compile(
    r"Invalid __\w+__ |(?:Error|ERROR|Warning|WARN|WARNING): .*[Rr]ace reported|Potential \w+ hazard|Barrier error|"
    r"Uninitialized __\w+__ "
)
_SUMMARY = re.compile(r"^(?:ERROR|RACECHECK) SUMMARY: ", re.MULTILINE)
_PLACE = re.compile(r"\bin (\S+?\.\w+):(\d+)\b")


def reports(output: str) -> list[Report]:
    """What compute-sanitizer found, from what it printed. ValueError if it did not come to its summary."""
    rows = [row.removeprefix("=========").strip() for row in output.splitlines() if row.startswith("=========")]
    if not _SUMMARY.search("\n".join(rows)):
        raise ValueError(f"compute-sanitizer did not come to its end:\n{output}")
    found: list[tuple[str, list[tuple[str, int]]]] = []
    inside = False
    for row in rows:
        if _HEAD.match(row):
            found.append((row, []))
            inside = True
        elif not row or row.startswith("Saved host backtrace") or _SUMMARY.match(row):
            inside = False
        if inside:
            found[-1][1].extend((Path(name).name, int(line)) for name, line in _PLACE.findall(row))
    return [Report(text, tuple(places)) for text, places in found]


# --- reading its output -----------------------------------------------------------------------------------------------

MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at add_wrong(const float *, const float *, float *, int)+0x120 in /home/me/bounds.cu:16
=========     by thread (36,0,0) in block (1,0,0)
=========     Address 0x7f0a00000390 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f0a00000200 of size 400 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========     Host Frame:main in other.c:7 [0x1234] in python3
=========
========= Invalid __shared__ write of size 4 bytes
=========     at 0x90 in bounds.cu:71:reverse_wrong(const int *, int *)
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x80 is out of bounds
=========
========= Program hit CUDA_ERROR_LAUNCH_FAILED (error 719) due to "unspecified launch failure" on CUDA API call to cuX.
========= ERROR SUMMARY: 3 errors
"""
RACECHECK = """\
some words of the program in it.cu:3
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at running_sum_wrong(const int *, int *)+0x1a0 in barriers.cu:313
=========     and Read access at running_sum_wrong(const int *, int *)+0x150 in barriers.cu:312 [508 hazards]
=========
========= Warning: Race reported between Read access at k(float *)+0x10 in a.cu:1
=========     and Write access at k(float *)+0x20 in a.cu:2 [4 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""
SYNCCHECK = """\
========= COMPUTE-SANITIZER
========= Barrier error detected. Divergent thread(s) in block.
=========     at __syncthreads()+0x80 in /usr/include/crt/sm_30_intrinsics.hpp:110
=========     by thread (36,0,0) in block (1,0,0)
=========     Device Frame:reverse_wrong(const float *, float *, int)+0x90 in divergence.cu:21
=========
========= ERROR SUMMARY: 1 error
"""
INITCHECK = """\
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at k(const float *)+0x60 in k.cu:5
=========     by thread (0,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 1 error
"""


@pytest.mark.parametrize(
    ("output", "places"),
    [
        (MEMCHECK, [(("bounds.cu", 16),), (("bounds.cu", 71),)]),
        (RACECHECK, [(("barriers.cu", 313), ("barriers.cu", 312)), (("a.cu", 1), ("a.cu", 2))]),
        (SYNCCHECK, [(("sm_30_intrinsics.hpp", 110), ("divergence.cu", 21))]),
        (INITCHECK, [(("k.cu", 5),)]),
        ("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", []),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", []),
    ],
    ids=["memcheck", "racecheck", "synccheck", "initcheck", "nothing", "no hazards"],
)
def test_its_output_is_read(output, places):
    found = reports(output)
    assert [report.places for report in found] == places
    assert all(report.text for report in found)


@pytest.mark.parametrize("output", ["", "Error: No supported GPU found\n", MEMCHECK.replace("ERROR SUMMARY", "")])
def test_output_without_a_summary_is_no_clean_bill(output):
    with pytest.raises(ValueError, match="did not come to its end"):
        reports(output)


# --- on a GPU ---------------------------------------------------------------------------------------------------------

CHILD = """
import importlib.util, sys
import torch
from mlsys.kernels.cuda import load
spec = importlib.util.spec_from_file_location("cases", sys.argv[1])
cases = sys.modules["cases"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)
file, name, twin = sys.argv[2:]
case = cases.TABLE[file][name]
wrong = twin == "wrong"
args = ((case.wrong if wrong else None) or case.arguments)()
args = [x.cuda() if isinstance(x, torch.Tensor) else x for x in args]
torch.cuda.synchronize()
load(cases.FILES / f"{file}.cu")[name + "_wrong" * wrong](case.grid, case.block, *args, shared=case.shared)
torch.cuda.synchronize()
"""


@pytest.fixture(scope="module")
def cases() -> ModuleType:
    """The planted mistakes, how they are launched, and on which lines they stand."""
    spec = importlib.util.spec_from_file_location("cases_of_check", HERE / "test_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_planted_mistake_is_in_one_of_the_tables(cases):
    planted = {f"{file}.{name}" for file, table in cases.TABLE.items() for name in table}
    assert SEEN.keys() | UNSEEN.keys() == planted
    assert not SEEN.keys() & UNSEEN.keys()


@pytest.fixture(scope="module")
def sanitizer() -> str:
    found = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), str(TOOLKIT)]))
    if found is None:
        pytest.skip(
            "compute-sanitizer is not installed: it comes with the CUDA toolkit (apt: cuda-sanitizer-<version>)"
        )
    return found


def sanitized(sanitizer: str, tool: str, spec: str, twin: str) -> list[Report]:
    """What a tool says of one launch. Each tensor is an allocation of its own, whose end the tool knows."""
    command = [sanitizer, "--tool", tool, "--error-exitcode", "1", sys.executable, "-c", CHILD]
    done = subprocess.run(
        [*command, str(HERE / "test_check.py"), *spec.split("."), twin],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    found = reports(done.stdout + done.stderr)
    assert found or done.returncode == 0, done.stdout + done.stderr
    return found


def needs_hopper(spec: str) -> None:
    import torch

    if spec.startswith("copies.") and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("copies.cu has bulk copies, which this GPU has not: it takes one of compute capability 9.0")


@pytest.mark.gpu
@pytest.mark.parametrize("spec", SEEN)
def test_the_sanitizer_sees_what_check_sees(cases, sanitizer, spec):
    needs_hopper(spec)
    file, name = spec.split(".")
    case, loaded = cases.TABLE[file][name], cases.load(cases.FILES / f"{file}.cu")
    kernel = loaded[f"{name}_wrong"]
    found = cases.check(kernel, case.grid, case.block, *(case.wrong or case.arguments)(), shared=case.shared)
    theirs = {place for report in sanitized(sanitizer, SEEN[spec], spec, "wrong") for place in report.places}
    assert theirs & {(f"{file}.cu", line) for line in cases.lines(found)}


@pytest.mark.gpu
@pytest.mark.parametrize("spec", SEEN)
def test_the_sanitizer_finds_the_correct_twin_clean(sanitizer, spec):
    needs_hopper(spec)
    assert sanitized(sanitizer, SEEN[spec], spec, "right") == []


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["barriers.softmax", "bounds.add", "blocks.grid_sum"])
def test_initcheck_finds_nothing_where_all_tensors_are_filled(sanitizer, spec):
    assert sanitized(sanitizer, "initcheck", spec, "right") == []
