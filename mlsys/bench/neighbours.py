"""What the benchmarks of vector indexes share: data, the two tasks, checking by recall, and what is counted.

A case names a task, a set of vectors and how many of them:

    {"task": "search", "data": "descriptors", "n": 100_000, "ef": 40}     an index is built once, its searches are timed
    {"task": "build",  "data": "descriptors", "n": 10_000}                building is timed

Every implementation is a class with the verbs that its contract asks for, and no
others (a peer gets them in `mlsys.bench._neighbour_peers`): `make(metric=…, …)`,
`fit(x)`, `search(queries, k, …)`. The reference is always exact search: what an index
finds is checked against it, and "÷ reference" says of a search how much faster than
brute force it is. An approximate answer is right if its recall is no accident and its
distances are those of the vectors that it names. On vectors of the user's any recall
is right, for nobody knows how hard they are.

    recall@10         as ann-benchmarks counts: by distance, not by id
    bytes/vector      what the index keeps, vectors included
    distances/query   how many distances a search computes, for those that say
    build s           one build of the index whose searches were timed; not repeated, so it says less than a task
                      "build"

Memory:
    The indexes of one set at one size, all implementations' together, until the next size is asked for.

See also:
    `mlsys.data.vectors` (the data), `mlsys.bench.neighbour_plots` (the pictures).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from mlsys.bench.core import Benchmark, Case, Impl, Plot, Size, Work
from mlsys.bench.records import Record
from mlsys.data import vectors
from mlsys.data.vectors import VectorData
from mlsys.retrieval import hnsw
from mlsys.retrieval._hnsw_index import NodeIndex
from mlsys.retrieval.exact import Exact

K = 10
QUERIES = 1000
LARGEST: dict[Size, int] = {"quick": 10_000, "default": 100_000, "full": 1 << 62}
FEWEST = 500  # vectors of a file: 256 centroids need some each
WARM = 300  # vectors of an index that is built before one whose build is timed: whatever compiles, compiles there
SMALL = 2_000  # vectors up to which a readable version takes part that is slow
BUILD = 20_000  # vectors in a timed build of lists or codes
PROBES = (1, 2, 4, 8, 16, 32, 64, 128)
DIMS = {"descriptors": 128, "latent": 128, "digits": 64}
COUNTED = 100  # queries whose distances are counted


class BruteForce:
    """`exact.Exact`, whatever it is told about how not to be exact."""

    def __init__(self, *, metric: str, **others: Any) -> None:
        self.index = Exact(metric=metric)

    def fit(self, x: np.ndarray) -> BruteForce:
        """Keep the vectors."""
        self.index.fit(x)
        return self

    def search(self, queries: np.ndarray, k: int, **how: Any) -> tuple[np.ndarray, np.ndarray]:
        """Look at all of them."""
        return self.index.search(queries, k)

    @property
    def nbytes(self) -> int:
        """Of the index."""
        return self.index.nbytes


@dataclass
class Built:
    """An index, and what it took to build it."""

    index: Any
    seconds: float
    counts: dict[tuple[Any, ...], float | None] = field(default_factory=dict)


@dataclass
class Given:
    """A case's data, and the indexes over it so far; `turn` is the one that was prepared last."""

    queries: np.ndarray
    data: VectorData
    base: np.ndarray | None = None  # where building is timed: the same array as `data.base`
    built: dict[Any, Built] = field(default_factory=dict)
    turn: Built | None = None


@lru_cache(maxsize=2)
def _loaded(name: str, metric: str | None) -> VectorData:
    return vectors.load(name, metric=metric)


@lru_cache(maxsize=1)
def _part(name: str, metric: str | None, n: int) -> tuple[VectorData, dict[Any, Built]]:
    """The first n vectors, and the store of indexes over them, which goes when another part is asked for."""
    return _loaded(name, metric).first(n, QUERIES), {}


def inputs(case: Case, device: str) -> Given:
    """The data of a case."""
    data, built = _part(case["data"], case.get("metric"), case["n"])
    if case["task"] == "build":
        own = replace(data.first(queries=100), base=data.base.copy())
        return Given(own.queries, own, own.base)
    asked = case.get("queries", QUERIES)
    return Given(data.queries[:asked], data.first(queries=asked), built=built)


