"""A benchmark checks, then times, and says of every row how it stands; missing and wrong are rows too."""

import dataclasses
import functools
import itertools

import pytest
import torch

from mlsys.bench import Impl, Work, machine, run, timing, trial
from mlsys.bench.core import describe
from mlsys.bench.machine import Limits


@pytest.fixture(autouse=True)
def known_limits(monkeypatch):
    monkeypatch.setattr(machine, "limits", lambda *_: Limits(flops=1e9, bandwidth=1e9))


def by_name(records):
    return {r.impl: r for r in records}


def test_rows_carry_ratios_share_and_provenance(toy):
    rows = by_name(run(toy(), [{"n": 1000}], budget_s=0.01))
    assert set(rows) == {"sum", "loop", "peer", "absent"}
    loop = rows["loop"]
    assert loop.status in ("ok", "noisy")
    assert loop.peer == "peer"
    assert loop.runs >= 5
    assert loop.bound == "memory"
    assert loop.share == pytest.approx(8000 / 1e9 / loop.seconds)
    assert loop.machine["slug"]
    assert loop.machine["versions"]["torch"]
    assert rows["sum"].ratio_to_reference == 1.0  # to itself; what is not known to a tenth is None
    assert loop.ratio_to_reference is None or loop.ratio_to_reference > 0
    assert rows["absent"].status == "missing"
    assert "pip install" in rows["absent"].note


def test_the_wrong_are_reported_and_not_timed(toy):
    bench = toy().with_impl("yours", lambda xs: sum(xs) + 1)
    told = []
    rows = by_name(run(bench, [{"n": 10}], budget_s=0.01, announce=told.append))
    assert rows["yours"].status == "wrong"
    assert rows["yours"].seconds is None
    assert any("yours is wrong" in line for line in told)
    assert rows["loop"].seconds is not None


def test_a_user_function_that_raises_is_a_row_and_ours_is_a_crash(toy):
    def broken(xs):
        raise ZeroDivisionError("by me")

    rows = by_name(run(toy().with_impl("yours", broken), [{"n": 10}], smoke=True))
    assert rows["yours"].status == "failed"
    assert "ZeroDivisionError: by me, at test_core.py:" in rows["yours"].note
    ours = toy(impls={"sum": Impl(lambda: sum, "reference"), "bad": Impl(lambda: broken, "ours")})
    with pytest.raises(ZeroDivisionError):
        run(ours, [{"n": 10}], smoke=True)


# --- right on the first call only ---


@pytest.fixture
def tensors(toy):
    """A benchmark on two tensors, beside a function of them; its row, and those of the others."""

    def inputs(case, device):
        generator = torch.Generator().manual_seed(case["n"])
        return [torch.randn(case["n"], generator=generator) for _ in range(2)]

    bench = toy(
        inputs=inputs,
        work=lambda case, inputs: Work(flops=1, bytes=8),
        impls={"plain": Impl(lambda: torch.dot, "reference"), "peer": Impl(lambda: torch.dot, "peer")},
        prepare=lambda function, case, inputs: lambda: [function(*inputs)],
        verify=lambda case, inputs, got, want: (abs(float(got[0] - want[0])), 1e-6),
        memory=True,
    )

    def rows(function, **changes):
        (*others, mine) = run(
            dataclasses.replace(bench, **changes).with_impl("yours", function), [{"n": 50}], budget_s=0.01
        )
        assert all(r.seconds > 0 and r.error == 0 for r in others)  # whatever the function did to their inputs
        return mine

    return rows


def test_a_right_function_is_timed(tensors):
    mine = tensors(lambda a, b: (a * b).sum())
    assert mine.status in ("ok", "noisy")
    assert mine.seconds > 0
    assert mine.peak_bytes > 0


def test_right_the_first_time_only(tensors):
    calls = []

    def lazy(a, b):
        calls.append(1)
        return torch.dot(a, b) if len(calls) == 1 else torch.zeros(())

    mine = tensors(lazy)
    assert (mine.status, mine.seconds, mine.share) == ("wrong", None, None)
    assert "while it was timed: error" in mine.note


