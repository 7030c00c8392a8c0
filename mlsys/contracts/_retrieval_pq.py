"""What product quantization must compute: good codes, and distances to what they stand for.

For `retrieval.pq` the implementation is anything called as `make(metric=…, m=…, bits=…, opq=…, seed=…)` that gives an
object with `fit(x)` (ids 0 … n−1), `encode(x) -> codes (n, m)`, `decode(codes) -> x̂ (n, d)`, and
`search(queries, k) -> (distances, ids)`. For `retrieval.ivfpq` it is called as
`make(metric=…, n_lists=…, m=…, bits=…, opq=…, n_probe=…, seed=…)`, and has `fit`, `search` as that of
`retrieval.ivf`, and `reconstruct() -> x̂ (n, d)`. Codebooks are its own affair:

- x̂ must be no farther from x in the mean than 1.5 times what a plain k-means of our own reaches (`coarseness`);
- distances must be those of the query as it is and x̂ (asymmetric), and the k smallest of them all, in order.

See also:
    `mlsys.retrieval.pq`, `mlsys.retrieval.ivfpq`, `mlsys.contracts.core`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mlsys.contracts._retrieval_exact import distances, pair, sound
from mlsys.contracts._retrieval_ivf import lloyd
from mlsys.contracts.core import Case, Contract, Inputs, Mismatch, Results, Wrong

COARSER = 1.5  # than our own codes, at most


@dataclass
class Plain:
    """Product quantization by its definition. Each further option is one place to go wrong."""

    metric: str
    m: int
    bits: int
    opq: bool = False
    seed: int = 0
    next_table: bool = False
    nine_bits: bool = False
    symmetric: bool = False
    query_as_it_is: bool = False
    without_query_norm: bool = False
    sampled: bool = False

    def fit(self, x: np.ndarray) -> Plain:
        """Codebooks, and the codes of x."""
        x = self.at_length_one(x)
        d = x.shape[1]
        # Any rotation will do for a test of who applies it: the one that turns each pair of far coordinates.
        self.rotation = np.eye(d)
        if self.opq:
            self.rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((d, d)))[0]
        parts = (x @ self.rotation).reshape(len(x), self.m, -1).astype(np.float64)
        size = 1 << (self.bits + 1 if self.nine_bits else self.bits)
        rows = np.random.default_rng(self.seed).permutation(len(x))[:size]
        self.books = np.stack([p[rows] if self.sampled else lloyd(p, size, 8) for p in parts.transpose(1, 0, 2)])
        self.codes = self.encode(x)
        return self

    def at_length_one(self, x: np.ndarray) -> np.ndarray:
        """As cosine wants it."""
        x = x.astype(np.float64)
        return x / np.sqrt((x * x).sum(axis=1, keepdims=True)) if self.metric == "cosine" else x

    def encode(self, x: np.ndarray) -> np.ndarray:
        """The nearest centroid of each part."""
        parts = (self.at_length_one(x) @ self.rotation).reshape(len(x), self.m, -1)
        codes = [distances("l2", parts[:, j], book).argmin(axis=1) for j, book in enumerate(self.books)]
        return np.stack(codes, axis=1) & ((1 << self.bits) - 1)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Centroids side by side, rotated back."""
        return self.books[np.arange(self.m), codes].reshape(len(codes), -1) @ self.rotation.T

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Tables, sums, the smallest."""
        queries = self.at_length_one(queries)
        if self.symmetric:
            queries = self.decode(self.encode(queries))
        parts = (queries if self.query_as_it_is else queries @ self.rotation).reshape(len(queries), self.m, -1)
        if self.metric == "l2":
            tables = ((parts[:, :, None] - self.books) ** 2).sum(axis=3)  # (n_queries, m, 2^bits)
            if self.without_query_norm:
                tables -= (parts**2).sum(axis=2)[:, :, None]
        else:
            tables = -(parts[:, :, None] * self.books).sum(axis=3)
        if self.next_table:
            tables = np.roll(tables, 1, axis=1)
        found = tables[:, np.arange(self.m), self.codes].sum(axis=2) + (self.metric == "cosine")
        return nearest(found, k)


def nearest(found: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k smallest of each row (n_queries, n), with their columns; padded."""
    order = np.argsort(found, axis=1, kind="stable")[:, :k]
    near = np.take_along_axis(found, order, axis=1)
    more = ((0, 0), (0, k - order.shape[1]))
    return np.pad(near, more, constant_values=np.inf), np.pad(order, more, constant_values=-1)


