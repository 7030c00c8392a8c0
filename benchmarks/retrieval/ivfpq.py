"""Inverted lists of short codes: how many vectors fit into memory, and can they still be searched fast?

What to look at: bytes per vector beside the curve of recall against queries per
second. Each vector is stored as the code of what is left after its list's centroid is
taken away, m bytes and its id, in place of 512 bytes. The curve ends at the recall
that the codes allow, however many lists are probed: more m, not more n_probe, goes
beyond it. This is how a billion vectors are searched on one machine.

faiss here is without FastScan, which needs 4-bit codes and tables in registers.
"""

from __future__ import annotations

from mlsys.bench import Impl, neighbour_plots, neighbours
from mlsys.bench._neighbour_peers import FaissIvfPq
from mlsys.bench.core import Case, Size
from mlsys.retrieval import ivfpq, ivfpq_numba

CODES: dict[Size, tuple[int, ...]] = {"quick": (), "default": (16, 32), "full": (8, 16, 32, 64)}


def cases(data: str, n: int, size: Size) -> list[Case]:
    search = {"task": "search", "data": data}
    if data == "digits":
        return [{**search, "n": n, "m": 8, "n_probe": 8}]
    codes = neighbours.pieces(data, CODES[size])
    middle = neighbours.pieces(data, (16,))[0]
    if size == "quick":
        return [{**search, "n": n, "m": middle, "n_probe": 8}]
    return [
        *({**search, "n": other, "m": middle, "n_probe": 8} for other in neighbours.grown(data, n, size)),
        *({**search, "n": n, "m": m, "n_probe": n_probe} for m in codes for n_probe in neighbours.probes(n, size)),
        {"task": "build", "data": data, "n": min(n, neighbours.BUILD), "m": middle, "n_probe": 8},
    ]


bench = neighbours.benchmark(
    __file__,
    cases=cases,
    sets=neighbours.sets(quick=3_000),
    impls={
        "numpy": Impl(lambda: ivfpq.IVFPQ, "variant", only=neighbours.small),
        "numba": Impl(lambda: ivfpq_numba.IVFPQ, "ours"),
        "faiss": Impl(lambda: FaissIvfPq, "peer", "faiss"),
    },
    subject="numba",
    settings=lambda case: neighbours.list_settings(case["n"]) | neighbours.code_settings(case["m"]),
    options=("n_probe",),
    least=lambda case: 0.1,
    compressed=True,
    contract="retrieval.ivfpq",
    pictures=neighbour_plots.USUAL,
)

if __name__ == "__main__":
    bench.main()
