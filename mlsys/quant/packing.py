"""Codes of a few bits side by side in bytes, without gaps.

Code i of a row takes bits i·b … i·b + b − 1, counted from the lowest bit of the row's first byte.
Below, each byte is written as numbers are, its highest bit on the left; a digit says whose bit it is:

                byte 0     byte 1     byte 2
    4 bits      11110000   33332222   55554444
    3 bits      22111000   54443332   77766655     code 2: two bits in byte 0, its highest in byte 1

A row ends on a full byte, so that rows can be read one by one.

Eight codes of one byte are a word of 64 bits, and become `bits` bytes in three steps, in each of
which neighbours move together, all pairs of a word at once (here 4 bits, one digit a code):

    .7.6.5.4.3.2.1.0   →   ..76..54..32..10   →   ....7654....3210   →   ........76543210

Cost:
    Three times four operations on a word of 8 codes; a copy for 8 bits.

Memory:
    ⌈n · bits / 8⌉ bytes a row of n codes.

Papers:
    Warren 2012, "Hacker's Delight", 2nd edition, section 7-4 (compress: bits move together in log₂ steps).
    Frantar et al. 2022, arXiv:2210.17323, section 5, "Practical Speedups" (weights unpacked as they are multiplied).

See also:
    `mlsys.quant.formats` (what codes mean).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def packed_bytes(n: int, bits: int) -> int:
    """How many bytes a row of n codes takes."""
    return -(-n * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 (*rows, n), each below 2^bits → uint8 (*rows, ⌈n·bits/8⌉). Bits that no code takes are 0."""
    check_bits(bits)
    check_bytes("codes", codes)
    if codes.numel() and bits < 8 and int(codes.max()) >> bits:
        raise ValueError(f"codes must be below 2^{bits} = {1 << bits}, got {int(codes.max())}")
    if bits == 8:
        return codes.clone(memory_format=torch.contiguous_format)
    *rows, n = codes.shape
    if not codes.numel():
        return codes.new_zeros(*rows, packed_bytes(n, bits))
    words = torch.nn.functional.pad(codes, (0, -n % 8)).contiguous().view(torch.int64)
    for lane, low in lanes(bits):  # the upper half of each lane comes down to the lower
        words = (words & low) | ((words & ~low) >> (lane // 2 - bits * lane // 16))
    packed = words.unsqueeze(-1).view(torch.uint8)[..., :bits].reshape(*rows, -1)
    return packed[..., : packed_bytes(n, bits)].contiguous()


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack`: uint8 (*rows, ⌈n·bits/8⌉) → the first n codes of each row, uint8 (*rows, n)."""
    check_bits(bits)
    check_bytes("packed", packed)
    *rows, width = packed.shape
    if type(n) is not int:
        raise TypeError(f"n must be a number of codes, got {n!r}")
    if n < 0 or width != packed_bytes(n, bits):
        raise ValueError(f"packed has rows of {width} bytes; {n} codes of {bits} bits take {packed_bytes(n, bits)}")
    if bits == 8:
        return packed.clone(memory_format=torch.contiguous_format)
    if not packed.numel():
        return packed.new_zeros(*rows, n)
    padded = torch.nn.functional.pad(packed, (0, -width % bits)).reshape(*rows, -1, bits)
    words = torch.nn.functional.pad(padded, (0, 8 - bits)).view(torch.int64).squeeze(-1)
    for lane, low in reversed(lanes(bits)):  # and back
        words = (words & low) | ((words << (lane // 2 - bits * lane // 16)) & (low << lane // 2))
    return words.view(torch.uint8)[..., :n].contiguous()


def lanes(bits: int) -> list[tuple[int, int]]:
    """The three steps: the width of a lane, and a mask of the bits in use in the lower half of each lane."""
    return [
        (lane, sum(((1 << bits * lane // 16) - 1) << start for start in range(0, 64, lane))) for lane in (16, 32, 64)
    ]


def check_bytes(name: str, codes: Any) -> None:
    """TypeError or ValueError unless rows of uint8."""
    if not isinstance(codes, Tensor) or codes.layout != torch.strided or codes.is_meta:
        raise TypeError(f"{name} must be a dense tensor that holds numbers, got {_kind(codes)}")
    if codes.dtype != torch.uint8:
        raise TypeError(f"{name} must be uint8, got {codes.dtype}")
    if codes.ndim == 0:
        raise ValueError(f"{name} must have at least one dimension, got a single number: reshape it to (1,)")


def _kind(x: Any) -> str:
    if not isinstance(x, Tensor):
        return type(x).__name__
    return "a meta tensor" if x.is_meta else str(x.layout)


def check_bits(bits: int) -> None:
    """ValueError unless 1 … 8."""
    if type(bits) is not int or bits not in range(1, 9):
        raise ValueError(f"bits must be 1 … 8, got {bits!r}")
