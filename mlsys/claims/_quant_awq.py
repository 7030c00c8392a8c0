"""Published numbers about AWQ, recomputed on matrices that are drawn; its perplexities would need its models."""

from __future__ import annotations

from functools import partial

from mlsys.claims.core import Claim

LIN = "Lin, Tang, Tang, Yang, Dang & Han 2023, arXiv:2306.00978"


def rounding_error() -> float:
    """The mean error of the nearest integer code, in steps, of normal weights."""
    import torch

    from mlsys.quant import quantize

    w = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    found = quantize(w, "int4:g128:sym")
    scale = found.scales()
    assert scale is not None
    return float(((w - found.dequantize()).abs() / scale.repeat_interleave(128, dim=1)).mean())


def error_left(s: float) -> float:
    """Mean Δ'/Δ of groups over s, where 1% of all columns are multiplied by s: what is left of their errors."""
    import torch

    from mlsys.quant import quantize

    generator = torch.Generator().manual_seed(0)
    w = torch.randn(256, 4096, generator=generator)
    scaled = w.clone()
    scaled[:, torch.randperm(4096, generator=generator)[:41]] *= s
    before, after = (quantize(x, "int3:g128:sym").scales() for x in (w, scaled))
    assert before is not None
    assert after is not None
    return float((after / before).double().mean()) / s


CLAIMS = [
    Claim(
        name="awq-rounding-error",
        area="quant.awq",
        source=f"{LIN}, on scaling salient weights (errors of rounding are uniform between 0 and 0.5, 0.25 on average)",
        what="mean error of the nearest code in steps, normal weights, 4 bits, groups of 128",
        unit="steps",
        published=0.25,
        digits=2,
        compute=rounding_error,
    ),
    *(
        Claim(
            name=f"awq-error-left-{s}",
            area="quant.awq",
            source=f"{LIN}, statistics of multiplying the 1% salient channels (OPT-6.7B, s = {s})",
            what=f"mean Δ'/Δ · 1/s where 1% of 4096 columns are multiplied by s = {s}, normal weights, groups of 128",
            unit="",
            published=published,
            digits=3,
            compute=partial(error_left, s),
            tolerance=0.05,
            expected="approximate" if s < 4 else "disagrees",
            reason=(
                "These weights are normal, and the columns chosen by chance: times 4, one of them is the largest of "
                "nearly half of all groups, whose step grows. A model's large columns seem to have smaller weights."
            ),
        )
        for s, published in ((1.25, 0.804), (1.5, 0.676), (2, 0.519), (4, 0.303))
    ),
]
