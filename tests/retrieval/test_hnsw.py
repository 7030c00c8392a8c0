"""HNSW: the graph's rules, recall, and any sequence of changes against brute force over a dictionary."""

import json
import math
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from mlsys.retrieval import _hnsw_index, _index_file, hnsw
from mlsys.retrieval._hnsw_graph import FREE, Graph, draw_levels

MANY = 500  # vectors, where a test needs a graph with layers


@pytest.fixture(scope="module", name="HNSW")
def implementation():
    return hnsw.HNSW


@pytest.fixture(scope="module", name="index")
def built(HNSW):
    """Not to be changed."""
    return HNSW(M=5, ef_construction=40, seed=1).fit(manifold(0, MANY))


def manifold(seed, n, d=12):
    rng = np.random.default_rng(99)
    weights = rng.standard_normal((4, d))
    rng = np.random.default_rng(seed)
    return (np.tanh(rng.standard_normal((n, 4)) @ weights) + 0.05 * rng.standard_normal((n, d))).astype(np.float32)


def digits(seed, n, d=4, top=5):
    return np.random.default_rng(seed).integers(0, top, (n, d)).astype(np.float32)


def brute(x, ids, queries, k, metric="l2"):
    """Distances and ids by sorting everything, float64."""
    x, q = np.asarray(x, np.float64), np.asarray(queries, np.float64)
    if metric == "l2":
        far = ((q[:, None] - x) ** 2).sum(-1)
    elif metric == "ip":
        far = -(q @ x.T)
    else:
        far = 1 - (q / np.linalg.norm(q, axis=1)[:, None]) @ (x / np.linalg.norm(x, axis=1)[:, None]).T
    distances, found = np.full((len(q), k), np.inf), np.full((len(q), k), -1)
    for row in range(len(q)):
        order = np.lexsort((ids, far[row]))[:k]
        distances[row, : len(order)], found[row, : len(order)] = far[row, order], np.asarray(ids)[order]
    return distances, found


def recall(found, true):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), true.tolist(), strict=True)])


def check_graph(index):
    """The rules that hold after any sequence of changes."""
    graph, M = index.graph, index.M
    Graph.of(M, *(graph.arrays()[name] for name in ("vectors", "levels", "links", "upper")), graph.entry)
    assert len(graph) == len(np.unique(graph.vectors, axis=0))
    assert sorted(set(index._node_of_row.tolist())) == list(range(len(graph)))
    if not len(graph):
        return
    reached, front = {graph.entry}, [graph.entry]
    for node in front:
        fresh = [near for near in graph.neighbors(node, 0) if near not in reached]
        reached.update(fresh)
        front += fresh
    assert len(reached) == len(graph)


# --- the graph --------------------------------------------------------------------------------------------------------


def test_the_rules_hold(index):
    check_graph(index)
    assert index.graph.top >= 2
    assert (index.graph.links != FREE).sum(axis=1).max() > index.M  # layer 0 has room for 2M, and uses it


@pytest.mark.parametrize("M", [2, 4, 16])
def test_levels_have_the_papers_distribution(M):
    levels = draw_levels(200_000, M, 0, 0)
    for layer in range(1, 4):
        share = (levels >= layer).mean()
        expected = M**-layer
        assert abs(share - expected) < 5 * math.sqrt(expected / 200_000)


def test_levels_are_one_sequence():
    whole = draw_levels(100, 2, 7, 0)
    np.testing.assert_array_equal(np.concatenate([draw_levels(30, 2, 7, 0), draw_levels(70, 2, 7, 30)]), whole)
    assert (draw_levels(100, 2, 8, 0) != whole).any()


def test_the_entry_point_is_on_the_top_layer(HNSW):
    index = HNSW(M=2, ef_construction=10)
    tops = []
    for vector in manifold(3, 60):
        index.add(vector)
        assert index.graph.levels[index.graph.entry] == index.graph.levels.max()
        tops.append(index.graph.top)
    assert tops[-1] > tops[0]


