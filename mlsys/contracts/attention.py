"""Contracts of `mlsys.attention`: what scaled dot-product attention must compute, forward and backward.

    attention.naive     attention(q, k, v, *, causal, scale), forward and backward
    attention.flash     the same with block_q and block_k, in memory that is linear in the length
    attention.variants  attention with windows, masks, ALiBi, soft-cap, sinks and lse
    attention.linear    attention(q, k, v, *, decay, state, return_state, chunk) without the softmax
    attention.merge     merge(out_a, lse_a, out_b, lse_b)
    attention.paged     decode(q, keys, values, tables, lengths) over blocks

The options are a contract of their own, so that a first implementation can be complete without them.

The oracle is written apart from the modules: float64, one einsum a step, the key
head of each query head picked by its index. The tolerance comes from the inputs: the
oracle's formula again, with the result of each step off by a random part of a rounding
unit, as the dtype of the inputs would leave it, forward and backward. The largest error
of many such draws is what an honest implementation cannot avoid; four times that is
allowed, and something for sums of many terms. In bfloat16 that is 3 to 8% of the
largest value: a plain PyTorch baseline passes with room to spare, and a scale that is
off by a fifth does not.

Memory is measured, not guessed: the tensors that the call's operations make and that
are alive at the same time, at one length and at a quarter of it.

Cost:
    A few seconds for all cases of a fast implementation.

Papers:
    Vaswani et al. 2017, arXiv:1706.03762, equation 1 (the formula).
    Higham & Mary 2019, "A New Approach to Probabilistic Rounding Error Analysis" (sums of n terms err as √n).

See also:
    `mlsys.contracts.core` (how a contract is run).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mlsys.attention import flash, flash_numba, naive, paged_numba
from mlsys.contracts import _attention_formula as formula
from mlsys.contracts import (
    _attention_kv_cache,
    _attention_linear,
    _attention_merge,
    _attention_paged,
    _attention_variants,
)
from mlsys.contracts._attention_memory import Held
from mlsys.contracts.core import Case, Contract, Inputs, Mismatch, Results, Wrong, accepts

SIGNATURE = "attention(q, k, v, *, causal=False, scale=None"
LINEAR, SHORTER = 8.0, 4  # at SHORTER times the length linear memory grows 4 times, quadratic 16 times: allow 8
MATERIALISES = "hold one tile of block_q × block_k scores at a time; never a tensor of t × s elements"
AUTOGRAD_KEEPS = (
    "autograd keeps every tile until the backward pass: write a torch.autograd.Function that saves q, k, v, O "
    "and the log-sum-exp only, and computes the tiles again"
)


def case(
    t: int,
    s: int | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    scores: str = "normal",
    layout: str = "contiguous",
    backward: bool = False,
    **sizes: Any,
) -> Case:
    """One case; what is left out takes the plainest value."""
    options = {"causal": causal, "scale": scale, "scores": scores, "layout": layout, "backward": backward}
    return formula.sizes(t, s, **sizes) | options


FORWARD = [
    case(4),
    case(5, 7, b=2, h=3, dv=5),
    case(6, causal=True),
    case(3, 9, h=2, causal=True),  # decoding: more keys than queries
    case(1, 16, causal=True),
    case(9, 4, h=2, causal=True),  # the first five queries see nothing
    case(6, 10, b=2, h=4, h_kv=2),
    case(7, h=6, h_kv=2, causal=True),
    case(8, h=4, h_kv=1),
    case(16, 24, scores="large"),  # exp overflows unless the maximum is subtracted
    case(16, 300, scores="rising"),  # the maximum moves with every block of keys
    case(129, 257, h=2, d=16, causal=True),  # no multiple of any block
    case(300, 301, d=16, causal=True),
    case(6, scale=0.3),
    case(6, scale=0.0),  # every key counts alike
    case(64, 64, d=32, dtype="bfloat16", causal=True),
    case(33, 70, d=32, dtype="bfloat16"),
    case(11, 13, h=2, dtype="float64", causal=True),
]
BACKWARD = [
    case(5, 6, backward=True),
    case(17, 17, h=2, causal=True, backward=True),
    case(7, 12, h=4, h_kv=2, dv=6, causal=True, backward=True),
    case(9, 4, causal=True, backward=True),
    case(140, 150, d=16, causal=True, backward=True, scale=0.2),
    # as a transformer has them: heads split off the last axis, and a gradient that sum() or mean() has expanded
    case(20, 24, b=2, h=4, h_kv=2, d=64, dv=80, causal=True, layout="transposed", backward=True),
    case(12, 10, d=16, backward=True, dtype="bfloat16"),
]
EMPTY = [
    case(5, 0, h=2),  # nothing to see: 0
    case(0, 5, h=2, causal=True),
    case(3, 4, b=0),
]
TILED_FORWARD = [
    {**case(10, 13, h=2, causal=True), "block_q": 3, "block_k": 4},
    {**case(16, 60, scores="rising"), "block_q": 16, "block_k": 8},
    {**case(40, 33, dtype="bfloat16"), "block_q": 16, "block_k": 8},
    # equal weights in 512 blocks: in 16 bits a sum of them stops growing half way
    {**case(4, 4096, dtype="bfloat16", scale=0.02), "block_q": 4, "block_k": 8},
]
TILED_BACKWARD = [
    {**case(9, 4, causal=True, backward=True), "block_q": 2, "block_k": 3},
    {**case(20, 23, h=4, h_kv=2, causal=True, backward=True), "block_q": 5, "block_k": 7},
    {**case(1024, d=16, causal=True, backward=True), "block_q": 128, "block_k": 128, "linear_memory": True},
]


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """q, k, v and, for a backward case, the gradient of the output; the options as they are passed."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, case["dtype"])

    def draw(b: int, h: int, t: int, d: int) -> Tensor:
        if case["layout"] == "transposed":
            return torch.randn(b, t, h, d, generator=generator, dtype=torch.float64).transpose(1, 2)
        return torch.randn(b, h, t, d, generator=generator, dtype=torch.float64)

    b, h, h_kv, t, s = (case[name] for name in ("b", "h", "h_kv", "t", "s"))
    q, k, v = draw(b, h, t, case["d"]), draw(b, h_kv, s, case["d"]), draw(b, h_kv, s, case["dv"])
    if case["scores"] == "large":
        q = q * 200
    if case["scores"] == "rising":  # keys that grow along one direction, queries that look there
        q = q.abs()
        k = k.abs() * torch.linspace(0.1, 6.0, s, dtype=torch.float64)[:, None]
    tensors = {"q": q, "k": k, "v": v}
    if case["backward"]:
        tensors["grad_out"] = draw(b, h, t, case["dv"])
    named: Inputs = {name: x.to(dtype).to(device) for name, x in tensors.items()}
    if case["backward"] and case["layout"] == "transposed":
        named["grad_out"] = named["grad_out"][:, :, :1].expand(-1, -1, t, -1)
    named |= {"causal": case["causal"], "scale": case["scale"]}
    return named | {name: case[name] for name in ("block_q", "block_k", "linear_memory") if name in case}


