"""Occupancy: how many blocks and warps of a kernel fit on one streaming multiprocessor (SM) at once.

An SM keeps a block until it ends, and shares its warp slots, block slots, registers and shared memory among the blocks
it holds. So the number of blocks is the smallest of five quotients,

    warps      ⌊warp slots / warps a block⌋
    blocks     the block slots
    registers  4 · ⌊⌊registers / 4⌋ / registers a warp⌋ / warps a block     (each quarter has its own)
    shared     ⌊shared memory / (shared a block + what the system reserves)⌋
    barriers   ⌊barriers / barriers a block⌋      (from Hopper on; one for __syncthreads, more with named barriers)

with registers rounded up to 256 a warp, and shared memory to its allocation unit. More warps hide more latency; a
kernel whose threads have much independent work hides it with few.

Cost:
    Integer arithmetic.

Memory:
    None to speak of.

Papers:
    NVIDIA, "CUDA C++ Programming Guide", appendix "Compute Capabilities" (table "Technical Specifications per Compute
    Capability": slots, registers, shared memory; the wheel nvidia-cuda-cccl has them in arch_traits.h).
    NVIDIA, cuda_occupancy.h, in the wheel nvidia-cuda-runtime (allocation units, rounding; the tests compare with it).
    Volkov 2010, "Better Performance at Lower Occupancy", GTC (why the largest number is not always the best).

See also:
    `mlsys.kernels.cuda.compile_report`, which takes registers and shared memory from the compiled kernel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

WARP = 32
MOST_THREADS = 1024  # of a block, on all of these
_REGISTER_UNIT = 256  # registers are given to a warp in these
_QUARTERS = 4  # an SM's sub-partitions: a warp lives in one, with a quarter of the registers


@dataclass(frozen=True)
class Multiprocessor:
    """What one SM has. shared_unit: allocation unit; reserved: bytes of shared memory a block that the system keeps."""

    warps: int
    blocks: int
    shared: int
    registers: int = 65536
    shared_unit: int = 128
    reserved: int = 1024
    barriers: int | None = None


MULTIPROCESSORS = {
    75: Multiprocessor(32, 16, 64 * 1024, shared_unit=256, reserved=0),  # Turing: T4, RTX 20
    80: Multiprocessor(64, 32, 164 * 1024),  # Ampere: A100
    86: Multiprocessor(48, 16, 100 * 1024),  # Ampere: A10, RTX 30
    87: Multiprocessor(48, 16, 164 * 1024),  # Ampere: Orin
    89: Multiprocessor(48, 24, 100 * 1024),  # Ada: L4, L40, RTX 40
    90: Multiprocessor(64, 32, 228 * 1024, barriers=64),  # Hopper: H100, H200
    100: Multiprocessor(64, 32, 228 * 1024, barriers=64),  # Blackwell: B200
    103: Multiprocessor(64, 32, 228 * 1024, barriers=32),  # Blackwell: B300
    120: Multiprocessor(48, 24, 100 * 1024, barriers=24),  # Blackwell: RTX 50
}


@dataclass(frozen=True)
class Occupancy:
    """Blocks of a kernel on one SM, and how many each resource would allow; None where the kernel needs none of it."""

    blocks: int
    warps: int
    most_warps: int
    by_warps: int
    by_blocks: int
    by_registers: int | None
    by_shared: int | None
    by_barriers: int | None

    @property
    def share(self) -> float:
        """Of the warp slots."""
        return self.warps / self.most_warps

    @property
    def limit(self) -> str:
        """What allows no more: `warps`, `blocks`, `registers`, `shared memory`, or several of them."""
        bounds = {
            "warps": self.by_warps,
            "blocks": self.by_blocks,
            "registers": self.by_registers,
            "shared memory": self.by_shared,
            "barriers": self.by_barriers,
        }
        return ", ".join(name for name, bound in bounds.items() if bound == self.blocks)

    def __str__(self) -> str:
        if not self.blocks:
            return f"does not fit on an SM: too much of {self.limit}"
        blocks = "1 block" if self.blocks == 1 else f"{self.blocks} blocks"
        return f"{blocks} an SM, {self.warps} of {self.most_warps} warps ({self.share:.0%}), limited by {self.limit}"


def occupancy(arch: str, threads: int, registers: int, shared: int = 0, *, barriers: int = 1) -> Occupancy:
    """How many blocks of `threads` threads run on an SM at once.

    arch: `sm_90a` and the like. registers: of a thread, as the compiler reports. shared: bytes a block, static and
    dynamic. barriers: that a block uses, `__syncthreads` being one. A block that cannot be launched there has 0
    blocks. ValueError naming the argument.
    """
    sm = multiprocessor(arch)
    for name, value, least, most in (
        ("threads", threads, 1, MOST_THREADS),
        ("registers", registers, 0, 255),
        ("shared", shared, 0, None),
        ("barriers", barriers, 0, 16),
    ):
        if (
            not isinstance(value, int)
            or isinstance(value, bool)
            or value < least
            or (most is not None and value > most)
        ):
            raise ValueError(f"{name} must be an int from {least}{f' to {most}' if most else ''}, got {value!r}")
    warps = -(-threads // WARP)
    by_registers = _by_registers(sm, warps, registers) if registers else None
    by_shared = _by_shared(sm, shared) if shared or sm.reserved else None
    by_barriers = sm.barriers // barriers if sm.barriers and barriers else None
    by_warps = sm.warps // warps
    blocks = min(x for x in (by_warps, sm.blocks, by_registers, by_shared, by_barriers) if x is not None)
    return Occupancy(blocks, blocks * warps, sm.warps, by_warps, sm.blocks, by_registers, by_shared, by_barriers)


def multiprocessor(arch: str) -> Multiprocessor:
    """The SM of an architecture: `sm_90` and `sm_90a` have the same. ValueError naming those that are known."""
    match = re.fullmatch(r"sm_(\d+)[af]?", arch) if isinstance(arch, str) else None
    found = MULTIPROCESSORS.get(int(match[1])) if match else None
    if found is None:
        raise ValueError(f"arch must be one of {', '.join(f'sm_{x}' for x in MULTIPROCESSORS)}, got {arch!r}")
    return found


def _by_registers(sm: Multiprocessor, warps: int, registers: int) -> int:
    a_warp = -(-registers * WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    return sm.registers // _QUARTERS // a_warp * _QUARTERS // warps


def _by_shared(sm: Multiprocessor, shared: int) -> int:
    return sm.shared // (-(-(shared + sm.reserved) // sm.shared_unit) * sm.shared_unit)
