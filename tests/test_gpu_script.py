"""`benchmarks/gpu.py` without a GPU: what it says and leaves out, when it ends; and each call that it would time."""

import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from mlsys.bench import Benchmark, Impl, Work, records
from mlsys.bench.core import Settings, describe
from mlsys.kernels._triton import INTERPRETED
from mlsys.loading import import_file

FILE = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
gpu = import_file(FILE)
CASE = {"n": 2, "dtype": "float32"}
SMOKE = Settings("quick", 1, "cpu", 0.0, smoke=True)
interpreted = pytest.mark.skipif(not INTERPRETED.value, reason="there is a GPU")


def fail():
    raise RuntimeError("no kernel\nfor this")


def toy(**impls):
    """Adds one; each other implementation by what its call returns, its role by its name."""
    roles = {"reference": "reference", "peer": "peer"}
    calls = {"reference": lambda: 1.0, "triton": lambda: 1.0, "peer": lambda: 1.0} | impls
    return Benchmark(
        str(Path("toys/one.py")),
        cases={"quick": [{"n": n, "dtype": "float32"} for n in (1, 2, 3)]},
        inputs=lambda case, device: case["n"],
        work=lambda case, n: Work(flops=1, bytes=1),
        impls={name: Impl(lambda call=call: call, roles.get(name, "ours")) for name, call in calls.items()},
        subject="triton",
        prepare=lambda function, case, n: function,
        verify=lambda case, n, got, want: (abs(got - want), 0.1),
        fits=lambda case, device: (case["n"] > 1) == (device == "cuda"),
    )


@interpreted
def test_without_a_gpu_it_says_so_and_fails(capsys):
    assert gpu.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("gpu.py: this needs an NVIDIA GPU: ")
    assert "`make test`" in said.err


def test_make_runs_it():
    makefile = (FILE.parents[1] / "Makefile").read_text(encoding="utf-8")
    assert "\ngpu: $(READY)  ## " in makefile
    assert "benchmarks/gpu.py --results results --report report" in makefile


def test_every_triton_kernel_has_a_benchmark_there():
    found = gpu.with_triton()
    assert {"attention.flash", "attention.paged", "kernels.cross_entropy", "kernels.triton"} <= set(found)
    alone = {name.removeprefix("kernels.") for name in gpu.modules()} - {n.removeprefix("kernels.") for n in found}
    techniques = {case["technique"] for case in gpu.cases(found["kernels.triton"])}
    assert techniques == {"softmax", "layernorm", "rmsnorm"}
    assert alone <= {"softmax", "norm"}


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_peer_that_cannot_is_left_out_and_named():
    found = {r.impl: r for r in gpu.attempt(toy(peer=fail), CASE, SMOKE)}
    assert found["triton"].status == found["reference"].status == "smoke"
    assert (found["peer"].status, found["peer"].note) == ("failed", "raised RuntimeError: no kernel for this")
    assert not any(map(gpu.bad, found.values()))


def test_two_that_cannot_are_both_left_out():
    found = {r.impl: r.status for r in gpu.attempt(toy(peer=fail, other=fail), CASE, SMOKE)}
    assert found == {"reference": "smoke", "triton": "smoke", "peer": "failed", "other": "failed"}


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_one_of_ours_that_fails_is_amiss(name):
    found = {r.impl: r for r in gpu.attempt(toy(**{name: fail}), CASE, SMOKE)}
    assert gpu.bad(found[name])
    assert ("peer" in found) == (name == "triton")


def test_a_wrong_result_of_ours_is_amiss_and_of_a_peer_is_not():
    for name, amiss in (("triton", True), ("peer", False)):
        (record,) = (r for r in gpu.attempt(toy(**{name: lambda: 2.0}), CASE, SMOKE) if r.impl == name)
        assert record.status == "wrong"
        assert gpu.bad(record) == amiss


# --- time -------------------------------------------------------------------------------------------------------------


def test_a_process_that_would_never_end_is_ended():
    forever = "import threading; threading.Event().wait()"
    assert gpu.ended([sys.executable, "-c", forever], 0.1) is None
    assert gpu.ended([sys.executable, "-c", "raise SystemExit(3)"], 60.0) == 3


def test_each_case_is_saved_when_it_is_done_and_none_is_begun_too_late(tmp_path, monkeypatch, capsys):
    clock = iter([0.0, 10.0])
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    assert gpu.measure(toy(), 5.0, tmp_path, SMOKE)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["case"], r["impl"]) for r in printed] == [(CASE, x) for x in ("reference", "triton", "peer")]
    (file,) = tmp_path.glob("*/toys.one.jsonl")
    assert [r.impl for r in records.read(file)] == ["reference", "triton", "peer"]


