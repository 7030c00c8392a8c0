"""Sending less than the gradient: rounded numbers, a few of them, or two thin matrices, and what makes up for the rest.

Where the link is slow, bytes are the step's time. A compressor takes the flat gradient of a bucket, sends something
smaller, and leaves in its place an estimate ĝ of the mean over ranks, the same on every rank:

    BF16           ĝ = mean of bfloat16(gᵢ)                        half the bytes of float32, 8 bits of precision
    TopK(ρ)        ĝ = mean of top_k(gᵢ),  k = ρN                  k values and k indices from each rank to each other
    PowerSGD(r)    ĝ = P̂·Qᵀ, with P̂ = orth(mean Gᵢ·Q), Q' = mean Gᵢᵀ·P̂     r(rows + columns) numbers a matrix

The last two lose most of the gradient, and not at random: a weight whose gradient is always small is never moved.
**Error feedback** repairs that. What was not sent is kept, and added to the next gradient before it is compressed:

    c  ← compress(g + e)          sent
    e  ← g + e − c                kept

Nothing is lost then, only late: the sum of all c is the sum of all g but for the last e. `error_feedback=False` shows
what happens without: training stalls where the gradients that are left out do not vanish.

**Not finite.** One infinite gradient on one rank must show on all, so that all leave the step out (as `GradScaler`
does), and must not stay: a residual that holds it would spoil every later step. So where the estimate of a bucket is
not finite, which all ranks see alike, the bucket's state is that of before the call. What other buckets have sent in a
step that is left out is lost. Residuals are in units of the gradients: when a loss scale changes, they are off for some
steps.

Residuals make this rank's state depend on its own gradients. They are not in a checkpoint: `reset` forgets them, and
a resumed run starts as if from a first step.

Cost:
    BF16: two passes over the gradient. TopK: a partial sort, on a CPU often dearer than the bytes it saves. PowerSGD:
    4·r FLOPs a number in matmuls, and an orthogonalisation of thin matrices. With error feedback, memory for N numbers
    that are kept, and for a bucket's again while it is under way.

Communication:
    Bytes that a rank sends for N numbers of 4 bytes: plain 8N(n−1)/n, BF16 4N(n−1)/n, TopK 8ρN(n−1), PowerSGD about
    8r·Σ(rows + columns)·(n−1)/n and one more latency. TopK's gathers grow with n where an all-reduce's bytes do not:
    it sends less only if ρ < 1/n.
    It pays where the bytes saved, times β, exceed the passes over memory. BF16 moves 12 bytes a number through memory
    and saves 4(n−1)/n on the link: it pays on links slower than a sixth (2 ranks) to a third (many) of the memory, if
    the backward pass does not hide them anyway.

Papers:
    Seide et al. 2014, "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel Distributed Training of
    Speech DNNs", Interspeech (error feedback).
    Stich, Cordonnier & Jaggi 2018, arXiv:1809.07599, algorithm 1 (top-k with memory).
    Karimireddy et al. 2019, arXiv:1901.09847, algorithm 2 (error feedback mends any compressor).
    Vogels, Karimireddy & Jaggi 2019, arXiv:1905.13727, algorithm 1 (PowerSGD).

See also:
    `mlsys.parallel.data_parallel` (which calls these), `mlsys.parallel.traffic` (which counts what they send).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlsys.parallel.collectives import Communicator, Group, Work, all_gather, all_reduce


class Compressor(ABC):
    """How a bucket's gradient is averaged. An object belongs to one model: it may keep state for each bucket."""

    @abstractmethod
    def start(self, key: int, gradient: Tensor, parts: Sequence[Tensor], group: Group) -> Work:
        """Begin to average: after `wait()` of what is returned, `gradient` holds the same estimate on every rank.

        key:      of the bucket, the same at each call, for state.
        gradient: flat, this rank's; to be overwritten.
        parts:    the same numbers, as views of the parameters' shapes.
        """

    def reset(self) -> None:  # noqa: B027 - most have no state
        """Forget all state, as after a change of buckets."""


