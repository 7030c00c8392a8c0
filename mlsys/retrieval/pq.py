"""Product quantization: a vector in 16 bytes, and its distance to a query by 16 look-ups in a table.

Cut the vector into m parts, and replace each part by the nearest of 256 centroids
for that part (its *codebook*, from k-means). A vector is then m bytes, its code:

    x = (x_1, …, x_m)   →   code_j = argmin_v ‖x_j − p_jv‖²   →   x̂ = (p_1,code_1, …, p_m,code_m)

m codebooks of 256 describe 256^m different vectors with 256·d numbers in all. One
codebook as fine would need as many centroids, and as many vectors to find them.

A search never decodes. Distances are sums over parts, and each part of a code
takes one of 256 values, so a query computes them all once, as a table:

    T[j, v] = ‖q_j − p_jv‖²      ‖q − x̂‖² = Σ_j T[j, code_j]        (l2)
    T[j, v] = −⟨q_j, p_jv⟩       −⟨q, x̂⟩ = Σ_j T[j, code_j]         (ip; cosine: 1 more)

That is *asymmetric*: the query stays as it is, only the stored vectors are
rounded. Rounding the query too (symmetric) would let tables be made in advance,
and adds its error once more.

Distances are to x̂, so neighbours come in a slightly wrong order: the search is
over all n, but its recall is not 1, and adding parts (m) is what raises it. The
sum is taken in float32, from j = 1 to m; equal codes have equal distances, and are
ranked by id.

**OPQ.** A cut after every d/m coordinates is arbitrary: if one part varies much
and another hardly at all, bytes are wasted. Distances do not change under a
rotation R, so one can be learned first: PQ of x R. Two steps in turn: with R fixed,
k-means as usual; with the codes fixed, the R nearest to mapping x to x̂, which is
the orthogonal Procrustes problem: with the SVD xᵀx̂ = U S Vᵀ it is R = U Vᵀ. It
starts from the principal axes, dealt out so that all parts vary alike (as products
of eigenvalues, which is optimal for Gaussian data).

Cost:
    fit: 20 iterations of k-means in each part on at most 2^bits · 256 vectors; OPQ: 20 more on a quarter of them.
    encode: 2^bits · d multiply-adds a vector. search: 2^bits · d a query for the table, then m look-ups a vector.

Memory:
    m + 8 bytes a vector (with bits < 8 still m bytes), 4 · 2^bits · d for the codebooks, 4·d² for a rotation.

Papers:
    Jégou, Douze & Schmid 2011, "Product Quantization for Nearest Neighbor Search", TPAMI (§II-B, §III-A: ADC).
    Ge, He, Ke & Sun 2013, "Optimized Product Quantization for Approximate Nearest Neighbor Search", CVPR (§3).
    Schönemann 1966, "A Generalized Solution of the Orthogonal Procrustes Problem" (the rotation).

See also:
    `pq_numba` (the same, compiled), `ivfpq` (codes of residuals, in inverted lists), `exact` (the vectors themselves).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlsys.retrieval import _kmeans
from mlsys.retrieval._ivf_index import check_numbers
from mlsys.retrieval._memory import Growing
from mlsys.retrieval._vectors import Index, array, modest, whole

ITERATIONS = 20  # of k-means in each part, and of OPQ
POINTS = 256  # vectors a centroid, at most
ROTATION_POINTS = 64  # … while the rotation is learned
ENTRIES = 1 << 22  # numbers of tables held at once


@dataclass(frozen=True)
class Quantizer:
    """Codebooks, float32 (m, 2^bits, d/m), and a rotation, float32 (d, d), that comes before them, or None."""

    codebooks: np.ndarray
    rotation: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.codebooks.nbytes + (0 if self.rotation is None else self.rotation.nbytes)

    def encode(self, x: np.ndarray) -> np.ndarray:
        """The nearest centroid of each part of x (n, d): uint8 (n, m)."""
        parts = self.parts(x)
        codes = np.empty(parts.shape[:2], np.uint8)
        for j, book in enumerate(self.codebooks):
            codes[:, j] = _kmeans.nearest(parts[:, j], book)
        return codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes (n, m) → x̂, float32 (n, d)."""
        return rotated(self.joined(codes), None if self.rotation is None else self.rotation.T)

    def parts(self, x: np.ndarray) -> np.ndarray:
        """The parts of x (n, d), rotated and cut: (n, m, d/m)."""
        return rotated(x, self.rotation).reshape(len(x), len(self.codebooks), -1)

    def joined(self, codes: np.ndarray) -> np.ndarray:
        """x̂ before it is rotated back: float32 (n, d)."""
        return self.codebooks[np.arange(len(self.codebooks)), codes].reshape(len(codes), -1)

    def tables(self, queries: np.ndarray, squared: bool) -> np.ndarray:
        """‖q_j − p_jv‖² if `squared`, else −⟨q_j, p_jv⟩: float32 (n_queries, m, 2^bits), summed in float32 in order."""
        parts, books = self.parts(queries), self.codebooks
        tables = np.zeros((len(queries), *books.shape[:2]), np.float32)
        for t in range(books.shape[2]):
            if squared:
                step = parts[:, :, t, None] - books[:, :, t]
                tables += step * step
            else:
                tables -= parts[:, :, t, None] * books[:, :, t]
        return tables