def call(impl: Callable[..., Any], inputs: Inputs) -> Results:
    """The output and, where asked for, the gradients."""
    options: dict[str, Any] = {"causal": inputs["causal"]}
    options |= {name: inputs[name] for name in ("scale", "block_q", "block_k") if inputs.get(name) is not None}
    blocks = ", block_q=None, block_k=None" if "block_q" in options else ""
    accepts(impl, 3, options, f"{SIGNATURE}{blocks})")
    tensors: dict[str, Tensor] = {name: inputs[name] for name in ("q", "k", "v", "grad_out") if name in inputs}
    if not inputs.get("linear_memory"):
        return _results(impl, options, tensors)
    held, shorter = Held(), Held()
    with held:
        results = _results(impl, options, tensors, held)
    short = {name: x.detach()[:, :, : x.shape[2] // SHORTER].clone() for name, x in tensors.items()}
    with shorter:
        _results(impl, options, short, shorter)
    _refuse_quadratic(held, shorter, tensors["q"].shape[2], tensors["k"].shape[2])
    return results


def _results(
    impl: Callable[..., Any], options: dict[str, Any], tensors: dict[str, Tensor], held: Held | None = None
) -> Results:
    backward = "grad_out" in tensors
    qkv = [tensors[name].requires_grad_(backward) for name in "qkv"]
    out = impl(*qkv, **options)
    if held:
        held.kept = held.now
    if not isinstance(out, Tensor):
        raise Mismatch(f"returned {type(out).__name__}, expected a tensor (batch, heads, t, dv)")
    if out.dtype != qkv[0].dtype:
        raise Mismatch(f"returned {out.dtype} for inputs of {qkv[0].dtype}: the output has the dtype of the inputs")
    results: Results = {"out": out.detach()}
    if backward:
        results |= formula.gradients({"out": out}, dict(zip("qkv", qkv, strict=True)), {"out": tensors["grad_out"]})
    for x in qkv:
        x.requires_grad_(False)
    return results


def _refuse_quadratic(held: Held, shorter: Held, t: int, s: int) -> None:
    """Mismatch if memory grew with t × s: a tensor of that size, or more alive at once than linear growth explains."""
    held.refuse_scores(t, s, MATERIALISES)
    growth = held.peak / max(shorter.peak, 1)
    if growth > LINEAR:
        keeps = held.kept > LINEAR * shorter.kept
        raise Mismatch(
            f"tensors of {held.peak / 2**20:.1f} MiB were alive at once at t = {t}, s = {s}, {growth:.1f} times as "
            "many as at a quarter of the length, where linear memory grows 4 times: "
            + (AUTOGRAD_KEEPS if keeps else MATERIALISES)
        )


# --- wrong variants ---------------------------------------------------------------------------------------------------


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
    factor: Callable[[int], float] = lambda d: d**-0.5,
    shift: int = 0,
    top_left: bool = False,
    softmax_dim: int = -1,
    subtract_max: bool = True,
    interleave: bool = False,
    hidden: float = -math.inf,
    ignore_scale: bool = False,
    zero_is_no_scale: bool = False,
    mask_after: bool = False,
    normalise: bool = True,
    nan_rows: bool = False,
) -> Tensor:
    """Attention in plain torch, with one knob for each mistake."""
    h, t, d = q.shape[1:]
    group, s = h // k.shape[1], k.shape[2]
    k, v = (x.repeat(1, group, 1, 1) if interleave else x.repeat_interleave(group, 1) for x in (k, v))
    if scale is None or ignore_scale or (zero_is_no_scale and scale == 0):
        scale = factor(d)
    scores = q @ k.mT * scale
    unseen = torch.ones(t, s, dtype=torch.bool, device=q.device).triu((1 if top_left else s - t + 1) + shift)
    if causal and not mask_after:
        scores = scores.masked_fill(unseen, hidden)
    if not normalise:
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    elif subtract_max:
        weights = torch.softmax(scores, softmax_dim)
    else:
        weights = torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True)
    if causal and (hidden == -math.inf or mask_after) and not nan_rows:
        weights = weights.masked_fill(unseen, 0.0)
    return weights @ v


