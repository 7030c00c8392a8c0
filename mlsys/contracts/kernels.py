"""Contracts of `mlsys.kernels`: one a family, for its readable version, its ladder of kernels, and yours."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from mlsys.contracts import (
    _kernels_conv1d,
    _kernels_cross_entropy,
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
    cross_entropy,
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


def _later(module: str, function: str) -> Callable[..., Any]:
    """A function of a Triton module, which is imported when it is first called: Triton is not everywhere."""

    def reference(*args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(f"mlsys.kernels.{module}"), function)(*args, **options)

    return reference


CONTRACTS: dict[str, Contract] = {
    "matmul": _kernels_matmul.contract("kernels.matmul", matmul.matmul),
    "matmul_cuda": _kernels_matmul.contract("kernels.matmul_cuda", matmul_cuda.matmul),
    "matmul_triton": _kernels_matmul.contract("kernels.matmul_triton", _later("matmul_triton", "matmul")),
    "conv1d": _kernels_conv1d.contract("kernels.conv1d", conv1d.conv1d),
    "conv1d_cuda": _kernels_conv1d.contract("kernels.conv1d_cuda", conv1d_cuda.conv1d),
    "cross_entropy": _kernels_cross_entropy.contract("kernels.cross_entropy", cross_entropy.cross_entropy),
    "cross_entropy_triton": _kernels_cross_entropy.contract(
        "kernels.cross_entropy_triton", _later("cross_entropy_triton", "cross_entropy")
    ),
    "gelu": _kernels_gelu.contract("kernels.gelu", gelu.gelu),
    "gelu_cuda": _kernels_gelu.contract("kernels.gelu_cuda", gelu_cuda.gelu),
    "histogram": _kernels_histogram.contract("kernels.histogram", histogram.histogram),
    "histogram_cuda": _kernels_histogram.contract("kernels.histogram_cuda", histogram_cuda.histogram),
    "norm": _kernels_norm.contract("kernels.norm", norm.norm),
    "norm_cuda": _kernels_norm.contract("kernels.norm_cuda", norm_cuda.norm),
    "norm_triton": _kernels_norm.contract("kernels.norm_triton", _later("norm_triton", "norm")),
    "reduction": _kernels_reduction.contract("kernels.reduction", reduction.sum),
    "reduction_cuda": _kernels_reduction.contract("kernels.reduction_cuda", reduction_cuda.sum),
    "scan": _kernels_scan.contract("kernels.scan", scan.scan),
    "scan_cuda": _kernels_scan.contract("kernels.scan_cuda", scan_cuda.scan),
    "softmax": _kernels_softmax.contract("kernels.softmax", softmax.softmax),
    "softmax_cuda": _kernels_softmax.contract("kernels.softmax_cuda", softmax_cuda.softmax),
    "softmax_triton": _kernels_softmax.contract("kernels.softmax_triton", _later("softmax_triton", "softmax")),
    "transpose": _kernels_transpose.contract("kernels.transpose", transpose.transpose),
    "transpose_cuda": _kernels_transpose.contract("kernels.transpose_cuda", transpose_cuda.transpose),
}
