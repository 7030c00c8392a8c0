"""Texts as rows of term ids: each new word of the documents gets the next number, a query's words are looked up.

Many texts are done in one pass through C; no Python code runs for each token.

See also:
    `tokenize` (a text as tokens), `bm25` (which counts the terms).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, compress, count, repeat

import numpy as np

from mlsys.retrieval.tokenize import Tokenizer

Texts = Sequence[str | Sequence[str]]  # each a string, or a list of tokens
Tokenize = Callable[[str], Sequence[str]]


def tokenized(argument: str, texts: Texts, tokenizer: Tokenize | None) -> list[Sequence[str]]:
    """Each text as a list of tokens; None is `Tokenizer()`. TypeError for what is no text."""
    if isinstance(texts, str | bytes):
        raise TypeError(f"{argument} must be a list of texts, got the single string {texts!r:.60}: use [{texts!r:.60}]")
    found: list[Sequence[str]] = []
    for position, text in enumerate(texts):
        if isinstance(text, list | tuple):
            found.append(text)
        elif isinstance(text, str):
            tokenizer = tokenizer or Tokenizer()
            found.append(tokenizer(text))
        else:
            raise TypeError(f"{argument}[{position}] must be a string or a list of tokens, got {type(text).__name__}")
    return found


def numbered(documents: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """The term ids of all documents in a row, the length of each, and the vocabulary, in order of first occurrence."""
    lengths = _lengths(documents)
    numbering: defaultdict[str, int] = defaultdict(count().__next__)  # looking a new token up gives it the next id
    terms = _looked_up("documents", documents, numbering.__getitem__, lengths)
    _check_strings("documents", numbering)
    return terms, lengths, dict(numbering)


def numbered_on(
    documents: Sequence[Sequence[str]], vocabulary: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """As `numbered`, after the documents that gave this vocabulary: which words come to it."""
    lengths = _lengths(documents)
    terms = _looked_up("documents", documents, vocabulary.get, lengths, repeat(-1))
    fresh: dict[str, int] = {}
    unknown = terms < 0
    if unknown.any():
        words = list(compress(chain.from_iterable(documents), unknown))
        _check_strings("documents", words)
        fresh.update((word, len(vocabulary) + i) for i, word in enumerate(dict.fromkeys(words)))
        terms[unknown] = [fresh[word] for word in words]
    return terms, lengths, fresh


def known(
    argument: str, texts: Texts, tokenizer: Tokenize | None, vocabulary: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The term ids of all queries in a row (-1: not in the vocabulary), and where each begins (n_queries + 1,)."""
    queries = tokenized(argument, texts, tokenizer)
    lengths = _lengths(queries)
    terms = _looked_up(argument, queries, vocabulary.get, lengths, repeat(-1))
    if (terms < 0).any():  # a token that is known is a string
        _check_strings(argument, chain.from_iterable(queries))
    return terms, np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def _lengths(texts: Sequence[Sequence[str]]) -> np.ndarray:
    return np.fromiter(map(len, texts), np.int64, len(texts))


def _looked_up(
    argument: str,
    texts: Sequence[Sequence[str]],
    number: Callable[..., int],
    lengths: np.ndarray,
    *default: repeat[int],
) -> np.ndarray:
    try:
        return np.fromiter(map(number, chain.from_iterable(texts), *default), np.int64, int(lengths.sum()))
    except TypeError:  # a list inside a list of tokens cannot be looked up
        _check_strings(argument, chain.from_iterable(texts))
        raise


def _check_strings(argument: str, tokens: Iterable[object]) -> None:
    for token in tokens:
        if not isinstance(token, str):
            raise TypeError(f"{argument}: tokens must be strings, got {token!r:.60} ({type(token).__name__})")
