"""Contracts of `mlsys.perf`: is this cost formula right?

For each module the one function that a course would set, over plain numbers:

    perf.roofline         matmul_bound(m, n, k, itemsize, peak, bandwidth) → (seconds, side)
    perf.transformer      parameters(config) → (total, active)
    perf.activations      block_bytes(batch, seq, d_model, heads, tp, sequence_parallel, recompute) → bytes
    perf.inference        decode(config, parameters, batch, cached, itemsize, kv_itemsize, bandwidth)
                          → (cache_bytes, seconds, tokens_per_second)
    perf.collectives      cost(operation, algorithm, n, size) → (steps, bytes_sent)
    perf.zero             memory(parameters, n, stage) → (weights, gradients, optimizer)
    perf.pipeline         bubble(schedule, stages, microbatches, chunks) → share of its time that a device waits
    perf.tensor_parallel  layer_bytes(batch, seq, d_model, tp, itemsize, sequence_parallel, recompute)
                          → (forward, backward)
    perf.checkpointing    schedule(layers, snapshots) → list of steps, which the contract executes
    perf.scaling_laws     compute_optimal(flops, E, A, B, alpha, beta) → (parameters, tokens)

Arguments are passed by position. What each means:

- **roofline**: a matrix m × k times one of k × n, each moved once, `itemsize` bytes a number, on a machine of `peak`
  FLOP/s and `bandwidth` bytes/s that does both at once. The side is "compute" or "memory", what takes longer.
- **transformer**: `config` has the fields of `mlsys.perf.configs.Config`; without latent attention. Its settings vary
  each on its own: RMSNorm with biases, GELU with rotary positions. Experts have biases where config.bias; a router has
  one, a number for each expert, where config.experts.router_bias. Active is what one token uses, embeddings in full.
- **activations**: what one block of a GPT keeps for its backward pass on one of `tp` devices: 16 bits, dropout after
  the softmax, the projection and the MLP. `recompute` is "none", "selective" or "full". With sequence parallelism the
  input that full recomputation keeps is divided too.
- **inference**: one step for `batch` sequences with `cached` tokens each; `parameters` are what it reads. The time is
  that of the bytes: weights once, and the whole cache. With config.latent, latent attention.
- **collectives**: `size` is the bytes of the whole vector (`mlsys.perf.collectives` says of what), `bytes_sent` what
  the busiest rank sends. Halving and doubling are asked for powers of two only; trees are binomial.
- **zero**: Adam in mixed precision. Shares are real numbers: no padding.
- **pipeline**: "gpipe", "1f1b", "interleaved" with `chunks` pieces a device, or "zb-h1"; the gradient of the input and
  that of the weights each take as long as the forward pass. Of the device that waits longest, between its own first
  and last operation.
- **tensor_parallel**: one block, one microbatch, collectives on rings, bytes that one device sends.
- **checkpointing**: steps are ("store", slot), ("restore", slot), ("advance", layers) and ("reverse",). At the start
  the input of layer 0 is at hand, and stored nowhere. Reversing layer i needs its input at hand, and i + 1 reversed;
  afterwards nothing is at hand. Layers advanced over are run again: there must be as few as possible.
- **scaling_laws**: the least E + A/N^α + B/D^β for 6·N·D = `flops`.

The oracles count rather than calculate: they list every tensor, pass every message, run the schedule tick by tick, try
all ways, or search for the lowest point, so that one mistake cannot hide in both. Results may be off by a thousand
roundings of float64; counts must be exact; a lowest point may be found numerically, to five digits.

Cost:
    Under a second for all cases of a formula.

Papers:
    Those of the modules.

See also:
    `mlsys.contracts.core` (how a contract is run), `mlsys.perf` (the modules).
"""

from __future__ import annotations

from mlsys.contracts import (
    _perf_activations,
    _perf_checkpointing,
    _perf_collectives,
    _perf_device,
    _perf_model,
    _perf_parallel,
)

CONTRACTS = {
    "roofline": _perf_device.ROOFLINE.contract("perf.roofline"),
    "transformer": _perf_model.TRANSFORMER.contract("perf.transformer"),
    "activations": _perf_activations.ACTIVATIONS.contract("perf.activations"),
    "inference": _perf_model.INFERENCE.contract("perf.inference"),
    "collectives": _perf_collectives.COLLECTIVES.contract("perf.collectives"),
    "zero": _perf_parallel.ZERO.contract("perf.zero"),
    "pipeline": _perf_parallel.PIPELINE.contract("perf.pipeline"),
    "tensor_parallel": _perf_parallel.TENSOR_PARALLEL.contract("perf.tensor_parallel"),
    "checkpointing": _perf_checkpointing.CHECKPOINTING.contract("perf.checkpointing"),
    "scaling_laws": _perf_device.SCALING_LAWS.contract("perf.scaling_laws"),
}
