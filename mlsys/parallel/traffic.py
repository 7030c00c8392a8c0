"""What a program really sends: a ledger of its collectives, torch's own included, to hold against the formulas.

    with ledger() as book:
        model(inputs).sum().backward()
        optimizer.step()
    print(book)

Each collective of torch is an operator (`c10d::allreduce_` and its like), called through the dispatcher as an
addition is, by `torch.distributed` as well as by the reducer of torch's DDP in C++ and by FSDP. A dispatch mode sees
every operator of its thread and hands it on. So the ledger looks at what passes, changes nothing, and needs no help
from the program. It is local: each rank that opens one keeps its own book.

What a row of the book says:

    operation   as `mlsys.perf.collectives` names it, whatever torch's version calls it; "send" for a lone message
    algorithm   of this library's collectives; "backend" for torch's own, "point-to-point" for a lone message
    ranks       of the group
    calls
    size        bytes of the whole vector, as `mlsys.perf.collectives` counts it, summed over the calls
    sent        bytes that this rank sent

`sent` is *counted* where messages can be seen: this library's collectives send them one by one. What the backend does
inside one of its collectives cannot be seen. There `sent` is *computed*, for the algorithms that backends take for
large vectors: what `mlsys.perf.collectives` says of a ring, or of pairwise exchange for an all-to-all; for a broadcast
or a reduction to one rank, what this rank sends along a binomial tree. `Row.counted` tells which.

Through shared memory nothing is sent at all. `sent` is then the bytes that other ranks read of what this rank wrote,
once for each that reads them (`shared_memory_sent`). For S bytes over n ranks, of which this rank's part is s:

    all_reduce      S(n−1) in one crossing (small vectors), S − s + s(n−1) in two: 2S(n−1)/n if parts are equal
    reduce_scatter  S − s
    all_gather      s(n−1)
    broadcast       S(n−1) from the source, 0 from the others
    all_to_all      S − s, where S and s are what this rank sends to all and to itself

Left out: the headers by which `check=True` finds out that ranks disagree, and messages that go to the backend past
the dispatcher, such as the rendezvous before the first call.

Cost:
    Every torch operator of the thread goes through Python while a ledger is open, some µs each: do not time under one.
    Nothing without one.

Communication:
    None of its own.

Papers:
    Thakur, Rabenseifner & Gropp 2005, "Optimization of Collective Communication Operations in MPICH", IJHPCA 19(1).

See also:
    `mlsys.perf.collectives` and `mlsys.perf.zero` (what should be sent), `mlsys.parallel.collectives`.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from mlsys.parallel._call import Call
from mlsys.parallel.shared_memory import SMALL_BYTES, _segments, _whole_lines
from mlsys.perf import collectives as perf

P = ParamSpec("P")
R = TypeVar("R")

BACKEND, POINT_TO_POINT = "backend", "point-to-point"

# torch's operator: ours, the argument that holds the vector, and whether that is only this rank's n-th of it.
OPERATIONS: Mapping[str, Mapping[str, tuple[str, str, bool]]] = {
    "c10d": {
        "allreduce_": ("all_reduce", "tensors", False),
        "allreduce_coalesced_": ("all_reduce", "tensors", False),
        "broadcast_": ("broadcast", "tensors", False),
        "reduce_": ("reduce", "tensors", False),
        "allgather_": ("all_gather", "output_tensors", False),
        "allgather_coalesced_": ("all_gather", "output_lists", False),
        "_allgather_base_": ("all_gather", "output_tensor", False),
        "allgather_into_tensor_coalesced_": ("all_gather", "outputs", False),
        "reduce_scatter_": ("reduce_scatter", "input_tensors", False),
        "_reduce_scatter_base_": ("reduce_scatter", "input_tensor", False),
        "reduce_scatter_tensor_coalesced_": ("reduce_scatter", "inputs", False),
        "alltoall_": ("all_to_all", "input_tensors", False),
        "alltoall_base_": ("all_to_all", "input", False),
        "gather_": ("gather", "input_tensors", True),
        "scatter_": ("scatter", "output_tensors", True),
        "send": ("send", "tensors", False),
        "barrier": ("barrier", "", False),
        "monitored_barrier_": ("barrier", "", False),
    },
    "_c10d_functional": {
        "all_reduce": ("all_reduce", "input", False),
        "all_reduce_": ("all_reduce", "input", False),
        "all_reduce_coalesced": ("all_reduce", "inputs", False),
        "all_reduce_coalesced_": ("all_reduce", "inputs", False),
        "all_gather_into_tensor": ("all_gather", "input", True),
        "all_gather_into_tensor_out": ("all_gather", "input", True),
        "all_gather_into_tensor_coalesced": ("all_gather", "inputs", True),
        "reduce_scatter_tensor": ("reduce_scatter", "input", False),
        "reduce_scatter_tensor_out": ("reduce_scatter", "input", False),
        "reduce_scatter_tensor_coalesced": ("reduce_scatter", "inputs", False),
        "all_to_all_single": ("all_to_all", "input", False),
        "broadcast": ("broadcast", "input", False),
        "broadcast_": ("broadcast", "input", False),
        "isend": ("send", "tensor", False),
    },
}
# Operators of these namespaces that move nothing from this rank: receiving is another rank's sending.
SILENT = {"recv_", "recv_any_source_", "irecv", "wait_tensor"}


@dataclass(frozen=True)
class Row:
    """One kind of collective in a book; `size` and `sent` are bytes, summed over the calls (see the module)."""

    operation: str
    algorithm: str
    ranks: int
    calls: int
    size: float
    sent: float
    counted: bool


class Book:
    """What `ledger` has seen: `rows`, and by operation `calls`, `size` and `bytes` (sent by this rank)."""

    def __init__(self) -> None:
        self._calls: Counter[tuple[str, str, int]] = Counter()
        self._size: dict[tuple[str, str, int], float] = {}
        self._sent: dict[tuple[str, str, int], float] = {}
        self._computed: set[tuple[str, str, int]] = set()
        self._lock = threading.Lock()  # a communicator's worker thread writes too

    @property
    def rows(self) -> tuple[Row, ...]:
        """The kinds of collectives, those that sent most first."""
        with self._lock:
            rows = [
                Row(*key, calls, self._size[key], self._sent[key], key not in self._computed)
                for key, calls in self._calls.items()
            ]
        return tuple(sorted(rows, key=lambda row: (-row.sent, row.operation, row.algorithm, row.ranks)))

    @property
    def calls(self) -> Mapping[str, int]:
        """How often each operation was called; 0 for those that were not."""
        return self._by_operation("calls")

    @property
    def size(self) -> Mapping[str, float]:
        """Bytes of the vectors of each operation, summed over the calls."""
        return self._by_operation("size")

    @property
    def bytes(self) -> Mapping[str, float]:
        """Bytes that this rank sent for each operation."""
        return self._by_operation("sent")

    @property
    def sent(self) -> float:
        """Bytes that this rank sent in all."""
        return sum(row.sent for row in self.rows)

    def _by_operation(self, field: str) -> Mapping[str, Any]:
        total: Counter[str] = Counter()
        for row in self.rows:
            total[row.operation] += getattr(row, field)
        return total

    def __str__(self) -> str:
        lines = [
            (row.operation, row.algorithm, row.ranks, row.calls, row.size, row.sent, "" if row.counted else "computed")
            for row in self.rows
        ]
        headers = ("operation", "algorithm", "ranks", "calls", "size, bytes", "sent, bytes", "")
        return tabulate(lines, headers=headers, intfmt=",", floatfmt=",.0f")

    def _add(self, key: tuple[str, str, int], calls: int, size: float, sent: float, *, counted: bool) -> None:
        with self._lock:
            self._calls[key] += calls
            self._size[key] = self._size.get(key, 0) + size
            self._sent[key] = self._sent.get(key, 0) + sent
            if not counted:
                self._computed.add(key)


@contextlib.contextmanager
def ledger() -> Iterator[Book]:
    """Count what this rank sends inside the `with` block: this thread, its backward passes, its communicators' workers.

    Ledgers may be nested: each counts all that passes while it is open.
    """
    book = Book()
    with _Watch(book):
        yield book


# --- what collectives tell it -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Inside:
    """The collective of this library that is running in this thread; None for headers, which nobody counts."""

    key: tuple[str, str, int] | None


_INSIDE: ContextVar[_Inside | None] = ContextVar("mlsys_collective", default=None)
_NOTHING = contextlib.nullcontext()


def collective(operation: str, algorithm: str, nbytes: float, n: int) -> contextlib.AbstractContextManager[None]:
    """Around one collective over `n` ranks and `nbytes` (of the whole vector): the messages within are its own.

    What is sent within counts for this row, and inner collectives of a composed one are no calls of their own.
    """
    books = _books()
    return _within(books, (operation, algorithm, n), nbytes) if books else _NOTHING


def note(
    operation: str, algorithm: str, nbytes: float, n: int, *, sent: float | Callable[[], float] | None = None
) -> None:
    """Tell the ledgers of a collective that no message shows, such as one through shared memory.

    `nbytes` is the size of the whole vector, `n` the ranks, `sent` what this rank sent, or a function that finds it out
    and is called only if a ledger is open (None: as a ring would). Within `collective` it is a part of that one, and
    adds only what was sent.
    """
    books = _books()
    if not books:
        return
    inside = _INSIDE.get()
    if sent is None:
        moved = _ring(operation, n, nbytes, 0, 0)
    else:
        moved = sent() if callable(sent) else sent
    for book in books:
        if inside is None:
            book._add((operation, algorithm, n), 1, nbytes, moved, counted=sent is not None)
        elif inside.key is not None:
            book._add(inside.key, 0, 0, moved, counted=sent is not None)


def shared_memory_sent(call: Call, rank: int, n: int, slot_bytes: int) -> int:
    """Bytes that the other ranks read of what `rank` wrote into its slots, of n ranks with slots of `slot_bytes`.

    The parts of an all-reduce are those of `SharedMemory.all_reduce`: whole cache lines, so the last may be shorter.
    """
    itemsize = call.dtype.itemsize
    if n == 1:
        return 0
    if call.operation == "broadcast":
        return call.nbytes * (n - 1) if rank == call.root else 0
    if call.operation == "reduce_scatter":
        return call.nbytes - call.sizes[rank] * itemsize
    if call.operation == "all_gather":
        return call.sizes[rank] * itemsize * (n - 1)
    if call.operation == "all_to_all":
        return call.nbytes - call.sent_sizes[rank] * itemsize
    if call.operation == "barrier":
        return 0
    if n * call.nbytes <= SMALL_BYTES and call.nbytes <= slot_bytes:
        return call.nbytes * (n - 1)
    count, width = _segments(call.elements, slot_bytes, itemsize)
    part = 0
    for k in range(count):
        segment = min(max(call.elements - k * width, 0), width)
        size = _whole_lines(-(-segment // n), itemsize)
        part += min((rank + 1) * size, segment) - min(rank * size, segment)
    return call.nbytes + part * itemsize * (n - 2)


def uncounted() -> contextlib.AbstractContextManager[None]:
    """Around messages that belong to no collective's cost: headers, measurements of the links."""
    return _set_inside(_Inside(None)) if _books() else _NOTHING


