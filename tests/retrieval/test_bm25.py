"""`mlsys.retrieval.bm25`: scores of the libraries it names, an order that is defined, an index that survives.

`test_bm25_numba` runs these same tests on the compiled version: `BM25` below is a fixture.
"""

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import bm25s
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_bm25 import BM25L, BM25Okapi, BM25Plus

from mlsys.retrieval import _bm25_file, _index_file, bm25
from mlsys.retrieval.bm25 import VARIANTS
from mlsys.retrieval.tokenize import Tokenizer

words = st.lists(st.sampled_from("abcdefghij"), max_size=12)
corpora = st.lists(words, min_size=1, max_size=20).filter(any)
parameters = {"k1": st.sampled_from([0.1, 0.9, 1.5, 4.0]), "b": st.sampled_from([0.0, 0.4, 0.75])}
few = settings(max_examples=60)

DOCUMENTS = ["the cat sat on the mat", "the dog sat on the log", "cats and dogs", "", "the the the"]


@pytest.fixture(scope="module", name="BM25")
def implementation():
    return bm25.BM25


# The numbers


@few
@given(corpus=corpora, query=words, variant=st.sampled_from(["okapi", "bm25+", "bm25l"]), **parameters)
def test_scores_are_those_of_rank_bm25(BM25, corpus, query, variant, k1, b):
    peer = {"okapi": BM25Okapi, "bm25+": BM25Plus, "bm25l": BM25L}[variant]
    want = peer(corpus, k1=k1, b=b).get_scores(query)  # k1 = 0 is 0/0 there, for documents without the term
    got = BM25(variant=variant, k1=k1, b=b).fit(corpus).scores(query)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@few
@given(corpus=corpora, query=words, variant=st.sampled_from(["lucene", "robertson", "atire", "bm25+"]), **parameters)
def test_scores_are_those_of_bm25s(BM25, corpus, query, variant, k1, b):
    peer = bm25s.BM25(method=variant, k1=k1, b=b, delta=1.0)
    peer.index(corpus, show_progress=False)
    known = [word for word in query if word in peer.vocab_dict]
    want = peer.get_scores(known) if known else np.zeros(len(corpus))
    got = BM25(variant=variant, k1=k1, b=b).fit(corpus).scores(query)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_the_formula_by_hand(BM25):
    got = BM25(k1=1.2, b=0.5).fit([["a", "a", "b"], ["b"]]).scores(["a"])
    norm = 1.2 * (1 - 0.5 + 0.5 * 3 / 2)
    assert got == pytest.approx([math.log(1 + 1.5 / 1.5) * 2 / (2 + norm), 0])


def test_the_papers_bm25_plus_and_l_lift_only_documents_with_the_term(BM25):
    corpus = [["a", "b"], ["b", "c", "c"], ["d"]]
    for ours, delta in (("paper-bm25+", 1.0), ("paper-bm25l", 0.5)):
        scores = BM25(variant=ours).fit(corpus).scores(["a"])
        assert scores[0] > 0
        assert not scores[1:].any()
        none = BM25(variant=ours, delta=0.0).fit(corpus).scores(["a"])
        assert scores[0] > none[0], delta
    everywhere = BM25(variant="bm25+").fit(corpus).scores(["a"])
    np.testing.assert_allclose(everywhere[1:], math.log(4))
    np.testing.assert_allclose(everywhere[0], BM25(variant="paper-bm25+").fit(corpus).scores(["a"])[0], rtol=1e-6)


@few
@given(corpus=corpora, queries=st.lists(words, max_size=4), variant=st.sampled_from(sorted(VARIANTS)), data=st.data())
def test_search_is_scores_sorted(BM25, corpus, queries, variant, data):
    index = BM25(variant=variant).fit(corpus)
    k = data.draw(st.integers(1, len(corpus)))
    scores, ids = index.search(queries, k)
    assert scores.shape == ids.shape == (len(queries), k)
    assert (scores.dtype, ids.dtype) == (np.float32, np.int64)
    for query, row_scores, row_ids in zip(queries, scores, ids, strict=True):
        every = index.scores(query)
        hits = {i for i, document in enumerate(corpus) if set(document) & set(query)}
        found = row_ids[row_ids >= 0].tolist()
        assert len(found) == len(set(found)) == min(k, len(hits))
        assert set(found) <= hits
        assert (row_ids[len(found) :] == -1).all()
        assert not row_scores[len(found) :].any()
        np.testing.assert_allclose(row_scores[: len(found)], every[found], rtol=1e-5, atol=1e-6)
        assert (np.diff(row_scores[: len(found)]) <= 0).all()
        missed = hits - set(found)
        assert not missed or every[list(missed)].max() <= every[found].min() + 1e-5
        for one, other in pairwise(found):
            assert sorted(corpus[one]) != sorted(corpus[other]) or one < other


