"""`mlsys.retrieval._vectors`: what every vector index promises, whatever its technique.

Ids, filters, bad input, any sequence of verbs, files that are whole or refused, and searches from several threads.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from mlsys.retrieval import (
    _index_file,
    _memory,
    _vectors,
    exact,
    exact_numba,
    hnsw,
    hnsw_numba,
    ivf,
    ivf_numba,
    ivfpq,
    ivfpq_numba,
    pq,
    pq_numba,
)

SMALL = {"m": 2, "bits": 2}
MAKE = {
    "exact": lambda metric="l2": exact.Exact(metric),
    "exact_numba": lambda metric="l2": exact_numba.Exact(metric),
    "ivf": lambda metric="l2": ivf.IVF(metric, n_lists=3, n_probe=3),
    "ivf_numba": lambda metric="l2": ivf_numba.IVF(metric, n_lists=3, n_probe=3),
    "pq": lambda metric="l2": pq.PQ(metric, **SMALL),
    "pq_numba": lambda metric="l2": pq_numba.PQ(metric, **SMALL, opq=True),
    "ivfpq": lambda metric="l2": ivfpq.IVFPQ(metric, n_lists=3, n_probe=3, **SMALL),
    "ivfpq_numba": lambda metric="l2": ivfpq_numba.IVFPQ(metric, n_lists=3, n_probe=3, **SMALL, opq=True),
    "hnsw": lambda metric="l2": hnsw.HNSW(metric, M=4, ef_construction=10),
    "hnsw_numba": lambda metric="l2": hnsw_numba.HNSW(metric, M=4, ef_construction=10),
}
EXACT = ("exact", "exact_numba", "ivf", "ivf_numba", "hnsw", "hnsw_numba")  # with all lists probed, and ef = 50 nodes
D = 4


def drawn(n, seed=0, d=D):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


@pytest.fixture(params=MAKE)
def name(request):
    return request.param


@pytest.fixture
def make(name):
    return MAKE[name]


def same(a, b, queries=None, k=5):
    for x, y in zip(a.search(drawn(9) if queries is None else queries, k), b.search(drawn(9), k), strict=True):
        np.testing.assert_array_equal(x, y)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# The results


@pytest.mark.parametrize("metric", _vectors.METRICS)
def test_results_are_sorted_padded_and_named_by_id(make, metric):
    x, ids = drawn(20), np.arange(20)[::-1] * 7
    near, found = make(metric).fit(x, ids).search(drawn(6, 1), k=25)
    assert near.dtype == np.float32
    assert found.dtype == np.int64
    assert near.shape == found.shape == (6, 25)
    assert (np.diff(near[:, :20], axis=1) >= 0).all()
    assert all(sorted(row) == sorted(ids) for row in found[:, :20].tolist())
    assert (found[:, 20:] == -1).all()
    assert np.isinf(near[:, 20:]).all()


def test_equal_distances_are_ordered_by_id(make):
    x = np.repeat(drawn(5), 8, axis=0)
    ids = np.random.default_rng(0).permutation(1000)[:40]
    near, found = make().fit(x, ids).search(drawn(5), k=40)
    for distances, row in zip(near, found, strict=True):
        assert len(np.unique(distances)) <= 5
        order = np.lexsort((row, distances))
        np.testing.assert_array_equal(order, np.arange(40))


@pytest.mark.parametrize("metric", _vectors.METRICS)
def test_a_filter_by_mask_and_by_function(make, metric):
    x, ids = drawn(40), np.arange(40) + 100
    index = make(metric).fit(x, ids)
    everything = index.search(drawn(5, 1), k=40)
    for mask in (ids % 3 == 0, ids == 117, ids > 0, ids < 0):
        near, found = index.search(drawn(5, 1), k=40, filter=mask)
        for a, b in zip((near, found), index.search(drawn(5, 1), 40, filter=lambda i, m=mask: m), strict=True):
            np.testing.assert_array_equal(a, b)
        for q in range(5):
            kept = np.isin(everything[1][q], ids[mask])
            np.testing.assert_array_equal(found[q, : mask.sum()], everything[1][q][kept])
            np.testing.assert_array_equal(near[q, : mask.sum()], everything[0][q][kept])
            assert (found[q, mask.sum() :] == -1).all()


def test_one_vector_stands_for_many_and_a_query_for_queries(make):
    index = make().fit(drawn(12))
    index.add(drawn(1, 5)[0])
    assert index.ids[-1] == 12
    near, found = index.search(drawn(1, 5)[0], k=2)
    assert near.shape == found.shape == (1, 2)


def test_adding_one_by_one_is_adding_at_once(make):
    x = drawn(60)
    one, many = make().fit(x[:20]), make().fit(x[:20])
    for row in x[20:]:
        one.add(row)
    many.add(x[20:])
    same(one, many, k=60)
    np.testing.assert_array_equal(one.ids, np.arange(60))


def test_removing_and_adding_again(name, make):
    x = drawn(30)
    index = make().fit(x)
    index.remove([3, 29, 0])
    assert len(index) == 27
    assert not np.isin(index.search(x, 30)[1], [3, 29, 0]).any()
    index.add(x[[3]], [3])
    near, found = index.search(x[[3]], 1)
    if name in EXACT:
        assert (near, found) == (0, 3)
    index.remove(index.ids)
    assert len(index) == 0
    assert (index.search(x, 3)[1] == -1).all()
    index.add(x[:2])
    np.testing.assert_array_equal(index.ids, [30, 31])


def test_fit_replaces_and_keeps_no_hold_of_the_callers_array(make):
    x = drawn(20)
    index, other = make().fit(drawn(50, 3)), make().fit(drawn(20))
    index.fit(x)
    x[:] = 9
    same(index, other)
    assert len(index) == 20


def test_doubling_keeps_what_was_there():
    grown = _memory.Growing(np.arange(3))
    views = []
    for i in range(3, 50):
        views.append((grown.view, grown.view.copy()))
        grown.append(np.array([i]))
    np.testing.assert_array_equal(grown.view, np.arange(50))
    assert all((a == b).all() for a, b in views)
    rooms = {len(v.base) if v.base is not None else len(v) for v, _ in views}
    assert len(rooms) <= 10  # made anew a few times only


# What is refused


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.full((30, D), np.nan), ValueError, r"x\[0\] holds NaN"),
        (np.full((30, D), 1e39), ValueError, "holds NaN or infinity"),
        (np.zeros(D), ValueError, "must be"),
        (np.zeros((30, 0)), ValueError, "d ≥ 1"),
        (np.array([["a"]]), TypeError, "must hold numbers"),
    ],
)
def test_bad_vectors_are_refused_and_nothing_changes(make, x, error, message):
    index, other = make().fit(drawn(20)), make().fit(drawn(20))
    with pytest.raises(error, match=message):
        index.fit(x)
    same(index, other)


def test_bad_ids_dimensions_and_numbers_are_refused(make):
    index, other = make().fit(drawn(20)), make().fit(drawn(20))
    for call, error, message in (
        (lambda: index.add(drawn(2, d=D + 1)), ValueError, "must have dimension"),
        (lambda: index.add(drawn(2), [1, 50]), ValueError, "1 is already in the index"),
        (lambda: index.add(drawn(2), [50, 50]), ValueError, "50 is more than once"),
        (lambda: index.add(drawn(2), [-1, 50]), ValueError, "from 0 to"),
        (lambda: index.add(drawn(2), [0.5, 1]), TypeError, "whole numbers"),
        (lambda: index.add(drawn(2), [50]), ValueError, "one for each vector"),
        (lambda: index.remove([0, 99]), ValueError, "99 is not in the index.*none removed"),
        (lambda: index.remove([0, 0]), ValueError, "0 is more than once"),
        (lambda: index.search(drawn(2, d=3)), ValueError, "queries must have dimension"),
        (lambda: index.search(drawn(2), 0), ValueError, "k must be at least 1"),
        (lambda: index.search(drawn(2), 2.5), TypeError, "k must be a whole number"),
        (lambda: index.search(drawn(2), True), TypeError, "k must be a whole number"),
        (lambda: index.search(drawn(2), filter=np.ones(3, bool)), ValueError, "filter must be a bool mask"),
        (lambda: index.search(drawn(2), filter=lambda i: i), ValueError, "filter must return a bool mask"),
        (lambda: index.search(drawn(2), colour=3), TypeError, "has no option colour"),
        (lambda: index.search(np.full((1, D), np.inf)), ValueError, "NaN or infinity"),
    ):
        with pytest.raises(error, match=message):
            call()
    same(index, other)


def test_a_zero_vector_has_no_direction(make):
    index, other = make("cosine").fit(drawn(20)), make("cosine").fit(drawn(20))
    zero = np.array([[1.0, 0, 0, 0], [0, 0, 0, 0]])
    for call, name in ((index.fit, "x"), (index.add, "x"), (index.search, "queries")):
        with pytest.raises(ValueError, match=rf"{name}\[1\] is a zero vector"):
            call(zero)
    same(index, other)


def test_an_unknown_metric_is_refused(make):
    with pytest.raises(ValueError, match="metric must be one of l2, ip, cosine; got 'l1'"):
        make("l1")


def test_an_index_without_vectors_says_so(make, tmp_path):
    for use in (lambda i: i.search(drawn(1)), lambda i: i.save(tmp_path)):
        with pytest.raises(ValueError, match="holds no vectors yet"):
            use(make())
    assert len(make()) == 0
    assert make().nbytes < 8


def test_ids_do_not_run_over(make):
    index = make().fit(drawn(20), [*range(19), 2**63 - 2])
    with pytest.raises(ValueError, match="pass ids for the new vectors"):
        index.add(drawn(1))
    assert index.add(drawn(1), [50]).ids[-1] == 50


def test_a_tensor_with_a_gradient_is_its_numbers(make):
    x, queries = (torch.from_numpy(a).requires_grad_() for a in (drawn(20), drawn(9)))
    same(make().fit(x), make().fit(drawn(20)), queries)


@pytest.mark.parametrize("name", [name for name in MAKE if not name.startswith("exact")])  # which takes them
def test_numbers_whose_squares_overflow_are_refused(make):
    index, other = make().fit(drawn(20)), make().fit(drawn(20))
    for call in (index.fit, index.add, index.search):
        with pytest.raises(ValueError, match="holds 1e\\+20; distances need numbers up to"):
            call(np.full((20, D), 1e20))
    same(index, other)


def test_memory_counts_the_room_in_which_arrays_grow(make):
    index = make().fit(drawn(40))
    before = index.nbytes
    assert before >= sum(a.nbytes for name, a in index._arrays().items() if name not in ("entry", "drawn", "list_of"))
    index.add(drawn(1))
    assert index.nbytes > before + 8 * 8  # ids have room for several more


# What is interrupted


@pytest.mark.parametrize("step", ["_build", "_insert", "_delete"])
def test_ctrl_c_leaves_what_was_there_or_an_error(make, monkeypatch, step, tmp_path):
    index, other = make().fit(drawn(20)), make().fit(drawn(20))
    work = getattr(index, step)

    def interrupted(x):
        work(x)
        raise KeyboardInterrupt

    monkeypatch.setattr(index, step, interrupted)
    verb = {"_build": "fit", "_insert": "add", "_delete": "remove"}[step]
    with pytest.raises(KeyboardInterrupt):
        getattr(index, verb)(np.array([3, 5]) if verb == "remove" else drawn(30, 1))
    monkeypatch.undo()
    if verb == "fit":
        same(index, other)
    else:
        for call in (
            lambda: index.search(drawn(1)),
            lambda: index.add(drawn(1)),
            lambda: index.remove([0]),
            lambda: index.save(tmp_path),
        ):
            with pytest.raises(RuntimeError, match=rf"{verb} was interrupted.*call fit\(x\) again"):
                call()
    same(index.fit(drawn(20)), other)
    same(index.add(drawn(3, 1)), other.add(drawn(3, 1)))


# Any sequence of verbs, against a dictionary


class Verbs(RuleBasedStateMachine):
    make = staticmethod(MAKE["exact"])
    exact = True
    folder = None

    @initialize(seed=st.integers(0, 99))
    def begin(self, seed):
        x = self.some(8, seed)
        self.index = self.make().fit(x)
        self.held = dict(enumerate(x))

    @staticmethod
    def some(n, seed):
        return np.random.default_rng(seed).integers(-3, 4, (n, D)).astype(np.float32)  # with ties and duplicates

    @rule(n=st.integers(0, 5), seed=st.integers(0, 99))
    def add(self, n, seed):
        first = self.index._next
        self.index.add(self.some(n, seed))
        self.held |= {first + i: v for i, v in enumerate(self.some(n, seed))}

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def remove(self, data):
        gone = data.draw(st.lists(st.sampled_from(sorted(self.held)), unique=True, max_size=4))
        self.index.remove(gone)
        for i in gone:
            del self.held[i]

    @rule()
    def save_and_load(self):
        self.index.save(self.folder)
        self.index = type(self.index).load(self.folder)

    @rule(seed=st.integers(0, 99), k=st.integers(1, 12), odd=st.booleans())
    def search(self, seed, k, odd):
        (near,), (found,) = self.index.search(
            self.some(1, seed)[0], k, filter=(lambda ids: ids % 2 == 1) if odd else None
        )
        ids = np.array([i for i in self.held if not odd or i % 2], np.int64)
        hits = min(k, len(ids))
        assert (found[hits:] == -1).all()
        assert set(found[:hits].tolist()) <= set(ids.tolist())
        assert len(set(found[:hits].tolist())) == hits
        if self.exact and hits:
            true = ((np.array([self.held[i] for i in ids.tolist()]) - self.some(1, seed)) ** 2).sum(axis=1)
            order = np.lexsort((ids, true))[:k]
            np.testing.assert_array_equal(found[:hits], ids[order])
            np.testing.assert_array_equal(near[:hits], true[order])

    @rule()
    def length(self):
        assert len(self.index) == len(self.held)
        assert self.index.ids.tolist() == list(self.held)


def test_any_sequence_of_verbs(name, make, tmp_path):
    machine = type("Verbs", (Verbs,), {"make": staticmethod(make), "exact": name in EXACT, "folder": tmp_path})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=8, stateful_step_count=20, suppress_health_check=list(HealthCheck))
    )


# Files


@pytest.mark.parametrize("metric", _vectors.METRICS)
def test_save_and_load(make, metric, tmp_path):
    index = make(metric).fit(drawn(30), np.arange(30) * 2)
    index.add(drawn(5, 1))
    index.remove([4, 8])
    index.save(tmp_path / "new" / "folder")
    again = type(index).load(tmp_path / "new" / "folder")
    same(index, again)
    assert again.metric == metric
    again.add(drawn(3, 2))
    index.add(drawn(3, 2))
    same(index, again, k=40)
    np.testing.assert_array_equal(index.ids, again.ids)
    assert index.nbytes > 0


def test_readable_and_compiled_files_are_interchangeable(tmp_path):
    for plain in (
        exact.Exact(),
        ivf.IVF(n_lists=3, n_probe=2),
        pq.PQ(**SMALL),
        ivfpq.IVFPQ(n_lists=3, **SMALL, n_probe=2),
    ):
        module = sys.modules[type(plain).__module__ + "_numba"]
        fast = getattr(module, type(plain).__name__)
        plain.fit(drawn(50)).save(tmp_path)
        same(plain, fast.load(tmp_path))
        for file in tmp_path.iterdir():
            file.unlink()


def test_loading_says_what_is_wrong_with_options_and_not_the_file(name, make, tmp_path):
    index = make().fit(drawn(20))
    index.save(tmp_path)
    same(index, type(index).load(tmp_path, metric="l2"))
    with pytest.raises(ValueError, match=r"metric = 'ip' is not what the index in .* was saved with, 'l2'") as caught:
        type(index).load(tmp_path, metric="ip")
    assert not isinstance(caught.value, _index_file.IndexFileError)
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        type(index).load(tmp_path, colour="red")


def test_a_rotation_of_large_numbers_can_be_loaded_again(tmp_path):
    """A rotation can turn all of a vector's length into one coordinate."""
    x = 9e14 * np.repeat([[-1.0], [1.0]], 15, axis=0) + 1e12 * drawn(30, d=64)
    for index in (pq.PQ(**SMALL, opq=True), ivfpq.IVFPQ(n_lists=1, n_probe=1, **SMALL, opq=True)):
        folder = tmp_path / type(index).__name__
        index.fit(x).save(folder)
        for a, b in zip(index.search(x[:3]), type(index).load(folder).search(x[:3]), strict=True):
            np.testing.assert_array_equal(a, b)


