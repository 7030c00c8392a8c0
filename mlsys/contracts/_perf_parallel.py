"""Exercises about many devices: sharded state, pipelines, tensor parallelism."""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction
from functools import cache

from mlsys.contracts._perf_collectives import simulate
from mlsys.contracts._perf_formula import Formula, wrong
from mlsys.contracts.core import Case
from mlsys.perf import pipeline, tensor_parallel, zero

# --- zero -------------------------------------------------------------------------------------------------------------


def _state(parameters: float, n: int, stage: int) -> tuple[float, float, float]:
    memory = zero.memory(parameters, n, stage)
    return memory.weights, memory.gradients, memory.optimizer


TENSORS = (  # of mixed precision with Adam: result, bytes a number, the first stage that cuts it
    ("weights", 2, 3),
    ("gradients", 2, 2),
    ("optimizer", 4, 1),  # the weights in float32
    ("optimizer", 4, 1),  # momentum
    ("optimizer", 4, 1),  # variance
)


def _state_oracle(parameters: float, n: int, stage: int) -> tuple[float, ...]:
    """The least model that can be cut evenly has a number for each device; count what device 0 holds, and scale."""
    held = dict.fromkeys(("weights", "gradients", "optimizer"), 0)
    for owner in range(n):
        for kind, size, first_stage in TENSORS:
            if stage < first_stage or owner == 0:
                held[kind] += size
    return tuple(float(Fraction(parameters) / n * size) for size in held.values())


def _state_plain(
    parameters: float,
    n: int,
    stage: int,
    *,
    weights: float = 2,
    gradients: float = 2,
    optimizer: float = 12,
    cut: tuple[int, int, int] = (3, 2, 1),
    shards: Callable[[int], float] = lambda n: n,
    unit: float = 1.0,
) -> tuple[float, ...]:
    return tuple(
        parameters * size / (shards(n) if stage >= first else 1) / unit
        for size, first in zip((weights, gradients, optimizer), cut, strict=True)
    )


ZERO = Formula(
    signature="memory(parameters, n, stage) -> (weights, gradients, optimizer), bytes of a device",
    results=("weights", "gradients", "optimizer"),
    reference=_state,
    oracle=_state_oracle,
    draw=lambda rng: {"parameters": rng.randint(10**6, 10**12), "n": rng.randint(2, 2000), "stage": rng.randint(1, 3)},
    cases=[
        {"parameters": 1000, "n": 1, "stage": 0},
        {"parameters": 1000, "n": 4, "stage": 0},
        {"parameters": 1000, "n": 4, "stage": 1},
        {"parameters": 1000, "n": 4, "stage": 2},
        {"parameters": 1000, "n": 4, "stage": 3},
        {"parameters": 7_500_000_000, "n": 64, "stage": 1},  # Rajbhandari et al., Figure 1
        {"parameters": 7_500_000_000, "n": 64, "stage": 2},
        {"parameters": 7_500_000_000, "n": 64, "stage": 3},
        {"parameters": 175_000_000_000, "n": 3, "stage": 3},
        {"parameters": 1000, "n": 1, "stage": 3},
    ],
    wrong={
        "no_float32_copy": wrong(
            _state_plain,
            "in mixed precision the optimizer also has the weights in float32: 12 bytes with momentum and variance",
            optimizer=8,
        ),
        "optimizer_in_16_bits": wrong(
            _state_plain, "the optimizer's numbers are float32: three of 4 bytes for Adam", optimizer=2
        ),
        "gradients_forgotten": wrong(_state_plain, "gradients take 2 bytes a parameter", gradients=0),
        "all_in_float32": wrong(
            _state_plain, "weights and gradients are in 16 bits: 2 bytes each", weights=4, gradients=4
        ),
        "nothing_cut": wrong(_state_plain, "from stage 1 on, a device holds 1/n of the optimizer state", cut=(9, 9, 9)),
        "gradients_from_stage_1": wrong(
            _state_plain, "stage 1 cuts the optimizer state only; gradients are cut from stage 2 on", cut=(3, 1, 1)
        ),
        "gradients_from_stage_3": wrong(_state_plain, "stage 2 cuts the gradients too", cut=(3, 3, 1)),
        "weights_never_cut": wrong(_state_plain, "stage 3 cuts the weights too", cut=(9, 2, 1)),
        "all_cut_from_stage_1": wrong(
            _state_plain, "each stage cuts one more: optimizer state, then gradients, then weights", cut=(1, 1, 1)
        ),
        "stage_0_cut": wrong(
            _state_plain, "stage 0 is plain data parallelism: every device holds everything", cut=(3, 2, 0)
        ),
        "other_devices_only": wrong(
            _state_plain, "n devices share the state, this one among them: 1/n each", shards=lambda n: max(1, n - 1)
        ),
        "gigabytes": wrong(_state_plain, "return bytes, not GB", unit=1e9),
        "gibibytes": wrong(_state_plain, "return bytes, not GiB", unit=2**30),
    },
)


