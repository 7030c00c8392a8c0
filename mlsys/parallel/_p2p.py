"""Messages between the ranks of a group, and the one loop that keeps several of them under way.

Every algorithm of this package is written over `Wire`: send these tensors, receive those, from whom. A message is
bytes, so every dtype travels, also those that gloo's own collectives refuse. Empty messages are not sent at all: both
sides know the sizes.

On gloo a send ends when its receive has been posted and the bytes have left. On NCCL messages are ordered like
kernels; those of one `post` go in one group call, and that is what keeps a ring, where everyone sends first, from
standing still.

A large message is cut into segments: while segment k is added, segment k+1 is on the way. `pipeline` is that loop.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mlsys.parallel._reduce import Reduction

# Bytes of a segment, and how many are under way at once. The best of a grid on loopback: smaller ones cost more latency
# than the overlap saves, larger ones fall out of the second-level cache before they are added.
SEGMENT = 2 * 2**20
AHEAD = 2
# Scratch that a wire keeps for its next call: enough for a ring's segments. Fresh memory costs a page fault every 4 KB,
# which on this path is a third of the copy.
KEEP = 16 * 2**20

Message = tuple[Tensor, int]  # what, and the rank it goes to or comes from
Pending = list[tuple[dist.Work, str, int]]


class Wire:
    """Point-to-point messages among `ranks` of a group (all of them by default), numbered from 0.

    Messages of one `tag` arrive in the order in which they were sent. Two wires of one group need two tags if they are
    used at the same time. `segment` is the bytes after which a message is cut.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        tag: int = 0x6D6C,
        segment: int = SEGMENT,
        ranks: Sequence[int] | None = None,
    ) -> None:
        self.group, self.tag, self.segment = group, tag, segment
        self.ranks = range(group.size()) if ranks is None else ranks
        self.rank, self.size = self.ranks.index(group.rank()), len(self.ranks)
        self._kept: dict[torch.device, Tensor] = {}

    def among(self, ranks: Sequence[int]) -> "Wire":
        """The wire of some of the ranks, this one among them, numbered anew; this wire rests while that one works."""
        if list(ranks) == list(range(self.size)):
            return self
        wire = Wire(self.group, tag=self.tag, segment=self.segment, ranks=[self.ranks[rank] for rank in ranks])
        wire._kept = self._kept
        return wire

    def scratch(self, like: Tensor, elements: int) -> Tensor:
        """A flat tensor of `like`'s dtype and device, valid until the next call."""
        nbytes = elements * like.element_size()
        kept = self._kept.get(like.device)
        if kept is None or kept.numel() < nbytes:
            with torch.inference_mode(False):  # or a later call outside of that mode could not write to it
                kept = torch.empty(nbytes, dtype=torch.uint8, device=like.device)
            if nbytes <= KEEP:
                self._kept[like.device] = kept
        return kept[:nbytes].view(like.dtype)

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Start these messages; `wait` for what is returned before their tensors are touched."""
        if any(tensor.is_cuda for tensor, _ in (*sends, *receives)):
            return self._post_batch(sends, receives)
        pending: Pending = []
        for message in receives:
            pending += self.receive(*message)
        for message in sends:
            pending += self.send(*message)
        return pending

    def send(self, tensor: Tensor, peer: int) -> Pending:
        """Start one message from the CPU, to `peer`."""
        return self._start(self.group.send, "send to", tensor, self.ranks[peer])

    def receive(self, tensor: Tensor, peer: int) -> Pending:
        """Expect one message on the CPU, from `peer`."""
        return self._start(self.group.recv, "receive from", tensor, self.ranks[peer])

    def _start(self, function: Callable[..., dist.Work], verb: str, tensor: Tensor, peer: int) -> Pending:
        if not tensor.numel():
            return []
        try:
            return [(function([tensor.view(torch.uint8)], peer, self.tag), verb, peer)]
        except RuntimeError as error:  # the connection was already gone
            raise self._explained(error, "reach", peer) from error

    def _post_batch(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        operations = [
            dist.P2POp(function, tensor.view(torch.uint8), group=self.group, group_peer=self.ranks[peer])
            for function, messages in ((dist.irecv, receives), (dist.isend, sends))
            for tensor, peer in messages
            if tensor.numel()
        ]
        works = dist.batch_isend_irecv(operations) if operations else []
        return [(work, "finish a batch with", self.group.rank()) for work in works]

    def wait(self, pending: Pending) -> None:
        """Until all of them have happened. Raises TimeoutError or ConnectionError naming the rank that did not."""
        for work, verb, peer in pending:
            try:
                work.wait()
            except RuntimeError as error:
                raise self._explained(error, verb, peer) from error

    def _explained(self, error: RuntimeError, verb: str, peer: int) -> OSError:
        here = self.group.rank()
        if timed_out(error):
            return TimeoutError(
                f"rank {here} waited in vain to {verb} rank {peer}, which has not made this call or waits for another "
                f"rank itself; look for the rank that is elsewhere ({error})"
            )
        return ConnectionError(f"rank {here} could not {verb} rank {peer}: has that rank ended? ({error})")

    def expect(self, receives: Iterable[Message]) -> "Exchange":
        """Announce messages that will come, in this order; as many will be sent, one for each."""
        return Exchange(self, list(receives))

    def move(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """`post` and `wait`."""
        self.wait(self.post(sends, receives))

    def combine(
        self,
        peer: int,
        reduction: Reduction,
        *,
        give: Tensor | None = None,
        mine: Tensor | None = None,
        out: Tensor | None = None,
    ) -> None:
        """Send `give` to `peer`, and combine what it sends with `mine` into `out`, a segment at a time.

        `give`, `mine` and `out` may be the same memory: a segment is overwritten when it has been sent. Left out,
        nothing is sent, or nothing received.
        """
        lengths = [tensor.numel() for tensor in (give, mine) if tensor is not None]
        like = give if give is not None else mine
        assert like is not None
        cut = Cut.of(max(lengths), self.segment // like.element_size())
        buffers = self.scratch(like, cut.step * AHEAD).split(cut.step) if mine is not None and cut.step else ()
        theirs_first = peer < self.rank

        def received(item: int) -> tuple[Tensor, Tensor]:
            assert mine is not None
            own = cut.piece(mine, item)
            return own, buffers[item % AHEAD][: own.numel()]

        def post(item: int) -> Pending:
            sends = [] if give is None else [(cut.piece(give, item), peer)]
            return self.post(sends, [] if mine is None else [(received(item)[1], peer)])

        def arrived(item: int) -> None:
            if mine is None:
                return
            own, theirs = received(item)
            first, second = (theirs, own) if theirs_first else (own, theirs)
            reduction.combine(first, second, out=cut.piece(mine if out is None else out, item))

        if cut.step:
            pipeline(self, cut.count, AHEAD, post, arrived)


class Exchange:
    """Messages that are expected, each with one that is sent: both in the order in which all ranks have them.

    gloo is told of all places at once. NCCL would wait in a receive for a send that is queued behind the peer's own, so
    there each receive is started together with the send of its number.
    """

    def __init__(self, wire: Wire, receives: list[Message]) -> None:
        self.wire, self.receives, self.taken, self.sent = wire, receives, 0, 0
        self.sends: list[Pending] = []
        self.batched = any(tensor.is_cuda for tensor, _ in receives)
        self.pending = [] if self.batched else [wire.receive(*message) for message in receives]

    def send(self, tensor: Tensor, peer: int) -> None:
        """Start the next message."""
        if self.batched:
            self.pending.append(self.wire.post(((tensor, peer),), (self.receives[self.sent],)))
        else:
            self.sends.append(self.wire.send(tensor, peer))
        self.sent += 1

    def next(self) -> Tensor:
        """The next of the expected, when it has come."""
        self.wire.wait(self.pending[self.taken])
        self.taken += 1
        return self.receives[self.taken - 1][0]

    def end(self) -> None:
        """When all that was sent has left."""
        for pending in self.sends:
            self.wire.wait(pending)


@dataclass(frozen=True)
class Cut:
    """How a part is cut: `count` segments of at most `step` elements, `width` of them (a wave) worked on together."""

    step: int
    count: int
    width: int

    @staticmethod
    def of(longest: int, most: int) -> "Cut":
        """Cut parts of up to `longest` elements into even segments of at most `most`, a whole number of waves."""
        count = max(1, -(-longest // max(1, most)))
        width = min(count, AHEAD)
        count = -(-count // width) * width
        return Cut(-(-longest // count), count, width)

    def piece(self, part: Tensor, segment: int) -> Tensor:
        """That segment of `part`; empty beyond its end."""
        return part[segment * self.step : (segment + 1) * self.step]


def pipeline(
    wire: Wire, items: int, ahead: int, post: Callable[[int], Pending], arrived: Callable[[int], None]
) -> None:
    """Post item after item, `ahead` of them before the first arrives; `post(i)` may rely on `arrived(i − ahead)`."""
    under_way: deque[tuple[int, Pending]] = deque()
    for item in range(items):
        if len(under_way) == ahead:
            first, pending = under_way.popleft()
            wire.wait(pending)
            arrived(first)
        under_way.append((item, post(item)))
    for first, pending in under_way:
        wire.wait(pending)
        arrived(first)


def timed_out(error: RuntimeError) -> bool:
    """Whether gloo or NCCL say that they waited too long, rather than that a connection is gone."""
    return any(sign in str(error) for sign in ("imed out", "timing out", "timeout caused", "operation timeout"))


def special(name: str, tensor: Tensor) -> str | None:
    """Why `tensor`, an argument called `name`, is no plain memory that may be written, and what to do; else None."""
    if tensor.is_nested:
        return f"{name} is a nested tensor: pass the tensors of {name}.unbind() one at a time"
    if tensor.is_quantized:
        return (
            f"{name} is quantized, and its scale would not travel with it: pass {name}.int_repr(), and make a "
            "quantized tensor of the result"
        )
    if tensor.is_inference() and not torch.is_inference_mode_enabled() and name != "input":  # which is only read
        return (
            f"{name} was made in torch.inference_mode, outside of which it cannot be written: call inside, or pass "
            f"{name}.clone() and copy the result back"
        )
    return None


@functools.lru_cache(maxsize=256)
def even(elements: int, n: int) -> tuple[int, ...]:
    """`elements` in n parts, the first ones an element longer where it does not divide."""
    each, longer = divmod(elements, n)
    return tuple(each + (rank < longer) for rank in range(n))


def copy(target: Tensor, source: Tensor) -> None:
    """`source` into `target`, unless it is there already."""
    if target.data_ptr() != source.data_ptr():
        target.copy_(source)