def carried(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, made to run in another thread under the ledgers that are open in this one."""
    books = _books()
    if not books:
        return function

    @wraps(function)
    def under_ledgers(*args: P.args, **kwargs: P.kwargs) -> R:
        with contextlib.ExitStack() as stack:
            already = _books()
            for book in books:
                if book not in already:
                    stack.enter_context(_Watch(book))
            return function(*args, **kwargs)

    return under_ledgers


@contextlib.contextmanager
def _within(books: list[Book], key: tuple[str, str, int], nbytes: float) -> Iterator[None]:
    if _INSIDE.get() is not None:
        yield
        return
    for book in books:
        book._add(key, 1, nbytes, 0, counted=True)
    with _set_inside(_Inside(key)):
        yield


@contextlib.contextmanager
def _set_inside(inside: _Inside) -> Iterator[None]:
    token = _INSIDE.set(inside)
    try:
        yield
    finally:
        _INSIDE.reset(token)


# --- what passes the dispatcher ---------------------------------------------------------------------------------------


class _Watch(TorchDispatchMode):
    """Sees every operator of its thread. Autograd carries it into the threads of a backward pass."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not wrapped for torch.compile, which would import the compiler: more than a second at the first operator."""
        return False

    def __init__(self, book: Book) -> None:
        super().__init__()
        self.book = book

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in OPERATIONS:
            self._see(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = func._schema.name.rpartition("::")[2]
        inside = _INSIDE.get()
        if name in SILENT or (inside is not None and inside.key is None):
            return
        # An operator of a later torch is counted under its own name rather than lost.
        operation, argument, part = OPERATIONS[func.namespace].get(name, (name, "", False))
        given: dict[str, Any] = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        size = _nbytes(given.get(argument))
        if operation == "send":
            key = inside.key if inside is not None and inside.key is not None else None
            if key is None:
                self.book._add((operation, POINT_TO_POINT, 2), 1, size, size, counted=True)
            else:
                self.book._add(key, 0, 0, size, counted=True)
            return
        group = _group(given)
        if group is None:  # housekeeping within torch
            return
        n, rank = group.size(), group.rank()
        size *= n if part else 1
        if operation == "all_to_all" and given.get("input_split_sizes"):
            sent = size * (1 - given["input_split_sizes"][rank] / max(sum(given["input_split_sizes"]), 1))
        else:
            root = given["root_rank"] if "root_rank" in given else given.get("src", 0)
            sent = _ring(operation, n, size, rank, root)
        if inside is not None and inside.key is not None:
            self.book._add(inside.key, 0, 0, sent, counted=False)
        else:
            self.book._add((operation, BACKEND, n), 1, size, sent, counted=False)


def _books() -> list[Book]:
    """The open ledgers of this thread, the outermost first."""
    if not torch._C._len_torch_dispatch_stack():
        return []
    return [mode.book for mode in _get_current_dispatch_mode_stack() if isinstance(mode, _Watch)]


def _nbytes(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in _pytree.tree_leaves(value) if isinstance(t, Tensor))


def _group(given: Mapping[str, Any]) -> dist.ProcessGroup | None:
    """The process group among an operator's arguments: an object, or in functional collectives a name."""
    group = given.get("process_group", given.get("group_name"))
    if isinstance(group, str):
        resolve: Any = dist.distributed_c10d._resolve_process_group
        return resolve(group)
    if group is None or isinstance(group, dist.ProcessGroup):
        return group
    return dist.ProcessGroup.unbox(group)


def _ring(operation: str, n: int, size: float, rank: int, root: int) -> float:
    """Bytes that `rank` sends: around a ring; along a binomial tree for one-to-all and all-to-one."""
    if n == 1 or operation not in ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", *_ROOTED):
        return 0
    if operation in perf.ALGORITHMS and operation != "broadcast":
        sent = perf.cost(operation, perf.ALGORITHMS[operation][0], n, size).bytes_per_rank
        return int(sent) if sent == int(sent) else sent
    return _ROOTED[operation](n, size, (rank - root) % n)


def _children(n: int, place: int) -> int:
    """How many ranks the one at `place` (0: the root) passes a broadcast on to: place + 2^i for every 2^i > place."""
    return sum(place < 1 << i and place + (1 << i) < n for i in range(n.bit_length()))


_ROOTED: Mapping[str, Callable[[int, float, int], float]] = {
    "broadcast": lambda n, size, place: size * _children(n, place),
    "reduce": lambda n, size, place: size if place else 0,
    "gather": lambda n, size, place: size / n if place else 0,
    "scatter": lambda n, size, place: 0 if place else size * (n - 1) / n,
}
