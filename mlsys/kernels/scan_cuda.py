"""Prefix sums by CUDA kernels: how blocks that each scan their own numbers are joined.

Two rungs scan in three steps: each block scans its own numbers and leaves its total; the totals are scanned, by the
same kernel; the sums before each block are added to its numbers. The third rung needs one launch, whose blocks look
back at one another.

Cost:
    `hillis_steele`: 10 additions a number in blocks of 1,024, `blelloch`: 2, `decoupled`: about 3.

Memory:
    Traffic of 16 bytes a number in the rungs that pass over it twice, 8 in the one that does once. Beside the result:
    one float a block, or one 64-bit word a tile.

Papers:
    Hillis & Steele 1986, "Data Parallel Algorithms", Communications of the ACM 29(12) (the scan of log n steps).
    Blelloch 1990, "Prefix Sums and Their Applications", CMU-CS-90-190 (up-sweep and down-sweep).
    Harris, Sengupta & Owens 2007, "Parallel Prefix Sum (Scan) with CUDA", GPU Gems 3 (both on a GPU, and the padding).
    Merrill & Garland 2016, "Single-pass Parallel Prefix Scan with Decoupled Look-back", NVR-2016-002 (the third rung).

See also:
    `mlsys.kernels.scan` (the readable version), `mlsys.kernels.reduction_cuda` (the total only).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mlsys.kernels._inputs import forward_only, variant_of
from mlsys.kernels._launch import Launch, ceil_div, run
from mlsys.kernels.scan import RUNGS, check_inputs

VARIANTS = tuple(RUNGS)
PER_BLOCK = 1024  # numbers of a block
THREADS = {"hillis_steele": PER_BLOCK, "blelloch": PER_BLOCK // 2, "decoupled": PER_BLOCK // 4}


def scan(x: Float[Tensor, " n"], *, exclusive: bool = False, variant: str = "decoupled") -> Float[Tensor, " n"]:
    """The sum of x up to each place, or, if `exclusive`, before it, by one of `VARIANTS`; on x's device.

    TypeError, ValueError naming the argument.
    """
    out, plan = launches(x, exclusive=exclusive, variant=variant)
    run(plan)
    return out


def launches(
    x: Float[Tensor, " n"], *, exclusive: bool = False, variant: str = "decoupled"
) -> tuple[Float[Tensor, " n"], list[Launch]]:
    """Where the sums will be, and the launches that put them there."""
    check_inputs(x, exclusive)
    forward_only(x=x)
    variant_of(variant, VARIANTS)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return out, []
    x, n, blocks = x.contiguous(), x.numel(), ceil_div(x.numel(), PER_BLOCK)
    if variant == "decoupled":
        words = torch.zeros(blocks, dtype=torch.int64, device=x.device)
        drawn = torch.zeros(1, dtype=torch.int32, device=x.device)
        args = (n, x, out, words, drawn, int(exclusive))
        return out, [Launch("scan.decoupled", "scan_decoupled", blocks, THREADS[variant], args)]
    return out, _joined(x, out, int(exclusive), variant)


def _joined(x: Tensor, out: Tensor, exclusive: int, variant: str) -> list[Launch]:
    """Scan the blocks, scan their totals, add what came before each block."""
    n, blocks, file = x.numel(), ceil_div(x.numel(), PER_BLOCK), f"scan.{variant}"
    totals = torch.empty(blocks, dtype=x.dtype, device=x.device) if blocks > 1 else None
    plan = [Launch(file, "scan_blocks", blocks, THREADS[variant], (n, x, out, totals, exclusive))]
    if totals is not None:
        before = torch.empty_like(totals)
        plan += _joined(totals, before, 1, variant)
        plan.append(Launch(file, "add_offsets", blocks, PER_BLOCK, (n, out, before)))
    return plan
