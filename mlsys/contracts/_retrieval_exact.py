"""What brute force must compute: the true distances, the k smallest, in a defined order.

The implementation is anything called as `make(metric=…)` ("l2" squared, "ip" negated, "cosine" 1 − cos) that gives an
object with

    fit(x, ids)                  vectors (n, d) float32 under ids (n,)
    add(x, ids), remove(ids)
    search(queries, k, filter=mask) -> (distances, ids), both (n_queries, k), nearest first

filter is a bool mask beside the vectors in order of arrival, or None. With fewer than k hits a row ends in id −1 and
distance ∞; equal distances are ordered by id. Which of two vectors comes first is not judged where their distances
differ by less than rounding, unless the vectors are the same.

See also:
    `mlsys.retrieval.exact`, `mlsys.contracts.core`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mlsys.contracts.core import Case, Contract, Inputs, Mismatch, Results, Wrong

BLOCK = 64  # of the variant that keeps too few of each block


def distances(metric: str, queries: np.ndarray, x: np.ndarray) -> np.ndarray:
    """All distances by the definition, float64 (n_queries, n)."""
    q, x = queries.astype(np.float64), x.astype(np.float64)
    if metric == "l2":
        return np.stack([((x - one) ** 2).sum(axis=1) for one in q])
    if metric == "cosine":
        q, x = (a / np.sqrt((a * a).sum(axis=1, keepdims=True)) for a in (q, x))
    return (metric == "cosine") - np.stack([(x * one).sum(axis=1) for one in q])


@dataclass
class Plain:
    """Brute force from the definitions, float64: the oracle. Each further option is one place to go wrong."""

    metric: str
    root: bool = False
    negate: bool = True
    normalise: bool = True
    cancel: bool = False
    tie: int = 1
    per_block: bool = False
    pad: tuple[float, int] = (np.inf, -1)
    filter_late: bool = False
    forget_removal: bool = False
    rows_as_ids: bool = False

    def fit(self, x: np.ndarray, ids: np.ndarray) -> Plain:
        """Hold them."""
        self.x, self.ids = x.copy(), ids.copy()
        return self

    def add(self, x: np.ndarray, ids: np.ndarray) -> Plain:
        """Hold these too."""
        return self.fit(np.concatenate([self.x, x]), np.concatenate([self.ids, ids]))

    def remove(self, ids: np.ndarray) -> Plain:
        """Hold those no longer."""
        stays = ~np.isin(self.ids, ids)
        return self if self.forget_removal else self.fit(self.x[stays], self.ids[stays])

    def all_distances(self, queries: np.ndarray) -> np.ndarray:
        """(n_queries, n)."""
        if self.cancel and self.metric == "l2":
            q, x = queries.astype(np.float32), self.x.astype(np.float32)
            squares = (q * q).sum(axis=1)[:, None] + (x * x).sum(axis=1)
            return (squares - 2 * (q @ x.T)).astype(np.float64)
        metric = "ip" if self.metric == "cosine" and not self.normalise else self.metric
        found = distances(metric, queries, self.x) + (metric != self.metric)
        return np.sqrt(found) if self.root and metric == "l2" else found

    def search(self, queries: np.ndarray, k: int, filter: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Compute everything, sort everything, cut."""
        near = np.full((len(queries), k), self.pad[0])
        ids = np.full((len(queries), k), self.pad[1], np.int64)
        allowed = np.ones(len(self.x), np.bool_) if filter is None or len(filter) != len(self.x) else filter
        for q, row in enumerate(self.all_distances(queries)):
            rows = np.arange(len(row)) if self.filter_late else np.flatnonzero(allowed)
            order = rows[np.lexsort((self.tie * self.ids[rows], row[rows]))]
            if self.per_block:  # of each block its share, and no more
                share = -(-k * BLOCK // len(row))
                order = order[[np.sum(order[:i] // BLOCK == r // BLOCK) < share for i, r in enumerate(order)]]
            order = order[:k]
            order = order[allowed[order]]
            near[q, : len(order)] = row[order]
            ids[q, : len(order)] = order if self.rows_as_ids else self.ids[order]
        if self.metric == "ip" and not self.negate:
            near = np.where(np.isfinite(near), -near, near)
        return near, ids


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Vectors and queries; some vectors twice, some queries among the vectors."""
    rng = np.random.default_rng(seed)
    n, d = case["n"], case["d"]
    # Lengths differ, so that an angle and a product rank differently.
    x = rng.standard_normal((n, d)) * rng.uniform(0.5, 2, (n, 1)) + case.get("mean", 0)
    x[n // 2 : n // 2 + n // 8] = x[: n // 8]
    queries = np.concatenate([x[: n // 16 + 1], rng.standard_normal((6, d)) + case.get("mean", 0)])
    drawn: Inputs = {
        "metric": case["metric"],
        "k": case["k"],
        "x": x.astype(np.float32),
        "queries": queries.astype(np.float32),
        "ids": rng.permutation(3 * n)[:n].astype(np.int64),
        "use": case.get("use"),
        "mask": rng.random(n) < 0.05,
    }
    if case.get("mean"):  # neighbours among the vectors at hand, not themselves: a distance of 0 would hide the error
        drawn["queries"] = (drawn["queries"] + rng.standard_normal(queries.shape)).astype(np.float32)
    return drawn


CASES: list[Case] = [
    {"metric": "l2", "n": 50, "d": 8, "k": 5},
    {"metric": "ip", "n": 50, "d": 8, "k": 5},
    {"metric": "cosine", "n": 50, "d": 8, "k": 5},
    {"metric": "l2", "n": 16, "d": 3, "k": 20},
    {"metric": "ip", "n": 1, "d": 1, "k": 2},
    {"metric": "l2", "n": 60, "d": 16, "k": 10, "mean": 1e4},
    {"metric": "l2", "n": 1500, "d": 12, "k": 40},
    {"metric": "l2", "n": 80, "d": 6, "k": 10, "use": "filter"},
    {"metric": "ip", "n": 80, "d": 6, "k": 10, "use": "remove"},
    {"metric": "l2", "n": 80, "d": 6, "k": 10, "use": "add"},
]


def _used(index: Any, given: Inputs) -> Any:
    """The index after what the case does with it."""
    x, ids = given["x"], given["ids"]
    if given["use"] == "add":
        index.fit(x[: len(x) // 2], ids[: len(x) // 2])
        index.add(x[len(x) // 2 :], ids[len(x) // 2 :])
    else:
        index.fit(x, ids)
    if given["use"] == "remove":
        index.remove(ids[::3])
    return index


def pair(answer: Any) -> Results:
    """Distances and ids, if that is what was returned."""
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise Mismatch(f"search returned a {type(answer).__name__}, expected the tuple (distances, ids)")
    near, ids = (np.asarray(part) for part in answer)
    if ids.dtype.kind not in "iu" or near.dtype.kind != "f":
        raise Mismatch(f"search returned {near.dtype} and {ids.dtype}, expected distances (float) and ids (integer)")
    return {"distances": near, "ids": ids}


def sound(got: Results, shape: tuple[int, int], n: int) -> None:
    """Mismatch for what no answer over the ids 0 … n−1 may be, however many of the nearest it misses."""
    near, ids = got["distances"], got["ids"]
    if near.shape != shape or ids.shape != shape:
        raise Mismatch(f"search returned distances {near.shape} and ids {ids.shape}, expected {shape}")
    if ids.min() < -1 or ids.max() >= n:
        raise Mismatch(f"search returned ids from {ids.min()} to {ids.max()}, expected 0 to {n - 1}, or −1 for none")
    if any(len(set(found)) < len(found) for found in (row[row >= 0].tolist() for row in ids)):
        raise Mismatch("search returned an id twice in a row")
    if (near[ids < 0] != np.inf).any():
        raise Mismatch("with fewer than k hits a row must end in id −1 and distance ∞")
    slack = 1e-5 * float(np.abs(near[np.isfinite(near)]).max(initial=1.0))
    if (near[:, 1:] < near[:, :-1] - slack).any():
        raise Mismatch("search returned a row that is not in order: the nearest comes first")


def call(make: Callable[..., Any], given: Inputs) -> Results:
    """Fit, do what the case does, search."""
    index = _used(make(metric=given["metric"]), given)
    mask = {"filter": given["mask"]} if given["use"] == "filter" else {}
    return pair(index.search(given["queries"], given["k"], **mask))


def oracle(given: Inputs) -> dict[str, np.ndarray]:
    """`Plain`'s answer."""
    near, ids = _used(Plain(given["metric"]), given).search(
        given["queries"], given["k"], given["mask"] if given["use"] == "filter" else None
    )
    return {"distances": near, "ids": ids}


def tolerance(given: Inputs, name: str, want: np.ndarray) -> float:
    """Rounding of the inputs' differences to float32, and of their sum."""
    return 0.0 if name == "ids" else 2e-6 * max(1.0, float(np.abs(want[np.isfinite(want)]).max(initial=0.0)))


def compare_ids(given: Inputs, got: np.ndarray, want: np.ndarray, limit: float) -> str | None:
    """Each id must stand where its distance belongs; equal vectors stand in order of id."""
    if got.shape != want.shape:
        return f"shape {got.shape}, expected {want.shape}"
    index = _used(Plain(given["metric"]), given)
    everything = distances(given["metric"], given["queries"], index.x)
    allowed = given["mask"] if given["use"] == "filter" else np.ones(len(index.x), np.bool_)
    row_of = {i: row for row, i in enumerate(index.ids.tolist()) if allowed[row]}
    limit = tolerance(given, "distances", everything)
    for q, (mine, right) in enumerate(zip(got.tolist(), want.tolist(), strict=True)):
        for rank, (a, b) in enumerate(zip(mine, right, strict=True)):
            at = f"query {q}, rank {rank}: id {a}, expected {b}"
            if a == b:
                continue
            if a == -1 or b == -1 or a not in row_of:
                return f"{at} ({len(row_of)} vectors may be found{'' if a in row_of or a == -1 else '; this is none'})"
            if mine.count(a) > 1:
                return f"{at}; it is returned {mine.count(a)} times"
            if abs(everything[q, row_of[a]] - everything[q, row_of[b]]) > limit:
                return f"{at}, at {everything[q, row_of[b]]:.6g} against {everything[q, row_of[a]]:.6g}"
            same = np.flatnonzero((index.x == index.x[row_of[a]]).all(axis=1) & (index.ids < a) & allowed)
            if any(int(index.ids[row]) not in mine[:rank] for row in same):
                return f"{at}; an equal vector has a smaller id, so it comes first"
    return None


WRONG = {
    "root": Wrong(partial(Plain, root=True), "l2 is the squared distance: take no root"),
    "not_negated": Wrong(partial(Plain, negate=False), "ip is −⟨q, x⟩, so that smaller is nearer for every metric"),
    "not_normalised": Wrong(partial(Plain, normalise=False), "cosine divides by both lengths"),
    "cancels": Wrong(
        partial(Plain, cancel=True),
        "‖q‖² + ‖x‖² − 2⟨q, x⟩ cancels in float32 far from the origin: compute Σ(q − x)² for what you return",
    ),
    "ties_to_larger_id": Wrong(partial(Plain, tie=-1), "of equal distances the smaller id comes first"),
    "share_of_each_block": Wrong(
        partial(Plain, per_block=True), "all k nearest may lie in one block: keep k of each block, then k of all"
    ),
    "padded_with_zero": Wrong(partial(Plain, pad=(0.0, 0)), "fewer than k hits: fill up with id −1 and distance ∞"),
    "filtered_late": Wrong(
        partial(Plain, filter_late=True), "filter before choosing the k nearest: afterwards fewer than k are left"
    ),
    "removed_stay": Wrong(partial(Plain, forget_removal=True), "what is removed must not be found any more"),
    "rows_as_ids": Wrong(partial(Plain, rows_as_ids=True), "return the ids that were given with the vectors, not rows"),
}


def contract(name: str, reference: Callable[..., Any]) -> Contract:
    """The contract of brute force, for this implementation."""
    return Contract(
        name=name,
        signature="make(*, metric) -> object with fit(x, ids), add, remove, search(q, k, filter) -> (distances, ids)",
        reference=reference,
        cases=CASES,
        inputs=inputs,
        call=call,
        oracle=oracle,
        tolerance=tolerance,
        wrong=WRONG,
        compare={"ids": compare_ids},
    )
