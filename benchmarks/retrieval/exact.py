"""Exact search: how fast can every vector be compared with every query?

What to look at: the share of this machine's limit. One query reads all vectors for two
FLOPs a number, so memory decides; for a thousand queries the same bytes serve them
all, the comparison is one large matrix product, and arithmetic decides. What is left
is to choose the k best of n without sorting them: `plain torch` does it with `topk`
over all distances, which shows what that costs.

`exact` (NumPy in float64) is the reference. Ours is exact to the last place and in the
order of ties, whichever queries come together; faiss, like most, returns ‖q‖² + ‖x‖² −
2⟨q, x⟩ in float32 as it is, which is not (see `mlsys.retrieval.exact`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlsys.bench import Impl, Plot, Work, neighbours
from mlsys.bench._neighbour_peers import FaissFlat
from mlsys.bench.core import Case, Size
from mlsys.bench.neighbours import Given
from mlsys.retrieval import exact, exact_numba

BATCHES: dict[Size, tuple[int, ...]] = {"quick": (1, 100), "default": (1, 100, 1000), "full": (1, 10, 100, 1000)}
AT_ONCE = 50  # queries, by the plain ways


def cases(data: str, n: int, size: Size) -> Sequence[Case]:
    metrics = ("l2", "ip") if data == "descriptors" and size != "quick" else (None,)
    return [
        {"task": "search", "data": data, "n": n, "queries": queries} | ({"metric": metric} if metric else {})
        for metric in metrics
        for queries in ((100,) if data == "digits" else BATCHES[size])
    ]


class PlainNumpy:
    """All distances in float64, and the k smallest by partition."""

    def __init__(self, *, metric: str) -> None:
        self.metric = metric

    def fit(self, x: np.ndarray, ids: np.ndarray) -> PlainNumpy:
        self.x = x.astype(np.float64)
        if self.metric == "cosine":
            self.x /= np.linalg.norm(self.x, axis=1, keepdims=True)
        self.squares = (self.x**2).sum(axis=1)
        return self

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        found = [self._some(queries[at : at + AT_ONCE], k) for at in range(0, len(queries), AT_ONCE)]
        return np.concatenate([d for d, _ in found]).astype(np.float32), np.concatenate([i for _, i in found])

    def _some(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        q = queries.astype(np.float64)
        products = q @ self.x.T
        if self.metric == "l2":
            distances = (q**2).sum(axis=1, keepdims=True) + self.squares - 2 * products
        elif self.metric == "ip":
            distances = -products
        else:
            distances = 1 - products / np.linalg.norm(q, axis=1, keepdims=True)
        best = np.argpartition(distances, k - 1, axis=1)[:, :k]
        near = np.take_along_axis(distances, best, axis=1)
        order = np.lexsort((best, near), axis=1)
        return np.take_along_axis(near, order, axis=1), np.take_along_axis(best, order, axis=1)

    @property
    def nbytes(self) -> int:
        return self.x.nbytes + self.squares.nbytes


class PlainTorch:
    """The same product in float32 by torch, and `topk` over all of it."""

    def __init__(self, *, metric: str) -> None:
        self.metric = metric

    def fit(self, x: np.ndarray, ids: np.ndarray) -> PlainTorch:
        import torch

        self.x = torch.from_numpy(x)
        if self.metric == "cosine":
            self.x = torch.nn.functional.normalize(self.x)
        self.squares = self.x.square().sum(1)
        return self

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        import torch

        q = torch.from_numpy(np.ascontiguousarray(queries))
        if self.metric == "cosine":
            q = torch.nn.functional.normalize(q)
        found = []
        for some in q.split(AT_ONCE):
            if self.metric == "l2":
                distances = torch.addmm(self.squares, some, self.x.mT, alpha=-2)
                distances += some.square().sum(1, keepdim=True)
            else:
                distances = float(self.metric == "cosine") - some @ self.x.mT
            found.append(distances.topk(k, largest=False))
        return torch.cat([f.values for f in found]).numpy(), torch.cat([f.indices for f in found]).numpy()

    @property
    def nbytes(self) -> int:
        return int(self.x.nbytes + self.squares.nbytes)


def work(case: Case, given: Given) -> Work:
    """A multiplication and an addition for each number of each pair; each vector and each query is read once."""
    m, n, d = len(given.queries), len(given.data), given.data.dim
    return Work(flops=2 * m * n * d, bytes=4 * (n + m) * d, items=m, unit="queries")


bench = neighbours.benchmark(
    __file__,
    cases=cases,
    sets=neighbours.sets(quick=10_000),
    impls={
        "numpy": Impl(lambda: exact.Exact, "ours"),
        "numba": Impl(lambda: exact_numba.Exact, "ours"),
        "plain torch": Impl(lambda: PlainTorch, "variant"),
        "faiss": Impl(lambda: FaissFlat, "peer", "faiss"),
    },
    subject="numba",
    settings=lambda case: {},
    least=lambda case: 0.999,
    with_ids=True,
    reference=Impl(lambda: PlainNumpy, "reference"),
    work=work,
    contract="retrieval.exact",
    plots=(
        Plot(x="queries", xlabel="queries at once", panel=("data", "n", "metric"), y="time", per="queries"),
        Plot(y="roofline"),
    ),
)

if __name__ == "__main__":
    bench.main()