def test_a_result_remembered_by_address(tensors):
    known = {}

    def cached(a, b):
        return known.setdefault((a.data_ptr(), b.data_ptr()), torch.dot(a, b))

    mine = tensors(cached)
    assert mine.status == "wrong"
    assert "does it remember its results?" in mine.note


def test_a_result_remembered_where_calls_go_on_from_each_other(tensors):
    def steps(function, case, inputs):
        done = [0.0]

        def step():
            done[0] += 1.0
            return [function(*inputs) + done[0]]

        return step

    assert tensors(torch.dot, prepare=steps, stateful=True).seconds > 0
    remembered = functools.cache(lambda *addresses: torch.ones(()))
    mine = tensors(lambda a, b: torch.dot(a, b) * remembered(a.data_ptr()), prepare=steps, stateful=True)
    assert mine.seconds > 0
    first = []
    mine = tensors(
        lambda a, b: first[0] if first else first.append(torch.dot(a, b)) or first[0], prepare=steps, stateful=True
    )
    assert mine.status == "wrong"


def count(given):
    """Steps of which each gives another result."""
    yield from map(float, itertools.count(1))


@pytest.fixture
def steps(toy):
    """A benchmark whose calls go on from each other."""
    return toy(
        impls={"steps": Impl(lambda: count, "reference"), "peer": Impl(lambda: count, "peer")},
        prepare=lambda function, case, given: functools.partial(next, function(given)),
        stateful=True,
    )


def test_right_steps_until_they_are_timed(steps):
    def lazy(given):
        yield 1.0
        yield from itertools.repeat(5.5)

    rows = by_name(run(steps.with_impl("yours", lazy), [{"n": 10}], budget_s=0.0))
    assert (rows["yours"].status, rows["yours"].seconds) == ("wrong", None)
    assert rows["yours"].note.startswith("while it was timed: error")
    assert all(rows[name].seconds > 0 for name in ("steps", "peer"))


def test_right_steps_are_compared_with_the_same_ones_of_the_reference(steps, monkeypatch):
    assert by_name(run(steps.with_impl("yours", count), [{"n": 10}], budget_s=0.0))["yours"].seconds > 0

    now = [0.0]

    def clock():
        now[0] += 1e-6
        return now[0]

    monkeypatch.setattr(timing.time, "perf_counter", clock)

    def slow(given):  # a sample of the other could hold a thousand calls
        for step in count(given):
            now[0] += 1.0
            yield step

    slowly = dataclasses.replace(steps, impls={"steps": Impl(lambda: slow, "reference")})
    rows = by_name(run(slowly.with_impl("yours", count), [{"n": 10}], budget_s=0.0))
    assert rows["yours"].status == "ok"

    def late(given):  # fails when the reference is one step ahead of whoever comes next
        yield 1.0
        raise ZeroDivisionError

    rows = by_name(run(steps.with_impl("late", late).with_impl("yours", count), [{"n": 10}], budget_s=0.0))
    assert rows["late"].status == "failed"
    assert rows["yours"].seconds > 0


@pytest.mark.parametrize("when", [1, 4])
def test_inputs_modified_in_place(tensors, when):
    calls = []

    def zeroes(a, b):
        calls.append(1)
        out = torch.dot(a, b)
        if len(calls) == when:
            b.zero_()
        return out

    mine = tensors(zeroes)
    assert mine.status == "wrong"
    assert mine.note == "modified its inputs in place"


@pytest.mark.parametrize("error", [RuntimeError("second\ntime"), SystemExit(0)])
def test_raising_while_it_is_timed(tensors, error):
    calls = []

    def late(a, b):
        calls.append(1)
        if len(calls) > 3:
            raise error
        return torch.dot(a, b)

    mine = tensors(late)
    assert (mine.status, mine.seconds) == ("failed", None)
    assert mine.note.startswith(f"raised {type(error).__name__}: ")
    assert "in late: `raise error`" in mine.note
    assert "\n" not in mine.note


