"""The exercise about collectives: steps and bytes, against algorithms that are run message by message."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction

from mlsys.contracts._perf_formula import Formula, wrong
from mlsys.contracts.core import Case
from mlsys.perf import collectives

Blocks = dict[int, frozenset[int]]  # block of the vector → the ranks whose numbers are in this copy of it
Message = tuple[int, int, set[int]]  # from, to, which blocks


@dataclass(frozen=True)
class Run:
    """What a collective did: steps, how many times the vector the busiest rank sent, and what each rank has now."""

    steps: int
    sent: Fraction
    held: tuple[Blocks, ...]


class _Ranks:
    """n ranks with a vector of n blocks each, that send one another messages and count them.

    In a step a rank sends one message and receives one, of what it had before the step. With `add`,
    what comes is added to what is there, which must not have any rank's numbers already; otherwise it replaces it.
    """

    def __init__(self, held: list[Blocks]) -> None:
        self.held = held
        self.steps = 0
        self.sent = [0] * len(held)

    def step(self, messages: Iterable[Message], *, add: bool = False) -> None:
        before = [dict(blocks) for blocks in self.held]
        senders, receivers = set(), set()
        for source, target, blocks in messages:
            assert source not in senders, f"rank {source} sends twice in a step"
            assert target not in receivers, f"rank {target} receives twice in a step"
            senders.add(source)
            receivers.add(target)
            self.sent[source] += len(blocks)
            for block in blocks:
                there = before[target].get(block, frozenset()) if add else frozenset()
                assert not there & before[source][block], "the same numbers are added twice"
                self.held[target][block] = there | before[source][block]
        self.steps += 1


def simulate(operation: str, algorithm: str, n: int) -> Run:
    """Run the algorithm message by message. Blocks of all_to_all are numbered source · n + destination."""
    everyone = frozenset(range(n))
    if operation == "all_gather":
        held: list[Blocks] = [{r: everyone} for r in range(n)]
    elif operation == "all_to_all":
        held = [{r * n + to: frozenset({r}) for to in range(n)} for r in range(n)]
    elif operation == "broadcast":
        held = [dict.fromkeys(range(n if r == 0 else 0), everyone) for r in range(n)]
    else:
        held = [{block: frozenset({r}) for block in range(n)} for r in range(n)]
    ranks = _Ranks(held)
    if n > 1:
        PROCEDURES[operation, algorithm](ranks, n)
    return Run(ranks.steps, Fraction(max(ranks.sent), n), tuple(ranks.held))  # a vector has n blocks


def _ring_reduce_scatter(ranks: _Ranks, n: int) -> None:
    for i in range(n - 1):  # block b goes once around and ends, complete, at rank b
        ranks.step([(r, (r + 1) % n, {(r - i - 1) % n}) for r in range(n)], add=True)


def _ring_all_gather(ranks: _Ranks, n: int) -> None:
    for i in range(n - 1):
        ranks.step([(r, (r + 1) % n, {(r - i) % n}) for r in range(n)])


def _halving(ranks: _Ranks, n: int) -> None:
    wanted = [set(range(n)) for _ in range(n)]
    distance = n // 2
    while distance:
        for r in range(n):
            wanted[r] = {block for block in wanted[r] if block & distance == r & distance}
        ranks.step([(r, r ^ distance, wanted[r ^ distance]) for r in range(n)], add=True)
        distance //= 2


def _doubling(ranks: _Ranks, n: int) -> None:
    mine = [{r} for r in range(n)]
    distance = 1
    while distance < n:
        ranks.step([(r, r ^ distance, mine[r]) for r in range(n)])
        mine = [mine[r] | mine[r ^ distance] for r in range(n)]
        distance *= 2


def _recursive_doubling(ranks: _Ranks, n: int) -> None:
    distance = 1
    while distance < n:
        ranks.step([(r, r ^ distance, set(range(n))) for r in range(n)], add=True)
        distance *= 2


def _distances(n: int) -> list[int]:
    """1, 2, 4 … below n: the levels of a binomial tree."""
    return [1 << level for level in range(n) if 1 << level < n]


def _tree_reduce(ranks: _Ranks, n: int) -> None:
    for distance in _distances(n):
        ranks.step([(r, r - distance, set(range(n))) for r in range(distance, n, 2 * distance)], add=True)


def _tree_broadcast(ranks: _Ranks, n: int) -> None:
    for distance in reversed(_distances(n)):
        ranks.step([(r, r + distance, set(range(n))) for r in range(0, n - distance, 2 * distance)])


def _pairwise(ranks: _Ranks, n: int) -> None:
    for i in range(1, n):
        ranks.step([(r, (r + i) % n, {r * n + (r + i) % n}) for r in range(n)])


Procedure = Callable[[_Ranks, int], None]


def _both(first: Procedure, second: Procedure) -> Procedure:
    def procedure(ranks: _Ranks, n: int) -> None:
        first(ranks, n)
        second(ranks, n)

    return procedure


PROCEDURES: dict[tuple[str, str], Procedure] = {
    ("reduce_scatter", "ring"): _ring_reduce_scatter,
    ("reduce_scatter", "halving"): _halving,
    ("all_gather", "ring"): _ring_all_gather,
    ("all_gather", "doubling"): _doubling,
    ("all_reduce", "ring"): _both(_ring_reduce_scatter, _ring_all_gather),
    ("all_reduce", "halving_doubling"): _both(_halving, _doubling),
    ("all_reduce", "recursive_doubling"): _recursive_doubling,
    ("all_reduce", "tree"): _both(_tree_reduce, _tree_broadcast),
    ("all_to_all", "pairwise"): _pairwise,
    ("broadcast", "tree"): _tree_broadcast,
}


def _collective(operation: str, algorithm: str, n: int, size: float) -> tuple[int, float]:
    cost = collectives.cost(operation, algorithm, n, size)
    return cost.steps, cost.bytes_per_rank


def _collective_oracle(operation: str, algorithm: str, n: int, size: float) -> tuple[int, float]:
    run = simulate(operation, algorithm, n)
    return run.steps, float(run.sent * Fraction(size))


def _collective_plain(
    operation: str,
    algorithm: str,
    n: int,
    size: float,
    *,
    own_part: bool = False,
    self_step: bool = False,
    halves: bool = True,
    shard: bool = False,
    everyone: bool = False,
    log: Callable[[int], int] = lambda n: (n - 1).bit_length(),
    whole_halves: bool = False,
    split_whole: bool = False,
    tree_back: bool = True,
    tree_sends: str = "each child",
    all_to_all: str = "others",
    ring_whole: bool = False,
) -> tuple[int, float]:
    if n == 1:
        return 0, 0.0
    levels, part = log(n), size if shard else size / n
    others = n if own_part else n - 1
    passes = 2 if operation == "all_reduce" and halves else 1
    if algorithm == "ring":
        steps, sent = passes * (n if self_step else n - 1), passes * others * (size if ring_whole else part)
    elif algorithm in ("halving", "doubling", "halving_doubling"):
        steps, sent = passes * levels, passes * (levels * size if whole_halves else others * part)
    elif algorithm == "recursive_doubling":
        steps, sent = levels, others * part if split_whole else levels * size
    elif algorithm == "tree":
        steps = levels * (2 if operation == "all_reduce" and tree_back else 1)
        sent = size if tree_sends == "once" else levels * size
    else:
        steps, sent = n if self_step else n - 1, {"others": others * part, "vectors": others * size}[all_to_all]
    return steps, sent * (n if everyone else 1)


def _message(operation: str, algorithm: str, n: int, size: float) -> Case:
    return {"operation": operation, "algorithm": algorithm, "n": n, "size": size}


def _draw_collective(rng: random.Random) -> Case:
    operation, algorithm = rng.choice(list(PROCEDURES))
    n = rng.randint(2, 17) if algorithm in ("ring", "tree", "pairwise") else rng.choice([2, 4, 8, 16])
    return _message(operation, algorithm, n, rng.randint(1, 10**9))


COLLECTIVES = Formula(
    signature="cost(operation, algorithm, n, size) -> (steps, bytes_sent)",
    results=("steps", "bytes_sent"),
    reference=_collective,
    oracle=_collective_oracle,
    draw=_draw_collective,
    cases=[
        _message("all_reduce", "ring", 2, 100),
        _message("all_reduce", "ring", 4, 1000),
        _message("reduce_scatter", "ring", 5, 1000),
        _message("all_gather", "ring", 5, 1000),
        _message("all_reduce", "ring", 1, 1000),
        _message("reduce_scatter", "halving", 8, 1000),
        _message("all_gather", "doubling", 8, 1000),
        _message("all_reduce", "halving_doubling", 16, 4096),
        _message("all_reduce", "recursive_doubling", 8, 1000),
        _message("broadcast", "tree", 8, 1000),
        _message("broadcast", "tree", 5, 1000),
        _message("all_reduce", "tree", 6, 1000),
        _message("all_to_all", "pairwise", 6, 600),
        _message("all_reduce", "ring", 16, 2.5e9),
        _message("all_gather", "doubling", 1, 1000),
    ],
    wrong={
        "own_part_sent": wrong(
            _collective_plain, "a rank does not send its own part to itself: (n−1)/n of the vector", own_part=True
        ),
        "n_steps": wrong(
            _collective_plain, "after n − 1 steps every part has been everywhere: there is no n-th", self_step=True
        ),
        "one_half_of_all_reduce": wrong(
            _collective_plain,
            "an all-reduce is a reduce-scatter and an all-gather: twice the steps and bytes",
            halves=False,
        ),
        "size_of_a_part": wrong(
            _collective_plain, "size is the whole vector's, as nccl-tests has it: a part is size / n", shard=True
        ),
        "whole_vector_around_the_ring": wrong(
            _collective_plain, "a step of the ring sends one part, size / n, not the whole vector", ring_whole=True
        ),
        "all_ranks_together": wrong(
            _collective_plain, "count what one rank sends, the busiest; not the sum over all ranks", everyone=True
        ),
        "log_rounded_down": wrong(
            _collective_plain, "a tree over n ranks has ⌈log₂ n⌉ levels: round up", log=lambda n: n.bit_length() - 1
        ),
        "n_for_log": wrong(
            _collective_plain, "the distance doubles with every step: log₂ n steps, not n − 1", log=lambda n: n - 1
        ),
        "halving_sends_all": wrong(
            _collective_plain,
            "halving sends half of the vector, then a quarter, …; doubling the same in reverse: S(n−1)/n in all",
            whole_halves=True,
        ),
        "recursive_doubling_splits": wrong(
            _collective_plain,
            "recursive doubling swaps the whole vector in every step: few steps, many bytes",
            split_whole=True,
        ),
        "tree_one_way": wrong(
            _collective_plain, "after the sum has reached the root it must come back down the tree", tree_back=False
        ),
        "root_sends_once": wrong(
            _collective_plain, "the root of a binomial tree sends to one child at every level", tree_sends="once"
        ),
        "all_to_all_vectors": wrong(
            _collective_plain,
            "in an all-to-all each rank gets another part, size / n, from me; not the whole vector",
            all_to_all="vectors",
        ),
    },
)
