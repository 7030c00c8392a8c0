"""The benchmarks of vector indexes: what they count as right, what they count, their pictures, and `--data`."""

import dataclasses
import json
import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from mlsys.bench import Impl, layers_plot, neighbour_plots, neighbours, run
from mlsys.bench import _neighbour_peers as peers
from mlsys.bench.records import Record
from mlsys.cli import main
from mlsys.data.vectors import VectorData
from mlsys.retrieval.exact import Exact

CASES = [{"task": "search", "data": "digits", "n": 300, "ef": ef} for ef in (10, 20)]
BUILD = {"task": "build", "data": "digits", "n": 300, "ef": 10}


class Right:
    """Exact, with a knob, and a count of its distances."""

    def __init__(self, *, metric, M):
        assert M == 16
        self.index = Exact(metric)
        self.asked = []

    def fit(self, x):
        self.index.fit(x)
        return self

    def search(self, queries, k, *, ef):
        self.asked.append(ef)
        return self.index.search(queries, k)

    def distances_per_query(self, queries, k, *, ef):
        return 7.0 * ef

    nbytes = 3000


class Lies(Right):
    def search(self, queries, k, *, ef):
        distances, ids = super().search(queries, k, ef=ef)
        return np.sqrt(distances), ids


class Nan(Right):
    def search(self, queries, k, *, ef):
        distances, ids = super().search(queries, k, ef=ef)
        return np.where(np.arange(k) == 3, np.nan, distances), ids


class Misses(Right):
    def search(self, queries, k, *, ef):
        distances, ids = super().search(queries, 100, ef=ef)
        return distances[:, 96 - k : 96], ids[:, 96 - k : 96]


def bench(mine=Right, **options):
    return neighbours.benchmark(
        __file__,
        cases=lambda data, n, size: [{**case, "data": data, "n": n} for case in CASES],
        sets={"quick": {"digits": 300}, "default": {"digits": 300}, "full": {"digits": 300}},
        impls={"mine": Impl(lambda: mine, "yours"), "ours": Impl(lambda: Right, "ours")},
        subject="ours",
        settings=lambda case: {"M": 16},
        options=("ef",),
        **options,
    )


def smoke(benchmark, case):
    return {r.impl: r for r in run(benchmark, [case], smoke=True)}


@pytest.mark.parametrize("case", [CASES[0], BUILD])
def test_a_right_index_is_right_and_has_figures(case):
    found = smoke(bench(), case)
    assert {r.status for r in found.values()} == {"smoke"}
    figures = found["ours"].figures
    assert figures["recall@10"] == 1.0
    assert figures["bytes/vector"] == 10
    assert figures.get("distances/query") == (70 if case["task"] == "search" else None)
    assert found["exact"].figures.get("distances/query") == (300 if case["task"] == "search" else None)
    assert ("build s" in figures) == (case["task"] == "search")
    assert found["ours"].items == 300


@pytest.mark.parametrize("case", [CASES[0], BUILD])
def test_distances_that_are_not_those_of_the_vectors_are_wrong(case):
    assert smoke(bench(Lies), case)["mine"].status == "wrong"
    assert smoke(bench(Nan), case)["mine"].status == "wrong"
    assert smoke(bench(Lies, compressed=True), case)["mine"].status == "smoke"


@pytest.mark.parametrize("case", [CASES[0], BUILD])
def test_too_low_a_recall_is_wrong(case):
    found = smoke(bench(Misses, compressed=True), case)
    assert found["mine"].status == "wrong"
    assert found["mine"].error > 0.9
    assert smoke(bench(Misses, compressed=True, least=lambda case: 0.0), case)["mine"].status == "smoke"


