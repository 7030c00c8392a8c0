"""Which algorithm: what the α-β model says of ours, beside what was measured of those that it does not know."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from mlsys.perf import _checks
from mlsys.perf.collectives import ALGORITHMS, chain_segments, cost, hierarchical_parts

# How far a modelled time is trusted beside a measured one: it leaves out what Python and busy cores add.
_MODELLED = 1.25
# Algorithms in which a host's ranks do not all send abroad at once.
_ONE_ABROAD = ("ring", "chain", "scatter_all_gather")


@dataclass(frozen=True)
class Links:
    """What a message costs between the ranks of a group.

    alpha, beta: seconds a message, and seconds a byte, between neighbours in rank order; over the slowest of the links.
    gamma:       seconds to combine a byte with another.
    local:       ranks on each host, where ranks are numbered host by host and all hosts have as many; else None.
    local_alpha, local_beta: within a host; by default as between hosts.

    The defaults are of gloo on one host, and rough: a `Communicator` measures.
    """

    alpha: float = 80e-6
    beta: float = 0.5e-9
    gamma: float = 0.1e-9
    local: int | None = None
    local_alpha: float | None = None
    local_beta: float | None = None

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma", "local_alpha", "local_beta"):
            value = getattr(self, name)
            if value is not None:
                _checks.amount(name, value)
        if self.local is not None:
            _checks.whole("local", self.local)


@dataclass(frozen=True)
class Choice:
    """The algorithm for one size of vector: `seconds` it should take, and those of all that could, best first.

    `measured` are those whose times come from measuring rather than from the model. Those are trusted more, so that the
    order is not always that of the seconds.
    """

    operation: str
    nbytes: int
    ranks: int
    algorithm: str
    seconds: float
    ranking: Mapping[str, float]
    measured: frozenset[str] = field(default_factory=frozenset)

    @property
    def why(self) -> str:
        """One sentence."""
        return str(self)

    def __str__(self) -> str:
        def said(name: str) -> str:
            seconds = self.ranking[name]
            time = f"{seconds * 1e3:.3g} ms" if math.isfinite(seconds) else "not measured"
            return f"{name} {time}{' (measured)' if name in self.measured else ''}"

        others = ", ".join(said(name) for name in self.ranking if name != self.algorithm)
        size = f"{self.nbytes / 2**20:.3g} MiB" if self.nbytes >= 2**20 else f"{self.nbytes} B"
        first = f"{self.operation} of {size} over {self.ranks} ranks: {said(self.algorithm)}"
        return f"{first}; behind it {others}" if others else first


def modelled(operation: str, n: int, nbytes: int, links: Links) -> dict[str, float]:
    """Seconds of every algorithm of `mlsys.perf.collectives` that can serve `n` ranks.

    The ranks of a host share its network card. Where all of them send to other hosts in the same step each gets a part
    of it; around a ring, one of them sends abroad. Every algorithm whose ranks are not in a ring is charged the former.
    """
    local = links.local if links.local and 1 < links.local < n and n % links.local == 0 else None
    seconds = {}
    for name in ALGORITHMS[operation]:
        if name in ("halving", "doubling") and n & (n - 1):
            continue
        if name == "hierarchical":
            if local is None:
                continue
            inside, across = hierarchical_parts(n, nbytes, local)
            here = (
                links.alpha if links.local_alpha is None else links.local_alpha,
                links.beta if links.local_beta is None else links.local_beta,
            )
            seconds[name] = inside.seconds(*here, links.gamma) + across.seconds(
                links.alpha, links.beta * local, links.gamma
            )
            continue
        beta = links.beta if name in _ONE_ABROAD or local is None else links.beta * local
        segments = chain_segments(n, nbytes, links.alpha, links.beta) if name == "chain" else None
        seconds[name] = cost(operation, name, n, nbytes, segments=segments).seconds(links.alpha, beta, links.gamma)
    return seconds


def choose(
    operation: str,
    n: int,
    nbytes: int,
    links: Links,
    lines: Mapping[tuple[str, str], tuple[float, float]] = MappingProxyType({}),
) -> Choice:
    """The fastest for a vector of `nbytes`; `lines` are (seconds, seconds a byte) of what was measured."""
    _checks.known("operation", operation, ALGORITHMS)
    measured = {
        name: fixed + slope * nbytes
        for (measured_operation, name), (fixed, slope) in lines.items()
        if measured_operation == operation
    }
    seconds = modelled(operation, n, nbytes, links)
    ranking = dict(sorted((seconds | measured).items(), key=lambda item: item[1]))
    # On one host a message is two copies and two system calls more than shared memory needs. That decides: times of a
    # moment, in which another program may have run, say less.
    trust = {name: _MODELLED for name in ranking if measured and name not in measured}
    order = sorted(ranking, key=lambda name: (name != "shared_memory", ranking[name] * trust.get(name, 1.0)))
    ranking = {name: ranking[name] for name in order}
    return Choice(operation, nbytes, n, order[0], ranking[order[0]], ranking, frozenset(measured))
