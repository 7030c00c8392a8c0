"""The best k hits, compiled: a heap of distances and ids whose top is the worst, so that a nearer hit replaces it.

Either it is filled with places at distance ∞ and the id NO_ID, which rank behind every
hit, and a hit always takes the place of the top (`sink`); or it grows (`push`). At the
end `sort` turns it into a list. Equal distances are ordered by id.

See also:
    `_collect_numba`, `pq_numba`, `bm25_numba` (which use it; a score is a distance with the other sign).
"""

from __future__ import annotations

import numpy as np

from mlsys.compiled import uncounted

Array = np.ndarray
NO_ID = np.int64(2**63 - 1)  # of an empty place: behind every hit at the same distance


@uncounted()
def worse(distance: float, id_: int, other: float, other_id: int) -> bool:
    """Whether the first hit ranks behind the other."""
    return distance > other or (distance == other and id_ > other_id)


@uncounted()
def push(distances: Array, ids: Array, size: int, distance: float, id_: int) -> int:
    """Add a hit to the heap of the first `size`; if that is all, in place of the top. How many it holds then."""
    if size == len(ids):
        sink(distances, ids, size, distance, id_)
        return size
    at = size
    while at > 0:  # up, past parents that are nearer
        parent = (at - 1) >> 1
        if not worse(distance, id_, distances[parent], ids[parent]):
            break
        distances[at], ids[at] = distances[parent], ids[parent]
        at = parent
    distances[at], ids[at] = distance, id_
    return size + 1


@uncounted()
def sink(distances: Array, ids: Array, size: int, distance: float, id_: int) -> None:
    """Put a hit in place of the top of the first `size`, and let it sink below children that are worse."""
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and worse(distances[child + 1], ids[child + 1], distances[child], ids[child]):
            child += 1
        if not worse(distances[child], ids[child], distance, id_):
            break
        distances[at], ids[at] = distances[child], ids[child]
        at = child
    distances[at], ids[at] = distance, id_


@uncounted()
def sort(distances: Array, ids: Array) -> None:
    """Turn the heap into a list, nearest first: take the worst off the top, and put it where the heap ended."""
    for end in range(len(ids) - 1, 0, -1):
        distance, id_ = distances[0], ids[0]
        sink(distances, ids, end, distances[end], ids[end])
        distances[end], ids[end] = distance, id_
