"""`mlsys.perf.collectives` counts what happens: each algorithm is run here, message by message.

The network below moves real arrays between ranks in steps. In a step a rank sends at most one message and receives at
most one; anything else fails. Steps and bytes are counted as the arrays move, and the result is checked.
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys.perf import collectives
from mlsys.perf.collectives import ALGORITHMS, Cost, cost

SEGMENTS = 3


class Network:
    def __init__(self, n):
        self.sent, self.combined = [0] * n, [0] * n
        self.steps = self.path = 0

    def step(self, messages):
        """`messages`: sender → (receiver, array). Returns receiver → a copy of what it gets."""
        receivers = [receiver for receiver, _ in messages.values()]
        assert len(set(receivers)) == len(receivers), "two messages to one rank in a step"
        assert all(sender != receiver for sender, (receiver, _) in messages.items())
        for sender, (_, array) in messages.items():
            self.sent[sender] += array.nbytes
        self.steps += 1
        self.path += max(array.nbytes for _, array in messages.values())
        return {receiver: array.copy() for receiver, array in messages.values()}

    def add(self, rank, mine, theirs):
        self.combined[rank] += theirs.nbytes
        mine += theirs

    def cost(self):
        return Cost(self.steps, max(self.sent), max(self.combined), self.path)


def powers(n):
    """1, 2, 4, … below n."""
    return [1 << i for i in range((n - 1).bit_length())]


# Each works on `data`: rank → array of n parts (parts, length), in place. `groups` run side by side.


def ring_reduce_scatter(net, groups, data):
    """Ends with part i complete on the i-th rank of its group."""
    k = len(groups[0])
    for step in range(k - 1):
        part = {rank: (i - step - 1) % k for group in groups for i, rank in enumerate(group)}
        after = {rank: group[(i + 1) % k] for group in groups for i, rank in enumerate(group)}
        before = {receiver: sender for sender, receiver in after.items()}
        got = net.step({rank: (after[rank], data[rank][part[rank]]) for rank in part})
        for rank, array in got.items():
            net.add(rank, data[rank][part[before[rank]]], array)


def ring_all_gather(net, groups, data):
    k = len(groups[0])
    for step in range(k - 1):
        part = {rank: (i - step) % k for group in groups for i, rank in enumerate(group)}
        after = {rank: group[(i + 1) % k] for group in groups for i, rank in enumerate(group)}
        before = {receiver: sender for sender, receiver in after.items()}
        got = net.step({rank: (after[rank], data[rank][part[rank]]) for rank in part})
        for rank, array in got.items():
            data[rank][part[before[rank]]] = array


def halving(net, n, data):
    low = [0] * n
    for distance in reversed(powers(n)):
        messages = {}
        for rank in range(n):
            mine = low[rank] + distance * bool(rank & distance)
            theirs = low[rank] + distance * (not rank & distance)
            messages[rank] = (rank ^ distance, data[rank][theirs : theirs + distance])
            low[rank] = mine
        for rank, array in net.step(messages).items():
            net.add(rank, data[rank][low[rank] : low[rank] + distance], array)


def doubling(net, n, data):
    for distance in powers(n):
        start = [rank // distance * distance for rank in range(n)]
        got = net.step({rank: (rank ^ distance, data[rank][start[rank] : start[rank] + distance]) for rank in range(n)})
        for rank, array in got.items():
            theirs = start[rank ^ distance]
            data[rank][theirs : theirs + distance] = array


def bruck_all_gather(net, n, data):
    have = {rank: [rank] for rank in range(n)}  # which parts, in the order in which they came
    for distance in powers(n):
        count = min(distance, n - distance)
        got = net.step({rank: ((rank - distance) % n, data[rank][have[rank][:count]]) for rank in range(n)})
        news = {rank: have[(rank + distance) % n][:count] for rank in range(n)}
        for rank, array in got.items():
            data[rank][news[rank]] = array
        for rank in range(n):
            have[rank] += news[rank]


def folded(net, n, data, inner):
    power = 1 << (n.bit_length() - 1)
    extra = range(power, n)
    if extra:
        for rank, array in net.step({rank: (rank - power, data[rank]) for rank in extra}).items():
            net.add(rank, data[rank], array)
    inner(power)
    if extra:
        for rank, array in net.step({rank - power: (rank, data[rank - power]) for rank in extra}).items():
            data[rank][:] = array


def recursive_doubling(net, n, data):
    def inner(power):
        for distance in powers(power):
            for rank, array in net.step({rank: (rank ^ distance, data[rank]) for rank in range(power)}).items():
                net.add(rank, data[rank], array)

    folded(net, n, data, inner)


def halving_doubling(net, n, data):
    def inner(power):
        views = {rank: data[rank].reshape(power, -1) for rank in range(power)}
        halving(net, power, views)
        doubling(net, power, views)

    folded(net, n, data, inner)


def tree_broadcast(net, n, data):
    for distance in reversed(powers(n)):
        senders = [rank for rank in range(0, n, 2 * distance) if rank + distance < n]
        for rank, array in net.step({rank: (rank + distance, data[rank]) for rank in senders}).items():
            data[rank][:] = array


def tree_all_reduce(net, n, data):
    for distance in powers(n):
        senders = range(distance, n, 2 * distance)
        for rank, array in net.step({rank: (rank - distance, data[rank]) for rank in senders}).items():
            net.add(rank, data[rank], array)
    tree_broadcast(net, n, data)


def hierarchical(net, n, data, local):
    inside = [list(range(start, start + local)) for start in range(0, n, local)]
    across = [list(range(i, n, local)) for i in range(local)]
    views = {rank: data[rank].reshape(local, -1) for rank in range(n)}
    ring_reduce_scatter(net, inside, views)
    own = {rank: views[rank][rank % local].reshape(n // local, -1) for rank in range(n)}
    ring_reduce_scatter(net, across, own)
    ring_all_gather(net, across, own)
    ring_all_gather(net, inside, views)


def pairwise(net, n, data):
    source = {rank: data[rank].copy() for rank in range(n)}
    for step in range(1, n):
        got = net.step({rank: ((rank + step) % n, source[rank][(rank + step) % n]) for rank in range(n)})
        for rank, array in got.items():
            data[rank][(rank - step) % n] = array


def bruck_all_to_all(net, n, data):
    ways = {rank: np.stack([data[rank][(rank + way) % n] for way in range(n)]) for rank in range(n)}
    for distance in powers(n):
        moving = [way for way in range(n) if way & distance]
        for rank, array in net.step({rank: ((rank + distance) % n, ways[rank][moving]) for rank in range(n)}).items():
            ways[rank][moving] = array
    for rank in range(n):
        for way in range(n):
            data[rank][(rank - way) % n] = ways[rank][way]


def scatter_all_gather(net, n, data):
    for distance in reversed(powers(n)):
        senders = [rank for rank in range(0, n, 2 * distance) if rank + distance < n]
        got = net.step({rank: (rank + distance, data[rank][rank + distance : rank + 2 * distance]) for rank in senders})
        for rank, array in got.items():
            data[rank][rank : rank + distance] = array
    ring_all_gather(net, [list(range(n))], data)


def chain(net, n, data):
    views = {rank: data[rank].reshape(SEGMENTS, -1) for rank in range(n)}
    for step in range(n - 2 + SEGMENTS):
        senders = [rank for rank in range(n - 1) if 0 <= step - rank < SEGMENTS]
        for rank, array in net.step({rank: (rank + 1, views[rank][step - rank]) for rank in senders}).items():
            views[rank][step - (rank - 1)] = array


def ring_all_reduce(net, n, data):
    ring_reduce_scatter(net, [list(range(n))], data)
    ring_all_gather(net, [list(range(n))], data)


RUN = {
    ("all_reduce", "ring"): ring_all_reduce,
    ("all_reduce", "tree"): tree_all_reduce,
    ("all_reduce", "recursive_doubling"): recursive_doubling,
    ("all_reduce", "halving_doubling"): halving_doubling,
    ("all_reduce", "hierarchical"): hierarchical,
    ("reduce_scatter", "ring"): lambda net, n, data: ring_reduce_scatter(net, [list(range(n))], data),
    ("reduce_scatter", "halving"): halving,
    ("all_gather", "ring"): lambda net, n, data: ring_all_gather(net, [list(range(n))], data),
    ("all_gather", "doubling"): doubling,
    ("all_gather", "bruck"): bruck_all_gather,
    ("all_to_all", "pairwise"): pairwise,
    ("all_to_all", "bruck"): bruck_all_to_all,
    ("broadcast", "tree"): tree_broadcast,
    ("broadcast", "scatter_all_gather"): scatter_all_gather,
    ("broadcast", "chain"): chain,
}
RANKS = [2, 3, 4, 5, 6, 7, 8, 9, 16]


def cases():
    for (operation, algorithm), run in RUN.items():
        for n in RANKS:
            if algorithm in ("halving", "doubling") and n & (n - 1):
                continue
            for local in [k for k in range(1, n + 1) if n % k == 0] if algorithm == "hierarchical" else [None]:
                yield pytest.param(
                    operation, algorithm, run, n, local, id=f"{operation}-{algorithm}-{n}" + f"-{local}" * bool(local)
                )


def test_every_algorithm_is_run():
    assert set(RUN) == {(operation, algorithm) for operation in ALGORITHMS for algorithm in ALGORITHMS[operation]}


@pytest.mark.parametrize(("operation", "algorithm", "run", "n", "local"), cases())
def test_formula_counts_what_happens(operation, algorithm, run, n, local):
    length = math.lcm(n, 16, SEGMENTS)  # every algorithm's parts are whole
    generator = np.random.default_rng(n)
    before = generator.integers(0, 100, (n, n, length // n)).astype(float)
    net, data = Network(n), {rank: before[rank].copy() for rank in range(n)}
    if operation == "all_gather":
        for rank in range(n):
            data[rank][:] = np.nan
            data[rank][rank] = before[rank, rank]
    elif operation == "broadcast":
        for rank in range(1, n):
            data[rank][:] = np.nan
    run(net, n, data, *([local] if local else []))

    for rank in range(n):
        if operation == "all_reduce":
            np.testing.assert_array_equal(data[rank], before.sum(0))
        elif operation == "reduce_scatter":
            np.testing.assert_array_equal(data[rank][rank], before.sum(0)[rank])
        elif operation == "all_gather":
            np.testing.assert_array_equal(data[rank], [before[i, i] for i in range(n)])
        elif operation == "all_to_all":
            np.testing.assert_array_equal(data[rank], before[:, rank])
        else:
            np.testing.assert_array_equal(data[rank], before[0])

    counted = net.cost()
    segments = SEGMENTS if algorithm == "chain" else None
    got = cost(operation, algorithm, n, 8 * length, local=local, segments=segments)
    assert got.steps == counted.steps
    assert got.bytes_per_rank == pytest.approx(counted.bytes_per_rank)
    assert got.reduced_bytes == pytest.approx(counted.reduced_bytes)
    assert got.path_bytes == pytest.approx(counted.path_bytes)


# --- the formulas of the papers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 4, 8, 64])
def test_published_all_reduce_counts(n):
    size, levels = 2**20, int(math.log2(n))
    ring, halves = (cost("all_reduce", name, n, size) for name in ("ring", "halving_doubling"))
    assert ring.steps == 2 * (n - 1)
    assert halves.steps == 2 * levels
    assert ring.bytes_per_rank == halves.bytes_per_rank == pytest.approx(2 * (n - 1) / n * size)
    double = cost("all_reduce", "recursive_doubling", n, size)
    assert (double.steps, double.bytes_per_rank) == (levels, levels * size)


def test_hierarchical_saves_the_slow_links():
    n, k, size = 64, 8, 2**20
    inside, across = collectives.hierarchical_parts(n, size, k)
    g = n // k
    assert inside.bytes_per_rank == pytest.approx(2 * (k - 1) / k * size)
    assert across.bytes_per_rank == pytest.approx(2 * (g - 1) / (g * k) * size)
    assert inside + across == cost("all_reduce", "hierarchical", n, size, local=k)


def every(n):
    """All costs that n ranks can have, with names."""
    for operation, algorithms in ALGORITHMS.items():
        for algorithm in algorithms:
            if algorithm in ("halving", "doubling") and n & (n - 1):
                continue
            local = next(k for k in range(n, 0, -1) if n % k == 0 and k < max(n, 2))
            options = {"hierarchical": {"local": local}, "chain": {"segments": SEGMENTS}}.get(algorithm, {})
            yield operation, algorithm, options


NUMBERS = st.floats(0, 1e12)
RATES = st.floats(1e-12, 1.0)


@given(n=st.integers(1, 64), size=NUMBERS, alpha=RATES, beta=RATES, gamma=RATES)
def test_time_grows_with_size_and_doubles_without_latency(n, size, alpha, beta, gamma):
    for operation, algorithm, options in every(n):
        one = cost(operation, algorithm, n, size, **options)
        two = cost(operation, algorithm, n, 2 * size, **options)
        assert two.steps == one.steps
        assert two.seconds(0, beta, gamma) == pytest.approx(2 * one.seconds(0, beta, gamma))
        assert two.seconds(alpha, beta, gamma) >= one.seconds(alpha, beta, gamma)
        assert one.path_bytes >= one.bytes_per_rank * (1 - 1e-12)


@given(size=NUMBERS, alpha=RATES, beta=RATES)
def test_one_rank_costs_nothing(size, alpha, beta):
    for operation, algorithm, options in every(1):
        assert cost(operation, algorithm, 1, size, **options) == Cost(0, 0, 0, 0)
        assert collectives.bus_bandwidth(operation, 1, size, 1.0) == 0


@given(n=st.integers(2, 200), size=st.floats(1, 1e12))
def test_no_all_reduce_beats_the_lower_bounds(n, size):
    for operation, algorithm, options in every(n):
        if operation == "all_reduce":
            one = cost(operation, algorithm, n, size, **options)
            assert one.bytes_per_rank >= 2 * (n - 1) / n * size * (1 - 1e-12) or algorithm in ("tree",)
            assert one.path_bytes >= 2 * (n - 1) / n * size * (1 - 1e-12) or algorithm == "recursive_doubling"
            assert one.steps >= math.ceil(math.log2(n))


# --- choosing ---------------------------------------------------------------------------------------------------------


@given(n=st.integers(2, 40), size=st.floats(1, 1e11), alpha=st.floats(1e-7, 1e-3), beta=st.floats(1e-12, 1e-8))
def test_best_is_the_least(n, size, alpha, beta):
    for operation in ALGORITHMS:
        ranking = collectives.ranking(operation, n, size, alpha, beta)
        assert list(ranking.values()) == sorted(ranking.values())
        assert collectives.best(operation, n, size, alpha, beta) == next(iter(ranking))
        for algorithm, seconds in ranking.items():
            segments = collectives.chain_segments(n, size, alpha, beta) if algorithm == "chain" else None
            assert seconds == cost(operation, algorithm, n, size, segments=segments).seconds(alpha, beta)


def test_small_vectors_want_few_steps_and_large_ones_few_bytes():
    alpha, beta = 5e-6, 1e-10
    assert collectives.best("all_reduce", 64, 64, alpha, beta) == "recursive_doubling"
    assert collectives.best("all_reduce", 64, 2**30, alpha, beta) == "halving_doubling"
    assert collectives.best("all_reduce", 65, 2**34, alpha, beta) == "ring"  # the fold costs 2S
    assert collectives.best("broadcast", 64, 64, alpha, beta) == "tree"
    assert collectives.best("broadcast", 64, 2**30, alpha, beta) == "chain"
    assert collectives.best("all_to_all", 64, 64, alpha, beta) == "bruck"
    assert collectives.best("all_to_all", 64, 2**30, alpha, beta) == "pairwise"
    assert "hierarchical" not in collectives.ranking("all_reduce", 64, 1, alpha, beta)
    assert "hierarchical" in collectives.ranking("all_reduce", 64, 1, alpha, beta, local=8)
    assert set(collectives.ranking("reduce_scatter", 6, 1, alpha, beta)) == {"ring"}


# On three ranks every block has one bit to go, so Bruck does what pairwise does.
NEVER = {("all_to_all", "pairwise", "bruck", 3)}


@given(n=st.integers(3, 64), alpha=st.floats(1e-7, 1e-3), beta=st.floats(1e-12, 1e-8), gamma=st.floats(0, 1e-9))
def test_both_take_equally_long_at_the_crossover(n, alpha, beta, gamma):
    for algorithms in (("all_reduce", "ring", "recursive_doubling"), ("all_to_all", "pairwise", "bruck")):
        operation, a, b = algorithms
        size = collectives.crossover(operation, a, b, n, alpha, beta, gamma=gamma)
        if size is None:
            assert (*algorithms, n) in NEVER
            continue
        at, above, below = (
            [cost(operation, name, n, factor * size).seconds(alpha, beta, gamma) for name in (a, b)]
            for factor in (1, 2, 0.5)
        )
        assert at[0] == pytest.approx(at[1])
        assert above[0] < above[1]
        assert below[0] > below[1]


def test_no_crossover_where_one_always_wins():
    assert collectives.crossover("all_reduce", "ring", "halving_doubling", 8, 1e-6, 1e-9) is None
    assert collectives.crossover("all_reduce", "ring", "ring", 8, 1e-6, 1e-9) is None


@given(n=st.integers(2, 64), size=st.floats(1, 1e12), alpha=st.floats(1e-9, 1e-3), beta=st.floats(1e-12, 1e-8))
def test_chain_segments_is_the_best_whole_number(n, size, alpha, beta):
    def seconds(k):
        return cost("broadcast", "chain", n, size, segments=k).seconds(alpha, beta)

    k = collectives.chain_segments(n, size, alpha, beta)
    assert 1 <= k <= size
    for other in (max(1, k - 1), min(k + 1, max(1, int(size)))):
        assert seconds(k) <= seconds(other) * (1 + 1e-12)


def test_chain_without_latency_goes_byte_by_byte():
    assert collectives.chain_segments(5, 1000, 0, 1e-9) == 1000
    assert collectives.chain_segments(5, 0, 0, 1e-9) == 1
    assert collectives.chain_segments(2, 1000, 0, 1e-9) == 1


@pytest.mark.parametrize(
    ("operation", "algorithm"),
    [("all_reduce", "ring"), ("reduce_scatter", "ring"), ("all_gather", "ring"), ("all_to_all", "pairwise")],
)
def test_bus_bandwidth_is_the_link_where_the_algorithm_is_optimal(operation, algorithm):
    n, size, beta = 8, 2**20, 1e-9
    seconds = cost(operation, algorithm, n, size).seconds(0, beta)
    assert collectives.bus_bandwidth(operation, n, size, seconds) == pytest.approx(1 / beta)


def test_bus_bandwidth_of_a_broadcast_is_size_over_seconds():
    assert collectives.bus_bandwidth("broadcast", 8, 100, 2) == 50


BAD = {
    "operation": (("all_redcue", "ring", 4, 1), {}, ValueError, "did you mean 'all_reduce'"),
    "algorithm": (("all_reduce", "rings", 4, 1), {}, ValueError, "algorithm='rings' is not known; did you mean 'ring'"),
    "far name": (("all_reduce", "??", 4, 1), {}, ValueError, "known are 'ring'"),
    "no ranks": (("all_reduce", "ring", 0, 1), {}, ValueError, "n must be at least 1, got 0"),
    "half a rank": (("all_reduce", "ring", 2.5, 1), {}, TypeError, "n must be a whole number, got 2.5"),
    "true": (("all_reduce", "ring", True, 1), {}, TypeError, "n must be a whole number"),
    "size": (("all_reduce", "ring", 2, -1), {}, ValueError, "size must be at least 0 and finite, got -1"),
    "nan": (("all_reduce", "ring", 2, math.nan), {}, ValueError, "size must be at least 0 and finite, got nan"),
    "text": (("all_reduce", "ring", 2, "1MB"), {}, TypeError, "size must be a number, got '1MB'"),
    "halving": (
        ("reduce_scatter", "halving", 6, 1),
        {},
        ValueError,
        "n=6: 'halving' needs a power of two; take 'ring'",
    ),
    "doubling": (("all_gather", "doubling", 6, 1), {}, ValueError, "power of two"),
    "no local": (("all_reduce", "hierarchical", 8, 1), {}, ValueError, "'hierarchical' needs local"),
    "local": (("all_reduce", "hierarchical", 8, 1), {"local": 3}, ValueError, "n=8 is not a multiple of local=3"),
    "local 0": (("all_reduce", "hierarchical", 8, 1), {"local": 0}, ValueError, "local must be at least 1"),
    "stray local": (("all_reduce", "ring", 8, 1), {"local": 2}, ValueError, "for 'hierarchical' only, not for 'ring'"),
    "no segments": (("broadcast", "chain", 8, 1), {}, ValueError, "'chain' needs segments"),
    "stray segments": (("broadcast", "tree", 8, 1), {"segments": 2}, ValueError, "for 'chain' only"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    arguments, options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        cost(*arguments, **options)


def test_bad_rates_are_named():
    with pytest.raises(ValueError, match="beta must be at least 0 and finite, got -1"):
        cost("all_reduce", "ring", 2, 1).seconds(1, -1)
    with pytest.raises(ValueError, match="seconds must be positive"):
        collectives.bus_bandwidth("all_reduce", 2, 1, 0)
    with pytest.raises(ValueError, match="did you mean 'broadcast'"):
        collectives.best("broadcasts", 2, 1, 1, 1)
