"""The exercise about data parallelism: a wrapper whose gradients are the mean over the ranks when backward returns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlsys.contracts import _parallel_net as nets
from mlsys.contracts._parallel_ranks import Exercise, seats
from mlsys.contracts.core import Case, Inputs, Mismatch, Results, Wrong

SIGNATURE = (
    "DataParallel(module, group=None) -> nn.Module: called like `module`, whose own parameters it leaves in place; "
    "the mean gradient over the ranks is in their .grad when backward() returns; .no_sync() if there is one"
)
RATE, MOMENTUM = 0.3, 0.9

CASES: list[Case] = [
    {"n": 2},
    {"n": 3, "tied": True},
    {"n": 2, "frozen": True, "scale": True},
    {"n": 4, "unused": True, "layers": 3},
    {"n": 2, "microbatches": 2},
    {"n": 3, "rows": (1, 4, 2)},
    {"n": 2, "dtype": "float32", "tied": True},
    {"n": 5, "width": 9, "layers": 4},
    {"n": 1},
    {"n": 3, "branch": True},  # ranks whose batch does not use a layer count as zeros
    {"n": 3, "members": (1, 2)},  # a group: its first rank is not rank 0
]


def work(impl: Callable[..., Any], inputs: Inputs, group: Any, rank: int) -> Results:
    """This rank's weights after construction, its gradients after each step's backward, its weights in the end."""
    module = nets.net(inputs, rank)
    wrapped = impl(module) if group is None else impl(module, group)
    if not callable(wrapped):
        raise Mismatch(f"returned {type(wrapped).__name__}, expected a module to call")
    found = {"weights after construction": nets.weights_of(module)}
    trained = [p for p in module.parameters() if p.requires_grad]
    moments = [torch.zeros_like(p) for p in trained]
    parts = inputs["microbatches"]
    for step in range(inputs["steps"]):
        module.zero_grad(set_to_none=step == 1)  # both ways of clearing must do
        for part in range(parts):
            quiet = part < parts - 1 and hasattr(wrapped, "no_sync")
            with wrapped.no_sync() if quiet else contextlib.nullcontext():
                nets.loss(wrapped, inputs, step * parts + part, rank).backward()
        found[f"gradients of step {step}"] = nets.gradients(module)
        with torch.no_grad():  # by hand: torch's optimizers take a second to be imported, in every rank
            for parameter, moment in zip(trained, moments, strict=True):
                if parameter.grad is not None:
                    parameter.sub_(RATE * moment.mul_(MOMENTUM).add_(parameter.grad))
    found["weights"] = nets.weights_of(module)
    return found


def finish(found: Results) -> Results:
    """With how far the ranks are apart in the end."""
    return {**found, "difference between ranks": nets.spread(found["weights"])}


def oracle(inputs: Inputs) -> Mapping[str, np.ndarray]:
    """One process on everyone's rows: SGD with momentum, m ← μ·m + g, θ ← θ − η·m."""
    moment: Any = 0.0

    def update(step: int, weights: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        nonlocal moment
        moment = MOMENTUM * moment + gradient
        return weights - RATE * moment

    ranks = seats(inputs)
    want = {"weights after construction": nets.first_weights(inputs)}
    weights = want["weights after construction"][0]
    for step, (gradient, after) in enumerate(nets.one_process(inputs, update)):
        want[f"gradients of step {step}"], weights = np.stack([gradient] * ranks), after
    return {**want, "weights": np.stack([weights] * ranks), "difference between ranks": np.zeros(ranks)}


def tolerance(inputs: Inputs, name: str, want: np.ndarray) -> float:
    """Rounding, of the largest number; what is copied must be equal."""
    if name in ("weights after construction", "difference between ranks"):
        return 0.0
    return float(nets.ROUNDING[inputs["dtype"]] * np.abs(want).max(initial=1.0))


# --- wrong variants ---------------------------------------------------------------------------------------------------


class _Plain(nn.Module):
    """The slowest right way, everything at the end of backward; with one knob for each mistake."""

    def __init__(self, module: nn.Module, group: Any = None, *, mistake: str = "") -> None:
        super().__init__()
        self.module, self.group, self.mistake = module, group, mistake
        self.ranks = dist.get_world_size(group)
        self.quiet = self.queued = False
        self.backwards = 0
        self.before: dict[nn.Parameter, Tensor] = {}
        self.trained = [p for p in module.parameters() if p.requires_grad]
        if mistake != "no_broadcast":
            self._take_over()
        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def _take_over(self) -> None:
        parameters = list(self.module.parameters())
        if self.mistake == "trained_only_broadcast":
            parameters = self.trained
        buffers = [] if self.mistake == "no_buffers" else list(self.module.buffers())
        for one in [*parameters, *buffers]:
            dist.broadcast(one.detach(), group_src=0, group=self.group)

    def forward(self, *args: Any, **settings: Any) -> Any:
        return self.module(*args, **settings)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        self.quiet = True
        try:
            yield
        finally:
            self.quiet = False

    def _arrived(self, parameter: nn.Parameter) -> None:
        if not self.queued and not self.quiet:
            self.queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        self.queued = False
        self.backwards += 1
        chosen = self.trained
        if self.mistake == "first_backward_only" and self.backwards > 1:
            return
        if self.mistake == "last_bucket_missing":
            chosen = self.trained[2:]  # buckets fill from the last layer to the first
        if self.mistake == "incomplete_bucket_missing":
            touched = self._anywhere([p.grad is not None for p in self.trained])
            chosen = self.trained if all(touched) else []
        if self.mistake == "unused_here_missing":
            touched = self._everywhere([p.grad is not None for p in self.trained])
            chosen = [p for p, everywhere in zip(self.trained, touched) if everywhere]
        for parameter in chosen:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            self._mean(parameter, gradient)
            parameter.grad = gradient

    def _mean(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        match self.mistake:
            case "averages_weights":
                gradient = parameter.detach()
            case "rank_0_gradient":
                dist.broadcast(gradient, group_src=0, group=self.group)
                return
            case "reduced_again":  # adds to a bucket that was never cleared
                gradient.add_(self.before.get(parameter, 0.0))
            case "weighted_twice":  # once by each name
                names = sum(p is parameter for _, p in self.module.named_parameters(remove_duplicate=False))
                gradient.div_(self.ranks ** (names - 1))
        dist.all_reduce(gradient, group=self.group)
        if self.mistake != "sum":
            gradient.div_(self.ranks)
        if self.mistake == "reduced_again":
            self.before[parameter] = gradient.clone()

    def _anywhere(self, flags: list[bool]) -> list[bool]:
        return self._all(flags, dist.ReduceOp.MAX)

    def _everywhere(self, flags: list[bool]) -> list[bool]:
        return self._all(flags, dist.ReduceOp.MIN)

    def _all(self, flags: list[bool], how: Any) -> list[bool]:
        known = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(known, how, group=self.group)
        return [bool(flag) for flag in known]


class _LastMicrobatch(_Plain):
    """Copies each new gradient into its bucket, over the one of the microbatch before."""

    def __init__(self, module: nn.Module, group: Any = None) -> None:
        super().__init__(module, group)
        for parameter in self.trained:
            parameter.register_hook(partial(self._alone, parameter))

    def _alone(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        # the new one minus what is there already: adding it leaves the new one alone
        return gradient if parameter.grad is None else gradient - parameter.grad


HINTS = {
    "sum": "the sum of the gradients over the ranks, not their mean: divide by the number of ranks",
    "averages_weights": "what is averaged is the parameter, not its gradient: a hook receives the parameter; its .grad "
    "is what to reduce",
    "rank_0_gradient": "every rank has rank 0's gradient: reduce them, do not broadcast",
    "last_bucket_missing": "the gradients that come last are not reduced: at the end of backward, send the last bucket "
    "even if it is not full",
    "no_broadcast": "each rank starts from its own weights: broadcast the first rank's parameters and buffers",
    "no_buffers": "buffers differ between the ranks: broadcast them with the parameters",
    "trained_only_broadcast": "frozen parameters differ between the ranks: broadcast those too that take no gradient",
    "weighted_twice": "a tied weight is handled once for each of its names: go over the distinct parameters",
    "first_backward_only": "right in the first step, not in the next: after each backward reset what counts a bucket's "
    "gradients; and know that zero_grad() puts None in .grad",
    "incomplete_bucket_missing": "a parameter that the forward pass does not use never gets a gradient, and its bucket "
    "is never sent: at the end of backward, count it as zeros",
    "unused_here_missing": "a parameter that this rank's batch did not use may have a gradient elsewhere: every rank "
    "must take part, with zeros",
    "reduced_again": "the last step's gradients are still in the bucket: clear it, or overwrite it",
}
WRONG = {name: Wrong(partial(_Plain, mistake=name), hint) for name, hint in HINTS.items()} | {
    "last_microbatch_only": Wrong(
        _LastMicrobatch, "only the last backward's gradient is left: gradients add up until they are cleared"
    )
}


def reference(module: nn.Module, group: Any = None) -> nn.Module:
    """`mlsys.parallel.data_parallel.DataParallel`."""
    from mlsys.parallel.data_parallel import DataParallel

    return DataParallel(module, group)


DATA_PARALLEL = Exercise(
    signature=SIGNATURE,
    reference=reference,
    cases=CASES,
    inputs=partial(nets.inputs, steps=3),
    work=work,
    oracle=oracle,
    tolerance=tolerance,
    wrong=WRONG,
    finish=finish,
)
