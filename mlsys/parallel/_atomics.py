"""Flags in memory that processes share: compiled, with a stated memory order, outside the GIL.

Python has no atomic load or store, so LLVM's own are reached through numba:

- `store atomic release`: whatever this thread wrote before is in memory before the flag is.
- `load atomic acquire`: whatever this thread reads afterwards is read after the flag was.

A reader that sees a flag by an acquire load therefore sees all that its writer wrote before the release store. On x86
both are plain moves, as the processor keeps the order anyway, and only the compiler must be told. ARM reorders: there
they are `ldar` and `stlr`, and plain moves would now and then publish a flag before its data.

Who waits for all others looks at one word, in which they are counted, not at the flag of each: with a flag each, a rank
would sleep and be woken for one after the other, and where ranks are more than cores each of these costs a turn.

A waiter that has looked for a while sleeps. Linux has a call for that, the futex: sleep while this word is so, and wake
who sleeps on this word. Sleepers are counted, so that the last to arrive makes no call if nobody sleeps, and only the
last wakes anyone. Elsewhere a sleeper looks again every few microseconds.

Addresses are plain integers, so that a call costs less than a microsecond.
"""

import platform
import sys
from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, extending, int64, njit, types

# Each flag has this many bytes to itself. Two flags in one cache line would take the line from each other's writers at
# every store ("false sharing"). x86 fetches lines of 64 bytes in pairs; a line of Apple's cores has 128.
LINE = 128
SPINS = 100  # loads of a flag before another process may run: each costs a nanosecond while nobody writes the flag

intrinsic: Any = extending.intrinsic  # numba replaces the signature, which type checkers cannot see
# futex(2), by the number of the system call: a process sleeps on a 32-bit word, and who writes it wakes the sleepers.
FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98}.get(platform.machine(), 0) if sys.platform == "linux" else 0
NAP_US = 50  # where there is no futex, a sleeper looks again after so long
SLEEPERS = 8  # after a count, how far on is the number of those who sleep on it

_sched_yield: Any = types.ExternalFunction("sched_yield", types.int32())
_usleep: Any = types.ExternalFunction("usleep", types.int32(types.int32))
_syscall: Any = types.ExternalFunction("syscall", int64(*[int64] * 7))


@intrinsic
def _load_acquire(typingctx: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def _store_release(typingctx: Any, address: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        builder.store_atomic(arguments[1], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _pointer(typingctx: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.int64)(types.int64), generate


@intrinsic
def _add(typingctx: Any, address: Any, value: Any) -> Any:
    """Add to a word, and return what it was: in one step, and in one order with all others of its kind."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


if FUTEX:

    @njit
    def _sleep(flag: int, seen: int, timeout: int) -> int:
        """Sleep while the word at `flag` is `seen` (its low half, which is first on these processors)."""
        return _syscall(FUTEX, flag, 0, seen & 0xFFFFFFFF, timeout, 0, 0)

    @njit
    def _wake(flag: int) -> int:
        return _syscall(FUTEX, flag, 1, 0x7FFFFFFF, 0, 0, 0)

else:

    @njit
    def _sleep(flag: int, seen: int, timeout: int) -> int:
        return _usleep(NAP_US)

    @njit
    def _wake(flag: int) -> int:
        return 0


def _compiled(signature: Any) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """`njit` for one signature, at import; kept in numba's cache, if there is a folder that it can write."""

    def decorate(function: Callable[..., int]) -> Callable[..., int]:
        try:
            compiled: Callable[..., int] = njit(signature, nogil=True, cache=True)(function)
        except (RuntimeError, OSError):  # numba found no such folder, or it filled up
            compiled = njit(signature, nogil=True)(function)
        return compiled

    return decorate


@_compiled(int64(int64))
def load(address: int) -> int:
    """The 64-bit word at `address`, acquired."""
    return _load_acquire(address)


@_compiled(int64(int64, int64))
def store(address: int, value: int) -> int:
    """Release `value` to the 64-bit word at `address`, and return it."""
    _store_release(address, value)
    return value


@_compiled(int64(int64, int64, int64, int64, int64))
def announce(header: int, a: int, b: int, c: int, d: int) -> int:
    """Write four words at `header`, with plain stores: those who read them wait for a flag first. Returns the last."""
    words = carray(_pointer(header), 4)
    words[0], words[1], words[2], words[3] = a, b, c, d
    return d


@_compiled(int64(int64, int64, int64))
def odd_one(headers: int, n: int, stride: int) -> int:
    """The first of `n` headers, `stride` bytes apart, whose four words are not those of the first; −1 if none."""
    first = carray(_pointer(headers), 4)
    for rank in range(1, n):
        words = carray(_pointer(headers + rank * stride), 4)
        for i in range(4):
            if words[i] != first[i]:
                return rank
    return -1


@_compiled(int64(int64, int64, int64, int64))
def wait(count: int, goal: int, yields: int, timeout: int) -> int:
    """Wait until the word at `count` is at `goal` or beyond: 1, or 0 if it is not after a while.

    "A while" is `SPINS` loads, as many again after each of `yields` turns given to other processes, and then a sleep
    until the goal is reached, or until nothing has happened for as long as the two words at `timeout` say: seconds and
    nanoseconds.
    """
    spins = slept = 0
    while _load_acquire(count) < goal:
        spins += 1
        if spins <= SPINS:
            continue
        spins = 0
        if yields > 0:
            yields -= 1
            _sched_yield()
            continue
        if slept:
            return 0
        # The sleepers first, the count then: the last to arrive does it in the other order, so one sees the other.
        _add(count + SLEEPERS, 1)
        seen = _load_acquire(count)
        while seen < goal:
            _sleep(count, seen, timeout)
            before, seen = seen, _load_acquire(count)
            if seen == before:
                break
        _add(count + SLEEPERS, -1)
        slept = 1
    return 1


@_compiled(int64(int64, int64, int64, int64, int64, int64))
def arrive(flag: int, epoch: int, count: int, n: int, yields: int, timeout: int) -> int:
    """Set one's own flag to `epoch`, be counted, and `wait` for the others of `n`; the last to come wakes all."""
    _store_release(flag, epoch)
    if _add(count, 1) + 1 < n * epoch:
        return wait(count, n * epoch, yields, timeout)
    if _add(count + SLEEPERS, 0):  # a read that cannot be done before that of the count, unlike a load
        _wake(count)
    return 1
