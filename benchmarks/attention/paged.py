"""Paged attention: what does it cost to read keys through a block table, and what does sharing a prefix save?

What to look at, by what is done:

- **decode**: one query a sequence. The reference and torch's kernel read contiguous keys. "numba" follows the table
  and multiplies what it finds; "torch" copies blocks together first, for a matrix product. The variants show why
  it is done so: "heads last" keeps blocks as (block, kv_heads, head_dim), where the rows of a head lie apart;
  "block by block" is the paper's loop over blocks with an online softmax, one call of torch a step.
- **ragged**: sequences of different lengths. Contiguous keys are padded to the longest, and read with the padding.
- **int8**: a quantized cache. Whoever copies has to widen; who follows the table reads half of bfloat16's bytes.
- **prefix**: sequences that begin with the same blocks. "shared" reads them once for all; the reference, as a cache
  without sharing, for each.
- **split**: one long sequence in four parts that are merged, on one thread: what that costs where it cannot help.
- **prefill**: the last 256 tokens of a prompt whose beginning is cached.

On a GPU (`--device cuda`), "triton" is the kernel that follows the table, with its checks, for which the tables go to
the CPU and back; "triton, a step" is the same kernel without a look at them. The reference, compiled by torch, is a
peer there as well.

Reference: two matrix products and a softmax on contiguous keys, grouped heads as rows of one product.
Peer: `torch.nn.functional.scaled_dot_product_attention` on the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial, wraps
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mlsys.attention import paged, paged_numba
from mlsys.attention._kv_quant import FORMATS, dequantize, quantize
from mlsys.attention.kv_cache import BLOCK
from mlsys.bench import Benchmark, Impl, Plot, Work

Case = Mapping[str, Any]
HEAD_DIM = 64
# relative to the largest value: some hundred roundings of float32, five of bfloat16
ALLOWED = {"float32": 1e-4, "bfloat16": 4e-2}


def case(
    what: str,
    batch: int,
    heads: int,
    kv_heads: int,
    n: int,
    dtype: str,
    *,
    block: int = BLOCK,
    prefix: int = 0,
    t: int = 1,
    **more: int,
) -> Case:
    return {
        "what": what, "batch": batch, "heads": heads, "kv_heads": kv_heads, "n": n, "dtype": dtype, "block": block,
        "prefix": prefix, "t": t, **more,
    }  # fmt: skip


def on_gpu(case: Case) -> bool:
    return "head_dim" in case


@dataclass(frozen=True)
class Given:
    """The same keys and values in blocks and contiguous, (batch, kv_heads, longest, d); int8 also widened."""

    case: Case
    q: Tensor  # (batch, heads, t, d)
    stored: tuple[Tensor, Tensor]  # (blocks, kv_heads, block, d)
    scales: tuple[Tensor, Tensor] | None
    tables: Tensor
    lengths: Tensor
    k: Tensor
    v: Tensor
    hidden: Tensor | None  # (batch, longest) True in the padding

    @cached_property
    def heads_last(self) -> tuple[Tensor, Tensor]:
        """(blocks, block, kv_heads, d)."""
        keys, values = (x.transpose(1, 2).contiguous() for x in self.stored)
        return keys, values


def inputs(case: Case, device: str) -> Given:
    generator = torch.Generator(device).manual_seed(case["n"] + case["batch"])
    batch, block, n, dtype = case["batch"], case["block"], case["n"], getattr(torch, case["dtype"])
    lengths = torch.full((batch,), n, dtype=torch.int32)
    if case["what"] == "ragged":
        lengths = torch.linspace(n // 8, n, batch).int()[
            torch.randperm(batch, generator=torch.Generator().manual_seed(0))
        ]
    common, width = case["prefix"] // block, -(-n // block)
    blocks = common + batch * (width - common)
    numbers = torch.randperm(blocks, generator=generator, device=device).int()
    tables = numbers[common:].view(batch, width - common)
    tables = torch.cat([numbers[:common].expand(batch, -1), tables], 1)
    head_dim = case.get("head_dim", HEAD_DIM)
    shape = blocks, case["kv_heads"], block, head_dim
    keys, values = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in "kv")
    k, v = (x[tables.long()].transpose(1, 2).reshape(batch, -1, width * block, head_dim) for x in (keys, values))
    q = torch.randn(batch, case["heads"], case["t"], head_dim, generator=generator, device=device).to(dtype)
    scales = None
    if case["what"] == "int8":
        (keys, key_scales), (values, value_scales) = (quantize(x, FORMATS["int8"]) for x in (keys, values))
        scales = key_scales, value_scales
        k, v = (
            dequantize(x, s, dtype)[tables.long()].transpose(1, 2).reshape(k.shape)
            for x, s in ((keys, key_scales), (values, value_scales))
        )
    hidden = (torch.arange(n) >= lengths[:, None]).to(device) if case["what"] == "ragged" else None
    return Given(
        case, q, (keys, values), scales, tables.to(device), lengths.to(device),
        k[:, :, :n].contiguous(), v[:, :, :n].contiguous(), hidden,
    )  # fmt: skip


def work(case: Case, given: Given) -> Work:
    # Each visible pair of query and key, and each key and value once; a common prefix need not be read again.
    total, batch, t = int(given.lengths.sum()), case["batch"], case["t"]
    pairs = total * t - batch * t * (t - 1) // 2
    read = total - (batch - 1) * case["prefix"]
    each, head_dim = given.stored[0].element_size(), given.q.shape[3]
    moved = 2 * case["kv_heads"] * head_dim * read * each + 2 * given.q.nbytes
    return Work(
        flops=4 * case["heads"] * head_dim * pairs,
        bytes=moved,
        items=moved if on_gpu(case) else batch * t,
        unit="B" if on_gpu(case) else "queries",
    )


# --- on contiguous keys -----------------------------------------------------------------------------------------------


def two_matmuls(given: Given) -> Tensor:
    """The query heads of a group are rows of one product."""
    b, h, t, d = given.q.shape
    q = given.q.view(b, given.k.shape[1], -1, d)  # (b, kv_heads, group · t, d)
    scores = q @ given.k.mT * d**-0.5
    if given.hidden is not None:
        scores = scores.masked_fill(given.hidden[:, None, None], -math.inf)
    if t > 1:
        n = given.k.shape[2]
        ahead = torch.ones(t, n, dtype=torch.bool, device=q.device).triu(n - t + 1)
        scores = scores.unflatten(2, (-1, t)).masked_fill(ahead, -math.inf).flatten(2, 3)
    return (torch.softmax(scores, -1) @ given.v).view(b, h, t, d)


def sdpa(given: Given) -> Tensor:
    t, n = given.case["t"], given.k.shape[2]
    mask = None if given.hidden is None else ~given.hidden[:, None, None]
    if t > 1:  # torch's is_causal is aligned to the top left
        mask = torch.ones(t, n, dtype=torch.bool, device=given.q.device).tril(n - t)
    grouped = given.case["heads"] != given.case["kv_heads"]
    return F.scaled_dot_product_attention(given.q, given.k, given.v, attn_mask=mask, enable_gqa=grouped)


def by_inductor() -> Callable[..., Tensor]:
    """`two_matmuls`, compiled for the very case: after some recompilations torch would go on without."""
    torch.compiler.reset()
    compiled = torch.compile(two_matmuls, fullgraph=True, dynamic=False)
    return wraps(two_matmuls)(lambda given: compiled(given))


# --- on blocks --------------------------------------------------------------------------------------------------------


def heads_last(given: Given) -> Tensor:
    """Blocks of (block, kv_heads, d), copied together; the rows of a head are then kv_heads · d numbers apart."""
    b, h, _, d = given.q.shape
    k, v = (
        x.flatten(1).index_select(0, given.tables.flatten()).view(b, -1, *x.shape[2:]).transpose(1, 2)
        for x in given.heads_last
    )
    q = given.q.view(b, k.shape[1], -1, d)
    return (torch.softmax(q @ k.mT * d**-0.5, -1) @ v).view(b, h, 1, d)


def block_by_block(given: Given) -> Tensor:
    """An online softmax over the blocks, where they lie: some calls for each of them."""
    keys, values = given.stored
    b, h, _, d = given.q.shape
    q = (given.q * d**-0.5).view(b, keys.shape[1], -1, d)
    outs = []
    for one, row in zip(q, given.tables.tolist(), strict=True):
        m = one.new_full((*one.shape[:2], 1), -math.inf, dtype=torch.float32)
        z, acc = torch.zeros_like(m), torch.zeros(one.shape, device=one.device)
        for number in row:
            scores = (one @ keys[number].mT).float()
            new = torch.maximum(m, scores.amax(-1, keepdim=True))
            p, rescale = torch.exp(scores - new), torch.exp(m - new)
            z = z * rescale + p.sum(-1, keepdim=True)
            acc = acc * rescale + p.to(one.dtype) @ values[number]
            m = new
        outs.append((acc / z).to(one.dtype).view(h, 1, d))
    return torch.stack(outs)


OTHERS = (two_matmuls, sdpa, heads_last, block_by_block)


def triton(door: str) -> Callable[..., Tensor]:
    from mlsys.attention import paged_triton

    function: Callable[..., Tensor] = getattr(paged_triton, door)
    return function


def each_for_itself(*args: Any, **options: Any) -> Tensor:
    return paged_numba.decode(*args, **{**options, "share_prefixes": False})


def prepare(function: Callable[..., Any], case: Case, given: Given) -> Callable[[], Tensor]:
    if unwrap(function) in OTHERS:
        return torch.no_grad()(lambda: function(given))
    stored = (*given.stored, given.tables, given.lengths)
    if case["what"] == "prefill":
        b, h, t, d = given.q.shape
        packed = given.q.transpose(1, 2).reshape(b * t, h, d)
        ends = torch.arange(0, b * t + 1, t, dtype=torch.int32)
        return lambda: paged.prefill(packed, ends, *stored).view(b, t, h, d).transpose(1, 2)
    options: dict[str, Any] = {} if given.scales is None else {"scales": given.scales}
    if case["what"] == "prefix":
        options["share_prefixes"] = True
    if case["what"] == "split":
        options["splits"] = 4
    q = given.q[:, :, 0]
    return torch.no_grad()(lambda: function(q, *stored, **options)[:, :, None])


def verify(case: Case, given: Given, got: Tensor, want: Tensor) -> tuple[float, float]:
    """Relative to the largest value."""
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item(), ALLOWED[case["dtype"]]


def only(*what: str) -> Callable[[Case], bool]:
    return lambda case: case["what"] in what and not on_gpu(case)


SHAPES = ((1, 8, 8, 2048), (8, 8, 8, 1024), (8, 32, 8, 1024), (32, 8, 2, 512))
DTYPES = ("bfloat16", "float32")
OTHER_CASES = [
    case("ragged", 16, 8, 8, 1024, "float32"),
    case("ragged", 16, 8, 8, 1024, "bfloat16"),
    case("int8", 8, 8, 8, 1024, "bfloat16"),
    case("split", 1, 8, 8, 4096, "float32"),
    *(case("prefix", batch, 8, 8, 1088, "float32", prefix=1024) for batch in (2, 8, 32)),
    case("prefill", 2, 8, 8, 1024, "float32", t=256),
]
ON_GPU = [
    *(
        case("decode", batch, 32, 8, n, "bfloat16", block=block, head_dim=128)
        for batch, n in ((1, 32768), (8, 8192), (64, 4096))
        for block in (16, 256)
    ),
    case("decode", 8, 32, 32, 8192, "bfloat16", head_dim=128),
    case("ragged", 64, 32, 8, 4096, "bfloat16", head_dim=128),
    case("int8", 8, 32, 8, 8192, "bfloat16", head_dim=128),
]
bench = Benchmark(
    __file__,
    cases={
        "quick": [
            case("decode", 8, 8, 8, 1024, "bfloat16"),
            case("decode", 8, 32, 8, 1024, "bfloat16"),
            case("decode", 8, 8, 8, 1024, "float32"),
            case("ragged", 16, 8, 8, 1024, "float32"),
            case("int8", 8, 8, 8, 1024, "bfloat16"),
            case("prefix", 32, 8, 8, 1088, "float32", prefix=1024),
            case("prefill", 2, 8, 8, 1024, "float32", t=256),
            *ON_GPU[::2],
        ],
        "default": [
            *(
                case("decode", *shape, dtype, block=block)
                for dtype in DTYPES
                for shape in SHAPES
                for block in (16, BLOCK, 256)
            ),
            *OTHER_CASES,
            *ON_GPU,
        ],
        "full": [
            *(
                case("decode", *shape, dtype, block=block)
                for dtype in DTYPES
                for shape in SHAPES
                for block in (8, 16, BLOCK, 256)
            ),
            *OTHER_CASES,
            *(case("prefix", 32, 8, 8, prefix + 64, "bfloat16", prefix=prefix) for prefix in (128, 512, 2048)),
            *ON_GPU,
        ],
    },
    inputs=inputs,
    work=work,
    impls={
        "two matmuls": Impl(lambda: two_matmuls, "reference"),
        "numba": Impl(lambda: paged_numba.decode, "ours", only=only("decode", "ragged", "int8", "split", "prefix")),
        "torch": Impl(lambda: paged.decode, "ours"),
        "heads last": Impl(lambda: heads_last, "variant", only=only("decode")),
        "block by block": Impl(
            lambda: block_by_block,
            "variant",
            only=lambda case: only("decode")(case) and case["batch"] * case["n"] // case["block"] <= 512,
        ),
        "triton": Impl(partial(triton, "decode"), "ours", needs="triton", only=on_gpu),
        "triton, a step": Impl(partial(triton, "step"), "ours", needs="triton", only=on_gpu),
        "numba, not shared": Impl(lambda: each_for_itself, "variant", only=only("prefix")),
        "torch sdpa": Impl(lambda: sdpa, "peer"),
        "torch.compile": Impl(by_inductor, "peer", only=on_gpu),
    },
    subject="numba",
    prepare=prepare,
    verify=verify,
    yours=only("decode", "ragged"),
    contract="attention.paged",
    fits=lambda case, device: on_gpu(case) == (device == "cuda"),
    plots=(
        Plot(
            x="block",
            xlabel="tokens a block",
            panel=("dtype", "heads"),
            only=lambda case: only("decode")(case) and case["batch"] == 8,
        ),
        Plot(
            x="batch",
            xlabel="sequences that share 1,024 tokens of 1,088",
            panel=("dtype",),
            only=lambda case: case["what"] == "prefix" and case["prefix"] == 1024,
        ),
        Plot(
            xlabel="one query of each sequence",
            panel=("what", "batch", "kv_heads", "n"),
            y="throughput",
            only=lambda case: on_gpu(case) and case["block"] == 16,
        ),
    ),
)

if __name__ == "__main__":
    bench.main()
