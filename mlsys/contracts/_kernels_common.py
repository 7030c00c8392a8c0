"""What the contracts of the kernel families share: how inputs are drawn, and what a result has to be."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlsys.contracts.core import Mismatch

BLOCK = 256  # numbers that a block of the wrong variants takes


def draw(generator: torch.Generator, *shape: int, dtype: str = "float32", device: str = "cpu") -> Tensor:
    """Normal numbers, rounded to the dtype."""
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    return drawn.to(getattr(torch, dtype)).to(device)


def result(got: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The result, if it is a tensor of this shape and dtype; else Mismatch."""
    if not isinstance(got, Tensor):
        raise Mismatch(f"returned {type(got).__name__}, expected a tensor of shape {shape}")
    if got.dtype != dtype:
        raise Mismatch(f"returned {got.dtype}, expected {dtype}")
    if tuple(got.shape) != shape:
        raise Mismatch(f"returned shape {tuple(got.shape)}, expected {shape}")
    return got.detach()


def exact(x: Tensor) -> np.ndarray:
    """As float64, apart from torch."""
    return x.detach().cpu().double().numpy()


def rounding(dtype: torch.dtype, want: np.ndarray) -> float:
    """Half a unit in the last place of the largest finite number."""
    finite = np.abs(want[np.isfinite(want)])
    return float(torch.finfo(dtype).eps / 2 * finite.max(initial=0.0))


UNIT = torch.finfo(torch.float32).eps / 2  # of the sums, which are float32 whatever the tensors are
