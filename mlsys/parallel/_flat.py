"""Many tensors as one flat buffer in n slices, one a rank: what the ZeRO stages send, and what a rank keeps of it.

A collective has a cost for each call, so tensors travel together, end to end in one buffer:

    numbers   w₀ w₀ w₀ w₀ w₀ w₀ · · b₀ b₀ · · w₁ w₁ w₁ w₁ w₁ w₁ w₁ · · · ·        · is padding, and stays 0
    slices    |———— rank 0 ————|———— rank 1 ————|———— rank 2 ————|

A reduce-scatter of the gradients then leaves each rank its slice of the sum, and an all-gather of the slices gives each
rank the whole. The rule by which the buffer is cut:

    "elements"   anywhere: equal slices, and a tensor may lie in two of them. For optimizers that treat each number by
                 itself (SGD, Adam and nearly all others).
    "tensors"    between tensors only, so slices differ in size. For optimizers that look at a whole tensor, such as
                 Adafactor (means of rows and columns) and Muon (a matrix made orthogonal).

The part of one tensor that lies in one slice is a *piece*. Each piece is a parameter of its own to the optimizer, so
that groups (this learning rate for the norms, that decay for the matrices) keep their meaning when a tensor is cut.

Tensors begin at multiples of 16 numbers: in float32 that is 64 bytes, a cache line and the widest vector register.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

ALIGN = 16
SPLITS = ("elements", "tensors")


@dataclass(frozen=True)
class Cut:
    """The part of one tensor that lies in one rank's slice.

    tensor:       which tensor, by its place in the list.
    start, stop:  the numbers of it, in row-major order.
    offset:       where they begin in the slice.
    """

    tensor: int
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Layout:
    """Where each tensor lies in the flat buffer, and how long each rank's slice is, in numbers."""

    numels: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def total(self) -> int:
        """Numbers in the buffer, padding included."""
        return sum(self.sizes)

    @property
    def uneven(self) -> tuple[int, ...] | None:
        """`sizes` as the collectives take them: None where all slices are equal."""
        return self.sizes if len(set(self.sizes)) > 1 else None

    def first(self, rank: int) -> int:
        """Where this rank's slice begins in the buffer."""
        return sum(self.sizes[:rank])

    def own(self, flat: Tensor, rank: int) -> Tensor:
        """This rank's slice of the buffer, as a view."""
        return flat.narrow(0, self.first(rank), self.sizes[rank])

    def view(self, flat: Tensor, tensor: int, shape: torch.Size) -> Tensor:
        """One tensor in the buffer, as a view of its shape."""
        return flat.narrow(0, self.offsets[tensor], self.numels[tensor]).view(shape)

    def cuts(self, rank: int) -> tuple[Cut, ...]:
        """What this rank's slice holds, in order; tensors without numbers are in no slice."""
        low = self.first(rank)
        high = low + self.sizes[rank]
        found = []
        for index, (offset, numel) in enumerate(zip(self.offsets, self.numels)):
            start, stop = max(low, offset), min(high, offset + numel)
            if start < stop:
                found.append(Cut(index, start - offset, stop - offset, start - low))
        return tuple(sorted(found, key=lambda cut: cut.offset))

    def gaps(self) -> tuple[tuple[int, int], ...]:
        """The padding: (begin, end) of each run of numbers that belong to no tensor."""
        used = sorted((offset, offset + numel) for offset, numel in zip(self.offsets, self.numels) if numel)
        begins = [0, *(end for _, end in used)]
        ends = [*(begin for begin, _ in used), self.total]
        return tuple((begin, end) for begin, end in zip(begins, ends) if begin < end)


