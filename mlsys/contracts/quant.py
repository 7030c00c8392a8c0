"""Contracts of `mlsys.quant`: number formats, packing, and ways to choose codes."""

from __future__ import annotations

from mlsys.contracts import (
    _quant_awq,
    _quant_formats,
    _quant_gptq,
    _quant_hqq,
    _quant_llm_int8,
    _quant_model,
    _quant_packing,
    _quant_qat,
    _quant_qlinear,
    _quant_rtn,
    _quant_smoothquant,
)
from mlsys.contracts.core import Contract
from mlsys.quant import formats, packing, rtn
from mlsys.quant.awq import awq
from mlsys.quant.gptq import gptq
from mlsys.quant.hqq import hqq
from mlsys.quant.model import quantize_

CONTRACTS: dict[str, Contract] = {
    "awq": _quant_awq.contract("quant.awq", awq),
    "formats": _quant_formats.contract("quant.formats", formats.named),
    "gptq": _quant_gptq.contract("quant.gptq", gptq),
    "llm_int8": _quant_llm_int8.contract("quant.llm_int8"),
    "model": _quant_model.contract("quant.model", quantize_),
    "hqq": _quant_hqq.contract("quant.hqq", hqq),
    "packing": _quant_packing.contract("quant.packing", packing.pack, packing.unpack),
    "qat": _quant_qat.contract("quant.qat"),
    "qlinear": _quant_qlinear.contract("quant.qlinear"),
    "qlinear_triton": _quant_qlinear.contract("quant.qlinear_triton", _quant_qlinear.by_triton),
    "rtn": _quant_rtn.contract("quant.rtn", rtn.quantize),
    "smoothquant": _quant_smoothquant.contract("quant.smoothquant"),
}
