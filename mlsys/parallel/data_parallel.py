"""Data parallelism: a copy of the model on every rank, a part of the batch each, and gradients averaged as they appear.

n ranks hold the same weights. Rank i takes its part of the batch and finds the gradient gᵢ of its mean loss. Then

    g = (g₁ + … + gₙ) / n        one all-reduce

is the gradient of the mean over the whole batch, if the parts are equally large, and any optimizer takes the same
step on every rank: the copies stay equal without ever being sent. The three strategies give the same g, and differ in
when the bytes move:

    naive      after the backward pass, one all-reduce a parameter: each pays the latency
    flat       after the backward pass, one all-reduce for all: the bandwidth, but the links idle until then
    bucketed   during the backward pass: gradients are ready from the last layer to the first, so those of the last
               layers travel while those of the first are computed

A *bucket* is a flat vector, and each parameter's `.grad` is a view of a piece of it, so nothing is packed or unpacked.
A hook after each accumulated gradient counts; a full bucket is sent at once by another thread, unless an earlier one
is not full yet. All ranks must send the buckets in one order, else they would add up different things, and hooks need
not fire in the same order everywhere. Buckets are first laid out in reverse order of the parameters, and after the
first backward pass in the order in which gradients appeared on rank 0. The first bucket is small, to start early.

What the end of a backward pass has to see to (`_finish`, which autograd calls when all else is done):

- A parameter that this rank did not use: its piece is 0, or what was accumulated before, since another rank may have
  used it. Whether any rank has used it travels along, as one number a parameter at the end of the last bucket. What
  nobody used keeps `.grad` None, as in one process, and an optimizer leaves it alone.
- `no_sync`: nothing is sent; the next backward pass outside reduces what has accumulated.
- Reducing an average again changes nothing, so a second backward pass before the step is right too: the average of
  ḡ + gᵢ is ḡ + the average of gᵢ.

**Uneven parts.** The mean of the ranks' means is not the mean of the batch if one rank has fewer samples. Sum instead,
and let `scale` count: `loss = losses.sum() * model.scale(len(losses))` is right for any split, down to an empty part.

Limits: a backward pass must reach at least one parameter on every rank. `torch.autograd.grad` and `create_graph=True`
go past the hooks. Reentrant checkpointing is right, but reduces once a segment: take `use_reentrant=False`. Freezing
and unfreezing (`requires_grad`) is followed if all ranks do it alike. Hooks sit on the parameters of the beginning, and
one put in the place of another would train on this rank's gradient alone: the next forward pass refuses it.

Cost:
    One pass over the gradients if `.grad` is None at the start (they are moved into the bucket), none otherwise; some
    µs a parameter for the hook. The rest is the all-reduce, of which the backward pass hides what it can.

Communication:
    2(Ψ + p)(n−1)/n numbers sent by each rank in a step, for Ψ numbers in p parameters; see `mlsys.perf.zero`, stage 0.
    Memory: the buckets are the gradients, Ψ numbers; once, when buckets are laid out anew, twice that.

Papers:
    Li et al. 2020, arXiv:2006.15704, sections 3.2 and 4.2 (gradient bucketing, overlap, unused parameters, no_sync).
    Goyal et al. 2017, arXiv:1706.02677, section 3 (mean of what: pitfalls of distributed SGD).

See also:
    `mlsys.parallel.compress` (sending less), `mlsys.parallel.zero` (not keeping n copies),
    `mlsys.parallel.collectives` (the all-reduce).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlsys.parallel._buckets import Bucket, plan
from mlsys.parallel._replicas import MB, agree, broadcast_first, check_memory, check_module
from mlsys.parallel.collectives import Communicator, Group, all_reduce, broadcast
from mlsys.parallel.compress import Compressor
from mlsys.perf import _checks
from mlsys.perf.collectives import ALGORITHMS

STRATEGIES = ("naive", "flat", "bucketed")


class DataParallel(nn.Module):
    """`module` on every rank, with gradients that are means over the ranks when `backward()` returns.

    module:            the wrapped one stays at `.module`; rank 0's weights and buffers are given to all.
    group:             a `Communicator`, or a process group (None: the default), for which one is made and owned.
    strategy:          "naive", "flat" or "bucketed".
    bucket_mb:         size of a bucket, MB of 2²⁰ bytes; a larger parameter has one of its own.
    first_bucket_mb:   size of the bucket that is sent first.
    compress:          a `Compressor`; None sends the gradients as they are.
    broadcast_buffers: give rank 0's buffers (means of batch norm) to all before each forward pass in training mode.
    algorithm:         of the all-reduces, tried once here; "backend" is torch's own, also for broadcasts, and makes no
                       Communicator.
    timeline:          gets a "waiting" span whenever this rank waits for the reduction of a bucket.
    """

    def __init__(
        self,
        module: nn.Module,
        group: Group = None,
        *,
        strategy: str = "bucketed",
        bucket_mb: float = 25.0,
        first_bucket_mb: float = 1.0,
        compress: Compressor | None = None,
        broadcast_buffers: bool = True,
        algorithm: str = "auto",
        timeline: Any = None,
    ) -> None:
        super().__init__()
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy={strategy!r}: one of {', '.join(STRATEGIES)} is needed")
        for name, value in (("bucket_mb", bucket_mb), ("first_bucket_mb", first_bucket_mb)):
            if not value > 0:
                raise ValueError(f"{name}={value!r}: a number of MB above 0 is needed")
        if compress is not None and not isinstance(compress, Compressor):
            raise TypeError(f"compress={compress!r}: an instance of a Compressor is needed, such as BF16(), or None")
        _checks.known("algorithm", algorithm, ("auto", *ALGORITHMS["all_reduce"], "shared_memory", "backend"))
        check_module(module)
        check_memory(module)
        agree(module, group)
        self.module, self.strategy, self.compress, self.algorithm = module, strategy, compress, algorithm
        self.broadcast_buffers, self.timeline = broadcast_buffers, timeline
        self._caps = (first_bucket_mb * MB, bucket_mb * MB)
        self._parameters_of_module = list(module.parameters())  # a tied one once
        self._names = {parameter: name for name, parameter in module.named_parameters()}
        self.group, self._own = group, None
        if algorithm != "backend" and not isinstance(group, Communicator):
            self.group = self._own = Communicator(group, timeline=timeline)
        self.size = self.group.size if isinstance(self.group, Communicator) else dist.get_world_size(self.group)
        self._overlaps = strategy == "bucketed"
        self._sync = True
        self._session: weakref.ref[_Session] | None = None
        self._hooks: dict[nn.Parameter, Any] = {}
        self._buckets: list[Bucket] = []
        # An algorithm of all-reduces need not exist for broadcasts, which are few: here, and of buffers.
        self._broadcasts = "backend" if algorithm == "backend" else "auto"
        broadcast_first([*self._parameters_of_module, *module.buffers()], self.group, self._broadcasts)
        self._try_algorithm()
        self._follow_requires_grad()

    # --- use ---

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            self._refuse_replaced()
            if self._sync and self._frozen_has_changed():
                self._follow_requires_grad()
            if self._sync and self.training and self.broadcast_buffers:
                self.sync_buffers()
        return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes within only accumulate; the next one outside reduces the sum."""
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    def scale(self, local: float) -> float:
        """What to multiply this rank's *sum* of losses with, to take the step of the mean over all ranks' samples.

        It is n / the sum of all ranks' `local`, the number of samples (or tokens) of this rank. All must call it.
        """
        count = torch.tensor([float(local)], dtype=torch.float64, device=self._parameters_of_module[0].device)
        all_reduce(count, self.group, algorithm=self.algorithm)
        if not count.item() > 0:
            raise ValueError("scale(0) on every rank: there is no mean over no samples; leave this step out")
        return self.size / count.item()

    def sync_buffers(self) -> None:
        """Give rank 0's buffers to all, as before each forward pass in training; all ranks must call it."""
        broadcast_first(list(self.module.buffers()), self.group, self._broadcasts)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """That of `.module`: with the names of one process."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Copy into `.module`, with its names; every rank must load the same. `assign` would need new hooks."""
        if assign:
            raise ValueError(
                "assign=True replaces the parameters, and gradients of the new ones would not be averaged: leave it "
                "out, which copies into the old ones, or load into the module before wrapping it"
            )
        return self.module.load_state_dict(state_dict, strict=strict)

    def close(self) -> None:
        """Take the hooks off the parameters, and close the Communicator if it was made here."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        if self._own is not None:
            self._own.close()

    # --- one backward pass ---

    def _ready(self, parameter: nn.Parameter) -> None:
        """The hook: this parameter's gradient has been accumulated."""
        if not self._sync:
            return
        session = self._session() if self._session is not None else None
        if session is None:
            session = self._begin()
        bucket, slot = self._where[parameter]
        if bucket.is_ready[slot]:
            raise RuntimeError(
                f"{self._names[parameter]} got a second gradient in one backward pass, after its first was under way: "
                "use checkpoint(…, use_reentrant=False)"
            )
        bucket.take(slot)
        bucket.is_ready[slot] = True
        bucket.missing -= 1
        session.order.append(parameter)
        if self._overlaps:
            while session.sent < len(self._buckets) and self._buckets[session.sent].missing == 0:
                self._send(self._buckets[session.sent])
                session.sent += 1

    def _begin(self) -> _Session:
        """The first gradient of a backward pass."""
        self._wait()  # for what one that raised has left under way
        self._refuse_replaced()
        if self._frozen_has_changed():
            self._follow_requires_grad()
        for bucket in self._buckets:
            bucket.restart()
        session = _Session()
        # Only the callback holds the session. If the pass raises, autograd drops the callback, the session is gone with
        # it, and the next pass begins anew.
        self._session = weakref.ref(session)
        torch.autograd.Variable._execution_engine.queue_callback(lambda: self._finish(session))
        return session

    def _finish(self, session: _Session) -> None:
        """Autograd has nothing left to do: send what is not under way, and wait for all."""
        for bucket in self._buckets[session.sent :]:
            bucket.complete()
            self._send(bucket)
        self._wait()
        without = [p for p in self._where if p.grad is None]
        if without:  # rarely: reading the flags makes a GPU's queue run dry
            used = self._buckets[-1].flags.tolist()
            for parameter in without:
                bucket, slot = self._where[parameter]
                if used[bucket.first + slot] != 0:
                    parameter.grad = bucket.views[slot]
        self._session = None
        if not self._learned:
            self._learn(session.order)

    def _send(self, bucket: Bucket) -> None:
        """Start to reduce it; without overlap, reduce it."""
        if bucket.flags.numel():
            bucket.flags.copy_(self._used(), non_blocking=True)
        if self.compress is not None:
            bucket.works.append(self.compress.start(bucket.index, bucket.gradient, bucket.views, self.group))
        vector = bucket.flat if self.compress is None else bucket.flags
        if vector.numel():
            options: Any = {"op": "mean", "algorithm": self.algorithm, "check": False}
            if self._overlaps:
                bucket.works.append(all_reduce(vector, self.group, async_op=True, **options))
            else:
                with self._waiting(bucket):
                    all_reduce(vector, self.group, **options)

    def _wait(self) -> None:
        """Until nothing is under way."""
        for bucket in self._buckets:
            if bucket.works:
                with self._waiting(bucket):
                    bucket.wait()

    def _used(self) -> Tensor:
        """1 for each parameter that has a gradient on this rank, in the order of the buckets."""
        return torch.tensor([float(p.grad is not None) for bucket in self._buckets for p in bucket.parameters])

    def _waiting(self, bucket: Bucket) -> contextlib.AbstractContextManager[Any]:
        if self.timeline is None:
            return contextlib.nullcontext()
        return self.timeline.span("waiting", f"bucket {bucket.index}")

    def _try_algorithm(self) -> None:
        """Let it refuse what it cannot serve here, and not in a hook."""
        if self.algorithm != "auto":
            for dtype in dict.fromkeys(p.dtype for p in self._parameters_of_module if p.requires_grad):
                number = torch.zeros(1, dtype=dtype, device=self._parameters_of_module[0].device)
                all_reduce(number, self.group, op="mean", algorithm=self.algorithm)

    def _refuse_replaced(self) -> None:
        """Raise if the module no longer has the parameters that it had."""
        if [*map(id, self.module.parameters())] == [*map(id, self._parameters_of_module)]:
            return
        now = dict(self.module.named_parameters())
        names = {name for parameter, name in self._names.items() if now.get(name) is not parameter}
        names |= {name for name, parameter in now.items() if parameter not in self._names}
        raise RuntimeError(
            f"{', '.join(sorted(names)) or 'the order of parameters'} changed since DataParallel was made (a new "
            "nn.Parameter or layer, or a load with assign=True), and new parameters have no hook that averages their "
            "gradients: close this DataParallel and make another, or copy into the old ones: parameter.data.copy_(…)"
        )

    # --- buckets ---

    def _frozen_has_changed(self) -> bool:
        return self._trainable != [p.requires_grad for p in self._parameters_of_module]

    def _follow_requires_grad(self) -> None:
        """Buckets for the parameters that now need gradients."""
        self._wait()
        if self._buckets:  # not at construction, which has just compared more than this
            agree(self.module, self.group)
        self._trainable = [p.requires_grad for p in self._parameters_of_module]
        trainable = [p for p in self._parameters_of_module if p.requires_grad]
        for parameter in set(self._hooks) - set(trainable):
            self._hooks.pop(parameter).remove()
        # One rank alone has the mean already, unless it is to show what compression does to it.
        if self.size > 1 or self.compress is not None:
            for parameter in trainable:
                if parameter not in self._hooks:
                    self._hooks[parameter] = parameter.register_post_accumulate_grad_hook(self._ready)
        if self.compress is not None:
            self.compress.reset()
        # A compressor's residuals belong to buckets, so with one the first layout stays.
        self._learned = not self._overlaps or self.compress is not None or self.size == 1
        self._lay_out(plan(trainable[::-1], self.strategy, *self._caps))

    def _learn(self, order: Sequence[nn.Parameter]) -> None:
        """Lay the buckets out in the order in which rank 0's gradients appeared."""
        self._learned = True
        trainable = [p for bucket in self._buckets for p in bucket.parameters]
        number = {parameter: i for i, parameter in enumerate(trainable)}
        seen = [number[p] for p in order]
        rest = sorted(set(number.values()) - set(seen))
        numbers = torch.tensor([*seen, *rest], dtype=torch.int64, device=trainable[0].device)
        broadcast(numbers, self.group, algorithm=self._broadcasts, check=False)
        planned = plan([trainable[i] for i in numbers.tolist()], self.strategy, *self._caps)
        # The order within a bucket does not matter: it is full when its last gradient is there.
        if [set(group) for group in planned] != [set(bucket.parameters) for bucket in self._buckets]:
            self._lay_out(planned)

    def _lay_out(self, planned: Sequence[Sequence[nn.Parameter]]) -> None:
        total = sum(map(len, planned))
        self._buckets, first = [], 0
        for index, parameters in enumerate(planned):
            last = index == len(planned) - 1
            self._buckets.append(Bucket(index, parameters, first, flags=total if last else 0))
            first += len(parameters)
        self._where = {p: (bucket, slot) for bucket in self._buckets for slot, p in enumerate(bucket.parameters)}
        for bucket in self._buckets:
            for slot, parameter in enumerate(bucket.parameters):
                if parameter.grad is not None:
                    bucket.take(slot)


class _Session:
    """A backward pass under way."""

    def __init__(self) -> None:
        self.sent = 0  # buckets
        self.order: list[nn.Parameter] = []
