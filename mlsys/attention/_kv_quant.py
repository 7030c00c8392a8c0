"""Keys and values in 8 bits: one scale for each token and head, so that a token is quantized when it arrives.

    scale = max |x| / largest code        code = x / scale, rounded

over the head_dim numbers of one head of one token. No number depends on another token's, so nothing that is in the
cache is ever quantized again, and a block can be shared or copied as it is.

    int8   255 steps of the same size: each number is off by at most scale / 2, which is max |x| / 254
    fp8    e4m3: 4 bits of exponent, 3 of mantissa: each is off by at most 1/16 of itself, and of the smallest,
           below scale / 64, by scale / 1024

See also:
    `mlsys.attention.kv_cache` (where the codes are kept).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """A number format of 8 bits: how torch calls it, and its largest number."""

    dtype: torch.dtype
    largest: float


FORMATS = {"int8": Format(torch.int8, 127.0), "fp8": Format(torch.float8_e4m3fn, 448.0)}


def quantize(x: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Codes of x (…, d) and float32 scales (…). A row that holds NaN or infinity comes back as NaN, every number of it;
    so does one whose numbers float32 cannot hold.

    Beyond the largest number, e4m3 has no infinity: what overflows becomes NaN or the largest, depending on who
    converts. So it is clamped before, though only a rounding of x / scale can take it there.
    """
    wide = x.float()
    scales = wide.abs().amax(-1) / form.largest
    # A quotient that was rounded up would make infinity of float32's largest number, on the way back
    top = torch.finfo(torch.float32).max / form.largest * (1 - 2**-23)
    scales = torch.where(scales.isinf(), torch.nan, scales.clamp(max=top))
    # A row of zeros, or one so small that its scale underflows, becomes zeros
    codes = wide / torch.where(scales == 0, 1.0, scales).unsqueeze(-1)
    if not form.dtype.is_floating_point:
        codes = codes.round_()
    return codes.clamp_(-form.largest, form.largest).to(form.dtype), scales


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Code times scale, in `dtype`."""
    return (codes.float() * scales.unsqueeze(-1)).to(dtype)
