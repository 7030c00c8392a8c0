"""Scaling laws: the loss that a model of N parameters reaches after D tokens, and how to spend a budget on the two.

Hoffmann et al. ("Chinchilla") write the loss, in nats a token, as what no model can
avoid and two shortfalls, of a model too small and of data too few:

    L(N, D) = E + A/N^α + B/D^β

Training takes about C = 6·N·D FLOPs (a multiply-add for each parameter and token is 2,
and the backward pass costs twice the forward). The least loss for a given C is where
both shortfalls, times their exponents, are equal, αA/N^α = βB/D^β:

    N(C) = G·(C/6)^a,   D(C) = (C/6)^b / G,   a = β/(α+β),   b = α/(α+β),   G = (αA/βB)^(1/(α+β))

So if α and β are about equal, parameters and tokens grow alike, each with √C. Kaplan et
al. had concluded otherwise (N ∝ C^0.73); their law lets loss fall to zero,

    L(N) = (N_c/N)^α_N,   L(D) = (D_c/D)^α_D,   L(N, D) = ((N_c/N)^(α_N/α_D) + D_c/D)^α_D

and it counts N without embeddings.

Two ways to get the constants from runs (N, D, L):

- `fit`, "approach 3": least Σ Huber_δ(log L̂ − log L). On the log scale every run counts alike, and Huber's loss,
  quadratic below δ and linear above, keeps bad runs from bending the curve. With a = log A, b = log B, e = log E,
  log L̂ = logsumexp(a − α log N, b − β log D, e): smooth, but not convex, hence a grid of starts.
- `fit_isoflop`, "approach 2": at each of a few budgets, a parabola of L over log N; its lowest point is N(C), and a
  line through those on log-log paper gives a. It needs no law, but a parabola is right only near its lowest point.

Extrapolate with care: A and B are known far worse than the loss they predict, and
printed to two digits the exponents move the optimum at 10²⁴ FLOPs by tens of percent. Compare
`CHINCHILLA`, `CHINCHILLA_UNROUNDED` and `BESIROGLU`, all from the same runs.

Cost:
    `fit`: 4,500 evaluations of the objective, then L-BFGS from the best few; seconds for hundreds of runs.

Memory:
    starts × runs numbers while the grid is screened, in slices of a few MB.

Papers:
    Kaplan et al. 2020, arXiv:2001.08361 (equations 1.1, 1.2 and 1.5; Table 2; section 6 for N ∝ C^0.73).
    Hoffmann et al. 2022, arXiv:2203.15556 (sections 3.2 and 3.3, equation 10, appendix D.3).
    Besiroglu et al. 2024, arXiv:2404.10102 (approach 3 replicated and corrected).

See also:
    `mlsys.perf.transformer` (the FLOPs of a model exactly, instead of 6ND).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, cast

from mlsys.perf import _checks

if TYPE_CHECKING:
    import numpy as np

FLOPS_PER_PARAMETER_AND_TOKEN = 6


@dataclass(frozen=True)
class Chinchilla:
    """L(N, D) = E + A/N^α + B/D^β, nats a token; `source` is where the constants are printed."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    source: str = ""

    def __post_init__(self) -> None:
        _checks.amount("E", self.E)
        for name in ("A", "B", "alpha", "beta"):
            _checks.amount(name, getattr(self, name), positive=True)

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats a token after training `parameters` numbers on `tokens` tokens."""
        _checks.amount("parameters", parameters, positive=True)
        _checks.amount("tokens", tokens, positive=True)
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    @property
    def parameter_exponent(self) -> float:
        """The a of N ∝ C^a; tokens grow with 1 − a."""
        return self.beta / (self.alpha + self.beta)

    def compute_optimal(self, flops: float) -> tuple[float, float]:
        """Parameters and tokens of the least loss for a budget of C = 6·N·D FLOPs."""
        _checks.amount("flops", flops, positive=True)
        both = flops / FLOPS_PER_PARAMETER_AND_TOKEN
        balance = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        parameters = balance * both**self.parameter_exponent
        return parameters, both / parameters


@dataclass(frozen=True)
class Kaplan:
    """The power laws of Kaplan et al.: N counts parameters without embeddings; losses are in nats a token."""

    alpha_n: float
    n_c: float
    alpha_d: float
    d_c: float
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("alpha_n", "n_c", "alpha_d", "d_c"):
            _checks.amount(name, getattr(self, name), positive=True)

    def loss_of_parameters(self, parameters: float) -> float:
        """L(N): trained to convergence on unlimited data."""
        _checks.amount("parameters", parameters, positive=True)
        return (self.n_c / parameters) ** self.alpha_n

    def loss_of_tokens(self, tokens: float) -> float:
        """L(D): a model that is large enough, stopped before it overfits."""
        _checks.amount("tokens", tokens, positive=True)
        return (self.d_c / tokens) ** self.alpha_d

    def loss(self, parameters: float, tokens: float) -> float:
        """L(N, D): either limit of it is one of the two laws above."""
        _checks.amount("parameters", parameters, positive=True)
        _checks.amount("tokens", tokens, positive=True)
        return ((self.n_c / parameters) ** (self.alpha_n / self.alpha_d) + self.d_c / tokens) ** self.alpha_d


CHINCHILLA = Chinchilla(1.69, 406.4, 410.7, 0.34, 0.28, "Hoffmann et al. 2022, arXiv:2203.15556, equation 10")
CHINCHILLA_UNROUNDED = Chinchilla(
    1.6934, 406.4, 410.7, 0.3392, 0.2849, "Hoffmann et al. 2022, from the paper's TeX by Besiroglu et al. 2024, Table 1"
)
BESIROGLU = Chinchilla(
    1.8172, 482.01, 2085.43, 0.3478, 0.3658, "Besiroglu et al. 2024, arXiv:2404.10102, Table 1 (re-fit)"
)
# L(N) and L(D) were fitted apart from each other, L(N, D) at once: two sets of constants, each for its own use.
KAPLAN = Kaplan(0.076, 8.8e13, 0.095, 5.4e13, "Kaplan et al. 2020, arXiv:2001.08361, equations 1.1 and 1.2")
KAPLAN_JOINT = Kaplan(0.076, 6.4e13, 0.103, 1.8e13, "Kaplan et al. 2020, arXiv:2001.08361, Table 2")


# --- approach 3 -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """A law fitted to runs.

    law:        the constants found.
    objective:  Σ Huber_δ of the residuals of log L, at the constants found.
    residuals:  log of predicted over measured loss, one a run: 0.01 is 1%.
    converged:  how many of the `starts` ended at this objective, to a millionth of it: few is a warning.
    """

    law: Chinchilla
    objective: float
    residuals: tuple[float, ...]
    converged: int
    starts: int


# The grid of Hoffmann et al., appendix D.3: log A, log B, log E, α, β.
GRID = (
    (0.0, 5.0, 10.0, 15.0, 20.0, 25.0),
    (0.0, 5.0, 10.0, 15.0, 20.0, 25.0),
    (-1.0, -0.5, 0.0, 0.5, 1.0),
    (0.0, 0.5, 1.0, 1.5, 2.0),
    (0.0, 0.5, 1.0, 1.5, 2.0),
)


def fit(
    params: Sequence[float],
    tokens: Sequence[float],
    losses: Sequence[float],
    *,
    delta: float = 1e-3,
    starts: int = 16,
) -> Fit:
    """The Chinchilla law nearest to runs of `params` parameters, `tokens` tokens and final `losses` (nats a token).

    `delta` is where Huber's loss turns from quadratic to linear, as a share of the loss: 1e-3 is 0.1%. L-BFGS starts
    from the `starts` best points of `GRID`, of which 4,500 is all. Arrays will do as well as lists.
    Raises ValueError with fewer than 5 different runs, for values that are not positive, and for runs that all have
    the same size or the same number of tokens, which leaves exponents undetermined.
    """
    import numpy as np
    from scipy.optimize import minimize

    _checks.amount("delta", delta, positive=True)
    starts = _checks.whole("starts", starts)
    n, d, y = (_positive_logs(name, v) for name, v in (("params", params), ("tokens", tokens), ("losses", losses)))
    if not len(n) == len(d) == len(y):
        raise ValueError(f"params, tokens and losses must be equally long, got {len(n)}, {len(d)} and {len(y)}")
    if len(set(zip(n.tolist(), d.tolist()))) < 5:
        raise ValueError(f"{len(n)} runs: five constants need at least 5 of different size or tokens")
    for name, values in (("params", n), ("tokens", d)):
        if np.ptp(values) < 1e-9:
            raise ValueError(f"{name} are all equal: vary them, or its exponent cannot be known")

    # Around the middle of the data: log A and α are otherwise nearly the same direction, and L-BFGS crawls.
    middle_n, middle_d = n.mean(), d.mean()
    x_n, x_d = n - middle_n, d - middle_d
    grid = np.array(list(product(*GRID)))
    grid[:, 0] -= grid[:, 3] * middle_n
    grid[:, 1] -= grid[:, 4] * middle_d

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        residual, slope = _residuals(theta, x_n, x_d, y)
        # In units of δ², so that the optimizer's tolerances, which suppose numbers near 1, do not stop it early:
        # what Besiroglu et al. found to have happened to the published constants.
        value = _huber(residual, delta).sum() / delta**2
        return float(value), np.clip(residual, -delta, delta) @ slope / delta**2

    per_slice = max(1, 250_000 // len(y))
    values = np.concatenate(
        [
            _huber(_predicted(grid[i : i + per_slice], x_n, x_d) - y, delta).sum(-1)
            for i in range(0, len(grid), per_slice)
        ]
    )
    best = grid[np.argsort(values, kind="stable")[:starts]]
    options = {"maxiter": 5000, "maxfun": 10_000, "ftol": 1e-12, "gtol": 1e-9}
    results = [minimize(objective, start, jac=True, method="L-BFGS-B", options=options) for start in best]
    chosen = min(results, key=lambda result: result.fun)
    a, b, e, alpha, beta = (float(value) for value in chosen.x)
    if alpha <= 0 or beta <= 0:
        raise ValueError(
            f"the best fit has alpha={alpha:.3g} and beta={beta:.3g}, and loss that does not fall with both sizes: "
            "check the runs, or vary params and tokens more"
        )
    residual, _ = _residuals(chosen.x, x_n, x_d, y)
    found = float(chosen.fun) * delta**2
    return Fit(
        law=Chinchilla(
            E=math.exp(e), A=math.exp(a + alpha * middle_n), B=math.exp(b + beta * middle_d), alpha=alpha, beta=beta
        ),
        objective=found,
        residuals=tuple(float(value) for value in residual),
        converged=sum(bool(result.fun * delta**2 <= found * (1 + 1e-6) + 1e-12 * delta) for result in results),
        starts=len(results),
    )


def _predicted(theta: np.ndarray, x_n: np.ndarray, x_d: np.ndarray) -> np.ndarray:
    """Predicted log L for each row of constants (starts, 5) and each run: (starts, runs)."""
    import numpy as np

    a, b, e, alpha, beta = theta.T[:, :, None]
    return cast("np.ndarray", np.logaddexp(np.logaddexp(a - alpha * x_n, b - beta * x_d), e))


def _residuals(theta: np.ndarray, x_n: np.ndarray, x_d: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Predicted less measured log L (runs,), and its derivative by the five constants (runs, 5)."""
    import numpy as np

    a, b, e, alpha, beta = theta
    terms = np.stack([a - alpha * x_n, b - beta * x_d, np.full_like(y, e)])  # (3, runs)
    total = np.logaddexp(np.logaddexp(terms[0], terms[1]), terms[2])
    share = np.exp(terms - total)  # softmax: the derivative of logsumexp
    slope = np.stack([share[0], share[1], share[2], -share[0] * x_n, -share[1] * x_d], axis=-1)
    return total - y, slope