def test_most_links_go_both_ways(index):
    links = {(a, b) for a in range(len(index.graph)) for b in index.graph.neighbors(a, 0)}
    assert sum((b, a) in links for a, b in links) > 0.7 * len(links)


def test_a_batch_is_drawn_at_random(HNSW):
    """Vectors that are alike arrive together; a batch of them all would leave them without links to each other."""
    x = np.sort(np.repeat(np.arange(8), 100)) * 1000 + np.random.default_rng(0).random(800)
    x = np.stack([x, np.zeros(800)], axis=1).astype(np.float32)
    index = HNSW(M=4, ef_construction=20).fit(x)
    true = brute(x, np.arange(800), x[::9], 5)[1]
    assert recall(index.search(x[::9], 5, ef=20)[1], true) > 0.95
    index = HNSW(M=4, ef_construction=20).fit(x[:700]).add(x[700:])
    assert recall(index.search(x[700::9], 5, ef=20)[1], brute(x, np.arange(800), x[700::9], 5)[1]) > 0.95


def test_the_heuristic_finds_its_way_between_clusters(HNSW):
    rng = np.random.default_rng(0)
    x = (10 * rng.standard_normal((25, 8))[rng.integers(0, 25, 600)] + 0.05 * rng.standard_normal((600, 8))).astype(
        "f4"
    )
    true = brute(x[:500], np.arange(500), x[500:], 5)[1]
    found = {
        how: HNSW(M=6, ef_construction=30, select=how).fit(x[:500]).search(x[500:], 5, ef=30)[1]
        for how in _hnsw_index.SELECT
    }
    assert recall(found["heuristic"], true) > 0.97
    assert recall(found["keep pruned"], true) > 0.97
    assert recall(found["nearest"], true) < 0.9


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "floor"), [("l2", 0.95), ("ip", 0.85), ("cosine", 0.95)])
def test_recall(HNSW, metric, floor):
    x, queries = manifold(0, MANY), manifold(1, 50)
    index = HNSW(metric, M=6, ef_construction=50).fit(x)
    distances, ids = index.search(queries, 10, ef=50)
    want, true = brute(x, np.arange(MANY), queries, 10, metric)
    assert recall(ids, true) > floor
    best = ids[:, 0] == true[:, 0]
    np.testing.assert_allclose(distances[best, 0], want[best, 0], rtol=1e-4, atol=1e-5)


def test_more_ef_finds_more(HNSW, index):
    queries = manifold(1, 50)
    true = brute(manifold(0, MANY), np.arange(MANY), queries, 5)[1]
    found = [recall(index.search(queries, 5, ef=ef)[1], true) for ef in (5, 20, MANY)]
    assert found[0] < found[1] <= found[2] == 1.0