def test_raising_while_its_memory_or_figures_are_taken(tensors, monkeypatch):
    def broken(call, device):
        if call()[0].dtype == torch.float64:
            raise SystemExit(3)
        return 1

    monkeypatch.setattr(trial, "peak_bytes", broken)
    mine = tensors(lambda a, b: torch.dot(a, b).double())
    assert mine.note.startswith("raised SystemExit: 3")
    monkeypatch.undo()

    def figures(case, inputs, got):
        return {"half": 1 / (got[0].dtype != torch.float64)}

    monkeypatch.setattr(machine, "limits", lambda *_: Limits(flops=1e9, bandwidth=1e9))
    mine = tensors(lambda a, b: torch.dot(a, b).double(), figures=figures)
    assert mine.note.startswith("raised ZeroDivisionError")


def test_a_result_that_is_not_there_yet(tensors):
    class Promise:
        def __init__(self, *inputs):
            self.inputs = inputs

        def __sub__(self, other):
            return torch.dot(*self.inputs) - other

    mine = tensors(Promise)
    assert mine.status == "wrong"
    assert mine.note.startswith("returned a Promise, expected plain tensors")


def test_more_threads_than_the_others_have(tensors):
    def hurried(a, b):
        torch.set_num_threads(2)
        return torch.dot(a, b)

    mine = tensors(hurried)
    assert mine.note == "changed torch's number of threads, for the others too"


def test_an_interrupt_is_the_users(tensors):
    def interrupted(a, b):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tensors(interrupted)


def test_trouble_of_ours_while_timed_is_a_crash(toy):
    calls = []

    def late(xs):
        calls.append(1)
        return sum(xs) / (len(calls) < 3)

    ours = toy(impls={"sum": Impl(lambda: sum, "reference"), "bad": Impl(lambda: late, "ours")})
    with pytest.raises(ZeroDivisionError):
        run(ours.with_impl("yours", sum), [{"n": 10}], budget_s=0.01)


# --- in place ---


class Doubling:
    """Doubles its own copy in place: each call's result differs, unless it is put back."""

    def __init__(self, function, numbers):
        self.function, self.numbers, self.own = function, numbers, numbers.clone()
        self.resets = 0

    def __call__(self):
        self.function(self.own)
        return self.own

    def reset(self):
        self.resets += 1
        self.own.copy_(self.numbers)


@pytest.fixture
def doubling(toy):
    """A benchmark of that, and the calls that were made for it."""
    made = []

    def prepare(function, case, numbers):
        made.append(Doubling(function, numbers))
        return made[-1]

    def double(numbers):
        numbers *= 2

    bench = toy(
        inputs=lambda case, device: torch.arange(1.0, 9.0),
        work=lambda case, numbers: Work(flops=1, bytes=8),
        impls={"plain": Impl(lambda: double, "reference"), "peer": Impl(lambda: double, "peer")},
        prepare=prepare,
        verify=lambda case, numbers, got, want: (float((got - want).abs().max()), 0.0),
    )
    return bench, made


def test_what_works_in_place_is_put_back_before_each_sample(doubling):
    bench, made = doubling
    rows = run(bench.with_impl("yours", lambda numbers: numbers.add_(numbers)), [{"n": 8}], budget_s=0.0)
    assert [r.status in ("ok", "noisy") for r in rows] == [True] * 3
    assert [call.resets > 5 for call in made] == [True] * 3


def test_right_in_place_the_first_time_only(doubling):
    calls = []

    def lazy(numbers):
        calls.append(1)
        numbers *= 2 if len(calls) == 1 else 1

    rows = by_name(run(doubling[0].with_impl("yours", lazy), [{"n": 8}], budget_s=0.0))
    assert (rows["yours"].status, rows["yours"].seconds) == ("wrong", None)
    assert rows["yours"].note.startswith("after it was timed: error")


# --- the rest ---


def test_a_users_function_is_only_given_the_cases_that_it_is_for(toy):
    bench = toy(yours=lambda case: case["n"] > 10).with_impl("yours", sum)
    rows = run(bench, [{"n": 10}, {"n": 20}], smoke=True)
    assert [r.case["n"] for r in rows if r.impl == "yours"] == [20]


