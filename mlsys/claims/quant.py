"""Published numbers about quantization."""

from __future__ import annotations

from mlsys.claims import (
    _quant_activations,
    _quant_awq,
    _quant_formats,
    _quant_gptq,
    _quant_hqq,
    _quant_model,
    _quant_qlinear,
)
from mlsys.claims.core import Claim

CLAIMS: list[Claim] = [
    *_quant_activations.CLAIMS,
    *_quant_awq.CLAIMS,
    *_quant_formats.CLAIMS,
    *_quant_gptq.CLAIMS,
    *_quant_hqq.CLAIMS,
    *_quant_model.CLAIMS,
    *_quant_qlinear.CLAIMS,
]
