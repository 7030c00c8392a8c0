"""Softmax over rows in Triton: a row in one block of registers if it fits, else the online rule over blocks.

If a row fits, a program takes a tile of whole rows (many, if they are short), reads it once, and computes maximum,
exponentials, sum and quotient on what is in registers:

                     columns, rounded up to a power of 2
                    ┌──────────────────────────────┬────┐
    program p       │ x[row, 0 … n−1]              │ −∞ │   ROWS of them
                    └──────────────────────────────┴────┘
                     m = max,  e = exp(x − m),  e / Σe       ─▶  out

If it does not, a block walks along one row, twice. First it keeps a maximum and a sum right together, by the online
rule m' = max(m, x), d' = d · exp(m − m') + exp(x − m'), a pair (m, d) for each lane; the lanes' pairs are merged at the
end, by the same rule. Then it comes again for the quotients.

    program p       │ block │ block │ block │ bl‥‥│          one row

The idea of this kernel: what is fused is what is not written to memory. The backward pass needs only the result y,

    dx = y · (dy − Σ_j dy_j y_j),

a sum over the row and then a product for each number: it has the same two forms.

Cost:
    An exponential a number if the row fits, three if it does not; the backward pass 4 FLOPs a number.

Memory:
    x is read once and the result written once if a row fits, up to `FITS` numbers; else x is read twice. The backward
    pass keeps the result, and reads it and its gradient once, or twice.

Papers:
    Milakov & Gimelshein 2018, arXiv:1805.02867 (Algorithm 3: the online softmax; section 3.1: merging pairs).
    Tillet, Kung & Cox 2019, "Triton: An Intermediate Language and Compiler for Tiled Neural Network Computations",
    MAPL (programs over tiles).

See also:
    `mlsys.kernels.softmax` (the readable version), `mlsys.kernels.softmax_cuda` (the same in CUDA).
"""
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from mlsys.kernels._inputs import differentiable_once
from mlsys.kernels._triton import Config, Specimen, at, bound, config, narrow, next_power_of_2, on_device
from mlsys.kernels._triton_tune import size, tuned
from mlsys.kernels.softmax import check_inputs

FITS = 16384  # numbers of a row that a program holds in registers: 32 for each of 512 threads

# Whole rows: numbers of a tile, and warps, that is 8 to 32 numbers a thread
TILES = ((2048, 4), (4096, 8), (4096, 16), (8192, 16), (16384, 16))
LONG = tuple(
    config(BLOCK=block, warps=warps, stages=stages)
    for block, warps, stages in ((4096, 8, 2), (8192, 16, 2), (2048, 4, 3))
)


def softmax(x: Float[Tensor, "... n"], *, config: Config | None = None) -> Float[Tensor, "... n"]:
    """The softmax over the last dimension of x, float32 or bfloat16; computed in float32, and differentiable once.

    −∞ becomes 0; a row of nothing but −∞ has no softmax and becomes NaN, as in torch. config: one of `configs(n)`, for
    both passes; without it they are tuned, each for itself. TypeError, ValueError naming the argument; RuntimeError
    without a GPU or the interpreter.
    """
    check_inputs(x)
    on_device("softmax", x=x)
    if not x.numel():
        return x.clone()
    result: Tensor = _Softmax.apply(x, config)
    return result


def configs(columns: int) -> tuple[Config, ...]:
    """The settings that may be taken for rows of this length."""
    if columns > FITS:
        return LONG
    block = next_power_of_2(columns)
    most = max(4096, block)  # short rows: a few at a time, and enough programs to fill a GPU
    return tuple(
        config(ROWS=numbers // block, BLOCK=block, warps=warps, stages=1)
        for numbers, warps in TILES
        if block <= numbers <= most
    )


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, config: Config | None) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _launch("forward", (_forward, _forward_long), config, rows_of(x), out)
        ctx.save_for_backward(out)
        ctx.config = config
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        differentiable_once("the Triton softmax", "mlsys.kernels.softmax")
        (y,) = ctx.saved_tensors
        dx = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        _launch("backward", (_backward, _backward_long), ctx.config, rows_of(y), rows_of(dy), dx)
        return dx, None


