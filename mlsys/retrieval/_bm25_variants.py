"""What a term weighs: the variants of BM25, and the parameters that each takes.

The variants differ in two factors (N documents, df of them with the term):

    variant        idf                              factor of tf
    lucene         ln(1 + (N−df+½)/(df+½))          tf/(tf+K)                  Lucene ≥ 8; never negative
    robertson      max(0, ln((N−df+½)/(df+½)))      tf/(tf+K)                  the original, floored as bm25s does
    atire          ln(N/df)                         (k1+1)·tf/(tf+K)
    okapi          ln((N−df+½)/(df+½))              (k1+1)·tf/(tf+K)           as rank_bm25.BM25Okapi, see below
    bm25+          ln((N+1)/df)                     (k1+1)·tf/(tf+K) + δ       as rank_bm25.BM25Plus, see below
    bm25l          ln((N+1)/(df+½))                 tf·(k1+1)·(c+δ)/(k1+c+δ)   c = tf/(K/k1), as rank_bm25.BM25L
    paper-bm25+    ln((N+1)/df)                     (k1+1)·tf/(tf+K) + δ       only where tf > 0 (Lv & Zhai)
    paper-bm25l    ln((N+1)/(df+½))                 (k1+1)·(c+δ)/(k1+c+δ)      only where tf > 0 (Lv & Zhai)

Where the libraries and the papers part:
- okapi: a term in more than half of the documents has a negative idf; rank_bm25
  gives it ¼ of the mean idf over all terms instead (which may be negative too,
  in a tiny corpus). A term in exactly half of them scores 0.
- bm25+: the paper adds δ·idf to documents that *have* the term. rank_bm25 and
  bm25s add it to all documents, a constant per query that changes no ranking.
- bm25l: rank_bm25 multiplies by tf once more, which undoes the saturation;
  bm25s does not, but gives documents without the term the value at c = 0.

See also:
    `bm25` (the index that uses them, with the papers).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from mlsys.retrieval._vectors import number


@dataclass(frozen=True)
class Variant:
    """One way to weigh a term.

    idf:    (N, df (n_terms,)) → (n_terms,).
    tf:     (tf, length, k1, b, delta) → the factor; `length` is |d| / avg|d|; tf and length have one entry a posting.
    delta:  default of δ; None if the variant has none.
    absent: what the factor of tf is where tf = 0, as a function of delta; nonzero only for "bm25+".
    """

    idf: Callable[[int, np.ndarray], np.ndarray]
    tf: Callable[[np.ndarray, np.ndarray, float, float, float], np.ndarray]
    delta: float | None = None
    absent: Callable[[float], float] = lambda delta: 0.0


def _idf_robertson(n: int, df: np.ndarray) -> np.ndarray:
    return np.log(n - df + 0.5) - np.log(df + 0.5)


def _idf_okapi(n: int, df: np.ndarray) -> np.ndarray:
    idf = _idf_robertson(n, df)
    return np.where(idf < 0, 0.25 * idf.mean(), idf)


def _tf_lucene(tf: np.ndarray, length: np.ndarray, k1: float, b: float, delta: float) -> np.ndarray:
    return tf / (tf + k1 * (1 - b + b * length))


def _tf_okapi(tf: np.ndarray, length: np.ndarray, k1: float, b: float, delta: float) -> np.ndarray:
    return (k1 + 1) * _tf_lucene(tf, length, k1, b, delta)


def _tf_plus(tf: np.ndarray, length: np.ndarray, k1: float, b: float, delta: float) -> np.ndarray:
    return _tf_okapi(tf, length, k1, b, delta) + delta


def _tf_l(tf: np.ndarray, length: np.ndarray, k1: float, b: float, delta: float) -> np.ndarray:
    c = tf / (1 - b + b * length) + delta
    return (k1 + 1) * c / (k1 + c)


VARIANTS: Mapping[str, Variant] = {
    "lucene": Variant(lambda n, df: np.log1p((n - df + 0.5) / (df + 0.5)), _tf_lucene),
    "robertson": Variant(lambda n, df: np.maximum(_idf_robertson(n, df), 0), _tf_lucene),
    "atire": Variant(lambda n, df: np.log(n / df), _tf_okapi),
    "okapi": Variant(_idf_okapi, _tf_okapi),
    "bm25+": Variant(lambda n, df: np.log((n + 1) / df), _tf_plus, delta=1.0, absent=lambda delta: delta),
    "bm25l": Variant(lambda n, df: np.log((n + 1) / (df + 0.5)), lambda tf, *rest: tf * _tf_l(tf, *rest), delta=0.5),
    "paper-bm25+": Variant(lambda n, df: np.log((n + 1) / df), _tf_plus, delta=1.0),
    "paper-bm25l": Variant(lambda n, df: np.log((n + 1) / (df + 0.5)), _tf_l, delta=0.5),
}


def check(name: str, k1: float, b: float, delta: float | None) -> None:
    """TypeError or ValueError for parameters that are none."""
    if not isinstance(name, str) or name not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}; got {name!r}")
    if not 0 <= number("k1", k1) < math.inf:
        raise ValueError(f"k1 must be at least 0 and finite (1.2 to 2 is usual), got {k1}")
    if not 0 <= number("b", b) <= 1:
        raise ValueError(f"b must be between 0 and 1 (0.75 is usual), got {b}")
    if delta is None:
        return
    if VARIANTS[name].delta is None:
        raise ValueError(f"delta has no meaning for variant {name!r}; leave it None, got {delta!r}")
    if not 0 <= number("delta", delta) < math.inf:
        raise ValueError(f"delta must be at least 0 and finite, got {delta}")
