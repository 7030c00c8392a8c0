"""The exercise about pipelines: a step of 1F1B over send and receive, on a stage a rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlsys.contracts._parallel_net import ROUNDING
from mlsys.contracts._parallel_ranks import Exercise, seats, tensor
from mlsys.contracts.core import Case, Inputs, Mismatch, Results, Wrong

SIGNATURE = (
    "step(stage, loss, inputs, targets, microbatches, group=None) -> mean loss on the last rank: `stage` is this "
    "rank's module, one a rank, and what it returns has shape and dtype of what it gets; inputs and targets are the "
    "whole batch, on every rank; adds to .grad of the stage's parameters the gradients of the mean loss over it. "
    "A matrix stage.tied, where it is not None, is in the first and last stage: both get the sum of their gradients"
)

CASES: list[Case] = [
    {"n": 2, "microbatches": 1},
    {"n": 2, "microbatches": 4, "rows": 8},
    {"n": 2, "microbatches": 4, "rows": 10},  # not equally many in each
    {"n": 4, "microbatches": 8, "rows": 16},
    {"n": 3, "microbatches": 3, "rows": 7, "tied": True},
    {"n": 4, "microbatches": 2, "rows": 5},  # fewer than ranks
    {"n": 2, "microbatches": 2, "rows": 6, "steps": 2, "tied": True},  # gradients add up from call to call
    {"n": 3, "microbatches": 4, "rows": 8, "turned": True},  # a stage gives columns of memory as rows
    {"n": 2, "microbatches": 3, "rows": 6, "dtype": "float32"},
    {"n": 1, "microbatches": 3, "rows": 7},
    {"n": 3, "microbatches": 4, "rows": 9, "members": (1, 2)},  # a group: its first rank is not rank 0
]

# torch refuses a rank that is not in the group, or is this one; what to do instead is for us to say
MISADDRESSED = ("is not part of group", "should not be the same as the rank of the current process")
ADDRESS = (
    "In a group, ranks are counted from 0, and send and recv take them as group_dst= and group_src=; dst= and src= are "
    "ranks of all processes"
)


class Stage(nn.Module):
    """Two layers; in the first and in the last stage of a tied model also the tied matrix."""

    def __init__(self, weights: Tensor, tied: Tensor | None, *, last: bool, turned: bool) -> None:
        super().__init__()
        self.layers = nn.ParameterList(weights.unbind())
        self.tied = None if tied is None else nn.Parameter(tied)
        self.last, self.turned = last, turned
        self.calls = self.held = self.most = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.held += torch.is_grad_enabled()
        self.most = max(self.most, self.held)
        if self.tied is not None and not self.last:
            x = x @ self.tied
        for weight in self.layers:
            x = x + torch.tanh(x @ weight)
        if self.tied is not None and self.last:
            x = x @ self.tied.T
        if x.requires_grad:
            x = _Released.apply(x, self)
        return x.T.contiguous().T if self.turned else x


class _Released(torch.autograd.Function):
    """The identity, which tells the stage when its backward pass begins."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: Stage) -> Tensor:
        ctx.stage = stage
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        ctx.stage.held -= 1
        return g, None


def mean_square(output: Tensor, targets: Tensor) -> Tensor:
    """The loss of the exercise, a mean over rows and columns."""
    return (output - targets).square().mean()


def inputs(case: Case, seed: int) -> Inputs:
    """Weights of all stages, and a batch for each step."""
    random = np.random.default_rng(seed)
    ranks, width, steps = len(case.get("members", range(case["n"]))), 4, case.get("steps", 1)
    rows = case.get("rows", 3)
    return {
        "weights": 0.5 * random.standard_normal((ranks, 2, width, width)),
        "tied": random.standard_normal((width, width)) if case.get("tied") else None,
        "batches": [random.standard_normal((2, rows + step, width)) for step in range(steps)],
        "microbatches": case["microbatches"],
        "turned": case.get("turned", False),
        "dtype": case.get("dtype", "float64"),
    }


