"""A batch as microbatches, and how much each of them counts.

See also:
    `mlsys.parallel.pipeline`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mlsys.parallel._pipeline_messages import Signature


@dataclass(frozen=True)
class Microbatch:
    """Tensors that are arguments together."""

    tensors: tuple[Tensor, ...]

    @property
    def rows(self) -> int:
        """Samples: the first dimension."""
        return self.tensors[0].shape[0]

    @property
    def signature(self) -> Signature:
        """Shapes and dtypes: all that the shapes between stages depend on."""
        return tuple((tuple(t.shape), t.dtype) for t in self.tensors)


def microbatches(name: str, value: Any, m: int) -> list[Microbatch]:
    """`value`, a batch called `name`, as m microbatches."""
    if isinstance(value, list):
        if len(value) != m:
            raise ValueError(f"{name} is a list of {len(value)}, and the schedule has {m} microbatches: pass as many")
        found = [Microbatch(_arguments(f"{name}[{k}]", one)) for k, one in enumerate(value)]
    else:
        whole = Microbatch(_arguments(name, value))
        if whole.rows < m:
            raise ValueError(
                f"{name} has {whole.rows} samples, too few for {m} microbatches: take a larger batch, or a schedule "
                "with fewer"
            )
        cut = [tensor.tensor_split(m) for tensor in whole.tensors]
        found = [Microbatch(tensors) for tensors in zip(*cut, strict=True)]
    for k, one in enumerate(found):
        if one.rows == 0:
            raise ValueError(f"{name}[{k}] has no samples: leave it out, with a schedule of fewer microbatches")
    return found


def _arguments(name: str, value: Any) -> tuple[Tensor, ...]:
    tensors = value if isinstance(value, tuple) else (value,)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name} must be a tensor, a tuple of tensors or a list of microbatches, got {type(tensor).__name__}"
            )
        if tensor.ndim == 0:
            raise ValueError(f"{name} is a scalar: its first dimension must be the samples")
    if not tensors or len({tensor.shape[0] for tensor in tensors}) > 1:
        raise ValueError(
            f"{name} must be tensors of equally many samples, got shapes {[tuple(t.shape) for t in tensors]}"
        )
    return tensors


def shares(
    batch: Sequence[Microbatch], targets: Sequence[Microbatch] | None, count: Callable[[Any], float] | None
) -> list[float]:
    """The part of each microbatch in the mean over the batch."""
    if count is None:
        counts = [float(one.rows) for one in batch]
    else:
        counts = [float(count(*one.tensors)) for one in targets or ()]
    total = sum(counts)
    if not total > 0 or min(counts) < 0:
        raise ValueError(f"count gave {counts} for the microbatches: amounts of at least 0, not all 0, are needed")
    return [number / total for number in counts]
