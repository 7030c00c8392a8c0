"""Bars and candidates: what is within the slack of the k-th smallest estimate is kept, whatever comes in what order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from mlsys.retrieval._collect_numba import MORE, Collector, _kth, collect

NONE = np.empty(0, np.bool_)


@njit
def kth(values, k, steps):
    return _kth(values, 0, values.shape[1], k, steps)


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
    collector = Collector(3, k, np.array([0.0, *slack]))
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
    collector = Collector(2, 1, np.zeros(2))
    room = collector.estimates.shape[1]
    collect(np.full((1, 500), -np.inf, np.float32), np.zeros(500, np.float32), 0, np.array([0]), NONE, *collector.state)
    assert collector.bars[0] == -np.inf
    assert room // 2 < collector.counts[0, 0] <= room
    assert collector.counts[1, 0] == 0
    assert collector.bars[1] == np.inf
