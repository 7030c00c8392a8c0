"""Exact attention: what does it buy never to hold the n × n scores, and how near is that to torch's own kernel?

What to look at: naive's memory grows with n², flash's with n; the time only
follows once the scores no longer fit in cache. In bfloat16 torch's CPU kernel
converts more than it multiplies, and two large matmuls a tile beat it.

On a GPU (`--device cuda`), sizes are those of the papers' pictures: 16,384 tokens, 2,048 numbers each. There,
`flash` is a launch for each of its lines, and `flash triton` one for all of them. The peers are torch's backends,
one by one, and its flex_attention, which torch.compile makes a Triton kernel of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
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


def gpu_case(n: int, head_dim: int, dtype: str = "bfloat16", *, causal: bool, backward: bool = False) -> Case:
    """As in FlashAttention's own measurements, but for half the tokens at 8,192, or naive's scores fill the GPU."""
    sizes = {"n": n, "heads": 2048 // head_dim, "batch": 16384 // n if n < 8192 else 1, "head_dim": head_dim}
    return sizes | {"dtype": dtype, "causal": causal, "backward": backward}


def on_gpu(case: Case) -> bool:
    return "batch" in case


def on_cpu(case: Case) -> bool:
    return not on_gpu(case)


def inputs(case: Case, device: str) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(case["n"])
    shape = (case.get("batch", 1), case["heads"], case["n"], case.get("head_dim", HEAD_DIM))
    dtype = getattr(torch, case["dtype"])
    return [
        torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_(case["backward"])
        for _ in range(3)
    ]


def work(case: Case, qkv: list[Tensor]) -> Work:
    # The field's convention: 4·n²·d FLOPs a head, half of it when causal; a backward pass is 2.5 forwards.
    n, heads = case["n"], case["heads"]
    heads, head_dim = heads * case.get("batch", 1), case.get("head_dim", HEAD_DIM)
    flops = 4 * heads * n * n * head_dim * (0.5 if case["causal"] else 1.0) * (3.5 if case["backward"] else 1.0)
    tensors = 4 if not case["backward"] else 11  # q k v o; then q k v o dO read again, dq dk dv written, lse aside
    moved = tensors * qkv[0].numel() * qkv[0].element_size()
    return Work(flops=flops, bytes=moved, items=flops, unit="FLOP") if on_gpu(case) else Work(flops=flops, bytes=moved)


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


def triton() -> Callable[..., Tensor]:
    from mlsys.attention import flash_triton

    return flash_triton.attention


def sdpa_by(backend: str) -> Callable[..., Tensor]:
    """One backend of torch's, and no other: an error where it has no kernel."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        with sdpa_kernel([getattr(SDPBackend, backend)]):
            return sdpa(q, k, v, causal=causal)

    return attention


def flex() -> Callable[..., Tensor]:
    """flex_attention, compiled for the very case: after some recompilations torch would go on without."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    @cache
    def visible(n: int, device: torch.device) -> Any:
        return create_block_mask(lambda b, h, i, j: i >= j, None, None, n, n, device=str(device))

    def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        out: Tensor = compiled(q, k, v, block_mask=visible(q.shape[2], q.device) if causal else None)
        return out

    return attention


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
QUICK_ON_GPU = [
    gpu_case(n, head_dim, causal=causal, backward=backward)
    for n, head_dim, causal in (
        (4096, 128, True), (4096, 64, True), (8192, 128, True), (1024, 128, True), (4096, 128, False),
    )
    for backward in (False, True)
]  # fmt: skip
ON_GPU = [
    gpu_case(n, head_dim, causal=causal, backward=backward)
    for backward in (False, True)
    for head_dim in (64, 128)
    for causal in (True, False)
    for n in (1024, 2048, 4096, 8192)
]
bench = Benchmark(
    __file__,
    cases={
        "quick": [
            *(case(n, dtype, causal=True) for dtype in DTYPES for n in (512, 1024, 2048, 4096)),
            *(case(2048, dtype, causal=False) for dtype in DTYPES),
            case(1024, "float32", causal=True, backward=True),
            *QUICK_ON_GPU,
        ],
        "default": [
            *(
                case(n, dtype, causal=causal)
                for dtype in DTYPES
                for causal in (True, False)
                for n in (512, 1024, 2048, 4096, 8192)
            ),
            *(case(n, "float32", causal=causal, backward=True) for causal in (True, False) for n in (1024, 2048)),
            *ON_GPU,
        ],
        "full": [
            *(
                case(n, dtype, causal=causal, backward=backward)
                for backward in (False, True)
                for dtype in DTYPES
                for causal in (True, False)
                for n in (512, 1024, 2048, 4096, 8192)
            ),
            *ON_GPU,
            *(gpu_case(2048, 64, "float32", causal=True, backward=backward) for backward in (False, True)),
        ],
    },
    inputs=inputs,
    work=work,
    impls={
        "naive": Impl(lambda: naive.attention, "reference"),
        "flash": Impl(lambda: flash.attention, "ours"),
        "flash numba": Impl(lambda: flash_numba.attention, "ours", only=on_cpu),
        "flash triton": Impl(triton, "ours", needs="triton", only=on_gpu),
        "torch sdpa": Impl(lambda: sdpa, "peer", only=on_cpu),
        **{
            f"torch sdpa, {name}": Impl(partial(sdpa_by, backend), "peer", only=on_gpu)
            for name, backend in (
                ("flash", "FLASH_ATTENTION"),
                ("cuDNN", "CUDNN_ATTENTION"),
                ("efficient", "EFFICIENT_ATTENTION"),
            )
        },
        "torch.compile, flex": Impl(flex, "peer", only=on_gpu),
    },
    subject="flash numba",
    prepare=prepare,
    verify=verify,
    contract="attention.flash",
    memory=True,
    fits=lambda case, device: on_gpu(case) == (device == "cuda"),
    plots=(
        Plot(
            x="n",
            xlabel="sequence length n",
            panel=("dtype", "causal"),
            per="heads",  # the largest size has fewer
            only=lambda case: on_cpu(case) and not case["backward"],
        ),
        Plot(
            x="n",
            xlabel="sequence length n",
            panel=("dtype", "causal"),
            y="memory",
            only=lambda case: on_cpu(case) and not case["backward"] and case["n"] <= 4096,  # same number of heads
        ),
        Plot(
            x="n",
            xlabel="sequence length n",
            panel=("head_dim", "causal", "backward"),
            y="throughput",
            only=on_gpu,
        ),
    ),
    pictures={"tiles": tiles_picture},
)

if __name__ == "__main__":
    bench.main()