def test_what_was_not_measured_is_named_and_what_was_is_kept(tmp_path, monkeypatch):
    made = gpu.attempt(toy(), CASE, SMOKE)
    limits = []

    def ended(words, limit_s, out):
        limits.append(limit_s)
        assert words[2:4] == ["toys.one", "--case-by-case"]
        for record in made:
            out.write(json.dumps(dataclasses.asdict(record), sort_keys=True) + "\n")
        out.write('{"case": {"n": 3}, "cut o')

    monkeypatch.setattr(gpu, "ended", ended)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: 100.0)
    found, amiss = gpu.benchmarks({"toys.one": toy()}, 160.0, tmp_path)
    assert found == made
    assert amiss == ["toys.one: not measured in 60 s: n=3 float32"]
    assert limits == [60.0]


def test_benchmarks_share_the_time_by_their_cases(tmp_path, monkeypatch):
    chosen = {"a": toy(), "b": dataclasses.replace(toy(), cases={"quick": [{"n": n} for n in range(2, 8)]})}
    limits = []
    monkeypatch.setattr(gpu, "ended", lambda words, limit_s, out: limits.append(limit_s) or 0)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: 0.0)
    gpu.benchmarks(chosen, 100.0, tmp_path)
    assert limits == [30.0, 100.0]  # 3 of 10 shares; then all that is left


# --- as if there were one ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_from_the_tests_to_the_page(tmp_path, monkeypatch, capsys):
    bench = gpu.with_triton()["kernels.triton"]
    timed = {"status": "ok", "seconds": 1e-3, "quartiles": (1e-3, 1e-3), "runs": 5, "items": 2.0**28, "unit": "B"}

    def ended(words, limit_s, out=None):
        if "pytest" in words:
            assert any(word.endswith("test_flash_triton.py") for word in words)
            assert not any("test_compiled" in word for word in words)
            return 0
        for case in gpu.cases(bench):
            for name, impl in bench.impls.items():
                record = dataclasses.replace(gpu.blank(bench, case, gpu.ON_GPU), impl=name, role=impl.role, **timed)
                print(json.dumps(dataclasses.asdict(record)), file=out)
        return 0

    monkeypatch.setattr(gpu.catalog, "devices", lambda backend: {"cuda": None})
    monkeypatch.setattr(gpu, "ended", ended)
    assert gpu.main(["kernels.triton", "--report", str(tmp_path), "--results", str(tmp_path)]) == 0
    assert "GB/s" in capsys.readouterr().out
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "rmsnorm" in page
    assert "<svg" in page


TINY = {"n": 64, "k": 256, "rows": 6, "columns": 64, "vocabulary": 96, "width": 32, "batch": 2, "head_dim": 16}


def tiny(case):
    """The same case in a size for the interpreter: as many heads a group, whole blocks of the same size."""
    small = dict(case)
    for name, x in case.items():
        if isinstance(x, int) and not isinstance(x, bool):
            small[name] = max(1, x // 8) if name in ("heads", "kv_heads") else min(x, TINY.get(name, 32))
    return small


def kinds(bench):
    """A case for the GPU of each kind: other sizes make no other kind."""
    found = {}
    for case in gpu.cases(bench):
        if "kernel" in bench.impls and bench.impls["kernel"].only(case):
            continue  # in CUDA, with tests of its own
        found[describe({key: x for key, x in tiny(case).items() if key not in ("batch", "block")})] = case
    return found.values()


@interpreted
@pytest.mark.parametrize("name", gpu.candidates())
def test_everything_that_it_would_time_can_be_called_and_agrees(name, monkeypatch):
    """What torch.compile gets is traced in full, though not compiled; what torch or a library lacks here is said."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiled(f, **{**how, "backend": "eager"}))
    bench = gpu.with_triton().get(name)
    if bench is None:
        pytest.skip("its Triton kernels are timed by kernels.triton")
    for case in kinds(bench):
        impls = {key: impl for key, impl in bench.impls.items() if impl.only(case)}  # whatever they say of the tiny one
        impls = {key: dataclasses.replace(impl, only=lambda case: True) for key, impl in impls.items()}
        found = gpu.attempt(dataclasses.replace(bench, impls=impls), tiny(case), SMOKE)
        for record in found:
            if record.status == "failed" and record.impl == "torch.compile, flex":
                assert case["backward"]  # of which torch says that a CPU has none
            elif record.status in ("failed", "wrong") and record.impl.startswith("torchao int4"):
                assert name == "quant.qlinear"  # packed as a GPU's kernel takes it
            elif record.status == "failed" and record.role == "peer":
                assert re.search("No (available kernel|viable backend)", record.note), f"{record.impl}: {record.note}"
            else:
                assert record.status in ("smoke", "missing"), f"{record.impl}, {case}: {record.status} {record.note}"
        assert any(record.role == "ours" and record.status == "smoke" for record in found)
