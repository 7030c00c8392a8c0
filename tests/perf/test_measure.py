"""Measured limits: the right work is timed, the best run counts, and each is measured once."""

import json

import numba
import pytest
import torch

from mlsys.perf import _measure
from mlsys.perf._measure import Limits


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MLSYS_CACHE", str(tmp_path))
    monkeypatch.setattr(_measure, "cpu_name", lambda: "Toy (R) CPU")
    return tmp_path


@pytest.fixture
def measured(monkeypatch):
    """Every measurement that was asked for; none takes time."""
    asked = []
    monkeypatch.setattr(_measure, "_measure", lambda *key: asked.append(key) or Limits(float(len(asked)), 3.0))
    return asked


def test_limits_are_measured_once_per_dtype_threads_and_device_then_cached(measured, cache):
    assert _measure.limits("float32", 1) == _measure.limits("float32", 1) == Limits(1.0, 3.0)
    assert _measure.limits("bfloat16", 1) == Limits(2.0, 3.0)
    assert _measure.limits("float32", 2) == Limits(3.0, 3.0)
    assert _measure.limits("float32", 1, "cuda") == Limits(4.0, 3.0)
    assert _measure.limits("float32", 1) == Limits(1.0, 3.0)
    assert len(measured) == 4
    stored = json.loads((cache / "limits.json").read_text())
    assert len(stored) == 4
    assert all("toy-cpu" in key or torch.cuda.is_available() for key in stored)
    assert all(f"torch {torch.__version__.partition('+')[0]}" in key for key in stored)


@pytest.mark.parametrize("text", ["{", "[]", "null", "\xff", '{"%s": 3}', '{"%s": {"flops": "x", "bandwidth": 1}}'])
def test_damaged_cache_is_measured_anew_with_a_warning(measured, cache, caplog, text):
    _measure.limits("bfloat16", 1)
    (key,) = json.loads((cache / "limits.json").read_text())
    (cache / "limits.json").write_bytes(text.replace("%s", key.replace("bfloat16", "float32")).encode("latin-1"))
    assert _measure.limits("float32", 1) == Limits(2.0, 3.0)
    assert "limits.json cannot be read" in caplog.text
    assert json.loads((cache / "limits.json").read_text())[key.replace("bfloat16", "float32")]["flops"] == 2.0


def test_a_damaged_entry_leaves_the_others(measured, cache):
    _measure.limits("bfloat16", 1)
    (key,) = (known := json.loads((cache / "limits.json").read_text()))
    (cache / "limits.json").write_text(json.dumps({**known, key.replace("bfloat16", "float32"): None, "x": [1]}))
    _measure.limits("float32", 1)
    assert json.loads((cache / "limits.json").read_text()).keys() == {key, key.replace("bfloat16", "float32"), "x"}


def test_without_a_place_to_keep_them_they_are_measured_once_a_process(measured, cache, monkeypatch, caplog):
    (cache / "file").write_text("")
    monkeypatch.setenv("MLSYS_CACHE", str(cache / "file" / "x"))
    assert _measure.limits("float32", 1) == _measure.limits("float32", 1) == Limits(1.0, 3.0)
    assert len(measured) == 1
    assert "cannot keep the limits" in caplog.text


def test_dtype_that_cannot_be_measured(measured):
    with pytest.raises(ValueError, match="dtype='int3' cannot be measured; there are float64, float32"):
        _measure.limits("int3", 1)
    assert measured == []


def test_the_work_that_is_timed_is_the_work_that_is_counted(monkeypatch):
    monkeypatch.setattr(_measure, "MATMUL", {"cpu": 64})
    monkeypatch.setattr(_measure, "COPY", {"cpu": 1000})
    threads = []

    def best(run, device, budget_s=0.0):
        threads.append(torch.get_num_threads())
        result = run()
        assert result.abs().sum() > 0  # never zeros: a GPU multiplies those faster
        return 0.01 if result.ndim == 2 else 0.1

    monkeypatch.setattr(_measure, "_best", best)
    limits = _measure.limits("bfloat16", 1)
    assert limits.flops == 2 * 64**3 / 0.01
    assert limits.bandwidth == 2 * 4 * 1000 / 0.1
    assert threads == [1, 1]


def test_the_best_run_counts(monkeypatch):
    ticks = iter([0, 5, 10, 13, 20, 29, 30, 34, 40, 46])  # five runs of 5, 3, 9, 4 and 6 seconds
    monkeypatch.setattr(_measure.time, "perf_counter", lambda: next(ticks))
    runs = []
    assert _measure._best(lambda: runs.append(1), "cpu") == 3
    assert len(runs) == 6  # one more before the clock starts


def test_the_bound_is_the_slower_of_the_two():
    assert Limits(flops=10.0, bandwidth=5.0).seconds(100, 5) == 10.0
    assert Limits(flops=10.0, bandwidth=5.0).seconds(10, 500) == 100.0


def test_threads_are_pinned_and_put_back():
    before = torch.get_num_threads(), numba.get_num_threads()
    with _measure.threads(1):
        assert (torch.get_num_threads(), numba.get_num_threads()) == (1, 1)
    assert (torch.get_num_threads(), numba.get_num_threads()) == before
    with pytest.raises(ValueError, match="threads=0: this machine allows 1 to"), _measure.threads(0):
        pass


@pytest.mark.parametrize(
    ("cpu", "cores", "gpu", "name"),
    [
        ("AMD EPYC", 2, None, "amd-epyc-2-cores"),
        ("Intel(R) Xeon(R) CPU @ 2.2GHz", 4, None, "intel-xeon-cpu-2-2ghz-4-cores"),
        ("AMD EPYC", 16, "NVIDIA H100 80GB", "nvidia-h100-80gb-16-cores"),
    ],
)
def test_slug(cpu, cores, gpu, name):
    assert _measure.slug(cpu, cores, gpu) == name


def test_cores():
    assert _measure.cores() >= 1
