"""What the processor can do and numba has no word for: a few instructions, in LLVM's language.

See also:
    `_hnsw_compiled`, `_collect_numba`, `_registers_numba` (who use them), `mlsys.compiled` (more of them).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic


def _memmove(typing_context: Any, target: Any, source: Any, size: Any) -> Any:
    """Copy bytes between addresses; they may overlap."""

    def generate(context: Any, build: Any, signature: Any, args: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        function = build.module.declare_intrinsic("llvm.memmove", [pointer, pointer, ir.IntType(64)])
        target, source = (build.inttoptr(arg, pointer) for arg in args[:2])
        build.call(function, [target, source, args[2], ir.IntType(1)(0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


def _take(typing_context: Any, taken: Any) -> Any:
    """The next number, from taken[0] on, that no other thread gets. taken: int64 (1,)."""

    def generate(context: Any, build: Any, signature: Any, args: Any) -> Any:
        place = context.make_array(signature.args[0])(context, build, args[0]).data
        return build.atomic_rmw("add", place, ir.IntType(64)(1), "monotonic")

    return types.int64(taken), generate


def _lowest_bit(typing_context: Any, bits: Any) -> Any:
    """The number of the lowest bit that is set, of at least one, in 64."""

    def generate(context: Any, build: Any, signature: Any, args: Any) -> Any:
        return build.cttz(args[0], ir.IntType(1)(1))

    return types.int64(types.uint64), generate


memmove: Any = intrinsic(_memmove)
take: Any = intrinsic(_take)
lowest_bit: Any = intrinsic(_lowest_bit)
