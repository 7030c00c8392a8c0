"""The losses of a chunk of logits, and the gradients in their place, by one Triton kernel: a program a row.

The vocabulary does not fit into registers, so a block walks along the row of logits, twice. First it keeps a maximum
and a sum right together by the online rule, a pair for each lane; then it comes again and writes over each logit what
the gradient of the loss with respect to it is:

    program i    │ block │ block │ block │ bl‥‥│    one row of V logits
                 m, d, Σz         ─▶  loss_i = m + log d − (1 − ε) z_target − ε/V Σz
                 │ G     │ G     │ G     │ G ‥‥│    the same memory: factor_i · (softmax(z)_v − q_v)

The idea of this kernel: nothing is copied. A library's log-softmax writes as much as it reads, and its gradient again;
here 131072 logits of a row are read twice and written once, the second time mostly from the cache.

Chunks of rows, and both products with weight, are those of the readable version, which calls this for each chunk.

Cost:
    Three exponentials a logit, beside the products.

Memory:
    2 reads and 1 write of a chunk's logits; nothing is allocated but a number a row.

Papers:
    Milakov & Gimelshein 2018, arXiv:1805.02867 (Algorithm 3: the online softmax).
    Hsu et al. 2024, arXiv:2410.10989 (Liger: section 3.2, the gradient in place of the logits).

See also:
    `mlsys.kernels.cross_entropy` (the readable version, and the loop), `mlsys.kernels.softmax_triton`.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from mlsys.kernels._triton import Config, Specimen, at, bound, config, narrow, next_power_of_2, on_device
from mlsys.kernels._triton_tune import size, tuned
from mlsys.kernels.cross_entropy import ChunkedLoss, Options, check_inputs, chunk_rows

CONFIGS = tuple(
    config(BLOCK=block, warps=warps, stages=stages)
    for block, warps, stages in ((4096, 8, 2), (8192, 16, 2), (4096, 16, 2), (2048, 4, 3))
)


def cross_entropy(
    hidden: Float[Tensor, "*rows d"],
    weight: Float[Tensor, "v d"],
    targets: Int[Tensor, "*rows"],
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    chunk: int | None = None,
    wide_sum: bool = True,
    config: Config | None = None,
) -> Tensor:
    """As `mlsys.kernels.cross_entropy`, with the losses of a chunk by one kernel.

    config: one of `CONFIGS`; without it, it is tuned. TypeError, ValueError naming the argument; RuntimeError without a
    GPU or the interpreter.
    """
    rows, marks, options = check_inputs(
        hidden, weight, targets, ignore_index, reduction, label_smoothing, softcap, chunk, wide_sum
    )
    on_device("cross_entropy", hidden=hidden, weight=weight, targets=targets)
    step = chunk or chunk_rows(len(rows), *weight.shape)
    way = partial(losses_of, config=config)
    losses: Tensor = ChunkedLoss.apply(rows, weight, marks, options, reduction, step, wide_sum, way)
    return losses.view(targets.shape) if reduction == "none" else losses


def losses_of(
    logits: Tensor, targets: Tensor, factors: Tensor | None, options: Options, config: Config | None = None
) -> Tensor:
    """As `mlsys.kernels.cross_entropy.losses_of`: the losses; gradients over the logits, if there are factors."""
    count, columns = logits.shape
    losses = torch.empty(count, dtype=torch.float32, device=logits.device)

    def run(config: Config, to: Tensor | None = None) -> None:
        _losses[(count,)](
            logits, logits if to is None else to, targets, targets.stride(0), factors,
            0 if factors is None else factors.stride(0), losses, logits.stride(0), columns,
            options.ignore_index, options.label_smoothing, options.softcap, **config.options(),
        )  # fmt: skip

    def trial(config: Config) -> None:  # the kernel overwrites what it reads: timed on a copy
        run(config, scratch())

    made: list[Tensor] = []

    def scratch() -> Tensor:
        if not made:
            made.append(torch.empty_like(logits))
        return made[0]

    key = f"rows{size(count)} columns{size(columns)} {str(logits.dtype).removeprefix('torch.')}"
    with at(logits.device):
        run(tuned("cross_entropy.losses", key, configs(columns), trial, logits.device, config))
    return losses


def configs(columns: int) -> tuple[Config, ...]:
    """The settings for a vocabulary of this size: blocks of no more than it needs."""
    small = next_power_of_2(columns)
    fitting = tuple(one for one in CONFIGS if one["BLOCK"] <= small)
    return fitting or (config(BLOCK=max(small, 16), warps=4, stages=1),)


@triton.jit
def _losses(
    logits, gradients, targets, target_stride, factors, factor_stride, losses, stride, columns,
    ignore_index, smoothing, softcap, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    gradients += row * stride
    target = tl.load(targets + row * target_stride)
    kept = target != ignore_index
    # before the sums, which all warps wait for: afterwards a fast one may have overwritten it already
    at_target = tl.load(logits + tl.where(kept, target, 0)).to(tl.float32)
    if softcap is not None:
        at_target = softcap * _tanh(at_target / softcap)
    lane = tl.arange(0, BLOCK)
    m = tl.full((BLOCK,), -float("inf"), tl.float32)
    d = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, bound(columns), BLOCK):
        inside = start + lane < columns
        z = tl.load(logits + start + lane, mask=inside, other=0.0).to(tl.float32)
        if softcap is not None:
            z = softcap * _tanh(z / softcap)
        sums += z  # lanes beyond the vocabulary have 0
        z = tl.where(inside, z, -float("inf"))
        larger = tl.maximum(m, z)
        shift = tl.where(larger == -float("inf"), 0.0, larger)
        d = d * tl.exp(m - shift) + tl.exp(z - shift)
        m = larger
    top = tl.max(m, 0)
    lse = top + tl.log(tl.sum(d * tl.exp(m - tl.where(top == -float("inf"), 0.0, top)), 0))
    loss = lse - (1 - smoothing) * at_target
    if smoothing != 0.0:  # not 0 · (−∞), where a logit is −∞
        loss -= smoothing * (tl.sum(sums, 0) / columns)
    tl.store(losses + row, tl.where(kept, loss, 0.0))
    if factors is not None:
        factor = tl.load(factors + row * factor_stride)
        for start in tl.range(0, bound(columns), BLOCK):
            inside = start + lane < columns
            z = tl.load(logits + start + lane, mask=inside, other=0.0).to(tl.float32)
            slope = 1.0
            if softcap is not None:
                z = softcap * _tanh(z / softcap)
                slope = 1 - (z / softcap) * (z / softcap)
            g = tl.exp(z - lse) - smoothing / columns - tl.where(start + lane == target, 1 - smoothing, 0.0)
            g = tl.where(kept, g * slope * factor, 0.0)
            tl.store(gradients + start + lane, narrow(g, gradients.dtype.element_ty), mask=inside)


@triton.jit
def _tanh(x):
    # by exp of a number that is not positive, which cannot overflow
    e = tl.exp(-2 * tl.abs(x))
    t = (1 - e) / (1 + e)
    return tl.where(x < 0, -t, t)


def specimens() -> list[Specimen]:
    """The kernel as it is compiled for a large vocabulary, with every config, and with a softcap."""
    types = {
        "logits": "*bf16", "gradients": "*bf16", "targets": "*i64", "target_stride": "i32", "factors": "*fp32",
        "factor_stride": "i32", "losses": "*fp32", "stride": "i32", "columns": "i32", "ignore_index": "i32",
        "smoothing": "fp32", "softcap": "fp32",
    }  # fmt: skip
    aligned = ("logits", "gradients", "targets", "factors", "losses", "stride", "columns")
    shows = dict.fromkeys((80, 90), ("128-bit loads",))
    return [
        Specimen(f"cross_entropy.losses {short}{' softcap' * (not constants)}", _losses,
                 types | dict.fromkeys(("logits", "gradients"), f"*{short}"), one, constants, aligned, shows)
        for short, constants in (("bf16", {"softcap": None}), ("fp32", {}))
        for one in CONFIGS
    ]  # fmt: skip


def typical(
    device: torch.device, dtype: torch.dtype, shape: Sequence[int] | None
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls to tune for, by what they are called: rows, vocabulary and width, given or usual. For `mlsys tune`."""
    for rows, vocabulary, width in [shape] if shape else ((8192, 32768, 4096), (8192, 131072, 4096)):
        hidden = torch.randn(rows, width, dtype=dtype, device=device, requires_grad=True)
        weight = torch.randn(vocabulary, width, dtype=dtype, device=device, requires_grad=True)
        targets = torch.randint(vocabulary, (rows,), device=device)
        label = f"{rows} × {vocabulary} × {width}"
        yield label, partial(_both_passes, hidden, weight, targets)


def _both_passes(*given: Tensor) -> None:
    cross_entropy(*given).backward()
