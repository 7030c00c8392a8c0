"""From text to terms: what counts as a word decides what a search can find.

A tokenizer is a few choices, made alike for documents and queries: which
characters form a word, whether case matters, which words carry no meaning,
whether `copies` and `copied` are one word, and, for program text, whether
`ThreadPoolExecutor` is one word or four.

    "parseDate() of HTTPServers"  →  parsedate of httpservers                              (default)
                                  →  parsed of httpserver                                  (stemmer="english")
                                  →  parse date parsedate of http servers httpservers      (split_identifiers)

With `split_identifiers` an identifier gives its parts and then itself, so that
a search for the exact name still finds it, and finds it first.

A stemmer cuts the endings off by a language's rules. What is left need not be a
word (`directories` → `directori`); what matters is that a word's forms meet.
Forms that should not meet sometimes do (`universe` and `university` → `univers`):
a stemmer gains recall and loses some precision.

`LUCENE` makes nearly the choices of Lucene's `EnglishAnalyzer`, on which most
published BM25 figures rest: words joined by an apostrophe or a point are one
(`don't`, `3.14`, `U.S.A`), a possessive 's goes, then stop words, then Porter's stemmer.

Cost:
    One regular-expression pass over the text: about linear in its characters. A stemmer, in C, takes about as long.

Memory:
    The list of tokens; equal tokens of one text are separate strings.

Papers:
    Manning, Raghavan & Schütze 2008, "Introduction to Information Retrieval", §2.2 (tokens, stop words, case, stems).
    Porter 1980, "An algorithm for suffix stripping", Program 14(3) (the stemmer "porter").
    Porter 2001, "Snowball: A language for stemming algorithms" (the others; "english" is his later revision).
    Davis & Iancu, Unicode Standard Annex 29, rules WB6, WB7, WB11 and WB12 (what joins a word in `LUCENE`).

See also:
    `bm25` (takes a tokenizer, or tokens made by any other).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

_LUCENE_STOPWORDS = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with"
)
ENGLISH = frozenset(_LUCENE_STOPWORDS.split())

# between lower and upper case (parse|Date), before the last capital of a run (HTTP|Server), and at underscores
_BOUNDARY = re.compile(r"_+|(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")

_LETTER = r"[^\W\d_]"
_JOIN = rf"(?:(?<={_LETTER})['’.:·](?={_LETTER})|(?<=\d)['’.,;](?=\d))"  # between letters, or between digits
_END = rf"(?!\w|{_JOIN}\w)"
_LUCENE_WORD = rf"(\w+(?:{_JOIN}\w+)*?)(?:['’][sS]{_END})?{_END}"


@dataclass(frozen=True)
class Tokenizer:
    r"""Text → list of tokens: `Tokenizer()("Parse a date")` is `["parse", "a", "date"]`.

    lowercase:         fold case (`str.lower`) before stop words are compared.
    pattern:           regular expression; each match is a token. With one group, the group is the token.
    stopwords:         words to leave out: None, "english" (Lucene's 33), another language ("german": the list of the
                       package stop-words), or a frozenset of your own.
    split_identifiers: also give the parts of snake_case and camelCase names, before the whole name.
    min_length:        leave out tokens with fewer characters, counted before stemming.
    stemmer:           cut endings off, so that "copied" and "copies" meet: None, "english", "porter" (Lucene's),
                       "german" and every other of the Snowball stemmers. They expect lower case.

    Raises TypeError or ValueError for an option that makes no tokenizer.
    """

    lowercase: bool = True
    pattern: str = r"\w+"
    stopwords: frozenset[str] | str | None = None
    split_identifiers: bool = False
    min_length: int = 1
    stemmer: str | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        for name in ("lowercase", "split_identifiers"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.pattern, str):
            raise TypeError(f"pattern must be a string, got {type(self.pattern).__name__}")
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} is no regular expression: {error}") from None
        if groups > 1:
            raise ValueError(f"pattern {self.pattern!r} has {groups} groups; use at most one, and (?:…) for the others")
        if isinstance(self.stopwords, str):
            if self.stopwords != "english":
                _known(
                    "stopwords", self.stopwords, ["english", *_stop_word_languages()], "or give a frozenset of words"
                )
        elif self.stopwords is not None and not isinstance(self.stopwords, frozenset):
            raise TypeError(
                'stopwords must be None, a language such as "english" or a frozenset of words, '
                f"got a {type(self.stopwords).__name__}"
            )
        elif self.stopwords and not all(isinstance(word, str) for word in self.stopwords):
            raise TypeError("stopwords must hold only strings")
        if isinstance(self.min_length, bool) or not isinstance(self.min_length, int):
            raise TypeError(f"min_length must be an integer, got {self.min_length!r}")
        if self.min_length < 1:
            raise ValueError(f"min_length must be at least 1, got {self.min_length}")
        if self.stemmer is not None:
            if not isinstance(self.stemmer, str):
                raise TypeError(
                    f'stemmer must be None or the name of one, such as "english" or "porter", got {self.stemmer!r}'
                )
            _known("stemmer", self.stemmer, stemmers(), "None is no stemming")

    @cached_property
    def _find(self) -> re.Pattern[str]:
        return re.compile(self.pattern)

    @cached_property
    def _left_out(self) -> frozenset[str]:
        words = self.stopwords or frozenset()
        if isinstance(words, str):
            words = _stop_words(words)
        return frozenset(word.lower() for word in words) if self.lowercase else words

    @cached_property
    def _stem(self) -> Any:
        import Stemmer

        assert self.stemmer is not None
        return Stemmer.Stemmer(self.stemmer)

    def __getstate__(self) -> dict[str, Any]:
        """The options alone: a stemmer is a C object, which cannot be copied or sent; it is made again."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __call__(self, text: str) -> list[str]:
        """The tokens of `text`, in order, with repetitions. TypeError if `text` is not a string."""
        if not isinstance(text, str):
            raise TypeError(f"a tokenizer takes one string, got {type(text).__name__}")
        if self.split_identifiers:  # needs the capitals, so case is folded afterwards
            words = [part for word in self._find.findall(text) for part in split_identifier(word)]
            tokens = [word.lower() for word in words] if self.lowercase else words
        else:
            tokens = self._find.findall(text.lower() if self.lowercase else text)
        if self._left_out:
            tokens = [token for token in tokens if token not in self._left_out]
        tokens = [token for token in tokens if len(token) >= self.min_length]
        if self.stemmer is None:
            return tokens
        shortest = 3 if self.stemmer == "porter" else 1  # Porter's own program, and Lucene's, leave "us" and "s" alone
        stems = self._stem.stemWords(tokens)
        return [stem if stem and len(token) >= shortest else token for token, stem in zip(tokens, stems, strict=True)]


def stemmers() -> list[str]:
    """The names that `stemmer` takes, some thirty languages and "porter"."""
    import Stemmer

    return sorted(Stemmer.algorithms())


def split_identifier(name: str) -> list[str]:
    """The parts of a snake_case or camelCase name and then the name: "parseDate" → ["parse", "Date", "parseDate"].

    A name of one part gives just itself (`_private` gives "_private").
    """
    parts = [part for part in _BOUNDARY.split(name) if part]
    return [name] if len(parts) < 2 else [*parts, name]


def _stop_word_languages() -> list[str]:
    import stop_words

    return sorted({*stop_words.LANGUAGE_MAPPING.values()} - {"english"})


def _stop_words(language: str) -> frozenset[str]:
    if language == "english":
        return ENGLISH
    import stop_words

    return frozenset(stop_words.get_stop_words(language))


def _known(option: str, name: str, names: list[str], otherwise: str) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{option}: there is none called {name!r}; {meant}known are {', '.join(names)}; {otherwise}")


LUCENE = Tokenizer(pattern=_LUCENE_WORD, stopwords="english", stemmer="porter")  # nearly Lucene's EnglishAnalyzer
