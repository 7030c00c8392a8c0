"""MHA, GQA, MQA: what do shared keys and values save, in bytes a token and in the time of a decode step?

One query for each sequence attends to all that is cached: every key and value is read once and used for as many query
heads as share it. So bytes, not FLOPs, should decide, and a cache of an eighth should take an eighth of the time.
What to look at: the share of the bandwidth. It is the test of that sentence, for a call that gets the bytes moved is
near 100% whatever the number of heads (above it where a small cache stays in the processor's own). And whether an
implementation reads a shared head once: `naive` copies it for each query head first, so it gains nothing.

Reference: `naive`. Ours: `decode` of `paged` and `paged_numba`, from blocks. "folded" is the trick that they need too:
the query heads of a group are the rows of one matrix product. Peer: `scaled_dot_product_attention` with `enable_gqa`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mlsys.attention import naive, paged
from mlsys.bench import Benchmark, Impl, Plot, Record, Work
from mlsys.perf.configs import MODELS, Config
from mlsys.perf.inference import kv_cache_bytes_per_token

Case = Mapping[str, Any]
HEADS, HEAD_DIM, BATCH, BLOCK = 32, 64, 4, 16
ALLOWED = {"float32": 1e-4, "bfloat16": 4e-2}  # relative to the largest value
NAMES = {HEADS: "MHA", HEADS // 4: "GQA", 1: "MQA"}


def case(kv_heads: int, context: int, dtype: str) -> Case:
    return {"heads": NAMES[kv_heads], "kv_heads": kv_heads, "context": context, "dtype": dtype}


@dataclass(frozen=True)
class Inputs:
    """A query for each sequence, (batch, heads, 1, head_dim), keys and values in one piece, and the same in blocks."""

    q: Tensor
    k: Tensor  # (batch, kv_heads, context, head_dim)
    v: Tensor
    key_blocks: Tensor  # (blocks, kv_heads, block, head_dim)
    value_blocks: Tensor
    tables: Tensor  # (batch, blocks of a sequence), int32
    lengths: Tensor


def inputs(case: Case, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(case["context"])
    dtype, n = getattr(torch, case["dtype"]), case["context"]

    def draw(heads: int, length: int) -> Tensor:
        shape = (BATCH, heads, length, HEAD_DIM)
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    q, k, v = draw(HEADS, 1), draw(case["kv_heads"], n), draw(case["kv_heads"], n)
    blocks = BATCH * n // BLOCK
    order = torch.randperm(blocks, generator=generator, device=device)  # as after some hours of serving

    def cut(x: Tensor) -> Tensor:
        pieces = x.unflatten(2, (-1, BLOCK)).transpose(1, 2).flatten(0, 1)
        scattered = torch.empty_like(pieces)
        scattered[order] = pieces
        return scattered

    lengths = torch.full((BATCH,), n, dtype=torch.int32, device=device)
    return Inputs(q, k, v, cut(k), cut(v), order.view(BATCH, -1).int(), lengths)


def work(case: Case, given: Inputs) -> Work:
    flops = 4 * BATCH * HEADS * case["context"] * HEAD_DIM
    return Work(flops, given.k.nbytes + given.v.nbytes + 2 * given.q.nbytes, items=BATCH, unit="tokens")


# --- who does it ------------------------------------------------------------------------------------------------------


def copied(given: Inputs) -> Tensor:
    return naive.attention(given.q, given.k, given.v)


def folded(given: Inputs) -> Tensor:
    """Two matrix products a sequence and key head, with its query heads as rows."""
    q = given.q.view(BATCH, given.k.shape[1], -1, HEAD_DIM)  # (b, kv_heads, group, d)
    scores = (q * HEAD_DIM**-0.5) @ given.k.mT
    return (scores.softmax(-1) @ given.v).view_as(given.q)


def from_blocks(decode: Callable[..., Tensor]) -> Callable[[Inputs], Tensor]:
    """Where the keys and values lie in blocks."""

    def call(given: Inputs) -> Tensor:
        blocks = given.key_blocks, given.value_blocks, given.tables, given.lengths
        return decode(given.q[:, :, 0], *blocks).unsqueeze(2)

    return call


def numba() -> Callable[[Inputs], Tensor]:
    from mlsys.attention import paged_numba

    return from_blocks(paged_numba.decode)


def sdpa(given: Inputs) -> Tensor:
    shared = given.k.shape[1] < HEADS
    return F.scaled_dot_product_attention(given.q, given.k, given.v, enable_gqa=shared)


def verify(case: Case, given: Inputs, got: Tensor, want: Tensor) -> tuple[float, float]:
    """Relative to the largest value."""
    return float((got.double() - want.double()).abs().max() / want.double().abs().max()), ALLOWED[case["dtype"]]


def figures(case: Case, given: Inputs, got: Tensor) -> dict[str, float]:
    """Keys and values of a token in this layer."""
    return {"KV bytes a token": (given.k.nbytes + given.v.nbytes) / (BATCH * case["context"])}


# --- the picture ------------------------------------------------------------------------------------------------------


def variants(config: Config) -> dict[str, float]:
    """KiB a token in 16 bits, had this model been built with as many key and value heads as query heads, 8, or one."""
    return {
        name: kv_cache_bytes_per_token(replace(config, kv_heads=kv_heads)) / 1024
        for name, kv_heads in (("MHA", config.heads), ("GQA, 8 heads", 8), ("MQA", 1))
    }


def picture(records: Sequence[Record]) -> str | None:
    """Left the bytes that a token takes in published models, right the time of a decode step of this benchmark."""
    from mlsys.bench.plots import COLOURS, HATCHES, LINES, MARKERS, new_figure, to_svg

    timed = [r for r in records if r.seconds is not None and r.case["dtype"] == "bfloat16"]
    fastest = next((impl for impl in ("paged numba", "paged") if any(r.impl == impl for r in timed)), None)
    shown = [r for r in timed if r.impl == fastest]
    if not shown:
        return None
    figure, (left, right) = new_figure(2, width=5.0)
    models = ("llama-2-7b", "llama-3-8b", "llama-2-70b")
    for row, model in enumerate(models):
        config = MODELS[model]
        for number, (name, size) in enumerate(variants(config).items()):
            y = row + 0.27 * (number - 1)
            built = config.kv_heads == {"MHA": config.heads, "GQA, 8 heads": 8, "MQA": 1}[name]
            left.barh(
                y, size, 0.25, color=COLOURS[number], hatch=HATCHES[number], alpha=0.75, edgecolor="white",
                label=name if row == 0 else None,
            )  # fmt: skip
            left.text(size, y, f" {size:g}" + (" ◂ as built" if built else ""), va="center", fontsize=8)
    left.set_yticks(range(len(models)), models)
    left.invert_yaxis()
    left.set_xscale("log")
    left.set_xlim(1, 1e5)  # with room for the labels and the key
    left.set(title="keys and values of a token", xlabel="KV cache, KiB a token (16 bits)")
    left.legend(frameon=False, fontsize=8, loc="upper right")
    for number, name in enumerate(NAMES.values()):
        points = sorted((r.case["context"], 1e3 * (r.seconds or 0)) for r in shown if r.case["heads"] == name)
        if points:
            kv_heads = next(kv for kv, known in NAMES.items() if known == name)
            label = f"{name}, {kv_heads} of {HEADS}"
            look: dict[str, Any] = {"color": COLOURS[number], "marker": MARKERS[number], "linestyle": LINES[number]}
            right.plot(*zip(*points, strict=True), **look, label=label)
    contexts = sorted({r.case["context"] for r in shown})
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xticks(contexts, [str(n) for n in contexts])
    right.set(
        title=f"a layer, {fastest}, bfloat16",
        xlabel=f"cached tokens of each of {BATCH} sequences",
        ylabel="time per step (ms)",
    )
    right.grid(True, alpha=0.3)
    right.legend(frameon=False, fontsize=8)
    return to_svg(figure)


def cases(contexts: Sequence[int], dtypes: Sequence[str]) -> list[Case]:
    return [case(kv_heads, n, dtype) for dtype in dtypes for kv_heads in NAMES for n in contexts]


BOTH = ("float32", "bfloat16")
bench = Benchmark(
    __file__,
    cases={
        "quick": cases((512, 2048), ("bfloat16",)),
        "default": cases((512, 2048, 8192), BOTH),
        "full": cases((512, 1024, 2048, 4096, 8192, 16384), BOTH),
    },
    inputs=inputs,
    work=work,
    impls={
        "naive": Impl(lambda: copied, "reference"),
        "paged": Impl(lambda: from_blocks(paged.decode), "ours"),
        "paged numba": Impl(numba, "ours", needs="numba"),
        "folded": Impl(lambda: folded, "variant"),
        "torch sdpa": Impl(lambda: sdpa, "peer"),
    },
    subject="paged",
    prepare=lambda function, case, given: lambda: function(given),
    verify=verify,
    figures=figures,
    memory=True,
    plots=(
        Plot(
            x="context",
            xlabel=f"cached tokens of each of {BATCH} sequences",
            panel=("heads",),
            only=lambda case: case["dtype"] == "bfloat16",
        ),
    ),
    pictures={"kv_bytes": picture},
)

if __name__ == "__main__":
    bench.main()
