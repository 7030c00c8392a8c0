"""Published numbers about shared keys and values: how long a context fits when all query heads read one key head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlsys.claims._perf_transformer import palm
from mlsys.claims.core import Claim
from mlsys.perf import inference
from mlsys.perf.configs import Config

POPE = "Pope et al. 2022, arXiv:2211.05102"
PALM_540B = palm(118, 18432, 48)
# The same model with a key and value head for each query head, half as wide, so that attention has as many parameters.
MULTIHEAD = replace(PALM_540B, kv_heads=48, head_dim=128)
PADDED = replace(MULTIHEAD, heads=64, kv_heads=64)  # one head for each of 64 chips
MEMORY = 0.30 * 64 * 32 * 2**30  # the share that the table gives to the cache, of 64 TPU v4 with 32 GiB


def context(variant: str, config: Config, batch: int, what: str, published: float, digits: int, **more: Any) -> Claim:
    """The longest context, in thousands of tokens, of so many sequences: a number of the paper's table."""
    return Claim(
        name=f"palm-{variant.split()[-1]}-context-{batch}",
        area="attention.kv_heads",
        source=f"{POPE}, Table 1 ({variant})",
        what=what,
        unit="K tokens",
        published=published,
        digits=digits,
        compute=lambda: inference.kv_slots(MEMORY, config) / batch / 1e3,
        **more,
    )


KV_HEADS = [
    Claim(
        name="palm-multihead-cache",
        area="attention.kv_heads",
        source=f"{POPE}, section 2 (3 TB, three times the parameters)",
        what="KV cache of a 500B model with multi-head attention: batch 512, 2,048 tokens",
        unit="TB",
        published=3,
        digits=0,
        compute=lambda: 512 * 2048 * inference.kv_cache_bytes_per_token(MULTIHEAD) / 1e12,
    ),
    context(
        "optimized multiquery",
        PALM_540B,
        128,
        "longest context of PaLM 540B on 64 TPU v4 with 30% of the memory for the cache, batch 128",
        43,
        0,
    ),
    context("optimized multiquery", PALM_540B, 512, "the same at batch 512", 10.7, 1),
    context(
        "multihead",
        PADDED,
        128,
        "the same with multi-head attention, 48 heads padded to 64, batch 128",
        1.32,
        2,
        tolerance=0.015,
        expected="approximate",
        reason="the printed number is four times that of batch 512, which is rounded",
    ),
    context("multihead", PADDED, 512, "the same with multi-head attention, batch 512", 0.33, 2),
]
