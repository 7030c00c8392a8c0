"""`mlsys.retrieval.ivf` and `ivf_numba`: exact with all lists, good with few; k-means and the lists."""

from itertools import pairwise

import numpy as np
import pytest

from mlsys.contracts.core import check
from mlsys.contracts.retrieval import CONTRACTS
from mlsys.retrieval import _kmeans, _lists, exact, ivf, ivf_numba

CONTRACT = CONTRACTS["ivf"]


@pytest.fixture(params=[ivf.IVF, ivf_numba.IVF], ids=["ivf", "ivf_numba"], name="IVF")
def implementation(request):
    return request.param


def groups(n=3000, d=16, seed=0):
    rng = np.random.default_rng(seed)
    centres = 3 * rng.standard_normal((60, d))
    return (centres[rng.integers(0, 60, n)] + rng.standard_normal((n, d))).astype(np.float32)


def equal(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_all_lists_are_brute_force_and_few_find_most(IVF, metric):
    x, queries = groups(), groups(40, seed=1) + 0.1
    want = exact.Exact(metric).fit(x).search(queries, 10)
    index = IVF(metric, n_lists=50, n_probe=10).fit(x)
    equal(index.search(queries, 10, n_probe=50), want)
    found = [
        (index.search(queries, 10, n_probe=p)[1][:, :, None] == want[1][:, None]).any(2).mean() for p in (1, 3, 10)
    ]
    assert found == sorted(found)
    assert found[2] > 0.9
    assert found[0] < found[2]


def test_compiled_equals_readable():
    x, queries = groups(), groups(70, seed=1)
    plain, fast = ivf.IVF(n_lists=40, n_probe=6).fit(x), ivf_numba.IVF(n_lists=40, n_probe=6).fit(x)
    mask = np.random.default_rng(0).random(len(x)) < 0.6
    for k in (1, 10, 500):
        equal(plain.search(queries, k), fast.search(queries, k))
        equal(plain.search(queries, k, filter=mask), fast.search(queries, k, filter=mask))
    equal(
        plain.search(queries, 5), [np.concatenate(p) for p in zip(*(fast.search(q, 5) for q in queries), strict=True)]
    )


def test_where_an_estimate_may_overflow_the_readable_version_answers():
    x, queries = groups(), groups(9, seed=1)
    plain, fast = ivf.IVF(n_lists=40, n_probe=6).fit(x), ivf_numba.IVF(n_lists=40, n_probe=6).fit(x)
    plain._longest = fast._longest = 1e30  # as a file could say: the slack is infinite
    equal(plain.search(queries, 3), fast.search(queries, 3))


def test_a_filter_that_leaves_few_is_exact(IVF):
    x, queries = groups(), groups(30, seed=1)
    mask = np.arange(len(x)) % 50 == 0
    index = IVF(n_lists=50, n_probe=2).fit(x)
    equal(index.search(queries, 10, filter=mask), exact.Exact().fit(x).search(queries, 10, filter=mask))


def test_thousands_of_equal_vectors(IVF):
    x = np.concatenate([groups(200), np.ones((3000, 16), np.float32)])
    near, ids = IVF(n_lists=4, n_probe=4).fit(x).search(np.ones((5, 16)), 7)
    np.testing.assert_array_equal(ids, np.tile(np.arange(200, 207), (5, 1)))
    assert not near.any()


def test_counts_what_is_compared(IVF):
    x = groups()
    index = IVF(n_lists=20, n_probe=3).fit(x)
    assert index.distances_per_query(x[:9], n_probe=20) == 20 + len(x)
    np.testing.assert_array_equal(index.probes(x[:9], 1)[:, 0], _kmeans.nearest(x[:9], index.centroids_))


def test_bad_settings_are_refused(IVF):
    for settings, message in (({"n_lists": 0}, "n_lists"), ({"n_lists": 4, "n_probe": 5}, "n_probe.*at most 4")):
        with pytest.raises(ValueError, match=message):
            IVF(**settings)
    with pytest.raises(ValueError, match="n_lists = 50 needs as many"):
        IVF(n_lists=50).fit(groups(49))
    index = IVF(n_lists=4, n_probe=1).fit(groups(50))
    with pytest.raises(ValueError, match="n_probe must be at least 1 and at most 4"):
        index.search(groups(1), n_probe=5)
    with pytest.raises(ValueError, match="numbers up to"):
        index.add(np.full((1, 16), 1e20))


# K-means


def spread(x, centroids):
    return float(((x - centroids[_kmeans.nearest(x, centroids)]) ** 2).sum())


def test_lloyd_never_gets_worse_and_repeats_itself():
    x = groups(1000)
    ends = [spread(x, _kmeans.kmeans(x, 30, seed=3, iterations=i)) for i in range(8)]
    assert all(b <= a * (1 + 1e-5) for a, b in pairwise(ends))
    np.testing.assert_array_equal(_kmeans.kmeans(x, 30, seed=3), _kmeans.kmeans(x, 30, seed=3))
    assert not np.array_equal(_kmeans.kmeans(x, 30, seed=3), _kmeans.kmeans(x, 30, seed=4))


def test_nearest_is_nearest_also_far_from_the_origin():
    for far in (0, 1e4):
        x, c = groups(300) + np.float32(far), groups(20, seed=1) + np.float32(far)
        true = ((x[:, None].astype(float) - c) ** 2).sum(2)
        chosen = true[np.arange(300), _kmeans.nearest(x, c)]
        np.testing.assert_allclose(chosen, true.min(axis=1), rtol=1e-4)


def test_an_empty_cluster_splits_the_largest():
    x = groups(400)
    start = np.concatenate([x[:2], np.full((2, 16), 1e6, np.float32)])  # nothing is nearest to the last two
    moved = _kmeans.moved(x, _kmeans.nearest(x, start), start)
    for _ in range(5):
        moved = _kmeans.moved(x, _kmeans.nearest(x, moved), moved)
    assert (np.bincount(_kmeans.nearest(x, moved), minlength=4) > 0).all()


def test_as_many_centroids_as_vectors_and_equal_vectors():
    x = groups(20)
    assert spread(x, _kmeans.kmeans(x, 20, seed=0)) < 1e-3
    assert np.isfinite(_kmeans.kmeans(np.ones((30, 4), np.float32), 5, seed=0)).all()


# The lists


def test_lists_hold_what_a_dictionary_holds():
    rng = np.random.default_rng(0)
    list_of, value = rng.integers(0, 7, 30), rng.random(30)
    lists = _lists.Lists(7, list_of, {"value": value})
    for step in range(60):
        if step % 4 == 3:
            rows = np.sort(rng.choice(len(list_of), 5, replace=False))
            lists.remove(rows)
            list_of, value = np.delete(list_of, rows), np.delete(value, rows)
        else:
            more = rng.integers(0, 7 if step % 3 else 1, 11)  # now and then all into one list
            lists.append(more, len(list_of), {"value": np.arange(11.0) + step})
            list_of, value = np.concatenate([list_of, more]), np.concatenate([value, np.arange(11.0) + step])
        again, arrays = lists.by_row()
        np.testing.assert_array_equal(again, list_of)
        np.testing.assert_array_equal(arrays["value"], value)
        assert len(np.unique(lists.slots())) == len(list_of)


def test_adding_one_by_one_copies_little(monkeypatch):
    """Each list's entries, and the whole arena, are copied a number of times that grows like log n."""
    lists = _lists.Lists(8, np.arange(8), {"value": np.zeros(8)})
    laid_out = []
    real = _lists.Lists._lay_out_anew
    monkeypatch.setattr(
        _lists.Lists, "_lay_out_anew", lambda self, more: (laid_out.append(len(self.rows)), real(self, more))
    )
    for row in range(8, 4000):
        lists.append(np.array([row % 8]), row, {"value": np.zeros(1)})
    assert len(laid_out) < 40
    assert len(lists.rows) < 8 * 4000


@pytest.mark.parametrize("name", ["ivf", "ivf_numba"])
@pytest.mark.parametrize("seed", range(3))
def test_contract_accepts_the_reference(name, seed):
    verdict = check(CONTRACTS[name], CONTRACTS[name].reference, seed=seed)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("wrong", sorted(CONTRACT.wrong))
def test_contract_names_the_wrong_variant(wrong):
    failure = check(CONTRACT, CONTRACT.wrong[wrong].impl, seed=1).failure
    assert failure is not None
    assert failure.like == wrong


class FewLists(ivf.IVF):
    """Right with all lists; with fewer, one row of its answer is spoilt."""

    def search(self, queries, k=10, *, n_probe=None):
        distances, ids = super().search(queries, k, n_probe=n_probe)
        if n_probe < self.n_lists:
            self.spoil(distances[0], ids[0])
        return distances, ids


class Unordered(FewLists):
    def spoil(self, distances, ids):
        distances[:], ids[:] = distances[::-1].copy(), ids[::-1].copy()


class Twice(FewLists):
    def spoil(self, distances, ids):
        distances[4], ids[4] = distances[3], ids[3]


class BadlyPadded(FewLists):
    def spoil(self, distances, ids):
        ids[4] = -1


class Beyond(FewLists):
    def spoil(self, distances, ids):
        ids[4] = 10**6


@pytest.mark.parametrize(
    ("mine", "message"),
    [
        (Unordered, "not in order"),
        (Twice, "an id twice"),
        (BadlyPadded, "must end in id −1"),
        (Beyond, "to 1000000, expected 0 to"),
    ],
)
def test_contract_looks_at_an_answer_from_few_lists(mine, message):
    verdict = check(CONTRACT, mine)
    assert not verdict.passed
    assert message in str(verdict)
