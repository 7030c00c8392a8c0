"""The contract of `kernels.transpose`: rows and columns exchanged, bit by bit, in memory of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlsys.contracts._kernels_common import draw, exact, result
from mlsys.contracts.core import Case, Contract, Inputs, Mismatch, Results, Wrong

SIGNATURE = "transpose(x (m, n)) -> (n, m), contiguous"
TILE = 32


def case(m: int, n: int, *, dtype: str = "float32") -> Case:
    """One case."""
    return {"m": m, "n": n, "dtype": dtype}


CASES = [
    case(2, 3),
    case(64, 64),
    case(64, 32),
    case(33, 65),
    case(1000, 3),
    case(3, 1000),
    case(1, 1),
    case(1, 40),
    case(40, 1),
    case(65, 40, dtype="bfloat16"),
    case(0, 5),
]


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Normal numbers, all different."""
    generator = torch.Generator().manual_seed(seed)
    return {"x": draw(generator, case["m"], case["n"], dtype=case["dtype"], device=device)}


def call(impl: Callable[..., Any], inputs: Inputs) -> Results:
    """The transpose, which must not be a view of x."""
    x = inputs["x"]
    out = result(impl(x), (x.shape[1], x.shape[0]), x.dtype)
    if x.numel() and out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        raise Mismatch("returned a view of x: nothing was moved; the transpose has memory of its own")
    if not out.is_contiguous():
        raise Mismatch(f"returned strides {out.stride()} for shape {tuple(out.shape)}: the result must be contiguous")
    return {"out": out}


def oracle(inputs: Inputs) -> Mapping[str, np.ndarray]:
    """By NumPy's axes."""
    return {"out": np.swapaxes(exact(inputs["x"]), 0, 1)}


def tolerance(inputs: Inputs, name: str, want: np.ndarray) -> float:
    """Nothing is computed, so nothing is rounded."""
    return 0.0


def _tiles(x: Tensor, place: Callable[[Tensor, int, int, Tensor], None]) -> Tensor:
    out = x.new_zeros(x.shape[1], x.shape[0])
    for i in range(0, x.shape[0], TILE):
        for j in range(0, x.shape[1], TILE):
            place(out, i, j, x[i : i + TILE, j : j + TILE])
    return out


def _full_only(out: Tensor, i: int, j: int, tile: Tensor) -> None:
    if tile.shape == (TILE, TILE):
        out[j : j + TILE, i : i + TILE] = tile.t()


def _same_place(out: Tensor, i: int, j: int, tile: Tensor) -> None:
    target = out[i : i + TILE, j : j + TILE]
    rows, columns = min(target.shape[0], tile.shape[1]), min(target.shape[1], tile.shape[0])
    target[:rows, :columns] = tile.t()[:rows, :columns]


def _not_turned(out: Tensor, i: int, j: int, tile: Tensor) -> None:
    target = out[j : j + TILE, i : i + TILE]
    rows, columns = min(target.shape[0], tile.shape[0]), min(target.shape[1], tile.shape[1])
    target[:rows, :columns] = tile[:rows, :columns]


def _last_missing(x: Tensor) -> Tensor:
    out = x.t().contiguous()
    out[-1:] = 0.0
    return out


WRONG = {
    "view": Wrong(lambda x: x.t(), "move the numbers: x.t() is only another way to read the same memory"),
    "reshape": Wrong(
        lambda x: x.reshape(x.shape[1], x.shape[0]).clone(),
        "out[j][i] = x[i][j]: a reshape keeps the numbers in the order in which they lie",
    ),
    "full_tiles_only": Wrong(
        lambda x: _tiles(x, _full_only),
        "tiles at the right and lower edge are not full: launch ⌈m / tile⌉ · ⌈n / tile⌉ of them, and test both indices",
    ),
    "tiles_stay": Wrong(
        lambda x: _tiles(x, _same_place), "exchange the indices of the block, too: tile (i, j) goes to (j, i)"
    ),
    "tiles_not_turned": Wrong(
        lambda x: _tiles(x, _not_turned), "read the tile by columns: tile[threadIdx.x][threadIdx.y] on the way out"
    ),
    "rotated": Wrong(lambda x: x.t().flip(0).contiguous(), "exchange the indices, do not count one of them backwards"),
    "last_row": Wrong(_last_missing, "j < n, not j < n − 1"),
}


def contract(name: str, reference: Callable[..., Any]) -> Contract:
    """The contract under this name, which `mlsys.contracts.kernels` gives it."""
    return Contract(name, SIGNATURE, reference, CASES, inputs, call, oracle, tolerance, WRONG)