def train(x: np.ndarray, m: int, bits: int, *, opq: bool, seed: int) -> Quantizer:
    """A quantizer for vectors like x (n, d): n ≥ 2^bits, d a multiple of m."""
    size = 1 << bits
    rotation = learned_rotation(x, m, bits, seed) if opq else None
    parts = rotated(x, rotation).reshape(len(x), m, -1)
    books = [
        _kmeans.kmeans(np.ascontiguousarray(parts[:, j]), size, seed=(seed, j), iterations=ITERATIONS, points=POINTS)
        for j in range(m)
    ]
    return Quantizer(np.stack(books), rotation)


def learned_rotation(x: np.ndarray, m: int, bits: int, seed: int) -> np.ndarray:
    """The rotation of OPQ, float32 (d, d): codes and rotation in turn, each the best for the other."""
    size = 1 << bits
    rng = np.random.default_rng((seed, m))
    if len(x) > size * ROTATION_POINTS:
        x = x[np.sort(rng.choice(len(x), size * ROTATION_POINTS, replace=False))]
    rotation = balanced_axes(x, m)
    parts = rotated(x, rotation).reshape(len(x), m, -1)
    books = parts[np.sort(rng.choice(len(x), size, replace=False))].transpose(1, 0, 2).copy()
    for _ in range(ITERATIONS):
        parts = rotated(x, rotation).reshape(len(x), m, -1)
        for j in range(m):
            part = np.ascontiguousarray(parts[:, j])
            books[j] = _kmeans.moved(part, _kmeans.nearest(part, books[j]), books[j])
        found = Quantizer(books, rotation)
        near = found.joined(found.encode(x))
        u, _, vt = np.linalg.svd(x.T.astype(np.float64) @ near)
        rotation = (u @ vt).astype(np.float32)
    return rotation


