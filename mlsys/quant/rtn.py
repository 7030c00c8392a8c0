"""Round to nearest: each weight gets the code nearest to it, on a grid that spans its group.

    symmetric   s = max|w| / (2^(b−1) − 1)                       ŵ = s · round(w / s)
    affine      s = (max(w, 0) − min(w, 0)) / (2^b − 1),
                z = round(−min(w, 0) / s)                        ŵ = s · (round(w / s + z) − z)
    floats      s = max|w| / (largest number of the format)      ŵ = s · nearest(w / s)
    MX          s = 2^(⌊log₂ max|w|⌋ − e_max)                    the same, saturated

    step s, and |ŵ − w| ≤ s / 2 for integers (scales in float32: one that is rounded down clips a little)

Fewer weights to a scale: a smaller step where weights are small, and more bits for
scales: 32 bits on 128 weights are a quarter of a bit each.

It needs no data, and at 8 bits nothing better is needed. At 4 bits it is what the
other methods of `mlsys.quant` are measured against; at 3 and 2 it fails.

Codes are chosen by the scale as it will be read back, after it was rounded to 16 bits, or
quantized itself. Several libraries divide by the scale as it was before, which leaves a little
more noise. Exact are: 0, always; and with scales in float32, a group of equal numbers.

Cost:
    Two passes over the matrix: one for the ranges, one to round.

Memory:
    bits per weight = b + (bits of a scale and zero point) / (group size); `QuantizedTensor.bits_per_weight` counts.

Papers:
    Jacob et al. 2017, arXiv:1712.05877, section 2.1 (affine quantization with an exact zero).
    Rouhani et al. 2023, arXiv:2310.10537, "Scalar Float to MX Format Conversion" (shared exponents).
    Dettmers et al. 2023, arXiv:2305.14314, section 3 (NF4, double quantization).

See also:
    `mlsys.quant.formats` (what codes mean), `mlsys.quant.gptq` (rounding that makes up for its errors).
"""

from __future__ import annotations

from torch import Tensor

from mlsys.quant._scheme import Scheme
from mlsys.quant._tensor import QuantizedTensor, assemble, check_matrix, choose_grid, encode


def quantize(w: Tensor, scheme: Scheme | str) -> QuantizedTensor:
    """Each number of w (*rows, K) as the nearest code of `scheme` ("int4:g128"; see `Scheme`); groups lie along K.

    w is not changed; it is looked at in float32. "fp16" has no scale, and what lies beyond 65504 becomes 65504.
    TypeError or ValueError for what is no float tensor, not finite, so large that a code would stand for more than
    float32 holds (about 1.7e38), or no scheme.
    """
    scheme = Scheme.parse(scheme)
    x = check_matrix("w", w)
    grid = choose_grid(x, scheme)
    return assemble(encode(x, grid, scheme), grid, tuple(w.shape), scheme)
