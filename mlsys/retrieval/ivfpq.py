"""IVF-PQ: inverted lists whose entries are codes of residuals: a billion vectors in the memory of one machine.

`ivf` compares few vectors but keeps them all; `pq` keeps 16 bytes of each but
compares all. Together: the vectors of a list lie around its centroid c, so what is
coded is the residual r = x − c, which is smaller than x, and codebooks for small
vectors are finer:

    x ≈ x̂ = c + r̂          r̂ = decode(encode(x − c))          one codebook set for all lists

A query of list c would need the table of ‖(q − c)_j − r̂_j‖²: a new one for each
list it probes, which can cost more than scanning the list. Multiply out instead:

    ‖q − c − r̂‖² = ‖q − c‖²  +  (‖r̂‖² + 2⟨c, r̂⟩)  −  2⟨q, r̂⟩
                    per list     per vector            per query: T[j, v] = −2⟨q_j, p_jv⟩

The first is known from choosing the lists. The last is one table for all lists.
The middle does not depend on the query: it is one number a vector, computed when
the vector is added (faiss keeps it as a table for each list and code instead:
n_lists · m · 256 numbers, which each probe adds to the query's).

These three are larger than their sum where the data lie far from the origin. All
of it is true of q − μ and c − μ as well, for any μ; with the mean of the centroids
for μ nothing large is left to cancel.

Under "ip" and "cosine", −⟨q, x̂⟩ = −⟨q, c⟩ − ⟨q, r̂⟩: there is no middle term.

A rotation (`opq=True`, see `pq`) is learned on the residuals; lists are not rotated.

Cost:
    fit: that of `ivf` and of `pq`.
    search: n_lists · d, 2^bits · d for the table, and n · n_probe / n_lists times m look-ups.

Memory:
    m + 16 bytes a vector (code, id, row, middle term), twice that after adding (room in each list);
    4·d bytes a centroid, 4 · 2^bits · d for the codebooks.

Papers:
    Jégou, Douze & Schmid 2011, "Product Quantization for Nearest Neighbor Search", TPAMI (§IV: IVFADC).
    Johnson, Douze & Jégou 2019, arXiv:1702.08734 (§5.2: multiplied out, with tables for the second term).
    Ge, He, Ke & Sun 2013, "Optimized Product Quantization for Approximate Nearest Neighbor Search", CVPR (§3).

See also:
    `ivfpq_numba` (the same, compiled), `ivf` (lists), `pq` (codes).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlsys.retrieval import _rank, pq
from mlsys.retrieval._ivf_index import ListIndex, check_lists, check_numbers
from mlsys.retrieval._kmeans import nearest
from mlsys.retrieval._lists import Lists
from mlsys.retrieval._vectors import array, modest

ENTRIES = 1 << 22  # numbers of tables held at once
PIECE = 1 << 14  # vectors that are encoded at once


class IVFPQ(ListIndex):
    """Codes of residuals in inverted lists.

    metric:  "l2" (squared), "ip" or "cosine", see `Index`; of the decoded vectors x̂ (under cosine 1 − ⟨q, x̂⟩).
    n_lists: how many lists.
    m, bits: parts of a code, and bits of each, 1 to 8; m must divide d. `fit` needs max(n_lists, 2^bits) vectors.
    opq:     learn a rotation of the residuals first.
    n_probe: how many lists a search scans, unless it says otherwise.
    seed:    of k-means.

    `search(queries, k, n_probe=None, filter=None)`. Fitted: `centroids_` float32 (n_lists, d), `quantizer_`.
    """

    FORMAT = "mlsys.ivfpq/1"
    SETTINGS = ("metric", "n_lists", "m", "bits", "opq", "n_probe", "seed")

    quantizer_: pq.Quantizer

    def __init__(
        self,
        metric: str = "l2",
        n_lists: int = 128,
        m: int = 16,
        bits: int = 8,
        opq: bool = False,
        n_probe: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__(metric, n_lists, n_probe)
        self.m, self.bits, self.opq, self.seed = pq.checked_settings(m, bits, opq, seed)

    @property
    def code_bytes(self) -> int:
        """Bytes of one vector's code."""
        return self.m

    def reconstruct(self) -> np.ndarray:
        """x̂ of every vector, float32 (n, d), in order of `ids`."""
        self._require_vectors()
        list_of, arrays = self._lists.by_row()
        return self._centroids[list_of] + self.quantizer_.decode(arrays["codes"])

    # --- building -----------------------------------------------------------------------------------------------------

    def _build(self, x: np.ndarray) -> None:
        pq.check_trainable(x, self.m, self.bits)
        centroids = self._place_centroids(x, self.seed)
        list_of = nearest(x, centroids)
        sample = np.arange(len(x))
        if len(x) > pq.POINTS << self.bits:  # residuals of those that train the codebooks
            rng = np.random.default_rng((self.seed, 0))
            sample = np.sort(rng.choice(len(x), pq.POINTS << self.bits, replace=False))
        residuals = x[sample] - centroids[list_of[sample]]
        quantizer = pq.train(residuals, self.m, self.bits, opq=self.opq, seed=self.seed)
        self._adopt(centroids, quantizer, list_of, self._encoded(x, list_of, centroids, quantizer))

    def _adopt(self, centroids: np.ndarray, quantizer: pq.Quantizer, list_of: np.ndarray, codes: np.ndarray) -> None:
        self._adopt_centroids(centroids)
        self.quantizer_ = quantizer
        self._middle = centroids.mean(axis=0, dtype=np.float64).astype(np.float32)  # μ
        self._lists = Lists(self.n_lists, list_of, {"codes": codes, "terms": self._terms(codes, list_of)})

    @staticmethod
    def _encoded(x: np.ndarray, list_of: np.ndarray, centroids: np.ndarray, quantizer: pq.Quantizer) -> np.ndarray:
        pieces = [slice(at, at + PIECE) for at in range(0, len(x), PIECE)]
        codes = [quantizer.encode(x[piece] - centroids[list_of[piece]]) for piece in pieces]
        return np.concatenate([np.empty((0, len(quantizer.codebooks)), np.uint8), *codes])

    def _terms(self, codes: np.ndarray, list_of: np.ndarray) -> np.ndarray:
        """‖r̂‖² + 2⟨c − μ, r̂⟩ of each vector, float32 (n,); 0 if the metric is not l2."""
        terms = np.zeros(len(codes), np.float32)
        if self.metric == "l2":
            centred = pq.rotated(self._centroids - self._middle, self.quantizer_.rotation).astype(np.float64)
            for at in range(0, len(codes), PIECE):
                piece = slice(at, at + PIECE)
                near = self.quantizer_.joined(codes[piece]).astype(np.float64)  # r̂, in rotated coordinates like c − μ
                terms[piece] = np.einsum("nd,nd->n", near, near + 2 * centred[list_of[piece]])
        return terms

    def _insert(self, x: np.ndarray) -> None:
        list_of = nearest(modest("x", x), self._centroids)
        codes = self._encoded(x, list_of, self._centroids, self.quantizer_)
        self._lists.append(list_of, len(self), {"codes": codes, "terms": self._terms(codes, list_of)})

    # --- searching ----------------------------------------------------------------------------------------------------

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
        n_probe = how["n_probe"]
        if allowed is not None and allowed.sum() <= max(k, n_probe * len(self) / self.n_lists):
            n_probe = self.n_lists  # no more than a search would compare: look at all of them
        mask = None if allowed is None else self._lists.marked(allowed)
        step = max(1, ENTRIES // (self.m << self.bits))
        for start in range(0, len(queries), step):
            part = slice(start, start + step)
            some = queries[part]
            to_centroids, probes = self._probe(some, n_probe)
            if self.metric == "cosine":  # 1 − ⟨q, c⟩; the lists were chosen by ‖q − c‖²
                query = np.repeat(np.arange(len(some)), n_probe)
                found = _rank.distances_of_pairs("cosine", some, self._centroids, query, probes.ravel())
                to_centroids = found.reshape(probes.shape)
            self._scan(some, probes, to_centroids, mask, distances[part], ids[part])

    def _asked(self, queries: np.ndarray) -> np.ndarray:
        """What the table is made for: it holds −⟨this_j, p_jv⟩."""
        return 2 * (queries - self._middle) if self.metric == "l2" else queries

    def _scan(
        self,
        queries: np.ndarray,
        probes: np.ndarray,
        to_centroids: np.ndarray,
        mask: np.ndarray | None,
        distances: np.ndarray,
        ids: np.ndarray,
    ) -> None:
        """Fill distances and ids for a few queries."""
        lists = self._lists
        tables = self.quantizer_.tables(self._asked(queries), squared=False)
        for q, table in enumerate(tables):
            hits, hit_ids = [], []
            for i, base in zip(probes[q].tolist(), to_centroids[q], strict=True):
                slots = np.arange(lists.starts[i], lists.starts[i] + lists.sizes[i])
                if mask is not None:
                    slots = slots[mask[slots]]
                total = base + lists.arrays["terms"][slots]
                for part, code in zip(table, lists.arrays["codes"][slots].T, strict=True):
                    total += part[code]
                hits.append(total)
                hit_ids.append(self._ids[lists.rows[slots]])
            pq.keep_nearest(np.concatenate(hits), np.concatenate(hit_ids), distances[q], ids[q])

    # --- files --------------------------------------------------------------------------------------------------------

    def _arrays(self) -> dict[str, np.ndarray]:
        list_of, arrays = self._lists.by_row()
        own = {"centroids": self._centroids, "list_of": list_of, "codes": arrays["codes"]}
        return own | pq.quantizer_arrays(self.quantizer_)

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        assert self.dim is not None
        centroids = array(arrays, "centroids", np.float32, (self.n_lists, self.dim))
        list_of = array(arrays, "list_of", np.int32, (len(self),))
        codes = pq.checked_codes(array(arrays, "codes", np.uint8, (len(self), self.m)), self.m, self.bits)
        check_lists(list_of, self.n_lists)
        check_numbers(self.dim, centroids=centroids)
        quantizer = pq.restored_quantizer(arrays, self.dim, self.m, self.bits, self.opq)
        self._adopt(centroids, quantizer, list_of, codes)