class BF16(Compressor):
    """Average in bfloat16, which has float32's range and 8 bits of its precision. Already narrow gradients go as is."""

    def start(self, key: int, gradient: Tensor, parts: Sequence[Tensor], group: Group) -> Work:
        """Begin to average `gradient` in bfloat16."""
        if gradient.element_size() <= 2:
            return _mean(gradient, group)
        narrow = gradient.to(torch.bfloat16)
        work = _mean(narrow, group)
        return _Then(work, lambda: gradient.copy_(narrow))


class TopK(Compressor):
    """Send the `ratio` of numbers that are largest in magnitude (at least one), keep the rest for later."""

    def __init__(self, ratio: float = 0.01, *, error_feedback: bool = True) -> None:
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio={ratio}: a share of the numbers is needed, above 0 and at most 1")
        self.ratio, self.error_feedback = ratio, error_feedback
        self._residuals: dict[int, Tensor] = {}

    def start(self, key: int, gradient: Tensor, parts: Sequence[Tensor], group: Group) -> Work:
        """Begin to gather the largest numbers of all ranks."""
        n = _size(group)
        wanted = _with_residual(self._residuals, key, gradient) if self.error_feedback else gradient.clone()
        # NaN and infinity count as the largest, so that one at least is sent, and every rank gets to know.
        k = math.ceil(self.ratio * wanted.numel())
        chosen = wanted.abs().topk(k, sorted=False).indices
        values = wanted[chosen].to(gradient.dtype)
        wanted[chosen] = 0  # rather than subtract what was sent: rounding to the gradient's type leaves little
        # Indices and values in one message: one latency instead of two.
        message = torch.cat((_bytes(chosen.to(torch.int32)), _bytes(values)))
        gathered = message.new_empty(n * message.numel())
        work = all_gather(gathered, message, group, algorithm=_algorithm(group), async_op=True, check=False)

        def add_all() -> None:
            gradient.zero_()
            # Rank after rank, so that every rank adds in the same order and gets the same bits.
            for part in gathered.view(n, -1):
                where, what = part[: 4 * k].clone().view(torch.int32), part[4 * k :].clone().view(gradient.dtype)
                gradient.index_add_(0, where, what, alpha=1 / n)
            if self.error_feedback and gradient.isfinite().all():
                self._residuals[key] = wanted

        return _Then(work, add_all)

    def reset(self) -> None:
        """Forget what was not sent."""
        self._residuals.clear()