def work(case: Case, given: Given) -> Work:
    """Throughput is all: what an approximate search must at least do, nobody knows."""
    if case["task"] == "build":
        return Work(0, 0, items=len(given.data), unit="vectors")
    return Work(0, 0, items=len(given.queries), unit="queries")


def recall(data: VectorData, got: tuple[np.ndarray, np.ndarray], want: tuple[np.ndarray, np.ndarray]) -> float:
    """Of what was found, against what the exact search found."""
    return data.recall(got[1], K, true=want[0])


def lies(data: VectorData, got: tuple[np.ndarray, np.ndarray]) -> bool:
    """Whether a distance is not that of the vector beside it, by more than a thousandth of the largest."""
    distances, ids = got
    there = ids >= 0
    if not there.any():
        return False
    true = data.distances(ids)[there]
    return not np.abs(distances[there].astype(np.float64) - true).max() <= 1e-3 * np.abs(true).max()  # NaN lies, too


def benchmark(
    file: str,
    *,
    cases: Callable[[str, int, Size], Sequence[Case]],
    sets: Mapping[Size, Mapping[str, int]],
    impls: Mapping[str, Impl],
    subject: str,
    settings: Callable[[Case], Mapping[str, Any]],
    options: Sequence[str] = (),
    least: Callable[[Case], float] = lambda case: 0.5,
    compressed: bool = False,
    with_ids: bool = False,
    reference: Impl | None = None,
    work: Callable[[Case, Given], Work] = work,
    yours: Callable[[Case], bool] = lambda case: True,
    contract: str | None = None,
    plots: Sequence[Plot] = (),
    pictures: Mapping[str, Callable[[Sequence[Record]], str | None]] | None = None,
) -> Benchmark:
    """The benchmark of an index.

    cases:      (set, n, size) → its cases; the same for the bundled sets and for the user's own.
    sets:       size → bundled sets, and how many vectors of each.
    settings:   case → what the index is made with, beside its metric.
    options:    keys of a case that its search is asked with, such as "ef".
    least:      case → the recall below which an index is broken; on the user's vectors there is no such.
    compressed: whether distances are approximate, so that they are not checked.
    with_ids:   whether the contract has `fit(x, ids)`; the ids are then 0 … n−1.
    reference:  who finds all true neighbours, and is called "exact"; None: `BruteForce`.
    """

    def chosen(case: Case) -> dict[str, Any]:
        return {name: case[name] for name in options if name in case}

    def floor(case: Case) -> float:
        return least(case) if case["data"] in DIMS else 0.0

    def fitted(make: Callable[..., Any], told: Mapping[str, Any], x: np.ndarray) -> Any:
        index = make(**told)  # which `fit` may return, or not
        index.fit(x, np.arange(len(x))) if with_ids else index.fit(x)
        return index

    def prepare(make: Callable[..., Any], case: Case, given: Given) -> Callable[[], Any]:
        told = {"metric": given.data.metric, **settings(case)}
        if case["task"] == "build":
            given.turn = None
            return lambda: fitted(make, told, given.data.base)
        key = make, tuple(sorted(told.items()))
        if key not in given.built:
            fitted(make, {**told, **settings({**case, "n": WARM})}, given.data.base[:WARM])
            start = time.perf_counter()
            index = fitted(make, told, given.data.base)
            given.built[key] = Built(index, time.perf_counter() - start)
        given.turn = given.built[key]
        index, how = given.turn.index, chosen(case)
        return lambda: index.search(given.queries, K, **how)

    def answers(case: Case, given: Given, got: Any) -> tuple[np.ndarray, np.ndarray]:
        distances, ids = got if case["task"] == "search" else got.search(given.queries, K, **chosen(case))
        return np.asarray(distances), np.asarray(ids)

    def verify(case: Case, given: Given, got: Any, want: Any) -> tuple[float, float]:
        """The share of true neighbours that was missed; ∞ for distances that are not true."""
        mine, true = answers(case, given, got), answers(case, given, want)
        if not compressed and lies(given.data, mine):
            return math.inf, 1 - floor(case)
        return 1 - recall(given.data, mine, true), 1 - floor(case)

    def figures(case: Case, given: Given, got: Any) -> dict[str, float]:
        index = given.turn.index if given.turn else got
        found = {f"recall@{K}": given.data.recall(answers(case, given, got)[1], K)}
        if hasattr(index, "nbytes"):
            found["bytes/vector"] = index.nbytes / len(given.data)
        if given.turn:
            how = chosen(case)
            key = tuple(sorted(how.items()))
            if key not in given.turn.counts:
                given.turn.counts[key] = distances_per_query(index, given.queries[:COUNTED], how)
            counted = given.turn.counts[key]
            found |= {} if counted is None else {"distances/query": counted}
            found["build s"] = given.turn.seconds
        return found

    return Benchmark(
        file,
        cases={
            size: [case for name, n in chosen_sets.items() for case in cases(name, n, size)]
            for size, chosen_sets in sets.items()
        },
        inputs=inputs,
        work=work,
        impls={"exact": reference or Impl(lambda: BruteForce, "reference"), **impls},
        subject=subject,
        prepare=prepare,
        compared=lambda case: case["task"] == "search",
        verify=verify,
        figures=figures,
        yours=yours,
        contract=contract,
        plots=plots,
        pictures=pictures or {},
        data=lambda path, metric, size: on_file(cases, path, metric, size),
    )


