"""IVF: sort the vectors into lists around centroids, and search only the lists nearest to the query.

K-means places `n_lists` centroids; each vector belongs to the list of its nearest
one (the inverted file of text search, with centroids for words). A query looks up
its `n_probe` nearest centroids and compares itself with the vectors of their lists
alone:

    compared = n_lists + n · n_probe / n_lists          of n, if the lists are equally long

which is least at n_lists = √(n · n_probe). What is missed lies across a border: in
a list whose centroid is farther than those probed. So recall rises with n_probe,
and with n_probe = n_lists the search is exact. Neighbours that are found have
their exact distances, ranked by (distance, id), as in `exact`.

Vectors of one list lie together in memory, so a probe reads one range. Many
queries are answered list by list, not query by query: all that probe a list are
multiplied with it at once, one matrix product a list.

The metric: lists are always regions of nearest centroids in the Euclidean sense,
also for "ip" and "cosine"; but under "ip" the lists to probe are those with the
largest ⟨q, centroid⟩, as ⟨q, x⟩ = ⟨q, c⟩ + ⟨q, x − c⟩ and x − c is small. (For
unit vectors, nearest and least angle are the same.)

Adding keeps the centroids as they are; if the new vectors come from elsewhere,
lists get uneven, and it is time to `fit` again. A filter that leaves no more
vectors than a search would compare is scanned exactly, over all lists.

Cost:
    fit: 10 iterations of k-means on at most 256 vectors a centroid, 2560 · n_lists² · d, and n_lists · n · d.
    search: the line above, times d. add: n_lists · d, and the move of a full list to a larger place.

Memory:
    4·d + 16 bytes a vector, twice that after adding (room in each list), and 4·d bytes a centroid.

Papers:
    Sivic & Zisserman 2003, "Video Google", ICCV (inverted files of quantised descriptors).
    Jégou, Douze & Schmid 2011, "Product Quantization for Nearest Neighbor Search", TPAMI (§IV-A: the coarse quantizer).

See also:
    `ivf_numba` (the same, compiled), `exact` (no lists), `ivfpq` (codes in the lists), `hnsw` (a graph instead).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mlsys.retrieval import _rank
from mlsys.retrieval._ivf_index import ListIndex, check_lists, check_numbers
from mlsys.retrieval._kmeans import nearest
from mlsys.retrieval._lists import Lists
from mlsys.retrieval._vectors import array, modest, whole

ESTIMATES = 1 << 22  # held at once: queries × the vectors that one of them is compared with


class IVF(ListIndex):
    """Vectors in inverted lists.

    metric:  "l2" (squared), "ip" or "cosine", see `Index`.
    n_lists: how many lists; `fit` needs at least as many vectors.
    n_probe: how many of them a search scans, unless it says otherwise; 1 to n_lists.
    seed:    of k-means.

    `search(queries, k, n_probe=None, filter=None)`. Fitted: `centroids_`, float32 (n_lists, d).
    """

    FORMAT = "mlsys.ivf/1"
    SETTINGS = ("metric", "n_lists", "n_probe", "seed")

    def __init__(self, metric: str = "l2", n_lists: int = 128, n_probe: int = 8, seed: int = 0) -> None:
        super().__init__(metric, n_lists, n_probe)
        self.seed = whole("seed", seed, 0)

    # --- building -----------------------------------------------------------------------------------------------------

    def _build(self, x: np.ndarray) -> None:
        centroids = self._place_centroids(x, self.seed)
        self._adopt(centroids, nearest(x, centroids), x)

    def _adopt(self, centroids: np.ndarray, list_of: np.ndarray, x: np.ndarray) -> None:
        halves = _rank.half_norms(self.metric, x)
        self._adopt_centroids(centroids)
        self._lists = Lists(self.n_lists, list_of, {"vectors": x, "halves": halves})
        self._longest = _rank.longest(x)

    def _insert(self, x: np.ndarray) -> None:
        list_of = nearest(modest("x", x), self._centroids)
        self._lists.append(list_of, len(self), {"vectors": x, "halves": _rank.half_norms(self.metric, x)})
        self._longest = max(self._longest, _rank.longest(x))

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
            self._scan_allowed(queries, k, allowed, distances, ids)
            return
        _, probes = self._probe(queries, n_probe)
        mask = None if allowed is None else self._lists.marked(allowed)
        step = self._at_once(k, n_probe)
        for start in range(0, len(queries), step):
            part = slice(start, start + step)
            self._scan(queries[part], probes[part], k, mask, distances[part], ids[part])

    def _at_once(self, k: int, n_probe: int) -> int:
        """How many queries are searched together."""
        widest = int(np.sort(self._lists.sizes)[-n_probe:].sum())
        return max(1, ESTIMATES // max(1, widest))

    def _scan(
        self,
        queries: np.ndarray,
        probes: np.ndarray,
        k: int,
        mask: np.ndarray | None,
        distances: np.ndarray,
        ids: np.ndarray,
    ) -> None:
        """Fill distances and ids for a few queries: estimates of all vectors in their lists, then the k nearest."""
        lists = self._lists
        x, halves = lists.arrays["vectors"], lists.arrays["halves"]
        slack = _rank.slack(self.metric, queries, self._longest)
        # Row q: the vectors of its lists behind one another; those of the p-th list begin at place[q, p].
        sizes = lists.sizes[probes]
        place = np.cumsum(sizes, axis=1) - sizes
        width = int(sizes.sum(axis=1).max())
        if not width:
            return
        estimates = np.full((len(queries), width), np.inf, np.float32)
        for i, query, rank in by_list(probes):
            some = slice(lists.starts[i], lists.starts[i] + lists.sizes[i])
            products = -queries[query] @ x[some].T
            products += halves[some]
            if mask is not None:
                products[:, ~mask[some]] = np.inf
            estimates[query[:, None], place[query, rank][:, None] + np.arange(lists.sizes[i])] = products
        bar = np.partition(estimates, min(k, width) - 1, axis=1)[:, min(k, width) - 1] + slack
        query, column = np.nonzero((estimates <= bar[:, None]) & (estimates < np.inf))
        rank = (column[:, None] >= place[query]).sum(axis=1) - 1
        slot = lists.starts[probes[query, rank]] + column - place[query, rank]
        found = _rank.Candidates(self.metric, queries, x, self._ids, k, lists.rows)
        found.add(query, slot)
        found.settle(distances, ids)

    def _scan_allowed(
        self, queries: np.ndarray, k: int, allowed: np.ndarray, distances: np.ndarray, ids: np.ndarray
    ) -> None:
        """The k nearest of these rows, by brute force."""
        slots = self._lists.slots()
        slots = slots[allowed[self._lists.rows[slots]]]
        few = self.EXACT.over(self.metric, self._lists.arrays["vectors"][slots], self._ids[self._lists.rows[slots]])
        few._find(queries, k, None, distances, ids)

    # --- files --------------------------------------------------------------------------------------------------------

    def _arrays(self) -> dict[str, np.ndarray]:
        list_of, arrays = self._lists.by_row()
        return {"centroids": self._centroids, "list_of": list_of, "vectors": arrays["vectors"]}

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        centroids = array(arrays, "centroids", np.float32, (self.n_lists, self.dim))
        list_of = array(arrays, "list_of", np.int32, (len(self),))
        vectors = array(arrays, "vectors", np.float32, (len(self), self.dim))
        check_lists(list_of, self.n_lists)
        check_numbers(vectors.shape[1], centroids=centroids, vectors=vectors)
        self._adopt(centroids, list_of, vectors)


def by_list(probes: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each list that is probed: its number, the queries that do, and at which rank each has it."""
    order = np.argsort(probes, axis=None, kind="stable")
    lists, first = np.unique(probes.ravel()[order], return_index=True)
    for i, members in zip(lists.tolist(), np.split(order, first[1:]), strict=True):
        yield i, members // probes.shape[1], members % probes.shape[1]
