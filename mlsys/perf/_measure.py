"""How fast this very machine can go: peak FLOP/s and bandwidth, measured once and kept.

    peak FLOP/s    the best large square matmul that torch can do, per dtype
    bandwidth      the best large copy: bytes read plus bytes written, a second

both for one number of threads, and stored under the user's cache folder with the
machine and the version of torch they were measured with. Whoever needs a ceiling
takes it from here: `mlsys.perf.hardware.this_machine` makes a record of it, and
the benchmarks report their share of it.

Importing this imports neither torch nor NumPy; measuring does.

Papers:
    Williams, Waterman & Patterson 2009, "Roofline" (CACM 52:4): both limits in one picture.
    McCalpin 1995, STREAM: the copy kernel and how its bytes are counted.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from mlsys.files import cache_folder, write_atomic

log = logging.getLogger(__name__)

DTYPES = ("float64", "float32", "bfloat16", "float16")  # what `torch.mm` multiplies on every device
MATMUL = {"cpu": 1536, "cuda": 8192}  # rows and columns of the square matrices
COPY = {"cpu": 2**25, "cuda": 2**28}  # float32 elements: 128 MiB and 1 GiB, larger than any cache


@dataclass(frozen=True)
class Limits:
    """Measured ceilings of this machine for one dtype and thread count."""

    flops: float  # FLOP/s
    bandwidth: float  # bytes/s

    def seconds(self, flops: float, bytes_: float) -> float:
        """The roofline's lower bound on the time of this much work."""
        return max(flops / self.flops, bytes_ / self.bandwidth)


# --- which machine this is --------------------------------------------------------------------------------------------


@cache
def cpu_name() -> str:
    """The processor's name as it gives it (about a second, once a process: asking is slow)."""
    import cpuinfo

    return cpuinfo.get_cpu_info().get("brand_raw") or platform.processor() or platform.machine()


@cache
def gpu_name() -> str | None:
    """The first GPU's name, or None where torch sees none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def slug(cpu: str, cores: int, gpu: str | None) -> str:
    """A folder name for a machine: `amd-epyc-2-cores`, or after its GPU where there is one."""
    text = f"{gpu or cpu} {cores} cores"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")


# --- its limits -------------------------------------------------------------------------------------------------------


def limits(dtype: str, n_threads: int, device: str = "cpu") -> Limits:
    """Measured ceilings for a dtype of `DTYPES`, from the cache where it has them.

    A damaged cache file is read as none, and one that cannot be written is done without, each with a warning.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} cannot be measured; there are {', '.join(DTYPES)}")
    machine = slug(cpu_name(), cores(), gpu_name())
    key = f"{machine}/{device}/{dtype}/{n_threads} threads/torch {metadata.version('torch')}"
    return _limits(cache_folder() / "limits.json", key, dtype, n_threads, device)


@cache  # where they cannot be kept in the file, they still are for this process
def _limits(path: Path, key: str, dtype: str, n_threads: int, device: str) -> Limits:
    try:
        known = _read(path).get(key)
        if known is not None:
            return _parse(known)
    except (OSError, ValueError) as error:
        log.warning("the cache file %s cannot be read (%s); measuring again", path, error)
    measured = _measure(dtype, n_threads, device)
    try:
        known = _read(path)  # again: someone else may have written meanwhile
    except (OSError, ValueError):
        known = {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({**known, key: asdict(measured)}, indent=1))
    except OSError as error:
        log.warning("cannot keep the limits in %s (%s); they will be measured again next time", path, error)
    return measured


def _read(path: Path) -> dict[str, Any]:
    """What the cache file holds, nothing if there is none. ValueError if it is not ours, OSError if it has no place."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    if not isinstance(known, dict):
        raise ValueError("it holds no dictionary")
    return known


def _parse(entry: object) -> Limits:
    """The limits of one entry; ValueError if they are none."""
    if not isinstance(entry, dict) or entry.keys() != {"flops", "bandwidth"}:
        raise ValueError(f"{entry!r} are no limits")
    if not all(isinstance(v, int | float) and 0 < v < math.inf for v in entry.values()):
        raise ValueError(f"{entry!r} are no limits")
    return Limits(**entry)


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


def _measure(dtype: str, n_threads: int, device: str) -> Limits:
    import torch

    generator = torch.Generator(device).manual_seed(0)
    n, elements = MATMUL[device], COPY[device]
    a, b = (torch.randn(n, n, generator=generator, device=device).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.randn(elements, generator=generator, device=device)
    target = torch.empty_like(source)
    with threads(n_threads):
        matmul = _best(lambda: torch.mm(a, b, out=out), device)
        copy = _best(lambda: target.copy_(source), device)
    return Limits(flops=2 * n**3 / matmul, bandwidth=2 * 4 * elements / copy)


def _best(run: Callable[[], object], device: str, budget_s: float = 0.6) -> float:
    """The shortest of as many runs as fit the budget (at least five): a limit is what was reached once."""
    import torch

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
