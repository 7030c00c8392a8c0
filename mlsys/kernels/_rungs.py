"""The kernels of a family as its variants, CUDA's and Triton's; their modules are imported when one is first run."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any

from mlsys.kernels._variants import Variant


def rungs(family: str, function: str, ideas: Mapping[str, str]) -> list[Variant]:
    """The variants `cuda.<rung>`, in the order of the ladder; `ideas` has a line for each.

    A rung runs `<family>_cuda.<function>(…, variant=rung)`. If that module has a function `refuse(…, variant=rung)`, it
    says why the rung cannot compute what it is given, or None.
    """

    def run(rung: str, *tensors: Any, **options: Any) -> Any:
        return getattr(_module(family, "cuda"), function)(*tensors, variant=rung, **options)

    def refuse(rung: str, *tensors: Any, **options: Any) -> str | None:
        ask = getattr(_module(family, "cuda"), "refuse", None)
        return None if ask is None else ask(*tensors, variant=rung, **options)

    return [Variant(f"cuda.{rung}", idea, partial(run, rung), partial(refuse, rung)) for rung, idea in ideas.items()]


def triton(family: str, function: str, idea: str) -> Variant:
    """The variant `triton`, which runs `<family>_triton.<function>`; that module may have a `refuse`, too."""

    def run(*tensors: Any, **options: Any) -> Any:
        return getattr(_module(family, "triton"), function)(*tensors, **options)

    def refuse(*tensors: Any, **options: Any) -> str | None:
        ask = getattr(_module(family, "triton"), "refuse", None)
        return None if ask is None else ask(*tensors, **options)

    return Variant("triton", idea, run, refuse)


def _module(family: str, backend: str) -> Any:
    return importlib.import_module(f"mlsys.kernels.{family}_{backend}")
