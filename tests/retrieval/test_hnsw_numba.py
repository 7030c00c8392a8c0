"""`mlsys.retrieval.hnsw_numba` passes every test of `hnsw`, and builds the same graph."""

import importlib.util
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from mlsys.retrieval import _hnsw_compiled, _intrinsics_numba, hnsw, hnsw_numba

_spec = importlib.util.spec_from_file_location("tests_of_hnsw", Path(__file__).with_name("test_hnsw.py"))
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)
globals().update({name: value for name, value in vars(_shared).items() if name.startswith("test_")})
index = _shared.built
digits, manifold, brute, recall = _shared.digits, _shared.manifold, _shared.brute, _shared.recall


@pytest.fixture(scope="module", name="HNSW")
def implementation():
    return hnsw_numba.HNSW


def same_graph(a, b):
    for name, value in a._arrays().items():
        np.testing.assert_array_equal(value, b._arrays()[name], err_msg=name)


@pytest.mark.parametrize("select", ["heuristic", "keep pruned", "nearest"])
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_the_same_graph_and_answers(metric, select):
    x, queries = digits(0, 400, 10, 30), digits(1, 30, 10, 30)
    plain, fast = (
        module.HNSW(metric, M=4, ef_construction=20, seed=2, select=select).fit(x) for module in (hnsw, hnsw_numba)
    )
    same_graph(plain, fast)
    for change in (lambda i: i.add(digits(2, 50, 10, 30)), lambda i: i.remove(np.arange(0, 200, 3))):
        change(plain)
        change(fast)
        same_graph(plain, fast)
    mask = np.random.default_rng(0).random(len(plain)) < 0.7
    for how in ({"ef": 1}, {"ef": 2}, {"ef": 25}, {"ef": 25, "filter": mask}):
        for a, b in zip(plain.search(queries, 1, **how), fast.search(queries, 1, **how), strict=True):
            np.testing.assert_array_equal(a, b)


def test_cosine_answers_are_as_good(HNSW):
    x, queries = manifold(0, 300), manifold(1, 30)
    plain, fast = (module.HNSW("cosine", M=6, ef_construction=40).fit(x) for module in (hnsw, hnsw_numba))
    a, b = plain.search(queries, 5, ef=300), fast.search(queries, 5, ef=300)
    np.testing.assert_array_equal(a[1], b[1])
    np.testing.assert_allclose(a[0], b[0], atol=1e-6)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("linked", [5, 200])
def test_the_same_for_any_number_of_threads(threads, linked, monkeypatch):
    """linked: how many nodes there are in a batch that is linked by several."""
    monkeypatch.setattr(hnsw_numba, "LINKED", linked)
    x, queries = manifold(0, 1500), manifold(1, 50)
    one = hnsw_numba.HNSW(M=5, ef_construction=30).fit(x)
    many = hnsw_numba.HNSW(M=5, ef_construction=30, threads=threads).fit(x)
    same_graph(one, many)
    same_graph(one.add(manifold(3, 200)), many.add(manifold(3, 200)))
    for a, b in zip(one.search(queries, 5), many.search(queries, 5), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("threads", "most", "parts"), [(1, 5, 1), (3, 0, 1), (3, 1, 1), (3, 2, 2), (3, 9, 3)])
def test_work_is_spread_over_no_more_threads_than_it_is_for(threads, most, parts):
    done = []
    hnsw_numba.HNSW(threads=threads)._spread(done.append, most)
    assert sorted(done) == list(range(parts))


@njit(nogil=True)
def take_all(taken, n, by, me):
    while True:
        i = _intrinsics_numba.take(taken)
        if i >= n:
            return
        by[i] += me


def test_each_number_is_taken_once_whoever_asks():
    taken, by, n = np.zeros(1, np.int64), np.zeros(1_000_000, np.int64), 1_000_000
    take_all(taken, 0, by, 0)  # compiled before the others race for it
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda me: take_all(taken, n, by, me), (1, 1000, 1_000_000)))
    assert set(np.unique(by)) <= {0, 1, 1000, 1_000_000}  # the first was taken before the race
    assert (by[1:] > 0).all()
    assert taken[0] == n + 3  # each of the three was told once that nothing is left


