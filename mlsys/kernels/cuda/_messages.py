"""What each kind of finding says, and what it advises: one function a kind, from the fields that the runtime wrote.

A function is named for the kind as the runtime spells it, `out-of-shared` is `_out_of_shared`; the fields after the
first six are its arguments, in the order in which checker.cpp and scheduler.cpp write them.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Index = tuple[int, int, int]
READ, WRITE, ATOMIC = 0, 1, 2
DEVICE = 1000  # in place of an argument's number: `__device__` variables (checker.cpp has the same)
DYNAMIC = "mlsys_dynamic_shared"
DYNAMIC_BYTES = 228 * 1024
_DOES = {READ: "reads", WRITE: "writes", ATOMIC: "updates atomically"}
_DID = {READ: "read", WRITE: "wrote", ATOMIC: "updated atomically"}


@dataclass(frozen=True)
class Variable:
    """A shared variable: where it lies among them, in bytes."""

    name: str
    offset: int
    bytes: int


@dataclass(frozen=True)
class Launch:
    """What the numbers of a finding refer to."""

    parameters: Sequence[str]
    grid: Index
    block: Index
    shared: Sequence[Variable]
    line_of: Callable[[int], int]  # of an instruction
    source: Sequence[str]

    @property
    def uses_atomics(self) -> bool:
        """Whether the file has an atomic operation."""
        return any("atomic" in line for line in self.source)

    def barrier_between(self, first: int, last: int) -> bool:
        """Whether a line between these two has a barrier of the block."""
        return any("__syncthreads" in line or ".sync()" in line for line in self.source[first : last - 1])

    def thread(self, linear: int) -> Index:
        """A thread's index, from its number within the block."""
        return _unravelled(linear, self.block)

    def block_at(self, linear: int) -> Index:
        """A block's index, from its number within the grid."""
        return _unravelled(linear, self.grid)

    def parameter(self, index: int) -> str:
        """The name of an argument."""
        if index == DEVICE:
            return "the __device__ variables"
        return (
            self.parameters[index] if index < len(self.parameters) and self.parameters[index] else f"argument {index}"
        )

    def variable(self, offset: int) -> Variable | None:
        """The shared variable that begins at or before a place in shared memory."""
        at = bisect.bisect_right([v.offset for v in self.shared], offset) - 1
        return self.shared[at] if at >= 0 else None

    def what(self, index: int, offset: int, size: int) -> str:
        """An element of an argument, or of shared memory (index −1), as one would write it."""
        if index >= 0:
            name = self.parameter(index)
            return f"{name}[{offset // size}]" if offset % size == 0 else f"byte {offset} of {name}"
        variable = self.variable(offset)
        if variable is None or offset >= variable.offset + variable.bytes:
            return f"{size} bytes of shared memory"
        name = "dynamic shared memory" if variable.name == DYNAMIC else f"shared {variable.name}"
        return name if variable.bytes == size else f"{name}, element {(offset - variable.offset) // size}"


@dataclass(frozen=True)
class Here:
    """Where a finding was made: the line, and who was there."""

    line: int
    thread: Index
    block: Index

    def __str__(self) -> str:
        return f"thread {spoken(self.thread)} of block {spoken(self.block)}"


@dataclass(frozen=True)
class Message:
    """What a finding says. line, thread, block: if others than those where it was written down."""

    kind: str
    text: str
    hint: str
    other_line: int = 0
    thread: Index | None = None
    block: Index | None = None
    line: int = 0


def message(kind: str, fields: Sequence[str], launch: Launch, here: Here) -> Message:
    """The message of a finding."""
    return _KINDS[kind](launch, here, *fields)


def spoken(index: Index) -> str:
    """An index as CUDA's manuals write it."""
    return f"({index[0]},{index[1]},{index[2]})"


def number(text: str) -> int:
    """What C++ printed, an address or an integer."""
    return int(text, 16) if text.startswith("0x") else 0 if text == "(nil)" else int(text)


# --- races ------------------------------------------------------------------------------------------------------------


def _race(launch: Launch, here: Here, *fields: str) -> Message:
    index, does, offset, size, pc, did, thread, block, same, *met = map(number, fields)
    if met:  # found when workers compared what they saw
        here = Here(here.line, launch.thread(met[0]), launch.block_at(met[1]))
    other = launch.line_of(pc)
    them = f"thread {spoken(launch.thread(thread))}"
    if not same:
        them += f" of block {spoken(launch.block_at(block))}"
    there = "in the same line" if other == here.line else f"in line {other}"
    what = launch.what(index, offset, size)
    text = f"{here} {_DOES[does]} {what}, which {them} {_DID[did]} {there}; nothing orders the two"
    if index >= 0 and not same:
        hint = _between_blocks(launch, does, did, here.line, other)
    else:
        hint = _between_threads(launch, here, does, did, other, thread, is_shared=index < 0)
    return Message("race", text, hint, other, here.thread, here.block)


