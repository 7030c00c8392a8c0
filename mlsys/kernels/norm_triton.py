"""LayerNorm and RMSNorm in Triton: a row is read once forward, and once backward; sums over rows without atomics.

Forward, a program takes a tile of whole rows: mean, then variance about it, then the result, all from registers. It
keeps the mean and 1/σ of each row for the backward pass. With x̂ = (x − μ) / σ and g = dy · weight,

    dx = (g − mean of g − x̂ · mean of g x̂) / σ        (RMSNorm: without the mean of g, and μ = 0)
    d weight = Σ_rows dy · x̂,     d bias = Σ_rows dy

The first needs sums over a row, the others over all rows: across programs. Atomic additions would come in any order and
round differently every time. Instead a program takes a group of rows, one tile after the other, and has the sums of its
group in registers; it writes them as one row of `partial`, and a second, small kernel adds those up in order:

                 columns                                  columns
              ┌───────────┐                            ┌───────────┐
    program 0 │ rows 0‥15 │ ─▶ dx,  partial[0, :]      │ partial   │
    program 1 │ rows16‥31 │ ─▶ dx,  partial[1, :]  ─▶  │ groups ↓ Σ│ ─▶ d weight
        ‥     │     ‥     │             ‥              └───────────┘

The idea of this kernel: a sum that crosses programs is two kernels, and the same bits every time.

Cost:
    Some 8 FLOPs a number forward, 14 backward.

Memory:
    Forward reads x and writes the result; backward reads x and dy and writes dx, and keeps 8 bytes a row; `partial` has
    `GROUPS` rows at most. Rows of up to `FITS` numbers.

Papers:
    Ba, Kiros & Hinton 2016, arXiv:1607.06450 (equations 3 and 4).
    Zhang & Sennrich 2019, arXiv:1910.07467 (equation 4: without the mean).
    Tillet, Kung & Cox 2019, "Triton: An Intermediate Language and Compiler for Tiled Neural Network Computations",
    MAPL (programs over tiles).

See also:
    `mlsys.kernels.norm` (the readable version, and Welford's rule), `mlsys.kernels.norm_cuda` (forward, in CUDA).
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
from mlsys.kernels.norm import check_inputs
from mlsys.kernels.softmax_triton import both_passes, rows_of

FITS = 16384  # numbers of a row that a program holds in registers
GROUPS = 264  # of rows in the backward pass: two programs for each multiprocessor of an H100

# numbers of a tile, and warps. Backward has x, dy and the sums over rows in registers at once: 16 a thread of each
FORWARD = ((2048, 4), (4096, 8), (8192, 8), (16384, 16))
BACKWARD = ((1024, 4), (2048, 4), (4096, 8), (8192, 16), (16384, 32))
CROWDED = "a thread of 1024 has 64 registers, and 16 numbers each of x, dy and the sums: some wait in the cache"
SUM = (config(ROWS=32, BLOCK=64, warps=4, stages=1),)


def norm(
    x: Float[Tensor, "... n"],
    weight: Float[Tensor, " n"],
    bias: Float[Tensor, " n"] | None = None,
    *,
    eps: float = 1e-5,
    kind: str = "layernorm",
    config: Config | None = None,
) -> Float[Tensor, "... n"]:
    """LayerNorm or RMSNorm over x's last dimension, float32 or bfloat16; computed in float32, differentiable once.

    weight, bias: of x's dtype; a bias for `layernorm` only. eps: inside of the root. config: one of
    `configs("forward", n)`, for the forward pass; without it, it is tuned. TypeError, ValueError naming the argument;
    RuntimeError without a GPU or the interpreter.
    """
    check_inputs(x, weight, bias, eps, kind)
    on_device("norm", x=x, weight=weight, bias=bias)
    if why := refuse(x):
        raise ValueError(why)
    if not x.numel():
        return x.clone()
    result: Tensor = _Norm.apply(x, weight, bias, float(eps), kind, config)
    return result


def refuse(x: Tensor, *others: Tensor, **options: Any) -> str | None:
    """Why these kernels cannot compute it, or None."""
    if x.shape[-1] <= FITS:
        return None
    return (
        f"x must have at most {FITS} numbers in a row for the Triton kernels, got {x.shape[-1]}: use mlsys.kernels.norm"
    )


def configs(direction: str, columns: int) -> tuple[Config, ...]:
    """The settings that may be taken for rows of this length, "forward" or "backward"."""
    block = next_power_of_2(columns)
    tiles = FORWARD if direction == "forward" else BACKWARD
    return tuple(
        config(ROWS=numbers // block, BLOCK=block, warps=warps, stages=1, why_spills=CROWDED if warps == 32 else "")
        for numbers, warps in tiles
        if block <= numbers <= max(4096, block)
    )


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str, config: Config | None
    ) -> Tensor:
        rows, weight = rows_of(x), weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        count, columns = rows.shape
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        mean = None if kind == "rmsnorm" else torch.empty(count, dtype=torch.float32, device=x.device)
        inverse = torch.empty(count, dtype=torch.float32, device=x.device)

        def run(config: Config) -> None:
            _forward[(triton.cdiv(count, config["ROWS"]),)](
                rows, weight, bias, out, mean, inverse, rows.stride(0), count, columns, eps, **config.options()
            )

        with at(x.device):
            run(tuned(f"{kind}.forward", _key(rows), configs("forward", columns), run, x.device, config))
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.biased = bias is not None
        ctx.kind = kind
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        differentiable_once("the Triton norm", "mlsys.kernels.norm")
        x, weight, mean, inverse = ctx.saved_tensors
        rows, dy = rows_of(x), rows_of(dy)
        count, columns = rows.shape
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        groups = min(GROUPS, count)
        each = triton.cdiv(count, groups)
        groups = triton.cdiv(count, each)
        wanted = ctx.needs_input_grad[1] or ctx.biased
        partial = torch.empty(2 if ctx.biased else 1, groups, columns, device=x.device) if wanted else None

        def run(config: Config) -> None:
            _backward[(groups,)](
                rows, dy, weight, mean, inverse, dx, partial,
                rows.stride(0), dy.stride(0), each, groups, count, columns, BIAS=ctx.biased, **config.options(),
            )  # fmt: skip

        with at(x.device):
            run(tuned(f"{ctx.kind}.backward", _key(rows), configs("backward", columns), run, x.device))
            sums: list[Tensor | None] = [None, None]
            if partial is not None:
                summed = torch.empty(partial.shape[0], columns, dtype=weight.dtype, device=x.device)
                (one,) = SUM
                grid = (triton.cdiv(columns, one["BLOCK"]), partial.shape[0])
                _sum_groups[grid](partial, summed, groups, columns, **one.options())
                sums[: len(summed)] = summed.unbind()
        return dx, *sums, None, None, None


def _key(rows: Tensor) -> str:
    count, columns = rows.shape
    return f"rows{size(count)} columns{size(columns)} {str(rows.dtype).removeprefix('torch.')}"


@triton.jit
def _forward(
    x, weight, bias, out, means, inverses, stride, count, columns, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < count) & (column < columns)
    wide = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    if means is not None:
        mean = tl.sum(wide, 1)[:, None] / columns
        tl.store(means + row, mean, mask=row < count)
        wide = tl.where(inside, wide - mean, 0.0)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 1)[:, None] / columns + eps)
    tl.store(inverses + row, inverse, mask=row < count)
    y = wide * inverse * tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(out + row * columns + column, narrow(y, out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x, dys, weight, means, inverses, dx, partial,
    x_stride, dy_stride, each, groups, count, columns,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    column = tl.arange(0, BLOCK)[None, :]
    known = column < columns
    scale = tl.load(weight + column, mask=known, other=0.0).to(tl.float32)
    d_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    d_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(0, bound(each), ROWS):
        within = start + tl.arange(0, ROWS)[:, None]
        row = group.to(tl.int64) * each + within
        mine = (within < each) & (row < count)
        inside = mine & known
        dy = tl.load(dys + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        xhat = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(inverses + row, mask=mine, other=0.0)
        if means is not None:
            xhat = tl.where(inside, xhat - tl.load(means + row, mask=mine, other=0.0), 0.0)
        xhat *= inverse
        g = dy * scale
        change = g - xhat * (tl.sum(g * xhat, 1)[:, None] / columns)
        if means is not None:
            change -= tl.sum(g, 1)[:, None] / columns
        tl.store(dx + row * columns + column, narrow(change * inverse, dx.dtype.element_ty), mask=inside)
        if partial is not None:
            d_weight += dy * xhat
            if BIAS:
                d_bias += dy
    if partial is not None:
        lane = tl.arange(0, BLOCK)
        tl.store(partial + group * columns + lane, tl.sum(d_weight, 0), mask=lane < columns)
        if BIAS:
            tl.store(partial + (groups + group) * columns + lane, tl.sum(d_bias, 0), mask=lane < columns)


@triton.jit
def _sum_groups(partial, out, groups, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    which = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(0, bound(groups), ROWS):
        group = start + tl.arange(0, ROWS)[:, None]
        inside = (group < groups) & (column < columns)
        sums += tl.load(partial + (which * groups + group) * columns + column, mask=inside, other=0.0)
    total = tl.sum(sums, 0)[None, :]
    tl.store(out + which * columns + column, narrow(total, out.dtype.element_ty), mask=column < columns)


def specimens() -> list[Specimen]:
    """The passes as they are compiled for rows of some lengths, with every config."""
    found = []
    shows = dict.fromkeys((80, 90), ("128-bit loads",))
    numbers = dict.fromkeys(("stride", "x_stride", "dy_stride", "each", "groups", "count", "columns"), "i32")
    wide = dict.fromkeys(("means", "inverses", "partial"), "*fp32")
    for kind, short, columns in (("layernorm", "bf16", 256), ("layernorm", "bf16", 4096), ("rmsnorm", "fp32", FITS)):
        narrow_names = ("x", "weight", "bias", "out", "dys", "dx")
        types = dict.fromkeys(narrow_names, f"*{short}") | wide | numbers | {"eps": "fp32"}
        no_mean: dict[str, Any] = {} if kind == "layernorm" else {"means": None}
        no_bias: dict[str, Any] = {} if kind == "layernorm" else {"bias": None}
        for direction, kernel, constants in (
            ("forward", _forward, no_mean | no_bias),
            ("backward", _backward, no_mean | {"BIAS": kind == "layernorm"}),
        ):
            names = kernel.arg_names
            aligned = tuple(
                name for name in names
                if name in types and name not in constants and name not in ("eps", "count", "each", "groups")
            )  # fmt: skip
            found += [
                Specimen(f"{kind}.{direction} {short} columns={columns}", kernel, types, one, constants, aligned, shows)
                for one in configs(direction, columns)
            ]
    types = {"partial": "*fp32", "out": "*bf16", "groups": "i32", "columns": "i32"}
    found += [
        Specimen("norm.sum_groups bf16", _sum_groups, types, one, aligned=("partial", "out", "columns"), shows=shows)
        for one in SUM
    ]
    return found


def typical(
    device: torch.device, dtype: torch.dtype, shape: Sequence[int] | None
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls to tune for, by what they are called: rows and columns, those given or usual ones. For `mlsys tune`."""
    for rows, columns in [shape] if shape else ((8192, 1024), (8192, 4096), (4096, 8192), (4096, 16384)):
        x = torch.randn(rows, columns, dtype=dtype, device=device, requires_grad=True)
        weight = torch.ones(columns, dtype=dtype, device=device, requires_grad=True)
        for kind in ("layernorm", "rmsnorm"):
            yield f"{kind} {rows} × {columns}", partial(both_passes, norm, x, weight, kind=kind)
