"""What token and position ids may be, checked once at the public door."""

from __future__ import annotations

import torch
from torch import Tensor


def check_ids(name: str, ids: Tensor, ndim: int, limit: int, of: str, device: torch.device) -> None:
    """Refuse ids that are not int64 or int32, of `ndim` dimensions, on `device`, and in 0 … limit − 1 (called `of`).

    The values are looked at on a CPU only: elsewhere the look would wait for the device, whose embedding has an
    assertion of its own.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {ids.dtype}: convert it, e.g. {name}.long()")
    if ids.ndim != ndim:
        wanted = "(batch, seq)" if ndim == 2 else "(seq,)"
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(ids.shape)}")
    if ids.device != device:
        raise ValueError(f"{name} must be on {device}, got {ids.device}: move it, e.g. {name}.to({str(device)!r})")
    if device.type == "cpu" and ids.numel():
        low, high = ids.aminmax()
        if low < 0 or high >= limit:
            raise ValueError(f"{name} must lie between 0 and {of} − 1 = {limit - 1}, got {int(low)} … {int(high)}")
