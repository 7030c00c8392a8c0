"""`mlsys.perf.pipeline` predicts what a simulation finds: each schedule is written out here and run.

An operation is (kind, chunk, microbatch) on a rank: F, B (gradient of the input) or W (gradient of the weights). A rank
runs its list in order, each operation as soon as what it needs is there. Times are fractions.
"""

from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlsys.perf import pipeline
from mlsys.perf.pipeline import Times


def one_chunk(p, m, warm_up, put_off):
    """`warm_up(r)` forward passes, then B and F in turn; W follows once more than `put_off(r)` of them wait."""
    orders = []
    for rank in range(p):
        started = min(warm_up(rank), m)
        ops = [("F", 0, i) for i in range(started)]
        weights = 0
        for i in range(m):
            ops.append(("B", 0, i))
            if i + 1 - weights > put_off(rank):
                ops.append(("W", 0, weights))
                weights += 1
            if started < m:
                ops.append(("F", 0, started))
                started += 1
        orders.append([*ops, *(("W", 0, i) for i in range(weights, m))])
    return orders


def interleaved(p, m, v):
    """Groups of p microbatches go through chunk after chunk; warm-up as in Megatron."""
    forward = [(chunk, group + i) for group in range(0, m, p) for chunk in range(v) for i in range(p)]
    backward = [(v - 1 - chunk, i) for chunk, i in forward]
    orders = []
    for rank in range(p):
        started = min(2 * (p - 1 - rank) + (v - 1) * p, m * v)
        ops = [("F", *unit) for unit in forward[:started]]
        for i, unit in enumerate(backward):
            if started + i < m * v:
                ops.append(("F", *forward[started + i]))
            ops += [("B", *unit), ("W", *unit)]
        orders.append(ops)
    return orders


def zbv(p, m):
    """Two chunks a rank, the second on the way back up; B and W of a chunk follow each other but for the last few."""
    orders = []
    for rank in range(p):
        plan = (
            [("F", 0)] * (2 * (p - rank) - 1)
            + [("F", 1), ("F", 0)] * rank
            + [("F", 1), ("B", 1), ("W", 1)] * (p - rank)
            + [("F", 0), ("B", 0), ("W", 0), ("F", 1), ("B", 1), ("W", 1)] * (m - p)
            + [("B", 0), ("B", 1)] * rank
            + [("B", 0), ("W", 0)] * (p - rank)
            + [("W", 1), ("W", 0)] * rank
        )
        done = dict.fromkeys(plan, 0)
        ops = []
        for unit in plan:
            if done[unit] < m:  # the last forward passes of chunk 0 were early
                ops.append((*unit, done[unit]))
                done[unit] += 1
        orders.append(ops)
    return orders


def written_out(schedule, p, m, v):
    return {
        "gpipe": lambda: one_chunk(p, m, lambda r: m, lambda r: 0),
        "1f1b": lambda: one_chunk(p, m, lambda r: p - r, lambda r: 0),
        "interleaved": lambda: interleaved(p, m, v),
        "zb-h1": lambda: one_chunk(p, m, lambda r: p - r, lambda r: r),
        "zb-h2": lambda: one_chunk(p, m, lambda r: 2 * (p - r) - 1, lambda r: 2 * r),
        "zbv": lambda: zbv(p, m),
    }[schedule]()


def stage_of(schedule, rank, chunk, p):
    return 2 * p - 1 - rank if schedule == "zbv" and chunk else chunk * p + rank


def simulate(schedule, p, m, v, times):
    """Makespan, longest span of a rank, most microbatches held and messages sent, for each rank."""
    orders = written_out(schedule, p, m, v)
    chunks = 2 if schedule == "zbv" else v
    seconds = {"F": times.forward, "B": times.backward_input, "W": times.backward_weight}
    stages = p * chunks
    rank_of = {stage_of(schedule, rank, chunk, p): rank for rank in range(p) for chunk in range(chunks)}
    # Without a split backward pass, the gradient leaves when all of the backward pass is done.
    sends_back = "B" if schedule.startswith("zb") else "W"
    end, first, now = {}, [None] * p, [Fraction(0)] * p
    held, most, sent, place = [0] * p, [0] * p, [0] * p, [0] * p
    progress = True
    while progress:
        progress = False
        for rank in range(p):
            while place[rank] < len(orders[rank]):
                kind, chunk, i = orders[rank][place[rank]]
                stage = stage_of(schedule, rank, chunk, p)
                needs = {
                    "F": [("F", stage - 1, i)] * (stage > 0),
                    "B": [("F", stage, i), *[(sends_back, stage + 1, i)] * (stage < stages - 1)],
                    "W": [("B", stage, i)],
                }[kind]
                if not all(need in end for need in needs):
                    break
                start = max([now[rank], *(end[need] for need in needs)])
                now[rank] = end[kind, stage, i] = start + Fraction(seconds[kind]) / chunks
                first[rank] = start if first[rank] is None else first[rank]
                held[rank] += {"F": 1, "B": 0, "W": -1}[kind]
                most[rank] = max(most[rank], held[rank])
                to = {"F": stage + 1, "B": stage - 1}.get(kind)
                sent[rank] += to in rank_of and rank_of[to] != rank
                place[rank] += 1
                progress = True
    assert len(end) == 3 * stages * m, "the schedule is stuck"
    spans = [stop - start for start, stop in zip(first, now)]
    return max(now) - min(first), max(spans), [Fraction(x, chunks) for x in most], sent


