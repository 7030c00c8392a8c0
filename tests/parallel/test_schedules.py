"""Schedules: exact times and memory, formulas, reasons for refusal, pictures, and torch's tables read and written."""

import dataclasses
import json
import math
import random
import xml.etree.ElementTree as ET
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys.contracts._parallel_schedules import makespan as slow_makespan
from mlsys.contracts._parallel_schedules import order
from mlsys.loading import import_file
from mlsys.parallel import schedules
from mlsys.parallel.schedules import (
    SCHEDULES,
    Op,
    ScheduleError,
    gpipe,
    interleaved,
    observed,
    one_f_one_b,
    plot,
    sequential,
    show,
    simulate,
    validate,
    zb_h1,
    zb_h2,
    zb_v,
)
from mlsys.perf import pipeline

torch_schedules = import_file(Path(__file__).parent / "_torch_schedules.py")


def make(name, p, m, v=2):
    return SCHEDULES[name](p, m, v) if name == "interleaved" else SCHEDULES[name](p, m)


# --- exact results ----------------------------------------------------------------------------------------------------

KNOWN = {  # F = B = W = 1, p = 4, m = 8: makespan, bubble, span bubble, peak of each rank
    "sequential": (lambda: sequential(4, 8), 96, Fraction(3, 4), Fraction(3, 4), [1, 1, 1, 1]),
    "gpipe": (lambda: gpipe(4, 8), 33, Fraction(3, 11), Fraction(3, 11), [8, 8, 8, 8]),
    "1f1b": (lambda: one_f_one_b(4, 8), 33, Fraction(3, 11), Fraction(3, 11), [4, 3, 2, 1]),
    "interleaved 2": (lambda: interleaved(4, 8, 2), 28.5, Fraction(3, 19), Fraction(3, 19), [5.5, 4.5, 3.5, 2.5]),
    "interleaved 4": (lambda: interleaved(4, 8, 4), 26.25, Fraction(3, 35), Fraction(3, 35), [4.75, 4.25, 3.75, 3.25]),
    "zb-h1": (lambda: zb_h1(4, 8), 27, Fraction(1, 9), Fraction(1, 9), [4, 4, 4, 4]),
    "zb-h2": (lambda: zb_h2(4, 8), 27, Fraction(1, 9), 0, [7, 7, 7, 7]),
    "zbv": (lambda: zb_v(4, 8), 25.5, Fraction(1, 17), 0, [4, 4, 4, 4]),
}


@pytest.mark.parametrize("name", KNOWN)
def test_four_ranks_and_eight_microbatches_to_the_bit(name):
    schedule, makespan, bubble, span_bubble, peak = KNOWN[name]
    found = simulate(schedule())
    assert found.makespan == makespan
    assert found.bubble == float(bubble)
    assert found.span_bubble == float(span_bubble)
    assert list(found.peak.values()) == peak
    assert all(rank.busy == 24 for rank in found.ranks.values())


def test_spans_of_a_small_step_worked_out_by_hand():
    found = simulate(one_f_one_b(2, 2), f=2, b=3, w=1, comm=1)
    # rank 0 sends its first at 2, which is there at 3; the gradient of the first leaves rank 1 at 9, and is there at 10
    assert found.spans == {
        0: [(Op("F", 0, 0), 0, 2), (Op("F", 0, 1), 2, 4), (Op("BW", 0, 0), 10, 14), (Op("BW", 0, 1), 16, 20)],
        1: [(Op("F", 1, 0), 3, 5), (Op("BW", 1, 0), 5, 9), (Op("F", 1, 1), 9, 11), (Op("BW", 1, 1), 11, 15)],
    }
    assert (found.makespan, found.bubble) == (20, 16 / 40)
    assert dataclasses.astuple(found.ranks[1]) == (3, 15, 12, 0)
    assert found.span_bubble == 8 / 20


