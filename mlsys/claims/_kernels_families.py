"""Published numbers about reductions, scans and the like, counted while our kernels run on the processor."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlsys.claims.core import Claim

if TYPE_CHECKING:
    from mlsys.kernels.cuda import Profile

GEMS = "Harris, Sengupta & Owens 2007, GPU Gems 3, chapter 39"
ONLINE = "Milakov & Gimelshein 2018, arXiv:1805.02867"
GUIDE = "NVIDIA, CUDA C++ Best Practices Guide"
STRIDES = """
__global__ void copy(float *out, const float *in, int stride, int offset) {
  int i = (blockIdx.x * blockDim.x + threadIdx.x) * stride + offset;
  out[i] = in[i];
}
"""


def _random(*shape: int) -> Any:
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _profiles(launches: Callable[..., Any], *args: Any, **options: Any) -> list[Profile]:
    from mlsys.kernels._launch import profile_each

    return profile_each(launches(*args, **options)[1])


def additions(variant: str) -> int:
    """Of an exclusive scan of 1024 numbers by one block."""
    from mlsys.kernels import scan_cuda

    return sum(p.flops for p in _profiles(scan_cuda.launches, _random(1024), exclusive=True, variant=variant))


def accesses_of_softmax(variant: str) -> float:
    """Of tensors, for each number of rows of 1000."""
    from mlsys.kernels import softmax_cuda

    profiles = _profiles(softmax_cuda.launches, _random(8, 1000), variant=variant)
    moved = sum(a.lanes * a.bytes for p in profiles for a in p.accesses if a.space == "global")
    return moved / 4 / 8000


def passes_of_a_column(variant: str) -> float:
    """Over the banks, for a warp that reads a column of the tile."""
    from mlsys.kernels import transpose_cuda

    (counted,) = _profiles(transpose_cuda.launches, _random(64, 64), variant=variant)
    reads = [a for a in counted.accesses if a.space == "shared" and a.kind == "read"]
    return sum(a.transactions for a in reads) / sum(a.requests for a in reads)


def conflicts_of_a_tree() -> int:
    """Of the sums in shared memory, sequentially addressed."""
    from mlsys.kernels import reduction_cuda

    return sum(p.conflicts for p in _profiles(reduction_cuda.launches, _random(10_000), variant="shared"))


def gelu_at_one() -> float:
    """By the kernel, with tanh."""
    import torch

    from mlsys.kernels import gelu_cuda

    return gelu_cuda.gelu(torch.ones(1), approximate="tanh").item()


def change_of_layernorm() -> float:
    """The largest, when all inputs are scaled and shifted."""
    import torch

    from mlsys.kernels import norm_cuda

    x, ones = _random(4, 64), torch.ones(64)
    before, after = (norm_cuda.norm(y, ones, eps=1e-12) for y in (x, 3 * x + 7))
    return (after - before).abs().max().item()


def multiplications_of_depthwise() -> float:
    """Of 3 channels of 100 numbers, width 4."""
    from mlsys.kernels import conv1d_cuda

    profiles = _profiles(conv1d_cuda.launches, _random(1, 3, 103), _random(3, 4), variant="depthwise_shared")
    return sum(p.flops for p in profiles) / 2


def atomics_of_histogram() -> float:
    """On each bin of the result, by one block."""
    import torch

    from mlsys.kernels import histogram_cuda

    x = torch.arange(256, dtype=torch.int32) % 16
    profiles = _profiles(histogram_cuda.launches, x, 16, variant="shared_atomics")
    updates = sum(a.lanes for p in profiles for a in p.accesses if a.space == "global" and a.kind == "atomic")
    return updates / 16


def efficiency(stride: int, offset: int) -> float:
    """Of the sectors that a copy reads, the share that it asked for."""
    import torch

    from mlsys.kernels.cuda import load, profile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "strides.cu"
        path.write_text(STRIDES, encoding="utf-8")
        x = torch.zeros(8 * 32 * 2 + 32)
        counted = profile(load(path)["copy"], 8, 32, x, x.clone(), stride, offset)
    (reads,) = (a for a in counted.accesses if a.kind == "read")
    return reads.lanes * reads.bytes / (32 * reads.transactions)


def _claim(
    name: str, area: str, source: str, what: str, published: float, compute: Callable[[], float], **more: Any
) -> Claim:
    settings: dict[str, Any] = {"unit": "", "digits": 0, **more}
    return Claim(name=name, area=area, source=source, what=what, published=published, compute=compute, **settings)


CLAIMS = [
    _claim(
        "scan-naive", "kernels.scan", f"{GEMS}, section 39.2.1 (the sum of n − 2^(d−1) over log2 n steps)",
        "additions of the naive scan, n = 1024, counted", 10 * 1024 - 1023, lambda: additions("hillis_steele"),
        formula=True,
    ),
    _claim(
        "softmax-safe-accesses", "kernels.softmax", f"{ONLINE}, section 2 (safe softmax)",
        "accesses to memory for each number, three passes, counted", 4, lambda: accesses_of_softmax("three_pass"),
    ),
    _claim(
        "softmax-online-accesses", "kernels.softmax", f"{ONLINE}, section 3 (online)",
        "accesses to memory for each number, online, counted", 3, lambda: accesses_of_softmax("online"),
    ),
    _claim(
        "transpose-conflicts", "kernels.transpose",
        "Ruetsch & Micikevicius 2009, Optimizing Matrix Transpose in CUDA (a column lies in one bank; 32 banks now)",
        "passes of a warp that reads a column of a 32 × 32 tile, counted", 32, lambda: passes_of_a_column("tiled"),
    ),
    _claim(
        "transpose-padded", "kernels.transpose",
        "Ruetsch & Micikevicius 2009, Optimizing Matrix Transpose in CUDA (one column of padding)",
        "passes of a warp that reads a column of a padded tile, counted", 1, lambda: passes_of_a_column("padded"),
    ),
    _claim(
        "reduction-sequential", "kernels.reduction",
        "Harris 2007, Optimizing Parallel Reduction in CUDA (sequential addressing is conflict free)",
        "bank conflicts of the sum in shared memory, counted", 0, conflicts_of_a_tree,
    ),
    _claim(
        "gelu-tanh", "kernels.gelu", "Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2",
        "0.5x(1 + tanh(√(2/π)(x + 0.044715x³))) at x = 1, by the kernel", 0.841192, gelu_at_one, digits=6, formula=True,
    ),
    _claim(
        "layernorm-invariant", "kernels.norm", "Ba, Kiros & Hinton 2016, arXiv:1607.06450, Table 1",
        "largest change of a normalised row if its numbers are scaled and shifted", 0, change_of_layernorm, digits=4,
    ),
    _claim(
        "depthwise-cost", "kernels.conv1d", "Howard et al. 2017, arXiv:1704.04861, equation 4 in 1-D (w·C·L)",
        "multiply-adds of a depthwise convolution, w = 4, C = 3, L = 100, counted", 1200, multiplications_of_depthwise,
        formula=True,
    ),
    _claim(
        "histogram-merge", "kernels.histogram", "Podlozhnyuk 2007, Histogram calculation in CUDA (one a block)",
        "updates of each bin of the result by 256 numbers in one block, counted", 1, atomics_of_histogram, formula=True,
    ),
    _claim(
        "stride-two", "kernels.cuda", f"{GUIDE}, Strided Accesses (a stride of 2: 50%)",
        "share of the sectors that was asked for, stride 2, counted", 50, lambda: 100 * efficiency(2, 0), unit="%",
    ),
    _claim(
        "offset-one", "kernels.cuda", f"{GUIDE}, Effects of Misaligned Accesses (5 segments instead of 4)",
        "share of the sectors that was asked for, offset 1, counted", 80, lambda: 100 * efficiency(1, 1), unit="%",
    ),
]  # fmt: skip
