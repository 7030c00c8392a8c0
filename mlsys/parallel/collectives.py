"""Collectives: what ranks do together on vectors that each of them has a part or a copy of.

With n ranks, every one of which calls the same function:

    all_reduce      everyone has a vector; everyone gets their sum
    reduce_scatter  everyone has a vector; rank r gets part r of the sum
    all_gather      everyone has a part;   everyone gets all parts, one after the other
    all_to_all      everyone has n parts;  rank r gets the r-th part of everyone
    broadcast       one has a vector;      everyone gets it
    gather          everyone has a part;   one gets all
    scatter         one has n parts;       rank r gets the r-th
    barrier         nobody goes on before everyone is there

An all-reduce is a reduce-scatter and an all-gather, and that is how most algorithms do it.

`algorithm` is one of `mlsys.perf.collectives.ALGORITHMS`, each written out here over point-to-point messages; or
"shared_memory", through the memory of one host; or "backend", torch's own. "auto" takes what should be fastest:

    group is                   "auto" is
    a `Communicator`           the fastest by what it measured: `choose` tells
    None or a process group    the backend's own; where it has none (uneven parts, more dtypes), or on gloo a slow one
                               (reduce_scatter), ours, by typical figures

Tensors are contiguous and taken flat: sizes are in elements, and a rank's part may be empty. They are changed in place,
or written to `output`, which in reduce_scatter and all_gather may be this rank's part of the longer vector; other
overlaps are not for use. `op` is "sum", "mean", "max", "min" or "product"; "max" of bool is or, "min" is and.

All dtypes can be moved. Integers, float16, bfloat16, float32, float64 and complex can be reduced, in their own
precision: n roundings, not one. Shared memory rounds once. The "max" and "min" of a NaN and anything is NaN,
except by "backend": gloo and NCCL may lose it, so for these two of floating-point numbers "auto" passes over them.

Every rank gets the same bits, whatever the algorithm ("backend": what torch promises). Two algorithms differ in the
last bits of a floating-point sum, since they add in another order.

`check=True` compares the calls of all ranks before any data moves: another operation, dtype, size, op, root or
algorithm on one rank is the same ValueError on all. With `check=False`, for calls that were checked once and repeat,
that is up to you, and what gloo does to ranks that disagree is to corrupt memory or to wait for ever. What is wrong
with the arguments of one rank alone, such as a tensor that is not contiguous, is always found.

`async_op=True` returns at once, with something to `wait()` for; until then the tensors belong to the collective. With a
`Communicator` its thread does the work, in the order of the calls. A plain group has no thread: there the backend's own
collectives run on, and all others are finished when the call returns.

Cost:
    See the table in `mlsys.perf.collectives`; `Communicator.choose` says the seconds. check=True costs one exchange of
    72 bytes in ⌈log₂ n⌉ steps, and nothing in shared memory.

Communication:
    Exactly the messages and bytes of `mlsys.perf.collectives.cost`, where the ranks divide the vector. Vectors longer
    than a MiB are sent in segments, more messages of as many bytes.

Papers:
    Thakur, Rabenseifner & Gropp 2005, "Optimization of Collective Communication Operations in MPICH", IJHPCA 19(1).
    Rabenseifner 2004, "Optimization of Collective Reduction Operations", ICCS (halving-doubling).
    Patarasuk & Yuan 2009, "Bandwidth Optimal All-reduce Algorithms for Clusters of Workstations", JPDC 69(2) (ring).
    Bruck et al. 1997, "Efficient Algorithms for All-to-All Communications in Multiport Message-Passing Systems", IEEE
    TPDS 8(11).
    Hensgen, Finkel & Manber 1988, "Two algorithms for barrier synchronization", IJPP 17(1) (dissemination).

See also:
    `mlsys.perf.collectives` (what they cost), `mlsys.parallel.shared_memory`, `mlsys.parallel.traffic` (what was sent).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mlsys.parallel import _algorithms, _reduce
from mlsys.parallel._call import Call
from mlsys.parallel._choose import Choice, Links
from mlsys.parallel._communicator import Channel, Communicator, Finished, Work, channel
from mlsys.parallel._p2p import special
from mlsys.perf import _checks

__all__ = [
    "Choice", "Communicator", "Links", "Work",
    "all_gather", "all_reduce", "all_to_all", "barrier", "broadcast", "gather", "reduce_scatter", "scatter",
]  # fmt: skip

_OPS = tuple(_reduce.COMBINE)
Group = dist.ProcessGroup | Communicator | None


def all_reduce(
    tensor: Tensor,
    group: Group = None,
    *,
    op: str = "sum",
    algorithm: str = "auto",
    async_op: bool = False,
    check: bool = True,
) -> Work | None:
    """Replace `tensor` on every rank by the sum (or other `op`) of all ranks' tensors."""
    there = channel(group)

    def call() -> Call:
        flat = _flat("tensor", tensor, there)
        _reducible(op, tensor)
        return Call("all_reduce", flat.dtype, flat.numel(), flat, None, op)

    return _run(there, "all_reduce", call, algorithm, async_op, check)


