"""The backward kernels of `mlsys.attention.flash_triton`: D of each row, dK and dV of keys, dQ of queries.

See also:
    `mlsys.attention.flash_triton` (which explains and launches them).
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from mlsys.attention._flash_triton_tiles import ends, keys_of, place, put, queries_of, rows, rows_of, seen
from mlsys.kernels._triton import bound, dot, narrow

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def row_sums(
    out, grad, grad_lse, delta, ends_q, o_b, o_h, o_t, g_b, g_h, g_t, g_d, gl_b, gl_h, gl_t, l_b, l_h,
    t, heads, blocks, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """D = Σ O · dO of BLOCK_M rows, less the gradient of L, if it has one."""
    block, head, b = place(heads, blocks)
    start, t = ends(ends_q, b, t)
    m0 = block * BLOCK_M
    if m0 >= t:
        return
    i = m0 + tl.arange(0, BLOCK_M)
    o = rows(out + b * o_b + head * o_h + start * o_t, m0, t, o_t, 1, BLOCK_M, BLOCK_DV, DV, True)
    g = rows(grad + b * g_b + head * g_h + start * g_t, m0, t, g_t, g_d, BLOCK_M, BLOCK_DV, DV, True)
    total = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    if grad_lse is not None:
        total -= tl.load(grad_lse + b * gl_b + head * gl_h + (start + i) * gl_t, mask=i < t, other=0.0)
    tl.store(delta + b * l_b + head * l_h + start + i, total, mask=i < t)


@triton.jit
def grad_kv(
    q, k, v, grad, lse, delta, dk, dv, ends_q, ends_k,
    q_b, q_h, q_t, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, g_b, g_h, g_t, g_d,
    dk_b, dk_h, dk_s, dv_b, dv_h, dv_s, l_b, l_h,
    t, s, heads, group, blocks, unit, left, right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr = 0,
):  # fmt: skip
    """Gradients dK and dV of BLOCK_N keys of one key/value head: the sum over the queries of all heads.

    heads: of keys and values. Tiles are transposed, keys by queries, so that P and dS are left operands as they are.
    """
    block, head, b = place(heads, blocks)
    start_q, t = ends(ends_q, b, t)
    start_k, s = ends(ends_k, b, s)
    n0 = block * BLOCK_N
    if n0 >= s:
        return
    keys = rows(k + b * k_b + head * k_h + start_k * k_s, n0, s, k_s, k_d, BLOCK_N, BLOCK_D, D, True)
    values = rows(v + b * v_b + head * v_h + start_k * v_s, n0, s, v_s, v_d, BLOCK_N, BLOCK_DV, DV, True)
    sum_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    sum_v = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    a, whole, edge, end = queries_of(n0, t, s, left, right, BLOCK_M, BLOCK_N, LEFT, RIGHT)
    if not TMA:
        q += b * q_b + head * group * q_h + start_q * q_t
        grad += b * g_b + head * group * g_h + start_q * g_t
    lse += b * l_b + head * group * l_h + start_q
    delta += b * l_b + head * group * l_h + start_q
    if RIGHT:
        sum_k, sum_v = _along_queries(
            sum_k, sum_v, keys, values, q, grad, lse, delta, b, head, q_h, q_t, q_d, g_h, g_t, g_d, l_h, n0,
            a, whole, group, t, s, unit, left, right,
            LEFT, RIGHT, D, DV, BLOCK_D, BLOCK_DV, PRECISION, BLOCK_M, BLOCK_N, True, TMA,
        )  # fmt: skip
    sum_k, sum_v = _along_queries(
        sum_k, sum_v, keys, values, q, grad, lse, delta, b, head, q_h, q_t, q_d, g_h, g_t, g_d, l_h, n0,
        whole, edge, group, t, s, unit, left, right,
        LEFT, RIGHT, D, DV, BLOCK_D, BLOCK_DV, PRECISION, BLOCK_M, BLOCK_N, False, TMA,
    )  # fmt: skip
    if LEFT:
        sum_k, sum_v = _along_queries(
            sum_k, sum_v, keys, values, q, grad, lse, delta, b, head, q_h, q_t, q_d, g_h, g_t, g_d, l_h, n0,
            edge, end, group, t, s, unit, left, right,
            LEFT, RIGHT, D, DV, BLOCK_D, BLOCK_DV, PRECISION, BLOCK_M, BLOCK_N, True, TMA,
        )  # fmt: skip
    put(dk + b * dk_b + head * dk_h + start_k * dk_s, sum_k * (unit * LN2), n0, s, dk_s, 1, BLOCK_N, BLOCK_D, D)
    put(dv + b * dv_b + head * dv_h + start_k * dv_s, sum_v, n0, s, dv_s, 1, BLOCK_N, BLOCK_DV, DV)


@triton.jit
def _along_queries(
    sum_k, sum_v, keys, values, q, grad, lse, delta, b, head, q_h, q_t, q_d, g_h, g_t, g_d, l_h, n0,
    start, stop, group, t, s, unit, left, right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Tiles of queries start … stop, of all heads of the group, in one loop: the next head's loads begin early."""
    j = n0 + tl.arange(0, BLOCK_N)[:, None]
    tiles = tl.cdiv(tl.maximum(stop - start, 0), BLOCK_M)
    for number in tl.range(0, bound(tiles * group)):
        member = tl.cast(number // tiles, tl.int64)
        m = start + number % tiles * BLOCK_M
        i = m + tl.arange(0, BLOCK_M)
        one, one_grad = q, grad
        if not TMA:
            one, one_grad = q + member * q_h, grad + member * g_h
        h = head * group + member
        queries = rows_of(one, b, h, m, t, q_t, q_d, BLOCK_M, BLOCK_D, D, True, TMA)
        scores = dot(keys, tl.trans(queries), tl.zeros((BLOCK_N, BLOCK_M), tl.float32), PRECISION)  # Sᵀ
        # queries from t on: 2^(0 − ∞) = 0, so that their tile needs no mask
        log_p = scores * unit - tl.load(lse + member * l_h + i, mask=i < t, other=float("inf"))[None, :]
        if MASKED:
            log_p = tl.where(seen(i[None, :], j, t, s, left, right, LEFT, RIGHT), log_p, -float("inf"))
        p = tl.exp2(log_p)
        mean = tl.load(delta + member * l_h + i, mask=i < t, other=0.0)
        g = rows_of(one_grad, b, h, m, t, g_t, g_d, BLOCK_M, BLOCK_DV, DV, True, TMA)
        sum_v = dot(narrow(p, g.dtype), g, sum_v, PRECISION)
        dp = dot(values, tl.trans(g), tl.zeros((BLOCK_N, BLOCK_M), tl.float32), PRECISION)
        ds = p * (dp - mean[None, :])
        sum_k = dot(narrow(ds, queries.dtype), queries, sum_k, PRECISION)
    return sum_k, sum_v


@triton.jit
def grad_q(
    q, k, v, grad, lse, delta, dq, ends_q, ends_k,
    q_b, q_h, q_t, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, g_b, g_h, g_t, g_d, dq_b, dq_h, dq_t, l_b, l_h,
    t, s, heads, group, blocks, unit, left, right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr = 0,
):  # fmt: skip
    """Gradients dQ of BLOCK_M queries of one head, which walk along their keys as in the forward pass."""
    block, head, b = place(heads, blocks)
    start_q, t = ends(ends_q, b, t)
    start_k, s = ends(ends_k, b, s)
    m0 = (blocks - 1 - block) * BLOCK_M
    if m0 >= t:
        return
    if not TMA:
        k += b * k_b + head // group * k_h + start_k * k_s
        v += b * v_b + head // group * v_h + start_k * v_s
    own = rows(q + b * q_b + head * q_h + start_q * q_t, m0, t, q_t, q_d, BLOCK_M, BLOCK_D, D, True)
    g = rows(grad + b * g_b + head * g_h + start_q * g_t, m0, t, g_t, g_d, BLOCK_M, BLOCK_DV, DV, True)
    i = m0 + tl.arange(0, BLOCK_M)
    at = b * l_b + head * l_h + start_q + i
    row_lse = tl.load(lse + at, mask=i < t, other=0.0)
    mean = tl.load(delta + at, mask=i < t, other=0.0)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    a, whole, edge, end = keys_of(m0, t, s, left, right, BLOCK_M, BLOCK_N, LEFT, RIGHT)
    if LEFT:
        total = _along_keys(
            total, own, g, row_lse, mean, k, v, b, head // group, k_s, k_d, v_s, v_d, m0,
            a, whole, t, s, unit, left, right,
            LEFT, RIGHT, D, DV, BLOCK_D, BLOCK_DV, PRECISION, BLOCK_M, BLOCK_N, True, TMA,
        )  # fmt: skip
    total = _along_keys(
        total, own, g, row_lse, mean, k, v, b, head // group, k_s, k_d, v_s, v_d, m0,
        whole, edge, t, s, unit, left, right,
        LEFT, RIGHT, D, DV, BLOCK_D, BLOCK_DV, PRECISION, BLOCK_M, BLOCK_N, False, TMA,
    )  # fmt: skip
    total = _along_keys(
        total, own, g, row_lse, mean, k, v, b, head // group, k_s, k_d, v_s, v_d, m0,
        edge, end, t, s, unit, left, right,
        LEFT, RIGHT, D, DV, BLOCK_D, BLOCK_DV, PRECISION, BLOCK_M, BLOCK_N, True, TMA,
    )  # fmt: skip
    put(dq + b * dq_b + head * dq_h + start_q * dq_t, total * (unit * LN2), m0, t, dq_t, 1, BLOCK_M, BLOCK_D, D)


@triton.jit
def _along_keys(
    total, own, g, row_lse, mean, k, v, b, head, k_s, k_d, v_s, v_d, m0, start, stop, t, s, unit, left, right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    i = m0 + tl.arange(0, BLOCK_M)[:, None]
    for n in tl.range(bound(start), bound(stop), BLOCK_N):
        keys = rows_of(k, b, head, n, s, k_s, k_d, BLOCK_N, BLOCK_D, D, MASKED, TMA)
        scores = dot(own, tl.trans(keys), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        log_p = scores * unit - row_lse[:, None]
        if MASKED:
            j = n + tl.arange(0, BLOCK_N)[None, :]
            log_p = tl.where(seen(i, j, t, s, left, right, LEFT, RIGHT), log_p, -float("inf"))
        p = tl.exp2(log_p)
        values = rows_of(v, b, head, n, s, v_s, v_d, BLOCK_N, BLOCK_DV, DV, MASKED, TMA)
        dp = dot(g, tl.trans(values), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        ds = p * (dp - mean[:, None])
        total = dot(narrow(ds, keys.dtype), keys, total, PRECISION)
    return total
