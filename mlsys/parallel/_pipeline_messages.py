"""What the stages of a pipeline say to each other, and why no valid schedule stands still for it.

A schedule says nothing of messages; they follow from it. F of stage s needs what F of stage s − 1 gave, and B needs the
gradient from B of stage s + 1; where the two are on one rank the tensor is handed over, elsewhere it is sent:

- A send is started as soon as its tensor is there, and never waited for before the step ends. So a rank waits in one
  place only, for a message that its next operation needs, and what produces that message comes earlier in a schedule
  without a cycle: by induction over its operations everybody gets on.
- A receive is posted before it is needed, `AHEAD` of them, so that bytes travel while the rank computes. Those from one
  rank are posted in the order in which it sends, also where this rank needs them in another: then the backend may match
  messages by their order alone, as NCCL does.
- A tensor that is sent is kept until it has arrived. To ask for that could mean to wait; but a message from a rank that
  already has what was sent tells it for nothing. Which message tells of which is known from the schedule (`released`),
  so a rank keeps no more sent tensors than 1F1B keeps activations.

Shapes are not asked for in advance. The first time that a boundary between two stages sees a microbatch of some shape,
a header travels before the message; both sides remember it, and later microbatches of that shape have none.

See also:
    `mlsys.parallel.pipeline` (who sends), `mlsys.parallel._p2p` (the messages of collectives).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mlsys.parallel import traffic
from mlsys.parallel._p2p import timed_out
from mlsys.parallel._schedule_ops import Op, Table

AHEAD = 2  # messages that are received before they are needed, and so the memory that this takes
TAG = 1 << 20  # of the first message; those of `mlsys.parallel.collectives` have lower ones
HEADER = 128  # whole numbers
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip
Signature = tuple[Any, ...]  # shapes and dtypes of a microbatch's inputs


class Key(NamedTuple):
    """A message: `kind` "F", an activation, or "B", a gradient, that `stage` gets for a microbatch."""

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        what = "input" if self.kind == "F" else "gradient"
        return f"the {what} of stage {self.stage} for microbatch {self.microbatch}"


class Spec(NamedTuple):
    """What is known of a tensor before it is there."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    grad: bool  # whether a gradient will come back


# --- what follows from a schedule -------------------------------------------------------------------------------------


def taken(op: Op, stages: int) -> Key | None:
    """The message that an operation needs; None where it needs none."""
    if op.kind == "F":
        return Key("F", op.stage, op.microbatch) if op.stage else None
    return Key("B", op.stage, op.microbatch) if op.kind != "W" and op.stage < stages - 1 else None


def given(op: Op, stages: int) -> Key | None:
    """The message that an operation gives."""
    if op.kind == "F":
        return Key("F", op.stage + 1, op.microbatch) if op.stage < stages - 1 else None
    return Key("B", op.stage - 1, op.microbatch) if op.kind != "W" and op.stage else None


@dataclass(frozen=True)
class Plan:
    """One rank's part of a schedule, with its messages.

    receives: messages and the ranks they come from, in the order in which they are posted.
    needed:   for each operation, how many of them must be posted before it.
    released: message that is received → messages sent from here that have arrived by then.
    """

    ops: Sequence[Op]
    receives: list[tuple[Key, int]] = field(default_factory=list)
    needed: list[int] = field(default_factory=list)
    released: dict[Key, list[Key]] = field(default_factory=dict)


def plan(schedule: Table, rank_of: Sequence[int], rank: int) -> Plan:
    """The plan of `rank`; `schedule` is valid, and may lack all backward passes."""
    stages = len(rank_of)
    here = Plan(list(schedule[rank]))
    channels: dict[int, list[Key]] = {}  # what each rank sends here, in its order
    positions: dict[int, list[int]] = {}  # where in its list
    for peer, ops in schedule.items():
        pairs = [
            (key, position)
            for position, op in enumerate(ops)
            if peer != rank and (key := given(op, stages)) is not None and rank_of[key.stage] == rank
        ]
        channels[peer], positions[peer] = [key for key, _ in pairs], [position for _, position in pairs]
    source = {key: peer for peer, keys in channels.items() for key in keys}
    place: dict[Key, int] = {}  # in receives
    posted = dict.fromkeys(schedule, 0)
    for op in here.ops:
        key = taken(op, stages)
        if key not in source:
            here.needed.append(0)
            continue
        peer = source[key]
        while key not in place:  # with all that its rank sends before it
            place[channels[peer][posted[peer]]] = len(here.receives)
            here.receives.append((channels[peer][posted[peer]], peer))
            posted[peer] += 1
        here.needed.append(place[key] + 1)
    for peer, ops in schedule.items():
        for position, op in enumerate(ops):
            key = taken(op, stages) if peer != rank else None
            if key is not None and rank_of[key.stage - 1 if key.kind == "F" else key.stage + 1] == rank:
                after = bisect_left(positions[peer], position)  # the first message sent here when it was used there
                if after < len(channels[peer]):
                    here.released.setdefault(channels[peer][after], []).append(key)
    return here