def reduce_scatter(
    output: Tensor,
    input: Tensor,
    group: Group = None,
    *,
    op: str = "sum",
    algorithm: str = "auto",
    sizes: Sequence[int] | None = None,
    async_op: bool = False,
    check: bool = True,
) -> Work | None:
    """This rank's part of the sum (or other `op`) of all ranks' `input`, into `output`; `input` stays as it is.

    Parts are equal, or as long as `sizes` says: elements for each rank.
    """
    there = channel(group)

    def call() -> Call:
        part, whole = _flat("output", output, there), _flat("input", input, there)
        _same_dtype(output, input)
        _reducible(op, input)
        parts = _sizes("sizes", sizes, there.size, "input", whole.numel())
        _length("output", part, parts[there.rank], "this rank's part")
        return Call("reduce_scatter", whole.dtype, whole.numel(), part, whole, op, sizes=parts, even=_equal(parts))

    return _run(there, "reduce_scatter", call, algorithm, async_op, check)


def all_gather(
    output: Tensor,
    input: Tensor,
    group: Group = None,
    *,
    algorithm: str = "auto",
    sizes: Sequence[int] | None = None,
    async_op: bool = False,
    check: bool = True,
) -> Work | None:
    """All ranks' `input`, one after the other, into `output`.

    Parts are equal, or as long as `sizes` says: elements for each rank.
    """
    there = channel(group)

    def call() -> Call:
        whole, part = _flat("output", output, there), _flat("input", input, there)
        _same_dtype(output, input)
        parts = _sizes("sizes", sizes, there.size, "output", whole.numel())
        _length("input", part, parts[there.rank], "this rank's part")
        return Call("all_gather", whole.dtype, whole.numel(), whole, part, sizes=parts, even=_equal(parts))

    return _run(there, "all_gather", call, algorithm, async_op, check)


def all_to_all(
    output: Tensor,
    input: Tensor,
    group: Group = None,
    *,
    output_sizes: Sequence[int] | None = None,
    input_sizes: Sequence[int] | None = None,
    algorithm: str = "auto",
    async_op: bool = False,
    check: bool = True,
) -> Work | None:
    """Part r of `input` to rank r; part r of `output` from rank r.

    Parts are equal, or as long as the sizes say: `input_sizes[r]` elements go to rank r, and `output_sizes[r]` come
    from it. Give both or neither, and on all ranks or on none.
    """
    there = channel(group)

    def call() -> Call:
        into, given = _flat("output", output, there), _flat("input", input, there)
        _same_dtype(output, input)
        if (output_sizes is None) != (input_sizes is None):
            raise ValueError("output_sizes and input_sizes belong together: give both, or neither for equal parts")
        if output_sizes is None:
            _length("output", into, given.numel(), "input")
        if into.numel() and into.untyped_storage().data_ptr() == given.untyped_storage().data_ptr():
            low, high = sorted((into, given), key=lambda tensor: tensor.data_ptr())
            if low.data_ptr() + low.numel() * low.element_size() > high.data_ptr():
                raise ValueError("output and input overlap: all_to_all needs another tensor to write to")
        received = _sizes("output_sizes", output_sizes, there.size, "output", into.numel())
        sent = _sizes("input_sizes", input_sizes, there.size, "input", given.numel())
        even = input_sizes is None
        return Call("all_to_all", given.dtype, given.numel(), into, given, sizes=received, sent_sizes=sent, even=even)

    return _run(there, "all_to_all", call, algorithm, async_op, check)


def broadcast(
    tensor: Tensor,
    group: Group = None,
    *,
    src: int = 0,
    algorithm: str = "auto",
    async_op: bool = False,
    check: bool = True,
) -> Work | None:
    """Replace `tensor` on every rank by that of rank `src` of the group."""
    there = channel(group)

    def call() -> Call:
        flat = _flat("tensor", tensor, there)
        return Call("broadcast", flat.dtype, flat.numel(), flat, None, root=_root("src", src, there))

    return _run(there, "broadcast", call, algorithm, async_op, check)


def gather(
    output: Tensor | None,
    input: Tensor,
    group: Group = None,
    *,
    dst: int = 0,
    sizes: Sequence[int] | None = None,
    check: bool = True,
) -> None:
    """All ranks' `input`, one after the other, into the `output` of rank `dst`; the others pass None.

    Parts are equal, or as long as `sizes` says.
    """
    there = channel(group)

    def call() -> Call:
        root = _root("dst", dst, there)
        part = _flat("input", input, there)
        whole = _only_at_root("output", output, "dst", root, there)
        _same_dtype(whole, part)
        parts = _divided("output", whole, "input", part, sizes, there)
        return Call("gather", part.dtype, sum(parts), whole, part, root=root, sizes=parts, even=_equal(parts))

    _run(there, "gather", call, "direct", False, check)


