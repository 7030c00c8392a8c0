"""`mlsys bench retrieval.X --impl` takes every class that passes `mlsys check retrieval.X`: it asks for no more."""

import dataclasses

import pytest

from mlsys.bench import find, run
from mlsys.contracts.core import check
from mlsys.contracts.retrieval import CONTRACTS
from mlsys.retrieval import bm25_numba, exact, hnsw_numba, ivfpq_numba, late_interaction, pq_numba


class Holds:
    """`fit` and `search` of an index of ours, and no more; `fit` returns nothing."""

    def fit(self, x):
        self.index.fit(x)

    def search(self, queries, k):
        return self.index.search(queries, k)


class MyBM25(Holds):
    def __init__(self, *, variant, k1, b):
        self.index = bm25_numba.BM25(variant=variant, k1=k1, b=b)


class MyExact:
    def __init__(self, *, metric):
        self.index = exact.Exact(metric)

    def fit(self, x, ids):
        self.index.fit(x, ids)

    def add(self, x, ids):
        self.index.add(x, ids)

    def remove(self, ids):
        self.index.remove(ids)

    def search(self, queries, k, filter=None):
        return self.index.search(queries, k, filter=filter)


class MyIVF(Holds):
    def __init__(self, *, metric, n_lists, n_probe, seed):
        self.index = exact.Exact(metric)

    def remove(self, ids):
        self.index.remove(ids)

    def search(self, queries, k, n_probe):
        return self.index.search(queries, k)


class MyPQ(Holds):
    def __init__(self, *, metric, m, bits, opq, seed):
        self.index = pq_numba.PQ(metric, m=m, bits=bits, opq=opq, seed=seed)

    def encode(self, x):
        return self.index.encode(x)

    def decode(self, codes):
        return self.index.decode(codes)


class MyIVFPQ(Holds):
    def __init__(self, *, metric, n_lists, m, bits, opq, n_probe, seed):
        self.index = ivfpq_numba.IVFPQ(metric, n_lists=n_lists, m=m, bits=bits, opq=opq, n_probe=n_probe, seed=seed)

    def search(self, queries, k, n_probe):
        return self.index.search(queries, k, n_probe=n_probe)

    def reconstruct(self):
        return self.index.reconstruct()


class MyHNSW(Holds):
    def __init__(self, *, metric, M, ef_construction, seed):
        self.index = hnsw_numba.HNSW(metric, M, ef_construction, seed)

    @property
    def graph(self):
        return self.index.graph

    def search(self, queries, k, ef):
        return self.index.search(queries, k, ef=ef)


class MyLateInteraction(Holds):
    def __init__(self):
        self.index = late_interaction.LateInteraction()


VECTORS = {"data": "digits", "n": 400, "queries": 20}
TASKS = [{"task": "search"}, {"task": "build"}]
TEXTS = {"corpus": "stdlib", "variant": "lucene", "queries": 20}
MINE = {
    "bm25": (MyBM25, [{**TEXTS, "task": "search"}, {**TEXTS, "task": "index"}]),
    "exact": (MyExact, [{**VECTORS, "task": "search"}]),
    "ivf": (MyIVF, [{**VECTORS, **task, "n_probe": 2} for task in TASKS]),
    "pq": (MyPQ, [{**VECTORS, **task, "m": 8, "opq": True} for task in TASKS]),
    "ivfpq": (MyIVFPQ, [{**VECTORS, **task, "m": 8, "n_probe": 2} for task in TASKS]),
    "hnsw": (MyHNSW, [{**VECTORS, **task, "ef": 20} for task in TASKS]),
    "late_interaction": (MyLateInteraction, [{"corpus": "drawn", "documents": 120, "queries": 2}]),
}


def test_every_benchmark_with_a_contract_is_here():
    benches = (find.load(name) for name in find.names() if name.startswith("retrieval."))
    assert {f"retrieval.{name}" for name in MINE} == {bench.contract for bench in benches if bench.contract}


@pytest.mark.parametrize("name", MINE)
def test_what_passes_the_check_runs_in_the_benchmark(name):
    mine, cases = MINE[name]
    verdict = check(CONTRACTS[name], mine)
    assert verdict.passed, str(verdict)
    bench = find.load(f"retrieval.{name}")
    alone = dataclasses.replace(bench, impls={bench.reference: bench.impls[bench.reference]}).with_impl("mine", mine)
    rows = run(alone, [case for case in cases if bench.yours(case)], smoke=True)
    assert [(r.status, r.note) for r in rows] == [("smoke", "")] * 2 * len(cases)
