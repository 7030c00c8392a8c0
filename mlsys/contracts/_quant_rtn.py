"""The contract of `quant.rtn`: each number as the nearest point of a grid that spans its group.

The implementation is a function `quantize(w, scheme)`; `scheme` is text such as "int4:g16" (see `mlsys.quant.Scheme`).
It gives an object with `dequantize()`, which has the shape of w. Where w lies halfway between two points, either is
right; and codes may be chosen by scales before or after those are rounded to what is kept of them.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from mlsys.contracts import _quant_formats as formats
from mlsys.contracts.core import Case, Contract, Inputs, Mismatch, Results, Wrong, as_array
from mlsys.quant import Scheme

SIGNATURE = "quantize(w, scheme) -> object with dequantize()"
# By how much errors may differ where the two neighbours are about equally near, as a share of max |w|: scales that
# are rounded move the middle between them.
HALFWAY = {"none": 1e-6, "fp32": 1e-5, "e8m0": 1e-5, "e4m3": 1e-5, "fp16": 2e-3, "bf16": 1e-2, "dq": 3e-2}


def case(scheme: str, *shape: int, of: str = "normal") -> Case:
    """One case."""
    return {"scheme": scheme, "shape": shape, "of": of}


CASES = [
    case("int8", 6, 24),
    case("int4:g16:sym", 5, 48),
    case("int4:g16:sym", 5, 40),
    case("int4:g16", 5, 40),
    case("int4:g16", 5, 48, of="positive"),
    case("int3:channel", 7, 20, of="negative"),
    case("int2:g8", 3, 24, of="shifted"),
    case("int8:tensor", 6, 24),
    case("int4:g8:sym", 4, 32, of="zeros"),
    case("int4:g8", 4, 32, of="constants"),
    case("int4:g8:fp16", 4, 24),
    case("int4:g8:bf16", 4, 24),
    case("nf4:g16", 4, 48),
    case("nf4:g16:dq", 16, 48, of="normal"),
    case("e2m1:g16", 4, 48),
    case("fp8_e4m3", 4, 30),
    case("fp8_e5m2:tensor", 4, 30),
    case("mxfp4", 3, 80),
    case("mxfp8_e4m3", 3, 64),
    case("mxfp6_e2m3", 3, 64),
    case("nvfp4", 3, 40),
    case("nvfp4", 4, 64, of="zeros"),
    case("bf16", 4, 12),
    case("int4:g16:sym", 50),
    case("int4:g16", 2, 3, 40),
]


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Rows and columns of unequal size, so that it matters who shares a scale."""
    import torch

    rng, shape, of = np.random.default_rng(seed), case["shape"], case["of"]
    w = rng.standard_normal(shape) * rng.uniform(0.2, 2, shape[-1])
    if len(shape) > 1:
        w = w * rng.uniform(0.1, 3, (*shape[:-1], 1))
    if of in ("positive", "negative"):
        w = (np.abs(w) + 1.5 * np.abs(w).max()) * (1 if of == "positive" else -1)
    if of == "shifted":
        w = w + 0.8 * np.abs(w).max() * np.sign(rng.standard_normal((shape[0], 1)))
    if of == "zeros":
        w[:, 8:24] = 0
    if of == "constants":
        w[:, :8], w[:, 8:16], w[:, 16:24] = 0.3, -1.7, 0
    w = 0.05 * w  # as weights are
    return {"w": torch.from_numpy(w.astype(np.float32)).to(device), "scheme": case["scheme"]}


def call(impl: Callable[..., Any], given: Inputs) -> Results:
    """What the codes stand for."""
    quantized = impl(given["w"], given["scheme"])
    if not hasattr(quantized, "dequantize"):
        raise Mismatch(f"quantize gave {type(quantized).__name__}, which has no dequantize()")
    return {"dequantized": quantized.dequantize()}


