"""The Triton kernels of `mlsys.kernels.matmul_triton`: three ways to walk over the tiles of a product, one epilogue.

A store to `z`, the sums with the bias and before the activation, is made if it is not None: the backward pass needs
them. Strides are in numbers.

See also:
    `mlsys.kernels.matmul_triton` (which explains them), `mlsys.kernels._matmul_triton_launch` (which launches them).
"""
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from mlsys.kernels._triton import bound, dot, narrow


@triton.jit
def tiled(
    a, b, bias, c, z, m, n, k, a_m, a_k, b_k, b_n, bias_n, c_m,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A program for each tile of C. WHOLE: k is a multiple of BLOCK_K, so that no slice of it needs a mask."""
    i, j = place(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP)
    acc = sums(a, b, i, j, m, n, k, a_m, a_k, b_k, b_n, PRECISION, WHOLE, BLOCK_M, BLOCK_N, BLOCK_K)
    finish(acc, bias, c, z, i, j, m, n, bias_n, c_m, ACTIVATION, BLOCK_M, BLOCK_N)


@triton.jit
def persistent(
    a, b, bias, c, z, m, n, k, a_m, a_k, b_k, b_n, bias_n, c_m,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """As many programs as there are multiprocessors, each of which walks along the tiles; both loops become one."""
    down, along = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    for tile in tl.range(bound(tl.program_id(0)), bound(down * along), bound(tl.num_programs(0)), flatten=True):
        i, j = place(tile, down, along, GROUP)
        acc = sums(a, b, i, j, m, n, k, a_m, a_k, b_k, b_n, PRECISION, WHOLE, BLOCK_M, BLOCK_N, BLOCK_K)
        finish(acc, bias, c, z, i, j, m, n, bias_n, c_m, ACTIVATION, BLOCK_M, BLOCK_N)


@triton.jit
def descriptor(
    a, b, bias, c, z, m, n, k, bias_n,
    A_SWAPPED: tl.constexpr, B_SWAPPED: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The walk of `persistent`, where a, b, c and z are descriptors: one thread asks for a tile, and TMA brings it.

    SWAPPED: the descriptor is of the transposed matrix, whose rows are contiguous. A load fills up with zeros beyond
    the matrix, a store leaves out what is beyond: there are no masks, and no pointers in registers.
    """
    down, along = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    for tile in tl.range(bound(tl.program_id(0)), bound(down * along), bound(tl.num_programs(0)), flatten=True):
        i, j = place(tile, down, along, GROUP)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in tl.range(0, bound(k), BLOCK_K):
            left = a.load([start, i * BLOCK_M]).T if A_SWAPPED else a.load([i * BLOCK_M, start])
            right = b.load([j * BLOCK_N, start]).T if B_SWAPPED else b.load([start, j * BLOCK_N])
            acc = dot(left, right, acc, PRECISION)
        acc = with_bias(acc, bias, j, n, bias_n, BLOCK_N)
        if z is not None:
            z.store([i * BLOCK_M, j * BLOCK_N], narrow(acc, z.dtype))
        c.store([i * BLOCK_M, j * BLOCK_N], narrow(activated(acc, ACTIVATION), c.dtype))


@triton.jit
def place(tile, down, along, GROUP: tl.constexpr):
    """Row and column of the tile-th tile of C, of `down` × `along`: GROUP rows of tiles, column by column, then on."""
    group = tile // (GROUP * along)
    first = group * GROUP
    rows = tl.minimum(down - first, GROUP)  # the last group may have fewer
    inside = tile - first * along
    return first + inside % rows, inside // rows


@triton.jit
def sums(
    a, b, i, j, m, n, k, a_m, a_k, b_k, b_n, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tile (i, j) of a @ b, in float32. Rows and columns beyond the edge are the first ones again: nobody stores them.

    Not so along k, where a lane beyond the edge would be added to every sum: it must read a zero, from both.
    """
    row = ((i * BLOCK_M + tl.arange(0, BLOCK_M)) % m).to(tl.int64)
    column = ((j * BLOCK_N + tl.arange(0, BLOCK_N)) % n).to(tl.int64)
    inner = tl.arange(0, BLOCK_K)
    left = a + row[:, None] * a_m + inner[None, :].to(tl.int64) * a_k
    right = b + inner[:, None].to(tl.int64) * b_k + column[None, :] * b_n
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, bound(k), BLOCK_K):
        if WHOLE:
            acc = dot(tl.load(left), tl.load(right), acc, PRECISION)
        else:
            slice_of_a = tl.load(left, mask=(inner < k - start)[None, :], other=0.0)
            slice_of_b = tl.load(right, mask=(inner < k - start)[:, None], other=0.0)
            acc = dot(slice_of_a, slice_of_b, acc, PRECISION)
        left += tl.cast(a_k, tl.int64) * BLOCK_K
        right += tl.cast(b_k, tl.int64) * BLOCK_K
    return acc


@triton.jit
def finish(acc, bias, c, z, i, j, m, n, bias_n, c_m, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
           BLOCK_N: tl.constexpr):  # fmt: skip
    """The epilogue: what is done to a tile of sums while it is still in registers, and its only way to memory."""
    acc = with_bias(acc, bias, j, n, bias_n, BLOCK_N)
    row, column = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N)
    at = row[:, None].to(tl.int64) * c_m + column[None, :]
    inside = (row < m)[:, None] & (column < n)[None, :]
    if z is not None:
        tl.store(z + at, narrow(acc, z.dtype.element_ty), mask=inside)
    tl.store(c + at, narrow(activated(acc, ACTIVATION), c.dtype.element_ty), mask=inside)


@triton.jit
def with_bias(acc, bias, j, n, bias_n, BLOCK_N: tl.constexpr):
    """The sums, with a number for each column if there is a bias."""
    if bias is not None:
        column = j * BLOCK_N + tl.arange(0, BLOCK_N)
        acc += tl.load(bias + column.to(tl.int64) * bias_n, mask=column < n, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """The activation of a float32."""
    if ACTIVATION == "relu":
        y = tl.where(x < 0, 0.0, x)  # NaN stays NaN
    elif ACTIVATION == "silu":
        y = x * sigmoid(x)
    elif ACTIVATION == "gelu":
        y = x * 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu tanh":
        y = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # (1 + tanh u)/2 is the sigmoid of 2u
    else:
        y = x
    return y


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """The activation's derivative at x."""
    if ACTIVATION == "relu":
        d = tl.where(x <= 0, 0.0, 1.0)  # of y as of x: they have one sign
    elif ACTIVATION == "silu":
        s = sigmoid(x)
        d = s * (1 + x * (1 - s))
    elif ACTIVATION == "gelu":
        d = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        tl.static_assert(ACTIVATION == "gelu tanh")
        s = sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        d = s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    return d


@triton.jit
def sigmoid(x):
    """1 / (1 + e⁻ˣ), by the exponential of a number that is not positive, which cannot overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def before_activation(
    dy, z, dz, m, n, dy_m, dy_n, z_m, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient dz = dy · activation'(z), of which those of a, b and bias are made: a tile a program."""
    along = tl.cdiv(n, BLOCK_N)
    row = tl.program_id(0) // along * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % along * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < m)[:, None] & (column < n)[None, :]
    row, column = row[:, None].to(tl.int64), column[None, :].to(tl.int64)
    x = tl.load(z + row * z_m + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dy + row * dy_m + column * dy_n, mask=inside, other=0.0).to(tl.float32)
    tl.store(dz + row * z_m + column, narrow(g * slope(x, ACTIVATION), dz.dtype.element_ty), mask=inside)
