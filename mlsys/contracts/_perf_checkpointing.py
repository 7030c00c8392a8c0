"""The exercise about recomputation: a schedule, which is executed and compared with the best there is."""

from __future__ import annotations

import heapq
import numbers
from collections.abc import Callable
from functools import cache
from typing import Any

from mlsys.contracts._perf_formula import Formula
from mlsys.contracts.core import Mismatch, Wrong
from mlsys.perf import checkpointing

Step = tuple[Any, ...]
Situation = tuple[int, int, frozenset[int]]  # layers left to reverse, the state at hand, the states stored
NOTHING = -1  # in place of a state: none is at hand
STEPS = "('store', slot), ('restore', slot), ('advance', layers) and ('reverse',)"


def _revolve(layers: int, snapshots: int) -> list[Step]:
    plain: list[Step] = []
    for instruction in checkpointing.revolve_schedule(layers, snapshots):
        if instruction.do == "advance":
            plain.append(("advance", instruction.stop - instruction.layer))
        else:
            plain.append(("reverse",) if instruction.do == "reverse" else (instruction.do, instruction.slot))
    return plain


def execute(schedule: Any, layers: int, snapshots: int) -> int:
    """Run a schedule and count the layers that it runs without keeping activations.

    At the start the input of layer 0 is at hand and no slot is used. To reverse layer i its input must be at hand,
    and layer i + 1 reversed; then nothing is at hand. Mismatch, naming the step, for what cannot be run.
    """
    if not isinstance(schedule, list | tuple):
        raise Mismatch(f"returned {type(schedule).__name__}, expected a list of {STEPS}")
    slots: dict[int, int] = {}
    at_hand, left, runs = 0, layers, 0
    for position, step in enumerate(schedule):
        match _plain(step):
            case ("store" | "restore", int(slot)) if not 0 <= slot < snapshots:
                problem = f"the slots are 0 to {snapshots - 1}"
            case ("restore", int(slot)):
                problem = "" if slot in slots else "nothing was stored there"
                at_hand = slots.get(slot, NOTHING)
            case ("store" | "advance", int()) | ("reverse",) if at_hand == NOTHING:
                problem = "no state is at hand after a reverse; restore one"
            case ("store", int(slot)):
                problem = ""
                slots[slot] = at_hand
            case ("advance", int(count)) if count < 1:
                problem = f"it goes {count} layers forward, and must at least one"
            case ("advance", int(count)):
                at_hand += count
                runs += count
                problem = "" if at_hand < layers else f"it leads to layer {at_hand} of {layers}"
            case ("reverse",):
                problem = (
                    "" if at_hand == left - 1 else f"layer {at_hand} is at hand, and {left - 1} is next to reverse"
                )
                left, at_hand = left - 1, NOTHING
            case _:
                problem = f"steps are {STEPS}"
        if problem:
            raise Mismatch(f"step {position}, {step!r}, cannot run: {problem}")
    if left:
        raise Mismatch(f"the schedule ends with {left} of {layers} layers not reversed")
    return runs


def _plain(step: Any) -> Any:
    """A step whose whole numbers are ints, where they may be NumPy's; what is no sequence stays as it is."""
    if not isinstance(step, tuple | list):
        return step
    return tuple(int(part) if isinstance(part, numbers.Integral) else part for part in step)


@cache
def fewest_runs(layers: int, snapshots: int) -> int:
    """The least that any schedule can run again, by trying them all: the cheapest path through what may be the case.

    Storing and restoring cost nothing, nor does forgetting; running a layer costs one.
    """
    start: Situation = (layers, 0, frozenset())
    queue: list[tuple[int, int, Situation]] = [(0, 0, start)]
    seen: set[Situation] = set()
    pushed = 0
    while queue:
        cost, _, situation = heapq.heappop(queue)
        if situation in seen:
            continue
        seen.add(situation)
        left, at_hand, stored = situation
        if left == 0:
            return cost
        following: list[tuple[int, Situation]] = []
        if at_hand == left - 1:  # nothing is gained by putting off a reverse that can be done
            below = frozenset(state for state in stored if state < left - 1)  # later states are of no more use
            following += [(cost, (left - 1, state, below)) for state in below] if left > 1 else [(cost, (0, 0, below))]
        else:
            following.append((cost + 1, (left, at_hand + 1, stored)))
            following += [(cost, (left, state, stored)) for state in stored if state != at_hand]
            if at_hand not in stored:
                kept = [stored] if len(stored) < snapshots else [stored - {state} for state in stored]
                following += [(cost, (left, at_hand, states | {at_hand})) for states in kept]
        for price, after in following:
            pushed += 1
            heapq.heappush(queue, (price, pushed, after))
    raise AssertionError(f"{layers} layers cannot be reversed with {snapshots} snapshots")


