"""The contract of `quant.packing`: codes of a few bits side by side, lowest bits first, each row on its own bytes.

The implementation is a function `make(bits)`; it gives an object with `pack(codes)`, uint8 (R, n) → uint8
(R, ⌈n·bits/8⌉), and `unpack(packed, n)`, the way back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from mlsys.contracts.core import Case, Contract, Inputs, Results, Wrong, as_array

SIGNATURE = "make(bits) -> object with pack(codes) -> packed, unpack(packed, n) -> codes; uint8 tensors of rows"
CASES: list[Case] = [
    {"bits": bits, "rows": rows, "n": n}
    for bits, rows, n in (
        (4, 1, 8), (4, 3, 16), (4, 3, 7), (2, 2, 16), (3, 1, 8), (3, 3, 16), (3, 3, 13), (1, 2, 11), (5, 2, 9),
        (6, 3, 10), (7, 2, 17), (8, 2, 5), (4, 0, 8),
    )
]  # fmt: skip


class Plain:
    """By NumPy's bits. Each further option is one place to go wrong."""

    def __init__(
        self,
        bits: int,
        *,
        order: str = "little",
        across: bool = True,
        rows_on: bool = False,
        planes: bool = False,
        drop: bool = False,
    ) -> None:
        self.bits, self.order, self.across = bits, order, across
        self.rows_on, self.planes, self.drop = rows_on, planes, drop

    def pack(self, codes: Any) -> np.ndarray:
        """All bits of a row one after the other, eight to a byte."""
        codes = as_array(codes)
        rows, n = codes.shape
        width = -(-n * self.bits // 8)
        bits = (codes[:, :, None] >> np.arange(self.bits)) & 1  # lowest first
        if self.order == "big":
            bits = bits[:, :, ::-1]
        if not self.across:  # as many as fit into a byte
            each = 8 // self.bits
            bits = np.pad(bits, ((0, 0), (0, -n % each), (0, 0))).reshape(rows, -(-n // each), each * self.bits)
            bits = np.pad(bits, ((0, 0), (0, 0), (0, 8 - each * self.bits)))
        if self.planes:
            bits = bits.transpose(0, 2, 1)
        flat = bits.reshape(rows, bits.shape[1] * bits.shape[2]).astype(np.uint8)
        if self.rows_on:
            flat = np.pad(flat.ravel(), (0, rows * width * 8 - flat.size)).reshape(rows, 8 * width)
        packed: np.ndarray = np.packbits(flat, axis=-1, bitorder="big" if self.order == "big" else "little")
        if self.drop and n * self.bits % 8:
            packed[:, -1] = 0
        return packed

    def unpack(self, packed: Any, n: int) -> np.ndarray:
        """Back, from packed bytes that are right."""
        packed = as_array(packed).astype(np.uint8)
        bits = np.unpackbits(packed, axis=-1, bitorder="little")[:, : n * self.bits].reshape(len(packed), n, self.bits)
        return (bits.astype(np.int64) << np.arange(self.bits)).sum(axis=2).astype(np.uint8)


class Signed(Plain):
    """Gives codes back as two's complement."""

    def unpack(self, packed: Any, n: int) -> np.ndarray:
        """With the first bit as a sign."""
        codes = super().unpack(packed, n).astype(np.int64)
        return np.where(codes >> (self.bits - 1), codes - (1 << self.bits), codes)


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Random codes."""
    import torch

    codes = np.random.default_rng(seed).integers(0, 1 << case["bits"], (case["rows"], case["n"])).astype(np.uint8)
    packed = Plain(case["bits"]).pack(codes)
    return {
        "bits": case["bits"],
        "codes": torch.from_numpy(codes).to(device),
        "packed": torch.from_numpy(packed).to(device),
    }


def call(make: Callable[[int], Any], given: Inputs) -> Results:
    """There, and back from bytes that are right."""
    packing = make(given["bits"])
    return {
        "packed": packing.pack(given["codes"]),
        "unpacked": packing.unpack(given["packed"], given["codes"].shape[1]),
    }


def oracle(given: Inputs) -> dict[str, np.ndarray]:
    """The inputs are each other's oracle."""
    return {"packed": as_array(given["packed"]), "unpacked": as_array(given["codes"])}


def tolerance(given: Inputs, name: str, want: np.ndarray) -> float:
    """None: bits."""
    return 0.0


def _wrong(hint: str, **knobs: Any) -> Wrong:
    return Wrong(partial(Plain, **knobs), hint)


WRONG = {
    "highest_bits_first": _wrong("the first code takes the lowest bits of the first byte", order="big"),
    "gaps": _wrong("no gaps: a code of 3 bits may begin in one byte and end in the next", across=False),
    "rows_run_on": _wrong("each row begins on a byte of its own", rows_on=True),
    "bit_planes": _wrong("the bits of a code stand together", planes=True),
    "last_byte_dropped": _wrong("a row takes ⌈n·bits/8⌉ bytes: round up, and fill the last", drop=True),
    "sign_extended": Wrong(Signed, "codes are without sign, 0 … 2^bits − 1; what they mean is the format's matter"),
}


def contract(name: str, pack: Callable[..., Any], unpack: Callable[..., Any]) -> Contract:
    """The contract of packing, for `pack(codes, bits)` and `unpack(packed, bits, n)`."""

    def reference(bits: int) -> Any:
        return SimpleNamespace(pack=lambda codes: pack(codes, bits), unpack=lambda packed, n: unpack(packed, bits, n))

    return Contract(
        name=name,
        signature=SIGNATURE,
        reference=reference,
        cases=CASES,
        inputs=inputs,
        call=call,
        oracle=oracle,
        tolerance=tolerance,
        wrong=WRONG,
    )
