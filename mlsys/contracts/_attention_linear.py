"""What linear attention must compute, whichever form it takes: steps, chunks, or one masked matrix.

The oracle is none of the three: float64, one row of the matrix L after another, each the row above times
a with a one put behind it, and then every product written out. It takes a itself, not its logarithm.

The tolerance comes from the same formula with the signs taken off: all of it is sums of products, so the
formula of |q|, |k|, |v| is the sum of what is added up, and its gradients likewise. Rounding is a small
part of that, of √n terms, and of what a sum of logarithms spans.

Memory is looked at in one case: no operation may make a tensor of t × t elements.

Papers:
    Those of `mlsys.attention.linear`.

See also:
    `mlsys.contracts.attention` (the contracts of softmax attention).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlsys.attention import linear
from mlsys.contracts import _attention_formula as formula
from mlsys.contracts._attention_memory import Held
from mlsys.contracts.core import Case, Contract, Inputs, Mismatch, Results, Wrong, accepts

SIGNATURE = "attention(q, k, v, *, decay=None, state=None, return_state=False, chunk=64)"
ROOM = 4.0  # how many times the rounding of one step is allowed
MATERIALISES = "the quadratic form belongs within a chunk; between chunks, only a state of d × dv is passed on"


def case(
    t: int,
    *,
    b: int = 1,
    h: int = 1,
    h_k: int | None = None,
    h_v: int | None = None,
    d: int = 4,
    dv: int = 3,
    decay: str | None = None,
    state: bool = False,
    chunk: int | None = None,
    dtype: str = "float32",
    values: str = "normal",
    backward: bool = False,
    linear_memory: bool = False,
) -> Case:
    """One case; what is left out takes the plainest value.

    `decay` is of each "head", "position" or "channel"; "strong" and "reset" are of positions, the one forgets
    up to e²¹ a step, the other everything at two of them.
    """
    return {
        "b": b,
        "h": h,
        "h_k": h_k or h,
        "h_v": h_v or h,
        "t": t,
        "d": d,
        "dv": dv,
        "decay": decay,
        "state": state,
        "chunk": chunk,
        "dtype": dtype,
        "values": values,
        "backward": backward,
        "linear_memory": linear_memory,
    }


CASES = [
    case(1),
    case(5, dv=4),
    case(6, b=2, h=2, decay="head"),
    case(7, h=2, decay="position"),
    case(7, h=2, decay="position", state=True),
    case(11, h=2, chunk=4),
    case(11, h=2, decay="head", chunk=4, state=True),
    case(12, b=2, h=2, decay="position", chunk=4, state=True),
    case(13, h=2, decay="channel", chunk=4, state=True),
    case(9, h=4, h_k=2, h_v=2, decay="position", chunk=4, state=True),  # grouped queries
    case(9, h=2, h_k=2, h_v=4, decay="position", chunk=4, state=True),  # two groups of B and C, as in Mamba-2
    case(1, h=2, decay="position", state=True),  # generation
    case(70, decay="strong", dv=4),  # e^{-cumulative sum} is more than float32 holds
    case(20, decay="strong", chunk=8, state=True),
    case(20, decay="reset", chunk=8, state=True),
    case(130, h=2, d=16, dv=16, decay="position", state=True),  # no multiple of 64
    case(150, h=2, d=16, dv=8, decay="channel"),
    case(10, decay="position", chunk=4, state=True, dtype="float64"),
    case(100, d=16, dv=16, decay="position", dtype="bfloat16"),
    case(1024, dv=4, values="positive", dtype="bfloat16"),  # a sum in 16 bits stops growing at 256
    case(6, h=2, backward=True),
    case(11, b=2, h=2, decay="head", chunk=4, backward=True),
    case(11, h=2, decay="position", chunk=4, state=True, backward=True),
    case(10, h=2, decay="channel", chunk=4, state=True, backward=True),
    case(9, h=2, h_k=2, h_v=4, decay="position", chunk=4, state=True, backward=True),
    case(14, decay="reset", chunk=4, state=True, backward=True),
    case(1024, d=4, dv=4, decay="position", backward=True, linear_memory=True),
]


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """q, k, v, and as the case has them decay, state and the gradients of both results."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, case["dtype"])
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return 1 + 0.1 * x if case["values"] == "positive" else x

    b, t, d, dv = (case[name] for name in ("b", "t", "d", "dv"))
    heads = max(case["h_k"], case["h_v"])
    tensors = {"q": draw(b, case["h"], t, d), "k": draw(b, case["h_k"], t, d), "v": draw(b, case["h_v"], t, dv)}
    if case["backward"]:
        tensors["grad_out"] = draw(b, max(case["h"], heads), t, dv)
    named: Inputs = {name: x.to(dtype) for name, x in tensors.items()}
    if case["decay"]:
        shape = {"head": (heads,), "channel": (b, heads, t, d)}.get(case["decay"], (b, heads, t))
        log_a = -torch.rand(shape, generator=generator, dtype=torch.float64)
        if case["decay"] == "strong":
            log_a = 20 * log_a - 1
        if case["decay"] == "reset":
            log_a[..., t // 3] = log_a[..., t // 2] = -math.inf
        named["decay"] = log_a.to(wide)
    if case["state"]:
        named["state"] = draw(b, heads, d, dv).to(wide)
        if case["backward"]:
            named["grad_state"] = draw(b, heads, d, dv).to(wide)
    named = {name: x.to(device) for name, x in named.items()}
    return named | {"chunk": case["chunk"], "linear_memory": case["linear_memory"]}


def call(impl: Callable[..., Any], inputs: Inputs) -> Results:
    """The output, the state at the end where one was given, and the gradients where asked for."""
    options: dict[str, Any] = {name: inputs[name] for name in ("decay", "state") if name in inputs}
    if inputs["chunk"] is not None:
        options["chunk"] = inputs["chunk"]
    if "state" in inputs:
        options["return_state"] = True
    accepts(impl, 3, options, SIGNATURE)
    backward = "grad_out" in inputs
    wanted: list[str] = [name for name in ("q", "k", "v", "decay", "state") if name in inputs and backward]
    given = {name: inputs[name].detach().requires_grad_(name in wanted) for name in ("q", "k", "v")}
    for name in ("decay", "state"):
        if name in options:
            options[name] = options[name].detach().requires_grad_(name in wanted)
    if inputs["linear_memory"]:
        t = inputs["q"].shape[2]
        with Held() as held:
            results = _results(impl, given, options, inputs, wanted)
        held.refuse_scores(t, t, MATERIALISES)
        return results
    return _results(impl, given, options, inputs, wanted)


def _results(
    impl: Callable[..., Any], given: dict[str, Tensor], options: dict[str, Any], inputs: Inputs, wanted: list[str]
) -> Results:
    got = impl(given["q"], given["k"], given["v"], **options)
    if "state" in inputs and not (isinstance(got, tuple | list) and len(got) == 2):
        raise Mismatch(f"returned {type(got).__name__} with return_state=True, expected the output and the state")
    parts = list(got) if "state" in inputs else [got]
    for name, part in zip(("output", "state"), parts, strict=False):
        if not isinstance(part, Tensor):
            alone = isinstance(part, tuple | list) and "state" not in inputs
            remedy = ": the state is returned with return_state only" if alone else ""
            raise Mismatch(f"the {name} is {type(part).__name__}, expected a tensor{remedy}")
    if parts[0].dtype != given["q"].dtype:
        raise Mismatch(f"the output is {parts[0].dtype} for inputs of {given['q'].dtype}, expected their dtype")
    named = dict(zip(("out", "state"), parts, strict=False))
    results: Results = {name: part.detach() for name, part in named.items()}
    if wanted:
        leaves = {name: x for name, x in {**given, **options}.items() if name in wanted}
        weights = {name: inputs[f"grad_{name}"].to(part.dtype) for name, part in named.items()}
        results |= formula.gradients(named, leaves, weights)
    return results


def oracle(inputs: Inputs) -> Mapping[str, np.ndarray]:
    """The unrolled recurrence in float64, with gradients by autograd through it."""
    return {name: x.numpy() for name, x in _unrolled(inputs, lambda x: x).items()}


def _unrolled(inputs: Inputs, sign: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    backward = "grad_out" in inputs
    names = [name for name in ("q", "k", "v", "decay", "state") if name in inputs]
    x = {name: inputs[name].detach().double().cpu() for name in names}
    x = {name: (y if name == "decay" else sign(y)).requires_grad_(backward) for name, y in x.items()}
    with torch.enable_grad():
        parts = _formula(**x)
    results = {name: part.detach() for name, part in parts.items() if name == "out" or "state" in inputs}
    if backward:
        of = {"out": sign(inputs["grad_out"].double().cpu())}
        if "state" in inputs:
            of["state"] = sign(inputs["grad_state"].double().cpu())
        grads = torch.autograd.grad([parts[name] for name in of], list(x.values()), list(of.values()))
        results |= {f"{name}.grad": grad for name, grad in zip(x, grads, strict=True)}
    return results


def _formula(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, state: Tensor | None = None
) -> dict[str, Tensor]:
    (b, _, t, d), dv = q.shape, v.shape[3]
    heads = max(k.shape[1], v.shape[1])
    h = max(q.shape[1], heads)

    def served(x: Tensor, to: int) -> Tensor:
        return x[:, torch.tensor([i * x.shape[1] // to for i in range(to)])]

    k, v = served(k, heads), served(v, heads)
    a = torch.ones(b, heads, t, 1, dtype=q.dtype) if decay is None else decay.exp()
    if a.ndim < 4:
        a = (a[:, None] if a.ndim == 1 else a).expand(b, heads, t)[..., None]
    written = torch.einsum("bhtd,bhte->bhtde", k, v)  # what each position adds
    s = torch.zeros(b, heads, d, dv, dtype=q.dtype) if state is None else state
    kept = torch.ones(b, heads, 1, a.shape[-1], dtype=q.dtype)  # of the state before, and of each position: L's row
    all_written = torch.cat([s[:, :, None], written], 2)
    outs = []
    for i in range(t):
        kept = kept * a[:, :, i, None]
        kept = torch.cat([kept, torch.ones_like(kept[:, :, :1])], 2)
        s = torch.einsum("bhjd,bhjde->bhde", kept.expand(-1, -1, -1, d), all_written[:, :, : i + 2])
        outs.append(torch.einsum("bhd,bhde->bhe", served(q[:, :, i], h), served(s, h)))
    return {"out": torch.stack(outs, 2), "state": s}


def tolerance(inputs: Inputs, name: str, want: np.ndarray) -> float:
    """ROOM × what rounding leaves of the sums without their signs: √n terms, and sums of logarithms."""
    if not want.size:
        return 0.0
    sums = float(_unrolled(inputs, torch.abs)[name].abs().max())
    dtype = inputs["q"].dtype
    t, d = inputs["q"].shape[2:]
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    spans = 0.0
    if "decay" in inputs:
        log_a = inputs["decay"].double().abs()
        log_a = torch.where(log_a.isfinite(), log_a, 0.0)
        spans = float(log_a.max()) * t if log_a.ndim == 1 else float(log_a.sum(2).max())
    narrow = torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0.0
    return (ROOM * (wide * math.sqrt(t + d) + narrow) + wide * spans) * max(sums, 1e-6)


# --- wrong variants ---------------------------------------------------------------------------------------------------


def _chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    state: Tensor | None = None,
    return_state: bool = False,
    chunk: int = 64,
    interleave: bool = False,
    scaled: bool = False,
    shifted: bool = False,
    own_write: bool = False,
    last_step_only: bool = False,
    diagonal: int = 0,
    causal: bool = True,
    carry: bool = True,
    decay_carried: bool = True,
    decay_read: bool = True,
    decay_written: bool = True,
    ignore_state: bool = False,
    padded: bool = False,
    detached: bool = False,
    factored: bool = False,
    softmaxed: bool = False,
    normalised: bool = False,
) -> Any:
    """Chunks one after another in plain torch and float64, with one knob for each mistake."""
    dtype, (b, _, t, d), dv = q.dtype, q.shape, v.shape[3]
    heads = max(k.shape[1], v.shape[1])
    h = max(q.shape[1], heads)

    def served(x: Tensor) -> Tensor:
        r = h // x.shape[1]
        return (x.repeat(1, r, *[1] * (x.ndim - 2)) if interleave else x.repeat_interleave(r, 1)).double()

    q, k, v = served(q), served(k), served(v)
    if scaled:
        q = q * d**-0.5
    log_a = torch.zeros(b, heads, t, 1, dtype=torch.float64) if decay is None else decay
    if detached:
        log_a = log_a.detach()
    if log_a.ndim < 4:
        log_a = (log_a[:, None] if log_a.ndim == 1 else log_a).expand(b, heads, t)[..., None]
    log_a = served(log_a.clamp(min=-1e5))  # finite, for the differences below
    if shifted:
        log_a = torch.cat([torch.zeros_like(log_a[:, :, :1]), log_a[:, :, :-1]], 2)
    s = q.new_zeros(b, h, d, dv) if state is None or ignore_state else served(state)
    outs = []
    for i in range(0, t, chunk):
        qi, ki, vi, ai = (x[:, :, i : i + chunk] for x in (q, k, v, log_a))
        c = qi.shape[2]
        cum = ai.cumsum(2)
        start = cum - ai if own_write else cum  # from where a position's own write begins to fade
        if factored:
            left, right = (qi.float() * cum.float().exp()), (ki.float() * (-cum).float().exp())
            scores = (left @ right.mT).double()
        else:
            spans = -(cum[:, :, :, None] - start[:, :, None]).abs()  # (b, h, c, c, ·)
            if last_step_only:
                spans = ai[:, :, :, None].expand_as(spans).masked_fill(torch.eye(c).bool()[..., None], 0.0)
            scores = torch.einsum("bhid,bhjd,bhijd->bhij", qi, ki, spans.exp().expand(*spans.shape[:4], d))
        if softmaxed:
            scores = scores.masked_fill(torch.ones(c, c, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
        if causal:
            scores = scores.tril(diagonal)
        outs.append(scores @ vi + (qi * cum.exp() if decay_read else qi) @ s)
        left_over = cum[:, :, -1:] - start
        if padded:
            rest = (chunk - c) * ai[:, :, -1:]
            left_over, cum = left_over + rest, cum + rest
        written = (ki * left_over.exp() if decay_written else ki).mT @ vi
        kept = s * cum[:, :, -1, :, None].exp() if decay_carried else s
        s = kept + written if carry else torch.zeros_like(s) if i + chunk < t else kept + written
    out = torch.cat(outs, 2)
    if normalised:
        out = out / (q * k.cumsum(2)).sum(-1, keepdim=True)
    out = out.to(dtype)
    s = s[:, :: h // heads].to(torch.promote_types(dtype, torch.float32))
    return (out, s) if return_state else out


def _wrong(**knobs: Any) -> Callable[..., Any]:
    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return _chunks(q, k, v, **options, **knobs)

    return attention


def _not_log(q: Tensor, k: Tensor, v: Tensor, *, decay: Tensor | None = None, **options: Any) -> Any:
    """Step by step with `decay` as it comes."""
    (b, heads, t, d), dv = k.shape, v.shape[3]
    if decay is None or not q.shape[1] == heads == v.shape[1]:
        return linear.attention(q, k, v, decay=decay, **options)
    state = options.get("state")
    s = q.new_zeros(b, heads, d, dv) if state is None else state
    factors = decay[None, :, None, None] if decay.ndim == 1 else decay.reshape(b, heads, t, -1)
    outs = _steps(q, k, v, s, factors.expand(b, heads, t, d).to(s.dtype))
    return outs if options.get("return_state") else outs[0]


def _narrow(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """Step by step with a state in the dtype of the inputs; right in 32 bits."""
    if q.dtype not in (torch.bfloat16, torch.float16) or options.get("decay") is not None:
        return linear.attention(q, k, v, **options)
    return _steps(q, k, v, q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]), torch.ones_like(k))[0]


def _steps(q: Tensor, k: Tensor, v: Tensor, s: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence, whose state keeps its dtype and is multiplied by `factors` (b, h, t, d)."""
    outs = []
    for i in range(q.shape[2]):
        s = s * factors[:, :, i, :, None] + (k[:, :, i, :, None] * v[:, :, i, None]).to(s.dtype)
        outs.append((q[:, :, i, None].to(s.dtype) @ s)[:, :, 0])
    return torch.stack(outs, 2).to(q.dtype), s


def _modifies_state(q: Tensor, k: Tensor, v: Tensor, *, state: Tensor | None = None, **options: Any) -> Any:
    got = _chunks(q, k, v, state=state, **options)
    if state is not None:
        with torch.no_grad():
            state.copy_(got[1])
    return got


WRONG = {
    "not_causal": Wrong(_wrong(causal=False), "position i reads positions 0 … i: mask the scores above the diagonal"),
    "diagonal_missing": Wrong(
        _wrong(diagonal=-1), "write before you read: oₜ = Sₜᵀ qₜ, so a position sees its own key and value"
    ),
    "scaled": Wrong(_wrong(scaled=True), "no 1/√d here: that is for the softmax; the caller scales q, if at all"),
    "softmaxed": Wrong(
        _wrong(softmaxed=True), "no softmax: the products q · k are the weights, whatever their signs and their sum"
    ),
    "normalised": Wrong(
        _wrong(normalised=True),
        "do not divide by q · Σ k: oₜ = Sₜᵀ qₜ as it is, which has no sum of weights to make 1",
    ),
    "own_write_decayed": Wrong(
        _wrong(own_write=True),
        "Sₜ = aₜ Sₜ₋₁ + kₜ vₜᵀ: decay the old state, then add; what is written now does not fade yet",
    ),
    "decay_of_the_step_before": Wrong(
        _wrong(shifted=True), "Sₜ = aₜ Sₜ₋₁ + kₜ vₜᵀ: from t − 1 to t it is aₜ that counts, of the later position"
    ),
    "decay_not_log": Wrong(_not_log, "`decay` is log a: take its exponential before you multiply"),
    "one_step_for_many": Wrong(
        _wrong(last_step_only=True),
        "from j to i the decay is the product aᵢ ⋯ aⱼ₊₁: exp of the sum of the logarithms between, not of the last one",
    ),
    "exp_of_minus_cumsum": Wrong(
        _wrong(factored=True),
        "exp(cumᵢ) · exp(−cumⱼ) overflows once a chunk forgets much: take the difference first, then exp",
    ),
    "state_not_carried": Wrong(_wrong(carry=False), "a chunk begins with the state that the chunk before has left"),
    "carried_undecayed": Wrong(
        _wrong(decay_carried=False),
        "the state fades over a chunk like anything else: multiply it by the chunk's whole decay before you add",
    ),
    "read_undecayed": Wrong(
        _wrong(decay_read=False),
        "when position i reads the state from before the chunk, that has faded by aᵢ ⋯ a₁ of the chunk",
    ),
    "written_undecayed": Wrong(
        _wrong(decay_written=False),
        "what position j writes has faded by the end of its chunk, by all the decays after j",
    ),
    "padding_decays_the_state": Wrong(
        _wrong(padded=True), "where you fill up the last chunk, fill up the decay with log a = 0"
    ),
    "state_ignored": Wrong(_wrong(ignore_state=True), "begin with the `state` that is given, not with zero"),
    "heads_interleaved": Wrong(
        _wrong(interleave=True), "head i is served by head i // (h // its heads): repeat_interleave, not repeat"
    ),
    "decay_without_gradient": Wrong(
        _wrong(detached=True), "gates are learned: let the gradient through to `decay` (no detach)"
    ),
    "narrow_state": Wrong(_narrow, "keep the state in float32: in 16 bits a step is lost beside the sum of many"),
    "modifies_state": Wrong(_modifies_state, "return a new state: the one that was given is the caller's"),
    "materialises_scores": Wrong(
        lambda q, k, v, **options: _chunks(q, k, v, **{**options, "chunk": max(1, q.shape[2])}), MATERIALISES
    ),
}


def contract(name: str) -> Contract:
    """The contract, under this name."""
    return Contract(
        name=name,
        signature=f"{SIGNATURE} -> (batch, heads, t, dv), with return_state also (batch, heads, d, dv)",
        reference=linear.attention,
        cases=CASES,
        inputs=inputs,
        call=call,
        oracle=oracle,
        tolerance=tolerance,
        wrong=WRONG,
    )
