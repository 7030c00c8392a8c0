"""Attention's options: what does each cost, and what does a window save, where torch has to be given a mask for it?

What to look at: flash visits only the tiles that a window or a mask of documents
leaves, so time falls with what is visible. torch's kernel is given the same mask as a
tensor and computes every score. Soft-cap and sinks it cannot do at all. Soft-cap
and ALiBi are passes over the tile that plain attention does without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mlsys.attention import flash, naive, variants
from mlsys.bench import Benchmark, Impl, Plot, Work

Case = Mapping[str, Any]
HEADS, HEAD_DIM, WINDOW = 4, 64, 256
OPTIONS = ("causal", "window", "documents", "prefix", "alibi", "softcap", "sinks")


def case(n: int, option: str) -> Case:
    return {"n": n, "option": option, "heads": HEADS, "dtype": "float32"}


def inputs(case: Case, device: str) -> dict[str, Any]:
    """q, k, v, the options, and the same as torch's kernel takes them: numbers that are added to the scores."""
    n, option = case["n"], case["option"]
    generator = torch.Generator(device).manual_seed(n)
    qkv = [torch.randn(1, HEADS, n, HEAD_DIM, generator=generator, device=device) for _ in range(3)]
    visible = torch.ones(n, n, dtype=torch.bool, device=device).tril()
    options: dict[str, Any] = {"causal": option != "prefix"}
    if option == "window":
        options["window"] = (WINDOW - 1, 0)
        visible = visible.triu(1 - WINDOW)
    if option == "documents":  # eight of equal length
        options["mask"] = variants.document_mask(torch.arange(n, device=device) * 8 // n)
        visible = visible & options["mask"]
    if option == "prefix":
        options["mask"] = visible = variants.prefix_mask(n, n, n // 2).to(device)
    if option == "alibi":
        options["alibi"] = variants.alibi_slopes(HEADS).to(device)
    if option == "softcap":
        options["softcap"] = 50.0
    if option == "sinks":
        options["sinks"] = torch.randn(HEADS, generator=generator, device=device)
    bias: Tensor = visible
    if option == "alibi":
        position = torch.arange(n, device=device)
        distance = (position[:, None] - position).abs()
        bias = (-options["alibi"][:, None, None] * distance).masked_fill(~visible, float("-inf"))
    return {"qkv": qkv, "options": options, "bias": bias, "pairs": int(visible.sum())}


def work(case: Case, given: dict[str, Any]) -> Work:
    # What is visible must be computed: 4·d FLOPs for each pair of query and key, in each head.
    q = given["qkv"][0]
    return Work(flops=4 * HEADS * HEAD_DIM * given["pairs"], bytes=4 * q.numel() * q.element_size())


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)


def prepare(function: Callable[..., Tensor], case: Case, given: dict[str, Any]) -> Callable[[], Tensor]:
    options = given["options"]
    if function is sdpa:
        options = {"bias": None if case["option"] == "causal" else given["bias"]}

    @torch.no_grad()
    def call() -> Tensor:
        return function(*given["qkv"], **options)

    return call


def verify(case: Case, given: dict[str, Any], got: Tensor, want: Tensor) -> tuple[float, float]:
    return ((got - want).abs().max() / want.abs().max()).item(), 1e-4


bench = Benchmark(
    __file__,
    cases={
        "quick": [case(1024, option) for option in ("window", "documents", "softcap")],
        "default": [case(n, option) for n in (1024, 4096) for option in OPTIONS],
        "full": [case(n, option) for n in (512, 1024, 2048, 4096, 8192) for option in OPTIONS],
    },
    inputs=inputs,
    work=work,
    impls={
        "naive": Impl(lambda: naive.attention, "reference"),
        "flash": Impl(lambda: flash.attention, "ours"),
        "torch sdpa": Impl(lambda: sdpa, "peer", only=lambda case: case["option"] not in ("softcap", "sinks")),
    },
    subject="flash",
    prepare=prepare,
    verify=verify,
    contract="attention.variants",
    memory=True,
    plots=(Plot(x="n", xlabel="sequence length n", panel=("option",)),),
)

if __name__ == "__main__":
    bench.main()
