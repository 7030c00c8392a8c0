"""Paged attention as a Triton kernel: a decode step reads the blocks where they lie, in parts that fill the GPU.

For one query a sequence there is nothing to do but to read: its keys and values, once, at the speed of the memory. A
program takes the query heads that share a key/value head (a group is the rows of one product, so its keys are read
once) and walks along one part of the sequence's tokens. Which block a token is in, it asks the table:

    tokens      j … j + BLOCK_N − 1        blocks may be of any size, a tile may begin and end within one
    table       ─────┬───────┬───────┬──   page[j // B]
                  17 │   4   │  122  │
    cache       [ 0 ] … [ 4 ] … [ 17 ] … [ 122 ] …     row ((page · kv_heads + head) · B + j mod B), d numbers in a row

    S = scale · q K[rows]ᵀ      online softmax as in `flash_triton`      A += P V[rows]

The idea of this kernel: parts. A batch of few sequences has too few heads to fill a GPU, and one long sequence would
keep one processor busy and leave 131 idle. So each is cut into `splits` parts, which have nothing to do with each
other, and a second kernel merges their averages by their log-sum-exps (`merge`):

    programs    (item, head, part 0)  (item, head, part 1)  …      O₀, L₀   O₁, L₁   …
    merge       O = Σ exp(Lₚ − L) Oₚ,   L = log Σ exp Lₚ

Places that hold no token of the sequence are not loaded: NaN in them stays there. Codes of 8 bits (int8, or e4m3 by
its bits) are widened to the queries' 16 bits in registers, which is exact; their scales multiply scores and weights.

There are two doors. `decode` is `paged.decode`, with its checks: for these the tables go to the CPU and back, once a
call. (`attention`, on a cache, does that once a step for all layers.) `step` looks at nothing that is on the GPU: no
waiting, nothing copied, and a CUDA graph may hold it. A table entry that is no block gives NaN there, and is never
followed.

Cost:
    2·h·n·(d + dv) FLOPs a query, on rows padded to 16. Each number in a visible block is read once. With splits, a
    second launch.

Memory:
    splits · seqs · heads · (dv + 1) float32, where there is more than one part.

Where it loses: prompts (`prefill` is `paged`'s, with its copy), and prefixes that many share, whose queries would be
rows of one product: `share_prefixes` is done by `paged`'s torch code.

Papers:
    Kwon et al. 2023, arXiv:2309.06180, section 5.1 (kernels that read through the block table).
    Dao et al. 2023, "Flash-Decoding for long-context inference" (one row in parts, and the merge).

See also:
    `mlsys.attention.paged` (the readable version), `mlsys.attention.merge` (parts of a row),
    `mlsys.attention.flash_triton` (the online softmax with tiles of queries).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor

from mlsys.attention import kv_cache, paged
from mlsys.attention._paged_inputs import Parts, Queries, Stored, check_how, check_stored
from mlsys.attention._paged_items import Items
from mlsys.attention._paged_triton_kernels import MERGE, attend, configs, merge, sizes, specimens
from mlsys.attention._pages import whole
from mlsys.attention.kv_cache import PagedKVCache
from mlsys.attention.paged import prefill, tokens_read
from mlsys.kernels._triton import Config, at, next_power_of_2, on_device
from mlsys.kernels._triton_tune import size, tuned

__all__ = ["attention", "decode", "prefill", "specimens", "step", "tokens_read", "typical"]

LARGEST = 256  # numbers of a head
MOST_PARTS, SHORTEST_PART = 128, 256  # parts of a sequence, and tokens that a part should have
EACH = 4  # programs for each processor of the GPU: some wait for memory while others work
Scales = tuple[Tensor, Tensor]


def decode(
    q: Float[Tensor, "seqs h d"],
    keys: Tensor,
    values: Tensor,
    tables: Int[Tensor, "seqs max_blocks"],
    lengths: Int[Tensor, " seqs"],
    *,
    splits: int | None = None,
    config: Config | None = None,
    **options: Any,
) -> Any:
    """`paged.decode`: arguments, results and errors, in float32, bfloat16 or float16.

    `splits` None is as many parts as fill the GPU. `config` forces the kernel's tiles, else the fastest found here.
    """
    _check(q)
    reader = partial(compiled, splits=splits, config=config)
    return paged.decode(q, keys, values, tables, lengths, **{"reader": reader, **options})


def attention(
    q: Float[Tensor, "b h t d"],
    cache: PagedKVCache,
    layer: int,
    seqs: Iterable[kv_cache.Sequence],
    pending: int = 0,
    *,
    splits: int | None = None,
    config: Config | None = None,
    **options: Any,
) -> Any:
    """`paged.attention`: arguments, results and errors; by the kernel for one query a sequence."""
    _check(q)
    reader = partial(compiled, splits=splits, config=config)
    return paged.attention(q, cache, layer, seqs, pending, **{"reader": reader, **options})


def step(
    q: Float[Tensor, "seqs h d"],
    keys: Tensor,
    values: Tensor,
    tables: Int[Tensor, "seqs max_blocks"],
    lengths: Int[Tensor, " seqs"],
    *,
    window: tuple[int, int] = (-1, -1),
    alibi: Float[Tensor, " h"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    scales: Scales | None = None,
    splits: int | None = None,
    return_lse: bool = False,
    config: Config | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`decode` without a look at what tables and lengths hold: nothing waits for the GPU; it may be in a CUDA graph.

    A table entry that is no block, of a token that is seen, makes the sequence's result NaN, as does a length beyond
    its table. `splits` None is for sequences as long as the tables are wide. No sinks: those are `decode`'s.
    RuntimeError under a gradient, as there.
    """
    _check(q)
    whole("splits", 1 if splits is None else splits)
    stored = Stored(keys, values, scales)
    how = check_how(q, window, alibi, softcap, None, scale)
    check_stored(q, stored)
    for name, x, shape in (("tables", tables, (q.shape[0], -1)), ("lengths", lengths, (q.shape[0],))):
        if x.dtype not in (torch.int32, torch.int64) or x.ndim != len(shape) or x.shape[0] != shape[0]:
            raise ValueError(
                f"{name} must be int32 or int64, with a row for each of {q.shape[0]} sequences, "
                f"got {x.dtype} {tuple(x.shape)}"
            )
    on_device("mlsys.attention.paged", q=q, keys=keys, values=values, tables=tables, lengths=lengths)
    kv_heads = keys.shape[1]
    slopes = None if how.alibi is None else how.alibi.float()
    out, lse = _attend(
        q.unflatten(1, (kv_heads, -1)), stored, tables, None, lengths, None, slopes, how.left, how.scale, how.softcap,
        splits, config,
    )  # fmt: skip
    out = out.flatten(1, 2).to(q.dtype)
    return (out, lse.flatten(1, 2)) if return_lse else out


