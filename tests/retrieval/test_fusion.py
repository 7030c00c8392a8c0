"""`mlsys.retrieval.fusion`: the formula, ties, padding, and what is no ranking."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys.contracts.core import check
from mlsys.contracts.retrieval import CONTRACTS
from mlsys.retrieval import fusion
from mlsys.retrieval.fusion import reciprocal_rank

CONTRACT = CONTRACTS["fusion"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", sorted(CONTRACT.wrong))
def test_contract_rejects_and_names_the_wrong_variant(name, seed):
    verdict = check(CONTRACT, CONTRACT.wrong[name].impl, seed=seed)
    assert not verdict.passed
    assert verdict.failure.like == name


@pytest.mark.parametrize("seed", range(3))
def test_contract_accepts_the_reference(seed):
    assert check(CONTRACT, fusion.reciprocal_rank, seed=seed).passed


def test_by_hand():
    scores, ids = reciprocal_rank([np.array([[7, 3, 5]]), np.array([[3, 9, -1]])], k=5)
    assert ids.tolist() == [[3, 7, 9, 5, -1]]
    np.testing.assert_allclose(scores, [[1 / 61 + 1 / 62, 1 / 61, 1 / 62, 1 / 63, 0]], rtol=1e-6)
    assert (scores.dtype, ids.dtype) == (np.float32, np.int64)


def test_weights_and_constant():
    rankings = [np.array([[1, 2]]), np.array([[2, 3]])]
    scores, ids = reciprocal_rank(rankings, 3, constant=1, weights=[4, 1])
    assert ids.tolist() == [[1, 2, 3]]
    np.testing.assert_allclose(scores, [[4 / 2, 4 / 3 + 1 / 2, 1 / 3]], rtol=1e-6)
    like_numpy = reciprocal_rank(rankings, 3, constant=np.int64(1), weights=np.array([4, 1], np.float32))
    np.testing.assert_array_equal(like_numpy, (scores, ids))
    assert reciprocal_rank(rankings, 2, weights=[0, 1])[1].tolist() == [[2, 3]]
    assert reciprocal_rank(rankings, 1, weights=[0, 0])[1].tolist() == [[-1]]


rows = st.lists(st.integers(0, 12), max_size=8, unique=True)


@settings(max_examples=100)
@given(data=st.data(), n=st.integers(1, 4), k=st.integers(1, 15))
def test_is_the_formula_whatever_is_padded(data, n, k):
    rankings = []
    for _ in range(data.draw(st.integers(1, 4))):
        drawn = [data.draw(rows) for _ in range(n)]
        rankings.append(np.array([row + [-1] * (8 - len(row)) for row in drawn]).reshape(n, 8))
    scores, ids = reciprocal_rank(rankings, k)
    for query in range(n):
        ranks = {}
        for ranking in rankings:
            for rank, i in enumerate(ranking[query].tolist(), 1):
                if i >= 0:
                    ranks.setdefault(i, []).append(rank)
        want = {i: float(sum(sorted(1 / (60 + rank) for rank in own))) for i, own in ranks.items()}
        order = sorted(want, key=lambda i: (-want[i], i))[:k]
        assert ids[query].tolist() == order + [-1] * (k - len(order))
        np.testing.assert_allclose(scores[query, : len(order)], [want[i] for i in order], rtol=1e-6)
        assert not scores[query, len(order) :].any()


@settings(max_examples=50)
@given(ranks=st.lists(st.integers(1, 40), min_size=3, max_size=6, unique=True))
def test_same_ranks_in_other_rankings_tie(ranks):
    """Sums of floats depend on their order; what ties in fractions must tie here."""
    rankings = [np.full((1, 41), -1) for _ in ranks]
    for i, (a, b) in enumerate(zip(ranks, ranks[::-1], strict=True)):
        rankings[i][0, a - 1] = 5
        if b != a:
            rankings[i][0, b - 1] = 3
        else:  # the same place cannot hold both: leave it to one ranking more
            other = np.full((1, 41), -1)
            other[0, b - 1] = 3
            rankings.append(other)
    scores, ids = reciprocal_rank(rankings, 2)
    assert ids.tolist() == [[3, 5]]
    assert scores[0, 0] == scores[0, 1]


def test_no_queries():
    scores, ids = reciprocal_rank([np.empty((0, 3), np.int64), np.empty((0, 5), np.int64)], 2)
    assert scores.shape == ids.shape == (0, 2)


@pytest.mark.parametrize(
    ("rankings", "options", "error", "message"),
    [
        ([], {}, ValueError, "at least one"),
        (np.zeros((2, 1, 3), np.int64), {}, ValueError, "a list of at least one array"),
        ([[1, 2]], {}, ValueError, r"rankings\[0\] must be ids, integers"),
        ([[[0.5]]], {}, ValueError, "float64"),
        ([[[1]], [[1], [2]]], {}, ValueError, r"rankings\[0\] has 1, rankings\[1\] 2"),
        ([[[1, 2]], [[4, 3, 4]]], {}, ValueError, r"rankings\[1\]\[0\] holds id 4 twice"),
        ([[[1, -2]]], {}, ValueError, "holds the id -2"),
        ([[[1]]], {"k": 0}, ValueError, "k must be at least 1"),
        ([[[1]]], {"k": 1.0}, TypeError, "k must be a whole number"),
        ([[[1]]], {"constant": -1}, ValueError, "constant must be above -1"),
        ([[[1]]], {"constant": float("nan")}, ValueError, "constant"),
        ([[[1]]], {"constant": "60"}, TypeError, "constant must be a number"),
        ([[[1]]], {"constant": np.bool_(True)}, TypeError, "constant must be a number"),
        ([[[1]], [[1]]], {"weights": "11"}, TypeError, r"weights\[0\] must be a number, got '1'"),
        ([[[1]]], {"weights": [True]}, TypeError, r"weights\[0\] must be a number, got True"),
        ([[[1]]], {"weights": [1, 2]}, ValueError, "weights must be 1 finite"),
        ([[[1]]], {"weights": [-1]}, ValueError, "at least 0"),
    ],
)
def test_bad_input(rankings, options, error, message):
    with pytest.raises(error, match=message):
        reciprocal_rank(rankings, **options)
