"""Timing that is fair on a noisy machine: in turn, round after round, medians, and silence where it is noise.

Implementations are timed in turn within each round, so that a neighbour's load
or a clock that drops falls on all alike, and a ratio is the median of the
rounds' ratios, not the ratio of two medians taken minutes apart. The order is
shuffled in each round, so that nobody always runs behind the same
cache-clearing neighbour (as everybody would if the order only rotated).

A time with fewer than five runs, or whose interquartile range exceeds a fifth of
its median, is called noisy. A ratio is judged by itself, for what disturbs both
cancels in it, and many rounds tell more than few: it is given if the median of the
rounds' ratios is known to a tenth. That is, if the interval from the l-th smallest
of n ratios to the l-th largest, which holds the true median with the probability

    1 − 2·P[B < l],   B binomial with n tosses of a fair coin

of at least 93% (of five, all must be in it), is at most a tenth of the median to each side.

Where several processes do the work together, they start each sample together
and its time is that of the slowest; what hangs on a clock or a dice is agreed
(`everyone`), so that all of them call the same things.

On a GPU, time is taken by events on the stream, with the L2 cache overwritten
before every run.

Papers:
    Hoefler & Belli 2015, "Scientific Benchmarking of Parallel Computing Systems" (SC '15, rules 5 and 8): medians and
        their intervals, without assuming a distribution.
    Le Boudec 2010, "Performance Evaluation of Computer and Communication Systems" (theorem 2.1): that interval.
    Chen & Revels 2016, arXiv:1608.04295 (robust estimates on noisy machines).
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

MIN_RUNS = 5
MAX_SPREAD = 0.20
MAX_DOUBT = 0.10  # of a ratio, to each side
CONFIDENCE = 0.93
Everyone = Callable[[Any], list[Any]]  # a value of this process → those of all that measure together, the same for all


def alone(value: Any) -> list[Any]:
    """The `Everyone` of a process that measures by itself."""
    return [value]


@dataclass(frozen=True)
class Sample:
    """Seconds per run, one entry a round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle run, s."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The interquartile range, s."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    @property
    def noisy(self) -> bool:
        """Too few runs, or too wide a spread: another run may well take another time."""
        low, high = self.quartiles
        return len(self.seconds) < MIN_RUNS or high - low > MAX_SPREAD * self.median


def ratio(a: Sample, b: Sample) -> float | None:
    """How many times as long `a` takes as `b`: the median over rounds; None if that is not known to a tenth."""
    if len(a.seconds) != len(b.seconds):  # not taken in turn: there are no rounds
        return None if a.noisy or b.noisy else a.median / b.median
    ratios = [x / y for x, y in zip(a.seconds, b.seconds, strict=True)]
    middle = statistics.median(ratios)
    low, high = interval(ratios)
    return middle if low >= (1 - MAX_DOUBT) * middle and high <= (1 + MAX_DOUBT) * middle else None


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Two of the values, between which the true median lies with at least `CONFIDENCE`; fewer than five have none."""
    n = len(values)
    outside, left_out = 0.0, 0  # the probability that the median is beyond the interval; values left out on each side
    while outside + 2 * math.comb(n, left_out) / 2**n <= 1 - CONFIDENCE:
        outside += 2 * math.comb(n, left_out) / 2**n
        left_out += 1
    if left_out == 0:
        return -math.inf, math.inf
    ordered = sorted(values)
    return ordered[left_out - 1], ordered[n - left_out]


def interleave(
    runs: Mapping[str, Callable[[], Any]],
    *,
    budget_s: float = 3.0,
    max_rounds: int = 50,
    min_sample_s: float = 0.005,
    max_repeats: int = 1000,
    device: str = "cpu",
    before: Callable[[str], None] = lambda name: None,
    keep: MutableMapping[str, Any] | None = None,
    everyone: Everyone = alone,
) -> dict[str, Sample]:
    """Time the implementations in turn until `budget_s` is spent; at least `MIN_RUNS` rounds.

    Each must have run once before (compiled, caches filled). A run shorter than
    `min_sample_s` is repeated within its sample, up to `max_repeats` times, which then
    holds the mean. With `max_repeats=1`, a round is the same call for all: the second,
    the third, and so on.
    Where the spread is still wide at the end of the budget, up to as much again
    is spent on further rounds.

    before: told whose turn it is, outside the time that is taken.
    keep:   for each name in it, the result of one timed run is put there, of the same round for all; which one, is
            drawn at random.
    everyone: what is agreed with the processes that measure the same with us; returns only when all have called it.
    """
    if max_rounds < MIN_RUNS:
        raise ValueError(f"max_rounds={max_rounds}: at least {MIN_RUNS} are needed for a median worth printing")
    timer = _GpuTimer() if device == "cuda" else _cpu_timer
    dice = random.SystemRandom()  # which nobody can seed
    kept = {} if keep is None else keep
    repeats = {}
    for name, run in runs.items():
        before(name)
        everyone(None)
        once = max(everyone(timer(run, 1, False)[0]))
        repeats[name] = 1 if device == "cuda" else max(1, min(max_repeats, round(min_sample_s / max(once, 1e-9))))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    order = random.Random(0)  # the same for all that measure together
    start = time.perf_counter()
    for done in range(max_rounds):
        spent = max(everyone(time.perf_counter() - start))
        noisy = done >= MIN_RUNS and any(Sample(tuple(s)).noisy for s in seconds.values())
        if done >= MIN_RUNS and spent > (2 * budget_s if noisy else budget_s):
            break
        chosen = everyone(dice.randrange(done + 1) == 0)[
            0
        ]  # in the end each round is the one kept with the same chance
        order.shuffle(names)
        for name in names:
            before(name)
            keeping = chosen and name in kept
            everyone(None)  # they start together
            taken, result = timer(runs[name], repeats[name], keeping)
            seconds[name].append(max(everyone(taken)))
            if keeping:
                kept[name] = result
    return {name: Sample(tuple(taken)) for name, taken in seconds.items()}


def _cpu_timer(run: Callable[[], Any], repeats: int, keep: bool) -> tuple[float, Any]:
    """Seconds a run, and the last run's result if it is to be kept; else it is freed while the clock still runs."""
    start = time.perf_counter()
    for _ in range(repeats - keep):
        run()
    result = run() if keep else None
    return (time.perf_counter() - start) / repeats, result


class _GpuTimer:
    """Event timing with a cold L2: a buffer of twice its size is overwritten before each run."""

    def __init__(self) -> None:
        import torch

        cache_bytes = torch.cuda.get_device_properties().L2_cache_size
        self.scratch = torch.empty(2 * cache_bytes, dtype=torch.uint8, device="cuda")

    def __call__(self, run: Callable[[], Any], repeats: int, keep: bool) -> tuple[float, Any]:
        """As `_cpu_timer`."""
        import torch

        total_ms, result = 0.0, None
        for _ in range(repeats):
            self.scratch.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            result = run()
            end.record()
            torch.cuda.synchronize()
            total_ms += start.elapsed_time(end)
            result = result if keep else None
        return total_ms / 1e3 / repeats, result
