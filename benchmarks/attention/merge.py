"""Merging: what does it save to attend to a shared prefix once for a batch, and merge in what each has of its own?

Sequences that continue one prompt share its keys. Attended to whole, the prefix's
keys are read again for each of them; in parts, they are read once, since the
queries of the batch become rows of one matrix, and only the few keys of its own
are read for each. `merge` joins the two.

What to look at: attending in parts reads prefix + batch · suffix keys instead of
batch · (prefix + suffix), and decoding is bound by what it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mlsys.attention import naive
from mlsys.attention.merge import merge
from mlsys.bench import Benchmark, Impl, Plot, Work

Case = Mapping[str, Any]
HEADS, HEAD_DIM, SUFFIX = 8, 64, 64


def case(batch: int, prefix: int) -> Case:
    return {"batch": batch, "prefix": prefix, "suffix": SUFFIX, "dtype": "float32"}


def inputs(case: Case, device: str) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(case["prefix"] + case["batch"])

    def draw(batch: int, length: int) -> Tensor:
        return torch.randn(batch, HEADS, length, HEAD_DIM, generator=generator, device=device)

    b = case["batch"]
    given = {"q": draw(b, 1)}
    for x in ("k", "v"):
        given[f"prefix_{x}"], given[f"suffix_{x}"] = draw(1, case["prefix"]), draw(b, SUFFIX)
        shared = given[f"prefix_{x}"].expand(b, -1, -1, -1)
        given[x] = torch.cat([shared, given[f"suffix_{x}"]], 2)  # as a cache without sharing holds them
    return given


def work(case: Case, given: dict[str, Tensor]) -> Work:
    # Any implementation computes batch · (prefix + suffix) scores, but need not read the prefix more than once.
    b, prefix = case["batch"], case["prefix"]
    keys = 2 * HEADS * HEAD_DIM * (prefix + b * SUFFIX)
    return Work(flops=4 * b * HEADS * HEAD_DIM * (prefix + SUFFIX), bytes=4 * (keys + 2 * given["q"].numel()))


def in_parts(merge: Callable[..., Any], given: dict[str, Tensor]) -> Tensor:
    """The prefix with the batch's queries as rows of one sequence, the suffixes each for itself, and both merged."""
    q = given["q"]
    together = q.transpose(0, 2)  # (1, heads, batch, d)
    out, lse = naive.attention(together, given["prefix_k"], given["prefix_v"], return_lse=True)
    own = naive.attention(q, given["suffix_k"], given["suffix_v"], return_lse=True)
    merged: Tensor = merge(out.transpose(0, 2), lse.transpose(0, 2), *own)[0]
    return merged


def whole(given: dict[str, Tensor]) -> Tensor:
    return naive.attention(given["q"], given["k"], given["v"])


def sdpa(given: dict[str, Tensor]) -> Tensor:
    return F.scaled_dot_product_attention(given["q"], given["k"], given["v"])


def prepare(function: Callable[..., Any], case: Case, given: dict[str, Tensor]) -> Callable[[], Tensor]:
    @torch.no_grad()
    def call() -> Tensor:
        return function(given) if function in (whole, sdpa) else in_parts(function, given)

    return call


def verify(case: Case, given: dict[str, Tensor], got: Tensor, want: Tensor) -> tuple[float, float]:
    return ((got - want).abs().max() / want.abs().max()).item(), 1e-4


bench = Benchmark(
    __file__,
    cases={
        "quick": [case(b, prefix) for b, prefix in ((1, 1024), (8, 1024), (8, 4096))],
        "default": [case(b, prefix) for b in (1, 4, 16) for prefix in (1024, 4096)],
        "full": [case(b, prefix) for b in (1, 4, 16, 64) for prefix in (256, 1024, 4096, 16384) if b * prefix <= 2**18],
    },
    inputs=inputs,
    work=work,
    impls={
        "whole": Impl(lambda: whole, "reference"),
        "merge": Impl(lambda: merge, "ours"),
        "torch sdpa": Impl(lambda: sdpa, "peer"),
    },
    subject="merge",
    prepare=prepare,
    verify=verify,
    contract="attention.merge",
    plots=(Plot(x="batch", xlabel="sequences that share the prefix", panel=("prefix",)),),
)

if __name__ == "__main__":
    bench.main()
