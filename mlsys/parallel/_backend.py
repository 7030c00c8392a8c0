"""torch's own collectives under our names: the algorithm "backend". What they cannot do is said, not tried.

What goes wrong on the way is a TimeoutError or a ConnectionError, as it is for our own messages.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from mlsys.parallel._call import Call
from mlsys.parallel._p2p import timed_out
from mlsys.parallel._reduce import Reduction

_OPS = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "product": dist.ReduceOp.PRODUCT,
}
_REDUCED = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int8, torch.uint8,
)  # fmt: skip
# torch 2.13 renames them and deprecates the old names; torch 2.11 has only those.
_all_gather: Callable[..., dist.Work] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter: Callable[..., dist.Work] = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def refusal(call: Call) -> str | None:
    """Why torch's backends cannot serve the call; None if they can."""
    if call.operation in ("all_gather", "reduce_scatter") and not call.even:
        return f"the backend's {call.operation} needs equal parts: take algorithm='ring'"
    if call.op and call.dtype not in _REDUCED:
        return f"the backend cannot reduce {call.dtype}: take algorithm='ring'"
    return None


def loses_nan(call: Call) -> bool:
    """Whether the result may lack a NaN that a rank has: gloo and NCCL compare, and no comparison with NaN holds."""
    return call.op in ("max", "min") and call.dtype.is_floating_point


def start(group: dist.ProcessGroup, call: Call) -> Callable[[], None]:
    """Begin the call; the function that is returned waits for it and finishes it, and may be called once."""
    try:
        work = _begun(group, call)
    except RuntimeError as error:
        raise _explained(error, group, call) from error

    def finish() -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise _explained(error, group, call) from error
        if call.op:
            assert call.output is not None
            Reduction(call.op, group.size()).finish(call.output)

    return finish


def run(group: dist.ProcessGroup, call: Call) -> None:
    """The call, from beginning to end."""
    start(group, call)()


def _begun(group: dist.ProcessGroup, call: Call) -> dist.Work:
    output, given = call.output, call.input
    if call.operation == "all_reduce":
        assert output is not None
        return dist.all_reduce(output, _OPS[call.op], group=group, async_op=True)
    if call.operation == "reduce_scatter":
        return _reduce_scatter(output, given, op=_OPS[call.op], group=group, async_op=True)
    if call.operation == "broadcast":
        return dist.broadcast(_bytes(output), group_src=call.root, group=group, async_op=True)
    if call.operation == "all_gather":
        return _all_gather(_bytes(output), _bytes(given), group=group, async_op=True)
    size = call.dtype.itemsize
    received, sent = ([part * size for part in parts] for parts in (call.sizes, call.sent_sizes))
    return dist.all_to_all_single(_bytes(output), _bytes(given), received, sent, group=group, async_op=True)


def _explained(error: RuntimeError, group: dist.ProcessGroup, call: Call) -> OSError:
    here = group.rank()
    if timed_out(error):
        return TimeoutError(
            f"rank {here} waited in vain in {call}, backend: some rank has not made this call; look for the rank that "
            f"is elsewhere ({error})"
        )
    return ConnectionError(f"rank {here} could not finish {call}, backend: has a rank ended? ({error})")


def _bytes(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.view(torch.uint8)
