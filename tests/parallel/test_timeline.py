"""The timeline: a rank's seconds are divided without rest, waiting is told from moving bytes, clocks are set."""

import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys.parallel import launch
from mlsys.parallel.timeline import KINDS, Span, Split, Timeline, collectives, gather, split, to_chrome

WORKER = 7  # a thread beside the program's, which is 0


def rank(*spans):
    """Spans of one rank: (kind, start, end), and the thread where it is not the program's."""
    return [Span(kind, f"{kind} x", start, end, *thread) for kind, start, end, *thread in spans]


def seconds(part):
    return pytest.approx(part, abs=1e-9)


# --- one rank ---------------------------------------------------------------------------------------------------------


def test_spans_are_noted_in_order_with_their_thread():
    ticks = iter(range(100))
    timeline = Timeline(clock=lambda: next(ticks))
    with timeline.span("compute", "outer"), timeline.span("optimizer", "inner"):
        pass
    other = threading.Thread(target=timeline.add, args=("communication", "all_reduce", 5, 5))
    other.start()
    other.join()
    assert [span[:4] for span in timeline.spans] == [
        ("optimizer", "inner", 1, 2),
        ("compute", "outer", 0, 3),
        ("communication", "all_reduce", 5, 5),
    ]
    assert timeline.spans[0].thread == timeline.spans[1].thread == threading.get_ident() != timeline.spans[2].thread
    assert len(timeline) == 3
    timeline.clear()
    assert timeline.spans == []


def test_span_is_noted_when_the_block_raises():
    timeline = Timeline()
    with pytest.raises(KeyError), timeline.span("compute", "fails"):
        raise KeyError
    assert timeline.spans[0].name == "fails"


def test_what_comes_while_it_does_not_record_is_forgotten():
    timeline = Timeline()
    timeline.recording = False
    with timeline.span("compute", "warm-up"):
        pass
    timeline.recording = True
    timeline.add("compute", "step", 0, 1)
    assert [span.name for span in timeline.spans] == ["step"]


def test_many_threads_may_add():
    timeline = Timeline()
    threads = [
        threading.Thread(target=lambda: [timeline.add("compute", "x", i, i) for i in range(500)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(timeline) == 4000


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("computing", "x", 0, 1), "kind='computing': a span is one of compute, communication, waiting, optimizer"),
        (("compute", "x", 2, 1), "end=1 is before start=2"),
        (("compute", "x", float("nan"), 1), "end=1 is before start=nan"),
    ],
)
def test_what_is_no_span_is_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        Timeline().add(*arguments)


# --- collectives ------------------------------------------------------------------------------------------------------


def test_waiting_ends_when_the_last_rank_is_there():
    early, late = rank(("communication", 1, 10)), rank(("communication", 6, 11))
    (call,) = collectives([early, late])
    assert (call.arrival, call.last) == (6, 1)
    assert [call.waiting(0), call.communication(0)] == [5, 4]
    assert [call.waiting(1), call.communication(1)] == [0, 5]
    assert split([early, late]) == [Split(0, 0, 4, 5, 0, 0), Split(0, 0, 5, 0, 0, 0)]


def test_who_leaves_before_the_last_comes_waited_for_nobody():
    root, leaf = rank(("communication", 0, 2)), rank(("communication", 3, 4))
    (call,) = collectives([root, leaf])
    assert [call.waiting(0), call.communication(0)] == [0, 2]
    assert split([root, leaf])[0].communication == 2


def test_the_kth_of_a_name_is_the_same_collective():
    def spans(a, b, c):
        return [Span("communication", name, t, t + 1) for name, t in (("small", a), ("big", b), ("small", c))]

    # The two ranks begin "big" and the second "small" in another order.
    calls = collectives([spans(0, 2, 4), spans(1, 5, 3)])
    assert [(call.name, call.starts) for call in calls] == [
        ("small", {0: 0, 1: 1}),
        ("small", {0: 4, 1: 3}),
        ("big", {0: 2, 1: 5}),
    ]


