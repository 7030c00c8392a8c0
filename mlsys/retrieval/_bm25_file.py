"""A BM25 index on disk: its parameters, words and counts; what is computed from these is left out.

See also:
    `_index_file` (the two files, and how they are replaced), `bm25` (`save` and `load`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from mlsys.retrieval import _bm25_variants, _index_file
from mlsys.retrieval._bm25_columns import Counts
from mlsys.retrieval._bm25_texts import Tokenize
from mlsys.retrieval.tokenize import Tokenizer

FORMAT = "mlsys.bm25/2"  # of a saved index, which holds these settings and arrays:
SETTINGS = ("variant", "k1", "b", "delta", "tokenizer")
ARRAYS = {
    "vocabulary": np.uint8,  # UTF-8 of a JSON list: the words, by term id
    "lengths": np.int64,
    "indptr": np.int64,
    "indices": np.int32,
    "tf": np.int32,
}
COUNTS = ("lengths", "indptr", "indices", "tf")  # those of them that are fields of `Counts`, in its order


def write(
    folder: str | os.PathLike[str], parameters: Mapping[str, Any], vocabulary: Mapping[str, int], counts: Counts
) -> None:
    """Save these in `folder`; of a tokenizer that is no `Tokenizer`, only that it was one of one's own."""
    settings = {**parameters, "tokenizer": _tokenizer_settings(parameters["tokenizer"])}
    words = np.frombuffer(json.dumps(list(vocabulary)).encode(), np.uint8)
    arrays = {name: getattr(counts, name) for name in COUNTS}
    _index_file.write(folder, FORMAT, settings, {"vocabulary": words, **arrays})


def read(folder: str | os.PathLike[str], tokenizer: Tokenize | None) -> tuple[dict[str, Any], dict[str, int], Counts]:
    """The parameters, with this tokenizer in place of the saved one if it is given; the vocabulary; and the counts.

    IndexFileError for files that make no index, ValueError if a tokenizer is needed.
    """
    settings, arrays = _index_file.read(folder, FORMAT)
    problem = _problem(settings, arrays)
    if problem:
        raise _unusable(folder, problem)
    if settings["tokenizer"] == "custom" and tokenizer is None:
        raise ValueError(f"the index in {folder} was made with a tokenizer of one's own: give it as tokenizer=…")
    try:
        parameters = {name: settings[name] for name in SETTINGS}
        _bm25_variants.check(*(parameters[name] for name in ("variant", "k1", "b", "delta")))
        parameters["tokenizer"] = tokenizer or _tokenizer_from(settings["tokenizer"])
    except (TypeError, ValueError) as error:
        raise _unusable(folder, error) from None
    vocabulary = {word: term for term, word in enumerate(json.loads(arrays["vocabulary"].tobytes()))}
    return parameters, vocabulary, Counts(*(arrays[name] for name in COUNTS))


def _unusable(folder: str | os.PathLike[str], why: object) -> _index_file.IndexFileError:
    return _index_file.IndexFileError(f"the index in {folder} cannot be used: {why}; save it again")


def _tokenizer_settings(tokenizer: Tokenize | None) -> dict[str, Any] | str:
    """A `Tokenizer`'s options as JSON can hold them; "custom" for any other callable."""
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        return "custom"
    options = asdict(tokenizer or Tokenizer())
    if isinstance(options["stopwords"], frozenset):
        options["stopwords"] = sorted(options["stopwords"])
    return options


def _tokenizer_from(options: dict[str, Any]) -> Tokenizer:
    words = options["stopwords"]
    return Tokenizer(**{**options, "stopwords": frozenset(words) if isinstance(words, list) else words})


def _problem(settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str | None:
    """What is wrong with a saved index, or None. Compiled code must never see ids or offsets that lead nowhere."""
    lacking = [name for name in SETTINGS if name not in settings] + [name for name in ARRAYS if name not in arrays]
    if lacking:
        return f"it lacks {', '.join(lacking)}"
    for name, dtype in ARRAYS.items():
        if arrays[name].ndim != 1 or arrays[name].dtype != dtype:
            return f"{name} is {arrays[name].ndim}-D {arrays[name].dtype}, expected 1-D {np.dtype(dtype)}"
    options = settings["tokenizer"]
    if options != "custom" and not (isinstance(options, dict) and options.keys() == asdict(Tokenizer()).keys()):
        return f"{options!r:.60} are not the options of a Tokenizer"
    try:
        words = json.loads(arrays["vocabulary"].tobytes())
    except (ValueError, RecursionError):
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words) or len(set(words)) < len(words):
        return "its vocabulary is no list of distinct words"
    lengths, indptr, indices, tf = (arrays[name] for name in COUNTS)
    if (
        not len(lengths)
        or len(indptr) - 1 != len(words)
        or indptr[0] != 0
        or (np.diff(indptr) < 0).any()
        or not len(tf) == len(indices) == indptr[-1]
        or (len(indices) and not 0 <= indices.min() <= indices.max() < len(lengths))
    ):
        return "its arrays do not fit together"
    starts = np.zeros(len(indices) + 1, np.bool_)
    starts[indptr[:-1]] = True  # where documents need not ascend: a term begins
    if (np.diff(indices) <= 0).any() and ((np.diff(indices) <= 0) & ~starts[1:-1]).any():
        return "a term has a document twice, or not in order"
    if (len(tf) and tf.min() < 1) or (np.bincount(indices, tf, len(lengths)) != lengths).any():
        return "its counts do not add up to the lengths of its documents"
    return None
