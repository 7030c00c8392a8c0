"""The contract of `kernels.matmul`: a product of two matrices, of any sizes, for a kernel that works in tiles.

The sizes are odd, small and mixed on purpose: a tile that is not full is where kernels go wrong. The oracle is NumPy's
float64 product. The tolerance is a rounding of the result and, for the sums, float32's error bound with √k in place of
k, since roundings go both ways: Σ |a|·|b| times float32's unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mlsys.contracts.core import Case, Contract, Inputs, Mismatch, Results, Wrong

SIGNATURE = "matmul(a (m, k), b (k, n)) -> (m, n)"
BLOCK, SMALL = 32, 16  # of the wrong variants' tiles
GROUP = 2  # rows of tiles that one of them takes together


def case(m: int, n: int, k: int, *, dtype: str = "float32", special: str = "none") -> Case:
    """One case.

    special: a or b as a view with its axes swapped, a NaN beside zeros, numbers that only add up, or sums whose second
    half takes away nearly all of the first.
    """
    return {"m": m, "n": n, "k": k, "dtype": dtype, "special": special}


CASES = [
    case(32, 32, 32),
    case(64, 96, 128),
    case(40, 24, 56),  # an edge each way
    case(5, 123, 77),  # no multiple of anything
    case(129, 65, 33),
    case(1, 1, 1),
    case(1, 70, 300),
    case(70, 1, 300),
    case(33, 47, 1),
    case(48, 80, 64, special="a swapped"),
    case(48, 80, 64, special="b swapped"),
    case(34, 50, 66, special="nan"),
    case(3, 4, 0),
    case(0, 4, 3),
    case(3, 0, 4),
    case(64, 64, 512, dtype="bfloat16", special="positive"),
    case(37, 50, 90, dtype="bfloat16"),
    case(66, 130, 72, dtype="bfloat16", special="b swapped"),
    case(24, 30, 256, dtype="bfloat16", special="cancelling"),  # what is left is smaller than a rounding of either half
]


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Two random matrices; swapped axes are contiguous memory read the other way round."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, case["dtype"])

    def draw(rows: int, columns: int, swapped: bool) -> Tensor:
        shape = (columns, rows) if swapped else (rows, columns)
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)
        return x.T if swapped else x

    a = draw(case["m"], case["k"], case["special"] == "a swapped")
    b = draw(case["k"], case["n"], case["special"] == "b swapped")
    if case["special"] == "positive":  # the sum grows, and with it what a narrow sum loses at each step
        a, b = a.abs(), b.abs()
    if case["special"] == "cancelling":
        half = case["k"] // 2
        a[:, half:], b[half:] = (a[:, :half].float() * (1 + 1 / 64)).to(dtype), -b[:half]
    if case["special"] == "nan":
        a[:, 3] = 0.0
        b[3, 7], b[4, 9] = math.nan, math.inf
    return {"a": a, "b": b}


def call(impl: Callable[..., Any], inputs: Inputs) -> Results:
    """The product, with the shape and dtype that it has to have."""
    a, b = inputs["a"], inputs["b"]
    got = impl(a, b)
    if not isinstance(got, Tensor):
        raise Mismatch(f"returned {type(got).__name__}, expected a tensor (m, n)")
    if got.dtype != a.dtype:
        raise Mismatch(f"returned {got.dtype} for inputs of {a.dtype}: the result has the dtype of the inputs")
    if got.shape != (a.shape[0], b.shape[1]):
        raise Mismatch(f"returned shape {tuple(got.shape)}, expected (m, n) = {(a.shape[0], b.shape[1])}")
    return {"c": got.detach()}


def oracle(inputs: Inputs) -> Mapping[str, np.ndarray]:
    """NumPy's product in float64."""
    a, b = (inputs[name].detach().double().cpu().numpy() for name in "ab")
    with np.errstate(invalid="ignore"):
        return {"c": a @ b}


def tolerance(inputs: Inputs, name: str, want: np.ndarray) -> float:
    """A rounding of the largest element, and what sums of k float32 products may lose."""
    finite = np.abs(want[np.isfinite(want)])
    if not finite.size:
        return 0.0
    a, b = (np.nan_to_num(np.abs(inputs[name].double().cpu().numpy()), posinf=0.0) for name in "ab")
    lost = (4 + 2 * math.sqrt(a.shape[1])) * torch.finfo(torch.float32).eps / 2 * float((a @ b).max())
    return lost + torch.finfo(inputs["a"].dtype).eps / 2 * float(finite.max())


# --- wrong variants ---------------------------------------------------------------------------------------------------


