"""Pipeline schedules: how long devices wait, and how many microbatches they hold, without drawing the schedule.

The layers are cut into p stages, one a device, and the batch into m microbatches
that follow one another through them. At the start later stages wait for work, at
the end earlier ones do: the *bubble*. Let a device spend F seconds on the forward
pass of a microbatch, B on the gradient of its input and W on that of its weights.
A device works m(F + B + W) seconds in a step, and then waits:

    schedule      bubble                                  microbatches held by rank r
    gpipe         (p−1)(F+B+W)                            m
    1f1b          (p−1)(F+B+W)                            min(m, p−r)
    interleaved   (p−1)(F+B+W)/v                          min(mv, 2(p−1−r) + (v−1)p + 1)/v
    zb-h1         (p−1)(F+B) − min(m−1, p−1)·min(F, W)    min(m, p)
    zb-h2         (p−1)·max(0, F+B − 2·min(F, W))         2p−1
    zbv           0, if F = B = W                         p

- **gpipe** runs all forward passes, then all backward passes.
- **1f1b** begins each backward pass as early as possible: the same bubble, a bounded memory.
- **interleaved** gives a device v chunks of layers that lie apart, so that each wait is v times shorter; m must be a
  multiple of p, and v times as many messages are sent.
- **zb-h1** and **zb-h2** put off W, which no other device waits for, and fill the bubble with it. For m ≥ p and W ≤ F
  the bubble of zb-h1 is the paper's (p−1)(F+B−W); zb-h2 starts 2p−1 microbatches early and needs m ≥ 2p−1.
- **zbv** gives a device two chunks, the second on the way back up: rank 0 has the first and the last layers. It needs
  m ≥ 2p−1.

The bubble is that of the device that waits longest between its own first and last
operation, its *span*: once devices need not wait for one another between steps, the
next step begins where the span ends. From the first operation of any to the last of
any is the *makespan*; for the zero-bubble schedules it is longer, since the last
rank starts (p−1)F late and no schedule can help it.

Papers differ in what they divide by. GPipe: bubble over the whole step, (p−1)/(m+p−1).
Megatron: bubble over useful work, (p−1)/m. `Bubble` has both. A microbatch is held
from its forward pass to the end of its W; activations that W does not need may go
sooner. Messages take no time here.

Cost:
    No FLOPs beyond the model's; a step lasts 1 + `Bubble.over_ideal` times the work.

Communication:
    A boundary between stages carries one activation forward and one gradient back for each microbatch: `bytes_sent`.

Papers:
    Huang et al. 2019, arXiv:1811.06965, section 2.3 (GPipe).
    Narayanan et al. 2019, "PipeDream: Generalized Pipeline Parallelism for DNN Training", SOSP, section 3.2 (1F1B).
    Narayanan et al. 2021, arXiv:2104.04473, section 2.2 (1F1B with a flush, and interleaved stages).
    Qi et al. 2024, arXiv:2401.10241, section 2 and Table 2 (ZB-H1, ZB-H2), section 6 (ZB-V).

See also:
    `mlsys.perf.transformer` (F and B), `mlsys.perf.activations`, `mlsys.perf.tensor_parallel` (the cut inside a layer).
"""

from __future__ import annotations

from dataclasses import dataclass

from mlsys.perf import _checks

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zbv")


@dataclass(frozen=True)
class Times:
    """Seconds that one device spends on one microbatch, all its chunks together.

    forward: F. backward_input: B, the gradient of the input. backward_weight: W, the gradient of the weights.
    """

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("forward", "backward_input", "backward_weight"):
            _checks.amount(name, getattr(self, name), positive=True)

    @property
    def total(self) -> float:
        """F + B + W, seconds."""
        return self.forward + self.backward_input + self.backward_weight


EQUAL = Times()


@dataclass(frozen=True)
class Bubble:
    """What the device that waits longest does in a step.

    seconds: waiting. ideal: working, the seconds of a step without a bubble.
    """

    seconds: float
    ideal: float

    @property
    def over_ideal(self) -> float:
        """Waiting over working, as in Megatron: how much longer the step takes than it should."""
        return self.seconds / self.ideal

    @property
    def over_total(self) -> float:
        """Waiting over the whole span, as in GPipe: the share of the machine that is lost."""
        return self.seconds / self.span

    @property
    def span(self) -> float:
        """Seconds from the device's first operation to its last."""
        return self.seconds + self.ideal


def bubble(schedule: str, stages: int, microbatches: int, *, chunks: int = 1, times: Times = EQUAL) -> Bubble:
    """How long the devices wait in one step of `schedule`, one of `SCHEDULES`; seconds, in the unit of `times`.

    `stages` is the number of devices, p; `chunks`, v, the pieces of model a device has, for "interleaved" only.
    Raises ValueError where the schedule cannot be run, or its bubble has no formula (zbv with unequal times).
    """
    _check(schedule, stages, microbatches, chunks)
    f, b, w = times.forward, times.backward_input, times.backward_weight
    waits = stages - 1
    if schedule in ("gpipe", "1f1b"):
        seconds = waits * times.total
    elif schedule == "interleaved":
        seconds = waits * times.total / chunks
    elif schedule == "zb-h1":
        # One W for each wait, as far as there are microbatches; a W longer than F lengthens the way it should shorten.
        seconds = waits * (f + b) - min(microbatches - 1, waits) * min(f, w)
    elif schedule == "zb-h2":
        seconds = waits * max(0.0, f + b - 2 * min(f, w))
    else:
        _require_equal(times)
        seconds = 0.0
    return Bubble(seconds, microbatches * times.total)