def truncate(folder):
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-3])


def flip(folder):
    file = next(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def cut_manifest(folder):
    file = folder / "index.json"
    file.write_bytes(file.read_bytes()[:40])


def edit_manifest(folder):
    file = folder / "index.json"
    file.write_text(file.read_text().replace('"l2"', '"ip"'))


@pytest.mark.parametrize("damage", [truncate, flip, cut_manifest, edit_manifest])
def test_a_damaged_index_is_refused_and_left_as_it_was(make, tmp_path, damage):
    index = make().fit(drawn(20))
    index.save(tmp_path)
    damage(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(_index_file.IndexFileError):
        type(index).load(tmp_path)
    assert contents(tmp_path) == before


def test_arrays_that_do_not_fit_are_refused(make, tmp_path):
    """With the right checksums: compiled code must never see rows, codes or lists that lead nowhere."""
    index = make().fit(drawn(20))
    index.save(tmp_path)
    settings_, arrays = _index_file.read(tmp_path, index.FORMAT)
    for array in arrays:
        wrong = [arrays[array][:-1], arrays[array].astype(np.float16), arrays[array][None]]
        if array in ("codes", "list_of"):
            wrong.append(np.full_like(arrays[array], 77))
        if arrays[array].dtype == np.float32:
            wrong.append(np.full_like(arrays[array], np.nan))
        if array == "ids":
            wrong += [np.zeros_like(arrays[array]), np.full_like(arrays[array], -1)]
        for other in wrong:
            _index_file.write(tmp_path, index.FORMAT, settings_, arrays | {array: other})
            with pytest.raises(_index_file.IndexFileError, match="cannot be used"):
                type(index).load(tmp_path)
        without = {name: a for name, a in arrays.items() if name != array}
        _index_file.write(tmp_path, index.FORMAT, settings_, without)
        with pytest.raises(_index_file.IndexFileError, match=f"it lacks '{array}'"):
            type(index).load(tmp_path)
    for setting in settings_:
        _index_file.write(tmp_path, index.FORMAT, {s: v for s, v in settings_.items() if s != setting}, arrays)
        with pytest.raises(_index_file.IndexFileError, match=f"it lacks '{setting}'"):
            type(index).load(tmp_path)


def test_another_kind_of_index_is_refused(make, tmp_path):
    _index_file.write(tmp_path, "mlsys.other/1", {}, {"x": np.zeros(2)})
    before = contents(tmp_path)
    index = make().fit(drawn(20))
    with pytest.raises(_index_file.IndexFileError, match=r"mlsys\.other/1"):
        index.save(tmp_path)
    with pytest.raises(_index_file.IndexFileError, match=r"mlsys\.other/1"):
        type(index).load(tmp_path)
    assert contents(tmp_path) == before


def test_a_failing_save_leaves_the_old_index(make, tmp_path, monkeypatch):
    old = make().fit(drawn(20))
    old.save(tmp_path)
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) > 1:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk full"):
        make().fit(drawn(30, 1)).save(tmp_path)
    monkeypatch.undo()
    same(old, type(old).load(tmp_path))


def test_killed_while_saving_keeps_the_old_file(killed_while_saving, tmp_path):
    old = exact.Exact().fit(drawn(20))
    old.save(tmp_path)
    killed_while_saving(
        "import numpy as np; from mlsys.retrieval.exact import Exact; index = Exact().fit(np.ones((9, 3)))", tmp_path
    )
    same(old, exact.Exact.load(tmp_path))
    old.save(tmp_path)
    assert len(contents(tmp_path)) == 2


# Threads


def test_searches_from_several_threads_give_the_same_answers(make):
    index = make().fit(drawn(400))
    queries = [drawn(7, seed) for seed in range(16)]
    want = [index.search(q, 9) for q in queries]
    with ThreadPoolExecutor(4) as pool:
        for (a, b), (c, d) in zip(want, pool.map(lambda q: index.search(q, 9), queries), strict=True):
            np.testing.assert_array_equal(a, c)
            np.testing.assert_array_equal(b, d)
