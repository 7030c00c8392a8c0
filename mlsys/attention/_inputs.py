"""What every attention function here accepts, checked once at the public door.

The checks read shapes and dtypes only, never values: a pass over the data would
cost more than it protects. NaN and infinity go through the arithmetic like numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import TypedDict

import torch
from torch import Tensor

from mlsys.attention._visible import Band, band

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_qkv(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> float:
    """The scale to use (1/√d unless given), after refusing what no formula could mean."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(f"{name} must have 4 dimensions (batch, heads, seq, head_dim), got shape {tuple(x.shape)}")
        check_dtype(name, x)
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
            f"causal must be True or False, got {type(causal).__name__}: a mask as a tensor is the argument mask"
        )
    return check_scale(q, scale)


def check_dtype(name: str, x: Tensor) -> None:
    """Refuse numbers that attention is not computed in."""
    if x.dtype not in DTYPES:
        raise TypeError(
            f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}: convert it, e.g. {name}.float()"
        )


def check_scale(q: Tensor, scale: float | None) -> float:
    """By what the scores of q are multiplied: 1/√d unless given."""
    if scale is None:
        return q.shape[-1] ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"scale must be a number or None (for 1/√head_dim), got {type(scale).__name__}")
    if not abs(scale) <= torch.finfo(wide(q)).max:
        raise ValueError(f"scale must be finite, got {scale} for {wide(q)}: leave it None for 1/√head_dim")
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


class Options(TypedDict, total=False):
    """The options of every attention function here, as keywords."""

    causal: bool
    window: tuple[int, int]
    mask: Tensor | None
    alibi: Tensor | None
    softcap: float | None
    sinks: Tensor | None
    scale: float | None


@dataclass(frozen=True, eq=False)
class Rules:
    """What happens between the scores and the output, checked: which keys are seen, and how scores are changed."""

    band: Band
    mask: Tensor | None  # (b, h, t, s) True where visible, a view of what was given
    alibi: Tensor | None  # (h,) slopes, float32 at least, as the next
    softcap: float | None
    sinks: Tensor | None  # (h,)

    @property
    def by_band_alone(self) -> bool:
        """Whether the scores are used as they are, but for the band."""
        return self.mask is None and self.alibi is None and self.softcap is None and self.sinks is None


def check_rules(
    q: Tensor,
    k: Tensor,
    causal: bool,
    window: tuple[int, int],
    mask: Tensor | None,
    alibi: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Rules:
    """The options beside causal and scale, after refusing what no formula could mean; q and k are checked before."""
    b, h, t, _ = q.shape
    s = k.shape[2]
    sides = check_window(window)
    if mask is not None:
        mask = _check_mask(mask, (b, h, t, s), q.device)
    softcap = check_softcap(q, softcap)
    return Rules(band(t, s, causal, sides), mask, check_alibi(alibi, q), softcap, check_per_head("sinks", sinks, q))


def check_window(window: tuple[int, int]) -> tuple[int, int]:
    """How many keys are seen on either side, −1 for all."""
    sides = window if isinstance(window, tuple | list) else ()
    if len(sides) != 2 or any(isinstance(side, bool) or not isinstance(side, int) for side in sides):
        raise TypeError(f"window must be two ints (left, right), −1 for no bound on that side, got {window!r}")
    if min(sides) < -1:
        raise ValueError(f"window must be numbers of keys (left, right), or −1 for no bound, got {window!r}")
    return sides[0], sides[1]


def check_softcap(q: Tensor, softcap: float | None) -> float | None:
    """The cap of q's scores, whose reciprocal is a number as well."""
    if softcap is None:
        return None
    if isinstance(softcap, bool) or not isinstance(softcap, Real):
        raise TypeError(f"softcap must be a number or None (for no cap), got {type(softcap).__name__}")
    least = torch.finfo(wide(q)).tiny  # below, its reciprocal would be infinite
    if not least <= softcap <= 1 / least:
        raise ValueError(
            f"softcap must be positive and finite, got {softcap}, and so must its reciprocal be in {wide(q)}: "
            "leave it None for no cap"
        )
    return float(softcap)


def check_alibi(alibi: Tensor | None, q: Tensor) -> Tensor | None:
    """The slopes, one a query head."""
    if isinstance(alibi, Tensor) and alibi.requires_grad:
        raise ValueError("alibi must not require a gradient, for it gets none here: pass alibi.detach()")
    return check_per_head("alibi", alibi, q)


def _check_mask(mask: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a bool tensor or None, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mask must be bool, True where a key is visible, got {mask.dtype}: "
            "compare to make one, e.g. mask > 0, or mask == 0 if numbers are added to the scores"
        )
    if mask.device != device:
        raise ValueError(f"mask must be on q's device {device}, got {mask.device}: move it, e.g. mask.to(q.device)")
    try:
        return mask.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"mask must be broadcastable to (batch, heads, t, s) = {shape}, got shape {tuple(mask.shape)}: "
            "give its own axes length 1, e.g. mask[:, None, None, :] for one of (batch, s)"
        ) from None


def check_per_head(name: str, x: Tensor | None, q: Tensor) -> Tensor | None:
    """One number a query head of q (·, heads, …), in float32 at least."""
    if x is None:
        return None
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor (heads,) or None, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}: e.g. {name}.float()")
    if x.shape != q.shape[1:2]:
        raise ValueError(f"{name} must have one number a query head, ({q.shape[1]},), got shape {tuple(x.shape)}")
    if x.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}: move it, e.g. {name}.to(q.device)")
    return x.to(wide(q))


def wide(x: Tensor) -> torch.dtype:
    """The dtype of scores, sums and gradients of `x` while they are worked on: float32 at least."""
    return torch.float32 if x.element_size() == 2 else x.dtype