def padded(numel: int) -> int:
    """The next multiple of ALIGN."""
    return -(-numel // ALIGN) * ALIGN


def by_elements(numels: Sequence[int], n: int) -> Layout:
    """End to end, cut into `n` equal slices."""
    ends = list(accumulate((padded(numel) for numel in numels), initial=0))
    size = padded(-(-ends[-1] // n))
    return Layout(tuple(numels), tuple(ends[:-1]), (size,) * n)


def by_tensors(numels: Sequence[int], n: int, loads: list[int] | None = None) -> Layout:
    """Each tensor in one slice, the largest first to whichever rank has least so far.

    `loads` is what the ranks have already, from buffers laid out before; it is added to. So that many small buffers
    come out even together, where one alone could not.
    """
    loads = [0] * n if loads is None else loads
    queue = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(queue)
    owners: list[list[int]] = [[] for _ in range(n)]
    for index in sorted(range(len(numels)), key=lambda i: -numels[i]):
        load, rank = heapq.heappop(queue)
        owners[rank].append(index)
        heapq.heappush(queue, (load + padded(numels[index]), rank))
    offsets, sizes, end = [0] * len(numels), [], 0
    for rank, indices in enumerate(owners):
        begin = end
        for index in sorted(indices):
            offsets[index] = end
            end += padded(numels[index])
        sizes.append(end - begin)
        loads[rank] += end - begin
    return Layout(tuple(numels), tuple(offsets), tuple(sizes))


@dataclass(frozen=True)
class Piece:
    """What one rank holds of one parameter of the model.

    names:   the parameter's names in the model: several where it is tied.
    shape:   of the whole parameter.
    start:   the numbers start … stop−1 of it, in row-major order, are here.
    stop:    one past the last.
    tensor:  those numbers, which the optimizer updates. Flat, unless the split is by whole tensors.
    """

    names: tuple[str, ...]
    shape: torch.Size
    start: int
    stop: int
    tensor: nn.Parameter

    @property
    def name(self) -> str:
        """The first of its names: the one in `module.named_parameters()`."""
        return self.names[0]


class Flat:
    """Parameters of one dtype in one flat buffer: the weights, the gradients, and this rank's slice of both.

    weights:    the whole buffer, which the module's parameters are views of.
    shard:      this rank's slice of it, what it gives to an all-gather: a view in stages 1 and 2.
    master:     the same numbers in the precision that the optimizer works in: `shard` itself if that is the same.
    pieces:     `master` cut up by parameter; their `.grad` is this rank's slice of the gradients.
    gradients:  the whole buffer of local gradients while there are some, else None.
    """

    weights: Tensor
    shard: Tensor
    master: Tensor
    pieces: tuple[Piece, ...]

    def __init__(
        self,
        names: Sequence[tuple[str, ...]],
        parameters: Sequence[nn.Parameter],
        layout: Layout,
        rank: int,
        *,
        dtype: torch.dtype | None = None,
        split: str = "elements",
    ) -> None:
        self.names, self.parameters, self.layout, self.rank = tuple(names), tuple(parameters), layout, rank
        self.shapes = tuple(parameter.shape for parameter in parameters)
        self.trainable = any(parameter.requires_grad for parameter in parameters)
        self.dtype = dtype or parameters[0].dtype
        # What is not trained needs no more precision than it is used with.
        self.master_dtype = parameters[0].dtype if self.trainable else self.dtype
        self.whole_tensors = split == "tensors"
        self.cuts, self._gaps = layout.cuts(rank), layout.gaps()
        self.gradients: Tensor | None = None
        self._filled: set[int] = set()  # which parameters have put a gradient since the last `take` …
        self._final: set[int] = set()  # … and in the pass after which it is to be taken

    # --- weights ------------------------------------------------------------------------------------------------------

    @property
    def mixed(self) -> bool:
        """Whether weights have less precision than what the optimizer updates."""
        return self.dtype != self.master_dtype

    def collect(self) -> Tensor:
        """A new buffer with the values that the parameters have now, in their own dtype."""
        device = self.parameters[0].device
        flat = torch.zeros(self.layout.total, dtype=self.master_dtype, device=device)
        for index, parameter in enumerate(self.parameters):
            self.layout.view(flat, index, self.shapes[index]).copy_(parameter.detach())
        return flat

    def keep(self, master: Tensor, shard: Tensor) -> None:
        """Take over this rank's slice, and make its pieces."""
        self.master, self.shard, pieces = master, shard, []
        for cut in self.cuts:
            numbers = master.narrow(0, cut.offset, cut.stop - cut.start)
            if self.whole_tensors:
                numbers = numbers.view(self.shapes[cut.tensor])
            tensor = nn.Parameter(numbers, requires_grad=self.trainable)
            if self.mixed and self.trainable:
                tensor.grad_dtype = None  # its gradient comes in the precision of the weights
            pieces.append(Piece(self.names[cut.tensor], self.shapes[cut.tensor], cut.start, cut.stop, tensor))
        self.pieces = tuple(pieces)

    def store(self, index: int, values: Tensor) -> None:
        """Copy what this rank holds of a parameter into `master`, from the whole of it."""
        for cut in self.cuts:
            if cut.tensor == index:
                numbers = values.detach().reshape(-1)[cut.start : cut.stop]
                self.master.narrow(0, cut.offset, cut.stop - cut.start).copy_(numbers)

    def attach(self) -> None:
        """Make the module's parameters views of `weights`.

        `.data` leaves the parameters' version counters alone, so what autograd has saved of them stays valid.
        """
        for index, parameter in enumerate(self.parameters):
            parameter.data = self.layout.view(self.weights, index, self.shapes[index])

    def detached(self) -> str | None:
        """The name of a parameter that is no longer such a view, if there is one."""
        begin, size = self.weights.data_ptr(), self.weights.itemsize
        for names, parameter, offset, numel in zip(
            self.names, self.parameters, self.layout.offsets, self.layout.numels
        ):
            if numel and parameter.data_ptr() != begin + offset * size:
                return names[0]
        return None

    def refresh(self) -> None:
        """Give `shard` the values of `master`: nothing to do where they are one tensor."""
        if self.mixed:
            self.shard.copy_(self.master)

    # --- gradients ----------------------------------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """Whether every parameter has put its last gradient."""
        return len(self._final) == len(self.parameters)

    @property
    def started(self) -> bool:
        """Whether any parameter has put a gradient."""
        return bool(self._filled)

    def put(self, index: int, gradient: Tensor, *, final: bool = True) -> None:
        """Copy a parameter's gradient into the buffer, or add it to what is there since the last `take`.

        final: no other backward pass adds to it before the buffer is taken.
        """
        if self.gradients is None:
            self.gradients = torch.empty(self.layout.total, dtype=self.dtype, device=gradient.device)
            for begin, end in self._gaps:
                self.gradients[begin:end].zero_()
        elif not self.started:
            self._set_aside()
        there = self.layout.view(self.gradients, index, self.shapes[index])
        if index in self._filled:
            there.add_(gradient)
        else:
            there.copy_(gradient)
        self._filled.add(index)
        if final:
            self._final.add(index)

    def take(self) -> Tensor:
        """The local gradients, 0 where no gradient came; what is put from now on is a new sum."""
        if self.gradients is None:
            self.gradients = torch.zeros(self.layout.total, dtype=self.dtype, device=self.shard.device)
        elif not self.started:
            self._set_aside()
            self.gradients.zero_()
        else:
            for index in range(len(self.parameters)):
                if index not in self._filled:
                    self.layout.view(self.gradients, index, self.shapes[index]).zero_()
        self.forget()
        return self.gradients

    def forget(self) -> None:
        """Take whatever was put as never put."""
        self._filled.clear()
        self._final.clear()

    def receive(self, fresh: Tensor) -> None:
        """Add this rank's slice of the reduced gradients to the pieces' `.grad`.

        The first since `zero_grad` is taken as it is. Sums of several are in the precision of the optimizer:
        in 16 bits the small terms of a long sum would be lost. In float16 all are: the loss was scaled so that small
        gradients do not vanish, and they would if they were unscaled in float16.
        """
        for piece, cut in zip(self.pieces, self.cuts):
            new = fresh.narrow(0, cut.offset, cut.stop - cut.start).view(piece.tensor.shape)
            if self.dtype == torch.float16:
                new = new.to(self.master_dtype)
            old = piece.tensor.grad
            piece.tensor.grad = new if old is None else old.to(self.master_dtype).add_(new)

    def widen(self) -> None:
        """Bring the pieces' gradients to the precision of the optimizer."""
        if self.mixed:
            for piece in self.pieces:
                if piece.tensor.grad is not None:
                    piece.tensor.grad = piece.tensor.grad.to(self.master_dtype)

    def _set_aside(self) -> None:
        """Copy the pieces' gradients out of the buffer before it is written again: in stage 1 they are views of it."""
        assert self.gradients is not None
        for piece in self.pieces:
            grad = piece.tensor.grad
            if grad is not None and grad.untyped_storage().data_ptr() == self.gradients.untyped_storage().data_ptr():
                piece.tensor.grad = grad.clone()
