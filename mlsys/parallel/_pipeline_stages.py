"""A model cut into stages: where to cut, what the stages are, and how they are filled from a whole checkpoint.

The slowest stage sets the pace of a pipeline, so `partition` cuts a row of layer costs where the largest sum of a part
is least. `split` takes the layers of the library's `Transformer` or of an `nn.Sequential` as they are, without copying
a weight, and keeps the names that they have in the whole model: a stage's state dict is a part of the whole one's.

A weight that two stages use, such as an embedding that is the output matrix too, is one tensor as long as both stages
are in one process. `shared` of a stage says which of its weights are such, and `mlsys.parallel.pipeline` then adds
up the gradients of the copies that ranks have.

See also:
    `mlsys.parallel.pipeline` (runs stages), `mlsys.perf.transformer` (the costs).
"""

from __future__ import annotations

import itertools
import math
import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlsys.models._inputs import check_ids
from mlsys.models._layers import rotation
from mlsys.models.transformer import Transformer
from mlsys.perf import _checks
from mlsys.perf.transformer import forward_flops

# --- where to cut -----------------------------------------------------------------------------------------------------


def partition(costs: Sequence[float], n: int) -> list[range]:
    """`n` neighbouring parts of a row of layers, none empty, whose largest sum of `costs` is as small as it can be.

    Among equally good ones that with the least sum of squares, which is the most even; among those that with the
    shorter parts first, since earlier stages hold more microbatches. Exact, for floats too.

        >>> partition([3, 1, 1, 1, 2], 3)
        [range(0, 1), range(1, 3), range(3, 5)]
    """
    n = _checks.whole("n", n)
    if n > len(costs):
        raise ValueError(f"n={n}: only {len(costs)} costs are there, and no part may be empty; take fewer parts")
    for i, cost in enumerate(costs):
        _checks.amount(f"costs[{i}]", cost)
    exact = [Fraction(cost) for cost in costs]
    unit = math.lcm(*(cost.denominator for cost in exact))
    sums = [0, *itertools.accumulate(int(cost * unit) for cost in exact)]
    most = _least_largest(sums, n)
    end = len(costs)
    # best[i]: the least sum of squares of the layers from i on, in so many parts of at most `most`; cuts[k][i]: where
    # the first of k + 1 such parts ends.
    best: list[float] = [(sums[end] - s) ** 2 if sums[end] - s <= most else math.inf for s in sums[:end]]
    cuts: list[list[int]] = []
    for parts in range(2, n + 1):
        longer: list[float] = [math.inf] * end
        cut = [end] * end
        for i in range(end - parts + 1):
            for j in range(i + 1, end - parts + 2):
                part = sums[j] - sums[i]
                if part > most:
                    break
                if best[j] == math.inf:  # cannot be cut so; also, inf plus a whole number beyond floats is an error
                    continue
                if part * part + best[j] < longer[i]:  # not <=: of equal ones the shorter first part
                    longer[i], cut[i] = part * part + best[j], j
        best = longer
        cuts.append(cut)
    starts = [0]
    for cut in reversed(cuts):
        starts.append(cut[starts[-1]])
    return [range(a, b) for a, b in zip(starts, [*starts[1:], end], strict=True)]


def _least_largest(sums: Sequence[int], n: int) -> int:
    """The least bound on a part's sum that n parts can keep, by bisection: filling parts greedily needs the fewest."""

    def enough(most: int) -> bool:
        start = parts = 0
        while start < len(sums) - 1:
            stop = bisect_left(sums, sums[start] + most + 1) - 1  # the last with a sum of at most `most`
            if stop == start:
                return False
            start, parts = stop, parts + 1
        return parts <= n  # fewer can always be cut further, as long as there are layers

    low, high = 0, sums[-1]
    while low < high:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle + 1
    return low


# --- the stages -------------------------------------------------------------------------------------------------------


