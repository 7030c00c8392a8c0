"""`mlsys.retrieval.exact` and `exact_numba`: exact to the last bit, whatever the data, the tiles and the batch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys.contracts._retrieval_exact import distances
from mlsys.contracts.core import check
from mlsys.contracts.retrieval import CONTRACTS
from mlsys.retrieval import _rank, _registers_numba, exact, exact_numba

CONTRACT = CONTRACTS["exact"]


@pytest.fixture(params=[exact.Exact, exact_numba.Exact], ids=["exact", "exact_numba"], name="Exact")
def implementation(request):
    return request.param


def brute(metric, x, queries, k):
    true = distances(metric, queries, x).astype(np.float32)
    order = np.argsort(true, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(true, order, axis=1), order


def whole_numbers(seed, n, d, far=0):
    """Sums of their squares are exact, so distances have one right value."""
    return np.random.default_rng(seed).integers(-9, 10, (n, d)).astype(np.float32) + np.float32(far)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 99),
    n=st.sampled_from([1, 5, 31, 33, 300]),
    d=st.sampled_from([1, 3, 16, 65]),
    n_queries=st.sampled_from([1, 7, 9, 40]),
    k=st.sampled_from([1, 5, 40]),
    metric=st.sampled_from(["l2", "ip"]),
    kind=st.sampled_from([exact.Exact, exact_numba.Exact]),
)
def test_equals_the_definition_bit_for_bit(seed, n, d, n_queries, k, metric, kind):
    x, queries = whole_numbers(seed, n, d), whole_numbers(seed + 1, n_queries, d)
    near, ids = kind(metric).fit(x).search(queries, k)
    want, order = brute(metric, x, queries, k)
    np.testing.assert_array_equal(near[:, : order.shape[1]], want)
    np.testing.assert_array_equal(ids[:, : order.shape[1]], order)


@pytest.mark.parametrize("far", [1e4, 1e6])
def test_far_from_the_origin_nothing_cancels(Exact, far):
    x, queries = whole_numbers(0, 600, 32, far), whole_numbers(1, 30, 32, far)
    near, ids = Exact().fit(x).search(queries, 10)
    want, order = brute("l2", x, queries, 10)
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(near, want)
    with np.errstate(all="ignore"):
        product = (queries**2).sum(1)[:, None] + (x**2).sum(1) - 2 * queries @ x.T
    assert np.abs(np.sort(product, axis=1)[:, :10] - want).max() > 10  # what the product alone says


@pytest.mark.parametrize("size", [1e-25, 1e-12, 1e15, 1e25])
def test_numbers_of_any_size(Exact, size):
    x = (np.random.default_rng(0).standard_normal((500, 8)) * size).astype(np.float32)
    near, ids = Exact().fit(x).search(x[:20], 3)
    with np.errstate(over="ignore"):
        want, order = brute("l2", x, x[:20], 3)
    np.testing.assert_array_equal(near, want)
    np.testing.assert_array_equal(ids, order)


def test_does_not_depend_on_tiles_or_the_batch(Exact, monkeypatch):
    rng = np.random.default_rng(0)
    x = np.round(rng.standard_normal((700, 20)), 1).astype(np.float32)  # with near ties
    queries = np.round(rng.standard_normal((50, 20)), 1).astype(np.float32)
    index = Exact().fit(x)
    want = index.search(queries, 20)
    alone = [index.search(q, 20) for q in queries]
    for i in range(2):
        np.testing.assert_array_equal(np.concatenate([a[i] for a in alone]), want[i])
    for module, name, value in (
        (exact, "TILE", 100), (exact, "QUERIES", 7), (exact_numba, "TILE", 33), (exact_numba, "FEW", 0),
        (exact_numba, "FEW", 1000), (_rank, "HELD", 50), (_rank, "PAIRS", 13),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
        for a, b in zip(index.search(queries, 20), want, strict=True):
            np.testing.assert_array_equal(a, b)


ROWS, COLUMNS = _registers_numba.ROWS, _registers_numba.COLUMNS


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("d", [1, 3, 128])
def test_tiles_of_registers_that_do_not_come_out_even(metric, d):
    for n in (1, ROWS - 1, ROWS, ROWS + 1, 5 * ROWS + 3):
        for m in (exact_numba.FEW + 1, COLUMNS - 1, COLUMNS, COLUMNS + 1, 2 * COLUMNS + 5):
            x, queries = whole_numbers(n, n, d), whole_numbers(m + 1000, m, d)
            k = min(3, n)
            near, ids = exact_numba.Exact(metric).fit(x).search(queries, k)
            want, order = brute(metric, x, queries, k)
            np.testing.assert_array_equal(near, want)
            np.testing.assert_array_equal(ids, order)


@pytest.mark.parametrize("threads", [2, 3, 64])
def test_does_not_depend_on_threads(threads, monkeypatch):
    rng = np.random.default_rng(0)
    x, queries = (np.round(rng.standard_normal((n, 20)), 1).astype(np.float32) for n in (700, 5 * COLUMNS - 3))
    index = exact_numba.Exact().fit(x)
    kept = rng.random(len(x)) < 0.5
    want = index.search(queries, 20), index.search(queries, 20, filter=kept)
    asked = []
    monkeypatch.setattr(exact_numba, "_threads", lambda steps: asked.append(steps) or threads)
    monkeypatch.setattr(exact_numba, "TILE", 50)
    got = index.search(queries, 20), index.search(queries, 20, filter=kept)
    assert asked == [len(queries) * len(x) * 20, len(queries) * int(kept.sum()) * 20]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(a[1], b[1])


def test_thousands_of_equal_vectors(Exact):
    x = np.repeat(whole_numbers(0, 3, 8), 3000, axis=0)
    near, ids = Exact().fit(x).search(np.repeat(whole_numbers(0, 3, 8), 4, axis=0), 5)
    np.testing.assert_array_equal(ids, np.repeat([[0], [3000], [6000]], 4, axis=0) + np.arange(5))
    assert not near.any()


def test_many_neighbours_are_looked_for_with_few_queries_at_once():
    k = 20_000
    assert exact_numba.at_once(10) == exact_numba.QUERIES
    assert exact_numba.at_once(k) * (16 * (4 * k + 64)) < 1 << 27


def test_the_slack_covers_the_error_of_estimates():
    rng = np.random.default_rng(0)
    for metric in ("l2", "ip"):
        for mean, d in ((0, 300), (100, 40), (1e4, 8)):
            x = (rng.standard_normal((400, d)) + mean).astype(np.float32)
            queries = (rng.standard_normal((30, d)) + mean).astype(np.float32)
            estimates = -queries @ x.T + _rank.half_norms(metric, x)
            exactly = -queries.astype(float) @ x.T.astype(float)
            exactly += 0.5 * (x.astype(float) ** 2).sum(1) if metric == "l2" else 0
            error = np.abs(estimates - exactly).max(axis=1)
            slack = _rank.slack(metric, queries, _rank.longest(x))
            assert (2 * error <= slack).all()
            assert (slack <= 1000 * np.maximum(error, 1e-6 * np.abs(exactly).max())).all()


@pytest.mark.parametrize("name", ["exact", "exact_numba"])
@pytest.mark.parametrize("seed", range(3))
def test_contract_accepts_the_reference(name, seed):
    verdict = check(CONTRACTS[name], CONTRACTS[name].reference, seed=seed)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("wrong", sorted(CONTRACT.wrong))
def test_contract_names_the_wrong_variant(wrong):
    failure = check(CONTRACT, CONTRACT.wrong[wrong].impl, seed=1).failure
    assert failure is not None
    assert failure.like == wrong
