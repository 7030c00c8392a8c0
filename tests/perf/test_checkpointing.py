"""`mlsys.perf.checkpointing`: closed form, dynamic programming and a schedule that is run all count the same steps.

The schedules here also run on a real chain of layers, where they must give the gradient.
"""

import math
from itertools import combinations, pairwise
from math import cos, sin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys.perf import checkpointing
from mlsys.perf.checkpointing import Instruction, replay, revolve_cost, revolve_extra_forwards, revolve_schedule

# --- segments ---------------------------------------------------------------------------------------------------------


def run_segments(segments, input_bytes, activation_bytes):
    """Forward and backward, layer by layer, with a ledger: the peak, and how many layers ran more than once."""
    layers = segments[-1].stop
    alive, peak, runs = {}, 0, [0] * layers

    def keep(key, size):
        nonlocal peak
        alive[key] = size
        peak = max(peak, sum(alive.values()))

    for segment in segments:
        keep(("input", segment.start), input_bytes)
        for layer in segment:
            runs[layer] += 1
            if segment == segments[-1]:
                keep(("activations", layer), activation_bytes)
    for segment in reversed(segments):
        for layer in segment:
            if ("activations", layer) not in alive:
                runs[layer] += 1
                keep(("activations", layer), activation_bytes)
        for layer in reversed(segment):
            del alive["activations", layer]
        del alive["input", segment.start]
    assert not alive
    return peak, sum(runs) - layers


def cuts(layers):
    """All ways to cut the layers."""
    for count in range(layers):
        for inner in combinations(range(1, layers), count):
            bounds = (0, *inner, layers)
            yield [range(a, b) for a, b in pairwise(bounds)]


@pytest.mark.parametrize("layers", range(1, 9))
@pytest.mark.parametrize(("input_bytes", "activation_bytes"), [(1, 1), (2, 34), (5, 1)])
def test_peak_and_extra_are_what_a_run_finds(layers, input_bytes, activation_bytes):
    for segments in cuts(layers):
        peak, extra = run_segments(segments, input_bytes, activation_bytes)
        assert checkpointing.peak_memory(segments, input_bytes, activation_bytes) == peak
        assert checkpointing.extra_forwards(segments) == extra


@given(layers=st.integers(1, 150), ratio=st.floats(0.1, 100))
def test_sqrt_schedule_is_the_best_even_cut(layers, ratio):
    segments = checkpointing.sqrt_schedule(layers, ratio=ratio)
    lengths = [len(segment) for segment in segments]
    assert sum(lengths) == layers
    assert max(lengths) - min(lengths) <= 1
    peak = checkpointing.peak_memory(segments, 1, ratio)
    for count in range(1, layers + 1):
        short, longer = divmod(layers, count)  # the last segment is a short one
        assert peak <= max(longer + (short + 1) * ratio if longer else 0, count + short * ratio) * (1 + 1e-12)
    assert checkpointing.extra_forwards(segments) < layers


@given(layers=st.integers(1, 200))
def test_peak_is_at_most_twice_the_square_root(layers):
    assert checkpointing.peak_memory(checkpointing.sqrt_schedule(layers), 1, 1) <= math.ceil(2 * math.sqrt(layers))


def test_dear_activations_make_short_segments():
    few = checkpointing.sqrt_schedule(96, ratio=1)
    many = checkpointing.sqrt_schedule(96, ratio=17)
    assert len(many) > len(few)
    assert checkpointing.sqrt_schedule(1) == [range(1)]


@pytest.mark.parametrize(
    "segments",
    [[], [range(1, 3)], [range(2), range(3, 4)], [range(2), range(2, 2)], [range(0, 4, 2)], [range(2), range(1, 3)]],
)
def test_segments_that_do_not_cover_the_layers_are_refused(segments):
    with pytest.raises(ValueError, match="segments"):
        checkpointing.peak_memory(segments, 1, 1)
    with pytest.raises(ValueError, match="segments"):
        checkpointing.extra_forwards(segments)


# --- Revolve ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "snapshots", "steps"), [(20, 3, 45), (100, 5, 316), (100, 10, 222)])
def test_published_counts(layers, snapshots, steps):
    assert revolve_extra_forwards(layers, snapshots) == steps
    assert revolve_cost(layers, snapshots) == steps
    assert replay(revolve_schedule(layers, snapshots), layers, snapshots) == steps


@given(layers=st.integers(1, 60), snapshots=st.integers(1, 70))
def test_three_ways_to_count(layers, snapshots):
    steps = revolve_cost(layers, snapshots)
    assert revolve_extra_forwards(layers, snapshots) == steps
    assert replay(revolve_schedule(layers, snapshots), layers, snapshots) == steps


