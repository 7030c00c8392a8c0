"""What models change in attention, as options: which keys a query sees, and what becomes of a score.

`naive.attention` and `flash.attention` take the same options. With p = i + s − t, the
position of query i among s keys, and x a score,

    causal     keys 0 … p                        every decoder
    window     keys p − left … p + right         Mistral 7B (4095, 0); every other layer of Gemma 2
    mask       any keys                          prefixes, packed documents, trees of drafts
    softcap    x ← c · tanh(x / c)               Gemma 2, c = 50
    alibi      x ← x − slope · |p − j|           BLOOM, MPT: no position embeddings
    sinks      a logit more in the denominator   gpt-oss: a head may attend to nothing

The order is that of the lines from below: cap, then bias, then hide, then the softmax.
Hiding last matters: the cap would make −∞ into −c, a score like others; and so does capping
before the bias, which would else stop falling with distance.

The functions here make what the options take: the slopes of ALiBi, and masks that are
more than a band. A mask is the general case and costs t × s booleans; where a
window says the same, flash attention does not even look at the tiles outside.

Cost:
    Soft-cap: a tanh a score. ALiBi: a multiplication and an addition a score. A window of w keys: the share
    w / s of full attention, in whole tiles (`flash.tiles` counts them). Sinks: nothing.

Memory:
    Masks: t·s bytes, once for all heads. The rest: one number a head.

Papers:
    Press et al. 2021, arXiv:2108.12409, section 3 (ALiBi and its slopes).
    Beltagy et al. 2020, arXiv:2004.05150, section 3.1 (sliding windows).
    Jiang et al. 2023, arXiv:2310.06825, section 2 (windows in a decoder, and how far layers of them see).
    Gemma Team 2024, arXiv:2408.00118, section 2 (soft-cap, windows in every other layer).
    Xiao et al. 2023, arXiv:2309.17453, section 3 (sinks: the first tokens, or one learnt in their place).
    Raffel et al. 2019, arXiv:1910.10683, section 3.2.1 (a prefix that sees itself whole).

See also:
    `mlsys.attention.naive` (the formula with all of them), `mlsys.attention.flash` (the same in tiles).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def alibi_slopes(heads: int) -> Float[Tensor, " heads"]:
    """The slopes of ALiBi, one a head, float32: 2^(−8/n), 2^(−16/n), … for n heads, a power of two.

    For other numbers, as the authors' code has it: those of the power of two below, then every other one of twice that.
    """
    if isinstance(heads, bool) or not isinstance(heads, int):
        raise TypeError(f"heads must be an int, got {type(heads).__name__}")
    if heads < 1:
        raise ValueError(f"heads must be at least 1, got {heads}")
    power = 2 ** (heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    between = [2 ** (-8 * i / (2 * power)) for i in range(1, 2 * power + 1, 2)]
    return torch.tensor((slopes + between)[:heads], dtype=torch.float32)


def prefix_mask(t: int, s: int, prefix: int) -> Bool[Tensor, "t s"]:
    """Causal, but the first `prefix` keys are seen by all: a question that is read both ways, then an answer."""
    _check_lengths(t=t, s=s, prefix=prefix)
    mask = torch.ones(t, s, dtype=torch.bool).tril(s - t)
    mask[:, :prefix] = True
    return mask


def document_mask(documents: Int[Tensor, " n"]) -> Bool[Tensor, "n n"]:
    """Whole documents packed in one sequence, each token with the number of its own: it sees no other's tokens.

    With `causal=True` that is how language models are trained. `flash.varlen` does the same without a mask.
    """
    if not isinstance(documents, Tensor) or documents.ndim != 1:
        raise ValueError("documents must be a tensor of one number a token, (n,), e.g. torch.tensor([0, 0, 1])")
    return documents[:, None] == documents


def streaming_mask(t: int, s: int, first: int, window: int) -> Bool[Tensor, "t s"]:
    """The `first` keys and the `window` latest, the query's own included: a cache of constant size.

    Without the first ones a model that was trained to see them falls apart: they are where heads put
    the weight that they have no use for. A learnt `sinks` takes their place.
    """
    _check_lengths(t=t, s=s, first=first, window=window)
    causal = torch.ones(t, s, dtype=torch.bool).tril(s - t)
    recent = causal & ~causal.tril(s - t - window)
    recent[:, :first] = causal[:, :first]
    return recent


def _check_lengths(**lengths: int) -> None:
    for name, length in lengths.items():
        if isinstance(length, bool) or not isinstance(length, int):
            raise TypeError(f"{name} must be an int, got {type(length).__name__}")
        if length < 0:
            raise ValueError(f"{name} must be at least 0, got {length}")
