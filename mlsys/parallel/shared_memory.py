"""Collectives between the processes of one host, through memory that they share.

Two processes of one host need no network, and no copy through the kernel: they
map the same pages. Each rank owns slots in that memory, which others only read.
The contract is that of any backend: the caller's tensors may lie anywhere, so
data is copied in and copied out.

An all-reduce of S bytes goes through in segments. A segment is cut into n parts,
and rank r reduces part r, so that the work is shared:

    1. copy in     r writes what the others will reduce to its slot
    2. reduce      r sums its part, over the others' slots and its own tensor, in
                   rank order; into its own tensor, and where its slot is still free
    3. copy out    r copies the other parts from where their ranks reduced them

Between two steps all ranks cross a barrier. Of one segment alone that would be two
crossings, so they are shared by three segments in flight: in each epoch a rank
copies in segment k, reduces k−1 and copies out k−2, then crosses. Three buffers
used in turn keep the three apart. A small message takes one crossing: each rank
writes all of it, then sums all slots itself, in rank order.

Either way the result is the same, bit for bit, on all ranks: an element is summed
by one rank, or by all in the same order. In 16 bits the sum is kept in float32
and rounded once (gloo rounds after each addition).

Memory order. Writing a slot and then a flag is not enough: processors and compilers
reorder plain stores and loads, and ARM's do so often. The flag is written by a
store-release, after which all earlier writes are seen, and read by a load-acquire,
before which no later read may happen. Each flag has a cache line (on some machines
two) to itself: in a shared line every store would take the line from all other
writers, although nobody writes the same word.

Waiting. A waiter reads flags for some nanoseconds, lets other processes run for
some microseconds (ranks may be more than cores), then sleeps until the flag is
written. It wakes now and then to look whether the others are still there: each
holds a lock on the file of the memory, which the system takes back from a process
that has ended. So a rank that is killed is noticed at once, and one that never
comes after the timeout.

Cost:
    Bytes read and written by each rank, where S is the whole vector. Slots stay in
    cache, so what counts for long vectors is the first column: the caller's memory.

        operation         tensors               slots
        all_reduce        S + S                 3·S·(n−1)/n + 2·S/n
        … small           S + S                 S + n·S
        reduce_scatter    S + S/n               2·S·(n−1)/n
        all_gather        S/n + S               S/n + S·(n−1)/n
        all_to_all        S + S                 2·S·(n−1)/n
        broadcast         S                     S

    Partial sums of more than two ranks add 2·S·(n−2)/n, in cache. One crossing a
    segment; all_reduce takes one more, and all_to_all one before, for the sizes.
    Through sockets the kernel copies each of the 2·S·(n−1)/n bytes that a rank sends
    in an all-reduce twice more, in and out of its own memory.

Memory:
    3·n·slot_bytes for the host, once, and some KB of flags and headers.

Where it loses: it serves one host. Each crossing waits for the slowest rank, so
ranks that share cores with other busy processes lose most on long vectors. Ranks on
several sockets pay for reading the slots of another socket, which one more level
of this scheme would save.

Papers:
    Graham & Shipman 2008, "MPI Support for Multi-core Architectures: Optimized Shared Memory Collectives" (segments
        in shared memory, small and large messages).
    Jain et al. 2018, "Framework for Scalable Intra-Node Collective Operations Using Shared Memory", SC18 (release and
        gather of flags as the frame of every collective).
    Mellor-Crummey & Scott 1991, "Algorithms for Scalable Synchronization on Shared-Memory Multiprocessors" (barriers,
        and why each processor must wait on its own cache line).

See also:
    `mlsys.parallel.collectives` (the same operations over a network), `mlsys.perf.collectives` (what those cost).
"""

import contextlib
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlsys.parallel._p2p import special
from mlsys.parallel._segment import OPS, Call, DifferentCallsError, Segment, patience

__all__ = ["DifferentCallsError", "SharedMemory"]