# --- on the way -------------------------------------------------------------------------------------------------------


class Links:
    """Messages to and from the other ranks of a group.

    On NCCL each ordered pair of ranks that talk has a group of its own: messages of one communicator run one after the
    other, and two ranks that both send first would wait for ever.
    """

    def __init__(self, group: Any, pairs: Iterable[tuple[int, int]]) -> None:
        self.group = group
        self.alone = not dist.is_initialized()
        self.rank = 0 if self.alone else dist.get_rank(group)
        self.size = 1 if self.alone else dist.get_world_size(group)
        self._own: dict[tuple[int, int], Any] = {}
        self.on_gpu = not self.alone and "nccl" in dist.get_backend(group)
        if self.on_gpu:
            for pair in sorted({pair for pair in pairs if self.rank in pair}):
                members = sorted(rank if group is None else dist.get_global_rank(group, rank) for rank in pair)
                self._own[pair] = dist.new_group(members, use_local_synchronization=True)

    def send(self, tensor: Tensor, peer: int, tag: int) -> Any:
        """Start to send; `wait` before `tensor` is changed. It must be contiguous: gloo does not look."""
        return self._start(dist.isend, tensor, peer, tag, (self.rank, peer))

    def receive(self, tensor: Tensor, peer: int, tag: int) -> Any:
        """Expect a message; `wait` before `tensor` is read."""
        return self._start(dist.irecv, tensor, peer, tag, (peer, self.rank))

    def _start(self, function: Any, tensor: Tensor, peer: int, tag: int, pair: tuple[int, int]) -> Any:
        group = self._own.get(pair, self.group)
        to = int(pair[0] < pair[1]) if function is dist.isend else int(pair[1] < pair[0])
        where = to if self.on_gpu else peer
        keyword = "group_dst" if function is dist.isend else "group_src"
        try:
            return function(tensor, group=group, tag=tag, **{keyword: where})
        except RuntimeError as error:
            raise ConnectionError(f"rank {self.rank} cannot reach rank {peer}: has it ended? ({error})") from error

    def wait(self, work: Any, what: str, peer: int) -> None:
        """Until a message has been sent, or is here. TimeoutError or ConnectionError say what was not."""
        try:
            work.wait()
        except RuntimeError as error:
            if timed_out(error):
                raise TimeoutError(
                    f"rank {self.rank} waited in vain for rank {peer} to pass on {what}: is that rank elsewhere, or "
                    f"does it have a batch of other shapes? ({error})"
                ) from error
            raise ConnectionError(
                f"rank {self.rank} lost rank {peer}, while {what} was on its way: look for that rank's own error "
                f"({error})"
            ) from error


