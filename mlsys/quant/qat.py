"""Quantization-aware training: round the weights in every forward pass, and train what is left to be trained.

Rounding afterwards takes the weights as they are. At 8 and 4 bits that is good enough; at 2 and 3
bits the network that is left is another one. So let the training see it: the layer multiplies with
ŵ = dequantize(quantize(w)), while the optimizer moves w, in floats, in steps far smaller than those
of the grid.

    forward       ŵ = s · (clamp(round(w / s + z), 0, 2^b − 1) − z)

    backward      ∂L/∂w = ∂L/∂ŵ        where w was within the range of the grid: "straight through"
                        = 0            where it was clamped

Rounding is a staircase whose derivative is 0 almost everywhere, so the true gradient says nothing; the
staircase's mean slope is 1, and that is what is used. A weight near the middle between two codes can then
change over to the other, if this lowers the loss *with the others rounded as they are*.

A grid that spans min … max (`fake_quantize(x, scheme)`) clamps nothing: with few bits most weights are then far
below its largest code. A step that is learned (`lsq`, learned step size quantization) trades clamped weights
for a finer step:

    ∂ŵ/∂s = round(w / s) − w / s       within the range                    b bits, codes −Q … Q
          = −Q or Q                    clamped                             Q = 2^(b−1) − 1
                                       and all of it times 1 / √(N·Q), for N weights with this step

without which the step, one number that hears of all its weights, would move much farther than they do.

`prepare_(module, scheme)` does this to all linear layers of a module, `convert_(module)` ends it: what remains are
ordinary layers with weights on the grid, and the codes.

Where it loses: it is training, with data, labels and a learning rate, against minutes for `mlsys.quant.gptq`, and
the more bits there are, the less it wins. And the gradient is wrong: near its end, weights jump to and fro between two
codes, so let the learning rate fall to 0.

Cost:
    Besides that of training: one pass over the weights to find their ranges and one to round, in each step.

Memory:
    A rounded copy of the weights, as long as backward needs it; where some can be clamped, a byte each for which.
    The float weights and the optimizer's state stay: nothing is saved before `convert_`.

Papers:
    Bengio, Léonard & Courville 2013, arXiv:1308.3432 (the straight-through estimator).
    Jacob et al. 2017, arXiv:1712.05877, section 3 (rounding simulated in training).
    Esser et al. 2019, arXiv:1902.08153, "Methods" (the step's gradient, its scale, and where it starts).

See also:
    `mlsys.quant.rtn` (the grids), `mlsys.quant.gptq` (better codes without training).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mlsys.quant._scheme import Scheme
from mlsys.quant._tensor import (
    Grid,
    QuantizedTensor,
    apply_grid,
    assemble,
    check_matrix,
    choose_grid,
    encode,
    spread,
)
from mlsys.quant.formats import Format, Integer

Range = Literal["minmax", "learned"]
EXACT = ("fp32", "fp16", "bf16")  # scales that leave a group's largest number within half a step of the largest code
LEAST_STEP = 1e-8  # a learned step that training drove to 0 or below has no meaning


def fake_quantize(x: Tensor, scheme: Scheme | str, grid: Grid | None = None) -> Tensor:
    """What quantize(x, scheme).dequantize() gives, in the dtype of x, with a gradient that goes straight through.

    grid: scales and zero points to use in place of those that span x; what is beyond their range is clamped, and gets
          gradient 0. As from `choose_grid` of other numbers: (R, G) or (1, 1).

    Errors as from `quantize`; also for a grid that is not one of this scheme for a matrix of this shape.
    """
    scheme = Scheme.parse(scheme)
    rows = check_matrix("x", x)
    spans = grid is None
    if grid is None:
        grid = choose_grid(rows, scheme)
    else:
        _check_grid(grid, rows, scheme)
    values, inside = _round(rows, grid, scheme, masked=not spans or scheme.scales not in EXACT)
    rounded = values.reshape(x.shape).to(x.dtype)
    result: Tensor = _Straight.apply(x, rounded, None if inside is None else inside.reshape(x.shape))
    return result


def _check_grid(grid: Any, rows: Tensor, scheme: Scheme) -> None:
    """TypeError or ValueError unless these are scales and zero points of `scheme` for these rows (R, K)."""
    if not isinstance(grid, Grid):
        raise TypeError(f"grid must be a Grid, as from choose_grid, got {type(grid).__name__}")
    shapes = [(1, 1), (len(rows), 1 if scheme.group == "tensor" else scheme.groups(rows.shape[1]))]
    wanted = {"scale": scheme.scales != "none", "zero": scheme.affine}
    for name, value in (("scale", grid.scale), ("zero", grid.zero)):
        if (value is not None) != wanted[name]:
            raise ValueError(f"grid.{name} must be {'a tensor' if wanted[name] else 'None'} for {scheme}, got {value}")
        if value is None:
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"grid.{name} must be a floating-point tensor, got {_kind(value)}")
        if tuple(value.shape) not in shapes:
            raise ValueError(
                f"grid.{name} must be {shapes[0]} or {shapes[1]} for {scheme} of {tuple(rows.shape)}, got "
                f"{tuple(value.shape)}"
            )
        if value.device != rows.device:
            raise ValueError(f"grid.{name} must be on {rows.device} as x is, got {value.device}")


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


class _Straight(torch.autograd.Function):
    """Put `rounded` in the place of x; the gradient is that of x, where `inside`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor, inside: Tensor | None) -> Tensor:
        ctx.save_for_backward(inside)
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] if inside is None else gradients[0] * inside, None, None


