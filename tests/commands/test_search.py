"""`mlsys search` finds what a person means, and says what it found and where."""

import json

import pytest

from mlsys.cli import main
from mlsys.commands import search
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
    ("word", "parts"), [("parsedat", ["pars", "dat"]), ("tempfil", ["temp", "fil"]), ("xy", []), ("unknown", [])]
)
def test_split_compound(word, parts):
    assert search.split_compound(word, {"pars", "dat", "temp", "fil"}) == parts
