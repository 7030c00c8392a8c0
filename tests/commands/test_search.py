"""`mlsys search` finds what a person means, and says what it found and where."""

import json

import pytest

from mlsys.cli import main
from mlsys.commands import search
from mlsys.data import beir
from mlsys.retrieval import bm25


def hits(capsys, *words):
    status = main(["search", *words, "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("query", "name", "within"),
    [
        ("parse a date string", "email.utils.parsedate", 5),
        ("compress data with gzip", "gzip.compress", 1),
        ("temporary file that deletes itself", "tempfile.NamedTemporaryFile", 3),
        ("split a string into words like a shell", "shlex.split", 1),
        ("merge sorted lists", "heapq.merge", 1),
        ("read a csv file", "csv", 3),
    ],
)
def test_finds_what_is_meant(capsys, query, name, within):
    status, found = hits(capsys, query, "-k", "5")
    assert status == 0
    assert name in [hit["name"] for hit in found[:within]]


def test_prints_name_signature_summary_place_and_words(capsys):
    assert main(["search", "split", "a", "string", "like", "a", "shell", "-k", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1. shlex.split(s, comments=False, posix=True)")
    assert lines[1].strip() == "Split the string *s* using shell-like syntax."
    assert lines[2].strip().startswith("shlex.py:")
    assert "matches split string like shell" in lines[2]
    assert lines[4].startswith("2. ")


def test_json_has_all_of_it(capsys):
    _, (hit,) = hits(capsys, "gzip compress data zebra", "-k", "1")
    assert hit["name"] == "gzip.compress"
    assert (hit["rank"], hit["file"], hit["package"]) == (1, "gzip.py", "stdlib")
    assert hit["matched"] == ["gzip", "compress", "data"]
    assert hit["missing"] == ["zebra"]
    assert hit["score"] > 0
    assert hit["line"] > 1


def test_nothing_found(capsys):
    assert main(["search", "qqzxqq"]) == 1
    said = capsys.readouterr()
    assert not said.out
    assert "nothing found" in said.err
    assert hits(capsys, "qqzxqq") == (1, [])


@pytest.mark.parametrize("query", ["the", "of The", "?!", " "])
def test_a_query_of_stop_words_is_told_so(capsys, query):
    assert main(["search", query]) == 1
    said = capsys.readouterr().err
    assert f"nothing found: {query!r} holds only stop words" in said
    assert "none of the" not in said


def test_words_that_are_left_out_are_not_said_to_be_absent(capsys):
    assert main(["search", "the qqzxqq"]) == 1
    assert capsys.readouterr().err.endswith("documents has a word of 'qqzxqq'\n")


def test_a_package_of_the_standard_library_is_not_found_twice(capsys):
    assert main(["search", "parse a date string", "-k", "4", "--packages", "email", "--json"]) == 0
    said = capsys.readouterr()
    names = [hit["name"] for hit in json.loads(said.out)]
    assert len(set(names)) == len(names) == 4
    assert "email is in the standard library" in said.err


@pytest.mark.parametrize("variant", search.VARIANTS)
def test_every_variant(capsys, variant):
    status, found = hits(capsys, "shlex split", "--variant", variant, "-k", "1")
    assert (status, len(found)) == (0, 1)


def test_variants_are_those_of_the_index():
    assert tuple(bm25.VARIANTS) == search.VARIANTS


def test_bad_input_is_one_line(capsys):
    assert main(["search", "x", "-k", "0"]) == 2
    assert "-k must be at least 1, got 0" in capsys.readouterr().err
    assert main(["search", "x", "--packages", "no_such_package"]) == 2
    said = capsys.readouterr().err
    assert "no_such_package" in said
    assert "install it there" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("parsedate", ["parse", "date"]),
        ("tempfile", ["temp", "file"]),
        ("xy", []),
        ("unknown", []),
        ("datedate", ["date"] * 2),
    ],
)
def test_split_compound(word, parts):
    assert search.split_compound(word, {"parse", "date", "temp", "file"}) == parts


# --- a folder ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Three documents, of which BM25 finds what is asked for in two of three cases."""
    corpus = beir.Corpus(
        name="scifact",
        ids=["a", "b", "c", "q3"],
        titles=["Vitamins", "", "Running", ""],
        bodies=["They help against colds.", "A cold wind blows.", "Runners run.", "Who runs against the wind?"],
        queries={"q1": "do vitamins help", "q2": "zebras", "q3": "who runs against the wind", "q4": "unjudged"},
        judgements={"q1": {"a": 1}, "q2": {"b": 1}, "q3": {"c": 2, "b": 1}},
    )
    beir.save(corpus, tmp_path / "scifact")
    return str(tmp_path / "scifact")


def test_search_in_a_folder(capsys, folder):
    assert main(["search", "--data", folder, "the", "runner"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["1. Running", "   Runners run."]
    assert lines[2].startswith("   c   score ")
    assert main(["search", "--data", folder, "colds", "--json", "-k", "9"]) == 0
    assert [hit["id"] for hit in json.loads(capsys.readouterr().out)] == ["b", "a"]
    assert main(["search", "--data", folder, "colds", "--json", "--stemmer", "none"]) == 0
    assert [hit["id"] for hit in json.loads(capsys.readouterr().out)] == ["a"]
    assert main(["search", "--data", folder, "zebra"]) == 1
    assert "none of the 4 documents has a word of 'zebra'" in capsys.readouterr().err


def test_figures_of_a_folder(capsys, folder):
    assert main(["search", "--data", folder, "--eval", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["documents"], said["queries"]) == (4, 3)
    assert (said["k1"], said["b"], said["stemmer"], said["stopwords"]) == (0.9, 0.4, "porter", "english")
    assert "EnglishAnalyzer" in said["words"]
    # q1: a first. q2: nothing. q3: the document q3 is the query itself; then c ("run" twice), then b ("wind") or a.
    assert said["figures"]["recall@100"] == pytest.approx((1 + 0 + 1) / 3)
    assert said["figures"]["MRR@10"] == pytest.approx((1 + 0 + 1) / 3)
    assert 0.6 < said["figures"]["nDCG@10"] <= 2 / 3
    assert said["published"] == {"nDCG@10": 0.6789, "recall@100": 0.9253}


def test_figures_are_printed_beside_the_published(capsys, folder):
    assert main(["search", "--data", folder, "--eval", "--k1", "1.2", "--b", "0.75", "--stopwords", "none"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("scifact: 4 documents, 3 queries with judgements\n")
    assert "k1 1.2, b 0.75, stemmer porter, stopwords none\nwords as mlsys.retrieval.tokenize.LUCENE finds them" in said
    assert "published 0.6789" in said
    assert "Anserini" in said
    assert said.endswith("not comparable: the published runs have k1 0.9, b 0.4, stopwords english\n")
    assert main(["search", "--data", folder, "--eval"]) == 0
    assert "not comparable" not in capsys.readouterr().out


def test_figures_of_the_documentation(capsys):
    assert main(["search", "--eval", "--json"]) == 0
    with_stems = json.loads(capsys.readouterr().out)["figures"]
    assert main(["search", "--eval", "--json", "--stemmer", "none", "--stopwords", "none"]) == 0
    without = json.loads(capsys.readouterr().out)
    assert without["published"] == {}
    assert with_stems["nDCG@10"] > without["figures"]["nDCG@10"] + 0.02 > 0.3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["search"], "nothing to look for: add words"),
        (["search", "--eval", "cat"], "--eval asks the corpus' own queries; leave out 'cat'"),
        (["search", "--data", "nowhere", "cat"], "corpus.jsonl is missing"),
        (["search", "--data", "nowhere", "--eval"], "nowhere is no folder"),
        (["search", "--data", "nowhere", "cat", "--packages", "numpy"], "--packages adds to Python's documentation"),
        (["search", "cat", "--stemmer", "portr"], "did you mean 'porter'?"),
        (["search", "cat", "--stopwords", "klingon"], "stopwords: there is none called 'klingon'"),
        (["search", "cat", "--k1", "-1"], "k1 must be at least 0"),
        (["search", "cat", "--b", "2"], "b must be between 0 and 1"),
    ],
)
def test_requests_that_cannot_be_met(fails, words, message):
    assert message in fails(*words)
