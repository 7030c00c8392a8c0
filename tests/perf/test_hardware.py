"""The records are complete, sourced and consistent; this machine is measured into the same form."""

import dataclasses
import itertools
import subprocess
import sys
from types import SimpleNamespace

import pytest

from mlsys.perf import _measure, hardware
from mlsys.perf._measure import Limits
from mlsys.perf.hardware import HARDWARE, Hardware, Link

# As the vendors print them: dense TFLOP/s, GB/s, GB. Written down apart from the module.
PRINTED = {
    "v100": ("float16", 125, 900, 32),
    "a100-40": ("bfloat16", 312, 1555, 40),
    "a100-80": ("bfloat16", 312, 2039, 80),
    "h100": ("bfloat16", 989.4, 3350, 80),
    "h200": ("bfloat16", 989.5, 4800, 141),
    "b200": ("bfloat16", 2250, 7700, 180),
    "tpu-v1": ("int8", 92, 34, 8 * 1.073741824),
    "tpu-v4": ("bfloat16", 275, 1200, 32 * 1.073741824),
    "tpu-v5e": ("bfloat16", 197, 819, 16),
}
LINKS = {"v100": 150, "a100-40": 300, "a100-80": 300, "h100": 450, "h200": 450, "b200": 900, "tpu-v4": 300}  # GB/s
NETWORKS = {"v100": 6.25, "a100-40": 25, "a100-80": 25, "h100": 50, "h200": 50, "b200": 50, "tpu-v5e": 3.125}


def toy(**changes):
    return Hardware(**{"name": "toy", "peak": {"float32": 1e9}, "bandwidth": 1e8, "memory": 1e6, **changes})


def test_importing_needs_neither_torch_nor_numpy():
    code = "import sys; import mlsys.perf.roofline; print({'torch', 'numpy', 'numba'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_records_are_those_promised():
    assert set(HARDWARE) == set(PRINTED)


@pytest.mark.parametrize("name", HARDWARE)
def test_figures_as_printed(name):
    record = hardware.find(name)
    dtype, teraflops, gigabytes_a_second, gigabytes = PRINTED[name]
    assert hardware.peak_flops(record, dtype) == pytest.approx(teraflops * 1e12)
    assert record.bandwidth == pytest.approx(gigabytes_a_second * 1e9)
    assert record.memory == pytest.approx(gigabytes * 1e9)
    if name in LINKS:
        assert record.link.bandwidth == pytest.approx(LINKS[name] * 1e9)
    if name in NETWORKS:
        assert record.network.bandwidth == pytest.approx(NETWORKS[name] * 1e9)


@pytest.mark.parametrize("name", HARDWARE)
def test_every_figure_has_a_source_with_a_year_and_no_source_is_idle(name):
    record = HARDWARE[name]
    fields = ("peak", "bandwidth", "memory", "processors", "sram", "cache")
    given = {field for field in fields if getattr(record, field) is not None}
    assert set(record.sources) == given
    texts = [*record.sources.values(), *(link.source for link in (record.link, record.network) if link)]
    assert all("20" in text and len(text) > 20 for text in texts)


@pytest.mark.parametrize("name", HARDWARE)
def test_figures_are_consistent(name):
    record = HARDWARE[name]
    peak = record.peak
    # fewer bits are never slower, and no format is printed with sparsity (twice that of the next narrower one)
    order = [d for d in ("float32", "tf32", "bfloat16", "float8") if d in peak]
    assert [peak[d] for d in order] == sorted(peak[d] for d in order)
    if "tf32" in peak:
        assert peak["bfloat16"] / peak["tf32"] == pytest.approx(2, rel=0.03)
    if "float8" in peak:
        assert peak["float8"] / peak["bfloat16"] == pytest.approx(2, rel=0.01)
    if "bfloat16" in peak and "float16" in peak:
        assert peak["bfloat16"] == peak["float16"]
    assert record.network is None or record.link is None or record.network.bandwidth < record.link.bandwidth
    assert record.link is None or record.link.bandwidth < record.bandwidth


def test_newer_generations_are_faster():
    gpus = [HARDWARE[name] for name in ("v100", "a100-40", "a100-80", "h100", "h200", "b200")]
    for older, newer in itertools.pairwise(gpus):
        assert newer.peak["float16"] >= older.peak["float16"]
        assert newer.bandwidth > older.bandwidth
        assert newer.memory > older.memory or newer.peak["float16"] > older.peak["float16"]


