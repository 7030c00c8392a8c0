"""What links, backend and shared memory cost here: two sizes each, a few rounds, the shortest, of the slowest rank."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist

from mlsys.parallel._call import Call
from mlsys.parallel._choose import Links
from mlsys.parallel._p2p import Wire, even
from mlsys.perf.collectives import ALGORITHMS

SMALL, LARGE = 1024, 2**18  # bytes
ROUNDS = {SMALL: 5, LARGE: 4}

Line = tuple[float, float]  # seconds, seconds a byte


def links(wire: Wire, local: int | None) -> Links:
    """α and β of an exchange with both neighbours at once, as in a ring; also within hosts if there are several."""
    rings = [wire]
    if local and 1 < local < wire.size:
        host = wire.rank // local
        rings.append(wire.among(range(host * local, (host + 1) * local)))
    times = []
    for ring in rings:
        to, source = (ring.rank + 1) % ring.size, (ring.rank - 1) % ring.size
        for size in (SMALL, LARGE):
            give, take = torch.zeros(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
            times.append(_best(lambda: ring.move([(give, to)], [(take, source)]), size))  # noqa: B023 (called at once)
    vector = torch.zeros(LARGE // 4)
    times.append(_best(lambda: torch.add(vector, vector, out=vector), LARGE))
    *rest, gamma = _slowest(wire.group, times)
    found = [_line(*rest[at : at + 2]) for at in range(0, len(rest), 2)]
    inside = found[1] if len(found) > 1 else (None, None)
    return Links(*found[0], gamma / LARGE, local, *inside)


def lines(group: dist.ProcessGroup, candidates: Mapping[str, Callable[[Call], None]]) -> dict[tuple[str, str], Line]:
    """Latency and slope of each operation with each candidate."""
    keys = [(operation, name) for operation in ALGORITHMS for name in candidates]
    times = dict.fromkeys(((key, size) for key in keys for size in (SMALL, LARGE)), math.inf)
    for size, rounds in ROUNDS.items():
        for operation in ALGORITHMS:
            call = example(operation, size // 4 // group.size() * group.size(), group.size())
            for _ in range(rounds):  # in turn, so that a busy moment of the machine falls on all of them
                for name, run in candidates.items():
                    key = (operation, name), size
                    times[key] = min(times[key], _seconds(lambda: run(call)))  # noqa: B023 (called at once)
    slowest = dict(zip(times, _slowest(group, times.values())))
    return {key: _line(slowest[key, SMALL], slowest[key, LARGE]) for key in keys}


def example(operation: str, elements: int, n: int) -> Call:
    """A call of `operation` on float32 zeros."""
    parts = even(elements, n)
    whole, part = torch.zeros(elements), torch.zeros(parts[0])
    output = part if operation == "reduce_scatter" else whole
    given = {"all_gather": part, "reduce_scatter": whole, "all_to_all": torch.zeros(elements)}.get(operation)
    op = "sum" if operation in ("all_reduce", "reduce_scatter") else ""
    return Call(operation, torch.float32, elements, output, given, op, sizes=parts, sent_sizes=parts)


def _best(run: Callable[[], object], size: int) -> float:
    """Seconds of the shortest of some rounds: what others on the machine add is no property of the link."""
    return min(_seconds(run) for _ in range(ROUNDS[size]))


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _slowest(group: dist.ProcessGroup, times: Iterable[float]) -> list[float]:
    """The same numbers on every rank, or they would choose different algorithms and wait for one another for ever."""
    found = torch.tensor(list(times), dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return found.tolist()


def _line(small: float, large: float) -> Line:
    slope = max(0.0, (large - small) / (LARGE - SMALL))
    return max(0.0, small - slope * SMALL), slope
