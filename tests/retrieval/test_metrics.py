"""`mlsys.retrieval.metrics`: trec_eval's own figures, the formulas by hand, and input that cannot be measured."""

import math

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys.retrieval import metrics
from mlsys.retrieval.metrics import (
    dcg,
    evaluate,
    evaluate_run,
    in_trec_order,
    mean_average_precision,
    mrr,
    ndcg,
    precision,
    recall,
)

IDS = np.array([[4, 1, 2], [5, 0, 3], [7, 8, 9]])
TREC = {"recall": "recall", "precision": "P", "map": "map_cut", "ndcg": "ndcg_cut"}
CUTS = (1, 3, 5, 10)


def test_by_hand():
    assert recall(IDS, [1, 5, 0], 3) == pytest.approx(2 / 3)
    assert recall(IDS, [1, 5, 0], 1) == pytest.approx(1 / 3)
    assert mrr(IDS, [1, 5, 0], 3) == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert mrr(IDS, [1, 5, 0], 1) == pytest.approx(1 / 3)


def test_several_relevant():
    several = [{1, 2}, [4, 6], (9,)]
    ids = np.array([[4, 1, 2], [5, 4, 3], [7, 8, 9]])
    assert recall(ids, several, 3) == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert precision(ids, several, 3) == pytest.approx((2 / 3 + 1 / 3 + 1 / 3) / 3)
    assert mrr(ids, several, 3) == pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 3)
    assert mean_average_precision(ids, several, 3) == pytest.approx(((1 / 2 + 2 / 3) / 2 + (1 / 2) / 2 + 1 / 3) / 3)


def test_ndcg_by_hand():
    got = ndcg(np.array([[3, 9, 1]]), [{1: 3, 2: 2, 3: 1}], 3)
    assert got == pytest.approx((1 + 0 + 3 / 2) / (3 + 2 / math.log2(3) + 1 / 2))
    assert dcg([3, 2, 3], 2) == pytest.approx(3 + 2 / math.log2(3))
    assert dcg([], 5) == 0


def test_ids_from_numpy_count():
    assert recall(IDS, np.array([1, 5, 0]), 3) == pytest.approx(2 / 3)
    assert recall(IDS, [np.array([1]), {np.int64(5): np.int64(2)}, [0]], 3) == pytest.approx(2 / 3)


def test_a_query_without_anything_relevant_scores_zero_and_counts():
    assert evaluate(IDS[:2], [1, {}], 2) == {name: value / 2 for name, value in evaluate(IDS[:1], [1], 2).items()}
    assert set(evaluate(IDS[:1], [{4: 0, 1: -1}], 3).values()) == {0.0}


def test_below_zero_is_not_relevant():
    assert evaluate(IDS[:1], [{4: -2, 1: 3, 9: -1}], 3) == evaluate(IDS[:1], [{1: 3}], 3)


def test_evaluate_is_all_five():
    got = evaluate(IDS, [{1: 2, 2: 1}, [4, 5], 9], 3)
    assert list(got) == list(metrics.MEASURES)
    for name, alone in zip(got, (recall, precision, mrr, mean_average_precision, ndcg), strict=True):
        assert got[name] == alone(IDS, [{1: 2, 2: 1}, [4, 5], 9], 3)


# --- trec_eval --------------------------------------------------------------------------------------------------------

documents = st.sampled_from([f"d{i}" for i in range(14)])
scores = st.sampled_from([0.5, 1.0, 1.0 + 1e-9, 2.0, -3.0, 1e10])  # few, so that many tie
runs = st.dictionaries(documents, scores, max_size=14)
# none below 0: of them trec_eval 9 makes an index of an array, and crashes; see `test_below_zero_is_not_relevant`
judged = st.dictionaries(documents, st.integers(0, 4), min_size=1, max_size=10)
queries = st.sampled_from(["q1", "q2", "q3", "q4"])


def theirs(run, judgements):
    """The figures of each judged query; pytrec_eval leaves out one that the run lacks, which counts 0 with -c."""
    names = {f"{measure}.{k}" for measure in TREC.values() for k in CUTS} | {"map", "recip_rank", "ndcg"}
    found = pytrec_eval.RelevanceEvaluator(judgements, names).evaluate(run)
    return {query: found.get(query, {}) for query in judgements}


@settings(max_examples=300)
@given(
    run=st.dictionaries(queries, runs, max_size=4), judgements=st.dictionaries(queries, judged, min_size=1, max_size=4)
)
def test_figures_are_those_of_trec_eval(run, judgements):
    want = theirs(run, judgements)
    measures = [f"{ours}@{k}" for ours in TREC for k in CUTS] + ["map", "mrr", "ndcg"]
    got = evaluate_run(run, judgements, measures)
    for measure in measures:
        name, _, k = measure.partition("@")
        key = f"{TREC[name]}_{k}" if k else {"map": "map", "mrr": "recip_rank", "ndcg": "ndcg"}[name]
        mean = sum(want[query].get(key, 0.0) for query in want) / len(want)
        assert got[measure] == pytest.approx(mean, abs=1e-9), measure


