"""What the three ZeRO stages have in common: pieces, the optimizer over them, norms, whole state, and the door."""

from __future__ import annotations

import abc
import contextlib
import math
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mlsys.parallel._flat import SPLITS, Flat, Piece, by_elements, by_tensors
from mlsys.parallel._replicas import agree, check_memory, check_module
from mlsys.parallel.collectives import Communicator, all_gather, all_reduce, broadcast, reduce_scatter
from mlsys.perf.zero import Memory

# They look at a whole tensor at a time: a piece of one would be another tensor to them.
WHOLE_TENSOR_OPTIMIZERS = ("Adafactor", "Muon")
REFUSED_OPTIMIZERS = {
    "LBFGS": "its line search is over the whole vector of weights, of which a rank has a slice",
    "SparseAdam": "it takes sparse gradients, which cannot be sliced",
}


class Sharded(nn.Module, abc.ABC):
    """A module whose training state is divided over the ranks of a group; the stages say how.

    A subclass sets `flats`, and starts and ends the collectives.
    """

    flats: list[Flat]
    _takes_meta = False

    def __init__(
        self,
        module: nn.Module,
        group: Any,
        *,
        dtype: torch.dtype | None,
        split: str,
        timeline: Any,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be None or a floating-point torch.dtype such as torch.bfloat16, got {dtype!r}")
        if split not in SPLITS:
            raise ValueError(f"split must be 'elements' or 'tensors', got {split!r}")
        if not (self._takes_meta and any(parameter.is_meta for parameter in module.parameters())):
            check_module(module)
            check_memory(module)
        if dtype is not None:
            _check_running_means(module, dtype)
        agree(module, group)
        self.module, self.dtype, self.split, self.timeline = module, dtype, split, timeline
        self._owns_communicator = not isinstance(group, Communicator)
        self.communicator: Communicator = (
            Communicator(group, timeline=timeline) if self._owns_communicator else group  # its thread, its measurements
        )
        self.rank, self.size = self.communicator.rank, self.communicator.size
        self.flats = []
        self._names = names_of(module)
        self._requires_grad = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
        self._in_flight: list[tuple[Flat, Any, Tensor, Tensor]] = []
        self._callback_queued = False
        self._optimizers: list[weakref.ref[torch.optim.Optimizer]] = []

    # --- what a user calls --------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward pass."""
        return self.module(*args, **kwargs)

    def optimizer(
        self,
        cls: Callable[..., torch.optim.Optimizer],
        groups: Iterable[Tensor] | Iterable[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> torch.optim.Optimizer:
        """A torch optimizer of class `cls` over this rank's pieces; after each step the ranks share the new weights.

        groups:   parameters of `.module`, or dictionaries with such a list as "params" and options of their own, as
                  torch takes them; by default all that are trained. Each parameter stands for its pieces here.
        options:  passed on: `lr`, `weight_decay`, `fused`, …

        It is a genuine one: learning-rate schedulers, `zero_grad`, `state_dict` work as ever. A rank may have no piece
        in a group, or none at all; the groups are the same on every rank. To scale the loss take
        `torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler(device_type, process_group=group)`: a step is left
        out on all ranks or on none. `torch.amp.GradScaler`, which asks one rank alone, is a TypeError when it steps.
        ValueError for optimizers that need whole tensors (Adafactor, Muon) unless `split="tensors"`, for parameters
        that are not of this module, and for those named twice.
        """
        kind = getattr(cls, "func", cls)  # a functools.partial
        name = getattr(kind, "__name__", type(kind).__name__)
        if not callable(cls):
            raise TypeError(f"cls must be an optimizer class such as torch.optim.AdamW, got {cls!r}")
        for family in _names_of_family(kind):
            if family in REFUSED_OPTIMIZERS:
                raise ValueError(
                    f"cls={name}: {REFUSED_OPTIMIZERS[family]}; use SGD, Adam or another that works by numbers"
                )
            if family in WHOLE_TENSOR_OPTIMIZERS and self.split != "tensors":
                raise ValueError(
                    f'cls={name} looks at whole tensors, and split="elements" cuts them: '
                    f'make it {type(self).__name__}(module, …, split="tensors")'
                )
        chosen, local = self._local_groups(groups)
        optimizer = cls(local, **options)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"cls must make a torch.optim.Optimizer, got {type(optimizer).__name__}")
        touched = [flat for flat in self.flats if any(id(parameter) in chosen for parameter in flat.parameters)]
        began = 0.0

        def widen() -> None:
            for flat in touched:
                flat.widen()

        def before(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal began
            began = time.perf_counter()
            widen()
            closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
            if closure is None:
                return None

            def closure_and_widen() -> Any:
                loss = closure()
                widen()
                return loss

            return (optimizer, closure_and_widen), {}

        def after(*_: Any) -> None:
            if self.timeline is not None:
                self.timeline.add("optimizer", name, began, time.perf_counter())
            self._publish(touched)

        clear = optimizer.zero_grad

        def zero_grad(set_to_none: bool = True) -> None:
            clear(set_to_none)
            for flat in touched:  # what `no_sync` has collected is a part of the gradient too
                flat.forget()

        def add_param_group(group: dict[str, Any]) -> None:
            raise ValueError(
                "add_param_group cannot add parameters to an optimizer over pieces: make another one for them, "
                "model.optimizer(cls, [parameters], …), and step both"
            )

        optimizer._step_supports_amp_scaling = _Unscaled()  # type: ignore[attr-defined]
        optimizer.zero_grad = zero_grad  # type: ignore[method-assign]
        optimizer.add_param_group = add_param_group  # type: ignore[assignment, method-assign]
        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
        self._optimizers.append(weakref.ref(optimizer))
        return optimizer

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Refused, as `parameters()` is, which asks for them here: an optimizer over these would train nothing.

        The module's parameters never have a `.grad`: the gradients are in this rank's pieces.
        """
        name = type(self).__name__
        raise TypeError(
            f"{name}.parameters(): gradients and optimizer state belong to this rank's pieces. Make the optimizer by "
            "model.optimizer(cls, lr=…) and clip by model.clip_grad_norm(…); the weights to look at are "
            "model.module.parameters(), the pieces model.pieces()"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients: the pieces', and what `no_sync` has collected."""
        for piece in self.pieces():
            piece.tensor.grad = None
        for flat in self.flats:
            flat.forget()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """For backward passes before the last one of a step: where the stage has room for it, nothing is sent."""
        yield

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale the gradients so that their norm over *all* ranks is at most `max_norm`; returns the norm before.

        As `torch.nn.utils.clip_grad_norm_` on one process, infinities and NaN included; one number is sent.
        Padding is 0 and adds nothing.
        """
        grads = []
        for flat in self.flats:
            flat.widen()
            grads += [piece.tensor.grad for piece in flat.pieces if piece.tensor.grad is not None]
        largest = math.isinf(norm_type)
        device = self.flats[0].master.device
        norms = [torch.linalg.vector_norm(grad, norm_type).double() for grad in grads]
        norms = norms or [torch.zeros((), dtype=torch.float64, device=device)]
        local = torch.linalg.vector_norm(torch.stack(norms), norm_type)
        part = (local if largest else local**norm_type).reshape(1)
        all_reduce(part, self.communicator, op="max" if largest else "sum", check=False)
        total = (part if largest else part ** (1 / norm_type))[0].to(self.flats[0].master.dtype)
        scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(scale)
        return total

    def pieces(self) -> list[Piece]:
        """What this rank holds of each parameter, frozen ones included; the slices of all ranks make the whole.

        A parameter that is not sharded (a frozen one, in stages 1 and 2) is one whole piece on every rank. After
        writing into the tensors call `sync_weights()`.
        """
        return [piece for flat in self.flats for piece in flat.pieces]

    @torch.no_grad()
    def sync_weights(self) -> None:
        """Make the module's weights those of the pieces of all ranks: for whoever has written into `pieces()`."""
        self._publish(self.flats)

    @torch.no_grad()
    def full_state_dict(self, *, rank0_only: bool = False) -> dict[str, Tensor]:
        """Every parameter and buffer whole, by its name in `.module`, as `.module.state_dict()` of one process has it.

        Parameters in the precision that the optimizer works in, copied; buffers are rank 0's. To be called on all
        ranks; with `rank0_only` the others get an empty dictionary, and hold one buffer at a time.
        """
        here = not rank0_only or self.rank == 0
        found: dict[str, Tensor] = {}
        for flat in self.flats:
            full = torch.empty(flat.layout.total, dtype=flat.master.dtype, device=flat.master.device)
            all_gather(full, flat.master, self.communicator, sizes=flat.layout.uneven, check=False)
            if here:
                for index, names in enumerate(flat.names):
                    whole = flat.layout.view(full, index, flat.shapes[index])
                    found |= dict.fromkeys(names, whole.clone())  # a tied tensor under each of its names
        for name, tensor in self._replicated().items():
            whole = tensor.detach().clone(memory_format=torch.contiguous_format)
            broadcast(whole, self.communicator, src=0, check=False)
            if here:
                found |= dict.fromkeys(self._names.get(id(tensor), (name,)), whole)
        order = [name for name, _ in _state_tensors(self.module)]
        return {name: found[name] for name in order} if here else {}

    @torch.no_grad()
    def load_full_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the values of `full_state_dict()`, or of one process's `.state_dict()`; the same on all ranks.

        ValueError, with nothing changed, for missing, unknown and misshapen tensors.
        """
        wanted = {name: tensor.shape for name, tensor in _state_tensors(self.module)}
        missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
        if missing or unknown:
            raise ValueError(
                f"state must have the module's names: missing {missing or 'none'}, unknown {unknown or 'none'}"
            )
        for name, shape in wanted.items():
            if state[name].shape != shape:
                raise ValueError(f"state[{name!r}] must have shape {tuple(shape)}, got {tuple(state[name].shape)}")
        for piece in self.pieces():
            numbers = state[piece.name].detach().reshape(-1)[piece.start : piece.stop]
            piece.tensor.view(-1).copy_(numbers)
        for name, tensor in self._replicated().items():
            tensor.copy_(state[name])
        self._publish(self.flats)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """That of `.module`, with the names of one process: the weights in the precision that it computes with."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The same as `load_full_state_dict`."""
        return self.load_full_state_dict(state_dict)

    def scale(self, local: float) -> float:
        """What to multiply this rank's *sum* of losses with, to take the step of the mean over all ranks' samples.

        It is n / the sum of all ranks' `local`, the number of samples (or tokens) of this rank. All must call it.
        """
        count = torch.tensor([float(local)], dtype=torch.float64, device=self.flats[0].master.device)
        all_reduce(count, self.communicator)
        if not count.item() > 0:
            raise ValueError("scale(0) on every rank: there is no mean over no samples; leave this step out")
        return self.size / count.item()

    def memory(self) -> Memory:
        """Bytes of model state that this rank holds now, counted from what is allocated; activations are not in it.

        Compare with `mlsys.perf.zero.memory`. The optimizer's part are its tensors and the float32 weights that it
        updates, if the module's are of another dtype.
        """
        weights: list[Tensor] = [t for t in self._replicated().values() if id(t) in self._names]
        gradients: list[Tensor] = []
        optimizer: list[Tensor] = []
        for _, _, fresh, full in self._in_flight:
            gradients += [fresh, full]
        for flat in self.flats:
            weights += [flat.weights, flat.shard]
            optimizer += [flat.master] if flat.mixed else []
            gradients += [] if flat.gradients is None else [flat.gradients]
            gradients += [piece.tensor.grad for piece in flat.pieces if piece.tensor.grad is not None]
        for reference in self._optimizers:
            known = reference()
            if known is not None:
                optimizer += [
                    leaf for leaf in pytree.tree_leaves(list(known.state.values())) if isinstance(leaf, Tensor)
                ]
        return Memory(_bytes(weights), _bytes(gradients), _bytes(optimizer))

    def close(self) -> None:
        """End the communicator's thread, if this object has made it; the module stays as it is."""
        if self._owns_communicator:
            self.communicator.close()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        raise RuntimeError(
            f"{type(self).__name__} holds weights in flat buffers: move or convert the module before it is wrapped "
            "(.to, .cuda, .half, …), or give dtype="
        )

    # --- for the stages -----------------------------------------------------------------------------------------------

    def _lay_out(self, parameters: Sequence[nn.Parameter], loads: list[int]) -> Flat:
        numels = [parameter.numel() for parameter in parameters]
        layout = by_elements(numels, self.size) if self.split == "elements" else by_tensors(numels, self.size, loads)
        names = [self._names[id(parameter)] for parameter in parameters]
        dtype = self.dtype if parameters[0].is_floating_point() else None
        return Flat(names, parameters, layout, self.rank, dtype=dtype, split=self.split)

    def _watch(self, flat: Flat) -> None:
        """Call `_arrived` whenever the gradient of one of these parameters is there."""
        for index, parameter in enumerate(flat.parameters):

            def hook(parameter: Tensor, flat: Flat = flat, index: int = index) -> None:
                gradient, parameter.grad = parameter.grad, None
                if gradient is None:
                    return
                if gradient.layout is not torch.strided:
                    raise TypeError(
                        f"the gradient of {flat.names[index][0]} is sparse, which cannot be sliced: "
                        "make its layer without sparse=True"
                    )
                with torch.no_grad():
                    self._arrived(flat, index, gradient.detach())

            parameter.register_post_accumulate_grad_hook(hook)

    @abc.abstractmethod
    def _arrived(self, flat: Flat, index: int, gradient: Tensor) -> None:
        """A parameter's gradient is there."""

    @abc.abstractmethod
    def _finish(self) -> None:
        """The backward pass has ended."""

    def _at_end_of_backward(self) -> None:
        """Have `_finish` called once, when the backward pass that is running has ended."""
        if not self._callback_queued:
            self._callback_queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    def _reduce(self, flat: Flat) -> None:
        """Start the reduce-scatter of a buffer of gradients."""
        full = flat.take()
        fresh = self._destination(flat, full)
        work = reduce_scatter(
            fresh, full, self.communicator, op="mean", sizes=flat.layout.uneven, async_op=True, check=False
        )
        self._in_flight.append((flat, work, fresh, full))

    def _land(self, most: int = 0) -> None:
        """Wait until at most so many reduce-scatters are on their way, the oldest first, and hand out their results."""
        while len(self._in_flight) > most:
            flat, work, fresh, _ = self._in_flight[0]
            self._wait(work, f"reduce-scatter of {flat.names[0][0]} …")
            self._in_flight.pop(0)
            flat.receive(fresh)

    def _all_gather(self, flat: Flat) -> Any:
        """Start the all-gather of a buffer of weights."""
        return all_gather(
            flat.weights, flat.shard, self.communicator, sizes=flat.layout.uneven, async_op=True, check=False
        )

    def _destination(self, flat: Flat, full: Tensor) -> Tensor:
        """Where this rank's slice of the reduced gradients goes."""
        return torch.empty(flat.shard.numel(), dtype=flat.dtype, device=full.device)

    @abc.abstractmethod
    def _publish(self, flats: Sequence[Flat]) -> None:
        """Bring the weights up to date with the masters."""

    def _wait(self, work: Any, name: str) -> None:
        if self.timeline is None:
            work.wait()
        else:
            with self.timeline.span("waiting", name):
                work.wait()

    def _door(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Before each forward pass of the module: tidy up after a backward pass that raised, check, cast."""
        if torch._C._current_graph_task_id() == -1:  # not a recomputation within a backward pass
            if self._callback_queued:
                self._recover()
            if torch.is_grad_enabled():
                for parameter, trained in self._requires_grad:
                    if parameter.requires_grad is not trained:
                        raise ValueError(
                            f"requires_grad of {self._names[id(parameter)][0]} was {trained} when the module was "
                            f"wrapped and is {parameter.requires_grad} now: freeze or unfreeze first, then wrap"
                        )
        if self.dtype is None:
            return None
        return pytree.tree_map(self._cast, (args, kwargs))

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def _recover(self) -> None:
        """Forget the gradients of a backward pass that did not end."""
        self._callback_queued = False
        for _, work, *_ in self._in_flight:
            with contextlib.suppress(RuntimeError):  # it has been reported: by the backward pass that raised
                work.wait()
        self._in_flight.clear()
        for flat in self.flats:
            flat.forget()

    def _refuse_load_state_dict(self, *_: Any) -> None:
        raise RuntimeError(
            f"the weights that {type(self).__name__} trains are in shards: use load_full_state_dict(), or "
            "mlsys.parallel.sharded_checkpoint.load"
        )

    def _replicated(self) -> dict[str, Tensor]:
        """Parameters and buffers that every rank has whole, by their first name."""
        sharded = {name for flat in self.flats for names in flat.names for name in names}
        return {name: tensor for name, tensor in _state_tensors(self.module) if name not in sharded}

    def _local_groups(self, groups: Any) -> tuple[set[int], list[dict[str, Any]]]:
        """The parameters that are trained, by id, and the groups with this rank's pieces in their place."""
        mine = {id(parameter): [] for parameter, _ in self._requires_grad}  # type: dict[int, list[nn.Parameter]]
        by_name = {names[0]: key for key, names in self._names.items()}
        for piece in self.pieces():
            mine[by_name[piece.name]].append(piece.tensor)
        if groups is None:
            groups = [parameter for parameter, trained in self._requires_grad if trained]
        listed = list(groups)
        if not listed:
            raise ValueError("groups is empty: give parameters of .module, or leave it out to train all")
        if not isinstance(listed[0], Mapping):
            listed = [{"params": listed}]
        chosen: set[int] = set()
        local = []
        for group in listed:
            members = group["params"]
            members = [members] if isinstance(members, Tensor) else list(members)
            for member in members:
                if id(member) not in mine:
                    shape = tuple(member.shape) if isinstance(member, Tensor) else type(member).__name__
                    raise ValueError(f"groups names a parameter {shape} that is not of .module: take them from .module")
                if id(member) in chosen:
                    raise ValueError(f"groups names {self._names[id(member)][0]} twice: a parameter has one group")
                chosen.add(id(member))
            pieces = [piece for member in members if member.requires_grad for piece in mine[id(member)]]
            local.append({**group, "params": pieces})
        return chosen, local


class _Unscaled:
    """The answer to a loss scaler that asks whether the optimizer unscales gradients, and leaves a step out, by itself.

    It is no, of fused ones too: they would do so by what is in this rank's pieces. And this is asked at each step, so
    here a scaler is refused that leaves steps out by what is in this rank's pieces: the other ranks, which do step,
    would wait for this one's weights forever.
    """

    def __bool__(self) -> bool:
        scaler = sys._getframe(1).f_locals.get("self")  # in `GradScaler.step`
        if getattr(type(scaler), "unscale_", None) is torch.amp.GradScaler.unscale_:
            raise TypeError(
                f"{type(scaler).__name__} would leave this step out on the ranks whose own gradients are infinite, and "
                "the others would wait for them: take ShardedGradScaler(device_type, process_group=group) from "
                "torch.distributed.fsdp.sharded_grad_scaler, with which all ranks decide together"
            )
        return False


def _check_running_means(module: nn.Module, dtype: torch.dtype) -> None:
    """ValueError for a norm whose running means would meet weights of another dtype: torch's kernels refuse that."""
    for name, part in module.named_modules():
        mean = getattr(part, "running_mean", None)
        if isinstance(part, nn.modules.batchnorm._NormBase) and mean is not None and mean.dtype != dtype:
            raise ValueError(
                f"dtype={dtype}: {name or 'module'} ({type(part).__name__}) keeps its running mean in {mean.dtype}, "
                f"beside weights in {dtype}; leave dtype out, or take a norm without running means, such as GroupNorm"
            )


def names_of(module: nn.Module) -> dict[int, tuple[str, ...]]:
    """All names of each parameter, by its id: several where it is tied."""
    names: dict[int, tuple[str, ...]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[id(parameter)] = (*names.get(id(parameter), ()), name)
    return names


def _state_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What `module.state_dict()` has, by name and in its order, as the very tensors."""
    for prefix, part in module.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, parameter in part._parameters.items():
            if parameter is not None:
                yield dot + name, parameter
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                yield dot + name, buffer


def _names_of_family(kind: Any) -> list[str]:
    return [base.__name__ for base in kind.__mro__] if isinstance(kind, type) else []


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages, each counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
