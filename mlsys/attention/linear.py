"""Attention without the softmax: the whole past fits in one matrix, which decays; chunks make it fast.

Softmax attention must keep every key, for exp(q · k) does not split into a part of q
and a part of k. Leave the exponential out and it does. With S (d × dv) in place of a cache,

    Sₜ = aₜ Sₜ₋₁ + kₜ vₜᵀ          write: forget a little, then add an outer product
    oₜ = Sₜᵀ qₜ                    read

Three papers' models are one choice of the decay a each, given here by its logarithm:

    a = 1                 linear attention        `decay=None`
    a of the head         retention               `decay` (h,)
    a of the position     Mamba-2, gated RetNet   `decay` (b, h, t)
    a of the channel too  gated linear attention  `decay` (b, h, t, d): one for each row of S

**Dual.** Unroll the recurrence and it is attention again, with a mask that fades:

    O = (L ∘ Q Kᵀ) V,     Lᵢⱼ = aᵢ aᵢ₋₁ ⋯ aⱼ₊₁  for j ≤ i,  else 0

`recurrent` is the first form: t·d·dv work, but t steps one after another. `quadratic` is the
second: t²·d work, but matmuls. `attention` cuts the sequence into chunks of C and takes the
quadratic form within a chunk and the recurrence between chunks, which leaves four matmuls
and t/C steps:

    within a chunk       (L ∘ Q Kᵀ) V                          C × C scores
    what a chunk writes  Σⱼ (a_C ⋯ aⱼ₊₁) kⱼ vⱼᵀ                decayed to the chunk's end
    chunk to chunk       S ← (a_C ⋯ a₁) S + what it writes
    what a chunk reads   (aᵢ ⋯ a₁) Sᵀ qᵢ                       S as it was before the chunk

All three give the same numbers, to rounding, and so do their gradients.

**Stable.** No exponent here is positive unless a decay is: each is a sum of log a over the
very steps it spans, never a difference of two longer sums. exp(cumᵢ) · exp(−cumⱼ), the
shortcut that factors L, overflows once a chunk forgets more than e⁸⁸; a difference
cumᵢ − cumⱼ rounds to what the longer sums leave. So a = 0 (log a = −∞) works too: it empties
the state, as the first token of a packed document wants. With a decay of each channel, L
does not come out of the product, so scores are built by halves: the later half of a block
against the earlier one, both decayed to the border between them, then each half likewise.

Who shares: a head of q, k or v may serve several, head i being served by i // (h // its heads).
Grouped queries are fewer k and v; Mamba-2, one B and C for all heads, is fewer q and k.
The state, and so the decay, has the heads of k or v, whichever are more.

Cost:
    FLOPs a head. Chunks: 2·t·C·(d + dv) + 4·t·d·dv, half of the first term above the diagonal and thrown away.
    Recurrent: 4·t·d·dv. Quadratic: 2·t²·(d + dv). One step of generation: 4·d·dv, whatever came before.
    A decay a position costs t·C exponentials; one a channel, t·d·log₂ C, and its scores half the FLOPs.

Memory:
    State d × dv a head. Chunks: beyond inputs and result, scores and states of four chunks; for the backward
    pass those of all, t·C and t·d·dv/C, still linear. Recurrent: one state, or t of them if gradients are to
    come. Quadratic t².
    16-bit inputs are computed in float32, and the state is float32: it is a sum over the whole past.

Where it loses: a state of d × dv numbers cannot recall more pairs than that, which is why models mix in layers of
softmax attention. In time, on a CPU below some hundred positions, where one quadratic product is as fast.

Papers:
    Katharopoulos et al. 2020, arXiv:2006.16236 (sections 3.2 to 3.4: features, equation 9; the recurrence, 16 to 20).
    Sun et al. 2023, arXiv:2307.08621 (section 2.1: retention's three forms; equation 8 for the decay of each head).
    Yang et al. 2023, arXiv:2312.06635 (section 4: a decay of each channel, and a second level of chunks).
    Dao & Gu 2024, arXiv:2405.21060 (section 5: the duality; section 6: the chunked algorithm, its cost in 6.3).

See also:
    `mlsys.attention.naive` (with the softmax), `mlsys.attention.flash` (what it is to beat).
"""

import math
from collections.abc import Iterable
from itertools import repeat
from typing import Literal, Unpack, overload

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mlsys.attention._linear_inputs import Call, Feature, Options, check_chunk, enter

