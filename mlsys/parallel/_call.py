"""One collective as every rank must call it, and how ranks find out that one of them does not.

gloo does not check: ranks with different shapes or dtypes get wrong numbers, a corrupted heap, or wait for ever. So
before any data moves, the ranks exchange what they are about to do, 72 bytes each, in ⌈log₂ n⌉ steps. Everyone then has
everyone's call and raises the same error. A rank whose own arguments are refused says that instead, so that the others
do not wait for it.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mlsys.parallel import _bruck
from mlsys.parallel._p2p import Wire
from mlsys.parallel._reduce import COMBINE
from mlsys.perf.collectives import ALGORITHMS

OPERATIONS = (*ALGORITHMS, "gather", "scatter", "barrier")
NAMES = (
    "direct",
    "dissemination",
    "shared_memory",
    "backend",
    *dict.fromkeys(a for of in ALGORITHMS.values() for a in of),
)
OPS = ("", *COMBINE)
REFUSED = -1
Exchange = Callable[[Tensor], Tensor]  # (n, k) integers of which this rank's row is filled in → all of them
_DTYPES = {zlib.crc32(str(dtype).encode()): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


class Call(NamedTuple):  # which is made five times as fast as a frozen dataclass, and one is made for every call
    """A collective with its arguments checked; tensors flat.

    elements: of the whole vector, as `mlsys.perf.collectives` counts it; of an uneven all-to-all, what this rank sends.
    sizes:    elements of each rank's part. For an all-to-all of what is received, and `sent_sizes` of what is sent.
    even:     whether all parts are equal; of an all-to-all, whether no sizes were given.
    root:     the rank that broadcasts, gathers or scatters.
    """

    operation: str
    dtype: torch.dtype
    elements: int
    output: Tensor | None
    input: Tensor | None
    op: str = ""
    root: int = 0
    sizes: tuple[int, ...] = ()
    sent_sizes: tuple[int, ...] = ()
    even: bool = True

    @property
    def cuda(self) -> bool:
        """Whether it is about tensors on a GPU."""
        some = self.output if self.output is not None else self.input
        return some is not None and some.is_cuda

    @property
    def nbytes(self) -> int:
        """Bytes of the whole vector."""
        return self.elements * self.dtype.itemsize

    def __str__(self) -> str:
        return _text(self.operation, self.dtype, self.elements, self.op, self.root)


def agree(exchange: Exchange, rank: int, n: int, call: Call, algorithm: str, count: int) -> None:
    """Raise ValueError on every rank unless all ranks make this call.

    `exchange` gathers one row of integers from each rank.
    """
    headers = exchange(_own_row(_header(call, algorithm, count), rank, n)).tolist()
    problem = disagreement(headers)
    if problem:
        raise ValueError(problem)
    if call.operation == "all_to_all" and not call.even:
        _agree_on_parts(exchange, rank, n, call)


def refuse(exchange: Exchange, rank: int, n: int, operation: str) -> None:
    """Tell the ranks that are in `agree` that the arguments of this rank's `operation` were refused."""
    exchange(_own_row([REFUSED, OPERATIONS.index(operation)] + [0] * 7, rank, n))


def over_wire(wire: Wire, device: torch.device) -> Exchange:
    """By messages: every rank's row is at every rank after ⌈log₂ n⌉ steps."""

    def exchange(rows: Tensor) -> Tensor:
        there = rows.to(device).view(-1)
        _bruck.all_gather(wire, there, [rows.shape[1]] * wire.size)
        return there.view(rows.shape).cpu()

    return exchange


def _own_row(values: Sequence[int], rank: int, n: int) -> Tensor:
    rows = torch.empty(n, len(values), dtype=torch.int64)
    rows[rank] = torch.tensor(values)
    return rows


def disagreement(headers: Sequence[Sequence[int]]) -> str | None:
    """What is wrong with the calls of all ranks, naming two of them; None if they agree."""
    for rank, header in enumerate(headers):
        if header[0] == REFUSED:
            return (
                f"rank {rank} did not take part: the arguments of its {OPERATIONS[header[1]]} were refused, see the "
                "error that it raised. No data was sent"
            )
    first = headers[0]
    for rank, header in enumerate(headers):
        if header != first:
            return (
                f"the ranks disagree: rank {rank} calls {_said(header, first)}, rank 0 calls {_said(first, header)}. "
                "No data was sent; every rank must make the same call"
            )
    return None


def _agree_on_parts(exchange: Exchange, rank: int, n: int, call: Call) -> None:
    sent = exchange(_own_row(call.sent_sizes, rank, n))
    expected = exchange(_own_row(call.sizes, rank, n))
    wrong = (sent != expected.T).nonzero()
    if len(wrong):
        source, to = wrong[0].tolist()
        raise ValueError(
            f"the ranks disagree: rank {source} sends {sent[source, to]} elements to rank {to} (input_sizes), which "
            f"expects {expected[to, source]} (output_sizes). No data was sent"
        )


def _header(call: Call, algorithm: str, count: int) -> list[int]:
    # Each rank of an uneven all-to-all sends as much as it likes: `_agree_on_parts` compares that.
    parts_differ = call.operation == "all_to_all" and not call.even
    return [
        OPERATIONS.index(call.operation),
        _dtype_code(call.dtype),
        NAMES.index(algorithm),
        0 if parts_differ else call.elements,
        OPS.index(call.op),
        call.root,
        count,
        0 if call.even or parts_differ else zlib.crc32(repr(call.sizes).encode()),
        int(call.even),
    ]


@functools.cache  # of some tens of dtypes
def _dtype_code(dtype: torch.dtype) -> int:
    return zlib.crc32(str(dtype).encode())


@functools.lru_cache(maxsize=1024)  # a training loop repeats itself
def _text(operation: str, dtype: torch.dtype | None, elements: int, op: str, root: int) -> str:
    if operation == "barrier":
        return operation
    settings = [f"op={op!r}"] if op else []
    if operation in ("broadcast", "scatter"):
        settings.append(f"src={root}")
    if operation == "gather":
        settings.append(f"dst={root}")
    return f"{operation}({', '.join(settings)}) of {elements} {str(dtype).removeprefix('torch.')} elements"


def _said(header: Sequence[int], other: Sequence[int]) -> str:
    """A header in words, with what is only worth saying where it differs."""
    text = _text(OPERATIONS[header[0]], _DTYPES.get(header[1]), header[3], OPS[header[4]], header[5])
    if header[:2] == other[:2] and header[3:6] == other[3:6]:
        if header[2] != other[2]:
            text += f" by algorithm={NAMES[header[2]]!r}"
        elif header[6] != other[6]:
            text += f" as call number {header[6]} of its communicator"
        else:
            text += " in equal parts" if header[8] else " with sizes of its own"
    return text