def _between_blocks(launch: Launch, does: int, did: int, line: int, other: int) -> str:
    if {does, did} == {READ, WRITE} and line != other and launch.uses_atomics:
        return (
            "blocks run in any order: if an atomic counter says that the data is there, is a __threadfence() missing "
            f"between line {min(line, other)} and the atomic?"
        )
    return "blocks run in any order, or at once: use an atomic operation such as atomicAdd, or give each its own place"


def _between_threads(
    launch: Launch, here: Here, does: int, did: int, other: int, thread: int, *, is_shared: bool
) -> str:
    first, last = sorted((here.line, other))
    if ATOMIC in (does, did):
        return (
            "an atomic operation does not protect from a plain access: make both atomic, or put a barrier between them"
        )
    if first == last and (does == did == WRITE or not is_shared):
        return "several threads write the same place: should each have its own, or is it a sum, for atomicAdd?"
    x, y, z = here.thread
    same_warp = (x + launch.block[0] * (y + launch.block[1] * z)) // 32 == thread // 32
    alone = launch.block[0] * launch.block[1] * launch.block[2] <= 32
    barrier = "__syncthreads(), or __syncwarp() if only lanes of a warp share this," if same_warp else "__syncthreads()"
    barrier = "__syncwarp()" if same_warp and alone else barrier
    if first == last:
        return f"is a {barrier} missing between one round of the loop and the next?"
    if launch.barrier_between(first, last):
        return f"is a {barrier} missing at the end of the loop, before line {first} comes round again?"
    loop = ", or at the end of the loop that both are in" if does == WRITE and here.line < other else ""
    return f"is a {barrier} missing between line {first} and line {last}{loop}?"


# --- accesses ---------------------------------------------------------------------------------------------------------


def _out_of_bounds(launch: Launch, here: Here, *fields: str) -> Message:
    does, size, index, offset, length = map(number, fields)
    text = f"{here} {_DOES[does]} {size} bytes"
    if index < 0:
        return Message("out-of-bounds", f"{text} of memory that belongs to no argument", "")
    name = launch.parameter(index)
    where = f"{-offset} bytes before {name}" if offset < 0 else f"{offset + size - length} bytes past the end of {name}"
    element = f"byte {offset} of {length}" if length % size else f"element {offset // size} of {length // size}"
    hint = "is an index negative?" if offset < 0 else "is the bounds check missing, or does it say <= where < is meant?"
    return Message("out-of-bounds", f"{text} {where} ({element})", hint)


def _out_of_shared(launch: Launch, here: Here, *fields: str) -> Message:
    does, size, offset, dynamic, asked = map(number, fields)
    text = f"{here} {_DOES[does]} {size} bytes"
    if dynamic <= offset < dynamic + DYNAMIC_BYTES:
        text += f" at byte {offset - dynamic} of dynamic shared memory, of which the launch asked for {asked}"
        return Message("out-of-bounds", text, "give the launch shared=…, in bytes, or check the index")
    near = launch.variable(offset)
    text += f" past the end of {near.name} ({near.bytes} bytes)" if near else ""
    return Message("out-of-bounds", f"{text} in shared memory", "check the index against the array's size")


def _index(launch: Launch, here: Here, array: str, index: str) -> Message:
    kind = re.sub(r"(?<=\w)\[", " [", array.strip("'"), count=1)  # clang writes float[16], g++ float [16]
    text = f"{here} uses index {index} in an array of type {kind}"
    return Message("out-of-bounds", text, "check the index against the array's size")


def _uninitialised(launch: Launch, here: Here, *fields: str) -> Message:
    offset, size, _ = map(number, fields)
    text = f"{here} reads {launch.what(-1, offset, size)}, which no thread of the block has written"
    hint = "shared memory begins with anything: does every element get a value, and is a __syncthreads() missing?"
    return Message("uninitialised", text, hint)


def _not_waited_for(launch: Launch, here: Here, *fields: str) -> Message:
    offset, size = map(number, fields)
    text = f"{here} reads {launch.what(-1, offset, size)} while an asynchronous copy still writes it"
    return Message("not-waited-for", text, "is the wait for the copy missing, or a __syncthreads() after it?")


def _misaligned(launch: Launch, here: Here, *fields: str) -> Message:
    index, does, size, _, past = map(number, fields)
    name = launch.parameter(index) if index >= 0 else "shared memory"
    text = f"{here} {_DOES[does]} {size} bytes of {name} at an address {past} bytes past a multiple of {size}"
    hint = f"a vector starts at a multiple of its size: is the length of a row a multiple of {size} bytes?"
    return Message("misaligned", text, hint)


# --- barriers and shuffles --------------------------------------------------------------------------------------------


def _divergent_barrier(launch: Launch, here: Here, *fields: str) -> Message:
    what, who, other, _, line, them = fields
    text = (
        f"in block {spoken(here.block)}, thread {spoken(launch.thread(int(who)))} waits at this {what}, thread "
        f"{spoken(launch.thread(int(them)))} at the {other} in line {line}: all threads must reach the same one"
    )
    return Message("divergent-barrier", text, "move the barrier out of the if", int(line))


def _barrier_after_return(launch: Launch, here: Here, what: str, count: str, who: str) -> Message:
    text = (
        f"{count} threads of block {spoken(here.block)}, one of them {spoken(launch.thread(int(who)))}, have returned "
        f"before this {what}: all threads must reach it"
    )
    hint = "do not return early: let all threads run to the end, and put the work, not the barrier, under an if"
    return Message("divergent-barrier", text, hint)


