"""Published numbers about what models and machines cost: sizes, FLOPs, utilisation, rooflines, caches, scaling laws."""

from __future__ import annotations

from mlsys.claims._perf_inference import CACHE
from mlsys.claims._perf_roofline import ROOFLINES
from mlsys.claims._perf_scaling_laws import LAWS
from mlsys.claims._perf_transformer import FLOPS, NANO, NANOGPT, SIZES

__all__ = ["CLAIMS", "NANO", "NANOGPT"]

CLAIMS = [*SIZES, *FLOPS, *CACHE, *ROOFLINES, *LAWS]