def test_top_k_of_bm25s_lucene(BM25):
    rng = np.random.default_rng(0)
    corpus = [[f"w{i}" for i in rng.zipf(1.3, rng.integers(5, 40)) if i < 500] for _ in range(700)]
    queries = [[f"w{i}" for i in rng.integers(1, 60, 5)] for _ in range(40)]
    peer = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    peer.index(corpus, show_progress=False)
    want = peer.retrieve(queries, k=10, show_progress=False).scores
    got, _ = BM25().fit(corpus).search(queries, k=10)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_only_presence_counts_without_saturation(BM25):
    scores = BM25(k1=0.0).fit([["a", "a", "b"], ["a"], []]).scores(["a"])
    assert scores == pytest.approx([math.log(1 + 1.5 / 2.5)] * 2 + [0])


# What a hit is, and in which order


def test_ties_go_to_the_smaller_id(BM25):
    index = BM25().fit([["x"], ["a"], ["x"], ["a"], ["a"], ["a", "b"]] * 20)
    _, ids = index.search([["a"]], k=7)
    assert ids.tolist() == [[1, 3, 4, 7, 9, 10, 13]]


def test_documents_that_share_no_term_are_not_returned(BM25):
    scores, ids = BM25().fit(DOCUMENTS).search(["dog"], k=4)
    assert ids.tolist() == [[1, -1, -1, -1]]
    assert scores[0, 1:].tolist() == [0, 0, 0]


def test_a_hit_may_score_zero_or_less(BM25):
    corpus = [["a", "b"], ["a", "c"], ["a", "b"], ["a", "d"]]  # b is in half of them: idf 0; the mean idf is > 0
    index = BM25(variant="okapi").fit(corpus)
    scores, ids = index.search([["b"]], k=3)
    assert ids.tolist() == [[0, 2, -1]]
    assert scores.tolist() == [[0, 0, 0]]
    negative = BM25(variant="okapi").fit([["a"], ["a"], ["a"]])
    scores, ids = negative.search([["a"]], k=3)
    assert ids.tolist() == [[0, 1, 2]]
    assert (scores < 0).all()


def test_repeated_query_terms_count_each_time(BM25):
    index = BM25().fit(DOCUMENTS)
    np.testing.assert_allclose(index.scores("cat cat"), 2 * index.scores("cat"), rtol=1e-6)


def test_empty_and_unknown_queries(BM25):
    index = BM25().fit(DOCUMENTS)
    scores, ids = index.search(["", "zebra", [], ["zebra"]], k=2)
    assert (ids == -1).all()
    assert not scores.any()
    assert not index.scores("").any()
    scores, ids = index.search([], k=2)
    assert scores.shape == ids.shape == (0, 2)
    assert BM25(variant="bm25+").fit(DOCUMENTS).search([], k=2)[0].shape == (0, 2)


def test_documents_without_any_token(BM25):
    index = BM25().fit(["", []])
    assert index.search(["a"], k=2)[1].tolist() == [[-1, -1]]


