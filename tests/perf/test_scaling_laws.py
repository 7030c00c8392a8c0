"""`mlsys.perf.scaling_laws`: the optimum is one, published constants are as printed, planted ones are found."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys.perf import scaling_laws
from mlsys.perf.scaling_laws import BESIROGLU, CHINCHILLA, CHINCHILLA_UNROUNDED, KAPLAN, KAPLAN_JOINT, Chinchilla, fit

# --- the laws ---------------------------------------------------------------------------------------------------------

LAWS = st.builds(
    Chinchilla,
    E=st.floats(0, 5),
    A=st.floats(1, 1e4),
    B=st.floats(1, 1e4),
    alpha=st.floats(0.1, 0.8),
    beta=st.floats(0.1, 0.8),
)
BUDGETS = st.floats(1e17, 1e27)


@given(law=LAWS, flops=BUDGETS)
def test_compute_optimal_is_the_least_loss_of_the_budget(law, flops):
    n, d = law.compute_optimal(flops)
    assert 6 * n * d == pytest.approx(flops)
    best = law.loss(n, d)
    for factor in (0.5, 0.9, 1.1, 2):
        assert law.loss(n * factor, d / factor) >= best * (1 - 1e-12)
    # First order: moving from parameters to tokens changes nothing.
    assert law.alpha * law.A / n**law.alpha == pytest.approx(law.beta * law.B / d**law.beta, rel=1e-6)


@given(law=LAWS, flops=BUDGETS)
def test_optimum_grows_as_a_power_of_compute(law, flops):
    (n, d), (more_n, more_d) = law.compute_optimal(flops), law.compute_optimal(100 * flops)
    assert more_n / n == pytest.approx(100**law.parameter_exponent)
    assert more_d / d == pytest.approx(100 ** (1 - law.parameter_exponent))


@given(law=LAWS, n=st.floats(1e6, 1e12), d=st.floats(1e6, 1e14))
def test_loss_falls_with_both_to_what_cannot_be_avoided(law, n, d):
    loss = law.loss(n, d)
    assert loss > law.E
    assert law.loss(2 * n, d) < loss
    assert law.loss(n, 2 * d) < loss
    assert law.loss(1e300, 1e300) == pytest.approx(law.E, abs=1e-9)


def test_constants_as_printed():
    assert (CHINCHILLA.E, CHINCHILLA.A, CHINCHILLA.B, CHINCHILLA.alpha, CHINCHILLA.beta) == (
        1.69,
        406.4,
        410.7,
        0.34,
        0.28,
    )
    assert (CHINCHILLA_UNROUNDED.A, CHINCHILLA_UNROUNDED.B) == (CHINCHILLA.A, CHINCHILLA.B)
    for name in ("E", "alpha", "beta"):  # what the paper prints are these, cut or rounded to two digits
        assert abs(getattr(CHINCHILLA_UNROUNDED, name) - getattr(CHINCHILLA, name)) < 0.005
    assert (BESIROGLU.E, BESIROGLU.A, BESIROGLU.B, BESIROGLU.alpha, BESIROGLU.beta) == (
        1.8172, 482.01, 2085.43, 0.3478, 0.3658
    )  # fmt: skip
    assert (KAPLAN.alpha_n, KAPLAN.n_c, KAPLAN.alpha_d, KAPLAN.d_c) == (0.076, 8.8e13, 0.095, 5.4e13)
    assert (KAPLAN_JOINT.alpha_n, KAPLAN_JOINT.n_c, KAPLAN_JOINT.alpha_d, KAPLAN_JOINT.d_c) == (
        0.076, 6.4e13, 0.103, 1.8e13
    )  # fmt: skip


def test_chinchilla_at_the_budget_of_gopher():
    """Gopher's budget, for which the paper trained 70 B parameters on 1.4 T tokens."""
    assert CHINCHILLA.parameter_exponent == pytest.approx(
        0.45, abs=0.005
    )  # printed 0.46, from constants with more digits
    assert CHINCHILLA_UNROUNDED.parameter_exponent == pytest.approx(0.46, abs=0.005)
    assert BESIROGLU.parameter_exponent == pytest.approx(0.5126, abs=5e-5)
    n, d = BESIROGLU.compute_optimal(5.76e23)
    assert (n, d) == (pytest.approx(70e9, rel=0.1), pytest.approx(1.4e12, rel=0.1))
    assert CHINCHILLA.loss(70e9, 1.4e12) == pytest.approx(1.69 + 406.4 / 70e9**0.34 + 410.7 / 1.4e12**0.28)


