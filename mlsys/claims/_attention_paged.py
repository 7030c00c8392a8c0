"""Published numbers about attention over a shared prefix, from the tokens that our decode step reads.

Decoding is bound by what it reads, so throughput falls as reads grow. Those of a step are counted by
`paged.tokens_read` for a batch whose block tables all begin alike, and the model's weights are read besides.
"""

from __future__ import annotations

from mlsys.claims.core import Claim
from mlsys.perf import inference
from mlsys.perf.configs import MODELS

HYDRAGEN = "Juravsky et al. 2024, arXiv:2402.05099, abstract"
MODEL = MODELS["llama-2-13b"]  # CodeLlama-13b has the same layers and heads
BATCH, OWN, BLOCK = 1024, 64, 16  # sequences, tokens that each has generated so far, and tokens a block
REASON = (
    "the paper prints a bound for a measured run; ours counts bytes only, for a batch of 1,024 with 64 tokens of "
    "each one's own"
)


def step_bytes(prefix: int, *, share_prefixes: bool) -> float:
    """What a decode step reads: weights, and the keys and values of BATCH sequences that begin with `prefix` tokens."""
    import torch

    from mlsys.attention import paged

    common, own = prefix // BLOCK, OWN // BLOCK
    tables = torch.empty(BATCH, common + own, dtype=torch.int32)
    tables[:, :common] = torch.arange(common)
    tables[:, common:] = common + torch.arange(BATCH * own).view(BATCH, own)
    lengths = torch.full((BATCH,), prefix + OWN, dtype=torch.int32)
    tokens = paged.tokens_read(tables, lengths, BLOCK, share_prefixes=share_prefixes)
    return inference.weight_bytes(MODEL) + tokens * inference.kv_cache_bytes_per_token(MODEL)


def throughput_drop(*, share_prefixes: bool) -> float:
    """By how many per cent throughput falls when the prefix grows from 1K to 16K tokens."""
    short, long = (step_bytes(n * 1024, share_prefixes=share_prefixes) for n in (1, 16))
    return 100 * (1 - short / long)


PAGED = [
    Claim(
        name=f"prefix-drop-{name}",
        area="attention.paged",
        source=HYDRAGEN,
        what=f"fall of decoding throughput when a prefix common to the batch grows from 1K to 16K tokens, {how}",
        unit="%",
        published=published,
        digits=0,
        compute=lambda share=share: throughput_drop(share_prefixes=share),  # type: ignore[misc]
        tolerance=0.1,
        expected="approximate",
        reason=REASON,
    )
    for name, how, share, published in (
        ("shared", "prefix read once (the paper: less than 15%)", True, 15),
        ("apart", "prefix read by each (the paper: over 90%)", False, 90),
    )
]
