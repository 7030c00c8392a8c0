"""Published numbers about training on many devices: ZeRO, activations, pipelines, all-reduce, gradient compression."""

from __future__ import annotations

from mlsys.claims._parallel_counted import COUNTED
from mlsys.claims._parallel_memory import ACTIVATIONS, RECOMPUTATION, ZERO_MEMORY
from mlsys.claims._parallel_mesh import RUN
from mlsys.claims._parallel_schedules import SIMULATED
from mlsys.claims._parallel_tensor import TENSOR
from mlsys.claims._parallel_time import (
    COMPRESSION,
    PIPELINES,
    SPECULATION,
    TRAINING,
    power_sgd_ratio,
    resnet18_shapes,
)

__all__ = ["CLAIMS", "power_sgd_ratio", "resnet18_shapes"]

CLAIMS = [
    *ZERO_MEMORY,
    *ACTIVATIONS,
    *TRAINING,
    *PIPELINES,
    *COMPRESSION,
    *RECOMPUTATION,
    *SPECULATION,
    *COUNTED,
    *SIMULATED,
    *TENSOR,
    *RUN,
]
