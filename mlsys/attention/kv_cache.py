"""A KV cache in blocks: no memory is reserved for tokens that may never come, and equal prefixes are kept once.

A token's keys and values never change, so decoding keeps them: 2·layers·kv_heads·head_dim
numbers a token. A cache that holds each sequence in one piece has to guess how long it
will get, and what it reserves beyond that is of no use to anybody. Do as operating
systems do with memory: cut it in blocks of B tokens, and give each sequence a table,

    token p of a sequence  is in block  table[p // B]  at place  p mod B

A sequence takes a block when it needs one, so that of each only the last is partly
empty. And since a table can name any block, sequences can name the same one:

    fork         the same table again; every block is counted once more
    write        only into a block that nobody else holds; otherwise into a copy of it
    prefix       a full block is indexed by  h = hash(h of the block before, its tokens);
                 a new prompt walks along that chain as far as it is known
    eviction     what nobody holds stays indexed until its room is needed; the longest
                 unused goes first
    window       blocks that no later query sees are given back

Hashes may collide, so a hit compares the tokens too. (Engines that do not compare them
use a cryptographic hash: whoever can choose a prompt could otherwise read another's.)

`Pool` keeps these books and holds no tensor. `PagedKVCache` adds the memory,

    (layers, blocks, kv_heads, B, head_dim)

for keys and for values: the rows of a head in a block lie together, as a matrix product
wants them. A step has three parts, so that one that fails leaves the cache as it was:
`reserve` room, `append` in each layer, `advance`. Where a step writes and what it reads is
the same in all layers: worked out in the first, and again after anything has changed in the pool.

With one block for each sequence, as long as the longest may get, the same class is a
contiguous cache. `mlsys.models.transformer.KVCache` is one for sequences of the same
length, whose `append` returns views.

With `quantized` "int8" or "fp8", a number takes 8 bits, and each head of each token a scale.

Cost:
    Bookkeeping: a dictionary look-up for each full block, an addition for each block
    that is forked. `append` writes t tokens, `gather` copies a whole sequence: reading
    straight from the blocks is the business of paged attention.

Memory:
    2·layers·kv_heads·head_dim·itemsize bytes a token; quantized
    2·layers·kv_heads·(head_dim + 4). All of it is taken at the start. Of a sequence of n
    tokens, B·⌈n/B⌉ − n places are empty, (B − 1)/2 on average.

Where it loses: the blocks of a sequence lie apart, so that a plain matrix product needs
a copy first, and on a CPU the copy takes longer than the product. For one batch of
equal lengths that are known, a contiguous cache is simpler and faster. A window and
prefix sharing get in each other's way: a prefix whose first blocks were evicted is no
longer found, although a query may not see them.

Papers:
    Kwon et al. 2023, arXiv:2309.06180, sections 4.1 to 4.4 (block tables, sharing, copy-on-write).
    Zheng et al. 2023, arXiv:2312.07104, section 3 (reuse of prefixes across calls, least recently used first).
    Beltagy et al. 2020, arXiv:2004.05150, section 3.1 (sliding windows).
    Micikevicius et al. 2022, arXiv:2209.05433, section 3 (e4m3).

See also:
    `mlsys.perf.inference` (bytes a token of published models), `mlsys.models.transformer` (what fills a cache).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mlsys.attention._inputs import DTYPES
from mlsys.attention._kv_quant import FORMATS, dequantize, quantize
from mlsys.attention._paged_items import Tables
from mlsys.attention._pages import BLOCK, OutOfBlocks, Pool, Sequence, ids, whole

__all__ = ["BLOCK", "Batch", "OutOfBlocks", "PagedKVCache", "Pool", "Sequence"]


class PagedKVCache:
    """Keys and values of all layers in `blocks` blocks of `block` tokens; `pool` knows whose they are.

    block:     as in `Pool`, which says what speaks for small ones and for large ones.
    window:    as in `Pool`: how many tokens before it a query sees.
    quantized: None, "int8" or "fp8" (e4m3).
    dtype:     of what goes in and comes out; torch's default.

    `pool.start`, `fork`, `truncate` and `free` are called on the pool; `reserve` and `advance` here, since a
    reservation may have to copy blocks. TypeError or ValueError if an argument is not what it must be.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        blocks: int,
        block: int = BLOCK,
        *,
        window: int | None = None,
        quantized: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        for name, value in (("layers", layers), ("kv_heads", kv_heads), ("head_dim", head_dim)):
            whole(name, value)
        self.pool = Pool(blocks, block, window=window)
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        if self.dtype not in DTYPES:
            raise TypeError(
                f"dtype must be float64, float32, bfloat16 or float16, got {dtype}; 8 bits are asked for by quantized="
            )
        if quantized is not None and quantized not in FORMATS:
            raise ValueError(f"quantized must be None or one of {', '.join(map(repr, FORMATS))}, got {quantized!r}")
        self.format = None if quantized is None else FORMATS[quantized]
        shape = (layers, blocks, kv_heads, block, head_dim)
        stored = self.format.dtype if self.format else self.dtype
        # Not torch.empty: what was never written may be read along with the rest of its block, and times 0 NaN is NaN
        self.keys, self.values = (torch.zeros(shape, dtype=stored, device=device) for _ in "kv")
        self.scales = torch.zeros((2, *shape[:-1]), device=device) if self.format else None  # of keys, of values
        self._step: _Step | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and scales, used or not."""
        return self.keys.nbytes + self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def reserve(self, seqs: Iterable[Sequence], tokens: int = 1) -> None:
        """Make room for `tokens` more in each sequence, and copy what they share and are about to write.

        OutOfBlocks, and nothing has changed, if there is not enough for all of them.
        """
        for source, target in self.pool.reserve(seqs, tokens):
            # One block at a time, straight to its place: this needs no memory, so it cannot fail for want of it
            for x in (self.keys, self.values, *([] if self.scales is None else self.scales)):
                x[:, target].copy_(x[:, source])

    def append(
        self,
        layer: int,
        seqs: Iterable[Sequence],
        k: Float[Tensor, "b kv_heads t d"],
        v: Float[Tensor, "b kv_heads t d"],
    ) -> None:
        """Write keys and values of t more tokens of each sequence in one layer; reserves room if that was not done.

        They count when `advance` is called, after all layers. ValueError if k or v is of another shape, dtype or
        device than the cache; RuntimeError if it is part of a gradient; OutOfBlocks as `reserve`.
        """
        seqs = self.pool.different(seqs)
        self._check_layer(layer)
        for name, new in (("k", k), ("v", v)):
            if not isinstance(new, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(new).__name__}")
            t = k.shape[2] if k.ndim == 4 else "t"
            want = (len(seqs), self.keys.shape[2], t, self.keys.shape[4])
            if tuple(new.shape) != want:
                raise ValueError(
                    f"{name} must have the cache's (seqs, kv_heads, t, head_dim) = {want}, got {tuple(new.shape)}"
                )
            if new.dtype != self.dtype or new.device != self.keys.device:
                raise ValueError(
                    f"{name} must be {self.dtype} on {self.keys.device} as the cache is, "
                    f"got {new.dtype} on {new.device}"
                )
            if torch.is_grad_enabled() and new.requires_grad:
                raise RuntimeError("a cache is for inference: compute keys and values under torch.no_grad()")
        t = k.shape[2]
        step = self._step
        if step is None or step.rows is None or not step.of(self.pool, seqs, t):
            self.reserve(seqs, t)
            step = self._step = self._prepared(seqs, t, to_write=True)
        assert step.rows is not None
        if not t or not seqs:
            return
        for part, (stored, new) in enumerate(((self.keys, k), (self.values, v))):
            new = new.reshape(-1, new.shape[-1])  # (b·kv_heads·t, d)
            if self.format and self.scales is not None:
                new, scales = quantize(new, self.format)
                self.scales[part, layer].view(-1)[step.rows] = scales
            stored[layer].view(-1, new.shape[-1])[step.rows] = new

    def advance(self, seqs: Iterable[Sequence], tokens: int | Iterable[Iterable[int]]) -> None:
        """Count what every layer has appended: the ids for each sequence, or how many, of which nobody learns the ids.

        Only blocks whose tokens were told can be found by other sequences. ValueError, and nothing has changed, if
        there is no room reserved for all of them.
        """
        seqs = self.pool.different(seqs)
        told: list[int | list[int]]
        told = [tokens] * len(seqs) if isinstance(tokens, int) else [ids("tokens", row) for row in tokens]
        if len(told) != len(seqs):
            raise ValueError(f"tokens must have a row for each of {len(seqs)} sequences, got {len(told)}")
        for seq, new in zip(seqs, told, strict=True):
            self.pool.check_room(seq, new)
        for seq, new in zip(seqs, told, strict=True):
            self.pool.advance(seq, new)

    def gather(
        self, layer: int, seq: Sequence, pending: int = 0
    ) -> tuple[Float[Tensor, "kv_heads n d"], Float[Tensor, "kv_heads n d"]]:
        """A copy of one layer's keys and values of a sequence, (kv_heads, n, head_dim) each, in order.

        pending: how many more have been appended, and are wanted too, but not counted yet.
        With a window, blocks that have left it are missing at the beginning: n is length − dropped·block.
        """
        k, v = self._gather(layer, [seq], pending)
        return k[0], v[0]

    def tables(
        self, seqs: Iterable[Sequence], pending: int = 0
    ) -> tuple[Int[Tensor, "seqs max_blocks"], Int[Tensor, " seqs"]]:
        """Block tables and lengths as int32 tensors, as paged attention reads them.

        A table ends in −1 where it is shorter than the longest, and begins with −1 for blocks that have left the
        window. pending: as in `gather`.
        """
        held, device = self.held(seqs, pending), self.keys.device
        tables, lengths = (torch.from_numpy(x.astype(np.int32)).to(device) for x in (held.table, held.length))
        return tables, lengths

    def held(self, seqs: Iterable[Sequence], pending: int = 0) -> Tables:
        """`tables` as attention wants them inside; all layers of a step are given the same."""
        seqs = list(seqs)
        if self._step is None or not self._step.of(self.pool, seqs, pending):
            self._step = self._prepared(seqs, pending)
        return self._step.tables

    def layer(self, layer: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Keys, values and scales of one layer, as they lie there: (blocks, kv_heads, block, ·)."""
        self._check_layer(layer)
        scales = None if self.scales is None else (self.scales[0, layer], self.scales[1, layer])
        return self.keys[layer], self.values[layer], scales

    def batch(self, seqs: Iterable[Sequence]) -> Batch:
        """These sequences as the cache that a model of `mlsys.models.transformer` takes."""
        return Batch(self, seqs)

    def _check_layer(self, layer: int) -> None:
        if whole("layer", layer, at_least=0) >= self.keys.shape[0]:
            raise ValueError(f"layer must be below {self.keys.shape[0]}, the number of layers, got {layer}")

    def _prepared(self, seqs: list[Sequence], tokens: int, *, to_write: bool = False) -> _Step:
        """For `tokens` more than are counted in each sequence; to write them, if room was just reserved."""
        version, block, device = self.pool.version, self.pool.block, self.keys.device
        tables = [self.pool.table(seq) for seq in seqs]
        lengths = np.array([seq.length + self._held(seq, tokens) for seq in seqs], np.int64)
        padded = np.full((len(seqs), max(map(len, tables), default=0)), -1)
        for row, table in zip(padded, tables, strict=True):
            row[: len(table)] = table
        rows = None
        if to_write:
            places = lengths[:, None] + np.arange(-tokens, 0)  # (b, t)
            blocks = torch.from_numpy(np.take_along_axis(padded, places // block, 1)).to(device)
            rows = self._rows(blocks[:, None]) * block + torch.from_numpy(places % block).to(device)[:, None]
            rows = rows.flatten()
        return _Step(version, seqs, tokens, Tables(padded, lengths, block, self.pool.blocks), rows)

    def _held(self, seq: Sequence, pending: int) -> int:
        if not 0 <= pending <= seq.reserved - seq.length:
            raise ValueError(f"pending must lie between 0 and {seq.reserved - seq.length}, got {pending}")
        return pending

    def _gather(self, layer: int, seqs: list[Sequence], pending: int) -> tuple[Tensor, Tensor]:
        """The same for sequences of equal length, (b, kv_heads, n, head_dim) each."""
        self._check_layer(layer)
        tables = [self.pool.table(seq) for seq in seqs]
        block, first = self.pool.block, seqs[0].dropped
        end = seqs[0].length + self._held(seqs[0], pending) - first * block
        count = -(-end // block)
        table = torch.tensor([row[first : first + count] for row in tables], dtype=torch.long, device=self.keys.device)
        rows = self._rows(table.unsqueeze(1))  # (b, kv_heads, count)

        k, v = (_copied(stored[layer], rows) for stored in (self.keys, self.values))
        if self.scales is not None:
            k, v = (
                dequantize(x, _copied(scales[layer], rows), self.dtype)
                for x, scales in zip((k, v), self.scales, strict=True)
            )
        return k[:, :, :end], v[:, :, :end]

    def _rows(self, blocks: Tensor) -> Tensor:
        """Where the heads of these blocks (b, 1, n) lie in (blocks·kv_heads, …): (b, kv_heads, n)."""
        heads = self.keys.shape[2]
        return blocks * heads + torch.arange(heads, device=blocks.device).unsqueeze(-1)


@dataclass(frozen=True, eq=False)
class _Step:
    """What all layers of a step share, worked out for the first of them: `tokens` more for each sequence.

    It holds until anything changes in the pool. Rows were made after `reserve`, so they may be written: a step that was
    only read has none, since its sequences may share the block that comes next.
    """

    version: int
    seqs: list[Sequence]
    tokens: int
    tables: Tables  # what is read
    rows: Tensor | None  # where each row of k.flatten(0, 2) is written

    def of(self, pool: Pool, seqs: list[Sequence], tokens: int) -> bool:
        """Whether this is what a layer asks for."""
        return self.version == pool.version and self.tokens == tokens and self.seqs == seqs


def _copied(stored: Tensor, rows: Tensor) -> Tensor:
    """Blocks of one layer, (blocks, kv_heads, block, …), in the order of `rows`: (b, kv_heads, n·block, …).

    One copy of pieces that lie together, block·head_dim numbers each, straight to where they belong: several times as
    fast on a CPU as selecting blocks and turning the heads to the front.
    """
    picked = stored.flatten(0, 1).index_select(0, rows.flatten())
    return picked.view(*rows.shape[:2], rows.shape[2] * stored.shape[2], *stored.shape[3:])


class Batch:
    """Sequences of a paged cache, of any lengths, as the cache that a model of `mlsys.models.transformer` takes.

    A model brings its own attention function. Where that is the library's, with any of its options, `attend` computes
    the same from the blocks where they lie; any other is given copies.

    reader: what reads the blocks: `paged.attention`, unless it is a faster one such as that of `paged_numba`.
    """

    def __init__(
        self, cache: PagedKVCache, seqs: Iterable[Sequence], reader: Callable[..., Tensor] | None = None
    ) -> None:
        self.cache = cache
        self.seqs = list(seqs)
        self.reader = reader
        if not self.seqs:
            raise ValueError("seqs must be at least one sequence, got none")
        self._told: list[list[int]] | None = None

    @property
    def layers(self) -> int:
        """Of the model that the cache is for."""
        return self.cache.keys.shape[0]

    @property
    def lengths(self) -> list[int]:
        """Tokens that each sequence holds."""
        return [seq.length for seq in self.seqs]

    @property
    def length(self) -> int:
        """Tokens that the longest sequence holds."""
        return max(self.lengths)

    def positions(self, tokens: int) -> Int[Tensor, "b t"]:
        """Where so many tokens more will stand in each sequence."""
        device = self.cache.keys.device
        return torch.tensor(self.lengths, device=device)[:, None] + torch.arange(tokens, device=device)

    def tell(self, tokens: Int[Tensor, "b t"]) -> Batch:
        """The ids of what is appended next, so that others can share it; returns the batch."""
        self._told = [ids("tokens", row) for row in tokens]
        return self

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "b h t d"],
        k: Float[Tensor, "b kv_heads t d"],
        v: Float[Tensor, "b kv_heads t d"],
        attention: Callable[..., Tensor],
    ) -> Float[Tensor, "b h t d"]:
        """Write t new positions of one layer; attention of q to these and all before them, in its own sequence.

        ValueError if the cache keeps a window and `attention` is not one of the library's with that window.
        """
        t, window, options = k.shape[2], self.cache.pool.window, _options_of(attention)
        if window is not None and (options is None or options.get("window", (-1,))[0] != window):
            raise ValueError(
                f"attention must have the cache's window, got {attention!r}: "
                f"give the model functools.partial(flash.attention, window=({window}, 0)), or the cache no window"
            )
        self.cache.append(layer, self.seqs, k, v)
        if options is not None:
            from mlsys.attention import paged  # which imports this module

            return (self.reader or paged.attention)(q, self.cache, layer, self.seqs, t, **options)
        rows = [self.cache.gather(layer, seq, t) for seq in self.seqs]
        return torch.cat([attention(q[i : i + 1], k[None], v[None], causal=True) for i, (k, v) in enumerate(rows)])

    def append(
        self, layer: int, k: Float[Tensor, "b kv_heads t d"], v: Float[Tensor, "b kv_heads t d"]
    ) -> tuple[Tensor, Tensor]:
        """Write t new positions of one layer; copies of all its keys and values, (b, kv_heads, length + t, head_dim).

        ValueError if the sequences have different lengths, which one tensor cannot hold.
        """
        lengths = sorted(set(self.lengths))
        if len(lengths) > 1:
            raise ValueError(f"seqs must have the same length, got {lengths}: use attend, which takes any")
        self.cache.append(layer, self.seqs, k, v)
        return self.cache._gather(layer, self.seqs, k.shape[2])

    def advance(self, tokens: int) -> None:
        """Count `tokens` more positions as seen, after every layer has appended them."""
        told, self._told = self._told, None
        fits = told is not None and all(len(row) == tokens for row in told)
        if told is not None and not fits:
            raise ValueError(f"tokens must be the {len(told[0])} that were told of, got {tokens}")
        self.cache.advance(self.seqs, tokens if told is None else told)

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""
        for seq in self.seqs:
            self.cache.pool.truncate(seq, length)


# What an attention function is told about how to compute, and what a cache knows by itself.
NOT_OF_THE_FORMULA = ("causal", "mask", "block_q", "block_k", "sweeps")


def _options_of(attention: Callable[..., Tensor]) -> dict[str, Any] | None:
    """With which options a function is the library's attention: {} for itself, None for another function.

    Known by where it is from, so that its fast versions are too, without importing what they need.
    """
    function, options = attention, dict[str, Any]()
    if isinstance(attention, partial) and not attention.args:
        function, options = attention.func, attention.keywords
    home, name = getattr(function, "__module__", ""), getattr(function, "__name__", "")
    if name != "attention" or not home.startswith(("mlsys.attention.naive", "mlsys.attention.flash")):
        return None
    if options.get("mask") is not None:  # it has the shape of one pass
        return None
    return {name: value for name, value in options.items() if name not in NOT_OF_THE_FORMULA}
