"""Late interaction: a vector for every token, and each token of the query looks for its best match in a document.

One vector a document must say everything at once. ColBERT keeps one for each token,
of query and document, made by the same encoder apart from each other, and lets them
meet only at the end, cheaply enough for a search:

    score(q, d) = Σ_{i ∈ tokens of q}  max_{j ∈ tokens of d}  ⟨q_i, d_j⟩          "MaxSim"

Each query token votes for what matches it best, wherever that stands; a token of the
document that nothing asks for costs nothing. Any token embeddings will do.

Documents differ in length. Padding all to the longest would multiply memory and
FLOPs by longest / mean, and padding must then be masked, or its zeros beat every
negative product. Here the tokens of all documents lie packed, one after the other:

    tokens_   (n_tokens, d)        float32
    starts_   (n_documents + 1)    document i's tokens are starts_[i] … starts_[i+1]

A search takes a block of whole documents that fits into the cache, multiplies it
once with the tokens of a batch of queries, takes the maximum over each document's
rows (a segmented maximum), and the sum over each query's columns:

    block (B, d) @ queriesᵀ (d, T)  →  (B, T)  →max→  (documents, T)  →sum→  (documents, queries)

Exact: all documents are scored. In production another index finds candidates, and
MaxSim orders them anew: `search(…, candidates=ids)`.

Cost:
    2 · d · T · n_tokens FLOPs for T query tokens, in matrix products; T · n_tokens comparisons.

Memory:
    4 · d bytes a document token, read once per batch of queries (512 tokens), and up to half as much room for more
    after `add`; a block's products, 4 · B · T bytes, stay in the cache; 4 · n_documents bytes a query of the batch.

Papers:
    Khattab & Zaharia 2020, arXiv:2004.12832, section 3.3, equation 3 (MaxSim).
    Santhanam et al. 2022, arXiv:2205.09707, section 4.5 (packed instead of padded tokens on the processor).

See also:
    `late_interaction_numba` (the maximum compiled), `bm25` and the vector indexes (for candidates), `fusion`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np

from mlsys.retrieval import _index_file
from mlsys.retrieval._memory import Growing
from mlsys.retrieval._vectors import LARGEST, array, whole

METRICS = ("ip", "cosine")
FORMAT = "mlsys.late_interaction/1"
BLOCK = 1024  # document tokens multiplied at once; a longer document is a block of its own
BATCH = 512  # query tokens multiplied at once; a longer query is a batch of its own

Packed = Sequence[np.ndarray] | np.ndarray  # (n_tokens_i, d) each, or all in a row (total, d) with their lengths


class LateInteraction:
    """Documents as packed token vectors, searched exactly by MaxSim: `fit`, `add`, `search`, `save`, `load`.

    metric: "ip", the inner product of the token vectors as they are; or "cosine", for which they are stored with
            length 1, and a zero vector is refused. What an encoder of ColBERT's kind gives has length 1 already.

    Documents are numbered in order of arrival. One without tokens is never found.
    Fitted: `tokens_`, `starts_` (see the module). Several threads may search while nothing is added.

        >>> index = LateInteraction().fit([np.eye(3)[:2], np.eye(3)[2:]])
        >>> index.search([np.eye(3)[1:]], k=2)
        (array([[1., 1.]], dtype=float32), array([[0, 1]]))
    """

    def __init__(self, *, metric: str = "ip") -> None:
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}")
        self.metric = metric

    def __len__(self) -> int:
        """How many documents it holds."""
        return len(self.starts_) - 1 if hasattr(self, "_starts") else 0

    @property
    def tokens_(self) -> np.ndarray:
        """The tokens of all documents in a row, float32 (n_tokens, d)."""
        end = self.starts_[-1]
        return self._tokens.view[:end]

    @property
    def starts_(self) -> np.ndarray:
        """Where each document's tokens begin, and where the last one's end, int64 (n_documents + 1,)."""
        if not hasattr(self, "_starts"):
            raise ValueError("this LateInteraction index holds no documents yet: call fit(documents) first")
        return self._starts.view

    def fit(self, documents: Packed, lengths: Sequence[int] | np.ndarray | None = None) -> Self:
        """Replace what the index holds by `documents`.

        documents: a list of arrays (n_tokens_i, d); or, with `lengths` (n_documents,), all of their tokens in a row.

        TypeError or ValueError for what is no list of token vectors; the index is then as it was.
        """
        tokens, counts = self._checked("documents", documents, lengths, None)
        self._tokens, self._starts = Growing(tokens), Growing(_starts(counts))
        return self

    def add(self, documents: Packed, lengths: Sequence[int] | np.ndarray | None = None) -> Self:
        """Add documents after those that are there, as if `fit` had been given all. Arguments and errors of `fit`."""
        if not hasattr(self, "_starts"):
            return self.fit(documents, lengths)
        tokens, counts = self._checked("documents", documents, lengths, self.tokens_.shape[1])
        if len(self._tokens.view) > len(self.tokens_):  # of an `add` that was interrupted between the next two lines
            self._tokens = Growing(self.tokens_)
        self._tokens.append(tokens)
        self._starts.append(self.starts_[-1] + _starts(counts)[1:])
        return self

    def search(
        self, queries: Sequence[np.ndarray], k: int = 10, *, candidates: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best `k` documents for each query: float32 scores and int64 ids, both (n_queries, k), best first.

        queries:    a list of arrays (n_tokens_i, d).
        k:          how many, ≥ 1. With fewer documents, or for a query without tokens, the row ends in id -1 and
                    score -∞.
        candidates: ids (n_queries, any number), -1 is padding: only these are scored, and so ordered anew.

        Equal scores are ordered by id, smallest first. TypeError or ValueError for anything else.
        """
        tokens, counts = self._checked("queries", queries, None, self.tokens_.shape[1])
        k = whole("k", k, 1)
        scores = np.full((len(counts), k), -np.inf, np.float32)
        ids = np.full((len(counts), k), -1, np.int64)
        starts = _starts(counts)
        if candidates is not None:
            for query, own in enumerate(self._candidates(candidates, len(counts))):
                if counts[query] and len(own):
                    found = self._score_some(tokens[starts[query] : starts[query + 1]], own)
                    _keep_best(found, own, scores[query], ids[query])
            return scores, ids
        documents = np.flatnonzero(np.diff(self.starts_))  # those with tokens
        if len(documents):
            for batch in _batches(starts, BATCH):
                asked = batch[counts[batch] > 0]
                if len(asked):
                    own = tokens[starts[batch[0]] : starts[batch[-1] + 1]]
                    found = self._score(own, _starts(counts[asked]), self.tokens_, self._segments(documents))
                    for row, query in zip(found, asked, strict=True):
                        _keep_best(row, documents, scores[query], ids[query])
        return scores, ids

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Save the index in `folder` (safetensors and JSON), in place of one of its kind there: whole, or not at all.

        ValueError if it holds no documents, or if the folder has an index.json of another kind.
        """
        arrays = {"tokens": self.tokens_, "starts": self.starts_}
        _index_file.write(folder, FORMAT, {"metric": self.metric}, arrays)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """The index saved in `folder`. ValueError (IndexFileError) if there is none or a file is damaged."""
        settings, arrays = _index_file.read(folder, FORMAT)
        try:
            index = cls(metric=settings["metric"])
            tokens = array(arrays, "tokens", np.float32, (None, None))
            starts = array(arrays, "starts", np.int64, (None,))
            if len(starts) < 2 or starts[0] != 0 or (np.diff(starts) < 0).any() or starts[-1] != len(tokens):
                raise ValueError("tokens and starts do not fit together")
            if not (_largest(tokens) <= LARGEST).all():
                raise ValueError(f"tokens hold NaN, infinity or numbers beyond {LARGEST:g}")
        except (KeyError, TypeError, ValueError) as error:
            raise _index_file.IndexFileError(f"the index in {folder} cannot be used: {error}; save it again") from None
        index._tokens, index._starts = Growing(tokens), Growing(starts)
        return index

    # --- scoring ------------------------------------------------------------------------------------------------------

    def _segments(self, documents: np.ndarray) -> np.ndarray:
        """Where the tokens of these documents begin, which are all that have any; and where the last ends."""
        return np.append(self.starts_[documents], self.starts_[-1])

    def _score(self, queries: np.ndarray, asked: np.ndarray, tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Float32 scores (n_queries, n_documents) of packed queries (tokens, starts) and documents; none is empty."""
        scores = np.empty((len(asked) - 1, len(starts) - 1), np.float32)
        transposed = np.ascontiguousarray(queries.T)
        for block in _batches(starts, BLOCK):
            first, last = starts[block[0]], starts[block[-1] + 1]
            products = tokens[first:last] @ transposed  # (B, T)
            self._reduce(products, starts[block[0] : block[-1] + 2] - first, asked, scores[:, block[0] : block[-1] + 1])
        return scores

    def _reduce(self, products: np.ndarray, starts: np.ndarray, asked: np.ndarray, scores: np.ndarray) -> None:
        """Fill scores (n_queries, documents of the block): maxima over each document's rows, sums over each query's."""
        best = np.maximum.reduceat(products, starts[:-1], axis=0)  # (documents, T)
        scores[:] = np.add.reduceat(best, asked[:-1], axis=1, dtype=np.float64).T

    def _score_some(self, query: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Float32 scores (n,) of one query and these documents, none of which is empty."""
        counts = self.starts_[documents + 1] - self.starts_[documents]
        starts = _starts(counts)
        rows = np.arange(starts[-1]) + np.repeat(self.starts_[documents] - starts[:-1], counts)
        return self._score(query, np.array([0, len(query)]), self.tokens_[rows], starts)[0]

    # --- the public door ----------------------------------------------------------------------------------------------

    def _candidates(self, candidates: Any, n_queries: int) -> Iterator[np.ndarray]:
        """The distinct ids of each row that have tokens, in ascending order."""
        ids = np.asarray(candidates)
        if ids.ndim != 2 or len(ids) != n_queries or (ids.dtype.kind not in "iu" and ids.size):
            raise ValueError(
                f"candidates must be ids, integers ({n_queries}, any number), a row for each query; "
                f"got {ids.dtype} of shape {ids.shape}"
            )
        if ids.size and not -1 <= ids.min() <= ids.max() < len(self):
            raise ValueError(
                f"candidates must be from 0 to {len(self) - 1} (-1 is padding), got {ids.min()} … {ids.max()}"
            )
        filled = np.diff(self.starts_) > 0
        for row in ids.astype(np.int64):
            own = np.unique(row[row >= 0])
            yield own[filled[own]]

    def _checked(self, name: str, texts: Any, lengths: Any, dim: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Tokens float32 (total, d), contiguous and finite, and how many each text has, int64."""
        if lengths is None:
            if isinstance(texts, np.ndarray) and texts.ndim == 2:
                remedy = "give their lengths, or" if name == "documents" else "give"
                raise TypeError(f"{name} is one array {texts.shape}: {remedy} a list of arrays (n_tokens, d)")
            parts = [_vectors(f"{name}[{i}]", text, dim) for i, text in enumerate(texts)]
            dims = {part.shape[1] for part in parts}
            if len(dims) > 1:
                raise ValueError(f"{name} must have one dimension, got {', '.join(map(str, sorted(dims)))}")
            counts = np.fromiter(map(len, parts), np.int64, len(parts))
            tokens = np.concatenate(parts) if parts else np.empty((0, dim or 1), np.float32)
        else:
            tokens, counts = _vectors(name, texts, dim).copy(), np.asarray(lengths)  # not the memory of the caller
            if counts.ndim != 1 or counts.dtype.kind not in "iu" or (counts < 0).any() or counts.sum() != len(tokens):
                raise ValueError(
                    f"lengths must be whole numbers of at least 0 that add up to {len(tokens)}, the tokens of "
                    f"{name}; got {counts.dtype} of shape {counts.shape} that add up to {counts.sum()}"
                )
            counts = counts.astype(np.int64)
        if name == "documents" and dim is None and not len(counts):
            raise ValueError("documents is empty: an index needs at least one document")
        most = LARGEST if self.metric == "ip" else float(np.finfo(np.float32).max)  # cosine makes large ones small
        bad = ~(_largest(tokens) <= most)
        if bad.any():
            where = _where(name, counts, bad)
            raise ValueError(f"{where} holds NaN, infinity or a number beyond {most:.3g}; {bad.sum()} in all")
        if self.metric == "cosine":
            length = np.sqrt(np.einsum("nd,nd->n", tokens, tokens, dtype=np.float64))
            if not length.all():
                raise ValueError(f"{_where(name, counts, length == 0)} is a zero vector, which has no direction")
            tokens = (tokens / length[:, None]).astype(np.float32)
        return tokens, counts


def _vectors(name: str, text: Any, dim: int | None) -> np.ndarray:
    """Float32 (n_tokens, d), contiguous, a copy if need be."""
    text = np.asarray(text)
    if text.dtype.kind not in "fiu":
        raise TypeError(f"{name} must hold numbers (float32), got {text.dtype}")
    if text.ndim != 2 or not text.shape[1]:
        raise ValueError(f"{name} must be token vectors (n_tokens, d) with d ≥ 1, got shape {text.shape}")
    if dim is not None and text.shape[1] != dim:
        raise ValueError(f"{name} must have dimension {dim}, as the tokens in the index, got {text.shape[1]}")
    with np.errstate(over="ignore"):  # what does not fit into float32 becomes ∞, which is refused
        return np.ascontiguousarray(text, np.float32)


def _largest(tokens: np.ndarray) -> np.ndarray:
    """The largest |number| of each token, (n_tokens,); NaN if it holds one."""
    return np.maximum(tokens.max(axis=1), -tokens.min(axis=1))


def _where(name: str, counts: np.ndarray, bad: Any) -> str:
    """The first bad token: "documents[3], token 5,"."""
    token = int(bad.argmax())
    starts = _starts(counts)
    text = int(np.searchsorted(starts, token, side="right")) - 1
    return f"{name}[{text}], token {token - starts[text]},"


def _starts(counts: np.ndarray) -> np.ndarray:
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


def _batches(starts: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Runs of neighbours, as indices, with at most `most` tokens together, or a single one that has more."""
    n, first = len(starts) - 1, 0
    while first < n:
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + most, side="right")) - 1)
        yield np.arange(first, min(last, n))
        first = last


def _keep_best(found: np.ndarray, documents: np.ndarray, scores: np.ndarray, ids: np.ndarray) -> None:
    """The best of `found`, scores of `documents` (ascending), into scores and ids (k,)."""
    k = len(scores)
    hits = np.arange(len(found))
    if len(found) > k:  # keep those not below the k-th best, ties included, before sorting
        hits = np.flatnonzero(found >= np.partition(found, len(found) - k)[len(found) - k])
    top = hits[np.argsort(-found[hits], kind="stable")][:k]
    scores[: len(top)], ids[: len(top)] = found[top], documents[top]
