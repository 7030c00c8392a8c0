"""What every attention function here accepts, checked once at the public door.

The checks read shapes and dtypes only, never values: a pass over the data would
cost more than it protects. NaN and infinity go through the arithmetic like numbers.
"""

import math
from numbers import Real

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_qkv(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> float:
    """The scale to use (1/√d unless given), after refusing what no formula could mean."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(f"{name} must have 4 dimensions (batch, heads, seq, head_dim), got shape {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}: convert it, e.g. {name}.float()"
            )
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(
                f"{name} must have q's dtype {q.dtype}, got {x.dtype}: convert one, e.g. {name}.to(q.dtype)"
            )
        if x.device != q.device:
            raise ValueError(
                f"{name} must be on q's device {q.device}, got {x.device}: move it, e.g. {name}.to(q.device)"
            )
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name} must have q's batch size {q.shape[0]}, got {x.shape[0]} (shape {tuple(x.shape)})")
    h, h_kv = q.shape[1], k.shape[1]
    if v.shape[1] != h_kv:
        raise ValueError(f"v must have as many heads as k, {h_kv}, got {v.shape[1]} (shape {tuple(v.shape)})")
    if h == 0 or h_kv == 0 or h % h_kv:
        raise ValueError(
            "q must have a multiple of k's heads, at least one, so that heads share keys evenly, "
            f"got {h} heads in q and {h_kv} in k"
        )
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"v must have as many positions as k, {k.shape[2]}, got {v.shape[2]} (shape {tuple(v.shape)})")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k must have q's head_dim {q.shape[3]}, got {k.shape[3]} (shape {tuple(k.shape)})")
    for name, x in (("q", q), ("v", v)):
        if x.shape[3] == 0:
            raise ValueError(f"{name} must have head_dim at least 1, got shape {tuple(x.shape)}")
    if not isinstance(causal, bool):
        raise TypeError(
            f"causal must be True or False, got {type(causal).__name__} (masks as tensors are not supported)"
        )
    if scale is None:
        return q.shape[3] ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"scale must be a number or None (for 1/√head_dim), got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}: leave it None for 1/√head_dim")
    return float(scale)


def check_block(name: str, size: int | None) -> None:
    """Refuse a block size that is not a whole number of rows; None stands for the module's own rule."""
    if size is None:
        return
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(
            f"{name} must be a positive int or None (chosen by the module), got {type(size).__name__} {size!r}"
        )
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")
