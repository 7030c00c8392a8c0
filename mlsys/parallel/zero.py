"""ZeRO stages 1 and 2: data parallelism in which each rank runs the optimizer for 1/n of the weights.

Plain data parallelism does the same thing n times: every rank has all gradients, all of the optimizer's state, and
makes the same update. Here rank r makes the update of its slice only, so it needs the state of that slice only:

    backward           gradients of the local batch, all of them, on each rank
    reduce-scatter     rank r gets slice r of their mean                           ← an all-reduce is this …
    optimizer step     rank r updates slice r of the weights
    all-gather         every rank gets all slices of the weights                   ← … and this

An all-reduce *is* a reduce-scatter and an all-gather. The optimizer goes in between, so stage 1 saves memory and
sends not one byte more. Stage 2 also gives back a bucket's gradients as soon as its reduce-scatter is over, so a
rank never has more of them than its slice and the buckets on their way.

    stage  weights   gradients                optimizer state
    1      all       all                      1/n
    2      all       1/n (and two buckets)    1/n

    model = ZeRO2(module)                                     # `module` is the same on all ranks: rank 0's weights
    optimizer = model.optimizer(torch.optim.AdamW, lr=3e-4)
    for inputs, targets in batches:                           # each rank its own part of the batch
        optimizer.zero_grad()
        loss(model(inputs), targets).backward()               # the mean over ranks, in slices, when this returns
        model.clip_grad_norm(1.0)
        optimizer.step()                                      # and every rank has the new weights when this returns

**Where gradients are.** Backward fills buckets, in the reverse order of the parameters, and sends each when it is
full, while the rest is still being computed. The result is the `.grad` of the pieces, which the optimizer has; `.grad`
of the module's own parameters is None after a backward pass. A parameter that got no gradient counts as one with
gradient 0 (plain torch would skip it): another rank may have one for it.

**Accumulation.** Stage 1 has all gradients anyway: within `no_sync()` it adds them up locally and sends nothing. Stage
2 has no room for that. It reduces in every backward pass and adds up slices; its `no_sync()` changes nothing.

**Mixed precision.** With `dtype=torch.bfloat16` the module's weights, floating-point inputs and gradients are bfloat16.
The float32 weights that the optimizer updates ("masters") are cut into slices like its other state, and become the
module's weights after each step. Gradients are cast to float32 for the norm and the step. Frozen parameters become
bfloat16 and nothing else. With `dtype=torch.float16` the loss must be scaled, by torch's `ShardedGradScaler`: it leaves
a step out on all ranks if one has an infinite gradient. Gradients are then float32 as soon as they are reduced, since
unscaling comes before the norm.

**Buffers** are rank 0's at the start; from then on each rank has its own. `full_state_dict()` has rank 0's.

Cost:
    The optimizer's work is divided by n. Copying gradients into the buckets reads and writes each once.

Communication:
    2Ψ(n−1)/n numbers a rank and step, as an all-reduce. With k microbatches stage 1 stays at that, and stage 2 sends
    (k+1)Ψ(n−1)/n: `mlsys.perf.zero.communication`.

Memory:
    `mlsys.perf.zero.memory`; `.memory()` counts what is there. For Adam in float32 4Ψ + 4Ψ + 8Ψ/n bytes in stage 1 and
    4Ψ + 12Ψ/n in stage 2; with bfloat16 2Ψ + 2Ψ + 12Ψ/n and 2Ψ + 14Ψ/n. The gradients in float32 take 4Ψ/n more in
    stage 1 and 2Ψ/n in stage 2, from the norm or the step (with float16 from the backward pass) until `zero_grad`.

Papers:
    Rajbhandari et al. 2020, arXiv:1910.02054, section 5 (stages 1 and 2, which it calls P_os and P_os+g).
    Li et al. 2020, arXiv:2006.15704, section 3.2 (buckets, and sending them during the backward pass).
    Micikevicius et al. 2018, arXiv:1710.03740, section 3.1 (float32 masters of 16-bit weights).

See also:
    `mlsys.perf.zero` (bytes and memory), `mlsys.parallel.zero3` (weights sharded too), `mlsys.parallel.data_parallel`
    (nothing sharded), `mlsys.parallel.sharded_checkpoint` (saving the pieces).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlsys.parallel._flat import Flat, Piece
from mlsys.parallel._replicas import broadcast_first
from mlsys.parallel._sharded import Sharded
from mlsys.parallel.collectives import broadcast

# While one bucket's reduce-scatter runs, the next may fill; a third would only hold memory.
MOST_IN_FLIGHT = 2


class _Replicated(Sharded):
    """Stages 1 and 2: all weights on every rank. See the module."""

    _keeps_gradients: bool

    def __init__(
        self,
        module: nn.Module,
        group: Any = None,
        *,
        bucket_mb: float = 25.0,
        dtype: torch.dtype | None = None,
        split: str = "elements",
        timeline: Any = None,
    ) -> None:
        super().__init__(module, group, dtype=dtype, split=split, timeline=timeline)
        if not bucket_mb > 0:
            raise ValueError(f"bucket_mb must be above 0, got {bucket_mb}")
        self._sync = True
        self._next = 0  # the first bucket that is not sent yet
        loads = [0] * self.size
        self.flats = [self._lay_out(bucket, loads) for bucket in self._plan(module, bucket_mb)]
        with torch.no_grad():
            for flat in self.flats:
                self._shard(flat)
            self._frozen = [self._replicate(p) for p in module.parameters() if not p.requires_grad]
            broadcast_first(list(module.buffers()), self.communicator, "auto")
        for flat in self.flats:
            self._watch(flat)
        module.register_forward_pre_hook(self._door, prepend=True, with_kwargs=True)
        if any(flat.mixed for flat in self.flats):  # the masters would not hear of it
            module.register_load_state_dict_pre_hook(self._refuse_load_state_dict)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in here add to the local gradients and send nothing (stage 1), or reduce as always (stage 2).

        The next one outside of it sends the sum.
        """
        before, self._sync = self._sync, not self._keeps_gradients
        try:
            yield
        finally:
            self._sync = before

    def pieces(self) -> list[Piece]:
        """What this rank holds of each parameter; frozen ones, which are not sharded, are whole on every rank.

        After writing into the tensors call `sync_weights()`.
        """
        return super().pieces() + self._frozen

    def _plan(self, module: nn.Module, bucket_mb: float) -> list[list[nn.Parameter]]:
        """Which parameters travel together."""
        return _buckets(module, bucket_mb, self.dtype)

    def _shard(self, flat: Flat) -> None:
        full = flat.collect()
        broadcast(full, self.communicator, src=0, check=False)
        flat.weights = full.to(flat.dtype)
        shard = flat.layout.own(flat.weights, self.rank)
        flat.keep(flat.layout.own(full, self.rank).clone() if flat.mixed else shard, shard)
        flat.attach()

    def _replicate(self, parameter: nn.Parameter) -> Piece:
        broadcast_first([parameter], self.communicator, "auto")
        if self.dtype is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(self.dtype)
        parameter.data = parameter.data.contiguous()
        numbers = parameter.data if self.split == "tensors" else parameter.data.view(-1)
        names = self._names[id(parameter)]
        return Piece(names, parameter.shape, 0, parameter.numel(), nn.Parameter(numbers, requires_grad=False))

    def _door(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if torch.is_grad_enabled():
            for flat in self.flats:
                name = flat.detached()
                if name is not None:
                    raise RuntimeError(
                        f"{name} was moved or converted, and no step of {type(self).__name__} would change it: do that "
                        "to the module before it is wrapped, or give dtype="
                    )
        return super()._door(module, args, kwargs)

    def _arrived(self, flat: Flat, index: int, gradient: Tensor) -> None:
        if any(flat is other for other, *_ in self._in_flight):
            self._land()  # a second gradient in one backward pass: nested ones do that
        flat.put(index, gradient, final=self._sync)
        if self._sync:
            self._at_end_of_backward()
            # In the same order on every rank, in whatever order gradients come.
            while self._next < len(self.flats) and self.flats[self._next].complete:
                self._send_next()

    def _send_next(self) -> None:
        self._land(MOST_IN_FLIGHT - 1)
        self._reduce(self.flats[self._next])
        self._next += 1

    def _finish(self) -> None:
        with torch.no_grad():
            while self._next < len(self.flats):
                self._send_next()
            self._land()
        self._callback_queued, self._next = False, 0

    def _destination(self, flat: Flat, full: Tensor) -> Tensor:
        """In stage 1, in place: no slice beside the whole, the rest of which is scratch from then on."""
        return flat.layout.own(full, self.rank) if self._keeps_gradients else super()._destination(flat, full)

    def _reduce(self, flat: Flat) -> None:
        super()._reduce(flat)
        if not self._keeps_gradients:
            flat.gradients = None  # held by the collective until it has landed

    def _recover(self) -> None:
        super()._recover()
        self._next = 0

    def _publish(self, flats: Sequence[Flat]) -> None:
        works = []
        with torch.no_grad():
            for flat in flats:
                flat.refresh()
                works.append(self._all_gather(flat))
        for flat, work in zip(flats, works):
            self._wait(work, f"all-gather of {flat.names[0][0]} …")
            # Written behind autograd's back; a graph from before the step must not be run backward now.
            torch.autograd.graph.increment_version(flat.parameters)


class ZeRO1(_Replicated):
    """Each rank has all weights and gradients, and 1/n of the optimizer's state.

    module:     the same on all ranks; weights and buffers become rank 0's.
    group:      None, a ProcessGroup, or a `Communicator` (else one is made).
    bucket_mb:  MiB of weights whose gradients travel together.
    dtype:      of weights, gradients and floating-point inputs; the optimizer stays in the module's own.
    split:      "elements" cuts anywhere, "tensors" keeps tensors whole, for optimizers that need that.
    timeline:   where waiting, communication and the optimizer's time are recorded.
    """

    _keeps_gradients = True


class ZeRO2(_Replicated):
    """Each rank has all weights, 1/n of the gradients, and 1/n of the optimizer's state.

    module:     the same on all ranks; weights and buffers become rank 0's.
    group:      None, a ProcessGroup, or a `Communicator` (else one is made).
    bucket_mb:  MiB of weights whose gradients travel together; two such buckets are alive during the backward pass.
    dtype:      of weights, gradients and floating-point inputs; the optimizer stays in the module's own.
    split:      "elements" cuts anywhere, "tensors" keeps tensors whole, for optimizers that need that.
    timeline:   where waiting, communication and the optimizer's time are recorded.
    """

    _keeps_gradients = False


def _buckets(module: nn.Module, bucket_mb: float, dtype: torch.dtype | None) -> list[list[nn.Parameter]]:
    """The trained parameters in the order in which backward is likely to reach them, of one dtype and device each."""
    buckets: list[list[nn.Parameter]] = []
    room = 0.0
    for parameter in reversed([p for p in module.parameters() if p.requires_grad]):
        nbytes = parameter.numel() * (dtype or parameter.dtype).itemsize
        last = buckets[-1][0] if buckets else None
        alike = last is not None and (last.dtype, last.device) == (parameter.dtype, parameter.device)
        if not alike or nbytes > room:
            buckets.append([])
            room = bucket_mb * 2**20
        buckets[-1].append(parameter)
        room -= nbytes
    return buckets
