"""What an HNSW index must do: find nearly all of the nearest, and say nothing wrong about those that it finds.

The implementation is called as `make(metric=…, M=…, ef_construction=…, seed=…)` and gives an object with

    fit(x)                                          x is float32 (n, d); ids are 0 … n−1
    search(queries, k, ef=…) -> (distances, ids)    both (n_queries, k), nearest first
    graph                                           an object with `levels` (n,), `entry`, and
                                                    `neighbors(node, layer)` -> nodes

Distances are Σ (q − x)² for "l2", −Σ q·x for "ip", 1 − cos for "cosine". Equal distances are ordered by id, smallest
first; with fewer than k hits, a row ends in id −1 and distance ∞. Equal vectors are all found, each under its id.
Where `ef` is at least n, the answer is exact; elsewhere, a floor for the recall is set that the paper's algorithms
reach with ease. `fit` copies x, for the caller may overwrite it, and replaces what an earlier `fit` built.

Of the graph, the mean level must be 1 / (M − 1) as the paper's mL makes it, the entry point be on the highest layer, no
node have more than M links on a layer, or 2M on layer 0, and every node be reached on layer 0. Levels are random by
`seed`: the same seed gives the same ones, another seed others. Without a graph to look at, an index could be a scan.

What an object also has is judged as well, and what it has not is not missed:

    add(x)                         of (m, d) or (d,): ids count on
    remove(ids)                    the others keep their ids
    search(…, filter=mask)         bool beside the ids: k hits of those allowed, if there are as many

The oracle sorts all distances, in float64.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from mlsys.contracts.core import Case, Contract, Inputs, Mismatch, Results, Wrong, accepts
from mlsys.retrieval import hnsw_numba

SIGNATURE = (
    "make(*, metric, M, ef_construction, seed) -> object with fit(x), search(queries, k, ef=…) -> (distances, ids), "
    "and graph, which has levels (n,), entry and neighbors(node, layer) -> nodes"
)
OPTIONS = ("metric", "M", "ef_construction", "seed")
GRAPH = {  # what is counted, and the rule behind it
    "mean level": "levels are ⌊−ln(u) / ln M⌋ with u uniform in (0, 1]",
    "layers of the entry point below the top": "a node that is higher than all others becomes the entry point",
    "links over M": "a neighbour that gets one too many chooses again, by Algorithm 4 (Algorithm 1, lines 13–16)",
    "links over 2M": "a neighbour that gets one too many on layer 0 chooses 2M of them, by Algorithm 4",
    "nodes not reached": "links go both ways (Algorithm 1, line 12), and every node needs one that leads to it",
}
KEEP = "keep the ef best while searching, and cut to k at the end"
SEEDS = {
    "levels differ": "two indexes of the same seed: draw levels from a generator made of `seed`, for each `fit` anew",
    "levels are the same": "two indexes of different seeds: draw levels from a generator made of `seed`",
}

TINY = {"M": 16, "ef_construction": 60, "ef": 100, "k": 10, "floor": 1.0}  # ef ≥ n: exact
REAL = {"M": 6, "ef_construction": 40, "ef": 60, "k": 10, "floor": 0.9}
CASES: list[Case] = [
    {"data": "digits of 5", "n": 30, "metric": "l2", **TINY},
    {"data": "digits of 5", "n": 30, "metric": "ip", **TINY},
    {"data": "normal", "n": 30, "metric": "cosine", **TINY},
    {"data": "normal", "n": 1, "metric": "l2", **TINY},
    {"data": "digits of 5", "n": 7, "metric": "l2", **TINY},
    {"data": "duplicates", "n": 60, "metric": "l2", **TINY},
    {"data": "manifold", "n": 600, "metric": "l2", **REAL},
    {"data": "manifold", "n": 600, "metric": "cosine", **REAL},
    {"data": "manifold", "n": 600, "metric": "l2", **REAL, "k": 1, "floor": 0.97},
    {"data": "clusters", "n": 600, "metric": "l2", **REAL, "ef": 30, "floor": 0.97},
    {"data": "digits of 5", "n": 30, "metric": "l2", **TINY, "use": "fit again"},
    {"data": "digits of 5", "n": 30, "metric": "l2", **TINY, "use": "x overwritten after fit"},
    {"data": "manifold", "n": 600, "metric": "l2", **REAL, "use": "graph"},
    {"data": "manifold", "n": 200, "metric": "l2", **REAL, "use": "seeds"},
    {"data": "manifold", "n": 400, "metric": "l2", **REAL, "use": "add"},
    {"data": "manifold", "n": 600, "metric": "l2", **REAL, "use": "remove"},
    {"data": "manifold", "n": 600, "metric": "l2", **REAL, "use": "filter half"},
    {"data": "manifold", "n": 600, "metric": "l2", **REAL, "use": "filter few"},
]
MANY: Case = {
    "data": "manifold",
    "n": 300,
    "metric": "l2",
    **REAL,
    "k": 5,
    "ef": 10,
    "floor": 0.6,
    "use": "many searches",
}
SEARCHES = 66_000  # more than 16 bits can count


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Vectors and queries; `before` are fitted first, `others` are added, `gone` removed, `allowed` is the filter."""
    rng = np.random.default_rng(seed)
    n, use = case["n"], case.get("use")
    drawn = DATA[case["data"]](rng, n + (120 if use == "add" else 0) + 40)
    before = DATA[case["data"]](rng, 20 if use == "fit again" else 0)
    allowed = rng.random(n) < {"filter half": 0.5, "filter few": 0.03}.get(str(use), 1.0)
    return {
        "x": drawn[:n],
        "queries": drawn[-40:],
        "others": drawn[n:-40],
        "before": before,
        "gone": np.sort(rng.choice(n, 250, replace=False)) if use == "remove" else np.empty(0, np.int64),
        "allowed": allowed,
        **{name: case[name] for name in ("metric", "M", "ef_construction", "k", "ef", "floor")},
        "use": use,
        "seed": seed % 1000,
    }