TIMES = st.builds(Times, *[st.integers(1, 9).map(Fraction)] * 3)


@st.composite
def runs(draw):
    schedule = draw(st.sampled_from(pipeline.SCHEDULES))
    p = draw(st.integers(1, 6))
    v = draw(st.integers(2, 4)) if schedule == "interleaved" else 1
    if schedule == "interleaved":
        m = p * draw(st.integers(1, 3))
    else:
        m = draw(st.integers(2 * p - 1 if schedule in ("zb-h2", "zbv") else 1, 14))
    times = draw(st.just(Times(*[draw(st.integers(1, 9).map(Fraction))] * 3)) if schedule == "zbv" else TIMES)
    return schedule, p, m, v, times


@given(runs())
@example(("zb-h1", 2, 2, 1, Times(2, 1, 2)))  # the last rank has the shortest bubble, and ends last
def test_formulas_are_what_a_simulation_finds(run):
    schedule, p, m, v, times = run
    makespan, span, most, sent = simulate(schedule, p, m, v, times)
    got = pipeline.bubble(schedule, p, m, chunks=v, times=times)
    assert got.ideal == m * times.total
    assert got.seconds == pytest.approx(float(span - m * times.total))
    assert pipeline.makespan(schedule, p, m, chunks=v, times=times) == pytest.approx(float(makespan))
    for rank in range(p):
        assert pipeline.peak_in_flight(schedule, p, m, rank, chunks=v) == pytest.approx(float(most[rank]))
        assert pipeline.bytes_sent(schedule, p, m, rank, 10, chunks=v) == 10 * sent[rank]


@pytest.mark.parametrize("schedule", pipeline.SCHEDULES)
def test_every_schedule_runs_as_predicted_on_four_ranks(schedule):
    """F = B = W = 1, 4 ranks, 8 microbatches, by name: what hypothesis draws must not be all that is tested."""
    v = 2 if schedule == "interleaved" else 1
    makespan, span, _, _ = simulate(schedule, 4, 8, v, Times(1, 1, 1))
    expected = {
        "gpipe": (33, 33),
        "1f1b": (33, 33),
        "interleaved": (28.5, 28.5),
        "zb-h1": (27, 27),
        "zb-h2": (27, 24),
        "zbv": (25.5, 24),
    }[schedule]
    assert (makespan, span) == expected
    assert pipeline.makespan(schedule, 4, 8, chunks=v) == makespan
    assert pipeline.bubble(schedule, 4, 8, chunks=v).span == span


@pytest.mark.parametrize(
    ("schedule", "chunks", "over_ideal", "over_total"),
    [
        ("gpipe", 1, 3 / 8, 3 / 11),
        ("1f1b", 1, 3 / 8, 3 / 11),
        ("interleaved", 2, 3 / 16, 3 / 19),
        ("interleaved", 4, 3 / 32, 3 / 35),
        ("zb-h1", 1, 1 / 8, 1 / 9),
        ("zb-h2", 1, 0, 0),
        ("zbv", 1, 0, 0),
    ],
)
def test_published_fractions(schedule, chunks, over_ideal, over_total):
    got = pipeline.bubble(schedule, 4, 8, chunks=chunks)
    assert got.over_ideal == pytest.approx(over_ideal)
    assert got.over_total == pytest.approx(over_total)


@pytest.mark.parametrize("m", [8, 9, 64])
@pytest.mark.parametrize("times", [Times(1.0, 1.0, 1.0), Times(1.0, 1.2, 0.8), Times(2.0, 1.0, 1.5)])
def test_published_zero_bubble_formulas(m, times):
    """Table 2 of the paper, where W ≤ F and microbatches suffice."""
    f, b, w = times.forward, times.backward_input, times.backward_weight
    assert pipeline.bubble("zb-h1", 4, m, times=times).seconds == pytest.approx(3 * (f + b - w))
    assert pipeline.bubble("zb-h2", 4, m, times=times).seconds == pytest.approx(3 * max(0, f + b - 2 * w))


