"""ZeRO stage 3, fully sharded data parallelism: no rank has all weights, and each layer is put together when it runs.

Stages 1 and 2 shard what is only needed at the step. The weights are needed all the time, but not all at the same
time: layer i's while layer i runs. So a rank keeps 1/n of every layer, and

    forward    all-gather layer i's weights, run it, free them                       for i = 1 … L
    backward   all-gather layer i's weights, compute its gradients, free them,
               reduce-scatter the gradients: each rank keeps 1/n                     for i = L … 1
    step       each rank updates its 1/n: nothing to send

The modules that come and go as a whole are *units*: by default the blocks in the model's `nn.ModuleList`s. What
belongs to none (embedding, last norm, head) is the root unit, there for the whole of a pass. A weight tied across
units belongs to the smallest unit that has all of its uses, mostly the root. So a rank needs room for 1/n of the
model, the root, and two units: while one runs, the next is on its way (`prefetch`), in the order of the pass before.

    model = ZeRO3(module, units=lambda part: isinstance(part, Block))
    optimizer = model.optimizer(torch.optim.AdamW, lr=3e-4)
    loss(model(inputs), targets).backward()                   # gradients are in the pieces when this returns
    optimizer.step()

**How weights come and go.** The module's parameters stay the same objects, so graphs, hooks and groups can refer to
them. They are views of a flat buffer whose storage is resized: to nothing when the unit is freed, and to its full size
for the next all-gather. What autograd saved for the backward pass are such views, and valid again by the time they are
read. While its unit is freed, a parameter shows NaN of the right shape, so that whoever uses it out of turn notices.

**When.** A module's forward hooks tell when a unit runs. In the backward pass a unit begins when the gradient of its
output arrives, and has ended when those of its parameters and of its input have. So what a unit computes must reach the
loss through what it returns: a tensor that it puts aside on `self` gives no such sign. Modules that run twice,
recomputation (`torch.utils.checkpoint`), frozen and unused parameters are fine; which units run must be the same on
every rank.

**Larger than a rank.** A module made on `device="meta"` has shapes and no storage. Its parameters are then made one by
one, initialised, cut, and freed: `init(name, tensor)` is called in the order of `named_parameters()`, as a loop over
the whole model would, so that a seeded generator gives the weights it gives on one process. Without `init`, it is the
modules' own `reset_parameters()`.

Cost:
    As one process. Each unit is gathered twice a step, by one copy of it each time.

Communication:
    3Ψ(n−1)/n numbers a rank and microbatch, against 2Ψ(n−1)/n a step: `mlsys.perf.zero.communication`. There is no
    room to put gradients off, so `no_sync()` changes nothing.

Memory:
    (w + g + o)Ψ/n, `mlsys.perf.zero.memory`: 16Ψ/n bytes for Adam, in float32 or bfloat16. While a pass runs, add the
    weights of the root and two units, and the gradients of the root and two units.

Where it loses: small models and slow links, where the gathers outlast the layers; accumulating many microbatches.

Papers:
    Rajbhandari et al. 2020, arXiv:1910.02054, sections 5.3 and 7.2.2 (stage 3, P_os+g+p, and its bytes).
    Zhao et al. 2023, arXiv:2304.11277, sections 3 and 4 (units, prefetching, flat parameters, initialisation on meta).

See also:
    `mlsys.parallel.zero` (stages 1 and 2, and what all stages share), `mlsys.perf.zero` (bytes and memory),
    `mlsys.parallel.sharded_checkpoint` (saving the pieces).
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mlsys.parallel._flat import Flat
from mlsys.parallel._replicas import broadcast_first, check_memory, check_module
from mlsys.parallel._sharded import Sharded, names_of

MOST_IN_FLIGHT = 2  # gradient buffers: one being sent, one being filled
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # they have no forward pass


class _Use:
    """One call of a unit's module whose backward pass is to come.

    waiting: inputs whose gradients have not arrived.
    begun:   the gradient of an output has arrived.
    passed:  that of an input has.
    """

    def __init__(self) -> None:
        self.waiting, self.begun, self.passed = 0, False, False


class _Unit:
    """Parameters that are gathered and freed together, and how far they are."""

    def __init__(self, name: str, module: nn.Module, flats: list[Flat]) -> None:
        self.name, self.module, self.flats = name, module, flats
        self.trained = [flat for flat in flats if flat.trainable]
        self.live = False  # the weights are there, or on their way
        self.works: list[Any] = []
        self.in_backward = False
        self.reduced = False  # in this backward pass
        self.uses: weakref.WeakSet[_Use] = weakref.WeakSet()  # they live as long as the graphs that they belong to
        self.calls: list[_Use] = []  # calls of the module that have not returned

    @property
    def begun(self) -> list[_Use]:
        return [use for use in self.uses if use.begun]


class ZeRO3(Sharded):
    """Each rank has 1/n of the weights, of the gradients and of the optimizer's state.

    module:    the same on all ranks, on a device or on meta; weights and buffers become rank 0's.
    group:     None, a ProcessGroup, or a `Communicator` (else one is made).
    units:     modules that are gathered as a whole: a list of them, or a function that says whether a module is one. By
               default the members of the outermost `nn.ModuleList`s, or, if there are none, `nn.Sequential`s.
    dtype:     of weights, gradients and floating-point inputs; the optimizer stays in the module's own.
    init:      `init(name, tensor)` fills a parameter or buffer that is on meta.
    prefetch:  gather the next unit while one runs.
    split:     "elements" cuts anywhere, "tensors" keeps tensors whole, for optimizers that need that.
    device:    where a module on meta is to be; by default the group's.
    timeline:  where waiting, communication and the optimizer's time are recorded.
    """

    _takes_meta = True

    def __init__(
        self,
        module: nn.Module,
        group: Any = None,
        *,
        units: Callable[[nn.Module], bool] | Iterable[nn.Module] | None = None,
        dtype: torch.dtype | None = None,
        init: Callable[[str, Tensor], Any] | None = None,
        prefetch: bool = True,
        split: str = "elements",
        device: torch.device | str | None = None,
        timeline: Any = None,
    ) -> None:
        super().__init__(module, group, dtype=dtype, split=split, timeline=timeline)
        chosen = _choose(module, units)
        self._prefetch = prefetch
        self._forward_order: list[_Unit] = []  # of the pass before: what to prefetch
        self._backward_order: list[_Unit] = []
        self._trace: list[_Unit] = []  # of this pass
        self._ahead: _Unit | None = None  # to be prefetched as soon as the unit before last has gone
        self._whole = False  # inside `gathered()`
        with torch.no_grad():
            check_memory(module)  # of the caller: `_Meta` puts stand-ins there
            meta = _Meta(module, init, _device(device, self.communicator.group))
            check_module(module)
            self._names = names_of(module)
            self._requires_grad = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
            self.units = self._make_units(chosen)
            self.flats = [flat for unit in self.units for flat in unit.flats]
            self._unit_of = {id(flat): unit for unit in self.units for flat in unit.flats}
            self._shard(meta)
        for flat in self.flats:
            if flat.trainable:
                self._watch(flat)
        for unit in self.units:
            unit.module.register_forward_pre_hook(self._before_forward(unit), prepend=True, with_kwargs=True)
            unit.module.register_forward_hook(self._after_forward(unit), always_call=True)
        module.register_forward_pre_hook(self._door, prepend=True, with_kwargs=True)
        module.register_state_dict_pre_hook(self._refuse_state_dict)
        module.register_load_state_dict_pre_hook(self._refuse_load_state_dict)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """The module with all its weights, to read and to run methods of it that are not `forward`: a full copy.

        To be entered on all ranks. What is written to the weights is lost.
        """
        with torch.no_grad():
            for unit in self.units:
                self._need(unit)
        self._whole = True
        try:
            yield self.module
        finally:
            self._whole = False
            for unit in self.units:
                self._free(unit)

    # --- setting up ---------------------------------------------------------------------------------------------------

    def _make_units(self, chosen: list[nn.Module]) -> list[_Unit]:
        """The root first, then the chosen modules; each parameter in the smallest that has all of its uses."""
        wanted = {id(part) for part in chosen} | {id(self.module)}
        unit_at = {path: part for path, part in self.module.named_modules(remove_duplicate=False) if id(part) in wanted}
        members: dict[int, list[nn.Parameter]] = {key: [] for key in wanted}
        for parameter in self.module.parameters():
            chains = [_enclosing(name, unit_at) for name in self._names[id(parameter)]]
            common = set.intersection(*({id(part) for part in chain} for chain in chains))
            smallest = next(part for part in reversed(chains[0]) if id(part) in common)
            members[id(smallest)].append(parameter)
        loads = [0] * self.size
        units, seen = [], set()
        for path, part in unit_at.items():
            if id(part) not in seen and (members[id(part)] or part is self.module):
                seen.add(id(part))
                kinds: dict[Any, list[nn.Parameter]] = {}
                for parameter in members[id(part)]:
                    kind = (parameter.dtype, parameter.device, parameter.requires_grad)
                    kinds.setdefault(kind, []).append(parameter)
                units.append(_Unit(path, part, [self._lay_out(group, loads) for group in kinds.values()]))
        return units

    def _shard(self, meta: _Meta) -> None:
        """Cut every parameter, one after the other, and free the whole of it."""
        place: dict[int, tuple[Flat, int]] = {}
        for flat in self.flats:
            device = flat.parameters[0].device
            master = torch.zeros(flat.layout.sizes[self.rank], dtype=flat.master_dtype, device=device)
            flat.keep(master, torch.zeros_like(master, dtype=flat.dtype) if flat.mixed else master)
            flat.weights = torch.empty(flat.layout.total, dtype=flat.dtype, device=device)
            flat.weights.untyped_storage().resize_(0)
            place |= {id(parameter): (flat, index) for index, parameter in enumerate(flat.parameters)}
        for parameter, values in meta.parameters():
            flat, index = place[id(parameter)]
            broadcast_first([values], self.communicator, "auto")
            flat.store(index, values)
            _blank(parameter)
        for flat in self.flats:
            flat.refresh()
        broadcast_first(list(self.module.buffers()), self.communicator, "auto")

    # --- weights come and go ------------------------------------------------------------------------------------------

    def _gather(self, unit: _Unit) -> None:
        """Start to put the unit's weights together."""
        if unit.live:
            return
        unit.live = True
        for flat in unit.flats:
            flat.weights.untyped_storage().resize_(flat.weights.numel() * flat.weights.itemsize)
            flat.attach()
            unit.works.append(self._all_gather(flat))

    def _need(self, unit: _Unit) -> None:
        """Have the unit's weights here before going on."""
        self._gather(unit)
        while unit.works:
            self._wait(unit.works[0], f"all-gather of {unit.name or 'root'}")
            unit.works.pop(0)

    def _free(self, unit: _Unit) -> None:
        if unit.live and not self._whole:
            self._need(unit)  # a prefetch that nobody used may still be writing
            for flat in unit.flats:
                for parameter in flat.parameters:
                    _blank(parameter)
                flat.weights.untyped_storage().resize_(0)
            unit.live = False
        unit.in_backward = False

    def _follow(self, unit: _Unit, order: list[_Unit]) -> None:
        """Note that this unit's turn has come, and which came next in the pass before."""
        turn = len(self._trace)
        self._trace.append(unit)
        if self._prefetch and turn + 1 < len(order) and order[turn] is unit:
            self._ahead = order[turn + 1]

    def _fetch_ahead(self) -> None:
        """Start to gather the unit that comes next."""
        unit, self._ahead = self._ahead, None
        if unit is not None:
            self._gather(unit)

    # --- forward ------------------------------------------------------------------------------------------------------

    def _before_forward(self, unit: _Unit) -> Callable[..., None]:
        root = unit.module is self.module

        @torch.no_grad()
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            in_backward = torch._C._current_graph_task_id() != -1
            if root and not in_backward:
                self._trace = []
            self._need(unit)
            if not in_backward:
                self._follow(unit, self._forward_order)
                self._fetch_ahead()
            use = _Use()
            unit.calls.append(use)
            for tensor in _tensors((args, kwargs)):
                if tensor.requires_grad:
                    use.waiting += 1
                    tensor.register_hook(self._on_input_gradient(unit, use))

        return hook

    def _after_forward(self, unit: _Unit) -> Callable[..., None]:
        root = unit.module is self.module

        def hook(module: nn.Module, args: Any, result: Any) -> None:
            if not unit.calls:  # the forward pass was refused at the door: this hook runs all the same
                return
            use = unit.calls.pop()
            in_backward = torch._C._current_graph_task_id() != -1
            outputs = [tensor for tensor in _tensors(result) if tensor.requires_grad]
            if torch.is_grad_enabled() and not outputs and unit.trained:
                _require_plain(result, unit)
            for tensor in outputs:
                tensor.register_hook(self._on_output_gradient(unit, use))
            if outputs:
                unit.uses.add(use)
            if not unit.in_backward:
                self._free(unit)
            if root and not in_backward:
                self._forward_order, self._trace = self._trace, []
                for other in self.units:
                    if not other.in_backward:
                        self._free(other)  # prefetched in vain

        return hook

    # --- backward -----------------------------------------------------------------------------------------------------

    def _on_output_gradient(self, unit: _Unit, use: _Use) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def hook(_: Tensor) -> None:
            self._at_end_of_backward()
            use.begun = True
            if not unit.in_backward:
                unit.in_backward = True
                self._need(unit)
                # Not fetched ahead yet: what ran before ends with a hook on the same tensor, after this one.
                self._follow(unit, self._backward_order)

        return hook

    def _on_input_gradient(self, unit: _Unit, use: _Use) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def hook(_: Tensor) -> None:
            use.waiting -= 1
            use.passed = True
            if use.begun and use.waiting == 0:
                unit.uses.discard(use)
                if not unit.uses and not unit.reduced:
                    self._reduce_unit(unit)  # what has no gradient now gets none
            self._release(unit)
            self._fetch_ahead()

        return hook

    def _arrived(self, flat: Flat, index: int, gradient: Tensor) -> None:
        unit = self._unit_of[id(flat)]
        self._at_end_of_backward()
        flat.put(index, gradient)
        self._fetch_ahead()
        if all(flat.complete for flat in unit.trained):
            self._reduce_unit(unit)
            self._release(unit)

    def _reduce_unit(self, unit: _Unit) -> None:
        for flat in unit.trained:
            self._land(MOST_IN_FLIGHT - 1)
            self._reduce(flat)
            flat.gradients = None  # held by the collective until it has landed
        unit.reduced = True

    def _release(self, unit: _Unit) -> None:
        """Free the weights if nothing in this backward pass needs them any more.

        All gradients of the parameters are there, so all that computes those has run; what else reads weights computes
        gradients of inputs, so those must have begun to leave.
        """
        if not unit.in_backward:
            return
        if unit.reduced or not unit.trained:
            left = [use for use in unit.uses if use.waiting and not (use.begun and use.passed)]
            if not (left if unit.reduced else unit.uses):
                self._free(unit)

    def _finish(self) -> None:
        with torch.no_grad():
            for unit in self.units:
                begun = unit.begun
                if any(flat.started for flat in unit.trained) or (unit.trained and begun and not unit.reduced):
                    self._reduce_unit(unit)
                for use in begun:
                    unit.uses.discard(use)
            self._land()
            for unit in self.units:
                self._free(unit)
                unit.reduced = False
        self._callback_queued, self._ahead = False, None
        self._backward_order, self._trace = self._trace, []

    def _recover(self) -> None:
        super()._recover()
        self._trace, self._ahead = [], None
        for unit in self.units:
            for flat in unit.flats:
                flat.gradients = None
            unit.reduced = False
            unit.uses.clear()
            self._free(unit)

    def _publish(self, flats: Sequence[Flat]) -> None:
        with torch.no_grad():
            for flat in flats:
                flat.refresh()
                torch.autograd.graph.increment_version(flat.parameters)

    # --- errors -------------------------------------------------------------------------------------------------------

    def _refuse_state_dict(self, *_: Any) -> None:
        if not self._whole:
            raise RuntimeError(
                "the weights of ZeRO3 are in shards: use full_state_dict(), or mlsys.parallel.sharded_checkpoint.save"
            )


