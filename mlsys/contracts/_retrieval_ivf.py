"""What inverted lists must do: find exactly with all lists, find most with few, and find nothing that is gone.

The implementation is anything called as `make(metric=…, n_lists=…, n_probe=…, seed=…)` that gives an object with
`fit(x)` (ids 0 … n−1), `remove(ids)`, and `search(queries, k, n_probe=…) -> (distances, ids)` as in
`_retrieval_exact`. Where its clusters lie is its own affair:

- with n_probe = n_lists it must equal brute force;
- with fewer, on vectors in well separated groups, at least 95% of the true neighbours must be found;
- whatever is found must have its true distance, stand in order of it, and stand there once.

See also:
    `mlsys.retrieval.ivf`, `mlsys.contracts._retrieval_exact` (the oracle).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mlsys.contracts._retrieval_exact import Plain as Brute
from mlsys.contracts._retrieval_exact import compare_ids, distances, pair, sound, tolerance
from mlsys.contracts.core import Case, Contract, Inputs, Results, Wrong

FOUND = 0.95  # of the true neighbours


def lloyd(x: np.ndarray, n: int, iterations: int = 15) -> np.ndarray:
    """Centroids by the two steps of Lloyd, from vectors far from each other."""
    chosen = [0]
    far = ((x - x[0]) ** 2).sum(axis=1)
    for _ in range(n - 1):
        chosen.append(int(far.argmax()))
        far = np.minimum(far, ((x - x[chosen[-1]]) ** 2).sum(axis=1))
    centroids = x[chosen].astype(np.float64)
    for _ in range(iterations):
        of = distances("l2", x, centroids).argmin(axis=1)
        centroids = np.stack([x[of == i].mean(axis=0) if (of == i).any() else centroids[i] for i in range(n)])
    return centroids


@dataclass
class Plain:
    """IVF by its definition. Each further option is one place to go wrong."""

    metric: str
    n_lists: int
    n_probe: int
    seed: int = 0
    farthest: bool = False
    assign: str = "l2"
    ignore_n_probe: bool = False
    forget_removal: bool = False
    to_centroid: bool = False

    def fit(self, x: np.ndarray) -> Plain:
        """Cluster, and assign."""
        self.x, self.gone = x.astype(np.float64), np.zeros(len(x), np.bool_)
        self.centroids = lloyd(self.x, self.n_lists)
        self.of = distances(self.assign, x, self.centroids).argmin(axis=1)
        return self

    def remove(self, ids: np.ndarray) -> Plain:
        """Mark them."""
        self.gone[ids] = not self.forget_removal
        return self

    def search(self, queries: np.ndarray, k: int, n_probe: int) -> tuple[np.ndarray, np.ndarray]:
        """The nearest in the lists of the nearest centroids."""
        n_probe = self.n_probe if self.ignore_n_probe else n_probe
        order = distances(self.metric, queries, self.centroids).argsort(axis=1)
        lists = order[:, -n_probe:] if self.farthest else order[:, :n_probe]
        near, ids = np.full((len(queries), k), np.inf), np.full((len(queries), k), -1, np.int64)
        measured = self.centroids[self.of] if self.to_centroid else self.x
        for q, row in enumerate(distances(self.metric, queries, measured)):
            rows = np.flatnonzero(np.isin(self.of, lists[q]) & ~self.gone)
            rows = rows[np.lexsort((rows, row[rows]))][:k]
            near[q, : len(rows)], ids[q, : len(rows)] = row[rows], rows
        return near, ids


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Groups of vectors around centres of different length; queries beside some of the vectors."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((case["groups"], 12))
    lengths = np.linspace(2, 40, case["groups"])
    centres *= (lengths / np.sqrt((centres**2).sum(axis=1)))[:, None]
    x = centres[np.arange(case["n"]) % case["groups"]] + 0.3 * rng.standard_normal((case["n"], 12))
    queries = x[rng.permutation(case["n"])[:20]] + 0.1 * rng.standard_normal((20, 12))
    settings = {name: case[name] for name in ("metric", "n_lists", "n_probe", "default")}
    return {
        **settings, "k": 5, "x": x.astype(np.float32), "queries": queries.astype(np.float32),
        "removed": np.arange(0, case["n"], 3) if case.get("use") == "remove" else np.empty(0, np.int64),
        "use": None, "ids": np.arange(case["n"]),
    }  # fmt: skip


CASES: list[Case] = [
    {"metric": "l2", "n": 200, "groups": 8, "n_lists": 8, "n_probe": 8, "default": 1},
    {"metric": "ip", "n": 200, "groups": 8, "n_lists": 8, "n_probe": 8, "default": 8},
    {"metric": "cosine", "n": 200, "groups": 8, "n_lists": 8, "n_probe": 8, "default": 2},
    {"metric": "l2", "n": 240, "groups": 8, "n_lists": 8, "n_probe": 3, "default": 3},
    {"metric": "l2", "n": 300, "groups": 12, "n_lists": 16, "n_probe": 5, "default": 1},
    {"metric": "l2", "n": 200, "groups": 8, "n_lists": 8, "n_probe": 8, "default": 8, "use": "remove"},
]


def call(make: Callable[..., Any], given: Inputs) -> Results:
    """Fit, search; with fewer lists than all, how much was found and how wrong its distances are."""
    index = make(metric=given["metric"], n_lists=given["n_lists"], n_probe=given["default"], seed=0)
    index.fit(given["x"])
    if len(given["removed"]):
        index.remove(given["removed"])
    got = pair(index.search(given["queries"], given["k"], n_probe=given["n_probe"]))
    if given["n_probe"] == given["n_lists"]:
        return got
    sound(got, (len(given["queries"]), given["k"]), len(given["x"]))
    want = _brute(given)["ids"]
    true = distances(given["metric"], given["queries"], given["x"])
    error = np.where(got["ids"] >= 0, got["distances"] - np.take_along_axis(true, np.maximum(got["ids"], 0), axis=1), 0)
    found = (want[:, :, None] == got["ids"][:, None]).any(axis=2)
    return {"error": np.array([np.abs(error).max()]), "missed": np.array([1 - found.mean()])}


def _brute(given: Inputs) -> dict[str, np.ndarray]:
    index = Brute(given["metric"]).fit(given["x"], given["ids"])
    if len(given["removed"]):
        index.remove(given["removed"])
    near, ids = index.search(given["queries"], given["k"])
    return {"distances": near, "ids": ids}


def oracle(given: Inputs) -> dict[str, np.ndarray]:
    """Brute force, or no error and nothing missed."""
    if given["n_probe"] == given["n_lists"]:
        return _brute(given)
    return {"error": np.zeros(1), "missed": np.zeros(1)}


def _tolerance(given: Inputs, name: str, want: np.ndarray) -> float:
    if name == "missed":
        return 1 - FOUND
    return tolerance(given, name, want) if name != "error" else 1e-3


def _compare_ids(given: Inputs, got: np.ndarray, want: np.ndarray, limit: float) -> str | None:
    stays = ~np.isin(given["ids"], given["removed"])
    return compare_ids({**given, "x": given["x"][stays], "ids": given["ids"][stays]}, got, want, limit)


WRONG = {
    "farthest_lists": Wrong(partial(Plain, farthest=True), "probe the lists whose centroids are nearest, not farthest"),
    "assigned_by_product": Wrong(
        partial(Plain, assign="ip"),
        "a vector belongs to its nearest centroid: by ⟨x, c⟩ the longest centroids take nearly all",
    ),
    "n_probe_ignored": Wrong(
        partial(Plain, ignore_n_probe=True), "search(…, n_probe=…) decides how many lists are scanned"
    ),
    "removed_stay": Wrong(partial(Plain, forget_removal=True), "what is removed must leave its list too"),
    "distance_to_centroid": Wrong(
        partial(Plain, to_centroid=True), "distances are to the vectors in the lists, not to their centroids"
    ),
}


def contract(name: str, reference: Callable[..., Any]) -> Contract:
    """The contract of inverted lists, for this implementation."""
    return Contract(
        name=name,
        signature="make(*, metric, n_lists, n_probe, seed) -> object with fit(x), remove, search(q, k, n_probe)",
        reference=reference,
        cases=CASES,
        inputs=inputs,
        call=call,
        oracle=oracle,
        tolerance=_tolerance,
        wrong=WRONG,
        compare={"ids": _compare_ids},
    )
