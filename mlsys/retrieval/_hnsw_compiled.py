"""The loops of `hnsw_numba`. What they compute is said in `hnsw`, why they are fast in `hnsw_numba`.

Arguments that recur:

    vectors, how                 float32 (n, d); 0 is l2, 1 is ip, 2 is cosine
    levels, first, links, upper  the graph's arrays (see `_hnsw_graph`)
    pool                         int64: entries in ascending order, see `_entry`
    marks                        uint16: [0] is the mark of the last search, [1 + v] that of the last that saw node v
    rule                         0 is the heuristic, 1 fills up with what it drops, 2 takes the nearest
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

Array = np.ndarray
Scalar = Any  # float32 or int64: what numba makes of a number

LINE = 64  # bytes that the processor loads at once
AHEAD = 512  # bytes of a vector that are requested; the processor itself sees where that goes on
LAST_MARK = 65535


@intrinsic
def _prefetch(typing: Any, address: Any) -> Any:
    """Request the cache line at this address; go on without it."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        read, keep, data = number(0), number(3), number(1)
        builder.call(function, [builder.inttoptr(args[0], pointer), read, keep, data])
        return context.get_dummy_value()

    return types.void(types.int64), code


@intrinsic
def _memmove(typing: Any, target: Any, source: Any, size: Any) -> Any:
    """Copy bytes between addresses; they may overlap."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        function = builder.module.declare_intrinsic("llvm.memmove", [pointer, pointer, ir.IntType(64)])
        target, source = (builder.inttoptr(arg, pointer) for arg in args[:2])
        builder.call(function, [target, source, args[2], ir.IntType(1)(0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code


# The flags let a sum be taken many floats at a time, in another order; NaN and infinities stay what they are.
@njit(cache=True, nogil=True, forceinline=True, fastmath={"reassoc", "contract", "nsz"})
def _distance(vectors: Array, how: int, node: int, query: Array) -> Scalar:
    total = np.float32(0)
    if how == 0:
        for j in range(query.shape[0]):
            difference = vectors[node, j] - query[j]
            total += difference * difference
        return total
    for j in range(query.shape[0]):
        total += vectors[node, j] * query[j]
    return np.float32(how - 1) - total


@njit(cache=True, nogil=True)
def _entry(distance: float, node: int) -> Scalar:
    """Distance and node in 64 bits that compare as the pair does; the lowest bit, "expanded", is 0."""
    bits = np.int64(np.float32(distance).view(np.int32)) if distance != 0 else np.int64(0)  # −0 is 0
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return (bits << 32) | (np.int64(node) << 1)


@njit(cache=True, nogil=True)
def _node(entry: int) -> int:
    return (entry & 0xFFFFFFFF) >> 1


@njit(cache=True, nogil=True)
def _far(entry: int) -> Scalar:
    """The distance in an entry."""
    bits = entry >> 32
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return np.int32(bits).view(np.float32)


@njit(cache=True, nogil=True)
def _next_mark(marks: Array) -> Scalar:
    """A mark that no node has."""
    mark = np.int64(marks[0]) + 1
    if mark > LAST_MARK:
        marks[:] = 0
        mark = np.int64(1)
    marks[0] = mark
    return mark


@njit(cache=True, nogil=True)
def _descend(
    vectors: Array, how: int, first: Array, upper: Array, query: Array, entry: int, top: int, bottom: int
) -> int:
    """Algorithm 2 with ef = 1 on the layers top … bottom + 1, from and to an entry."""
    for layer in range(top, bottom, -1):
        moved = True
        while moved:
            moved = False
            row = first[_node(entry)] + layer - 1
            for t in range(upper.shape[1]):
                node = upper[row, t]
                if node < 0:
                    break
                other = _entry(_distance(vectors, how, node, query), node)
                if other < entry:
                    entry = other
                    moved = True
    return entry


@njit(cache=True, nogil=True)
def paths(vectors: Array, how: int, levels: Array, first: Array, upper: Array, queries: Array, entry: int) -> Array:
    """Int32 (layers above 0, n_queries): where the descent of each query ends on them, the lowest layer first."""
    top = levels[entry]
    ends = np.empty((top, len(queries)), np.int32)
    for i in range(len(queries)):
        query = queries[i]
        at = _entry(_distance(vectors, how, entry, query), entry)
        for layer in range(top, 0, -1):
            at = _descend(vectors, how, first, upper, query, at, layer, layer - 1)
            ends[layer - 1, i] = _node(at)
    return ends


@njit(cache=True, nogil=True)
def _search_layer(
    vectors: Array,
    how: int,
    first: Array,
    links: Array,
    layer: int,
    query: Array,
    pool: Array,
    n: int,
    ef: int,
    marks: Array,
    fresh: Array,
) -> int:
    """Algorithm 2: go on from the n entries in the pool, none of them expanded. Returns how many there are then."""
    mark = _next_mark(marks)
    for i in range(n):
        marks[1 + _node(pool[i])] = mark
    base, stride, start = vectors.ctypes.data, vectors.strides[0], pool.ctypes.data
    ahead = min(stride, AHEAD)
    at = 0  # the first that is not expanded
    while at < n:
        node = _node(pool[at])
        pool[at] |= 1
        row = first[node] + layer - 1 if layer else node
        count = 0
        for t in range(links.shape[1]):
            neighbor = links[row, t]
            if neighbor < 0:
                break
            if marks[1 + neighbor] != mark:
                marks[1 + neighbor] = mark
                fresh[count] = neighbor
                count += 1
                for offset in range(0, ahead, LINE):
                    _prefetch(base + neighbor * stride + offset)  # type: ignore[call-arg]
        at += 1
        for i in range(count):
            entry = _entry(_distance(vectors, how, fresh[i], query), fresh[i])
            if n == ef and entry > pool[n - 1]:
                continue
            low, high = 0, n
            while low < high:
                middle = (low + high) >> 1
                if pool[middle] < entry:
                    low = middle + 1
                else:
                    high = middle
            if n < ef:
                n += 1
            _memmove(start + 8 * (low + 1), start + 8 * low, 8 * (n - 1 - low))  # type: ignore[call-arg]
            pool[low] = entry
            at = min(at, low)
        while at < n and pool[at] & 1:
            at += 1
    return n


@njit(cache=True, nogil=True)
def _select(vectors: Array, how: int, pool: Array, n: int, most: int, rule: int, kept: Array, pruned: Array) -> int:
    """Algorithm 4 on the n entries of the pool: writes the nodes to `kept`, and returns how many they are."""
    if rule == 2 or n < most:
        count = min(n, most)
        for i in range(count):
            kept[i] = _node(pool[i])
        return count
    count, dropped = 0, 0
    for i in range(n):
        if count == most:
            break
        node, distance = _node(pool[i]), _far(pool[i])
        behind = False
        for j in range(count):
            if _distance(vectors, how, kept[j], vectors[node]) < distance:
                behind = True
                break
        if not behind:
            kept[count] = node
            count += 1
        elif rule == 1 and dropped < most:
            pruned[dropped] = node
            dropped += 1
    if rule == 1:
        for j in range(min(dropped, most - count)):
            kept[count + j] = pruned[j]
        count += max(0, min(dropped, most - count))
    return count


@njit(cache=True, nogil=True)
def explore(
    vectors: Array,
    how: int,
    levels: Array,
    first: Array,
    links: Array,
    upper: Array,
    nodes: Array,
    entry: int,
    ef: int,
    M: int,
    rule: int,
    marks: Array,
) -> None:
    """Algorithm 1, the searching half: fill the rows of these nodes."""
    top = levels[entry]
    pool = np.empty(ef + 1, np.int64)
    fresh, pruned = np.empty(2 * M, np.int32), np.empty(M, np.int32)
    for node in nodes:
        query, level = vectors[node], min(levels[node], top)
        pool[0] = _descend(
            vectors, how, first, upper, query, _entry(_distance(vectors, how, entry, query), entry), top, level
        )
        n = 1
        for layer in range(level, -1, -1):
            table = upper if layer else links
            for i in range(n):
                pool[i] &= ~1
            n = _search_layer(vectors, how, first, table, layer, query, pool, n, ef, marks, fresh)
            row = table[first[node] + layer - 1 if layer else node]
            row[_select(vectors, how, pool, n, M, rule, row, pruned) :] = -1


@njit(cache=True, nogil=True)
def link_back(
    vectors: Array,
    how: int,
    levels: Array,
    first: Array,
    links: Array,
    upper: Array,
    nodes: Array,
    top: int,
    rule: int,
    part: int,
    parts: int,
) -> None:
    """Algorithm 1, the linking half, for those neighbours whose number is `part` modulo `parts`."""
    width = links.shape[1] + 1
    linked, pool, pruned = np.empty(width, np.int32), np.empty(width, np.int64), np.empty(width, np.int32)
    for node in nodes:
        for layer in range(min(levels[node], top) + 1):
            table = upper if layer else links
            most = upper.shape[1] if layer else links.shape[1]
            for t in range(upper.shape[1]):
                neighbor = table[first[node] + layer - 1 if layer else node, t]
                if neighbor < 0:
                    break
                if neighbor % parts != part:
                    continue
                row = table[first[neighbor] + layer - 1 if layer else neighbor]
                if row[most - 1] < 0:
                    free = most - 1
                    while free > 0 and row[free - 1] < 0:
                        free -= 1
                    row[free] = node
                    continue
                linked[:most], linked[most] = row, node
                row[_choose(vectors, how, neighbor, linked[: most + 1], most, rule, pool, row, pruned) :] = -1


@njit(cache=True, nogil=True)
def _choose(
    vectors: Array,
    how: int,
    node: int,
    candidates: Array,
    most: int,
    rule: int,
    pool: Array,
    kept: Array,
    pruned: Array,
) -> int:
    """Algorithm 4 on candidates in any order: writes a selection to `kept`, and returns how many they are."""
    for n in range(len(candidates)):
        entry = _entry(_distance(vectors, how, candidates[n], vectors[node]), candidates[n])
        at = n
        while at > 0 and pool[at - 1] > entry:
            pool[at] = pool[at - 1]
            at -= 1
        pool[at] = entry
    return _select(vectors, how, pool, len(candidates), most, rule, kept, pruned)


@njit(cache=True, nogil=True)
def choose(vectors: Array, how: int, node: int, candidates: Array, most: int, rule: int) -> Array:
    """A selection of candidates for a node."""
    pool, kept, pruned = np.empty(len(candidates), np.int64), np.empty(most, np.int32), np.empty(most, np.int32)
    return kept[: _choose(vectors, how, node, candidates, most, rule, pool, kept, pruned)]


@njit(cache=True, nogil=True)
def distances(vectors: Array, how: int, query: Array, nodes: Array) -> Array:
    """Float32 (len(nodes),)."""
    result = np.empty(len(nodes), np.float32)
    for i in range(len(nodes)):
        result[i] = _distance(vectors, how, nodes[i], query)
    return result


@njit(cache=True, nogil=True)
def search(
    vectors: Array,
    how: int,
    levels: Array,
    first: Array,
    links: Array,
    upper: Array,
    queries: Array,
    entry: int,
    ef: int,
    marks: Array,
    near: Array,
    nodes: Array,
) -> None:
    """Algorithm 5: fill near and nodes, (n_queries, k), k ≤ ef."""
    pool = np.empty(max(ef, 2) + 1, np.int64)
    fresh = np.empty(links.shape[1], np.int32)
    for i in range(len(queries)):
        query = queries[i]
        start = _entry(_distance(vectors, how, entry, query), entry)
        pool[0] = _descend(vectors, how, first, upper, query, start, levels[entry], 0)
        pool[1] = start
        n = min(ef, 2 if pool[0] != start else 1)
        n = _search_layer(vectors, how, first, links, 0, query, pool, n, ef, marks, fresh)
        for j in range(min(n, near.shape[1])):
            near[i, j], nodes[i, j] = _far(pool[j]), _node(pool[j])
