"""numba's compiler, as the inner loops of this library ask for it.

numba counts the references to every array: also to a view like `x[i]`, and to each array that is handed to another
compiled function. Where that happens in a loop it stays in the machine code: two atomic additions each time, which wait
for each other, and for other threads that count the same array. Where a step of the loop is short, it shows.

Whoever calls from Python holds the arrays anyway. So what makes no arrays of its own is compiled without counting;
numba refuses to compile an allocation there, or to return an array that was not an argument.

And what numba has no word for: `prefetch` and `prefetch_second` ask memory for what a loop will need soon.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])


def uncounted(**options: Any) -> Callable[[F], F]:
    """`njit` that is cached, lets other threads run, and counts no references; scratch memory is handed in."""
    asked: dict[str, Any] = {"cache": True, "nogil": True, "_nrt": False, **options}
    return njit(**asked)


def _prefetch(cache: int) -> Any:
    """`prefetch(array, index)`, index a tuple: bring that element's line into this cache; nothing waits for it."""

    def typed(typing_context: Any, array: Any, index: Any) -> Any:
        def generate(context: Any, build: Any, signature: Any, args: Any) -> Any:
            of, at = signature.args
            memory = context.make_array(of)(context, build, args[0])
            numbers = zip(cgutils.unpack_tuple(build, args[1], len(at)), at, strict=True)
            place = [context.cast(build, number, kind, types.intp) for number, kind in numbers]
            where = cgutils.get_item_pointer(context, build, of, memory, place)
            pointer, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
            wants = ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
            request = cgutils.get_or_insert_function(build.module, wants, "llvm.prefetch.p0i8")
            read, keep, data = i32(0), i32(4 - cache), i32(1)
            build.call(request, [build.bitcast(where, pointer), read, keep, data])
            return context.get_dummy_value()

        return types.void(array, index), generate

    return intrinsic(typed)


prefetch: Any = _prefetch(1)
prefetch_second: Any = _prefetch(2)
