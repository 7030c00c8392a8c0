"""`mlsys.perf.zero`: the paper's figures, shards that sum to the whole, and the bytes of the collectives."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys.perf import zero
from mlsys.perf.collectives import cost

GB = 1e9
NUMBERS = st.integers(1, 10**12)
RANKS = st.integers(1, 4096)


@pytest.mark.parametrize(
    ("n", "gigabytes"),  # stages 0 to 3 for 7.5 billion parameters: the paper's Figure 1 and Table 1
    [
        (1, (120, 120, 120, 120)),
        (4, (120, 52.5, 41.25, 30)),
        (16, (120, 35.6, 21.6, 7.5)),
        (64, (120, 31.4, 16.6, 1.88)),
        (1024, (120, 30.1, 15.1, 0.117)),
    ],
)
def test_published_memory(n, gigabytes):
    got = [zero.memory(7.5e9, n, stage).total / GB for stage in zero.STAGES]
    assert got == pytest.approx(gigabytes, rel=3e-3)


def test_published_largest_models():
    """Table 2: 64 devices of 32 GB."""
    got = [zero.largest_model(32 * GB, 64, stage) / 1e9 for stage in zero.STAGES]
    assert got == pytest.approx([2, 7.6, 14.4, 128], rel=6e-3)


@given(parameters=NUMBERS, n=RANKS)
def test_shards_sum_to_the_whole(parameters, n):
    whole = zero.memory(parameters, 1, 0)
    for stage, sharded in enumerate(
        [(), ("optimizer",), ("optimizer", "gradients"), ("optimizer", "gradients", "weights")]
    ):
        part = zero.memory(parameters, n, stage)
        for name in ("weights", "gradients", "optimizer"):
            copies = n if name in sharded else 1
            assert copies * getattr(part, name) == pytest.approx(getattr(whole, name))
        assert part.total == part.weights + part.gradients + part.optimizer


@given(parameters=NUMBERS, n=RANKS, more=RANKS, stage=st.sampled_from(zero.STAGES))
def test_memory_falls_with_stages_and_devices_and_grows_with_the_model(parameters, n, more, stage):
    total = zero.memory(parameters, n, stage).total
    assert zero.memory(parameters, n + more, stage).total <= total
    assert zero.memory(2 * parameters, n, stage).total == pytest.approx(2 * total)
    if stage:
        assert total <= zero.memory(parameters, n, stage - 1).total


@given(memory=st.floats(1, 1e15), n=RANKS, stage=st.sampled_from(zero.STAGES))
def test_the_largest_model_just_fits(memory, n, stage):
    options = {"bytes_weights": 4, "bytes_gradients": 4, "bytes_optimizer": 8}
    largest = zero.largest_model(memory, n, stage, **options)
    assert zero.memory(largest, n, stage, **options).total == pytest.approx(memory)


@given(
    parameters=NUMBERS, n=RANKS, microbatches=st.integers(1, 16), weights=st.integers(1, 4), gradients=st.integers(1, 4)
)
def test_bytes_are_those_of_the_collectives(parameters, n, microbatches, weights, gradients):
    """What each stage runs in a step, as a list of collectives."""

    def sent(operation, count, itemsize):
        return count * cost(operation, "ring", n, parameters * itemsize).bytes_per_rank

    k = microbatches
    steps = {
        0: [("all_reduce", 1, gradients)],
        1: [("reduce_scatter", 1, gradients), ("all_gather", 1, weights)],
        2: [("reduce_scatter", k, gradients), ("all_gather", 1, weights)],
        3: [("all_gather", k, weights), ("all_gather", k, weights), ("reduce_scatter", k, gradients)],
    }
    for stage, calls in steps.items():
        got = zero.communication(parameters, n, stage, bytes_weights=weights, bytes_gradients=gradients, microbatches=k)
        assert got == pytest.approx(sum(sent(*call) for call in calls))


def test_published_communication_in_the_limit():
    parameters, n = 1e9, 10**6
    got = [zero.communication(parameters, n, stage) / (2 * parameters) for stage in zero.STAGES]
    assert got == pytest.approx([2, 2, 2, 3], rel=1e-5)
    assert [zero.communication(parameters, 1, stage) for stage in zero.STAGES] == [0, 0, 0, 0]


@pytest.mark.parametrize("function", [zero.memory, zero.communication, zero.largest_model])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1, 0, 1), ValueError, "n must be at least 1, got 0"),
        ((1, 2.0, 1), TypeError, "n must be a whole number"),
        ((1, 2, 4), ValueError, "stage=4: ZeRO has stages 0"),
        ((1, 2, True), ValueError, "stage=True"),
        ((-1, 2, 1), ValueError, "(parameters|memory) must be at least 0 and finite, got -1"),
        ((math.inf, 2, 1), ValueError, "(parameters|memory) must be at least 0 and finite, got inf"),
    ],
)
def test_bad_arguments_are_named(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(*arguments)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="bytes_optimizer must be at least 0"):
        zero.memory(1, 1, 0, bytes_optimizer=-1)
    with pytest.raises(ValueError, match="microbatches must be at least 1, got 0"):
        zero.communication(1, 1, 0, microbatches=0)
    with pytest.raises(ValueError, match="are all 0: any model fits"):
        zero.largest_model(1, 1, 0, bytes_weights=0, bytes_gradients=0, bytes_optimizer=0)
