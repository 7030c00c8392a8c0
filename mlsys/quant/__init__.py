"""Quantization: weights in few bits, chosen well, and multiplied as they are.

`formats` says what codes mean, `packing` puts them side by side, `rtn` rounds a matrix (`quantize`).
`gptq` rounds such that the layer's outputs err little.
`awq` scales columns by their inputs first, `hqq` fits zero points without any data.
`smoothquant` and `llm_int8` deal with outliers in what the weights are multiplied with; `qat` trains with the rounding.
`qlinear` multiplies with what they make, on the fastest path that there is; `explain` says which.
`quantize_` does all that for the linear layers of a model; `save` and `load` keep it in one file.
"""

from mlsys.quant._scheme import Scheme
from mlsys.quant._tensor import QuantizedTensor
from mlsys.quant.awq import awq
from mlsys.quant.gptq import gptq, gptq_report, hessian
from mlsys.quant.hqq import hqq
from mlsys.quant.model import QuantizedLinear, Report, load, quantize_, save
from mlsys.quant.qat import fake_quantize
from mlsys.quant.qlinear import PreparedWeight, explain, prepare, qlinear
from mlsys.quant.rtn import quantize
from mlsys.quant.smoothquant import smooth, smooth_scale

__all__ = [
    "PreparedWeight",
    "QuantizedLinear",
    "QuantizedTensor",
    "Report",
    "Scheme",
    "awq",
    "explain",
    "fake_quantize",
    "gptq",
    "gptq_report",
    "hessian",
    "hqq",
    "load",
    "prepare",
    "qlinear",
    "quantize",
    "quantize_",
    "save",
    "smooth",
    "smooth_scale",
]