def test_ef_is_at_least_k_and_50(index):
    queries = manifold(1, 20)
    np.testing.assert_array_equal(index.search(queries, 5)[1], index.search(queries, 5, ef=50)[1])
    np.testing.assert_array_equal(index.search(queries, 60, ef=1)[1], index.search(queries, 60, ef=60)[1])
    for ef, error in ((0, ValueError), (2.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="ef must be"):
            index.search(queries, 5, ef=ef)
    with pytest.raises(TypeError, match="no option efs"):
        index.search(queries, 5, efs=10)


def test_ties_go_to_the_smaller_id(HNSW):
    x = digits(0, 80)
    ids = np.random.default_rng(1).permutation(80) * 3
    index = HNSW(M=4, ef_construction=20).fit(x, ids)
    want, true = brute(x, ids, digits(1, 20), 12)
    distances, found = index.search(digits(1, 20), 12, ef=80)
    np.testing.assert_array_equal(found, true)
    np.testing.assert_array_equal(distances, want)


def test_duplicates_are_one_node_and_many_ids(HNSW):
    x = np.concatenate([np.zeros((300, 3)), digits(0, 60, 3, 4)]).astype(np.float32)
    x[5] = -0.0
    index = HNSW(M=3, ef_construction=20).fit(x)
    check_graph(index)
    assert len(index.graph) == len(np.unique(x, axis=0)) < 61
    for k in (1, 20, 400):
        want, true = brute(x, np.arange(360), x[-10:], k)
        distances, found = index.search(x[-10:], k, ef=360)
        np.testing.assert_array_equal(found, true)
        np.testing.assert_array_equal(distances, want)
    nodes = len(index.graph)
    index.remove(np.arange(0, 299))
    assert len(index.graph) == nodes
    assert index.search(np.zeros(3), 1)[1][0, 0] == 299
    index.remove([299, *(300 + np.flatnonzero(~x[300:].any(axis=1)))])
    assert len(index.graph) == nodes - 1
    check_graph(index)


def test_removing_the_first_of_two_equal_rows_keeps_ids_apart(HNSW):
    index = HNSW(M=2).fit(np.array([[0.0], [5.0], [0.0]]), ids=[10, 20, 30]).remove([10])
    np.testing.assert_array_equal(index.search(np.array([[0.0], [5.0]]), 1)[1], [[30], [20]])


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
def test_filter(HNSW, index, share):
    x, queries = manifold(0, MANY), manifold(1, 40)
    allowed = np.random.default_rng(0).random(MANY) < share
    true = brute(x[allowed], np.flatnonzero(allowed), queries, 5)[1]
    found = index.search(queries, 5, ef=40, filter=allowed)[1]
    assert np.isin(found, [*np.flatnonzero(allowed), -1]).all()
    assert recall(found, true) == 1.0 if share < 0.2 else recall(found, true) > 0.95
    assert ((found >= 0).sum(axis=1) == min(5, allowed.sum())).all()
    np.testing.assert_array_equal(index.search(queries, 5, ef=40, filter=lambda ids: allowed[ids])[1], found)


def test_filter_far_from_the_query(HNSW):
    """None of the nearest is allowed: the search has to go on, in the graph, until it has k."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 200, (900, 2)).astype(np.float32)
    index = HNSW(M=4, ef_construction=30).fit(x)
    allowed = (x[:, 0] > 80) | (x[:, 1] > 150)
    queries = np.zeros((3, 2)) + [[0], [3], [6]]
    found = index.search(queries, 4, ef=8, filter=allowed)[1]
    true = brute(x[allowed], np.flatnonzero(allowed), queries, 4)[1]
    assert recall(found, true) > 0.9


def test_fewer_than_k_one_and_none(HNSW):
    index = HNSW(M=2).fit(digits(0, 1))
    distances, ids = index.search(digits(0, 1), 3)
    np.testing.assert_array_equal(ids, [[0, -1, -1]])
    np.testing.assert_array_equal(distances, [[0, np.inf, np.inf]])
    index.remove([0])
    assert len(index) == 0
    np.testing.assert_array_equal(index.search(digits(0, 2), 2)[1], -1)
    index.add(digits(5, 3))
    np.testing.assert_array_equal(np.sort(index.search(digits(0, 1), 3)[1][0]), [1, 2, 3])
    check_graph(index)


def test_one_by_one_is_as_good_as_at_once(HNSW):
    x, queries = manifold(0, 250), manifold(1, 40)
    true = brute(x, np.arange(250), queries, 5)[1]
    index = HNSW(M=6, ef_construction=40)
    for vector in x:
        index.add(vector)
    check_graph(index)
    np.testing.assert_array_equal(index.graph.levels, HNSW(M=6, ef_construction=1).fit(x).graph.levels)
    assert recall(index.search(queries, 5, ef=30)[1], true) > 0.95


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_removal_is_repaired(HNSW, share):
    x, queries = manifold(0, MANY), manifold(1, 40)
    index = HNSW(M=5, ef_construction=40).fit(x)
    gone = np.random.default_rng(0).permutation(MANY)[: int(share * MANY)]
    entry = int(index.graph.entry)
    if entry not in gone:
        gone[0] = entry
    index.remove(gone)
    check_graph(index)
    kept = np.setdiff1d(np.arange(MANY), gone)
    np.testing.assert_array_equal(index.ids, kept)
    np.testing.assert_array_equal(index.graph.vectors, x[kept])
    assert recall(index.search(queries, 5, ef=30)[1], brute(x[kept], kept, queries, 5)[1]) > 0.93


def test_what_is_not_reached_is_connected(HNSW):
    index = HNSW(M=2, ef_construction=10).fit(manifold(0, 40))
    graph = index.graph
    cut = [node for node in range(40) if node != graph.entry][:15]
    graph.links[np.isin(graph.links, cut)] = FREE
    graph.links[:] = -np.sort(-graph.links, axis=1)  # links first
    assert graph.reached(graph.entry).sum() <= 25
    index._reconnect()
    check_graph(index)


def test_vectors_of_the_caller_are_not_kept(HNSW):
    x = digits(0, 30)
    index = HNSW(M=3).fit(x)
    more = digits(1, 5)
    index.add(more)
    before = index.search(x, 3)[0]
    x2 = x.copy()
    x[:] = 77
    more[:] = 77
    np.testing.assert_array_equal(index.search(x2, 3)[0], before)


# --- against a dictionary ---------------------------------------------------------------------------------------------


def machine(make, folder):
    class Machine(RuleBasedStateMachine):
        """Small numbers, so that distances are exact, vectors come again and ties are many."""

        @initialize(M=st.integers(2, 4), metric=st.sampled_from(["l2", "ip"]), seed=st.integers(0, 3))
        def start(self, M, metric, seed):
            self.metric = metric
            self.index = make(metric, M=M, ef_construction=5, seed=seed)
            self.held = {}

        @rule(seed=st.integers(0, 10**6), n=st.integers(1, 25), gap=st.integers(0, 3))
        def add(self, seed, n, gap):
            x = digits(seed, n, 2, 6)
            start = max(self.held, default=-1) + 1 + gap
            ids = start + np.random.default_rng(seed).permutation(n)
            if n == 1 and not gap and start == self.index._next:
                self.index.add(x[0])
            else:
                self.index.add(x, ids)
            self.held.update(zip(ids.tolist(), x, strict=True))

        @rule(seed=st.integers(0, 10**6), share=st.floats(0, 1))
        def remove(self, seed, share):
            ids = [i for i in self.held if np.random.default_rng([seed, i]).random() < share]
            if ids:
                self.index.remove(ids)
                for i in ids:
                    del self.held[i]

        @rule()
        def save_and_load(self):
            if self.index.dim:
                self.index.save(folder)
                self.index = type(self.index).load(folder)

        @rule(seed=st.integers(0, 10**6), k=st.integers(1, 30), share=st.none() | st.floats(0, 1))
        def search(self, seed, k, share):
            if not self.index.dim:
                return
            queries = digits(seed, 4, 2, 6)
            ids = np.array(list(self.held), np.int64)
            mask = np.random.default_rng(seed).random(len(ids)) < (2 if share is None else share)
            x = np.array(list(self.held.values())).reshape(-1, 2)
            allowed = set(ids[mask].tolist())
            chosen = None if share is None else lambda got: np.array([i in allowed for i in got.tolist()], bool)
            distances, found = self.index.search(queries, k, ef=1000, filter=chosen)
            want, true = brute(x[mask], ids[mask], queries, k, self.metric)
            np.testing.assert_array_equal(found, true)
            np.testing.assert_array_equal(distances, want)

        @invariant()
        def rules(self):
            if hasattr(self, "index"):
                assert sorted(self.index.ids.tolist()) == sorted(self.held)
                check_graph(self.index)

    return Machine


def test_any_sequence_against_a_dictionary(HNSW, tmp_path):
    run_state_machine_as_test(
        machine(HNSW, tmp_path / "index"),
        settings=settings(
            max_examples=40, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


# --- files, threads, arguments ----------------------------------------------------------------------------------------


def test_loaded_is_as_saved_and_goes_on(HNSW, index, tmp_path):
    index.save(tmp_path)
    loaded = HNSW.load(tmp_path)
    queries = manifold(1, 20)
    for a, b in zip(index.search(queries, 5), loaded.search(queries, 5), strict=True):
        np.testing.assert_array_equal(a, b)
    again = HNSW(M=5, ef_construction=40, seed=1).fit(manifold(0, MANY))
    for changed in (loaded, again):
        changed.add(manifold(5, 40)).remove(np.arange(20))
    for name, value in loaded._arrays().items():
        np.testing.assert_array_equal(value, again._arrays()[name], err_msg=name)


def test_how_many_were_added_since_the_last_check_is_saved(HNSW, tmp_path):
    """Of 600 nodes it is made when three are new: a loaded index must not count from 0."""
    index = HNSW(M=5, ef_construction=40).fit(manifold(0, 600)).add(manifold(5, 2))
    index.save(tmp_path)
    loaded = HNSW.load(tmp_path)
    for expected in (2, 0):
        assert [i._arrays()["unchecked"].tolist() for i in (index, loaded)] == [[expected], [expected]]
        for changed in (index, loaded):
            changed.add(manifold(6, 1))
    for name, value in loaded._arrays().items():
        np.testing.assert_array_equal(value, index._arrays()[name], err_msg=name)


DAMAGE = {
    "a link beyond the last node": ("links", (3, 0), MANY),
    "a link below −1": ("links", (3, 0), -2),
    "a link to itself": ("links", (3, 0), 3),
    "a free place before a link": ("links", (3, 0), FREE),
    "a level too high": ("levels", 3, 10**6),
    "a level below 0": ("levels", 3, -1),
    "another level": ("levels", 3, None),
    "a link above that is no node": ("upper", (0, 0), MANY),
    "no entry point": ("entry", 0, -1),
    "an entry point that is no node": ("entry", 0, MANY),
    "NaN": ("vectors", (7, 1), np.nan),
    "a row without its node": ("node_of_row", 5, MANY),
    "a node without a row": ("node_of_row", 5, 6),
    "fewer levels drawn than nodes": ("drawn", 0, 3),
    "more nodes unchecked than there are": ("unchecked", 0, MANY + 1),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_file_with_wrong_numbers_is_refused(HNSW, index, tmp_path, what):
    """Compiled code would follow a link anywhere."""
    index.save(tmp_path)
    name, at, value = DAMAGE[what]
    kind_settings, arrays = _index_file.read(tmp_path, HNSW.FORMAT)
    arrays[name] = arrays[name].copy()
    arrays[name][at] = arrays[name][at] + 1 if what == "another level" else value
    _index_file.write(tmp_path, HNSW.FORMAT, kind_settings, arrays)
    with pytest.raises(ValueError, match="cannot be used"):
        HNSW.load(tmp_path)


def test_a_low_entry_point_and_links_to_lower_nodes_are_refused(HNSW, index, tmp_path):
    index.save(tmp_path)
    kind_settings, arrays = _index_file.read(tmp_path, HNSW.FORMAT)
    low = int((arrays["levels"] == 0).argmax())
    for name, at in (("entry", 0), ("upper", (0, 0))):
        changed = {**arrays, name: arrays[name].copy()}
        changed[name][at] = low
        _index_file.write(tmp_path, HNSW.FORMAT, kind_settings, changed)
        with pytest.raises(ValueError, match=r"highest|not on it"):
            HNSW.load(tmp_path)


@pytest.mark.parametrize("missing", ["links", "entry", "node_of_row", "drawn", "unchecked"])
def test_a_file_without_an_array_is_refused(HNSW, index, tmp_path, missing):
    index.save(tmp_path)
    kind_settings, arrays = _index_file.read(tmp_path, HNSW.FORMAT)
    del arrays[missing]
    _index_file.write(tmp_path, HNSW.FORMAT, kind_settings, arrays)
    with pytest.raises(ValueError, match=missing):
        HNSW.load(tmp_path)


def test_wrong_settings_in_a_file_are_refused(HNSW, index, tmp_path):
    index.save(tmp_path)
    kind_settings, arrays = _index_file.read(tmp_path, HNSW.FORMAT)
    for name, value in (("M", 6), ("M", "5"), ("metric", "l3"), ("select", 0), ("dim", 11)):
        _index_file.write(tmp_path, HNSW.FORMAT, {**kind_settings, name: value}, arrays)
        with pytest.raises(ValueError, match="cannot be used"):
            HNSW.load(tmp_path)
    assert json.loads((tmp_path / "index.json").read_text())["kind"] == "mlsys.hnsw/2"


def test_searches_from_several_threads_are_equal(index):
    queries = manifold(1, 60)
    want = index.search(queries, 5, ef=30)
    with ThreadPoolExecutor(4) as pool:
        for distances, ids in pool.map(lambda _: index.search(queries, 5, ef=30), range(8)):
            np.testing.assert_array_equal(distances, want[0])
            np.testing.assert_array_equal(ids, want[1])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"M": 1}, ValueError, "M must be at least 2"),
        ({"M": 16.0}, TypeError, "M must be a whole number"),
        ({"ef_construction": 0}, ValueError, "ef_construction must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"metric": "L2"}, ValueError, "metric must be one of"),
        ({"select": "best"}, ValueError, "select must be one of"),
    ],
)
def test_wrong_arguments(HNSW, options, error, message):
    with pytest.raises(error, match=message):
        HNSW(**options)


def test_more_nodes_than_links_can_name_are_refused(monkeypatch):
    monkeypatch.setattr(_hnsw_index, "MOST", 10)
    with pytest.raises(ValueError, match="at most 10"):
        hnsw.HNSW(M=2).fit(manifold(0, 11))
    index = hnsw.HNSW(M=2).fit(manifold(0, 9))
    with pytest.raises(ValueError, match="at most 10"):
        index.add(manifold(1, 2))
    check_graph(index.add(manifold(1, 1)))  # nothing is left of what was refused


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_numbers_whose_squares_overflow_are_refused(HNSW, metric):
    """Their distances would be infinite, or NaN, and in no order."""
    x = manifold(0, 30)
    index = HNSW(metric, M=2).fit(x)
    for call in (index.fit, index.add, index.search):
        with pytest.raises(ValueError, match="scale the data"):
            call(np.float32(1e20) * x)
    assert np.isfinite(index.search(np.float32(1e14) * x, 3)[0]).all()


def test_a_fit_that_is_interrupted_changes_nothing(HNSW, monkeypatch):
    x, more = manifold(0, 60), manifold(1, 90)
    index = HNSW(M=3, ef_construction=10).fit(x)
    want = index.search(x, 4)
    stop_at_the_third_batch(index, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        index.fit(more)
    monkeypatch.undo()
    for a, b in zip(index.search(x, 4), want, strict=True):
        np.testing.assert_array_equal(a, b)
    check_graph(index.add(more))


def test_an_add_that_is_interrupted_is_said(HNSW, monkeypatch):
    """Links to and from half of the new nodes are there: no answer is better than a wrong one."""
    x, more = manifold(0, 60), manifold(1, 90)
    index = HNSW(M=3, ef_construction=10).fit(x)
    stop_at_the_third_batch(index, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        index.add(more)
    monkeypatch.undo()
    for call in (index.search, index.add):
        with pytest.raises(RuntimeError, match="fit"):
            call(x)
    check_graph(index.fit(more))
    assert len(index) == 90


def stop_at_the_third_batch(index, monkeypatch):
    explore, batches = index._explore, []

    def stop(nodes):
        batches.append(nodes)
        if len(batches) == 3:
            raise KeyboardInterrupt
        explore(nodes)

    monkeypatch.setattr(index, "_explore", stop)


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_nbytes_is_what_is_allocated(HNSW):
    HNSW(M=4, ef_construction=5).fit(manifold(0, 20)).search(manifold(0, 3), 2)  # compiles
    x = manifold(0, 700)
    x[7] = x[3]
    tracemalloc.start()
    try:
        index = HNSW(M=4, ef_construction=5).fit(x[:500]).add(x[500:])
        index.search(x[:3], 2)
        allocated, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.9 * allocated < index.nbytes <= allocated


def test_rows_are_put_in_order_once(HNSW, monkeypatch):
    """Where there are duplicates, or ids in another order: when the index changes, not in each search."""
    x = digits(0, 40)
    index = HNSW(M=3).fit(x, ids=np.arange(40)[::-1])
    ordered, calls = index._ordered, []
    monkeypatch.setattr(index, "_ordered", lambda rows: calls.append(len(rows)) or ordered(rows))
    for _ in range(3):
        index.search(x[:2], 3)
    assert calls == [40]
    index.add(x[:1]).search(x[:2], 3)
    assert calls == [40, 41]


def test_rows_that_come_in_order_need_no_list(HNSW):
    """Until a duplicate comes, or an id that is smaller than the one before."""
    x = np.arange(60, dtype=np.float32).reshape(30, 2)
    index = HNSW(M=3).fit(x[:10])
    for row in range(10, 20):
        index.add(x[row]).search(x[:2], 3)
        assert index._members() is None
    index.add(x[20], ids=[100]).add(x[21], ids=[50])
    assert index._members() is not None
    index.remove([100]).remove([3])
    assert index._members() is None
    index.add(x[5])
    np.testing.assert_array_equal(index.search(x[5], 3, ef=30)[1][0, :2], [5, 101])
    index.remove([5])  # the node goes on under the other id, and rows are numbered otherwise
    assert index._members() is not None
    assert index.search(x[5], 1)[1][0, 0] == index.ids[-1]


# --- the trace --------------------------------------------------------------------------------------------------------


def test_trace_is_the_search(index):
    query = manifold(1, 1)[0]
    trace = hnsw.trace(index, query, k=5, ef=30)
    distances, ids = index.search(query, 5, ef=30)
    np.testing.assert_array_equal([node for _, node in trace.hits], ids[0])
    np.testing.assert_allclose([distance for distance, _ in trace.hits], distances[0], rtol=1e-5)
    assert [step.layer for step in trace.steps] == sorted((step.layer for step in trace.steps), reverse=True)
    assert trace.steps[0].node == index.graph.entry
    assert sum(step.layer == 0 for step in trace.steps) >= 30
    assert hnsw.distances_per_query(index, query[None], 5, ef=30) == sum(trace.counted)
    for layer, (nodes, links) in enumerate(trace.layers):
        np.testing.assert_array_equal(nodes, np.flatnonzero(index.graph.levels >= layer))
        assert np.isin(links, nodes).all()
        assert (links[:, 0] < links[:, 1]).all()
        way = [((index.graph.vectors[node] - query) ** 2).sum() for node in trace.path(layer)]
        assert way == sorted(way, reverse=True)
    assert trace.places.shape == (MANY, 2)
    assert trace.query.shape == (2,)
    assert np.var(trace.places[:, 0]) >= np.var(trace.places[:, 1]) > 0
    assert f"layer {index.graph.top}: " in str(trace)
    assert str(ids[0, 0]) in str(trace).splitlines()[-1]


def test_a_search_computes_few_distances(index):
    queries = manifold(1, 20)
    few, more = (hnsw.distances_per_query(index, queries, 5, ef=ef) for ef in (10, 60))
    assert 10 < few < more < 0.7 * MANY


def test_trace_refuses_what_it_cannot_search(HNSW):
    with pytest.raises(ValueError, match="holds no vectors"):
        hnsw.trace(HNSW(), np.zeros(3))
    one = HNSW().fit(np.ones((1, 1)))
    assert hnsw.trace(one, np.zeros(1)).hits == ((1.0, 0),)
    with pytest.raises(ValueError, match="dimension 1"):
        hnsw.trace(one, np.zeros(3))
    with pytest.raises(ValueError, match="one at least"):
        hnsw.distances_per_query(one, np.zeros((0, 1)))
