"""Published statements about GPTQ, recomputed on matrices that are drawn; its perplexities would need its models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlsys.claims.core import Claim

if TYPE_CHECKING:
    from torch import Tensor

FRANTAR = "Frantar, Ashkboos, Hoefler & Alistarh 2022, arXiv:2210.17323"
CHEE = "Chee, Cai, Kuleshov & De Sa 2023, arXiv:2307.13304"


def layer(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Normal weights, and Σ x xᵀ of correlated inputs in float64."""
    import torch

    from mlsys.quant.gptq import hessian

    generator = torch.Generator().manual_seed(0)
    few = columns // 4
    x = torch.randn(4 * columns, few, generator=generator) @ torch.randn(few, columns, generator=generator) / few**0.5
    x += 0.3 * torch.randn(4 * columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), hessian(x.double())


def other_codes() -> float:
    """Of 64 × 384 codes, those that differ when all columns are one block and when each is its own."""
    from mlsys.quant.gptq import gptq

    w, H = layer(64, 384)
    one, all_at_once = (gptq(w, H, "int4", block=block).unpacked() for block in (1, 384))
    return float((one != all_at_once).sum())


def random_order() -> float:
    """The loss with the columns in a random order, over that in the given order; int3."""
    import torch

    from mlsys.quant.gptq import gptq, loss

    w, H = layer(256, 384)
    turn = torch.randperm(384, generator=torch.Generator().manual_seed(1))
    turned, weight = w[:, turn], H[turn][:, turn]
    return loss(turned, gptq(turned, weight, "int3"), weight) / loss(w, gptq(w, H, "int3"), H)


def mean_loss() -> float:
    """tr(E H Eᵀ) / (m tr(D)) for m = 4000 rows of uniform weights and integers as the grid, nothing clamped."""
    import torch

    from mlsys.quant.gptq import gptq

    _, H = layer(4, 48)
    w = 200 * torch.rand(4000, 48, generator=torch.Generator().manual_seed(1)) - 100
    w[:, 0] = 127  # the largest code of int8, so that steps are 1; it has no error, and does not count
    error = (w - gptq(w, H, "int8", damp=0.0).dequantize()).double()
    pivots = torch.linalg.cholesky(H.flip(0, 1)).diagonal().square().flip(0)
    return float(((error @ H) * error).sum() / (len(w) * pivots[1:].sum()))


def group_bits(group: int) -> float:
    """Bits a weight beyond 3, for scales in 16 bits and a zero point a group."""
    import torch

    from mlsys.quant.gptq import gptq

    w = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0))
    return gptq(w, torch.eye(1024), f"int3:g{group}:fp16").bits_per_weight - 3


CLAIMS = [
    Claim(
        name="gptq-lazy-blocks",
        area="quant.gptq",
        source=f"{FRANTAR}, section 4, step 2 (updates of later columns may wait: they change no decision); so 0",
        what="of 64 × 384 codes, those that depend on whether columns hear of errors at once or late",
        unit="codes",
        published=0,
        digits=0,
        compute=other_codes,
        formula=True,
    ),
    Claim(
        name="gptq-any-order",
        area="quant.gptq",
        source=f"{FRANTAR}, section 4, step 1 (any fixed order does about as well); so about 1",
        what="loss with columns in a random order, over that in the given, 256 × 384, int3",
        unit="",
        published=1.0,
        digits=1,
        compute=random_order,
        formula=True,
    ),
    Claim(
        name="gptq-mean-loss",
        area="quant.gptq",
        source=f"{CHEE}, Theorem 1 (m/12 · tr D on average for nearest rounding to integers, H = U D Uᵀ)",
        what="tr(E H Eᵀ) / (m tr D) of GPTQ, 4000 rows of uniform weights",
        unit="",
        published=1 / 12,
        digits=3,
        compute=mean_loss,
        formula=True,
    ),
    Claim(
        name="gptq-group-bits-1024",
        area="quant.gptq",
        source=f"{FRANTAR}, section 5 (groups of 1024: about 0.02 extra bits)",
        what="bits a weight beyond 3, with a scale in 16 bits and a zero point for each 1024",
        unit="bits",
        published=0.02,
        digits=2,
        compute=lambda: group_bits(1024),
    ),
    Claim(
        name="gptq-group-bits-128",
        area="quant.gptq",
        source=f"{FRANTAR}, section 5 (groups of 128: about 0.15 extra bits)",
        what="bits a weight beyond 3, with a scale in 16 bits and a zero point for each 128",
        unit="bits",
        published=0.15,
        digits=2,
        compute=lambda: group_bits(128),
        expected="disagrees",
        reason="They count zero points in 3 bits, 16 + 3 a group; here each takes a byte of its own, 16 + 8.",
    ),
]
