"""Exercises that need no model: the roofline of a matmul, and the size of a model for a budget."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from decimal import Decimal, localcontext
from functools import cache

from mlsys.contracts._perf_formula import Formula, wrong
from mlsys.contracts.core import Case
from mlsys.perf import roofline, scaling_laws
from mlsys.perf.hardware import Hardware

# --- roofline ---------------------------------------------------------------------------------------------------------


def _matmul(m: int, n: int, k: int, itemsize: float, peak: float, bandwidth: float) -> tuple[float, str]:
    machine = Hardware("any", peak={"float32": peak}, bandwidth=bandwidth, memory=1)
    bound = roofline.bound(*roofline.matmul_work(m, n, k, itemsize), machine, "float32")
    return bound.seconds, bound.side


def _matmul_oracle(m: int, n: int, k: int, itemsize: float, peak: float, bandwidth: float) -> tuple[float, str]:
    """The least time in which the machine can do all FLOPs and, at once, move all numbers: found by halving."""
    flops, moved = 0, m * k + k * n  # each input once
    for _ in range(m * n):
        flops += k + k  # products, and their additions to the sum
        moved += 1  # the sum, when it is done

    def too_short(seconds: float) -> tuple[bool, bool]:
        return peak * seconds < flops, bandwidth * seconds < itemsize * moved

    low, high = 0.0, 1.0
    while any(too_short(high)):
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if any(too_short(middle)) else (low, middle)
    return high, "compute" if too_short(low)[0] else "memory"


def _matmul_plain(
    m: int,
    n: int,
    k: int,
    itemsize: float,
    peak: float,
    bandwidth: float,
    *,
    flops_each: int = 2,
    elements: Callable[[int, int, int], int] = lambda m, n, k: m * k + k * n + m * n,
    bytes_each: float | None = None,
    combine: Callable[[float, float], float] = max,
    giga: float = 1.0,
    turned: bool = False,
) -> tuple[float, str]:
    compute = flops_each * m * n * k / peak
    memory = elements(m, n, k) * (itemsize if bytes_each is None else bytes_each) / (bandwidth * giga)
    return combine(compute, memory), "compute" if (compute > memory) != turned else "memory"


def _matmul_case(m: int, n: int, k: int, itemsize: float, peak: float, bandwidth: float) -> Case:
    return {"m": m, "n": n, "k": k, "itemsize": itemsize, "peak": peak, "bandwidth": bandwidth}


def _draw_matmul(rng: random.Random) -> Case:
    m, n, k = (rng.randint(1, 100) for _ in range(3))
    itemsize = rng.choice([0.5, 1, 2, 4, 8])
    ridge = 2 * m * n * k / (itemsize * (m * k + k * n + m * n)) * rng.choice([0.5, 0.8, 1.3, 3.0])
    return _matmul_case(m, n, k, itemsize, ridge * 1e12, 1e12)


ROOFLINE = Formula(
    signature="matmul_bound(m, n, k, itemsize, peak, bandwidth) -> (seconds, side), the side 'compute' or 'memory'",
    results=("seconds", "side"),
    words={"side": ("compute", "memory")},
    reference=_matmul,
    oracle=_matmul_oracle,
    draw=_draw_matmul,
    cases=[
        _matmul_case(2, 3, 4, 1, 10, 1000),
        _matmul_case(2, 3, 4, 1, 1000, 10),
        _matmul_case(1, 5, 7, 4, 100.0, 100.0),
        _matmul_case(64, 96, 128, 2, 2e3, 1e3),
        _matmul_case(10, 100, 10, 2, 5.2e3, 1e3),  # memory, but compute without the output matrix
        _matmul_case(40, 30, 50, 2, 5e3, 1e3),
        _matmul_case(1, 4096, 4096, 2, 989.4e12, 3.35e12),  # one token on an H100 in bfloat16
        _matmul_case(16, 2048, 2048, 0.5, 989.4e12, 3.35e12),
    ],
    wrong={
        "multiply_add_as_one": wrong(
            _matmul_plain, "a multiply-add is two FLOPs, as peaks are printed: 2·m·n·k for a matmul", flops_each=1
        ),
        "elements_as_bytes": wrong(_matmul_plain, "multiply the numbers moved by itemsize, to get bytes", bytes_each=1),
        "always_float32": wrong(
            _matmul_plain, "take the bytes of a number from itemsize; they are not always 4", bytes_each=4
        ),
        "output_forgotten": wrong(
            _matmul_plain,
            "the m × n result is written to memory: it counts too",
            elements=lambda m, n, k: m * k + k * n,
        ),
        "weights_only": wrong(
            _matmul_plain,
            "activations move as well as the k × n weights: m × k come in",
            elements=lambda m, n, k: k * n,
        ),
        "nothing_reused": wrong(
            _matmul_plain,
            "the bound moves each matrix once; reading both factors for every product is the worst case",
            elements=lambda m, n, k: 2 * m * n * k + m * n,
        ),
        "times_added": wrong(
            _matmul_plain,
            "arithmetic and traffic can run at once: the slower one decides, they do not add up",
            combine=lambda a, b: a + b,
        ),
        "the_faster_decides": wrong(_matmul_plain, "the slower of the two decides: the largest time", combine=min),
        "side_turned": wrong(
            _matmul_plain, "the side that binds is the one that takes longer; the other one waits", turned=True
        ),
        "gib_for_gb": wrong(
            _matmul_plain,
            "bandwidth is in bytes a second already, and a GB is 10⁹ bytes: no factor of 1024 belongs here",
            giga=1024**3 / 1e9,
        ),
    },
)


# --- scaling laws -----------------------------------------------------------------------------------------------------


def _optimal(flops: float, E: float, A: float, B: float, alpha: float, beta: float) -> tuple[float, float]:
    return scaling_laws.Chinchilla(E, A, B, alpha, beta).compute_optimal(flops)


@cache
def _optimal_oracle(flops: float, E: float, A: float, B: float, alpha: float, beta: float) -> tuple[float, float]:
    """The lowest loss along 6·N·D = flops, by golden sections over log N with 40 digits."""
    with localcontext() as context:
        context.prec = 40
        e, a, b, x, y = (Decimal(value) for value in (E, A, B, alpha, beta))
        log_both = (Decimal(flops) / 6).ln()

        def loss(log_n: Decimal) -> Decimal:
            return e + a * (-x * log_n).exp() + b * (-y * (log_both - log_n)).exp()

        golden = (Decimal(5).sqrt() - 1) / 2
        low, high = Decimal(0), log_both
        left, right = high - golden * (high - low), low + golden * (high - low)
        at_left, at_right = loss(left), loss(right)
        while high - low > Decimal("1e-14"):
            if at_left < at_right:
                high, right, at_right = right, left, at_left
                left = high - golden * (high - low)
                at_left = loss(left)
            else:
                low, left, at_left = left, right, at_right
                right = low + golden * (high - low)
                at_right = loss(right)
        return float(low.exp()), float((log_both - low).exp())


def _optimal_plain(
    flops: float,
    E: float,
    A: float,
    B: float,
    alpha: float,
    beta: float,
    *,
    per_token: float = 6.0,
    share: str = "beta over both",
    balance: str = "slopes",
    root: bool = True,
    inverted: bool = False,
    rule: float | None = None,
    turned: bool = False,
) -> tuple[float, float]:
    both = flops / per_token
    exponent = {"beta over both": beta, "alpha over both": alpha, "half": (alpha + beta) / 2}[share] / (alpha + beta)
    g = {"slopes": alpha * A / (beta * B), "losses": A / B, "none": 1.0}[balance]
    g = (1 / g if inverted else g) ** (1 / (alpha + beta) if root else 1)
    parameters = math.sqrt(both / rule) if rule else g * both**exponent
    return (both / parameters, parameters) if turned else (parameters, both / parameters)


def _law(flops: float, E: float, A: float, B: float, alpha: float, beta: float) -> Case:
    return {"flops": flops, "E": E, "A": A, "B": B, "alpha": alpha, "beta": beta}


SCALING_LAWS = Formula(
    signature="compute_optimal(flops, E, A, B, alpha, beta) -> (parameters, tokens)",
    results=("parameters", "tokens"),
    # Found numerically in float64, the lowest point of a curve is known to about √(2⁻⁵³) = 1e-8 times what its flatness
    # adds; so a search may pass as well as the closed form, which is far more exact.
    relative=1e-5,
    reference=_optimal,
    oracle=_optimal_oracle,
    draw=lambda rng: _law(
        10 ** rng.uniform(18, 26),
        rng.uniform(1, 2),
        rng.uniform(300, 600),
        rng.uniform(900, 2000),
        rng.uniform(0.3, 0.36),
        rng.uniform(0.4, 0.5),
    ),
    cases=[
        _law(6e12, 1.0, 1.0, 1.0, 0.5, 0.5),  # symmetric: a million of each
        _law(6e18, 2.0, 400.0, 100.0, 0.5, 0.5),
        _law(5.76e23, 1.69, 406.4, 410.7, 0.34, 0.28),  # Hoffmann et al., at Chinchilla's budget
        _law(1e21, 1.69, 406.4, 410.7, 0.34, 0.28),
        _law(5.76e23, 1.8172, 482.01, 2085.43, 0.3478, 0.3658),  # Besiroglu et al.
        _law(1e20, 0.0, 500.0, 900.0, 0.3, 0.45),
    ],
    wrong={
        "six_forgotten": wrong(_optimal_plain, "training takes 6·N·D FLOPs, not N·D", per_token=1.0),
        "forward_only": wrong(
            _optimal_plain,
            "2·N·D is the forward pass; the backward pass costs twice as much again: 6·N·D",
            per_token=2.0,
        ),
        "exponents_swapped": wrong(
            _optimal_plain,
            "N grows with the exponent β/(α+β): where the loss falls quickly with D, more goes to parameters",
            share="alpha over both",
        ),
        "square_root": wrong(
            _optimal_plain, "N grows with √C only if α = β; the exponent is the share that β has in α + β", share="half"
        ),
        "equal_losses": wrong(
            _optimal_plain,
            "at the optimum the slopes are balanced, αA/N^α = βB/D^β, not the two losses themselves",
            balance="losses",
        ),
        "no_coefficient": wrong(
            _optimal_plain, "A and B decide how the budget is split: a coefficient is missing", balance="none"
        ),
        "coefficient_not_rooted": wrong(
            _optimal_plain, "solve αA/N^α = βB/D^β for N: the coefficient gets the exponent 1/(α+β)", root=False
        ),
        "coefficient_inverted": wrong(
            _optimal_plain,
            "a larger A, the loss from few parameters, calls for more parameters, not fewer",
            inverted=True,
        ),
        "twenty_tokens": wrong(
            _optimal_plain,
            "20 tokens a parameter is a rule for one law near one budget; compute it from the constants",
            rule=20.0,
        ),
        "turned": wrong(_optimal_plain, "the order is (parameters, tokens)", turned=True),
    },
)
