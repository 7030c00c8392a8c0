"""The exercises about ZeRO: optimizer state, and then also parameters, of which each rank holds a share."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mlsys.contracts import _parallel_net as nets
from mlsys.contracts._parallel_ranks import Compare, Exercise, seats
from mlsys.contracts.core import Case, Inputs, Mismatch, Results, Wrong

WRAPS = "(module, group=None) -> nn.Module, called like `module`"
OPTIMIZER = (
    ".optimizer(cls, **options) -> a torch optimizer of that class, over this rank's share; "
    ".clip_grad_norm(max_norm) -> the norm of the whole gradient, after backward and before step"
)
SIGNATURE = f"ZeRO1{WRAPS}; after optimizer.step(), `module` has all new weights; {OPTIMIZER}"
SIGNATURE_3 = f"ZeRO3{WRAPS}; {OPTIMIZER}; .full_state_dict() -> all weights by their names in `module`, on every rank"

OPTIONS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.3}),
    "momentum": (torch.optim.SGD, {"lr": 0.3, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.0}),
    "decayed": (torch.optim.AdamW, {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}),
}
MOMENTS = {"sgd": 0, "momentum": 1, "adamw": 2, "decayed": 2}  # numbers of state for each parameter

CASES: list[Case] = [
    {"n": 2, "optimizer": "momentum"},
    {"n": 3, "optimizer": "decayed"},
    {"n": 2, "optimizer": "sgd", "clip": 0.1},
    {"n": 3, "optimizer": "sgd", "clip": 100.0},
    {"n": 2, "optimizer": "momentum", "microbatches": 2},
    {"n": 2, "optimizer": "adamw", "tied": True, "frozen": True, "scale": True},
    {"n": 4, "optimizer": "adamw", "unused": True, "width": 7},
    {"n": 5, "optimizer": "momentum", "rows": (1, 2, 3, 4, 1), "width": 6},
    {"n": 2, "optimizer": "decayed", "dtype": "float32"},
    {"n": 1, "optimizer": "decayed"},
    {"n": 3, "optimizer": "momentum", "members": (1, 2)},  # a group: its first rank is not rank 0
]
MEMORY: Case = {
    "n": 3,
    "optimizer": "sgd",
    "layers": 8,
    "width": 48,
    "rows": (1, 1, 1),
    "tied": True,
    "memory": True,
}
# When memory is looked at, and what a rank may then have: shares of the model, and whole layers in use or on their way.
MOMENTS_OF_USE = {
    "after construction": (1, 1),
    "after the forward pass": (1, 2),
    "late in the backward pass": (2, 5),
    "after the step": (1, 1),
}


def inputs(case: Case, seed: int) -> Inputs:
    """A model, its batches, and how it is trained."""
    given = nets.inputs(case, seed, steps=2)
    return {**given, "optimizer": case["optimizer"], "clip": case.get("clip"), "memory": case.get("memory", False)}


def _train(
    impl: Callable[..., Any], inputs: Inputs, group: Any, rank: int, read: Callable[[Any, nets.Net], Tensor]
) -> Results:
    """What a rank finds in three steps; `read` takes the weights from what `impl` made."""
    before = _numbers_held() if inputs["memory"] else 0
    module = nets.net(inputs, rank)
    wrapped = impl(module) if group is None else impl(module, group)
    found: Results = {}

    def weigh(moment: str) -> None:
        if inputs["memory"]:
            found[f"numbers held {moment}"] = torch.tensor(float(_numbers_held() - before))

    if not inputs["memory"]:
        found["weights after construction"] = read(wrapped, module).numpy().copy()  # a tensor would be counted
    cls, options = OPTIONS[inputs["optimizer"]]
    optimizer = wrapped.optimizer(cls, **options)
    if not hasattr(optimizer, "state"):
        raise Mismatch(f".optimizer(…) returned {type(optimizer).__name__}, expected a torch optimizer with its .state")
    weigh("after construction")
    parts, norms = inputs["microbatches"], []
    for step in range(inputs["steps"]):
        if inputs["memory"] and step == 1:
            module.late = partial(weigh, "late in the backward pass")
        for part in range(parts):
            quiet = part < parts - 1 and hasattr(wrapped, "no_sync")
            with wrapped.no_sync() if quiet else contextlib.nullcontext(), _visible(inputs["memory"]):
                loss = nets.loss(wrapped, inputs, step * parts + part, rank)
                if step == 1:
                    weigh("after the forward pass")
                loss.backward()
                del loss
        module.late = None
        if inputs["clip"] is not None:
            norms.append(float(wrapped.clip_grad_norm(inputs["clip"])))
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            weigh("after the step")
        found[f"weights after step {step}"] = read(wrapped, module).numpy().copy()
    if norms:
        found["norms"] = torch.tensor(norms, dtype=torch.float64)
    found["numbers of optimizer state"] = torch.tensor(float(_state_numbers(optimizer)))
    return found


def _state_numbers(optimizer: Any) -> int:
    """Numbers in an optimizer's state, without the counters of steps."""
    return sum(
        value.numel()
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, Tensor) and name != "step"
    )


