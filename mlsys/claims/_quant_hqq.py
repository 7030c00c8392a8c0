"""Published numbers about HQQ, from its formula and from a model's sizes."""

from __future__ import annotations

from mlsys.claims.core import Claim

BADRI = "Badri & Shaji 2023, Half-Quadratic Quantization of Large Machine Learning Models"
MIXTRAL = "mobiuslabsgmbh, model card of Mixtral-8x7B-Instruct-v0.1-hf-attn-4bit-moe-2bit-metaoffload-HQQ"
LAYERS, WIDTH, INNER, EXPERTS, VOCABULARY, KEYS = 32, 4096, 14336, 8, 32000, 1024  # of Mixtral 8x7B


def mixtral_gigabytes() -> float:
    """Codes of attention in 4 bits and of experts in 2, embeddings in 16, in 10^9 bytes."""
    import torch

    from mlsys.quant import hqq

    w = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0))
    experts, attention = (hqq(w, s).codes.nbytes / w.numel() for s in ("int2:g16:fp16", "int4:g64:fp16"))
    layer = EXPERTS * 3 * WIDTH * INNER * experts + 2 * WIDTH * (WIDTH + KEYS) * attention
    return (LAYERS * layer + 2 * VOCABULARY * WIDTH * 2) / 1e9


def set_aside(p: float) -> float:
    """What is set aside of an error of half a step, β = 10."""
    import torch

    from mlsys.quant.hqq import shrink

    return float(shrink(torch.tensor(0.5, dtype=torch.float64), 10.0, p))


CLAIMS = [
    Claim(
        name="hqq-mixtral-memory",
        area="quant.hqq",
        source=f"{MIXTRAL} (13.5 GB while it runs, scales and zero points kept outside)",
        what="codes of 2 bits (experts) and 4 bits (attention), embeddings in 16 bits",
        unit="GB",
        published=13.5,
        digits=1,
        compute=mixtral_gigabytes,
        tolerance=0.1,
        expected="approximate",
        reason="What the GPU holds while the model runs is more than its weights.",
    ),
    Claim(
        name="hqq-shrink",
        area="quant.hqq",
        source=f"{BADRI} (shrink(x, β) = sign(x) max(|x| − |x|^(p−1) / β, 0)); here 0.5 − 0.5^−0.3 / 10",
        what="what is set aside of an error of 0.5, p = 0.7, β = 10",
        unit="",
        published=0.3769,
        digits=4,
        compute=lambda: set_aside(0.7),
        formula=True,
    ),
    Claim(
        name="hqq-soft-threshold",
        area="quant.hqq",
        source=f"{BADRI} (for p = 1 it is the soft threshold, |x| − 1 / β); here 0.5 − 1 / 10",
        what="what is set aside of an error of 0.5, p = 1, β = 10",
        unit="",
        published=0.4,
        digits=6,
        compute=lambda: set_aside(1.0),
        formula=True,
    ),
]
