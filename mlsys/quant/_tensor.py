"""A quantized matrix, as a plain record: codes, scales, zero points, and what they are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mlsys.quant._scheme import Scheme
from mlsys.quant.formats import E8M0, Format, Minifloat
from mlsys.quant.packing import pack, unpack

BLOCK = 1 << 16  # numbers worked on at a time on a processor, so that what is made in between stays in its cache
MOST = torch.finfo(torch.float32).max / 2


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """What `quantize` makes of a tensor. Rows are the last dimension: R rows of K numbers, G groups of a row.

    codes:   uint8 (R, ⌈K·bits/8⌉), side by side as `packing` says; int16 (R, K) for bf16 and fp16.
    scale:   (R, G), or (1, 1) if all share one: a float tensor, e8m0 codes (uint8), a QuantizedTensor, or None.
    zero:    (R, G) zero points of "affine" schemes: uint8, or float where a method fits them (HQQ); else None.
             (Of double-quantized scales: (1, 1), the mean that was taken off them.)
    shape:   of the tensor that it stands for.
    scheme:  how to read all this.
    """

    codes: Tensor
    scale: Tensor | QuantizedTensor | None
    zero: Tensor | None
    shape: tuple[int, ...]
    scheme: Scheme

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor that the codes stand for: (code − zero) · scale, or the format's value times scale."""
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point one, got {dtype}")
        codes, scale, element = self.unpacked(), self.scales(), self.scheme.element
        out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        for part in blocks(codes):
            values = element.decode(codes[part])
            out[part] = apply_grid(values, of_rows(scale, part), of_rows(self.zero, part), self.scheme)
        return out.reshape(self.shape)

    def unpacked(self) -> Tensor:
        """One code an element: uint8 (R, K); int32 above 8 bits."""
        if self.scheme.bits > 8:
            return self.codes.int() & 0xFFFF
        return unpack(self.codes, self.scheme.bits, self.columns)

    def scales(self) -> Tensor | None:
        """The scales as float32 (R, G) or (1, 1), or None."""
        if isinstance(self.scale, QuantizedTensor):  # of double-quantized ones, groups of 256 run over all rows
            groups = (1, 1) if self.scheme.group == "tensor" else (self.rows, self.scheme.groups(self.columns))
            return self.scale.dequantize().reshape(groups)
        if self.scale is not None and self.scheme.scales == "e8m0":
            return E8M0.decode(self.scale)
        return None if self.scale is None else self.scale.float()

    @property
    def rows(self) -> int:
        """R."""
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """K."""
        return self.shape[-1]

    @property
    def nbytes(self) -> int:
        """Of codes, scales and zero points."""
        scale = 0 if self.scale is None else self.scale.nbytes
        return self.codes.nbytes + scale + (0 if self.zero is None else self.zero.nbytes)

    @property
    def bits_per_weight(self) -> float:
        """8 · nbytes / elements: with scales, zero points and what row ends lose; NaN if there are no elements."""
        elements = math.prod(self.shape)
        return 8 * self.nbytes / elements if elements else math.nan

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same on another device."""
        scale = None if self.scale is None else self.scale.to(device)
        zero = None if self.zero is None else self.zero.to(device)
        return replace(self, codes=self.codes.to(device), scale=scale, zero=zero)

    def __repr__(self) -> str:
        return f"QuantizedTensor({tuple(self.shape)}, {str(self.scheme)!r}, {self.bits_per_weight:.3f} bits per weight)"


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of a matrix, chosen before any code is.

    scale:   float32 (R, G) or (1, 1), as it will be read back from `stored`; None for bf16 and fp16.
    zero:    float32 (R, G) or (1, 1), or None.
    stored:  what is kept for `scale`.
    """

    scale: Tensor | None
    zero: Tensor | None
    stored: Tensor | QuantizedTensor | None


