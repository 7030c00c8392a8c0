"""`mlsys.retrieval.late_interaction`: MaxSim against two loops, adding, candidates, files; compiled or not, the same.

Every test runs on `late_interaction` and on `late_interaction_numba`.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys.contracts.core import check
from mlsys.contracts.retrieval import CONTRACTS
from mlsys.retrieval import _index_file, _memory, late_interaction, late_interaction_numba

CONTRACT = CONTRACTS["late_interaction"]


@pytest.fixture(scope="module", params=[late_interaction, late_interaction_numba], name="Index")
def implementation(request):
    return request.param.LateInteraction


def texts(seed, lengths, dim=4):
    """Whole numbers, whose sums are exact: what is right is right to the last bit."""
    rng = np.random.default_rng(seed)
    return [rng.integers(-3, 4, (length, dim)).astype(np.float32) for length in lengths]


def brute(documents, queries, k):
    scores, ids = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
    for row, query in enumerate(queries):
        if len(query):
            found = [(-(query @ x.T).max(axis=1).sum(), i) for i, x in enumerate(documents) if len(x)]
            for rank, (score, i) in enumerate(sorted(found)[:k]):
                scores[row, rank], ids[row, rank] = -score, i
    return scores, ids


def same(got, want):
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])


lengths = st.lists(st.integers(0, 7), min_size=1, max_size=12)


@settings(max_examples=100)
@given(documents=lengths, queries=lengths, k=st.integers(1, 15), seed=st.integers(0, 99), data=st.data())
def test_is_brute_force(Index, documents, queries, k, seed, data):
    """Whatever the sizes of blocks and batches."""
    documents, queries = texts(seed, documents), texts(seed + 100, queries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(late_interaction, "BLOCK", data.draw(st.sampled_from([1, 5, 1024])))
        patch.setattr(late_interaction, "BATCH", data.draw(st.sampled_from([1, 4, 512])))
        got = Index().fit(documents).search(queries, k)
    same(got, brute(documents, queries, k))
    assert (got[0].dtype, got[1].dtype) == (np.float32, np.int64)


@settings(max_examples=50)
@given(parts=st.lists(lengths, min_size=1, max_size=4), seed=st.integers(0, 99))
def test_adding_is_fitting_all(Index, parts, seed):
    parts = [texts(seed + i, part) for i, part in enumerate(parts)]
    index = Index()
    for part in parts:
        assert index.add(part) is index
    whole = Index().fit([text for part in parts for text in part])
    assert len(index) == len(whole) == sum(map(len, parts))
    np.testing.assert_array_equal(index.tokens_, whole.tokens_)
    np.testing.assert_array_equal(index.starts_, whole.starts_)


def test_adding_one_by_one_copies_the_tokens_now_and_then(Index):
    index, copies = Index().fit(texts(0, [4])), 0
    for text in texts(1, [4] * 200):
        before = index.tokens_
        copies += not np.shares_memory(before, index.add([text]).tokens_)
    assert copies < 20


def test_an_interrupted_add_is_as_none(Index, monkeypatch):
    index, append = Index().fit(texts(0, [3, 2])), _memory.Growing.append

    def interrupted(self, more):
        if more.ndim == 1:  # the tokens are there, their starts are not
            raise KeyboardInterrupt
        append(self, more)

    monkeypatch.setattr(_memory.Growing, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        index.add(texts(1, [4]))
    monkeypatch.undo()
    same(index.search(texts(2, [3]), 2), Index().fit(texts(0, [3, 2])).search(texts(2, [3]), 2))
    index.add(texts(3, [1]))
    np.testing.assert_array_equal(index.tokens_, np.concatenate(texts(0, [3, 2]) + texts(3, [1])))


def test_packed_is_the_list(Index):
    documents = texts(0, [3, 0, 5, 2])
    packed = Index().fit(np.concatenate(documents), lengths=[3, 0, 5, 2])
    np.testing.assert_array_equal(packed.tokens_, Index().fit(documents).tokens_)
    np.testing.assert_array_equal(packed.starts_, [0, 3, 3, 8, 10])
    packed.add(np.concatenate(documents), [3, 0, 5, 2])
    same(packed.search(documents[:1], 3), Index().fit(documents * 2).search(documents[:1], 3))


def test_what_the_caller_changes_later_does_not_change_the_index(Index):
    documents = texts(0, [3, 5])
    packed = np.concatenate(documents)
    for index in (Index().fit(documents[:1]), Index().fit(packed, [3, 5])):
        before = index.search(documents, 1)
        kept = [documents[0].copy(), packed.copy()]
        documents[0][:], packed[:] = 99, 99
        documents[0][:], index_after = kept[0], index.search([kept[0], documents[1]], 1)
        packed[:] = kept[1]
        same(index_after, before)


@settings(max_examples=50)
@given(seed=st.integers(0, 99), data=st.data())
def test_candidates_are_ordered_anew(Index, seed, data):
    documents, queries = texts(seed, [3, 0, 5, 2, 1, 4, 4]), texts(seed + 1, [2, 0, 3])
    rows = [data.draw(st.lists(st.integers(-1, 6), min_size=4, max_size=4)) for _ in queries]
    scores, ids = Index().fit(documents).search(queries, 5, candidates=np.array(rows))
    for row, query in enumerate(queries):
        own = [x if i in rows[row] else x[:0] for i, x in enumerate(documents)]
        same((scores[row : row + 1], ids[row : row + 1]), brute(own, [query], 5))


def test_cosine_is_the_inner_product_of_directions(Index):
    documents, queries = texts(0, [3, 5, 2]), texts(1, [4, 2])
    for text in documents + queries:
        text[:, 0] += 10  # no zero vector
    directions = [[x / np.linalg.norm(x, axis=1, keepdims=True) for x in part] for part in (documents, queries)]
    got = Index(metric="cosine").fit(documents).search(queries, 3)
    want = Index().fit(directions[0]).search(directions[1], 3)
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    assert got[0].max() <= 4 + 1e-5
    large = Index(metric="cosine").fit([1e30 * x for x in documents]).search(queries, 3)
    np.testing.assert_allclose(large[0], got[0], rtol=1e-6)


def test_nothing_to_ask_or_to_find(Index):
    index = Index().fit(texts(0, [2, 3]))
    assert [part.shape for part in index.search([], 3)] == [(0, 3), (0, 3)]
    scores, ids = Index().fit(texts(0, [0, 0])).search(texts(0, [2]), 2)
    assert ids.tolist() == [[-1, -1]]
    assert np.isneginf(scores).all()


def test_save_and_load(Index, tmp_path):
    documents, queries = texts(0, [3, 0, 5, 2]), texts(1, [4, 2])
    index = Index().fit(documents)
    index.save(tmp_path)
    for kind in (late_interaction, late_interaction_numba):
        same(kind.LateInteraction.load(tmp_path).search(queries, 4), index.search(queries, 4))
    index.add(documents).save(tmp_path)
    loaded = Index.load(tmp_path).add(documents)
    assert len(loaded) == 12
    for text in documents:
        text[:, 0] += 9
    cosine = Index(metric="cosine").fit(documents)
    cosine.save(tmp_path)
    same(Index.load(tmp_path).search(queries[:1], 4), cosine.search(queries[:1], 4))


@pytest.mark.parametrize(
    ("settings_", "arrays", "message"),
    [
        ({"metric": "l2"}, {}, "metric must be one of"),
        ({}, {"starts": np.array([0, 3, 2, 10])}, "do not fit together"),
        ({}, {"starts": np.array([0, 3, 11])}, "do not fit together"),
        ({}, {"starts": np.array([1, 3, 10])}, "do not fit together"),
        ({}, {"starts": np.array([0.0, 10.0])}, "starts is float64"),
        ({}, {"tokens": np.full((10, 4), np.nan, np.float32)}, "NaN"),
        ({}, {"tokens": np.full((10, 4), -1e16, np.float32)}, "beyond"),
        ({}, {"tokens": np.zeros(10, np.float32)}, "tokens is float32"),
    ],
)
def test_files_that_make_no_index_are_refused(Index, tmp_path, settings_, arrays, message):
    good = {"tokens": np.zeros((10, 4), np.float32), "starts": np.array([0, 3, 10])}
    _index_file.write(tmp_path, late_interaction.FORMAT, {"metric": "ip", **settings_}, {**good, **arrays})
    with pytest.raises(_index_file.IndexFileError, match=message):
        Index.load(tmp_path)


@pytest.mark.parametrize(
    ("documents", "lengths", "error", "message"),
    [
        ([], None, ValueError, "documents is empty"),
        (np.zeros((3, 2)), None, TypeError, r"documents is one array \(3, 2\): give their lengths"),
        ([np.zeros(3)], None, ValueError, r"documents\[0\] must be token vectors \(n_tokens, d\)"),
        ([np.zeros((2, 3)), np.zeros((2, 4))], None, ValueError, "one dimension, got 3, 4"),
        ([np.zeros((2, 0))], None, ValueError, "d ≥ 1"),
        ([np.array([["a"]])], None, TypeError, "must hold numbers"),
        (
            [np.zeros((2, 3)), np.array([[0, 0, 0], [0, np.nan, 0]])],
            None,
            ValueError,
            r"documents\[1\], token 1, holds",
        ),
        ([np.full((1, 2), 1e300)], None, ValueError, "infinity"),
        (
            [np.eye(4), np.array([[0, 0, 0, 1], [0, -2e19, 0, 0]])],  # its product with itself is infinite
            None,
            ValueError,
            r"documents\[1\], token 1, holds NaN, infinity or a number beyond 1e\+15; 1 in all",
        ),
        (np.zeros((3, 2)), [1, 1], ValueError, "add up to 3"),
        (np.zeros((3, 2)), [4, -1], ValueError, "lengths must be whole numbers"),
        (np.zeros((3, 2)), [1.5, 1.5], ValueError, "lengths must be whole numbers"),
    ],
)
def test_bad_documents_leave_the_index(Index, documents, lengths, error, message):
    index = Index().fit(texts(0, [2, 3]))
    before = index.search(texts(1, [2]), 2)
    with pytest.raises(error, match=message):
        index.fit(documents, lengths)
    same(index.search(texts(1, [2]), 2), before)


@pytest.mark.parametrize(
    ("queries", "options", "error", "message"),
    [
        ([np.zeros((2, 3))], {}, ValueError, r"queries\[0\] must have dimension 4, as the tokens in the index, got 3"),
        (np.zeros((2, 4)), {}, TypeError, "queries is one array"),
        ([np.full((1, 4), 1e16)], {}, ValueError, r"queries\[0\], token 0, holds .* beyond 1e\+15"),
        (texts(0, [2]), {"k": 0}, ValueError, "k must be at least 1"),
        (texts(0, [2]), {"candidates": [[2]]}, ValueError, "candidates must be from 0 to 1"),
        (texts(0, [2]), {"candidates": [[-2]]}, ValueError, "candidates must be from 0 to 1"),
        (texts(0, [2]), {"candidates": [[0], [1]]}, ValueError, "a row for each query"),
        (texts(0, [2]), {"candidates": [[0.0]]}, ValueError, "candidates must be ids"),
    ],
)
def test_bad_queries(Index, queries, options, error, message):
    with pytest.raises(error, match=message):
        Index().fit(texts(0, [2, 3])).search(queries, **options)


def test_zero_vectors_have_no_cosine(Index):
    with pytest.raises(ValueError, match=r"documents\[1\], token 0, is a zero vector"):
        Index(metric="cosine").fit([np.ones((2, 2)), np.zeros((1, 2))])
    with pytest.raises(ValueError, match="metric must be one of ip, cosine; got 'l2'"):
        Index(metric="l2")
    for use in (lambda i: i.search([np.ones((1, 2))]), lambda i: i.save("nowhere")):
        with pytest.raises(ValueError, match="call fit"):
            use(Index())
    assert len(Index()) == 0


def test_compiled_and_readable_agree_on_real_numbers():
    rng = np.random.default_rng(0)
    documents = [rng.normal(size=(n, 24)).astype(np.float32) for n in rng.integers(0, 90, 200)]
    queries = [rng.normal(size=(n, 24)).astype(np.float32) for n in rng.integers(0, 40, 60)]
    one, other = (kind.LateInteraction().fit(documents) for kind in (late_interaction, late_interaction_numba))
    same(one.search(queries, 10), other.search(queries, 10))


@pytest.mark.parametrize("name", sorted(CONTRACT.wrong))
def test_contract_rejects_and_names_the_wrong_variant(name):
    verdict = check(CONTRACT, CONTRACT.wrong[name].impl, seed=1)
    assert not verdict.passed
    assert verdict.failure.like == name
