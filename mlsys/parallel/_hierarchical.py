"""Hosts of several ranks each: rings inside the hosts, then rings across them with what is left to reduce.

Inside a host of k ranks a reduce-scatter leaves each rank 1/k of the vector; the i-th ranks of all hosts all-reduce
theirs; an all-gather inside ends it. A host's network card carries 2S(g−1)/g for g hosts, less than the 2S(n−1)/n of
one ring through all ranks, and in 2(g−1) steps instead of 2(n−1).
"""

from torch import Tensor

from mlsys.parallel import _ring
from mlsys.parallel._p2p import Wire, even
from mlsys.parallel._reduce import Reduction


def all_reduce(wire: Wire, flat: Tensor, reduction: Reduction, local: int) -> None:
    """2(k−1) + 2(g−1) steps for g hosts of k = `local` ranks, numbered host by host."""
    host, place = divmod(wire.rank, local)
    inside = wire.among(range(host * local, (host + 1) * local))
    across = wire.among(range(place, wire.size, local))
    parts = flat.split(even(flat.numel(), local))
    mine = parts[place]
    _ring.reduce_scatter(inside, mine, parts, reduction.unfinished())
    if across.size > 1:
        _ring.all_reduce(across, mine, reduction)
    else:
        reduction.finish(mine)
    _ring.all_gather(inside, parts)
