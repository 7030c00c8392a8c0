"""Products with codes of 4 and 8 bits on a GPU, in Triton: numbers are made of codes in registers, and nowhere else.

A GPU has far more operations for a byte from memory than a processor has, so with a few rows of x the time is that of
the codes' bytes: what must not happen is that Ŵ is written out on the way, or that its registers are.

With more than a few rows a program computes a tile. W stands on the left, and x, transposed, on the right:

                          BLOCK_K columns                  BLOCK_M rows of x
                  ┌───────────────────────────┐           ┌───────┐
    BLOCK_N rows  │ codes, 2 of a byte        │  BLOCK_K  │  xᵀ   │      y (BLOCK_N, BLOCK_M)
    of W          │  (c − z) · s in registers │           │       │  ─▶  += W xᵀ
                  └───────────────────────────┘           └───────┘
                   one group: one z and one s a row         copied asynchronously, steps ahead

since tensor cores take their left factor from registers, where the codes are unpacked anyhow, and want at least 64 rows
of it, which W has even where x has one. A step along the columns never crosses a group.

The idea of this kernel: what is exact is kept exact. c − z is a whole number of at most 9 bits, which bfloat16 holds
(HQQ's zero points are not whole, and are rounded); so with few rows of x, or one scale a row of W, sums are scaled, in
float32, and not weights. And four bits need not be converted: written into the mantissa of 128 they are 128 + c, as
`_halves` explains. With `activations="int8"` both factors are int8 and a group's sum is int32: it is scaled when it is
complete, for what was scaled before could not be added exactly.

With up to 8 rows of x a second kernel may be faster, which needs no tensor cores: a program takes one row of x and a
few of W, in whole spans of a group, 16 bytes of codes a thread, and sums products in float32; so nothing goes by way of
shared memory but x. Which one is taken is measured (`mlsys tune`). And since a matrix of few rows has too few tiles to
fill a GPU, both can cut the columns into parts:

    programs    (rows of W, part 0)  (rows of W, part 1)  …     sums, (part, rows of x, rows of W)
    finish      part 0 + part 1 + …, in this order       the same bits with the same config; by atomics not

Rounding x to int8 is a kernel of its own, before: a row's scale must be known before its first number is rounded.

Not read: codes of 2, 3, 5, 6 and 7 bits, tables (nf4) and small floats; scales that are quantized themselves. There
`mlsys.quant.qlinear` writes out blocks of Ŵ.

Cost:
    2·M·N·K operations, by tensor cores if x is bfloat16, float16 or int8; float32 x stays float32, without them. Codes,
    scales and zero points are read once for each BLOCK_M rows of x, the later times mostly from the cache.

Memory:
    SPLIT · M · N numbers of 4 bytes, if the columns are cut into parts; (K + 4) · M bytes for x in int8.

Where it loses: with hundreds of rows the weights' bytes do not matter, and unpacking comes on top of a product in
bfloat16. Groups that no power of 2 from 16 on divides are read in masked steps.

Papers:
    Frantar et al. 2022, arXiv:2210.17323, section 5, "Practical Speedups" (weights dequantized as they are multiplied).
    Frantar et al. 2024, arXiv:2408.11743 (MARLIN: 4-bit weights with many rows, by tensor cores).
    Dettmers et al. 2022, arXiv:2208.07339, section 3.1 (a scale for each row of x and of W).
    Tillet, Kung & Cox 2019, "Triton: An Intermediate Language and Compiler for Tiled Neural Network Computations",
    MAPL (programs over tiles).

See also:
    `mlsys.quant.qlinear` (the readable version, and which path when), `mlsys.quant.packing` (which half of a byte).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from mlsys.kernels._triton import Config, Specimen, at, config, next_power_of_2, on_device
from mlsys.kernels._triton_tune import size, tuned
from mlsys.quant._qlinear_triton_kernels import finish, floats, gemv, integers, round_row
from mlsys.quant._tensor import QuantizedTensor
from mlsys.quant.qlinear import PreparedWeight, with_kernels

FEW = 8  # rows of x, up to which there is a choice of kernels
SPAN = 128  # columns that `gemv` sums at a time, at most
LEAST = 16  # columns that a tensor core takes at once (of int8: 32)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

ROUND = config(BLOCK=2048, warps=8, stages=1)
FINISH = config(BLOCK=512, warps=4, stages=1)
# BLOCK_G is for spans of SPAN columns, and more if they are shorter
GEMV = tuple(
    config(BLOCK_N=n, BLOCK_G=g, SPLIT=split, warps=warps, stages=1)
    for n, g, split, warps in ((8, 4, 4, 4), (8, 4, 1, 4), (4, 8, 1, 4), (16, 4, 8, 4), (8, 8, 2, 8))
)


def _tiles(*settings: tuple[int, int, int, int, int, int], why_spills: str = "") -> tuple[Config, ...]:
    return tuple(
        config(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, SPLIT=split, warps=warps, stages=stages, why_spills=why_spills)
        for m, n, k, split, warps, stages in settings
    )


# up to 16 rows of x, up to 64, and more
TILES = (
    _tiles((16, 64, 128, 4, 4, 4), (16, 64, 128, 1, 4, 4), (16, 128, 64, 8, 4, 4), (16, 64, 64, 8, 4, 5)),
    _tiles((32, 64, 64, 4, 4, 4), (64, 64, 64, 4, 4, 4), (64, 128, 64, 2, 4, 4), (64, 128, 64, 1, 8, 4)),
    _tiles((128, 128, 64, 1, 8, 3), (128, 64, 64, 1, 4, 4), (256, 64, 64, 1, 8, 3)),
)
WIDE = (  # float32 x: no tensor cores
    _tiles((16, 32, 32, 4, 4, 2), (16, 64, 32, 8, 4, 2)),
    _tiles((32, 64, 32, 2, 4, 2), (32, 32, 32, 4, 4, 2)),
    _tiles((64, 64, 32, 1, 8, 2), (64, 128, 16, 1, 8, 2)),
)


def qlinear(
    x: Tensor,
    qw: QuantizedTensor | PreparedWeight,
    bias: Tensor | None = None,
    *,
    activations: Literal["int8"] | None = None,
    config: Config | None = None,
) -> Tensor:
    """As `mlsys.quant.qlinear.qlinear`, by the Triton kernels: x (*rows, K) times qw (N, K), x Ŵᵀ + bias.

    x: float32, bfloat16 or float16, without a gradient. config: one of `configs(...)`, which also says which kernel;
    without it, it is tuned. ValueError for what the kernels cannot do; RuntimeError without a GPU or the interpreter.
    """
    return with_kernels(partial(product, config=config), x, qw, bias, activations)


def product(x: Tensor, qw: QuantizedTensor, bias: Tensor | None, rounded: bool, config: Config | None = None) -> Tensor:
    """Multiply x (M, K) with qw (N, K), and add the bias, in the dtype of x; nothing is empty. `rounded`: x by int8."""
    device = on_device("mlsys.quant.qlinear", x=x, codes=qw.codes)
    if config is not None:
        _check_config(config, configs(len(x), qw, x.dtype, rounded), rounded)
    rows = x.detach() if x.stride(1) == 1 else x.detach().contiguous()
    later = bias is not None and bias.requires_grad and torch.is_grad_enabled()  # the kernels have no gradient
    with at(device):
        factor, t = round_rows(rows) if rounded else (rows, None)
        y = _launch(factor, t, qw, None if later else bias, torch.float32 if later else x.dtype, config)
    return (y + bias).to(x.dtype) if later and bias is not None else y


def _check_config(config: object, able: Sequence[Config], rounded: bool) -> None:
    if not isinstance(config, Config):
        raise TypeError(f"config must be a Config or None, got {type(config).__name__}: take one of configs(…)")
    if {name for name, _ in config.constants} not in [{name for name, _ in one.constants} for one in able]:
        how = ", rounded=True" if rounded else ""
        raise ValueError(
            f"config must be of a kernel that this call may take, got {config}: take one of "
            f"configs(rows, qw, x.dtype{how})"
        )


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `mlsys.quant.qlinear.round_rows`, by a kernel; the scales are (M,)."""
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    t = torch.empty(len(x), dtype=torch.float32, device=x.device)
    with at(x.device):
        round_row[(len(x),)](x, codes, t, x.shape[1], x.stride(0), **ROUND.options())
    return codes, t


