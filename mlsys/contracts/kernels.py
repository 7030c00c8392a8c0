"""Contracts of `mlsys.kernels`: one a family, for its readable version, its ladder of kernels, and yours."""

from __future__ import annotations

from mlsys.contracts import (
    _kernels_conv1d,
    _kernels_gelu,
    _kernels_histogram,
    _kernels_matmul,
    _kernels_norm,
    _kernels_reduction,
    _kernels_scan,
    _kernels_softmax,
    _kernels_transpose,
)
from mlsys.contracts.core import Contract
from mlsys.kernels import (
    conv1d,
    conv1d_cuda,
    gelu,
    gelu_cuda,
    histogram,
    histogram_cuda,
    matmul,
    matmul_cuda,
    norm,
    norm_cuda,
    reduction,
    reduction_cuda,
    scan,
    scan_cuda,
    softmax,
    softmax_cuda,
    transpose,
    transpose_cuda,
)

CONTRACTS: dict[str, Contract] = {
    "matmul": _kernels_matmul.contract("kernels.matmul", matmul.matmul),
    "matmul_cuda": _kernels_matmul.contract("kernels.matmul_cuda", matmul_cuda.matmul),
    "conv1d": _kernels_conv1d.contract("kernels.conv1d", conv1d.conv1d),
    "conv1d_cuda": _kernels_conv1d.contract("kernels.conv1d_cuda", conv1d_cuda.conv1d),
    "gelu": _kernels_gelu.contract("kernels.gelu", gelu.gelu),
    "gelu_cuda": _kernels_gelu.contract("kernels.gelu_cuda", gelu_cuda.gelu),
    "histogram": _kernels_histogram.contract("kernels.histogram", histogram.histogram),
    "histogram_cuda": _kernels_histogram.contract("kernels.histogram_cuda", histogram_cuda.histogram),
    "norm": _kernels_norm.contract("kernels.norm", norm.norm),
    "norm_cuda": _kernels_norm.contract("kernels.norm_cuda", norm_cuda.norm),
    "reduction": _kernels_reduction.contract("kernels.reduction", reduction.sum),
    "reduction_cuda": _kernels_reduction.contract("kernels.reduction_cuda", reduction_cuda.sum),
    "scan": _kernels_scan.contract("kernels.scan", scan.scan),
    "scan_cuda": _kernels_scan.contract("kernels.scan_cuda", scan_cuda.scan),
    "softmax": _kernels_softmax.contract("kernels.softmax", softmax.softmax),
    "softmax_cuda": _kernels_softmax.contract("kernels.softmax_cuda", softmax_cuda.softmax),
    "transpose": _kernels_transpose.contract("kernels.transpose", transpose.transpose),
    "transpose_cuda": _kernels_transpose.contract("kernels.transpose_cuda", transpose_cuda.transpose),
}