TOGETHER = 4  # chunks: of 64 positions and 8 heads their scores are 0.5 MB, the size of a core's cache


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunk: int = 64,
    return_state: Literal[False] = False,
    **options: Unpack[Options],
) -> Tensor: ...


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, chunk: int = 64, return_state: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Float[Tensor, "b hq t d"],
    k: Float[Tensor, "b hk t d"],
    v: Float[Tensor, "b hv t dv"],
    *,
    decay: Float[Tensor, "..."] | None = None,
    chunk: int = 64,
    state: Float[Tensor, "b hs f e"] | None = None,
    return_state: bool = False,
    feature: Feature | None = None,
    normalise: bool = False,
) -> Float[Tensor, "b h t dv"] | tuple[Float[Tensor, "b h t dv"], Float[Tensor, "b hs f e"]]:
    """Linear attention in chunks; causal: position i reads positions 0 … i. There is no scale: multiply q by one.

    `decay`         log a, at most 0 as a rule, −∞ to forget all: (h,), (b, h, t) or (b, h, t, d); None: nothing
                    is forgotten. h are the heads of the state: the more of k's and v's. Gets a gradient.
    `chunk`         how many positions take the quadratic form together; any, also longer than t. With a decay
                    of each channel it is rounded up to a power of two.
    `state`         S from an earlier call, (b, h, d, dv): what came before. `return_state`: also return S at the end,
                    in float32 at least.
    `feature`       applied to q and to k first, such as `elu_plus_one`; it may change d.
    `normalise`     divide each row by the sum of its weights, Σⱼ Lᵢⱼ qᵢ·kⱼ (Katharopoulos et al., equation 9); 0 where
                    that sum is 0. For features that are positive. The state then has one more column, the sum of keys.

    Any length, also 0. NaN and infinity are not looked for: a NaN in `k` or `v` reaches all that follows, and may reach
    what comes before it in its chunk, since 0 · NaN is NaN.
    Raises TypeError or ValueError naming the argument if shapes, dtypes or devices are wrong.
    """
    check_chunk(chunk)
    call = enter(q, k, v, decay, state, feature, normalise)
    out, last = _chunked(call, chunk)
    return (call.output(out), last.flatten(1, 2)) if return_state else call.output(out)


@overload
def recurrent(
    q: Tensor, k: Tensor, v: Tensor, *, return_state: Literal[False] = False, **options: Unpack[Options]
) -> Tensor: ...


