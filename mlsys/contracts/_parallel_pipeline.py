"""The exercise about pipelines: a step of 1F1B over send and receive, on a stage a rank."""

from __future__ import annotations

import re
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
# so it is with these: what torch or Python says, and what to do
STRIDED = "has to be contiguous"
CONTIGUOUS = (
    "A stage's result need not be contiguous, and send and recv take only what is: send its .contiguous(), and receive "
    "its gradient into torch.empty(y.shape, dtype=y.dtype), since empty_like takes over the strides"
)
TOO_FEW_CHUNKS = (
    "chunk may give fewer parts than it is asked for, as it does of {rows} rows in {m}: tensor_split gives as many"
)
NO_GRAD_ASKED = (
    "The stage was called with an activation that does not require grad, so there is no gradient to send back: call "
    "requires_grad_() on what was received, before the stage"
)
# and with ranks that wait for each other: these words are for the line that says where each of them is
ALL_SEND = (
    "Ranks that send to each other at once wait for each other: send, and wait() on what isend returns, come back when "
    "the other rank has received. So isend, keep what it returns, and wait later, when the receive has come"
)
NOBODY_SENDS = (
    "A rank waits in recv for what nobody is sending: either isend was not called for it, or what isend returned was "
    "dropped, and the message with it. Keep it, together with the tensor, and wait for it at the end of the step"
)


class Stage(nn.Module):
    """Two layers; in the first and in the last stage of a tied model also the tied matrix."""

    def __init__(self, weights: Tensor, tied: Tensor | None, *, last: bool, turned: bool) -> None:
        super().__init__()
        self.layers = nn.ParameterList(weights.unbind())
        self.tied = None if tied is None else nn.Parameter(tied)
        self.last, self.turned = last, turned
        self.calls = self.held = self.most = 0
        self.cut_off = False  # called with what gets no gradient

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.cut_off |= not x.requires_grad
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
        except Exception as error:
            advice = _advice(error, stage, len(x), m, group, rank)
            if advice:
                error.args = (f"{str(error).rstrip('.')}. {advice}",)
            raise
        if rank and stage.cut_off:
            raise Mismatch(NO_GRAD_ASKED)
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


def _advice(error: Exception, stage: Stage, rows: int, m: int, group: Any, rank: int) -> str | None:
    """What to do about an error whose words do not say so."""
    if isinstance(error, ValueError) and group is not None and any(words in str(error) for words in MISADDRESSED):
        return ADDRESS
    if isinstance(error, RuntimeError | ValueError) and STRIDED in str(error):
        return CONTIGUOUS
    if isinstance(error, IndexError) and len(torch.empty(rows).chunk(m)) < m:
        return TOO_FEW_CHUNKS.format(rows=rows, m=m)
    return NO_GRAD_ASKED if rank and stage.cut_off else None


