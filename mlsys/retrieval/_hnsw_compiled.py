"""The loops of `hnsw_numba`. What they compute is said in `hnsw`, why they are fast in `hnsw_numba`.

Arguments that recur:

    vectors, how                 float32 (n, d); 0 is l2, 1 is ip, 2 is cosine
    levels, first, links, upper  the graph's arrays (see `_hnsw_graph`)
    pool                         int64: entries in ascending order, see `_entry`
    marks                        uint16: [0] is the mark of the last search, [1 + v] that of the last that saw node v
    rule                         0 is the heuristic, 1 fills up with what it drops, 2 takes the nearest
    taken                        int64 (1,): how many threads have taken of what they share
    fresh, pruned, linked        room for nodes, int32
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlsys.compiled import prefetch, uncounted
from mlsys.retrieval._intrinsics_numba import memmove, take

Array = np.ndarray
Scalar = Any  # float32 or int64: what numba makes of a number

LINE = 16  # numbers that the processor loads at once
AHEAD = 128  # numbers of a vector that are requested; the processor itself sees where that goes on
LAST_MARK = 65535


# The flags let a sum be taken many floats at a time, in another order; NaN and infinities stay what they are.
@uncounted(forceinline=True, fastmath={"reassoc", "contract", "nsz"})
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


@uncounted()
def _entry(distance: float, node: int) -> Scalar:
    """Distance and node in 64 bits that compare as the pair does; the lowest bit, "expanded", is 0."""
    bits = np.int64(np.float32(distance).view(np.int32)) if distance != 0 else np.int64(0)  # −0 is 0
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return (bits << 32) | (np.int64(node) << 1)


@uncounted()
def _node(entry: int) -> int:
    return (entry & 0xFFFFFFFF) >> 1


@uncounted()
def _far(entry: int) -> Scalar:
    """The distance in an entry."""
    bits = entry >> 32
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return np.int32(bits).view(np.float32)


@uncounted()
def _next_mark(marks: Array) -> Scalar:
    """A mark that no node has."""
    mark = np.int64(marks[0]) + 1
    if mark > LAST_MARK:
        marks[:] = 0
        mark = np.int64(1)
    marks[0] = mark
    return mark


@uncounted()
def descend(
    vectors: Array, how: int, levels: Array, first: Array, upper: Array, queries: Array, entry: int, ends: Array
) -> None:
    """Algorithm 2 with ef = 1, layer by layer: where each query is then.

    ends: int32 (n_queries, layers above 0); ends[i, l] is where query i begins on layer l, having been above it.
    """
    for i in range(len(queries)):
        query = queries[i]
        at = _entry(_distance(vectors, how, entry, query), entry)
        for layer in range(levels[entry], 0, -1):
            moved = True
            while moved:
                moved = False
                row = first[_node(at)] + layer - 1
                for t in range(upper.shape[1]):
                    node = upper[row, t]
                    if node < 0:
                        break
                    other = _entry(_distance(vectors, how, node, query), node)
                    if other < at:
                        at = other
                        moved = True
            ends[i, layer - 1] = _node(at)


@uncounted()
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
    start, ahead = pool.ctypes.data, min(vectors.shape[1], AHEAD)
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
                for j in range(0, ahead, LINE):
                    prefetch(vectors, (neighbor, j))
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
            memmove(start + 8 * (low + 1), start + 8 * low, 8 * (n - 1 - low))
            pool[low] = entry
            at = min(at, low)
        while at < n and pool[at] & 1:
            at += 1
    return n


@uncounted()
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


@uncounted()
def explore(
    vectors: Array,
    how: int,
    levels: Array,
    first: Array,
    links: Array,
    upper: Array,
    nodes: Array,
    ends: Array,
    taken: Array,
    entry: int,
    ef: int,
    M: int,
    rule: int,
    marks: Array,
    pool: Array,
    fresh: Array,
    pruned: Array,
) -> None:
    """Algorithm 1, the searching half: fill the rows of these nodes. ends: theirs, from `descend`."""
    top = levels[entry]
    while True:
        i = take(taken)
        if i >= len(nodes):
            return
        node = nodes[i]
        query, level = vectors[node], min(levels[node], top)
        start = ends[i, level] if level < top else entry
        pool[0] = _entry(_distance(vectors, how, start, query), start)
        n = 1
        for layer in range(level, -1, -1):
            table = upper if layer else links
            for j in range(n):
                pool[j] &= ~1
            n = _search_layer(vectors, how, first, table, layer, query, pool, n, ef, marks, fresh)
            row = table[first[node] + layer - 1 if layer else node]
            row[_select(vectors, how, pool, n, M, rule, row, pruned) :] = -1


@uncounted()
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
    linked: Array,
    pool: Array,
    pruned: Array,
) -> None:
    """Algorithm 1, the linking half, for those neighbours whose number is `part` modulo `parts`."""
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
                for i in range(most):
                    linked[i] = row[i]
                linked[most] = node
                row[choose(vectors, how, neighbor, linked[: most + 1], most, rule, pool, row, pruned) :] = -1


@uncounted()
def choose(
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


@uncounted()
def distances(vectors: Array, how: int, query: Array, nodes: Array, result: Array) -> None:
    """Of these nodes from the query: result float32 (len(nodes),)."""
    for i in range(len(nodes)):
        result[i] = _distance(vectors, how, nodes[i], query)


@uncounted()
def search(
    vectors: Array,
    how: int,
    levels: Array,
    first: Array,
    links: Array,
    upper: Array,
    queries: Array,
    ends: Array,
    taken: Array,
    entry: int,
    ef: int,
    marks: Array,
    pool: Array,
    fresh: Array,
    near: Array,
    nodes: Array,
) -> None:
    """Algorithm 5, from where it begins on layer 0: fill near and nodes, (n_queries, k), k ≤ ef. ends: of `descend`."""
    while True:
        i = take(taken)
        if i >= len(queries):
            return
        query = queries[i]
        start = ends[i, 0] if levels[entry] else entry
        pool[0] = _entry(_distance(vectors, how, start, query), start)
        pool[1] = _entry(_distance(vectors, how, entry, query), entry)
        n = min(ef, 2 if start != entry else 1)
        n = _search_layer(vectors, how, first, links, 0, query, pool, n, ef, marks, fresh)
        for j in range(min(n, near.shape[1])):
            near[i, j], nodes[i, j] = _far(pool[j]), _node(pool[j])
