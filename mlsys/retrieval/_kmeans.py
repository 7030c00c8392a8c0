"""K-means: n centroids such that the vectors lie near theirs, by Lloyd's algorithm.

Two steps in turn: each vector goes to its nearest centroid; each centroid moves to
the mean of its vectors. Neither can increase the sum of squared distances. Then:

- It starts from n of the vectors, by k-means++: each next one is drawn with
  probability proportional to its squared distance from those already chosen, so
  that no group is left without. That is n passes; 16 vectors a centroid are looked
  at. For more than 256 centroids it is a plain random sample.
- A centroid that no vector is nearest to is put beside that of the largest
  cluster, which so splits in two.
- Some hundred vectors a centroid are enough to place it: of more, a sample is
  taken. All that is drawn comes from `seed`.

Papers:
    Lloyd 1982, "Least Squares Quantization in PCM" (the two steps).
    Arthur & Vassilvitskii 2007, "k-means++: The Advantages of Careful Seeding" (the start).

See also:
    `ivf` (centroids of inverted lists), `pq` (codebooks).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csc_array

TILE = 1 << 17  # estimates held at once, vectors × centroids: half a megabyte stays in the second-level cache
SPLIT = 2.0**-10  # how far apart two centroids are put, relative to their coordinates
CAREFUL = 256  # centroids, at most, that are started by k-means++
LOOKED_AT = 16  # vectors a centroid that k-means++ chooses from


def kmeans(
    x: np.ndarray,
    n: int,
    *,
    seed: int | Sequence[int],
    iterations: int = 10,
    points: int = 256,
) -> np.ndarray:
    """`n` centroids of `x` (at least n vectors), float32 (n, d).

    points: vectors a centroid that are used, at most; of more, a sample.
    """
    rng = np.random.default_rng(seed)
    if len(x) > n * points:
        x = x[np.sort(rng.choice(len(x), n * points, replace=False))]
    # Around their mean, the products that `nearest` takes cancel least.
    middle = x.mean(axis=0, dtype=np.float64).astype(np.float32)
    x = x - middle
    start = x[np.sort(rng.choice(len(x), min(len(x), n * (LOOKED_AT if n <= CAREFUL else 1)), replace=False))]
    centroids = _plus_plus(start, n, rng) if n <= CAREFUL else start
    for _ in range(iterations):
        centroids = moved(x, nearest(x, centroids), centroids)
    return centroids + middle


def nearest(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The nearest centroid of each vector, int64 (len(x),): the first of equals, up to rounding in float32."""
    middle = centroids.mean(axis=0, dtype=np.float64).astype(np.float32)
    c = centroids - middle
    # ½‖c‖² − ⟨x, c⟩ as one product: a coordinate more, 1 in x and ½‖c‖² in c.
    c = np.concatenate([-c, 0.5 * np.einsum("nd,nd->n", c, c)[:, None]], axis=1).T
    found = np.empty(len(x), np.int64)
    step = min(max(1, TILE // c.shape[1]), len(x))
    ones, room = np.ones((step, len(c)), np.float32), np.empty((step, c.shape[1]), np.float32)
    for at in range(0, len(x), step):
        piece = x[at : at + step]
        longer, estimates = ones[: len(piece)], room[: len(piece)]
        np.subtract(piece, middle, out=longer[:, :-1])
        np.matmul(longer, c, out=estimates).argmin(axis=1, out=found[at : at + step])
    return found


def moved(x: np.ndarray, nearest: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Each centroid at the mean of its vectors; one without vectors beside that of a large cluster."""
    sizes = np.bincount(nearest, minlength=len(centroids))
    # Who belongs to whom, as a matrix with one 1 in each column: its product with x adds up each cluster in one pass.
    belongs = csc_array((np.ones(len(x), np.float32), nearest, np.arange(len(x) + 1)), (len(centroids), len(x)))
    new = np.where(sizes[:, None] > 0, belongs @ x / np.maximum(sizes, 1)[:, None].astype(np.float32), centroids)
    for empty in np.flatnonzero(sizes == 0):
        largest = sizes.argmax()
        apart = np.where(np.arange(new.shape[1]) % 2, np.float32(SPLIT), np.float32(-SPLIT)) * new[largest]
        new[empty], new[largest] = new[largest] + apart, new[largest] - apart
        sizes[empty] = sizes[largest] // 2
        sizes[largest] -= sizes[empty]
    return new


def _plus_plus(x: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    chosen = [int(rng.integers(len(x)))]
    squares = np.einsum("nd,nd->n", x, x)
    far = np.full(len(x), np.inf, np.float32)  # squared distance to the nearest chosen one
    while len(chosen) < n:
        last = chosen[-1]
        far = np.minimum(far, np.maximum(squares + squares[last] - 2 * (x @ x[last]), 0))
        far[last] = 0
        total = far.cumsum(dtype=np.float64)
        # With fewer distinct vectors than centroids all are chosen by now, and any will do.
        place = (
            np.searchsorted(total, rng.random() * total[-1], side="right") if total[-1] > 0 else rng.integers(len(x))
        )
        chosen.append(min(int(place), len(x) - 1))
    return x[chosen]
