"""How two parts of a vector become one: the arithmetic of a reduction, the same for every algorithm.

A vector is combined in another order by each algorithm, and floating-point addition is not associative: two
*algorithms* may differ in the last bits. Two *ranks* may not, since weights that drift apart by a bit stay apart. Every
algorithm of this package therefore reduces an element in one place and copies it from there; where two ranks combine
the same pair, as in recursive doubling, the operand of the lower rank goes first on both (`a + b` and `b + a` are
equal, but the largest of 0 and −0, or a complex product computed with fused multiply-adds, is not).

"mean" divides by the number of ranks once an element is complete, where it was completed: a part, not the vector.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

COMBINE: Mapping[str, Callable[..., Tensor]] = {
    "sum": torch.add,
    "mean": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
    "product": torch.mul,
}
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_COMPLEX = (torch.complex128, torch.complex64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Reduction:
    """`op`, one of `COMBINE`, over `ranks` ranks."""

    op: str
    ranks: int

    def combine(self, first: Tensor, second: Tensor, out: Tensor) -> None:
        """`first` op `second` into `out`, which may be either of them."""
        COMBINE[self.op](first, second, out=out)

    def finish(self, part: Tensor) -> None:
        """What is left to do to a part into which every rank's has gone."""
        if self.op == "mean" and self.ranks > 1:
            part.div_(self.ranks)

    def unfinished(self) -> "Reduction":
        """The same without `finish`, for a stage after which others follow."""
        return Reduction("sum", self.ranks) if self.op == "mean" else self


def refusal(op: str, dtype: torch.dtype) -> str | None:
    """Why `op` cannot be had in `dtype`, and what to do; None if it can."""
    if dtype == torch.bool:
        if op in ("max", "min"):
            return None
        return (
            f"op={op!r} of bool has no meaning of its own: take 'max' for or, 'min' for and, or convert to an integer"
        )
    if dtype in _COMPLEX:
        if op in ("max", "min"):
            return f"op={op!r}: complex numbers have no order; reduce torch.view_as_real(tensor), or take 'sum'"
        return None
    if dtype in _INTEGERS:
        if op == "mean":
            return f"op='mean' of {dtype} would round: convert to float, or take 'sum' and divide"
        return None
    if dtype in _FLOATS:
        return None
    return f"{dtype} can be moved but not reduced: convert to float32 or bfloat16 first"
