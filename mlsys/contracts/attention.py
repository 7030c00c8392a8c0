"""Contracts of `mlsys.attention`: what scaled dot-product attention must compute, forward and backward.

The oracle is written apart from the modules: float64, one einsum a step, the key
head of each query head picked by its index. The tolerance is a multiple of the
dtype's rounding unit that grows with the logarithm of the number of terms summed,
as pairwise summation does, times the largest value expected: a plain PyTorch
baseline in the same dtype passes with room to spare, the wrong variants do not.

Cost:
    Under two seconds for all cases of a fast implementation.

Papers:
    Vaswani et al. 2017, arXiv:1706.03762, equation 1 (the formula).
    Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 4.2 (error of sums).

See also:
    `mlsys.contracts.core` (how a contract is run).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mlsys.attention import flash, naive
from mlsys.contracts.core import Case, Contract, Inputs, Mismatch, Results, Wrong

SIGNATURE = "attention(q, k, v, *, causal=False, scale=None"
ROUNDINGS = 16  # rounding units allowed per level of a pairwise sum


def case(
    t: int,
    s: int | None = None,
    *,
    b: int = 1,
    h: int = 1,
    h_kv: int | None = None,
    d: int = 8,
    dv: int | None = None,
    dtype: str = "float32",
    causal: bool = False,
    scale: float | None = None,
    scores: str = "normal",
    backward: bool = False,
) -> Case:
    """One case; what is left out takes the plainest value."""
    return {
        "b": b,
        "h": h,
        "h_kv": h_kv or h,
        "t": t,
        "s": t if s is None else s,
        "d": d,
        "dv": dv or d,
        "dtype": dtype,
        "causal": causal,
        "scale": scale,
        "scores": scores,
        "backward": backward,
    }


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
    case(12, 10, d=16, backward=True, dtype="bfloat16"),
]
TILED_FORWARD = [
    {**case(10, 13, h=2, causal=True), "block_q": 3, "block_k": 4},
    {**case(16, 60, scores="rising"), "block_q": 16, "block_k": 8},
    {**case(40, 33, dtype="bfloat16"), "block_q": 16, "block_k": 8},
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

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

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
    named |= {"causal": case["causal"], "scale": case["scale"]}
    return named | {name: case[name] for name in ("block_q", "block_k", "linear_memory") if name in case}


def call(impl: Callable[..., Any], inputs: Inputs) -> Results:
    """The output and, where asked for, the gradients."""
    options: dict[str, Any] = {"causal": inputs["causal"]}
    options |= {name: inputs[name] for name in ("scale", "block_q", "block_k") if inputs.get(name) is not None}
    backward = "grad_out" in inputs
    qkv = [inputs[name].requires_grad_(backward) for name in "qkv"]
    limit = inputs["q"].shape[2] * inputs["k"].shape[2] if inputs.get("linear_memory") else None
    _accepts(impl, options)
    with _Allocations(limit) as allocations:
        out = impl(*qkv, **options)
        if not isinstance(out, Tensor):
            raise Mismatch(f"returned {type(out).__name__}, expected a tensor (batch, heads, t, dv)")
        if out.dtype != qkv[0].dtype:
            raise Mismatch(f"returned {out.dtype} for inputs of {qkv[0].dtype}: the output has the dtype of the inputs")
        results: Results = {"out": out.detach()}
        if backward:
            results |= _gradients(out, qkv, inputs["grad_out"])
    for x in qkv:
        x.requires_grad_(False)
    if allocations.largest is not None:
        raise Mismatch(
            f"an operation made a tensor of shape {allocations.largest}, as many elements as the t × s scores "
            f"(t = s = {inputs['q'].shape[2]}): flash attention holds one tile of block_q × block_k at a time"
        )
    return results


def _accepts(impl: Callable[..., Any], options: dict[str, Any]) -> None:
    """Mismatch, with the signature that is wanted, if `impl` cannot be called with three tensors and these options."""
    try:
        inspect.signature(impl).bind(None, None, None, **options)
    except TypeError as error:
        blocks = ", block_q=None, block_k=None" if "block_q" in options else ""
        raise Mismatch(f"cannot be called as {SIGNATURE}{blocks}): {error}") from None
    except ValueError:
        return  # a builtin that does not tell its signature


def _gradients(out: Tensor, qkv: list[Tensor], grad_out: Tensor) -> Results:
    if out.requires_grad is False:
        raise Mismatch("the output has no gradient: it was computed outside autograd (detach, no_grad or NumPy?)")
    if out.shape != grad_out.shape:
        raise Mismatch(f"out: shape {tuple(out.shape)}, expected {tuple(grad_out.shape)}")
    grads = torch.autograd.grad(out, qkv, grad_out, allow_unused=True)
    missing = [name for name, grad in zip("qkv", grads, strict=True) if grad is None]
    if missing:
        raise Mismatch(f"no gradient reaches {', '.join(missing)}")
    return {f"{name}.grad": grad for name, grad in zip("qkv", grads, strict=True)}


class _Allocations(TorchDispatchMode):
    """Notes the first tensor with at least `limit` elements that an operation returns."""

    def __init__(self, limit: int | None) -> None:
        super().__init__()
        self.limit = limit
        self.largest: tuple[int, ...] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.limit is not None:
            for x in result if isinstance(result, tuple | list) else (result,):
                # the storage, since an expanded view has many elements and holds few
                held = x.untyped_storage().nbytes() // x.element_size() if isinstance(x, Tensor) else 0
                if held >= self.limit and self.largest is None:
                    self.largest = tuple(x.shape)
        return result


def oracle(inputs: Inputs) -> Mapping[str, np.ndarray]:
    """The formula in float64, with gradients by autograd through it."""
    q, k, v = (inputs[name].detach().double().cpu().requires_grad_("grad_out" in inputs) for name in "qkv")
    with torch.enable_grad():
        out = _formula(q, k, v, inputs["causal"], inputs["scale"])
    results = {"out": out.detach().numpy()}
    if "grad_out" in inputs:
        grads = torch.autograd.grad(out, (q, k, v), inputs["grad_out"].double().cpu())
        results |= {f"{name}.grad": grad.numpy() for name, grad in zip("qkv", grads, strict=True)}
    return results


def _formula(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    h, t, d = q.shape[1:]
    h_kv, s = k.shape[1:3]
    reads = torch.tensor([head * h_kv // h for head in range(h)])
    scores = torch.einsum("bhtd,bhsd->bhts", q, k[:, reads]) * (1 / math.sqrt(d) if scale is None else scale)
    visible = torch.arange(s)[None, :] <= torch.arange(t)[:, None] + s - t if causal else torch.ones(t, s).bool()
    # exp(score − largest visible score), and 0 for a row that sees nothing
    top = torch.where(visible, scores, -math.inf).amax(-1, keepdim=True).clamp(min=-1e300).detach()
    weights = torch.where(visible, torch.exp(torch.where(visible, scores - top, 0.0)), 0.0)
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total > 0, total, 1.0)
    return torch.einsum("bhts,bhse->bhte", weights, v[:, reads])


def tolerance(inputs: Inputs, name: str, want: np.ndarray) -> float:
    """Rounding units × levels of the sum × largest value; scores that are large amplify their own rounding."""
    eps = torch.finfo(inputs["q"].dtype).eps
    d, terms = inputs["q"].shape[-1], max(inputs["q"].shape[2], inputs["k"].shape[2])
    scale = 1 / math.sqrt(d) if inputs["scale"] is None else inputs["scale"]
    norms = [float(inputs[x].detach().double().norm(dim=-1).max()) for x in "qk"] if want.size else [0.0, 0.0]
    largest_score = abs(scale) * norms[0] * norms[1]
    largest = float(np.abs(want).max(initial=0.0))
    return ROUNDINGS * eps * max(largest, 1e-3) * (math.log2(terms + d) + largest_score) / 4


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
    mask_after: bool = False,
) -> Tensor:
    """Attention in plain torch, with one knob for each mistake."""
    h, t, d = q.shape[1:]
    group, s = h // k.shape[1], k.shape[2]
    k, v = (x.repeat(1, group, 1, 1) if interleave else x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.mT * (factor(d) if scale is None or ignore_scale else scale)
    unseen = torch.ones(t, s, dtype=torch.bool, device=q.device).triu((1 if top_left else s - t + 1) + shift)
    if causal and not mask_after:
        scores = scores.masked_fill(unseen, hidden)
    if subtract_max:
        weights = torch.softmax(scores, softmax_dim)
    else:
        weights = torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True)
    if causal and (hidden == -math.inf or mask_after):
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
) -> Tensor:
    """The online softmax over blocks of keys, with its own mistakes."""
    scale = options.get("scale")
    block = options.get("block_k") or 64
    h, t, d = q.shape[1:]
    group, s = h // k.shape[1], k.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    unseen = torch.ones(t, s, dtype=torch.bool, device=q.device).triu(s - t + 1 if options.get("causal") else s)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.mT * (d**-0.5 if scale is None else scale)).to(wide).masked_fill(unseen, -1e30)
    m = q.new_full((*q.shape[:-1], 1), -1e30, dtype=wide)
    z, acc = torch.zeros_like(m), m.new_zeros((*q.shape[:-1], v.shape[-1]))
    end = max(block, s - s % block) if drop else s
    for j in range(0, end, block):
        tile = scores[..., j : j + block]
        new = torch.maximum(m, tile.amax(-1, keepdim=True))
        p = torch.exp(tile - new).masked_fill(unseen[:, j : j + block], 0.0)
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

COMMON: dict[str, Any] = {"inputs": inputs, "call": call, "oracle": oracle, "tolerance": tolerance}
CONTRACTS = {
    "naive": Contract(
        name="attention.naive",
        signature=f"{SIGNATURE}) -> (batch, heads, t, dv)",
        reference=naive.attention,
        cases=[*FORWARD, *BACKWARD],
        wrong=WRONG,
        **COMMON,
    ),
    "flash": Contract(
        name="attention.flash",
        signature=f"{SIGNATURE}, block_q=None, block_k=None) -> (batch, heads, t, dv)",
        reference=flash.attention,
        cases=[*FORWARD, *TILED_FORWARD, *BACKWARD, *TILED_BACKWARD],
        wrong={
            **WRONG,
            "materialises_scores": Wrong(
                _wrong(), "hold one tile of block_q × block_k scores at a time; never a tensor of t × s elements"
            ),
        },
        **COMMON,
    ),
}