# --- pipeline ---------------------------------------------------------------------------------------------------------


def _bubble(schedule: str, stages: int, microbatches: int, chunks: int) -> float:
    return pipeline.bubble(schedule, stages, microbatches, chunks=chunks).over_total


Operation = tuple[str, int, int]  # "forward" or "backward", chunk, microbatch


def _order(schedule: str, stages: int, microbatches: int, chunks: int, rank: int) -> list[Operation]:
    """What a device does, in order: forward passes to warm up, then one forward and one backward by turns."""
    if schedule == "interleaved":  # `stages` microbatches through one chunk, the same through the next, and so on
        forward = [
            (k // stages % chunks, k // (stages * chunks) * stages + k % stages) for k in range(microbatches * chunks)
        ]
        warm_up = 2 * (stages - 1 - rank) + (chunks - 1) * stages
    else:
        forward = [(0, microbatch) for microbatch in range(microbatches)]
        warm_up = microbatches if schedule == "gpipe" else stages - 1 - rank
    backward = [(chunks - 1 - chunk, microbatch) for chunk, microbatch in forward]
    warm_up = min(warm_up, len(forward))
    order: list[Operation] = [("forward", *one) for one in forward[:warm_up]]
    for ahead, behind in zip(forward[warm_up:], backward, strict=False):
        order += [("forward", *ahead), ("backward", *behind)]
    return order + [("backward", *one) for one in backward[len(forward) - warm_up :]]


def idle_share(schedule: str, stages: int, microbatches: int, chunks: int) -> Fraction:
    """The share of its span that the device which waits longest is idle, by running the schedule tick by tick.

    A chunk's forward pass takes a tick, its backward pass two. "zb-h1" cuts the latter in halves: the gradient of the
    weights is put off until the device has nothing else to do, or holds as many microbatches as there are stages.
    """
    apart = schedule == "zb-h1"
    todo = [_order(schedule, stages, microbatches, chunks, rank) for rank in range(stages)]
    done: dict[Operation, int] = {}  # kind, place among all chunks, microbatch → when
    free, first, last = [0] * stages, [-1] * stages, [0] * stages
    put_off, held = [0] * stages, [0] * stages
    now = 0
    while any(todo) or any(put_off):
        for rank in range(stages):
            if free[rank] > now:
                continue
            ticks = 0
            if todo[rank]:
                kind, chunk, microbatch = todo[rank][0]
                place = chunk * stages + rank
                needed = [("forward", place, microbatch)] if kind == "backward" else []
                needed += [("forward", place - 1, microbatch)] if kind == "forward" and place else []
                beyond = kind == "backward" and place < stages * chunks - 1
                needed += [("backward", place + 1, microbatch)] if beyond else []
                full = apart and kind == "forward" and held[rank] == stages
                if not full and all(done.get(one, now + 1) <= now for one in needed):
                    todo[rank].pop(0)
                    ticks = 1 if kind == "forward" or apart else 2
                    done[kind, place, microbatch] = now + ticks
                    held[rank] += kind == "forward"
                    put_off[rank] += kind == "backward" and apart
            if not ticks and put_off[rank]:
                ticks = 1
                put_off[rank] -= 1
                held[rank] -= 1
            if ticks:
                first[rank] = now if first[rank] < 0 else first[rank]
                free[rank] = last[rank] = now + ticks
        now += 1
    busy = 3 * microbatches * chunks
    return max(1 - Fraction(busy, end - begin) for begin, end in zip(first, last, strict=True))


def _bubble_plain(
    schedule: str,
    stages: int,
    microbatches: int,
    chunks: int,
    *,
    over_work: bool = False,
    waits: Callable[[int], int] = lambda stages: stages - 1,
    divide: Callable[[float, int], float] = lambda idle, chunks: idle / chunks,
    zero_bubble: float = 1 / 3,
    filled: Callable[[int, int], int] = lambda microbatches, waits: min(microbatches - 1, waits),
    one_f_one_b: float = 1.0,
    both_ways: float = 1.0,
    span: str = "work and wait",
) -> float:
    # In units of a microbatch's forward and backward pass, three ticks.
    idle = {"zb-h1": zero_bubble, "1f1b": one_f_one_b}.get(schedule, 1.0) * waits(stages) * both_ways
    if schedule == "zb-h1" and zero_bubble == 1 / 3:
        idle = (2 * waits(stages) - filled(microbatches, waits(stages))) / 3  # too few microbatches fill less
    if schedule == "interleaved":
        idle = divide(idle, chunks)
    whole = {"work and wait": microbatches + idle, "stages and microbatches": stages + microbatches}[span]
    return idle / (microbatches if over_work else whole)


def _steps(schedule: str, stages: int, microbatches: int, chunks: int = 1) -> Case:
    return {"schedule": schedule, "stages": stages, "microbatches": microbatches, "chunks": chunks}


def _draw_pipeline(rng: random.Random) -> Case:
    schedule, stages = rng.choice(["gpipe", "1f1b", "interleaved", "zb-h1"]), rng.randint(2, 6)
    if schedule == "interleaved":
        return _steps(schedule, stages, stages * rng.randint(1, 3), rng.randint(2, 4))
    return _steps(schedule, stages, rng.randint(1, 12))  # fewer than stages, too


PIPELINE = Formula(
    signature="bubble(schedule, stages, microbatches, chunks) -> idle share of a device's time, 0 to 1",
    results=("bubble",),
    reference=_bubble,
    oracle=lambda *settings: (float(idle_share(*settings)),),
    draw=_draw_pipeline,
    cases=[
        _steps("gpipe", 1, 4),
        _steps("gpipe", 2, 1),
        _steps("gpipe", 4, 8),
        _steps("1f1b", 4, 8),
        _steps("1f1b", 3, 2),
        _steps("interleaved", 4, 8, 2),
        _steps("interleaved", 4, 8, 4),
        _steps("interleaved", 3, 6, 3),
        _steps("zb-h1", 4, 8),
        _steps("zb-h1", 3, 1),
        _steps("zb-h1", 5, 2),
        _steps("zb-h1", 8, 4),
        _steps("gpipe", 8, 64),
        _steps("interleaved", 8, 16, 2),
    ],
    wrong={
        "over_useful_work": wrong(
            _bubble_plain, "divide by the whole time, work and waiting: (p−1)/(m+p−1), not (p−1)/m", over_work=True
        ),
        "stages_for_stages_less_one": wrong(
            _bubble_plain,
            "the last stage waits for p − 1 others, not p; one stage alone has no bubble",
            waits=lambda p: p,
        ),
        "one_too_many_below": wrong(
            _bubble_plain, "a step lasts m + p − 1 turns, not m + p", span="stages and microbatches"
        ),
        "waits_counted_twice": wrong(
            _bubble_plain,
            "p − 1 waits of a forward and a backward pass each: those at the start and at the end make one together",
            both_ways=2.0,
        ),
        "chunks_ignored": wrong(
            _bubble_plain,
            "with v chunks a device, a wait lasts only as long as one chunk: v times shorter",
            divide=lambda idle, chunks: idle,
        ),
        "chunks_multiply": wrong(
            _bubble_plain, "chunks shorten the bubble: divide by them", divide=lambda idle, chunks: idle * chunks
        ),
        "chunks_squared": wrong(
            _bubble_plain,
            "the bubble is v times shorter, not v²: there are as many waits, and each lasts as long as one chunk",
            divide=lambda idle, chunks: idle / chunks**2,
        ),
        "1f1b_is_shorter": wrong(
            _bubble_plain, "1F1B saves memory, not time: its bubble is that of GPipe", one_f_one_b=0.5
        ),
        "zb-h1_as_1f1b": wrong(
            _bubble_plain,
            "the gradient of the weights fills the bubble: with F = B = W a third of it is left",
            zero_bubble=1.0,
        ),
        "zb-h1_without_bubble": wrong(
            _bubble_plain,
            "ZB-H1 keeps the memory of 1F1B and so a third of the bubble; only ZB-H2 and ZB-V lose it all",
            zero_bubble=0.0,
        ),
        "zb-h1_always_full": wrong(
            _bubble_plain,
            "a wait is filled by the weight gradient of one microbatch: fewer than stages fill only m − 1 of the waits",
            filled=lambda microbatches, waits: waits,
        ),
        "zb-h1_fills_one_or_all": wrong(
            _bubble_plain,
            "with m below p microbatches, zb-h1 fills m − 1 of the p − 1 waits: neither all of them nor only one",
            filled=lambda microbatches, waits: waits if microbatches > waits else 1,
        ),
        "zb-h1_fills_none_or_all": wrong(
            _bubble_plain,
            "fewer microbatches than stages still fill some of the bubble of zb-h1: m − 1 of the p − 1 waits",
            filled=lambda microbatches, waits: waits if microbatches > waits else 0,
        ),
    },
)


# --- tensor parallelism -----------------------------------------------------------------------------------------------


def _layer(
    batch: int,
    seq: int,
    d_model: int,
    tp: int,
    itemsize: int,
    sequence_parallel: bool,
    recompute: tensor_parallel.Recompute,
) -> tuple[float, float]:
    traffic = tensor_parallel.layer_traffic(
        batch, seq, d_model, tp, sequence_parallel=sequence_parallel, recompute=recompute, itemsize=itemsize
    )
    return traffic.forward_bytes, traffic.backward_bytes


# What must happen so that a tensor that every device has ("whole"), has a part of ("cut"), or has a summand of
# ("partial") becomes another of these.
MOVES = {
    ("whole", "whole"): None,
    ("cut", "cut"): None,
    ("whole", "cut"): None,
    ("cut", "whole"): "all_gather",
    ("partial", "whole"): "all_reduce",
    ("partial", "cut"): "reduce_scatter",
}


@cache
def _ring(operation: str, n: int) -> Fraction:
    return simulate(operation, "ring", n).sent


def _layer_oracle(
    batch: int, seq: int, d_model: int, tp: int, itemsize: int, sequence_parallel: bool, recompute: str
) -> tuple[float, float]:
    """Follow the tensors through the block, and send what is not where it is needed, around simulated rings."""
    numbers = sum(d_model for _ in range(batch * seq))
    between = "cut" if sequence_parallel else "whole"  # how the residual stream lies

    def sent(*moves: tuple[str, str]) -> Fraction:
        return sum((_ring(name, tp) for move in moves if (name := MOVES[move])), Fraction(0)) * numbers * itemsize

    forward = backward = Fraction(0)
    for _ in ("attention", "mlp"):
        forward += sent((between, "whole"), ("partial", between))  # in: to columns; out: of rows, one summand each
        backward += sent((between, "whole"), ("partial", between))  # the gradients of out and of in
        backward += sent((between, "whole"))  # the input once more, for the gradient of the first matrix
    return float(forward), float(backward + (forward if recompute == "full" else 0))


def _layer_plain(
    batch: int,
    seq: int,
    d_model: int,
    tp: int,
    itemsize: int,
    sequence_parallel: bool,
    recompute: str,
    *,
    halves: int = 2,
    back: bool = True,
    own_part: bool = False,
    passes: int = 2,
    elements: bool = False,
    everyone: bool = False,
    sequence: str = "the same and inputs again",
    again: tuple[str, ...] = ("full",),
    width: int = 1,
    sequences: bool = True,
    cut: bool = False,
) -> tuple[float, float]:
    size = (batch if sequences else 1) * seq * d_model * (1 if elements else itemsize) * width
    one = size * (1 if own_part else (tp - 1) / tp) * (tp if everyone else 1) / (tp if cut else 1)
    forward = halves * passes * one if tp > 1 else 0.0
    backward = forward if back else 0.0
    if sequence_parallel and tp > 1:
        if sequence == "the same and inputs again":
            backward += halves * one if back else 0.0
        elif sequence == "less":
            forward, backward = forward / tp, backward / tp
        elif sequence == "twice":
            forward, backward = 2 * forward, 2 * backward
    return forward, backward + (forward if recompute in again else 0.0)


def _block(
    batch: int,
    seq: int,
    d_model: int,
    tp: int,
    itemsize: int = 2,
    sequence_parallel: bool = False,
    recompute: str = "none",
) -> Case:
    sizes = {"batch": batch, "seq": seq, "d_model": d_model, "tp": tp, "itemsize": itemsize}
    return sizes | {"sequence_parallel": sequence_parallel, "recompute": recompute}


def _draw_block(rng: random.Random) -> Case:
    tp = rng.randint(2, 8)
    recompute = rng.choice(["none", "selective", "full"])
    return _block(
        rng.randint(2, 8),
        tp * rng.randint(1, 50),
        rng.randint(4, 999),
        tp,
        rng.choice([2, 4]),
        rng.random() < 0.5,
        recompute,
    )


TENSOR_PARALLEL = Formula(
    signature="layer_bytes(batch, seq, d_model, tp, itemsize, sequence_parallel, recompute)"
    " -> (forward, backward), bytes that a device sends; recompute is 'none', 'selective' or 'full'",
    results=("forward", "backward"),
    reference=_layer,
    oracle=_layer_oracle,
    draw=_draw_block,
    cases=[
        _block(1, 4, 8, 1, 1),
        _block(1, 4, 8, 2, 1),
        _block(3, 4, 8, 4, 2),
        _block(1, 2048, 12288, 8),  # GPT-3
        _block(2, 12, 8, 4, 2, True),
        _block(2, 12, 8, 3, 4, False, "full"),
        _block(2, 12, 8, 3, 4, False, "selective"),
        _block(2, 12, 8, 3, 4, True, "full"),
        _block(1, 2048, 12288, 8, 2, True, "selective"),
    ],
    wrong={
        "one_collective_a_block": wrong(
            _layer_plain,
            "attention and MLP each end in a sum over devices: two all-reduces forward, two backward",
            halves=1,
        ),
        "forward_only": wrong(
            _layer_plain,
            "the gradient of the input is a sum over devices too: the backward pass mirrors it",
            back=False,
        ),
        "own_part_sent": wrong(
            _layer_plain, "a device does not send its own part to itself: (t−1)/t of the tensor", own_part=True
        ),
        "all_reduce_once_around": wrong(
            _layer_plain, "an all-reduce sends the tensor twice around: a reduce-scatter and an all-gather", passes=1
        ),
        "numbers_not_bytes": wrong(_layer_plain, "multiply by itemsize to get bytes", elements=True),
        "all_devices_together": wrong(_layer_plain, "count what one device sends, not all of them", everyone=True),
        "batch_ignored": wrong(
            _layer_plain, "every sequence of the microbatch has activations to sum", sequences=False
        ),
        "hidden_layer_sent": wrong(
            _layer_plain, "what is summed is d_model wide; the hidden layer of 4·d_model stays on its device", width=4
        ),
        "part_summed": wrong(
            _layer_plain, "each device has a summand of the whole tensor, not a t-th of the tensor", cut=True
        ),
        "sequence_parallel_sends_less": wrong(
            _layer_plain,
            "sequence parallelism divides memory, not traffic: the two halves of an all-reduce send as much as it does",
            sequence="less",
        ),
        "sequence_parallel_sends_twice": wrong(
            _layer_plain,
            "a reduce-scatter and an all-gather together send what one all-reduce does, not twice as much",
            sequence="twice",
        ),
        "inputs_not_gathered_again": wrong(
            _layer_plain,
            "with sequence parallelism a device keeps its part of the input only: the backward pass gathers it again",
            sequence="the same",
        ),
        "recomputation_is_free": wrong(
            _layer_plain, "full recomputation runs the forward pass again, its collectives too", again=()
        ),
        "selective_sends_too": wrong(
            _layer_plain,
            "selective recomputation repeats the core of attention only, which sends nothing",
            again=("full", "selective"),
        ),
    },
)
