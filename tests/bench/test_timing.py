"""Timing arithmetic: medians, spread, paired ratios, and silence where it is noise. No real clock is judged."""

import itertools
import math

import pytest

from mlsys.bench import timing
from mlsys.bench.timing import CONFIDENCE, MIN_RUNS, Sample, interleave, interval, ratio


def test_median_and_quartiles():
    sample = Sample((5.0, 1.0, 3.0, 2.0, 4.0))
    assert sample.median == 3.0
    assert sample.quartiles == (2.0, 4.0)


def test_one_run_is_noisy_but_printable():
    sample = Sample((2.0,))
    assert sample.noisy
    assert sample.quartiles == (2.0, 2.0)


@pytest.mark.parametrize(("seconds", "noisy"), [((1.0,) * 4, True), ((1.0,) * 5, False), ((1, 1, 2, 3, 3), True)])
def test_too_few_runs_or_too_wide_a_spread_is_noisy(seconds, noisy):
    assert Sample(tuple(map(float, seconds))).noisy is noisy


def test_ratio_is_the_median_of_the_rounds_ratios():
    # The machine slows down threefold half-way: medians taken apart would differ, paired rounds do not.
    slow = Sample((2.0, 2.0, 2.0, 2.1, 2.1, 2.1))
    fast = Sample((1.0, 1.0, 1.0, 1.05, 1.05, 1.05))
    assert ratio(slow, fast) == pytest.approx(2.0)


def test_noise_gives_no_ratio():
    steady, wild = Sample((1.0,) * 6), Sample((1.0, 2.0, 3.0, 1.0, 2.0, 3.0))
    assert ratio(steady, wild) is None
    assert ratio(wild, steady) is None


def test_a_ratio_of_noisy_times_stands_if_their_rounds_agree():
    """Whatever disturbs both cancels: another program, a clock that drops."""
    disturbed = [1.0, 3.0, 1.5, 5.0, 1.0, 2.0, 1.0, 4.0]
    a, b = Sample(tuple(2.05 * t for t in disturbed)), Sample(tuple(disturbed))
    assert a.noisy
    assert b.noisy
    assert ratio(a, b) == pytest.approx(2.05)


def test_many_rounds_tell_a_ratio_that_few_do_not():
    spread = (0.8, 1.0, 1.25)
    few, many = Sample(spread * 2), Sample(spread * 30)
    assert ratio(few, Sample((1.0,) * 6)) is None
    assert ratio(many, Sample((1.0,) * 90)) == 1.0


def test_times_that_were_not_taken_in_turn_must_not_be_noisy():
    assert ratio(Sample((2.0,) * 5), Sample((1.0,) * 6)) == 2.0
    assert ratio(Sample((2.0,) * 5), Sample((1.0, 3.0) * 3)) is None


@pytest.mark.parametrize("n", [1, 4, 5, 6, 10, 25, 60])
def test_the_interval_holds_the_median_as_often_as_it_says(n):
    """Of all ways in which n values fall below or above the true median, each as likely: counted one by one."""
    low, high = interval(list(range(n)))
    if n < 5:
        assert (low, high) == (-math.inf, math.inf)
        return
    held = sum(math.comb(n, below) for below in range(n + 1) if low < below <= high)  # the median is between two values
    narrower = sum(math.comb(n, below) for below in range(n + 1) if low + 1 < below <= high - 1)
    assert narrower / 2**n < CONFIDENCE <= held / 2**n


def test_interleave_takes_turns_and_shuffles_the_order(monkeypatch):
    calls = []
    clock = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    samples = interleave({name: lambda name=name: calls.append(name) for name in "abc"}, budget_s=1e9)
    assert all(len(s.seconds) >= MIN_RUNS for s in samples.values())
    first, *rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert first == "abc"  # calibration
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert set(rounds) == {"abc", "acb", "bac", "bca", "cab", "cba"}  # so each runs behind each other


def test_interleave_repeats_what_is_too_short_to_time(monkeypatch):
    calls = []
    now = [0.0]

    def run():
        calls.append(1)
        now[0] += 0.001

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    samples = interleave({"short": run}, budget_s=0.0, min_sample_s=0.01)
    assert samples["short"].median == pytest.approx(0.001)
    assert len(calls) >= 10 * MIN_RUNS


def test_a_round_can_be_one_call_of_each(monkeypatch):
    calls = []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 0.0)
    samples = interleave({name: lambda name=name: calls.append(name) for name in "ab"}, max_rounds=6, max_repeats=1)
    assert [len(s.seconds) for s in samples.values()] == [6, 6]
    assert calls.count("a") == calls.count("b") == 7  # one more that only finds out how long it takes


def test_interleave_refuses_fewer_rounds_than_a_median_needs():
    with pytest.raises(ValueError, match="max_rounds=2"):
        interleave({"a": lambda: None}, max_rounds=2)


def test_interleave_says_whose_turn_it_is_before_it_looks_at_the_clock(monkeypatch):
    told = []
    clock = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: told.append("clock") or float(next(clock)))
    runs = {name: lambda name=name: told.append(f"{name} runs") for name in "ab"}
    interleave(runs, budget_s=0.0, before=told.append)
    assert told[:4] == ["a", "clock", "a runs", "clock"]
    for name in "ab":
        turns = [told[i : i + 4] for i, word in enumerate(told) if word == name]
        assert len(turns) > MIN_RUNS
        assert all(turn == [name, "clock", f"{name} runs", "clock"] for turn in turns)


def test_interleave_keeps_one_result_of_any_round_and_only_of_those_asked_for():
    seen = set()
    for _ in range(60):
        calls = itertools.count()
        kept = {"a": None}
        runs = {"a": lambda calls=calls: next(calls), "b": lambda: "not kept"}
        interleave(runs, budget_s=0.0, max_rounds=5, min_sample_s=0.0, keep=kept)
        assert set(kept) == {"a"}
        seen.add(kept["a"])
    assert seen <= {1, 2, 3, 4, 5}  # the first call only finds out how long it takes
    assert len(seen) > 1


def test_a_kept_result_is_the_last_of_its_sample(monkeypatch):
    calls = itertools.count(1)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 0.0)
    assert timing._cpu_timer(lambda: next(calls), 4, True) == (0.0, 4)
    assert timing._cpu_timer(lambda: next(calls), 4, False) == (0.0, None)
    assert next(calls) == 9