def on_file(cases: Callable[[str, int, Size], Sequence[Case]], path: str, metric: str | None, size: Size) -> list[Case]:
    """The cases on the user's file: as many of its vectors as the size allows. What `vectors.read` raises."""
    n = min(len(_loaded(path, metric)), LARGEST[size])
    if n < FEWEST:
        raise ValueError(f"{path}: {n} vectors are too few to measure an index on; {FEWEST} are needed")
    said = {} if metric is None else {"metric": metric}
    return [{**case, **said} for case in cases(path, n, size)]


def distances_per_query(index: Any, queries: np.ndarray, how: Mapping[str, Any]) -> float | None:
    """How many distances a search computes on average, where the index can say; None else."""
    if isinstance(index, BruteForce):
        return float(len(index.index))
    if isinstance(index, NodeIndex):
        return hnsw.distances_per_query(index, queries, K, **how)
    if not hasattr(index, "distances_per_query"):
        return None
    count = index.distances_per_query(queries, K, **how)
    return None if count is None else float(count)


def lists(n: int) -> int:
    """How many inverted lists for n vectors: the power of two next to 1.6·√n, so 512 for 100,000."""
    return 2 ** round(math.log2(1.6 * math.sqrt(n)))


def pieces(data: str, wanted: Iterable[int]) -> list[int]:
    """Into how many pieces the vectors of this set, or file, can be cut: the largest divisors up to those wanted."""
    dim = DIMS.get(data) or _loaded(data, None).dim
    found = (max(m for m in range(1, most + 1) if dim % m == 0) for most in wanted)
    return list(dict.fromkeys(found))


def sets(quick: int, digits: int = 1_400) -> dict[Size, dict[str, int]]:
    """Of each size the bundled sets, and how many vectors of each; `quick` of the descriptors in the quick one."""
    return {
        "quick": {"digits": digits, "descriptors": quick},
        "default": {"digits": digits, "descriptors": 100_000},
        "full": {"digits": digits, "latent": 6_000, "descriptors": 200_000},
    }


def small(case: Case) -> bool:
    """Whether a slow readable version takes part."""
    return bool(case["n"] <= SMALL)


def probes(n: int, size: Size) -> list[int]:
    """How many of the lists of n vectors are probed, from one to as many as take their time."""
    chosen = PROBES if size == "full" else PROBES[:-1] if size == "default" else (1, 8)
    return [n_probe for n_probe in chosen if n_probe <= lists(n)]


def list_settings(n: int) -> dict[str, Any]:
    """What an index with inverted lists over n vectors is made with; each search says its own n_probe."""
    return {"n_lists": lists(n), "n_probe": 8, "seed": 0}


def code_settings(m: int, opq: bool = False) -> dict[str, Any]:
    """What an index of codes of m bytes is made with."""
    return {"m": m, "bits": 8, "opq": opq, "seed": 0}


def grown(data: str, n: int, size: Size) -> list[int]:
    """The other sizes at which a search is timed to see how it grows: n/2, n/4, …; and 200,000 of the descriptors."""
    beyond = [200_000] if (data, size) == ("descriptors", "default") else []
    return [] if size == "quick" else [*halves(n // 2), *beyond]


def halves(n: int, least: int = 3000) -> Iterable[int]:
    """n, n/2, n/4, … down to `least`, smallest first."""
    sizes = []
    while n >= least:
        sizes.append(n)
        n //= 2
    return reversed(sizes)
