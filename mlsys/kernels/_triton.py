"""What every Triton kernel of the library needs: where it may run, a product that is right everywhere, its settings.

A kernel is an ordinary function under `@triton.jit`. Compiled, it runs on a GPU. With TRITON_INTERPRET=1 set before
Python starts, Triton runs it with NumPy on the CPU, one program after the other: slow, and the same numbers. Which of
the two it is, is decided when Triton is imported, for its own library of functions as for ours, and is one for the
process.

The interpreter knows no bfloat16: it keeps the sixteen bits as an integer, adds two of those as integers, and cuts a
float32 off where it should round. So a kernel turns what it has loaded into float32 before it computes, as it should
for the sake of the sums, and rounds with `narrow` before it stores. `dot` does the same for a product, but under the
interpreter only: compiled, the tensor cores take bfloat16 as it is.

See also:
    `mlsys.kernels._triton_tune` (which settings are the fastest), `mlsys.kernels._triton_compile` (what becomes of
    a kernel).
"""
# mypy: allow-untyped-defs

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

# `tl.cdiv` is a kernel function of Triton's own: what became of it when Triton was imported is what becomes of all
INTERPRETED = tl.constexpr(not isinstance(tl.cdiv, JITFunction))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """The product a @ b, added to acc, which is float32, or int32 if a and b are int8.

    PRECISION, for float32 factors: "ieee" is float32, "tf32" drops 13 bits of each.
    """
    if INTERPRETED:
        if a.dtype == tl.bfloat16:
            a = a.to(tl.float32)
        if b.dtype == tl.bfloat16:
            b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """A float32, rounded to the nearest number of DTYPE, to even if two are as near: `out.dtype.element_ty`, say."""
    if INTERPRETED:  # noqa: SIM102  (compiled, what is inside is not even looked at)
        if DTYPE == tl.bfloat16:  # noqa: SIM300
            bits = x.to(tl.uint32, bitcast=True)
            rounded = bits + 0x7FFF + ((bits >> 16) & 1)
            upper = tl.where(x == x, rounded >> 16, (bits >> 16) | 0x40)  # a NaN stays one: its bits are not rounded
            return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def bound(n):
    """A number as the bound of a loop over `tl.range`: Triton 3.6's interpreter takes a Python int only."""
    if INTERPRETED:  # noqa: SIM102  (compiled, what is inside is not even looked at)
        if hasattr(n, "handle"):
            return n.handle.data.item()
    return n


@dataclass(frozen=True)
class Config:
    """One way to cut a kernel's work: its tile sizes, and how many warps and pipeline stages a program has.

    constants:  the kernel's `tl.constexpr` arguments that may vary without changing the result, BLOCK_M and the like.
    warps:      of a program; 32 threads each.
    stages:     tiles of a loop that are on their way from memory at once.
    why_spills: why registers may be spilled to memory with these; "" if they must not be.
    """

    constants: tuple[tuple[str, int], ...]
    warps: int = 4
    stages: int = 2
    why_spills: str = ""

    def options(self) -> dict[str, int]:
        """What a launch takes: `kernel[grid](…, **config.options())`."""
        return dict(self.constants) | {"num_warps": self.warps, "num_stages": self.stages}

    def __getitem__(self, constant: str) -> int:
        return dict(self.constants)[constant]

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in (*self.constants, ("warps", self.warps))) + (
            f" stages={self.stages}"
        )


def config(*, warps: int = 4, stages: int = 2, why_spills: str = "", **constants: int) -> Config:
    """A `Config` with its constants by name: `config(BLOCK_M=128, BLOCK_N=64, warps=8, stages=3)`."""
    return Config(tuple(constants.items()), warps, stages, why_spills)


@dataclass(frozen=True)
class Specimen:
    """A kernel as it would be compiled for some call: what `_triton_compile` looks at, without a GPU or the call.

    name:      "softmax.forward bfloat16": the kernel, and what distinguishes the call.
    kernel:    the function under `@triton.jit`.
    signature: the types of its arguments: "*bf16", "i32", "fp32", "tensordesc<bf16[128,64]>".
    constants: its `tl.constexpr` arguments beside those of the config, and arguments that are None.
    config:    the settings.
    aligned:   arguments that are multiples of 16, as a pointer to a fresh tensor is and most strides are. Triton reads
               that off a call; without it loads are narrow and nothing is copied asynchronously.
    shows:     for a target (80, 90), what must appear in its code: names of `_triton_compile.MARKS`.
    targets:   those that it is launched on; all, if it names none.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    config: Config
    constants: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    shows: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    targets: tuple[int, ...] = ()


def on_device(name: str, **tensors: Tensor | None) -> torch.device:
    """The device that all of these tensors are on, if the Triton kernels of `mlsys.kernels.<name>` can run there.

    name: of the readable version, which a message recommends: "softmax", or in full "mlsys.attention.flash".
    ValueError naming the tensors if they are on several devices, or on one that Triton has no kernels for; RuntimeError
    if they are on a CPU, and the interpreter is not on.
    """
    readable = name if "." in name else f"mlsys.kernels.{name}"
    given = {key: x for key, x in tensors.items() if x is not None}
    (first, x), *others = given.items()
    for key, other in others:
        if other.device != x.device:
            raise ValueError(f"{key} must be on {first}'s device {x.device}, got {other.device}: move it")
    if x.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{first} must be on a CUDA device, got {x.device}: move it, or use {readable}")
    interpreted = bool(INTERPRETED.value)
    if bool(triton.knobs.runtime.interpret) != interpreted:
        raise RuntimeError(
            f"TRITON_INTERPRET was {'unset' if interpreted else 'set'} after Triton was imported, which is too late: "
            "set it, or not, before Python starts"
        )
    if x.device.type == "cpu" and not interpreted:
        raise RuntimeError(
            f"{first} is on a CPU, where Triton kernels run under Triton's interpreter only: set TRITON_INTERPRET=1 "
            f"before Python starts, or use {readable}"
        )
    return x.device


def at(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """While kernels for this device are launched: Triton takes the current GPU, whatever the tensors are on.

    The interpreter's NumPy would warn of an overflow or a NaN where a GPU goes on in silence, with the same numbers.
    """
    return torch.cuda.device(device) if device.type == "cuda" else np.errstate(all="ignore")


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is at least n: what a block of a whole row must be."""
    return 1 << max(n - 1, 0).bit_length()
