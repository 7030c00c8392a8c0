"""From a checked call to the function that runs it, by operation and algorithm."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from mlsys.parallel import _bruck, _chain, _direct, _hierarchical, _recursive, _ring, _tree
from mlsys.parallel._call import Call
from mlsys.parallel._choose import Links
from mlsys.parallel._p2p import Wire, copy
from mlsys.parallel._reduce import Reduction
from mlsys.parallel.shared_memory import SharedMemory
from mlsys.perf.collectives import chain_segments

ALL_REDUCE: Mapping[str, Callable[[Wire, Tensor, Reduction], None]] = {
    "ring": _ring.all_reduce,
    "recursive_doubling": _recursive.doubling_all_reduce,
    "halving_doubling": _recursive.halving_doubling_all_reduce,
    "tree": _tree.all_reduce,
}


def run(wire: Wire, call: Call, algorithm: str, links: Links) -> None:
    """The call over point-to-point messages."""
    _OPERATIONS[call.operation](wire, call, algorithm, links)


def _all_reduce(wire: Wire, call: Call, algorithm: str, links: Links) -> None:
    flat, reduction = _there(call.output), Reduction(call.op, wire.size)
    if algorithm == "hierarchical":
        _hierarchical.all_reduce(wire, flat, reduction, links.local or 1)
    else:
        ALL_REDUCE[algorithm](wire, flat, reduction)


def _reduce_scatter(wire: Wire, call: Call, algorithm: str, links: Links) -> None:
    flat, reduction = _there(call.input), Reduction(call.op, wire.size)
    if algorithm == "halving":
        _recursive.halving_reduce_scatter(wire, _there(call.output), flat, call.sizes, reduction)
    else:
        _ring.reduce_scatter(wire, _there(call.output), flat.split(call.sizes), reduction)


def _all_gather(wire: Wire, call: Call, algorithm: str, links: Links) -> None:
    flat = _there(call.output)
    parts = flat.split(call.sizes)
    copy(parts[wire.rank], _there(call.input))
    if algorithm == "doubling":
        _recursive.doubling_all_gather(wire, flat, call.sizes)
    elif algorithm == "bruck":
        _bruck.all_gather(wire, flat, call.sizes)
    else:
        _ring.all_gather(wire, parts)


def _all_to_all(wire: Wire, call: Call, algorithm: str, links: Links) -> None:
    output, flat = _there(call.output), _there(call.input)
    if algorithm == "bruck":
        _bruck.all_to_all(wire, output, flat)
    else:
        _direct.all_to_all(wire, output.split(call.sizes), flat.split(call.sent_sizes))


def _broadcast(wire: Wire, call: Call, algorithm: str, links: Links) -> None:
    flat = _there(call.output)
    if algorithm == "chain":
        segments = chain_segments(wire.size, call.nbytes, links.alpha, links.beta)
        _chain.broadcast(wire, flat, call.root, segments)
    elif algorithm == "scatter_all_gather":
        _tree.scatter_all_gather(wire, flat, call.root)
    else:
        _tree.broadcast(wire, flat, call.root)


def _gather(wire: Wire, call: Call, algorithm: str, links: Links) -> None:
    parts = call.output.split(call.sizes) if call.output is not None else ()
    _direct.gather(wire, parts, _there(call.input), call.root)


def _scatter(wire: Wire, call: Call, algorithm: str, links: Links) -> None:
    parts = call.input.split(call.sizes) if call.input is not None else ()
    _direct.scatter(wire, _there(call.output), parts, call.root)


_OPERATIONS: Mapping[str, Callable[[Wire, Call, str, Links], None]] = {
    "all_reduce": _all_reduce,
    "reduce_scatter": _reduce_scatter,
    "all_gather": _all_gather,
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
    "gather": _gather,
    "scatter": _scatter,
    "barrier": lambda wire, call, algorithm, links: None,  # to have exchanged headers is to have met
}


def through(shared: SharedMemory, call: Call) -> None:
    """The call through the memory of one host."""
    sizes = None if call.even else list(call.sizes)
    if call.operation == "all_reduce":
        shared.all_reduce(_there(call.output), call.op)
    elif call.operation == "reduce_scatter":
        shared.reduce_scatter(_there(call.output), _there(call.input), call.op, sizes)
    elif call.operation == "all_gather":
        shared.all_gather(_there(call.output), _there(call.input), sizes)
    elif call.operation == "broadcast":
        shared.broadcast(_there(call.output), call.root)
    elif call.operation == "all_to_all":
        sent = None if call.even else list(call.sent_sizes)
        shared.all_to_all(_there(call.output), _there(call.input), sizes, sent)
    else:
        shared.barrier()


def alone(call: Call) -> None:
    """The call of a group of one rank: nothing to combine, at most something to copy."""
    if call.output is not None and call.input is not None:
        copy(call.output, call.input)


def _there(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
