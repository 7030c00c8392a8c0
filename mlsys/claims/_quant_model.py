"""Published statements about models in 8 bits that are arithmetic; their perplexities would need their models."""

from __future__ import annotations

from mlsys.claims.core import Claim

WIDTH = 12288  # of OPT-175B (Zhang et al. 2022, arXiv:2205.01068)
ROWS = 64  # a part of a matrix: all rows are alike


def memory(scheme: str) -> float:
    """Bytes of a matrix in fp16, over those that it has once `quantize_` has rounded weights and inputs."""
    import torch
    from torch import nn

    from mlsys.quant import quantize_

    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(WIDTH, ROWS, bias=False)
    nn.init.normal_(layer.weight, generator=generator)
    report = quantize_(nn.Sequential(layer.half()), scheme, activations="int8")
    return report.before / report.nbytes


def in_eight_bits(outliers: int) -> float:
    """Of 100 inputs of a layer, those that LLM.int8() multiplies as integers, where so many columns hold outliers."""
    import torch
    from torch import nn

    from mlsys.quant import QuantizedLinear, quantize_

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, WIDTH, generator=generator).clamp(-5, 5)
    x[3, torch.randperm(WIDTH, generator=generator)[:outliers]] = 60
    module = nn.Sequential(nn.Linear(WIDTH, ROWS, bias=False))
    quantize_(module, "int8", "llm_int8", [x])
    layer = module[0]
    assert isinstance(layer, QuantizedLinear)
    kept = 0 if layer.outlier_columns is None else len(layer.outlier_columns)
    return 100 * (1 - kept / WIDTH)


CLAIMS = [
    Claim(
        name="w8a8-memory",
        area="quant.model",
        source="Xiao et al. 2022, arXiv:2211.10438, abstract (2× memory reduction)",
        what="bytes of a matrix of 12288 columns in fp16, over those in int8 with a scale for each row",
        unit="×",
        published=2,
        digits=1,
        compute=lambda: memory("int8"),
    ),
    Claim(
        name="llm-int8-share",
        area="quant.model",
        source="Dettmers et al. 2022, arXiv:2208.07339, abstract (more than 99.9% of values in 8 bits)",
        what="inputs of a layer of width 12288 that are multiplied as integers, 7 columns with outliers",
        unit="%",
        published=99.9,
        digits=1,
        compute=lambda: in_eight_bits(7),
    ),
]
