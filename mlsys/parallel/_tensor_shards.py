"""Which part of each parameter is whose: a table from names to cuts, and what follows from a cut.

    name                                  cut along   into shares
    token_embedding.weight, head.weight   rows        n, padded: ⌈vocab/n⌉ rows each
    attention.q (weight, bias)            rows        n, of whole heads
    attention.k, attention.v              rows        n, or one a key/value head where there are fewer of them
    attention.o.weight                    columns     n
    mlp.gate, mlp.up (weight, bias)       rows        n
    mlp.down.weight                       columns     n
    norms, positions, biases of o, down   not cut     one, which every rank has

A matrix that is (out, in) in torch is the transpose of the papers': cut by rows here is cut by columns there.

See also:
    `mlsys.parallel.tensor`, `mlsys.perf.tensor_parallel.shard_parameters` (how much that makes for a device).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlsys.perf.configs import Config

ROWS = ("q.weight", "q.bias", "gate.weight", "gate.bias", "up.weight", "up.bias")
KEY_VALUE = ("k.weight", "k.bias", "v.weight", "v.bias")
COLUMNS = ("o.weight", "down.weight")
VOCAB = ("token_embedding.weight", "head.weight")


class Cut(NamedTuple):
    """A parameter cut along `dim`, of size `size` there, into `shares`; rank r of n has share r·shares // n.

    dim None: not cut.
    """

    dim: int | None
    shares: int
    size: int

    @property
    def each(self) -> int:
        """Size of a share along `dim`, padding included."""
        return -(-self.size // self.shares)

    def which(self, rank: int, n: int) -> int:
        """Which share is this rank's."""
        return rank * self.shares // n

    def is_first(self, rank: int, n: int) -> bool:
        """Whether no lower rank has the same share."""
        return rank == 0 or self.which(rank, n) != self.which(rank - 1, n)

    def bounds(self, rank: int, n: int) -> tuple[int, int]:
        """Where this rank's share begins and ends along `dim`; the end is before any padding."""
        index = self.which(rank, n)
        return min(index * self.each, self.size), min((index + 1) * self.each, self.size)

    def share(self, whole: Any, rank: int, n: int) -> Tensor:
        """A copy of this rank's share of `whole`, which may also be the slice of a safetensors file."""
        if self.dim is None:
            return whole[:].clone(memory_format=torch.contiguous_format)
        start, stop = self.bounds(rank, n)
        share: Tensor = whole[start:stop] if self.dim == 0 else whole[:, start:stop]
        if stop - start == self.each:
            return share.clone(memory_format=torch.contiguous_format)
        padded = share.new_zeros((self.each, *share.shape[1:]))  # only a vocabulary is padded, and that by rows
        padded[: stop - start] = share
        return padded

    def joined(self, shares: Sequence[Tensor]) -> Tensor:
        """The whole from the shares of all ranks, in order, without padding."""
        if self.dim is None:
            return shares[0].clone()
        n = len(shares)
        different = [share for rank, share in enumerate(shares) if self.is_first(rank, n)]
        return torch.cat(different, self.dim).narrow(self.dim, 0, self.size).contiguous()


def cut_of(name: str, config: Config, n: int) -> Cut:
    """How the parameter of this name, as in `Transformer(config)`, is cut for n ranks."""
    last_two = ".".join(name.split(".")[-2:])
    if last_two in VOCAB:
        return Cut(0, n, config.vocab)
    if last_two in KEY_VALUE:
        return Cut(0, min(n, config.kv_heads), config.kv_heads * config.head_dim)
    if last_two in ROWS:
        return Cut(0, n, config.heads * config.head_dim if last_two.startswith("q") else config.d_ff)
    if last_two in COLUMNS:
        return Cut(1, n, config.heads * config.head_dim if last_two.startswith("o") else config.d_ff)
    return Cut(None, 1, 0)


def check_divides(config: Config, n: int) -> None:
    """Raise ValueError unless n ranks can have equal shares of this config."""
    for name in ("heads", "d_ff"):
        value = getattr(config, name)
        if value % n:
            raise ValueError(f"config.{name}={value} cannot be shared out to {n} ranks: take a number that divides it")
    if config.kv_heads % n and n % config.kv_heads:
        raise ValueError(
            f"config.kv_heads={config.kv_heads} and {n} ranks: one must divide the other, to share the key/value heads "
            "out or to copy them"
        )
