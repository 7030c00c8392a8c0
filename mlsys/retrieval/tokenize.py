"""From text to terms: what counts as a word decides what a search can find.

A tokenizer is a few choices, made alike for documents and queries: which
characters form a word, whether case matters, which words carry no meaning, and,
for program text, whether `ThreadPoolExecutor` is one word or four.

    "parseDate() of HTTPServer"  →  parsedate of httpserver                                (default)
                                 →  parse date parsedate of http server httpserver         (split_identifiers)

With `split_identifiers` an identifier gives its parts and then itself, so that
a search for the exact name still finds it, and finds it first.

Cost:
    One regular-expression pass over the text: about linear in its characters.

Memory:
    The list of tokens; equal tokens of one text are separate strings.

Papers:
    Manning, Raghavan & Schütze 2008, "Introduction to Information Retrieval", §2.2 (tokens, stop words, case).
    The stop words are the 33 of Lucene's `EnglishAnalyzer`.
    Porter 1980, "An algorithm for suffix stripping", Program 14(3), steps 1a and 1b (`stem`).

See also:
    `bm25` (takes a tokenizer, or tokens made by any other).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

_LUCENE_STOPWORDS = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with"
)
ENGLISH = frozenset(_LUCENE_STOPWORDS.split())

_VOWEL = re.compile(r"[aeiouy]")
# between lower and upper case (parse|Date), before the last capital of a run (HTTP|Server), and at underscores
_BOUNDARY = re.compile(r"_+|(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


@dataclass(frozen=True)
class Tokenizer:
    r"""Text → list of tokens: `Tokenizer()("Parse a date")` is `["parse", "a", "date"]`.

    lowercase:         fold case (`str.lower`) before stop words are compared.
    pattern:           regular expression; each match is a token. With one group, the group is the token.
    stopwords:         words to leave out: None, "english" (33 words), or a frozenset of your own.
    split_identifiers: also give the parts of snake_case and camelCase names, before the whole name.
    min_length:        leave out tokens with fewer characters.
    stem:              cut English endings off, so that "parsed" and "parsing" find "parse" (see `stem`).

    Raises TypeError or ValueError for an option that makes no tokenizer.
    """

    lowercase: bool = True
    pattern: str = r"\w+"
    stopwords: frozenset[str] | str | None = None
    split_identifiers: bool = False
    min_length: int = 1
    stem: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        for name in ("lowercase", "split_identifiers", "stem"):
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
                raise ValueError(f'stopwords must be None, "english" or a frozenset of words, got {self.stopwords!r}')
        elif self.stopwords is not None and not isinstance(self.stopwords, frozenset):
            raise TypeError(
                f'stopwords must be None, "english" or a frozenset of words, got a {type(self.stopwords).__name__}'
            )
        elif self.stopwords and not all(isinstance(word, str) for word in self.stopwords):
            raise TypeError("stopwords must hold only strings")
        if isinstance(self.min_length, bool) or not isinstance(self.min_length, int):
            raise TypeError(f"min_length must be an integer, got {self.min_length!r}")
        if self.min_length < 1:
            raise ValueError(f"min_length must be at least 1, got {self.min_length}")

    @cached_property
    def _find(self) -> re.Pattern[str]:
        return re.compile(self.pattern)

    @cached_property
    def _left_out(self) -> frozenset[str]:
        words = ENGLISH if self.stopwords == "english" else frozenset(self.stopwords or ())
        return frozenset(word.lower() for word in words) if self.lowercase else words

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
        return [stem(token) for token in tokens] if self.stem else tokens


def split_identifier(name: str) -> list[str]:
    """The parts of a snake_case or camelCase name and then the name: "parseDate" → ["parse", "Date", "parseDate"].

    A name of one part gives just itself (`_private` gives "_private").
    """
    parts = [part for part in _BOUNDARY.split(name) if part]
    return [name] if len(parts) < 2 else [*parts, name]


def stem(word: str) -> str:
    """An English word without plural -s, -ed, -ing and final -e: "copies", "copied" → "copy", "parsing" → "pars".

    Nearly the first step of Porter's algorithm, and of its last the final -e. What comes out need not be a word; what
    matters is that a word's forms meet. Words of three letters or fewer stay as they are.
    """
    if len(word) <= 3:
        return word
    if word.endswith(("ies", "ied")) and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith("sses"):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    for ending in ("ed", "ing"):
        rest = word.removesuffix(ending)
        if rest != word and len(rest) > 2 and _VOWEL.search(rest):
            doubled = rest[-1] == rest[-2] and rest[-1] not in "aeioulsz"
            word = rest[:-1] if doubled else rest
            break
    return word[:-1] if word.endswith("e") and len(word) > 3 else word