def configs(rows: int, qw: QuantizedTensor, dtype: torch.dtype, rounded: bool = False) -> tuple[Config, ...]:
    """The settings that may be taken for so many rows of x in this dtype; those with BLOCK_G are of `gemv`."""
    group, columns = _group(qw), qw.columns
    which = 0 if rows <= 16 else 1 if rows <= 64 else 2
    least = 32 if rounded else LEAST
    found = []
    for one in (TILES if rounded or dtype != torch.float32 else WIDE)[which]:
        block = fitting(one["BLOCK_K"], group, least)
        found.append(_changed(one, BLOCK_K=block, SPLIT=min(one["SPLIT"], triton.cdiv(columns, block))))
    span = _span(qw)
    if rows <= FEW and not rounded and span >= LEAST:
        few = [
            _changed(one, BLOCK_G=g, SPLIT=min(one["SPLIT"], triton.cdiv(columns, span * g)))
            for one in GEMV
            for g in (one["BLOCK_G"] * SPAN // span,)
        ]
        found = [*few, *found] if rows == 1 else [*found, *few]
    return tuple(dict.fromkeys(found))


def fitting(block: int, group: int, least: int) -> int:
    """The columns of a step, at most `block`, at least `least`: those that divide a group, if a power of 2 does."""
    if not group:
        return block
    halves = [block >> i for i in range(block.bit_length()) if block >> i >= least]
    return next((b for b in halves if group % b == 0), max(least, min(block, next_power_of_2(group))))


def _changed(one: Config, **constants: int) -> Config:
    return config(warps=one.warps, stages=one.stages, why_spills=one.why_spills, **dict(one.constants) | constants)


def _group(qw: QuantizedTensor) -> int:
    """How many columns share a scale; 0 if all of a row do."""
    return 0 if qw.scheme.groups(qw.columns) == 1 else qw.scheme.group_size(qw.columns)


def _span(qw: QuantizedTensor) -> int:
    """The columns that `gemv` sums at a time: a power of 2 that divides the group."""
    group = _group(qw)
    return min(SPAN, group & -group if group else max(LEAST, next_power_of_2(qw.columns)))


def _launch(
    x: Tensor, t: Tensor | None, qw: QuantizedTensor, bias: Tensor | None, dtype: torch.dtype, config: Config | None
) -> Tensor:
    """The product of x, float or with scales t int8, by the kernel that the config says."""
    (m, k), n = x.shape, qw.rows
    scheme, scale, zero = qw.scheme, qw.scale, qw.zero
    assert isinstance(scale, Tensor)
    codes = qw.codes if scheme.affine else qw.codes.view(torch.int8)
    codes = codes if codes.stride(1) == 1 else codes.contiguous()
    group = _group(qw)
    # one for all rows has the stride 0; groups of a row lie side by side
    scale, zero = (None if s is None else s.expand(n, -1) if len(s) == 1 else s for s in (scale, zero))
    assert scale is not None
    scale, zero = (s if s is None or s.stride(1) == 1 or s.shape[1] == 1 else s.contiguous() for s in (scale, zero))
    assert scale is not None
    bias = None if bias is None else bias.contiguous()
    numbers = (m, n, k, x.stride(0), codes.stride(0), scale.stride(0), 0 if zero is None else zero.stride(0))
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    common = {"BITS": scheme.bits, "GROUP": group}

    def run(config: Config) -> None:
        split, tile = config["SPLIT"], dict(config.constants)
        plain = t is not None and not group and zero is None  # sums of int32, to be scaled when they are complete
        to = out
        if split > 1:
            to = torch.empty(split, m, n, dtype=torch.int32 if plain else torch.float32, device=x.device)
        if "BLOCK_G" in tile:
            span = _span(qw)
            grid = (m * triton.cdiv(n, config["BLOCK_N"]), split)
            even = k % (span * config["BLOCK_G"]) == 0
            gemv[grid](x, codes, scale, zero, bias, to, *numbers, **common, SPAN=span, EVEN=even, **config.options())
        else:
            grid = (triton.cdiv(m, config["BLOCK_M"]) * triton.cdiv(n, config["BLOCK_N"]), split)
            even = k % config["BLOCK_K"] == 0 and group % config["BLOCK_K"] == 0
            kernel, given = (floats, (x,)) if t is None else (integers, (x, t))
            kernel[grid](*given, codes, scale, zero, bias, to, *numbers, **common, EVEN=even, **config.options())
        if split > 1:
            unscaled = t is not None and not group
            finish[(m, triton.cdiv(n, FINISH["BLOCK"]))](
                to, t if unscaled else None, scale if unscaled else None, bias, out, m, n, scale.stride(0),
                SPLIT=split, **FINISH.options(),
            )  # fmt: skip

    key = f"M{size(m)} N{size(n)} K{size(k)} {scheme} {str(x.dtype).removeprefix('torch.')}"
    run(tuned("qlinear.product", key, configs(m, qw, x.dtype, t is not None), run, x.device, config))
    return out


# --- what the compiler is shown, and what is tuned --------------------------------------------------------------------


def specimens() -> list[Specimen]:
    """The kernels with every config: 4-bit codes in groups of 128 with zero points, 8-bit ones with a scale a row."""
    found = [_specimen(gemv, "bf16", 4, one) for one in GEMV]
    found += [_specimen(gemv, "fp32", 8, GEMV[0]), _specimen(gemv, "bf16", 8, GEMV[0])]
    found += [_specimen(floats, "bf16", 4, one) for which in TILES for one in which]
    found += [_specimen(floats, "fp32", 4, one) for which in WIDE for one in which]
    found += [_specimen(floats, "fp16", 8, which[0]) for which in TILES]
    found += [_specimen(integers, "i8", 8, one) for which in TILES for one in which]
    found += [_specimen(integers, "i8", 4, which[0]) for which in TILES]
    found += [_specimen(gemv, "fp16", 8, GEMV[0], **RAGGED), _specimen(integers, "i8", 8, TILES[0][0], **RAGGED)]
    odd = _changed(TILES[0][0], BLOCK_K=16)
    found += [_specimen(floats, "fp16", 4, odd, **RAGGED, GROUP=group) for group in (7, 24)]
    types = dict.fromkeys(("t", "scale", "bias"), "*fp32") | {"parts": "*i32", "x": "*bf16", "codes": "*i8"}
    for name, kernel, one, constants in (("finish", finish, FINISH, {"SPLIT": 4}), ("round", round_row, ROUND, {})):
        signature = {x: {**types, "out": "*bf16"}.get(x, "i32") for x in kernel.arg_names}
        aligned = tuple(x for x in kernel.arg_names if signature[x] != "i32" or x in ("x_m", "columns", "count"))
        found.append(Specimen(f"qlinear.{name}", kernel, signature, one, constants, aligned))
    return found


RAGGED = {"EVEN": False, "rows": 1}  # masked, and one row of x, which Triton makes a constant


def _specimen(kernel: Any, dtype: str, bits: int, one: Config, **changed: Any) -> Specimen:
    """On whole tiles, with a bias; or with other constants, and codes of 8 bits from 0 up."""
    types = {"x": f"*{dtype}", "t": "*fp32", "scale": "*fp32", "bias": "*fp32", "zero": "*u8"}
    types |= {"codes": "*u8" if bits == 4 else "*i8", "out": "*bf16" if dtype == "i8" else f"*{dtype}"}
    if one["SPLIT"] > 1:
        types["out"] = "*i32" if dtype == "i8" and bits == 8 and not changed else "*fp32"
    constants: dict[str, Any] = {"BITS": bits, "GROUP": 128 if bits == 4 else 0, "EVEN": True}
    constants |= {"SPAN": SPAN} if kernel is gemv else {}
    constants |= changed if bits == 4 or changed else {"zero": None}
    types |= {"codes": "*u8"} if changed else {}
    names = kernel.arg_names
    marks: dict[int, tuple[str, ...]] = {80: ("mma.sync", "cp.async"), 90: ("wgmma", "cp.async")}
    if kernel is gemv:
        marks = dict.fromkeys((80, 90), ("128-bit loads",))
    aligned = (*types, "x_m", "c_n", "columns", "count")
    return Specimen(
        name=f"qlinear.{kernel.__name__} x={dtype} int{bits}"
        + ("" if kernel is gemv else f" rows<={one['BLOCK_M']}")
        + (f" ragged groups={constants['GROUP']}" if changed else ""),
        kernel=kernel,
        signature={x: types.get(x, "i32") for x in names},
        config=one,
        constants=constants,
        aligned=tuple(x for x in names if x in aligned and x not in constants),
        shows={} if changed or (kernel is floats and dtype == "fp32") else marks,
    )


def typical(
    device: torch.device, dtype: torch.dtype, shape: Sequence[int] | None
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Products to tune for, M × N × K, those given or usual ones, with int4 and int8 weights. For `mlsys tune`."""
    from mlsys.quant.rtn import quantize

    if shape is not None and len(shape) != 3:
        raise ValueError("it must be rows of x, rows and columns of the weight, such as 1x4096x4096")
    generator = torch.Generator(device).manual_seed(0)
    for m, n, k in [shape] if shape else [(m, *nk) for m in (1, 16, 512) for nk in ((4096, 4096), (14336, 4096))]:
        w = torch.randn(n, k, generator=generator, device=device)
        x = torch.randn(m, k, generator=generator, device=device).to(dtype)
        for scheme, activations in (("int4:g128", None), ("int8", None), ("int8", "int8")):
            label = f"{m} × {n} × {k}, {scheme}{', x in int8' if activations else ''}"
            yield label, partial(qlinear, x, quantize(w, scheme), activations=activations)  # type: ignore[arg-type]