def test_strings_and_tokens_are_the_same_documents(BM25):
    tokens = [Tokenizer()(document) for document in DOCUMENTS]
    one, other = BM25().fit(DOCUMENTS), BM25().fit(tokens)
    assert one.vocabulary_ == other.vocabulary_
    np.testing.assert_array_equal(one.impacts_, other.impacts_)
    np.testing.assert_array_equal(one.search(["the cat"], 3)[0], other.search([("the", "cat")], 3)[0])
    own = BM25(tokenizer=str.split).fit(["A-b c"])
    assert list(own.vocabulary_) == ["A-b", "c"]


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"variant": "bm26"}, ValueError, "variant must be one of lucene, .*bm26"),
        ({"variant": None}, ValueError, "variant must be one of"),
        ({"k1": -0.1}, ValueError, "k1 must be at least 0"),
        ({"k1": math.nan}, ValueError, "k1 .*nan"),
        ({"k1": math.inf}, ValueError, "k1 .*inf"),
        ({"k1": "1.5"}, TypeError, "k1 must be a number"),
        ({"b": 1.01}, ValueError, "b must be between 0 and 1"),
        ({"b": -0.01}, ValueError, "b must be between"),
        ({"b": math.nan}, ValueError, "b must be between"),
        ({"b": True}, TypeError, "b must be a number"),
        ({"delta": 1.0}, ValueError, "delta has no meaning for variant 'lucene'"),
        ({"delta": -1.0, "variant": "bm25+"}, ValueError, "delta must be at least 0"),
        ({"delta": math.nan, "variant": "bm25l"}, ValueError, "delta must be"),
    ],
)
def test_bad_parameters(BM25, options, error, message):
    index = BM25(**options)  # only stores, as scikit-learn's estimators do
    with pytest.raises(error, match=message):
        index.fit(DOCUMENTS)


@pytest.mark.parametrize(
    ("documents", "error", "message"),
    [
        ([], ValueError, "documents is empty"),
        ("one text", TypeError, r"single string 'one text'.*use \['one text'\]"),
        (["a", 3], TypeError, r"documents\[1\] must be a string or a list of tokens, got int"),
        ([["a"], None], TypeError, r"documents\[1\]"),
        ([["a", 3]], TypeError, "tokens must be strings, got 3"),
        ([["a", ["b"]]], TypeError, r"tokens must be strings, got \['b'\]"),
    ],
)
def test_bad_documents_leave_what_was_fitted(BM25, documents, error, message):
    index = BM25().fit(DOCUMENTS)
    before = index.search(["the cat"], 3)
    with pytest.raises(error, match=message):
        index.fit(documents)
    np.testing.assert_array_equal(before, index.search(["the cat"], 3))


@pytest.mark.parametrize(
    ("queries", "k", "error", "message"),
    [
        ("cat", 1, TypeError, r"use \['cat'\]"),
        ([3], 1, TypeError, r"queries\[0\]"),
        ([[3]], 1, TypeError, "tokens must be strings"),
        ([[["cat"]]], 1, TypeError, "tokens must be strings"),
        (["cat"], 0, ValueError, "k must be at least 1, got 0"),
        (["cat"], -2, ValueError, "got -2"),
        (["cat"], 6, ValueError, "k must be at most 5, the number of documents, got 6"),
        (["cat"], 2.0, TypeError, "k must be a whole number"),
        (["cat"], True, TypeError, "k must be a whole number"),
        ("cat", 99, TypeError, r"use \['cat'\]"),  # the queries are looked at first
        ("cat", 2.0, TypeError, r"use \['cat'\]"),
    ],
)
def test_bad_queries(BM25, queries, k, error, message):
    with pytest.raises(error, match=message):
        BM25().fit(DOCUMENTS).search(queries, k)


def test_needs_fit_first(BM25, tmp_path):
    for use in (lambda i: i.search(["a"]), lambda i: i.scores("a"), lambda i: i.save(tmp_path)):
        with pytest.raises(ValueError, match=r"call fit\(documents\) first"):
            use(BM25())


# Adding


def equal(one, other):
    """The same to the last bit, in everything that can be seen."""
    assert one.vocabulary_ == other.vocabulary_
    assert list(one.vocabulary_) == list(other.vocabulary_)
    assert (one.n_documents_, one.average_length_) == (other.n_documents_, other.average_length_)
    for name in ("indptr_", "indices_", "tf_", "impacts_", "absent_"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a.dtype, a.tolist()) == (b.dtype, b.tolist()), name


@few
@given(
    parts=st.lists(st.lists(words, max_size=6), min_size=1, max_size=5).filter(lambda parts: parts[0]),
    looks=st.sets(st.integers(0, 4)),
    variant=st.sampled_from(sorted(VARIANTS)),
)
def test_adding_is_fitting_all(BM25, parts, looks, variant):
    index = BM25(variant=variant).fit(parts[0])
    for i, part in enumerate(parts[1:]):
        assert index.add(part) is index
        if i in looks:
            index.search([["a", "j"]], 1)
    whole = BM25(variant=variant).fit([document for part in parts for document in part])
    for got, want in zip(index.search([["a", "c"], ["b"]], 1), whole.search([["a", "c"], ["b"]], 1), strict=True):
        np.testing.assert_array_equal(got, want)
    equal(index, whole)


