"""The BM25 contract accepts both references, and rejects and names every wrong variant."""

import math
import os
import re
import subprocess
import sys
import zlib
from collections import Counter

import numpy as np
import pytest
from rank_bm25 import BM25Okapi

from mlsys.contracts.core import check
from mlsys.contracts.retrieval import CASES, CONTRACTS, CORPORA, Plain, inputs
from mlsys.retrieval.bm25 import BM25

CONTRACT = CONTRACTS["bm25"]


@pytest.mark.parametrize("name", sorted(CONTRACTS))
@pytest.mark.parametrize("seed", range(3))
def test_accepts_the_reference(name, seed):
    verdict = check(CONTRACTS[name], CONTRACTS[name].reference, seed=seed)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", sorted(CONTRACT.wrong))
def test_rejects_and_names_the_wrong_variant(name, seed):
    verdict = check(CONTRACT, CONTRACT.wrong[name].impl, seed=seed)
    assert not verdict.passed
    assert verdict.failure.like == name
    assert verdict.failure.hint == CONTRACT.wrong[name].hint


def test_the_oracle_is_rank_bm25_and_the_formula():
    """The oracle is not taken from the reference, so it needs a witness of its own."""
    for case in CASES:
        drawn = inputs(case, 0, "cpu")
        plain = Plain(drawn["variant"], drawn["k1"], drawn["b"]).fit(drawn["documents"])
        for query in drawn["queries"]:
            got = [plain.score(query, document) for document in range(len(drawn["documents"]))]
            if drawn["variant"] == "okapi":
                want = BM25Okapi(drawn["documents"], k1=drawn["k1"], b=drawn["b"]).get_scores(query)
                np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
    one = Plain("lucene", 1.2, 0.5).fit([["a", "a", "b"], ["b"]])
    assert one.score(["a"], 0) == pytest.approx(math.log(2) * 2 / (2 + 1.2 * (0.5 + 0.5 * 1.5)))


def test_inputs_are_the_same_for_the_same_seed():
    for case in CASES:
        assert inputs(case, 3, "cpu") == inputs(case, 3, "cpu")
        assert case["k"] <= len(inputs(case, 3, "cpu")["documents"])
    assert {case["corpus"] for case in CASES} == set(CORPORA)


def test_inputs_are_the_same_in_another_process():
    """The order of a set of words differs from process to process."""
    code = """
from mlsys.contracts.retrieval import CASES, inputs
print([inputs(case, 0, "cpu") for case in CASES])
"""
    said = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert said[0] == said[1]


class Swapped(BM25):
    def search(self, queries, k=10):
        return super().search(queries, k)[::-1]


class Short(BM25):
    def search(self, queries, k=10):
        scores, ids = super().search(queries, k)
        return scores[:, :-1], ids[:, :-1]


class Alone(BM25):
    def search(self, queries, k=10):
        return super().search(queries, k)[1]


class Greedy(BM25):
    """Consumes its input."""

    def fit(self, documents):
        super().fit(documents)
        documents.clear()
        return self


class Twice(BM25):
    """Returns the best document for every rank whose score is near: the same one twice."""

    def search(self, queries, k=10):
        scores, ids = super().search(queries, k)
        same = np.isclose(scores[:, 1:], scores[:, :-1], rtol=1e-6) & (ids[:, 1:] >= 0)
        ids[:, 1:][same] = ids[:, :-1][same]
        return scores, ids


class Hashed(BM25):
    """Tells words apart by a hash of 12 bits."""

    def hashed(self, texts):
        return [[str(zlib.crc32(word.encode()) % 4096) for word in text] for text in texts]

    def fit(self, documents):
        return super().fit(self.hashed(documents))

    def search(self, queries, k=10):
        return super().search(self.hashed(queries), k)


class Capped(BM25):
    """Counts to `most`; what is more becomes another word, so that lengths are right."""

    most = 19

    def fit(self, documents):
        kept = []
        for document in documents:
            count = Counter()
            kept.append([])
            for word in document:
                count[word] += 1
                kept[-1].append(word if count[word] <= self.most else "another")
        return super().fit(kept)


class CappedByte(Capped):
    most = 255


class UnsignedByte(BM25):
    def search(self, queries, k=10):
        scores, ids = super().search(queries, k)
        return scores, np.where(ids < 0, ids, ids.astype(np.uint8))


class SettingsShared(BM25):
    """The settings of the index that was made last are those of all."""

    latest: dict = {}  # noqa: RUF012

    def __init__(self, **options):
        super().__init__(**options)
        self.latest.update(options)

    def fit(self, documents):
        vars(self).update(self.latest)
        return super().fit(documents)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("impl", "named"),
    [
        (Hashed, "many documents and words"),
        (Capped, "many documents and words"),
        (CappedByte, "many documents and words"),
        (UnsignedByte, "many documents and words"),
        (SettingsShared, "two indexes"),
    ],
)
def test_rejects_what_only_a_larger_corpus_or_a_second_use_shows(impl, named, seed):
    verdict = check(CONTRACT, impl, seed=seed)
    assert not verdict.passed
    assert named in verdict.failure.case.values()


class Ragged(BM25):
    """Rows as long as there are hits."""

    def search(self, queries, k=10):
        scores, ids = super().search(queries, k)
        return [s[i >= 0] for s, i in zip(scores, ids, strict=True)], [i[i >= 0] for i in ids]


class Extends(BM25):
    """Keeps the caller's list of documents, and adds to it."""

    def fit(self, documents):
        self.kept = documents
        return super().fit(documents)

    def add(self, documents):
        self.kept += documents
        return super().fit(self.kept)


@pytest.mark.parametrize(
    ("impl", "message"),
    [
        (Swapped, r"the order is \(scores, ids\)"),
        (Short, "shape"),
        (Alone, r"expected the tuple \(scores, ids\)"),
        (Greedy, "modified its argument documents"),
        (Twice, "is returned 2 times|comes first"),
        (Ragged, "rows of scores differ in length: fill up with id -1 and score 0"),
        (Extends, "changed a list of documents"),
        (lambda **_: None, "AttributeError"),
    ],
)
def test_rejects_what_is_no_index(impl, message):
    verdict = check(CONTRACT, impl)
    assert not verdict.passed
    assert re.search(message, str(verdict.failure)), str(verdict)


def test_near_ties_may_stand_either_way():
    """Float32 cannot tell scores apart that differ in the ninth digit, and need not."""

    class Swaps(BM25):
        def search(self, queries, k=10):
            scores, ids = super().search(queries, k)
            for row in range(len(ids)):
                for rank in range(k - 1):
                    a, b = ids[row, rank : rank + 2]
                    if a >= 0 <= b and 0 < abs(scores[row, rank] - scores[row, rank + 1]) < 1e-6:
                        ids[row, [rank, rank + 1]] = b, a
            return scores, ids

    assert check(CONTRACT, Swaps).passed