def test_published_memory():
    assert [pipeline.peak_in_flight("gpipe", 4, 8, r) for r in range(4)] == [8, 8, 8, 8]
    assert [pipeline.peak_in_flight("1f1b", 4, 8, r) for r in range(4)] == [4, 3, 2, 1]
    assert [pipeline.peak_in_flight("interleaved", 4, 8, r, chunks=2) for r in range(4)] == [5.5, 4.5, 3.5, 2.5]
    assert [pipeline.peak_in_flight("zb-h1", 4, 8, r) for r in range(4)] == [4, 4, 4, 4]
    assert [pipeline.peak_in_flight("zb-h2", 4, 8, r) for r in range(4)] == [7, 7, 7, 7]
    assert [pipeline.peak_in_flight("zbv", 4, 8, r) for r in range(4)] == [4, 4, 4, 4]


@given(runs())
def test_more_microbatches_hide_the_bubble(run):
    schedule, p, m, v, times = run
    one = pipeline.bubble(schedule, p, m, chunks=v, times=times)
    two = pipeline.bubble(schedule, p, 2 * m, chunks=v, times=times)
    assert 0 <= two.over_ideal <= one.over_ideal
    assert two.over_total <= one.over_total < 1
    assert one.over_total <= one.over_ideal
    assert pipeline.makespan(schedule, p, m, chunks=v, times=times) >= one.span


@pytest.mark.parametrize("schedule", pipeline.SCHEDULES)
def test_one_stage_waits_for_nobody(schedule):
    v = 2 if schedule == "interleaved" else 1
    assert pipeline.bubble(schedule, 1, 5, chunks=v).seconds == 0
    assert pipeline.makespan(schedule, 1, 5, chunks=v) == 15
    assert pipeline.bytes_sent(schedule, 1, 5, 0, 10, chunks=v) == 0


def test_boundary_bytes():
    assert pipeline.boundary_bytes(2, 2048, 12288) == 2 * 2048 * 12288 * 2
    assert 8 * pipeline.boundary_bytes(2, 2048, 12288, tp=8) == pipeline.boundary_bytes(2, 2048, 12288)
    with pytest.raises(ValueError, match="seq must be at least 1"):
        pipeline.boundary_bytes(1, 0, 1)


BAD = {
    "schedule": (("zb-h3", 4, 8), {}, ValueError, "schedule='zb-h3' is not known; did you mean 'zb-h"),
    "stages": (("gpipe", 0, 8), {}, ValueError, "stages must be at least 1, got 0"),
    "microbatches": (("gpipe", 4, 0), {}, ValueError, "microbatches must be at least 1, got 0"),
    "half": (("gpipe", 4, 8.0), {}, TypeError, "microbatches must be a whole number"),
    "stray chunks": (("1f1b", 4, 8), {"chunks": 2}, ValueError, "chunks=2 is for 'interleaved' only, not for '1f1b'"),
    "one chunk": (("interleaved", 4, 8), {}, ValueError, "needs at least 2; with 1 it is '1f1b'"),
    "uneven": (
        ("interleaved", 4, 6),
        {"chunks": 2},
        ValueError,
        "microbatches=6: 'interleaved' needs a multiple of stages=4",
    ),
    "few for h2": (("zb-h2", 4, 6), {}, ValueError, "microbatches=6: 'zb-h2' starts 2·stages − 1 = 7"),
    "few for zbv": (("zbv", 4, 6), {}, ValueError, "'zb-h1' does with fewer"),
    "unequal": (("zbv", 4, 8), {"times": Times(1, 2, 1)}, ValueError, "for equal times only"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    arguments, options, error, message = BAD[name]
    for function in (pipeline.bubble, pipeline.makespan):
        with pytest.raises(error, match=message):
            function(*arguments, **options)


@pytest.mark.parametrize("rank", [-1, 4])
def test_ranks_are_below_stages(rank):
    with pytest.raises(ValueError, match="rank must be"):
        pipeline.peak_in_flight("1f1b", 4, 8, rank)
    with pytest.raises(ValueError, match="rank must be"):
        pipeline.bytes_sent("1f1b", 4, 8, rank, 1)


def test_times_are_positive():
    with pytest.raises(ValueError, match="backward_weight must be positive and finite, got 0"):
        Times(1, 1, 0)