def test_digits_matter():
    """Two digits of an exponent move the optimum by a quarter."""
    (rounded, _), (exact, _) = (law.compute_optimal(5.76e23) for law in (CHINCHILLA, CHINCHILLA_UNROUNDED))
    assert exact / rounded > 1.2


@given(n=st.floats(1e3, 1e14), d=st.floats(1e3, 1e14))
def test_kaplan_joint_law_has_both_limits(n, d):
    law = KAPLAN_JOINT
    assert law.loss(n, 1e300) == pytest.approx(law.loss_of_parameters(n))
    assert law.loss(1e300, d) == pytest.approx(law.loss_of_tokens(d))
    assert law.loss(n, d) >= max(law.loss_of_parameters(n), law.loss_of_tokens(d)) * (1 - 1e-12)
    assert law.loss(n, 2 * d) < law.loss(n, d) * (1 + 1e-12)


def test_kaplan_as_printed():
    assert KAPLAN.loss_of_parameters(8.8e13) == 1
    assert KAPLAN.loss_of_tokens(5.4e13) == 1
    # Section 4.2: eight times the model needs about five times the data for the same overfitting.
    assert 8 ** (KAPLAN_JOINT.alpha_n / KAPLAN_JOINT.alpha_d) == pytest.approx(5, rel=0.1)
    # Section 4: a loss that keeps falling by 2^-0.076 with each doubling of the model.
    assert KAPLAN.loss_of_parameters(2e9) / KAPLAN.loss_of_parameters(1e9) == pytest.approx(2**-0.076)


# --- fitting ----------------------------------------------------------------------------------------------------------

PLANTED = {
    "chinchilla": CHINCHILLA_UNROUNDED,
    "re-fit": BESIROGLU,
    "unequal": Chinchilla(E=0.5, A=50, B=5000, alpha=0.2, beta=0.45),
}


def runs(law, count=120, noise=0.0, outliers=0, seed=0):
    """Runs as in the paper: sizes and budgets over three and four decades."""
    generator = np.random.default_rng(seed)
    n = 10 ** generator.uniform(7.5, 10.2, count)
    d = np.clip(10 ** generator.uniform(18, 22, count) / (6 * n), 1e8, 1e12)
    loss = np.array([law.loss(*sizes) for sizes in zip(n.tolist(), d.tolist())])
    loss *= np.exp(noise * generator.standard_normal(count))
    loss[:outliers] *= generator.uniform(1.1, 1.6, outliers)
    return n, d, loss


def distance(law, planted):
    """How far apart two laws are where the runs lie, and where they are used: at a hundred times the compute."""
    ratios = [law.loss(n, d) / planted.loss(n, d) for n, d in ((1e8, 2e9), (1e9, 2e10), (1e10, 2e11), (1e11, 2e12))]
    return max(abs(math.log(ratio)) for ratio in ratios)


@pytest.mark.parametrize("name", PLANTED)
def test_planted_constants_are_found(name):
    planted = PLANTED[name]
    found = fit(*runs(planted))
    for constant in ("E", "A", "B", "alpha", "beta"):
        assert getattr(found.law, constant) == pytest.approx(getattr(planted, constant), rel=1e-6), constant
    assert found.objective < 1e-15
    assert 1 <= found.converged <= found.starts
    assert max(map(abs, found.residuals)) < 1e-9


