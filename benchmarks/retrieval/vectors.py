"""Which index for which recall: brute force, inverted lists, codes or a graph?

What to look at: all techniques and their peers on the same axes. Each line goes
through the settings of one index's knob, as `effort`: n_probe = effort, ef = 10 ×
effort. Brute force and plain codes have no knob, and are points.

At a high recall a graph answers more queries a second than inverted lists, and lists
more than brute force; the more so, the more vectors there are. The graph pays with
memory on top of the vectors, and with its build, a search for each vector. Codes are
the other way round: a small part of the memory, but a recall that no effort raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mlsys.bench import Impl, Record, neighbour_plots, neighbours
from mlsys.bench._neighbour_peers import FaissHnsw, FaissIvf, FaissIvfPq, FaissPq, Hnswlib
from mlsys.bench.core import Case, Size
from mlsys.retrieval import hnsw_numba, ivf_numba, ivfpq_numba, pq_numba

M, EF_CONSTRUCTION, PIECES = 16, 200, 16
QUERIES = 500


@dataclass(frozen=True)
class Way:
    """An index, what it is made with for n vectors and codes of m bytes, and what effort means to it."""

    make: Callable[..., Any]
    settings: Callable[[int, int], dict[str, Any]]
    option: str | None = None
    times: int = 1

    def __call__(self, *, metric: str, n: int, m: int) -> Asked:
        return Asked(self.make(metric=metric, **self.settings(n, m)), self)


@dataclass
class Asked:
    """An index whose searches are asked with an effort."""

    index: Any
    way: Way

    def fit(self, x: np.ndarray) -> Asked:
        self.index.fit(x)
        return self

    def search(self, queries: np.ndarray, k: int, *, effort: int) -> tuple[np.ndarray, np.ndarray]:
        how = {self.way.option: self.way.times * effort} if self.way.option else {}
        return self.index.search(queries, k, **how)

    @property
    def nbytes(self) -> int:
        return int(self.index.nbytes)


def graph(n: int, m: int) -> dict[str, Any]:
    return {"M": M, "ef_construction": EF_CONSTRUCTION, "seed": 0}


def lists(n: int, m: int) -> dict[str, Any]:
    return neighbours.list_settings(n)


def codes(n: int, m: int) -> dict[str, Any]:
    return neighbours.code_settings(m)


def both(n: int, m: int) -> dict[str, Any]:
    return lists(n, m) | codes(n, m)


def once(case: Case) -> bool:
    """For what has no knob: it takes part in one case."""
    return bool(case["effort"] == ONCE)


ONCE = 8


def compiled_graph(**told: Any) -> hnsw_numba.HNSW:
    """With as many threads as the benchmark runs with."""
    return hnsw_numba.HNSW(**told, threads=torch.get_num_threads())


WAYS = {
    "hnsw": Way(compiled_graph, graph, "ef", 10),
    "ivf": Way(ivf_numba.IVF, lists, "n_probe"),
    "ivfpq": Way(ivfpq_numba.IVFPQ, both, "n_probe"),
    "pq": Way(pq_numba.PQ, codes),
}
PEERS = {
    "hnswlib": Way(Hnswlib, graph, "ef", 10),
    "faiss hnsw": Way(FaissHnsw, graph, "ef", 10),
    "faiss ivf": Way(FaissIvf, lists, "n_probe"),
    "faiss ivfpq": Way(FaissIvfPq, both, "n_probe"),
    "faiss pq": Way(FaissPq, codes),
}


def impls() -> dict[str, Impl]:
    found = {}
    for name, way in (WAYS | PEERS).items():
        role, needs = ("ours", None) if name in WAYS else ("peer", name.partition(" ")[0])
        only = once if way.option is None else lambda case: True
        found[name] = Impl(lambda way=way: way, role, needs, only)  # type: ignore[arg-type, misc]
    return found


def cases(data: str, n: int, size: Size) -> Sequence[Case]:
    efforts = [ONCE] if data == "digits" else neighbours.probes(n, size)
    search = {"task": "search", "data": data, "n": n, "queries": QUERIES, "m": neighbours.pieces(data, (PIECES,))[0]}
    return [{**search, "effort": effort} for effort in efforts]


def technique(name: str) -> str:
    """Of an implementation, for its colour."""
    return "hnsw" if name == "hnswlib" else name.removeprefix("faiss ")


def picture(records: Sequence[Record]) -> str | None:
    return neighbour_plots.recall_against_queries(records, technique)


bench = neighbours.benchmark(
    __file__,
    cases=cases,
    sets=neighbours.sets(quick=2_000),
    impls=impls(),
    subject="hnsw",
    settings=lambda case: {"n": case["n"], "m": case["m"]},
    options=("effort",),
    least=lambda case: 0.1,
    compressed=True,
    yours=lambda case: False,
    pictures={"recall": picture, "memory": neighbour_plots.memory},
)

if __name__ == "__main__":
    bench.main()