def test_a_gradient_leaves_after_b_and_only_after_all_of_bw():
    split = {
        0: [Op("F", 0, 0), Op("B", 0, 0), Op("W", 0, 0)],
        1: [Op("F", 1, 0), Op("B", 1, 0), Op("W", 1, 0)],
    }
    assert simulate(split, 1, 1, 5).spans[0][1][1:] == (3, 4)
    whole = {rank: [Op("F", rank, 0), Op("BW", rank, 0)] for rank in (0, 1)}
    assert simulate(whole, 1, 1, 5).spans[0][1][1:] == (8, 14)


def test_messages_within_a_rank_take_no_time():
    v = zb_v(3, 6)
    assert simulate(v, comm=0).spans[2][1] == (Op("F", 3, 0), 1.5, 2)
    assert simulate(v, comm=1).spans[2][1] == (Op("F", 3, 0), 3.5, 4)  # two hops to get there, none at the turn


def test_ranks_compute_while_messages_are_on_their_way():
    found = simulate(gpipe(2, 4), comm=0.5)
    assert found.spans[0][3] == (Op("F", 0, 3), 3, 4)
    assert found.makespan == simulate(gpipe(2, 4)).makespan + 1  # there and back, once


def test_costs_of_stages_are_taken_as_they_are():
    schedule = interleaved(2, 2, 2)
    even = simulate(schedule, 1, 2, 3)
    half = [Fraction(1, 2)] * 4
    assert simulate(schedule, half, [1] * 4, dict.fromkeys(range(4), 1.5)).spans == even.spans
    slow = simulate(one_f_one_b(3, 4), f=[1, 5, 1])
    assert slow.makespan == slow_makespan(one_f_one_b(3, 4), [{"F": Fraction(f), "B": 1, "W": 1} for f in (1, 5, 1)])


@pytest.mark.parametrize("v", [2, 3, 5])
def test_thirds_are_exact(v):
    found = simulate(interleaved(3, 6, v))
    assert found.makespan == float(18 + Fraction(6, v))
    assert found.ranks[0].busy == 18


def test_floats_are_what_they_are():
    found = simulate(gpipe(2, 10), 0.1, 0.1, 0.1)
    assert found.makespan == float(33 * Fraction(0.1))  # a sum of 33 roundings is another number
    assert sum([0.1] * 33) != found.makespan


def test_figures_are_plain_numbers():
    found = simulate(interleaved(4, 8, 3), f=Fraction(1, 3), b=np.float32(0.5), w=np.int64(2))
    values = [found.makespan, found.bubble, found.span_bubble, *found.peak.values(), found.spans[0][0][2]]
    assert all(type(value) is float for value in values)
    json.dumps([dataclasses.asdict(found.summary), found.makespan, found.bubble, found.peak])
    assert f"{found.makespan:.2f} {found.bubble:.1%}"


def test_no_costs_no_bubble():
    found = simulate(gpipe(2, 2), 0, 0, 0)
    assert (found.makespan, found.bubble, found.span_bubble) == (0, 0, 0)


def test_a_large_pipeline():
    """131,072 operations; nothing here grows faster than their number."""
    found = simulate(one_f_one_b(64, 1024))
    assert found.makespan == 3 * (1024 + 63)
    assert found.peak == {rank: 64 - rank for rank in range(64)}


# --- against formulas and a slow simulation ---------------------------------------------------------------------------

COST = st.integers(1, 9)


@st.composite
def steps(draw, costs=COST):
    name = draw(st.sampled_from(pipeline.SCHEDULES))
    p = draw(st.integers(1, 6))
    v = draw(st.integers(2, 4)) if name == "interleaved" else 1
    if name == "interleaved":
        m = p * draw(st.integers(1, 3))
    else:
        m = draw(st.integers(2 * p - 1 if name in ("zb-h2", "zbv") else 1, 14))
    times = (draw(costs),) * 3 if name == "zbv" else (draw(costs), draw(costs), draw(costs))
    return name, p, m, v, times


