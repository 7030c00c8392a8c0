"""The CUDA kernels of a family as its variants; the module that launches them is imported when one is first run."""

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
        return getattr(_module(family), function)(*tensors, variant=rung, **options)

    def refuse(rung: str, *tensors: Any, **options: Any) -> str | None:
        ask = getattr(_module(family), "refuse", None)
        return None if ask is None else ask(*tensors, variant=rung, **options)

    return [Variant(f"cuda.{rung}", idea, partial(run, rung), partial(refuse, rung)) for rung, idea in ideas.items()]


def _module(family: str) -> Any:
    return importlib.import_module(f"mlsys.kernels.{family}_cuda")