def blocks(x: Tensor) -> Iterator[slice]:
    """Slices of the rows of x (R, K), of about BLOCK numbers each; all rows in one on a GPU."""
    rows, columns = x.shape
    step = rows if x.is_cuda else BLOCK // max(columns, 1)
    step = max(step, 1)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def of_rows(per_group: Tensor | None, part: slice) -> Tensor | None:
    """The scales or zero points of these rows: (1, 1) is for all of them."""
    return per_group if per_group is None or per_group.shape[0] == 1 else per_group[part]


def spread(per_group: Tensor, columns: int, size: int) -> Tensor:
    """(R, G) → (R, K): each group's number for each of its columns; (1, 1) stays, and a whole row's is (R, 1)."""
    if per_group.shape[1] <= 1:
        return per_group
    rows, groups = per_group.shape
    return per_group[:, :, None].expand(rows, groups, size).reshape(rows, groups * size)[:, :columns]


def apply_grid(values: Tensor, scale: Tensor | None, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """From values of the element format (R, K) to those of the tensor."""
    if scale is None:
        return values
    columns = values.shape[1]
    size = scheme.group_size(columns)
    if zero is not None and scheme.affine:
        values = values - spread(zero.float(), columns, size)
    values = values * spread(scale, columns, size)
    return values + zero if zero is not None and not scheme.affine else values


def encode(x: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """The nearest code of each of x (R, K), unpacked. Where a scale was lost (it is not above 0), the code of 0."""
    element = scheme.element
    scale = grid.scale
    if scale is not None:
        scale = torch.where(scale > 0, scale, math.inf)
    codes = torch.empty(x.shape, dtype=torch.uint8 if element.bits <= 8 else torch.int32, device=x.device)
    for part in blocks(x):
        codes[part] = _encode(x[part], of_rows(scale, part), of_rows(grid.zero, part), scheme, element)
    return codes


def _encode(x: Tensor, scale: Tensor | None, zero: Tensor | None, scheme: Scheme, element: Format) -> Tensor:
    if scale is None:
        return element.encode(x)
    columns = x.shape[1]
    size = scheme.group_size(columns)
    scaled = x / spread(scale, columns, size)
    return element.encode(scaled if zero is None else scaled + spread(zero, columns, size))


def assemble(codes: Tensor, grid: Grid, shape: tuple[int, ...], scheme: Scheme) -> QuantizedTensor:
    """The record of unpacked codes (R, K)."""
    zero = grid.zero
    if zero is not None and bool((zero == zero.to(torch.uint8)).all()):
        zero = zero.to(torch.uint8)
    packed = codes.to(torch.int16) if scheme.bits > 8 else pack(codes, scheme.bits)
    return QuantizedTensor(packed, grid.stored, zero, tuple(shape), scheme)


def choose_grid(x: Tensor, scheme: Scheme) -> Grid:
    """Scales (and zero points) that span what each group of x, float32 (R, K), holds.

    Symmetric: max |x| gets the largest code. Affine: 0 … 2^b − 1 span min(x, 0) … max(x, 0), so that 0 is exact.
    Where scales are kept in float32, a group of equal numbers is exact: its scale is their magnitude.
    ValueError for numbers so large that float32 might not hold what their codes stand for.
    """
    if scheme.scales == "none":
        return Grid(None, None, None)
    low, high = _ranges(x, scheme)
    element = scheme.element
    size = torch.maximum(low.abs(), high.abs())
    if size.numel() and float(size.max()) > MOST:
        raise ValueError(
            f"numbers up to {float(size.max()):.3g} cannot be quantized: keep them below {MOST:.3g}, half of what "
            "float32 holds"
        )
    if scheme.affine:
        wide = (high.clamp(min=0) - low.clamp(max=0)) / element.largest
    elif scheme.scales == "e8m0":
        wide = size  # of which `keep_scales` takes the exponent
    else:
        wide = size / element.largest
    equal = (low == high) & (scheme.scales == "fp32")
    scale, stored = keep_scales(torch.where(equal, size, wide), scheme)
    zero = None
    if scheme.affine:
        below = (-low.clamp(max=0) / torch.where(scale > 0, scale, math.inf)).round().clamp(0, element.largest)
        zero = torch.where(equal, (low < 0).double(), below).float()
    return Grid(scale, zero, stored)


def keep_scales(scale: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | QuantizedTensor]:
    """Scales, float64 (R, G), as the scheme keeps them: what is read back (float32), and what is kept.

    What is read back may be 0 or less only for "dq", where a scale that is far below the others can be lost. A scale
    of 0 (a group of zeros) becomes 1, or in formats where that would change what others get, the smallest there is.
    ValueError for scales that are too large for their format.
    """
    if scheme.scales == "e8m0":
        element = scheme.element
        assert isinstance(element, Minifloat)
        stored = E8M0.encode(torch.ldexp(scale, torch.tensor(1 - math.frexp(element.largest)[1])))  # over 2^e_max
        return E8M0.decode(stored), stored
    if scheme.scales in ("e4m3", "dq"):
        from mlsys.quant.rtn import quantize  # a quantized matrix's scales are a matrix

        if scheme.scales == "e4m3":
            kept = quantize(scale.float(), Scheme("fp8_e4m3", "tensor"))
            kept = replace(kept, codes=kept.codes.clamp(min=1))  # not 0, which would lose all of its group
            return kept.dequantize(), kept
        flat = scale.float().reshape(1, -1)
        mean = flat.mean(dtype=torch.float64).float().reshape(1, 1) if flat.numel() else flat.new_zeros(1, 1)
        kept = quantize(flat - mean, Scheme("dynamic8", 256))
        kept = replace(kept, zero=mean)
        return kept.dequantize().reshape(scale.shape), kept
    scale = torch.where(scale == 0, 1.0, scale)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[scheme.scales]
    limits = torch.finfo(dtype)
    if scale.numel() and float(scale.max()) > limits.max:
        raise ValueError(
            f"a scale of {float(scale.max()):.3g} is beyond {scheme.scales}'s {limits.max:.3g}: "
            "keep scales in bf16 or fp32"
        )
    stored = scale.clamp(min=limits.smallest_normal * limits.eps).to(dtype)  # at least the smallest subnormal
    return stored.float(), stored


def _ranges(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Smallest and largest of each group, float64 (R, G) or (1, 1)."""
    rows, columns = x.shape
    groups = (1, 1) if scheme.group == "tensor" else (rows, scheme.groups(columns))
    if not x.numel():
        empty = x.new_zeros(groups, dtype=torch.float64)
        return empty, empty
    if scheme.group == "tensor":
        low, high = torch.aminmax(x)
        return low.double().reshape(1, 1), high.double().reshape(1, 1)
    size = scheme.group_size(columns)
    whole = columns // size * size  # what is left over is the shorter last group
    parts = [x[:, :whole].reshape(rows, -1, size)] + [x[:, None, whole:]] * (whole < columns)
    low = torch.cat([part.amin(dim=2) for part in parts], dim=1)
    high = torch.cat([part.amax(dim=2) for part in parts], dim=1)
    return low.double(), high.double()


def check_matrix(name: str, w: Any) -> Tensor:
    """The matrix as float32 (R, K), rows one after the other. Errors for what cannot be quantized."""
    if not isinstance(w, Tensor):
        raise TypeError(f"{name} must be a torch tensor, got {type(w).__name__}")
    if not w.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {w.dtype}")
    if w.ndim == 0:
        raise ValueError(f"{name} must have at least one dimension, got a single number: reshape it to (1,)")
    if w.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {w.layout}: call .to_dense() first")
    if w.is_meta:
        raise TypeError(f"{name} must hold numbers, got a meta tensor: load its weights first")
    x = w.detach().float()
    if x.numel() and not all(math.isfinite(end) for end in torch.aminmax(x)):  # a NaN is both ends
        bad = (~torch.isfinite(x)).nonzero()[0].tolist()
        found = w[tuple(bad)].item()
        what = "must be finite" if not math.isfinite(found) else "must fit into float32"
        raise ValueError(f"{name} {what}, got {found} at {bad}: remove or clamp it first")
    return x.reshape(math.prod(w.shape[:-1]), w.shape[-1]).contiguous()