def _huber(residual: np.ndarray, delta: float) -> np.ndarray:
    import numpy as np

    size = np.abs(residual)
    return cast("np.ndarray", np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta)))


# --- approach 2 -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IsoFlop:
    """N(C) = coefficient · C^exponent, through the lowest points of parabolas.

    budgets: FLOPs of each group of runs (their geometric mean), ascending. optima: parameters at its lowest point.
    """

    coefficient: float
    exponent: float
    budgets: tuple[float, ...]
    optima: tuple[float, ...]

    def compute_optimal(self, flops: float) -> tuple[float, float]:
        """Parameters and tokens for a budget of C = 6·N·D FLOPs."""
        _checks.amount("flops", flops, positive=True)
        parameters = self.coefficient * flops**self.exponent
        return parameters, flops / FLOPS_PER_PARAMETER_AND_TOKEN / parameters


SAME_BUDGET = 0.01  # of log C


def fit_isoflop(flops: Sequence[float], params: Sequence[float], losses: Sequence[float]) -> IsoFlop:
    """N(C) from runs in groups of about equal `flops` that differ in `params`: at least 2 budgets, 3 sizes each.

    A run's tokens are a whole number, often of whole batches, so its 6·N·D is only near its budget. In order of
    `flops`, a new budget begins where they rise by more than 1%, `SAME_BUDGET`, from one run to the next.
    Raises ValueError, naming the budget, where the losses have no lowest point inside the sizes tried.
    """
    import numpy as np

    c, n, y = (_positive_logs(name, v) for name, v in (("flops", flops), ("params", params), ("losses", losses)))
    if not len(c) == len(n) == len(y):
        raise ValueError(f"flops, params and losses must be equally long, got {len(c)}, {len(n)} and {len(y)}")
    order = np.argsort(c, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(c[order]) > SAME_BUDGET) + 1)
    if len(groups) < 2:
        raise ValueError(
            "flops are all within 1% of the next, which makes 1 budget of them: a power law needs at least 2 budgets"
        )
    budgets = np.array([c[runs].mean() for runs in groups])
    optima = []
    for budget, runs in zip(budgets, groups, strict=True):
        sizes, group = n[runs], np.exp(y[runs])
        where = f"flops={math.exp(budget):.4g}"
        if len(np.unique(sizes)) < 3:
            raise ValueError(f"{where}: a parabola needs at least 3 sizes of model, got {len(np.unique(sizes))}")
        middle = sizes.mean()
        curvature, slope, _ = np.polyfit(sizes - middle, group, 2)
        lowest = middle - slope / (2 * curvature) if curvature > 0 else math.inf
        if not sizes.min() <= lowest <= sizes.max():
            raise ValueError(f"{where}: the losses have no lowest point between the sizes tried; try others")
        optima.append(lowest)
    exponent, intercept = np.polyfit(budgets, optima, 1)
    return IsoFlop(
        coefficient=math.exp(intercept),
        exponent=float(exponent),
        budgets=tuple(math.exp(budget) for budget in budgets),
        optima=tuple(math.exp(optimum) for optimum in optima),
    )


def _positive_logs(name: str, values: Sequence[float]) -> np.ndarray:
    import numpy as np

    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} must be a list of numbers, got shape {array.shape}")
    if not (np.isfinite(array) & (array > 0)).all():
        raise ValueError(f"{name} must be positive and finite, got {array[~(np.isfinite(array) & (array > 0))][0]}")
    return np.log(array)
