"""Linear attention in chunks: from what length does a state of fixed size beat the softmax, and what do chunks buy?

What to look at: the softmax's time per position rises with n, that of chunks and steps does
not: the lines cross. Steps do the least work and are slow all the same, one small product after
another; the one masked matrix is fast only while it is small. And the decays: a mask that fades costs
about half as much again as the products, a fade of each channel several times as much.

The softmax rows compute another function, which is the point of the comparison: they are checked against
the softmax, a few rows in float64, and timed on the same q, k and v. No installable package computes linear attention
in chunks on a CPU (those of its authors are GPU kernels), so the peer is torch's softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mlsys.attention import flash, linear
from mlsys.bench import Benchmark, Impl, Plot, Work

Case = Mapping[str, Any]
HEADS, HEAD_DIM, CHUNK = 8, 64, 64
ALLOWED = 1e-4  # relative to the largest value: some hundred roundings of float32
SAMPLED = 16  # rows of the softmax that are checked in float64


def case(n: int, decay: str, *, backward: bool = False) -> Case:
    return {"n": n, "decay": decay, "backward": backward}


def inputs(case: Case, device: str) -> list[Tensor]:
    """q, k, v and, where the case has one, log a."""
    generator = torch.Generator(device).manual_seed(case["n"])
    n = case["n"]
    qkv = [torch.randn(1, HEADS, n, HEAD_DIM, generator=generator, device=device) for _ in range(3)]
    qkv[0] *= HEAD_DIM**-0.5
    shape = {"none": None, "head": (HEADS,), "position": (1, HEADS, n), "channel": (1, HEADS, n, HEAD_DIM)}
    wanted = shape[case["decay"]]
    if wanted is not None:
        qkv.append(-0.1 * torch.rand(wanted, generator=generator, device=device))
    return [x.requires_grad_(case["backward"]) for x in qkv]


def work(case: Case, given: list[Tensor]) -> Work:
    # The least that any form needs: an outer product and a read a position. Backward, twice that, and the states again.
    flops = 4 * HEADS * case["n"] * HEAD_DIM * HEAD_DIM * (3.5 if case["backward"] else 1.0)
    moved = sum(x.numel() for x in given) + given[2].numel()  # each input, and the output
    if case["backward"]:
        moved = 3 * moved  # all read again with the output's gradient, and the inputs' gradients written
    return Work(flops=flops, bytes=4 * moved)


def prepare(function: Callable[..., Any], case: Case, given: list[Tensor]) -> Callable[[], dict[str, Any]]:
    q, k, v, *rest = given
    softmax = function in (flash_attention, sdpa)
    options = {"decay": rest[0]} if rest and not softmax else {}

    def forward() -> dict[str, Any]:
        with torch.no_grad():
            return {"softmax": softmax, "results": [function(q, k, v, **options)]}

    def forward_backward() -> dict[str, Any]:
        out = function(q, k, v, **options)
        grads = torch.autograd.grad(out, given[:3] if softmax else given, torch.ones_like(out))
        return {"softmax": softmax, "results": [out.detach(), *grads]}

    return forward_backward if case["backward"] else forward


def verify(case: Case, given: list[Tensor], got: dict[str, Any], want: dict[str, Any]) -> tuple[float, float]:
    """Largest error relative to the largest value: of output and gradients against the reference, or of a softmax."""
    if got["softmax"]:
        return _softmax_error(given, got["results"][0]), ALLOWED
    errors = [
        ((g.double() - w.double()).abs().max() / w.double().abs().max()).item()
        for g, w in zip(got["results"], want["results"], strict=True)
    ]
    return max(errors), ALLOWED


def _softmax_error(given: list[Tensor], out: Tensor) -> float:
    q, k, v = (x.detach().double() for x in given[:3])
    n = q.shape[2]
    rows = torch.linspace(0, n - 1, SAMPLED).long()
    scores = q[:, :, rows] @ k.mT
    hidden = torch.arange(n) > rows[:, None]
    want = scores.masked_fill(hidden.to(scores.device), -torch.inf).softmax(-1) @ v
    return ((out[:, :, rows].double() - want).abs().max() / want.abs().max()).item()


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash.attention(q, k, v, causal=True, scale=1.0)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)


def chunks(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None) -> Tensor:
    return linear.attention(q, k, v, decay=decay, chunk=CHUNK)


LENGTHS = (128, 256, 512, 1024, 2048, 4096)
bench = Benchmark(
    __file__,
    cases={
        "quick": [case(n, "position") for n in (128, 512, 2048)],
        "default": [
            *(case(n, decay) for decay in ("none", "position") for n in (*LENGTHS, 8192, 16384)),
            *(case(2048, decay) for decay in ("head", "channel")),
            *(case(n, "position", backward=True) for n in (1024, 4096)),
        ],
        "full": [
            *(
                case(n, decay, backward=backward)
                for backward in (False, True)
                for decay in ("none", "head", "position", "channel")
                for n in (*LENGTHS, 8192)
            ),
            *(case(n, decay) for decay in ("none", "position") for n in (16384, 32768)),
        ],
    },
    inputs=inputs,
    work=work,
    impls={
        "recurrent": Impl(lambda: linear.recurrent, "reference"),
        "chunks": Impl(lambda: chunks, "ours"),
        # its t × t scores, mask and sums of logarithms are half a gigabyte at twice this length
        "quadratic": Impl(
            lambda: linear.quadratic, "variant", only=lambda c: c["n"] <= 1024 and c["decay"] != "channel"
        ),
        "flash": Impl(lambda: flash_attention, "variant", only=lambda c: c["n"] <= 16384),
        "torch sdpa": Impl(lambda: sdpa, "peer", only=lambda c: c["n"] <= 16384),
    },
    subject="chunks",
    prepare=prepare,
    verify=verify,
    contract="attention.linear",
    memory=True,
    plots=(
        Plot(
            x="n",
            xlabel="sequence length n",
            panel=("decay",),
            per="n",
            only=lambda case: not case["backward"] and case["decay"] in ("none", "position"),
        ),
        Plot(
            x="n",
            xlabel="sequence length n",
            panel=("decay",),
            y="memory",
            only=lambda case: not case["backward"] and case["decay"] in ("none", "position"),
        ),
    ),
)

if __name__ == "__main__":
    bench.main()