@given(steps())
def test_formulas_of_perf_hold(step):
    name, p, m, v, (f, b, w) = step
    found = simulate(make(name, p, m, v), f, b, w)
    times = pipeline.Times(f, b, w)
    said = pipeline.bubble(name, p, m, chunks=v, times=times)
    assert max(rank.idle for rank in found.ranks.values()) == pytest.approx(said.seconds)
    assert found.span_bubble == pytest.approx(said.over_total)
    assert found.makespan == pytest.approx(pipeline.makespan(name, p, m, chunks=v, times=times))
    for rank in range(p):
        assert found.peak[rank] == pytest.approx(pipeline.peak_in_flight(name, p, m, rank, chunks=v))


@given(st.integers(1, 6), st.integers(1, 10))
def test_plain_model_parallelism_uses_one_rank_at_a_time(p, m):
    found = simulate(sequential(p, m), 2, 3, 4)
    assert found.makespan == 9 * p * m
    assert found.bubble == pytest.approx((p - 1) / p)
    assert set(found.peak.values()) == {1}


@given(steps(), st.integers(0, 2**32))
def test_any_costs_agree_with_a_slow_simulation(step, seed):
    name, p, m, v, _ = step
    schedule = make(name, p, m, v)
    rng = random.Random(seed)
    stages = validate(schedule).stages
    f, b, w = ([Fraction(rng.randint(0, 20), rng.randint(1, 4)) for _ in range(stages)] for _ in "fbw")
    costs = [dict(zip("FBW", each)) for each in zip(f, b, w)]
    assert simulate(schedule, f, b, w).makespan == float(slow_makespan(schedule, costs))


@given(st.integers(1, 8), st.integers(1, 14))
def test_1f1b_is_the_order_that_its_limit_gives(p, m):
    assert one_f_one_b(p, m) == {rank: order(p, m, rank) for rank in range(p)}
    validate(one_f_one_b(p, m), limit={rank: p - rank for rank in range(p)})


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 7), st.integers(1, 12), st.integers(2, 4))
def test_every_schedule_can_be_run_at_every_size(name, p, m, v):
    """Also with fewer microbatches than ranks, where formulas stop."""
    m = m * p if name == "interleaved" else m
    schedule = make(name, p, m, v)
    chunks = v if name == "interleaved" else 2 if name == "zbv" else 1
    found = validate(schedule)
    assert (found.ranks, found.stages, found.microbatches, found.chunks) == (p, p * chunks, m, chunks)
    assert simulate(schedule).bubble < 1


@given(steps(st.integers(1, 5)), st.integers(0, 3))
def test_messages_only_delay(step, comm):
    name, p, m, v, times = step
    schedule = make(name, p, m, v)
    slower, faster = simulate(schedule, *times, comm=comm), simulate(schedule, *times)
    assert slower.makespan >= faster.makespan
    assert slower.peak == faster.peak
    for rank, spans in slower.spans.items():
        assert all(a[2] <= b[1] for a, b in pairwise(spans))
        assert all(s[1] >= f[1] for s, f in zip(spans, faster.spans[rank]))


# --- what is refused, and why -----------------------------------------------------------------------------------------


def without(schedule, rank, place):
    return {**schedule, rank: schedule[rank][:place] + schedule[rank][place + 1 :]}


def swapped(schedule, rank, a, b):
    ops = list(schedule[rank])
    ops[a], ops[b] = ops[b], ops[a]
    return {**schedule, rank: ops}


GOOD = one_f_one_b(2, 3)  # rank 0: F0 F1 BW0 F2 BW1 BW2; rank 1: F0 BW0 F1 BW1 F2 BW2
SPLIT = zb_h1(2, 2)  # rank 0: F0 F1 B0 W0 B1 W1; rank 1: F0 B0 F1 B1 W0 W1

