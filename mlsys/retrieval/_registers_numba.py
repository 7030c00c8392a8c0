"""A matrix product that is compared with the bar before it leaves the registers.

A product of queries and vectors that goes through memory is written once and read once for the selection: a quarter of
the time of an exact search, for numbers of which hardly any is looked at again. Here a small tile of it, ROWS vectors
times COLUMNS queries, is summed up in registers (as every fast matrix product does it) and compared there: the smallest
estimate of each query with its bar. Only if one is below, the tile is written, and looked through.

    for j in 0 … d − 1:                  one vector register is LANES queries
        tile[r, :] −= x[r, j] · queries[j, :]    2 loads, ROWS broadcasts, 2·ROWS multiply-adds

The sums begin with ½‖x‖², so that nothing is added later. Queries are transposed once, in panels of COLUMNS, and lie
in the first cache; vectors are read as they are. The tile's shape is what the processor has registers for: 24 for sums
and a few for the rest of the 32 of AVX-512 and of ARM, 12 of the 16 of AVX.

numba has no vector registers, and its compiler does not find this in loops: the tile is written in LLVM's own language.

Papers:
    Goto & van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication", TOMS (tiles of registers, panels in
    caches).

See also:
    `exact_numba` (who uses it), `_collect_numba` (what is done with a candidate).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mlsys.compiled import uncounted
from mlsys.retrieval import _memory
from mlsys.retrieval._collect_numba import note
from mlsys.retrieval._intrinsics_numba import lowest_bit

Array = np.ndarray

_has = binding.get_host_cpu_features()
LANES, ROWS = (16, 12) if _has.get("avx512f") else (8, 6) if _has.get("avx") else (4, 12)
COLUMNS = 2 * LANES
NEAR = 1 << 18  # bytes of vectors that meet one panel after the other: so few stay in the second cache


def panels(queries: Array) -> Array:
    """−queries (m, d), transposed: (panels, d, COLUMNS), the last filled up with 0."""
    m, d = queries.shape
    padded = np.zeros((-(-m // COLUMNS) * COLUMNS, d), np.float32)
    np.negative(queries, out=padded[:m])
    return _memory.copy(padded.reshape(-1, COLUMNS, d).transpose(0, 2, 1))


def compare(panels: Array, x: Array, halves: Array, first: int, *state: Array) -> None:
    """`collect` of all vectors x (n, d), which are in slots first … first + n, for all queries of the panels."""
    rest = len(x) - len(x) % ROWS
    last, last_halves = np.zeros((ROWS, x.shape[1]), np.float32), np.zeros(ROWS, np.float32)  # the last few, filled up
    last[: len(x) - rest], last_halves[: len(x) - rest] = x[rest:], halves[rest:]
    room = np.empty(COLUMNS, np.float32), np.empty((ROWS, COLUMNS), np.float32), np.empty(ROWS, np.uint64)
    _compare(panels, x, halves, last, last_halves, first, *room, *state)


@uncounted()
def _compare(
    panels: Array,
    x: Array,
    halves: Array,
    last: Array,
    last_halves: Array,
    first: int,
    bars: Array,
    tile: Array,
    below: Array,
    limits: Array,
    slack: Array,
    estimates: Array,
    slots: Array,
    counts: Array,
) -> None:
    """last, last_halves: those after the last whole tile. bars, tile, below: room for those of a panel."""
    n, d = x.shape
    rest = n - n % ROWS
    step = max(1, NEAR // (4 * d * ROWS)) * ROWS
    for begin in range(0, n, step):
        end = min(begin + step, n)
        for p in range(len(panels)):
            for c in range(COLUMNS):
                q = p * COLUMNS + c
                bars[c] = limits[q] if q < len(limits) else -np.inf
            for at in range(begin, end, ROWS):
                if at < rest:
                    near = _tile(panels, p, x, at, halves, bars, tile, below)
                else:
                    near = _tile(panels, p, last, 0, last_halves, bars, tile, below)
                if not near:
                    continue
                for r in range(min(ROWS, end - at)):
                    hits = below[r]
                    while hits:
                        c = lowest_bit(hits)
                        hits &= hits - np.uint64(1)
                        if tile[r, c] <= bars[c]:  # which may be lower by now
                            q = p * COLUMNS + c
                            bars[c] = note(q, tile[r, c], first + at + r, limits, slack, estimates, slots, counts)


def _tile_typed(
    typing_context: Any, panels: Any, p: Any, x: Any, at: Any, halves: Any, bars: Any, tile: Any, below: Any
) -> tuple[Any, Any]:
    """Whether some estimate of the queries of panel p and the vectors x[at] … x[at + ROWS − 1] is not above its bar.

    If so, all estimates are in `tile`, and in below[r] those of vector r that are not above, as bits.
    All arrays are contiguous, below uint64 and the others float32.
    """
    i32, i64, f32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
    vector, bits = ir.VectorType(f32, LANES), ir.IntType(LANES)

    def generate(context: Any, build: Any, signature: Any, args: Any) -> Any:
        names = ("panels", "p", "x", "at", "halves", "bars", "tile", "below")
        arrays = {
            name: context.make_array(kind)(context, build, value)
            for name, kind, value in zip(names, signature.args, args, strict=True)
            if name not in ("p", "at")
        }
        d = build.extract_value(arrays["x"].shape, 1)
        p, at = (context.cast(build, args[i], signature.args[i], types.int64) for i in (1, 3))

        def place(name: str, index: Any, kind: Any = f32) -> Any:
            return build.bitcast(build.gep(arrays[name].data, [index]), kind.as_pointer())

        def pair(name: str, index: Any) -> list[Any]:
            return [place(name, build.add(index, i64(h * LANES)), vector) for h in (0, 1)]

        def spread(number: Any) -> Any:
            undefined = ir.Constant(vector, ir.Undefined)
            one = build.insert_element(undefined, number, i32(0))
            return build.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(i32, LANES), [0] * LANES))

        sums = [[cgutils.alloca_once(build, vector) for _ in (0, 1)] for _ in range(ROWS)]
        for r in range(ROWS):
            half = spread(build.load(place("halves", build.add(at, i64(r)))))
            for h in (0, 1):
                build.store(half, sums[r][h])
        panel = build.mul(build.mul(p, d), i64(COLUMNS))
        rows = [build.mul(build.add(at, i64(r)), d) for r in range(ROWS)]
        with cgutils.for_range(build, d, intp=i64) as loop:
            j = loop.index
            queries = [build.load(q, align=4) for q in pair("panels", build.add(panel, build.mul(j, i64(COLUMNS))))]
            for r in range(ROWS):
                number = spread(build.load(place("x", build.add(rows[r], j))))
                for h in (0, 1):
                    product = build.fmul(number, queries[h], flags=("contract",))
                    build.store(build.fadd(build.load(sums[r][h]), product, flags=("contract",)), sums[r][h])
        limits, found = [build.load(bar, align=4) for bar in pair("bars", i64(0))], ir.IntType(1)(0)
        for h in (0, 1):
            lowest = build.load(sums[0][h])
            for r in range(1, ROWS):
                other = build.load(sums[r][h])
                lowest = build.select(build.fcmp_ordered("<", other, lowest), other, lowest)
            near = build.bitcast(build.fcmp_ordered("<=", lowest, limits[h]), bits)
            found = build.or_(found, build.icmp_unsigned("!=", near, bits(0)))
        with build.if_then(found, likely=False):
            for r in range(ROWS):
                hits = i64(0)
                for h, there in enumerate(pair("tile", i64(r * COLUMNS))):
                    estimates = build.load(sums[r][h])
                    build.store(estimates, there, align=4)
                    near = build.bitcast(build.fcmp_ordered("<=", estimates, limits[h]), bits)
                    hits = build.or_(hits, build.shl(build.zext(near, i64), i64(h * LANES)))
                build.store(hits, build.gep(arrays["below"].data, [i64(r)]))
        return found

    return types.boolean(panels, p, x, at, halves, bars, tile, below), generate


_tile: Any = intrinsic(_tile_typed)
