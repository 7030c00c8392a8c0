"""What every rank is doing, readable after it was killed: a page of memory that ranks write and the launcher reads.

A rank that hangs cannot be asked, and one that was killed least of all. So each rank writes, before every collective, a
line like "all_reduce of float32 (1024,) at train.py:31" into its own slot of a file that all processes map. A write is
a copy of a hundred bytes in memory, a few µs; the launcher reads it whenever it likes, also after a kill -9.

A slot has two entries: the last collective, and the last send or receive, which is where a collective written out over
point-to-point messages really is.
"""

from __future__ import annotations

import functools
import mmap
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

ENTRY = 512  # bytes
HEAD = struct.Struct("<QdII")  # how many so far, when by the monotonic clock, state, bytes of text
STATE = struct.Struct("<I")  # at byte 16 of the head
COLLECTIVE, MESSAGE = 0, 1  # which entry of a slot
RUNNING, ISSUED, FINISHED = 1, 2, 3

# Names in torch.distributed; those that a torch version lacks are passed over.
COLLECTIVES = (
    "all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object", "all_gather_single",
    "all_reduce", "all_reduce_coalesced", "all_to_all", "all_to_all_single", "barrier", "broadcast",
    "broadcast_object_list", "gather", "gather_object", "monitored_barrier", "reduce", "reduce_scatter",
    "reduce_scatter_single", "reduce_scatter_tensor", "scatter", "scatter_object_list",
)  # fmt: skip
MESSAGES = ("batch_isend_irecv", "irecv", "isend", "recv", "recv_object_list", "send", "send_object_list")

_HERE = str(Path(__file__).parent)
_INSIDE = (_HERE, str(Path(torch.__file__).parent))
_OWN: Notes | None = None  # in a rank of a launch: its slot


@dataclass(frozen=True)
class Entry:
    """The last collective, or the last message, of a rank."""

    count: int
    since_s: float  # time.monotonic()
    state: int
    text: str


class Notes:
    """One rank's slot."""

    def __init__(self, path: Path, rank: int) -> None:
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self.path = path
        self._offset = rank * 2 * ENTRY
        self._counts = [0, 0]
        self._texts: dict[Any, bytes] = {}

    def start(self, which: int, text: bytes) -> None:
        """A new operation begins."""
        self._counts[which] += 1
        offset = self._offset + which * ENTRY
        text = text[: ENTRY - HEAD.size]
        HEAD.pack_into(self._memory, offset, self._counts[which], time.monotonic(), RUNNING, len(text))
        self._memory[offset + HEAD.size : offset + HEAD.size + len(text)] = text

    def finish(self, which: int, state: int = FINISHED) -> None:
        """The last operation is over, or was handed over to a thread of the backend (`ISSUED`)."""
        STATE.pack_into(self._memory, self._offset + which * ENTRY + 16, state)

    def describe(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType) -> bytes:
        """Such as "all_reduce of float32 (4, 8) at train.py:31"; kept, as a training loop repeats itself."""
        first = args[0] if args else None
        tensor = first if isinstance(first, torch.Tensor) else _first_tensor((*args, *kwargs.values()))
        caller = outside(frame)
        what = None if tensor is None else (tensor.dtype, tensor.shape)
        key = (name, caller.f_code, caller.f_lineno, what)
        text = self._texts.get(key)
        if text is None:
            if len(self._texts) >= 1024:  # shapes that never repeat must not fill the memory
                self._texts.clear()
            of = "" if tensor is None else f" of {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
            text = self._texts[key] = f"{name}{of}{at(caller)}".encode()
        return text


def note(text: str | None) -> None:
    """Say that this rank begins the collective `text`, or with None that it has finished it.

    `launch` reports it when the rank hangs or dies, with the line outside of torch and of this package that asked for
    it. Outside of a launch it does nothing.
    """
    if _OWN is None:
        return
    if text is None:
        _OWN.finish(COLLECTIVE)
    else:
        _OWN.start(COLLECTIVE, f"{text}{at(outside(sys._getframe(1)))}".encode())