def test_find_ignores_case_and_suggests_the_nearest():
    assert hardware.find("H100") is HARDWARE["h100"]
    with pytest.raises(LookupError, match=r"no machine 'a100'; did you mean .*a100-80"):
        hardware.find("a100")
    with pytest.raises(LookupError, match=r"no machine 'zzz'; there are v100, .*tpu-v5e"):
        hardware.find("zzz")


def test_peak_of_an_unknown_dtype_names_those_there_are():
    with pytest.raises(LookupError, match=r"V100 .* no peak for dtype 'bfloat16'; it has float64, float32, float16"):
        hardware.peak_flops(HARDWARE["v100"], "bfloat16")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peak": {}}, "peak of 'toy' is empty"),
        ({"peak": {"fp32": 1.0}}, "peak has dtype 'fp32'; known are float64"),
        ({"peak": {"float32": -1.0}}, r"peak\['float32'\] must be positive"),
        ({"bandwidth": 0}, "bandwidth must be positive"),
        ({"memory": float("inf")}, "memory must be positive and finite"),
        ({"cache": -1}, "cache must be positive"),
        ({"sources": {"speed": "x"}}, "sources has 'speed'"),
    ],
)
def test_impossible_records_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        toy(**changes)


def test_links_are_checked():
    with pytest.raises(ValueError, match="bandwidth must be positive"):
        Link("x", 0.0)
    with pytest.raises(ValueError, match="latency must be positive"):
        Link("x", 1.0, latency=0.0)


def test_records_are_plain_values():
    copied = dataclasses.asdict(HARDWARE["h100"])
    assert copied["link"]["latency"] == 3.4e-6
    assert copied["network"]["latency"] == 14e-6
    assert copied["peak"]["float8"] == pytest.approx(1978.9e12)
    with pytest.raises(dataclasses.FrozenInstanceError):
        HARDWARE["h100"].bandwidth = 1.0


# --- this machine -----------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """Limits that need no clock; returns what was asked for."""
    asked = []

    def limits(dtype, n_threads, device="cpu"):
        asked.append((dtype, n_threads, device))
        return Limits(flops={"float32": 1e11, "bfloat16": 2e11}[dtype], bandwidth=3e10 + len(asked))

    monkeypatch.setattr(_measure, "limits", limits)
    return asked


def test_this_machine_is_a_record(measured, monkeypatch):
    monkeypatch.setattr(_measure, "cpu_name", lambda: "Toy CPU")
    here = hardware.this_machine(n_threads=2)
    assert measured == [("float32", 2, "cpu"), ("bfloat16", 2, "cpu")]
    assert here.name == "Toy CPU, 2 threads"
    assert here.peak == {"float32": 1e11, "bfloat16": 2e11}
    assert here.bandwidth == 3e10 + 2  # the better of the two copies
    assert here.processors == 2
    assert here.memory > 2**20
    assert here.sources["peak"].startswith("measured")
    assert "128 MiB" in here.sources["bandwidth"]
    assert hardware.this_machine(("float32",)).name == "Toy CPU, 1 thread"


def test_this_machines_gpu_is_a_record(measured, monkeypatch):
    import torch

    gpu = SimpleNamespace(name="Toy GPU", total_memory=8, multi_processor_count=4, L2_cache_size=2)
    monkeypatch.setattr(_measure, "gpu_name", lambda: "Toy GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    here = hardware.this_machine(("float32",), device="cuda")
    assert (here.name, here.memory, here.processors, here.cache) == ("Toy GPU", 8, 4, 2)
    assert measured == [("float32", 1, "cuda")]
    assert set(here.sources) == {"peak", "bandwidth", "memory", "processors", "cache"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"device": "tpu"}, "device='tpu': there are cpu and cuda"),
        ({"device": "cuda"}, "no CUDA device"),
        ({"dtypes": ("float8",)}, "dtypes has 'float8'"),
        ({"dtypes": "float32"}, "give a sequence"),
        ({"dtypes": ()}, "give a sequence"),
    ],
)
def test_what_cannot_be_measured_is_refused(measured, monkeypatch, arguments, named):
    monkeypatch.setattr(_measure, "gpu_name", lambda: None)
    with pytest.raises(ValueError, match=named):
        hardware.this_machine(**arguments)
    assert measured == []
