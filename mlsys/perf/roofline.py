"""The roofline: the least time that some work can take on a machine, and which limit sets it.

Work is two numbers: the FLOPs that must be done and the bytes that must come from
memory. A machine can do both at once, each at its own rate, so

    time ≥ max(FLOPs / peak, bytes / bandwidth)

Dividing FLOPs by that time gives the picture. With the arithmetic intensity
I = FLOPs / bytes,

    attainable FLOP/s = min(peak, I · bandwidth)

is a slanted line that ends in a flat one. They meet at the ridge point
I = peak / bandwidth: work to its left waits for memory, work to its right for the
arithmetic. A third limit joins in the same way where devices talk to each other:

    time ≥ max(FLOPs / peak, bytes / bandwidth, bytes sent / link bandwidth)

It is a bound, not a forecast. Nothing can be faster as long as the bytes do come
from memory; work whose data is still in cache can be, and lies above the roof.
Real work is slower, for what the bound leaves out: launching, latency, tiles that
do not fit the matrix, and phases that do not overlap. If they never overlapped, the
times would add up, and so the truth is often between `seconds` and `sum_seconds`.

A matmul of m × k by k × n does 2mnk FLOPs and moves at least mk + kn + mn numbers.
With few rows m the weights k × n are nearly all of that, and I ≈ 2m / bytes per
number: this is why generating text one token at a time runs at the speed of memory,
and why a batch of `critical_rows` tokens costs hardly more than one.

Cost:
    A few divisions.

Memory:
    None.

Papers:
    Williams, Waterman & Patterson 2009, "Roofline: An Insightful Visual Performance Model" (CACM 52:4), Figure 1.
    Jouppi et al. 2017, "In-Datacenter Performance Analysis of a TPU", Figure 5 (operations per byte of weights).
    Pope et al. 2022, arXiv:2211.05102, section 2 (memory, compute and communication time of one decoding step).

See also:
    `mlsys.perf.hardware` (the machines), `mlsys.bench.plots` (measurements under the roof; `mlsys roofline`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mlsys.perf._checks import amount, whole
from mlsys.perf.hardware import Hardware, peak_flops

Side = Literal["compute", "memory", "link", "balanced"]


@dataclass(frozen=True)
class Bound:
    """The least time for some work: each limit alone, in seconds. `flops` and `bytes` are the work itself."""

    compute_seconds: float
    memory_seconds: float
    link_seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0

    @property
    def seconds(self) -> float:
        """The lower bound: all of it at once, so the slowest decides."""
        return max(self.compute_seconds, self.memory_seconds, self.link_seconds)

    @property
    def sum_seconds(self) -> float:
        """The time if nothing overlapped: one after the other, each at full speed. At most three times the bound."""
        return self.compute_seconds + self.memory_seconds + self.link_seconds

    @property
    def side(self) -> Side:
        """Which limit decides; "balanced" if two of them take the same time (to nine digits), as at the ridge point."""
        sides: dict[Side, float] = {
            "compute": self.compute_seconds,
            "memory": self.memory_seconds,
            "link": self.link_seconds,
        }
        slowest = [side for side, seconds in sides.items() if math.isclose(seconds, self.seconds, rel_tol=1e-9)]
        return slowest[0] if len(slowest) == 1 else "balanced"

    @property
    def intensity(self) -> float:
        """FLOPs per byte of memory traffic; infinite without traffic."""
        return intensity(self.flops, self.bytes)

    def share(self, seconds: float) -> float:
        """How much of what is possible a measured time in seconds reaches: 1.0 is the limit, above it is from cache."""
        return self.seconds / amount("seconds", seconds, positive=True)


def bound(flops: float, bytes_: float, hardware: Hardware, dtype: str, *, link_bytes: float = 0.0) -> Bound:
    """The least time of work that needs `flops` FLOPs in `dtype` and moves `bytes_` to or from memory.

    link_bytes: bytes that each device must also send over `hardware.link`.
    ValueError for negative or infinite work, or for link_bytes where the machine has no link;
    LookupError for a dtype that the machine has no peak for.
    """
    amount("flops", flops)
    amount("bytes_", bytes_)
    amount("link_bytes", link_bytes)
    if link_bytes and hardware.link is None:
        raise ValueError(f"link_bytes={link_bytes:g}, but the record of {hardware.name} has no link; leave it out")
    return Bound(
        compute_seconds=flops / peak_flops(hardware, dtype),
        memory_seconds=bytes_ / hardware.bandwidth,
        link_seconds=link_bytes / hardware.link.bandwidth if hardware.link else 0.0,
        flops=flops,
        bytes=bytes_,
    )


def intensity(flops: float, bytes_: float) -> float:
    """Arithmetic intensity in FLOP/B; infinite if no byte moves. ValueError if there is neither."""
    amount("flops", flops)
    amount("bytes_", bytes_)
    if flops == bytes_ == 0:
        raise ValueError("flops=0 and bytes_=0: no work has no intensity")
    return flops / bytes_ if bytes_ else math.inf


def ridge(hardware: Hardware, dtype: str) -> float:
    """The intensity in FLOP/B at which arithmetic and memory take equally long.

    Some papers count a multiply-add as one operation: TPU v1's ridge is 1,353 there and 2,706 here.
    """
    return peak_flops(hardware, dtype) / hardware.bandwidth


def attainable(intensity: float, hardware: Hardware, dtype: str) -> float:
    """The roof: the most FLOP/s that work of this intensity (FLOP/B, may be infinite) can reach."""
    if math.isnan(intensity) or intensity < 0:
        raise ValueError(f"intensity={intensity!r}: FLOPs per byte, zero or more, is needed")
    return min(peak_flops(hardware, dtype), intensity * hardware.bandwidth)


def matmul_work(m: int, n: int, k: int, itemsize: float) -> tuple[int, float]:
    """(FLOPs, bytes) of an m × k matrix times a k × n one, each of the three matrices moved once.

    itemsize is bytes a number: 4 for float32, 2 for bfloat16, 0.5 for int4.
    """
    m, n, k = whole("m", m), whole("n", n), whole("k", k)
    amount("itemsize", itemsize, positive=True)
    return 2 * m * n * k, itemsize * (m * k + k * n + m * n)


def critical_rows(n: int, k: int, itemsize: float, hardware: Hardware, dtype: str) -> float:
    """The rows m from which an m × k by k × n matmul is bound by arithmetic; infinite where it never is.

    Solves 2mnk / peak = itemsize · (mk + kn + mn) / bandwidth for m. For large n and k this is
    ridge · itemsize / 2: on an H100 in bfloat16, 295 tokens.
    """
    n, k = whole("n", n), whole("k", k)
    amount("itemsize", itemsize, positive=True)
    per_row = 2 * n * k / ridge(hardware, dtype) - itemsize * (k + n)  # what a row adds in arithmetic beyond traffic
    return itemsize * k * n / per_row if per_row > 0 else math.inf
