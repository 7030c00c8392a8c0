"""Pipeline schedules as data: who does what in which order, checked, simulated and drawn before anything runs.

A model is cut into stages 0 … S−1, each of which lives on one of p ranks, and a batch into m microbatches. What a rank
does in a step is a list of operations, and a schedule is the list of each rank:

    {0: [Op("F", 0, 0), Op("F", 0, 1), Op("BW", 0, 0), Op("BW", 0, 1)],         two ranks, one stage each,
     1: [Op("F", 1, 0), Op("BW", 1, 0), Op("F", 1, 1), Op("BW", 1, 1)]}         two microbatches: 1F1B

    F   the forward pass of a microbatch through a stage
    B   the gradient of the stage's input: all that the stage before waits for
    W   the gradients of the stage's weights: nobody waits for them before the optimizer
    BW  both at once, an ordinary backward pass

No clock and no message is in it. When an operation can begin follows from three rules, and from nothing else:

    a rank does one thing at a time, in the order of its list
    F of stage s needs F of stage s − 1
    B or BW of stage s needs F of stage s and B or BW of stage s + 1;  W needs B

So a schedule can be printed, counted, checked for deadlock and timed on paper; and `mlsys.parallel.pipeline` runs any
that passes `validate`, also one that you wrote.

    sequential(p, m)      one microbatch at a time: the model is spread out, and one rank works
    gpipe(p, m)           all forward passes, then all backward passes
    one_f_one_b(p, m)     as early as possible back again: the same time, p − r microbatches held instead of m
    interleaved(p, m, v)  1F1B with v chunks of the model on each rank: the bubble is v times shorter
    zb_h1(p, m)           1F1B with W put off into the bubble, in about the memory of 1F1B
    zb_h2(p, m)           further warm-up, and no bubble if F = B = W; twice the memory
    zb_v(p, m)            two chunks, down and up again: no bubble if F = B = W, in the memory of 1F1B

    >>> found = simulate(one_f_one_b(4, 8))
    >>> found.makespan, found.bubble, found.peak
    (33.0, 0.2727272727272727, {0: 4.0, 1: 3.0, 2: 2.0, 3: 1.0})

The *bubble* is time in which ranks have nothing to do. Zero-bubble papers do not count the wait before a rank's first
operation and after its last, since the next step can fill it: that is the `span_bubble`. What lies between F and the
end of W is *held*, in microbatches through the whole share of a rank; where it has v stages, one counts 1/v.

Cost:
    Making, checking and simulating takes time linear in the number of operations, 2·m·S or 3·m·S:
    some microseconds each.

Communication:
    None here. A schedule implies 2·m·(S − 1) messages, less where neighbouring stages share a rank.

Papers:
    Huang et al. 2019, arXiv:1811.06965, section 2.3 (GPipe).
    Narayanan et al. 2019, "PipeDream: Generalized Pipeline Parallelism for DNN Training", SOSP, section 3.2 (1F1B).
    Narayanan et al. 2021, arXiv:2104.04473, section 2.2 (1F1B with a flush, and interleaved stages).
    Qi et al. 2024, arXiv:2401.10241, sections 2 and 6 (B and W apart: ZB-H1, ZB-H2, ZB-V).

See also:
    `mlsys.parallel.pipeline` (runs them), `mlsys.perf.pipeline` (bubble and memory by formula), `mlsys schedule`.
"""

from __future__ import annotations

from collections.abc import Callable

from mlsys.parallel._schedule_check import Summary, validate
from mlsys.parallel._schedule_ops import KINDS, Op, Schedule, ScheduleError
from mlsys.parallel._schedule_plot import plot
from mlsys.parallel._schedule_show import show
from mlsys.parallel._schedule_simulate import RankTime, Simulation, observed, simulate
from mlsys.perf import _checks

__all__ = [
    "KINDS",
    "Op",
    "RankTime",
    "SCHEDULES",
    "Schedule",
    "ScheduleError",
    "Simulation",
    "Summary",
    "gpipe",
    "interleaved",
    "observed",
    "one_f_one_b",
    "plot",
    "sequential",
    "show",
    "simulate",
    "validate",
    "zb_h1",
    "zb_h2",
    "zb_v",
]


def sequential(p: int, m: int) -> Schedule:
    """Plain model parallelism: a microbatch goes through all stages and back before the next one starts."""
    p, m = _whole(p, m)
    return {rank: [Op(kind, rank, i) for i in range(m) for kind in ("F", "BW")] for rank in range(p)}


def gpipe(p: int, m: int) -> Schedule:
    """All forward passes, then all backward passes: a bubble of p − 1 microbatches, and m of them held."""
    p, m = _whole(p, m)
    return {rank: [Op(kind, rank, i) for kind in ("F", "BW") for i in range(m)] for rank in range(p)}


