"""The exercise about meshes: which ranks talk to each other when data, pipeline and tensor parallelism are combined.

The oracle numbers no rank from its place. It cuts the row of all ranks, as a scheduler would hand out hosts: first into
stages, each of those into replicas, and what is left are the ranks of one tensor-parallel group.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from mlsys.contracts.core import Case, Contract, Inputs, Mismatch, Results, Wrong, accepts
from mlsys.parallel.mesh import groups

SIGNATURE = (
    'groups(dp, pp, tp) -> {"dp": [[rank, …], …], "pp": …, "tp": …}: the groups of ranks 0 … dp·pp·tp − 1 that differ '
    "in one place only, tp between neighbouring ranks, then dp, then pp; each group in the order of its places"
)
KINDS = ("dp", "pp", "tp")


# --- the oracle -------------------------------------------------------------------------------------------------------


def cut(dp: int, pp: int, tp: int) -> list[list[list[int]]]:
    """ranks[stage][replica], the ranks of a tensor-parallel group."""
    row = list(range(dp * pp * tp))
    stages = [row[i * dp * tp : (i + 1) * dp * tp] for i in range(pp)]
    return [[stage[i * tp : (i + 1) * tp] for i in range(dp)] for stage in stages]


def expected(dp: int, pp: int, tp: int) -> dict[str, list[list[int]]]:
    """All groups."""
    ranks = cut(dp, pp, tp)
    return {
        "dp": [list(column) for stage in ranks for column in zip(*stage)],
        "pp": [list(line) for replicas in zip(*ranks) for line in zip(*replicas)],
        "tp": [cell for stage in ranks for cell in stage],
    }


# --- the contract -----------------------------------------------------------------------------------------------------


def _call(impl: Callable[..., Any], inputs: Inputs) -> Results:
    accepts(impl, 3, {}, SIGNATURE)
    answer = impl(inputs["dp"], inputs["pp"], inputs["tp"])
    if not isinstance(answer, Mapping) or sorted(answer) != sorted(KINDS):
        found = sorted(map(str, answer)) if isinstance(answer, Mapping) else type(answer).__name__
        raise Mismatch(f'returned {found}, expected a dictionary with "dp", "pp" and "tp"')
    return {kind: _rows(kind, answer[kind]) for kind in KINDS}


def _rows(kind: str, found: Any) -> np.ndarray:
    """A row for each group, in the order of the first ranks: in which order groups are listed is no matter."""
    try:
        rows = [[int(rank) for rank in group] for group in found]
    except (TypeError, ValueError):
        raise Mismatch(f"{kind} is {found!r}, expected a list of lists of ranks") from None
    if len({len(row) for row in rows}) > 1:
        raise Mismatch(f"{kind} has groups of {sorted({len(row) for row in rows})} ranks: all must be equally large")
    return np.array(sorted(rows), dtype=np.int64).reshape(len(rows), -1)


def _oracle(inputs: Inputs) -> dict[str, np.ndarray]:
    return {kind: np.array(sorted(rows)) for kind, rows in expected(inputs["dp"], inputs["pp"], inputs["tp"]).items()}


def _compare(kind: str) -> Callable[[Inputs, np.ndarray, np.ndarray, float], str | None]:
    def compare(inputs: Inputs, got: np.ndarray, want: np.ndarray, tolerance: float) -> str | None:
        n, size = inputs["dp"] * inputs["pp"] * inputs["tp"], inputs[kind]
        known = sorted(got.flatten().tolist())
        if known != list(range(n)):
            missing = sorted(set(range(n)) - set(known))
            if missing:
                return f"rank {missing[0]} of {n} is in no group"
            twice = next((a for a, b in itertools.pairwise(known) if a == b), known[-1])
            return f"rank {twice} is in several groups, or is none of {n}"
        if got.shape != want.shape:
            return f"groups of {got.shape[1]} ranks, expected {size} each"
        if not np.array_equal(got, want):
            row = next(i for i in range(len(want)) if not np.array_equal(got[i], want[i]))
            return f"has the group {got[row].tolist()}, expected {want[row].tolist()}"
        return None

    return compare


# --- wrong variants ---------------------------------------------------------------------------------------------------


def _grid(dp: int, pp: int, tp: int, *, order: tuple[str, ...] = ("pp", "dp", "tp"), mistake: str = "") -> Any:
    """The groups of a grid whose dimensions have this order, from the outermost in."""
    sizes = {"dp": dp, "pp": pp, "tp": tp}
    ranks = np.arange(dp * pp * tp).reshape([sizes[kind] for kind in order])
    if mistake == "snake":  # each other replica counted backwards
        ranks[:, 1::2] = ranks[:, 1::2, ::-1].copy()
    found = {}
    for kind in KINDS:
        last = np.moveaxis(ranks, order.index(kind), -1)
        found[kind] = last.reshape(-1, sizes[kind]).tolist()
    if mistake == "reversed":
        found["pp"] = [group[::-1] for group in found["pp"]]
    if mistake == "dp_of_all_shares":
        found["dp"] = ranks.reshape(pp, dp * tp).tolist()
    if mistake == "dp_across_stages":
        found["dp"] = [group.ravel().tolist() for group in np.moveaxis(ranks, 2, 0)]
    if mistake == "own_group_only":
        found = {kind: [next(group for group in rows if 0 in group)] for kind, rows in found.items()}
    if mistake == "pairs":
        found["pp"] = [[a, b] for group in found["pp"] for a, b in itertools.pairwise(group)] or found["pp"]
    return found


HINTS: dict[str, tuple[dict[str, Any], str]] = {
    "tp_strided": (
        {"order": ("tp", "pp", "dp")},
        "tensor-parallel ranks lie apart: neighbouring numbers share a host and its fast links, and tp sends most, so "
        "it is the innermost dimension",
    ),
    "pp_inside_dp": (
        {"order": ("dp", "pp", "tp")},
        "dp is outside pp: a pipeline sends least and one neighbour at a time, so it takes the slow links, the "
        "outermost dimension",
    ),
    "dp_of_all_shares": (
        {"mistake": "dp_of_all_shares"},
        "a dp group contains ranks with other shares of the layers, whose gradients are of other numbers: one group "
        "for each stage and share",
    ),
    "dp_across_stages": (
        {"mistake": "dp_across_stages"},
        "a dp group contains ranks of other stages, which have other layers: one group for each stage and share",
    ),
    "stages_reversed": (
        {"mistake": "reversed"},
        "a pipeline's ranks are listed from the last stage to the first: stage 0 is at the lowest rank",
    ),
    "snake": (
        {"mistake": "snake"},
        "in every other replica the shares are counted backwards, so that replicas' gradients of different shares meet",
    ),
    "own_group_only": (
        {"mistake": "own_group_only"},
        "only the groups of rank 0 are there: torch's new_group must be called for every group on every rank, or the "
        "ranks wait for each other",
    ),
    "neighbours_only": (
        {"mistake": "pairs"},
        "a pipeline is one group of all its stages, not one for each pair: tied weights and the loss go from end to "
        "end",
    ),
}

CASES: list[Case] = [
    {"dp": 1, "pp": 1, "tp": 1},
    {"dp": 2, "pp": 1, "tp": 1},
    {"dp": 1, "pp": 1, "tp": 2},
    {"dp": 1, "pp": 3, "tp": 1},
    {"dp": 2, "pp": 1, "tp": 2},
    {"dp": 2, "pp": 2, "tp": 1},
    {"dp": 1, "pp": 2, "tp": 2},
    {"dp": 2, "pp": 2, "tp": 2},
    {"dp": 3, "pp": 4, "tp": 2},
    {"dp": 5, "pp": 1, "tp": 3},
    {"dp": 2, "pp": 12, "tp": 8},
]


def contract(name: str) -> Contract:
    """The contract of the technique `name`."""
    return Contract(
        name=name,
        signature=SIGNATURE,
        reference=groups,
        cases=CASES,
        inputs=lambda case, seed, device: dict(case),
        call=_call,
        oracle=_oracle,
        tolerance=lambda inputs, result, want: 0.0,
        wrong={mistake: Wrong(partial(_grid, **knobs), hint) for mistake, (knobs, hint) in HINTS.items()},
        compare={kind: _compare(kind) for kind in KINDS},
    )