class Plain:
    """Group by group, in float64. Each further option is one place to go wrong."""

    def __init__(
        self,
        *,
        clip: bool = False,
        levels: bool = False,
        next_scale: bool = False,
        signed_max: bool = False,
        whole_zero: bool = True,
        spans_zero: bool = True,
        e8m0: str = "down",
        along_rows: bool = False,
        short: str = "kept",
        per: str | None = None,
        zero_over_zero: bool = False,
        mean: bool = True,
        global_scale: bool = True,
        truncate: bool = False,
    ) -> None:
        self.clip, self.levels, self.next_scale, self.signed_max = clip, levels, next_scale, signed_max
        self.whole_zero, self.spans_zero, self.e8m0, self.along_rows = whole_zero, spans_zero, e8m0, along_rows
        self.short, self.per, self.zero_over_zero, self.mean = short, per, zero_over_zero, mean
        self.global_scale, self.truncate = global_scale, truncate

    def __call__(self, w: Any, scheme: str) -> Any:
        """An object with `dequantize()`."""
        s, w = Scheme.parse(scheme), as_array(w)
        rows = w.reshape(-1, w.shape[-1])
        if self.along_rows and s.group != "tensor":
            rows = rows.T
        with np.errstate(divide="ignore", invalid="ignore"):
            near = self.rounded(rows, s)
        near = near.T if self.along_rows and s.group != "tensor" else near
        return SimpleNamespace(dequantize=lambda: near.reshape(w.shape))

    def rounded(self, w: np.ndarray, s: Scheme) -> np.ndarray:
        """Rows of numbers as the nearest points."""
        name = s.element.name if not s.affine else "u" + s.element.name
        pick = "zero" if self.truncate else "even"
        grid = formats.Plain(name, pick=pick)
        if s.scales == "none":
            return grid.decode(grid.encode(w))
        edges = self.edges(w.shape, s)
        low = np.array([w[part].min() for part in edges])
        high = np.array([w[part].max() for part in edges])
        scale, zero = self.scales(w, s, low, high, grid)
        if self.next_scale:
            scale = np.roll(scale, 1)
        near = np.zeros_like(w)
        for part, each, offset in zip(edges, scale, zero, strict=True):
            if self.short == "dropped" and s.group not in ("tensor", "channel") and w[part].size < int(s.group):
                continue
            x = w[part] / each if each or self.zero_over_zero else np.zeros_like(w[part])
            lost = np.isnan(x)
            codes = grid.encode(np.where(lost, 0, x) + offset)
            near[part] = np.where(lost, np.nan, (grid.decode(codes) - offset) * each)
        return near

    def edges(self, shape: tuple[int, ...], s: Scheme) -> list[tuple[slice, slice]]:
        """Who shares a scale."""
        rows, columns = shape
        group = self.per or s.group
        if group == "tensor":
            return [(slice(0, rows), slice(0, columns))]
        size = columns if group == "channel" else int(group)
        return [(slice(r, r + 1), slice(c, c + size)) for r in range(rows) for c in range(0, columns, size)]

    def scales(
        self, w: np.ndarray, s: Scheme, low: np.ndarray, high: np.ndarray, grid: formats.Plain
    ) -> tuple[np.ndarray, np.ndarray]:
        """One a group, and zero points."""
        largest = float(grid.values[grid.codes].max())
        size = high if self.signed_max else np.maximum(np.abs(low), np.abs(high))
        zero = np.zeros_like(low)
        if s.affine:
            if self.spans_zero:
                low, high = np.minimum(low, 0), np.maximum(high, 0)
            scale = (high - low) / (largest + self.levels)
        elif self.clip and s.format.startswith("int"):
            scale = size / (largest + 1)
        else:
            scale = size / largest
        scale = self.kept(scale, size, s, largest)
        if s.affine:
            ends = np.where(scale > 0, -low / np.where(scale > 0, scale, 1), 0)
            zero = np.clip(ends.round() if self.whole_zero else ends, 0, largest)
        return scale, zero

    def kept(self, scale: np.ndarray, size: np.ndarray, s: Scheme, largest: float) -> np.ndarray:
        """What is read back of scales."""
        if s.scales == "e8m0":
            exponent = np.log2(np.where(size > 0, size, 1))
            exponent = np.floor(exponent) if self.e8m0 == "down" else np.floor(exponent + np.log2(4 / 3))
            return 2.0 ** (exponent - np.floor(np.log2(largest)))
        if s.scales == "e4m3":
            e4m3 = formats.Plain("e4m3")
            shared = scale.max() / 448 if self.global_scale else 1.0
            if not shared:
                return scale
            codes = e4m3.encode(scale / shared)
            return e4m3.decode(np.maximum(codes, 1) if self.global_scale else codes) * shared
        if s.scales in ("fp16", "bf16"):
            form = formats.Plain(s.scales, pick="zero" if self.truncate else "even")
            return form.decode(form.encode(scale))
        if s.scales == "dq":
            mean, book = scale.mean(), formats.Plain("dynamic8")
            kept = np.empty_like(scale)
            for start in range(0, len(scale), 256):
                off = scale[start : start + 256] - mean
                absmax = np.abs(off).max()
                kept[start : start + 256] = book.decode(book.encode(off / absmax)) * absmax if absmax else 0
            return kept + mean if self.mean else kept
        return scale


