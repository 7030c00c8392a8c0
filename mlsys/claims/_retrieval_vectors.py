"""Published statements about exact search, inverted lists and product quantization, on vectors that are drawn."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from mlsys.claims.core import Claim

JEGOU = "Jégou, Douze & Schmid 2011, TPAMI 33(1)"
GE = "Ge, He, Ke & Sun 2013, CVPR"
JOHNSON = "Johnson, Douze & Jégou 2019, arXiv:1702.08734"


def gaussian(n: int, d: int) -> np.ndarray:
    """Vectors whose coordinates vary more and more, and are mixed: what a cut after every d/m of them does not suit."""
    rng = np.random.default_rng(0)
    mixed = np.linalg.qr(rng.standard_normal((d, d)))[0] * np.exp(-np.arange(d) / 8)[:, None]
    return (rng.standard_normal((n, d)) @ mixed).astype(np.float32)


@cache
def distortion(opq: bool) -> float:
    """Mean ‖x − x̂‖² of 8 codes of 6 bits, for 4000 Gaussian vectors of dimension 32."""
    from mlsys.retrieval.pq import PQ

    x = gaussian(4000, 32)
    index: Any = PQ(m=8, bits=6, opq=opq).fit(x)
    return float(((x - index.decode(index.codes_)) ** 2).sum(axis=1).mean())


def code_bytes() -> float:
    """Bytes that a vector takes in a PQ index, without its id."""
    from mlsys.retrieval.pq import PQ

    x = gaussian(600, 128)
    return PQ(m=x.shape[1] // 16).fit(x).codes_.nbytes / len(x)


def codebook_entries() -> float:
    """Numbers in the codebooks of 8 parts and 8 bits, d = 128."""
    from mlsys.retrieval.pq import PQ

    return float(PQ(m=8, bits=8).fit(gaussian(600, 128)).quantizer_.codebooks.size)


def probed_everywhere() -> float:
    """How many of the 10 nearest differ between brute force and IVF, if all lists are probed."""
    from mlsys.retrieval.exact import Exact
    from mlsys.retrieval.ivf import IVF

    x = gaussian(2000, 32)
    _, want = Exact().fit(x).search(x[:50], 10)
    _, got = IVF(n_lists=32).fit(x).search(x[:50], 10, n_probe=32)
    return float((want != got).sum())


def decomposed() -> float:
    """Largest difference of the distances by tables of terms and those of decoded vectors, relative."""
    from mlsys.retrieval.ivfpq import IVFPQ

    x = gaussian(3000, 32)
    index = IVFPQ(n_lists=16, m=8, bits=6).fit(x)
    near, ids = index.search(x[:50], 10, n_probe=16)
    true = ((x[:50, None] - index.reconstruct()[ids]) ** 2).sum(axis=2)
    return round(float(np.abs(near - true).max() / true.max()), 5)


def near_duplicate_error() -> float:
    """Distance, of vectors around 10⁴ to themselves, as brute force returns it."""
    from mlsys.retrieval.exact import Exact

    x = gaussian(500, 64) + np.float32(1e4)
    near, _ = Exact().fit(x).search(x, 1)
    return float(near.max())


CLAIMS = [
    Claim(
        name="exact-decomposed-distance",
        area="retrieval.exact",
        source=f"{JOHNSON}, §5.1 (‖x‖² + ‖y‖² − 2⟨x, y⟩ as a matrix product); exact arithmetic gives 0",
        what="distance of a vector around 10⁴ to itself, found by that product and computed again",
        unit="",
        published=0.0,
        digits=6,
        compute=near_duplicate_error,
        formula=True,
    ),
    Claim(
        name="ivf-all-probed-is-exact",
        area="retrieval.ivf",
        source=f"{JEGOU}, §IV (w lists are scanned; with all of them nothing is left out)",
        what="of 500 nearest neighbours, those that differ from brute force when every list is probed",
        unit="neighbours",
        published=0,
        digits=0,
        compute=probed_everywhere,
        formula=True,
    ),
    Claim(
        name="pq-code-length",
        area="retrieval.pq",
        source=f"{JEGOU}, §II-B (m log₂ k* bits: 64 for m = 8, k* = 256)",
        what="bytes that one more vector of dimension 128 takes, without its id",
        unit="bytes",
        published=8,
        digits=0,
        compute=code_bytes,
    ),
    Claim(
        name="pq-codebook-size",
        area="retrieval.pq",
        source=f"{JEGOU}, Table I (k* · D numbers for a product quantizer)",
        what="numbers in the codebooks of m = 8 parts of 256 centroids each, D = 128",
        unit="numbers",
        published=256 * 128,
        digits=0,
        compute=codebook_entries,
        formula=True,
    ),
    Claim(
        name="opq-lowers-distortion",
        area="retrieval.pq",
        source=f"{GE}, abstract (the rotation lowers the distortion that PQ leaves); 1 if it does",
        what="1 if a learned rotation lowers the mean ‖x − x̂‖² of correlated Gaussian vectors",
        unit="",
        published=1,
        digits=0,
        compute=lambda: float(distortion(True) < distortion(False)),
    ),
    Claim(
        name="ivfpq-three-terms",
        area="retrieval.ivfpq",
        source=f"{JOHNSON}, §5.2 (the distance to a residual code as the sum of three terms)",
        what="largest difference of that sum and the distance to the decoded vector, of the largest distance",
        unit="",
        published=0.0,
        digits=4,
        compute=decomposed,
        formula=True,
    ),
]