class Stage(nn.Module):
    """Some layers of a model, under the names that they have there.

    shared: of the parameters that other stages use too, the name here → the name that stands for it in the whole model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shared: dict[str, str] = {}


class SequentialStage(Stage):
    """Neighbouring layers of an `nn.Sequential`. Several tensors, as several arguments, are one tuple to a layer."""

    def __init__(self, model: nn.Sequential, part: range) -> None:
        super().__init__()
        for name, layer in list(model._modules.items())[part.start : part.stop]:
            self.add_module(name, layer)

    def forward(self, *inputs: Tensor) -> Any:
        x: Any = inputs[0] if len(inputs) == 1 else inputs
        for layer in self._modules.values():
            assert layer is not None
            x = layer(x)
        return x


class TransformerStage(Stage):
    """Neighbours among the embedding, the blocks, and the last norm with the output matrix: tokens or x → x or logits.

    Rotary angles depend on nothing but the positions, so each stage works them out for itself.
    """

    def __init__(self, model: Transformer, part: range) -> None:
        super().__init__()
        self.config = model.config
        self.first, self.last = part.start == 0, part.stop == model.config.layers + 2
        head = self.last and model.head is None
        self.token_embedding = model.token_embedding if self.first or head else None
        self.position_embedding = model.position_embedding if self.first else None
        blocks = range(max(part.start - 1, 0), min(part.stop - 1, model.config.layers))
        self.blocks = nn.ModuleDict({str(i): model.blocks[i] for i in blocks})
        self.norm = model.norm if self.last else None
        self.head = model.head if self.last else None

    def forward(self, x: Tensor) -> Tensor:
        config = self.config
        if self.first:
            x = self._embedded(x)
        cos_sin = None
        if config.positions != "learned" and len(self.blocks):
            cos, sin = rotation(torch.arange(x.shape[1], device=x.device), config.head_dim, config.rope_theta)
            wide = torch.promote_types(x.dtype, torch.float32)
            cos_sin = cos.to(wide), sin.to(wide)
        for i, block in self.blocks.items():
            x = block(x, cos_sin, None, int(i))
        if self.norm is not None:
            head = self.token_embedding if self.head is None else self.head
            assert head is not None
            x = F.linear(self.norm(x), head.weight)
        return x

    def _embedded(self, tokens: Tensor) -> Tensor:
        assert self.token_embedding is not None
        check_ids("tokens", tokens, 2, self.config.vocab, "vocab", self.token_embedding.weight.device)
        if not 0 < tokens.shape[1] <= self.config.context:
            raise ValueError(f"tokens must be 1 to {self.config.context} a sequence, got shape {tuple(tokens.shape)}")
        x = self.token_embedding(tokens)
        if self.position_embedding is not None:
            x = x + self.position_embedding(torch.arange(tokens.shape[1], device=tokens.device))
        return x


def split(model: nn.Module, n: int, costs: Sequence[float] | None = None) -> list[Stage]:
    """`n` stages that are `model` one after the other, with its own layers: no weight is copied.

    model: a `Transformer`, whose layers are the embedding, each block, and the last norm with the output matrix; or an
           `nn.Sequential`. On the meta device it costs nothing, and each rank fills its own stages with `load`.
    costs: of each layer, such as measured seconds; by default FLOPs of a `Transformer`'s layers (none for the
           embedding) and numbers of parameters of an `nn.Sequential`'s.
    """
    if isinstance(model, Transformer):
        flops = forward_flops(model.config, 1, model.config.context)
        block = (flops.total - flops.logits) / model.config.layers
        default, make = [0.0, *[block] * model.config.layers, flops.logits], TransformerStage
        layers = f"its embedding, {model.config.layers} blocks and output"
    elif isinstance(model, nn.Sequential):
        default = [float(sum(p.numel() for p in layer.parameters())) for layer in model]
        make, layers = SequentialStage, f"its {len(model)} layers"  # type: ignore[assignment]
    else:
        raise TypeError(
            f"model must be a Transformer or an nn.Sequential, got {type(model).__name__}: its stages cannot be known; "
            "write them as modules of their own, Pipeline takes any"
        )
    costs = default if costs is None else costs
    if len(costs) != len(default):
        raise ValueError(f"costs must have one entry for each of {layers}: {len(default)}, got {len(costs)}")
    if _checks.whole("n", n) > len(default):
        raise ValueError(f"n={n}: there are only {len(default)} layers to cut between ({layers}); take fewer stages")
    stages: list[Stage] = [make(model, part) for part in partition(costs, n)]  # type: ignore[arg-type]
    _note_shared(model, stages)
    return stages


def _note_shared(model: nn.Module, stages: Sequence[Stage]) -> None:
    first: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first.setdefault(parameter, name)
    users = Counter(parameter for stage in stages for parameter in stage.parameters())
    for stage in stages:
        named = stage.named_parameters(remove_duplicate=False)
        stage.shared = {name: first[parameter] for name, parameter in named if users[parameter] > 1}


# --- weights ----------------------------------------------------------------------------------------------------------


def load(
    stages: Sequence[nn.Module],
    weights: Mapping[str, Tensor] | str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
) -> None:
    """Give these stages of `split` their part of a whole model's weights; the rest is not looked at.

    weights: by name, or a safetensors file such as `mlsys.models.transformer.save` writes, of which only these weights
             are read: so its checksum, which is over all of them, is not compared.
    device:  of weights that are on the meta device; None is the CPU. Others are overwritten where they are.
    ValueError, before anything is changed, if a weight is missing or of another shape.
    """
    if isinstance(weights, Mapping):
        _fill(stages, weights.keys(), lambda name: tuple(weights[name].shape), weights.__getitem__, device)
        return
    try:
        with safetensors.safe_open(weights, framework="pt") as file:
            shape = lambda name: tuple(file.get_slice(name).get_shape())  # noqa: E731
            _fill(stages, file.keys(), shape, file.get_tensor, device)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{weights} is damaged, or no safetensors file ({error})") from None


@torch.no_grad()
def _fill(
    stages: Sequence[nn.Module],
    names: Any,
    shape: Callable[[str], tuple[int, ...]],
    read: Callable[[str], Tensor],
    device: torch.device | str | None,
) -> None:
    there = set(names)
    places = [
        (prefix + own, module, own, tensor)
        for stage in stages
        for prefix, module in ((p + "." if p else "", m) for p, m in stage.named_modules(remove_duplicate=False))
        for own, tensor in itertools.chain(
            module._parameters.items(),
            ((b, t) for b, t in module._buffers.items() if b not in module._non_persistent_buffers_set),
        )
        if tensor is not None
    ]
    for name, _, _, tensor in places:
        if name not in there:
            raise ValueError(f"weights have no {name}, which a stage needs; those of the whole model are asked for")
        if shape(name) != tuple(tensor.shape):
            raise ValueError(f"weights have {name} of shape {shape(name)}, the model's is {tuple(tensor.shape)}")
    filled: dict[int, Tensor] = {}
    for name, module, own, tensor in places:
        if not tensor.is_meta:
            tensor.copy_(read(name))
            continue
        if id(tensor) not in filled:  # a tied one once
            # A copy: what is read may be a view of the file, or somebody's weight.
            values = torch.empty(tensor.shape, dtype=tensor.dtype, device=device or "cpu").copy_(read(name))
            is_parameter = isinstance(tensor, nn.Parameter)
            filled[id(tensor)] = nn.Parameter(values, requires_grad=tensor.requires_grad) if is_parameter else values
        (module._parameters if own in module._parameters else module._buffers)[own] = filled[id(tensor)]
