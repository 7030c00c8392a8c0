"""Doubling and halving: log₂ n steps, each with the rank whose number differs in one bit.

*Doubling*: what two ranks know they swap, so that each knows twice as much: the sum over 2, 4, 8, … ranks, or 1, 2, 4,
… parts. *Halving* runs it backwards: each step a rank gives away the half of the vector that its partner is to sum, and
sums the other.

Both need a power of two. An all-reduce over other counts folds: of the ranks too many, each gives its vector to a
partner before and gets the result after.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from mlsys.parallel._p2p import Wire, copy, even
from mlsys.parallel._reduce import Reduction


def doubling_all_reduce(wire: Wire, flat: Tensor, reduction: Reduction) -> None:
    """⌈log₂ n⌉ steps of the whole vector: the fewest steps there can be, so best for short vectors."""

    def core(inner: Wire) -> None:
        reach = 1
        while reach < inner.size:
            inner.combine(inner.rank ^ reach, reduction, give=flat, mine=flat)
            reach *= 2
        reduction.finish(flat)

    _folded(wire, flat, reduction, core)


def halving_doubling_all_reduce(wire: Wire, flat: Tensor, reduction: Reduction) -> None:
    """2⌈log₂ n⌉ steps and 2S(n−1)/n bytes: as few bytes as a ring in fewer steps, where n is a power of two."""

    def core(inner: Wire) -> None:
        bounds = _bounds(even(flat.numel(), inner.size))
        for peer, keep, give in _halvings(inner):
            inner.combine(peer, reduction, give=_range(flat, bounds, give), mine=_range(flat, bounds, keep))
        reduction.finish(_range(flat, bounds, (inner.rank, inner.rank + 1)))
        _double(inner, flat, bounds)

    _folded(wire, flat, reduction, core)


def halving_reduce_scatter(
    wire: Wire, output: Tensor, flat: Tensor, sizes: Sequence[int], reduction: Reduction
) -> None:
    """log₂ n steps and S(n−1)/n bytes. `flat` stays as it is; half of it is held beside it."""
    bounds = _bounds(sizes)
    origin, have = 0, flat  # `have` begins with part `origin`
    for peer, keep, give in _halvings(wire):
        shifted = [bound - bounds[origin] for bound in bounds]
        mine = _range(have, shifted, keep)
        last = keep[1] - keep[0] == 1
        total = output if last else have.new_empty(mine.numel()) if have is flat else mine
        wire.combine(peer, reduction, give=_range(have, shifted, give), mine=mine, out=total)
        origin, have = keep[0], total
    if wire.size == 1:
        copy(output, flat)
    reduction.finish(output)


def doubling_all_gather(wire: Wire, flat: Tensor, sizes: Sequence[int]) -> None:
    """log₂ n steps and S(n−1)/n bytes. This rank's part is in its place in `flat` already."""
    _double(wire, flat, _bounds(sizes))


def _folded(wire: Wire, flat: Tensor, reduction: Reduction, core: Callable[[Wire], None]) -> None:
    inner = 1 << (wire.size.bit_length() - 1)  # the largest power of two that is not above n
    partner = wire.rank ^ inner  # rank inner + i and rank i
    if wire.rank >= inner:
        wire.combine(partner, reduction, give=flat)
        wire.move([], [(flat, partner)])
        return
    if partner < wire.size:
        wire.combine(partner, reduction, mine=flat)
    core(wire.among(range(inner)))
    if partner < wire.size:
        wire.move([(flat, partner)], [])


def _halvings(wire: Wire) -> list[tuple[int, tuple[int, int], tuple[int, int]]]:
    """For each step the partner, the range of parts to keep, and the one to give away: with rank XOR n/2 first."""
    low, high, steps = 0, wire.size, []
    while high - low > 1:
        middle = (low + high) // 2
        lower, upper = (low, middle), (middle, high)
        keep, give = (lower, upper) if wire.rank < middle else (upper, lower)
        steps.append((wire.rank ^ (middle - low), keep, give))
        low, high = keep
    return steps


def _double(wire: Wire, flat: Tensor, bounds: Sequence[int]) -> None:
    """The steps of `_halvings` backwards: give what was kept, take what was given away."""
    for peer, keep, give in reversed(_halvings(wire)):
        wire.move([(_range(flat, bounds, keep), peer)], [(_range(flat, bounds, give), peer)])


def _bounds(sizes: Sequence[int]) -> list[int]:
    """Where each part begins, and the end."""
    bounds = [0]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    return bounds


def _range(flat: Tensor, bounds: Sequence[int], parts: tuple[int, int]) -> Tensor:
    return flat[bounds[parts[0]] : bounds[parts[1]]]
