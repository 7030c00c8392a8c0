"""Which keys a query sees: the band of `causal` and `window`, said once for whole rows, for tiles and as a mask.

Query i of t stands at key position p = i + s − t, so that the last query stands at the
last key. It sees the keys p − left … p + right: a band along the aligned diagonal.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Band(NamedTuple):
    """Query i of t sees the keys i + s − t − left … i + s − t + right of s."""

    t: int
    s: int
    left: int
    right: int

    @property
    def bounded(self) -> bool:
        """Whether some query does not see some key."""
        return self.left < self.s - 1 or self.right < self.t - 1

    @property
    def blind(self) -> int:
        """How many queries see no key at all: the first ones, for the last stands at a key and its band holds it."""
        return self.t if self.s == 0 else min(self.t, max(0, self.t - self.s - self.right))

    def keys(self, rows: slice) -> tuple[int, int]:
        """The keys that some query of a block sees, start and stop."""
        shift = self.s - self.t
        return max(0, rows.start + shift - self.left), min(self.s, rows.stop + shift + self.right)

    def query_blocks(self, block_q: int) -> Iterator[slice]:
        """Blocks of the queries that see a key."""
        for i in range(self.blind, self.t, block_q):
            yield slice(i, min(i + block_q, self.t))

    def widest(self, block_q: int) -> int:
        """At least as many keys as any block of queries sees."""
        return min(self.s, self.left + self.right + block_q)

    def hidden(self, device: torch.device) -> Tensor:
        """The whole band as a mask (t, s), True where a key is not seen."""
        ones = torch.ones(self.t, self.s, dtype=torch.bool, device=device)
        diagonal = self.s - self.t
        after = ones.triu(diagonal + self.right + 1)
        return after if self.left >= self.s - 1 else after | ones.tril(diagonal - self.left - 1)


def band(t: int, s: int, causal: bool, window: tuple[int, int]) -> Band:
    """The band of these options; −1 is no bound, which a bound beyond both lengths says as well."""
    unbounded = t + s
    left, right = (unbounded if side < 0 else side for side in window)
    return Band(t, s, min(left, unbounded), min(0 if causal else right, unbounded))
