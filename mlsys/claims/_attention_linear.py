"""Published numbers about linear attention and Mamba-2, counted while our own functions run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlsys.claims.core import Claim

MAMBA2 = "Dao & Gu 2024, arXiv:2405.21060"
GLA = "Yang et al. 2023, arXiv:2312.06635"
T, N = 1024, 64  # positions; numbers a channel, channels a head and positions a chunk


def _flops(run: Callable[[], Any]) -> int:
    """FLOPs of the matrix products of a call, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def _ssd(chunk: int = N, n: int = N) -> Any:
    """Mamba-2's layer on T positions of one head of N channels, and its state of n numbers a channel at the end."""
    import torch

    from mlsys.attention import linear

    generator = torch.Generator().manual_seed(0)
    x, B, C = (torch.randn(1, T, 1, size, generator=generator) for size in (N, n, n))
    return linear.ssd(x, torch.rand(1, T, 1), -torch.ones(1), B, C, chunk=chunk, return_state=True)


def _form(name: str) -> int:
    """FLOPs of one form on T positions of one head, N × N state."""
    import torch

    from mlsys.attention import linear

    q, k, v = torch.randn(3, 1, 1, T, N)
    return _flops(lambda: getattr(linear, name)(q, k, v, decay=-torch.ones(1)))


LINEAR = [
    Claim(
        name="linear-ssd-flops",
        area="attention.linear",
        source=f"{MAMBA2}, section 6.3 (four products BMM(T/N, N, N, N) if N = P = Q)",
        what="FLOPs of the products of ssd at T=1024, N=P=Q=64, counted while it runs, at 2 a multiplication",
        unit="FLOP",
        published=4 * 2 * (1024 // 64) * 64**3,
        digits=0,
        compute=lambda: _flops(_ssd),
        formula=True,
    ),
    Claim(
        name="linear-ssd-chunk",
        area="attention.linear",
        source=f"{MAMBA2}, section 6.3 (BMM(T/Q, Q, Q, N), (T/Q, Q, P, Q), (T/Q, N, P, Q), (T/Q, Q, P, N))",
        what="FLOPs of ssd with chunks of 256 over those with chunks of 64, counted, N=P=64: (Q + N) for each",
        unit="×",
        published=2.5,
        digits=3,
        compute=lambda: _flops(lambda: _ssd(256)) / _flops(lambda: _ssd(64)),
        formula=True,
    ),
    Claim(
        name="linear-duality",
        area="attention.linear",
        source=f"{MAMBA2}, section 6.3, table (training FLOPs T²N of attention, TN² of the recurrence)",
        what="FLOPs of the quadratic form over those of the recurrence, counted, T=1024, N=64: T/N",
        unit="×",
        published=16.0,
        digits=3,
        compute=lambda: _form("quadratic") / _form("recurrent"),
        formula=True,
    ),
    Claim(
        name="linear-chunks-interpolate",
        area="attention.linear",
        source=f"{GLA}, section 2.2 (chunks cost O(LCd + Ld²); C = L is the parallel form)",
        what="FLOPs of one chunk of all positions over those of the quadratic form: 1 + d/L, the state's, L=1024, d=64",
        unit="×",
        published=1.0625,
        digits=4,
        compute=lambda: _flops(lambda: _ssd(T)) / _form("quadratic"),
        formula=True,
    ),
    Claim(
        name="linear-mamba-2-state",
        area="attention.linear",
        source=f"{MAMBA2}, section 1 (states 8 times the size of Mamba's)",
        what="numbers in the state that ssd returns, with Mamba-2's 128 a channel over Mamba's 16",
        unit="×",
        published=8.0,
        digits=0,
        compute=lambda: _ssd(n=128)[1].numel() / _ssd(n=16)[1].numel(),
    ),
]
