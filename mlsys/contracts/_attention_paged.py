"""The contract of `attention.paged`: one decode step over block tables.

Blocks are drawn in any order; what stands in places that no sequence owns is somebody else's, or NaN. The oracle
walks from token to token through the table, in float64. What an honest implementation may miss it by is that of the
formula of attention for each sequence alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlsys.attention import paged
from mlsys.contracts import _attention_formula as formula
from mlsys.contracts.core import Case, Contract, Inputs, Mismatch, Results, Wrong, accepts

SIGNATURE = "decode(q, keys, values, tables, lengths, *, scale=None) -> (seqs, heads, dv)"
ARGUMENTS = ("q", "keys", "values", "tables", "lengths")


def case(
    *lengths: int,
    h: int = 2,
    h_kv: int | None = None,
    d: int = 8,
    dv: int | None = None,
    block: int = 4,
    dtype: str = "float32",
    scale: float | None = None,
    scores: str = "normal",
    elsewhere: str = "numbers",
    shared: int = 0,
    spare: int = 0,
    layout: str = "contiguous",
) -> Case:
    """One case; what is left out takes the plainest value.

    elsewhere: what is in places of no sequence; shared: with how many blocks all begin; spare: columns of −1;
    layout: "strided" if q, tables and lengths are parts of larger tensors. The blocks always lie as they are read.
    """
    return {
        "lengths": lengths, "h": h, "h_kv": h_kv or h, "d": d, "dv": dv or d, "block": block, "dtype": dtype,
        "scale": scale, "scores": scores, "elsewhere": elsewhere, "shared": shared, "spare": spare,
        "layout": layout,
    }  # fmt: skip


CASES = [
    case(8),  # two full blocks
    case(6),  # the second not full
    case(8, 8, 8),
    case(5, 12, 1, 8),
    case(7, 3, 10, h=6, h_kv=2),
    case(9, 4, h=4, h_kv=1, d=5, dv=3),
    case(3, 13, spare=3),
    case(4, 0, 6),  # one has no tokens yet
    case(6, 11, 2, elsewhere="nan"),
    case(14, 9, 12, shared=2, h=4, h_kv=2),  # tables that begin alike
    case(40, 33, scores="rising"),  # the maximum moves with every block
    case(30, 21, scores="large"),  # exp overflows unless the maximum is subtracted
    case(10, 7, scale=0.9),
    case(10, 7, scale=0.0),  # all tokens count alike
    case(35, 64, 16, 17, block=16, h=4, h_kv=2, d=16),
    case(5, 7, block=1),
    case(300, block=16, d=16, elsewhere="nan"),
    case(20, 33, d=32, dtype="bfloat16"),
    case(11, 6, dtype="float64", elsewhere="nan", spare=1),
    case(9, 4, 6, h=4, h_kv=2, layout="strided"),
    case(),  # nobody is decoding
]


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """q, the blocks of one layer, tables and lengths; scale where it is given."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, case["dtype"])
    block, lengths, shared = case["block"], case["lengths"], case["shared"]
    needed = [-(-n // block) for n in lengths]
    numbers = torch.randperm(sum(needed) + 3, generator=generator).tolist()
    common = [numbers.pop() for _ in range(shared)]
    tables = torch.full((len(lengths), max(needed, default=0) + case["spare"]), -1, dtype=torch.int32)
    for i, count in enumerate(needed):
        own = common + [numbers.pop() for _ in range(count - shared)]
        tables[i, :count] = torch.tensor(own, dtype=torch.int32)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    blocks = sum(needed) + 3
    q = draw(len(lengths), case["h"], case["d"])
    keys, values = (draw(blocks, case["h_kv"], block, size) for size in (case["d"], case["dv"]))
    owned = torch.zeros(blocks, block, dtype=torch.bool)
    for i, n in enumerate(lengths):
        for j in range(n):
            at = int(tables[i, j // block]), j % block
            owned[at] = True
            if case["scores"] == "rising":  # keys that grow along the table, and queries that look there
                keys[at[0], :, at[1]] = keys[at[0], :, at[1]].abs() * (0.1 + 6 * j / n)
    if case["scores"] == "rising":
        q = q.abs()
    if case["scores"] == "large":
        q = q * 200
    for x in (keys, values):
        x.transpose(1, 2)[~owned] = math.nan if case["elsewhere"] == "nan" else 3.0
    named: Inputs = {name: x.to(dtype).to(device) for name, x in (("q", q), ("keys", keys), ("values", values))}
    named |= {"tables": tables.to(device), "lengths": torch.tensor(lengths, dtype=torch.int32, device=device)}
    if case["layout"] == "strided":
        named["q"] = named["q"].transpose(0, 1).contiguous().transpose(0, 1)
        named["tables"] = torch.cat([named["tables"], torch.full_like(named["tables"], -1)], 1)[:, : tables.shape[1]]
        named["lengths"] = torch.stack([named["lengths"]] * 2, 1)[:, 0]
    return named | {"scale": case["scale"]}


def call(impl: Callable[..., Any], inputs: Inputs) -> Results:
    """The output."""
    options = {} if inputs["scale"] is None else {"scale": inputs["scale"]}
    accepts(impl, 5, options, SIGNATURE)
    with torch.no_grad():
        out = impl(*(inputs[name] for name in ARGUMENTS), **options)
    if not isinstance(out, Tensor):
        raise Mismatch(f"returned {type(out).__name__}, expected a tensor (seqs, heads, dv)")
    if out.dtype != inputs["q"].dtype:
        raise Mismatch(f"returned {out.dtype} for a q of {inputs['q'].dtype}: the output has its dtype")
    return {"out": out}


def _alone(inputs: Inputs) -> list[Inputs]:
    """Each sequence as one that is not paged: q (1, h, 1, d), k and v (1, h_kv, n, ·), token by token."""
    found = []
    for i, n in enumerate(inputs["lengths"].tolist()):
        block = inputs["keys"].shape[2]
        at = [(int(inputs["tables"][i, j // block]), j % block) for j in range(n)]
        one: Inputs = {"q": inputs["q"][i][None, :, None], "scale": inputs["scale"]}
        for name, x in (("k", inputs["keys"]), ("v", inputs["values"])):
            rows = [x[b, :, place] for b, place in at]
            one[name] = torch.stack(rows, 1)[None] if rows else x.new_zeros(1, x.shape[1], 0, x.shape[3])
        found.append(one)
    return found


def oracle(inputs: Inputs) -> Mapping[str, np.ndarray]:
    """The formula in float64 for each sequence alone."""
    rows = [formula.oracle(one)["out"][0, :, 0] for one in _alone(inputs)]
    return {"out": np.stack(rows) if rows else np.zeros((0, inputs["q"].shape[1], inputs["values"].shape[3]))}


def tolerance(inputs: Inputs, name: str, want: np.ndarray) -> float:
    """The largest that any sequence is allowed."""
    each = zip(_alone(inputs), want, strict=True)
    return max((formula.tolerance(one, "out", row[None, :, None]) for one, row in each), default=0.0)


# --- wrong variants ---------------------------------------------------------------------------------------------------


def _plain(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    mistake: str = "",
) -> Tensor:
    """A decode step in plain torch, sequence by sequence and block by block, with one mistake."""
    h, d = q.shape[1:]
    if mistake == "layout":
        keys, values = (x.reshape(x.shape[0], x.shape[2], x.shape[1], -1).transpose(1, 2) for x in (keys, values))
    h_kv, block = keys.shape[1:3]
    factor = {"no_scale": 1.0, "scale_by_d": 1 / d}.get(mistake, d**-0.5)
    scale = scale or None if mistake == "zero_is_no_scale" else scale
    scale = factor if scale is None or mistake == "scale_ignored" else scale
    if mistake == "strides_ignored" and not q.is_contiguous():
        q = q.transpose(0, 1).reshape(q.shape)
    heads = [i % h_kv if mistake == "heads_interleaved" else i * h_kv // h for i in range(h)]
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(q.shape[0], h, values.shape[3])
    for i in range(q.shape[0]):
        n = int(lengths[i - 1 if mistake == "lengths_of_another" else i])
        n = {"longest_for_all": int(lengths.max()), "padding_is_a_block": tables.shape[1] * block}.get(mistake, n)
        if mistake in ("whole_last_block", "zero_times_nan"):
            n = -(-n // block) * block
        if mistake == "last_block_dropped":
            n = max(block, n // block * block) if n else 0
        if mistake == "last_token_dropped":
            n = max(0, n - 1)
        row = tables[0 if mistake == "first_table" else i].tolist()
        row = [] if mistake == "table_ignored" else row
        part = []
        if mistake in ("column_modulo", "columns_interleaved"):
            j, columns = torch.arange(n, device=keys.device), tables.shape[1]
            at = tables[i, j % columns].long(), j % block if mistake == "column_modulo" else j // columns
            k, v = (x.transpose(1, 2)[at].transpose(0, 1)[heads].to(wide) for x in (keys, values))  # (h, n, ·)
            part = [((k @ (q[i].to(wide) * scale)[..., None])[..., 0], v)] if n else []
            n = 0  # that was all
        for column in range(-(-n // block)):
            if mistake == "table_off_by_one":
                column = min(column + 1, len(row) - 1)
            b = row[column] if column < len(row) else min(i * tables.shape[1] + column, keys.shape[0] - 1)
            places = min(block, n - column * block)
            k, v = (x[b, heads, :places].to(wide) for x in (keys, values))  # (h, places, ·)
            scores = (k @ (q[i].to(wide) * scale)[..., None])[..., 0]
            if mistake == "zero_times_nan":
                beyond = torch.arange(places) + column * block >= int(lengths[i])
                scores = scores.masked_fill(beyond.to(scores.device), -math.inf)
            part.append((scores, v))
        if not part:
            out[i] = math.nan if mistake == "empty_is_nan" else 0.0
            continue
        out[i] = _joined(part, mistake).to(q.dtype)
    return out


def _joined(part: list[tuple[Tensor, Tensor]], mistake: str) -> Tensor:
    """The weighted average over all blocks, (h, dv)."""
    if mistake == "parts_averaged":
        outs = [torch.softmax(scores, -1)[:, None] @ v for scores, v in part]
        return torch.stack(outs).mean(0)[:, 0]
    if mistake == "no_max":
        return _divided([torch.exp(scores) for scores, _ in part], part)
    if mistake == "stale_max":
        top = torch.cummax(torch.stack([scores.amax(-1) for scores, _ in part]), 0).values
        exps = [torch.exp(scores - m[:, None]) for m, (scores, _) in zip(top, part, strict=True)]
        return _divided(exps, part)
    weights = torch.softmax(torch.cat([scores for scores, _ in part], -1), -1)
    return (weights[:, None] @ torch.cat([v for _, v in part], 1))[:, 0]


def _divided(exps: list[Tensor], part: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Numerators and denominators of all blocks, summed as they are."""
    above = torch.stack([(e[:, None] @ v)[:, 0] for e, (_, v) in zip(exps, part, strict=True)]).sum(0)
    below = torch.stack([e.sum(-1) for e in exps]).sum(0)
    return above / below[:, None]


HINTS = {
    "no_scale": "multiply the scores by 1/√d, or their spread grows with √d",
    "scale_by_d": "divide the scores by the square root of d, not by d",
    "zero_is_no_scale": "0.0 is a scale as well: `scale or …` takes it for none, `scale is None` does not",
    "scale_ignored": "use the `scale` argument where it is given; 1/√d is its default",
    "table_off_by_one": "token j is in block tables[i, j // block], from column 0",
    "column_modulo": "token j is in block tables[i, j // block], at place j % block: not in column j % columns",
    "columns_interleaved": "a block is filled before the next is begun: put the blocks one after another, not in turns",
    "table_ignored": "blocks lie in any order: ask the table for each, do not count them up from the first",
    "first_table": "each sequence has a table of its own: row i for sequence i",
    "layout": "a block is (kv_heads, block, d): the tokens of one head lie together, not the heads of one token",
    "whole_last_block": "the last block holds lengths[i] mod block tokens; what is behind them is not this sequence's",
    "last_block_dropped": "the last block counts too, though it is not full: round the number of blocks up",
    "last_token_dropped": "lengths[i] counts the newest token too, whose key is there: read tokens 0 … lengths[i] − 1",
    "padding_is_a_block": "−1 is padding, not a block (in Python, the last one): stop at lengths[i]",
    "lengths_of_another": "each sequence has a length of its own: lengths[i] for sequence i",
    "longest_for_all": "each sequence ends at its own length; up to the longest there is padding, and others' tokens",
    "heads_interleaved": "query head i reads key head i // (h // kv_heads): heads that share one are neighbours",
    "parts_averaged": "blocks do not count alike: weigh each one's average by exp of its log-sum-exp",
    "no_max": "subtract the row's maximum before exp, which overflows above 88 in float32",
    "stale_max": "when a block raises the maximum, rescale what has been summed by exp(m_old − m_new)",
    "zero_times_nan": "leave out the values of places that are not the sequence's: 0 · NaN is NaN",
    "strides_ignored": "q may be a view with strides of its own: call contiguous() before a kernel gets its memory",
    "empty_is_nan": "a sequence of no tokens gives 0, not 0/0",
}


def _wrong(mistake: str) -> Callable[..., Tensor]:
    def decode(*args: Tensor, **options: Any) -> Tensor:
        return _plain(*args, **options, mistake=mistake)

    return decode


def contract(name: str, reference: Callable[..., Any] = paged.decode) -> Contract:
    """The contract under this name."""
    return Contract(
        name=name,
        signature=SIGNATURE,
        reference=reference,
        cases=CASES,
        inputs=inputs,
        call=call,
        oracle=oracle,
        tolerance=tolerance,
        wrong={mistake: Wrong(_wrong(mistake), hint) for mistake, hint in HINTS.items()},
        compare={"out": formula.compare},
    )
