"""A quantized module in one safetensors file: codes as they are, and in the metadata how to read them."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from mlsys.models import _checkpoint
from mlsys.quant._layer import QuantizedLinear, describe, from_tensors

KIND = "mlsys.quant.model"


def save(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write all of a module whose layers `quantize_` replaced to one file, whole or not at all; shared tensors once.

    It holds the quantized layers, their schemes, and every other parameter and buffer by its name, but not the shape of
    the model: `load` puts it into one. ValueError if no layer is quantized.
    """
    layers = _quantized(module)
    if not layers:
        raise ValueError("module holds no quantized layer: call quantize_ first, or save it as it was saved before")
    tensors: dict[str, Tensor] = {}
    same: dict[str, str] = {}  # name → that under which it is kept
    known: dict[tuple[Any, ...], str] = {}
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is no tensor but extra state ({type(tensor).__name__}), which cannot be saved")
        if tensor.is_meta:
            raise ValueError(f"{name} has no data (device meta): load it first")
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in known:
            same[name] = known[key]
            continue
        known[key] = name
        tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    described = {
        name: {**describe(layer.quantized), "activations": layer.activations, "threshold": layer.threshold}
        for name, layer in layers.items()
    }
    _checkpoint.write(path, {"layers": described, "same": same}, tensors, kind=KIND)


def load(path: str | os.PathLike[str], into: nn.Module) -> nn.Module:
    """Put what `save` wrote into a module of the same shape, as it was before it was quantized; returns it.

    Its linear layers are replaced where the file has quantized ones, with their bias, as the file has them; and all
    other parameters and buffers get the file's numbers in the module's dtypes. All are on the module's devices (from
    the meta device: on the CPU). ValueError, and
    nothing is changed, if the file is damaged, holds something else, or does not fit: all that does not is named.
    OSError as for `open`.
    """
    if not isinstance(into, nn.Module):
        raise TypeError(f"into must be a module of the shape that was saved, got {type(into).__name__}")
    config, tensors = _checkpoint.read(path, kind=KIND)
    try:
        tensors |= {name: tensors[first] for name, first in config["same"].items()}
        quantized = dict(config["layers"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} lacks what `save` writes ({error!r}): save the model again") from None
    layers: dict[str, QuantizedLinear] = {}
    problems: list[str] = []
    for name, description in quantized.items():
        own = {key[len(name) + 1 :]: tensors.pop(key) for key in list(tensors) if key.startswith(f"{name}.")}
        try:
            old = into.get_submodule(name)
        except AttributeError:
            problems.append(f"{name}: the module has no such layer")
            continue
        shape = (getattr(old, "out_features", None), getattr(old, "in_features", None))
        said = description.get("shape", ())
        if not isinstance(old, nn.Linear | QuantizedLinear) or shape != tuple(said):
            want = " × ".join(map(str, said))
            problems.append(f"{name}: the file has a linear layer {want}, and the module {old}")
            continue
        device = next(iter(old.state_dict().values())).device
        try:
            layer = from_tensors(own, description)
        except (KeyError, TypeError, ValueError) as error:
            problems.append(f"{name}: the file's parts do not make a layer ({error})")
            continue
        problems += [f"{name}.bias: {problem}" for problem in _of_bias(own.get("bias"), old.bias)]
        layer.dtype = old.dtype if isinstance(old, QuantizedLinear) else old.weight.dtype
        layers[name] = layer.to("cpu" if device.type == "meta" else device).train(old.training)
    state = {
        name: tensor
        for name, tensor in into.state_dict().items()
        if not any(name.startswith(f"{layer}.") for layer in quantized)
    }
    problems += [f"{name}: the module has no such tensor" for name in tensors if name not in state]
    problems += [f"{name}: the file does not have it" for name in state if name not in tensors]
    problems += [
        f"{name}: {tuple(tensors[name].shape)} in the file, {tuple(tensor.shape)} in the module"
        for name, tensor in state.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    problems += [
        f"{first} and {name}: one tensor in the module, different numbers in the file"
        for first, name in _shared(into)
        if first in tensors and name in tensors and not torch.equal(tensors[first], tensors[name])
    ]
    problems += [
        f"{name}: it has no data (device meta), and is not saved"
        for name, tensor in into.named_buffers()
        if tensor.is_meta and name not in into.state_dict()
    ]
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ValueError(f"{path} does not fit into the module, which was not changed:{lines}")

    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        setattr(into.get_submodule(parent), last, layer)
    _fill(into, tensors)
    return into


def _of_bias(given: Tensor | None, own: Tensor | None) -> list[str]:
    """What keeps this bias of the file from being that of the layer. Any float dtype will do, and stays as it is."""
    if given is None and own is not None:
        return ["the file does not have it"]
    if given is not None and own is None:
        return ["the module has no such tensor"]
    if given is not None and not given.is_floating_point():
        return [f"{given.dtype} in the file, and a bias is floating-point"]
    return []


def _shared(module: nn.Module) -> list[tuple[str, str]]:
    """Names of one and the same parameter: its first, and each further one."""
    first: dict[int, str] = {}
    pairs = []
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            pairs.append((first[id(parameter)], name))
    return pairs


def _fill(into: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Numbers into parameters and buffers; those without data are replaced, and stay shared where they were."""
    made: dict[int, Tensor] = {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            parent, _, last = name.rpartition(".")
            owner = into.get_submodule(parent)
            old = getattr(owner, last)
            if not old.is_meta:
                old.copy_(tensor)
                continue
            if id(old) not in made:
                new = tensor.to(old.dtype)
                made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
            setattr(owner, last, made[id(old)])


def _quantized(module: nn.Module) -> dict[str, QuantizedLinear]:
    if isinstance(module, QuantizedLinear):
        raise ValueError("module is a quantized layer itself: save what holds it, or nn.Sequential(layer)")
    found = module.named_modules(remove_duplicate=False)
    return {name: layer for name, layer in found if isinstance(layer, QuantizedLinear)}
