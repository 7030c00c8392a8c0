"""Published numbers about scaling laws: how large a model should be for a budget, and how long it should train."""

from __future__ import annotations

from math import log

from mlsys.claims.core import Claim
from mlsys.perf import scaling_laws

CHINCHILLA = "Hoffmann et al. 2022, arXiv:2203.15556"


def optimal_exponent(law: scaling_laws.Chinchilla) -> float:
    """The a of N_opt ∝ C^a, from two optima found a thousandfold apart."""
    (small, _), (large, _) = (law.compute_optimal(c) for c in (1e21, 1e24))
    return log(large / small) / log(1e3)


def refit_tokens() -> float:
    """Tokens for each parameter that the re-fitted law wants at Gopher's budget."""
    parameters, tokens = scaling_laws.BESIROGLU.compute_optimal(5.76e23)
    return tokens / parameters


LAWS = [
    Claim(
        name="chinchilla-exponent",
        area="perf.scaling_laws",
        source=f"{CHINCHILLA}, Table 2, approach 3",
        what="a of N ∝ C^a, minimising the fitted loss",
        unit="",
        published=0.46,
        digits=2,
        compute=lambda: optimal_exponent(scaling_laws.CHINCHILLA),
        tolerance=0.03,
        expected="approximate",
        reason="the printed α and β have two digits",
    ),
    Claim(
        name="chinchilla-refit-tokens",
        area="perf.scaling_laws",
        source=f"{CHINCHILLA}, section 4 (Chinchilla: 70 B parameters, 1.4 T tokens)",
        what="tokens for each parameter: Chinchilla's own; ours by the law that Besiroglu et al. 2024 fitted again",
        unit="",
        published=20,
        digits=0,
        compute=refit_tokens,
        tolerance=0.10,
        expected="approximate",
        reason="the re-fit (arXiv:2404.10102) is of the same runs; Chinchilla followed the first two approaches",
    ),
]