def compiled(
    queries: Queries, stored: Stored, items: Items, *, splits: int | None = None, config: Config | None = None
) -> Parts:
    """Attention of each item's queries to its blocks where they lie: a reader, as `paged` asks for one."""
    q = queries.rows
    on_device("mlsys.attention.paged", q=q, keys=stored.keys, values=stored.values)
    whole("splits", 1 if splits is None else splits)

    def there(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(q.device)

    positions = slopes = None
    if queries.slopes is not None:
        slopes = queries.slopes.float().contiguous()
        positions = there(np.broadcast_to(queries.position, q.shape[:1] + q.shape[2:3]))
    return _attend(
        q, stored, there(items.table), there(items.start), there(items.stop), positions, slopes, -1, queries.scale,
        queries.softcap, splits, config,
    )  # fmt: skip


def _check(q: Tensor) -> None:
    if not isinstance(q, Tensor):
        raise TypeError(f"q must be a torch.Tensor, got {type(q).__name__}")
    if q.dtype == torch.float64:
        raise TypeError(
            "q must be float32, bfloat16 or float16 for the Triton kernel, got float64: use mlsys.attention.paged"
        )
    if q.ndim and q.shape[-1] > LARGEST:
        raise ValueError(
            f"q must have head_dim at most {LARGEST} for the Triton kernel, got {q.shape[-1]}: "
            "use mlsys.attention.paged"
        )


def _attend(
    q: Tensor,
    stored: Stored,
    table: Tensor,
    starts: Tensor | None,
    stops: Tensor,
    positions: Tensor | None,
    slopes: Tensor | None,
    left: int,
    unit: float,
    softcap: float | None,
    splits: int | None,
    forced: Config | None,
) -> Parts:
    """Queries (items, kv_heads, rows, d): out (items, kv_heads, rows, dv) and lse, float32."""
    items, kv_heads, rows, d = q.shape
    keys, values, scales = stored
    page, dv, longest = keys.shape[2], values.shape[3], table.shape[1] * keys.shape[2]
    table = table if table.shape[1] == 0 or table.stride(1) == 1 else table.contiguous()
    parts = _parts(items * kv_heads, longest, q.device) if splits is None else splits
    out = q.new_empty(items, kv_heads, rows, dv, dtype=torch.float32)
    lse = q.new_empty(items, kv_heads, rows, dtype=torch.float32)
    outs, lses = (out, lse) if parts == 1 else (x.new_empty(parts, *x.shape) for x in (out, lse))
    if not out.numel():
        return out, lse
    fp8 = keys.dtype == torch.float8_e4m3fn
    key_scales, value_scales = (None, None) if scales is None else (x.contiguous() for x in scales)
    if fp8:
        keys, values = keys.view(torch.uint8), values.view(torch.uint8)

    def launch(one: Config) -> None:
        attend[(items * kv_heads * parts,)](
            q, keys, values, key_scales, value_scales, table, starts, stops, positions, slopes, outs, lses,
            *q.stride(), table.stride(0), table.shape[1], keys.shape[0], kv_heads, rows, parts,
            out.numel(), lse.numel(), longest if left < 0 else left, unit, softcap or 1.0,
            CAPPED=softcap is not None, FP8=fp8, **sizes(d, dv, page, rows), **one.options(),
        )  # fmt: skip

    key = f"{q.dtype} {keys.dtype} d={d} dv={dv} rows{size(rows)} page={page} tokens{size(longest // parts)}"
    with at(q.device):
        launch(tuned("paged.attend", key, configs(q.dtype, max(d, dv)), launch, q.device, forced))
        if parts > 1:
            merge[(lse.numel(),)](
                outs, lses, out, lse, parts, out.numel(), lse.numel(), DV=dv, BLOCK_DV=next_power_of_2(dv),
                BLOCK_P=next_power_of_2(parts), **MERGE.options(),
            )  # fmt: skip
    return out, lse


def _parts(programs: int, longest: int, device: torch.device) -> int:
    """How many parts keep all processors of the GPU busy, and are long enough to be worth their merge."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = triton.cdiv(EACH * processors, max(programs, 1))
    return max(1, min(wanted, longest // SHORTEST_PART, MOST_PARTS))


def typical(
    device: torch.device, dtype: torch.dtype, shape: Sequence[int] | None
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Steps to tune for: sequences × heads × kv_heads × tokens × head_dim, or usual ones. For `mlsys tune`."""
    if shape is not None and len(shape) != 5:
        raise ValueError("it must be sequences, heads, kv_heads, tokens and head_dim, such as 8x32x8x8192x128")
    for one in [shape] if shape else ((1, 32, 8, 32768, 128), (8, 32, 8, 8192, 128), (64, 32, 8, 4096, 128)):
        seqs, heads, kv_heads, tokens, d = one
        width = triton.cdiv(tokens, 16)
        q = torch.randn(seqs, heads, d, dtype=dtype, device=device)
        keys, values = (torch.randn(seqs * width, kv_heads, 16, d, dtype=dtype, device=device) for _ in "kv")
        tables = torch.arange(seqs * width, dtype=torch.int32, device=device).view(seqs, width)
        lengths = torch.full((seqs,), tokens, dtype=torch.int32, device=device)
        yield " × ".join(map(str, one)), partial(step, q, keys, values, tables, lengths)
