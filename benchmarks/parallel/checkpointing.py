"""Sharded checkpoints: what does it cost to save and to load a model and its optimizer from several ranks?

What to look at: "gathered" is what most scripts do: one rank collects everything, which takes the memory that sharding
had saved, and writes it alone. Sharded, each rank writes its own part. On one disk the bytes are the same and the
time is the disk's, so what differs is who waits, what is copied, and the checksums that ours reads and verifies and
the others have not. Each call ends when the data are on disk (fsync), except torch's, which leaves it to the system.

Peer: `torch.distributed.checkpoint`, with the same shards, each under a name of its own.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from mlsys.bench import Benchmark, Impl, Work
from mlsys.bench.ranks import rank
from mlsys.files import write_atomic
from mlsys.parallel import ZeRO3, sharded_checkpoint
from mlsys.parallel.collectives import broadcast

Case = Mapping[str, Any]
LAYERS = 4


@dataclass(frozen=True)
class Inputs:
    """A sharded model after a step, and a folder that all ranks see."""

    case: Case

    @cached_property
    def folder(self) -> Path:
        """The same on all ranks; removed at the end of the process that made it."""
        name = torch.zeros(200, dtype=torch.uint8)
        if rank() == 0:
            made = tempfile.mkdtemp(prefix="mlsys-checkpoint-")
            atexit.register(shutil.rmtree, made, ignore_errors=True)
            name[: len(made.encode())] = torch.frombuffer(bytearray(made.encode()), dtype=torch.uint8)
        broadcast(name)
        return Path(bytes(name.tolist()).rstrip(b"\0").decode())

    @cached_property
    def trained(self) -> tuple[ZeRO3, torch.optim.Optimizer]:
        """Adam's state is there after the first step."""
        torch.manual_seed(0)
        width = self.case["width"]
        model = ZeRO3(nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS))))
        optimizer = model.optimizer(torch.optim.Adam, lr=1e-3)
        model(torch.randn(4, width, generator=torch.Generator().manual_seed(rank()))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return model, optimizer

    @property
    def state(self) -> dict[str, Tensor]:
        """What this rank holds, by names of its own."""
        _, optimizer = self.trained
        held = {}
        for number, piece in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            held[f"rank{rank()}.{number}.weight"] = piece.detach()
            entries = optimizer.state[piece]
            held |= {f"rank{rank()}.{number}.{name}": entries[name] for name in ("exp_avg", "exp_avg_sq")}
        return held


def sharded(given: Inputs) -> dict[str, Tensor]:
    model, optimizer = given.trained
    if given.case["what"] == "save":
        sharded_checkpoint.save(given.folder / "sharded", model, optimizer)
    else:
        sharded_checkpoint.load(given.folder / "sharded", model, optimizer)
    return given.state


def gathered(given: Inputs) -> dict[str, Tensor]:
    """Rank 0 has it all for a moment, and the others wait. Loading, each rank reads its own from the one file."""
    from safetensors import safe_open

    file = given.folder / "gathered.safetensors"
    state = given.state
    if given.case["what"] == "save":
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(state, everyone if rank() == 0 else None)
        if rank() == 0:
            write_atomic(file, to_safetensors({k: v for one in everyone for k, v in one.items()}))
        dist.barrier()
        return state
    with safe_open(file, "pt") as stored:
        for name, tensor in state.items():
            tensor.copy_(stored.get_tensor(name))
    return state


def torch_dcp(given: Inputs) -> dict[str, Tensor]:
    import torch.distributed.checkpoint as dcp

    state, folder = given.state, given.folder / "dcp"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (dcp.save if given.case["what"] == "save" else dcp.load)(state, checkpoint_id=folder)
    return state


def case(what: str, width: int) -> Case:
    return {"what": what, "ranks": 2, "width": width}


def work(case: Case, given: Inputs) -> Work:
    numbers = LAYERS * (case["width"] ** 2 + case["width"])  # of all ranks; with two of Adam's for each
    return Work(flops=3 * numbers, bytes=12 * numbers, items=12 * numbers, unit="B")


def prepare(function: Callable[[Inputs], Any], case: Case, given: Inputs) -> Callable[[], Any]:
    if case["what"] == "load":  # there has to be something to load
        function(_saving(given))
    return lambda: function(given)


def _saving(given: Inputs) -> Inputs:
    """The same model and folder, to be saved."""
    other = Inputs({**given.case, "what": "save"})
    other.__dict__.update(folder=given.folder, trained=given.trained)
    return other


def verify(case: Case, given: Inputs, got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, float]:
    """Nothing that is saved and loaded may change."""
    return max(float((got[name] - want[name]).abs().max()) for name in want), 0.0


bench = Benchmark(
    __file__,
    cases={
        "quick": [case("save", 256)],
        "default": [case(what, width) for what in ("save", "load") for width in (512, 2048)],
        "full": [case(what, width) for what in ("save", "load") for width in (512, 2048, 4096)],
    },
    inputs=lambda case, device: Inputs(case),
    work=work,
    impls={
        "gathered": Impl(lambda: gathered, "reference"),
        "sharded": Impl(lambda: sharded, "ours"),
        "torch.distributed.checkpoint": Impl(lambda: torch_dcp, "peer"),
    },
    subject="sharded",
    prepare=prepare,
    verify=verify,
    ranks=lambda case: case["ranks"],
)

if __name__ == "__main__":
    bench.main()
