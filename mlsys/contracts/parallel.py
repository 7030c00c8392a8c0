"""Contracts of `mlsys.parallel`: several processes compute what one would, and each holds its share.

    parallel.collectives    all_reduce(tensor, group=None), in place: the sum over the ranks
    parallel.data_parallel  DataParallel(module, group=None): mean gradients when backward() returns
    parallel.mesh           groups(dp, pp, tp): which ranks talk to each other when three kinds are combined
    parallel.pipeline       step(stage, loss, inputs, targets, microbatches, group=None): 1F1B over send and receive
    parallel.schedules      schedule(p, m): 1F1B as a table, {rank: [(kind, stage, microbatch), …]}
    parallel.tensor         TensorMLP(up, down, group=None): an MLP of which each rank holds its columns and rows
    parallel.zero           ZeRO1(module, group=None) with .optimizer(cls, **options), .clip_grad_norm(max_norm)
    parallel.zero3          ZeRO3(module, group=None), the same, and .full_state_dict()

A case starts n processes and runs the implementation in each; `group=None` are all of them. What is looked at:

- **collectives**: every rank's tensor, which has any shape, down to fewer numbers than ranks and none at all; float64,
  float32, bfloat16, int64; 1 to 5 ranks, and a group that is not all of them.
- **data_parallel**: the module is called as before, and its own parameters have the gradients. Ranks begin with
  different weights, buffers and frozen parameters: those of the group's first rank count. A rank's loss is the mean
  over its rows, which may be more or fewer than another's; the gradient is the mean over the ranks. Parameters may be
  tied, frozen, used by no rank, or by some; backward may run twice before a step, the first time within `no_sync()` if
  there is one; gradients may be set to zero or to None. In the end the ranks' weights are equal to the bit.
- **zero**: as there, with the optimizer that `.optimizer(torch.optim.AdamW, lr=…)` makes. After `optimizer.step()` the
  module has all new weights, and `optimizer.zero_grad()` clears the gradients. `.clip_grad_norm` is called between
  backward and step, and returns the norm of the whole mean gradient. In `optimizer.state` no rank has more than its
  share, to within the largest parameter, and all of them together have the whole.
- **zero3**: weights are read by `.full_state_dict()`. And memory: after construction, after the forward pass, late in
  the backward pass and after a step, all tensors of a rank are counted, with those that autograd keeps. There is room
  for the share and a few layers, none for the whole model.
- **tensor**: the result and the gradient of x, whole on every rank; the gradients of this rank's shares, over one or
  two backward passes; x contiguous or not, and the gradient that backward() begins with too, or one number expanded.
  That gradient may not be changed. A rank holds no more than its share, and sends no more than two all-reduces a pass.
- **pipeline**: gradients of each rank's stage, which add up from step to step, and the mean loss; microbatches of
  unequal size, fewer than ranks, stages whose result is not contiguous, a matrix that the first and the last stage
  share. Each rank holds as many microbatches as under 1F1B.
- **schedules**: no rank runs. The table can be run, a step takes no longer than 1F1B's, with equal costs and unequal
  ones, and no rank holds more microbatches. Any order that does this will do.
- **mesh**: no rank runs. Groups may be listed in any order, ranks in a group in that of their places.

The oracle is one process in float64, on everybody's rows, with SGD and AdamW written out. Float64 results must agree to
nine digits, float32 to four: far more than rounding in another order takes, far less than any mistake makes. A rank
that raises, exits, dies or waits for ever is named, with the line of the implementation that it was at.

Cost:
    About 0.1 s a case on an idle machine, and a few seconds to start.

Papers:
    Those of the modules.

See also:
    `mlsys.contracts.core` (how a contract is run), `mlsys.parallel.launcher` (how the ranks are).
"""

from __future__ import annotations

from mlsys.contracts import (
    _parallel_collectives,
    _parallel_data,
    _parallel_mesh,
    _parallel_pipeline,
    _parallel_schedules,
    _parallel_tensor,
    _parallel_zero,
)

CONTRACTS = {
    "collectives": _parallel_collectives.COLLECTIVES.contract("parallel.collectives"),
    "data_parallel": _parallel_data.DATA_PARALLEL.contract("parallel.data_parallel"),
    "mesh": _parallel_mesh.contract("parallel.mesh"),
    "pipeline": _parallel_pipeline.PIPELINE.contract("parallel.pipeline"),
    "schedules": _parallel_schedules.contract("parallel.schedules"),
    "tensor": _parallel_tensor.TENSOR.contract("parallel.tensor"),
    "zero": _parallel_zero.ZERO.contract("parallel.zero"),
    "zero3": _parallel_zero.ZERO_3.contract("parallel.zero3"),
}