class Messages:
    """The messages of one step after another, and what is known of their shapes."""

    def __init__(self, links: Links, rank_of: Sequence[int], microbatches: int, device: torch.device) -> None:
        self.links, self.rank_of, self.microbatches, self.device = links, rank_of, microbatches, device
        self._known: dict[tuple[bool, int, Signature], tuple[Spec, ...]] = {}  # (training, boundary, microbatch) → …

    def begin(self, plan: Plan, signatures: Sequence[Signature], training: bool) -> None:
        """A step: what each microbatch looks like, and whether gradients will be asked for."""
        self.plan, self.signatures, self.training = plan, signatures, training
        self._posted = self._used = 0
        self._here: dict[Key, list[Tensor]] = {}  # handed over on this rank
        self._arriving: dict[Key, tuple[int, list[Tensor], list[Any]]] = {}
        self._leaving: dict[Key, tuple[int, list[Any], list[Any]]] = {}

    def forget(self) -> None:
        """Let headers travel again, for all shapes."""
        self._known.clear()

    def expect(self, position: int) -> None:
        """Post the receives that an operation needs, and some for those after it."""
        while self._posted < self.plan.needed[position]:
            self._post()
        most = min(self._used + AHEAD + 1, len(self.plan.receives))
        while self._posted < most and self._specs(self.plan.receives[self._posted][0]) is not None:
            self._post()

    def take(self, key: Key) -> list[Tensor]:
        """The tensors of a message, when they are here."""
        if key in self._here:
            return self._here.pop(key)
        peer, tensors, works = self._arriving.pop(key)
        for work in works:
            self.links.wait(work, str(key), peer)
        self._used += 1
        if works:  # a message of no tensors, where nothing needs a gradient, tells nothing
            for sent in self.plan.released.get(key, ()):
                self._arrived(sent)
        return tensors

    def give(self, key: Key, tensors: Sequence[Tensor]) -> None:
        """Send a message, or keep it for another stage of this rank."""
        peer = self.rank_of[key.stage]
        if peer == self.links.rank:
            # A leaf of its own also where a stage gives back what it got, else its gradient would be counted twice.
            self._here[key] = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
            return
        works: list[Any] = []
        kept: list[Any] = []
        if key.kind == "F":
            self._announce(key, tensors, peer, works, kept)
        for tensor in tensors:
            if tensor.numel():
                kept.append(tensor.detach().contiguous())
                works.append(self.links.send(kept[-1], peer, self._tag(key)))
        self._leaving[key] = peer, works, kept

    def finish(self) -> None:
        """Until all that was sent has arrived."""
        for key in list(self._leaving):
            self._arrived(key)

    def _arrived(self, key: Key) -> None:
        peer, works, _ = self._leaving.pop(key)
        for work in works:
            self.links.wait(work, str(key), peer)

    def _post(self) -> None:
        key, peer = self.plan.receives[self._posted]
        specs = self._specs(key)
        if specs is None:
            specs = self._learn(key, peer)
        tensors = [torch.empty(spec.shape, dtype=spec.dtype, device=self.device) for spec in specs]
        works = [self.links.receive(tensor, peer, self._tag(key)) for tensor in tensors if tensor.numel()]
        if key.kind == "F" and self.training:
            for tensor, spec in zip(tensors, specs, strict=True):
                tensor.requires_grad_(spec.grad)
        self._arriving[key] = peer, tensors, works
        self._posted += 1

    # --- shapes ---

    def _boundary(self, key: Key) -> tuple[bool, int, Signature]:
        stage = key.stage if key.kind == "F" else key.stage + 1
        return self.training, stage, self.signatures[key.microbatch]

    def _specs(self, key: Key) -> tuple[Spec, ...] | None:
        specs = self._known.get(self._boundary(key))
        if specs is None or key.kind == "F":
            return specs
        return tuple(spec for spec in specs if spec.grad)

    def _announce(self, key: Key, tensors: Sequence[Tensor], peer: int, works: list[Any], kept: list[Any]) -> None:
        """See to it that the other side knows the shapes: by a header, if it does not yet."""
        specs = tuple(Spec(tuple(t.shape), t.dtype, t.requires_grad) for t in tensors)
        known = self._known.setdefault(self._boundary(key), specs)
        if known is specs:
            with traffic.uncounted():
                kept.append(_header(specs, key).to(self.device))
                works.append(self.links.send(kept[-1], peer, self._tag(key, header=True)))
        elif known != specs:
            raise RuntimeError(
                f"stage {key.stage - 1} gave {_words(specs)} for microbatch {key.microbatch}, and {_words(known)} for "
                "an earlier one of the same shape, which the next stage now expects: after freezing parameters or "
                "changing dtypes call forget() on every rank; shapes must not depend on the values of a batch"
            )

    def _learn(self, key: Key, peer: int) -> tuple[Spec, ...]:
        header = torch.empty(HEADER, dtype=torch.int64, device=self.device)
        self.links.wait(self.links.receive(header, peer, self._tag(key, header=True)), f"the shape of {key}", peer)
        specs = self._known[self._boundary(key)] = _read(header)
        return specs

    def _tag(self, key: Key, *, header: bool = False) -> int:
        kind = 2 if header else int(key.kind == "B")
        return TAG + 3 * (key.stage * self.microbatches + key.microbatch) + kind


def _header(specs: Sequence[Spec], key: Key) -> Tensor:
    numbers = [len(specs)]
    for spec in specs:
        if spec.dtype not in DTYPES:
            raise TypeError(f"stage {key.stage - 1} gave a tensor of {spec.dtype}, which cannot be sent to a rank")
        numbers += [DTYPES.index(spec.dtype), int(spec.grad), len(spec.shape), *spec.shape]
    if len(numbers) > HEADER:
        raise ValueError(f"stage {key.stage - 1} gave {len(specs)} tensors, too many to describe: pass fewer on")
    return torch.tensor(numbers + [0] * (HEADER - len(numbers)))


def _read(header: Tensor) -> tuple[Spec, ...]:
    numbers = iter(header.tolist())
    specs = []
    for _ in range(next(numbers)):
        dtype, grad, ndim = DTYPES[next(numbers)], bool(next(numbers)), next(numbers)
        specs.append(Spec(tuple(next(numbers) for _ in range(ndim)), dtype, grad))
    return tuple(specs)


def _words(specs: Sequence[Spec]) -> str:
    return ", ".join(f"{spec.dtype} {spec.shape}{'' if spec.grad else ' without gradient'}" for spec in specs)
