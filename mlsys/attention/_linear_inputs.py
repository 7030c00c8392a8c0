"""What linear attention accepts, checked once at the public door, and the layout that it computes in.

Inside, heads are in groups: (b, g, r, t, ·), where g is the smaller number of heads and r is 1 for
the tensors that have only those. Broadcasting over r then shares what is shared and copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from mlsys.attention._inputs import DTYPES

Feature = Callable[[Tensor], Tensor]


class Options(TypedDict, total=False):
    """The options of every form, as keywords."""

    decay: Tensor | None
    state: Tensor | None
    feature: Feature | None
    normalise: bool


class Call(NamedTuple):
    """The arguments of a call as the forms compute with them: float32 at least, heads in groups."""

    q: Tensor  # (b, g, r or 1, t, d)
    k: Tensor  # (b, g, r or 1, t, d)
    v: Tensor  # (b, g, r or 1, t, dv), and a last column of ones if the output is to be normalised
    decay: Tensor | None  # log a: (b or 1, g, r or 1, t, 1 or d)
    state: Tensor  # (b, g, r or 1, d, columns of v)
    normalise: bool
    dtype: torch.dtype  # of the output

    def output(self, out: Tensor) -> Tensor:
        """The result for the caller: (b, g, r, t, columns of v) → (b, h, t, dv) in the dtype of the inputs."""
        if self.normalise:
            total = out[..., -1:]
            out = out[..., :-1] / total.masked_fill(total == 0, 1.0)  # who has seen nothing gets 0
        return out.flatten(1, 2).to(self.dtype)


def enter(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    state: Tensor | None,
    feature: Feature | None,
    normalise: bool,
) -> Call:
    """The call, after refusing what no formula could mean."""
    _check_tensors(q, k, v)
    dtype = q.dtype
    groups = _groups(q, k, v)
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    if feature is not None:
        q, k = _featured(feature, q, k)
    if not isinstance(normalise, bool):
        raise TypeError(f"normalise must be True or False, got {type(normalise).__name__}")
    if normalise:
        v = F.pad(v, (0, 1), value=1.0)  # Σ weights · 1 is the sum of the weights: the denominator rides along
    heads = max(k.shape[1], v.shape[1])  # of the state: whatever writes to it
    decay = _check_decay(decay, k, heads, groups)
    state = _check_state(state, k, v, heads)
    q, k, v, state = (_grouped(x, groups) for x in (q, k, v, state))
    return Call(q, k, v, decay, state, normalise, dtype)


def check_chunk(chunk: int) -> None:
    """Refuse a chunk that is not a whole number of positions."""
    if isinstance(chunk, bool) or not isinstance(chunk, int):
        raise TypeError(f"chunk must be a positive int, got {type(chunk).__name__} {chunk!r}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}: 64 is a good size")


def _grouped(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(1, (groups, -1))


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(f"{name} must have 4 dimensions (batch, heads, seq, head_dim), got shape {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}: convert it, e.g. {name}.float()"
            )
        if x.shape[1] == 0 or x.shape[3] == 0:
            raise ValueError(f"{name} must have at least one head and head_dim at least 1, got shape {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}: convert one")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}: move it")
        if (x.shape[0], x.shape[2]) != (q.shape[0], q.shape[2]):
            raise ValueError(
                f"{name} must have q's batch and length, {q.shape[0]} and {q.shape[2]}, got shape {tuple(x.shape)}: "
                "linear attention reads the past through its state, so every position has a query"
            )
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k must have q's head_dim {q.shape[3]}, got {k.shape[3]} (shape {tuple(k.shape)})")


def _groups(q: Tensor, k: Tensor, v: Tensor) -> int:
    """The smaller number of heads."""
    counts = sorted({x.shape[1] for x in (q, k, v)})
    if len(counts) > 2 or counts[-1] % counts[0]:
        raise ValueError(
            "q, k and v must have the same number of heads, or two numbers of which one divides the other, "
            f"got {q.shape[1]}, {k.shape[1]} and {v.shape[1]}"
        )
    return counts[0]


def _featured(feature: Feature, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    if not callable(feature):
        raise TypeError(f"feature must be a function of a tensor or None, got {type(feature).__name__}")
    mapped = feature(q), feature(k)
    for old, new in zip((q, k), mapped, strict=True):
        if not isinstance(new, Tensor) or new.shape[:-1] != old.shape[:-1] or new.shape[-1] != mapped[0].shape[-1]:
            got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(f"feature must map the last axis of a tensor {tuple(old.shape)} only, got {got}")
    return mapped[0].to(q.dtype), mapped[1].to(q.dtype)


def _check_decay(decay: Tensor | None, k: Tensor, heads: int, groups: int) -> Tensor | None:
    if decay is None:
        return None
    if not isinstance(decay, Tensor) or not decay.is_floating_point():
        kind = decay.dtype if isinstance(decay, Tensor) else type(decay).__name__
        raise TypeError(f"decay must be a floating-point tensor of log a, or None for no decay, got {kind}")
    if decay.device != k.device:
        raise ValueError(f"decay must be on q's device {k.device}, got {decay.device}: move it")
    b, _, t, d = k.shape
    if decay.shape not in {(heads,), (b, heads, t), (b, heads, t, d)}:
        raise ValueError(
            f"decay must have the heads of the state: ({heads},) for one a head, {(b, heads, t)} for one a position, "
            f"or {(b, heads, t, d)} for one a key channel, got shape {tuple(decay.shape)}"
        )
    if decay.ndim == 1:
        decay = decay[None, :, None].expand(1, heads, t)
    return _grouped((decay if decay.ndim == 4 else decay.unsqueeze(-1)).to(k.dtype), groups)


def _check_state(state: Tensor | None, k: Tensor, v: Tensor, heads: int) -> Tensor:
    shape = k.shape[0], heads, k.shape[3], v.shape[3]
    if state is None:
        return k.new_zeros(shape)
    if not isinstance(state, Tensor):
        raise TypeError(f"state must be a tensor that a call before has returned, or None, got {type(state).__name__}")
    if state.shape != shape:
        raise ValueError(
            f"state must have shape (batch, heads, d, dv) = {shape}, got {tuple(state.shape)}: pass what an earlier "
            "call has returned, of the same heads, feature and normalise (which adds a column)"
        )
    if state.dtype != k.dtype or state.device != k.device:
        raise TypeError(f"state must be {k.dtype} on {k.device}, got {state.dtype} on {state.device}: convert it")
    return state
