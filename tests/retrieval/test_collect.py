"""Bars and candidates: what is within the slack of the k-th smallest estimate is kept, whatever comes in what order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from mlsys.retrieval import _rank
from mlsys.retrieval._collect_numba import COUNTED, METRICS, MORE, Collector, _kth, _rank_few, collect

NONE = np.empty(0, np.bool_)


@njit
def kth(values, k, steps):
    return _kth(values, 0, values.shape[1], k, steps)


def collector_with(slack, k):
    collector = Collector("ip", np.zeros((len(slack), 1), np.float32), k, 0.0)
    collector.slack[:] = slack
    return collector


def kept(collector, q):
    return dict(zip(collector.slots[q, : collector.counts[q, 0]], collector.estimates[q], strict=False))


@settings(max_examples=200)
@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=80),
    data=st.data(),
)
def test_the_kth_smallest_is_never_missed(values, data):
    k = data.draw(st.integers(1, len(values)))
    row = np.array([values], np.float32)
    exact = np.sort(row[0])[k - 1]
    assert kth(row, k, 3) >= exact
    assert kth(row, k, 3) in row
    assert kth(row, k, 300) == exact  # so many steps that nothing is left to halve


@pytest.mark.parametrize("order", ["as they come", "falling", "rising", "equal"])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 200, 1000])
@pytest.mark.parametrize("k", [1, 10])
@pytest.mark.parametrize("some", [False, True], ids=["all", "filtered"])
def test_all_within_the_slack_are_candidates(order, n, k, some):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, n)).astype(np.float32)
    x = {"falling": -np.sort(-x), "rising": np.sort(x), "equal": np.zeros_like(x)}.get(order, x)
    halves = np.zeros(n, np.float32)
    allowed = rng.random(n) < 0.5 if some else NONE
    slack = np.array([0.1, 0.0])
    collector = collector_with([0.0, *slack], k)
    which = np.array([1, 2])
    for start in range(0, n, 100):
        part = slice(start, start + 100)
        collect(
            np.ascontiguousarray(x[:, part]), halves[part], start, which, allowed[part] if some else NONE,
            *collector.state,
        )  # fmt: skip
    assert collector.counts[0, 0] == 0
    for r, q in enumerate(which):
        seen = np.flatnonzero(allowed) if some else np.arange(n)
        if collector.bars[q] == -np.inf:
            assert order == "equal"
            assert len(seen) > 3 * k  # more than the list is to hold
            continue
        bar = np.sort(x[r, seen])[k - 1] + slack[r] if len(seen) >= k else np.inf
        wanted = set(seen[x[r, seen] <= bar])
        found = kept(collector, q)
        assert wanted <= found.keys() <= set(seen)
        assert all(found[slot] == x[r, slot] for slot in found)
        assert len(found) < 3 * k + 2 * MORE or order == "equal"


def test_a_full_list_stays_full():
    """Estimates of −∞ are not above any bar, not even that of a query that has overflown."""
    collector = collector_with([0.0, 0.0], 1)
    room = collector.estimates.shape[1]
    collect(np.full((1, 500), -np.inf, np.float32), np.zeros(500, np.float32), 0, np.array([0]), NONE, *collector.state)
    assert collector.bars[0] == -np.inf
    assert room // 2 < collector.counts[0, 0] <= room
    assert collector.counts[1, 0] == 0
    assert collector.bars[1] == np.inf


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [1, 7, 300])
def test_the_slack_is_that_of_the_readable_version_rounded_up(metric, d):
    queries = np.random.default_rng(d).standard_normal((50, d)).astype(np.float32) * np.float32(3)
    queries[0] = 0
    collector, slack = Collector(metric, queries, 3, 7.5), _rank.slack(metric, queries, 7.5)
    assert collector.estimable
    assert (collector.slack >= slack).all()
    np.testing.assert_allclose(collector.slack, slack, rtol=1e-6)


@pytest.mark.parametrize("longest", [1e19, np.inf])
def test_what_could_overflow_is_not_estimated(longest):
    queries = np.full((2, 4), 1e18, np.float32)
    assert np.isinf(_rank.slack("l2", queries, longest)).all()
    assert not Collector("l2", queries, 3, longest).estimable


def test_too_many_dimensions_say_nothing():
    factor, _ = _rank.rounding(1 << 24)
    assert factor == np.inf
    assert np.isinf(_rank.slack("ip", np.zeros((1, 1 << 24), np.float32), 0.0)).all()


@settings(max_examples=100)
@given(n=st.integers(0, COUNTED + 40), k=st.integers(1, COUNTED + 20), kinds=st.integers(1, 6), seed=st.integers(0, 99))
def test_hits_are_ranked_by_distance_and_id(n, k, kinds, seed):
    rng = np.random.default_rng(seed)
    near = rng.choice(np.array([-1.5, 0, 0.25, 2, 3, np.inf], np.float32)[:kinds], (2, n)).astype(np.float32)
    ids = np.stack([rng.permutation(1000)[:n], np.arange(n)])
    distances, found = np.full((2, k), np.inf, np.float32), np.full((2, k), -1)
    _rank_few(1, near, ids, n, distances, found)
    order = np.lexsort((ids[1], near[1]))[:k]
    np.testing.assert_array_equal(distances[1, : len(order)], near[1, order])
    np.testing.assert_array_equal(found[1, : len(order)], ids[1, order])
    assert (distances[1, len(order) :] == np.inf).all()
    assert (found[1, len(order) :] == -1).all()
    assert (found[0] == -1).all()