def rows_of(x: Float[Tensor, "... n"]) -> Float[Tensor, "rows n"]:
    """The rows of x, each of them contiguous; a view of x if there is one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _launch(direction: str, kernels: tuple[Any, Any], config: Config | None, *tensors: Tensor) -> None:
    """Run the kernel for rows that fit, or the one for rows that do not. The last tensor is the result."""
    count, columns = tensors[0].shape
    kernel = kernels[columns > FITS]
    strides = [x.stride(0) for x in tensors[:-1]]

    def run(config: Config) -> None:
        blocks = count if columns > FITS else triton.cdiv(count, config["ROWS"])
        kernel[(blocks,)](*tensors, *strides, count, columns, **config.options())

    device = tensors[0].device
    with at(device):
        key = f"rows{size(count)} columns{size(columns)} {str(tensors[0].dtype).removeprefix('torch.')}"
        run(tuned(f"softmax.{direction}", key, configs(columns), run, device, config))


@triton.jit
def _forward(x, out, x_stride, count, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < count) & (column < columns)
    wide = tl.load(x + row * x_stride + column, mask=inside, other=-float("inf")).to(tl.float32)
    wide = tl.where(row < count, wide, 0.0)  # rows beyond the last: not −∞ − (−∞)
    e = tl.exp(wide - tl.max(wide, 1)[:, None])
    tl.store(out + row * columns + column, narrow(e / tl.sum(e, 1)[:, None], out.dtype.element_ty), mask=inside)


@triton.jit
def _forward_long(x, out, x_stride, count, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    out += row * columns
    lane = tl.arange(0, BLOCK)
    m = tl.full((BLOCK,), -float("inf"), tl.float32)
    d = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, bound(columns), BLOCK):
        wide = tl.load(x + start + lane, mask=start + lane < columns, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(m, wide)
        shift = tl.where(larger == -float("inf"), 0.0, larger)  # nothing but −∞ so far: the sum stays 0, not NaN
        d = d * tl.exp(m - shift) + tl.exp(wide - shift)
        m = larger
    top = tl.max(m, 0)
    total = tl.sum(d * tl.exp(m - tl.where(top == -float("inf"), 0.0, top)), 0)
    for start in tl.range(0, bound(columns), BLOCK):
        inside = start + lane < columns
        wide = tl.load(x + start + lane, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + start + lane, narrow(tl.exp(wide - top) / total, out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(y, dy, dx, y_stride, dy_stride, count, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < count) & (column < columns)
    p = tl.load(y + row * y_stride + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dy + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(p * g, 1)[:, None]
    tl.store(dx + row * columns + column, narrow(p * (g - mean), dx.dtype.element_ty), mask=inside)


@triton.jit
def _backward_long(y, dy, dx, y_stride, dy_stride, count, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    y += row * y_stride
    dy += row * dy_stride
    dx += row * columns
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, bound(columns), BLOCK):
        inside = start + lane < columns
        p = tl.load(y + start + lane, mask=inside, other=0.0).to(tl.float32)
        sums += p * tl.load(dy + start + lane, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(sums, 0)
    for start in tl.range(0, bound(columns), BLOCK):
        inside = start + lane < columns
        p = tl.load(y + start + lane, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy + start + lane, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + start + lane, narrow(p * (g - mean), dx.dtype.element_ty), mask=inside)


def specimens() -> list[Specimen]:
    """Both passes as they are compiled for rows of some lengths, with every config."""
    found = []
    for short, columns in (("bf16", 128), ("bf16", 4096), ("fp32", FITS), ("bf16", 131072)):
        pair = (_forward_long, _backward_long) if columns > FITS else (_forward, _backward)
        for pass_name, kernel, tensors in zip(
            ("forward", "backward"), pair, (("x", "out"), ("y", "dy", "dx")), strict=True
        ):
            strides = [f"{name}_stride" for name in tensors[:-1]]
            types = dict.fromkeys(tensors, f"*{short}") | dict.fromkeys((*strides, "count", "columns"), "i32")
            shows = dict.fromkeys((80, 90), ("128-bit loads",))
            found += [
                Specimen(
                    f"softmax.{pass_name} {short} columns={columns}",
                    kernel, types, one, aligned=(*tensors, *strides, "columns"), shows=shows,
                )
                for one in configs(columns)
            ]  # fmt: skip
    return found


def typical(
    device: torch.device, dtype: torch.dtype, shape: Sequence[int] | None
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls to tune for, by what they are called: rows and columns, those given or usual ones. For `mlsys tune`."""
    for rows, columns in [shape] if shape else ((4096, 1024), (4096, 4096), (4096, 16384), (1024, 131072)):
        x = torch.randn(rows, columns, dtype=dtype, device=device, requires_grad=True)
        yield f"{rows} × {columns}", partial(both_passes, softmax, x)


def both_passes(function: Callable[..., Tensor], x: Tensor, *others: Any, **options: Any) -> None:
    """Forward and backward, with x itself as the gradient that arrives."""
    function(x, *others, **options).backward(x.detach())
