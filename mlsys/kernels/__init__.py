"""Kernels: one function, written again and again, each time a little faster, in CUDA that also runs without a GPU.

    from mlsys.kernels import list_variants, matmul, select

    matmul(a, b)                                # the fastest known here: torch on a CPU
    matmul(a, b, variant="cuda.tiled")          # this kernel, on a GPU or on the processor
    select("matmul", a, b)                      # which "auto" takes, and why

A family's module can be called by its own name. Its kernels lie beside it, one rung of its ladder a file:
`matmul.naive.cu`, `matmul.coalesced.cu`, …; each begins with what it changes and why.

`cuda`       load a kernel file, run it, `check` it, count what it moves; for your own files, too.
`matmul`     from one thread an element to TMA, wgmma and specialised warps.
`reduction`  sums: through shared memory, by shuffles, four numbers a load.
`scan`       prefix sums: in log n steps, in a tree, in a single pass over memory.
`transpose`  reading and writing in whole sectors, with bank conflicts and without.
`softmax`    three passes over a row, or two.
`norm`       LayerNorm and RMSNorm: a block or a warp a row.
`gelu`       fused with the bias before it, or not.
`conv1d`     depthwise, causal: neighbours share what they load.
`histogram`  atomics on global memory, and on a copy of each block's own.

`matmul_triton`, `softmax_triton` and `norm_triton` are the same in Triton, with gradients; so is
`cross_entropy_triton`, beside `cross_entropy`, the loss of a language model without its logits. `mlsys tune` finds
their fastest settings on a GPU.
"""

from __future__ import annotations

import importlib
from typing import Any

from mlsys.kernels._variants import Chosen, families, list_variants, select

__all__ = ["Chosen", "families", "list_variants", "select"]


def __getattr__(name: str) -> Any:
    """A family's module, imported when it is first used."""
    if name in families():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its families: {', '.join(families())}")


def __dir__() -> list[str]:
    return sorted([*globals(), *families()])
