"""Product quantization, compiled: the same index and the same results as `pq`, faster.

Scanning codes is m table look-ups a vector, and nothing else is worth as much care:

- A table of 16 · 256 floats is 16 KB: it stays in the first-level cache, where
  two look-ups a cycle are possible.
- The sum of one vector is a chain of additions, each waiting for the one before.
  So 4 vectors are summed side by side, and their chains overlap.
- 8 code bytes are read as one 64-bit word, and shifted apart.
- A distance is compared with the k-th best so far, and nearly always discarded.

What is out of reach here is faiss's FastScan: with 4-bit codes a table of 16 bytes
fits into a register, and one shuffle instruction looks up 32 vectors at once. It
has no counterpart in plain loops that a compiler could find.

Cost:
    As `pq`: m look-ups a vector, each a few tenths of a nanosecond.

Memory:
    As `pq`.

Papers:
    Those of `pq`. André, Kermarrec & Le Scouarnec 2015, "Cache Locality Is Not Enough", PVLDB (the shuffle, §4).

See also:
    `pq` (the readable version), `ivfpq_numba` (the same loop over lists).
"""

from __future__ import annotations

import sys

import numpy as np

from mlsys.compiled import uncounted
from mlsys.retrieval import pq
from mlsys.retrieval._heap_numba import NO_ID, sink, sort, worse

Array = np.ndarray

NONE = np.empty(0, np.bool_)
BLOCK = 256  # vectors whose distances are held at once


class PQ(pq.PQ):
    """`pq.PQ`, compiled: same arguments, methods, results, and index files.

    The first search in a process loads compiled code (a fraction of a second), the first ever compiles it (seconds).
    """

    def _scan(self, queries: Array, k: int, allowed: Array | None, distances: Array, ids: Array) -> None:
        parts, across = books_across(self.quantizer_, queries)
        base = 1.0 if self.metric == "cosine" else 0.0
        codes = self._codes.view
        mask = NONE if allowed is None else allowed
        ids[:] = NO_ID
        room = np.empty(across[..., 0, :].size, np.float32), np.empty(BLOCK, np.float32)
        rows = np.arange(len(codes), dtype=np.int32)
        _scan(
            parts, across, self.metric == "l2", codes, words(codes), base, self._ids, rows, mask, *room, distances, ids
        )
        ids[ids == NO_ID] = -1


def books_across(quantizer: pq.Quantizer, queries: Array) -> tuple[Array, Array]:
    """What `fill` makes tables of: the queries' parts (n_queries, m, d/m), and the codebooks (m, d/m, 2^bits)."""
    parts = np.ascontiguousarray(quantizer.parts(queries))
    return parts, np.ascontiguousarray(quantizer.codebooks.transpose(0, 2, 1))


def words(codes: Array) -> Array:
    """The codes, 8 in each uint64; without any if they do not come in eights."""
    if codes.shape[1] % 8 or sys.byteorder != "little":
        return np.empty((0, 0), np.uint64)
    return codes.view(np.uint64)


@uncounted()
def fill(parts: Array, across: Array, squared: bool, table: Array) -> None:
    """One query's row of `Quantizer.tables`, summed in the same order: parts (m, d/m), table (m · 2^bits,)."""
    m, width, size = across.shape
    for j in range(m):
        row = table[j * size : (j + 1) * size]
        row[:] = 0
        done = 0 if squared else width - width % 4
        for t in range(0, done, 4):  # four steps for each time that the row is read and written
            a, b, c, d = parts[j, t], parts[j, t + 1], parts[j, t + 2], parts[j, t + 3]
            book_a, book_b, book_c, book_d = across[j, t], across[j, t + 1], across[j, t + 2], across[j, t + 3]
            for v in range(size):
                row[v] = (((row[v] - a * book_a[v]) - b * book_b[v]) - c * book_c[v]) - d * book_d[v]
        for t in range(done, width):
            value, book = parts[j, t], across[j, t]
            if squared:
                for v in range(size):
                    step = value - book[v]
                    row[v] += step * step
            else:
                for v in range(size):
                    row[v] -= value * book[v]


@uncounted()
def _scan(
    parts: Array,
    across: Array,
    squared: bool,
    codes: Array,
    packed: Array,
    base: float,
    ids: Array,
    rows: Array,
    allowed: Array,
    table: Array,
    room: Array,
    distances: Array,
    found: Array,
) -> None:
    """Fill distances (∞ so far) and found (NO_ID so far), (n_queries, k). table, room: for one query, for one block."""
    size = across.shape[2]
    for q in range(len(parts)):
        fill(parts[q], across, squared, table)
        for at in range(0, len(codes), BLOCK):
            n = min(BLOCK, len(codes) - at)
            room[:n] = base
            add_up(table, size, codes, packed, at, room[:n])
            near = allowed[at : at + n] if len(allowed) else allowed
            keep(room[:n], ids, rows[at : at + n], near, distances[q], found[q])
        sort(distances[q], found[q])


@uncounted()
def add_up(table: Array, size: int, codes: Array, packed: Array, at: int, out: Array) -> None:
    """out[i] += Σ_j table[j · size + codes[at + i, j]], j in order: four vectors side by side."""
    n, m = len(out), codes.shape[1]
    mask = np.uint64(255)
    done = n - n % 4
    if packed.shape[0]:
        for i in range(0, done, 4):
            a, b, c, d = out[i], out[i + 1], out[i + 2], out[i + 3]
            first = np.uint64(0)
            for w in range(packed.shape[1]):
                wa, wb, wc, wd = packed[at + i, w], packed[at + i + 1, w], packed[at + i + 2, w], packed[at + i + 3, w]
                for _ in range(8):
                    a += table[first + (wa & mask)]
                    b += table[first + (wb & mask)]
                    c += table[first + (wc & mask)]
                    d += table[first + (wd & mask)]
                    wa >>= np.uint64(8)
                    wb >>= np.uint64(8)
                    wc >>= np.uint64(8)
                    wd >>= np.uint64(8)
                    first += np.uint64(size)
            out[i], out[i + 1], out[i + 2], out[i + 3] = a, b, c, d
    else:
        done = 0
    for i in range(done, n):
        total = out[i]
        for j in range(m):
            total += table[j * size + codes[at + i, j]]
        out[i] = total


@uncounted()
def keep(totals: Array, ids: Array, rows: Array, allowed: Array, distances: Array, found: Array) -> None:
    """Put hits into the heap of the k best where they are better than its worst. ids: by row, rows: of each hit."""
    bar = distances[0]
    for i in range(len(totals)):
        if totals[i] <= bar and (not len(allowed) or allowed[i]):
            id_ = ids[rows[i]]
            if worse(bar, found[0], totals[i], id_):
                sink(distances, found, len(found), totals[i], id_)
                bar = distances[0]