REFUSED = {
    "missing forward": (
        without(GOOD, 0, 3),
        "rank 0 never does F of microbatch 2 in stage 0",
    ),
    "missing backward": (
        without(GOOD, 1, 5),
        "rank 1 never does B of microbatch 2 in stage 1, or BW for both gradients at once",
    ),
    "missing weights": (
        without(SPLIT, 0, 5),
        "rank 0 never does W of microbatch 1 in stage 0, which the optimizer needs",
    ),
    "missing input": (without(SPLIT, 0, 2), "rank 0 never does B of microbatch 0 in stage 0"),
    "missing everything": (
        {0: GOOD[0], 1: GOOD[1][:4]},
        "rank 1 never does F of microbatch 2 in stage 1, nor anything else of it",
    ),
    "far microbatch": (
        {0: [*GOOD[0], Op("F", 0, 10**12)], 1: GOOD[1]},
        "rank 0 never does F of microbatch 3 in stage 0, nor anything else of it",
    ),
    "twice": (
        {**GOOD, 0: [*GOOD[0], Op("F", 0, 1)]},
        "rank 0 has F of microbatch 1 in stage 0 twice, as operations 1 and 6",
    ),
    "backward twice": (
        {**GOOD, 1: [*GOOD[1], Op("BW", 1, 0)]},
        "rank 1 has BW of microbatch 0 in stage 1 twice, as operations 1 and 6",
    ),
    "two ranks": (
        {0: GOOD[0], 1: [*GOOD[1], Op("F", 0, 3)]},
        "stage 0 is on two ranks, 0 and 1: its weights can be on one only",
    ),
    "stage missing": (
        {0: GOOD[0], 1: [op._replace(stage=2) for op in GOOD[1]]},
        "no rank has stage 1, but rank 1 has stage 2: stages are numbered from 0",
    ),
    "weights first": (
        swapped(SPLIT, 0, 2, 3),
        "rank 0 has W of microbatch 0 in stage 0 (operation 2) before its B (operation 3), which it needs",
    ),
    "backward first": (
        swapped(GOOD, 1, 0, 1),
        "rank 1 has BW of microbatch 0 in stage 1 (operation 0) before its F (operation 1), which it needs",
    ),
    "mixed": (
        {**SPLIT, 0: [*SPLIT[0], Op("BW", 0, 0)]},
        "rank 0 has BW of microbatch 0 in stage 0 (operation 6) and B as well (operation 2): BW is B and W at once",
    ),
    "mixed weights": (
        {**GOOD, 0: [*GOOD[0], Op("W", 0, 1)]},
        "rank 0 has BW of microbatch 1 in stage 0 (operation 4) and W as well (operation 6)",
    ),
    "deadlock": (
        swapped(GOOD, 0, 1, 2) | {1: [Op("F", 1, 0), Op("F", 1, 1), *GOOD[1][1:2], *GOOD[1][3:]]},
        "deadlock: rank 0 waits at operation 1, BW of microbatch 0 in stage 0, for rank 1's operation 2, BW of "
        "microbatch 0 in stage 1; rank 1 waits at operation 1, F of microbatch 1 in stage 1, for rank 0's operation 2, "
        "F of microbatch 1 in stage 0. Operations are counted from 0",
    ),
    "waits for itself": (
        {0: [Op("F", 1, 0), Op("F", 0, 0), Op("BW", 1, 0), Op("BW", 0, 0)]},
        "deadlock: rank 0 waits at operation 0, F of microbatch 0 in stage 1, for its own operation 1, F of "
        "microbatch 0 in stage 0",
    ),
    "empty": ({}, "the schedule is empty"),
    "idle rank": ({**GOOD, 2: []}, "rank 2 has nothing to do"),
    "ranks": ({0: GOOD[0], 2: GOOD[1]}, "the ranks must be 0 to 1, got [0, 2]"),
    "kind": (
        {0: [Op("forward", 0, 0)]},
        "rank 0, operation 0: the kind is 'forward', known are F, B, W, BW",
    ),
    "negative": ({0: [Op("F", 0, -1)]}, "rank 0, operation 0: F of microbatch -1 in stage 0; both are counted from 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_run_is_refused_with_the_reason(name):
    schedule, reason = REFUSED[name]
    for function in (validate, simulate):
        with pytest.raises(ScheduleError) as raised:
            function(schedule)
        assert reason in str(raised.value)
    assert issubclass(ScheduleError, ValueError)


def test_of_a_circle_every_rank_is_named_and_no_other():
    """Rank r of four warms up with r + 1 microbatches instead of p − r: 0 and 1 wait for each other, 2 and 3 for 1."""
    turned = {}
    for rank in range(4):
        ahead = [Op("F", rank, i) for i in range(rank + 1)]
        pairs = [[Op("BW", rank, i), Op("F", rank, rank + 1 + i)] for i in range(4)]
        turned[rank] = ahead + [op for pair in pairs for op in pair if op.microbatch < 4]
    with pytest.raises(ScheduleError, match=r"deadlock: rank 0 waits .*; rank 1 waits") as raised:
        validate(turned)
    assert str(raised.value).count("waits") == 2


def test_a_circle_of_three():
    """Two chunks a rank: rank 0 waits for 2 before it feeds 1, and 1 and 2 want microbatch 1 before 0."""
    circle = {
        0: [Op("F", 0, 0), Op("F", 3, 0), Op("F", 0, 1), Op("F", 3, 1)],
        1: [Op("F", 1, 1), Op("F", 1, 0), Op("F", 4, 0), Op("F", 4, 1)],
        2: [Op("F", 2, 1), Op("F", 2, 0), Op("F", 5, 0), Op("F", 5, 1)],
    }
    circle = {
        rank: [*ops, *(Op("BW", s, i) for s in (rank + 3, rank) for i in range(2))] for rank, ops in circle.items()
    }
    with pytest.raises(ScheduleError) as raised:
        validate(circle)
    told = str(raised.value)
    assert "rank 0 waits at operation 1, F of microbatch 0 in stage 3, for rank 2's operation 1, F of" in told
    assert "; rank 2 waits at operation 0, F of microbatch 1 in stage 2, for rank 1's operation 0, F of" in told
    assert "; rank 1 waits at operation 0, F of microbatch 1 in stage 1, for rank 0's operation 2, F of" in told


NO_TABLE = {
    "list": ([[Op("F", 0, 0)]], "schedule must be a dictionary from each rank to the list of its operations, got list"),
    "rank": ({"0": []}, "the keys of schedule must be ranks, whole numbers; got '0'"),
    "bool": ({False: []}, "the keys of schedule must be ranks, whole numbers; got False"),
    "row": ({0: "F0"}, r"schedule\[0\] must be a list of operations, got str"),
    "tuple": ({0: [("F", 0, 0)]}, r"schedule\[0\]\[0\] must be an Op, as Op\(\"F\", 0, 1\) is; got \('F', 0, 0\)"),
    "half": ({0: [Op("F", 0, 0.5)]}, r"schedule\[0\]\[0\]: stage and microbatch must be whole numbers, got 0 and 0.5"),
    "kind": ({0: [Op(["F"], 0, 0)]}, r"schedule\[0\]\[0\]: kind must be one of F, B, W, BW, got \['F'\]"),
    "numpy": ({0: [Op("F", np.int64(0), 0)]}, "must be whole numbers"),
}


@pytest.mark.parametrize("name", NO_TABLE)
def test_what_is_no_table_is_named(name):
    schedule, message = NO_TABLE[name]
    for function in (validate, simulate):
        with pytest.raises(TypeError, match=message):
            function(schedule)


def test_what_is_missing_is_always_found():
    """Each operation of several schedules left out, doubled, or moved before what it needs."""
    for name in SCHEDULES:
        schedule = make(name, 2, 4)
        for rank, ops in schedule.items():
            for place, op in enumerate(ops):
                with pytest.raises(ScheduleError, match=f"rank {rank} .*{op.kind} of microbatch {op.microbatch}|never"):
                    validate(without(schedule, rank, place))
                with pytest.raises(ScheduleError, match="twice"):
                    validate({**schedule, rank: [*ops, op]})
                if op.kind != "F":
                    with pytest.raises(ScheduleError, match=f"{op.kind} of {str(op)[len(op.kind) + 4 :]} .* before"):
                        validate({**schedule, rank: [op, *ops[:place], *ops[place + 1 :]]})


def test_limits():
    assert validate(gpipe(4, 8), limit=8).microbatches == 8
    with pytest.raises(ScheduleError, match=r"rank 0 holds 5 microbatches from operation 4 on, F of microbatch 4 in"):
        validate(gpipe(4, 8), limit=4)
    with pytest.raises(ScheduleError, match=r"rank 2 holds 3 microbatches .* the limit is 2\."):
        validate(zb_h1(4, 8), limit={0: 4, 2: 2})
    validate(interleaved(4, 8, 2), limit=6)  # 5.5
    with pytest.raises(ScheduleError, match="rank 0 holds 11/2 microbatches from operation 10 on"):
        validate(interleaved(4, 8, 2), limit=5)
    for bad in (0, 1.5, True, {0: 0}):
        with pytest.raises(ValueError, match="limit must be a whole number of at least 1"):
            validate(gpipe(2, 2), limit=bad)
    with pytest.raises(ValueError, match=r"limit\[7\]: there is no such rank, the schedule has 0 to 1"):
        validate(gpipe(2, 2), limit={7: 1})


BAD_COSTS = {
    "negative": ({"f": -1}, ValueError, "f must be at least 0 and finite, got -1"),
    "nan": ({"b": math.nan}, ValueError, "b must be at least 0 and finite, got nan"),
    "infinite": ({"comm": math.inf}, ValueError, "comm must be at least 0 and finite, got inf"),
    "huge": ({"w": 10**400}, ValueError, "w must be finite"),
    "text": ({"f": "1"}, TypeError, "f must be a number, or a list or dictionary with one for each stage; got '1'"),
    "inside": ({"w": [1, -2]}, ValueError, r"w\[1\] must be at least 0"),
    "too many": ({"f": [1, 2, 3]}, ValueError, "f has costs of 3 stages, the schedule has 2"),
    "other stages": (
        {"b": {1: 1, 2: 1}},
        ValueError,
        r"b has costs of stages \[1, 2\], the schedule has stages 0 to 1",
    ),
    "no number": ({"comm": "fast"}, TypeError, "comm must be a number"),
}


@pytest.mark.parametrize("name", BAD_COSTS)
def test_costs_that_are_none_are_named(name):
    options, error, message = BAD_COSTS[name]
    with pytest.raises(error, match=message):
        simulate(gpipe(2, 2), **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: one_f_one_b(0, 1), ValueError, "p must be at least 1, got 0"),
        (lambda: gpipe(2, 0), ValueError, "m must be at least 1, got 0"),
        (lambda: zb_v(2.0, 4), TypeError, "p must be a whole number, got 2.0"),
        (lambda: interleaved(2, 4, 1), ValueError, "v=1: interleaved needs at least 2 chunks a rank"),
        (lambda: interleaved(4, 6, 2), ValueError, "m=6: interleaved sends microbatches in groups of p=4"),
    ],
)
def test_sizes_that_are_none_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_sizes_of_numpy_give_plain_numbers():
    schedule = interleaved(np.int64(2), np.int64(4), np.int64(2))
    assert schedule == interleaved(2, 4, 2)
    assert {type(value) for ops in schedule.values() for op in ops for value in op[1:]} == {int}


