"""Straight to where it belongs: pairwise all-to-all, gather and scatter."""

from collections.abc import Sequence

from torch import Tensor

from mlsys.parallel._p2p import AHEAD, Pending, Wire, copy, pipeline


def all_to_all(wire: Wire, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """n−1 steps: in step i to rank r+i, from rank r−i, so that nobody gets two messages at once. Parts of any size."""
    n, rank = wire.size, wire.rank
    copy(outputs[rank], inputs[rank])

    def post(item: int) -> Pending:
        to, source = (rank + item + 1) % n, (rank - item - 1) % n
        return wire.post([(inputs[to], to)], [(outputs[source], source)])

    pipeline(wire, n - 1, AHEAD, post, lambda item: None)


def gather(wire: Wire, outputs: Sequence[Tensor], mine: Tensor, root: int) -> None:
    """Everyone to the root, which takes them as they come."""
    if wire.rank != root:
        wire.move([(mine, root)], [])
        return
    wire.move([], [(part, rank) for rank, part in enumerate(outputs) if rank != root])
    copy(outputs[root], mine)


def scatter(wire: Wire, mine: Tensor, inputs: Sequence[Tensor], root: int) -> None:
    """The root to everyone."""
    if wire.rank != root:
        wire.move([], [(mine, root)])
        return
    wire.move([(part, rank) for rank, part in enumerate(inputs) if rank != root], [])
    copy(mine, inputs[root])