def test_adding_to_nothing_fits(BM25):
    equal(BM25().add(DOCUMENTS), BM25().fit(DOCUMENTS))
    with pytest.raises(ValueError, match="documents is empty"):
        BM25().add([])


def test_adding_uses_what_the_index_was_fitted_with(BM25):
    index = BM25(tokenizer=str.split).fit(["A-b c"])
    index.tokenizer, index.k1 = None, 9.0
    equal(index.add(["A-b"]), BM25(tokenizer=str.split).fit(["A-b c", "A-b"]))


def test_what_was_added_is_saved(BM25, tmp_path):
    BM25().fit(DOCUMENTS[:2]).add(DOCUMENTS[2:]).save(tmp_path)
    equal(BM25.load(tmp_path), BM25().fit(DOCUMENTS))


@pytest.mark.parametrize("documents", ["one text", ["new words", 3], [["new", 3]], [["new", ["b"]]]])
def test_adding_what_is_no_text_leaves_the_index(BM25, documents):
    index = BM25().fit(DOCUMENTS)
    with pytest.raises(TypeError):
        index.add(documents)
    equal(index, BM25().fit(DOCUMENTS))


def test_searches_of_several_threads_after_adding_are_alike(BM25):
    rng = np.random.default_rng(0)
    corpus = [[f"w{i}" for i in rng.zipf(1.3, 20) if i < 500] for _ in range(400)]
    whole = BM25().fit(corpus).search(corpus[:20], 10)
    for _ in range(5):
        index = BM25().fit(corpus[:100]).add(corpus[100:])
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(index.search, corpus[:20], 10) for _ in range(16)]
        for answer in answers:
            np.testing.assert_array_equal(answer.result(), whole)


# On disk


def same(one, other):
    assert one.vocabulary_ == other.vocabulary_
    for a, b in zip(one.search(["the cat", "dog"], 5), other.search(["the cat", "dog"], 5), strict=True):
        np.testing.assert_array_equal(a, b)


def contents(folder):
    return {path.name: path.read_bytes() if path.is_file() else None for path in Path(folder).iterdir()}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_save_and_load(BM25, tmp_path, variant):
    delta = 0.7 if VARIANTS[variant].delta else None
    words = frozenset({"on"})
    index = BM25(variant=variant, k1=1.1, b=0.3, delta=delta, tokenizer=Tokenizer(stopwords=words)).fit(DOCUMENTS)
    index.save(tmp_path / "new" / "folder")
    loaded = BM25.load(tmp_path / "new" / "folder")
    same(index, loaded)
    assert (loaded.variant, loaded.k1, loaded.b, loaded.delta) == (variant, 1.1, 0.3, delta)
    assert loaded.tokenizer == index.tokenizer
    assert loaded.average_length_ == index.average_length_
    loaded.fit(DOCUMENTS)
    same(index, loaded)
    loaded.add(["a cat"])
    same(loaded, BM25.load(tmp_path / "new" / "folder").add(["a cat"]))


def test_what_is_set_after_fit_waits_for_the_next_fit(BM25, tmp_path):
    index, same_index = BM25(k1=1.5).fit(DOCUMENTS), BM25(k1=1.5).fit(DOCUMENTS)
    index.k1, index.variant, index.delta, index.tokenizer = 0.1, "bm25+", math.nan, str.split
    same(index, same_index)
    index.save(tmp_path)
    loaded = BM25.load(tmp_path)
    same(loaded, same_index)
    assert (loaded.variant, loaded.k1, loaded.delta, loaded.tokenizer) == ("lucene", 1.5, None, Tokenizer())
    index.delta = 1.0
    index.fit(DOCUMENTS).save(tmp_path)
    assert BM25.load(tmp_path, tokenizer=str.split).k1 == index.parameters_["k1"] == 0.1


def test_odd_tokens_survive(BM25, tmp_path):
    tokens = ["", "a\nb", "ü日", "\ud800", '"\\']
    BM25().fit([tokens]).save(tmp_path)
    assert list(BM25.load(tmp_path).vocabulary_) == tokens