# --- measured steps ---------------------------------------------------------------------------------------------------


def test_what_was_simulated_can_be_observed():
    one = simulate(zb_v(3, 6), 1, 2, 1, comm=0.25)
    late = {rank: [(op, start + 100, end + 100) for op, start, end in spans] for rank, spans in one.spans.items()}
    seen = observed(late)
    assert (seen.makespan, seen.bubble, seen.span_bubble) == (one.makespan, one.bubble, one.span_bubble)
    assert (seen.peak, seen.ranks, seen.spans) == (one.peak, one.ranks, one.spans)


def test_what_cannot_have_been_measured_is_named():
    spans = simulate(gpipe(1, 1)).spans
    op = Op("BW", 0, 0)
    with pytest.raises(ValueError, match=r"spans\[0\]\[1\]: BW .* from 0.5 to 2, the one before it until 1.0"):
        observed({0: [spans[0][0], (op, 0.5, 2)]})
    with pytest.raises(ValueError, match="from 3 to 2"):
        observed({0: [spans[0][0], (op, 3, 2)]})
    with pytest.raises(ValueError, match="nan"):
        observed({0: [spans[0][0], (op, 3, math.nan)]})
    with pytest.raises(TypeError, match=r"spans\[0\]\[0\] must be \(Op, start, end\)"):
        observed({0: [(1, 2)]})
    with pytest.raises(TypeError, match="spans must be a dictionary"):
        observed([])
    with pytest.raises(ScheduleError, match="never does B"):
        observed({0: spans[0][:1]})


