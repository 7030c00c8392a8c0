"""Published numbers about attention, from our own loops and our own modules."""

from __future__ import annotations

from functools import partial
from math import ceil

from mlsys.claims.core import Claim

FLASH = "Dao et al. 2022, arXiv:2205.14135"
GPT2_MEDIUM = {"n": 1024, "d": 64, "heads": 16, "batch": 64}  # the caption of Figure 2


def flash_traffic_gb(
    n: int, d: int, heads: int, batch: int, *, sram_bytes: int = 192 * 1024, itemsize: int = 2
) -> float:
    """Slow-memory traffic of Algorithm 1 (forward) and Algorithm 4 (backward), GB, counted load by load.

    The loops are the paper's: an outer loop over key blocks, an inner one over
    query blocks, block sizes ⌈M/4d⌉ and min(⌈M/4d⌉, d) for M elements of SRAM.
    """
    elements = sram_bytes // itemsize
    block_k = ceil(elements / (4 * d))
    block_q = min(block_k, d)
    moved = 0
    for j in range(0, n, block_k):
        keys = min(block_k, n - j)
        moved += 2 * keys * d  # forward: load Kj, Vj
        for i in range(0, n, block_q):
            rows = min(block_q, n - i)
            moved += 2 * rows * d + 2 * rows  # load Qi, Oi, li, mi
            moved += rows * d + 2 * rows  # store Oi, li, mi
        moved += 2 * keys * d  # backward: load Kj, Vj
        for i in range(0, n, block_q):
            rows = min(block_q, n - i)
            moved += 4 * rows * d + 2 * rows  # load Qi, Oi, dOi, dQi, li, mi
            moved += rows * d  # store dQi
        moved += 2 * keys * d  # store dKj, dVj
    return moved * itemsize * heads * batch / 1e9


def _peak(module: str, n: int) -> int:
    """Peak bytes of a forward and a backward pass over one head of 64, above the inputs; tiles of 64 × 64."""
    import torch

    from mlsys.attention import flash, naive
    from mlsys.bench.memory import peak_bytes

    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, 1, n, 64, generator=generator).requires_grad_() for _ in range(3)]
    attention = naive.attention if module == "naive" else partial(flash.attention, block_q=64, block_k=64)

    def run() -> None:
        out = attention(*qkv)
        torch.autograd.grad(out, qkv, torch.ones_like(out))

    return peak_bytes(run)


CLAIMS = [
    Claim(
        name="flash-traffic",
        area="attention.flash",
        source=f"{FLASH}, Figure 2 (left)",
        what="HBM reads and writes, forward and backward, GPT-2 medium, n=1024, d=64, 16 heads, batch 64, fp16",
        unit="GB",
        published=4.4,
        digits=1,
        compute=lambda: flash_traffic_gb(**GPT2_MEDIUM),
        tolerance=0.10,
        expected="approximate",
        reason="counted from Algorithms 1 and 4 with all of the A100's 192 KB as SRAM; the paper measured a kernel "
        "with masking and dropout, whose block size it does not print",
    ),
    Claim(
        name="flash-memory-linear",
        area="attention.flash",
        source=f"{FLASH}, Table 21 (memory, 1672 MB at n=8192 over 104 MB at n=512)",
        what="growth of peak memory, forward and backward, from n=512 to n=2048 (the table: 418 / 104)",
        unit="×",
        published=4.02,
        digits=2,
        compute=lambda: _peak("flash", 2048) / _peak("flash", 512),
        tolerance=0.10,
        expected="approximate",
        reason="allocations counted on a CPU with float32 tiles; the constant tile buffers weigh more in a small run",
    ),
    Claim(
        name="naive-memory-quadratic",
        area="attention.naive",
        source=f"{FLASH}, Table 21 (PyTorch attention, 17024 MB at n=4096 over 1184 MB at n=1024)",
        what="growth of peak memory of standard attention, forward and backward, from n=1024 to n=4096",
        unit="×",
        published=14.38,
        digits=2,
        compute=lambda: _peak("naive", 4096) / _peak("naive", 1024),
        tolerance=0.15,
        expected="approximate",
        reason="the paper's run also holds dropout masks and 16 × 8 heads in fp16; the n² term is the same shape",
    ),
]