def test_an_index_is_built_once_for_all_settings_and_anew_for_another_size(monkeypatch):
    """And before it a small one, so that no compiler is timed."""
    monkeypatch.setattr(neighbours, "WARM", 50)
    neighbours._part.cache_clear()
    benchmark, made = bench(), []

    class Counted(Right):
        def fit(self, x):
            made.append(len(x))
            return super().fit(x)

    benchmark = dataclasses.replace(benchmark, impls={**benchmark.impls, "ours": Impl(lambda: Counted, "ours")})
    run(benchmark, [*CASES, {**CASES[0], "n": 200}, {**CASES[1], "n": 200}], smoke=True)
    assert made == [50, 300, 50, 200]


def test_yours_is_looked_at_again_with_other_queries(monkeypatch):
    from mlsys.bench import machine
    from mlsys.bench.machine import Limits

    monkeypatch.setattr(machine, "limits", lambda *_: Limits(flops=1e11, bandwidth=2e10))

    class Remembers(Right):
        def search(self, queries, k, *, ef):
            if not hasattr(self, "last"):
                self.last = super().search(queries, k, ef=ef)
            return self.last

    for mine, status in ((Right, ("ok", "noisy")), (Remembers, ("wrong",))):
        found = {r.impl: r for r in run(bench(mine), CASES[:1], size="quick", budget_s=0.01)}
        assert found["mine"].status in status, found["mine"].note
        assert found["ours"].status in ("ok", "noisy")


def test_brute_force_builds_nothing_so_no_build_is_compared_with_it(monkeypatch):
    from mlsys.bench import machine
    from mlsys.bench.machine import Limits

    monkeypatch.setattr(machine, "limits", lambda *_: Limits(flops=1e11, bandwidth=2e10))
    rows = run(bench(), [BUILD], size="quick", budget_s=0.01)
    assert all(r.seconds for r in rows)
    assert [r.ratio_to_reference for r in rows] == [None] * 3


def test_any_recall_is_right_on_the_user_s_own_data(tmp_path):
    path = str(tmp_path / "x.npy")
    np.save(path, np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32))
    assert smoke(bench(Misses), {**CASES[0], "data": path})["mine"].status == "smoke"
    assert smoke(bench(Lies), {**CASES[0], "data": path})["mine"].status == "wrong"


GRAPH = {"M": 8, "ef_construction": 60}
PEERS = [
    (peers.Hnswlib, GRAPH, {"ef": 200}),
    (peers.FaissFlat, {}, {}),
    (peers.FaissHnsw, GRAPH, {"ef": 200}),
    (peers.FaissIvf, {"n_lists": 4}, {"n_probe": 4}),
]
CODED = [
    (peers.FaissPq, {"m": 4}, {}),
    (peers.FaissPq, {"m": 4, "opq": True}, {}),
    (peers.FaissIvfPq, {"n_lists": 4, "m": 4}, {"n_probe": 4}),
    (peers.FaissIvfPq, {"n_lists": 4, "m": 4, "opq": True}, {"n_probe": 4}),
]


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_peers_give_our_distances(metric):
    rng = np.random.default_rng(0)
    data = VectorData("toy", rng.normal(size=(400, 8)).astype("f4"), rng.normal(size=(20, 8)).astype("f4"), metric)
    for peer, settings, how in [*PEERS, *CODED]:
        index = peer(metric=metric, **settings).fit(data.base)
        distances, ids = index.search(data.queries, 10, **how)
        exact = (peer, settings, how) in PEERS
        np.testing.assert_allclose(
            distances, data.distances(ids), rtol=1e-4 if exact else 0.5, atol=1e-5 if exact else 2
        )
        assert data.recall(ids) > (0.97 if exact else 0.5), peer
        assert index.nbytes > (400 * 4 * 8 if exact else 400 * 4)
    assert neighbours.distances_per_query(index, data.queries, how) == 404


