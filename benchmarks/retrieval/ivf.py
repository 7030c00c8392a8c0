"""Inverted lists: how much of the data need a search look at to find nearly all neighbours?

What to look at: the curve of recall against queries per second, through n_probe. A
search compares the query with all centroids and then with the vectors of the n_probe
nearest lists. There are about 1.6·√n lists (a power of two), so that each doubling of
n_probe doubles the work on vectors and leaves that on centroids. The growth with n is
about √n: less than brute force's, more than a graph's; but the index is built sooner.

faiss chooses its centroids from other random starts, so that its recall at the same
n_probe differs a little: compare curves, not rows.
"""

from __future__ import annotations

from mlsys.bench import Impl, neighbour_plots, neighbours
from mlsys.bench._neighbour_peers import FaissIvf
from mlsys.bench.core import Case, Size
from mlsys.retrieval import ivf, ivf_numba


def cases(data: str, n: int, size: Size) -> list[Case]:
    search = {"task": "search", "data": data}
    if data == "digits":
        return [{**search, "n": n, "n_probe": 8}]
    return [
        *({**search, "n": other, "n_probe": 8} for other in neighbours.grown(data, n, size)),
        *({**search, "n": n, "n_probe": n_probe} for n_probe in neighbours.probes(n, size)),
        *([] if size == "quick" else [{"task": "build", "data": data, "n": min(n, neighbours.BUILD), "n_probe": 8}]),
    ]


bench = neighbours.benchmark(
    __file__,
    cases=cases,
    sets=neighbours.sets(quick=5_000),
    impls={
        "numpy": Impl(lambda: ivf.IVF, "variant", only=neighbours.small),
        "numba": Impl(lambda: ivf_numba.IVF, "ours"),
        "faiss": Impl(lambda: FaissIvf, "peer", "faiss"),
    },
    subject="numba",
    settings=lambda case: neighbours.list_settings(case["n"]),
    options=("n_probe",),
    least=lambda case: 0.15,  # one list of a thousand may hold few of ten neighbours
    contract="retrieval.ivf",
    pictures=neighbour_plots.USUAL,
)

if __name__ == "__main__":
    bench.main()