@pytest.mark.parametrize("which", [0, 1])
def test_what_a_thread_raises_is_raised(which):
    def work(part):
        if part == which:
            raise KeyError(part)

    with pytest.raises(KeyError):
        hnsw_numba.HNSW(threads=2)._spread(work, 2)


def test_queries_are_answered_alone_as_together(HNSW):
    """Together, they are searched in the order of the regions that they descend to."""
    index = HNSW(M=3, ef_construction=20).fit(manifold(0, 400))
    queries = manifold(1, 40)
    order, where = index._by_region(queries)
    assert sorted(order.tolist()) == list(range(40))
    traces = [hnsw.trace(index, queries[i], k=1) for i in order]
    for lowest in range(1, index.graph.top + 1):
        ends = [tuple(trace.path(layer)[-1] for layer in range(index.graph.top, lowest - 1, -1)) for trace in traces]
        assert sum(a != b for a, b in itertools.pairwise(ends)) == len(set(ends)) - 1  # none comes again later
        assert [end[-1] for end in ends] == where[:, lowest - 1].tolist()
    together = index.search(queries, 5, ef=20)
    for row, query in enumerate(queries):
        for a, b in zip(index.search(query, 5, ef=20), together, strict=True):
            np.testing.assert_array_equal(a[0], b[row])


def test_threads_are_not_saved(tmp_path):
    hnsw_numba.HNSW(M=3, threads=3).fit(manifold(0, 20)).save(tmp_path)
    assert hnsw_numba.HNSW.load(tmp_path, threads=2).threads == 2
    assert hnsw_numba.HNSW.load(tmp_path).threads == 1
    assert len(hnsw.HNSW.load(tmp_path)) == 20
    with pytest.raises(ValueError, match="threads must be at least 1"):
        hnsw_numba.HNSW(threads=0)


def test_index_files_are_interchangeable(tmp_path):
    x = digits(0, 100, 8, 20)
    for module, folder in ((hnsw, "a"), (hnsw_numba, "b")):
        module.HNSW(M=4).fit(x).save(tmp_path / folder)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()
    }


def test_marks_are_cleared_when_their_numbers_run_out():
    """In 16 bits: after 65,535 searches a number comes again, and what it marked must not count as seen."""
    index = hnsw_numba.HNSW(M=4, ef_construction=30).fit(manifold(0, 200))
    queries = manifold(1, 200)
    want = index.search(queries, 5, ef=20)
    (marks,) = index._marks
    for value in (65535 - 100, 65535, 65534):
        marks[:] = 1  # as left over by search 1
        marks[0] = value
        for a, b in zip(index.search(queries, 5, ef=20), want, strict=True):
            np.testing.assert_array_equal(a, b)
    assert 0 < marks[0] <= 65535


def test_marks_after_many_searches():
    index = hnsw_numba.HNSW(M=4, ef_construction=20).fit(manifold(0, 60))
    want = index.search(manifold(1, 9), 5, ef=10)
    index.search(np.repeat(manifold(1, 1), 66_000, axis=0), 1, ef=1)
    for a, b in zip(index.search(manifold(1, 9), 5, ef=10), want, strict=True):
        np.testing.assert_array_equal(a, b)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.tuples(st.floats(width=32, allow_nan=False), st.integers(0, 2**31 - 1)), min_size=2, max_size=2, unique=True
    )
)
def test_entries_compare_as_distance_and_node(pairs):
    entries = [_hnsw_compiled._entry(np.float32(distance), node) for distance, node in pairs]
    assert (entries[0] < entries[1]) == (pairs[0] < pairs[1])
    for entry, (distance, node) in zip(entries, pairs, strict=True):
        assert _hnsw_compiled._far(entry) == distance
        assert _hnsw_compiled._node(entry) == node
        assert not entry & 1


def test_vectors_of_many_dimensions():
    for d in (1, 15, 17, 130):
        x, queries = digits(d, 120, d, 9), digits(d + 1, 10, d, 9)
        got = hnsw_numba.HNSW(M=8).fit(x).search(queries, 4, ef=120)
        for a, b in zip(got, brute(x, np.arange(120), queries, 4), strict=True):
            np.testing.assert_array_equal(a, b)
