"""`mlsys.retrieval.tokenize`: each option does what it says; bad options are refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys.retrieval.tokenize import ENGLISH, Tokenizer, split_identifier, stem


def test_default_is_lowercase_words():
    assert Tokenizer()("Parse a DATE, e.g. x_1!") == ["parse", "a", "date", "e", "g", "x_1"]
    assert Tokenizer()("") == []
    assert Tokenizer()("Größe café 日本") == ["größe", "café", "日本"]


def test_case_is_kept_when_asked():
    assert Tokenizer(lowercase=False)("The Cat") == ["The", "Cat"]


def test_stopwords():
    assert Tokenizer(stopwords="english")("The cat and the hat") == ["cat", "hat"]
    assert Tokenizer(stopwords=frozenset({"CAT"}))("The cat") == ["the"]  # folded like the text
    assert Tokenizer(stopwords=frozenset({"CAT"}), lowercase=False)("cat CAT") == ["cat"]
    assert len(ENGLISH) == 33


def test_pattern_and_its_group():
    assert Tokenizer(pattern=r"[a-z]+")("ab1cd") == ["ab", "cd"]
    assert Tokenizer(pattern=r"#(\w+)")("a #b #c") == ["b", "c"]
    assert Tokenizer(pattern=r"x*")("xxa") == ["xx"]  # empty matches are no words


def test_min_length():
    assert Tokenizer(min_length=3)("go on then") == ["then"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("parseDate", ["parse", "Date", "parseDate"]),
        ("HTTPServer", ["HTTP", "Server", "HTTPServer"]),
        ("snake_case_name", ["snake", "case", "name", "snake_case_name"]),
        ("sha256Sum", ["sha256", "Sum", "sha256Sum"]),
        ("plain", ["plain"]),
        ("_private", ["_private"]),
        ("HTTP", ["HTTP"]),
        ("café", ["café"]),
        ("__", ["__"]),
    ],
)
def test_split_identifier(name, parts):
    assert split_identifier(name) == parts


def test_identifiers_give_parts_and_themselves():
    assert Tokenizer(split_identifiers=True)("the HTTPServer") == ["the", "http", "server", "httpserver"]
    assert Tokenizer()("the HTTPServer") == ["the", "httpserver"]


@pytest.mark.parametrize(
    "forms",
    ["parse parses parsed parsing", "copy copies copied", "delete deletes deleted deleting", "run running",
     "directory directories", "compress compresses compressed", "class classes", "fall falling", "split splitting"],
)  # fmt: skip
def test_stem_makes_forms_meet(forms):
    assert len({stem(word) for word in forms.split()}) == 1


@pytest.mark.parametrize("word", ["is", "bus", "string", "thing", "this", "class", "need", "bed", "red"])
def test_stem_leaves_alone(word):
    assert stem(word) == word


@given(st.text())
def test_splitting_adds_and_never_loses(text):
    whole = Tokenizer()(text)
    split = Tokenizer(split_identifiers=True)(text)
    assert set(whole) <= set(split)
    assert all(token and token == token.lower() for token in split)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lowercase": 1}, TypeError, "lowercase must be True or False, got 1"),
        ({"split_identifiers": "yes"}, TypeError, "split_identifiers"),
        ({"stem": None}, TypeError, "stem must be True or False"),
        ({"pattern": "("}, ValueError, "no regular expression"),
        ({"pattern": "(a)(b)"}, ValueError, "2 groups"),
        ({"pattern": 3}, TypeError, "pattern must be a string"),
        ({"stopwords": "german"}, ValueError, "german"),
        ({"stopwords": {"a"}}, TypeError, "got a set"),
        ({"stopwords": frozenset({1})}, TypeError, "only strings"),
        ({"min_length": 0}, ValueError, "at least 1"),
        ({"min_length": 1.5}, TypeError, "integer"),
        ({"min_length": True}, TypeError, "integer"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Tokenizer(**options)


def test_takes_one_string():
    with pytest.raises(TypeError, match="one string, got list"):
        Tokenizer()(["a"])


def test_is_a_value():
    assert Tokenizer(min_length=2) == Tokenizer(min_length=2)
    assert hash(Tokenizer()) == hash(Tokenizer())
    with pytest.raises(AttributeError):
        Tokenizer().min_length = 3