def _numbers_held() -> int:
    """Numbers of float64 in all tensors of this process that Python can see, each memory counted once.

    Memory that torch did not allocate is left out: that is what ranks of a host talk through.
    """
    gc.collect()
    sizes: dict[int, int] = {}
    for thing in gc.get_objects():
        if not issubclass(type(thing), Tensor):
            continue
        for one in (thing, thing.grad if thing.is_leaf else None):
            if one is not None and one.layout is torch.strided and not one.is_meta:
                storage = one.untyped_storage()
                if storage.resizable():
                    sizes[storage.data_ptr()] = max(storage.nbytes(), sizes.get(storage.data_ptr(), 0))
    return sum(sizes.values()) // 8


def _visible(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """What autograd saves for backward is held by C++; passed through a hook, Python sees it, and counts it."""
    return saved_tensors_hooks(lambda saved: saved, lambda saved: saved) if wanted else contextlib.nullcontext()


def _in_place(wrapped: Any, module: nets.Net) -> Tensor:
    return nets.weights_of(module)


def _collected(wrapped: Any, module: nets.Net) -> Tensor:
    """Parameters and buffers out of `full_state_dict`, in the order of the module."""
    state = wrapped.full_state_dict()
    names = [name for name, _ in module.named_parameters()] + [name for name, _ in module.named_buffers()]
    missing = [name for name in names if name not in state]
    if missing:
        raise Mismatch(f"full_state_dict() has no {missing[0]!r}; it has {', '.join(map(repr, state))}")
    return torch.cat([state[name].detach().double().reshape(-1) for name in names])


def finish(found: Results) -> Results:
    """With how far the ranks are apart in the end."""
    return {**found, "difference between ranks": nets.spread(found["weights after step 1"])}


# --- the oracle -------------------------------------------------------------------------------------------------------


def _step(name: str, state: dict[str, Any], step: int, weights: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """One step of SGD or AdamW, by the formula."""
    _, options = OPTIONS[name]
    if name in ("sgd", "momentum"):
        state["m"] = options.get("momentum", 0.0) * state.get("m", 0.0) + gradient
        return np.asarray(weights - options["lr"] * state["m"])
    first, second = options["betas"]
    state["m"] = first * state.get("m", 0.0) + (1 - first) * gradient
    state["v"] = second * state.get("v", 0.0) + (1 - second) * gradient**2
    mean, square = state["m"] / (1 - first ** (step + 1)), state["v"] / (1 - second ** (step + 1))
    moved = weights - options["lr"] * (mean / (np.sqrt(square) + options["eps"]) + options["weight_decay"] * weights)
    return np.asarray(moved)


def oracle(inputs: Inputs) -> Mapping[str, np.ndarray]:
    """One process on everyone's rows; and the most that a rank may hold."""
    ranks, state, norms = seats(inputs), dict[str, Any](), list[float]()

    def update(step: int, weights: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        norms.append(float(np.sqrt((gradient**2).sum())))
        if inputs["clip"] is not None:
            gradient = gradient * min(1.0, inputs["clip"] / norms[-1])
        return _step(inputs["optimizer"], state, step, weights, gradient)

    want = {} if inputs["memory"] else {"weights after construction": nets.first_weights(inputs)}
    for step, (_, weights) in enumerate(nets.one_process(inputs, update)):
        want[f"weights after step {step}"] = np.stack([weights] * ranks)
    if inputs["clip"] is not None:
        want["norms"] = np.stack([np.array(norms)] * ranks)
    want["difference between ranks"] = np.zeros(ranks)
    want["numbers of optimizer state"] = np.full(ranks, MOMENTS[inputs["optimizer"]] * float(_trained(inputs)))
    if inputs["memory"]:
        total, largest = _sizes(inputs)
        for moment, (shares, layers) in MOMENTS_OF_USE.items():
            most = shares * total / ranks + layers * largest + total / 16  # and activations, and what is small
            want[f"numbers held {moment}"] = np.full(ranks, most)
    return want


def _trained(inputs: Inputs) -> int:
    return sum(p.numel() for p in nets.net(inputs).parameters() if p.requires_grad)


def _sizes(inputs: Inputs) -> tuple[int, int]:
    """Numbers of the model, and of its largest layer."""
    module = nets.net(inputs)
    layers = [sum(p.numel() for p in layer.parameters(recurse=False)) for layer in module.modules()]
    return sum(p.numel() for p in module.parameters()), max(layers)


def _state_is_shared(inputs: Inputs, got: np.ndarray, want: np.ndarray, tolerance: float) -> str | None:
    """The ranks together have the whole state, and each its share, to within the largest parameter."""
    whole, ranks = float(want[0]), len(want)
    largest = max(p.numel() for p in nets.net(inputs).parameters())
    most = whole / ranks + MOMENTS[inputs["optimizer"]] * (largest + ranks)
    if got.max() > most:
        return (
            f"rank {int(got.argmax())} holds {got.max():.0f} numbers, of {whole:.0f} in all: "
            f"its share is {whole / ranks:.0f}"
        )
    if got.sum() < whole:
        return f"the ranks' optimizers hold {got.sum():.0f} numbers together, expected {whole:.0f}"
    return None


def _memory_is_shared(inputs: Inputs, got: np.ndarray, want: np.ndarray, tolerance: float) -> str | None:
    total, largest = _sizes(inputs)
    if got.max() <= want[0]:
        return None
    return (
        f"rank {int(got.argmax())} holds {got.max() / total:.2f} times the numbers of the model, at most "
        f"{want[0] / total:.2f} expected: a share is {1 / len(want):.2f}, the largest layer {largest / total:.2f}"
    )


COMPARE: dict[str, Compare] = {
    "numbers of optimizer state": _state_is_shared,
    **{f"numbers held {moment}": _memory_is_shared for moment in MOMENTS_OF_USE},
}


def tolerance(inputs: Inputs, name: str, want: np.ndarray) -> float:
    """Rounding, of the largest number; when clipping, also the 1e-6 that torch adds to the norm."""
    if name in ("weights after construction", "difference between ranks"):
        return 0.0
    if name.startswith("numbers held"):
        return float(_sizes(inputs)[0]) / 8
    if name == "numbers of optimizer state":
        return float(want.max()) / 16
    share = nets.ROUNDING[inputs["dtype"]] if inputs["clip"] is None else 1e-5
    return float(share * np.abs(want).max(initial=1.0))


# --- wrong variants: the optimizer's share ----------------------------------------------------------------------------


class _Sharded(nn.Module):
    """All parameters in one row, of which each rank steps a part; with one knob for each mistake.

    A part is an n-th of the row, or in whole parameters: `division` "in turn" deals them out one by one, "by size"
    gives the next largest to the rank that has the least.
    """

    def __init__(self, module: nn.Module, group: Any = None, *, mistake: str = "", division: str = "") -> None:
        super().__init__()
        self.module, self.group, self.mistake = module, group, mistake
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        if mistake != "no_broadcast":
            for one in [*module.parameters(), *module.buffers()]:
                dist.broadcast(one.detach(), group_src=0, group=group)
        self.trained = [p for p in module.parameters() if p.requires_grad]
        self.size = sum(p.numel() for p in self.trained)
        part = self.size // self.ranks if mistake == "remainder" else -(-self.size // self.ranks)
        self.mine: Any = slice(min(self.rank * part, self.size), min((self.rank + 1) * part, self.size))
        if division:
            owners = _owners([p.numel() for p in self.trained], self.ranks, division)
            self.mine = torch.cat([torch.full((p.numel(),), o == self.rank) for p, o in zip(self.trained, owners)])
        if mistake == "whole_state":
            self.mine = slice(0, self.size)
        self.gradient: Tensor | None = None  # of this rank's part, once it is reduced
        self.seen: dict[nn.Parameter, Tensor] = {}
        if mistake == "last_microbatch_only":
            for parameter in self.trained:
                parameter.register_hook(partial(self._alone, parameter))

    def _alone(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        return gradient if parameter.grad is None else gradient - parameter.grad

    def forward(self, *args: Any, **settings: Any) -> Any:
        return self.module(*args, **settings)

    def optimizer(self, cls: type[torch.optim.Optimizer], **options: Any) -> torch.optim.Optimizer:
        self.share = nn.Parameter(self._row()[self.mine].clone())
        made = cls([self.share], **({"lr": 1e-3} if self.mistake == "options_ignored" else options))
        made.register_step_pre_hook(self._before)
        made.register_step_post_hook(self._after)
        return made

    def _row(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.trained])

    def _reduce(self) -> Tensor:
        if self.gradient is None:
            row = torch.cat([torch.zeros_like(p).view(-1) if p.grad is None else p.grad.view(-1) for p in self.trained])
            if self.mistake != "local_gradients":
                dist.all_reduce(row, group=self.group)
                row /= 1 if self.mistake == "sum" else self.ranks
            self.gradient = row[self.mine].clone()
        return self.gradient

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        gradient = self._reduce()
        square = gradient.square().sum()
        if self.mistake not in ("local_norm", "whole_state"):
            dist.all_reduce(square, group=self.group)
        norm = square.sqrt()
        if self.mistake == "norms_added":
            norm = gradient.norm()
            dist.all_reduce(norm, group=self.group)
        if self.mistake == "scaled_up":
            gradient *= max_norm / norm
        elif self.mistake != "not_clipped":
            gradient *= (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm

    def _before(self, optimizer: Any, *unused: Any) -> None:
        self.share.grad = self._reduce()

    @torch.no_grad()
    def _after(self, optimizer: Any, *unused: Any) -> None:
        row = self._row()
        if self.mistake in ("stale_shards", "whole_state"):
            row[self.mine] = self.share.detach()
        else:
            every = torch.zeros_like(row)
            every[self.mine] = self.share.detach()
            dist.all_reduce(every, group=self.group)
            if self.mistake == "remainder":
                even = self.size // self.ranks * self.ranks
                every[even:] = row[even:]
            row = every
        if self.mistake == "order":
            row = row.roll(-(self.mine.stop - self.mine.start) if self.ranks > 1 else 0)
        start = 0
        for parameter in self.trained:
            parameter.copy_(row[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()
            if self.mistake != "not_cleared":
                parameter.grad = None
        self.gradient = None
        if self.mistake == "moments_lost":
            optimizer.state.clear()


def _owners(sizes: list[int], ranks: int, division: str) -> list[int]:
    """The rank of each parameter, where parameters stay whole."""
    if division == "in turn":
        return [index % ranks for index in range(len(sizes))]
    owners, loads = [0] * len(sizes), [0] * ranks
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += sizes[index]
    return owners


def reference(module: nn.Module, group: Any = None) -> nn.Module:
    """`mlsys.parallel.zero.ZeRO2`."""
    from mlsys.parallel.zero import ZeRO2

    return ZeRO2(module, group)


SHARED_HINTS = {
    "sum": "the sum of the gradients over the ranks, not their mean: divide by the number of ranks",
    "local_gradients": "a rank steps its share with its own gradient: reduce-scatter the gradients first",
    "no_broadcast": "each rank starts from its own weights: take over those of the group's first rank",
    "options_ignored": "the optimizer's options do not arrive: pass **options on to its class",
    "moments_lost": "the optimizer's state does not survive the step: make the optimizer once",
    "local_norm": "the norm is that of this rank's share: add up the squares over the ranks before the root",
    "norms_added": "the ranks' norms are added: add their squares, then take the root",
    "not_clipped": "the norm is right, but the gradients are not scaled by max_norm / norm",
    "scaled_up": "a gradient below max_norm is scaled up to it: the factor is min(1, max_norm / norm)",
    "remainder": "the last numbers are no rank's: where the size does not divide by the ranks, pad it, or cut unevenly",
    "order": "the parts are put together in another order than they were cut",
}
HINTS = SHARED_HINTS | {
    "stale_shards": "each rank has new weights for its own share only: all-gather after the step",
    "whole_state": "every rank holds the state of all parameters: give its optimizer its share only",
    "not_cleared": "zero_grad() clears the gradients of the share, but those of the module stay and add up: clear both",
    "last_microbatch_only": "only the last backward's gradient is left: gradients add up until they are cleared",
}

ZERO = Exercise(
    signature=SIGNATURE,
    reference=reference,
    cases=CASES,
    inputs=inputs,
    work=partial(_train, read=_in_place),
    oracle=oracle,
    tolerance=tolerance,
    wrong={name: Wrong(partial(_Sharded, mistake=name), hint) for name, hint in HINTS.items()}
    | {  # mistakes whose numbers depend on how the parameters are divided
        f"{name}_{division.replace(' ', '_')}": Wrong(partial(_Sharded, mistake=name, division=division), HINTS[name])
        for name in ("stale_shards", "local_norm", "no_broadcast")
        for division in ("in turn", "by size")
    },
    compare=COMPARE,
    finish=finish,
    incidental=("numbers of optimizer state",),
)


# --- wrong variants: the parameters' share ----------------------------------------------------------------------------


class _Pieces(nn.Module):
    """Each parameter cut into a piece for each rank, and gathered where it is used; with one knob for each mistake."""

    def __init__(self, module: nn.Module, group: Any = None, *, mistake: str = "") -> None:
        super().__init__()
        self.module, self.group, self.mistake = module, group, mistake
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.names = [name for name, _ in module.named_parameters()]
        self.like: list[Tensor] = []  # shapes
        self.rest: list[Tensor] = []  # what no rank's piece has, only with the mistake
        self.pieces: list[nn.Parameter] = []
        self.kept: list[Tensor] = []
        self.first: dict[int, Tensor] = {}
        self.wholes: dict[int, int] = {}  # address of a gathered parameter → its number
        parameters = list(module.parameters())
        for one in [*parameters, *module.buffers()]:
            if mistake != "no_broadcast":
                dist.broadcast(one.detach(), group_src=0, group=group)
        numbers = {id(p): index for index, p in enumerate(parameters)}
        for parameter in parameters:
            self._cut(parameter)
        for layer in module.modules():
            own = {name: numbers[id(p)] for name, p in layer._parameters.items() if p is not None}
            for name, index in own.items():
                layer._parameters[name] = self.pieces[index]
            if own:
                layer.register_forward_pre_hook(partial(self._gather_layer, own))
                layer.register_forward_hook(partial(self._free_layer, own))
        self.hooks: list[Any] = []

    def _cut(self, parameter: nn.Parameter) -> None:
        flat = parameter.detach().reshape(-1)
        size = flat.numel()
        part = size // self.ranks if self.mistake == "remainder" else -(-size // self.ranks)
        padded = torch.zeros(max(part * self.ranks, size), dtype=flat.dtype)
        padded[:size] = flat
        piece = padded[self.rank * part : (self.rank + 1) * part].clone()
        self.pieces.append(nn.Parameter(piece, requires_grad=parameter.requires_grad))
        self.like.append(torch.empty(parameter.shape, device="meta"))
        self.rest.append(padded[part * self.ranks : size].clone())
        if self.mistake == "full_copy":
            self.kept.append(flat.clone())

    def whole(self, index: int) -> Tensor:
        """All of a parameter, gathered now."""
        piece, shape = self.pieces[index].detach(), self.like[index].shape
        parts = [torch.empty_like(piece) for _ in range(self.ranks)]
        dist.all_gather(parts, piece, group=self.group)
        if self.mistake == "order":
            parts = parts[1:] + parts[:1]
        return torch.cat([*parts, self.rest[index]])[: shape.numel()].view(shape)

    def reduced(self, index: int, gradient: Tensor) -> Tensor:
        """This rank's piece of the mean gradient."""
        part = self.pieces[index].numel()
        padded = gradient.new_zeros(max(part * self.ranks, gradient.numel()))
        padded[: gradient.numel()] = gradient.reshape(-1)
        if self.mistake != "local_gradients":
            dist.all_reduce(padded, group=self.group)
            padded /= 1 if self.mistake == "sum" else self.ranks
        if self.mistake == "whole_gradients":
            self.kept.append(padded)
        return padded[self.rank * part : (self.rank + 1) * part].clone()

    def _gather_layer(self, own: dict[str, int], layer: nn.Module, args: Any) -> None:
        for name, index in own.items():
            gathered = _Whole.apply(self.pieces[index], self, index)
            self.wholes[gathered.untyped_storage().data_ptr()] = index
            layer.__dict__[name] = gathered  # found before the piece of that name in `_parameters`
            if self.mistake == "stale_in_backward":
                self.first.setdefault(index, gathered.detach())
            if self.mistake == "never_freed":
                self.kept.append(gathered.detach())
        hooks = saved_tensors_hooks(self._pack, self._unpack)
        hooks.__enter__()
        self.hooks.append(hooks)

    def _free_layer(self, own: dict[str, int], layer: nn.Module, args: Any, out: Any) -> None:
        self.hooks.pop().__exit__(None, None, None)
        for name in own:
            del layer.__dict__[name]
        self.wholes.clear()

    def _pack(self, saved: Tensor) -> Any:
        index = self.wholes.get(saved.untyped_storage().data_ptr())
        if index is None or self.mistake == "freed_late":
            return saved
        return index, saved.shape, saved.stride(), saved.storage_offset()

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        index, *layout = packed
        gathered = self.first[index] if self.mistake == "stale_in_backward" else self.whole(index)
        return gathered.as_strided(*layout)

    def forward(self, *args: Any, **settings: Any) -> Any:
        return self.module(*args, **settings)

    def optimizer(self, cls: type[torch.optim.Optimizer], **options: Any) -> torch.optim.Optimizer:
        pieces = [piece for piece in self.pieces if piece.requires_grad]
        made = cls(pieces, **({"lr": 1e-3} if self.mistake == "options_ignored" else options))
        made.register_step_pre_hook(self._before)
        made.register_step_post_hook(self._after)
        return made

    def _before(self, *unused: Any) -> None:
        for piece in self.pieces:
            if piece.grad is None and piece.requires_grad:  # no forward pass uses it
                piece.grad = torch.zeros_like(piece)

    def _after(self, optimizer: Any, *unused: Any) -> None:
        if self.mistake != "full_copy":
            self.kept.clear()
        if self.mistake == "moments_lost":
            optimizer.state.clear()

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        gradients = [piece.grad for piece in self.pieces if piece.grad is not None]
        square = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
        norm = square.sqrt()
        if self.mistake == "norms_added":
            dist.all_reduce(norm, group=self.group)
        elif self.mistake != "local_norm":
            dist.all_reduce(square, group=self.group)
            norm = square.sqrt()
        factor = max_norm / (norm + 1e-6)
        if self.mistake != "scaled_up":
            factor = factor.clamp(max=1.0)
        if self.mistake != "not_clipped":
            for gradient in gradients:
                gradient *= factor
        return norm

    def full_state_dict(self) -> dict[str, Tensor]:
        wholes = {name: self.whole(index) for index, name in enumerate(self.names)}
        return wholes | dict(self.module.named_buffers())


class _Whole(torch.autograd.Function):
    """A piece → the whole parameter; the parameter's gradient → that of the piece, reduced."""

    @staticmethod
    def forward(ctx: Any, piece: Tensor, owner: _Pieces, index: int) -> Tensor:
        ctx.owner, ctx.index = owner, index
        return owner.whole(index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.owner.reduced(ctx.index, gradient), None, None


def reference_3(module: nn.Module, group: Any = None) -> nn.Module:
    """`mlsys.parallel.zero3.ZeRO3`."""
    from mlsys.parallel.zero3 import ZeRO3

    return ZeRO3(module, group)


HINTS_3 = SHARED_HINTS | {
    "stale_in_backward": "backward runs with the weights of an earlier step: gather the parameters again each time",
    "full_copy": "a whole copy of the parameters stays beside the share: free the module's own after cutting them",
    "freed_late": "autograd keeps the gathered parameters for backward: let it save the share, and gather again "
    "(saved_tensors_hooks), or free and refill their storage",
    "never_freed": "gathered parameters stay until the step: free a layer's right after its forward pass",
    "whole_gradients": "whole gradients stay until the step: reduce each as soon as it is there, and keep the share",
}

ZERO_3 = Exercise(
    signature=SIGNATURE_3,
    reference=reference_3,
    cases=[*CASES[:4], MEMORY, *CASES[4:]],
    inputs=inputs,
    work=partial(_train, read=_collected),
    oracle=oracle,
    tolerance=tolerance,
    wrong={name: Wrong(partial(_Pieces, mistake=name), hint) for name, hint in HINTS_3.items()},
    compare=COMPARE,
    finish=finish,
)
