"""A chain: the root gives the first segment to its neighbour and, while that one passes it on, the second."""

from torch import Tensor

from mlsys.parallel._p2p import AHEAD, Cut, Pending, Wire, pipeline


def broadcast(wire: Wire, flat: Tensor, root: int, segments: int) -> None:
    """n−2+k steps for k segments: each rank sends S once, and the last starts n−2 segments after the first."""
    n, place = wire.size, (wire.rank - root) % wire.size
    before, after = (wire.rank - 1) % n, (wire.rank + 1) % n
    step = -(-flat.numel() // max(1, min(segments, flat.numel())))
    if not step:
        return
    cut = Cut(step, -(-flat.numel() // step), 1)
    sent: list[Pending] = []

    def post(item: int) -> Pending:
        return wire.post([], [(cut.piece(flat, item), before)] if place else [])

    def arrived(item: int) -> None:
        if place < n - 1:
            sent.append(wire.post([(cut.piece(flat, item), after)], []))
        if len(sent) > AHEAD:  # keeps the root, which waits for nobody, from posting all at once
            wire.wait(sent.pop(0))

    pipeline(wire, cut.count, AHEAD, post, arrived)
    for pending in sent:
        wire.wait(pending)