@settings(max_examples=200)
@given(run=st.dictionaries(queries, runs, min_size=1, max_size=4), data=st.data())
def test_arrays_of_ids_give_the_same(run, data):
    """In the order of trec_eval, with -1 where a query has fewer."""
    judgements = {query: data.draw(judged) for query in run}
    ids = np.full((len(run), 14), -1)
    for row, query in enumerate(run):
        order = in_trec_order(run[query])
        ids[row, : len(order)] = [int(document[1:]) for document in order]
    relevant = [{int(document[1:]): grade for document, grade in judgements[query].items()} for query in run]
    for k in CUTS:
        want = evaluate_run(run, judgements, [f"{name}@{k}" for name in metrics.MEASURES])
        got = evaluate(ids, relevant, k)
        assert list(got.values()) == pytest.approx(list(want.values()), abs=1e-12)


def test_mrr_is_cut_at_k():
    run, judgements = {"q": {"a": 3.0, "b": 2.0, "c": 1.0}}, {"q": {"c": 1}}
    assert evaluate_run(run, judgements, ["mrr", "mrr@3", "mrr@2"]) == {"mrr": 1 / 3, "mrr@3": 1 / 3, "mrr@2": 0.0}


def test_order_of_ties():
    assert in_trec_order({"a": 1.0, "c": 1.0 + 1e-12, "b": 1.0, "d": 2.0}) == ["d", "c", "b", "a"]
    with pytest.raises(ValueError, match="NaN"):
        in_trec_order({"a": math.nan})


def test_queries_without_judgements_do_not_count_and_unanswered_ones_do():
    run = {"q1": {"a": 1.0}, "unjudged": {"a": 1.0}}
    assert evaluate_run(run, {"q1": {"a": 1}, "q2": {"a": 1}}, ["recall@1"]) == {"recall@1": 0.5}


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "relevant", "k", "message"),
    [
        (IDS, [1, 2], 3, "2 for 3 queries"),
        (IDS, [1, 2, 3], 4, "k must be at most 3, the number of ids a query has, got 4"),
        (IDS, [1, 2, 3], 0, "k must be at least 1, got 0"),
        (IDS, [1, -1, 3], 3, r"relevant\[1\] must hold no id below 0"),
        (IDS, [1, {-1: 2}, 3], 3, r"relevant\[1\] must hold no id below 0"),
        (IDS.astype(float), [1, 2, 3], 3, "float64"),
        (IDS[0], [1], 1, "shape"),
        (np.array([[1, 2, 1]]), [1], 3, r"ids\[0\] holds 1 twice"),
    ],
)
@pytest.mark.parametrize("measure", [mrr, evaluate])
def test_bad_input(measure, ids, relevant, k, message):
    with pytest.raises(ValueError, match=message):
        measure(ids, relevant, k)


@pytest.mark.parametrize("k", [1.0, True, "1", None])
def test_k_is_a_whole_number(k):
    for measure in (recall, evaluate, ndcg):
        with pytest.raises(TypeError, match="k must be a whole number"):
            measure(IDS, [1, 5, 0], k)
    with pytest.raises(TypeError, match="k must be a whole number"):
        dcg([3, 2], k)
    assert recall(IDS, [1, 5, 0], np.int64(3)) == recall(IDS, [1, 5, 0], 3)


def test_relevant_ids_are_whole_numbers():
    for entry in (1.0, "1", [1, None]):
        with pytest.raises(TypeError, match=r"relevant\[1\] must be an id, ids or grades by id, whole numbers"):
            recall(IDS, [1, entry, 0], 3)


def test_grades_are_whole_numbers():
    with pytest.raises(TypeError, match=r"relevant\[0\]: grades must be whole numbers, got \[0.5\]"):
        ndcg(IDS[:1], [{1: 0.5}], 3)
    with pytest.raises(TypeError, match=r"judgements\['q'\]: grades must be whole"):
        evaluate_run({}, {"q": {"a": "1"}})


@pytest.mark.parametrize("name", ["ndcg@0", "ndcg10", "nDCG@10", "", "f1", 3])
def test_unknown_measures(name):
    with pytest.raises(ValueError, match="known are recall, precision, mrr, map, ndcg"):
        evaluate_run({}, {"q": {"a": 1}}, [name])


def test_no_judgements():
    with pytest.raises(ValueError, match="judgements is empty"):
        evaluate_run({"q": {"a": 1.0}}, {})
