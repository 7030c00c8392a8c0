"""A whole module quantized: which layers, what they are given, which method, and one file for the result.

    quantize_(model, "int4:g128")                                     round to nearest
    quantize_(model, "int4:g128", "gptq", calibration=batches)        codes chosen for the inputs of each layer
    save(model, path);  load(path, into=another_of_the_same_shape)

Each `nn.Linear` is replaced in place by a `QuantizedLinear`. Embeddings, norms and what
else there is stay as they are. It goes in three steps, and only the last one changes anything:

1. **Check.** All layers are looked at before any work is done, and all that do not fit
   are named in one error: weights shared with another layer (the token embedding, often),
   numbers that are not finite, tensors without data, a method that does not know the format.
2. **Calibrate.** The model reads `calibration`, and each layer's inputs are taken down:
   Σ x xᵀ for GPTQ, the largest of each column for SmoothQuant and LLM.int8(), some
   of the inputs for AWQ and for the report.
3. **Replace.** All layers at once. An error or Ctrl-C before leaves the module as it was.

    method          needs inputs   what it does
    "rtn"           no             the nearest code of each weight
    "hqq"           no             zero points chosen so that most weights are near, and few are far
    "gptq"          yes            codes that make up for each other's errors on these inputs
    "awq"           yes            columns with large inputs are scaled up before they are rounded
    "smoothquant"   yes            int8 weights *and* activations, the range of inputs moved into the weights
    "llm_int8"      yes            int8 weights and activations, but for columns with outliers, which stay floats

Inputs are divided (AWQ, SmoothQuant) when the model runs, which fits any model. Where the division can be put into
the norm before, it costs nothing: `mlsys.quant.smoothquant.balance_` does that.

By default layers are calibrated on inputs from the model as it was. With `sequential=True`
each one is calibrated on what it will be given: by the layers before it when they are quantized
already, so that it can make up for what they do. The model then reads `calibration` once a layer.

It gains nothing where the weights are not what takes memory and time: small layers, long
sequences, large batches. And a method that needs inputs is as good as these are like those of use.

Cost:
    "rtn": some passes over the weights. Calibrated: a forward pass over `calibration` besides, and the method for each
    layer (GPTQ: K²(R/2 + K/6) multiply-adds, and K² an input).

Memory:
    bits_per_weight / 8 bytes a weight afterwards; while it works, old and new layers both. GPTQ also holds a
    matrix (K, K) in float32 for each layer; with `sequential=True` for one at a time.

Papers:
    Frantar, Ashkboos, Hoefler & Alistarh 2022, arXiv:2210.17323 (GPTQ; layers calibrated one after the other).
    Xiao et al. 2022, arXiv:2211.10438 (SmoothQuant).
    Dettmers, Lewis, Belkada & Zettlemoyer 2022, arXiv:2208.07339 (LLM.int8()).
    Lin et al. 2023, arXiv:2306.00978 (AWQ).
    Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models" (HQQ).

See also:
    `mlsys.quant.gptq`, `mlsys.quant.awq`, `mlsys.quant.hqq`, `mlsys.quant.smoothquant`, `mlsys.quant.llm_int8`,
    `mlsys.quant.qlinear` (how the layers multiply), `mlsys.models.transformer` (a model to try it on).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional

from mlsys.quant._calibrate import Seen, watch
from mlsys.quant._file import load, save
from mlsys.quant._layer import QuantizedLinear
from mlsys.quant._methods import METHODS, Given
from mlsys.quant._scheme import BLOCKS, Scheme
from mlsys.quant._tensor import check_matrix, choose_grid

__all__ = ["LayerReport", "QuantizedLinear", "Report", "load", "quantize_", "save"]

Choice = str | Collection[str] | Callable[[str, nn.Module], bool] | None


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    bits:          a weight, with scales and all else that the layer keeps but its bias.
    weight_error:  ‖Ŵ − W‖ / ‖W‖.
    output_error:  ‖ŷ − y‖ / ‖y‖ on some of the calibration inputs, bias left out; None without calibration.
    note:          what the method has to say.
    """

    name: str
    shape: tuple[int, int]
    scheme: str
    bits: float
    weight_error: float
    output_error: float | None
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What `quantize_` did, layer by layer; `print` shows a table.

    nbytes, before:  of the weights of these layers, now and before.
    left:            linear layers that were not selected; also those of a subclass, which never are.
    """

    method: str
    layers: tuple[LayerReport, ...]
    nbytes: int
    before: int
    left: tuple[str, ...]

    @property
    def bits_per_weight(self) -> float:
        """The mean over all weights of these layers."""
        return 8 * self.nbytes / max(sum(math.prod(layer.shape) for layer in self.layers), 1)

    def __str__(self) -> str:
        head = ["layer", "out × in", "scheme", "bits", "weight error", "output error", "s", ""]
        rows = [
            [
                layer.name, f"{layer.shape[0]} × {layer.shape[1]}", layer.scheme, f"{layer.bits:.2f}",
                f"{layer.weight_error:.3g}", "" if layer.output_error is None else f"{layer.output_error:.3g}",
                f"{layer.seconds:.2f}", layer.note,
            ]
            for layer in self.layers
        ]  # fmt: skip
        aligned = ("left", "right", "left", "right", "right", "right", "right", "left")
        table = tabulate(rows, head, tablefmt="simple", colalign=aligned, disable_numparse=True)
        total = (
            f"{self.method}: {len(self.layers)} layers, {self.bits_per_weight:.3f} bits a weight, "
            f"{self.nbytes / 1e6:.3g} MB for {self.before / 1e6:.3g}"
        )
        if self.left:
            total += f"; left as they are: {', '.join(self.left)}"
        return f"{table}\n{total}"


def quantize_(
    module: nn.Module,
    scheme: Scheme | str,
    method: str = "rtn",
    calibration: Iterable[Any] | None = None,
    include: Choice = None,
    exclude: Choice = None,
    *,
    activations: Literal["int8"] | None = None,
    sequential: bool = False,
    **options: Any,
) -> Report:
    """Replace the linear layers of `module`, in place, by quantized ones; says what became of each.

    scheme:       "int4:g128" and so on, see `Scheme`.
    method:       "rtn", "hqq", "gptq", "awq", "smoothquant" or "llm_int8"; `options` are passed on to it.
    calibration:  inputs of the module: each a tensor, a tuple of arguments or a dict of named ones.
    include, exclude:  names of layers as `module.named_modules()` has them, with *, ? and [ab] as for files; or a
                  function of name and layer. All `nn.Linear` by default.
    activations:  "int8": layers round their inputs, too. "smoothquant" and "llm_int8" always do.
    sequential:   calibrate each layer with those before it quantized already.

    The module is left in the mode (train or eval) that it was in. ValueError or TypeError, and nothing is changed, for
    layers that cannot be quantized (all are named), no calibration where one is needed, or layers it never reached.
    """
    scheme = Scheme.parse(scheme)
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    if method not in METHODS:
        raise ValueError(f"method={method!r} must be one of {', '.join(METHODS)}")
    if activations not in (None, "int8"):
        raise ValueError(f'activations={activations!r} must be None or "int8"')
    chosen, left = _chosen(module, include, exclude)
    needed = METHODS[method].calibrated
    _check_calibration(method, calibration, needed or sequential)
    _check(module, chosen, scheme, method, activations, options)

    def made(name: str, layer: nn.Linear, seen: Seen | None) -> tuple[QuantizedLinear, LayerReport]:
        return _quantized(name, layer, seen, scheme, method, activations, options)

    old = {name: (module.get_submodule(name), *_place(module, name)) for name in chosen}
    results: dict[str, tuple[QuantizedLinear, LayerReport]] = {}
    second = METHODS[method].second
    found: Mapping[str, Seen]
    try:
        if sequential:
            assert calibration is not None
            batches = list(calibration)
            order = _reached(module, chosen, batches)
            for name in order:
                found = watch(module, {name: chosen[name]}, batches, second)
                if needed and (name not in found or not found[name].count):
                    raise ValueError(f"{name} gets no inputs once the layers before it are quantized: sequential=False")
                results[name] = made(name, chosen[name], found.get(name))
                _, parent, last = old[name]
                setattr(parent, last, results[name][0])
        else:
            found = {}
            if calibration is not None:
                found = watch(module, chosen, calibration, second)
                if needed:
                    _all_reached(chosen, found)
            results = {name: made(name, layer, found.get(name)) for name, layer in chosen.items()}
            for name, (new, _) in results.items():
                _, parent, last = old[name]
                setattr(parent, last, new)
    except BaseException:
        for layer, parent, last in old.values():
            setattr(parent, last, layer)
        raise
    return Report(
        method,
        tuple(results[name][1] for name in chosen),
        sum(new.nbytes for new, _ in results.values()),
        sum(layer.weight.nbytes for layer in chosen.values()),
        tuple(left),
    )


# --- which layers -----------------------------------------------------------------------------------------------------


def _chosen(module: nn.Module, include: Choice, exclude: Choice) -> tuple[dict[str, nn.Linear], list[str]]:
    """The layers to quantize, and the names of linear layers that are left. ValueError for patterns without a match."""
    named = dict(module.named_modules(remove_duplicate=False))
    # Not of a subclass: those compute something else, or are never called (as in nn.MultiheadAttention)
    linear = {name: layer for name, layer in named.items() if type(layer) is nn.Linear}
    for argument, choice in (("include", include), ("exclude", exclude)):
        _check_choice(argument, choice)
    if "" in linear:
        raise ValueError(
            "module is a linear layer itself, and cannot be replaced within itself: pass what holds it, or "
            "nn.Sequential(layer)"
        )
    selected = {
        name: layer
        for name, layer in linear.items()
        if (include is None or _matches(include, name, layer))
        and not (exclude is not None and _matches(exclude, name, layer))
    }
    for argument, choice in (("include", include), ("exclude", exclude)):
        for pattern in _patterns(choice):
            if any(fnmatchcase(name, pattern) for name in linear):
                continue
            what = f"is a {type(named[pattern]).__name__}" if pattern in named else "is the name of none"
            names = ", ".join(linear) or "(there are none)"
            raise ValueError(f"{argument}={pattern!r} {what}, and nn.Linear layers are to be named: {names}")
    if not selected:
        raise ValueError("no nn.Linear layer is left to quantize: look at include and exclude, and print(module)")
    left = [name for name, layer in named.items() if isinstance(layer, nn.Linear) and name not in selected]
    return selected, left


def _check_choice(argument: str, choice: object) -> None:
    """TypeError unless names, or a function."""
    if choice is None or callable(choice) or isinstance(choice, str):
        return
    wrong = [one for one in choice if not isinstance(one, str)] if isinstance(choice, Collection) else [choice]
    if wrong:
        raise TypeError(
            f'{argument} must be a name or pattern ("blocks.*.up"), a list of them, or a function of name and layer, '
            f"got {wrong[0]!r}"
        )


def _patterns(choice: Choice) -> Collection[str]:
    if choice is None or callable(choice):
        return ()
    return (choice,) if isinstance(choice, str) else choice


def _matches(choice: Choice, name: str, layer: nn.Module) -> bool:
    if callable(choice):
        return bool(choice(name, layer))
    return any(fnmatchcase(name, pattern) for pattern in _patterns(choice))


def _place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """What holds the layer, and under which name."""
    parent, _, last = name.rpartition(".")
    return module.get_submodule(parent), last


# --- what cannot be ---------------------------------------------------------------------------------------------------


def _check_calibration(method: str, calibration: Any, needed: bool) -> None:
    if calibration is None:
        if needed:
            raise ValueError(
                f'method="{method}" chooses by the inputs of layers: pass calibration=[x, …], some batches as module '
                'takes them; or method="rtn" or "hqq", which need none'
            )
    elif isinstance(calibration, Tensor | Mapping | str) or not isinstance(calibration, Iterable):
        raise TypeError(
            f"calibration must be a list (or another iterable) of inputs, got a {type(calibration).__name__}: "
            "put it into a list, [x]"
        )


def _check(
    module: nn.Module,
    chosen: Mapping[str, nn.Linear],
    scheme: Scheme,
    method: str,
    activations: str | None,
    options: Mapping[str, Any],
) -> None:
    """One ValueError for everything that keeps these layers from being quantized."""
    problems = _of_method(scheme, method, activations, options)
    owners: dict[int, list[str]] = {}  # of each parameter, under all its names
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, layer in chosen.items():
        problems += [f"{name}: {problem}" for problem in _of_layer(name, layer, owners, scheme)]
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ValueError(f"nothing was quantized, because of this:{lines}")


def _of_method(scheme: Scheme, method: str, activations: str | None, options: Mapping[str, Any]) -> list[str]:
    """What the method says against scheme and options: it is tried on a small matrix."""
    if (activations or METHODS[method].integers) and scheme.format[:3] != "int":
        return [f"{scheme}: activations in int8 are multiplied with integers: take int8 or int4"]
    generator = torch.Generator().manual_seed(0)
    seen = Seen(METHODS[method].second)
    seen.add(torch.randn(128, 64, generator=generator))
    small = scheme
    if isinstance(scheme.group, int) and scheme.format not in BLOCKS:
        small = replace(scheme, group=min(scheme.group, 16))  # several groups a row, as in the layers
    try:
        METHODS[method].make(Given(torch.randn(4, 64, generator=generator), seen, small), **options)
    except (TypeError, ValueError) as error:
        return [f'method="{method}" with {scheme}: {error}']
    return []


def _of_layer(name: str, layer: nn.Linear, owners: Mapping[int, list[str]], scheme: Scheme) -> list[str]:
    weight = layer.weight
    others = [other for other in owners.get(id(weight), []) if other != f"{name}.weight"]
    if others:
        return [f"its weight is also {', '.join(others)}: exclude it, or give it a weight of its own"]
    if weight.is_meta:
        return ["its weight has no data (device meta): load it first"]
    hooks = [*layer._forward_hooks, *layer._forward_pre_hooks, *layer._backward_hooks]
    if hooks:
        return ["it has hooks, which its replacement would not have: remove them first"]
    try:
        choose_grid(check_matrix("weight", weight), scheme)
    except (TypeError, ValueError) as error:
        return [str(error)]
    return []


def _reached(module: nn.Module, chosen: Mapping[str, nn.Linear], batches: Sequence[Any]) -> list[str]:
    """The layers in the order in which they are called. ValueError if some never are."""
    seen = watch(module, chosen, batches, second=False)
    _all_reached(chosen, seen)
    return list(seen)


def _all_reached(chosen: Mapping[str, nn.Linear], seen: Mapping[str, Seen]) -> None:
    never = [name for name in chosen if name not in seen or not seen[name].count]
    if len(never) == len(chosen):
        raise ValueError("calibration holds no inputs, or none that reach these layers: pass some batches")
    if never:
        raise ValueError(
            f"no calibration input reached {', '.join(never)}: pass inputs that do (or exclude these layers; a layer "
            "whose weight is used without calling it cannot be calibrated)"
        )


# --- one layer --------------------------------------------------------------------------------------------------------


def _quantized(
    name: str,
    layer: nn.Linear,
    seen: Seen | None,
    scheme: Scheme,
    method: str,
    activations: Literal["int8"] | None,
    options: Mapping[str, Any],
) -> tuple[QuantizedLinear, LayerReport]:
    """Its replacement, and what there is to say."""
    start = time.perf_counter()
    with torch.no_grad():
        w = check_matrix("weight", layer.weight)
        try:
            made = METHODS[method].make(Given(w, seen, scheme), **options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"layer {name}, nothing was quantized: {error}") from error
        rounded: Literal["int8"] | None = "int8" if METHODS[method].integers else activations
        new = QuantizedLinear(
            made.quantized,
            layer.bias,
            divisor=made.divisor,
            outliers=made.outliers,
            threshold=made.threshold,
            activations=rounded,
            dtype=layer.weight.dtype,
        )
        new.train(layer.training)
        seconds = time.perf_counter() - start
        output_error = None
        if seen is not None and seen.rows is not None:
            want = functional.linear(seen.rows, w)
            bias = 0 if layer.bias is None else layer.bias.float()
            output_error = _relative(new(seen.rows) - bias, want)
        report = LayerReport(
            name,
            (layer.out_features, layer.in_features),
            str(scheme),
            new.bits_per_weight,
            _relative(new.dequantize(), w),
            output_error,
            seconds,
            made.note,
        )
    return new, report


def _relative(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖; 0 for no error."""
    error, size = float((got - want).norm()), float(want.norm())
    if not error:
        return 0.0
    return error / size if size else math.inf