# --- shown and drawn --------------------------------------------------------------------------------------------------


def test_1f1b_as_text():
    text = show(one_f_one_b(4, 8)).splitlines()
    assert max(map(len, text)) <= 120
    assert text[3].startswith("rank 3  ··········F0")
    assert [line.count("BW") for line in text[:4]] == [8] * 4
    assert "F the forward pass, BW both gradients, · nothing" in text
    assert text[-1] == ("makespan 33; bubble 27.3%, within the span of a rank 27.3%; most microbatches held 4, 3, 2, 1")


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_fits_into_the_width(name):
    for width in (60, 120, 200):
        text = show(make(name, 4, 8), width=width).splitlines()
        assert max(len(line) for line in text[:-3]) <= width
        assert [line[:6] for line in text if line.startswith("rank")] == [f"rank {r}" for r in range(4)]


def test_where_numbers_do_not_fit_they_stand_below():
    text = show(zb_v(2, 4), width=60).splitlines()
    assert text[0].startswith("rank 0  F")
    assert text[1].split()[0] == "0"
    assert text[2].split()[:2] == ["0", "0"]
    assert "below the kind the microbatch, below that the stage" in text
    assert show(simulate(zb_v(2, 4), 0, 0, 0))


def test_text_of_simulated_and_measured_steps():
    one = simulate(gpipe(2, 2), 1, 1, 1, comm=1)
    assert show(one) == show(one.spans)
    assert show(one) != show(gpipe(2, 2))
    with pytest.raises(ValueError, match="width must be at least 18, got 5"):
        show(one, width=5)
    with pytest.raises(TypeError, match="schedule must be a dictionary"):
        show(3)