class _Meta:
    """The module's parameters one by one, those on meta made and initialised just before they are handed out."""

    def __init__(self, module: nn.Module, init: Callable[[str, Tensor], Any] | None, device: torch.device) -> None:
        self.module, self.init, self.device = module, init, device
        self._on_meta = {name for name, tensor in _all_tensors(module) if tensor.is_meta}
        self._check()
        # `.data` cannot change the device of a parameter that is on meta, so such ones are made anew.
        renewed: dict[int, nn.Parameter] = {}
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None and parameter.is_meta:
                    if id(parameter) not in renewed:
                        blank = _blanks(parameter.shape, parameter.dtype, device)
                        renewed[id(parameter)] = nn.Parameter(blank, requires_grad=parameter.requires_grad)
                    part._parameters[name] = renewed[id(parameter)]

    def parameters(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter with its values, which are dropped when the next is asked for."""
        if self.init is None and self._on_meta:
            yield from self._reset_modules()
            return
        for name, parameter in self.module.named_parameters():
            yield parameter, self._made(name, parameter) if name in self._on_meta else parameter.detach()
        for prefix, part in self.module.named_modules():
            for name, buffer in part._buffers.items():
                if buffer is not None and buffer.is_meta:
                    part._buffers[name] = self._made(f"{prefix}.{name}" if prefix else name, buffer)

    def _made(self, name: str, like: Tensor) -> Tensor:
        assert self.init is not None
        values = _unset(like.shape, like.dtype, self.device)
        self.init(name, values)
        return _require_set(values, name, "init")

    def _reset_modules(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """By the modules' own `reset_parameters`; a tied parameter is what the last of its modules makes of it."""
        last = {id(parameter): part for part in self.module.modules() for parameter in _own(part._parameters)}
        for prefix, part in self.module.named_modules():
            names = {name: f"{prefix}.{name}" if prefix else name for name in (*part._parameters, *part._buffers)}
            fresh = [name for name, parameter in part._parameters.items() if names[name] in self._on_meta]
            for name, buffer in part._buffers.items():
                if buffer is not None and buffer.is_meta:
                    part._buffers[name] = _unset(buffer.shape, buffer.dtype, self.device)
                    fresh.append(name)
            for name in fresh:
                if name in part._parameters:
                    parameter = getattr(part, name)
                    parameter.data = _unset(parameter.shape, parameter.dtype, self.device)
            if fresh:
                part.reset_parameters()  # `_check` has seen that there is one
            for name in fresh:
                _require_set(getattr(part, name).detach(), names[name], f"{type(part).__name__}.reset_parameters()")
            for parameter in _own(part._parameters):
                if last[id(parameter)] is part:
                    yield parameter, parameter.detach()

    def _check(self) -> None:
        if self.init is not None and not self._on_meta:
            raise ValueError('init is for a module made on device="meta": this one has weights; leave init out')
        if self.init is not None:
            return
        for prefix, part in self.module.named_modules():
            tensors = [t for t in (*_own(part._parameters), *_own(part._buffers)) if t.is_meta]
            if tensors and not callable(getattr(part, "reset_parameters", None)):
                raise ValueError(
                    f"{prefix or 'the module'} ({type(part).__name__}) has tensors on meta and no reset_parameters(): "
                    "pass init=, a function init(name, tensor) that fills them"
                )


def _choose(module: nn.Module, units: Any) -> list[nn.Module]:
    """The modules that shall be units, beside the root."""
    if units is None:
        for container in (nn.ModuleList, nn.Sequential):
            found = _members_of_outermost(module, container)
            if found:
                return found
        return []
    parts = list(module.modules())
    if callable(units):
        units = [part for part in parts if units(part)]
    chosen = list(units)
    known = {id(part) for part in parts}
    for part in chosen:
        if not isinstance(part, nn.Module) or id(part) not in known:
            raise ValueError(f"units must be modules within module, got {type(part).__name__}, which is none of them")
        if isinstance(part, CONTAINERS):
            raise ValueError(
                f"units holds a {type(part).__name__}, which is never called, so that its weights would never be "
                "gathered: name the modules in it"
            )
    return chosen


def _members_of_outermost(module: nn.Module, container: type[nn.Module]) -> list[nn.Module]:
    if isinstance(module, container):
        return [part for child in module.children() for part in _called(child)]
    return [member for child in module.children() for member in _members_of_outermost(child, container)]


def _called(module: nn.Module) -> list[nn.Module]:
    """The module itself, or if it is a container, which nobody calls, what it contains."""
    if not isinstance(module, CONTAINERS):
        return [module]
    return [part for child in module.children() for part in _called(child)]


def _enclosing(name: str, unit_at: dict[str, nn.Module]) -> list[nn.Module]:
    """The units that a parameter of this name lies in, the root first."""
    parts = name.split(".")[:-1]
    paths = [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
    return [unit_at[path] for path in paths if path in unit_at]


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in tuples, lists, dictionaries and dataclasses."""
    if isinstance(value, Tensor):
        yield value
        return
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                yield from _tensors(getattr(leaf, field.name))


def _require_plain(result: Any, unit: _Unit) -> None:
    """TypeError if a result may hide tensors, whose gradients would be the sign to gather the weights again."""
    for leaf in pytree.tree_leaves(result):
        if not isinstance(leaf, (Tensor, *PLAIN)) and not dataclasses.is_dataclass(leaf):
            raise TypeError(
                f"{unit.name or 'the module'} returns a {type(leaf).__name__}, in which ZeRO3 can see no tensors: "
                "return tensors, tuples, dictionaries or dataclasses, or choose other units"
            )


def _all_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _own(tensors: dict[str, Any]) -> list[Any]:
    return [tensor for tensor in tensors.values() if tensor is not None]


def _blanks(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """NaN (0 for integers) of this shape, stored once."""
    return _unset(torch.Size(()), dtype, device).expand(shape)


def _blank(parameter: nn.Parameter) -> None:
    """Show that the parameter's values are elsewhere."""
    parameter.data = _blanks(parameter.shape, parameter.dtype, parameter.device)


def _unset(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    value = float("nan") if dtype.is_floating_point or dtype.is_complex else 0
    return torch.full(shape, value, dtype=dtype, device=device)


def _require_set(values: Tensor, name: str, by: str) -> Tensor:
    if values.isnan().any():
        raise ValueError(f"{by} has left numbers of {name} unset or NaN: fill the tensor in place")
    return values


def _device(device: torch.device | str | None, group: dist.ProcessGroup | None) -> torch.device:
    """Where to make a module that is on meta."""
    if device is not None:
        return torch.device(device)
    if "gloo" not in dist.get_backend(group) and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