def oracle(given: Inputs) -> dict[str, np.ndarray]:
    """Group by group."""
    return {"dequantized": Plain()(given["w"], given["scheme"]).dequantize()}


def tolerance(given: Inputs, name: str, want: np.ndarray) -> float:
    """A few roundings of float32."""
    return 2e-6 * float(given["w"].abs().max())


def compare(given: Inputs, got: np.ndarray, want: np.ndarray, limit: float) -> str | None:
    """What is wrong with the numbers: each must be the nearest point, or as near."""
    if got.shape != want.shape:
        return f"shape {got.shape}, expected {want.shape}"
    w = as_array(given["w"])
    halfway = HALFWAY[Scheme.parse(given["scheme"]).scales] * float(np.abs(w).max(initial=0.0))
    with np.errstate(invalid="ignore"):
        equal = np.abs(got - want) <= limit
        as_near = np.abs(np.abs(got - w) - np.abs(want - w)) <= halfway
    off = ~(equal | as_near)
    if not off.any():
        return None
    at = tuple(int(i) for i in np.argwhere(off)[0])
    count = f"{int(off.sum())} of {w.size} are off"
    return f"{w[at]:.6g} at {list(at)} became {got[at]:.6g}, expected {want[at]:.6g} ({count})"


def _wrong(hint: str, **knobs: Any) -> Wrong:
    return Wrong(Plain(**knobs), hint)


WRONG = {
    "clipped_largest": _wrong(
        "max |w| gets the code 2^(b−1) − 1: dividing by 2^(b−1) clips the largest positive weight", clip=True
    ),
    "levels_off_by_one": _wrong(
        "2^b codes have 2^b − 1 steps between them: that is what max − min is cut into", levels=True
    ),
    "scale_of_the_wrong_group": _wrong("divide a group by its own scale", next_scale=True),
    "largest_without_abs": _wrong("the scale of a symmetric scheme is of max |w|, not max w", signed_max=True),
    "zero_point_not_whole": _wrong("round the zero point to a whole number: only then is 0 exact", whole_zero=False),
    "range_without_zero": _wrong(
        "an affine range must hold 0: from min(w, 0) to max(w, 0), or the zero point has no code", spans_zero=False
    ),
    "e8m0_rounded": _wrong("the shared scale of MX is ⌊log₂ max |w|⌋ − e_max: the exponent is cut off", e8m0="nearest"),
    "groups_along_rows": _wrong("groups are neighbours in a row, along the last dimension", along_rows=True),
    "short_group_dropped": _wrong("the last group of a row may be shorter, and needs a scale too", short="dropped"),
    "one_scale_for_all": _wrong("each row, or each group of a row, has a scale of its own", per="tensor"),
    "zero_over_zero": _wrong("a group of zeros has scale 0, and 0 / 0 is NaN: take another scale", zero_over_zero=True),
    "mean_of_scales_forgotten": _wrong("double quantization takes the mean off the scales: add it again", mean=False),
    "no_global_scale": _wrong(
        "nvfp4's block scales are e4m3 numbers times one float32, max |w| / (6 · 448): alone they underflow",
        global_scale=False,
    ),
    "truncated": _wrong("round to the nearest, do not cut off", truncate=True),
}


def contract(name: str, reference: Callable[..., Any]) -> Contract:
    """The contract of rounding to nearest, for one implementation of it."""
    return Contract(
        name=name,
        signature=SIGNATURE,
        reference=reference,
        cases=CASES,
        inputs=inputs,
        call=call,
        oracle=oracle,
        tolerance=tolerance,
        wrong=WRONG,
        compare={"dequantized": compare},
    )