def test_peers_use_as_many_threads_as_they_are_told(monkeypatch):
    import faiss
    import torch

    told = []
    monkeypatch.setattr(faiss, "omp_set_num_threads", told.append)
    x = np.random.default_rng(0).normal(size=(50, 4)).astype("f4")
    torch.set_num_threads(2)
    peers.FaissFlat(metric="l2").fit(x).search(x, 3)
    torch.set_num_threads(1)
    peers.FaissFlat(metric="l2").fit(x).search(x, 3)
    peers.FaissHnsw(metric="l2", threads=2, **GRAPH).fit(x).search(x, 3, ef=10)
    assert told == [2, 2, 1, 1, 2, 2]


def test_lists_and_halves():
    assert [neighbours.lists(n) for n in (1000, 10_000, 100_000, 1_000_000)] == [64, 128, 512, 2048]
    assert [*neighbours.halves(100_000)] == [3125, 6250, 12500, 25000, 50000, 100000]
    assert [*neighbours.halves(2000)] == []
    assert neighbours.pieces("descriptors", (4, 8, 20)) == [4, 8, 16]


def test_pieces_divide_the_dimension_of_a_file(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((600, 100)))
    assert neighbours.pieces(str(tmp_path / "x.npy"), (4, 8, 9, 16)) == [4, 5, 10]


# --- pictures ---------------------------------------------------------------------------------------------------------


def record(impl, role, n, ef, *, seconds=1.0, recall=0.9, **case):
    return Record(
        benchmark="retrieval.hnsw",
        case={"task": "search", "data": "descriptors", "n": n, "ef": ef, **case},
        impl=impl,
        role=role,
        status="ok",
        seconds=seconds,
        items=1000,
        unit="queries",
        figures={"recall@10": recall, "bytes/vector": 640.0, "distances/query": 10 * n**0.5, "build s": n * 1e-4},
    )


RECORDS = [
    *(record("exact", "reference", 8000, ef, seconds=8.0, recall=1.0) for ef in (10, 20, 40)),
    *(record("ours", "ours", 8000, ef, seconds=ef / 10, recall=1 - 1 / ef) for ef in (10, 20, 40)),
    *(record("faiss", "peer", 8000, ef, seconds=ef / 5, recall=1 - 1 / ef) for ef in (10, 20, 40)),
    *(record("ours", "ours", n, 20, seconds=2 * (n / 8000) ** 0.25) for n in (1000, 2000, 4000)),
    *(record("exact", "reference", n, 20, seconds=n / 1000) for n in (1000, 2000, 4000)),
]


