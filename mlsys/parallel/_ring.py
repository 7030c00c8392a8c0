"""Rings: everything goes to the next rank, everything comes from the one before; all links are busy all the time.

Reduce-scatter: part c starts at rank c+1 and goes once around; every rank adds its own, and rank c, the last, has the
sum. All-gather: complete parts go around the same way. Both after one another are an all-reduce. In step k rank r sends
part r−k−1 and receives part r−k−2 (mod n), in the reduce-scatter (k < n−1) as in the all-gather that follows it.

Parts are cut into segments, and `width` segments at a time (a wave) go through all steps before the next are touched:
while one is added the next arrives, and what has just been added is sent on out of the cache. All places of a wave are
announced before its first message: gloo asks before it sends, and a place that waits saves the question.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from mlsys.parallel._p2p import AHEAD, KEEP, Cut, Wire, copy, even
from mlsys.parallel._reduce import Reduction

Segments = list[Tensor]  # of one part, those of a wave


def all_reduce(wire: Wire, flat: Tensor, reduction: Reduction) -> None:
    """2(n−1) steps; each rank sends 2S(n−1)/n."""
    n, rank = wire.size, wire.rank
    if n == 1:
        return
    steps = 2 * (n - 1)
    parts = flat.split(even(flat.numel(), n))
    for cut, room, wave in _waves(wire, parts, flat, rooms=n - 1):
        arriving = wire.expect(
            # In the second half, into its own place: it is made of what this rank had sent from there.
            (room[step * cut.width + i][: own.numel()] if step < n - 1 else own, (rank - 1) % n)
            for step in range(steps)
            for i, own in enumerate(wave[(rank - step - 2) % n])
        )
        for step in range(steps + 1):
            for i in range(cut.width):
                if step > 0:
                    got, own = arriving.next(), wave[(rank - step - 1) % n][i]
                    if step < n:
                        reduction.combine(got, own, out=own)
                    if step == n - 1:
                        reduction.finish(own)
                if step < steps:
                    arriving.send(wave[(rank - step - 1) % n][i], (rank + 1) % n)
        arriving.end()


def reduce_scatter(wire: Wire, output: Tensor, parts: Sequence[Tensor], reduction: Reduction) -> None:
    """n−1 steps; each rank sends S(n−1)/n. `parts` stay as they are; `output` may be this rank's part."""
    n, rank = wire.size, wire.rank
    if n == 1:
        copy(output, parts[0])
        return
    done = 0
    for cut, room, wave in _waves(wire, parts, output, rooms=n - 1):
        places = [
            [room[step * cut.width + i][: own.numel()] for i, own in enumerate(wave[(rank - step - 2) % n])]
            for step in range(n - 1)
        ]
        arriving = wire.expect((place, (rank - 1) % n) for step in places for place in step)
        for step in range(n):
            for i in range(cut.width):
                if step > 0:
                    got, own = arriving.next(), wave[(rank - step - 1) % n][i]
                    total = cut.piece(output, done + i) if step == n - 1 else got
                    reduction.combine(got, own, out=total)
                    if step == n - 1:
                        reduction.finish(total)
                if step < n - 1:
                    arriving.send(places[step - 1][i] if step else wave[(rank - 1) % n][i], (rank + 1) % n)
        arriving.end()
        done += cut.width


def all_gather(wire: Wire, parts: Sequence[Tensor]) -> None:
    """n−1 steps; each rank sends S(n−1)/n. This rank's part is in its place already."""
    n, rank = wire.size, wire.rank
    if n == 1:
        return
    for cut, _, wave in _waves(wire, parts, parts[0], rooms=0):
        arriving = wire.expect(
            (place, (rank - 1) % n) for step in range(n - 1) for place in wave[(rank - step - 1) % n]
        )
        for step in range(n):
            for i in range(cut.width):
                if step > 0:
                    arriving.next()
                if step < n - 1:
                    arriving.send(wave[(rank - step) % n][i], (rank + 1) % n)
        arriving.end()


def _waves(
    wire: Wire, parts: Sequence[Tensor], like: Tensor, rooms: int
) -> Iterator[tuple[Cut, Sequence[Tensor], list[Segments]]]:
    """How parts are cut, scratch for a wave's segments `rooms` times over, and each wave's segments of each part."""
    most = min(wire.segment, KEEP // max(1, rooms * AHEAD)) // like.element_size()
    cut = Cut.of(max(part.numel() for part in parts), most)
    if not cut.step:
        return
    room = wire.scratch(like, cut.step * cut.width * rooms).split(cut.step) if rooms else ()
    for first in range(0, cut.count, cut.width):
        yield cut, room, [[cut.piece(part, first + i) for i in range(cut.width)] for part in parts]
