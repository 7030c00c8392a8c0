"""The contract of `kernels.conv1d`: depthwise, causal or with zeros on both sides, filters longer than the sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlsys.contracts._kernels_common import BLOCK, UNIT, draw, exact, result, rounding
from mlsys.contracts.core import Case, Contract, Inputs, Results, Wrong, accepts

SIGNATURE = "conv1d(x (b, c, n), weight (c, width), bias (c,) or None, *, padding=0, an int or 'causal') -> (b, c, m)"


def case(
    b: int, c: int, n: int, width: int, *, padding: int | str = 0, bias: bool = True, dtype: str = "float32"
) -> Case:
    """One case."""
    return {"b": b, "c": c, "n": n, "width": width, "padding": padding, "bias": bias, "dtype": dtype}


CASES = [
    case(1, 1, 8, 3, bias=False),
    case(1, 2, 8, 3),
    case(2, 3, 20, 4, padding="causal"),
    case(2, 3, 20, 4, padding=2),
    case(1, 2, 300, 4, padding="causal"),
    case(1, 2, 700, 5, padding=2),
    case(2, 1, 33, 2, padding=1),
    case(1, 2, 5, 9, padding="causal"),  # the filter is longer than the sequence
    case(1, 2, 4, 3, padding=6),  # results that are made of zeros only
    case(3, 4, 257, 1, bias=False),
    case(1, 1, 600, 300),
    case(0, 2, 5, 2),
    case(2, 3, 70, 4, padding="causal", dtype="bfloat16"),
]


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    options = {"dtype": case["dtype"], "device": device}
    named: Inputs = {
        "x": draw(generator, case["b"], case["c"], case["n"], **options),
        "weight": draw(generator, case["c"], case["width"], **options),
    }
    if case["bias"]:
        named["bias"] = draw(generator, case["c"], **options)
    return named | {"padding": case["padding"]}


def call(impl: Callable[..., Any], inputs: Inputs) -> Results:
    """The result."""
    tensors = [inputs[name] for name in ("x", "weight", "bias") if name in inputs]
    options = {"padding": inputs["padding"]} if inputs["padding"] != 0 else {}
    accepts(impl, len(tensors), options, SIGNATURE)
    return {"out": result(impl(*tensors, **options), oracle(inputs)["out"].shape, inputs["x"].dtype)}


def oracle(inputs: Inputs) -> Mapping[str, np.ndarray]:
    """Place by place in float64, over a row with its zeros written out."""
    x, weight = exact(inputs["x"]), exact(inputs["weight"])
    width, padding = weight.shape[1], inputs["padding"]
    zeros = (width - 1, 0) if padding == "causal" else (padding, padding)
    row = np.pad(x, ((0, 0), (0, 0), zeros))
    length = row.shape[2] - width + 1
    out = np.zeros((*x.shape[:2], length))
    for t in range(length):
        out[:, :, t] = (row[:, :, t : t + width] * weight).sum(-1)
    return {"out": out + exact(inputs["bias"])[:, None] if "bias" in inputs else out}


def tolerance(inputs: Inputs, name: str, want: np.ndarray) -> float:
    """A rounding of the result, and float32's of a sum of `width` products and a bias."""
    x, weight = (np.abs(exact(inputs[name])) for name in ("x", "weight"))
    terms = float(weight.sum(1).max(initial=0.0) * x.max(initial=0.0)) + 4
    return rounding(inputs["x"].dtype, want) * 1.01 + (2 + float(np.sqrt(weight.shape[1]))) * UNIT * terms


# --- wrong variants ---------------------------------------------------------------------------------------------------


def _conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: int | str = 0,
    flip: bool = False,
    late: int = 0,
    anticausal: bool = False,
    both_sides: bool = False,
    no_halo: bool = False,
    one_filter: bool = False,
    mix: bool = False,
    no_bias: bool = False,
    repeat_edge: bool = False,
) -> Tensor:
    """The convolution in plain torch, with one knob for each mistake."""
    width, n = weight.shape[1], x.shape[2]
    before, after = (width - 1, 0) if padding == "causal" else (int(padding), int(padding))
    if padding == "causal" and anticausal:
        before, after = 0, width - 1
    if padding == "causal" and both_sides:
        before, after = width - 1 - (width - 1) // 2, (width - 1) // 2
    wide, filters = x.float(), weight.float()
    filters = filters.flip(1) if flip else filters[:1].expand_as(filters) if one_filter else filters
    if mix:
        wide = wide.sum(1, keepdim=True).expand_as(wide)
    length = n + before + after - width + 1
    out = wide.new_zeros(*x.shape[:2], length)
    t = torch.arange(length, device=x.device)
    for k in range(width):
        place = t + k - before + late
        inside = (place >= 0) & (place < n)
        if no_halo:  # a block sees only its own numbers
            inside &= place // (BLOCK // 4) == t // (BLOCK // 4)
        got = wide[:, :, place.clamp(0, n - 1)]
        out += filters[:, k, None] * (got if repeat_edge else got * inside)
    return (out if bias is None or no_bias else out + bias.float()[:, None]).to(x.dtype)


def _torch_filter_over_batch(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: int | str = 0
) -> Tensor:
    """The filter of the batch's number, not of the channel's."""
    rows = weight[torch.arange(x.shape[0], device=x.device) % weight.shape[0]]
    parts = [
        _conv1d(row[None], own.expand(x.shape[1], -1), bias, padding=padding) for row, own in zip(x, rows, strict=True)
    ]
    return torch.cat(parts) if parts else _conv1d(x, weight, bias, padding=padding)


def _wrong(hint: str, **knobs: Any) -> Wrong:
    return Wrong(partial(_conv1d, **knobs), hint)


WRONG = {
    "flipped": _wrong("x[t + k − left], not x[t − k]: the filter is not turned round", flip=True),
    "one_late": _wrong("the first result begins `left` places before the sequence, not one later", late=1),
    "anticausal": _wrong(
        "causal: the zeros stand before the sequence, so that no result sees what comes after it", anticausal=True
    ),
    "both_sides": _wrong("causal: all width − 1 zeros stand before the sequence, none after it", both_sides=True),
    "no_halo": _wrong("a block needs width − 1 numbers beside its own: load the halo, too", no_halo=True),
    "one_filter": _wrong("each channel has its own filter: weight[channel]", one_filter=True),
    "filter_of_batch": Wrong(_torch_filter_over_batch, "the row's channel is row % channels, not row / channels"),
    "channels_mixed": _wrong("depthwise: a channel sees only itself", mix=True),
    "no_bias": _wrong("add the channel's bias", no_bias=True),
    "edge_repeated": _wrong("beyond the sequence there are zeros, not the last number again", repeat_edge=True),
}


def contract(name: str, reference: Callable[..., Any]) -> Contract:
    """The contract under this name, which `mlsys.contracts.kernels` gives it."""
    return Contract(name, SIGNATURE, reference, CASES, inputs, call, oracle, tolerance, WRONG)
