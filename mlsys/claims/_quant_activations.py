"""Published statements about outliers in activations, and about training with rounding; the models are not needed."""

from __future__ import annotations

from mlsys.claims.core import Claim

XIAO = "Xiao, Lin, Seznec, Wu, Demouth & Han 2022, arXiv:2211.10438"
DETTMERS = "Dettmers, Lewis, Belkada & Zettlemoyer 2022, arXiv:2208.07339"
ESSER = "Esser, McKinstry, Bablani, Appuswamy & Modha 2019, arXiv:1902.08153"


def outlier_levels() -> float:
    """Codes that numbers in −1 … 1 have if the same scale holds a 100."""
    import torch

    from mlsys.quant import quantize

    x = torch.linspace(-1, 1, 1001)
    x[0] = 100
    return float(len(quantize(x[None], "int8:tensor").unpacked()[:, 1:].unique()))


def balanced() -> float:
    """The largest ratio of a column's maximum in x / s and in W · diag(s), α = ½."""
    import torch

    from mlsys.quant.smoothquant import absmax, smooth, smooth_scale

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=generator) * torch.exp(2 * torch.randn(64, generator=generator))
    w = torch.randn(32, 64, generator=generator)
    s = smooth_scale(absmax(x), w)
    ratio = absmax(x / s) / absmax(smooth(w, s))
    return float(torch.maximum(ratio, 1 / ratio).max())


def kept_share() -> float:
    """Per cent of a 5120 × 5120 matrix in 16 bits that 7 of its columns are."""
    import torch

    from mlsys.quant import llm_int8

    w = torch.ones(64, 5120, dtype=torch.bfloat16)
    return 100 * llm_int8.keep(w, 700 * torch.arange(7)).nbytes / w.nbytes


def step_gradient(ratio: float) -> float:
    """∂ŵ/∂s of one number w = ratio · s in 3 bits, without the factor 1 / √(N·Q)."""
    import torch

    from mlsys.quant.qat import lsq

    step = torch.full((1, 1), 0.25, requires_grad=True)
    lsq(torch.full((1, 1), 0.25 * ratio), step, "int3:sym").sum().backward()
    assert step.grad is not None
    return float(step.grad) * 3**0.5


CLAIMS = [
    Claim(
        name="smoothquant-effective-levels",
        area="quant.smoothquant",
        source=f"{XIAO}, on outliers (about 100 times larger, they leave other channels two or three levels)",
        what="codes of 8 bits that numbers in −1 … 1 have if their tensor holds a 100",
        unit="codes",
        published=3,
        digits=0,
        compute=outlier_levels,
    ),
    Claim(
        name="smoothquant-half-balances",
        area="quant.smoothquant",
        source=f"{XIAO}, the formula of s (α = 0.5: inputs and weights of a channel share one maximum); so 1",
        what="the largest ratio of the two maxima of a channel, 64 channels of very unequal size",
        unit="",
        published=1.0,
        digits=4,
        compute=balanced,
        formula=True,
    ),
    Claim(
        name="llm-int8-memory",
        area="quant.llm_int8",
        source=f"{DETTMERS}, section 3.2 (at most 7 outlier columns up to 13B: about 0.1% more memory)",
        what="7 columns of a matrix with 5120, as a share of it",
        unit="%",
        published=0.1,
        digits=1,
        compute=kept_share,
    ),
    Claim(
        name="lsq-gradient-within",
        area="quant.qat",
        source=f"{ESSER}, step size gradient (−v/s + round(v/s) within the range), at v/s = 1.4",
        what="gradient of a number rounded to 3 bits in its step, at 1.4 steps",
        unit="",
        published=-0.4,
        digits=4,
        compute=lambda: step_gradient(1.4),
        formula=True,
    ),
    Claim(
        name="lsq-gradient-clamped",
        area="quant.qat",
        source=f"{ESSER}, step size gradient (the largest code beyond the range), Q = 3, at v/s = 5",
        what="gradient of a number clamped to 3 bits in its step, at 5 steps",
        unit="",
        published=3.0,
        digits=4,
        compute=lambda: step_gradient(5.0),
        formula=True,
    ),
]