def scatter(
    output: Tensor,
    input: Tensor | None,
    group: Group = None,
    *,
    src: int = 0,
    sizes: Sequence[int] | None = None,
    check: bool = True,
) -> None:
    """Part r of the `input` of rank `src` into the `output` of rank r; the others pass None as input.

    Parts are equal, or as long as `sizes` says.
    """
    there = channel(group)

    def call() -> Call:
        root = _root("src", src, there)
        part = _flat("output", output, there)
        whole = _only_at_root("input", input, "src", root, there)
        _same_dtype(part, whole)
        parts = _divided("input", whole, "output", part, sizes, there)
        return Call("scatter", part.dtype, sum(parts), part, whole, root=root, sizes=parts, even=_equal(parts))

    _run(there, "scatter", call, "direct", False, check)


def barrier(group: Group = None) -> None:
    """Wait until every rank is here."""
    there = channel(group)
    if there.size > 1:
        there.barrier()


def _run(
    there: Channel, operation: str, build: Callable[[], Call], algorithm: str, async_op: bool, check: bool
) -> Work | None:
    """Check the arguments, then run; if they are refused, the ranks that wait for this one get to know."""
    try:
        call = build()
        chosen = algorithm if algorithm == "direct" else there.pick(call, algorithm)
    except Exception:  # whatever it is, the others must not wait for this rank
        if check and there.size > 1:
            there.refuse(operation)
        raise
    if there.size > 1:
        return there.run(call, chosen, check, async_op)
    _algorithms.alone(call)
    return Finished() if async_op else None


# --- checks of the arguments ------------------------------------------------------------------------------------------


def _flat(name: str, tensor: Tensor, there: Channel) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    reason = special(name, tensor)
    if reason:
        raise ValueError(reason)
    if tensor.layout != torch.strided or not tensor.is_contiguous():
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} is not contiguous, and its memory would be taken for another "
            f"tensor's: pass {name}.contiguous(), and copy the result back"
        )
    if tensor.device.type not in there.devices:
        raise ValueError(
            f"{name} is on {tensor.device}, but this group ({there.config}) serves {' and '.join(there.devices)}: move "
            "it, or make a group with another backend"
        )
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError(f"{name} is a lazy conjugate or negative: pass {name}.resolve_conj().resolve_neg()")
    return tensor.detach().view(-1)


def _same_dtype(output: Tensor | None, input: Tensor | None) -> None:
    if output is not None and input is not None and output.dtype != input.dtype:
        raise ValueError(f"output is {output.dtype} and input {input.dtype}: convert one of them")


def _reducible(op: str, tensor: Tensor) -> None:
    if op not in _OPS:
        _checks.known("op", op, _OPS)
    reason = _reduce.refusal(op, tensor.dtype)
    if reason:
        raise ValueError(reason)


def _length(name: str, tensor: Tensor, expected: int, what: str) -> None:
    if tensor.numel() != expected:
        raise ValueError(f"{name} has {tensor.numel()} elements, but {what} has {expected}")


def _equal(parts: Sequence[int]) -> bool:
    return min(parts) == max(parts)


def _sizes(name: str, sizes: Sequence[int] | None, n: int, of: str, elements: int) -> tuple[int, ...]:
    """Elements of each rank's part of a vector; equal ones by default."""
    if sizes is None:
        if elements % n:
            raise ValueError(f"{of} has {elements} elements, which {n} ranks do not divide: pass {name}=[…]")
        return (elements // n,) * n
    parts = _given(name, sizes, n)
    if sum(parts) != elements:
        raise ValueError(f"{name}={list(parts)} add up to {sum(parts)}, but {of} has {elements} elements")
    return parts


def _divided(
    whole_name: str, whole: Tensor | None, part_name: str, part: Tensor, sizes: Sequence[int] | None, there: Channel
) -> tuple[int, ...]:
    """Elements of each rank's part of a vector that only one rank has; as many as of this one's by default."""
    parts = (part.numel(),) * there.size if sizes is None else _given("sizes", sizes, there.size)
    _length(part_name, part, parts[there.rank], "this rank's part")
    if whole is not None:
        _length(whole_name, whole, sum(parts), "all parts together")
    return parts


def _given(name: str, sizes: Sequence[int], n: int) -> tuple[int, ...]:
    parts = tuple(_checks.whole(f"{name}[{rank}]", size, at_least=0) for rank, size in enumerate(sizes))
    if len(parts) != n:
        raise ValueError(f"{name} has {len(parts)} entries for {n} ranks: give each rank one, 0 for an empty part")
    return parts


def _root(name: str, rank: int, there: Channel) -> int:
    if _checks.whole(name, rank, at_least=0) >= there.size:
        raise ValueError(f"{name}={rank}, but the group has the ranks 0 to {there.size - 1}; count within the group")
    return int(rank)


def _only_at_root(name: str, tensor: Tensor | None, role: str, root: int, there: Channel) -> Tensor | None:
    if there.rank != root:
        if tensor is not None:
            raise ValueError(f"{name} is for rank {root} ({role}) only: pass None on rank {there.rank}")
        return None
    if tensor is None:
        raise ValueError(f"{name} is None on rank {root}, which is {role}: pass a tensor there")
    return _flat(name, tensor, there)