def test_noise_moves_the_constants_little():
    found = fit(*runs(CHINCHILLA_UNROUNDED, noise=2e-3))
    assert found.law.parameter_exponent == pytest.approx(CHINCHILLA_UNROUNDED.parameter_exponent, abs=0.02)
    assert found.law.alpha == pytest.approx(CHINCHILLA_UNROUNDED.alpha, abs=0.02)
    assert abs(found.law.E - CHINCHILLA_UNROUNDED.E) < 0.05
    assert distance(found.law, CHINCHILLA_UNROUNDED) < 0.01
    assert np.std(found.residuals) == pytest.approx(2e-3, rel=0.2)


def test_outliers_are_borne_by_huber_and_not_by_squares():
    points = runs(BESIROGLU, noise=1e-3, outliers=12)  # a tenth of the runs, wrong by up to 60%
    robust = fit(*points)
    squares = fit(*points, delta=10.0)  # beyond every residual: least squares
    assert distance(robust.law, BESIROGLU) < 0.005
    assert distance(squares.law, BESIROGLU) > 4 * distance(robust.law, BESIROGLU)
    assert min(robust.residuals[:12]) < -0.05  # the bad runs are named by their residuals
    assert max(map(abs, robust.residuals[12:])) < 0.01


def test_starts_that_end_elsewhere_are_counted():
    hard = Chinchilla(E=2.0, A=30, B=3e4, alpha=0.25, beta=0.5)  # most of the grid is far from it
    found = fit(*runs(hard, noise=1e-3))
    assert 1 <= found.converged < found.starts
    assert fit(*runs(hard, noise=1e-3), starts=1).converged == 1


def test_objective_is_huber_of_the_residuals_and_least_at_the_fit():
    delta = 1e-3
    n, d, loss = runs(CHINCHILLA_UNROUNDED, noise=2e-3)
    found = fit(n, d, loss, delta=delta)

    def objective(law):
        total = 0.0
        for x, y, measured in zip(n.tolist(), d.tolist(), loss.tolist()):
            r = abs(math.log(law.loss(x, y) / measured))
            total += 0.5 * r * r if r <= delta else delta * (r - 0.5 * delta)
        return total

    assert objective(found.law) == pytest.approx(found.objective, rel=1e-9)
    assert objective(CHINCHILLA_UNROUNDED) >= found.objective
    best = {name: getattr(found.law, name) for name in ("E", "A", "B", "alpha", "beta")}
    for name in best:
        for factor in (0.999, 1.001):
            assert objective(Chinchilla(**(best | {name: best[name] * factor}))) > found.objective


def test_the_grid_is_screened_by_the_law_itself():
    n, d, loss = runs(BESIROGLU, count=7)
    law = BESIROGLU
    theta = np.array([[math.log(law.A), math.log(law.B), math.log(law.E), law.alpha, law.beta], [0, 5, -1, 0.5, 2]])
    predicted = scaling_laws._predicted(theta, np.log(n), np.log(d))
    np.testing.assert_allclose(predicted[0], np.log(loss))
    other = Chinchilla(E=math.exp(-1), A=1, B=math.exp(5), alpha=0.5, beta=2)
    np.testing.assert_allclose(predicted[1], [math.log(other.loss(*sizes)) for sizes in zip(n.tolist(), d.tolist())])
    assert math.prod(map(len, scaling_laws.GRID)) == 4500