def words(svg):
    return [e.text for e in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text") if e.text]


def test_the_picture_has_what_the_simulation_says(tmp_path):
    one = simulate(one_f_one_b(2, 3))
    figure = plot({"simulated": one, "measured": one.spans}, tmp_path / "a.svg", unit="ms")
    svg = (tmp_path / "a.svg").read_text()
    plot({"simulated": one, "measured": one.spans}, tmp_path / "b.svg", unit="ms")
    assert svg == (tmp_path / "b.svg").read_text()  # the same bytes
    told = words(svg)
    assert [told.count(str(i)) for i in (1, 2)] >= [8, 8]
    assert "simulated: 12 long, bubble 25.0%, in a span 25.0%, holds 2 1" in told
    assert {"time (ms)", "rank 0", "rank 1", "F: the forward pass", "BW: both gradients"} <= set(told)
    above, below = figure.axes
    assert above.get_xlim() == below.get_xlim()
    rectangles = sum(len(c.get_paths()) for c in above.collections)
    assert rectangles == 2 * 6 + 2  # and what lies behind each rank


def test_numbers_that_do_not_fit_are_left_out_of_the_picture(tmp_path):
    plot(one_f_one_b(2, 200), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    figure = plot(one_f_one_b(2, 200))
    assert not figure.axes[0].texts


def test_a_long_step_is_drawn_as_few_shapes():
    """The same area in the same colours, and no more shapes than ranks and kinds."""
    figure = plot(one_f_one_b(4, 400))
    ax = figure.axes[0]
    shapes = [patch for patch in ax.get_children() if type(patch).__name__ == "PathPatch"]
    assert len(shapes) == 4 * 2
    assert [len(shape.get_path().vertices) for shape in shapes] == [5 * 400] * 8  # four corners and the end of each
    first = shapes[0].get_path().vertices[:4]
    assert first.tolist() == [[0, -0.42], [1, -0.42], [1, 0.42], [0, 0.42]]
    assert sum(len(c.get_paths()) for c in ax.collections) == 4  # what lies behind each rank


def test_on_axes_of_ones_own():
    from matplotlib.figure import Figure

    figure = Figure()
    ax = figure.subplots()
    assert plot(gpipe(2, 2), ax=ax) is figure
    assert len(ax.texts) == 8
    with pytest.raises(ValueError, match="ax takes a single timeline"):
        plot({"a": gpipe(2, 2), "b": gpipe(2, 2)}, ax=ax)


def test_pictures_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in .svg, .png or .pdf, got 'a.gif'"):
        plot(gpipe(2, 2), "a.gif")
    with pytest.raises(ValueError, match="panels is empty"):
        plot({})


# --- torch's tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_torch_reads_our_tables(name):
    """Its parser, its check of order and owners, its messages, and its dry run for deadlocks."""
    from torch.distributed.pipelining import schedules as theirs

    ours = make(name, 4, 8)
    summary = validate(ours)
    rows = torch_schedules.to_csv(ours).splitlines()
    actions = {rank: [theirs._Action.from_str(word) for word in row.split(",")] for rank, row in enumerate(rows)}
    assert torch_schedules.from_torch(actions) == ours
    owners = theirs._validate_schedule(actions, 4, summary.stages, 8)
    assert owners == dict(enumerate(summary.rank_of))
    full = theirs._add_send_recv(actions, owners.__getitem__, summary.stages)
    sends = sum("SEND" in str(action) for row in full.values() for action in row)
    assert sends == 2 * 8 * sum(a != b for a, b in pairwise(summary.rank_of))
    theirs._simulate_comms_compute(full, owners.__getitem__, summary.stages)


@pytest.mark.parametrize(
    ("name", "v", "makespan", "peak"),
    [
        ("Interleaved1F1B", 2, 28.5, [5.5, 4.5, 3.5, 2.5]),
        ("ZBVZeroBubble", 2, 25.5, [4, 4, 4, 4]),
    ],
)
def test_torch_tables_can_be_simulated(name, v, makespan, peak):
    """And come out as ours do."""
    theirs = torch_schedules.torch_table(name, 4, 8, v)
    found = simulate(theirs)
    assert found.makespan == makespan
    assert list(found.peak.values()) == peak


def test_all_is_exported():
    assert set(schedules.__all__) <= set(dir(schedules))
    assert {"validate", "simulate", "show", "plot", "observed", *[f.__name__ for f in SCHEDULES.values()]} <= set(
        schedules.__all__
    )


def test_costs_beyond_all_numbers_are_named():
    with pytest.raises(ValueError, match="too large for their sum"):
        simulate(one_f_one_b(4, 8), 1e308, 1e308, 1e308)


def test_plain_tuples_are_named_as_what_they_are():
    with pytest.raises(TypeError, match="must be an Op"):
        show({0: [("F", 0, 0), ("BW", 0, 0)]})
