"""Published numbers about the loss over a large vocabulary."""

from __future__ import annotations

from mlsys.claims.core import Claim

CUT = "Wijmans et al. 2024, arXiv:2411.09009, Table 1 (Gemma 2, 2B)"
ROWS, VOCABULARY, WIDTH, ITEMSIZE = 8192, 256_000, 2304, 2
MIB = 1 << 20


def mebibytes(what: str) -> float:
    """Of `cross_entropy.peak_bytes`, for the tokens and the head of that table."""
    from mlsys.kernels.cross_entropy import peak_bytes

    return peak_bytes(ROWS, VOCABULARY, WIDTH, ITEMSIZE)[what] / MIB


CLAIMS = [
    Claim(
        name="cross-entropy-whole",
        area="kernels.cross_entropy",
        source=f"{CUT}, loss and gradient of the baseline",
        what="logits, log-softmax and its gradient of 8192 tokens and 256,000 words, in two operations",
        unit="MB",
        published=28_000,
        digits=0,
        compute=lambda: mebibytes("whole"),
    ),
    Claim(
        name="cross-entropy-least",
        area="kernels.cross_entropy",
        source=f"{CUT}, lower bound",
        what="the gradients of hidden and weight alone, which any way must hold",
        unit="MB",
        published=1161,
        digits=0,
        compute=lambda: mebibytes("gradients"),
    ),
]