class PowerSGD(Compressor):
    """Send each matrix of the gradient as two factors of `rank` columns, found by one step of power iteration.

    A step is enough since Q is kept: gradients of consecutive steps have similar directions, so the iteration goes on
    from step to step. Convolutions are matrices of (out, in · kernel area); vectors, and matrices for which factors
    would be no smaller, are averaged as they are.
    """

    def __init__(self, rank: int = 2, *, error_feedback: bool = True, seed: int = 0) -> None:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank={rank!r}: a whole number of at least 1 is needed")
        self.rank, self.error_feedback, self.seed = rank, error_feedback, seed
        self._residuals: dict[int, Tensor] = {}
        self._factors: dict[tuple[int, int], Tensor] = {}

    def start(self, key: int, gradient: Tensor, parts: Sequence[Tensor], group: Group) -> Work:
        """Begin to average the left factors; `wait` averages the right ones and multiplies."""
        if self.error_feedback:
            flat = _with_residual(self._residuals, key, gradient)
        else:
            flat = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        # In the order of `parts`, which lie end to end in the bucket. A part's own strides do not matter here: the
        # numbers are taken in the order of memory, on all ranks alike.
        pieces = [
            piece.view(part.shape[0], -1) if self._thin(part) else piece
            for part, piece in zip(parts, flat.split([part.numel() for part in parts]), strict=True)
        ]
        matrices = {i: piece for i, piece in enumerate(pieces) if piece.ndim == 2}
        whole = [piece for piece in pieces if piece.ndim == 1]
        right = {i: self._factor(key, i, matrix) for i, matrix in matrices.items()}
        left = [matrix @ right[i] for i, matrix in matrices.items()]
        first = torch.cat([piece.reshape(-1) for piece in (*left, *whole)])
        work = _mean(first, group)

        def multiply() -> None:
            if not first.isfinite().all():  # on all ranks alike; factors of it would spread over the matrix anyway
                gradient.fill_(math.nan)
                return
            averaged = _split_like(first, (*left, *whole))
            bases = [torch.linalg.qr(factor).Q for factor in averaged[: len(left)]]
            seconds = [matrix.T @ base for matrix, base in zip(matrices.values(), bases, strict=True)]
            if seconds:
                second = torch.cat([factor.reshape(-1) for factor in seconds])
                _mean(second, group).wait()
                seconds = _split_like(second, seconds)
            estimates = dict(zip(matrices, (b @ q.T for b, q in zip(bases, seconds, strict=True)), strict=True))
            vectors = iter(averaged[len(left) :])
            ordered = [estimates[i].reshape(-1) if i in estimates else next(vectors) for i in range(len(pieces))]
            torch.cat(ordered, out=(estimate := torch.empty_like(flat)))
            gradient.copy_(estimate)
            if not gradient.isfinite().all():  # a product, or its rounding to the gradient's type, may overflow
                return
            self._factors.update({(key, i): q for i, q in zip(matrices, seconds, strict=True)})
            if self.error_feedback:
                exact = [i not in estimates for i in range(len(pieces))]
                flat.sub_(estimate)
                for piece, is_exact in zip(pieces, exact, strict=True):
                    if is_exact:
                        piece.zero_()  # sent whole: nothing of it is late
                self._residuals[key] = flat

        return _Then(work, multiply)

    def reset(self) -> None:
        """Forget what was not sent, and the directions found so far."""
        self._residuals.clear()
        self._factors.clear()

    def _thin(self, part: Tensor) -> bool:
        if part.ndim < 2 or part.numel() == 0:
            return False
        rows, columns = part.shape[0], part.numel() // part.shape[0]
        return self.rank * (rows + columns) < rows * columns

    def _factor(self, key: int, i: int, matrix: Tensor) -> Tensor:
        """Q of this matrix; at first random, the same on every rank."""
        if (key, i) not in self._factors:
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * key + i)
            start = torch.randn(matrix.shape[1], self.rank, generator=generator, dtype=matrix.dtype)
            self._factors[key, i] = start.to(matrix.device)
        return self._factors[key, i]


class _Then:
    """Work followed by a function, once."""

    def __init__(self, work: Work | None, function: Callable[[], Any]) -> None:
        assert work is not None  # of async_op=True
        self._work, self._function = work, function

    def wait(self) -> None:
        self._work.wait()
        self._function()


def _with_residual(residuals: dict[int, Tensor], key: int, gradient: Tensor) -> Tensor:
    """The gradient and what was kept of the ones before, in float32 at least; the state is left as it is."""
    if key not in residuals:
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
    if residuals[key].shape != gradient.shape:
        raise ValueError(
            f"bucket {key} has {gradient.numel():,} numbers, and had {residuals[key].numel():,}: a compressor serves "
            "one model; make another for this one, or call reset()"
        )
    return residuals[key] + gradient


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


def _split_like(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def _mean(tensor: Tensor, group: Group) -> Work:
    work = all_reduce(tensor, group, op="mean", algorithm=_algorithm(group), async_op=True, check=False)
    assert work is not None  # of async_op=True
    return work


def _algorithm(group: Group) -> str:
    """A plain process group has no measured links to choose by."""
    return "auto" if isinstance(group, Communicator) else "backend"


def _size(group: Group) -> int:
    return group.size if isinstance(group, Communicator) else dist.get_world_size(group)