def _stage(inputs: Inputs, rank: int, ranks: int, dtype: str) -> Stage:
    ends = rank in (0, ranks - 1) and inputs["tied"] is not None
    tied = tensor(inputs["tied"], dtype) if ends else None
    return Stage(tensor(inputs["weights"][rank], dtype), tied, last=rank == ranks - 1, turned=inputs["turned"])


def work(impl: Callable[..., Any], inputs: Inputs, group: Any, rank: int) -> Results:
    """This rank's gradients, what it held, and of the last rank the losses."""
    ranks, m = seats(inputs), inputs["microbatches"]
    stage = _stage(inputs, rank, ranks, inputs["dtype"])
    losses = []
    for batch in inputs["batches"]:
        x, y = (tensor(part, inputs["dtype"]) for part in batch)
        stage.calls = 0
        given = x.clone(), y.clone()
        arguments = (stage, mean_square, x, y, m)
        try:
            value = impl(*arguments) if group is None else impl(*arguments, group)
        except ValueError as error:
            if group is None or not any(words in str(error) for words in MISADDRESSED):
                raise
            raise ValueError(f"{error} {ADDRESS}").with_traceback(error.__traceback__) from None
        if not (torch.equal(x, given[0]) and torch.equal(y, given[1])):
            raise Mismatch("the batch was changed in place")
        if stage.calls != m:
            raise Mismatch(f"the stage was called {stage.calls} times in a step, expected once for each of {m}")
        if rank == ranks - 1 and not isinstance(value, Tensor | float):
            raise Mismatch(f"returned {type(value).__name__} on the last rank, expected the mean loss")
        losses.append(float(value) if rank == ranks - 1 else 0.0)
    zeros = torch.zeros(4, 4)
    found = [zeros if weight.grad is None else weight.grad.double() for weight in stage.layers]
    tied = zeros if stage.tied is None or stage.tied.grad is None else stage.tied.grad
    return {
        "loss": torch.tensor(losses, dtype=torch.float64),
        "gradients": torch.stack(found),
        "gradient of tied": tied,
        "microbatches in flight": torch.tensor(stage.most),
    }


def oracle(inputs: Inputs) -> Mapping[str, np.ndarray]:
    """One process on the whole batch."""
    ranks, m = seats(inputs), inputs["microbatches"]
    stages = [_stage({**inputs, "turned": False}, rank, ranks, "float64") for rank in range(ranks)]
    if stages[-1].tied is not None:
        stages[-1].tied = stages[0].tied
    losses = []
    for batch in inputs["batches"]:
        stream, targets = (tensor(part, inputs["dtype"]).double() for part in batch)
        for stage in stages:
            stream = stage(stream)
        loss = mean_square(stream, targets)
        loss.backward()
        losses.append(loss.item())
    tied = stages[0].tied
    gradient = np.zeros((4, 4)) if tied is None or tied.grad is None else tied.grad.numpy()
    ends = [rank in (0, ranks - 1) for rank in range(ranks)]
    return {
        "loss": np.stack([losses if rank == ranks - 1 else [0.0] * len(losses) for rank in range(ranks)]),
        "gradients": np.stack([[w.grad.numpy() for w in s.layers if w.grad is not None] for s in stages]),
        "gradient of tied": np.stack([gradient if end else np.zeros((4, 4)) for end in ends]),
        "microbatches in flight": np.array([min(m, ranks - rank) for rank in range(ranks)], dtype=float),
    }


def tolerance(inputs: Inputs, name: str, want: np.ndarray) -> float:
    """Rounding, of the largest number; microbatches are counted."""
    if name == "microbatches in flight":
        return 0.0
    return float(ROUNDING[inputs["dtype"]] * np.abs(want).max(initial=1.0))