def test_series_stand_in_the_record_unless_it_is_refused(toy):
    bench = toy(series=lambda case, xs, got: {"sums": [got, got]}).with_impl("yours", lambda xs: sum(xs) + 1)
    rows = by_name(run(bench, [{"n": 3}], smoke=True))
    assert rows["loop"].series == {"sums": [3, 3]}
    assert rows["yours"].series == {}


def test_no_work_has_no_share(toy):
    rows = by_name(run(toy(work=lambda case, xs: Work(flops=0, bytes=0)), [{"n": 3}], budget_s=0.0))
    assert rows["loop"].seconds > 0
    assert rows["loop"].share is None


def test_smoke_runs_once_and_times_nothing(toy):
    calls = []
    bench = toy(prepare=lambda function, case, xs: lambda: (calls.append(1), function(xs))[1])
    rows = run(bench, [{"n": 10}], smoke=True)
    assert len(calls) == 3  # three implementations are here, once each
    assert all(r.seconds is None for r in rows)


def test_threads_are_pinned_inside_and_restored_after(toy):
    before = torch.get_num_threads()
    seen = []
    bench = toy(prepare=lambda function, case, xs: lambda: (seen.append(torch.get_num_threads()), function(xs))[1])
    rows = run(bench, [{"n": 10}], smoke=True, n_threads=1)
    assert set(seen) == {1}
    assert rows[0].threads == 1
    assert torch.get_num_threads() == before


def test_bad_threads_peer_and_dtype_are_named(toy):
    with pytest.raises(ValueError, match="threads=0"):
        run(toy(), [{"n": 10}], n_threads=0)
    with pytest.raises(ValueError, match=r"--peer bm26: toys\.sums has the peers peer, absent"):
        toy().with_peers(["bm26"])
    cases = {"quick": [{"n": 1, "dtype": "float32"}], "default": [], "full": []}
    with pytest.raises(ValueError, match=r"--dtype float8: toys\.sums has cases in float32"):
        toy(cases=cases).select("quick", ["float8"])


def test_with_peers_keeps_the_others(toy):
    assert set(toy().with_peers(["none"]).impls) == {"sum", "loop"}
    assert set(toy().with_peers(["peer"]).impls) == {"sum", "loop", "peer"}


def test_describe_leaves_out_what_is_off():
    assert describe({"n": 8, "causal": True, "backward": False, "window": None}) == "n=8 causal"


def test_roofline_bound_is_the_slower_of_the_two():
    assert Limits(flops=10.0, bandwidth=5.0).seconds(100, 5) == 10.0
    assert Limits(flops=10.0, bandwidth=5.0).seconds(10, 500) == 100.0


def test_records_are_plain_values(toy):
    record = run(toy(), [{"n": 10}], smoke=True)[0]
    assert all(not callable(v) for v in dataclasses.asdict(record).values())


def test_the_counted_are_checked_and_have_figures_but_no_time(toy):
    counted = toy(counted=lambda impl, device: impl == "loop", figures=lambda case, xs, got: {"sum": got})
    rows = by_name(run(counted, [{"n": 10}], budget_s=0.01))
    assert rows["loop"].status == "counted"
    assert rows["loop"].seconds is None
    assert rows["loop"].figures == {"sum": 45}
    assert rows["sum"].seconds is not None
    wrong = {"sum": Impl(lambda: sum, "reference"), "mine": Impl(lambda: lambda xs: sum(xs) + 1, "yours")}
    assert by_name(run(toy(impls=wrong, counted=lambda *_: True), [{"n": 10}]))["mine"].status == "wrong"


def test_a_case_that_does_not_fit_a_device_is_left_out(toy):
    bench = toy(fits=lambda case, device: device == "cuda" or case["n"] < 1000)
    assert [case["n"] for case in bench.select("quick")] == [10, 100]
    assert [case["n"] for case in bench.select("quick", device="cuda")] == [10, 100, 1000]