@dataclass
class PlainLists:
    """Codes of residuals in lists. Each further option is one place to go wrong."""

    metric: str
    n_lists: int
    m: int
    bits: int
    opq: bool = False
    n_probe: int = 1
    seed: int = 0
    code_vectors: bool = False
    without_term: bool = False
    one_residual: bool = False
    without_base: bool = False

    def fit(self, x: np.ndarray) -> PlainLists:
        """Lists, then codebooks of residuals."""
        self.quantizer = Plain("l2", self.m, self.bits, self.opq)
        x = Plain.at_length_one(Plain(self.metric, 1, 1), x)
        self.centroids = lloyd(x, self.n_lists)
        self.of = distances("l2", x, self.centroids).argmin(axis=1)
        self.offset = np.zeros_like(self.centroids) if self.code_vectors else self.centroids
        self.quantizer.fit(x - self.offset[self.of])
        self.residuals = self.quantizer.decode(self.quantizer.codes)
        return self

    def reconstruct(self) -> np.ndarray:
        """Centroids and residuals."""
        return self.offset[self.of] + self.residuals

    def search(self, queries: np.ndarray, k: int, n_probe: int) -> tuple[np.ndarray, np.ndarray]:
        """All of the nearest lists."""
        queries = Plain.at_length_one(Plain(self.metric, 1, 1), queries)
        order = distances(self.metric, queries, self.centroids).argsort(axis=1)
        lists = order[:, :n_probe]
        r = self.residuals
        if self.metric == "l2":
            found = distances("l2", queries, self.reconstruct())
            if self.without_term:
                found -= 2 * (self.offset[self.of] * r).sum(axis=1)
            if self.one_residual:  # q − c of the nearest list, for all of them
                found = distances("l2", queries - self.offset[order[:, 0]], r)
            if self.without_base:
                found -= ((queries[:, None] - self.offset[self.of]) ** 2).sum(axis=2)
        else:
            base = 0 if self.without_base else queries @ self.offset[self.of].T
            found = (self.metric == "cosine") - base - queries @ r.T
        found = np.where([np.isin(self.of, probed) for probed in lists], found, np.inf)
        near, ids = nearest(found, k)
        return near, np.where(np.isfinite(near), ids, -1)


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Vectors in a few groups far apart, in coordinates of unequal spread; queries beside some of them."""
    rng = np.random.default_rng(seed)
    n, d = case["n"], case["d"]
    spread = np.linspace(1.5, 0.5, d)
    centres = 6 * rng.standard_normal((4, d))
    x = centres[np.arange(n) % 4] + spread * rng.standard_normal((n, d))
    queries = x[rng.permutation(n)[:8]] + 0.3 * rng.standard_normal((8, d))
    settings = {name: case[name] for name in ("metric", "m", "bits", "opq", "k")}
    lists = {name: case[name] for name in ("n_lists", "n_probe") if name in case}
    return {"settings": settings, "lists": lists, "x": x.astype(np.float32), "queries": queries.astype(np.float32)}


CASES: list[Case] = [
    {"metric": "l2", "n": 200, "d": 8, "m": 4, "bits": 4, "opq": False, "k": 5},
    {"metric": "ip", "n": 200, "d": 8, "m": 4, "bits": 4, "opq": False, "k": 5},
    {"metric": "cosine", "n": 200, "d": 8, "m": 2, "bits": 4, "opq": False, "k": 5},
    {"metric": "l2", "n": 200, "d": 8, "m": 4, "bits": 4, "opq": True, "k": 5},
    {"metric": "ip", "n": 150, "d": 6, "m": 3, "bits": 5, "opq": True, "k": 160},
    {"metric": "l2", "n": 600, "d": 6, "m": 2, "bits": 8, "opq": False, "k": 10},
]

LISTS: list[Case] = [
    {**CASES[0], "n_lists": 4, "n_probe": 4},
    {**CASES[1], "n_lists": 4, "n_probe": 4},
    {**CASES[2], "n_lists": 4, "n_probe": 4},
    {**CASES[3], "n_lists": 6, "n_probe": 6},
    {**CASES[0], "n_lists": 8, "n_probe": 8, "n": 300},
]


def _coarseness(metric: str, x: np.ndarray, near: Any) -> float:
    """Mean squared distance of x and x̂."""
    near = np.asarray(near)
    if near.shape != x.shape:
        raise Mismatch(f"the decoded vectors have shape {near.shape}, expected {x.shape}")
    return float(((Plain(metric, 1, 1).at_length_one(x) - near) ** 2).sum(axis=1).mean())


def call(make: Callable[..., Any], given: Inputs) -> Results:
    """Fit, encode, decode, search; all distances of what was decoded are our own to compute."""
    settings, lists, x = dict(given["settings"]), dict(given["lists"]), given["x"]
    k = settings.pop("k")
    index = make(**settings, **lists, seed=0)
    index.fit(x.copy())
    if lists:
        near = np.asarray(index.reconstruct(), np.float64)
        got = pair(index.search(given["queries"], k, n_probe=lists["n_probe"]))
    else:
        near = np.asarray(index.decode(index.encode(x.copy())), np.float64)
        got = pair(index.search(given["queries"], k))
    metric = settings["metric"]
    coarseness = np.array([_coarseness(metric, x, near)])
    queries = Plain(metric, 1, 1).at_length_one(given["queries"])
    true = distances("ip", queries, near) + 1 if metric == "cosine" else distances(metric, queries, near)
    want, _ = nearest(true, k)
    sound(got, want.shape, len(x))
    there, ids = np.isfinite(want), got["ids"]
    if (ids < 0)[there].any():
        raise Mismatch(f"search returned −1 where there are more vectors: {len(x)} for k = {k}")
    own = np.take_along_axis(true, np.maximum(ids, 0), axis=1)
    with np.errstate(invalid="ignore"):
        return {
            "coarseness": coarseness,
            "distances": np.where(there, got["distances"] - own, 0),  # of the ids returned
            "ranking": np.where(there, own - want, 0),  # how much farther than the true k nearest
        }


def oracle(given: Inputs) -> dict[str, np.ndarray]:
    """Our own coarseness; no error, nothing farther."""
    settings, x = dict(given["settings"]), given["x"]
    k = settings.pop("k")
    none = np.zeros((len(given["queries"]), k))
    plain: Any = PlainLists(**settings, **given["lists"]) if given["lists"] else Plain(**settings)
    plain.fit(x)
    near = plain.reconstruct() if given["lists"] else plain.decode(plain.codes)
    coarseness = np.array([_coarseness(settings["metric"], x, near)])
    return {"coarseness": coarseness, "distances": none, "ranking": none}


def tolerance(given: Inputs, name: str, want: np.ndarray) -> float:
    """Sums of float32 terms."""
    scale = 1.0 if given["settings"]["metric"] == "cosine" else float((given["x"] ** 2).sum(axis=1).max())
    return COARSER if name == "coarseness" else 1e-5 * scale


def not_coarser(given: Inputs, got: np.ndarray, want: np.ndarray, limit: float) -> str | None:
    """Finer is welcome."""
    if got[0] <= limit * want[0]:
        return None
    return f"mean ‖x − x̂‖² is {got[0]:.4g}; plain k-means in each part reaches {want[0]:.4g}"


PQ_WRONG = {
    "codebooks_sampled": Wrong(
        partial(Plain, sampled=True), "a codebook is what k-means makes of the parts, not a random sample of them"
    ),
    "next_table": Wrong(partial(Plain, next_table=True), "part j of a code is looked up in the table of part j"),
    "codes_overflow": Wrong(
        partial(Plain, nine_bits=True), "a part has 2^bits centroids: numbers beyond do not fit into its bits"
    ),
    "symmetric": Wrong(partial(Plain, symmetric=True), "do not quantize the query: asymmetric distances are closer"),
    "query_not_rotated": Wrong(
        partial(Plain, query_as_it_is=True), "the codes are of rotated vectors: rotate the query too"
    ),
    "query_norm_missing": Wrong(
        partial(Plain, without_query_norm=True), "l2 tables hold ‖q_j − p_jv‖², with ‖q_j‖² in it"
    ),
}

IVFPQ_WRONG = {
    "residual_not_taken": Wrong(partial(PlainLists, code_vectors=True), "code the residual x − c, which is smaller"),
    "term_forgotten": Wrong(
        partial(PlainLists, without_term=True), "multiplied out, the distance has a term 2⟨c, r̂⟩ for each vector"
    ),
    "residual_of_one_list": Wrong(
        partial(PlainLists, one_residual=True), "q − c differs from list to list: take that of the list you scan"
    ),
    "base_forgotten": Wrong(partial(PlainLists, without_base=True), "add the list's own part: ‖q − c‖², or −⟨q, c⟩"),
}


def contract(name: str, reference: Callable[..., Any]) -> Contract:
    """The contract of product quantization, for this implementation; with lists if its name is of `ivfpq`."""
    lists = "ivfpq" in name
    more = "n_lists, m, bits, opq, n_probe" if lists else "m, bits, opq"
    verbs = "search(q, k, n_probe), reconstruct()" if lists else "search(q, k), encode(x), decode(codes)"
    return Contract(
        name=name,
        signature=f"make(*, metric, {more}, seed) -> object with fit(x), {verbs}",
        reference=reference,
        cases=LISTS if lists else CASES,
        inputs=inputs,
        call=call,
        oracle=oracle,
        tolerance=tolerance,
        wrong=IVFPQ_WRONG if lists else PQ_WRONG,
        compare={"coarseness": not_coarser},
    )
