"""The HNSW contract accepts both references, and rejects and names every wrong variant."""

from types import SimpleNamespace

import numpy as np
import pytest

from mlsys.contracts._retrieval_hnsw import CASES, DATA, inputs, oracle
from mlsys.contracts.core import check
from mlsys.contracts.retrieval import CONTRACTS
from mlsys.retrieval import hnsw, hnsw_numba

CONTRACT = CONTRACTS["hnsw_numba"]


@pytest.mark.parametrize("seed", range(4))
def test_accepts_the_compiled_one(seed):
    verdict = check(CONTRACT, hnsw_numba.HNSW, seed=100 * seed)
    assert verdict.passed, str(verdict)


def test_accepts_the_readable_one():
    verdict = check(CONTRACTS["hnsw"], hnsw.HNSW)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("seed", [0, 50])
@pytest.mark.parametrize("name", sorted(CONTRACT.wrong))
def test_rejects_and_names_the_wrong_variant(name, seed):
    failure = check(CONTRACT, CONTRACT.wrong[name].impl, seed=seed).failure
    assert failure
    assert failure.like == name, str(failure)


class Bare:
    """`fit`, `search` and `graph`, and no more."""

    def __init__(self, **options):
        self.index = hnsw_numba.HNSW(**options)

    def fit(self, x):
        self.index.fit(x)

    def search(self, queries, k, ef):
        return self.index.search(queries, k, ef=ef)

    @property
    def graph(self):
        return self.index.graph


def test_what_an_object_has_not_is_not_missed():
    verdict = check(CONTRACTS["hnsw"], Bare)
    assert verdict.passed, str(verdict)


class Scan:
    """No graph: brute force."""

    def __init__(self, *, metric, M, ef_construction, seed):
        self.metric = metric

    def fit(self, x):
        self.x = x.copy()

    def search(self, queries, k, ef):
        drawn = {"x": self.x, "queries": queries, "others": self.x[:0], "gone": [], "k": k, "use": None}
        answer = oracle({**drawn, "allowed": np.ones(len(self.x), bool), "metric": self.metric})["answer"]
        return answer[..., 0], answer[..., 1].astype(int)


class NoNeighbors(Scan):
    graph = SimpleNamespace(levels=[0], entry=0)


class OtherLevels(Scan):
    graph = SimpleNamespace(levels=[0], entry=0, neighbors=lambda node, layer: [])


class Ragged(Scan):
    def search(self, queries, k, ef):
        distances, ids = super().search(queries, k, ef)
        short = [list(row) for row in distances]
        short[0].pop()
        return short, ids


class Swapped(Scan):
    def search(self, queries, k, ef):
        return super().search(queries, k, ef)[::-1]


class Alone(Scan):
    def search(self, queries, k, ef):
        return super().search(queries, k, ef)[1]


class Greedy(Scan):
    def fit(self, x):
        x += 1
        super().fit(x)


class Twice(Scan):
    def search(self, queries, k, ef):
        distances, ids = super().search(queries, k, ef)
        return distances[:, [0, 0, *range(1, k - 1)]], ids[:, [0, 0, *range(1, k - 1)]]


@pytest.mark.parametrize(
    ("impl", "message"),
    [
        (Swapped, r"the order is \(distances, ids\)"),
        (Alone, r"expected the tuple \(distances, ids\)"),
        (Greedy, "modified its argument x"),
        (Twice, "returned twice"),
        (lambda metric: None, "cannot be called as make"),
        (Scan, "the index has no `graph`: let it show `graph.levels`"),
        (NoNeighbors, "its `graph` has no `neighbors`"),
        (OtherLevels, "`graph.levels` has shape (1,), expected (600,)"),
        (Ragged, "differ in length: fill up with id −1 and distance ∞"),
    ],
)
def test_rejects_what_is_no_index(impl, message):
    failure = check(CONTRACTS["hnsw"], impl).failure
    assert message.replace("\\", "") in failure.message


def test_inputs_are_the_same_for_the_same_seed():
    for case in CASES:
        for a, b in zip(inputs(case, 3, "cpu").values(), inputs(case, 3, "cpu").values(), strict=True):
            np.testing.assert_array_equal(a, b)
    assert {case["data"] for case in CASES} == set(DATA)


def unlucky(**mistake):
    """The readable index with another way to draw levels, or to link: other random numbers than the wrong variants'."""

    class Mine(hnsw.HNSW):
        def __init__(self, *, metric, M, ef_construction, seed):
            super().__init__(metric, M, ef_construction, seed + 7, select=mistake.get("select", "heuristic"))

        def _levels(self, n):
            return mistake.get("levels", lambda levels: levels)(super()._levels(n))

        def search(self, queries, k, ef):
            return super().search(queries, k, ef=k if mistake.get("ef_is_k") else ef)

    return Mine


@pytest.mark.parametrize(
    ("mistake", "rule"),
    [
        ({"select": "nearest"}, "choose links by Algorithm 4"),
        ({"levels": lambda levels: 2 * levels}, "levels are ⌊−ln(u) / ln M⌋"),
        ({"ef_is_k": True}, "keep the ef best while searching"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_the_message_tells_the_rule_where_no_wrong_variant_has_the_same_numbers(mistake, rule, seed):
    failure = check(CONTRACTS["hnsw"], unlucky(**mistake), seed=seed).failure
    assert rule in failure.message, str(failure)