def one_f_one_b(p: int, m: int) -> Schedule:
    """Each backward pass as early as it can be, then one forward, one backward: at most p − rank microbatches held.

    PipeDream's order with a flush at the end of the step, as Megatron runs it.
    """
    p, m = _whole(p, m)
    schedule = {}
    for rank in range(p):
        warm_up = min(p - 1 - rank, m)  # so many go on to the later ranks before the first comes back from them
        ops = [Op("F", rank, i) for i in range(warm_up)]
        for i in range(m):
            if warm_up + i < m:
                ops.append(Op("F", rank, warm_up + i))
            ops.append(Op("BW", rank, i))
        schedule[rank] = ops
    return schedule


def interleaved(p: int, m: int, v: int) -> Schedule:
    """1F1B with `v` chunks of the model on each rank, rank r having stages r, p + r, 2p + r …: Megatron's order.

    p microbatches go through a rank's first chunk, the same p through its second, and so on; then the next p. Hence
    m must be a multiple of p. The bubble is v times shorter, and v times as many messages are sent.
    """
    p, m = _whole(p, m)
    v = _checks.whole("v", v)
    if v == 1:
        raise ValueError("v=1: interleaved needs at least 2 chunks a rank; with 1 it is one_f_one_b")
    if m % p:
        raise ValueError(f"m={m}: interleaved sends microbatches in groups of p={p}, so m must be a multiple of it")
    units = [(chunk, group + i) for group in range(0, m, p) for chunk in range(v) for i in range(p)]
    schedule = {}
    for rank in range(p):
        forward = [Op("F", chunk * p + rank, i) for chunk, i in units]
        backward = [Op("BW", (v - 1 - chunk) * p + rank, i) for chunk, i in units]
        warm_up = min(2 * (p - 1 - rank) + (v - 1) * p, m * v)
        ops = forward[:warm_up]
        for behind, op in enumerate(backward):
            ops += [*forward[warm_up + behind : warm_up + behind + 1], op]
        schedule[rank] = ops
    return schedule


def zb_h1(p: int, m: int) -> Schedule:
    """1F1B that passes B on at once and puts W off: the W's fill the wait at the end. At most p microbatches held."""
    p, m = _whole(p, m)
    return {rank: _split(rank, m, warm_up=p - rank, put_off=rank) for rank in range(p)}


def zb_h2(p: int, m: int) -> Schedule:
    """More forward passes first, more W's put off: every rank works without a pause if F = B = W. 2p − 1 held."""
    p, m = _whole(p, m)
    return {rank: _split(rank, m, warm_up=2 * (p - rank) - 1, put_off=2 * rank) for rank in range(p)}


def _split(rank: int, m: int, warm_up: int, put_off: int) -> list[Op]:
    """`warm_up` forward passes, then B and F by turns; a W follows whenever more than `put_off` of them wait."""
    started, done = min(warm_up, m), 0
    ops = [Op("F", rank, i) for i in range(started)]
    for i in range(m):
        ops.append(Op("B", rank, i))
        if i + 1 - done > put_off:
            ops.append(Op("W", rank, done))
            done += 1
        if started < m:
            ops.append(Op("F", rank, started))
            started += 1
    return ops + [Op("W", rank, i) for i in range(done, m)]


def zb_v(p: int, m: int) -> Schedule:
    """Two chunks a rank, in the shape of a V: rank r has stage r on the way down and stage 2p − 1 − r on the way up.

    The last stage is where the first is, so that rank 0 has a gradient of its own as soon as a microbatch is back: the
    zero bubble of `zb_h2` with p microbatches held.
    """
    p, m = _whole(p, m)
    schedule = {}
    for rank in range(p):
        below, above = p - rank, rank  # of the turn at rank p − 1, counted in ranks: how long a way down and back takes
        plan = (
            [("F", 0)] * (2 * below - 1)
            + [("F", 1), ("F", 0)] * above
            + [("F", 1), ("B", 1), ("W", 1)] * below
            + [("F", 0), ("B", 0), ("W", 0), ("F", 1), ("B", 1), ("W", 1)] * (m - p)
            + [("B", 0), ("B", 1)] * above
            + [("B", 0), ("W", 0)] * below
            + [("W", 1), ("W", 0)] * above
        )
        stages = (rank, 2 * p - 1 - rank)
        done = dict.fromkeys(plan, 0)
        ops = []
        for kind, chunk in plan:
            i = done[kind, chunk]
            if i < m:  # there are p − 1 forward passes of the first chunk too many in the plan: they were early
                ops.append(Op(kind, stages[chunk], i))
                done[kind, chunk] += 1
        schedule[rank] = ops
    return schedule


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "sequential": sequential,
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb-h1": zb_h1,
    "zb-h2": zb_h2,
    "zbv": zb_v,
}


def _whole(p: int, m: int) -> tuple[int, int]:
    return _checks.whole("p", p), _checks.whole("m", m)