def _tiles(
    a: Tensor,
    b: Tensor,
    *,
    tile: int = BLOCK,
    first: int = 0,
    k_rounded_down: bool = False,
    rows_rounded_down: bool = False,
    columns_rounded_down: bool = False,
    narrow: bool = False,
    round_tiles: bool = False,
    last_twice: bool = False,
    stale: bool = False,
    keep_sums: bool = False,
    skip_zeros: bool = False,
    round_each: bool = False,
    last_group_full: bool = False,
) -> Tensor:
    """A product in tiles in plain torch, with one knob for each mistake."""
    (m, k), n = a.shape, b.shape[1]
    wide = a.dtype if narrow else torch.promote_types(a.dtype, torch.float32)
    c = a.new_zeros(m, n)
    end = k // tile * tile if k_rounded_down else k
    total = a.new_zeros(tile, tile, dtype=wide)
    down, along = m // tile * tile if rows_rounded_down else m, n // tile * tile if columns_rounded_down else n
    for i, j in _places(down, along, tile, last_group_full):
        rows, columns = min(tile, m - i), min(tile, n - j)
        if not keep_sums:
            total = torch.zeros_like(total)
        before: Tensor | None = None
        for at in range(min(first, max(0, end - 1)), end, tile):
            left = F.pad(a[i : i + tile, at : at + tile], (0, max(0, at + tile - k), 0, tile - rows))
            right = F.pad(b[at : at + tile, j : j + tile], (0, tile - columns, 0, max(0, at + tile - k)))
            used = before if stale and before is not None else left
            product = _product(used.to(wide), right.to(wide), skip_zeros, narrow)
            total = total + (product.to(c.dtype).to(wide) if round_tiles else product)
            if round_each:
                total = total.to(c.dtype).to(wide)
            if last_twice and at + tile >= end:
                total = total + product
            before = left
        c[i : i + tile, j : j + tile] = total[:rows, :columns].to(c.dtype)
    return c


