"""Product quantization: how many bytes must a vector have so that its neighbours are still found?

What to look at: recall against bytes per vector. A vector is cut into m pieces, and
each piece becomes one byte: the number of the nearest of 256 centroids. A search adds
up m entries of a table for each vector, where an exact one multiplies d numbers. So m
decides all: the memory, the time, and how coarse the distances are. At 8 bytes, a
64th of the vector, recall@10 is far from 1; yet the true neighbour is nearly always
among the first hundred, which is why codes are used to choose what is then looked at
exactly, and together with inverted lists (`retrieval.ivfpq`).

"opq" turns the vectors first, so that the pieces share the variance evenly; building
takes longer. faiss here is without FastScan, whose 4-bit tables lie in registers: that
is out of reach for numba.
"""

from __future__ import annotations

from mlsys.bench import Impl, neighbour_plots, neighbours
from mlsys.bench._neighbour_peers import FaissPq
from mlsys.bench.core import Case, Size
from mlsys.retrieval import pq, pq_numba

QUERIES = 200  # each of which looks at all codes
SWEEP: dict[Size, tuple[int, ...]] = {"quick": (16,), "default": (4, 8, 16, 32, 64), "full": (4, 8, 16, 32, 64)}


def cases(data: str, n: int, size: Size) -> list[Case]:
    search = {"task": "search", "data": data, "n": n, "queries": QUERIES}
    if data == "digits":
        return [{**search, "m": 8}]
    middle = neighbours.pieces(data, (16,))[0]
    turned = [] if size == "quick" else [{**search, "m": middle, "opq": True}]
    build = [] if size == "quick" else [{"task": "build", "data": data, "n": min(n, neighbours.BUILD), "m": middle}]
    return [*({**search, "m": m} for m in neighbours.pieces(data, SWEEP[size])), *turned, *build]


bench = neighbours.benchmark(
    __file__,
    cases=cases,
    sets=neighbours.sets(quick=3_000),
    impls={
        "numpy": Impl(lambda: pq.PQ, "variant", only=neighbours.small),
        "numba": Impl(lambda: pq_numba.PQ, "ours"),
        "faiss": Impl(lambda: FaissPq, "peer", "faiss"),
    },
    subject="numba",
    settings=lambda case: neighbours.code_settings(case["m"], "opq" in case),
    least=lambda case: 0.1,
    compressed=True,
    contract="retrieval.pq",
    pictures={
        "bytes": neighbour_plots.recall_against_bytes,
        "build": neighbour_plots.build,
    },
)

if __name__ == "__main__":
    bench.main()