def test_a_name_of_some_ranks_is_theirs_alone():
    mine = [Span("communication", "host 0", 0, 3)]
    assert collectives([mine, [Span("communication", "host 0", 2, 3)], []])[0].starts == {0: 0, 1: 2}


def test_unequal_counts_are_not_guessed_at():
    twice = rank(("communication", 0, 1), ("communication", 2, 3))
    calls = collectives([twice, rank(("communication", 2, 3))])
    assert sorted((*call.starts, call.waiting(*call.starts)) for call in calls) == [(0, 0), (0, 0), (1, 0)]


# --- the split --------------------------------------------------------------------------------------------------------


def test_blocking_collective_is_taken_out_of_the_span_around_it():
    spans = rank(("compute", 0, 10), ("communication", 4, 6), ("optimizer", 10, 12), ("communication", 11, 12))
    assert split([spans]) == [Split(8, 1, 3, 0, 0, 0)]


def test_asynchronous_collective_costs_only_what_is_waited_for():
    # Bytes move from 4 to 12 beneath a backward pass that is blocked from 9 on.
    spans = rank(("compute", 0, 12), ("communication", 4, 12, WORKER), ("waiting", 9, 12))
    assert split([spans]) == [Split(9, 0, 3, 0, 0, 5)]


def test_blocked_before_others_are_there_is_waiting():
    early = rank(("compute", 0, 2), ("communication", 2, 10, WORKER), ("waiting", 2, 10))
    late = rank(("compute", 0, 7), ("communication", 7, 10, WORKER), ("waiting", 7, 10))
    assert split([early, late]) == [Split(2, 0, 3, 5, 0, 0), Split(7, 0, 3, 0, 0, 0)]


def test_blocked_while_nothing_moves_is_waiting_and_gaps_are_other():
    spans = rank(("compute", 0, 2), ("waiting", 3, 4), ("optimizer", 6, 7))
    assert split([spans]) == [Split(2, 1, 0, 1, 3, 0)]


def test_overlapping_and_nested_spans_count_once():
    spans = rank(("compute", 0, 5), ("compute", 3, 8), ("compute", 4, 5), ("optimizer", 7, 9))
    assert split([spans]) == [Split(7, 2, 0, 0, 0, 0)]


def test_collective_alone_blocks_its_thread_whatever_that_is():
    assert split([rank(("communication", 0, 3, WORKER))]) == [Split(0, 0, 3, 0, 0, 0)]


def test_only_the_windows_are_divided():
    spans = rank(("compute", 0, 4), ("communication", 2, 6, WORKER), ("waiting", 4, 6), ("optimizer", 7, 9))
    assert split([spans], [[(1, 5), (8, 12)]]) == [Split(3, 1, 1, 0, 3, 2)]
    assert split([spans], [[(1, 3), (2, 5)]]) == split([spans], [[(1, 5)]]) == [Split(3, 0, 1, 0, 0, 2)]
    with pytest.raises(ValueError):
        split([spans], [])


def test_rank_without_spans_has_zeros():
    assert split([[], rank(("compute", 1, 2))]) == [Split(0, 0, 0, 0, 0, 0), Split(1, 0, 0, 0, 0, 0)]
    assert split([]) == []


moment = st.integers(0, 40)
some_spans = st.lists(
    st.builds(
        lambda kind, a, b, thread: Span(kind, kind, min(a, b), max(a, b), thread),
        st.sampled_from(KINDS),
        moment,
        moment,
        st.sampled_from([0, WORKER]),
    ),
    max_size=8,
)


