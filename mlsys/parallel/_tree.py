"""Binomial trees: in each step every rank that has the data gives it to one that has not, so that 2ᵏ have it after k.

Ranks are counted from the root. Rank v's parent is v without its lowest bit; its children are v + 1, v + 2, v + 4, … as
long as the step is below that bit. A reduction runs up the same tree, a scatter down it with the parts of the child's
subtree only.
"""

from collections.abc import Sequence

from torch import Tensor

from mlsys.parallel import _ring
from mlsys.parallel._p2p import Wire, even
from mlsys.parallel._reduce import Reduction


def all_reduce(wire: Wire, flat: Tensor, reduction: Reduction) -> None:
    """Up to rank 0 and down again: 2⌈log₂ n⌉ steps of the whole vector."""
    parent, children = _family(wire.rank, wire.size)
    for child in reversed(children):  # the nearest first: its subtree is the smallest, and done soonest
        wire.combine(child, reduction, mine=flat)
    if parent is None:
        reduction.finish(flat)
    else:
        wire.combine(parent, reduction, give=flat)
    broadcast(wire, flat, 0)


def broadcast(wire: Wire, flat: Tensor, root: int) -> None:
    """⌈log₂ n⌉ steps of the whole vector."""
    rotated, _ = _from_root(wire, root)
    parent, children = _family(rotated.rank, rotated.size)
    if parent is not None:
        rotated.move([], [(flat, parent)])
    for child in children:  # the largest subtree first
        rotated.move([(flat, child)], [])


def scatter_all_gather(wire: Wire, flat: Tensor, root: int) -> None:
    """Scatter n parts down the tree, then gather them round a ring: 2S(n−1)/n bytes instead of S·log₂ n."""
    rotated, n = _from_root(wire, root)
    parts = flat.split(even(flat.numel(), n))
    parent, children = _family(rotated.rank, n)
    if parent is not None:
        rotated.move([], [(_subtree(flat, parts, rotated.rank, n), parent)])
    for child in children:
        rotated.move([(_subtree(flat, parts, child, n), child)], [])
    _ring.all_gather(rotated, parts)


def _from_root(wire: Wire, root: int) -> tuple[Wire, int]:
    """The same ranks counted from the root."""
    n = wire.size
    return (wire.among([(root + rank) % n for rank in range(n)]) if root else wire), n


def _family(rank: int, n: int) -> tuple[int | None, list[int]]:
    """Parent (None for the root) and children, the farthest first."""
    lowest = rank & -rank or 1 << (n - 1).bit_length()
    steps = [1 << bit for bit in reversed(range(lowest.bit_length() - 1))]
    return (rank & (rank - 1) if rank else None), [rank + step for step in steps if rank + step < n]


def _subtree(flat: Tensor, parts: Sequence[Tensor], rank: int, n: int) -> Tensor:
    """The parts of `rank` and of all below it, which lie together."""
    last = min(n, rank + (rank & -rank))
    start = sum(part.numel() for part in parts[:rank])
    return flat[start : start + sum(part.numel() for part in parts[rank:last])]
