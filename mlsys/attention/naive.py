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

Each line of the code is one of these equations: read this module first.

Cost:
    2·b·h·t·s·(d + dv) FLOPs in two matmuls, also when causal: half of that work
    is thrown away. The backward pass costs 2.5 times as much.

Memory:
    b·h·t·s scores, several times over while the softmax runs and its gradient
    waits: 1 GB for 32 heads at t = s = 2,896 in float32. This, not the FLOPs, is
    what ends long contexts; `flash` is the answer. Below t ≈ 500 the scores fit in
    cache and this module is hard to beat.

Papers:
    Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1, equation 1.
    Ainslie et al. 2023, arXiv:2305.13245, section 2.2 (grouped queries).

See also:
    `mlsys.attention.flash` (the same numbers in linear memory).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from mlsys.attention._inputs import check_qkv


def attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b h_kv s d"],
    v: Float[Tensor, "b h_kv s dv"],
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "b h t dv"]:
    """Scaled dot-product attention; query head i reads key/value head i // (h // h_kv).

    Any lengths t and s, also 0; `scale` is 1/√d unless given. NaN and infinity are not
    looked for: they spread as the formula spreads them. A query whose own row or one of
    whose visible keys or values holds a NaN gets NaN. With `causal`, a NaN in a hidden
    row of `k` stays out of the output, but in `v` it reaches every query, since the
    weight it is multiplied by is 0 and 0 · NaN is NaN.
    Raises TypeError or ValueError naming the argument if shapes, dtypes or devices disagree.
    """
    scale = check_qkv(q, k, v, causal, scale)
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, dim=1)  # (b, h, s, d)
    v = v.repeat_interleave(group, dim=1)  # (b, h, s, dv)

    scores = (q * scale) @ k.mT  # (b, h, t, s)
    if not causal:
        return torch.softmax(scores, dim=-1) @ v

    t, s = scores.shape[-2:]
    hidden = torch.ones(t, s, dtype=torch.bool, device=q.device).triu(s - t + 1)
    weights = torch.softmax(scores.masked_fill(hidden, -math.inf), dim=-1)
    # A row of nothing but -inf is 0/0 = NaN: zero it here, and its gradient with it.
    return weights.masked_fill(hidden, 0.0) @ v