def makespan(schedule: str, stages: int, microbatches: int, *, chunks: int = 1, times: Times = EQUAL) -> float:
    """Seconds from the first operation of any device to the last operation of any.

    The time of a step if all devices wait for one another after it, as they do for a gradient norm.
    """
    one = bubble(schedule, stages, microbatches, chunks=chunks, times=times)
    if schedule == "zb-h1":  # rank r starts r·F late; up to this one each fills one wait less with a W
        rank = min(microbatches, stages) - 1
        late = rank * times.forward + (stages - 1 - rank) * (times.forward + times.backward_input)
        return one.ideal + max(one.seconds, late)
    if schedule == "zb-h2":  # the last rank has no bubble, but starts late
        return one.ideal + max(one.seconds, (stages - 1) * times.forward)
    if schedule == "zbv":  # the same; what it waits for are chunks, half as long
        return one.ideal + (stages - 1) * times.forward / 2
    return one.span


def peak_in_flight(schedule: str, stages: int, microbatches: int, rank: int, *, chunks: int = 1) -> float:
    """The most microbatches whose activations device `rank` holds at once.

    Counted in microbatches through *all* layers of the device, so that schedules compare: one of v chunks is 1/v.
    """
    _check(schedule, stages, microbatches, chunks)
    _check_rank(rank, stages)
    if schedule == "gpipe":
        return microbatches
    if schedule == "1f1b":
        return min(microbatches, stages - rank)
    if schedule == "interleaved":
        warm_up = 2 * (stages - 1 - rank) + (chunks - 1) * stages
        return min(microbatches * chunks, warm_up + 1) / chunks
    if schedule == "zb-h2":
        return 2 * stages - 1
    return min(microbatches, stages)  # zb-h1, and zbv, which always has enough


def boundary_bytes(batch: int, seq: int, d_model: int, *, itemsize: int = 2, tp: int = 1) -> float:
    """Bytes of the activation between two layers: `batch` sequences of a microbatch, `seq` tokens, `d_model` numbers.

    With tensor parallelism over `tp` devices each can send its share, to be gathered on the other side.
    """
    for name, value in (("batch", batch), ("seq", seq), ("d_model", d_model), ("itemsize", itemsize), ("tp", tp)):
        _checks.whole(name, value)
    return batch * seq * d_model * itemsize / tp


def bytes_sent(
    schedule: str,
    stages: int,
    microbatches: int,
    rank: int,
    message: float,
    *,
    chunks: int = 1,
) -> float:
    """Bytes that device `rank` sends to its neighbours in a step; `message` is the bytes of one `boundary_bytes`."""
    _check(schedule, stages, microbatches, chunks)
    _check_rank(rank, stages)
    _checks.amount("message", message)
    if stages == 1:
        return 0.0
    first, last = rank == 0, rank == stages - 1
    if schedule == "zbv":  # down with the first chunk and up with the second; the turn is inside the last rank
        down, up = not last, not first
        messages = 2 * (down + up)
    else:  # a ring: rank p−1 sends to rank 0, but nothing forward from the last chunk, and nothing back from the first
        messages = (chunks - last) + (chunks - first)
    return messages * microbatches * message


def _require_equal(times: Times) -> None:
    if not times.forward == times.backward_input == times.backward_weight:
        raise ValueError(
            f"times={times}: the bubble of 'zbv' has a formula for equal times only; take 'zb-h1' or 'zb-h2'"
        )


def _check_rank(rank: int, stages: int) -> None:
    if _checks.whole("rank", rank, 0) >= stages:
        raise ValueError(f"rank must be below stages={stages}, got {rank}")


def _check(schedule: str, stages: int, microbatches: int, chunks: int) -> None:
    _checks.known("schedule", schedule, SCHEDULES)
    _checks.whole("stages", stages)
    _checks.whole("microbatches", microbatches)
    _checks.whole("chunks", chunks)
    if schedule != "interleaved" and chunks != 1:
        raise ValueError(f"chunks={chunks} is for 'interleaved' only, not for {schedule!r}: leave it out")
    if schedule == "interleaved" and chunks == 1:
        raise ValueError("chunks=1: 'interleaved' needs at least 2; with 1 it is '1f1b'")
    if schedule == "interleaved" and microbatches % stages:
        raise ValueError(f"microbatches={microbatches}: 'interleaved' needs a multiple of stages={stages}")
    if schedule in ("zb-h2", "zbv") and microbatches < 2 * stages - 1:
        raise ValueError(
            f"microbatches={microbatches}: {schedule!r} starts 2·stages − 1 = {2 * stages - 1} before it ends one, "
            "so it needs as many; 'zb-h1' does with fewer"
        )
