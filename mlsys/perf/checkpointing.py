"""Recomputing activations: keep a few states of the forward pass, and run parts of it again for the backward pass.

The backward pass needs the activations of layer l, then l−1, … 1: in the order
opposite to that in which they are made. Keeping all costs l layers of memory;
keeping only the first input costs l(l−1)/2 layers run again. In between:

**Segments** (Chen et al.). Cut the layers into k segments and keep the input of
each. The backward pass runs one segment again, with its activations kept, at a time.
At most k inputs and l/k layers of activations are alive: least at k = √l if both
weigh the same, and each layer runs twice.

**Revolve** (Griewank & Walther). With s snapshots, the first of which is the input,
and one layer's activations at a time, the fewest layers to run again is known. With
C(a, b) "a choose b" and r the least number such that l ≤ C(s+r, s),

    t(l, s) = min over k of  k + t(l−k, s−1) + t(k, s)        run k layers, keep the state, do the rest, then the k
            = r·l − C(s+r, s+1)                               in closed form

and no layer is run more than r times without its activations. With r = s there is
room for l = C(2s, s), about 4^s/√(πs), layers: time and memory both grow with log l.

What is counted: every run of a layer *without* keeping its activations. Each layer
also runs once with them, just before its own backward pass; that is the forward pass
which any training has. A schedule is a list of instructions, and `replay` runs it.

Cost:
    Segments: at most one forward pass more, a third of a training step. Revolve: t(l, s) layers.

Memory:
    Segments: k inputs and the activations of one segment. Revolve: s inputs and the activations of one layer.

Papers:
    Griewank & Walther 2000, "Algorithm 799: Revolve", ACM TOMS 26(1), doi:10.1145/347837.347846 (t(l, s), schedules).
    Griewank 1992, "Achieving logarithmic growth of temporal and spatial complexity", Opt. Methods and Software 1.
    Chen et al. 2016, arXiv:1604.06174, section 4 (segments of √n layers).

See also:
    `mlsys.perf.activations` (what a transformer layer keeps, and its selective recomputation).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from mlsys.perf import _checks

# --- segments ---------------------------------------------------------------------------------------------------------


def sqrt_schedule(layers: int, *, ratio: float = 1.0) -> list[range]:
    """The layers of each segment, so that `peak_memory` is least among even cuts; the longer segments come first.

    `ratio` is the bytes that a layer keeps over the bytes of its input; with r, there are about √(r·layers) segments.
    """
    _checks.whole("layers", layers)
    _checks.amount("ratio", ratio, positive=True)
    # Ties go to fewer segments.
    count = min(range(1, layers + 1), key=lambda k: (peak_memory(_even(layers, k), 1.0, ratio), k))
    return _even(layers, count)


def peak_memory(segments: Sequence[range], input_bytes: float, activation_bytes: float) -> float:
    """The most bytes alive in the backward pass, with `input_bytes` for a layer's input and `activation_bytes` for
    all that the layer keeps.

    While segment i (from 1) runs backward, the inputs of i segments and the activations of its layers are there.
    """
    _check_segments(segments)
    _checks.amount("input_bytes", input_bytes)
    _checks.amount("activation_bytes", activation_bytes)
    return max(i * input_bytes + len(segment) * activation_bytes for i, segment in enumerate(segments, 1))


def extra_forwards(segments: Sequence[range]) -> int:
    """Layers that run twice: all but those of the last segment, whose activations are still there."""
    _check_segments(segments)
    return sum(len(segment) for segment in segments[:-1])


def _even(layers: int, count: int) -> list[range]:
    short, longer = divmod(layers, count)
    starts = [i * short + min(i, longer) for i in range(count + 1)]
    return [range(start, stop) for start, stop in pairwise(starts)]


def _check_segments(segments: Sequence[range]) -> None:
    expected = 0
    for segment in segments:
        if segment.start != expected or segment.step != 1 or not segment:
            raise ValueError(f"segments must follow one another from layer 0 and none be empty, got {list(segments)}")
        expected = segment.stop
    if not segments:
        raise ValueError("segments is empty: there must be at least one")


# --- Revolve ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    """One step of a schedule. State i is the input of layer i.

    store:    keep the current state, `layer`, in snapshot `slot`.
    restore:  make the state in snapshot `slot`, which is `layer`, the current one.
    advance:  run from state `layer` to state `stop` without keeping activations: stop − layer forward steps.
    reverse:  run layer `layer` from its state, with activations, and then its backward pass.
    """

    do: Literal["store", "restore", "advance", "reverse"]
    layer: int
    stop: int = 0
    slot: int = 0

    def __str__(self) -> str:
        if self.do == "advance":
            return f"advance {self.layer} → {self.stop}"
        return f"reverse {self.layer}" if self.do == "reverse" else f"{self.do} {self.layer} in slot {self.slot}"


def revolve_extra_forwards(layers: int, snapshots: int) -> int:
    """t(l, s) in closed form: the fewest layers to run without keeping activations, the first sweep included."""
    _checks.whole("layers", layers)
    _checks.whole("snapshots", snapshots)
    r = _repetitions(layers, snapshots)
    return r * layers - math.comb(snapshots + r, snapshots + 1)


def revolve_cost(layers: int, snapshots: int) -> int:
    """t(l, s) by dynamic programming over all ways to place the next snapshot: O(layers² · snapshots) additions."""
    _checks.whole("layers", layers)
    _checks.whole("snapshots", snapshots)
    row = [length * (length - 1) // 2 for length in range(layers + 1)]  # one snapshot: from the input, each time
    for _ in range(min(snapshots, layers) - 1):  # more snapshots than layers are of no use
        above, row = row, [0, 0]
        for length in range(2, layers + 1):
            row.append(min(k + above[length - k] + row[k] for k in range(1, length)))
    return row[layers]


def revolve_schedule(layers: int, snapshots: int) -> list[Instruction]:
    """Instructions that reverse `layers` layers in the fewest forward steps, with at most `snapshots` kept states."""
    _checks.whole("layers", layers)
    _checks.whole("snapshots", snapshots)
    schedule = [Instruction("store", 0)]
    current: int | None = 0
    todo = [(0, layers, 0)]  # a part of the layers, and the slot of its first state; higher slots are free
    while todo:
        start, stop, slot = todo.pop()
        if current != start:
            schedule.append(Instruction("restore", start, slot=slot))
        length, free = stop - start, snapshots - 1 - slot
        if length == 1 or not free:
            if length > 1:
                schedule.append(Instruction("advance", start, stop=stop - 1))
                todo.append((start, stop - 1, slot))
            schedule.append(Instruction("reverse", stop - 1))
            current = None
        else:
            middle = start + _split(length, free + 1)
            schedule.append(Instruction("advance", start, stop=middle))
            schedule.append(Instruction("store", middle, slot=slot + 1))
            current = middle
            todo += [(start, middle, slot), (middle, stop, slot + 1)]  # the later layers first
    return schedule


def replay(schedule: Sequence[Instruction], layers: int, snapshots: int) -> int:
    """Run a schedule and count its forward steps without activations, to compare with t(l, s).

    Raises ValueError, naming the instruction, for a schedule that could not run: a state that is not at hand, a slot
    that does not exist, layers reversed out of order or not at all.
    """
    _checks.whole("layers", layers)
    _checks.whole("snapshots", snapshots)
    kept: dict[int, int] = {}
    current, left, steps = 0, layers, 0
    for i, instruction in enumerate(schedule):
        layer = instruction.layer
        problem = ""
        if instruction.do in ("store", "restore") and not 0 <= instruction.slot < snapshots:
            problem = f"there are {snapshots} slots"
        elif instruction.do == "restore":
            if kept.get(instruction.slot) != layer:
                problem = f"the slot has {kept.get(instruction.slot, 'nothing')}"
            current = layer
        elif layer != current:
            problem = f"the state at hand is {current}"
        elif instruction.do == "store":
            kept[instruction.slot] = layer
        elif instruction.do == "advance":
            if not layer < instruction.stop < layers:
                problem = f"it must go on, and not beyond state {layers - 1}"
            steps += instruction.stop - layer
            current = instruction.stop
        else:
            if layer != left - 1:
                problem = f"the next to reverse is {left - 1}"
            left -= 1
            current = layer + 1
        if problem:
            raise ValueError(f"instruction {i}, {instruction}, cannot run: {problem}")
    if left:
        raise ValueError(f"the schedule ends with {left} of {layers} layers not reversed")
    return steps


def _repetitions(layers: int, snapshots: int) -> int:
    """The least r with layers ≤ C(snapshots + r, snapshots): how often a layer may be run again."""
    r = 0
    while math.comb(snapshots + r, snapshots) < layers:
        r += 1
    return r


def _split(layers: int, snapshots: int) -> int:
    """How far to advance before the next snapshot: the least k for which both parts still do with r repetitions.

    For layers ≥ 2 and snapshots ≥ 2.
    The first k layers get all snapshots and r−1 further repetitions, the others one snapshot fewer and r.
    """
    r = _repetitions(layers, snapshots)
    rest = math.comb(snapshots - 1 + r, snapshots - 1)
    return max(1, math.comb(snapshots + r - 2, snapshots), layers - rest)
