"""HNSW: how many queries a second for which recall, and what does it cost to build the graph?

What to look at: the curve of recall against queries per second. An index is better
where its curve is further up and to the right; one point of it says nothing, since
everyone is fast at a low recall. All have the same M = 16 and ef_construction = 200,
and one thread, but for the build that says otherwise.

Then how a search grows with n: brute force is a line of slope 1 on logarithmic axes,
a graph's is nearly flat. And that building costs about as much as ef_construction/ef
as many searches: the graph is built by searching for the place of each vector.

`numpy`, plain Python and NumPy, shows what the others do; on 500 vectors only, for it
is slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mlsys.bench import Impl, Record, layers_plot, neighbour_plots, neighbours
from mlsys.bench._neighbour_peers import FaissHnsw, Hnswlib
from mlsys.bench.core import Case, Size
from mlsys.retrieval import hnsw, hnsw_numba

SETTINGS = {"M": 16, "ef_construction": 200, "seed": 0}
SMALL = 500  # vectors that plain Python indexes in a second or two
SWEEP: dict[Size, tuple[int, ...]] = {
    "quick": (20, 80),
    "default": (10, 20, 40, 80, 160, 320),
    "full": (10, 20, 40, 80, 120, 160, 240, 320, 640),
}
GROWTH_EF = 80
BUILD = 10_000  # vectors in a timed build
BUILD_MORE = 50_000  # with two threads as well: they share a batch, and batches grow with the graph


def cases(data: str, n: int, size: Size) -> list[Case]:
    search = {"task": "search", "data": data}
    if n <= SMALL or data == "digits":
        return [{**search, "n": n, "queries": 100, "ef": 50}]
    small = min(n, 1000 if size == "quick" else BUILD)
    build: dict[str, Any] = {"task": "build", "data": data, "n": small, "ef": GROWTH_EF}
    return [
        *({**search, "n": other, "ef": GROWTH_EF} for other in neighbours.grown(data, n, size)),
        *({**search, "n": n, "ef": ef} for ef in SWEEP[size]),
        build,
        *([] if size == "quick" else [{**build, "threads": 2}]),
        *([] if size == "quick" or n < BUILD_MORE else [{**build, "n": BUILD_MORE, "threads": 2}]),
    ]


def settings(case: Case) -> dict[str, Any]:
    return SETTINGS | ({"threads": case["threads"]} if "threads" in case else {})


def compiled(**told: Any) -> hnsw_numba.HNSW:
    """With as many threads as the benchmark runs with, unless the case says."""
    return hnsw_numba.HNSW(**{"threads": torch.get_num_threads(), **told})


def layers(records: Sequence[Record]) -> str | None:
    """The graph over 250 descriptors, and the way of one query through it."""
    from mlsys.data import vectors

    if not any(r.case["data"] == "descriptors" for r in records):
        return None
    data = vectors.descriptors(250)
    index = hnsw.HNSW(metric=data.metric, M=5, ef_construction=60, seed=0).fit(data.base)
    return layers_plot.layers(hnsw.trace(index, data.queries[0], k=5, ef=10))


bench = neighbours.benchmark(
    __file__,
    cases=cases,
    sets=neighbours.sets(quick=5_000, digits=SMALL),
    impls={
        "numpy": Impl(lambda: hnsw.HNSW, "variant", only=lambda case: case["n"] <= SMALL and "threads" not in case),
        "numba": Impl(lambda: compiled, "ours"),
        "hnswlib": Impl(lambda: Hnswlib, "peer", "hnswlib"),
        "faiss": Impl(lambda: FaissHnsw, "peer", "faiss"),
    },
    subject="numba",
    settings=settings,
    options=("ef",),
    contract="retrieval.hnsw",
    yours=lambda case: "threads" not in case,
    pictures={**neighbour_plots.USUAL, "layers": layers},
)

if __name__ == "__main__":
    bench.main()
