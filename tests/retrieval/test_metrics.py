"""`mlsys.retrieval.metrics` on rankings small enough to count by hand."""

import numpy as np
import pytest

from mlsys.retrieval.metrics import mrr, recall

IDS = np.array([[3, 1, 2], [5, 4, -1], [7, 8, 9]])


def test_known_items():
    assert recall(IDS, [1, 5, 0], 3) == pytest.approx(2 / 3)
    assert recall(IDS, [1, 5, 0], 1) == pytest.approx(1 / 3)
    assert mrr(IDS, [1, 5, 0], 3) == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert mrr(IDS, [1, 5, 0], 1) == pytest.approx(1 / 3)


def test_several_relevant():
    assert recall(IDS, [{1, 2}, [4, 6], (9,)], 3) == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert mrr(IDS, [{1, 2}, [4, 6], (9,)], 3) == pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 3)


def test_ids_from_numpy_count():
    assert recall(IDS, np.array([1, 5, 0]), 3) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("ids", "relevant", "k", "message"),
    [
        (IDS, [1, 2], 3, "2 for 3 queries"),
        (IDS, [1, 2, 3], 4, "between 1 and 3"),
        (IDS, [1, 2, 3], 0, "got 0"),
        (IDS, [1, -1, 3], 3, r"relevant\[1\]"),
        (IDS, [1, [], 3], 3, r"relevant\[1\] must hold at least one"),
        (IDS.astype(float), [1, 2, 3], 3, "float64"),
        (IDS[0], [1], 1, "shape"),
    ],
)
def test_bad_input(ids, relevant, k, message):
    with pytest.raises(ValueError, match=message):
        mrr(ids, relevant, k)
