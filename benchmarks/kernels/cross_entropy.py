"""Cross-entropy over a large vocabulary: what does the loss cost, in time and memory, if the logits are never whole?

Loss and both gradients, of hidden states and of a head's weight. The reference is the head in two operations,
a product and torch's cross-entropy in float32, which keeps all logits several times; ours takes them by chunks of rows
and computes the gradients in the forward pass. Both spend the same FLOPs. On a GPU the Triton kernel takes part too,
and as its peers torch.compile of the reference, torch's own product and loss by chunks, where it has one, and Liger's.

What to look at: peak memory, against the number of words. Ours holds weight's gradient, in float32, and little else.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mlsys.bench import Benchmark, Impl, Plot, Work
from mlsys.kernels import cross_entropy

Case = Mapping[str, Any]
ALLOWED = {"float32": 1e-4, "bfloat16": 2e-2}  # of all gradients, taken as one vector
ON_PROCESSOR = 1 << 27  # products of rows, words and width divided by 64, up to which a processor takes seconds


def case(rows: int, vocabulary: int, width: int, dtype: str = "float32") -> Case:
    return {"rows": rows, "vocabulary": vocabulary, "width": width, "dtype": dtype}


@dataclass(frozen=True)
class Inputs:
    """Hidden states, the head's weight and the words that follow."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor


def inputs(case: Case, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(case["vocabulary"])
    dtype = getattr(torch, case["dtype"])
    hidden = torch.randn(case["rows"], case["width"], generator=generator, device=device)
    weight = torch.randn(case["vocabulary"], case["width"], generator=generator, device=device) / case["width"] ** 0.5
    targets = torch.randint(case["vocabulary"], (case["rows"],), generator=generator, device=device)
    return Inputs(hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets)


def work(case: Case, given: Inputs) -> Work:
    # three products; hidden and weight are read, and their gradients written: logits need not leave the chip
    flops = 6 * case["rows"] * case["vocabulary"] * case["width"]
    return Work(flops=flops, bytes=2 * (given.hidden.nbytes + given.weight.nbytes), items=case["rows"], unit="tokens")


def prepare(function: Callable[..., Tensor], case: Case, given: Inputs) -> Callable[[], list[Tensor]]:
    def step() -> list[Tensor]:
        loss = function(given.hidden, given.weight, given.targets)
        return [loss.detach(), *torch.autograd.grad(loss, (given.hidden, given.weight))]

    return step


def verify(case: Case, given: Inputs, got: list[Tensor], want: list[Tensor]) -> tuple[float, float]:
    """The largest relative error of the loss, and of each gradient as a vector."""
    errors = [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(got, want, strict=True)]
    return max(errors), ALLOWED[case["dtype"]]


def whole(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The head as it is usually written."""
    return F.cross_entropy((hidden @ weight.t()).float(), targets)


def narrow(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """By chunks, with weight's gradient summed in its own dtype."""
    return cross_entropy.cross_entropy(hidden, weight, targets, wide_sum=False)


def by_triton() -> Callable[..., Tensor]:
    from mlsys.kernels import cross_entropy_triton

    return cross_entropy_triton.cross_entropy


def by_inductor() -> Callable[..., Tensor]:
    torch.compiler.reset()  # each case anew: after some recompilations torch would go on without compiling
    compiled: Callable[..., Tensor] = torch.compile(whole, fullgraph=True, dynamic=False)
    return compiled


def by_torch_chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Of torch 2.13 and later."""
    options = torch.nn.LinearCrossEntropyOptions()
    loss: Tensor = F.linear_cross_entropy(hidden, weight, targets, options=options)
    return loss


def by_liger() -> Callable[..., Tensor]:
    """The kernel of the liger-kernel package, and its loop over chunks."""
    liger = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")

    def function(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = liger.LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets)[0]
        return loss

    return function


def on_gpu(case: Case) -> bool:
    """A processor takes the small cases, a GPU those of a language model."""
    return bool(case["rows"] * case["vocabulary"] * case["width"] > 64 * ON_PROCESSOR)


NEWER = hasattr(F, "linear_cross_entropy")
SMALL = [case(256, vocabulary, 256) for vocabulary in (4096, 16384, 65536)]
LARGE = [case(8192, vocabulary, 4096, "bfloat16") for vocabulary in (32768, 131072)]
bench = Benchmark(
    __file__,
    cases={
        "quick": [case(256, 4096, 256), case(256, 16384, 256), *LARGE[::-1]],
        "default": [*SMALL, *LARGE],
        "full": [*SMALL, case(1024, 32768, 256), case(256, 16384, 256, "bfloat16"), *LARGE],
    },
    inputs=inputs,
    work=work,
    impls={
        "torch": Impl(lambda: whole, "reference"),
        "chunked": Impl(lambda: cross_entropy.cross_entropy, "ours"),
        "chunked, narrow sum": Impl(lambda: narrow, "variant", only=lambda case: case["dtype"] != "float32"),
        "triton": Impl(by_triton, "ours", needs="triton", only=on_gpu),
        "torch.compile": Impl(by_inductor, "peer", only=on_gpu),
        **({"torch, by chunks": Impl(lambda: by_torch_chunks, "peer", only=on_gpu)} if NEWER else {}),
        "liger": Impl(by_liger, "peer", needs="liger_kernel", only=on_gpu, install="liger-kernel"),
    },
    subject="chunked",
    prepare=prepare,
    verify=verify,
    fits=lambda case, device: on_gpu(case) == (device == "cuda"),
    contract="kernels.cross_entropy",
    memory=True,
    plots=[
        Plot(x="vocabulary", xlabel="words", y="memory", only=lambda case: case["rows"] in (256, 8192)),
        Plot(x="vocabulary", xlabel="words", y="throughput", only=on_gpu),
    ],
)

if __name__ == "__main__":
    bench.main()