def test_saving_again_replaces_and_cleans_up(BM25, tmp_path):
    BM25().fit(["something else"]).save(tmp_path)
    (tmp_path / "arrays-0123456789abcdef.safetensors").write_bytes(b"of a save that was killed")
    mine = {
        "mine.txt": b"kept",
        "arrays-mine.safetensors": b"kept",
        "arrays-0123456789ABCDEF.safetensors": b"kept",
        ".arrays-draft.tmp": b"kept",
        ".index.json.mine.tmp": b"kept",
    }
    for name, data in mine.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / ".arrays-0123456789abcdef.safetensors.0123456789ab.tmp").write_bytes(b"of a save that was killed")
    (tmp_path / ".index.json.0123456789ab.tmp").write_bytes(b"of a save that was killed")
    (tmp_path / "arrays-fedcba9876543210.safetensors").mkdir()
    index = BM25().fit(DOCUMENTS)
    index.save(tmp_path)
    index.save(tmp_path)
    same(index, BM25.load(tmp_path))
    (tmp_path / "arrays-fedcba9876543210.safetensors").rmdir()
    left = contents(tmp_path)
    assert mine.items() <= left.items()
    assert len(left) == len(mine) + 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": "a web page\'s index"}', "is not the manifest of an index"),
        ("[]", "is not the manifest of an index"),
        ("var index = 1", "is not the manifest of an index, or a damaged one"),
        ("[" * 100_000, "is not the manifest of an index, or a damaged one"),
    ],
)
def test_a_folder_with_another_index_json_is_refused_and_left_as_it_was(BM25, tmp_path, text, message):
    (tmp_path / "index.json").write_text(text)
    (tmp_path / "arrays-0123456789abcdef.safetensors").write_bytes(b"somebody's")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"{message}.*choose another folder"):
        BM25().fit(DOCUMENTS).save(tmp_path)
    assert contents(tmp_path) == before
    with pytest.raises(_index_file.IndexFileError, match=r"index\.json"):
        BM25.load(tmp_path)


def test_an_index_of_another_kind_is_not_replaced_but_an_older_format_is(BM25, tmp_path):
    _index_file.write(tmp_path, "mlsys.vectors/1", {}, {"x": np.zeros(2)})
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"'mlsys\.vectors/1' index, not a 'mlsys\.bm25/2' one.*choose another"):
        BM25().fit(DOCUMENTS).save(tmp_path)
    assert contents(tmp_path) == before
    _index_file.write(tmp_path / "old", "mlsys.bm25/0", {}, {"x": np.zeros(2)})
    BM25().fit(DOCUMENTS).save(tmp_path / "old")
    assert BM25.load(tmp_path / "old").n_documents_ == 5


def test_a_tokenizer_of_ones_own_must_be_given_again(BM25, tmp_path):
    index = BM25(tokenizer=str.split).fit(DOCUMENTS)
    index.save(tmp_path)
    with pytest.raises(ValueError, match="give it as tokenizer="):
        BM25.load(tmp_path)
    same(index, BM25.load(tmp_path, tokenizer=str.split))


def damage_truncate(folder):
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-3])


