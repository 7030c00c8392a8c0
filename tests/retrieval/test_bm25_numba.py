"""`mlsys.retrieval.bm25_numba` passes every test of `bm25`, and ranks exactly as it does."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys.retrieval import bm25, bm25_numba
from mlsys.retrieval.bm25 import VARIANTS

_spec = importlib.util.spec_from_file_location("tests_of_bm25", Path(__file__).with_name("test_bm25.py"))
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)
globals().update({name: value for name, value in vars(_shared).items() if name.startswith("test_")})
del globals()["test_killed_between_the_two_files"]  # about the files alone


@pytest.fixture(scope="module", name="BM25")
def implementation():
    return bm25_numba.BM25


def both(variant, corpus):
    return bm25.BM25(variant=variant).fit(corpus), bm25_numba.BM25(variant=variant).fit(corpus)


def zipf_corpus(seed, n, longest=30):
    rng = np.random.default_rng(seed)
    return [[f"w{i}" for i in rng.zipf(1.2, rng.integers(0, longest)) if i < 300] for _ in range(n)]


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("n", [1, 15, 16, 17, 500])
def test_equals_numpy_bit_for_bit(variant, n):
    corpus = zipf_corpus(n, n)
    if not any(corpus):
        corpus[0] = ["w1"]
    queries = [document[:6] for document in zipf_corpus(1, 30)]
    plain, fast = both(variant, corpus)
    np.testing.assert_array_equal(plain.indptr_, fast.indptr_)
    np.testing.assert_array_equal(plain.indices_, fast.indices_)
    np.testing.assert_array_equal(plain.impacts_, fast.impacts_)
    for k in {1, min(n, 10), n}:
        for a, b in zip(plain.search(queries, k), fast.search(queries, k), strict=True):
            np.testing.assert_array_equal(a, b)


@settings(max_examples=60)
@given(
    corpus=st.lists(st.lists(st.sampled_from("abcde"), max_size=6), min_size=1, max_size=40),
    queries=st.lists(st.lists(st.sampled_from("abcdef"), max_size=5), max_size=4),
    variant=st.sampled_from(["lucene", "okapi"]),
    data=st.data(),
)
def test_equals_numpy_with_many_ties(corpus, queries, variant, data):
    k = data.draw(st.integers(1, len(corpus)))
    plain, fast = both(variant, corpus)
    for a, b in zip(plain.search(queries, k), fast.search(queries, k), strict=True):
        np.testing.assert_array_equal(a, b)


def test_frequent_and_rare_terms_take_both_ways():
    index = bm25_numba.BM25().fit(zipf_corpus(0, 500))
    dense = index._columns().row_of >= 0
    assert dense.any()
    assert not dense.all()
    frequency = np.diff(index.indptr_)
    assert frequency[dense].min() > 500 / bm25_numba.DENSE_FROM >= frequency[~dense].max()


def test_index_files_are_interchangeable(tmp_path):
    plain, fast = both("lucene", zipf_corpus(0, 100))
    plain.save(tmp_path / "a")
    fast.save(tmp_path / "b")
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()
    }
    for a, b in zip(
        bm25_numba.BM25.load(tmp_path / "a").search([["w1", "w9"]], 50), plain.search([["w1", "w9"]], 50), strict=True
    ):
        np.testing.assert_array_equal(a, b)
