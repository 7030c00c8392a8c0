"""Pipeline parallelism: the model in stages, one rank each or several, and any schedule run over messages between them.

    stages = split(model, 4)                                   # by FLOPs; no weight is copied
    pipe = Pipeline(stages, one_f_one_b(4, m=8), loss)         # on each of 4 ranks, which keeps its own stage
    optimizer = AdamW(pipe.parameters())

    optimizer.zero_grad()
    mean = pipe.step(inputs, targets)                          # forward and backward of 8 microbatches
    optimizer.step()

A rank goes down its list of the schedule (`mlsys.parallel.schedules`, all of which can be imported from here) and does
what stands there:

    F   takes the activation of the stage before, runs the stage, passes the result on
    BW  takes the gradient of that result, runs autograd's backward pass, passes the gradient of the activation back
    B   the same, but for the weights of linear layers, tensor-parallel ones too, whose gradients are put off
        (`_weight_gradients`)
    W   works those out

That is the whole executor: it knows nothing of 1F1B or of zero bubbles. What it takes is any table that passes
`validate`, also yours, and none that does stands still: `_pipeline_messages` says why.

**The step of one process.** The batch is cut along its first dimension into m microbatches, of n₁ … n_m samples. The
loss of each is a mean over its own samples; multiplied with nᵢ / n their sum is the mean over the batch, and so are the
gradients:

    L = Σ (nᵢ / n) Lᵢ

That is right for uneven microbatches too. Where a loss is a mean over something else, such as the tokens that are not
padding, `count` says of how many. What looks at a whole batch, as batch norm does, sees a microbatch.

**Weights of several stages.** A tied embedding is in the first and in the last stage. Each rank has a copy, their
gradients are added up at the end of a step, and they stay equal.

**Hooks** on a parameter fire in BW; where B and W are apart those of linear layers' weights fire in W, all others in B.

Cost:
    The model's FLOPs, and a wait: `simulate(schedule)` says how long. Some tens of µs an operation for Python.

Memory:
    A rank has the weights of its stages, with gradients and optimizer state, and the activations of the microbatches
    that it holds: `simulate(schedule).peak`. Between B and W a linear layer keeps its input and the gradient of its
    result. On top come two messages received ahead, and those that are on their way.

Communication:
    An activation forward and a gradient back for each microbatch at each boundary between ranks, 2m messages of
    `mlsys.perf.pipeline.boundary_bytes`; a header of 1 KB the first time that a microbatch has a new shape; for the
    loss 8 bytes to each rank; once a step, the gradients of weights that several ranks have.

Papers:
    Huang et al. 2019, arXiv:1811.06965, section 2 (microbatches through stages; gradients as of the whole batch).
    Narayanan et al. 2021, arXiv:2104.04473, sections 2.2 and 4.1 (schedules, and sending between stages).
    Qi et al. 2024, arXiv:2401.10241, section 2 (B and W apart).

See also:
    `mlsys.parallel.schedules` (what runs when), `mlsys.perf.pipeline` (bubbles and bytes by formula),
    `mlsys.parallel.timeline`, `mlsys.parallel.data_parallel` (many such pipelines beside each other).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from mlsys.parallel import _loops, traffic
from mlsys.parallel._mesh_group import plain_group
from mlsys.parallel._pipeline_agree import agree, device_of, gathered
from mlsys.parallel._pipeline_batch import Microbatch, microbatches, shares
from mlsys.parallel._pipeline_messages import TAG, Links, Messages, given, plan, taken
from mlsys.parallel._pipeline_stages import Stage, load, partition, split
from mlsys.parallel._pipeline_tied import Tied, shared_here
from mlsys.parallel._pipeline_times import measured, operations
from mlsys.parallel._weight_gradients import Store, deferring
from mlsys.parallel.collectives import Group
from mlsys.parallel.schedules import (
    KINDS,
    SCHEDULES,
    Op,
    RankTime,
    Schedule,
    ScheduleError,
    Simulation,
    Summary,
    gpipe,
    interleaved,
    observed,
    one_f_one_b,
    plot,
    sequential,
    show,
    simulate,
    validate,
    zb_h1,
    zb_h2,
    zb_v,
)

__all__ = [
    "KINDS",
    "SCHEDULES",
    "Op",
    "Pipeline",
    "RankTime",
    "Schedule",
    "ScheduleError",
    "Simulation",
    "Stage",
    "Summary",
    "gpipe",
    "interleaved",
    "load",
    "measured",
    "observed",
    "one_f_one_b",
    "operations",
    "partition",
    "plot",
    "sequential",
    "show",
    "simulate",
    "split",
    "validate",
    "zb_h1",
    "zb_h2",
    "zb_v",
]


class Pipeline:
    """A model in stages that a schedule runs; `step` is the forward and backward pass of one process on a whole batch.

    stages:   modules by number, those of this rank at least: a mapping, or the list of all. A stage gets what the one
              before returns, a tensor or several; each must be a tensor, and its shape follow from the shapes of the
              batch. The rest is not kept.
    schedule: the same on all ranks; it says which rank has which stage. Checked here, once.
    loss:     loss(output of the last stage, targets) → a scalar, the mean over the microbatch.
    group:    process group, Communicator, or DeviceMesh of one dimension (`mesh["pp"]`), of as many ranks as the table
              has; None is all, or this process alone.
    count:    count(targets) → of how many things `loss` is the mean; None: of samples, the first dimension.
    limit:    of microbatches in flight, as of `validate`.
    timeline: gets a "compute" span for each operation and a "waiting" span for each wait.

    ValueError or TypeError, on all ranks, if one of them has other stages than its own list names, another schedule, or
    the ranks are too few or too many.
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module] | Sequence[nn.Module],
        schedule: Schedule,
        loss: Callable[..., Tensor],
        group: Group | Any = None,
        *,
        count: Callable[[Any], float] | None = None,
        limit: int | Mapping[int, int] | None = None,
        timeline: Any = None,
    ) -> None:
        group = plain_group(group, "pp")
        summary = validate(schedule, limit=limit)
        self.rank_of, self.microbatches = summary.rank_of, summary.microbatches
        self.schedule = {rank: list(ops) for rank, ops in schedule.items()}
        self.loss, self.count, self.timeline = loss, count, timeline
        self._last = summary.stages - 1
        self._forward = {rank: [op for op in ops if op.kind == "F"] for rank, ops in self.schedule.items()}
        pairs = {(a, b) for a, b in itertools.pairwise(self.rank_of) if a != b}
        pairs |= {(self.rank_of[-1], rank) for rank in range(summary.ranks)}
        self._links = Links(group, pairs | {(b, a) for a, b in pairs})
        self.rank = self._links.rank
        self.stages, ranks_of_shared = agree(stages, self.schedule, self.rank_of, self._links)
        self.device = device_of(self.stages, self._links)
        self._messages = Messages(self._links, self.rank_of, self.microbatches, self.device)
        self._plans = {
            training: plan(table, self.rank_of, self.rank)
            for training, table in ((True, self.schedule), (False, self._forward))
        }
        self._put_off = {op[1:] for op in self.schedule[self.rank] if op.kind == "B"}
        last_tag = TAG + 3 * (self._last + 1) * self.microbatches
        self._loss_tag = last_tag
        self.tied = Tied(shared_here(self.stages), ranks_of_shared, last_tag + 1)
        self.tied.make_equal(self._links)
        self._broken = False
        _loops.calm()

    # --- use ---

    def step(self, inputs: Any, targets: Any) -> Tensor:
        """Gradients of the mean loss over a batch, added to `.grad`; returns that mean, float64, on every rank.

        inputs, targets: a tensor, or a tuple of tensors that are arguments together, of a whole batch, to be cut along
                         the first dimension into microbatches as even as can be; or a list of the microbatches.

        All ranks pass the same batch. Only the first stage reads the inputs and the last one the targets; from the
        inputs the others take the shapes, for which tensors on the meta device do, and to them targets may be None.
        Waits for the messages of this step, and for nobody's optimizer.
        """
        with torch.enable_grad():
            return self._run(inputs, targets, training=True)

    def evaluate(self, inputs: Any, targets: Any) -> Tensor:
        """The mean loss over a batch as `step` returns it, by forward passes alone."""
        with torch.no_grad():
            return self._run(inputs, targets, training=False)

    def forget(self) -> None:
        """Learn anew what stages pass to each other: on all ranks, after freezing parameters or changing dtypes."""
        self._messages.forget()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of this rank's stages, each once."""
        return (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same with names; those of stages of `split` are the names in the whole model."""
        seen: set[int] = set()
        for stage in self.stages.values():
            for name, parameter in stage.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield name, parameter

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's part of the whole model's. ValueError if two stages use one name; those of `split` do not."""
        return {name: tensor for name, tensor, _, _ in self._named_state()}

    def full_state_dict(self, *, rank0_only: bool = False) -> dict[str, Tensor]:
        """The whole model's, as one process has it, copied; to be called on all ranks.

        With `rank0_only` the others get an empty dictionary, and hold one tensor at a time.
        """
        own = self.state_dict()
        mine = [(name, tuple(t.shape), t.dtype, number, shared) for name, t, number, shared in self._named_state()]
        found: dict[str, Tensor] = {}
        users: dict[str, int] = {}
        for owner, entries in enumerate(gathered(self._links, mine)):
            for name, shape, dtype, number, shared in entries:
                if name in found:
                    _check_shared(name, users[name], number, shared)
                    continue
                users[name] = number
                here = owner == self.rank
                whole = own[name].detach().clone() if here else torch.empty(shape, dtype=dtype, device=self.device)
                whole = whole.contiguous()
                if not self._links.alone and whole.numel():
                    dist.broadcast(whole.view(-1).view(torch.uint8), group=self._links.group, group_src=owner)
                found[name] = whole if not rank0_only or self.rank == 0 else torch.empty(0)
        return found if not rank0_only or self.rank == 0 else {}

    def _named_state(self) -> list[tuple[str, Tensor, int, bool]]:
        """Names and tensors of this rank's stages, each with its stage, and whether other stages have it too."""
        found: dict[str, tuple[str, Tensor, int, bool]] = {}
        for number, stage in self.stages.items():
            several = getattr(stage, "shared", {})
            for name, tensor in stage.state_dict().items():
                if name in found:
                    _check_shared(name, found[name][2], number, name in several)
                found.setdefault(name, (name, tensor, number, name in several))
        return list(found.values())

    # --- one step ---

    def _run(self, inputs: Any, targets: Any, *, training: bool) -> Tensor:
        if self._broken:
            raise RuntimeError(
                "an earlier step of this pipeline raised half-way, and messages of it may still be under way: make a "
                "new Pipeline on a new process group, or start the ranks again"
            )
        batch = microbatches("inputs", inputs, self.microbatches)
        last_here, wanted = self._last in self.stages, None
        if 0 in self.stages and any(t.is_meta for one in batch for t in one.tensors):
            raise ValueError(f"inputs are on the meta device, and rank {self.rank} has the stage that reads them")
        if last_here:
            if targets is None:
                raise ValueError(f"targets=None, and rank {self.rank} has the last stage, which computes the loss")
            wanted = microbatches("targets", targets, self.microbatches)
            rows = sum(one.rows for one in batch), sum(one.rows for one in wanted)
            if rows[0] != rows[1] and not isinstance(targets, list):
                raise ValueError(f"inputs have {rows[0]} samples and targets {rows[1]}: they are cut alike")
        step = _Step(batch, wanted, shares(batch, wanted, self.count) if last_here else [], self.device)
        self._broken = True  # until the end is reached
        if training:
            self.tied.begin()
        self._messages.begin(self._plans[training], [one.signature for one in batch], training)
        told = None if last_here else self._expect_mean()
        for position, op in enumerate(self._plans[training].ops):
            self._do(position, op, step)
        mean = self._tell(step.total) if told is None else told()
        self._messages.finish()
        if training:
            self.tied.add_up(self._links)
        self._broken = False
        return mean

    def _do(self, position: int, op: Op, step: _Step) -> None:
        """One line of this rank's list."""
        self._messages.expect(position)
        key = taken(op, self._last + 1)
        tensors: Sequence[Tensor] = ()
        if key is not None:
            with self._span("waiting", str(key)):
                tensors = self._messages.take(key)
        with self._span("compute", str(op)):
            if op.kind == "F":
                result = self._forward_pass(op, step, tensors)
            elif op.kind == "W":
                step.stores.pop(op[1:]).run()
                return
            else:
                result = self._backward_pass(op, step, tensors)
        key = given(op, self._last + 1)
        if key is not None:
            self._messages.give(key, result)

    def _forward_pass(self, op: Op, step: _Step, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run a stage on a microbatch; what it gives, without its graph, for the next."""
        _, number, k = op
        training = torch.is_grad_enabled()
        if number == 0:
            tensors = step.batch[k].tensors
        with self._deferring(op, step):
            result = self.stages[number](*tensors)
            if number == self._last:
                assert step.targets is not None
                roots = [self._loss_of(result, step.targets[k], step.shares[k], k)]
                step.total += roots[0].detach().double()
        if number < self._last:
            roots = _tensors(result, number)
        if training:
            if number == self._last and not roots[0].requires_grad:
                raise RuntimeError("the loss has no gradient: no parameter that it depends on has requires_grad=True")
            # Of the result only its place in the graph is kept: its numbers may go as soon as they have been sent.
            edges = [get_gradient_edge(root) for root in roots if root.requires_grad]
            step.held[op[1:]] = (list(tensors), edges)
        return roots

    def _backward_pass(self, op: Op, step: _Step, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run a stage's graph back; the gradients of what it was given."""
        inputs, edges = step.held.pop(op[1:])
        if edges:
            # For the loss None, which is 1.
            torch.autograd.backward(edges, list(tensors) if op.stage < self._last else [None])
        if op.stage == 0:
            return ()
        return [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs if x.requires_grad]

    def _loss_of(self, output: Any, target: Microbatch, share: float, k: int) -> Tensor:
        """The part of a microbatch in the mean over the batch."""
        if share == 0:  # a mean over nothing is not a number, and 0 times what is not finite is none either
            nothing = torch.ones((), dtype=torch.bool, device=self.device)
            zeros = (t.masked_fill(nothing, 0).sum() for t in _tensors(output, self._last))
            return sum(zeros, start=torch.zeros((), device=self.device))
        value = self.loss(output, *target.tensors)
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss gave {found} for microbatch {k}: a scalar tensor is needed, the mean over it")
        return value.reshape(()) * share

    def _deferring(self, op: Op, step: _Step) -> contextlib.AbstractContextManager[Any]:
        """Around the forward pass of a stage whose B and W will be apart."""
        if op[1:] not in self._put_off or not torch.is_grad_enabled():
            return contextlib.nullcontext()
        store = step.stores[op[1:]] = Store()
        return deferring(store)

    def _span(self, kind: str, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.timeline is None else self.timeline.span(kind, name)

    # --- between the ranks ---

    def _tell(self, total: Tensor) -> Tensor:
        """The last stage's rank tells the loss to all others."""
        with traffic.uncounted():
            works = [(self._links.send(total, r, self._loss_tag), r) for r in set(self.rank_of) if r != self.rank]
        for work, rank in works:
            self._links.wait(work, "the loss", rank)
        return total

    def _expect_mean(self) -> Callable[[], Tensor]:
        """Called at the start of a step; what is returned, at its end, waits for the loss."""
        total, last = torch.empty((), dtype=torch.float64, device=self.device), self.rank_of[self._last]

        def post() -> Any:
            return self._links.receive(total, last, self._loss_tag)

        # On gloo a send ends when its receive has been posted: early, or the last rank waits until others are done. On
        # NCCL it does not wait, and messages are matched by their order: this is the last one.
        early = None if self._links.on_gpu else post()

        def mean() -> Tensor:
            self._links.wait(post() if early is None else early, "the loss", last)
            return total

        return mean


class _Step:
    """What one step holds: for each stage and microbatch, between F and B its inputs and the ends of its graph."""

    def __init__(
        self, batch: list[Microbatch], targets: list[Microbatch] | None, shares: list[float], device: torch.device
    ) -> None:
        self.batch, self.targets, self.shares = batch, targets, shares
        self.held: dict[tuple[int, int], tuple[list[Tensor], list[GradientEdge]]] = {}
        self.stores: dict[tuple[int, int], Store] = {}
        self.total = torch.zeros((), dtype=torch.float64, device=device)


def _check_shared(name: str, one: int, other: int, shared: bool) -> None:
    if not shared:
        raise ValueError(
            f"stages {one} and {other} both have a {name}, and one would take the other's place: name them apart, as "
            "nn.Sequential(OrderedDict(…)) does, or cut the model with split"
        )


def _tensors(result: Any, number: int) -> list[Tensor]:
    """What a stage returned, as a list."""
    tensors = [result] if isinstance(result, Tensor) else list(result) if isinstance(result, tuple | list) else []
    if not tensors or not all(isinstance(t, Tensor) for t in tensors):
        raise TypeError(f"stage {number} returned {type(result).__name__}: a tensor, or a tuple of tensors, is needed")
    return tensors
