"""Published numbers about attention, from our own loops and our own modules."""

from __future__ import annotations

from functools import partial
from math import exp, inf, log2

from mlsys.claims._attention_kv_cache import KV_CACHE
from mlsys.claims._attention_kv_heads import KV_HEADS
from mlsys.claims._attention_linear import LINEAR
from mlsys.claims._attention_paged import PAGED
from mlsys.claims.core import Claim

MILAKOV = "Milakov & Gimelshein 2018, arXiv:1805.02867"
PRESS = "Press et al. 2021, arXiv:2108.12409"
FLASH = "Dao et al. 2022, arXiv:2205.14135"
GPT2_MEDIUM = {"n": 1024, "d": 64, "heads": 16, "batch": 64}  # the caption of Figure 2


def flash_traffic_gb(
    n: int, d: int, heads: int, batch: int, *, sram_bytes: int = 192 * 1024, itemsize: int = 2
) -> float:
    """Slow-memory traffic of Algorithm 1 (forward) and Algorithm 4 (backward), GB, counted load by load."""
    from mlsys.attention import flash

    return flash.traffic(n, n, d, sram_bytes // itemsize, backward=True) * itemsize * heads * batch / 1e9


def _forward_traffic(sram_bytes: int) -> int:
    from mlsys.attention import flash

    return flash.traffic(8192, 8192, 64, sram_bytes // 2)


def _passes(online: bool) -> int:
    """How often a softmax over a vector touches slow memory for each of its elements: loads and stores, counted."""
    touched = 0

    def load(x: list[float]) -> list[float]:
        nonlocal touched
        touched += len(x)
        return x

    x = [0.5, 3.0, -1.0, 2.0]
    m, z = -inf, 0.0
    if online:  # Algorithm 3: maximum and denominator in one pass, each element merged into what was before it
        for value in load(x):
            higher = max(m, value)
            m, z = higher, z * exp(m - higher) + exp(value - higher)
    else:  # Algorithm 2: the maximum first, then the denominator
        m = max(load(x))
        z = sum(exp(value - m) for value in load(x))
    y = load([exp(value - m) / z for value in load(x)])  # loaded once more, and stored
    if abs(sum(y) - 1) > 1e-12:
        raise ArithmeticError(f"a softmax that sums to {sum(y)}")
    return touched // len(x)


def _slope(heads: int, head: int) -> float:
    from mlsys.attention.variants import alibi_slopes

    return float(alibi_slopes(heads)[head])


def _span(window: int, layers: int) -> int:
    """How many keys before its own a query's output depends on: its gradient, through layers of attention."""
    import torch

    from mlsys.attention import flash

    n = window * layers + 8
    x = torch.zeros(1, 1, n, 1, dtype=torch.float64, requires_grad=True)
    y = x
    for _ in range(layers):  # equal scores: each query averages what it sees
        y = flash.attention(torch.zeros_like(x), torch.zeros_like(x), y, causal=True, window=(window, 0))
    (grad,) = torch.autograd.grad(y[0, 0, -1, 0], x)
    return n - 1 - int(grad[0, 0, :, 0].nonzero()[0])


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
        name="flash-traffic-inverse",
        area="attention.flash",
        source=f"{FLASH}, Theorem 2 (Θ(N²d²/M))",
        what="growth of slow-memory traffic when SRAM shrinks from 192 KB to 48 KB, forward, n=8192, d=64, fp16",
        unit="×",
        published=4.0,
        digits=1,
        compute=lambda: _forward_traffic(48 * 1024) / _forward_traffic(192 * 1024),
        tolerance=0.05,
        expected="approximate",
        reason="the last block of keys is not full at every size, and reading K and V once does not shrink with M",
        formula=True,
    ),
    Claim(
        name="online-softmax-passes",
        area="attention.merge",
        source=f"{MILAKOV}, section 3 (memory accesses per vector element, from 4 down to 3)",
        what="accesses of the safe softmax over those of the online one, loads and stores counted",
        unit="×",
        published=1.33,
        digits=2,
        compute=lambda: _passes(online=False) / _passes(online=True),
    ),
    Claim(
        name="alibi-slopes",
        area="attention.variants",
        source=f"{PRESS}, section 3 (for 8 heads the geometric sequence 1/2¹, 1/2², …, 1/2⁸)",
        what="slope of the last of 8 heads, as 1/slope",
        unit="",
        published=256,
        digits=0,
        compute=lambda: 1 / _slope(8, -1),
    ),
    Claim(
        name="alibi-slopes-16",
        area="attention.variants",
        source=f"{PRESS}, section 3 (for 16 heads 1/2^0.5, 1/2¹, 1/2^1.5, …, 1/2⁸)",
        what="log₂ of the first of 16 heads' slopes",
        unit="",
        published=-0.5,
        digits=1,
        compute=lambda: log2(_slope(16, 0)),
    ),
    Claim(
        name="window-span",
        area="attention.variants",
        source="Jiang et al. 2023, arXiv:2310.06825, section 2 (W=4096, 32 layers: about 131K tokens)",
        what="how far back 32 layers with a window of 4096 see, by the gradient through 32 layers at 1/64 of the size",
        unit="K tokens",
        published=131,
        digits=0,
        compute=lambda: _span(4096 // 64, 32) * 64 / 1000,
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
    *LINEAR,
    *KV_CACHE,
    *PAGED,
    *KV_HEADS,
]