def _undefined_lane(launch: Launch, here: Here, what: str, lane: str, mask: str) -> Message:
    text = (
        f"{here} reads lane {lane} by {what}, but that lane takes no part (mask {int(mask):#010x}): any value may come"
    )
    hint = "let all 32 lanes take part with the mask 0xffffffff, or choose source lanes within the mask"
    return Message("divergent-shuffle", text, hint)


def _mask_without_caller(launch: Launch, here: Here, what: str, mask: str) -> Message:
    text = f"{here} calls {what} with the mask {int(mask):#010x}, in which its own lane is missing"
    return Message("divergent-shuffle", text, "the mask names the lanes that call, the caller among them")


def _stuck(launch: Launch, here: Here, *fields: str) -> Message:
    groups = [fields[i : i + 6] for i in range(0, len(fields), 6)]
    text = f"block {spoken(here.block)} can not go on: " + "; ".join(_group(launch, *group) for group in groups)
    # Where the mistake is, few wait: a shuffle or a vote in an if, before a barrier that all reach.
    waiting = sorted((g for g in groups if g[0] != "returned"), key=lambda g: (not _is_warp(g[0]), int(g[3])))
    line, other = (int(waiting[0][2]), int(waiting[1][2]) if len(waiting) > 1 else 0)
    if any("mbarrier" in what for what, *_ in waiting):
        hint = (
            "a phase never ends: does every expected thread arrive, do the bytes add up, is the parity the right one?"
        )
        return Message("deadlock", text, hint, line=line)
    if _is_warp(waiting[0][0]):
        hint = (
            "all lanes of the mask must reach the same call: move it out of the if, or leave the others out of the mask"
        )
        return Message("divergent-shuffle", text, hint, line=line)
    if len(groups) > 1:
        hint = "all threads of the block must reach the same barrier: move it out of the if, or the loop"
        return Message("divergent-barrier", text, hint, other, line=line)
    return Message("deadlock", text, "every path must lead the threads of a block to the same meeting", line=line)


def _is_warp(what: str) -> bool:
    """Whether it is a meeting of lanes, not of the block."""
    return what.endswith("_sync") or what in ("__syncwarp", "tile.sync")


def _group(launch: Launch, what: str, _: str, line: str, count: str, first: str, last: str) -> str:
    one = count == "1"
    who = f"thread {spoken(launch.thread(int(first)))}"
    if not one:
        who = f"{count} threads, {spoken(launch.thread(int(first)))} to {spoken(launch.thread(int(last)))},"
    if what == "returned":
        return f"{who} {'has' if one else 'have'} returned"
    return f"{who} {'waits' if one else 'wait'} at {what} in line {line}"


# --- ends -------------------------------------------------------------------------------------------------------------


def _assertion(launch: Launch, here: Here, what: str) -> Message:
    return Message("assertion", f"{here} finds that {what} does not hold", "")


def _endless(launch: Launch, here: Here, _: str) -> Message:
    hint = "does the loop end? Give the launch limit=…, in seconds, if it only needs longer"
    return Message("endless-loop", f"time is up, and {here} was here", hint)


def _unfinished(launch: Launch, here: Here, _: str) -> Message:
    return Message("endless-loop", "time was up before all blocks had run", "give the launch limit=…, in seconds")


def _invalid_address(launch: Launch, here: Here, address: str) -> Message:
    text = f"{here} used an address that is not memory, or not aligned ({address})"
    return Message("invalid-address", text, "check() finds the access that is out of bounds")


def _division(launch: Launch, here: Here, _: str) -> Message:
    return Message("division-by-zero", f"{here} divides an integer by zero", "a GPU gives a wrong number, and no error")


def _stack_overflow(launch: Launch, here: Here, _: str) -> Message:
    hint = "are local arrays very large, or does a recursion not end?"
    return Message("stack-overflow", f"{here} needs more than 64 KB of stack", hint)


def _misuse(launch: Launch, here: Here, *what: str) -> Message:
    return Message("misuse", f"{here}: {' '.join(what)}", "")


_KINDS: dict[str, Callable[..., Message]] = {
    "race": _race,
    "out-of-bounds": _out_of_bounds,
    "out-of-shared": _out_of_shared,
    "index": _index,
    "uninitialised": _uninitialised,
    "not-waited-for": _not_waited_for,
    "misaligned": _misaligned,
    "divergent-barrier": _divergent_barrier,
    "barrier-after-return": _barrier_after_return,
    "undefined-lane": _undefined_lane,
    "mask-without-caller": _mask_without_caller,
    "stuck": _stuck,
    "assertion": _assertion,
    "endless": _endless,
    "unfinished": _unfinished,
    "invalid-address": _invalid_address,
    "division": _division,
    "stack-overflow": _stack_overflow,
    "misuse": _misuse,
}


def _unravelled(linear: int, sizes: Index) -> Index:
    x, y, _ = sizes
    return linear % x, linear // x % y, linear // (x * y)