def _wrong(**knobs: Any) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return _plain(q, k, v, **options, **knobs)

    return attention


def _blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: dict[str, Any],
    *,
    stale: bool = False,
    keep_z: bool = False,
    drop: bool = False,
    narrow: bool = False,
) -> Tensor:
    """The online softmax over blocks of keys in plain torch, with its own mistakes."""
    scale = options.get("scale")
    block = options.get("block_k") or 64
    h, t, d = q.shape[1:]
    group, s = h // k.shape[1], k.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    wide = q.dtype if narrow else torch.promote_types(q.dtype, torch.float32)
    scaled = q * (d**-0.5 if scale is None else scale)
    last = torch.arange(t, device=q.device)[:, None] + (s - t if options.get("causal") else s)  # key that a query sees
    m = q.new_full((*q.shape[:-1], 1), -1e30, dtype=wide)
    z, acc = torch.zeros_like(m), m.new_zeros((*q.shape[:-1], v.shape[-1]))
    end = max(block, s - s % block) if drop else s
    for j in range(0, end, block):
        unseen = torch.arange(j, min(j + block, s), device=q.device) > last
        tile = (scaled @ k[..., j : j + block, :].mT).to(wide).masked_fill(unseen, -1e30)
        new = torch.maximum(m, tile.amax(-1, keepdim=True))
        p = torch.exp(tile - new).masked_fill(unseen, 0.0)
        rescale = torch.exp(m - new)
        z = z * (1.0 if keep_z else rescale) + p.sum(-1, keepdim=True)
        acc = acc * (1.0 if stale else rescale) + p @ v[..., j : j + block, :].to(wide)
        m = new
    return (acc / z.masked_fill(z == 0, 1.0)).to(q.dtype)


