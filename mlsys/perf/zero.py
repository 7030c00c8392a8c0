"""ZeRO: data parallelism without keeping n copies of the optimizer state, the gradients and the weights.

Plain data parallelism holds the whole model state on each of n devices. ZeRO keeps
1/n of it on each, and fetches the rest when it is needed:

    stage   sharded                              bytes of a device
    0       nothing                              Ψ·(w + g + o)
    1       optimizer state                      Ψ·(w + g + o/n)
    2       … and gradients                      Ψ·(w + (g + o)/n)
    3       … and weights (FSDP's full shard)    Ψ·(w + g + o)/n

for Ψ parameters with w bytes of weight, g of gradient and o of optimizer state
each: 2, 2 and 12 for Adam in mixed precision, since the optimizer has a float32
copy of the weights, a momentum and a variance. Shares are real numbers here:
the padding of a last, uneven shard, less than n numbers, is left out.

Stages 0 to 2 send the same bytes, because an all-reduce *is* a reduce-scatter of
gradients and an all-gather of weights (or of gradients, in stage 0); stages 1 and 2
only run the optimizer in between. Stage 3 gathers the weights twice, for the
forward and for the backward pass, since they are dropped in between: 3Ψ for 2Ψ, in
the limit of many devices.

Cost:
    No FLOPs: each number is updated once by one device instead of n times by all.

Communication:
    Bytes that a device sends in a step, with Ψ numbers in 16 bits: 4Ψ(n−1)/n in stages 0 to 2, 6Ψ(n−1)/n in stage 3.
    With k microbatches a step, stage 2 reduces k times and stage 3 does everything k times: neither may keep
    what it shards. So gradient accumulation makes stage 3 dear; see `communication`.

Papers:
    Rajbhandari et al. 2020, arXiv:1910.02054 (Figure 1 and Table 1: memory; Table 2: largest models; section 7: bytes).
    Zhao et al. 2023, arXiv:2304.11277 (FSDP: stage 3 in PyTorch).

See also:
    `mlsys.perf.collectives` (what a reduce-scatter costs in seconds), `mlsys.perf.transformer` (Ψ),
    `mlsys.perf.activations` (which ZeRO does not shard).
"""

from __future__ import annotations

from dataclasses import dataclass

from mlsys.perf import _checks

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Memory:
    """Model state on one device, bytes."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """All of it, bytes; activations and buffers come on top."""
        return self.weights + self.gradients + self.optimizer


def memory(
    parameters: float,
    n: int,
    stage: int,
    *,
    bytes_weights: float = 2,
    bytes_gradients: float = 2,
    bytes_optimizer: float = 12,
) -> Memory:
    """What each of `n` devices holds for a model of `parameters` numbers, with so many bytes for each of them.

    The defaults are Adam in mixed precision. Raises ValueError for a stage that is not 0, 1, 2 or 3.
    """
    _checks.amount("parameters", parameters)
    _check(n, stage)
    sizes = {"bytes_weights": bytes_weights, "bytes_gradients": bytes_gradients, "bytes_optimizer": bytes_optimizer}
    for name, value in sizes.items():
        _checks.amount(name, value)
    return Memory(
        weights=parameters * bytes_weights / (n if stage >= 3 else 1),
        gradients=parameters * bytes_gradients / (n if stage >= 2 else 1),
        optimizer=parameters * bytes_optimizer / (n if stage >= 1 else 1),
    )


def communication(
    parameters: float,
    n: int,
    stage: int,
    *,
    bytes_weights: float = 2,
    bytes_gradients: float = 2,
    microbatches: int = 1,
) -> float:
    """Bytes that each of `n` devices sends in one optimizer step, with ring or halving-doubling collectives.

    Each pass over the parameters is (n−1)/n of them. `microbatches` are accumulated before the step.
    """
    _checks.amount("parameters", parameters)
    _check(n, stage)
    _checks.amount("bytes_weights", bytes_weights)
    _checks.amount("bytes_gradients", bytes_gradients)
    _checks.whole("microbatches", microbatches)
    reduces = microbatches if stage >= 2 else 1  # stages 0 and 1 have room for the sum of all microbatches
    if stage == 0:
        gathered = bytes_gradients  # the second half of the all-reduce
    elif stage < 3:
        gathered = bytes_weights
    else:
        gathered = 2 * microbatches * bytes_weights  # before the forward and before the backward pass
    return parameters * (n - 1) / n * (reduces * bytes_gradients + gathered)


def largest_model(
    memory: float,
    n: int,
    stage: int,
    *,
    bytes_weights: float = 2,
    bytes_gradients: float = 2,
    bytes_optimizer: float = 12,
) -> float:
    """The most parameters whose model state fits into `memory` bytes on each of `n` devices: nothing else counted."""
    _checks.amount("memory", memory)
    state = _one_parameter(n, stage, bytes_weights, bytes_gradients, bytes_optimizer)
    if state.total == 0:
        raise ValueError("bytes_weights, bytes_gradients and bytes_optimizer are all 0: any model fits")
    return memory / state.total


def _one_parameter(n: int, stage: int, weights: float, gradients: float, optimizer: float) -> Memory:
    return memory(1, n, stage, bytes_weights=weights, bytes_gradients=gradients, bytes_optimizer=optimizer)


def _check(n: int, stage: int) -> None:
    _checks.whole("n", n)
    if stage not in STAGES or isinstance(stage, bool):
        raise ValueError(f"stage={stage!r}: ZeRO has stages 0 (plain data parallelism), 1, 2 and 3")
