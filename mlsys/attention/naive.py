"""Attention as the paper writes it: every query scores every key, then averages the values.

For one head, with queries Q (t × d), keys K (s × d) and values V (s × dv),

    S = scale · Q Kᵀ            scale = 1/√d keeps the scores' variance at 1
    P = softmax(S)              over the keys: each row sums to 1
    O = P V

With `causal`, query i sees keys 0 … i + s − t, so the last query sees every key
whatever the lengths (decoding one token against a cache of s is t = 1). Hidden
scores become −∞ before the softmax, whose exponential makes them 0. A query that
sees nothing has an empty average, which is 0 here, as is its gradient. In
grouped-query attention each key/value head serves h // h_kv query heads in a row.

Models change one thing or another between the scores and the softmax. In this order,
with p = i + s − t the position of query i among the keys:

    S ← c · tanh(S / c)           `softcap`: no score beyond ±c
    S ← S − slope · |p − j|       `alibi`: one slope a head, in place of position embeddings
    S ← −∞ where hidden           `causal`; `window`: keys p − left … p + right; `mask`: any
    P = softmax([S, sink])        `sinks`: one more term of the denominator, for which no value stands

Each line of the code is one of these equations: read this module first.

Cost:
    2·b·h·t·s·(d + dv) FLOPs in two matmuls, also when causal: half of that work
    is thrown away, and with a window nearly all of it. The backward pass costs 2.5 times as much.

Memory:
    b·h·t·s scores, several times over while the softmax runs and its gradient
    waits: 1 GB for 32 heads at t = s = 2,896 in float32. This, not the FLOPs, is
    what ends long contexts; `flash` is the answer. Below t ≈ 500 the scores fit in
    cache and this module is hard to beat.

Papers:
    Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1, equation 1.
    Ainslie et al. 2023, arXiv:2305.13245, section 2.2 (grouped queries).
    Beltagy et al. 2020, arXiv:2004.05150, section 3.1 (sliding windows).
    Press et al. 2021, arXiv:2108.12409, section 3 (ALiBi).
    Gemma Team 2024, arXiv:2408.00118, section 2 (soft-cap).
    Xiao et al. 2023, arXiv:2309.17453, section 3 (sinks).

See also:
    `mlsys.attention.flash` (the same numbers in linear memory), `mlsys.attention.variants` (the options, one by one).
"""

import math
from typing import Literal, Unpack, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mlsys.attention._inputs import Options, Rules, check_qkv, check_rules, wide


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False, **options: Unpack[Options]
) -> Tensor: ...


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b h_kv s d"],
    v: Float[Tensor, "b h_kv s dv"],
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    mask: Bool[Tensor, "..."] | None = None,
    alibi: Float[Tensor, " h"] | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " h"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Float[Tensor, "b h t dv"] | tuple[Float[Tensor, "b h t dv"], Float[Tensor, "b h t"]]:
    """Scaled dot-product attention; query head i reads key/value head i // (h // h_kv).

    Any lengths t and s, also 0; `scale` is 1/√d unless given.

    `causal`      hides the keys after p = i + s − t.
    `window`      (left, right): query i sees keys p − left … p + right, −1 for no bound on that side.
    `mask`        bool, broadcastable to (b, h, t, s), True = visible; a key must be visible by all three.
    `alibi`       slopes (h,): slope · |p − j| is subtracted from the score. No gradient.
    `softcap`     c > 0: scores become c · tanh(score / c), before ALiBi and before keys are hidden.
    `sinks`       finite logits (h,), one more term of each row's denominator. They get a gradient.
    `return_lse`  also return the natural logarithm of the denominators, (b, h, t), float32 at least.

    A query that sees nothing gives 0, and −∞ as its lse; with a sink, 0 and the sink.
    NaN and infinity are not looked for: they spread as the formula spreads them. A query whose own row or one of
    whose visible keys or values holds a NaN gets NaN. A NaN in a hidden row of `k` stays out of the output, but in `v`
    it reaches every query, since the weight it is multiplied by is 0 and 0 · NaN is NaN.
    Raises TypeError or ValueError naming the argument if shapes, dtypes, devices or options are wrong.
    """
    scale = check_qkv(q, k, v, causal, scale)
    rules = check_rules(q, k, causal, window, mask, alibi, softcap, sinks)
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, dim=1)  # (b, h, s, d)
    v = v.repeat_interleave(group, dim=1)  # (b, h, s, dv)

    scores = (q * scale) @ k.mT  # (b, h, t, s)
    if not rules.by_band_alone:
        scores = scores.to(wide(q))  # in 16 bits, what follows would round a second time
    if rules.softcap is not None:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    if rules.alibi is not None:
        scores = scores - rules.alibi[:, None, None] * _distance(q.shape[2], k.shape[2], q.device)
    hidden = _hidden(rules, q.device)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    if rules.sinks is not None:
        scores = torch.cat([scores, rules.sinks[:, None, None].expand(*scores.shape[:-1], 1)], dim=-1)

    weights = torch.softmax(scores, dim=-1)[..., : k.shape[2]]
    if hidden is not None:
        # A row of nothing but −∞ is 0/0 = NaN: zero it here, and its gradient with it.
        weights = weights.masked_fill(hidden, 0.0)
    out = weights.to(v.dtype) @ v
    return (out, scores.to(wide(q)).logsumexp(dim=-1)) if return_lse else out


def _distance(t: int, s: int, device: torch.device) -> Tensor:
    """|p − j| of query i, which stands at p = i + s − t, and key j, (t, s)."""
    position = torch.arange(t, device=device)[:, None] + (s - t)
    return (position - torch.arange(s, device=device)).abs()


def _hidden(rules: Rules, device: torch.device) -> Tensor | None:
    """True where a query does not see a key, (t, s) or (b, h, t, s); None if all see all."""
    hidden = rules.band.hidden(device) if rules.band.bounded else None
    if rules.mask is None:
        return hidden
    return ~rules.mask if hidden is None else hidden | ~rules.mask
