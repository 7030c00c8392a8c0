"""Packing: how fast are codes of 3 bits put side by side, when no machine can address 3 bits?

"loops" is the definition: bit j of code i goes to bit i·b + j, one pass over all codes for each bit of eight codes.
The library takes eight codes as a word of 64 bits and moves neighbours together in three steps, whatever the bits.
The peer is NumPy's packbits, to which each code is first spread out as bits, a byte each.

What to look at: bytes of codes a second, and how little they depend on the bits. For the multiplications that use the
codes this is not the fast path: they unpack in registers, as they go (`quant.qlinear`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlsys.bench import Benchmark, Impl, Plot, Work
from mlsys.quant import packing

Case = Mapping[str, Any]


def case(do: str, bits: int, n: int) -> Case:
    return {"do": do, "bits": bits, "n": n}


def cases(n: int, *bits: int) -> list[Case]:
    return [case(do, b, n) for do in ("pack", "unpack") for b in bits]


def inputs(case: Case, device: str) -> dict[str, Tensor]:
    """64 rows of codes, and the same packed."""
    generator = torch.Generator(device).manual_seed(case["n"])
    codes = torch.randint(
        0, 1 << case["bits"], (64, case["n"] // 64), generator=generator, dtype=torch.uint8, device=device
    )
    return {"codes": codes, "packed": packing.pack(codes, case["bits"])}


def work(case: Case, given: dict[str, Tensor]) -> Work:
    return Work(flops=0, bytes=given["codes"].nbytes + given["packed"].nbytes, items=case["n"], unit="codes")


class Loops:
    """Bit by bit."""

    def __init__(self, bits: int) -> None:
        self.places = [(i, j, *divmod(i * bits + j, 8)) for i in range(8) for j in range(bits)]
        self.bits = bits

    def pack(self, codes: Tensor) -> Tensor:
        rows, n = codes.shape
        eights = torch.nn.functional.pad(codes, (0, -n % 8)).reshape(rows, -1, 8)
        packed = eights.new_zeros(rows, eights.shape[1], self.bits)
        for i, j, byte, place in self.places:
            packed[..., byte] |= ((eights[..., i] >> j) & 1) << place
        return packed.reshape(rows, -1)[:, : packing.packed_bytes(n, self.bits)]

    def unpack(self, packed: Tensor, n: int) -> Tensor:
        rows, width = packed.shape
        parts = torch.nn.functional.pad(packed, (0, -width % self.bits)).reshape(rows, -1, self.bits)
        codes = parts.new_zeros(rows, parts.shape[1], 8)
        for i, j, byte, place in self.places:
            codes[..., i] |= ((parts[..., byte] >> place) & 1) << j
        return codes.reshape(rows, -1)[:, :n]


class Packbits:
    """NumPy's."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def pack(self, codes: Tensor) -> Tensor:
        each = np.unpackbits(codes.numpy()[:, :, None], axis=2, count=self.bits, bitorder="little")
        return torch.from_numpy(np.packbits(each.reshape(len(codes), -1), axis=1, bitorder="little"))

    def unpack(self, packed: Tensor, n: int) -> Tensor:
        bits = np.unpackbits(packed.numpy(), axis=1, count=n * self.bits, bitorder="little")
        return torch.from_numpy(np.packbits(bits.reshape(len(packed), n, self.bits), axis=2, bitorder="little")[..., 0])


def ours(bits: int) -> Any:
    return SimpleNamespace(
        pack=lambda codes: packing.pack(codes, bits), unpack=lambda packed, n: packing.unpack(packed, bits, n)
    )


def prepare(function: Callable[..., Any], case: Case, given: dict[str, Tensor]) -> Callable[[], Any]:
    made, n = function(case["bits"]), given["codes"].shape[1]
    return (lambda: made.pack(given["codes"])) if case["do"] == "pack" else (lambda: made.unpack(given["packed"], n))


def verify(case: Case, given: dict[str, Tensor], got: Any, want: Any) -> tuple[float, float]:
    """How many bytes differ."""
    return float((torch.as_tensor(got) != torch.as_tensor(want)).sum()), 0.0


bench = Benchmark(
    __file__,
    cases={
        "quick": [case("pack", 3, 1 << 14), case("unpack", 4, 1 << 14)],
        "default": cases(1 << 22, 1, 2, 3, 4, 5, 6, 7),
        "full": cases(1 << 22, 1, 2, 3, 4, 5, 6, 7, 8) + cases(1 << 24, 3, 4),
    },
    inputs=inputs,
    work=work,
    impls={
        "loops": Impl(lambda: Loops, "reference"),
        "words": Impl(lambda: ours, "ours"),
        "numpy packbits": Impl(lambda: Packbits, "peer", only=lambda case: bool(case["bits"] < 8)),
    },
    subject="words",
    prepare=prepare,
    verify=verify,
    fits=lambda case, device: device == "cpu",
    contract="quant.packing",
    plots=(Plot(x="bits", xlabel="bits a code", panel=("do",)),),
)

if __name__ == "__main__":
    bench.main()
