"""The exercise about collectives: an all-reduce, of any size, by any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mlsys.contracts._parallel_ranks import Exercise, seats, tensor
from mlsys.contracts.core import Case, Inputs, Mismatch, Results, Wrong

SIGNATURE = "all_reduce(tensor, group=None) -> None, in place: the sum over the ranks, on every rank"


def case(n: int, *shape: int, dtype: str = "float32", **more: Any) -> Case:
    """One case: a tensor of this shape on each of `n` ranks."""
    return {"n": n, "shape": shape, "dtype": dtype, **more}


CASES = [
    case(2, 4),
    case(2, 5),
    case(3, 6),
    case(3, 2, 4),  # 8 numbers do not divide by 3 ranks
    case(4, 4, 5),
    case(5, 3),  # fewer numbers than ranks
    case(4, 1003, dtype="float64"),
    case(3, 70, dtype="int64"),
    case(2, 33, dtype="bfloat16"),
    case(1, 3),
    case(3, 0),
    case(4, 10, members=(0, 2, 3)),  # a group: in it, ranks are numbered 0, 1, 2
]


def inputs(case: Case, seed: int) -> Inputs:
    """A tensor for each rank that takes part."""
    random = np.random.default_rng(seed)
    ranks = len(case.get("members", range(case["n"])))
    shape = (ranks, *case["shape"])
    whole = case["dtype"] == "int64"
    drawn = random.integers(-(2**40), 2**40, shape) if whole else random.standard_normal(shape).astype(np.float32)
    return {"tensor": drawn, "dtype": case["dtype"]}


def work(impl: Callable[..., Any], inputs: Inputs, group: Any, rank: int) -> Results:
    """This rank's tensor after the call."""
    mine = tensor(inputs["tensor"][rank], inputs["dtype"])
    shape = mine.shape
    impl(mine) if group is None else impl(mine, group)
    if mine.shape != shape:
        raise Mismatch(f"left a tensor of shape {tuple(mine.shape)}, it was {tuple(shape)}")
    return {"tensor": mine}


def oracle(inputs: Inputs) -> Mapping[str, np.ndarray]:
    """The sum, once for each rank."""
    exact = tensor(inputs["tensor"], inputs["dtype"])
    exact = exact if inputs["dtype"] == "int64" else exact.double()
    total = sum(exact, torch.zeros_like(exact[0])).numpy()
    return {"tensor": np.stack([total] * seats(inputs))}


def tolerance(inputs: Inputs, name: str, want: np.ndarray) -> float:
    """One rounding unit of the sum of magnitudes for each addition; whole numbers are exact."""
    if inputs["dtype"] == "int64":
        return 0.0
    magnitudes = np.abs(inputs["tensor"]).sum(0).max(initial=0.0)
    return float(seats(inputs) * torch.finfo(getattr(torch, inputs["dtype"])).eps * magnitudes)


# --- wrong variants ---------------------------------------------------------------------------------------------------


def _plain(tensor: Tensor, group: Any = None, *, mistake: str = "") -> None:
    """What each mistake leaves in the tensor, computed from everyone's; the messages themselves are of no matter."""
    rank, n = dist.get_rank(group), dist.get_world_size(group)
    every = [torch.empty_like(tensor) for _ in range(n)]
    dist.all_gather(every, tensor, group=group)
    flat = torch.stack(every).reshape(n, -1)
    total, mine = flat.sum(0), tensor.view(-1)
    bounds = [part * mine.numel() // n for part in range(n + 1)]
    chunks = [slice(start, stop) for start, stop in pairwise(bounds)]
    match mistake:
        case "mean":
            total = total / n if total.is_floating_point() else total // n
        case "rank_0_everywhere":
            total = flat[0]
        case "root_only":
            total = total if rank == 0 else flat[rank]
        case "own_twice":
            total = total + flat[rank]
        case "gather_missing":  # a reduce-scatter and no all-gather
            total, right = flat[rank].clone(), total
            total[chunks[rank]] = right[chunks[rank]]
        case "last_chunk_missing":
            total[chunks[-1]] = flat[rank][chunks[-1]]
        case "one_step_short":  # part i starts at rank i + 1 and stops before it has been everywhere
            for part, chunk in enumerate(chunks):
                total[chunk] -= flat[part, chunk] if n > 1 else 0
        case "off_by_one":  # gathered as though rank r had finished part r, when it finished part r + 1
            total = torch.cat([total[chunks[(part + 1) % n]] for part in range(n)])
        case "remainder":
            even = mine.numel() // n * n
            total[even:] = flat[rank, even:]
        case "powers_of_two":
            inner = 1 << (n.bit_length() - 1)
            total = flat[:inner].sum(0) if rank < inner else flat[rank]
    if mistake != "not_in_place":
        mine[: total.numel()] = total[: mine.numel()]


WRONG = {
    name: Wrong(partial(_plain, mistake=name), hint)
    for name, hint in {
        "mean": "a sum was asked for: do not divide by the number of ranks (whoever wants a mean does that)",
        "rank_0_everywhere": "every rank has rank 0's tensor: that is a broadcast; add everyone's",
        "root_only": "only rank 0 has the sum: after the reduction, broadcast it",
        "own_twice": "a rank's own numbers are in the sum twice: start from zeros, or from its own and add the others'",
        "gather_missing": "each rank has the sum of its own part only: an all-gather must follow the reduce-scatter",
        "last_chunk_missing": "the last part is not reduced: there are n parts, and both loops go over all of them",
        "one_step_short": "one rank's numbers are missing from each part: a ring's reduce-scatter takes n − 1 steps",
        "off_by_one": "the right sums in the wrong places: after n − 1 steps rank r has finished part r + 1, not r",
        "remainder": "the numbers left over when the size does not divide by n are not reduced: parts may be uneven",
        "powers_of_two": "right for powers of two only: the ranks beyond must first give what they have to a partner, "
        "and get the sum back in the end",
        "not_in_place": "the tensor has not changed: write the sum into it (`tensor.copy_(…)`, not `tensor = …`)",
    }.items()
}


def reference(tensor: Tensor, group: Any = None) -> None:
    """`mlsys.parallel.collectives.all_reduce`."""
    from mlsys.parallel.collectives import all_reduce

    all_reduce(tensor, group)


COLLECTIVES = Exercise(
    signature=SIGNATURE,
    reference=reference,
    cases=CASES,
    inputs=inputs,
    work=work,
    oracle=oracle,
    tolerance=tolerance,
    wrong=WRONG,
)
