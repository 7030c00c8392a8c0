"""The kernels of `mlsys.quant.qlinear_triton`: codes that become numbers in registers, on their way to a product.

A step along the columns never crosses from one group to the next, so that it has one scale and one zero point for each
row of W. Where groups and steps do not divide each other the last step of a group is a short one, masked.

See also:
    `mlsys.quant.qlinear_triton` (which explains and launches them).
"""
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from mlsys.kernels._triton import INTERPRETED, bound, dot, narrow


@triton.jit
def gemv(
    x, codes, scale, zero, bias, out, rows, count, columns, x_m, c_n, s_n, z_n,
    BITS: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One row of float x with BLOCK_N rows of W, in BLOCK_G spans of a group at a time: products and sums in float32.

    codes: uint8 or, where they are in two's complement, int8. GROUP: columns that share a scale, 0 for a whole row.
    EVEN:  a row is whole blocks of spans. out: as in `_stored`.
    """
    PACKED: tl.constexpr = 8 // BITS  # codes in a byte
    m = tl.program_id(0) % rows  # programs with the same rows of W are neighbours
    n = tl.program_id(0) // rows * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.where(n < count, n, 0)  # beyond the last row the first is read again, and not stored
    x += m.to(tl.int64) * x_m
    codes += row.to(tl.int64)[:, None, None] * c_n
    scale += row.to(tl.int64)[:, None] * s_n
    if zero is not None:
        zero += row.to(tl.int64)[:, None] * z_n

    spans = tl.cdiv(columns, SPAN)
    each = tl.cdiv(tl.cdiv(spans, SPLIT), BLOCK_G) * BLOCK_G
    first = tl.program_id(1) * each
    acc = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
    for start in tl.range(bound(first), bound(tl.minimum(first + each, spans)), BLOCK_G):
        span = start + tl.arange(0, BLOCK_G)
        byte = span[:, None] * (SPAN // PACKED) + tl.arange(0, SPAN // PACKED)[None, :]
        k = span[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
        group = tl.where(span < spans, span, 0) * SPAN // GROUP if GROUP else tl.zeros_like(span)
        if EVEN:
            c = tl.load(codes + byte[None])
            v = tl.load(x + k)
        else:
            c = tl.load(codes + byte[None], mask=byte[None] < tl.cdiv(columns, PACKED), other=0)
            v = tl.load(x + k, mask=k < columns, other=0.0)
        if BITS == 4:  # even columns are the lower halves, odd ones the upper
            c = tl.reshape(tl.join((c << 4) >> 4, c >> 4), (BLOCK_N, BLOCK_G, SPAN))
        w = c.to(tl.float32)
        if zero is not None:
            w -= tl.load(zero + group[None, :]).to(tl.float32)[:, :, None]
        s = tl.load(scale + group[None, :]).to(tl.float32)  # (BLOCK_N, BLOCK_G)
        acc += tl.sum(w * v.to(tl.float32)[None], 2) * s
    _stored(tl.sum(acc, 1), bias, out, m + tl.zeros_like(n), n, rows, count, SPLIT)


@triton.jit
def floats(
    x, codes, scale, zero, bias, out, rows, count, columns, x_m, c_n, s_n, z_n,
    BITS: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """A tile of W times a tile of float x, in the dtype of x, summed in float32: (BLOCK_N, BLOCK_M)."""
    # halves of bytes in whole bytes, whole zero points: 16 bits hold all that comes of them
    NARROW: tl.constexpr = x.dtype.element_ty.primitive_bitwidth == 16 and BITS == 4 and GROUP % 2 == 0
    WHOLE: tl.constexpr = zero is None or zero.dtype.element_ty == tl.uint8
    AFTER: tl.constexpr = BLOCK_M <= 32  # fewer sums than weights: these are not scaled, but their sums
    m, n, row = _place(rows, count, BLOCK_M, BLOCK_N)
    x += tl.where(m < rows, m, 0).to(tl.int64)[None, :] * x_m
    codes += row.to(tl.int64)[:, None] * c_n
    scale += row.to(tl.int64) * s_n
    if zero is not None:
        zero += row.to(tl.int64) * z_n
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first, last = _part(columns, GROUP, BLOCK_K, SPLIT)
    for step in tl.range(bound(first), bound(last)):
        start, stop, group = _columns(step, columns, GROUP, BLOCK_K)
        k = start + tl.arange(0, BLOCK_K)[:, None]
        v = tl.load(x + k) if EVEN else tl.load(x + k, mask=k < stop, other=0.0)
        if NARROW and WHOLE:
            w = _halves(codes, start, stop, EVEN, BLOCK_K, v.dtype)
        else:
            w = _unpacked(codes, start, stop, BITS, GROUP, EVEN, BLOCK_K).to(tl.float32)
        if zero is not None:
            w -= tl.load(zero + group).to(w.dtype)[:, None]
        if not EVEN:
            w = tl.where(start + tl.arange(0, BLOCK_K)[None, :] < stop, w, 0.0)
        if GROUP and AFTER:
            sums = dot(_narrowed(w, v.dtype), v, tl.zeros((BLOCK_N, BLOCK_M), tl.float32), "ieee")
            acc += sums * tl.load(scale + group).to(tl.float32)[:, None]
        elif GROUP:
            w = w.to(tl.float32) * tl.load(scale + group).to(tl.float32)[:, None]
            acc = dot(narrow(w, v.dtype), v, acc, "ieee")
        else:
            acc = dot(_narrowed(w, v.dtype), v, acc, "ieee")
    if not GROUP:  # one scale a row: once, at the end
        acc *= tl.load(scale).to(tl.float32)[:, None]
    _stored(acc, bias, out, m[None, :], n[:, None], rows, count, SPLIT)


@triton.jit
def integers(
    x, t, codes, scale, zero, bias, out, rows, count, columns, x_m, c_n, s_n, z_n,
    BITS: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """A tile of W times a tile of x, both int8, summed in int32; a group's sum is scaled when it is complete.

    t: (rows,) the scale of each row of x. With SPLIT > 1 and one scale a row, `out` gets sums that are not scaled yet.
    """
    # codes of 8 bits from 0 up have 128 taken off, to be int8; so has the zero point
    CENTRE: tl.constexpr = 128 if BITS == 8 and codes.dtype.element_ty == tl.uint8 else 0
    m, n, row = _place(rows, count, BLOCK_M, BLOCK_N)
    x += tl.where(m < rows, m, 0).to(tl.int64)[None, :] * x_m
    codes += row.to(tl.int64)[:, None] * c_n
    scale += row.to(tl.int64) * s_n
    if zero is not None:
        zero += row.to(tl.int64) * z_n
    whole = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)  # the sum of a row that is one group
    inputs = tl.zeros((BLOCK_M,), tl.int32)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first, last = _part(columns, GROUP, BLOCK_K, SPLIT)
    for step in tl.range(bound(first), bound(last)):
        start, stop, group = _columns(step, columns, GROUP, BLOCK_K)
        k = start + tl.arange(0, BLOCK_K)[:, None]
        q = tl.load(x + k) if EVEN else tl.load(x + k, mask=k < stop, other=0)
        c = _unpacked(codes, start, stop, BITS, GROUP, EVEN, BLOCK_K)
        c = (c ^ CENTRE).to(tl.int8, bitcast=True)
        if GROUP:
            y = dot(c, q, tl.zeros((BLOCK_N, BLOCK_M), tl.int32), "ieee").to(tl.float32)
            if zero is not None:
                z = tl.load(zero + group).to(tl.float32) - CENTRE
                y -= z[:, None] * tl.sum(q.to(tl.int32), 0).to(tl.float32)[None, :]
            acc += y * tl.load(scale + group).to(tl.float32)[:, None]
        else:
            whole = dot(c, q, whole, "ieee")
            if zero is not None:
                inputs += tl.sum(q.to(tl.int32), 0)
    if not GROUP:
        if zero is not None:
            acc = whole.to(tl.float32)
            acc -= (tl.load(zero).to(tl.float32) - CENTRE)[:, None] * inputs.to(tl.float32)[None, :]
        if SPLIT > 1:  # scaled when the parts are added
            _stored(whole if zero is None else acc, None, out, m[None, :], n[:, None], rows, count, SPLIT)
        else:
            factor = tl.load(scale).to(tl.float32)[:, None] * tl.load(t + m, mask=m < rows, other=0.0)[None, :]
            y = (whole.to(tl.float32) if zero is None else acc) * factor
            _stored(y, bias, out, m[None, :], n[:, None], rows, count, SPLIT)
    else:
        acc *= tl.load(t + m, mask=m < rows, other=0.0)[None, :]
        _stored(acc, bias, out, m[None, :], n[:, None], rows, count, SPLIT)


@triton.jit
def finish(parts, t, scale, bias, out, rows, count, s_n, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """The parts of each sum, added in their order; scaled by row of x and of W if t is given; and the bias."""
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < count
    total = tl.zeros((BLOCK,), parts.dtype.element_ty)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + (part * rows + m) * count + n, mask=inside, other=0)
    y = total.to(tl.float32)
    if t is not None:
        y *= tl.load(scale + n.to(tl.int64) * s_n, mask=inside, other=0.0).to(tl.float32) * tl.load(t + m)
    if bias is not None:
        y += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + m * count + n, narrow(y, out.dtype.element_ty), mask=inside)


@triton.jit
def round_row(x, codes, t, columns, x_m, BLOCK: tl.constexpr):
    """A row of x as integers −127 … 127 and a scale, as `round_rows` has it: by max |x|, and to the nearest, even one.

    A row that holds NaN or infinity has the scale NaN.
    """
    m = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    x += m * x_m
    codes += m * columns
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, bound(columns), BLOCK):
        size = tl.abs(tl.load(x + start + lane, mask=start + lane < columns, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, tl.where(size == size, size, float("inf")))
    top = tl.max(largest, 0)
    finite = top < float("inf")
    # div_rn, for `/` is off by an ulp or two on a GPU; 2⁻¹²⁶ is the smallest normal number
    step = tl.where(top > 0, tl.maximum(tl.div_rn(tl.where(finite, top, 127.0), 127.0), 1.1754943508222875e-38), 1.0)
    tl.store(t + m, tl.where(finite, step, float("nan")))
    for start in tl.range(0, bound(columns), BLOCK):
        inside = start + lane < columns
        wide = tl.load(x + start + lane, mask=inside, other=0.0).to(tl.float32)
        q = tl.div_rn(tl.where(finite, wide, 0.0), step + tl.zeros((BLOCK,), tl.float32))
        q = (q + 12582912.0) - 12582912.0  # 1.5 · 2²³: what is added to it is rounded to a whole number
        tl.store(codes + start + lane, q.to(tl.int8), mask=inside)


@triton.jit
def _place(rows, count, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which rows of x and of W, and the latter with 0 beyond the last.

    Programs with the same rows of W are neighbours, so that these are read from memory once.
    """
    tiles = tl.cdiv(rows, BLOCK_M)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    return m, n, tl.where(n < count, n, 0)


@triton.jit
def _part(columns, GROUP: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr):
    """The first step of this program's part of the columns, and the one after its last."""
    if GROUP == 0 or GROUP % BLOCK_K == 0:
        steps = tl.cdiv(columns, BLOCK_K)
    else:
        steps = tl.cdiv(columns, GROUP) * tl.cdiv(GROUP, BLOCK_K)
    each = tl.cdiv(steps, SPLIT)
    first = tl.program_id(1) * each
    return first, tl.minimum(first + each, steps)


@triton.jit
def _columns(step, columns, GROUP: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where a step begins, where what it may read ends, and its group."""
    if GROUP == 0:
        start, stop, group = step * BLOCK_K, columns, 0
    elif GROUP % BLOCK_K == 0:
        start, stop, group = step * BLOCK_K, columns, step * BLOCK_K // GROUP
    else:
        STEPS: tl.constexpr = (GROUP + BLOCK_K - 1) // BLOCK_K
        group = step // STEPS
        start = group * GROUP + step % STEPS * BLOCK_K
        stop = tl.minimum((group + 1) * GROUP, columns)
    return start, stop, group


@triton.jit
def _unpacked(
    codes, start, stop, BITS: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """The codes of BLOCK_K columns from `start` on: (BLOCK_N, BLOCK_K) of uint8 or int8. codes (BLOCK_N, 1) pointers.

    A shift to the left and back takes one half of a byte, with its sign if there is one.
    """
    if BITS == 8:
        k = start + tl.arange(0, BLOCK_K)[None, :]
        return tl.load(codes + k) if EVEN else tl.load(codes + k, mask=k < stop, other=0)
    if GROUP % 2 == 0:  # a step begins with a byte
        byte = start // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
        c = tl.load(codes + byte) if EVEN else tl.load(codes + byte, mask=byte < (stop + 1) // 2, other=0)
        return tl.reshape(tl.join((c << 4) >> 4, c >> 4), (c.shape[0], BLOCK_K))
    k = start + tl.arange(0, BLOCK_K)[None, :]
    c = tl.load(codes + k // 2, mask=k < stop, other=0)
    return tl.where(k % 2 == 0, (c << 4) >> 4, c >> 4)


@triton.jit
def _halves(codes, start, stop, EVEN: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr):
    """As `_unpacked` of 4 bits, as floats of 16 bits (under the interpreter, which cannot subtract these, of 32).

    Four bits written into the mantissa of a power of two whose last bit counts 1 are added to it: of 128, in bfloat16,
    or 1024. What is taken off again is exact. That is cheaper than to convert, and two lanes are worked on at once.
    """
    BASE: tl.constexpr = 128 if DTYPE == tl.bfloat16 else 1024  # noqa: SIM300
    ITS_BITS: tl.constexpr = 0x4300 if DTYPE == tl.bfloat16 else 0x6400  # noqa: SIM300
    byte = start // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
    c = tl.load(codes + byte) if EVEN else tl.load(codes + byte, mask=byte < (stop + 1) // 2, other=0)
    SIGN: tl.constexpr = 8 if c.dtype == tl.int8 else 0  # two's complement, its sign turned over, is 8 too much
    c = c.to(tl.int16)
    c = tl.join((c & 15) ^ (ITS_BITS + SIGN), ((c >> 4) & 15) ^ (ITS_BITS + SIGN))
    w = tl.reshape(c, (c.shape[0], BLOCK_K)).to(DTYPE, bitcast=True)
    if INTERPRETED:
        w = w.to(tl.float32)
    return w - (BASE + SIGN)


@triton.jit
def _narrowed(w, DTYPE: tl.constexpr):
    """As `narrow`, of what may be of that dtype already."""
    if w.dtype != DTYPE:
        w = narrow(w, DTYPE)
    return w


@triton.jit
def _stored(y, bias, out, m, n, rows, count, SPLIT: tl.constexpr):
    """Results in `out` (rows, count), with the bias; or this part's, as they are, in `out` (SPLIT, rows, count)."""
    at = m.to(tl.int64) * count + n
    inside = (m < rows) & (n < count)
    if SPLIT > 1:
        at += tl.program_id(1).to(tl.int64) * rows * count
    else:
        if bias is not None:
            y += tl.load(bias + n, mask=n < count, other=0.0).to(tl.float32)
        y = narrow(y, out.dtype.element_ty)
    tl.store(out + at, y, mask=inside)
