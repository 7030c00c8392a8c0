"""What the indexes with inverted lists share: centroids, and the lists that a query probes.

See also:
    `ivf` (vectors in the lists), `ivfpq` (codes in the lists), `_lists` (how they lie in memory).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlsys.retrieval import exact
from mlsys.retrieval._kmeans import kmeans
from mlsys.retrieval._lists import Lists
from mlsys.retrieval._vectors import LARGEST, Index, as_rows, modest, whole


class ListIndex(Index):
    """An `Index` of `n_lists` lists, each of what is nearest to one of `centroids_`, float32 (n_lists, d)."""

    EXACT: type[exact.Exact] = exact.Exact  # finds the nearest centroids

    _coarse: exact.Exact  # of the centroids
    _lists: Lists

    def __init__(self, metric: str, n_lists: int, n_probe: int) -> None:
        super().__init__(metric)
        self.n_lists = whole("n_lists", n_lists, 1)
        self.n_probe = whole("n_probe", n_probe, 1, self.n_lists)

    @property
    def centroids_(self) -> np.ndarray:
        """The centroids, float32 (n_lists, d)."""
        self._require_vectors()
        return self._centroids

    @property
    def _centroids(self) -> np.ndarray:
        return self._coarse._vectors.view

    def probes(self, queries: np.ndarray, n_probe: int | None = None) -> np.ndarray:
        """The lists that a search of these queries scans, nearest first: int64 (n_queries, n_probe)."""
        self._require_vectors()
        queries = self._checked("queries", as_rows(queries), self.dim)
        return self._probe(modest("queries", queries), self._n_probe(n_probe))[1]

    def distances_per_query(self, queries: np.ndarray, k: int = 10, *, n_probe: int | None = None) -> float:
        """How many vectors a query is compared with in the mean, centroids included. ValueError without queries."""
        probes = self.probes(queries, n_probe)
        if not len(probes):
            raise ValueError("queries must hold at least one: of none there is no mean")
        return self.n_lists + float(self._lists.sizes[probes].sum(axis=1).mean())

    def _place_centroids(self, x: np.ndarray, seed: int) -> np.ndarray:
        """By k-means. ValueError for too few vectors, or too large numbers."""
        if len(x) < self.n_lists:
            raise ValueError(
                f"n_lists = {self.n_lists} needs as many vectors to fit on, got {len(x)}; choose fewer lists"
            )
        return kmeans(modest("x", x), self.n_lists, seed=seed)

    def _adopt_centroids(self, centroids: np.ndarray) -> None:
        self._coarse = self.EXACT.over("ip" if self.metric == "ip" else "l2", centroids, np.arange(self.n_lists))

    def _delete(self, rows: np.ndarray) -> None:
        self._lists.remove(rows)

    def _options(self, k: int, **how: Any) -> dict[str, Any]:
        chosen = {"n_probe": self._n_probe(how.pop("n_probe", None))}
        return super()._options(k, **how) | chosen

    def _n_probe(self, n_probe: int | None) -> int:
        return self.n_probe if n_probe is None else whole("n_probe", n_probe, 1, self.n_lists)

    def _probe(self, queries: np.ndarray, n_probe: int) -> tuple[np.ndarray, np.ndarray]:
        """The distances of the nearest centroids, and their lists, of queries that are checked already."""
        distances = np.full((len(queries), n_probe), np.inf, np.float32)
        lists = np.full((len(queries), n_probe), -1, np.int64)
        if len(queries):
            self._coarse._find(queries, n_probe, None, distances, lists)
        return distances, lists


def check_numbers(dim: int, **arrays: np.ndarray) -> None:
    """ValueError if one of them holds NaN, infinity, or numbers that `fit` does not make of modest ones.

    Residuals are up to twice as large, and a rotation can turn all of a vector's length into one coordinate.
    """
    for name, a in arrays.items():
        if not (np.abs(a) <= 2 * LARGEST * dim**0.5).all():
            raise ValueError(f"{name} hold NaN, infinity or numbers beyond {LARGEST:g}")


def check_lists(list_of: np.ndarray, n_lists: int) -> None:
    """ValueError if these are not numbers of lists."""
    if len(list_of) and not 0 <= list_of.min() <= list_of.max() < n_lists:
        raise ValueError(f"list_of holds {list_of.min()} … {list_of.max()}, expected 0 … {n_lists - 1}")
