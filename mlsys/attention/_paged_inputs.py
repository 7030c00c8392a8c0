"""What paged attention accepts, checked once at the public door, and what it makes of block tables: items.

An item is a query (or several that see the same keys) and the blocks that it reads. A window cuts blocks off the
front of a sequence's table, splitting makes several items of one, sharing takes a common beginning out of many: each
is `Items.part`. What is not visible is never in an item's table, so the rest of the code may read all that is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from mlsys.attention._inputs import check_qkv, check_rules
from mlsys.attention._kv_quant import FORMATS

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


class How(NamedTuple):
    """How scores become weights, checked; `left` is how many tokens before its own a query sees, −1 for all."""

    scale: float
    left: int
    softcap: float | None
    alibi: Tensor | None  # (h,) float32 at least, as the next
    sinks: Tensor | None


class Stored(NamedTuple):
    """One layer of a paged cache: (blocks, kv_heads, block, ·), and the scales (blocks, kv_heads, block) of 8 bits."""

    keys: Tensor
    values: Tensor
    scales: tuple[Tensor, Tensor] | None

    @property
    def block(self) -> int:
        """Tokens in a block."""
        return self.keys.shape[2]


class Items(NamedTuple):
    """Which blocks are read, one row an item; all other numbers count tokens from the first one of the row."""

    table: np.ndarray  # (items, width) int64; an item that has fewer repeats its last
    start: np.ndarray  # (items,) the first token that is seen
    stop: np.ndarray  # (items,) one after the last; start or less if none is
    position: np.ndarray  # (items,) where the query stands

    def part(self, first: np.ndarray, count: np.ndarray, block: int) -> Items:
        """The same items with only `count` blocks from `first` on."""
        width = int(count.max(initial=0))
        if not width:
            none = np.zeros_like(self.stop)
            return Items(self.table[:, :0], none, none, self.position)
        if self.table.shape[1] == width and not first.any() and (count == width).all():
            return self
        columns = first[:, None] + np.minimum(np.arange(width), np.maximum(count - 1, 0)[:, None])
        table = np.take_along_axis(self.table, np.minimum(columns, self.table.shape[1] - 1), 1)
        offset, end = first * block, count * block
        start, stop = (np.clip(x - offset, 0, end) for x in (self.start, self.stop))
        return Items(table, start, stop, self.position - offset)

    def split(self, parts: int, block: int) -> Items:
        """`parts` items in place of each: first the beginnings of all, then what follows."""
        if parts == 1:
            return self
        count = -(-self.stop // block)
        each = -(-count // parts)
        cut = [self.part(i * each, np.clip(count - i * each, 0, each), block) for i in range(parts)]
        width = max(part.table.shape[1] for part in cut)
        tables = [np.pad(part.table, ((0, 0), (0, width - part.table.shape[1]))) for part in cut]
        rest = (np.concatenate(x) for x in list(zip(*cut, strict=True))[1:])
        return Items(np.concatenate(tables), *rest)

    def groups(self, block: int, limit: int) -> Iterator[slice | np.ndarray]:
        """The numbers of items that are done together: up to `limit` tokens, of about the same length."""
        width = self.table.shape[1]
        if width and (self.stop > (width - 1) * block).all() and (self.stop > self.start).all():  # all of one length
            each = max(1, limit // (width * block))
            yield from (slice(i, i + each) for i in range(0, self.stop.size, each))
            return
        tokens = np.where(self.stop > self.start, -(-self.stop // block) * block, 0)
        order = np.argsort(-tokens, kind="stable")
        order = order[: np.count_nonzero(tokens)]
        while order.size:
            group = order[: max(1, limit // int(tokens[order[0]]))]
            group = group[2 * tokens[group] > tokens[order[0]]]  # or half of what is done is for nothing
            yield group
            order = order[group.size :]

    def only(self, which: slice | np.ndarray, block: int) -> Items:
        """Some of the items, with a table as wide as they need."""
        stop = self.stop[which]
        table = self.table[which, : -(-int(stop.max()) // block)]
        return Items(table, self.start[which], stop, self.position[which])


def common_prefixes(items: Items, block: int) -> list[tuple[np.ndarray, int]]:
    """Sets of items whose tables begin with the same full blocks, and how many those are: one prefix for each set."""
    full = np.where(items.start == 0, items.stop // block, 0)
    first = np.where(full > 0, items.table[:, 0], -1) if items.table.shape[1] else full - 1
    found = []
    for block_id in np.unique(first[first >= 0]):
        members = np.flatnonzero(first == block_id)
        if members.size < 2:
            continue
        columns = items.table[members, : int(full[members].min())]
        alike = (columns == columns[0]).all(0)
        found.append((members, int(alike.argmin()) if not alike.all() else alike.size))
    return found


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
    if q.ndim != 3:
        raise ValueError(f"q must have 3 dimensions (sequences or rows, heads, head_dim), got shape {tuple(q.shape)}")
    _refuse_gradients(q=q, sinks=sinks)
    alone = q[:, :, None]  # what there is to check of q alone is checked by those who check q, k and v
    scale = check_qkv(alone, alone, alone, True, scale)
    rules = check_rules(alone, alone, True, window, None, alibi, softcap, sinks)
    return How(scale, window[0], rules.softcap, rules.alibi, rules.sinks)


def _refuse_gradients(**given: object) -> None:
    for name, x in given.items():
        if torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad:
            raise RuntimeError(
                f"paged attention is for inference, and {name} is part of a gradient: use torch.no_grad()"
            )


def check_stored(q: Tensor, stored: Stored, tables: Tensor, lengths: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Tables (seqs, max_blocks) and lengths (seqs,) as int64 arrays, after refusing blocks that do not fit q."""
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
    length = lengths.cpu().numpy().astype(np.int64)
    if length.min(initial=0) < 0:
        raise ValueError(f"lengths must be numbers of tokens, at least 0, got {int(length.min())}")
    longest = int(length.max(initial=0))
    if longest > tables.shape[1] * stored.block:
        raise ValueError(
            f"tables must have a block of {stored.block} tokens for each token of the longest sequence, {longest}, "
            f"that is {-(-longest // stored.block)} columns, got {tables.shape[1]}: a block missing, or a length off?"
        )
    return tables.cpu().numpy().astype(np.int64), length