def _round(x: Tensor, grid: Grid, scheme: Scheme, *, masked: bool) -> tuple[Tensor, Tensor | None]:
    """The nearest values on the grid; and which of x were not clamped, if that is asked for."""
    element = scheme.element
    columns = x.shape[1]
    if not isinstance(element, Integer):
        values = apply_grid(element.decode(encode(x, grid, scheme)), grid.scale, grid.zero, scheme)
        if not masked:
            return values, None
        low, high = _reach(element)
        scale = 1.0 if grid.scale is None else spread(grid.scale, columns, scheme.group_size(columns))
        return values, (x >= low * scale) & (x <= high * scale)
    assert grid.scale is not None
    size = scheme.group_size(columns)
    # As `encode` and `decode` do, without the codes in between
    scale = spread(grid.scale, columns, size)
    codes = x / torch.where(scale > 0, scale, torch.inf)
    zero = None if grid.zero is None else spread(grid.zero, columns, size)
    if zero is not None:
        codes = codes + zero
    codes = codes.round_()
    inside = (codes >= element.smallest) & (codes <= element.largest) if masked else None
    codes = codes.clamp_(element.smallest, element.largest)
    return (codes if zero is None else codes.sub_(zero)).mul_(scale), inside


def _reach(element: Format) -> tuple[float, float]:
    """What is still rounded, not clamped: half a step beyond the smallest and the largest number."""
    if element.bits > 8:
        return -element.largest, element.largest
    values = element.decode(torch.arange(1 << element.bits, dtype=torch.int32).to(torch.uint8)).double()
    values = values[torch.isfinite(values)].unique()
    low, above, below, high = (float(values[i]) for i in (0, 1, -2, -1))
    return low - (above - low) / 2, high + (high - below) / 2


# --- a step that is learned -------------------------------------------------------------------------------------------


def lsq(x: Tensor, step: Tensor, scheme: Scheme | str) -> Tensor:
    """Round x (R, K) to multiples of `step`, float32 (R, G) or (1, 1), with gradients in both; symmetric integers.

    Steps below 1e-8 count as that. ValueError for other schemes, or steps of another shape.
    """
    scheme = _symmetric(scheme)
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point matrix (R, K), got {x.dtype} {tuple(x.shape)}")
    groups = (1, 1) if scheme.group == "tensor" else (len(x), scheme.groups(x.shape[1]))
    if tuple(step.shape) != groups:
        raise ValueError(f"step must be {groups} for {scheme}, got {tuple(step.shape)}")
    size, largest = scheme.group_size(x.shape[1]), scheme.element.largest
    each = x.numel() if scheme.group == "tensor" else size  # numbers that share a step
    step = _slowed(step.clamp(min=LEAST_STEP), (each * largest) ** -0.5)
    scaled = (x / spread(step, x.shape[1], size)).clamp(-largest, largest)  # clamping has the right gradient: 0
    whole = scaled + (scaled.round() - scaled).detach()
    return (whole * spread(step, x.shape[1], size)).to(x.dtype)


def first_step(x: Tensor, scheme: Scheme | str) -> Tensor:
    """Where to start learning steps: 2 · mean|x| / √Q of each group of x (R, K); 1 for a group of zeros."""
    scheme = _symmetric(scheme)
    rows = check_matrix("x", x).abs()
    if scheme.group == "tensor":
        mean = rows.mean().reshape(1, 1)
    else:
        parts = rows.split(scheme.group_size(rows.shape[1]), dim=1)
        mean = torch.stack([part.mean(dim=1) for part in parts], dim=1)
    return torch.where(mean > 0, 2 * mean / scheme.element.largest**0.5, 1.0)


def _slowed(step: Tensor, by: float) -> Tensor:
    """The same number, with a gradient of `by` times as much."""
    slow = step * by
    return slow + (step - slow).detach()


def _symmetric(scheme: Scheme | str) -> Scheme:
    scheme = Scheme.parse(scheme)
    if not isinstance(scheme.element, Integer) or scheme.affine or scheme.scales != "fp32":
        raise ValueError(f"steps are learned of symmetric integers with scales in float32 (int3:sym), not of {scheme}")
    return scheme


# --- a model ----------------------------------------------------------------------------------------------------------