def balanced_axes(x: np.ndarray, m: int) -> np.ndarray:
    """The principal axes of x as columns, float32 (d, d), dealt to m parts: each goes where the product is least."""
    d = x.shape[1]
    variances, axes = np.linalg.eigh(np.cov(x.T.astype(np.float64)).reshape(d, d))
    logs = np.log(np.maximum(variances, max(variances.max(initial=0.0), 1e-30) * 1e-12))
    logs -= logs.min()  # all at least 0, or the part that has the most axes would have the least product
    parts: list[list[int]] = [[] for _ in range(m)]
    for axis in np.argsort(-variances, kind="stable").tolist():
        free = [part for part in parts if len(part) < d // m]
        min(free, key=lambda part: float(logs[part].sum()) if part else -np.inf).append(axis)
    return axes[:, [axis for part in parts for axis in part]].astype(np.float32)


def rotated(x: np.ndarray, rotation: np.ndarray | None) -> np.ndarray:
    """The product x R, float32 (n, d): multiplied in float64, so that it hardly depends on the batch."""
    return x if rotation is None else (x.astype(np.float64) @ rotation.astype(np.float64)).astype(np.float32)


class PQ(Index):
    """Codes of all vectors, scanned with a table of distances.

    metric: "l2" (squared), "ip" or "cosine", see `Index`; of the decoded vectors x̂ (under cosine 1 − ⟨q, x̂⟩).
    m:      parts, and bytes a vector; must divide d.
    bits:   of each part's code, 1 to 8; `fit` needs at least 2^bits vectors.
    opq:    learn a rotation first.
    seed:   of k-means.

    Fitted: `quantizer_` (codebooks and rotation), `codes_` uint8 (n, m).
    """

    FORMAT = "mlsys.pq/1"
    SETTINGS = ("metric", "m", "bits", "opq", "seed")

    quantizer_: Quantizer
    _codes: Growing

    def __init__(self, metric: str = "l2", m: int = 16, bits: int = 8, opq: bool = False, seed: int = 0) -> None:
        super().__init__(metric)
        self.m, self.bits, self.opq, self.seed = checked_settings(m, bits, opq, seed)

    @property
    def code_bytes(self) -> int:
        """Bytes of one vector's code."""
        return self.m

    @property
    def codes_(self) -> np.ndarray:
        """The codes, uint8 (n, m), in order of arrival."""
        self._require_vectors()
        return self._codes.view

    def encode(self, x: np.ndarray) -> np.ndarray:
        """The codes of x (n, d): uint8 (n, m). Under cosine, of x at length 1."""
        self._require_vectors()
        return self.quantizer_.encode(modest("x", self._checked("x", x, self.dim)))

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """What codes (n, m) stand for: x̂, float32 (n, d). ValueError if they are none of this index."""
        self._require_vectors()
        return self.quantizer_.decode(checked_codes(np.asarray(codes), self.m, self.bits))

    def _build(self, x: np.ndarray) -> None:
        check_trainable(x, self.m, self.bits)
        self.quantizer_ = train(modest("x", x), self.m, self.bits, opq=self.opq, seed=self.seed)
        self._codes = Growing(self.quantizer_.encode(x))

    def _insert(self, x: np.ndarray) -> None:
        self._codes.append(self.quantizer_.encode(modest("x", x)))

    def _delete(self, rows: np.ndarray) -> None:
        self._codes = Growing(np.delete(self._codes.view, rows, axis=0))

    def _find(
        self,
        queries: np.ndarray,
        k: int,
        allowed: np.ndarray | None,
        distances: np.ndarray,
        ids: np.ndarray,
        **how: Any,
    ) -> None:
        modest("queries", queries)
        step = max(1, ENTRIES // (self.m << self.bits))
        for start in range(0, len(queries), step):
            part = slice(start, start + step)
            self._scan(queries[part], k, allowed, distances[part], ids[part])

    def _scan(
        self, queries: np.ndarray, k: int, allowed: np.ndarray | None, distances: np.ndarray, ids: np.ndarray
    ) -> None:
        """Fill distances and ids for a few queries."""
        rows = np.arange(len(self)) if allowed is None else np.flatnonzero(allowed)
        codes = self._codes.view[rows].T  # (m, n)
        tables = self.quantizer_.tables(queries, self.metric == "l2")
        for q, table in enumerate(tables):
            total = np.full(len(rows), 1.0 if self.metric == "cosine" else 0.0, np.float32)
            for part, code in zip(table, codes, strict=True):
                total += part[code]
            keep_nearest(total, self._ids[rows], distances[q], ids[q])

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"codes": self._codes.view, **quantizer_arrays(self.quantizer_)}

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        assert self.dim is not None
        codes = array(arrays, "codes", np.uint8, (len(self), self.m))
        self.quantizer_ = restored_quantizer(arrays, self.dim, self.m, self.bits, self.opq)
        self._codes = Growing(checked_codes(codes, self.m, self.bits))


# What `ivfpq` shares.


def keep_nearest(found: np.ndarray, found_ids: np.ndarray, distances: np.ndarray, ids: np.ndarray) -> None:
    """Write the nearest of these hits, by (distance, id), into distances and ids (k,)."""
    k = min(len(ids), len(found))
    if not k:
        return
    near = np.flatnonzero(found <= np.partition(found, k - 1)[k - 1])
    near = near[np.lexsort((found_ids[near], found[near]))[:k]]
    distances[:k], ids[:k] = found[near], found_ids[near]


def checked_settings(m: int, bits: int, opq: bool, seed: int) -> tuple[int, int, bool, int]:
    """The settings, or TypeError or ValueError."""
    if not isinstance(opq, bool):
        raise TypeError(f"opq must be True or False, got {opq!r}")
    return whole("m", m, 1), whole("bits", bits, 1, 8), opq, whole("seed", seed, 0)


def check_trainable(x: np.ndarray, m: int, bits: int) -> None:
    """ValueError if codebooks cannot be made of x."""
    if x.shape[1] % m:
        raise ValueError(f"m = {m} must divide the dimension, {x.shape[1]}")
    if len(x) < 1 << bits:
        raise ValueError(f"bits = {bits} needs at least {1 << bits} vectors to fit on, got {len(x)}; choose fewer bits")


def checked_codes(codes: np.ndarray, m: int, bits: int) -> np.ndarray:
    """The codes if they are codes. ValueError otherwise."""
    if codes.dtype != np.uint8 or codes.ndim != 2 or codes.shape[1] != m:
        raise ValueError(f"codes must be uint8 (n, {m}), got {codes.dtype} {codes.shape}")
    if codes.max(initial=0) >= 1 << bits:
        raise ValueError(f"codes hold {codes.max()}, but with bits = {bits} they end at {(1 << bits) - 1}")
    return codes


def quantizer_arrays(quantizer: Quantizer) -> dict[str, np.ndarray]:
    """What is saved of a quantizer."""
    turned = {} if quantizer.rotation is None else {"rotation": quantizer.rotation}
    return {"codebooks": quantizer.codebooks, **turned}


def restored_quantizer(arrays: Mapping[str, np.ndarray], dim: int, m: int, bits: int, opq: bool) -> Quantizer:
    """The inverse of `quantizer_arrays`, checked."""
    if dim % m:
        raise ValueError(f"m = {m} does not divide the dimension, {dim}")
    found = Quantizer(
        array(arrays, "codebooks", np.float32, (m, 1 << bits, dim // m)),
        array(arrays, "rotation", np.float32, (dim, dim)) if opq else None,
    )
    check_numbers(dim, **quantizer_arrays(found))
    return found