def _split_at(layers: int, snapshots: int, where: Callable[[int, int], int], unused: int = 0) -> list[Step]:
    """A schedule that runs `where(length, slots)` layers of each part, keeps that state, and does the rest first."""
    last = max(1, snapshots - unused)

    def part(length: int, slot: int, at_hand: bool) -> list[Step]:
        steps: list[Step] = [] if at_hand else [("restore", slot)]
        if length == 1:
            return [*steps, ("reverse",)]
        if slot == last - 1:
            return [*steps, ("advance", length - 1), ("reverse",), *part(length - 1, slot, False)]
        first = min(length - 1, max(1, where(length, last - slot)))
        steps += [("advance", first), ("store", slot + 1)]
        return [*steps, *part(length - first, slot + 1, True), *part(first, slot, False)]

    return [("store", 0), *part(layers, 0, True)]


def _best_split(length: int, slots: int) -> int:
    """Where to keep the next state, by trying every place."""
    return min(range(1, length), key=lambda first: first + _again(length - first, slots - 1) + _again(first, slots))


@cache
def _again(length: int, slots: int) -> int:
    if length == 1 or slots == 1:
        return length * (length - 1) // 2
    return min(first + _again(length - first, slots - 1) + _again(first, slots) for first in range(1, length))


def _even_once(layers: int, snapshots: int) -> list[Step]:
    """States at even distances, stored in the first sweep and never again."""
    stored = sorted({layers * slot // snapshots for slot in range(snapshots)})
    steps: list[Step] = []
    for slot, state in enumerate(stored):
        steps += [("advance", state - stored[slot - 1])] if slot else []
        steps.append(("store", slot))
    for layer in reversed(range(layers)):
        slot = max(slot for slot, state in enumerate(stored) if state <= layer)
        steps += [("restore", slot)] if layer < layers - 1 else []
        steps += [("advance", layer - stored[slot])] if layer > stored[slot] else []
        steps.append(("reverse",))
    return steps


SCHEDULES: dict[str, tuple[Callable[[int, int], list[Step]], str]] = {
    "from_the_input_each_time": (
        lambda layers, snapshots: _split_at(layers, 1, _best_split),
        "use the snapshots: only with one of them does every layer need a run from the input",
    ),
    "one_slot_unused": (
        lambda layers, snapshots: _split_at(layers, snapshots, _best_split, unused=1),
        "the input takes one of the snapshots, and all the others are yours: one is left unused",
    ),
    "slots_used_once": (
        _even_once,
        "a slot is free again when the layers after its state are reversed: store new states on later sweeps",
    ),
    "split_in_the_middle": (
        lambda layers, snapshots: _split_at(layers, snapshots, lambda length, slots: length // 2),
        "the middle is not the best place: the later layers have a slot less, so their part should be shorter",
    ),
    "split_evenly": (
        lambda layers, snapshots: _split_at(layers, snapshots, lambda length, slots: length // slots),
        "even distances are best with only one sweep; the first part is reversed with all slots, so it may be longer",
    ),
    "split_after_one_layer": (
        lambda layers, snapshots: _split_at(layers, snapshots, lambda length, slots: 1),
        "one layer apart, the slots are used up at the start: place a state so that both parts cost as much a layer",
    ),
    "slot_counted_twice": (
        lambda layers, snapshots: _split_at(
            layers,
            snapshots,
            lambda length, slots: min(
                range(1, length), key=lambda first: first + _again(length - first, slots) + _again(first, slots)
            ),
        ),
        "the later layers have a slot less than the first: the state before them is in it; so their part is shorter",
    ),
}
SIZES = ((1, 1), (2, 1), (4, 1), (3, 2), (3, 3), (5, 2), (6, 2), (6, 3), (8, 3), (10, 2), (10, 3))

CHECKPOINTING = Formula(
    signature=f"schedule(layers, snapshots) -> list of {STEPS}",
    results=("layers_run_again",),
    relative=0.0,
    reference=_revolve,
    measure=execute,
    oracle=lambda layers, snapshots: (fewest_runs(layers, snapshots),),
    draw=lambda rng: {"layers": rng.randint(5, 10), "snapshots": rng.randint(2, 4)},
    cases=[{"layers": layers, "snapshots": snapshots} for layers, snapshots in SIZES],
    wrong={name: Wrong(schedule, hint) for name, (schedule, hint) in SCHEDULES.items()},
)
