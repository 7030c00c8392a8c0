"""Vectors for words and documents without a neural network: latent semantic analysis.

Words that occur in the same documents get vectors that point the same way. The
matrix of documents and words (how often, times how rare) is written as U S Vᵀ by a
truncated singular value decomposition: a row of V S is a word, and a document is
what its words' rows of V add up to.

No match for a trained encoder, but real: it is made from the text at hand in
seconds, it finds what shares no word with the query, and it gives late interaction
a vector for every token and other indexes one for every document.

    >>> latent = fit(token_lists)
    >>> latent.documents(token_lists)       # (n, d), of length 1
    >>> latent.tokens(["parse", "date"])    # (2, d), of length 1; unknown words are left out

Cost:
    The decomposition: some hundred products of the sparse matrix with a block of vectors, seconds for 10,000 documents.

Memory:
    4 · d bytes a word.

Papers:
    Deerwester et al. 1990, "Indexing by Latent Semantic Analysis" (documents and words in a truncated SVD).

See also:
    `mlsys.retrieval.late_interaction`, `mlsys.retrieval.fusion` (which join such vectors with BM25).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Tokens = Sequence[str]


@dataclass(frozen=True)
class Latent:
    """Words as vectors.

    vocabulary: word → its row.
    rarity:     (n_words,) float32, ln(N / df): how much a word weighs.
    axes:       (n_words, d) float32, V.
    scale:      (d,) float32, S.
    """

    vocabulary: dict[str, int]
    rarity: np.ndarray
    axes: np.ndarray
    scale: np.ndarray

    def tokens(self, text: Tokens, *, weighted: bool = False) -> np.ndarray:
        """A vector for each known word of a text, float32 (n, d), of length 1; `weighted`: of length `rarity`."""
        rows = np.array([self.vocabulary[word] for word in text if word in self.vocabulary], np.int64)
        vectors = _unit(self.axes[rows] * self.scale)
        return vectors * self.rarity[rows, None] if weighted else vectors

    def documents(self, texts: Sequence[Tokens]) -> np.ndarray:
        """A vector for each text, float32 (n, d), of length 1; zeros where no word is known."""
        found = np.zeros((len(texts), len(self.scale)), np.float32)
        for i, text in enumerate(texts):
            counts = Counter(self.vocabulary[word] for word in text if word in self.vocabulary)
            if counts:
                rows = np.fromiter(counts, np.int64, len(counts))
                weights = (1 + np.log(np.fromiter(counts.values(), np.float32, len(counts)))) * self.rarity[rows]
                found[i] = weights @ self.axes[rows]
        return _unit(found)


def fit(texts: Sequence[Tokens], dim: int = 96) -> Latent:
    """The latent space of these texts, of at most `dim` dimensions; words of a single text are left out."""
    from scipy.sparse import csr_array
    from scipy.sparse.linalg import svds

    df = Counter(word for text in texts for word in set(text))
    vocabulary = {word: i for i, word in enumerate(word for word, count in df.items() if count > 1)}
    if min(len(texts), len(vocabulary)) < 2:
        raise ValueError(f"texts must be at least two that share at least two words, got {len(texts)}")
    rarity = np.log(len(texts) / np.array([df[word] for word in vocabulary])).astype(np.float32)
    rows, columns, weights = [], [], []
    for i, text in enumerate(texts):
        counts = Counter(vocabulary[word] for word in text if word in vocabulary)
        of = np.fromiter(counts, np.int64, len(counts))
        weight = (1 + np.log(np.fromiter(counts.values(), np.float64, len(counts)))) * rarity[of]
        rows.append(np.full(len(of), i))
        columns.append(of)
        weights.append(weight / (np.linalg.norm(weight) or 1.0))
    shape = len(texts), len(vocabulary)
    matrix = csr_array((np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns))), shape=shape)
    k = min(dim, min(shape) - 1)
    _, scale, axes = svds(matrix, k=k, v0=np.random.default_rng(0).normal(size=min(shape)))  # the same in every run
    return Latent(vocabulary, rarity, np.ascontiguousarray(axes.T, np.float32), scale.astype(np.float32))


def _unit(x: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return np.divide(x, length, out=np.zeros_like(x), where=length > 0)