def damage_flip(folder):
    file = next(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def damage_missing(folder):
    next(folder.glob("*.safetensors")).unlink()


def damage_manifest_edited(folder):
    file = folder / "index.json"
    file.write_text(file.read_text().replace('"k1": 1.5', '"k1": 9.5'))


def damage_manifest_cut(folder):
    file = folder / "index.json"
    file.write_bytes(file.read_bytes()[:40])


def damage_manifest_binary(folder):
    (folder / "index.json").write_bytes(b"\xff\xfe\x00")


def damage_manifest_list(folder):
    (folder / "index.json").write_text("[]")


def damage_arrays_folder(folder):
    file = next(folder.glob("*.safetensors"))
    file.unlink()
    file.mkdir()


def damage_manifest_folder(folder):
    (folder / "index.json").unlink()
    (folder / "index.json").mkdir()


def rewrite_manifest(folder, **changes):
    """A manifest with other entries (None: without it) and the right checksum."""
    file = folder / "index.json"
    manifest = {name: value for name, value in (json.loads(file.read_text()) | changes).items() if value is not None}
    del manifest["checksum"]
    file.write_text(json.dumps(manifest | {"checksum": _index_file._checksum(manifest)}))


def damage_manifest_entry(folder):
    rewrite_manifest(folder, file=None)


def damage_manifest_outside(folder):
    rewrite_manifest(folder, file="../arrays.safetensors")


def damage_manifest_type(folder):
    rewrite_manifest(folder, settings=[])


def damage_manifest_gone(folder):
    (folder / "index.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "bytes where .* damaged"),
        (damage_flip, "wrong checksum"),
        (damage_missing, "is missing"),
        (damage_manifest_edited, r"index\.json has a wrong checksum"),
        (damage_manifest_cut, "is not JSON"),
        (damage_manifest_binary, "is not JSON"),
        (damage_manifest_list, "is not the manifest of an index"),
        (damage_arrays_folder, "is a folder where a file should be"),
        (damage_manifest_folder, "is a folder where a file should be"),
        (damage_manifest_entry, "is not the manifest of an index"),
        (damage_manifest_outside, "is not the manifest of an index"),
        (damage_manifest_type, "is not the manifest of an index"),
        (damage_manifest_gone, "holds no saved index"),
    ],
)
def test_a_damaged_index_is_refused_and_left_as_it_was(BM25, tmp_path, damage, message):
    BM25().fit(DOCUMENTS).save(tmp_path)
    damage(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(_index_file.IndexFileError, match=message):
        BM25.load(tmp_path)
    assert contents(tmp_path) == before


def test_a_file_is_no_folder_with_an_index(BM25, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(_index_file.IndexFileError, match="holds no saved index"):
        BM25.load(tmp_path / "file")


LEFT_OUT = object()


def saved_otherwise(folder, settings=None, **arrays):
    """An index of DOCUMENTS with other settings and arrays, or without them; every checksum is right."""
    bm25.BM25().fit(DOCUMENTS).save(folder)
    old_settings, old_arrays = _index_file.read(folder, _bm25_file.FORMAT)
    new_settings, new_arrays = (
        {name: value for name, value in (old | new).items() if value is not LEFT_OUT}
        for old, new in ((old_settings, settings or {}), (old_arrays, arrays))
    )
    _index_file.write(folder, _bm25_file.FORMAT, new_settings, new_arrays)


SAVED = bm25.BM25().fit(DOCUMENTS)


def changed(array, place, value):
    array = array.copy()
    array[place] = value
    return array


@pytest.mark.parametrize("name", _bm25_file.SETTINGS)
def test_an_index_without_a_setting_is_refused(BM25, tmp_path, name):
    saved_otherwise(tmp_path, {name: LEFT_OUT})
    with pytest.raises(_index_file.IndexFileError, match=f"cannot be used: it lacks {name}; save it again"):
        BM25.load(tmp_path)


@pytest.mark.parametrize("name", _bm25_file.ARRAYS)
def test_an_index_without_an_array_or_with_one_of_another_type_is_refused(BM25, tmp_path, name):
    saved_otherwise(tmp_path, **{name: LEFT_OUT})
    with pytest.raises(_index_file.IndexFileError, match=f"it lacks {name}"):
        BM25.load(tmp_path)
    saved_otherwise(tmp_path, **{name: np.zeros(3, np.float16)})
    with pytest.raises(_index_file.IndexFileError, match=f"{name} is 1-D float16, expected 1-D [a-z]+[0-9]+;"):
        BM25.load(tmp_path)
    saved_otherwise(tmp_path, **{name: np.zeros((1, 3), _bm25_file.ARRAYS[name])})
    with pytest.raises(_index_file.IndexFileError, match=f"{name} is 2-D"):
        BM25.load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "arrays", "message"),
    [
        ({}, {"tf": changed(SAVED.tf_, 0, 0)}, "its counts do not add up"),
        ({}, {"tf": changed(SAVED.tf_, 0, 9)}, "its counts do not add up"),
        ({}, {"lengths": np.array([6, 6, 3, 1, 3])}, "its counts do not add up"),
        ({}, {"lengths": np.zeros(0, np.int64)}, "do not fit together"),
        ({}, {"indices": changed(SAVED.indices_, 1, SAVED.indices_[0])}, "a document twice, or not in order"),
        ({}, {"indices": changed(SAVED.indices_, 0, -1)}, "do not fit together"),
        ({}, {"indptr": changed(SAVED.indptr_, 0, 1)}, "do not fit together"),
        ({}, {"indptr": changed(SAVED.indptr_, 1, 99)}, "do not fit together"),
        ({}, {"vocabulary": np.frombuffer(b'["a", "a"]', np.uint8)}, "no list of distinct words"),
        ({}, {"vocabulary": np.frombuffer(b"{}", np.uint8)}, "no list of distinct words"),
        ({}, {"vocabulary": np.frombuffer(b"\xff", np.uint8)}, "no list of distinct words"),
        ({}, {"vocabulary": np.frombuffer(b'["a"]', np.uint8)}, "do not fit together"),
        ({}, {"indptr": np.zeros(0, np.int64)}, "do not fit together"),
        ({"tokenizer": {"stem": True}}, {}, "are not the options of a Tokenizer"),
        ({"tokenizer": "mine"}, {}, "are not the options of a Tokenizer"),
        ({"variant": "bm26"}, {}, "variant must be one of"),
        ({"k1": "1.5"}, {}, "k1 must be a number"),
        ({"delta": -1.0}, {}, "delta has no meaning"),
    ],
)
def test_settings_and_arrays_that_make_no_index_are_refused(BM25, tmp_path, settings, arrays, message):
    saved_otherwise(tmp_path, settings, **arrays)
    with pytest.raises(_index_file.IndexFileError, match=f"cannot be used: .*{message}.*; save it again"):
        BM25.load(tmp_path)


