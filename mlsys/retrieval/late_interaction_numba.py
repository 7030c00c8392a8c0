"""MaxSim, with the maximum and the sum compiled: the same results as `late_interaction`.

The matrix product is the same call. What follows it in NumPy are two passes that make
arrays between them; here each row of products is folded into its document's running
maxima as a few vector instructions, and their sums go straight to the scores. So a
block's products are read once, while they are still in the cache.

Cost:
    `late_interaction`'s; the comparisons take 8 or 16 products at once.

Memory:
    `late_interaction`'s, less the maxima: 4 bytes a query token in place of 4 a query token and document of the block.

Papers:
    Khattab & Zaharia 2020, arXiv:2004.12832, section 3.3, equation 3 (MaxSim).
    Santhanam et al. 2022, arXiv:2205.09707, section 4.5 (a compiled MaxSim over packed tokens).

See also:
    `late_interaction` (the readable version, with the formulas).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from mlsys.retrieval import late_interaction

Array = np.ndarray


class LateInteraction(late_interaction.LateInteraction):
    """`late_interaction.LateInteraction` with a compiled reduction: same methods, results, and index files.

    The first call in a process loads the compiled code, the first ever compiles it (a second or two).
    """

    def _reduce(self, products: np.ndarray, starts: np.ndarray, asked: np.ndarray, scores: np.ndarray) -> None:
        _max_then_sum(products, starts, asked, scores)


# The flag says that no product is NaN, so that a maximum may be taken many at a time. Sums keep their order.
@njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def _max_then_sum(products: Array, starts: Array, asked: Array, scores: Array) -> None:
    """Products (B, T), rows by document as in starts, columns by query as in asked → scores (n_queries, n)."""
    n_tokens = products.shape[1]
    best = np.empty(n_tokens, np.float32)
    for document in range(len(starts) - 1):
        best[:] = products[starts[document]]
        for row in range(starts[document] + 1, starts[document + 1]):
            for token in range(n_tokens):
                best[token] = max(best[token], products[row, token])
        for query in range(len(asked) - 1):
            total = 0.0
            for token in range(asked[query], asked[query + 1]):
                total += np.float64(best[token])
            scores[query, document] = total