class FakeQuantized(nn.Module):
    """A parametrization: what a layer has as its weight is the rounded one; the float weight is what is trained.

    scheme: of the weights.
    step:   the learned steps, a parameter; None where scales span min … max.
    """

    def __init__(self, weight: Tensor, scheme: Scheme | str, ranges: Range = "minmax") -> None:
        """For a weight (N, K) like this one."""
        super().__init__()
        self.scheme = Scheme.parse(scheme)
        self.step = nn.Parameter(first_step(weight, self.scheme)) if ranges == "learned" else None
        self.unhook: Callable[[], None] = lambda: None  # of the activations' rounding

    def forward(self, weight: Tensor) -> Tensor:
        """The rounded weight."""
        return fake_quantize(weight, self.scheme) if self.step is None else lsq(weight, self.step, self.scheme)

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """The codes of `weight`, which stand for just what `forward` gives."""
        rows = check_matrix("weight", weight)
        if self.step is None:
            grid = choose_grid(rows, self.scheme)
        else:
            step = self.step.detach().clamp(min=LEAST_STEP)
            if not bool(step.isfinite().all()):
                raise ValueError("its learned steps must be finite: training diverged; take a lower learning rate")
            grid = Grid(step, None, step)
        return assemble(encode(rows, grid, self.scheme), grid, tuple(weight.shape), self.scheme)


def prepare_(
    module: nn.Module,
    scheme: Scheme | str,
    *,
    ranges: Range = "minmax",
    activations: Literal["int8"] | None = None,
    include: Callable[[str], bool] = lambda name: True,
) -> list[str]:
    """Make linear layers in `module` multiply with rounded weights, in training and evaluation; returns their names.

    scheme:      of the weights.
    ranges:      "minmax": scales span what a group holds; "learned": steps are parameters too (symmetric integers).
                 Make the optimizer afterwards, so that it has them.
    activations: "int8": inputs are rounded as well, with a scale for each row, as by `qlinear` with this option.
    include:     which layers, a function of the name; the module itself, if it is a linear layer, is "".

    Parameters stay the same objects under other names (`parametrizations.weight.original`). ValueError if there is no
    such layer, or one was prepared already; then nothing is changed.
    """
    scheme = Scheme.parse(scheme)
    if ranges not in ("minmax", "learned"):
        raise ValueError(f'ranges={ranges!r} must be "minmax" or "learned"')
    if ranges == "learned":
        _symmetric(scheme)
    if activations not in (None, "int8"):
        raise ValueError(f'activations={activations!r} must be None or "int8"')
    if not callable(include):
        raise TypeError(f'include must be a function of a layer\'s name, got {include!r}: lambda name: name == "0"')
    layers = {name: layer for name, layer in _linears(module) if include(name)}
    if not layers:
        raise ValueError("module has no linear layer that is included")
    for name, layer in layers.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError(
                f"{name or 'module'} has a parametrized weight already: convert_() it first, or leave it out"
            )
        try:
            choose_grid(check_matrix("weight", layer.weight), scheme)
        except (TypeError, ValueError) as why:
            raise ValueError(f"{name or 'module'} cannot be quantized: {why}") from why
    for layer in layers.values():
        rounding = FakeQuantized(layer.weight, scheme, ranges)
        parametrize.register_parametrization(layer, "weight", rounding)
        if activations:
            rounding.unhook = layer.register_forward_pre_hook(_round_inputs, with_kwargs=True).remove
    return list(layers)


def convert_(module: nn.Module) -> dict[str, QuantizedTensor]:
    """End the training: layers that `prepare_` changed are plain again, with weights on the grid; returns their codes.

    A weight that was shared (with an embedding, say) is so no longer: the other keeps the float numbers. Activations
    are rounded no longer; `qlinear(x, codes, activations="int8")` does that. ValueError if nothing was prepared.
    """
    made: dict[str, tuple[nn.Linear, FakeQuantized, Tensor, QuantizedTensor]] = {}
    for name, layer in _linears(module):
        if not parametrize.is_parametrized(layer, "weight"):
            continue
        parametrizations: Any = layer.parametrizations
        chain = parametrizations["weight"]
        rounding = chain[0]
        if not isinstance(rounding, FakeQuantized):
            continue
        try:
            made[name] = layer, rounding, chain.original, rounding.quantized(chain.original)
        except ValueError as why:
            raise ValueError(f"{name or 'module'} cannot be quantized, and nothing was changed: {why}") from why
    for layer, rounding, original, codes in made.values():
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        rounding.unhook()
        layer.weight = nn.Parameter(codes.dequantize(original.dtype), requires_grad=original.requires_grad)
    found = {name: codes for name, (*_, codes) in made.items()}
    if not found:
        raise ValueError("module has no layer that was prepared: see prepare_()")
    return found


def _linears(module: nn.Module) -> Iterable[tuple[str, nn.Linear]]:
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear))


def _round_inputs(
    layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A linear layer's only argument, given by place or by name; a call with none is left for the layer to refuse."""
    if inputs:
        return (fake_quantize(inputs[0], "int8"), *inputs[1:]), named
    return inputs, {name: fake_quantize(x, "int8") if name == "input" else x for name, x in named.items()}
