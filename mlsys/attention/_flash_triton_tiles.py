"""What the three Triton kernels of flash attention share: loading rows, and which pairs of a tile are visible.

Queries and keys are named by their place in their own sequence: query i of t stands at key i + s − t and sees the
keys from `left` before that to `right` after it, as in `_visible`. A side without a bound is left out when the kernel
is compiled.

See also:
    `mlsys.attention.flash_triton` (the kernels, explained), `mlsys.attention._visible` (the same for torch).
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from mlsys.kernels._triton import narrow

LOG2E = 1.4426950408889634


@triton.jit
def place(heads, blocks):
    """This program's block of rows, its head and its batch entry, as offsets of these may be large."""
    program = tl.program_id(0)
    return program % blocks, (program // blocks % heads).to(tl.int64), (program // blocks // heads).to(tl.int64)


@triton.jit
def ends(cumulative, b, length):
    """Where entry b begins and how long it is: the cumulative lengths of packed sequences say so, if there are any."""
    first = 0
    if cumulative is not None:
        first = tl.load(cumulative + b)
        length = tl.load(cumulative + b + 1) - first
    return tl.cast(first, tl.int64), length


@triton.jit
def rows(x, start, stop, row_stride, column_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr,
         MASKED: tl.constexpr):  # fmt: skip
    """x[start : start + ROWS, :SIZE], with zeros from column SIZE to COLUMNS and, if MASKED, from row `stop` on."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = x + tl.cast(start, tl.int64) * row_stride + row[:, None] * row_stride + column[None, :] * column_stride
    if MASKED:
        if SIZE == COLUMNS:
            tile = tl.load(at, mask=(start + row < stop)[:, None], other=0.0)
        else:
            tile = tl.load(at, mask=(start + row < stop)[:, None] & (column < SIZE)[None, :], other=0.0)
    elif SIZE == COLUMNS:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=(column < SIZE)[None, :], other=0.0)
    return tile


@triton.jit
def rows_of(x, b, head, start, stop, row_stride, column_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
            SIZE: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """`rows` of a pointer to the first row of a head; or, TMA, the same rows by a descriptor of the whole tensor.

    A descriptor knows the tensor's shape, so the hardware fills up with zeros, and one thread asks for the whole tile.
    """
    if TMA:
        tile = x.load([tl.cast(b, tl.int32), tl.cast(head, tl.int32), start, 0]).reshape(ROWS, COLUMNS)
    else:
        tile = rows(x, start, stop, row_stride, column_stride, ROWS, COLUMNS, SIZE, MASKED)
    return tile


@triton.jit
def put(x, tile, start, stop, row_stride, column_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
        SIZE: tl.constexpr):  # fmt: skip
    """x[start : min(start + ROWS, stop), :SIZE] = tile."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = x + tl.cast(start, tl.int64) * row_stride + row[:, None] * row_stride + column[None, :] * column_stride
    inside = (start + row < stop)[:, None] & (column < SIZE)[None, :]
    tl.store(at, narrow(tile, x.dtype.element_ty), mask=inside)


@triton.jit
def seen(i, j, t, s, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Whether query i and key j exist and meet; i and j are a column and a row of numbers, or the other way round."""
    visible = (i < t) & (j < s)
    if LEFT:
        visible &= j >= i + (s - t) - left
    if RIGHT:
        visible &= j <= i + (s - t) + right
    return visible


@triton.jit
def keys_of(m, t, s, left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LEFT: tl.constexpr,
            RIGHT: tl.constexpr):  # fmt: skip
    """The keys that queries from m on visit, as four places: masked tiles a … b, whole ones b … c, masked c … d."""
    first, last = m + (s - t), tl.minimum(m + BLOCK_M, t) - 1 + (s - t)  # where these queries stand
    a, b, c, d = 0, 0, s // BLOCK_N * BLOCK_N, s
    if RIGHT:
        c = tl.minimum(c, tl.maximum(first + right + 1, 0) // BLOCK_N * BLOCK_N)
        d = tl.maximum(tl.minimum(d, last + right + 1), 0)
    if LEFT:
        a = tl.maximum(first - left, 0) // BLOCK_N * BLOCK_N
        b = tl.minimum((tl.maximum(last - left, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N, d)
        c = tl.maximum(c, b)
    return a, b, c, d


@triton.jit
def queries_of(n, t, s, left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LEFT: tl.constexpr,
               RIGHT: tl.constexpr):  # fmt: skip
    """The queries that visit keys from n on, likewise; but a last tile that is not full needs no mask."""
    first, last = n - (s - t), tl.minimum(n + BLOCK_N, s) - 1 - (s - t)  # the queries that stand at these keys
    a, b, c, d = 0, 0, t, t
    if LEFT:
        c = tl.minimum(c, tl.maximum(first + left + 1, 0) // BLOCK_M * BLOCK_M)
        d = tl.maximum(tl.minimum(d, last + left + 1), 0)
    if RIGHT:
        a = tl.maximum(first - right, 0) // BLOCK_M * BLOCK_M
        b = tl.minimum((tl.maximum(last - right, 0) + BLOCK_M - 1) // BLOCK_M * BLOCK_M, d)
        c = tl.maximum(c, b)
    return a, b, c, d