def outside(frame: FrameType) -> FrameType:
    """The nearest caller that is neither in torch nor in this package, or the frame itself if all are."""
    found: FrameType | None = frame
    while found is not None and found.f_code.co_filename.startswith(_INSIDE):
        found = found.f_back
    return found or frame


def at(frame: FrameType) -> str:
    return f" at {frame.f_code.co_filename}:{frame.f_lineno}"


def create(path: Path, ranks: int) -> None:
    """Make the file, with an empty slot for each rank."""
    path.write_bytes(bytes(ranks * 2 * ENTRY))


def read(path: Path, ranks: int) -> list[tuple[Entry | None, Entry | None]]:
    """The last collective and the last message of each rank; None if it has had none."""
    data = path.read_bytes()
    return [(_entry(data, 2 * rank), _entry(data, 2 * rank + 1)) for rank in range(ranks)]


def _entry(data: bytes, index: int) -> Entry | None:
    start = index * ENTRY
    count, since_s, state, length = HEAD.unpack_from(data, start)
    if not count:
        return None
    text = data[start + HEAD.size : start + HEAD.size + length].decode(errors="replace")  # may be cut in a letter
    return Entry(count, since_s, state, text)


def in_words(entries: tuple[Entry | None, Entry | None]) -> str:
    """Such as "is in its 3rd collective, all_reduce of float32 (4,) at train.py:31"; empty if there was nothing."""
    parts = []
    for entry, what in zip(entries, ("collective", "message"), strict=True):
        if entry is not None:
            verb = {RUNNING: "is in", ISSUED: "has issued"}.get(entry.state, "has finished")
            parts.append(f"{verb} its {_ordinal(entry.count)} {what}, {entry.text}")
    return "; ".join(parts)


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def suspect(last: dict[int, Entry | None]) -> tuple[int, str]:
    """Which of the stuck ranks the others probably wait for, by the last collective of each, and why."""
    counts = {number: entry.count if entry else 0 for number, entry in last.items()}
    behind = min(counts, key=lambda number: (counts[number], number))
    if counts[behind] < max(counts.values()):
        return behind, f"; rank {behind} is behind"
    kinds = {number: entry.text.partition(" at ")[0] if entry else "" for number, entry in last.items()}
    times = Counter(kinds.values())
    odd = min(kinds, key=lambda number: (times[kinds[number]], number))
    return odd, "; they are in different collectives" if len(times) > 1 else ""


def inside_launch() -> bool:
    """Whether this process is a rank of a launch."""
    return _OWN is not None


def attach(path: Path, rank: int) -> None:
    """From now on this process is that rank, and what it calls is written down."""
    global _OWN
    _OWN = Notes(path, rank)


def watch_torch() -> None:
    """Replace torch.distributed's Python functions with ones that first write down that they were called.

    Only in the processes of a launch, and before anything else has imported the functions by name. What C++ calls
    itself, as torch's own DDP does, is not seen here; the Python stack of a stuck rank shows it.
    """
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    for which, names in ((COLLECTIVE, COLLECTIVES), (MESSAGE, MESSAGES)):
        for name in names:
            if hasattr(dist, name):
                watched = _watched(getattr(dist, name), name, which)
                setattr(dist, name, watched)
                setattr(c10d, name, watched)


def _watched(function: Callable[..., Any], name: str, which: int) -> Callable[..., Any]:
    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        own, frame = _OWN, sys._getframe(1)
        if own is None or frame.f_globals.get("__name__") == "torch.distributed.distributed_c10d":
            return function(*args, **kwargs)  # a part of another collective, which is written down already
        own.start(which, own.describe(name, args, kwargs, frame))
        result = function(*args, **kwargs)
        own.finish(which, FINISHED if result is None or isinstance(result, int) else ISSUED)
        return result

    return watched


def _first_tensor(values: Iterable[Any]) -> Any:
    """The first tensor among arguments, lists of tensors and P2POps."""
    for value in values:
        for item in value[:1] if isinstance(value, list | tuple) else (value,):
            tensor = getattr(item, "tensor", item)  # a P2POp holds its tensor
            if hasattr(tensor, "dtype") and hasattr(tensor, "shape"):
                return tensor
    return None