@overload
def recurrent(
    q: Tensor, k: Tensor, v: Tensor, *, return_state: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...


def recurrent(
    q: Float[Tensor, "b hq t d"],
    k: Float[Tensor, "b hk t d"],
    v: Float[Tensor, "b hv t dv"],
    *,
    decay: Float[Tensor, "..."] | None = None,
    state: Float[Tensor, "b hs f e"] | None = None,
    return_state: bool = False,
    feature: Feature | None = None,
    normalise: bool = False,
) -> Float[Tensor, "b h t dv"] | tuple[Float[Tensor, "b h t dv"], Float[Tensor, "b hs f e"]]:
    """The same, one position after another: the definition. Options and errors as in `attention`."""
    call = enter(q, k, v, decay, state, feature, normalise)
    s, steps = call.state, []
    log_a = repeat(None) if call.decay is None else call.decay.unbind(-2)
    for qt, kt, vt, at in zip(call.q.unbind(-2), call.k.unbind(-2), call.v.unbind(-2), log_a, strict=False):
        o, s = _advance(qt, kt, vt, at, s)
        steps.append(o)
    stacked, s = (torch.stack(steps, dim=-2), s) if steps else _nothing(call)
    out = call.output(stacked)
    return (out, s.flatten(1, 2)) if return_state else out


def quadratic(
    q: Float[Tensor, "b hq t d"],
    k: Float[Tensor, "b hk t d"],
    v: Float[Tensor, "b hv t dv"],
    *,
    decay: Float[Tensor, "..."] | None = None,
    feature: Feature | None = None,
    normalise: bool = False,
) -> Float[Tensor, "b h t dv"]:
    """The same as one masked matrix, (L ∘ Q Kᵀ) V: t × t scores, or t × t × d with a decay of each channel.

    No state: all is there. Options and errors as in `attention`.
    """
    call = enter(q, k, v, decay, None, feature, normalise)
    if call.decay is not None and call.decay.shape[-1] > 1:
        fade = _fade(call.decay.mT)  # (b, g, r, d, t, t)
        return call.output(torch.einsum("...id,...jd,...dji->...ij", call.q, call.k, fade).tril() @ call.v)
    return call.output(_scores(call.q, call.k, call.decay) @ call.v)


def step(
    q: Float[Tensor, "b hq d"],
    k: Float[Tensor, "b hk d"],
    v: Float[Tensor, "b hv dv"],
    state: Float[Tensor, "b hs f e"] | None = None,
    decay: Float[Tensor, "..."] | None = None,
    *,
    feature: Feature | None = None,
    normalise: bool = False,
) -> tuple[Float[Tensor, "b h dv"], Float[Tensor, "b hs f e"]]:
    """One position of generation: its output and the next state, in memory that does not grow.

    Tensors without the axis of positions: q (b, h, d), and `decay` (h,), (b, h) or (b, h, d). `state` is None for the
    first position, else what the last call has returned; it is left as it was. Otherwise as `attention`.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if isinstance(x, Tensor) and x.ndim != 3:
            raise ValueError(f"{name} must be one position, (batch, heads, head_dim), got shape {tuple(x.shape)}")
    if isinstance(decay, Tensor) and decay.ndim > 1:
        decay = decay.unsqueeze(2)
    q, k, v = (x.unsqueeze(2) if isinstance(x, Tensor) else x for x in (q, k, v))
    out, last = recurrent(q, k, v, decay=decay, state=state, return_state=True, feature=feature, normalise=normalise)
    return out.squeeze(2), last


def ssd(
    x: Float[Tensor, "b t h p"],
    dt: Float[Tensor, "b t h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    D: Float[Tensor, " h"] | None = None,
    *,
    chunk: int = 64,
    state: Float[Tensor, "b h p n"] | None = None,
    return_state: bool = False,
) -> Float[Tensor, "b t h p"] | tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"]]:
    """Mamba-2's layer in its own letters: a state space model hₜ = exp(Δₜ A) hₜ₋₁ + Δₜ Bₜ xₜᵀ, yₜ = Cₜᵀ hₜ + D xₜ.

    It is linear attention with q = C, k = B, v = Δ x and log a = Δ A:

    `x`      (b, t, h, p), the input: h heads of p channels.
    `dt`     (b, t, h), Δ: how long a step takes, positive (after the softplus). It scales the input and the decay.
    `A`      (h,), negative: how fast a head forgets.
    `B`, `C` (b, t, g, n), to and from a state of n numbers a channel; g groups, each of which h // g heads share.
    `D`      (h,), the part of the input that passes by.
    `state`  (b, h, p, n) from an earlier call, which `return_state` asks for; float32 at least, as dt and A may be.

    Raises TypeError or ValueError naming the argument if shapes, dtypes or devices are wrong.
    """
    _check_ssd(x, dt, A, B, C, D, state)
    wide = torch.promote_types(x.dtype, torch.float32)
    dt = dt.to(wide)
    q, k, v = (y.to(wide).transpose(1, 2) for y in (C, B, x * dt.unsqueeze(-1)))
    log_a = (dt * A.to(wide)).transpose(1, 2)  # (b, h, t)
    before = None if state is None else state.mT
    out, last = attention(q, k, v, decay=log_a, chunk=chunk, state=before, return_state=True)
    y = out.transpose(1, 2)
    if D is not None:
        y = y + D.to(wide)[:, None] * x
    y = y.to(x.dtype)
    return (y, last.mT) if return_state else y


def elu_plus_one(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """elu(x) + 1, the positive feature map of Katharopoulos et al. (equation 7): 1 + x above 0, eˣ below."""
    return F.elu(x) + 1


def _advance(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, s: Tensor) -> tuple[Tensor, Tensor]:
    """One step: the output (b, g, r, dv), and the state after it (b, g, r, d, dv)."""
    if log_a is not None:
        s = s * log_a.exp().unsqueeze(-1)
    s = s + k.unsqueeze(-1) @ v.unsqueeze(-2)
    return (q.unsqueeze(-2) @ s).squeeze(-2), s


def _chunked(call: Call, chunk: int) -> tuple[Tensor, Tensor]:
    """Output (b, g, r, t, dv) and final state, a few chunks at a time, so that what they share is still in cache."""
    t = call.q.shape[-2]
    if t == 0:
        return _nothing(call)
    size = min(chunk, t)
    if call.decay is not None and call.decay.shape[-1] > 1:
        size = 2 ** math.ceil(math.log2(size))

    def spans(x: Tensor | None) -> Iterable[Tensor | None]:  # split, for a slice's gradient would be as long as x
        return repeat(None) if x is None else (_chunks(y, size) for y in x.split(TOGETHER * size, dim=-2))

    s, outs = call.state, []
    for q, k, v, decay in zip(*map(spans, (call.q, call.k, call.v, call.decay)), strict=False):
        out, s = _some_chunks(q, k, v, decay, s)
        outs.append(out)
    return torch.cat(outs, dim=-2)[..., :t, :], s


def _some_chunks(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, s: Tensor) -> tuple[Tensor, Tensor]:
    """Output of n chunks (b, g, r, n·c, dv) and the state after them: the four lines of the table above."""
    scores = _scores(q, k, decay)
    if decay is not None:
        through = decay.cumsum(-2).exp()  # from before the chunk to each position
        q, k = q * through, k * _later(decay).exp()
    written = k.mT @ v  # (b, g, r, n, d, dv)
    kept = repeat(None) if decay is None else through[..., -1, :].unsqueeze(-1).unbind(-3)  # (b, g, r, 1 or d, 1)
    before = []
    for a, more in zip(kept, written.unbind(-3), strict=False):
        before.append(s)
        s = more + (s if a is None else s * a)
    out = scores @ v + q @ torch.stack(before, dim=-3)
    return out.flatten(-3, -2), s


def _chunks(x: Tensor, size: int) -> Tensor:
    """(b, g, r, t, ·) → (b, g, r, n, size, ·), the last one filled up with zeros.

    With k = v = 0 and log a = 0 the positions that are not there leave the state alone.
    """
    return F.pad(x, (0, 0, 0, -x.shape[-2] % size)).unflatten(-2, (-1, size))


def _scores(q: Tensor, k: Tensor, decay: Tensor | None) -> Tensor:
    """L ∘ Q Kᵀ for each block (…, c, d); a decay of channels takes c a power of two."""
    if decay is None:
        return (q @ k.mT).tril()
    if decay.shape[-1] == 1:
        return (k @ q.mT * _fade(decay.squeeze(-1))).triu().mT
    scores = (q * k).sum(-1).unsqueeze(-1).unsqueeze(-1)  # blocks of one position, (…, c, 1, 1)
    while scores.shape[-3] > 1:
        size = scores.shape[-1]
        (_, q1), (k0, _), (a0, a1) = (x.unflatten(-2, (-1, 2, size)).unbind(-3) for x in (q, k, decay))
        border = (q1 * a1.cumsum(-2).exp()) @ (k0 * _later(a0).exp()).mT  # the later half looks back
        first, second = (x.expand_as(border) for x in scores.unflatten(-3, (-1, 2)).unbind(-3))
        above = torch.cat([first, torch.zeros_like(border)], dim=-1)
        scores = torch.cat([above, torch.cat([border, second], dim=-1)], dim=-2)
    return scores.squeeze(-3)


def _fade(x: Tensor) -> Tensor:
    """(…, c) → (…, c, c): exp(xⱼ₊₁ + … + xᵢ) at [j, i], so 1 on the diagonal and, for no later use, before it.

    A row for each key, since sums are taken fastest along the last axis: the other way round costs a quarter more.
    """
    c = x.shape[-1]
    return x.unsqueeze(-2).expand(*x.shape[:-1], c, c).triu(1).cumsum(-1).exp()


def _later(x: Tensor) -> Tensor:
    """(…, c, ·): for each row, the sum of the rows after it in its block."""
    return F.pad(x[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def _nothing(call: Call) -> tuple[Tensor, Tensor]:
    """Output of no positions, (b, g, r, 0, dv), which autograd can follow like any other, and a copy of the state.

    A copy, since a state that comes back is never the one that was given.
    """
    out = call.q[..., :1] * call.k[..., :1] * call.v
    return out if call.decay is None else out * call.decay[..., :1], call.state.clone()


def _check_ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor | None) -> None:
    for name, y in (("x", x), ("dt", dt), ("A", A), ("B", B), ("C", C), ("D", D), ("state", state)):
        if y is None and name in ("D", "state"):
            continue
        if not isinstance(y, Tensor) or not y.is_floating_point():
            kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
    if x.ndim != 4 or 0 in x.shape[2:]:
        raise ValueError(f"x must be (batch, seq, heads, channels), at least one of each last, got {tuple(x.shape)}")
    b, t, h, p = x.shape
    if B.ndim != 4 or B.shape[:2] != (b, t) or 0 in B.shape[2:] or h % B.shape[2]:
        raise ValueError(f"B must be (batch, seq, groups, n) = ({b}, {t}, a divisor of {h}, n), got {tuple(B.shape)}")
    wanted = [("dt", dt, (b, t, h)), ("A", A, (h,)), ("C", C, tuple(B.shape)), ("D", D, (h,))]
    for name, y, shape in [*wanted, ("state", state, (b, h, p, B.shape[3]))]:
        if y is not None and y.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(y.shape)}")
    for name, y in (("dt", dt), ("A", A), ("B", B), ("C", C), ("D", D), ("state", state)):
        if y is not None and y.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {y.device}: move it")
