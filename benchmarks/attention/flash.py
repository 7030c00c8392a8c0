"""Exact attention: what does it buy never to hold the n × n scores, and how near is that to torch's own kernel?

What to look at: naive's memory grows with n², flash's with n; the time only
follows once the scores no longer fit in cache. In bfloat16 torch's CPU kernel
converts more than it multiplies, and two large matmuls a tile beat it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mlsys.attention import flash, flash_numba, naive, variants
from mlsys.bench import Benchmark, Impl, Plot, Work
from mlsys.bench.records import Record

Case = Mapping[str, Any]
HEADS, HEAD_DIM = 8, 64
ALLOWED = {
    "float32": 1e-4,
    "bfloat16": 4e-2,
}  # relative to the largest value: some hundred roundings of float32, five of bfloat16


def case(n: int, dtype: str, *, causal: bool, backward: bool = False) -> Case:
    heads = HEADS if n <= 4096 else 2  # the largest size with two heads, or naive's scores fill the machine
    return {"n": n, "heads": heads, "dtype": dtype, "causal": causal, "backward": backward}


def inputs(case: Case, device: str) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(case["n"])
    shape = (1, case["heads"], case["n"], HEAD_DIM)
    dtype = getattr(torch, case["dtype"])
    return [
        torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_(case["backward"])
        for _ in range(3)
    ]


def work(case: Case, qkv: list[Tensor]) -> Work:
    # The field's convention: 4·n²·d FLOPs a head, half of it when causal; a backward pass is 2.5 forwards.
    n, heads = case["n"], case["heads"]
    flops = 4 * heads * n * n * HEAD_DIM * (0.5 if case["causal"] else 1.0) * (3.5 if case["backward"] else 1.0)
    tensors = 4 if not case["backward"] else 11  # q k v o; then q k v o dO read again, dq dk dv written, lse aside
    return Work(flops=flops, bytes=tensors * qkv[0].numel() * qkv[0].element_size())


def prepare(function: Callable[..., Tensor], case: Case, qkv: list[Tensor]) -> Callable[[], list[Tensor]]:
    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [function(*qkv, causal=case["causal"])]

    def forward_backward() -> list[Tensor]:
        out = function(*qkv, causal=case["causal"])
        return [out.detach(), *torch.autograd.grad(out, qkv, torch.ones_like(out))]

    return forward_backward if case["backward"] else forward


def verify(case: Case, qkv: list[Tensor], got: list[Tensor], want: list[Tensor]) -> tuple[float, float]:
    """Largest error relative to the reference's largest value, over output and gradients."""
    scale_free = [
        ((g.double() - w.double()).abs().max() / w.double().abs().max()).item()
        for g, w in zip(got, want, strict=True)
    ]  # fmt: skip
    return max(scale_free), ALLOWED[case["dtype"]]


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def tiles_picture(records: Sequence[Record]) -> str | None:
    """The tiles that the forward pass visits under each mask, counted by the walk itself; it needs no record."""
    from matplotlib.patches import Rectangle

    from mlsys.bench.plots import COLOURS, new_figure, to_svg

    n, block = 512, 32
    documents = torch.arange(n) * 4 // n
    masks: dict[str, dict[str, Any]] = {
        "full": {},
        "causal": {"causal": True},
        "window of 128": {"causal": True, "window": (127, 0)},
        "window of 64 either side": {"window": (64, 64)},
        "four documents": {"causal": True, "mask": variants.document_mask(documents)},
        "prefix of 192": {"mask": variants.prefix_mask(n, n, 192)},
        "first 16 and latest 96": {"mask": variants.streaming_mask(n, n, 16, 96)},
        "last 128 queries": {"causal": True},
    }
    figure, axes = new_figure(4, 2, width=2.6, height=2.8)
    for ax, (name, options) in zip(axes, masks.items(), strict=True):
        t = 128 if name == "last 128 queries" else n
        visited = flash.tiles(t, n, **options, block_q=block, block_k=block)
        for queries, keys in visited:
            ax.add_patch(
                Rectangle((keys.start, queries.start), len(keys), len(queries), facecolor=COLOURS[0], edgecolor="white")
            )
        ax.set(xlim=(0, n), ylim=(t, 0), aspect="equal", xlabel="keys", ylabel="queries", xticks=[0, n], yticks=[0, t])
        share = sum(len(queries) * len(keys) for queries, keys in visited) / (t * n)
        ax.set_title(f"{name}: {share:.0%}", fontsize=9)
    return to_svg(figure)


DTYPES = ("float32", "bfloat16")
bench = Benchmark(
    __file__,
    cases={
        "quick": [
            *(case(n, dtype, causal=True) for dtype in DTYPES for n in (512, 1024, 2048, 4096)),
            *(case(2048, dtype, causal=False) for dtype in DTYPES),
            case(1024, "float32", causal=True, backward=True),
        ],
        "default": [
            *(
                case(n, dtype, causal=causal)
                for dtype in DTYPES
                for causal in (True, False)
                for n in (512, 1024, 2048, 4096, 8192)
            ),
            *(case(n, "float32", causal=causal, backward=True) for causal in (True, False) for n in (1024, 2048)),
        ],
        "full": [
            case(n, dtype, causal=causal, backward=backward)
            for backward in (False, True)
            for dtype in DTYPES
            for causal in (True, False)
            for n in (512, 1024, 2048, 4096, 8192)
        ],
    },
    inputs=inputs,
    work=work,
    impls={
        "naive": Impl(lambda: naive.attention, "reference"),
        "flash": Impl(lambda: flash.attention, "ours"),
        "flash numba": Impl(lambda: flash_numba.attention, "ours"),
        "torch sdpa": Impl(lambda: sdpa, "peer"),
    },
    subject="flash numba",
    prepare=prepare,
    verify=verify,
    contract="attention.flash",
    memory=True,
    plots=(
        Plot(
            x="n",
            xlabel="sequence length n",
            panel=("dtype", "causal"),
            per="heads",  # the largest size has fewer
            only=lambda case: not case["backward"],
        ),
        Plot(
            x="n",
            xlabel="sequence length n",
            panel=("dtype", "causal"),
            y="memory",
            only=lambda case: not case["backward"] and case["n"] <= 4096,  # same number of heads
        ),
    ),
    pictures={"tiles": tiles_picture},
)

if __name__ == "__main__":
    bench.main()
