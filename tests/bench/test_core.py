"""A benchmark checks, then times, and says of every row how it stands; missing and wrong are rows too."""

import dataclasses

import pytest

from mlsys.bench import machine, run
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
    assert (loop.ratio_to_reference is None) == (loop.status == "noisy" or rows["sum"].status == "noisy")
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
    assert "ZeroDivisionError: by me" in rows["yours"].note
    from mlsys.bench import Impl

    ours = toy(impls={"sum": Impl(lambda: sum, "reference"), "bad": Impl(lambda: broken, "ours")})
    with pytest.raises(ZeroDivisionError):
        run(ours, [{"n": 10}], smoke=True)


def test_smoke_runs_once_and_times_nothing(toy):
    calls = []
    bench = toy(prepare=lambda function, case, xs: lambda: (calls.append(1), function(xs))[1])
    rows = run(bench, [{"n": 10}], smoke=True)
    assert len(calls) == 3  # three implementations are here, once each
    assert all(r.seconds is None for r in rows)


def test_threads_are_pinned_inside_and_restored_after(toy):
    import torch

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


def test_limits_are_measured_once_then_cached(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("MLSYS_CACHE", str(tmp_path))
    measured = []
    monkeypatch.setattr(machine, "_measure", lambda *key: measured.append(key) or Limits(2.0, 3.0))
    assert machine.limits("float32", 1) == machine.limits("float32", 1) == Limits(2.0, 3.0)
    machine.limits("bfloat16", 1)
    assert len(measured) == 2
    (tmp_path / "limits.json").write_text("{")
    with pytest.raises(ValueError, match="delete it"):
        machine.limits("float32", 1)


def test_roofline_bound_is_the_slower_of_the_two():
    assert Limits(flops=10.0, bandwidth=5.0).seconds(100, 5) == 10.0
    assert Limits(flops=10.0, bandwidth=5.0).seconds(10, 500) == 100.0


def test_records_are_plain_values(toy):
    record = run(toy(), [{"n": 10}], smoke=True)[0]
    assert all(not callable(v) for v in dataclasses.asdict(record).values())
