"""Published numbers about shared keys and values: how long a context fits when all query heads read one key head."""

from __future__ import annotations

from dataclasses import replace

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


def context(config: Config, batch: int) -> float:
    """Thousands of tokens that each of so many sequences can hold."""
    return inference.kv_slots(MEMORY, config) / batch / 1e3


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
    Claim(
        name="palm-multiquery-context-128",
        area="attention.kv_heads",
        source=f"{POPE}, Table 1 (optimized multiquery)",
        what="longest context of PaLM 540B on 64 TPU v4 with 30% of the memory for the cache, batch 128",
        unit="K tokens",
        published=43,
        digits=0,
        compute=lambda: context(PALM_540B, 128),
    ),
    Claim(
        name="palm-multiquery-context-512",
        area="attention.kv_heads",
        source=f"{POPE}, Table 1 (optimized multiquery)",
        what="the same at batch 512",
        unit="K tokens",
        published=10.7,
        digits=1,
        compute=lambda: context(PALM_540B, 512),
    ),
    Claim(
        name="palm-multihead-context-128",
        area="attention.kv_heads",
        source=f"{POPE}, Table 1 (multihead)",
        what="the same with multi-head attention, 48 heads padded to 64, batch 128",
        unit="K tokens",
        published=1.32,
        digits=2,
        compute=lambda: context(PADDED, 128),
        tolerance=0.015,
        expected="approximate",
        reason="the printed number is four times that of batch 512, which is rounded",
    ),
    Claim(
        name="palm-multihead-context-512",
        area="attention.kv_heads",
        source=f"{POPE}, Table 1 (multihead)",
        what="the same with multi-head attention, batch 512",
        unit="K tokens",
        published=0.33,
        digits=2,
        compute=lambda: context(PADDED, 512),
    ),
]