def test_gradient_is_that_of_the_residuals():
    generator = np.random.default_rng(0)
    theta, x_n, x_d, y = generator.standard_normal(5), *generator.standard_normal((3, 6))
    _, slope = scaling_laws._residuals(theta, x_n, x_d, y)
    for i in range(5):
        step = np.eye(5)[i] * 1e-6
        ahead, behind = (scaling_laws._residuals(theta + sign * step, x_n, x_d, y)[0] for sign in (1, -1))
        np.testing.assert_allclose(slope[:, i], (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-9)


def test_fit_does_not_depend_on_the_order_or_kind_of_the_runs():
    n, d, loss = (values[:40] for values in runs(BESIROGLU, noise=1e-3))
    one = fit(n.tolist(), d.tolist(), loss.tolist(), starts=4)
    two = fit(n[::-1], d[::-1], loss[::-1], starts=4)
    assert one.law.alpha == pytest.approx(two.law.alpha, rel=1e-4)


GOOD = [[1e8, 1e9, 1e8, 1e9, 2e9], [1e9, 1e9, 1e10, 1e10, 1e10], [3.0, 2.9, 2.8, 2.5, 2.4]]
BAD_FITS = {
    "few": ([column[:4] for column in GOOD], {}, "4 runs: five constants need at least 5"),
    "the same": (
        [[1e8, 1e9] * 5, [1e9, 1e10] * 5, [3.0, 2.0] * 5],
        {},
        "10 runs: five constants need at least 5 of different",
    ),
    "lengths": ([GOOD[0], GOOD[1], GOOD[2][:4]], {}, "must be equally long, got 5, 5 and 4"),
    "zero": ([GOOD[0], GOOD[1], [3.0, 2.9, 0.0, 2.5, 2.4]], {}, "losses must be positive and finite, got 0.0"),
    "nan": ([[math.nan, *GOOD[0][1:]], *GOOD[1:]], {}, "params must be positive and finite, got nan"),
    "table": ([[GOOD[0]], *GOOD[1:]], {}, r"params must be a list of numbers, got shape \(1, 5\)"),
    "one size": ([[1e8] * 5, [1e9, 2e9, 3e9, 4e9, 5e9], GOOD[2]], {}, "params are all equal"),
    "one length": ([[1e9, 2e9, 3e9, 4e9, 5e9], [1e8] * 5, GOOD[2]], {}, "tokens are all equal"),
    "delta": (GOOD, {"delta": 0}, "delta must be positive"),
    "starts": (GOOD, {"starts": 0}, "starts must be at least 1"),
}


@pytest.mark.parametrize("name", BAD_FITS)
def test_bad_runs_are_named(name):
    columns, options, message = BAD_FITS[name]
    with pytest.raises(ValueError, match=message):
        fit(*columns, **options)


def test_loss_that_grows_with_size_is_refused():
    n = np.geomspace(1e7, 1e10, 20)
    d = np.geomspace(1e9, 1e11, 20)[::-1]
    n, d = (grid.ravel() for grid in np.meshgrid(n, d))
    with pytest.raises(ValueError, match="does not fall with both sizes"):
        fit(n, d, 2 * n**0.05, starts=2)


# --- isoFLOP parabolas ------------------------------------------------------------------------------------------------


def isoflop_runs(law, budgets=(1e18, 1e19, 1e20, 1e21), width=2.0, count=9):
    """Sizes around the optimum of each budget, from 1/width to width² of it: the optimum is not in the middle."""
    flops, params, losses = [], [], []
    for budget in budgets:
        optimum, _ = law.compute_optimal(budget)
        for factor in np.geomspace(1 / width, width**2, count).tolist():
            flops.append(budget)
            params.append(optimum * factor)
            losses.append(law.loss(optimum * factor, budget / (6 * optimum * factor)))
    return flops, params, losses


@pytest.mark.parametrize("name", PLANTED)
def test_isoflop_finds_the_planted_allocation(name):
    law = PLANTED[name]
    found = scaling_laws.fit_isoflop(*isoflop_runs(law, width=1.3))
    assert found.exponent == pytest.approx(law.parameter_exponent, abs=2e-3)
    assert found.budgets == pytest.approx((1e18, 1e19, 1e20, 1e21))
    for budget, optimum in zip(found.budgets, found.optima):
        assert optimum == pytest.approx(law.compute_optimal(budget)[0], rel=0.01)
    n, d = found.compute_optimal(1e22)
    assert n == pytest.approx(law.compute_optimal(1e22)[0], rel=0.02)
    assert 6 * n * d == pytest.approx(1e22)


def test_wide_parabolas_are_biased_where_exponents_differ():
    """What the parabola leaves out: it is symmetric, the losses are not."""
    law = PLANTED["unequal"]
    narrow, wide = (scaling_laws.fit_isoflop(*isoflop_runs(law, width=width)).optima for width in (1.3, 8))
    exact = [law.compute_optimal(budget)[0] for budget in (1e18, 1e19, 1e20, 1e21)]
    bias = [max(abs(a / b - 1) for a, b in zip(optima, exact)) for optima in (narrow, wide)]
    assert bias[0] < 0.01 < 0.05 < bias[1]


@pytest.mark.parametrize("batch", [1, 2**19])
def test_isoflop_groups_runs_whose_sizes_are_whole_numbers(batch):
    """Parameters and tokens are counted, tokens in batches: no two runs have the same 6·N·D."""
    law = PLANTED["chinchilla"]
    flops, params, losses = isoflop_runs(law, width=1.3)
    params = [round(n) for n in params]
    tokens = [batch * round(c / 6 / n / batch) for c, n in zip(flops, params)]
    rounded = [6 * n * d for n, d in zip(params, tokens)]
    assert len(set(rounded)) > 4
    losses = [law.loss(n, d) for n, d in zip(params, tokens)]
    shuffled = np.random.default_rng(0).permutation(len(params))
    found = scaling_laws.fit_isoflop(*(np.array(v, dtype=float)[shuffled] for v in (rounded, params, losses)))
    assert found.budgets == pytest.approx((1e18, 1e19, 1e20, 1e21), rel=1e-3)
    assert found.exponent == pytest.approx(law.parameter_exponent, abs=3e-3)


def test_a_budget_begins_where_compute_rises_by_more_than_a_percent():
    near = [1e18, 1.0000001e18, 1.008e18]
    sizes, losses = [1e8, 2e8, 4e8], [3.0, 2.0, 3.0]
    found = scaling_laws.fit_isoflop([*near, *(c * 1.03 for c in near)], sizes * 2, losses * 2)
    assert found.budgets == pytest.approx([math.prod(near) ** (1 / 3), 1.03 * math.prod(near) ** (1 / 3)])
    assert found.optima == pytest.approx([2e8, 2e8])
    with pytest.raises(ValueError, match="makes 1 budget of them"):
        scaling_laws.fit_isoflop([*near, *(c * 1.016 for c in near)], sizes * 2, losses * 2)


BAD_ISOFLOP = {
    "one budget": (([1e18] * 3, [1, 2, 3], [3, 2, 3]), "a power law needs at least 2 budgets"),
    "no runs": (([], [], []), "a power law needs at least 2 budgets"),
    "two sizes": (
        ([1e18] * 3 + [1e19] * 2, [1, 2, 3, 1, 2], [3, 2, 3, 3, 2]),
        "flops=1e.19: a parabola needs at least 3",
    ),
    "no minimum": (([1e18] * 3 + [1e19] * 3, [1, 2, 4] * 2, [3, 2, 3, 3, 2, 1.5]), "flops=1e.19: .* no lowest point"),
    "a maximum": (([1e18] * 3 + [1e19] * 3, [1, 2, 4] * 2, [2, 3, 2, 3, 2, 3]), "flops=1e.18: .* no lowest point"),
    "lengths": (([1e18], [1, 2], [1, 2]), "must be equally long, got 1, 2 and 2"),
}


@pytest.mark.parametrize("name", BAD_ISOFLOP)
def test_bad_isoflop_runs_are_named(name):
    columns, message = BAD_ISOFLOP[name]
    with pytest.raises(ValueError, match=message):
        scaling_laws.fit_isoflop(*columns)


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CHINCHILLA.loss(0, 1), "parameters must be positive"),
        (lambda: CHINCHILLA.loss(1, -1), "tokens must be positive and finite, got -1"),
        (lambda: CHINCHILLA.compute_optimal(math.inf), "flops must be positive and finite, got inf"),
        (lambda: KAPLAN.loss_of_parameters(0), "parameters must be positive"),
        (lambda: KAPLAN.loss_of_tokens(0), "tokens must be positive"),
        (lambda: KAPLAN.loss(1, 0), "tokens must be positive"),
        (lambda: Chinchilla(-1, 1, 1, 1, 1), "E must be at least 0"),
        (lambda: Chinchilla(1, 1, 1, 0, 1), "alpha must be positive"),
        (lambda: scaling_laws.Kaplan(0, 1, 1, 1), "alpha_n must be positive"),
        (lambda: scaling_laws.IsoFlop(1, 0.5, (), ()).compute_optimal(0), "flops must be positive"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