def test_saving_again_mends_a_manifest_edited_by_hand(BM25, tmp_path):
    index = BM25().fit(DOCUMENTS)
    index.save(tmp_path)
    damage_manifest_edited(tmp_path)
    index.save(tmp_path)
    same(index, BM25.load(tmp_path))


def test_arrays_that_do_not_fit_are_refused(BM25, tmp_path):
    index = BM25().fit(DOCUMENTS)
    index.indices_[:] += 99  # ids beyond the corpus: compiled code must never see them
    index.save(tmp_path)
    with pytest.raises(ValueError, match="do not fit together"):
        BM25.load(tmp_path)


def test_another_kind_of_index_is_refused(BM25, tmp_path, monkeypatch):
    monkeypatch.setattr(_bm25_file, "FORMAT", "mlsys.other/1")
    BM25().fit(DOCUMENTS).save(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"'mlsys\.other/1' index, expected 'mlsys\.bm25/2'"):
        BM25.load(tmp_path)


@pytest.mark.parametrize("fails_at", [0, 1])
def test_a_failing_save_leaves_the_old_index(BM25, tmp_path, monkeypatch, fails_at):
    old = BM25().fit(["an old index"] * 5)
    old.save(tmp_path)
    before = contents(tmp_path)
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) > fails_at:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk full"):
        BM25().fit(DOCUMENTS).save(tmp_path)
    monkeypatch.undo()
    same(old, BM25.load(tmp_path))
    assert before.items() <= contents(tmp_path).items()
    new = BM25().fit(DOCUMENTS)
    new.save(tmp_path)
    same(new, BM25.load(tmp_path))
    assert len(contents(tmp_path)) == 2


def test_killed_between_the_two_files(killed_while_saving, tmp_path):
    bm25.BM25().fit(["an old index"]).save(tmp_path)
    killed_while_saving(
        'from mlsys.retrieval.bm25 import BM25; index = BM25().fit(["a new index"] * 9)',
        tmp_path,
    )
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert bm25.BM25.load(tmp_path).n_documents_ == 1
    bm25.BM25().fit(["a third"]).save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_manifest_is_readable_json(BM25, tmp_path):
    BM25().fit(DOCUMENTS).save(tmp_path)
    manifest = json.loads((tmp_path / "index.json").read_text())
    assert manifest["settings"]["variant"] == "lucene"
    assert manifest["settings"]["tokenizer"]["stemmer"] is None


def test_an_index_of_an_earlier_format_is_told_so(BM25, tmp_path):
    _index_file.write(tmp_path, "mlsys.bm25/1", {}, {"impacts": np.zeros(2, np.float32)})
    with pytest.raises(
        _index_file.IndexFileError, match=r"'mlsys\.bm25/1'.*another version.*index the documents again"
    ):
        BM25.load(tmp_path)
