"""Sequences of different lengths, packed one after the other without padding."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor


def sequences(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """q, k and v of each sequence, (1, heads, length, ·), after refusing lengths that do not fit the tensors."""
    lengths_q, lengths_k = lengths(q, k, v, cu_seqlens_q, cu_seqlens_k)
    # split, whose backward pass writes one gradient; slices would fill one of the whole length for each sequence
    for qi, ki, vi in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True):
        yield qi.transpose(0, 1)[None], ki.transpose(0, 1)[None], vi.transpose(0, 1)[None]


def lengths(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> tuple[list[int], list[int]]:
    """How many queries and how many keys each sequence has, after refusing numbers that do not fit the tensors."""
    lengths_q = _lengths("q", q, cu_seqlens_q)
    lengths_k = _lengths("k", k, cu_seqlens_k)
    if len(lengths_q) != len(lengths_k):
        raise ValueError(
            "cu_seqlens_k must name as many sequences as cu_seqlens_q, "
            f"{len(lengths_q)}, got {len(lengths_k)} (one number more than sequences)"
        )
    if v.shape[0] != k.shape[0]:
        raise ValueError(f"v must have as many rows as k, {k.shape[0]}, got {v.shape[0]} (shape {tuple(v.shape)})")
    return lengths_q, lengths_k


def _lengths(name: str, x: Tensor, cumulative: Tensor) -> list[int]:
    """The lengths of the sequences packed in q or k."""
    if not isinstance(x, Tensor) or x.ndim != 3:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a packed tensor (total, heads, head_dim), got {got}")
    where = f"cu_seqlens_{name}"
    if not isinstance(cumulative, Tensor) or cumulative.dtype not in (torch.int32, torch.int64):
        kind = cumulative.dtype if isinstance(cumulative, Tensor) else type(cumulative).__name__
        raise TypeError(f"{where} must be an int32 or int64 tensor, got {kind}")
    if cumulative.ndim != 1 or cumulative.shape[0] < 2:
        raise ValueError(
            f"{where} must have one number more than sequences, at least 2, got shape {tuple(cumulative.shape)}"
        )
    ends = cumulative.tolist()
    lengths = [end - start for start, end in pairwise(ends)]
    if ends[0] != 0 or ends[-1] != x.shape[0] or min(lengths) < 0:
        raise ValueError(
            f"{where} must go up from 0 to the rows of {name}, {x.shape[0]}, got {ends}: "
            "cumulative lengths, e.g. [0, 3, 8] for lengths 3 and 5"
        )
    return lengths
