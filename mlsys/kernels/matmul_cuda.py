"""The ladder of matmul kernels: how each is launched, and what it takes.

Ten files, one rung each. Every one computes the same product, changes one thing against the rung before, and says so
in its first lines. In the worklog that the float32 rungs follow, such steps went from 1% of cuBLAS's speed to 94%.

    naive         one thread an element; a warp's threads in 32 rows of A
    coalesced     a warp's threads in 32 columns of B: 5 sectors where there were 33
    tiled         a block keeps what it loads in shared memory
    tiled_1d      a thread computes 8 elements of a column, and asks shared memory half as often
    tiled_2d      a thread computes 8 × 8
    vectorized    float4 loads and stores, the tile of A transposed
    warp_tiled    a tile a warp, no bank conflicts, the next tile on its way while this one is multiplied
    wmma          bfloat16 and tensor cores, load, barrier, multiply
    mma           ldmatrix, mma.sync, swizzled tiles, four stages of asynchronous copies
    hopper        TMA, mbarriers, wgmma, specialised warps, a persistent grid

A rung is data: its file, the tile of C that a block computes, its threads, its shared memory. `launch` makes the grid
of it, for any sizes; where they are no multiples of the tile, the kernels check their bounds.

Cost:
    2·m·n·k FLOPs. Global memory serves m·n·k·(1/tile_m + 1/tile_n) numbers (`matmul.traffic`), the plain rungs 2·m·n·k.

Memory:
    Nothing beside the inputs and the result, but copies of inputs that are not contiguous, or not aligned to 16
    bytes; and for `hopper`, whose rows have to be multiples of 16 bytes, of matrices whose rows are not.

Where it loses: below some 512 rows and columns there are fewer tiles than a GPU has multiprocessors, and a long k is
not split among them. cuBLAS has hundreds of kernels to choose from, these are ten. On a processor all of them run to
be looked at: their time there says nothing of a GPU's.

Papers:
    Boehm 2022, "How to Optimize a CUDA Matmul Kernel for cuBLAS-like Performance: a Worklog" (the steps in float32).
    Markidis et al. 2018, arXiv:1803.04014 (tensor cores by wmma).
    Bikshandi & Shah 2023, arXiv:2312.11918 (TMA and wgmma).
    Bauer, Cook & Khailany 2011, "CudaDMA: Optimizing GPU Memory Bandwidth via Warp Specialization", SC (loaders).

See also:
    `mlsys.kernels.matmul` (the idea, readable), `mlsys.kernels.cuda` (`check`, `profile`, `compile_report` of these
    files).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mlsys.kernels.matmul import check_inputs

__all__ = ["LADDER", "Launch", "Rung", "launch", "matmul", "refuse"]

MOST = 2**31 - 1
MOST_DOWN = 65535  # blocks in a grid's y


@dataclass(frozen=True)
class Launch:
    """What a kernel is launched with: an instance of its template, grid, block, bytes of dynamic shared memory."""

    instance: str
    grid: tuple[int, int]
    block: tuple[int, int]
    shared: int


@dataclass(frozen=True)
class Rung:
    """One rung.

    name:   of its file, `matmul.<name>.cu`, and its kernel, `matmul_<name>`.
    dtype:  of the inputs.
    tile:   rows and columns of C that a block computes; `template` the arguments of the kernel that follow from no
    input.
    block:  threads (x, y).
    shared: bytes of dynamic shared memory.
    whole:  whether the template also wants to know that all sizes are multiples of the tile; with this slice of k.
    out:    whether it wants the type of the result, which may then be float32 beside the dtype.
    order:  of the grid: "columns" x along the columns of C, "rows" x along its rows, "line" all tiles in one dimension,
            "persistent" one dimension of as many blocks as fit.
    capability: the oldest GPU that runs it.
    """

    name: str
    dtype: torch.dtype
    tile: tuple[int, int]
    template: tuple[int, ...]
    block: tuple[int, int]
    shared: int = 0
    whole: int = 0
    out: bool = False
    order: str = "columns"
    capability: tuple[int, int] = (7, 5)


def _stages(rows: int, columns: int, deep: int, stages: int) -> int:
    """Bytes of so many pairs of bfloat16 tiles."""
    return stages * (rows + columns) * deep * 2


FLOAT, BFLOAT = torch.float32, torch.bfloat16
SWIZZLED = 1024  # bytes at whose multiples a tile with the 128-byte swizzle begins
LADDER = {
    rung.name: rung
    for rung in (
        Rung("naive", FLOAT, (32, 8), (), (32, 8), order="rows"),
        Rung("coalesced", FLOAT, (8, 32), (), (32, 8)),
        Rung("tiled", FLOAT, (32, 32), (32,), (32, 32)),
        Rung("tiled_1d", FLOAT, (64, 64), (64, 64, 8, 8), (512, 1)),
        Rung("tiled_2d", FLOAT, (128, 128), (128, 128, 8, 8, 8), (256, 1)),
        Rung("vectorized", FLOAT, (128, 128), (128, 128, 8, 8, 8), (256, 1), whole=8),
        Rung("warp_tiled", FLOAT, (128, 128), (128, 128, 16, 64, 64), (128, 1), whole=16),
        Rung("wmma", BFLOAT, (128, 128), (128, 128, 32, 32, 64), (256, 1), out=True, capability=(8, 0)),
        Rung(
            "mma",
            BFLOAT,
            (128, 256),
            (128, 256, 32, 64, 64, 4),
            (256, 1),
            shared=_stages(128, 256, 32, 4),
            out=True,
            order="line",
            capability=(8, 0),
        ),
        Rung(
            "hopper",
            BFLOAT,
            (128, 256),
            (256, 4),
            (384, 1),
            shared=SWIZZLED + _stages(128, 256, 64, 4) + 128 * 128 * 2,  # the last: C on its way out
            order="persistent",
            capability=(9, 0),
        ),
    )
}


def launch(rung: Rung, m: int, n: int, k: int, *, out: torch.dtype | None = None, multiprocessors: int = 4) -> Launch:
    """How a rung is launched for a (m, k) times b (k, n), all at least 1. ValueError if that needs too many blocks."""
    down, along = -(-m // rung.tile[0]), -(-n // rung.tile[1])
    arguments: list[Any] = list(rung.template)
    if rung.whole:
        whole = m % rung.tile[0] == 0 and n % rung.tile[1] == 0 and k % rung.whole == 0
        arguments.append("true" if whole else "false")
    if rung.out:
        arguments.append("float" if out == FLOAT else "__nv_bfloat16")
    grids = {
        "columns": (along, down),
        "rows": (down, along),
        "line": (down * along, 1),
        "persistent": (min(down * along, multiprocessors), 1),
    }
    x, y = grids[rung.order]
    if y > MOST_DOWN or x > MOST:
        raise ValueError(
            f"a ({m}, {k}) times b ({k}, {n}) needs {x} × {y} blocks, more than a grid has: split the matrices"
        )
    name = f"matmul_{rung.name}"
    instance = f"{name}<{', '.join(map(str, arguments))}>" if arguments else name
    return Launch(instance, (x, y), rung.block, rung.shared)


def matmul(a: Tensor, b: Tensor, *, variant: str | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """The product (m, n) of a (m, k) and b (k, n) by one of the kernels, on the GPU or the processor: where they are.

    variant: a rung of `LADDER`; by default the last that takes the dtype and that the device can run.
    out_dtype: of the result, that of the inputs by default; `wmma` and `mma` also give the float32 of their sums.
    Inputs that are not contiguous, or begin at no multiple of 16 bytes, are copied. With k = 0 the result is zeros.
    ValueError or TypeError naming the argument, also if a gradient might be asked for, since there is none.
    """
    check_inputs(a, b)
    rung = _rung(variant) if variant is not None else _last(a)
    if why := refuse(a, b, rung.name):
        raise ValueError(f"variant {rung.name!r} cannot compute this: {why}")
    out_dtype = out_dtype or a.dtype
    if out_dtype != a.dtype and not (rung.out and out_dtype == FLOAT):
        also = " or torch.float32" if rung.out else ""
        raise ValueError(
            f"out_dtype must be {a.dtype}{also} for variant {rung.name!r}, got {out_dtype}: convert the result"
        )
    (m, k), n = a.shape, b.shape[1]
    if 0 in (m, n, k):
        return a.new_zeros(m, n, dtype=out_dtype)
    a, b = a.detach(), b.detach()
    if rung.name == "hopper":
        return _with_tensor_maps(rung, a, b)
    c = a.new_empty(m, n, dtype=out_dtype)
    how = launch(rung, m, n, k, out=out_dtype)
    _kernel(rung.name, how.instance)(how.grid, how.block, m, n, k, _plain(a), _plain(b), c, shared=how.shared)
    return c


def arguments(a: Tensor, b: Tensor, variant: str) -> tuple[Any, Launch, tuple[Any, ...]]:
    """The kernel, its launch and its arguments, the last of them the result: for `check` and `profile`.

    No size may be 0, and for `hopper` k and n are multiples of 8. ValueError or TypeError as for `matmul`.
    """
    check_inputs(a, b)
    rung = _rung(variant)
    if why := refuse(a, b, variant):
        raise ValueError(f"variant {variant!r} cannot compute this: {why}")
    (m, k), n = a.shape, b.shape[1]
    if 0 in (m, n, k):
        raise ValueError(
            f"a and b must not be empty, got shapes {tuple(a.shape)} and {tuple(b.shape)}: nothing is launched"
        )
    c = a.new_empty(m, n)
    how = launch(rung, m, n, k)
    given = (_plain(a.detach()), _plain(b.detach()), c)
    return _kernel(rung.name, how.instance), how, (m, n, k, *(_maps(*given) if variant == "hopper" else given))


def refuse(a: Tensor, b: Tensor, variant: str) -> str | None:
    """Why a rung cannot multiply these, and what to do about it, or None. ValueError if there is no such rung."""
    rung = _rung(variant)
    if a.dtype != rung.dtype:
        others = ", ".join(other.name for other in LADDER.values() if other.dtype == a.dtype)
        remedy = f"convert the matrices{f', or take one of {others}' if others else ''}"
        return f"it takes {rung.dtype}, and a is {a.dtype}: {remedy}"
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return "it has no gradient: give a.detach() and b.detach(), or take variant 'torch'"
    if max(a.shape + b.shape) > MOST:
        return (
            f"sizes are ints of 32 bits, and the shapes are {tuple(a.shape)} and {tuple(b.shape)}: split the matrices"
        )
    if a.device.type == "cuda":
        have = torch.cuda.get_device_capability(a.device)
        if have < rung.capability or (rung.name == "hopper" and have[0] != 9):
            need = "9.0" if rung.name == "hopper" else "{}.{} or newer".format(*rung.capability)
            return f"it needs compute capability {need}, this GPU has {have[0]}.{have[1]}"
    elif a.device.type != "cpu":
        return f"kernels run on an NVIDIA GPU or the CPU, and a is on {a.device}"
    return None


def _rung(name: str) -> Rung:
    if name not in LADDER:
        raise ValueError(f"variant must be one of {', '.join(LADDER)}, got {name!r}")
    return LADDER[name]


def _last(a: Tensor) -> Rung:
    """The last rung that takes a's dtype and device."""
    able = [rung for rung in LADDER.values() if rung.dtype == a.dtype]
    if not able:
        raise TypeError(f"a must be float32 or bfloat16, for which there are kernels, got {a.dtype}: convert a and b")
    if a.device.type == "cuda":
        able = [r for r in able if refuse(a, a, r.name) is None] or able[:1]
    return able[-1]


