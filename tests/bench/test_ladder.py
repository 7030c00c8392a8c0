"""The benchmark of a ladder of CUDA kernels: on a processor each rung is counted, and no time is shown."""

from pathlib import Path

import pytest
import torch

from mlsys.bench import Work, machine, run
from mlsys.bench.ladder import ON_PROCESSOR, count, ladder
from mlsys.bench.machine import Limits
from mlsys.kernels import reduction, reduction_cuda

DOCS = Path(__file__).parents[2] / "docs" / "kernels"
N = 4096
COLUMNS = {
    "launches",
    "bytes ÷ least",
    "sectors/request",
    "requests/KiB",
    "shared passes/KiB",
    "of them conflicts, %",
}


@pytest.fixture(autouse=True)
def known_limits(monkeypatch):
    monkeypatch.setattr(machine, "limits", lambda *_: Limits(flops=1e9, bandwidth=1e9))


def toy(function=reduction.sum, allowed=1e-5):
    cases = [{"rung": "shuffle", "n": n, "dtype": "float32"} for n in (N, ON_PROCESSOR, ON_PROCESSOR + 1)]
    return ladder(
        "benchmarks/kernels/reduction.py",
        family="reduction",
        function=function,
        launches=reduction_cuda.launches,
        cases={"quick": cases, "default": cases, "full": cases},
        inputs=lambda case, device: {"x": torch.arange(case["n"], device=device) % 7 + 1.0},
        numbers=lambda case: case["n"],
        work=lambda case, given: Work(flops=case["n"] - 1, bytes=4 * case["n"], items=case["n"], unit="number"),
        allowed=allowed,
    )


def rows(bench, **case):
    records = run(bench, [{"rung": "shuffle", "n": N, "dtype": "float32", **case}], budget_s=0.01)
    return {record.impl: record for record in records}


def test_a_rung_is_counted_and_not_timed():
    found = rows(toy())
    for record in found.values():
        assert (record.status, record.seconds, record.share, record.runs) == ("counted", None, None, 0)
    assert found["torch"].figures == {}
    assert set(found["kernel"].figures) == COLUMNS
    assert found["kernel"].error <= 1e-5


def test_what_is_counted_is_what_the_kernels_move():
    figures = rows(toy())["kernel"].figures
    blocks = N // reduction_cuda.THREADS
    assert figures["launches"] == 2
    # n numbers; a sum a block, written, read and, a sector of 32 bytes, the result: no more
    moved = 4 * N + 32 * blocks + 4 * blocks + 32
    assert figures["bytes ÷ least"] == pytest.approx(moved / (4 * N))
    assert figures["of them conflicts, %"] == 0


def test_rungs_differ_in_what_they_ask_of_shared_memory():
    passes = {rung: rows(toy(), rung=rung)["kernel"].figures["shared passes/KiB"] for rung in reduction_cuda.VARIANTS}
    assert passes["shared"] > passes["shuffle"] >= passes["vectorized"]


def test_nothing_launched_asks_for_nothing():
    assert set(count([], 1024)) == COLUMNS
    assert set(count([], 1024).values()) == {0}


def test_large_cases_are_for_a_gpu_and_small_ones_for_a_processor():
    bench = toy()
    assert [case["n"] for case in bench.select("default", device="cpu")] == [N, ON_PROCESSOR]
    assert [case["n"] for case in bench.select("default", device="cuda")] == [ON_PROCESSOR + 1]


def test_a_gpu_is_timed():
    bench = toy()
    assert not any(bench.counted(impl, "cuda") for impl in bench.impls)
    assert all(bench.counted(impl, "cpu") for impl in bench.impls)


def test_a_function_whose_result_is_wrong_is_a_row_that_says_so():
    bench = toy().with_impl("yours", lambda x: reduction.sum(x) + 1)
    wrong = rows(bench)["yours"]
    assert (wrong.status, wrong.seconds, wrong.figures) == ("wrong", None, {})
    assert wrong.error > 1e-5


def test_a_users_function_is_counted_like_the_others():
    """It may launch kernels too, and then its time here would say nothing."""
    bench = toy().with_impl("yours", lambda x: x.sum())
    assert {name: record.status for name, record in rows(bench).items()} == dict.fromkeys(bench.impls, "counted")


def test_a_rung_that_there_is_not_is_refused_by_name():
    with pytest.raises(ValueError, match=r"variant must be one of 'shared', .*'turbo'"):
        rows(toy(), rung="turbo")


FAMILIES = sorted(path.stem for path in DOCS.glob("*.md") if "counted |" in path.read_text(encoding="utf-8"))


def test_there_are_pages():
    assert len(FAMILIES) >= 9


@pytest.mark.parametrize("family", FAMILIES)
def test_a_page_whose_rows_are_counted_says_that_no_gpu_was_measured(family):
    assert "not yet measured" in (DOCS / f"{family}.md").read_text(encoding="utf-8")