def _places(m: int, n: int, tile: int, last_group_full: bool) -> list[tuple[int, int]]:
    """Where the tiles of a result begin, in the order in which they are computed.

    last_group_full: in groups of GROUP rows of tiles, as if the last of them had as many: some are beyond the result.
    """
    if not last_group_full:
        return [(i, j) for i in range(0, m, tile) for j in range(0, n, tile)]
    down, along = -(-m // tile), -(-n // tile)
    found = []
    for place in range(down * along):
        group, inside = divmod(place, GROUP * along)
        found.append(((group * GROUP + inside % GROUP) * tile, inside // GROUP * tile))
    return [(i, j) for i, j in found if i < m]


def _product(a: Tensor, b: Tensor, skip_zeros: bool, narrow: bool) -> Tensor:
    if skip_zeros:
        terms = torch.where(a[:, :, None] == 0, torch.zeros((), dtype=a.dtype, device=a.device), a[:, :, None] * b)
        return terms.sum(1)
    if narrow:  # one product at a time, and the sum rounded after each
        total = a.new_zeros(a.shape[0], b.shape[1])
        for i in range(a.shape[1]):
            total = total + a[:, i, None] * b[i]
        return total
    return a @ b


def _wrong(hint: str, **knobs: Any) -> Wrong:
    return Wrong(lambda a, b: _tiles(a, b, **knobs), hint)


def _right(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() @ b.float()).to(a.dtype)


def _spilling(a: Tensor, b: Tensor) -> Tensor:
    """Whole tiles of columns are computed and stored: those beyond the edge come from, and go to, the next row."""
    m, (k, n) = a.shape[0], b.shape
    beyond = -n % BLOCK
    c = _right(a, b).flatten()
    if not beyond or not n:
        return c.view(m, n)
    memory = torch.cat([b.contiguous().flatten(), b.new_zeros(beyond)])
    at = torch.arange(k, device=b.device)[:, None] * n + n + torch.arange(beyond, device=b.device)
    spilled = _right(a, memory[at])  # (m, beyond)
    for row in range(m):  # the last threads to store win
        start = (row + 1) * n
        room = max(0, min(beyond, m * n - start))
        c[start : start + room] = spilled[row, :room]
    return c.view(m, n)


def _wrapping(a: Tensor, b: Tensor) -> Tensor:
    """Whole slices of k are added: what is beyond the edge is the first columns and rows again."""
    k = a.shape[1]
    lanes = torch.arange(-(-k // BLOCK) * BLOCK, device=a.device) % max(k, 1)
    return _right(a[:, lanes], b[lanes])


def _as_if_contiguous(a: Tensor, b: Tensor) -> Tensor:
    a, b = (x if x.is_contiguous() else x.T.contiguous().view(x.shape) for x in (a, b))
    return _right(a, b)


def _tf32(a: Tensor, b: Tensor) -> Tensor:
    """Factors rounded to 10 bits after the point, as tensor cores take float32 unless told otherwise."""
    if a.dtype != torch.float32:
        return _right(a, b)
    a, b = ((x.contiguous().view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32) for x in (a, b))
    return a @ b


def _bf16(a: Tensor, b: Tensor) -> Tensor:
    return (a.bfloat16().float() @ b.bfloat16().float()).to(a.dtype)


def _one_by_one(a: Tensor, b: Tensor) -> Tensor:
    return _product(a, b, skip_zeros=False, narrow=True)


def _rounded_products(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, :, None] * b).float().sum(1).to(a.dtype)


def _empty_sum(a: Tensor, b: Tensor) -> Tensor:
    return _right(a, b) if a.shape[1] else torch.full((a.shape[0], b.shape[1]), 7.0, dtype=a.dtype, device=a.device)


# What is forgotten at the edges depends on where they are: with tiles of two sizes.
EDGES: dict[str, tuple[str, dict[str, bool]]] = {
    "no_k_remainder": (
        "the last slice of k is shorter than the others, but it counts: round the number of slices up, and load zeros "
        "beyond the edge",
        {"k_rounded_down": True},
    ),
    "edge_rows_dropped": (
        "the last tile of rows is not full, but it counts: the grid has ⌈m / tile⌉ blocks",
        {"rows_rounded_down": True},
    ),
    "edge_columns_dropped": (
        "the last tile of columns is not full, but it counts: the grid has ⌈n / tile⌉ blocks",
        {"columns_rounded_down": True},
    ),
    "all_edges_dropped": (
        "the last tiles of rows, of columns and of k are not full, but they count: round all three numbers up, load "
        "zeros beyond the edges, and store nothing there",
        {"k_rounded_down": True, "rows_rounded_down": True, "columns_rounded_down": True},
    ),
}
NARROW = "sum in float32 and round once: bfloat16 has 8 bits, and loses most of what it adds to a sum"
ROUNDED = "a product of two tiles is rounded to bfloat16 before it is added: let it be float32 too, and round once"
WRONG = {
    **{name: _wrong(hint, **knobs) for name, (hint, knobs) in EDGES.items()},
    **{f"{name}_{SMALL}": _wrong(hint, tile=SMALL, **knobs) for name, (hint, knobs) in EDGES.items()},
    "k_tail_not_masked": Wrong(
        _wrapping,
        "lanes beyond the edge along k are added to every sum: load zeros there. Rows and columns beyond the edge may "
        "hold anything, since they are not stored",
    ),
    "last_group_taken_as_full": _wrong(
        "tiles are taken in groups of rows, and the last group may have fewer rows: divide by those it has, or tiles "
        "beyond the result are computed in place of some of it",
        last_group_full=True,
    ),
    "epilogue_in_the_loop": _wrong(
        "the sum is complete behind the loop over k, not in it: round there and once, and add a bias and apply an "
        "activation there, too",
        round_each=True,
    ),
    "first_slice_forgotten": _wrong("the slices of k begin at 0: the first is not multiplied", first=BLOCK),
    "last_slice_twice": _wrong(
        "the last slice of k is added twice: is it still in the pipeline when the loop ends?", last_twice=True
    ),
    "edge_columns_spill": Wrong(
        _spilling, "threads beyond the last column must not store: in memory, column n of a row is the next row's first"
    ),
    "b_transposed": Wrong(
        lambda a, b: _right(a, b.contiguous().view(b.shape[1], b.shape[0]).T),
        "b is (k, n), row after row: element (i, j) lies at i·n + j, not at j·k + i",
    ),
    "a_transposed": Wrong(
        lambda a, b: _right(a.contiguous().view(a.shape[1], a.shape[0]).T, b),
        "a is (m, k), row after row: element (i, j) lies at i·k + j, not at j·m + i",
    ),
    "a_and_b_swapped": Wrong(
        lambda a, b: _right(b, a) if a.shape == b.shape == b.T.shape else _right(a, b),
        "the product is a @ b, not b @ a: rows are those of a, columns those of b",
    ),
    "result_by_columns": Wrong(
        lambda a, b: _right(a, b).T.contiguous().view(a.shape[0], b.shape[1]),
        "the result is stored row after row: element (i, j) lies at i·n + j, not at j·m + i",
    ),
    "strides_ignored": Wrong(
        _as_if_contiguous, "a view has strides of its own: call contiguous() before the kernel gets its memory"
    ),
    "narrow_sums": _wrong(NARROW, narrow=True),
    "narrow_sums_one_by_one": Wrong(_one_by_one, NARROW),
    "rounded_products": Wrong(
        _rounded_products,
        "a product of two bfloat16 numbers is exact in float32: widen the factors before they are multiplied",
    ),
    "rounded_tiles": _wrong(ROUNDED, round_tiles=True),
    f"rounded_tiles_{SMALL}": _wrong(ROUNDED, round_tiles=True, tile=SMALL),
    "tf32": Wrong(_tf32, "the factors are rounded to 10 bits, as TF32 and float16 have: float32 means float32"),
    "bfloat16_factors": Wrong(_bf16, "the factors are rounded to bfloat16's 8 bits: float32 means float32"),
    "sums_not_reset": _wrong("a block's sums begin at 0 for each of its tiles", keep_sums=True),
    "stale_tile": _wrong(
        "the products use the tile of A before: a barrier is missing between the loads and the products, or a wait",
        stale=True,
    ),
    "zeros_skipped": _wrong("do not leave out products with 0: 0 · NaN is NaN, and 0 · ∞ too", skip_zeros=True),
    "k_zero": Wrong(_empty_sum, "with k = 0 every sum is empty, and an empty sum is 0: store it"),
}


def contract(name: str, reference: Callable[..., Tensor]) -> Contract:
    """The contract under this name, which `mlsys.contracts.kernels` gives it."""
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
    )
