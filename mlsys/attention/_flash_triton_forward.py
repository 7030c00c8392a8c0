"""The forward kernel of `mlsys.attention.flash_triton`: a block of queries walks along its keys.

See also:
    `mlsys.attention.flash_triton` (which explains and launches it).
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from mlsys.attention._flash_triton_tiles import ends, keys_of, place, put, rows, rows_of, seen
from mlsys.kernels._triton import bound, dot, narrow


@triton.jit
def forward(
    q, k, v, out, lse, ends_q, ends_k,
    q_b, q_h, q_t, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, o_b, o_h, o_t, l_b, l_h,
    t, s, heads, group, blocks, unit, left, right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr = 0,
):  # fmt: skip
    """O and L (in units of log 2) of BLOCK_M queries of one head.

    ends_q, ends_k: cumulative lengths of packed sequences, which then stand in place of a batch; or None.
    unit:           scale · log₂e, not negative.
    TMA:            whether k and v are descriptors of the tensors, and not pointers.
    """
    block, head, b = place(heads, blocks)
    start_q, t = ends(ends_q, b, t)
    start_k, s = ends(ends_k, b, s)
    m0 = (blocks - 1 - block) * BLOCK_M  # causal, the last have the most keys: they begin first
    if m0 >= t:
        return
    q += b * q_b + head * q_h + start_q * q_t
    if not TMA:
        k += b * k_b + head // group * k_h + start_k * k_s
        v += b * v_b + head // group * v_h + start_k * v_s
    out += b * o_b + head * o_h + start_q * o_t
    lse += b * l_b + head * l_h + start_q

    queries = rows(q, m0, t, q_t, q_d, BLOCK_M, BLOCK_D, D, True)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    z = tl.zeros((BLOCK_M,), tl.float32)
    a, whole, edge, end = keys_of(m0, t, s, left, right, BLOCK_M, BLOCK_N, LEFT, RIGHT)
    if LEFT:
        acc, m, z = _along(
            acc, m, z, queries, k, v, b, head // group, k_s, k_d, v_s, v_d, m0, a, whole, t, s, unit, left, right,
            LEFT, RIGHT, D, DV, BLOCK_D, BLOCK_DV, PRECISION, BLOCK_M, BLOCK_N, True, TMA,
        )  # fmt: skip
    acc, m, z = _along(
        acc, m, z, queries, k, v, b, head // group, k_s, k_d, v_s, v_d, m0, whole, edge, t, s, unit, left, right,
        LEFT, RIGHT, D, DV, BLOCK_D, BLOCK_DV, PRECISION, BLOCK_M, BLOCK_N, False, TMA,
    )  # fmt: skip
    acc, m, z = _along(
        acc, m, z, queries, k, v, b, head // group, k_s, k_d, v_s, v_d, m0, edge, end, t, s, unit, left, right,
        LEFT, RIGHT, D, DV, BLOCK_D, BLOCK_DV, PRECISION, BLOCK_M, BLOCK_N, True, TMA,
    )  # fmt: skip

    z = tl.where(z == 0, 1.0, z)  # of a row that sees nothing: A is 0 and m is −∞
    put(out, acc / z[:, None], m0, t, o_t, 1, BLOCK_M, BLOCK_DV, DV)
    i = m0 + tl.arange(0, BLOCK_M)
    tl.store(lse + i, m + tl.log2(z), mask=i < t)


@triton.jit
def _along(
    acc, m, z, queries, k, v, b, head, k_s, k_d, v_s, v_d, m0, start, stop, t, s, unit, left, right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The online softmax over tiles of keys start … stop; without a mask where all of them see each other."""
    i = m0 + tl.arange(0, BLOCK_M)[:, None]
    for n in tl.range(bound(start), bound(stop), BLOCK_N):
        keys = rows_of(k, b, head, n, s, k_s, k_d, BLOCK_N, BLOCK_D, D, MASKED, TMA)
        scores = dot(queries, tl.trans(keys), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        if MASKED:
            j = n + tl.arange(0, BLOCK_N)[None, :]
            scores = tl.where(seen(i, j, t, s, left, right, LEFT, RIGHT), scores * unit, -float("inf"))
            top = tl.maximum(m, tl.max(scores, 1))
            shift = tl.where(top == -float("inf"), 0.0, top)  # −∞ − (−∞) would be NaN
            p = tl.exp2(scores - shift[:, None])
        else:
            top = tl.maximum(m, tl.max(scores, 1) * unit)
            shift = top
            p = tl.exp2(scores * unit - shift[:, None])  # one instruction: multiply and add
        rescale = tl.exp2(m - shift)
        z = z * rescale + tl.sum(p, 1)
        values = rows_of(v, b, head, n, s, v_s, v_d, BLOCK_N, BLOCK_DV, DV, MASKED, TMA)
        acc = dot(narrow(p, values.dtype), values, acc * rescale[:, None], PRECISION)
        m = top
    return acc, m, z