def advice_for_waiting(told: str) -> str | None:
    """What to do about ranks that wait for each other, from where the launcher says that each of them is."""
    head, *places = re.split(r"; rank \d+ ", told)
    if "had not finished after" not in head:
        return None
    in_messages = [place for place in places if not re.search(r"has returned|is in its \w+ collective", place)]
    sending = [re.search(r"is in its \w+ message, send |has issued its \w+ message, isend ", at) for at in in_messages]
    receiving = [
        re.search(r"is in its \w+ message, recv |has issued its \w+ message, irecv ", at) for at in in_messages
    ]
    if sum(map(bool, sending)) > 1:
        return ALL_SEND
    return NOBODY_SENDS if any(receiving) and not any(sending) else None


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
    used = rows // m * m if mistake.startswith("drops_the_rest") else rows
    xs, ys = inputs[:used].tensor_split(m), targets[:used].tensor_split(m)
    if mistake == "chunks":
        xs, ys = inputs.chunk(m), targets.chunk(m)
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
    aside = None
    if stage.tied is not None and mistake != "tied_again":
        aside, stage.tied.grad = stage.tied.grad, None

    def send(tensor: Tensor, **to: int) -> None:
        if mistake == "sends":
            dist.send(tensor, group=group, **to)
            return
        sent: Any = dist.isend(tensor, group=group, **to)
        if mistake == "waits_at_once":
            sent.wait()
        elif mistake != "dropped":
            sends.append((sent, tensor))

    def forward(k: int) -> None:
        nonlocal total, last_loss
        x = xs[k]
        if rank:
            x = torch.empty_like(x)
            _receive(x, rank - 1, group, mistake)
            x.requires_grad_(mistake != "no_grad_asked")
        y = stage(x)
        if rank == ranks - 1:
            share = len(x) / (rows if mistake == "drops_the_rest_weighted" else used)
            if mistake == "not_scaled":
                share = 1.0
            if mistake == "mean_of_means":
                share = 1 / m
            y = loss(y, ys[k]) * share
            total = total + y.detach()
            last_loss = y.detach() / (1 if mistake == "last_loss_weighted" else share)
        else:
            out = y.detach() if mistake == "sends_strided" else y.detach().contiguous()
            send(out, **{"dst" if mistake == "global_ranks" else "group_dst": rank + 1})
        held.append((x, y, k))

    def backward() -> None:
        nonlocal summed
        which = -1 if mistake == "newest_first" and len(held[-1][0]) == len(held[0][0]) else 0
        x, y, _ = held.pop(which)
        if rank == ranks - 1:
            gradient = torch.ones_like(y)
        else:
            gradient = torch.empty_like(y) if mistake == "receives_strided" else torch.empty(y.shape, dtype=y.dtype)
            dist.recv(gradient, group=group, group_src=rank + 1)
        if mistake == "last_microbatch_only":
            stage.zero_grad()
            for parameter, old in zip(stage.parameters(), before, strict=True):
                if parameter is not stage.tied and old is not None:
                    parameter.grad = old.clone()
        torch.autograd.backward([y], [gradient])
        if rank:
            back: Tensor = x.grad.contiguous()  # type: ignore[union-attr]
            if mistake == "stale_gradient":
                if summed is not None and summed.shape == back.shape:
                    back = back + summed
                summed = back
            if mistake == "no_gradient_back":
                back = torch.zeros_like(back)
            send(back, group_dst=rank - 1)

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
    return last_loss if mistake.startswith("last_loss") else total


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
    "drops_the_rest_weighted": "rows that are left over when the batch does not divide evenly are dropped, though the "
    "others are weighed as if they were there: use tensor_split",
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
    "tied_again": "the tied gradients of earlier calls are added up over the two ranks again: set stage.tied.grad "
    "aside when a step begins, and add it to the sum that the step makes",
    "gpipe": "all forward passes come first, so all microbatches are held: after the warm-up do one forward, one "
    "backward",
    "one_more": "a rank starts one microbatch too many before its first backward pass: the warm-up is ranks − 1 − rank",
    "one_short": "a rank starts one microbatch too few before its first backward pass, so that every round trip has a "
    "hole: the warm-up is ranks − 1 − rank, and a forward pass before each backward pass then",
    "all_as_rank_0": "all ranks warm up as long as the first: it is ranks − 1 − rank, and nothing on the last",
    "last_loss": "the loss returned is the last microbatch's: add up the weighted ones",
    "last_loss_weighted": "the loss returned is the last microbatch's, with its weight: add up those of all",
}
WRONG = {name: Wrong(partial(_step, mistake=name), hint) for name, hint in HINTS.items()}
# Not among them, since there are no numbers to compare: a rank raises, or ranks wait for each other, and the hint is
# added to the words of that.
HINTS_IN_WORDS = {
    "global_ranks": ADDRESS,
    "sends_strided": CONTIGUOUS,
    "receives_strided": CONTIGUOUS,
    "chunks": TOO_FEW_CHUNKS.format(rows=9, m=4),
    "no_grad_asked": NO_GRAD_ASKED,
    "sends": ALL_SEND,
    "waits_at_once": ALL_SEND,
    "dropped": NOBODY_SENDS,
}
TOLD = {name: Wrong(partial(_step, mistake=name), hint) for name, hint in HINTS_IN_WORDS.items()}


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


class _Pipelines(Exercise):
    """An exercise in which ranks may come to wait for each other, and are told what for."""

    def _call(self, impl: Callable[..., Any], inputs: Inputs) -> Results:
        try:
            return super()._call(impl, inputs)
        except Mismatch as broken:
            advice = advice_for_waiting(str(broken))
            raise Mismatch(f"{broken}. {advice}" if advice else str(broken)) from None


PIPELINE = _Pipelines(
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