@cache
def _file(name: str) -> Any:
    from mlsys.kernels.cuda import load, source

    return load(source(f"matmul.{name}"))


def _kernel(name: str, instance: str) -> Callable[..., None]:
    kernel: Callable[..., None] = _file(name)[instance]
    return kernel


def _plain(x: Tensor) -> Tensor:
    """Row after row without gaps, from a multiple of 16 bytes on: so that a row's first 16 bytes are one load."""
    x = x.contiguous().resolve_neg()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _with_tensor_maps(rung: Rung, a: Tensor, b: Tensor) -> Tensor:
    """For the rung that reads by TMA: rows are padded to multiples of 16 bytes, where they are not."""
    (m, k), n = a.shape, b.shape[1]
    wide_k, wide_n = -(-k // 8) * 8, -(-n // 8) * 8
    if wide_k != k:
        a = torch.nn.functional.pad(a, (0, wide_k - k))
    if (wide_k, wide_n) != (k, n):
        b = torch.nn.functional.pad(b, (0, wide_n - n, 0, wide_k - k))
    c = a.new_empty(m, wide_n)
    blocks = torch.cuda.get_device_properties(a.device).multi_processor_count if a.is_cuda else 4
    how = launch(rung, m, wide_n, wide_k, multiprocessors=blocks)
    maps = _maps(_plain(a), _plain(b), c)
    _kernel(rung.name, how.instance)(how.grid, how.block, m, wide_n, wide_k, *maps, shared=how.shared)
    return c if wide_n == n else c[:, :n].contiguous()


def _maps(a: Tensor, b: Tensor, c: Tensor) -> tuple[Any, Any, Any]:
    """Boxes as the kernel copies them: of a block's rows of A, and of 64 columns, 128 bytes, of all three."""
    from mlsys.kernels.cuda._tensor_map import tensor_map

    return tensor_map(a, box=(128, 64)), tensor_map(b, box=(64, 64)), tensor_map(c, box=(64, 64))