def as_1f1b(inputs: Inputs, got: np.ndarray, want: np.ndarray, allowed: float) -> str | None:
    """No more than 1F1B holds, and no fewer: ranks that start fewer wait for each other."""
    for rank, (held, limit) in enumerate(zip(got, want, strict=True)):
        if held < limit:
            return (
                f"rank {rank} never has more than {held:.0f} microbatches in flight, 1F1B has {limit:.0f}: it waits "
                "for a gradient when it could go on"
            )
        if held > limit:
            return (
                f"rank {rank} holds the activations of {held:.0f} microbatches at once, 1F1B no more than {limit:.0f}"
            )
    return None


# --- wrong variants ---------------------------------------------------------------------------------------------------


def _step(
    stage: Any,
    loss: Callable[..., Tensor],
    inputs: Tensor,
    targets: Tensor,
    microbatches: int,
    group: Any = None,
    *,
    mistake: str = "",
) -> Tensor:
    """1F1B with one message at a time, and one knob for each mistake."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    m, rows = microbatches, len(inputs)
    used = rows // m * m if mistake == "drops_the_rest" else rows
    xs, ys = inputs[:used].tensor_split(m), targets[:used].tensor_split(m)
    right = ranks - 1 - rank
    warm_ups = {"gpipe": m, "one_more": right + 1, "one_short": max(right - 1, 0), "all_as_rank_0": ranks - 1}
    warm_up = min(warm_ups.get(mistake, right), m)
    held: list[tuple[Tensor, Tensor, int]] = []
    sends: list[Any] = []
    total = torch.zeros((), dtype=inputs.dtype)
    last_loss = total
    summed: Tensor | None = None
    before = [None if p.grad is None else p.grad.clone() for p in stage.parameters()]
    if mistake == "clears":
        stage.zero_grad()
    if stage.tied is not None:
        aside, stage.tied.grad = stage.tied.grad, None

    def forward(k: int) -> None:
        nonlocal total, last_loss
        x = xs[k]
        if rank:
            x = torch.empty_like(x)
            _receive(x, rank - 1, group, mistake)
            x.requires_grad_()
        y = stage(x)
        if rank == ranks - 1:
            share = len(x) / used
            if mistake == "not_scaled":
                share = 1.0
            if mistake == "mean_of_means":
                share = 1 / m
            y = loss(y, ys[k]) * share
            total = total + y.detach()
            last_loss = y.detach() / share
        else:
            out = y.detach().contiguous()
            to = {"dst" if mistake == "global_ranks" else "group_dst": rank + 1}
            sends.append((dist.isend(out, group=group, **to), out))
        held.append((x, y, k))

    def backward() -> None:
        nonlocal summed
        which = -1 if mistake == "newest_first" and len(held[-1][0]) == len(held[0][0]) else 0
        x, y, _ = held.pop(which)
        if rank == ranks - 1:
            gradient = torch.ones_like(y)
        else:
            gradient = torch.empty(y.shape, dtype=y.dtype)
            dist.recv(gradient, group=group, group_src=rank + 1)
        if mistake == "last_microbatch_only":
            stage.zero_grad()
            for parameter, old in zip(stage.parameters(), before, strict=True):
                if parameter is not stage.tied and old is not None:
                    parameter.grad = old.clone()
        torch.autograd.backward([y], [gradient])
        if rank:
            assert x.grad is not None
            back = x.grad.contiguous()
            if mistake == "stale_gradient":
                if summed is not None and summed.shape == back.shape:
                    back = back + summed
                summed = back
            if mistake == "no_gradient_back":
                back = torch.zeros_like(back)
            sends.append((dist.isend(back, group=group, group_dst=rank - 1), back))

    for k in range(warm_up):
        forward(k)
    for k in range(m):
        if warm_up + k < m:
            forward(warm_up + k)
        backward()
    for sent, _ in sends:
        sent.wait()
    if stage.tied is not None:
        _add_tied(stage.tied, rank, ranks, group, mistake)
        if aside is not None and mistake != "clears":
            stage.tied.grad.add_(aside)
    return last_loss if mistake == "last_loss" else total


def _receive(x: Tensor, source: int, group: Any, mistake: str) -> None:
    if mistake == "global_ranks":
        dist.recv(x, source, group)
    else:
        dist.recv(x, group=group, group_src=source)


def _add_tied(tied: Any, rank: int, ranks: int, group: Any, mistake: str) -> None:
    if ranks == 1 or mistake == "tied_apart":
        return
    peer = ranks - 1 - rank
    theirs = torch.empty_like(tied.grad)
    own = tied.grad.contiguous()
    sent: Any = dist.isend(own, group=group, group_dst=peer)
    dist.recv(theirs, group=group, group_src=peer)
    sent.wait()
    tied.grad = theirs.clone() if mistake == "tied_swapped" else own + theirs
    if mistake == "tied_averaged":
        tied.grad /= 2


HINTS = {
    "not_scaled": "the sum of the microbatches' mean losses: weigh each with its share of the batch before backward",
    "mean_of_means": "microbatches of unequal size count alike: weigh a loss with rows / all rows, not with 1 / m",
    "drops_the_rest": "rows that are left over when the batch does not divide evenly are dropped: use tensor_split",
    "newest_first": "a gradient that comes back belongs to the oldest microbatch in flight, not to the newest: keep a "
    "queue, not a stack",
    "last_microbatch_only": "only the last microbatch's gradients are left: they add up over a step",
    "clears": "gradients of an earlier step are gone: to clear them is the caller's, who may want to accumulate",
    "stale_gradient": "the gradient that is sent back contains those of earlier microbatches: each needs an activation "
    "of its own, or x.grad set to None",
    "no_gradient_back": "the stages before get no gradient: set requires_grad on the received activation, and send its "
    ".grad back",
    "tied_apart": "each copy of the tied matrix has the gradient of its own use only: add them up over the two ranks",
    "tied_averaged": "the gradients of a tied matrix are averaged: they are parts of one sum",
    "tied_swapped": "the two ranks swapped the gradients of the tied matrix: add what arrives to one's own",
    "gpipe": "all forward passes come first, so all microbatches are held: after the warm-up do one forward, one "
    "backward",
    "one_more": "a rank starts one microbatch too many before its first backward pass: the warm-up is ranks − 1 − rank",
    "one_short": "a rank starts one microbatch too few before its first backward pass, so that every round trip has a "
    "hole: the warm-up is ranks − 1 − rank, and a forward pass before each backward pass then",
    "all_as_rank_0": "all ranks warm up as long as the first: it is ranks − 1 − rank, and nothing on the last",
    "last_loss": "the loss returned is the last microbatch's: add up the weighted ones",
}
WRONG = {name: Wrong(partial(_step, mistake=name), hint) for name, hint in HINTS.items()}
# Not among them, since there are no numbers to compare: torch raises, in the members of a group alone, and `work` adds
# the hint to its words.
GLOBAL_RANKS = Wrong(partial(_step, mistake="global_ranks"), ADDRESS)


def reference(
    stage: nn.Module,
    loss: Callable[..., Tensor],
    inputs: Tensor,
    targets: Tensor,
    microbatches: int,
    group: Any = None,
) -> Tensor:
    """`mlsys.parallel.pipeline.Pipeline` with 1F1B."""
    from mlsys.parallel.pipeline import Pipeline
    from mlsys.parallel.schedules import one_f_one_b

    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    tied: Any = stage.tied
    stage.shared = {} if tied is None else {"tied": "tied"}  # type: ignore[assignment]
    return Pipeline({rank: stage}, one_f_one_b(ranks, microbatches), loss, group).step(inputs, targets)


PIPELINE = Exercise(
    signature=SIGNATURE,
    reference=reference,
    cases=CASES,
    inputs=inputs,
    work=work,
    oracle=oracle,
    tolerance=tolerance,
    wrong=WRONG,
    compare={"microbatches in flight": as_1f1b},
    incidental=("microbatches in flight",),
)
