"""Published numbers about tensor and sequence parallelism, counted on this library's ranks: calls, bytes, memory.

The formulas are also claims of `mlsys.perf`, which evaluates them; here they are held against what really happens in a
block of GPT's kind, without dropout, since the library's models have none.
"""

from __future__ import annotations

from typing import Any

from mlsys.claims._parallel_counted import RANKS, on_ranks
from mlsys.claims._parallel_memory import KORTHIKANTI
from mlsys.claims.core import Claim

MEGATRON = "Shoeybi et al. 2019, arXiv:1909.08053"
NARAYANAN = "Narayanan et al. 2021, arXiv:2104.04473"


def counted() -> dict[str, float]:
    """What the processes call, send and hold in one block."""
    return on_ranks(_count)


def _count() -> dict[str, float]:
    """Runs in each rank."""
    import torch

    from mlsys.models.transformer import Transformer
    from mlsys.parallel.tensor import parallelize
    from mlsys.parallel.traffic import ledger
    from mlsys.perf.configs import gpt

    b, t, d = 2, 32, 64
    config = gpt(1, d, 8, vocab=64, context=t, bias=False)
    torch.manual_seed(0)
    model = Transformer(config)
    x = torch.randn(b, t, d)
    alone = model.blocks[0]
    whole, _ = _kept(lambda: alone(x.clone().requires_grad_(), None, None, 0), alone)
    found: dict[str, float] = {}
    for name, sequence_parallel in (("TP", False), ("TP+SP", True)):
        # by the backend, so that bytes are those of rings
        made = parallelize(model, sequence_parallel=sequence_parallel, algorithm="backend")
        block = made.blocks[0]
        mine = (x.chunk(RANKS, dim=1)[made.rank] if sequence_parallel else x).clone().requires_grad_()
        with ledger() as ahead:
            held, y = _kept(lambda block=block, mine=mine: block(mine, None, None, 0), block)
        with ledger() as back:
            y.sum().backward()
        found[f"{name} held"] = held / whole
        for when, book in (("forward", ahead), ("backward", back)):
            for operation in ("all_reduce", "all_gather", "reduce_scatter"):
                found[f"{name} {when} {operation}"] = book.calls[operation]
            # without the sums of the norms' gradients, which the papers leave out
            norms = book.bytes["all_reduce"] if sequence_parallel else 0.0
            found[f"{name} {when}"] = (book.sent - norms) / (b * t * d * 4)
    return found


def _kept(run: Any, module: Any) -> tuple[int, Any]:
    """Bytes that a forward pass leaves for the backward pass, beside weights, and its result."""
    import torch

    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights and tensor.is_floating_point():
            found[place] = tensor  # alive, so that no other gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values()), result


TENSOR = [
    Claim(
        name=f"counted-tensor-parallel-{when}-calls",
        area="parallel.tensor",
        source=f"{MEGATRON}, section 3",
        what=f"all-reduces of a block in the {when} pass, {RANKS} ranks, counted",
        unit="",
        published=2,
        digits=0,
        compute=lambda when=when: counted()[f"TP {when} all_reduce"],  # type: ignore[misc]
    )
    for when in ("forward", "backward")
] + [
    Claim(
        name="counted-tensor-parallel-bytes",
        area="parallel.tensor",
        source=f"{NARAYANAN}, section 3.2, 8bsh(t−1)/t at t = 4",
        what=f"numbers that a rank sends for a block, forward and backward, {RANKS} ranks, counted",
        unit="b·s·h",
        published=6.0,
        digits=2,
        formula=True,
        compute=lambda: counted()["TP forward"] + counted()["TP backward"],
    ),
    Claim(
        name="counted-sequence-parallel-calls",
        area="parallel.tensor",
        source=f"{KORTHIKANTI}, section 4.2.2",
        what=f"all-gathers and reduce-scatters of a block, forward and backward, {RANKS} ranks, counted",
        unit="",
        published=8,
        digits=0,
        tolerance=0.26,
        expected="approximate",
        reason="the paper counts four of each, and apart from them the two all-gathers of what is not kept for the "
        "backward pass, which overlap with computation there",
        compute=lambda: sum(
            counted()[f"TP+SP {when} {operation}"]
            for when in ("forward", "backward")
            for operation in ("all_gather", "reduce_scatter")
        ),
    ),
    Claim(
        name="counted-sequence-parallel-forward-bytes",
        area="parallel.tensor",
        source=f"{KORTHIKANTI}, section 4.2.2 (no communication overhead)",
        what=f"bytes that a block sends forward with sequence parallelism over those without, {RANKS} ranks, counted",
        unit="×",
        published=1.0,
        digits=2,
        compute=lambda: counted()["TP+SP forward"] / counted()["TP forward"],
    ),
    Claim(
        name="counted-sequence-parallel-activations",
        area="parallel.tensor",
        source=f"{KORTHIKANTI}, Table 2, tensor and sequence parallel over no parallelism, at t = 4",
        what=f"bytes that a block keeps for the backward pass over those of one process, {RANKS} ranks, counted",
        unit="×",
        published=0.25,
        digits=3,
        formula=True,
        compute=lambda: counted()["TP+SP held"],
    ),
]
