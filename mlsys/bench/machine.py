"""What this machine is, and how fast it can go: the yardstick behind every "share of the limit".

A figure such as "90 GFLOP/s" says little; "95% of what this core can do" says
when to stop optimising. So the limits are measured, not read off a data sheet:

    peak FLOP/s    the best large square matmul that torch can do, per dtype
    bandwidth      the best large copy: bytes read plus bytes written, a second

both for the same number of threads as the benchmark uses, once, and then cached
under the user's cache folder with the versions they were measured with. A share
above 100% is possible where the work's bytes stay in cache: the bound is on
memory, not on cache.

Cost:
    About a second per dtype and thread count, the first time.

Papers:
    Williams, Waterman & Patterson 2009, "Roofline" (CACM 52:4): both limits in one picture.
    McCalpin 1995, STREAM: the copy kernel and how its bytes are counted.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import platformdirs

from mlsys.files import write_atomic

LIBRARIES = ("torch", "numpy", "numba", "triton", "bm25s", "rank-bm25", "faiss-cpu", "hnswlib", "scikit-learn")


@dataclass(frozen=True)
class Machine:
    """The fingerprint that goes with every record. No host name: the record may be published."""

    cpu: str
    cores: int
    memory_gib: float
    system: str
    python: str
    gpu: str | None
    versions: dict[str, str]

    @property
    def slug(self) -> str:
        """A folder name: `amd-epyc-2-cores`, or the GPU's name where there is one."""
        text = f"{self.gpu or self.cpu} {self.cores} cores"
        return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")

    def __str__(self) -> str:
        gpu = f", {self.gpu}" if self.gpu else ""
        return f"{self.cpu}, {self.cores} cores, {self.memory_gib:.0f} GiB{gpu}; {self.system}; Python {self.python}"


@dataclass(frozen=True)
class Limits:
    """Measured ceilings of this machine for one dtype and thread count."""

    flops: float  # FLOP/s
    bandwidth: float  # bytes/s

    def seconds(self, flops: float, bytes_: float) -> float:
        """The roofline's lower bound on the time of this much work."""
        return max(flops / self.flops, bytes_ / self.bandwidth)


@cache
def this_machine() -> Machine:
    """Read the fingerprint (about a second, once a process: asking the CPU its name is slow)."""
    import cpuinfo
    import psutil
    import torch

    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return Machine(
        cpu=cpuinfo.get_cpu_info().get("brand_raw") or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        versions=versions,
    )


def commit() -> str | None:
    """The commit of the checkout this package lies in, with a + if the tree has changes; None outside one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def load() -> float:
    """Load average over the last minute, divided by the cores: 1.0 is a full machine."""
    return round(os.getloadavg()[0] / (os.cpu_count() or 1), 2) if hasattr(os, "getloadavg") else 0.0


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """Pin torch, BLAS, OpenMP and numba to `n` threads inside the block, and put the old counts back."""
    import numba
    import threadpoolctl
    import torch

    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    if not 1 <= n <= most:
        raise ValueError(f"threads={n}: this machine allows 1 to {most}")
    before = torch.get_num_threads(), numba.get_num_threads()
    with threadpoolctl.threadpool_limits(limits=n):
        torch.set_num_threads(n)
        numba.set_num_threads(n)
        try:
            yield
        finally:
            torch.set_num_threads(before[0])
            numba.set_num_threads(before[1])


def cache_folder() -> Path:
    """Where measured limits (and built corpora) are kept: $MLSYS_CACHE, or the user's cache folder."""
    return Path(os.environ.get("MLSYS_CACHE") or platformdirs.user_cache_dir("mlsys"))


def limits(dtype: str, n_threads: int, device: str = "cpu") -> Limits:
    """Measured ceilings for a dtype ("float32", "bfloat16", "float64"), from the cache where it has them."""
    machine = this_machine()
    torch_version = machine.versions["torch"]
    key = f"{machine.slug}/{device}/{dtype}/{n_threads} threads/torch {torch_version}"
    path = cache_folder() / "limits.json"
    try:
        known = json.loads(path.read_text())
        return Limits(**known[key])
    except (FileNotFoundError, KeyError):
        pass
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and it will be measured again") from error
    measured = _measure(dtype, n_threads, device)
    known = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({**known, key: asdict(measured)}, indent=1))
    return measured


def _measure(dtype: str, n_threads: int, device: str) -> Limits:
    import torch

    generator = torch.Generator(device).manual_seed(0)
    n = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(n, n, generator=generator, device=device).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)
    elements = 2**28 if device == "cuda" else 2**25  # 128 MiB of float32 on a CPU: larger than any cache
    source = torch.randn(elements, generator=generator, device=device)
    target = torch.empty_like(source)
    with threads(n_threads):
        matmul = _best(lambda: torch.mm(a, b, out=out), device)
        copy = _best(lambda: target.copy_(source), device)
    return Limits(flops=2 * n**3 / matmul, bandwidth=2 * 4 * elements / copy)


def _best(run: object, device: str, budget_s: float = 0.6) -> float:
    """The shortest of as many runs as fit the budget (at least five): a limit is what was reached once."""
    import torch

    assert callable(run)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    run()
    wait()
    best, spent, runs = float("inf"), 0.0, 0
    while runs < 5 or (spent < budget_s and runs < 200):
        start = time.perf_counter()
        run()
        wait()
        took = time.perf_counter() - start
        best, spent, runs = min(best, took), spent + took, runs + 1
    return best