def _digits(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.integers(0, 6, (n, 5)).astype(np.float32)


def _normal(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.standard_normal((n, 6)).astype(np.float32)


def _duplicates(rng: np.random.Generator, n: int) -> np.ndarray:
    """25 vectors, over and over."""
    return _digits(rng, 25)[rng.integers(0, 25, n)]


def _manifold(rng: np.random.Generator, n: int) -> np.ndarray:
    """Descriptors as they come: a few directions that matter, some noise in all."""
    curved = np.tanh(rng.standard_normal((n, 5)) @ rng.standard_normal((5, 16)))
    return (curved + 0.05 * rng.standard_normal((n, 16))).astype(np.float32)


def _clusters(rng: np.random.Generator, n: int) -> np.ndarray:
    """40 tight clusters, far from each other."""
    centers = 10 * rng.standard_normal((40, 8))
    return (centers[rng.integers(0, 40, n)] + 0.05 * rng.standard_normal((n, 8))).astype(np.float32)


DATA: Mapping[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "digits of 5": _digits,
    "normal": _normal,
    "duplicates": _duplicates,
    "manifold": _manifold,
    "clusters": _clusters,
}


def call(make: Callable[..., Any], inputs: Inputs) -> Results:
    """Build as the case says, and search; what the object cannot do is as it should be."""
    options = {name: inputs[name] for name in OPTIONS}
    accepts(make, 0, options, SIGNATURE)
    index = make(**options)
    use, how = inputs["use"], {"ef": inputs["ef"]}
    want = oracle(inputs)
    if use == "fit again":
        index.fit(inputs["before"])
        index.search(inputs["queries"], inputs["k"], **how)
    x = inputs["x"].copy() if use == "x overwritten after fit" else inputs["x"]
    index.fit(x)
    if use == "x overwritten after fit":
        x[:] = 7
    if use == "graph":
        return {"graph": _graph(index, inputs)} | _answer(index.search(inputs["queries"], inputs["k"], **how))
    if use == "seeds":
        twin, other = make(**options), make(**options | {"seed": inputs["seed"] + 1})
        twin.fit(x)
        other.fit(x)
        first, second, third = (np.asarray(_has_graph(made).levels) for made in (index, twin, other))
        return {"seeds": np.array([not np.array_equal(first, second), np.array_equal(first, third)], np.float64)}
    if use in ("add", "remove") and not callable(getattr(index, use, None)):
        return dict(want)
    if use == "add":
        index.add(inputs["others"][:100])
        for vector in inputs["others"][100:]:
            index.add(vector)
    if use == "remove":
        index.remove(inputs["gone"])
    if use in ("filter half", "filter few"):
        takes = inspect.signature(index.search).parameters.values()
        if not any(p.name == "filter" or p.kind is p.VAR_KEYWORD for p in takes):
            return dict(want)
        how["filter"] = inputs["allowed"]
    if use == "many searches":
        index.search(np.repeat(inputs["queries"][:1], SEARCHES, axis=0), 1, ef=1)
    return _answer(index.search(inputs["queries"], inputs["k"], **how))


def _answer(answer: Any) -> Results:
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise Mismatch(f"search returned a {type(answer).__name__}, expected the tuple (distances, ids)")
    try:
        distances, ids = (np.asarray(part) for part in answer)
    except ValueError:
        raise Mismatch("rows that search returned differ in length: fill up with id −1 and distance ∞") from None
    if ids.dtype.kind not in "iu":
        raise Mismatch(f"search returned ids of dtype {ids.dtype}, expected integers; the order is (distances, ids)")
    if distances.shape != ids.shape:
        raise Mismatch(f"search returned distances {distances.shape} and ids {ids.shape}, which must be alike")
    return {"answer": np.stack([distances.astype(np.float64), ids.astype(np.float64)], axis=-1)}


def _has_graph(index: Any) -> Any:
    """Its graph; Mismatch if it shows none."""
    graph = getattr(index, "graph", None)
    missing = [name for name in ("levels", "entry", "neighbors") if not hasattr(graph, name)]
    if graph is None or missing:
        what = "the index has no `graph`" if graph is None else f"its `graph` has no `{missing[0]}`"
        raise Mismatch(f"{what}: let it show `graph.levels` (n,), `graph.entry`, and `graph.neighbors(node, layer)`")
    return graph


def _graph(index: Any, inputs: Inputs) -> np.ndarray:
    graph, n = _has_graph(index), len(inputs["x"])
    levels, entry, M = np.asarray(graph.levels), int(graph.entry), inputs["M"]
    if levels.shape != (n,):
        raise Mismatch(f"`graph.levels` has shape {levels.shape}, expected ({n},): the highest layer of each node")
    over = [0, 0]
    for node, level in enumerate(levels.tolist()):
        for layer in range(level + 1):
            linked = len(graph.neighbors(node, layer))
            over[layer == 0] = max(over[layer == 0], linked - (2 * M if layer == 0 else M))
    reached, front = {entry}, [entry]
    for node in front:  # which grows
        fresh = [near for near in graph.neighbors(node, 0) if near not in reached]
        reached.update(fresh)
        front += fresh
    return np.array([levels.mean(), levels.max() - levels[entry], *over, len(levels) - len(reached)], np.float64)


def _contents(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """The vectors that the index holds when it is searched, and whether each id may be found."""
    x = np.concatenate([inputs["x"], inputs["others"]]).astype(np.float64)
    allowed = np.concatenate([inputs["allowed"], np.ones(len(inputs["others"]), bool)])
    allowed[inputs["gone"]] = False
    return x, allowed


def _distances(inputs: Inputs) -> np.ndarray:
    """(n_queries, n); ∞ for what must not be found."""
    x, allowed = _contents(inputs)
    q = inputs["queries"].astype(np.float64)
    if inputs["metric"] == "l2":
        far = ((q[:, None] - x) ** 2).sum(axis=-1)
    elif inputs["metric"] == "ip":
        far = -(q @ x.T)
    else:
        far = 1 - (q / np.linalg.norm(q, axis=1)[:, None]) @ (x / np.linalg.norm(x, axis=1)[:, None]).T
    return np.where(allowed, far, np.inf)


def oracle(inputs: Inputs) -> dict[str, np.ndarray]:
    """Sort everything."""
    far, k = _distances(inputs), inputs["k"]
    order = np.argsort(far, axis=1, kind="stable")[:, :k]
    answer = np.full((len(far), k, 2), (np.inf, -1.0))
    answer[:, : order.shape[1], 0] = np.take_along_axis(far, order, axis=1)
    answer[:, : order.shape[1], 1] = order
    answer[np.isinf(answer[..., 0]), 1] = -1
    if inputs["use"] == "seeds":
        return {"seeds": np.zeros(len(SEEDS))}
    if inputs["use"] != "graph":
        return {"answer": answer}
    return {"graph": np.array([1 / (inputs["M"] - 1), 0, 0, 0, 0], np.float64), "answer": answer}


def tolerance(inputs: Inputs, name: str, want: np.ndarray) -> float:
    """Rounding of float32 sums of a few products; for the graph, five standard deviations of the mean level."""
    if name == "seeds":
        return 0.0
    if name == "graph":
        q = 1 / inputs["M"]
        return 5 * np.sqrt(q) / (1 - q) / np.sqrt(len(inputs["x"]))
    finite = want[..., 0][np.isfinite(want[..., 0])]
    return 2e-5 * max(1.0, float(np.abs(finite).max(initial=0.0)))


def compare_answer(inputs: Inputs, got: np.ndarray, want: np.ndarray, limit: float) -> str | None:
    """What is wrong with distances and ids: shape, padding, order, a distance, an id, or too few of the nearest."""
    if got.shape != want.shape:
        return f"shape {got.shape[:-1]}, expected {want.shape[:-1]}"
    far = _distances(inputs)
    k = inputs["k"]
    for row, (mine, right) in enumerate(zip(got, want, strict=True)):
        ids = mine[:, 1].astype(np.int64)
        for rank, (distance, id_) in enumerate(zip(mine[:, 0], ids.tolist(), strict=True)):
            at = f"query {row}, rank {rank}: id {id_}, distance {distance:.6g}"
            if right[rank, 1] < 0 or id_ == -1:
                if id_ == -1 and distance == np.inf and right[rank, 1] < 0:
                    continue
                there = int((right[:, 1] >= 0).sum())
                rule = f"; {_why_too_few(inputs)}" if id_ == -1 and right[rank, 1] >= 0 else ""
                return f"{at}; {there} of {k} can be found, and only after them id −1 and distance ∞ stand{rule}"
            if not 0 <= id_ < far.shape[1]:
                return f"{at}; there is no such id"
            if np.isinf(far[row, id_]):
                return f"{at}; that id was {'removed' if len(inputs['gone']) else 'not allowed by the filter'}"
            if not abs(far[row, id_] - distance) <= limit:  # NaN too
                return f"{at}; the distance is {far[row, id_]:.6g}"
            if id_ in ids[:rank]:
                return f"{at}; it is returned twice"
            if rank and (mine[rank - 1, 0], ids[rank - 1]) > (distance, id_):
                return f"{at}; it stands after id {ids[rank - 1]}, distance {mine[rank - 1, 0]:.6g}"
        if inputs["floor"] == 1.0:
            found = far[row, ids[ids >= 0]]
            bad = np.flatnonzero(np.abs(found - right[: len(found), 0]) > limit)
            if len(bad):
                near = f"distance {found[bad[0]]:.6g}, expected {right[bad[0], 0]:.6g}"
                return f"query {row}, rank {bad[0]}: {near}; {_why_too_few(inputs)}"
            twins = _tied(far[row], ids[ids >= 0])
            if twins:
                return f"query {row}: {twins}"
    hits = got[..., 0] <= want[:, -1:, 0] + limit
    recall = float(hits.mean())
    if recall < inputs["floor"]:
        low = f"recall {recall:.3f} of the {k} nearest at ef={inputs['ef']}, expected at least {inputs['floor']}"
        if k == 1:
            return f"{low}: {KEEP}"
        return f"{low}: choose links by Algorithm 4, also for a neighbour that has too many of them; {KEEP}"
    return None


def _why_too_few(inputs: Inputs) -> str:
    """What makes a search find fewer than there are."""
    if len(inputs["gone"]):
        return "removed ones must not take the places of others"
    if not inputs["allowed"].all():
        return "go on until k allowed ones are found"
    return f"{KEEP}, and let links go both ways (Algorithm 1, line 12)"


def _tied(far: np.ndarray, ids: np.ndarray) -> str | None:
    """An id that is missing though it is exactly as near as a larger one that was returned."""
    for id_ in ids.tolist():
        for twin in np.flatnonzero(far[:id_] == far[id_]).tolist():
            if twin not in ids:
                return f"id {twin} is as near as id {id_} and smaller, so it comes first"
    return None


def compare_graph(inputs: Inputs, got: np.ndarray, want: np.ndarray, limit: float) -> str | None:
    """Which of the rules the graph breaks."""
    for (what, rule), mine, right in zip(GRAPH.items(), got.tolist(), want.tolist(), strict=True):
        off = abs(mine - right) > limit if what == "mean level" else mine > right
        if off:
            return f"{what}: {mine:.4g}, expected {right:.4g}; {rule}"
    return None


def compare_seeds(inputs: Inputs, got: np.ndarray, want: np.ndarray, limit: float) -> str | None:
    """Whether levels are those of the seed."""
    for (what, rule), mine in zip(SEEDS.items(), got.tolist(), strict=True):
        if mine:
            return f"{what} in {rule}"
    return None


# --- wrong variants: the compiled index, with one mistake -------------------------------------------------------------


class _Right(hnsw_numba.HNSW):
    """What the mistakes are made in."""

    def __init__(self, *, metric: str, M: int, ef_construction: int, seed: int, **mistake: Any) -> None:
        super().__init__(metric, M, ef_construction, seed, **mistake)


class _Levels(_Right):
    """Wrong levels."""

    def __init__(self, *, how: Callable[[np.ndarray, np.random.Generator], np.ndarray], **options: Any) -> None:
        super().__init__(**options)
        self.how = how

    def _insert(self, x: np.ndarray) -> None:
        self.rng = np.random.default_rng(self.seed)
        super()._insert(x)

    def _levels(self, n: int) -> np.ndarray:
        return self.how(super()._levels(n), self.rng).astype(np.int32)


class _SeedIgnored(_Right):
    """Every index is that of seed 0."""

    def __init__(self, *, seed: int, **options: Any) -> None:
        super().__init__(seed=0, **options)


class _EntryStays(_Right):
    """The first node stays the entry point."""

    def _link_in(self, nodes: np.ndarray) -> None:
        graph = self._graph
        if graph.entry < 0:
            graph.entry = int(nodes[0])
        for at in range(0, len(nodes), 8):
            self._explore(nodes[at : at + 8])
            self._link_back(nodes[at : at + 8])


class _OneWay(_Right):
    """New nodes know their neighbours, but not the other way."""

    def _link_back(self, nodes: np.ndarray) -> None:
        pass

    def _reconnect(self) -> None:
        pass


class _OneBatch(_Right):
    """All nodes search an empty graph."""

    def _link_in(self, nodes: np.ndarray) -> None:
        super()._link_in(nodes[:1])
        self._explore(nodes[1:])
        self._link_back(nodes[1:])

    def _reconnect(self) -> None:
        pass


class _Overfull(_Right):
    """Rows of 3M links on layer 0."""

    def __init__(self, *, M: int, **options: Any) -> None:
        super().__init__(M=M + M // 2, **options)


class _Unreached(_OneBatch):
    """Half of the nodes are not linked to."""

    def _link_in(self, nodes: np.ndarray) -> None:
        half = -(-len(nodes) // 2)
        hnsw_numba.HNSW._link_in(self, nodes[:half])
        self._explore(nodes[half:])


class _Answers(_Right):
    """A mistake in what `search` makes of the graph's answer."""

    def __init__(self, *, mistake: str, **options: Any) -> None:
        super().__init__(**options)
        self.mistake, self.searches, self.given = mistake, 0, np.empty((0, 0), np.float32)

    def search(self, queries: np.ndarray, k: int = 10, *, filter: Any = None, **how: Any) -> tuple[Any, Any]:
        """Search, and spoil it."""
        if self.mistake == "ef_is_k":
            how["ef"] = k
        if self.mistake == "x_not_copied" and self.metric == "l2" and len(self.given) == len(self):
            self._graph.vectors[self._node_of_row] = self.given
        if self.mistake == "filter_after_search" and filter is not None:
            distances, ids = super().search(queries, k, **how)
            dropped = (ids < 0) | ~np.asarray(filter)[ids]
            order = np.argsort(dropped, axis=1, kind="stable")
            far, none = np.where(dropped, np.inf, distances), np.where(dropped, -1, ids)
            return np.take_along_axis(far, order, axis=1), np.take_along_axis(none, order, axis=1)
        if self.mistake == "filter_ignored":
            filter = None
        distances, ids = super().search(queries, k, filter=filter, **how)
        before, self.searches = self.searches, self.searches + len(ids)
        if self.mistake == "marks_not_cleared" and before > 65535:
            return np.where(np.arange(k) > 0, np.inf, distances), np.where(np.arange(k) > 0, -1, ids)
        if self.mistake == "distance_not_squared" and self.metric == "l2":
            return np.sqrt(distances), ids
        if self.mistake == "distances_nan":
            with np.errstate(invalid="ignore"):  # ∞ − ∞
                return distances + (np.float32(np.inf) - np.float32(np.inf)) * (distances == distances[:, :1]), ids
        if self.mistake == "product_not_negated" and self.metric == "ip":
            return -distances, ids
        if self.mistake == "similarity_for_distance" and self.metric == "cosine":
            return 1 - distances, ids
        if self.mistake == "not_padded":
            return distances, np.where(ids < 0, 0, ids)
        if self.mistake == "furthest_first":
            return distances[:, ::-1], ids[:, ::-1]
        if self.mistake == "ties_to_larger_id":
            order = np.lexsort((-ids, distances), axis=1)
            return np.take_along_axis(distances, order, axis=1), np.take_along_axis(ids, order, axis=1)
        return distances, ids

    def remove(self, ids: np.ndarray) -> Any:
        """Take them out, or not."""
        if self.mistake == "removed_returned":
            return self
        if self.mistake == "ids_move_up":
            super().remove(ids)
            self._ids, self._listed = np.arange(len(self)), None
            return self
        return super().remove(ids)

    def fit(self, x: np.ndarray, ids: np.ndarray | None = None) -> Any:
        """Take them in, or not all."""
        self.given = x
        if self.mistake == "fit_adds" and len(self):
            return self.add(x)
        if self.mistake == "duplicates_dropped":
            _, first = np.unique(x, axis=0, return_index=True)
            ids = np.sort(first)
            return super().fit(x[ids], ids)
        return super().fit(x, ids)


def _wrong(mistake: str) -> Callable[..., Any]:
    return partial(_Answers, mistake=mistake)


WRONG = {
    "nearest_linked": Wrong(
        partial(_Right, select="nearest"),
        "link to neighbours in different directions (Algorithm 4): with the M nearest, no link leaves a tight cluster",
    ),
    "all_on_layer_0": Wrong(
        partial(_Levels, how=lambda levels, rng: 0 * levels),
        "levels are ⌊−ln(u) / ln M⌋ with u uniform in (0, 1], not all 0",
    ),
    "levels_uniform": Wrong(
        partial(_Levels, how=lambda levels, rng: rng.integers(0, 4, len(levels))),
        "levels fall off exponentially: ⌊−ln(u) / ln M⌋, one node in M is on layer 1",
    ),
    "levels_too_high": Wrong(
        partial(_Levels, how=lambda levels, rng: levels + (rng.random(len(levels)) < 0.5)),
        "mL is 1 / ln M with the natural logarithm, and the level is rounded down",
    ),
    "levels_of_no_seed": Wrong(
        partial(_Levels, how=lambda levels, rng: np.random.default_rng().permutation(levels)),
        "draw levels from a generator made of `seed`, not from one that all share",
    ),
    "seed_ignored": Wrong(_SeedIgnored, "draw levels from a generator made of `seed`: another seed gives other levels"),
    "fit_adds": Wrong(_wrong("fit_adds"), "fit replaces what an earlier fit built: start from nothing in it"),
    "x_not_copied": Wrong(_wrong("x_not_copied"), "copy x in fit: it is the caller's, who may overwrite it"),
    "entry_stays": Wrong(
        _EntryStays, "a node that is higher than all others becomes the entry point (Algorithm 1, lines 18–19)"
    ),
    "ef_is_k": Wrong(_wrong("ef_is_k"), "keep the ef best while searching, and cut to k at the end"),
    "one_way": Wrong(_OneWay, "links go both ways: add the new node to its neighbours' links (Algorithm 1, line 12)"),
    "one_batch": Wrong(_OneBatch, "nodes of a batch do not see each other: let batches grow with the graph"),
    "overfull": Wrong(_Overfull, "shrink the links of a neighbour that has more than M, or 2M on layer 0"),
    "unreached": Wrong(_Unreached, "every node needs a link that leads to it: insert all of them"),
    "distance_not_squared": Wrong(_wrong("distance_not_squared"), "l2 is the sum of squares, without the root"),
    "distances_nan": Wrong(
        _wrong("distances_nan"), "a distance is a number: NaN is in no order, and passes every test for being too large"
    ),
    "product_not_negated": Wrong(_wrong("product_not_negated"), "ip is minus the inner product: smaller is nearer"),
    "similarity_for_distance": Wrong(_wrong("similarity_for_distance"), "cosine is 1 − cos: smaller is nearer"),
    "not_padded": Wrong(_wrong("not_padded"), "with fewer than k hits, fill up with id −1 and distance ∞"),
    "furthest_first": Wrong(_wrong("furthest_first"), "a heap of the best has its worst on top: turn the result round"),
    "ties_to_larger_id": Wrong(_wrong("ties_to_larger_id"), "of equal distances the smaller id comes first"),
    "duplicates_dropped": Wrong(
        _wrong("duplicates_dropped"), "equal vectors may share a node, but each has an id, and all are found"
    ),
    "removed_returned": Wrong(_wrong("removed_returned"), "an id that was removed is not found any more"),
    "ids_move_up": Wrong(_wrong("ids_move_up"), "removing one id does not change the others"),
    "filter_after_search": Wrong(
        _wrong("filter_after_search"), "go on until k allowed ones are found: a filter after the search leaves fewer"
    ),
    "filter_ignored": Wrong(_wrong("filter_ignored"), "only those for which the filter is True are hits"),
}
MARKS = {
    "marks_not_cleared": Wrong(
        _wrong("marks_not_cleared"),
        "when the number of the search no longer fits the marks of visited nodes, clear them and begin at 1",
    )
}


def contract(name: str, reference: Callable[..., Any], *, fast: bool = False) -> Contract:
    """The contract under this name. fast: with a case of 66,000 searches."""
    return Contract(
        name=name,
        signature=SIGNATURE,
        reference=reference,
        cases=[*CASES, MANY] if fast else CASES,
        inputs=inputs,
        call=call,
        oracle=oracle,
        tolerance=tolerance,
        wrong=WRONG | MARKS if fast else WRONG,
        compare={"answer": compare_answer, "graph": compare_graph, "seeds": compare_seeds},
    )
