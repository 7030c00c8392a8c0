"""What a collective costs: count its messages and its bytes, then put in the latency and the bandwidth of the links.

The α-β model: a message of m bytes takes α + β·m seconds (α seconds of latency,
β seconds a byte, the inverse of the bandwidth), and combining m bytes with what is
there takes γ·m. In one step each rank sends at most one message and receives at
most one, both at full speed; a step lasts as long as its longest message. So

    seconds = steps·α + path_bytes·β + reduced_bytes·γ        path_bytes: the longest message of each step, summed

`size`, S below, is always the bytes of the *whole* vector, as nccl-tests counts it:

    all_reduce      the vector that every rank has before and after
    reduce_scatter  what every rank has before; after, a rank has S/n
    all_gather      what every rank has after; before, a rank has S/n
    all_to_all      what every rank has before and after: n blocks of S/n
    broadcast       the vector of the root, which is rank 0

S is divided into n equal parts; a remainder is not modelled. With L = ⌈log₂ n⌉:

    operation       algorithm            steps           bytes on the path        n
    reduce_scatter  ring                 n−1             S(n−1)/n                 any
                    halving              L               S(n−1)/n                 power of 2
    all_gather      ring                 n−1             S(n−1)/n                 any
                    doubling             L               S(n−1)/n                 power of 2
                    bruck                L               S(n−1)/n                 any
    all_reduce      ring                 2(n−1)          2S(n−1)/n                any
                    halving_doubling     2L              2S(n−1)/n                any, see below
                    recursive_doubling   L               S·L                      any, see below
                    tree                 2L              2S·L                     any
                    hierarchical         2(k−1)+2(g−1)   2S(n−1)/n                n = g groups of k = `local`
    all_to_all      pairwise             n−1             S(n−1)/n                 any
                    bruck                L               about S·L/2              any
    broadcast       tree                 L               S·L                      any
                    scatter_all_gather   L+n−1           2S(n−1)/n                any
                    chain                n−2+k           S(n−2+k)/k               any, k = `segments`

Where n is no power of two, `halving_doubling` and `recursive_doubling` fold: of the
r = n − 2^⌊log₂ n⌋ ranks too many, each first gives its vector to a partner and at the
end gets the result from it. That is 2 steps and 2S bytes more than for 2^⌊log₂ n⌋
ranks. `halving` and `doubling` have no such way out and raise ValueError.

No all-reduce can send less than 2S(n−1)/n a rank, and none can end in fewer than L
steps; none here does both. Small vectors want few steps, large ones few bytes.

Cost:
    Constant or O(n) arithmetic for each call.

Communication:
    None: this module counts it.

Papers:
    Hockney 1994, "The communication challenge for MPP: Intel Paragon and Meiko CS-2", Parallel Computing 20 (α and β).
    Thakur, Rabenseifner & Gropp 2005, "Optimization of Collective Communication Operations in MPICH", IJHPCA 19(1).
    Rabenseifner 2004, "Optimization of Collective Reduction Operations", ICCS (halving-doubling and the fold).
    Patarasuk & Yuan 2009, "Bandwidth Optimal All-reduce Algorithms for Clusters of Workstations", JPDC 69(2) (ring).
    Bruck et al. 1997, "Efficient Algorithms for All-to-All Communications in Multiport Message-Passing Systems", IEEE
    TPDS 8(11).
    Chan et al. 2007, "Collective communication: theory, practice, and experience", CCPE 19(13) (the lower bounds).
    NVIDIA nccl-tests, doc/PERFORMANCE.md (algorithm and bus bandwidth).

See also:
    `mlsys.perf.zero` (which collectives data parallelism runs), `mlsys.perf.tensor_parallel`, `mlsys.perf.hardware`
    (links of published machines).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mlsys.perf import _checks


@dataclass(frozen=True)
class Cost:
    """What one collective does.

    steps:          messages one after the other on the longest path: each costs α.
    bytes_per_rank: bytes that the busiest rank sends.
    reduced_bytes:  bytes that the busiest rank combines with its own.
    path_bytes:     the longest message of each step, summed: what β multiplies. It is more than `bytes_per_rank`
                    where ranks wait for one another, as in a tree.
    """

    steps: int = 0
    bytes_per_rank: float = 0.0
    reduced_bytes: float = 0.0
    path_bytes: float = 0.0

    def seconds(self, alpha: float, beta: float, gamma: float = 0.0) -> float:
        """Seconds with `alpha` seconds a message, `beta` seconds a byte sent, `gamma` seconds a byte combined."""
        for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
            _checks.amount(name, value)
        return self.steps * alpha + self.path_bytes * beta + self.reduced_bytes * gamma

    def __add__(self, other: Cost) -> Cost:
        """One after the other, where the same rank is the busiest in both."""
        return Cost(
            self.steps + other.steps,
            self.bytes_per_rank + other.bytes_per_rank,
            self.reduced_bytes + other.reduced_bytes,
            self.path_bytes + other.path_bytes,
        )


ALGORITHMS: Mapping[str, tuple[str, ...]] = {
    "all_reduce": ("ring", "halving_doubling", "recursive_doubling", "tree", "hierarchical"),
    "reduce_scatter": ("ring", "halving"),
    "all_gather": ("ring", "doubling", "bruck"),
    "all_to_all": ("pairwise", "bruck"),
    "broadcast": ("tree", "scatter_all_gather", "chain"),
}


def cost(
    operation: str,
    algorithm: str,
    n: int,
    size: float,
    *,
    local: int | None = None,
    segments: int | None = None,
) -> Cost:
    """What `operation` over `n` ranks and `size` bytes (of the whole vector, see the module) does with `algorithm`.

    `local`, only for "hierarchical", is the ranks of one group (a node); `segments`, only for "chain", into how many
    pieces the vector is cut. Names are in `ALGORITHMS`. One rank alone costs nothing.
    Raises ValueError for unknown names, n < 1, size < 0, and an n that the algorithm cannot serve.
    """
    _check(operation, algorithm, n, size, local, segments)
    if n == 1:
        return Cost()
    functions = {
        "all_reduce": _all_reduce,
        "reduce_scatter": _reduce_scatter,
        "all_gather": _all_gather,
        "all_to_all": _all_to_all,
    }
    if operation == "broadcast":
        return _broadcast(algorithm, n, size, segments or 1)
    if algorithm == "hierarchical":
        inside, across = hierarchical_parts(n, size, local or 1)
        return inside + across
    return functions[operation](algorithm, n, size)


def hierarchical_parts(n: int, size: float, local: int) -> tuple[Cost, Cost]:
    """The hierarchical all-reduce in two parts: inside the groups of `local` ranks, and across groups.

    Rings reduce-scatter inside each group, all-reduce across the groups the 1/`local` that a rank then has, and
    all-gather inside. A rank sends as much in all as with one ring, but only 1/`local` of it over the slow links, and
    in fewer steps. Give each part the α and β of its own links.
    """
    _check("all_reduce", "hierarchical", n, size, local, None)
    groups = n // local
    inside = _reduce_scatter("ring", local, size) + _all_gather("ring", local, size)
    return inside, _all_reduce("ring", groups, size / local)


def chain_segments(n: int, size: float, alpha: float, beta: float) -> int:
    """Into how many pieces to cut a "chain" broadcast so that it is fastest: √((n−2)·S·β/α), to a whole number.

    More pieces fill the chain sooner, and each costs another α. At most one piece a byte.
    """
    _checks.whole("n", n)
    for name, value in (("size", size), ("alpha", alpha), ("beta", beta)):
        _checks.amount(name, value)
    most = max(1, math.floor(size))
    if n <= 2:
        return 1
    ideal = math.sqrt((n - 2) * size * beta / alpha) if alpha else math.inf
    if ideal >= most:
        return most
    below = max(1, math.floor(ideal))
    return min((below, below + 1), key=lambda k: _chain(n, size, k).seconds(alpha, beta))


def ranking(
    operation: str,
    n: int,
    size: float,
    alpha: float,
    beta: float,
    *,
    gamma: float = 0.0,
    local: int | None = None,
) -> dict[str, float]:
    """Seconds of every algorithm that can serve `n` ranks, the fastest first.

    "hierarchical" is among them if `local` is given; "chain" is cut as `chain_segments` says.
    """
    _checks.known("operation", operation, ALGORITHMS)
    _checks.whole("n", n)
    seconds = {}
    for algorithm in ALGORITHMS[operation]:
        if algorithm in ("halving", "doubling") and not _is_power_of_two(n):
            continue
        if algorithm == "hierarchical" and local is None:
            continue
        one = cost(
            operation,
            algorithm,
            n,
            size,
            local=local if algorithm == "hierarchical" else None,
            segments=chain_segments(n, size, alpha, beta) if algorithm == "chain" else None,
        )
        seconds[algorithm] = one.seconds(alpha, beta, gamma)
    return dict(sorted(seconds.items(), key=lambda item: item[1]))


def best(
    operation: str,
    n: int,
    size: float,
    alpha: float,
    beta: float,
    *,
    gamma: float = 0.0,
    local: int | None = None,
) -> str:
    """The fastest algorithm of `ranking`; of equally fast ones the first in `ALGORITHMS`."""
    return next(iter(ranking(operation, n, size, alpha, beta, gamma=gamma, local=local)))


def crossover(
    operation: str,
    algorithm_a: str,
    algorithm_b: str,
    n: int,
    alpha: float,
    beta: float,
    *,
    gamma: float = 0.0,
    local: int | None = None,
    segments: int | None = None,
) -> float | None:
    """The bytes at which both algorithms take equally long; None if one of them is never the slower.

    Both times are straight lines over the size: below the crossover the one of fewer steps wins, above it the other.
    """
    lines = []
    for algorithm in (algorithm_a, algorithm_b):
        one = cost(
            operation,
            algorithm,
            n,
            1,
            local=local if algorithm == "hierarchical" else None,
            segments=segments if algorithm == "chain" else None,
        )
        lines.append((one.seconds(alpha, 0), one.seconds(0, beta, gamma)))  # where the line starts, and its slope
    (fixed_a, slope_a), (fixed_b, slope_b) = lines
    if (fixed_a - fixed_b) * (slope_b - slope_a) <= 0:
        return None
    return (fixed_a - fixed_b) / (slope_b - slope_a)


def bus_bandwidth(operation: str, n: int, size: float, seconds: float) -> float:
    """Bytes/s that each link carried, had the best possible algorithm run: comparable over n and with a data sheet.

    It is size/seconds, the "algorithm bandwidth", times 2(n−1)/n for all_reduce, (n−1)/n for reduce_scatter, all_gather
    and all_to_all, and 1 for broadcast: the factors of nccl-tests. 0 for one rank, which sends nothing.
    """
    _checks.known("operation", operation, ALGORITHMS)
    _checks.whole("n", n)
    _checks.amount("size", size)
    _checks.amount("seconds", seconds, positive=True)
    if n == 1:
        return 0.0
    passes = {"all_reduce": 2 * (n - 1) / n, "broadcast": 1.0}
    return size / seconds * passes.get(operation, (n - 1) / n)


# --- the algorithms ---------------------------------------------------------------------------------------------------
# n ≥ 1 and size ≥ 0 from here on; `part` is the n-th of the vector.


def _reduce_scatter(algorithm: str, n: int, size: float) -> Cost:
    sent = size * (n - 1) / n
    if algorithm == "ring":  # part i goes once around and is added to at every rank
        return Cost(n - 1, sent, sent, sent)
    return Cost(_log2(n), sent, sent, sent)  # halving: swap halves with rank XOR n/2, then quarters with XOR n/4, …


def _all_gather(algorithm: str, n: int, size: float) -> Cost:
    sent = size * (n - 1) / n
    steps = n - 1 if algorithm == "ring" else _log2(n)  # doubling and bruck: all parts so far, twice as many each time
    return Cost(steps, sent, 0.0, sent)


def _all_reduce(algorithm: str, n: int, size: float) -> Cost:
    if algorithm == "ring":
        return _reduce_scatter("ring", n, size) + _all_gather("ring", n, size)
    if algorithm == "tree":  # everything to rank 0 along a binomial tree, and back; rank 0 is the busiest
        levels = _log2(n)
        return Cost(2 * levels, levels * size, levels * size, 2 * levels * size)
    inner = 1 << (n.bit_length() - 1)  # the largest power of two that is not above n
    levels = _log2(inner)
    if algorithm == "recursive_doubling":  # swap whole vectors with rank XOR 1, XOR 2, XOR 4, …
        core = Cost(levels, levels * size, levels * size, levels * size)
    else:
        core = _reduce_scatter("halving", inner, size) + _all_gather("doubling", inner, size)
    # The fold: a partner receives and adds a vector before, and sends one after.
    return core if inner == n else core + Cost(2, size, size, 2 * size)


def _all_to_all(algorithm: str, n: int, size: float) -> Cost:
    part = size / n
    if algorithm == "pairwise":  # in step i, block r+i straight to its rank
        return Cost(n - 1, (n - 1) * part, 0.0, (n - 1) * part)
    # Bruck: in step i every block whose way has bit i set moves 2^i ranks on: it moves as often as its way has bits.
    blocks = sum(way.bit_count() for way in range(n))
    return Cost(_log2(n), blocks * part, 0.0, blocks * part)


def _broadcast(algorithm: str, n: int, size: float, segments: int) -> Cost:
    levels = _log2(n)
    if algorithm == "tree":  # rank 0 sends in every step
        return Cost(levels, levels * size, 0.0, levels * size)
    if algorithm == "chain":
        return _chain(n, size, segments)
    # Scatter along a binomial tree (rank 0 sends every part but its own, once), then a ring all-gather.
    scatter = Cost(levels, size * (n - 1) / n, 0.0, size * (n - 1) / n)
    return scatter + _all_gather("ring", n, size)


def _chain(n: int, size: float, segments: int) -> Cost:
    """Rank r passes a segment to rank r+1 while it receives the next; the last rank waits n−2 steps for its first."""
    steps = n - 2 + segments
    return Cost(steps, size, 0.0, steps * size / segments)


def _log2(n: int) -> int:
    """⌈log₂ n⌉."""
    return (n - 1).bit_length()


def _is_power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def _check(operation: str, algorithm: str, n: int, size: float, local: int | None, segments: int | None) -> None:
    _checks.known("operation", operation, ALGORITHMS)
    _checks.known("algorithm", algorithm, ALGORITHMS[operation])
    _checks.whole("n", n)
    _checks.amount("size", size)
    if algorithm in ("halving", "doubling") and not _is_power_of_two(n):
        raise ValueError(f"n={n}: {algorithm!r} needs a power of two; take 'ring', which serves any n")
    for name, value, owner in (("local", local, "hierarchical"), ("segments", segments, "chain")):
        if algorithm != owner and value is not None:
            raise ValueError(f"{name}={value} is for {owner!r} only, not for {algorithm!r}: leave it out")
        if algorithm == owner and value is None:
            raise ValueError(f"{owner!r} needs {name}=…")
        if value is not None:
            _checks.whole(name, value)
    if local is not None and n % local:
        raise ValueError(f"n={n} is not a multiple of local={local}: every group must have as many ranks")
