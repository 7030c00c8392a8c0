"""`mlsys.data.beir`: what is read is what lies there, errors name file and line, and the published habits are kept."""

import json

import numpy as np
import pytest

from mlsys.data import beir
from mlsys.retrieval import metrics

CORPUS = [
    {"_id": "d1", "title": "Cats", "text": "They sleep."},
    {"_id": "d2", "title": "", "text": "Dogs bark."},
    {"_id": "q2", "text": "Birds sing."},
]
QUERIES = [{"_id": "q1", "text": "who sleeps"}, {"_id": "q2", "text": "who sings"}, {"_id": "q3", "text": "unjudged"}]
QRELS = "query-id\tcorpus-id\tscore\nq2\td2\t1\nq2\tgone\t2\nq1\td1\t1\nq1\td2\t0\n"


def lines(entries):
    return "".join(json.dumps(entry) + "\n" for entry in entries)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "mine"
    (path / "qrels").mkdir(parents=True)
    (path / "corpus.jsonl").write_text(lines(CORPUS))
    (path / "queries.jsonl").write_text(lines(QUERIES))
    (path / "qrels" / "test.tsv").write_text(QRELS)
    return path


def test_what_is_read(folder):
    corpus = beir.load(folder)
    assert corpus.name == "mine"
    assert corpus.ids == ["d1", "d2", "q2"]
    assert corpus.texts == ["Cats They sleep.", "Dogs bark.", "Birds sing."]
    assert corpus.judgements == {"q2": {"d2": 1, "gone": 2}, "q1": {"d1": 1, "d2": 0}}
    assert corpus.asked == ["who sings", "who sleeps"]
    assert corpus.relevant == [{1: 1, 4: 2}, {0: 1, 1: 0}]
    assert beir.documents(folder).texts == corpus.texts


def test_a_judged_document_that_is_not_there_counts_as_not_found(folder):
    corpus = beir.load(folder)
    assert metrics.recall(np.array([[1, 0, 2], [0, 1, 2]]), corpus.relevant, 3) == pytest.approx((1 / 2 + 1) / 2)


def test_a_document_that_is_the_query_is_no_answer(folder):
    corpus = beir.load(folder)
    found = corpus.without_query(np.array([[2, 1, 0], [2, 1, -1]]))  # row 2 is the document "q2"
    assert found.tolist() == [[1, 0], [2, 1]]


def test_saved_is_what_is_loaded(folder, tmp_path):
    corpus = beir.load(folder)
    beir.save(corpus, tmp_path / "copy" / "mine")
    assert beir.load(tmp_path / "copy" / "mine") == corpus


def test_forms_that_are_met_in_the_wild(folder):
    (folder / "corpus.jsonl").write_bytes(
        b'\xef\xbb\xbf{"_id": 7, "title": null, "text": "a", "metadata": {}}\r\n\n{"_id": "8", "text": "\xc3\xbc"}'
    )
    (folder / "qrels" / "dev.tsv").write_text("q1\t7\t1.0\r\nq1\t8\t-1\n")  # no header
    corpus = beir.load(folder, split="dev")
    assert corpus.ids == ["7", "8"]
    assert corpus.texts == ["a", "ü"]
    assert corpus.judgements == {"q1": {"7": 1, "8": -1}}


def test_known_items_of_the_documentation():
    corpus = beir.from_docs(n_queries=20)
    assert len(corpus.asked) == 20
    for query, judged, row in zip(corpus.asked, corpus.judgements.values(), corpus.relevant, strict=True):
        (document,) = judged
        assert corpus.ids[next(iter(row))] == document
        assert query not in corpus.texts[next(iter(row))]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("corpus.jsonl", None, r"corpus\.jsonl is missing; a BEIR corpus has"),
        ("queries.jsonl", None, r"queries\.jsonl is missing"),
        ("qrels/test.tsv", None, r"test\.tsv is missing"),
        ("corpus.jsonl", "", "holds no documents"),
        ("corpus.jsonl", '{"_id": "1", "text": "a"}\n{"_id": "2"', r"corpus\.jsonl, line 2 is not JSON"),
        ("corpus.jsonl", "\n\n[1]\n", r"line 3 is no object such as"),
        ("corpus.jsonl", '{"id": "1", "text": "a"}', r"line 1 has no '_id' that is a string; it has 'id', 'text'"),
        ("corpus.jsonl", '{"_id": "1", "text": 3}', "line 1 has no 'text' that is a string"),
        ("corpus.jsonl", '{"_id": "1", "text": "a", "title": 3}', "has a 'title' that is no string: 3"),
        ("corpus.jsonl", '{"_id": "1", "text": "a"}\n{"_id": "1", "text": "b"}', r"line 2 has the _id '1', which"),
        ("corpus.jsonl", b'{"_id": "1", "text": "\xff"}', r"line 1 is not UTF-8"),
        ("queries.jsonl", '{"_id": "q1"}', r"queries\.jsonl, line 1 has no 'text'"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "holds no judgements"),
        ("qrels/test.tsv", "q1 d1 1\n", r"test\.tsv, line 1 must be query-id, corpus-id and score with tabs"),
        ("qrels/test.tsv", QRELS + "q1\td3\t0.5\n", r"line 6: the score must be a whole number, got '0\.5'"),
        ("qrels/test.tsv", QRELS + "q1\td3\tnan\n", "whole number, got 'nan'"),
        ("qrels/test.tsv", QRELS + "q9\td1\t1\n", r"line 6 judges the query 'q9', which queries\.jsonl does not have"),
        ("qrels/test.tsv", QRELS + "q1\td1\t2\n", "line 6 judges query 'q1' and document 'd1' a second time"),
    ],
)
def test_what_is_no_corpus_is_named_by_file_and_line(folder, file, text, message):
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        beir.load(folder)


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match="is no folder; a BEIR corpus is one with"):
        beir.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is missing"):
        beir.documents(tmp_path / "nowhere")


def test_published_figures_are_shares():
    assert {"scifact", "nfcorpus", "arguana"} <= set(beir.PUBLISHED)
    assert all(0 < ndcg < 1 and 0 < recall < 1 for ndcg, recall in beir.PUBLISHED.values())
    assert beir.PUBLISHED["scifact"] == (0.6789, 0.9253)