def _wrong_blocks(**knobs: Any) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return _blocks(q, k, v, options, **knobs)

    return attention


class _WrongBackward(torch.autograd.Function):
    """The right output with a backward pass that forgets the row sum D, or the scale."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], forget: str) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.options, ctx.forget = options, forget
        return _plain(q, k, v, **options)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v = ctx.saved_tensors
        group, (t, s) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
        kg, vg = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scale = q.shape[-1] ** -0.5 if ctx.options.get("scale") is None else ctx.options["scale"]
        unseen = torch.ones(t, s, dtype=torch.bool, device=q.device).triu(s - t + 1 if ctx.options.get("causal") else s)
        p = torch.softmax((q @ kg.mT * scale).masked_fill(unseen, -math.inf), -1).masked_fill(unseen, 0.0)
        dp = grads[0] @ vg.mT
        ds = p * (dp if ctx.forget == "rowsum" else dp - (p * dp).sum(-1, keepdim=True))
        scale = 1.0 if ctx.forget == "scale" else scale
        dk, dv = scale * ds.mT @ q, p.mT @ grads[0]
        dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
        return scale * ds @ kg, dk, dv, None, None


def _wrong_backward(forget: str) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        out: Tensor = _WrongBackward.apply(q, k, v, options, forget)
        return out

    return attention


def _modifies_q(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **options: Any) -> Tensor:
    with torch.no_grad():
        q *= q.shape[-1] ** -0.5 if scale is None else scale
    return _plain(q, k, v, scale=1.0, **options)


WRONG = {
    "no_scale": Wrong(_wrong(factor=lambda d: 1.0), "multiply the scores by 1/√d, or their spread grows with √d"),
    "scale_by_d": Wrong(_wrong(factor=lambda d: 1 / d), "divide the scores by the square root of d, not by d"),
    "zero_is_no_scale": Wrong(
        _wrong(zero_is_no_scale=True),
        "0.0 is a scale as well: `scale or …` takes it for none, `scale is None` does not",
    ),
    "scale_ignored": Wrong(
        _wrong(ignore_scale=True), "use the `scale` argument where it is given; 1/√d is its default"
    ),
    "softmax_over_queries": Wrong(
        _wrong(softmax_dim=-2),
        "normalise over the keys (the last axis of the scores), so that each query's weights sum to 1",
    ),
    "top_left_causal": Wrong(
        _wrong(top_left=True),
        "align the mask bottom-right: query i sees keys 0 … i + s − t, so that the last query sees every key",
    ),
    "cannot_see_itself": Wrong(_wrong(shift=-1), "the mask is off by one: query i sees key i + s − t as well"),
    "sees_one_ahead": Wrong(_wrong(shift=1), "the mask is off by one: query i must not see key i + s − t + 1"),
    "mask_after_softmax": Wrong(
        _wrong(mask_after=True),
        "mask before the softmax: afterwards the weights of the visible keys no longer sum to 1",
    ),
    "masked_rows_average": Wrong(
        _wrong(hidden=-1e9),
        "a query that sees no key gets 0; a large negative score in place of −∞ averages all values",
    ),
    "nan_rows": Wrong(
        _wrong(nan_rows=True),
        "a query that sees no key is 0/0 = NaN, or −∞ − (−∞) in the exponent: its output is 0",
    ),
    "not_normalised": Wrong(
        _wrong(normalise=False), "divide by the sum of the exponentials: each query's weights add up to 1"
    ),
    "no_max": Wrong(
        _wrong(subtract_max=False), "subtract each row's maximum before exp, which overflows above 88 in float32"
    ),
    "heads_interleaved": Wrong(
        _wrong(interleave=True), "query head i reads key head i // (h // h_kv): repeat_interleave, not repeat"
    ),
    "stale_accumulator": Wrong(
        _wrong_blocks(stale=True),
        "rescale the accumulator by exp(m_old − m_new) when a block of keys raises the maximum",
    ),
    "stale_denominator": Wrong(
        _wrong_blocks(keep_z=True), "rescale the running denominator too when a block of keys raises the maximum"
    ),
    "last_block_dropped": Wrong(
        _wrong_blocks(drop=True),
        "the last block of keys is smaller than the others, but it counts: round the number up",
    ),
    "backward_without_rowsum": Wrong(
        _wrong_backward("rowsum"),
        "dS = P ∘ (dP − D) with D = rowsum(dO ∘ O): the softmax's denominator depends on S too",
    ),
    "backward_without_scale": Wrong(
        _wrong_backward("scale"), "dQ and dK are multiplied by the scale, as the scores were"
    ),
    "modifies_q": Wrong(_modifies_q, "work on a copy: the caller's q is not yours to scale in place"),
}

COMMON: dict[str, Any] = {
    "inputs": inputs,
    "call": call,
    "oracle": formula.oracle,
    "tolerance": formula.tolerance,
    "compare": dict.fromkeys(("out", "q.grad", "k.grad", "v.grad"), formula.compare),
}
_FLASH = Contract(
    name="attention.flash",
    signature=f"{SIGNATURE}, block_q=None, block_k=None) -> (batch, heads, t, dv)",
    reference=flash.attention,
    cases=[*FORWARD, *TILED_FORWARD, *BACKWARD, *TILED_BACKWARD, *EMPTY],
    wrong={
        **WRONG,
        "narrow_sums": Wrong(
            _wrong_blocks(narrow=True),
            "keep the running denominator and accumulator in float32: in 16 bits a block is lost beside the sum",
        ),
        "materialises_scores": Wrong(_wrong(), MATERIALISES),
        "autograd_tiles": Wrong(_wrong_blocks(), AUTOGRAD_KEEPS),
    },
    **COMMON,
)


def _triton(module: str, function: str) -> Callable[..., Any]:
    """A function of a Triton module, which is imported when it is first called: Triton is not everywhere."""

    def reference(*args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(f"mlsys.attention.{module}"), function)(*args, **options)

    return reference


# The kernels have tiles of their own, and no float64. The interpreter takes some milliseconds a tile: shorter rows.
_FLASH_TRITON = replace(
    _FLASH,
    name="attention.flash_triton",
    signature=f"{SIGNATURE}) -> (batch, heads, t, dv)",
    reference=_triton("flash_triton", "attention"),
    cases=[
        *(case for case in [*FORWARD, *BACKWARD, *EMPTY] if case["dtype"] != "float64"),
        {**case(512, d=16, causal=True, backward=True), "linear_memory": True},
    ],
    wrong={name: wrong for name, wrong in _FLASH.wrong.items() if name != "narrow_sums"},
)
_PAGED = _attention_paged.contract("attention.paged")
_PAGED_TRITON = replace(
    _PAGED,
    name="attention.paged_triton",
    reference=_triton("paged_triton", "decode"),
    cases=[case for case in _PAGED.cases if case["dtype"] != "float64"],
)
CONTRACTS = {
    "naive": Contract(
        name="attention.naive",
        signature=f"{SIGNATURE}) -> (batch, heads, t, dv)",
        reference=naive.attention,
        cases=[*FORWARD, *BACKWARD, *EMPTY],
        wrong=WRONG,
        **COMMON,
    ),
    "flash": _FLASH,
    "flash_numba": replace(_FLASH, name="attention.flash_numba", reference=flash_numba.attention),
    "flash_triton": _FLASH_TRITON,
    "merge": _attention_merge.contract("attention.merge"),
    "variants": _attention_variants.contract("attention.variants"),
    "linear": _attention_linear.contract("attention.linear"),
    "kv_cache": _attention_kv_cache.contract("attention.kv_cache"),
    "paged": _PAGED,
    "paged_numba": _attention_paged.contract("attention.paged_numba", paged_numba.decode),
    "paged_triton": _PAGED_TRITON,
}