def fewest(layers, snapshots):
    """The least steps, by searching all that can be done; a state is (at hand, kept, layers left)."""
    frontier, seen = {(0, frozenset({0}), layers)}, {}
    cost = 0
    while True:
        grown = set(frontier)
        while frontier:  # what costs nothing: dropping, keeping, going back to a snapshot, reversing
            at, kept, left = frontier.pop()
            if left == 0:
                return cost
            moves = [(at, kept - {state}, left) for state in kept]
            moves += [(state, kept, left) for state in kept]
            if at is not None and len(kept) < snapshots:
                moves.append((at, kept | {at}, left))
            if at == left - 1:
                moves.append((None, kept, left - 1))
            for move in moves:
                if move not in seen:
                    seen[move] = cost
                    grown.add(move)
                    frontier.add(move)
        frontier = {(at + 1, kept, left) for at, kept, left in grown if at is not None and at + 1 < left}
        frontier = {state for state in frontier if state not in seen}
        seen.update(dict.fromkeys(frontier, cost + 1))
        cost += 1


@pytest.mark.parametrize("layers", range(1, 8))
@pytest.mark.parametrize("snapshots", [1, 2, 3])
def test_no_schedule_takes_fewer_steps(layers, snapshots):
    assert fewest(layers, snapshots) == revolve_cost(layers, snapshots)


@given(layers=st.integers(1, 40), snapshots=st.integers(1, 8))
def test_schedule_gives_the_gradient(layers, snapshots):
    """The chain x → sin(x + i), reversed with nothing but what the instructions keep."""
    x, kept, states = 0.7, {}, []
    value, gradient = x, 1.0
    for i in range(layers):
        states.append(value)
        value = sin(value + i)
    expected = math.prod(cos(state + i) for i, state in enumerate(states))

    state = x
    for step in revolve_schedule(layers, snapshots):
        if step.do == "store":
            assert 0 <= step.slot < snapshots
            kept[step.slot] = state
        elif step.do == "restore":
            state = kept[step.slot]
        elif step.do == "advance":
            for i in range(step.layer, step.stop):
                state = sin(state + i)
        else:
            gradient *= cos(state + step.layer)
            state = math.nan
    assert gradient == pytest.approx(expected)


@given(layers=st.integers(1, 200), snapshots=st.integers(1, 30))
def test_more_snapshots_and_fewer_layers_cost_less(layers, snapshots):
    steps = revolve_extra_forwards(layers, snapshots)
    assert revolve_extra_forwards(layers, snapshots + 1) <= steps <= revolve_extra_forwards(layers + 1, snapshots)
    assert layers - 1 <= steps <= layers * (layers - 1) // 2


def test_extremes():
    assert revolve_extra_forwards(1, 1) == 0
    assert revolve_extra_forwards(50, 1) == 50 * 49 // 2  # from the input each time
    assert revolve_extra_forwards(50, 49) == 49  # every state kept: one sweep
    assert [str(step) for step in revolve_schedule(2, 1)] == [
        "store 0 in slot 0",
        "advance 0 → 1",
        "reverse 1",
        "restore 0 in slot 0",
        "reverse 0",
    ]


def test_long_schedules_do_not_recurse():
    assert replay(revolve_schedule(3000, 2999), 3000, 2999) == 2999


GOOD = revolve_schedule(4, 2)
BAD = {
    "not at hand": ([Instruction("reverse", 3)], "instruction 0, reverse 3, cannot run: the state at hand is 0"),
    "no such slot": ([Instruction("store", 0, slot=2)], "there are 2 slots"),
    "empty slot": ([Instruction("restore", 0, slot=1)], "the slot has nothing"),
    "another state": ([GOOD[0], Instruction("restore", 1, slot=0)], "the slot has 0"),
    "too far": ([Instruction("advance", 0, stop=4)], "not beyond state 3"),
    "backwards": ([Instruction("advance", 0, stop=0)], "it must go on"),
    "out of order": ([Instruction("reverse", 0)], "the next to reverse is 3"),
    "not all": (GOOD[:-1], "ends with 1 of 4 layers not reversed"),
}


@pytest.mark.parametrize("name", BAD)
def test_schedules_that_cannot_run_are_refused(name):
    schedule, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        replay(schedule, 4, 2)


@pytest.mark.parametrize("function", [revolve_cost, revolve_extra_forwards, revolve_schedule])
def test_bad_arguments_are_named(function):
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        function(0, 1)
    with pytest.raises(ValueError, match="snapshots must be at least 1, got 0"):
        function(1, 0)
    with pytest.raises(TypeError, match=r"layers must be a whole number, got 1\.5"):
        function(1.5, 1)


def test_bad_ratio_is_named():
    with pytest.raises(ValueError, match="ratio must be positive"):
        checkpointing.sqrt_schedule(4, ratio=0)
