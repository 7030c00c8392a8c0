"""hnswlib and faiss behind our own verbs: `make(metric=…, …)`, `fit(x)`, `search(queries, k, …) -> (distances, ids)`.

Distances are ours: squared for l2, −q·x for ip, 1 − cos for cosine. The number of threads is set at every call, for
both libraries take all cores if they are not told: as many as the benchmark runs with, or as the case says.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class Hnswlib:
    """`hnswlib.Index`."""

    def __init__(self, *, metric: str, M: int, ef_construction: int, seed: int = 0, threads: int | None = None) -> None:
        self.metric, self.M, self.ef_construction, self.seed, self.threads = metric, M, ef_construction, seed, threads

    def fit(self, x: np.ndarray) -> Hnswlib:
        import hnswlib

        self.index = hnswlib.Index(self.metric, x.shape[1])
        self.index.init_index(len(x), self.M, self.ef_construction, self.seed)
        self.index.add_items(x, num_threads=self.threads or torch.get_num_threads())
        return self

    def search(self, queries: np.ndarray, k: int, *, ef: int) -> tuple[np.ndarray, np.ndarray]:
        self.index.set_ef(max(ef, k))
        ids, distances = self.index.knn_query(queries, k, num_threads=self.threads or torch.get_num_threads())
        return distances - (self.metric == "ip"), ids.astype(np.int64)

    @property
    def nbytes(self) -> int:
        return int(self.index.index_file_size())


class Faiss:
    """An index of faiss: `make` gives it, empty, for a dimension and a metric of faiss; `options` sets its knob."""

    threads: int | None = None
    counter = ""  # where faiss counts the distances it computes, if it does

    def __init__(self, *, metric: str) -> None:
        self.metric = metric

    def make(self, dim: int, metric: int) -> Any:
        import faiss

        return faiss.IndexFlat(dim, metric)

    def options(self, **how: Any) -> None:
        """Set what a search is asked with."""

    def fit(self, x: np.ndarray, ids: np.ndarray | None = None) -> Faiss:
        """Ids are rows, whatever is said."""
        import faiss

        faiss.omp_set_num_threads(self.threads or torch.get_num_threads())
        x = self.directions(x)
        self.index = self.make(x.shape[1], faiss.METRIC_L2 if self.metric == "l2" else faiss.METRIC_INNER_PRODUCT)
        if not self.index.is_trained:
            self.index.train(x)
        self.index.add(x)
        return self

    def search(self, queries: np.ndarray, k: int, **how: Any) -> tuple[np.ndarray, np.ndarray]:
        import faiss

        faiss.omp_set_num_threads(self.threads or torch.get_num_threads())
        self.options(**how)
        found, ids = self.index.search(self.directions(queries), k)
        return (found if self.metric == "l2" else -found if self.metric == "ip" else 1 - found), ids

    def directions(self, x: np.ndarray) -> np.ndarray:
        """Of length 1 under cosine, which faiss has not."""
        x = np.ascontiguousarray(x, np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True) if self.metric == "cosine" else x

    @property
    def nbytes(self) -> int:
        import faiss

        return len(faiss.serialize_index(self.index))

    def distances_per_query(self, queries: np.ndarray, k: int, **how: Any) -> float | None:
        """How many distances to vectors a search computes on average, by faiss's own count."""
        import faiss

        if not self.counter:
            return None
        count = getattr(faiss.cvar, self.counter)
        count.reset()
        self.search(queries, k, **how)
        return float(count.ndis / len(queries))


class FaissFlat(Faiss):
    """`IndexFlat`: exact search."""

    def __init__(self, *, metric: str, **others: Any) -> None:
        super().__init__(metric=metric)


class FaissHnsw(Faiss):
    """`IndexHNSWFlat`."""

    counter = "hnsw_stats"

    def __init__(self, *, metric: str, M: int, ef_construction: int, seed: int = 0, threads: int | None = None) -> None:
        super().__init__(metric=metric)
        self.M, self.ef_construction, self.threads = M, ef_construction, threads

    def make(self, dim: int, metric: int) -> Any:
        import faiss

        index = faiss.IndexHNSWFlat(dim, self.M, metric)
        index.hnsw.efConstruction = self.ef_construction
        return index

    def options(self, **how: Any) -> None:
        self.index.hnsw.efSearch = how["ef"]


class FaissIvf(Faiss):
    """`IndexIVFFlat`."""

    counter = "indexIVF_stats"

    def __init__(self, *, metric: str, n_lists: int, n_probe: int = 1, seed: int = 0) -> None:
        super().__init__(metric=metric)
        self.n_lists, self.seed = n_lists, seed  # every search says its own n_probe

    def make(self, dim: int, metric: int) -> Any:
        import faiss

        self.quantizer = faiss.IndexFlat(dim, metric)  # kept: the index holds a bare pointer to it
        return self.trained_with(self.lists(dim, metric))

    def lists(self, dim: int, metric: int) -> Any:
        import faiss

        return faiss.IndexIVFFlat(self.quantizer, dim, self.n_lists, metric)

    def trained_with(self, index: Any) -> Any:
        index.cp.seed = self.seed
        index.cp.min_points_per_centroid = 1  # else it warns where the data are few
        return index

    def options(self, **how: Any) -> None:
        self.index.nprobe = how["n_probe"]

    def distances_per_query(self, queries: np.ndarray, k: int, **how: Any) -> float | None:
        found = super().distances_per_query(queries, k, **how)
        return None if found is None else found + self.n_lists  # to the centroids, which it counts apart


class FaissIvfPq(FaissIvf):
    """`IndexIVFPQ`, without FastScan."""

    def __init__(
        self, *, metric: str, n_lists: int, m: int, bits: int = 8, opq: bool = False, n_probe: int = 1, seed: int = 0
    ) -> None:
        super().__init__(metric=metric, n_lists=n_lists, seed=seed)
        self.m, self.bits, self.opq = m, bits, opq

    def lists(self, dim: int, metric: int) -> Any:
        import faiss

        index = faiss.IndexIVFPQ(self.quantizer, dim, self.n_lists, self.m, self.bits, metric)
        index.pq.cp.min_points_per_centroid = 1
        return index

    def make(self, dim: int, metric: int) -> Any:
        import faiss

        index = super().make(dim, metric)
        self.codes = faiss.ProductQuantizer(dim, self.m, self.bits)
        return rotated(index, dim, self.codes) if self.opq else index

    def options(self, **how: Any) -> None:
        import faiss

        faiss.extract_index_ivf(self.index).nprobe = how["n_probe"]


class FaissPq(Faiss):
    """`IndexPQ`, without FastScan."""

    def __init__(self, *, metric: str, m: int, bits: int = 8, opq: bool = False, seed: int = 0) -> None:
        super().__init__(metric=metric)
        self.m, self.bits, self.opq, self.seed = m, bits, opq, seed

    def make(self, dim: int, metric: int) -> Any:
        import faiss

        index = faiss.IndexPQ(dim, self.m, self.bits, metric)
        index.pq.cp.min_points_per_centroid, index.pq.cp.seed = 1, self.seed
        self.codes = faiss.ProductQuantizer(dim, self.m, self.bits)
        return rotated(index, dim, self.codes) if self.opq else index


def rotated(index: Any, dim: int, codes: Any) -> Any:
    """The index behind a rotation that is learned for these codes; the caller keeps them, faiss has a bare pointer."""
    import faiss

    rotation = faiss.OPQMatrix(dim, codes.M)
    codes.cp.min_points_per_centroid = 1
    rotation.pq = codes
    return faiss.IndexPreTransform(rotation, index)
