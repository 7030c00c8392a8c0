"""Bruck's algorithms: any number of ranks in ⌈log₂ n⌉ steps, for the price of moving blocks about in memory.

In step k rank r talks to r − 2ᵏ and r + 2ᵏ, around the circle.

All-gather: r keeps the blocks r, r+1, r+2, … in this order, and each step gets as many again from the rank that has the
next ones. All-to-all: the block for rank r+d must go d ranks on; in step k all blocks whose d has bit k set move 2ᵏ on.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mlsys.parallel._p2p import Wire


def all_gather(wire: Wire, output: Tensor, sizes: Sequence[int]) -> None:
    """⌈log₂ n⌉ steps and S(n−1)/n bytes. This rank's part is in its place in `output` already."""
    n, rank = wire.size, wire.rank
    if n == 1:
        return
    parts = output.split(list(sizes))
    order = [(rank + away) % n for away in range(n)]
    ends = [0]
    for block in order:
        ends.append(ends[-1] + sizes[block])
    held = torch.empty_like(output)  # the blocks in `order`; not scratch of the wire, which may be in use
    held[: ends[1]] = parts[rank]
    have = 1
    while have < n:
        more = min(have, n - have)
        give, take = held[: _length(sizes, rank, more)], held[ends[have] : ends[have + more]]
        wire.move([(give, (rank - have) % n)], [(take, (rank + have) % n)])
        have += more
    for place, block in enumerate(order[1:], start=1):
        parts[block].copy_(held[ends[place] : ends[place + 1]])


def all_to_all(wire: Wire, output: Tensor, flat: Tensor) -> None:
    """⌈log₂ n⌉ steps; a block is sent as often as its distance has bits: about S/2 bytes a step."""
    n, rank = wire.size, wire.rank
    each = flat.numel() // n
    # Row d: first what goes d ranks on, in the end what has come d ranks.
    blocks = flat.view(n, each).roll(-rank, 0)
    reach = 1
    while reach < n:
        moving = torch.tensor([way for way in range(n) if way & reach], device=flat.device)
        give = blocks.view(torch.uint8).index_select(0, moving) if each else blocks[:0].view(torch.uint8)
        take = torch.empty_like(give)
        wire.move([(give.view(-1), (rank + reach) % n)], [(take.view(-1), (rank - reach) % n)])
        if each:
            blocks.view(torch.uint8).index_copy_(0, moving, take)
        reach *= 2
    source = torch.tensor([(rank - way) % n for way in range(n)], device=flat.device)
    if each:
        output.view(n, each).view(torch.uint8).index_copy_(0, source, blocks.view(torch.uint8))


def _length(sizes: Sequence[int], first: int, count: int) -> int:
    return sum(sizes[(first + away) % len(sizes)] for away in range(count))
