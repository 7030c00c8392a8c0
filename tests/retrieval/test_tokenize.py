"""`mlsys.retrieval.tokenize`: each option does what it says; bad options are refused."""

import copy
import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys.retrieval.tokenize import ENGLISH, LUCENE, Tokenizer, split_identifier, stemmers


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
    ("stemmer", "forms"),
    [
        ("english", "copy copies copied"),
        ("english", "delete deletes deleted deleting"),
        ("porter", "run running runs"),
        ("porter", "directory directories"),
        ("german", "haus häuser"),
        ("french", "continuer continué"),
    ],
)
def test_forms_meet(stemmer, forms):
    assert len(set(Tokenizer(stemmer=stemmer)(forms))) == 1
    assert len(set(Tokenizer()(forms))) == len(forms.split())


def test_stemming_comes_last():
    tokenizer = Tokenizer(stemmer="english", stopwords=frozenset({"cats"}), min_length=4)
    assert tokenizer("Cats this Running dogs") == ["this", "run", "dog"]


def test_porter_leaves_short_words_alone_as_lucene_does():
    assert Tokenizer(stemmer="porter")("us s is bus this") == ["us", "s", "is", "bu", "thi"]


def test_no_word_is_stemmed_away():
    for stemmer in stemmers():
        tokenizer = Tokenizer(stemmer=stemmer)
        assert all(tokenizer("a s is ed ing 1 x_1 ly é"))


def test_stop_words_of_another_language():
    assert Tokenizer(stopwords="german")("Der Hund und die Katze") == ["hund", "katze"]


def test_lucene_keeps_together_what_its_analyzer_does():
    plain = Tokenizer(pattern=LUCENE.pattern)
    assert plain("don't 3.14 1,000 U.S.A. e.g. x_1") == ["don't", "3.14", "1,000", "u.s.a", "e.g", "x_1"]
    assert plain("a, b 'quoted' end. 2,x y.3 a-b") == ["a", "b", "quoted", "end", "2", "x", "y", "3", "a", "b"]
    assert plain("the cat's James' O’Neil’s it's. CAT'S") == ["the", "cat", "james", "o’neil", "it", "cat"]
    assert plain("cat's's 's cat'sx") == ["cat's", "s", "cat'sx"]
    assert LUCENE("The vitamins' effects, and not the cats' (1.5 mg)") == ["vitamin", "effect", "cat", "1.5", "mg"]


@given(st.text(alphabet="ab1'’.,:s _-S", max_size=20))
def test_lucene_loses_nothing_but_possessives(text):
    tokens = Tokenizer(pattern=LUCENE.pattern, lowercase=False)(text)
    rest = text
    for token in tokens:  # in order, and what lies between them is no word
        before, found, rest = rest.partition(token)
        assert found
        assert not re.sub("['’][sS]", "", before).strip("'’.,:- ")
    assert not re.sub("['’][sS]", "", rest).strip("'’.,:- ")


def test_can_be_copied_and_sent_after_use():
    tokenizer = Tokenizer(stemmer="english", stopwords="english")
    assert tokenizer("the dogs") == ["dog"]
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other == tokenizer
        assert other("the dogs") == ["dog"]


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
        (
            {"stemmer": True},
            TypeError,
            'stemmer must be None or the name of one, such as "english" or "porter", got True',
        ),
        ({"stemmer": "portr"}, ValueError, "stemmer: there is none called 'portr'; did you mean 'porter'"),
        ({"pattern": "("}, ValueError, "no regular expression"),
        ({"pattern": "(a)(b)"}, ValueError, "2 groups"),
        ({"pattern": 3}, TypeError, "pattern must be a string"),
        ({"stopwords": "germn"}, ValueError, "stopwords: there is none called 'germn'; did you mean 'german'"),
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