def texts(svg):
    return [e.text for e in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_recall_against_queries_names_all_lines_and_axes():
    written = texts(neighbour_plots.recall_against_queries(RECORDS))
    assert {"exact", "ours", "faiss", "descriptors, n = 8,000", "queries per second"} <= set(written)
    assert any("recall@10" in (text or "") for text in written)


def test_recall_against_queries_has_a_line_for_each_other_setting():
    two = [record("ours", "ours", 8000, ef, m=m) for ef in (10, 20) for m in (8, 16)]
    assert {"ours, m=8", "ours, m=16"} <= set(texts(neighbour_plots.recall_against_queries(two)))


def test_growth_prints_the_fitted_slope():
    written = "".join(filter(None, texts(neighbour_plots.growth(RECORDS))))
    assert "slope of the fit" in written
    assert "ours: 0.25" in written  # time
    assert "exact: 1.00" in written  # time
    assert "exact: 0.50" in written  # distances, as this test has them


def test_a_power_law_is_fitted():
    n = np.array([1e3, 1e4, 1e5])
    slope, start = neighbour_plots.fitted(n, 3 * n**0.7)
    assert math.isclose(slope, 0.7, rel_tol=1e-9)
    assert math.isclose(start, 3, rel_tol=1e-9)


def test_memory_and_bytes():
    assert "640" in " ".join(filter(None, texts(neighbour_plots.memory(RECORDS))))
    codes = [record("pq", "ours", 8000, 0, m=m, recall=m / 64) for m in (8, 16, 32)]
    codes = [
        dataclasses.replace(r, figures={**r.figures, "bytes/vector": r.case["m"] + 8.0}, case={**r.case, "opq": opq})
        for r in codes
        for opq in (None, True)
    ]
    assert {"pq", "pq, opq"} <= set(texts(neighbour_plots.recall_against_bytes(codes)))


def test_build_leaves_brute_force_out():
    built = [
        dataclasses.replace(r, case={"task": "build", "data": "descriptors", "n": 500, "ef": 80}) for r in RECORDS[:6]
    ]
    written = texts(neighbour_plots.build(built))
    assert {"ours", "build, descriptors n=500"} <= set(written)
    assert "exact" not in written


@pytest.mark.parametrize("draw", ["recall_against_queries", "growth", "memory", "recall_against_bytes", "build"])
def test_nothing_to_draw_is_no_picture(draw):
    bare = [dataclasses.replace(r, figures={}, seconds=None) for r in RECORDS[:2]]
    assert getattr(neighbour_plots, draw)(bare) is None
    assert getattr(neighbour_plots, draw)([]) is None


def test_the_same_records_give_the_same_picture():
    assert neighbour_plots.recall_against_queries(RECORDS) == neighbour_plots.recall_against_queries(RECORDS)


def test_layers_of_a_search():
    from mlsys.retrieval import hnsw

    x = np.random.default_rng(0).normal(size=(80, 4)).astype(np.float32)
    index = hnsw.HNSW(M=4, ef_construction=20, seed=1).fit(x)
    trace = hnsw.trace(index, x[3] + 0.01, k=3, ef=6)
    written = " ".join(filter(None, texts(layers_plot.layers(trace))))
    assert "layer 0" in written
    assert f"layer {len(trace.layers) - 1}" in written
    assert "among 80 vectors" in written


# --- the user's own data ----------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.npy"
    np.save(path, np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32))
    return str(path)


def test_data_replaces_the_cases(file, capsys):
    assert main(["bench", "retrieval.exact", "--data", file, "--metric", "cosine", "--smoke", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {r["status"] for r in rows} <= {"smoke", "missing"}
    assert {(r["case"]["data"], r["case"]["metric"], r["case"]["n"]) for r in rows} == {(file, "cosine", 540)}


def test_data_runs_for_all_that_take_it(file, capsys, monkeypatch):
    from mlsys.bench import find

    monkeypatch.setattr(find, "names", lambda: ["retrieval.bm25", "retrieval.exact"])
    assert main(["bench", "--data", file, "--smoke", "--json"]) == 0
    assert {json.loads(line)["benchmark"] for line in capsys.readouterr().out.splitlines()} == {"retrieval.exact"}


def test_data_for_the_user_s_own_index(file, tmp_path, capsys):
    mine = tmp_path / "mine.py"
    mine.write_text("from mlsys.retrieval.exact import Exact\n")
    words = ["bench", "retrieval.exact", "--data", file, "--smoke", "--json", "--impl", f"{mine}:Exact"]
    assert main(words) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["status"] for r in rows if r["role"] == "yours"] == ["smoke"]


def test_data_that_cannot_be_used_is_refused_in_one_line(file, fails, tmp_path):
    (tmp_path / "cut.fvecs").write_bytes(b"\x03\0\0\0abc")
    assert "there is no such file" in fails("bench", "retrieval.exact", "--data", str(tmp_path / "no.npy"))
    np.save(tmp_path / "few.npy", np.ones((100, 4)))
    assert "90 vectors are too few" in fails("bench", "retrieval.exact", "--data", str(tmp_path / "few.npy"))
    assert "truncated" in fails("bench", "retrieval.exact", "--data", str(tmp_path / "cut.fvecs"))
    assert "takes no vectors" in fails("bench", "retrieval.bm25", "--data", file)
    assert "--metric is of --data" in fails("bench", "retrieval.exact", "--metric", "ip")
