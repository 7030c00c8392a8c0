"""What this machine is, for every record, and how fast it can go: the yardstick behind every "share of the limit".

A figure such as "90 GFLOP/s" says little; "95% of what this core can do" says
when to stop optimising. So the limits are measured, not read off a data sheet:

    peak FLOP/s    the best large square matmul that torch can do, per dtype
    bandwidth      the best large copy: bytes read plus bytes written, a second

both for the same number of threads as the benchmark uses, once, and then cached
under the user's cache folder with the versions they were measured with. A share
above 100% is possible where the work's bytes stay in cache: the bound is on
memory, not on cache. The measuring itself lies below the techniques, in
`mlsys.perf`, so that the roofline can use it too.

Cost:
    About a second per dtype and thread count, the first time.

See also:
    `mlsys.perf.hardware` (the same limits as a record beside published machines), `mlsys.perf.roofline`.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from mlsys.perf._measure import Limits, cores, cpu_name, gpu_name, limits, slug, threads

__all__ = ["Limits", "Machine", "commit", "limits", "load", "this_machine", "threads"]

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
        return slug(self.cpu, self.cores, self.gpu)

    def __str__(self) -> str:
        gpu = f", {self.gpu}" if self.gpu else ""
        return f"{self.cpu}, {self.cores} cores, {self.memory_gib:.0f} GiB{gpu}; {self.system}; Python {self.python}"


@cache
def this_machine() -> Machine:
    """Read the fingerprint (about a second, once a process: asking the CPU its name is slow)."""
    import psutil

    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return Machine(
        cpu=cpu_name(),
        cores=cores(),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        gpu=gpu_name(),
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