@given(st.lists(some_spans, min_size=1, max_size=3))
def test_parts_are_what_counting_every_tick_gives(ranks):
    """Against a clock of whole ticks: each tick of a rank is looked at by itself."""
    calls = collectives(ranks)
    for r, (spans, parts) in enumerate(zip(ranks, split(ranks), strict=True)):
        if not spans:
            continue
        program = {s.thread for s in spans if s.kind != "communication"} or {s.thread for s in spans}
        counted = dict.fromkeys(("compute", "optimizer", "communication", "waiting", "other", "hidden"), 0)
        for tick in range(min(s.start for s in spans), max(s.end for s in spans)):
            now = [s for s in spans if s.start <= tick < s.end]
            here = [c for c in calls if r in c.starts and c.starts[r] <= tick < c.ends[r]]
            moving = any(tick >= c.arrival or c.ends[r] < c.arrival for c in here)
            still = any(s.kind == "waiting" or (s.kind == "communication" and s.thread in program) for s in now)
            kinds = {s.kind for s in now}
            what = "other"
            if still:
                what = "communication" if moving else "waiting"
            elif "optimizer" in kinds:
                what = "optimizer"
            elif "compute" in kinds:
                what = "compute"
            counted[what] += 1
            counted["hidden"] += moving and what in ("compute", "optimizer")
        assert vars(parts) == {name: seconds(value) for name, value in counted.items()}
        assert parts.total == seconds(max(s.end for s in spans) - min(s.start for s in spans))


# --- several processes ------------------------------------------------------------------------------------------------


def work():
    """Each rank's clock is as many seconds ahead as its number; all meet in a barrier."""
    import time

    import torch.distributed as dist

    rank = dist.get_rank()
    timeline = Timeline(clock=lambda: time.perf_counter() + rank)
    with timeline.span("compute", f"on {rank}"):
        pass
    dist.barrier()
    with timeline.span("communication", "barrier"):
        dist.barrier()
    return gather(timeline), gather(timeline, align=True)


def test_gathered_on_every_rank_with_clocks_set():
    n = 3
    results = launch(work, n)
    raw, _ = results[0]
    assert [[span.name for span in spans] for spans in raw] == [[f"on {r}", "barrier"] for r in range(n)]
    assert all(result[0] == raw for result in results)  # one host: clocks are trusted
    assert all(result[1] == results[0][1] for result in results)
    first = raw[0][1]
    for r in range(1, n):
        # A barrier ends at about the same time for all: a second apart by clocks that are a second apart.
        assert raw[r][1].end - first.end > 0.9 * r - 0.4
        assert abs(results[0][1][r][1].end - results[0][1][0][1].end) < 0.4
        assert raw[r][0].start - results[0][1][r][0].start == pytest.approx(r, abs=0.1)


# --- the trace --------------------------------------------------------------------------------------------------------


def test_trace_has_a_process_a_rank_and_microseconds(tmp_path):
    ranks = [
        rank(("compute", 100.0, 100.5), ("communication", 100.2, 100.6, WORKER), ("waiting", 100.5, 100.6)),
        rank(("communication", 100.3, 100.6)),
    ]
    path = to_chrome(ranks, tmp_path / "trace.json")
    events = json.loads(path.read_text())["traceEvents"]
    names = {(e["pid"], e["tid"], e["name"]): e["args"]["name"] for e in events if e["ph"] == "M"}
    assert names == {
        (0, 0, "process_name"): "rank 0",
        (0, 0, "thread_name"): "program",
        (0, 1, "thread_name"): "communication",
        (1, 0, "process_name"): "rank 1",
        (1, 0, "thread_name"): "program",
    }
    spans = [(e["pid"], e["tid"], e["cat"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert spans == [
        (0, 0, "compute", 0, 500_000),
        (0, 1, "communication", 200_000, 400_000),
        (0, 0, "waiting", 500_000, 100_000),
        (1, 0, "communication", 300_000, 300_000),
    ]
    arguments = [e["args"] for e in events if e["ph"] == "X"]
    assert arguments[1] == {"last to arrive": 1, "waited ms": pytest.approx(100)}
    assert arguments[3] == {"last to arrive": 1, "waited ms": 0}
    assert arguments[0] == arguments[2] == {}


def test_trace_of_nothing_is_a_trace(tmp_path):
    assert json.loads(to_chrome([], tmp_path / "t.json").read_text())["traceEvents"] == []


def test_trace_is_whole_or_absent(tmp_path):
    with pytest.raises(FileNotFoundError):
        to_chrome([], tmp_path / "nowhere" / "t.json")
    assert list(tmp_path.iterdir()) == []
