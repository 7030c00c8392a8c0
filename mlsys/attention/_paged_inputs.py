"""What paged attention accepts, checked once at the public door, and what it asks of who reads the blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from mlsys.attention._inputs import (
    check_alibi,
    check_dtype,
    check_per_head,
    check_scale,
    check_softcap,
    check_window,
)
from mlsys.attention._kv_quant import FORMATS
from mlsys.attention._paged_items import Items, Tables

QUANTIZED = tuple(form.dtype for form in FORMATS.values())


class Options(TypedDict, total=False):
    """What paged attention can be asked for besides its inputs, as keywords."""

    window: tuple[int, int]
    alibi: Tensor | None
    softcap: float | None
    sinks: Tensor | None
    scale: float | None
    scales: tuple[Tensor, Tensor] | None


class DecodeOptions(Options, total=False):
    """The same of one query a sequence."""

    splits: int
    share_prefixes: bool
    reader: Reader | None


class PrefillOptions(Options, total=False):
    """The same of several."""

    causal: bool


class LayerOptions(TypedDict, total=False):
    """The same of a layer of a cache, which knows its window and its scales."""

    causal: bool
    window: tuple[int, int] | None
    alibi: Tensor | None
    softcap: float | None
    sinks: Tensor | None
    scale: float | None
    splits: int
    share_prefixes: bool
    reader: Reader | None


class How(NamedTuple):
    """How scores become weights, checked."""

    scale: float
    window: tuple[int, int]
    softcap: float | None
    alibi: Tensor | None  # (h,) float32 at least, as the next
    sinks: Tensor | None

    @property
    def left(self) -> int:
        """How many tokens before its own a query sees, −1 for all."""
        return self.window[0]


class Stored(NamedTuple):
    """One layer of a paged cache: (blocks, kv_heads, block, ·), and the scales (blocks, kv_heads, block) of 8 bits."""

    keys: Tensor
    values: Tensor
    scales: tuple[Tensor, Tensor] | None

    @property
    def block(self) -> int:
        """Tokens in a block."""
        return self.keys.shape[2]


class Queries(NamedTuple):
    """Queries of items, `rows` of each item and key/value head; in what follows, n is the tokens of an item."""

    rows: Tensor  # (items, kv_heads, rows, d)
    scale: float  # by which their scores are multiplied
    position: np.ndarray  # (items, rows) or (items, 1): where they stand
    slopes: Tensor | None  # (kv_heads, rows) of ALiBi
    softcap: float | None
    need_lse: bool


Parts = tuple[Tensor, Tensor]  # out (items, kv_heads, rows, dv) and lse (items, kv_heads, rows), for `merge`
# What reads the blocks of each item for its queries. lse may be anything unless it is needed; both in float32 at least
Reader = Callable[[Queries, Stored, Items], Parts]


def check_how(
    q: Tensor,
    window: tuple[int, int],
    alibi: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    scale: float | None,
) -> How:
    """The options, after refusing what they could not mean for queries (·, h, d)."""
    if not isinstance(q, Tensor):
        raise TypeError(f"q must be a torch.Tensor, got {type(q).__name__}")
    if q.ndim != 3 or 0 in q.shape[1:]:
        raise ValueError(
            "q must have 3 dimensions (sequences or rows, heads, head_dim), with heads and head_dim at least 1, "
            f"got shape {tuple(q.shape)}"
        )
    _refuse_gradients(q=q, sinks=sinks)
    check_dtype("q", q)
    slopes, sinks = check_alibi(alibi, q), check_per_head("sinks", sinks, q)
    return How(check_scale(q, scale), check_window(window), check_softcap(q, softcap), slopes, sinks)


def _refuse_gradients(**given: object) -> None:
    for name, x in given.items():
        if torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad:
            raise RuntimeError(
                f"paged attention is for inference, and {name} is part of a gradient: use torch.no_grad()"
            )


def check_stored(q: Tensor, stored: Stored) -> None:
    """Refuse blocks that do not fit the queries."""
    keys, values, scales = stored
    if scales is not None and not (
        isinstance(scales, tuple | list) and len(scales) == 2 and all(isinstance(x, Tensor) for x in scales)
    ):
        raise TypeError(
            f"scales must be None or two tensors, of the keys and of the values, got {type(scales).__name__}: "
            "e.g. (cache.scales[0, layer], cache.scales[1, layer])"
        )
    _refuse_gradients(keys=keys, values=values)
    for name, x in (("keys", keys), ("values", values)):
        if not isinstance(x, Tensor) or x.ndim != 4:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor (blocks, kv_heads, block, head_dim), got {got}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}: move one of them")
        if scales is None and x.dtype != q.dtype:
            why = "with codes of 8 bits, pass their scales" if x.dtype in QUANTIZED else f"e.g. q.to({x.dtype})"
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}: {why}")
        if scales is not None and x.dtype not in QUANTIZED:
            raise TypeError(f"{name} must be int8 or float8_e4m3fn, since scales are given, got {x.dtype}")
        if not x.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, or every call would copy them, got strides {x.stride()}: "
                f"keep them as (blocks, kv_heads, block, head_dim), or pass {name}.contiguous()"
            )
    if values.shape[:3] != keys.shape[:3]:
        raise ValueError(
            f"values must have the blocks, heads and block size of keys, {tuple(keys.shape[:3])}, "
            f"got shape {tuple(values.shape)}"
        )
    if keys.shape[3] != q.shape[2]:
        raise ValueError(f"keys must have q's head_dim {q.shape[2]}, got {keys.shape[3]} (shape {tuple(keys.shape)})")
    if min(keys.shape[1:]) < 1 or q.shape[1] % keys.shape[1]:
        raise ValueError(
            f"q must have a multiple of the heads of keys, got {q.shape[1]} heads in q and keys of {tuple(keys.shape)}"
        )
    for name, scale in zip(("key", "value"), scales or (), strict=False):
        _refuse_gradients(scales=scale)
        if scale.shape != keys.shape[:3] or scale.dtype != torch.float32 or scale.device != q.device:
            raise ValueError(
                f"scales must be two float32 tensors {tuple(keys.shape[:3])} on {q.device}, of keys and of values, "
                f"got {scale.dtype} {tuple(scale.shape)} on {scale.device} for the {name}s"
            )


def check_tables(tables: Tensor, lengths: Tensor, stored: Stored) -> Tables:
    """Tables (seqs, max_blocks) and lengths (seqs,), after refusing what these blocks cannot be read by."""
    for name, x, ndim, shape in (("tables", tables, 2, "(seqs, max_blocks)"), ("lengths", lengths, 1, "(seqs,)")):
        if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be an int32 or int64 tensor, got {kind}: e.g. {name}.int()")
        if x.ndim != ndim:
            raise ValueError(f"{name} must be {shape}, got shape {tuple(x.shape)}")
    if tables.shape[0] != lengths.shape[0]:
        raise ValueError(
            f"tables must have a row for each of {lengths.shape[0]} sequences, got shape {tuple(tables.shape)}"
        )
    counts = lengths.tolist()  # so few that Python is faster than NumPy
    if min(counts, default=0) < 0:
        raise ValueError(f"lengths must be numbers of tokens, at least 0, got {min(counts)}")
    longest = max(counts, default=0)
    if longest > tables.shape[1] * stored.block:
        raise ValueError(
            f"tables must have a block of {stored.block} tokens for each token of the longest sequence, {longest}, "
            f"that is {-(-longest // stored.block)} columns, got {tables.shape[1]}: a block missing, or a length off?"
        )
    table = tables.cpu().numpy().astype(np.int64)  # a copy: compiled code relies on what is checked of it
    return Tables(table, np.array(counts, np.int64), stored.block, stored.keys.shape[0])


def check_packed(q: Tensor, cu_seqlens_q: Tensor, lengths: np.ndarray) -> np.ndarray:
    """How many queries each sequence has."""
    if not isinstance(cu_seqlens_q, Tensor) or cu_seqlens_q.dtype not in (torch.int32, torch.int64):
        kind = cu_seqlens_q.dtype if isinstance(cu_seqlens_q, Tensor) else type(cu_seqlens_q).__name__
        raise TypeError(f"cu_seqlens_q must be an int32 or int64 tensor, got {kind}")
    if cu_seqlens_q.shape != (lengths.size + 1,):
        raise ValueError(
            f"cu_seqlens_q must have one number more than sequences, {lengths.size + 1}, "
            f"got shape {tuple(cu_seqlens_q.shape)}"
        )
    ends = cu_seqlens_q.cpu().numpy().astype(np.int64)
    queries = np.diff(ends)
    if ends[0] != 0 or ends[-1] != q.shape[0] or queries.min(initial=0) < 0:
        raise ValueError(
            f"cu_seqlens_q must go up from 0 to the rows of q, {q.shape[0]}, got {ends.tolist()}: "
            "cumulative lengths, e.g. [0, 3, 8] for 3 and 5 queries"
        )
    return queries


def check_counted(queries: np.ndarray, lengths: np.ndarray) -> None:
    """The queries are a sequence's last tokens, so not more than it has."""
    if (queries > lengths).any():
        row = int((queries > lengths).argmax())
        raise ValueError(
            f"lengths must count the queries too, {int(queries[row])} in sequence {row}, got {int(lengths[row])}: "
            "the keys of new tokens are written before they are attended to"
        )
