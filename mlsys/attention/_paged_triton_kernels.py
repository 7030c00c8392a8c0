"""The two kernels of `mlsys.attention.paged_triton`: attention to some of a sequence's blocks, and the merge.

See also:
    `mlsys.attention.paged_triton` (which explains and launches them).
"""
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from mlsys.kernels._triton import Config, Specimen, bound, config, dot, narrow, next_power_of_2

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend(
    q, keys, values, key_scales, value_scales, table, starts, stops, positions, slopes, out, lse,
    q_i, q_h, q_r, q_d, table_i, width, blocks, kv_heads, rows, parts, o_p, l_p, left, unit, softcap,
    CAPPED: tl.constexpr, FP8: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """O and L of the query heads that share one key/value head, over one part of the tokens of one item.

    table:     (items, width) block numbers. Outside of it, or of the blocks, is no token: the result is NaN.
    starts, stops: (items,) the tokens that are seen; starts may be None, for `left` before the last one.
    slopes:    of ALiBi, (kv_heads, rows), or None; positions: (items, rows) of the queries, None for the last token.
    unit:      the scale of the scores.
    FP8:       codes are e4m3, given as bytes.
    """
    program = tl.program_id(0)
    part, head = program % parts, program // parts % kv_heads
    item = (program // parts // kv_heads).to(tl.int64)
    stop = tl.load(stops + item).to(tl.int32)
    last = stop - 1
    if starts is None:
        start = tl.maximum(last - left, 0)
    else:
        start = tl.load(starts + item).to(tl.int32)
    each = tl.cdiv(tl.cdiv(tl.maximum(stop - start, 0), parts), BLOCK_N) * BLOCK_N
    start += part * each
    stop = tl.minimum(stop, start + each)

    r, at_d, at_dv = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    row, column, column_v = r < rows, at_d < D, at_dv < DV
    own = tl.load(
        q + item * q_i + head * q_h + r[:, None] * q_r + at_d[None, :] * q_d,
        mask=row[:, None] & column[None, :],
        other=0.0,
    )
    if slopes is not None:
        slope = tl.load(slopes + head * rows + r, mask=row, other=0.0)
        if positions is None:
            position = last + tl.zeros((BLOCK_R,), tl.int32)
        else:
            position = tl.load(positions + item * rows + r, mask=row, other=0).to(tl.int32)
    acc = tl.zeros((BLOCK_R, BLOCK_DV), tl.float32)
    m = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    z = tl.zeros((BLOCK_R,), tl.float32)
    for first in tl.range(bound(start), bound(stop), BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        inside = j < stop
        page = tl.load(table + item * table_i + j // PAGE, mask=inside & (j // PAGE < width), other=-1).to(tl.int64)
        there = (page >= 0) & (page < blocks)
        token = (page * kv_heads + head) * PAGE + j % PAGE  # a row of the cache
        k = tl.load(
            keys + token[None, :] * D + at_d[:, None], mask=there[None, :] & column[:, None], other=0
        )  # (d, tokens)
        if key_scales is not None:
            k = narrow(_widened(k, FP8), own.dtype)  # exact: what 8 bits hold, 16 hold
        scores = dot(own, k, tl.zeros((BLOCK_R, BLOCK_N), tl.float32), "ieee") * unit
        if key_scales is not None:
            scores *= tl.load(key_scales + token, mask=there, other=0.0)[None, :]
        if CAPPED:
            scores = softcap * _tanh(scores / softcap)
        if slopes is not None:
            scores -= slope[:, None] * tl.abs(position[:, None] - j[None, :]).to(tl.float32)
        scores = tl.where(there[None, :], scores * LOG2E, float("nan"))  # a token whose block is none
        scores = tl.where(inside[None, :], scores, -float("inf"))
        top = tl.maximum(m, tl.max(scores, 1))
        shift = tl.where(top == -float("inf"), 0.0, top)
        p, rescale = tl.exp2(scores - shift[:, None]), tl.exp2(m - shift)
        z = z * rescale + tl.sum(p, 1)
        v = tl.load(
            values + token[:, None] * DV + at_dv[None, :], mask=there[:, None] & column_v[None, :], other=0
        )  # (tokens, dv); 0 where nothing is seen, for 0 · NaN is NaN
        if value_scales is not None:
            v = narrow(_widened(v, FP8), own.dtype)
            p *= tl.load(value_scales + token, mask=there, other=0.0)[None, :]
        acc = dot(narrow(p, v.dtype), v, acc * rescale[:, None], "ieee")
        m = top

    z = tl.where(z == 0, 1.0, z)  # no token: acc is 0 and m is −∞
    at = (item * kv_heads + head) * rows + r
    tl.store(
        out + tl.cast(part, tl.int64) * o_p + at[:, None] * DV + at_dv[None, :],
        acc / z[:, None],
        mask=row[:, None] & column_v[None, :],
    )
    tl.store(lse + part * l_p + at, (m + tl.log2(z)) * LN2, mask=row)


@triton.jit
def merge(
    outs, lses, out, lse, parts, o_p, l_p, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """O and L of one row of all parts: their averages weighed by exp(L − max L)."""
    at = tl.program_id(0).to(tl.int64)
    part, column = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_DV)
    known, inside = part < parts, column < DV
    each = tl.load(lses + part * l_p + at, mask=known, other=-float("inf"))
    top = tl.max(each, 0)
    weight = tl.exp(each - tl.where(top == -float("inf"), 0.0, top))
    total = tl.sum(weight, 0)
    some = tl.where(total == 0, 1.0, total)
    o = tl.load(
        outs + part.to(tl.int64)[:, None] * o_p + at * DV + column[None, :],
        mask=known[:, None] & inside[None, :],
        other=0.0,
    )
    tl.store(out + at * DV + column, tl.sum(o * (weight / some)[:, None], 0), mask=inside)
    tl.store(lse + at, top + tl.log(some))


@triton.jit
def _widened(codes, FP8: tl.constexpr):
    """Codes of 8 bits as float32: whole numbers, or e4m3 by its bits, which no GPU before sm_89 converts."""
    if FP8:
        bits = codes.to(tl.int32)  # exponent and mantissa to where float32 has them; the biases are 120 apart
        magnitude = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
        wide = tl.where(bits >= 0x80, -magnitude, magnitude)
    else:
        wide = codes.to(tl.float32)
    return wide


@triton.jit
def _tanh(x):
    """By e^2x; near 0, where a difference of numbers near 1 is left, by its series."""
    x2 = x * x
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    near = x * (1 - x2 * (1 / 3 - x2 * (2 / 15)))
    return tl.where(tl.abs(x) < 0.1, near, tl.where(x < 0, -far, far))


# --- tiles, and what the compiler is shown ----------------------------------------------------------------------------

MERGE = config(warps=4, stages=1)


def configs(dtype: torch.dtype, widest: int) -> tuple[Config, ...]:
    """What may be tried for the kernel."""
    tiles: tuple[tuple[int, int, int], ...]
    if dtype == torch.float32:
        tiles = ((32, 4, 3), (64, 8, 2)) if widest <= 128 else ((32, 8, 2), (16, 4, 2))
    elif widest <= 128:
        tiles = ((64, 4, 3), (64, 4, 4), (128, 4, 2), (128, 8, 3), (32, 2, 4))
    else:
        tiles = ((64, 8, 2), (32, 4, 3))
    return tuple(config(BLOCK_N=n, warps=warps, stages=stages) for n, warps, stages in tiles)


def sizes(d: int, dv: int, page: int, rows: int) -> dict[str, int]:
    """Of heads, blocks and groups, and of the tiles that hold them: powers of 2, as tensor cores take them."""
    blocks = {"BLOCK_D": d, "BLOCK_DV": dv, "BLOCK_R": rows}
    return {"D": d, "DV": dv, "PAGE": page} | {name: max(16, next_power_of_2(n)) for name, n in blocks.items()}


def specimens() -> list[Specimen]:
    """The kernel with every config on bfloat16 and float32; on codes, and with ALiBi and a soft-cap; and the merge."""
    found = [_specimen("bf16", d, one) for d in (128, 256) for one in configs(torch.bfloat16, d)]
    found += [_specimen("fp32", d, one) for d in (128, 256) for one in configs(torch.float32, d)]
    first = configs(torch.bfloat16, 128)[0]
    found.append(_specimen("bf16", 64, first))
    found += [_specimen("bf16", 128, first, code=code) for code in ("i8", "u8")]
    found.append(_specimen("bf16", 128, first, changed=True))
    constants = {"DV": 128, "BLOCK_DV": 128, "BLOCK_P": 32}
    signature = {x: "*fp32" if x in ("outs", "lses", "out", "lse") else "i32" for x in merge.arg_names}
    return [*found, Specimen("paged.merge", merge, signature, MERGE, constants, ("outs", "lses", "out", "lse", "o_p"))]


def _specimen(dtype: str, d: int, one: Config, *, code: str = "", changed: bool = False) -> Specimen:
    """In blocks of 16 tokens, with 8 query heads a group."""
    types = dict.fromkeys(("keys", "values"), f"*{code or dtype}") | {
        "q": f"*{dtype}",
        "table": "*i32",
        "stops": "*i32",
    }
    types |= dict.fromkeys(("key_scales", "value_scales", "slopes", "out", "lse"), "*fp32")
    constants: dict[str, Any] = {"CAPPED": changed, "FP8": code == "u8", **sizes(d, d, 16, 8)}
    constants |= {"q_d": 1, "starts": None, "positions": None}
    constants |= {} if code else {"key_scales": None, "value_scales": None}
    constants |= {} if changed else {"slopes": None}
    kind = {"": "", "i8": " int8", "u8": " fp8"}[code] + (" changed" if changed else "")
    fast = dtype == "bf16" and not code
    return Specimen(
        name=f"paged.attend {'bfloat16' if dtype == 'bf16' else 'float32'} d={d}{kind}",
        kernel=attend,
        signature={x: types.get(x, "fp32" if x in ("unit", "softcap") else "i32") for x in attend.arg_names},
        config=one,
        constants=constants,
        aligned=tuple(x for x in (*types, "q_i", "q_h", "q_r", "o_p") if x not in constants),
        shows=dict.fromkeys((80, 90), ("mma.sync", "cp.async")) if fast else {},
    )