# The best of 256 KiB to 4 MiB, with 2 and 4 ranks on cores with 1 MiB of L2: up to there fewer crossings pay off.
SLOT_BYTES = 1 << 20
# An all-reduce of no more than this, over all ranks, takes one crossing: summing it n times is cheaper than a second.
SMALL_BYTES = 128 << 10
CACHE_LINE = 64  # bytes: parts start on one, so that no two ranks write the same

_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "sum": torch.add,
    "mean": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
    "product": torch.mul,
}
_HALVES = (torch.float16, torch.bfloat16)
_FLOATS = (*_HALVES, torch.float32, torch.float64)
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_COMPLEX = (torch.complex64, torch.complex128)

Step = Callable[[int, list[Tensor]], None]  # does its part of segment k, given the slots of the ranks


class SharedMemory:
    """The collectives of a group whose ranks are on one host. Making one is itself a collective call.

    Tensors are contiguous, on the CPU, and taken flat; sizes are in elements, and a rank's part may be empty.
    `slot_bytes`, the same on all ranks, is how much of a vector is in flight at a time. A call raises TimeoutError if a
    rank has not come within `timeout` seconds (None: as many as the group's own collectives wait), and before that if
    one has ended; the object is of no use after that. It raises ValueError on every rank if the ranks call different
    things, or if one refuses its arguments; then nothing is written and the object stays good. One thread may use it at
    a time.
    """

    def __init__(self, group: Any = None, *, slot_bytes: int = SLOT_BYTES, timeout: float | None = None) -> None:
        timeout = patience(group) if timeout is None else timeout
        if not timeout > 0:
            raise ValueError(f"timeout={timeout} must be more than 0 seconds")
        if isinstance(slot_bytes, bool) or not isinstance(slot_bytes, int) or slot_bytes < 4096 or slot_bytes % 4096:
            raise ValueError(f"slot_bytes={slot_bytes!r} must be a multiple of 4096: take {SLOT_BYTES}")
        self._segment = Segment(group, slot_bytes, timeout)
        if slot_bytes < CACHE_LINE * self._segment.size:
            self.close()
            raise ValueError(f"slot_bytes={slot_bytes} is less than a cache line for each rank: take {SLOT_BYTES}")
        self.group, self.rank, self.size = group, self._segment.rank, self._segment.size
        self.slot_bytes, self.timeout = slot_bytes, timeout
        self._turn = threading.Lock()
        self._scratch = torch.empty(0)

    def supports(self, dtype: torch.dtype, op: str = "sum") -> bool:
        """Whether tensors of `dtype` can be reduced by `op`. Moving them is possible for every dtype.

        Integers have no mean (sum them and divide), complex numbers no max and min. Booleans are added by "or".
        """
        return op in OPS and (
            dtype in _FLOATS
            or (dtype in _INTEGERS and op != "mean")
            or (dtype in _COMPLEX and op not in ("max", "min"))
        )

    def barrier(self) -> None:
        """Return when all ranks have called it."""
        self._run(Call("barrier"), 1)

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> None:
        """Replace `tensor` by its reduction over ranks: their sum, mean, max, min or product, the same on all."""
        with _Refusal(self, "all_reduce"):
            own = _flat("tensor", tensor)
            self._check_op(own.dtype, op)
        n, rank, total, itemsize = self.size, self.rank, own.numel(), own.element_size()
        call = Call("all_reduce", own.dtype, total, op)

        def copy_all(k: int, slots: list[Tensor]) -> None:
            slots[rank][:total].copy_(own)

        def reduce_all(k: int, slots: list[Tensor]) -> None:
            self._combine(op, [slot[:total] for slot in slots], own, own)

        if n * total * itemsize <= SMALL_BYTES and total * itemsize <= self.slot_bytes:
            self._run(call, 1, copy_all, reduce_all)
            return

        count, width = _segments(total, self.slot_bytes, itemsize)

        def parts(k: int) -> tuple[Tensor, list[slice]]:
            """Segment k of the tensor, and where in it the ranks' parts are."""
            segment = own[k * width : (k + 1) * width]
            size = _whole_lines(-(-segment.numel() // n), itemsize)
            ends = [min(i * size, segment.numel()) for i in range(n + 1)]
            return segment, [slice(*ends[i : i + 2]) for i in range(n)]

        def copy_in(k: int, slots: list[Tensor]) -> None:
            segment, part = parts(k)
            before, after = slice(0, part[rank].start), slice(part[rank].stop, segment.numel())
            slots[rank][before].copy_(segment[before])
            slots[rank][after].copy_(segment[after])

        def reduce(k: int, slots: list[Tensor]) -> None:
            segment, part = parts(k)
            mine = part[rank]
            result = slots[rank][mine]  # nobody reads our slot here: this part of our input is in our tensor only
            self._combine(op, [(segment if i == rank else slot)[mine] for i, slot in enumerate(slots)], result, result)
            segment[mine].copy_(result)

        def copy_out(k: int, slots: list[Tensor]) -> None:
            segment, part = parts(k)
            for i in range(n):
                if i != rank:
                    segment[part[i]].copy_(slots[i][part[i]])

        self._run(call, count, copy_in, reduce, copy_out)

    def reduce_scatter(
        self, output: Tensor, input: Tensor, op: str = "sum", sizes: Sequence[int] | None = None
    ) -> None:
        """Reduce `input` over ranks, and give rank r the r-th part of the result in `output`.

        Parts have `sizes` elements, one size a rank; without, all are equally long. `output` may be this rank's part of
        `input`.
        """
        with _Refusal(self, "reduce_scatter"):
            own, out = _flat("input", input), _flat("output", output)
            self._check_op(own.dtype, op)
            sizes = self._check_parts("input", own, "output", out, sizes)
        rank, itemsize = self.rank, own.element_size()
        starts = _starts(sizes)
        room = self._room(itemsize)  # in a slot, for each rank
        count, width = _segments(max(sizes), room * itemsize, itemsize)

        def piece(k: int, part: int) -> tuple[Tensor, slice]:
            """Segment k of a part of the input, and where it goes in a slot."""
            first, last = min(k * width, sizes[part]), min((k + 1) * width, sizes[part])
            return own[starts[part] + first : starts[part] + last], slice(part * room, part * room + last - first)

        def copy_in(k: int, slots: list[Tensor]) -> None:
            for part in range(self.size):
                if part != rank:
                    values, there = piece(k, part)
                    slots[rank][there].copy_(values)

        def reduce(k: int, slots: list[Tensor]) -> None:
            mine, there = piece(k, rank)
            result = out[k * width : (k + 1) * width]
            operands = [mine if i == rank else slot[there] for i, slot in enumerate(slots)]
            self._combine(op, operands, result, slots[rank][there])

        self._run(Call("reduce_scatter", own.dtype, own.numel(), op, _digest(sizes)), count, copy_in, reduce)

    def all_gather(self, output: Tensor, input: Tensor, sizes: Sequence[int] | None = None) -> None:
        """Put the `input` of all ranks one after the other in `output`, on every rank.

        Rank r's has `sizes[r]` elements; without `sizes`, all are equally long. `input` may be its part of `output`.
        """
        with _Refusal(self, "all_gather"):
            out, own = _flat("output", output), _flat("input", input)
            sizes = self._check_parts("output", out, "input", own, sizes)
            call = Call("all_gather", out.dtype, out.numel(), detail=_digest(sizes))
            own, out, sizes = _as_bytes(own), _as_bytes(out), [size * out.element_size() for size in sizes]
        rank, starts = self.rank, _starts(sizes)
        count, width = _segments(max(sizes), self.slot_bytes, 1)

        def copy_in(k: int, slots: list[Tensor]) -> None:
            values = own[k * width : (k + 1) * width]
            slots[rank][: values.numel()].copy_(values)

        def copy_out(k: int, slots: list[Tensor]) -> None:
            for i, slot in enumerate(slots):
                first, last = min(k * width, sizes[i]), min((k + 1) * width, sizes[i])
                target = out[starts[i] + first : starts[i] + last]
                target.copy_(slot[: last - first] if i != rank else own[first:last])

        self._run(call, count, copy_in, copy_out)

    def broadcast(self, tensor: Tensor, src: int = 0) -> None:
        """Replace `tensor` by that of rank `src` of the group."""
        with _Refusal(self, "broadcast"):
            if not 0 <= src < self.size:
                raise ValueError(f"src={src} is not a rank of this group: take 0 to {self.size - 1}")
            own = _flat("tensor", tensor)
            call = Call("broadcast", own.dtype, own.numel(), detail=src)
            own = _as_bytes(own)
        rank = self.rank
        count, width = _segments(own.numel(), self.slot_bytes, 1)

        def copy_in(k: int, slots: list[Tensor]) -> None:
            if rank == src:
                values = own[k * width : (k + 1) * width]
                slots[src][: values.numel()].copy_(values)

        def copy_out(k: int, slots: list[Tensor]) -> None:
            if rank != src:
                values = own[k * width : (k + 1) * width]
                values.copy_(slots[src][: values.numel()])

        self._run(call, count, copy_in, copy_out)

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        output_sizes: Sequence[int] | None = None,
        input_sizes: Sequence[int] | None = None,
    ) -> None:
        """Send the i-th part of `input` to rank i, and receive the i-th part of `output` from rank i.

        Parts have `input_sizes[i]` and `output_sizes[i]` elements; without, all are equally long. What one rank sends
        another must be what that one expects.
        """
        with _Refusal(self, "all_to_all"):
            own, out = _flat("input", input), _flat("output", output)
            if own.dtype != out.dtype:
                raise TypeError(f"input is {own.dtype} and output {out.dtype}: make them the same")
            if _overlap(own, out):
                raise ValueError("input and output share memory: give all_to_all an output of its own")
            sends = self._check_sizes("input", own, input_sizes)
            receives = self._check_sizes("output", out, output_sizes)
            call = Call("all_to_all", own.dtype)
            itemsize = own.element_size()
            own, out = _as_bytes(own), _as_bytes(out)
        n, rank = self.size, self.rank
        # How many segments there are depends on all ranks' sizes: these go ahead.
        sizes = self._run(call, 1, sizes=np.array([sends, receives], np.int64).ravel())
        sent, received = sizes[:, :n], sizes[:, n : 2 * n]
        if (sent != received.T).any():
            i, j = (int(index) for index in np.argwhere(sent != received.T)[0])
            raise DifferentCallsError(
                f"rank {i} sends {sent[i, j]} elements to rank {j}, which expects {received[j, i]}: output_sizes[i] of "
                "rank j must be input_sizes[j] of rank i. Nothing was written"
            )
        sends, receives = [size * itemsize for size in sends], [size * itemsize for size in receives]
        sends_at, receives_at = _starts(sends), _starts(receives)
        room = self._room(1)
        count, width = _segments(int(sent.max()) * itemsize, room, 1)

        def piece(flat: Tensor, starts: list[int], sizes: Sequence[int], part: int, k: int) -> Tensor:
            first, last = min(k * width, sizes[part]), min((k + 1) * width, sizes[part])
            return flat[starts[part] + first : starts[part] + last]

        def copy_in(k: int, slots: list[Tensor]) -> None:
            for part in range(n):
                if part != rank:
                    values = piece(own, sends_at, sends, part, k)
                    slots[rank][part * room : part * room + values.numel()].copy_(values)

        def copy_out(k: int, slots: list[Tensor]) -> None:
            for part in range(n):
                values = piece(out, receives_at, receives, part, k)
                if part == rank:
                    values.copy_(piece(own, sends_at, sends, part, k))
                else:
                    values.copy_(slots[part][rank * room : rank * room + values.numel()])

        self._run(call, count, copy_in, copy_out)

    def exchange(self, row: Tensor, plan: Call) -> Tensor:
        """The `row` of every rank, int64, one after the other: what they compare before `plan`, a call by messages.

        A row has at most as many elements as there are ranks, or `_segment.ROW`.
        """
        everyone = self._run(plan._replace(planned=True), 1, sizes=row.numpy())
        return torch.from_numpy(everyone[:, : row.numel()].copy())

    def refuse(self, operation: str) -> None:
        """Take part in what the others call, to tell them that the arguments of this rank's `operation` were refused.

        Raises nothing: this rank has an error of its own.
        """
        with contextlib.suppress(ValueError, RuntimeError, OSError):
            self._run(Call(operation, refused=True), 1)

    def close(self) -> None:
        """Let go of the memory: of this rank's mapping only, so that others may still be at their last call."""
        self._segment.close()

    def __enter__(self) -> "SharedMemory":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- how a call runs ----------------------------------------------------------------------------------------------

    def _run(self, call: Call, count: int, *steps: Step, sizes: np.ndarray | None = None) -> Any:
        """Take `count` segments through `steps`, one step an epoch: step i of segment k in epoch k + i of the call.

        Segment k uses buffer k mod 3, counted from that of the first epoch. After the last epoch nobody needs to wait:
        the next call starts with a buffer that nobody reads any more. Returns the `sizes` of all ranks.
        """
        segment = self._segment
        if segment.broken:
            raise RuntimeError(f"{call.operation}: this SharedMemory is of no use, {segment.broken}: make a new one")
        if not self._turn.acquire(blocking=False):
            raise RuntimeError(
                f"{call.operation}: another thread is in a call of this SharedMemory; wait for it, or make one for each"
            )
        try:
            buffers, first = segment.slots(call.dtype if call.operation in _REDUCTIONS else torch.uint8), segment.epoch
            crossings = max(1, count + len(steps) - 2)
            everyones = None
            for epoch in range(crossings + 1):
                for age, step in enumerate(steps):
                    k = epoch - age
                    if 0 <= k < count:
                        step(k, buffers[(first + k) % len(buffers)])
                if epoch == 0:
                    everyones = segment.meet(call, sizes)
                elif epoch < crossings:
                    segment.cross(call)
        except DifferentCallsError:
            raise  # all ranks are at the same crossing, and only slots have been written
        except BaseException as error:  # KeyboardInterrupt too: this rank stopped where the others do not expect it
            segment.give_up(f"{type(error).__name__} ended it")
            raise
        finally:
            self._turn.release()
        return everyones

    def _combine(self, op: str, operands: list[Tensor], result: Tensor, partial: Tensor) -> None:
        """`result` = the reduction of `operands`, from the first to the last.

        `partial` may be written on the way, and is no operand; `result` may be one.
        """
        function = _FUNCTIONS[op]
        if result.dtype in _HALVES and (op == "mean" or (op in ("sum", "product") and len(operands) > 2)):
            if self._scratch.numel() < result.numel():
                with torch.inference_mode(False):  # or a later call outside of that mode could not write to it
                    self._scratch = torch.empty(result.numel())
            total = self._scratch[: result.numel()]
            total.copy_(operands[0])
            for operand in operands[1:]:
                function(total, operand, out=total)
            result.copy_(total.div_(len(operands)) if op == "mean" else total)
            return
        if len(operands) == 1:
            result.copy_(operands[0])
            return
        total = operands[0]
        for operand in operands[1:-1]:
            total = function(total, operand, out=partial)
        function(total, operands[-1], out=result)
        if op == "mean":
            result.div_(len(operands))

    def _room(self, itemsize: int) -> int:
        """Elements of a slot that each of the n ranks has, in whole cache lines."""
        return self.slot_bytes // self.size // CACHE_LINE * CACHE_LINE // itemsize

    # --- what is refused ----------------------------------------------------------------------------------------------

    def _check_op(self, dtype: torch.dtype, op: str) -> None:
        if op not in OPS:
            raise ValueError(f"op={op!r} is unknown: take one of {', '.join(OPS)}")
        if not self.supports(dtype, op):
            raise TypeError(f"there is no {op} of {dtype}: convert the tensor, or take another of {', '.join(OPS)}")

    def _check_parts(
        self, name: str, whole: Tensor, part_name: str, part: Tensor, sizes: Sequence[int] | None
    ) -> list[int]:
        """The sizes of the parts of `whole`, of which this rank's is `part`."""
        if whole.dtype != part.dtype:
            raise TypeError(f"{name} is {whole.dtype} and {part_name} {part.dtype}: make them the same")
        checked = self._check_sizes(name, whole, sizes)
        if part.numel() != checked[self.rank]:
            raise ValueError(
                f"{part_name} has {part.numel()} elements, and the part of rank {self.rank} is {checked[self.rank]} of "
                f"the {whole.numel()} of {name}: make it as long, or give the sizes of all parts"
            )
        start = whole.data_ptr() + sum(checked[: self.rank]) * whole.element_size()
        if part.data_ptr() != start and _overlap(whole, part):
            raise ValueError(
                f"{part_name} lies in {name}, but not where part {self.rank} is: put it there, or elsewhere"
            )
        return checked

    def _check_sizes(self, name: str, whole: Tensor, sizes: Sequence[int] | None) -> list[int]:
        n, total = self.size, whole.numel()
        if sizes is None:
            if total % n:
                raise ValueError(f"{name} has {total} elements, which {n} ranks cannot share evenly: give the sizes")
            return [total // n] * n
        checked = [int(size) for size in sizes]
        if len(checked) != n or min(checked) < 0 or sum(checked) != total:
            raise ValueError(
                f"sizes of {name} {checked} must be {n}, one a rank, none negative, and add up to its {total} elements"
            )
        return checked


_REDUCTIONS = ("all_reduce", "reduce_scatter")


class _Refusal:
    """While a rank checks its arguments: if they are refused, the others, who may wait for them, are told."""

    def __init__(self, memory: SharedMemory, operation: str) -> None:
        self._memory, self._operation = memory, operation

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            self._memory.refuse(self._operation)


def _flat(name: str, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if not tensor.is_cpu:
        raise ValueError(f"{name} is on {tensor.device}: shared memory serves tensors on the CPU; copy it there")
    reason = special(name, tensor)
    if reason:
        raise ValueError(reason)
    if tensor.layout != torch.strided or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} is not contiguous memory: pass {name}.contiguous(), and copy the "
            "result back (.resolve_conj() and .resolve_neg() first for a lazy conjugate)"
        )
    return tensor.detach().view(-1)


def _as_bytes(flat: Tensor) -> Tensor:
    return flat.view(torch.uint8)


def _overlap(a: Tensor, b: Tensor) -> bool:
    a_end, b_end = a.data_ptr() + a.numel() * a.element_size(), b.data_ptr() + b.numel() * b.element_size()
    return a.numel() > 0 and b.numel() > 0 and a.data_ptr() < b_end and b.data_ptr() < a_end


def _whole_lines(count: int, itemsize: int) -> int:
    """`count` elements, rounded up to whole cache lines."""
    return -(-count * itemsize // CACHE_LINE) * CACHE_LINE // itemsize


def _segments(total: int, room: int, itemsize: int) -> tuple[int, int]:
    """How many segments `total` elements take if each may have `room` bytes, and how many elements each has.

    Equally long, so that the last is no straggler; and at least one, since the ranks must meet.
    """
    count = max(1, -(-total * itemsize // room))
    return count, min(_whole_lines(-(-total // count), itemsize), room // itemsize)


def _starts(sizes: Sequence[int]) -> list[int]:
    starts = [0]
    for size in sizes[:-1]:
        starts.append(starts[-1] + size)
    return starts


def _digest(sizes: Sequence[int]) -> int:
    """A number that differs if sizes differ, the same in every process."""
    return hash(tuple(sizes))
