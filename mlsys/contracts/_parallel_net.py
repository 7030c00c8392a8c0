"""A small model, batches for several ranks, and what one process would compute from all of them.

The ranks' models begin with different weights, so that one who forgets to take over those of the group's first rank is
found out. Everything is in float64, unless a case says otherwise: a wrong mean is then far away from rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlsys.contracts._parallel_ranks import seats, tensor
from mlsys.contracts.core import Case, Inputs

VOCAB = 7
ROUNDING = {"float64": 1e-9, "float32": 1e-4}  # of the largest number: far above rounding, far below any mistake


class Net(nn.Module):
    """Tokens → logits: an embedding, layers with a residual, an output matrix; with what real models have beside.

    tied:   the output matrix is the embedding.
    frozen: the first layer takes no gradient.
    unused: a layer that no forward pass uses.
    branch: a layer that only batches beginning with token 0 use.
    scale:  a buffer that the stream is multiplied by.
    """

    def __init__(
        self,
        *,
        width: int = 5,
        layers: int = 2,
        tied: bool = False,
        frozen: bool = False,
        unused: bool = False,
        branch: bool = False,
        scale: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, width, dtype=dtype)
        self.blocks = nn.ModuleList(nn.Linear(width, width, dtype=dtype) for _ in range(layers))
        if unused:
            self.unused = nn.Linear(width, 3, dtype=dtype)
        self.branch = nn.Linear(width, width, dtype=dtype) if branch else None
        self.gain = nn.Parameter(torch.ones(width, dtype=dtype))
        self.head = nn.Linear(width, VOCAB, bias=False, dtype=dtype)
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(width, dtype=dtype) if scale else None)
        if tied:
            self.head.weight = self.embedding.weight
        if frozen:
            for parameter in self.blocks[0].parameters():
                parameter.requires_grad_(False)
        self.late: Callable[[], None] | None = None  # called when backward has come to the first layer

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.embedding(tokens)
        if self.scale is not None:
            stream = stream * self.scale
        if self.branch is not None and tokens[0] == 0:
            stream = stream + self.branch(stream)
        for index, block in enumerate(self.blocks):
            stream = stream + torch.tanh(block(stream))
            if self.late is not None and index == 0:
                stream.register_hook(self._passed)
        return self.head(stream * self.gain)

    def _passed(self, gradient: Tensor) -> None:
        if self.late is not None:
            self.late()


KNOBS = ("width", "layers", "tied", "frozen", "unused", "branch", "scale")


def net(inputs: Inputs, rank: int | None = None) -> Net:
    """The model, with the weights that this rank begins with (None: any)."""
    made = Net(**inputs["net"], dtype=getattr(torch, inputs["dtype"]))
    if rank is not None:
        fill(made, tensor(inputs["weights"][rank], inputs["dtype"]))
    return made


def fill(module: nn.Module, values: Tensor) -> None:
    """Set parameters, then buffers, to these numbers, in order."""
    start = 0
    with torch.no_grad():
        for one in [*module.parameters(), *module.buffers()]:
            one.copy_(values[start : start + one.numel()].view_as(one))
            start += one.numel()


def flat(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """All in one row as float64; None is zeros of the size of what it is like."""
    rows = [torch.zeros_like(b) if a is None else a.detach() for a, b in zip(tensors, like, strict=True)]
    return torch.cat([row.double().reshape(-1) for row in rows])


def inputs(case: Case, seed: int, steps: int) -> Inputs:
    """Weights of each rank, and for each step, microbatch and rank the tokens and their targets."""
    random = np.random.default_rng(seed)
    ranks = len(case.get("members", range(case["n"])))
    knobs = {name: case[name] for name in KNOBS if name in case}
    made = Net(**knobs)
    size = len(weights_of(made))
    weights = random.standard_normal((ranks, size)) * (0.3 if made.scale is None else 0.8)
    rows = case.get("rows", (3,) * ranks)  # of each rank
    batches = steps * case.get("microbatches", 1)
    tokens = [[random.integers(1, VOCAB, count) for count in rows] for _ in range(batches)]
    targets = [[random.integers(0, VOCAB, count) for count in rows] for _ in range(batches)]
    if case.get("branch"):
        for batch in tokens:
            batch[0][0] = 0  # the first rank's batches alone use it
    return {
        "weights": weights,
        "tokens": tokens,
        "targets": targets,
        "steps": steps,
        "microbatches": case.get("microbatches", 1),
        "net": knobs,
        "dtype": case.get("dtype", "float64"),
    }


def loss(model: nn.Module, inputs: Inputs, batch: int, rank: int) -> Tensor:
    """Mean loss of this rank's rows of a batch."""
    logits = model(torch.from_numpy(inputs["tokens"][batch][rank]))
    return F.cross_entropy(logits, torch.from_numpy(inputs["targets"][batch][rank]))


def one_process(
    inputs: Inputs, update: Callable[[int, np.ndarray, np.ndarray], np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each step the mean gradient and the weights after it, from the first rank's weights on, by one process.

    A rank's loss is the mean over its rows, the gradient the mean over the ranks; microbatches add up.
    `update(step, weights, gradient)` → the new weights.
    """
    model = Net(**inputs["net"])
    fill(model, tensor(inputs["weights"][0], inputs["dtype"]).double())
    for step in range(inputs["steps"]):
        total: Any = 0.0
        for rank in range(seats(inputs)):
            one = copy.deepcopy(model)
            for part in range(inputs["microbatches"]):
                loss(one, inputs, step * inputs["microbatches"] + part, rank).backward()
            total = total + gradients(one).numpy()
        gradient = total / seats(inputs)
        trained = [p for p in model.parameters() if p.requires_grad]
        moved = update(step, flat(trained, trained).numpy(), gradient)
        start = 0
        with torch.no_grad():
            for parameter in trained:
                parameter.copy_(torch.from_numpy(moved[start : start + parameter.numel()]).view_as(parameter))
                start += parameter.numel()
        yield gradient, weights_of(model).numpy()


def gradients(model: nn.Module) -> Tensor:
    """All gradients in a row, of the parameters that take one; zeros where there is none yet."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return flat([p.grad for p in trained], trained)


def weights_of(model: nn.Module) -> Tensor:
    """All parameters, then all buffers, in a row."""
    every = [*model.parameters(), *model.buffers()]
    return flat(every, every)


def first_weights(inputs: Inputs) -> np.ndarray:
    """What every rank must have after construction: the first rank's weights and buffers."""
    first = tensor(inputs["weights"][0], inputs["dtype"]).double().numpy()
    return np.stack([first] * seats(inputs))


def spread(weights: np.ndarray) -> np.ndarray:
    """Of each rank, the largest difference of its weights from the first rank's; it must be 0, to the bit."""
    return np.abs(weights - weights[0]).max(1, initial=0.0)
