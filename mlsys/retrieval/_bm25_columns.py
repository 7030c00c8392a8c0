"""What BM25 counts in documents, and what a search reads: postings by term, and the impact of each.

See also:
    `bm25` (what the columns are for), `_bm25_variants` (the formulas).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlsys.retrieval._bm25_variants import VARIANTS


@dataclass(frozen=True)
class Counts:
    """What is counted in documents: the postings in columns, and how long each document is."""

    lengths: np.ndarray  # (n_documents,) tokens
    indptr: np.ndarray  # (n_terms + 1,)
    indices: np.ndarray  # (n_postings,)
    tf: np.ndarray  # (n_postings,)

    def followed_by(self, other: Counts) -> Counts:
        """The counts of these documents and then those of `other`, whose terms are these and perhaps more."""
        n_terms = len(other.indptr) - 1
        mine = np.diff(self.indptr, append=np.full(n_terms - len(self.indptr) + 1, self.indptr[-1]))
        theirs = np.diff(other.indptr)
        indptr = np.zeros(n_terms + 1, np.int64)
        np.cumsum(mine + theirs, out=indptr[1:])
        indices, tf = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.int32)
        first = indptr[:-1]
        for part, df, start, shift in ((self, mine, first, 0), (other, theirs, first + mine, len(self.lengths))):
            # Its postings lie in the same order as before; a term's begin at its `start`.
            place = np.arange(len(part.tf)) + np.repeat(start - (np.cumsum(df) - df), df)
            indices[place] = part.indices + np.int32(shift)
            tf[place] = part.tf
        return Counts(np.concatenate([self.lengths, other.lengths]), indptr, indices, tf)


@dataclass(frozen=True)
class Columns:
    """What a search reads: computed from counts and parameters alone."""

    counts: Counts
    average_length: float
    impacts: np.ndarray  # (n_postings,) float32
    absent: np.ndarray  # (n_terms,) float64
    positive: bool  # all impacts: then a score of 0 says that nothing matched. Okapi's need not be


def weigh(counts: Counts, parameters: Mapping[str, Any]) -> Columns:
    """The impact of every posting, by `BM25.parameters_`."""
    variant, k1, b = VARIANTS[parameters["variant"]], parameters["k1"], parameters["b"]
    delta = (variant.delta or 0.0) if parameters["delta"] is None else parameters["delta"]
    df = np.diff(counts.indptr)
    average_length = float(counts.lengths.mean())
    idf = variant.idf(len(counts.lengths), df.astype(np.float64)) if len(df) else np.empty(0)
    length = (counts.lengths / (average_length or 1.0))[counts.indices]
    absent = idf * variant.absent(delta)
    factor = variant.tf(counts.tf.astype(np.float64), length, k1, b, delta)
    impacts = (np.repeat(idf, df) * factor - np.repeat(absent, df)).astype(np.float32)
    return Columns(counts, average_length, impacts, absent, bool((impacts > 0).all()))
