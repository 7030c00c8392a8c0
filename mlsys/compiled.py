"""numba's compiler, as the inner loops of this library ask for it.

numba counts the references to every array: also to a view like `x[i]`, and to each array that is handed to another
compiled function. Where that happens in a loop it stays in the machine code: two atomic additions each time, which wait
for each other, and for other threads that count the same array. Where a step of the loop is short, it shows.

Whoever calls from Python holds the arrays anyway. So what makes no arrays of its own is compiled without counting;
numba refuses to compile an allocation there, or to return an array that was not an argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])


def uncounted(**options: Any) -> Callable[[F], F]:
    """`njit` that is cached, lets other threads run, and counts no references; scratch memory is handed in."""
    asked: dict[str, Any] = {"cache": True, "nogil": True, "_nrt": False, **options}
    return njit(**asked)