def visible(table: np.ndarray, stored: Stored, earliest: np.ndarray, length: np.ndarray, left: int) -> Items:
    """The blocks that queries see of which the first stands at `earliest`; ValueError if one does not exist."""
    block, blocks = stored.block, stored.keys.shape[0]
    start = np.maximum(0, earliest - left) if left >= 0 else np.zeros_like(length)
    first = start // block
    items = Items(table, start, length, length - 1).part(first, -(-length // block) - first, block)
    wrong = (items.table < 0) | (items.table >= blocks)
    wrong &= (items.stop > items.start)[:, None]
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        entry, at = int(items.table[row, column]), int(first[row]) + column
        remedy = (
            "a block that has left the cache's window is visible in this call; pass the window that the cache has"
            if entry == -1
            else f"there are {blocks} blocks"
        )
        raise ValueError(
            f"tables must name a block for each token that is seen, got {entry} for sequence {row} at column {at}, "
            f"tokens {at * block} to {at * block + block - 1}: {remedy}"
        )
    return items


def check_packed(q: Tensor, cu_seqlens_q: Tensor, lengths: np.ndarray) -> list[int]:
    """How many queries each sequence has; they are its last, so not more than it has tokens."""
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
    if (queries > lengths).any():
        row = int((queries > lengths).argmax())
        raise ValueError(
            f"lengths must count the queries too, {int(queries[row])} in sequence {row}, got {int(lengths[row])}: "
            "the keys of new tokens are written before they are attended to"
        )
    return [int(n) for n in queries]
