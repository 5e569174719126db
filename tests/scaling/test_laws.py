"""Fits of the loss against laws that are known, against scipy's general optimizers, and against published figures."""

import doctest
import importlib
import sys

import numpy as np
import pytest

from arfast.scaling import ParametricLaw, PowerLaw, ScalingWarning, fit_parametric, fit_power_law

scipy_optimize = pytest.importorskip("scipy.optimize")

# arXiv:2203.15556, the TeX source's digits as arXiv:2404.10102 gives them; that paper's own; a lopsided one.
HOFFMANN = ParametricLaw(E=1.6934, A=406.4, alpha=0.3392, B=410.7, beta=0.2849)
BESIROGLU = ParametricLaw(E=1.8172, A=482.01, alpha=0.3478, B=2085.43, beta=0.3658)
LOPSIDED = ParametricLaw(E=0.0, A=2000.0, alpha=0.45, B=300.0, beta=0.25)
LAWS = dict(hoffmann=HOFFMANN, besiroglu=BESIROGLU, lopsided=LOPSIDED)


def grid(num_sizes=4, num_lengths=4):
    return (x.ravel() for x in np.meshgrid(np.geomspace(5e7, 5e9, num_sizes), np.geomspace(1e9, 3e11, num_lengths)))


@pytest.mark.parametrize("loss", ["squared", "huber"])
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_parametric_law_is_recovered_without_noise(law, loss):
    N, D = grid()
    fitted = fit_parametric(N, D, law.predict(N, D), loss=loss, num_resamples=20)
    for name, value in law.parameters.items():
        assert fitted.parameters[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
        low, high = fitted.intervals[name]
        assert high - low <= 1e-4 * max(1.0, value)
    assert fitted.predict(1e12, 1e13) == pytest.approx(law.predict(1e12, 1e13), rel=1e-6)


@pytest.mark.parametrize("loss", ["squared", "huber"])
@pytest.mark.parametrize("a,b,c", [(60.0, -0.1, 1.7), (2e4, -0.3, 0.0), (5.0, -0.05, 0.5)])
def test_power_law_is_recovered_without_noise(a, b, c, loss):
    C = np.geomspace(1e15, 1e20, 7)
    fitted = fit_power_law(C, a * C**b + c, loss=loss, num_resamples=20)
    assert [fitted.a, fitted.b] == pytest.approx([a, b], rel=1e-5)
    assert fitted.c == pytest.approx(c, abs=1e-5)
    assert fitted.predict(1e24) == pytest.approx(a * 1e24**b + c, rel=1e-5)


def test_squares_are_those_of_curve_fit():
    N, D = grid()
    L = HOFFMANN.predict(N, D) + 0.01 * np.random.default_rng(0).standard_normal(len(N))
    fitted = fit_parametric(N, D, L, num_resamples=20)

    def law(x, E, log_A, alpha, log_B, beta):
        return E + np.exp(log_A - alpha * np.log(x[0])) + np.exp(log_B - beta * np.log(x[1]))

    start = [1.6934, np.log(406.4), 0.3392, np.log(410.7), 0.2849]
    peer, _ = scipy_optimize.curve_fit(law, (N, D), L, p0=start, ftol=1e-14, xtol=1e-14, gtol=1e-14, maxfev=20000)
    ours = [fitted.E, np.log(fitted.A), fitted.alpha, np.log(fitted.B), fitted.beta]
    assert ours == pytest.approx(peer.tolist(), rel=1e-4)
    squares = [np.square(values - L).sum() for values in (fitted.predict(N, D), law((N, D), *peer))]
    assert squares[0] <= squares[1] * (1 + 1e-9)


def test_power_law_squares_are_those_of_curve_fit():
    C = np.geomspace(1e15, 1e20, 9)
    L = 60 * C**-0.1 + 1.7 + 0.005 * np.random.default_rng(1).standard_normal(9)
    fitted = fit_power_law(C, L, num_resamples=20)
    start = dict(p0=[60, -0.1, 1.7], ftol=1e-14, xtol=1e-14, gtol=1e-14, maxfev=20000)
    peer, _ = scipy_optimize.curve_fit(lambda x, a, b, c: a * x**b + c, C, L, **start)
    assert [fitted.a, fitted.b, fitted.c] == pytest.approx(peer.tolist(), rel=1e-4)


def test_huber_minimum_is_not_above_that_of_a_general_optimizer():
    N, D = grid()
    L = HOFFMANN.predict(N, D) * np.exp(0.01 * np.random.default_rng(2).standard_normal(len(N)))
    fitted = fit_parametric(N, D, L, loss="huber", num_resamples=20)
    delta = 1e-3

    def objective(p):  # arXiv:2203.15556, equation 10, summed
        terms = [p[0] - p[3] * np.log(N), p[1] - p[4] * np.log(D), np.full(len(N), p[2])]
        residual = np.abs(np.logaddexp.reduce(terms, axis=0) - np.log(L))
        return np.where(residual < delta, residual**2 / 2, delta * (residual - delta / 2)).sum()

    def search(start):
        options = dict(xatol=1e-10, fatol=1e-14, maxiter=4000, maxfev=4000, adaptive=True)
        return scipy_optimize.minimize(objective, start, method="Nelder-Mead", options=options)

    peer = search(search([np.log(406.4), np.log(410.7), np.log(1.6934), 0.3392, 0.2849]).x)
    ours = objective([np.log(fitted.A), np.log(fitted.B), np.log(fitted.E), fitted.alpha, fitted.beta])
    assert ours <= peer.fun * 1.005


def test_huber_bears_a_wrong_point_and_squares_do_not():
    N, D = grid()
    L = BESIROGLU.predict(N, D)
    L[5] *= 1.3
    robust = fit_parametric(N, D, L, loss="huber", num_resamples=20)
    assert [robust.alpha, robust.beta] == pytest.approx([0.3478, 0.3658], rel=0.02)
    squares = fit_parametric(N, D, L, num_resamples=20)
    assert abs(squares.alpha / 0.3478 - 1) > 0.1


@pytest.mark.parametrize("loss,repeats,least", [("squared", 24, 17), ("huber", 6, 2)])
def test_intervals_hold_what_they_promise(loss, repeats, least):
    """Exponents, and the measured loss of a run of 27 times the compute, at the level of 90 %; from 16 runs alone, that
    of a new run is too narrow (of 40 sweeps 31 held it, the exponents 39 and 36), with Huber's loss more so."""
    N, D = grid(4, 4)
    inside = dict(alpha=0, beta=0, run=0)
    large = (2e10, 2e12)
    for seed in range(repeats):
        noise = 0.005 * np.random.default_rng(seed).standard_normal(len(N) + 1)
        fitted = fit_parametric(N, D, HOFFMANN.predict(N, D) + noise[:-1], loss=loss, num_resamples=60)
        for name in ("alpha", "beta"):
            low, high = fitted.intervals[name]
            assert low < fitted.parameters[name] < high
            inside[name] += low <= HOFFMANN.parameters[name] <= high
        _, low, high = fitted.predict(*large, return_interval=True)
        assert high - low < 0.2
        inside["run"] += low <= HOFFMANN.predict(*large) + noise[-1] <= high
    assert all(count >= least for count in inside.values()), inside


def test_compute_optimum_is_the_published_one():
    """For the compute of Gopher, 5.76e23: 40 billion by approach 3 of Hoffmann et al. (their figure 4), and about the
    70 billion of Chinchilla by Besiroglu et al., whose exponent of N* is 0.51 (0.46 of Hoffmann et al., table 2)."""
    assert f"{HOFFMANN.optimum(5.76e23).N[0]:.0e}" == "4e+10"
    assert 6.5e10 < BESIROGLU.optimum(5.76e23).N[0] < 7.5e10
    assert round(HOFFMANN.size_exponent, 2) == 0.46
    assert round(BESIROGLU.size_exponent, 2) == 0.51
    assert 17 < BESIROGLU.optimum(5.76e23).D[0] / BESIROGLU.optimum(5.76e23).N[0] < 23


@pytest.mark.parametrize("flops_factor", [6.0, 7.3])
def test_compute_optimum_is_the_minimum(flops_factor):
    best = BESIROGLU.optimum(1e21, flops_factor)
    found = scipy_optimize.minimize_scalar(
        lambda x: BESIROGLU.predict(np.exp(x), 1e21 / flops_factor / np.exp(x)),
        bounds=(15, 30),
        options=dict(xatol=1e-9),
    )
    assert best.N[0] == pytest.approx(np.exp(found.x), rel=1e-4)
    assert best.N[0] * best.D[0] * flops_factor == pytest.approx(1e21)
    assert best.L[0] == pytest.approx(found.fun, rel=1e-12)


def test_fits_are_functions_of_the_seed_and_wider_at_a_higher_level():
    N, D = grid()
    L = HOFFMANN.predict(N, D) + 0.01 * np.random.default_rng(0).standard_normal(len(N))
    first, second, other = (fit_parametric(N, D, L, num_resamples=40, seed=seed) for seed in (1, 1, 2))
    assert first.intervals == second.intervals != other.intervals
    wide = fit_parametric(N, D, L, num_resamples=40, seed=1, confidence=0.99).intervals["alpha"]
    narrow = first.intervals["alpha"]
    assert wide[0] <= narrow[0] < narrow[1] <= wide[1] and wide != narrow
    value, low, high = first.predict(N, D, return_interval=True)
    assert value.shape == low.shape == high.shape == N.shape and (low < high).all()
    best = first.optimum(1e22)
    assert best.N[1] < best.N[0] < best.N[2] and best.L[1] < best.L[0] < best.L[2]


def test_the_order_and_the_units_of_the_runs_do_not_matter():
    N, D = grid()
    L = HOFFMANN.predict(N, D) + 0.01 * np.random.default_rng(0).standard_normal(len(N))
    first = fit_parametric(N, D, L, num_resamples=20)
    other = fit_parametric(N[::-1] * 1e-6, D[::-1] * 1e-9, L[::-1], num_resamples=20)
    assert [other.alpha, other.beta, other.E] == pytest.approx([first.alpha, first.beta, first.E], rel=1e-6)
    assert other.predict(1e4, 1e4) == pytest.approx(first.predict(1e10, 1e13), rel=1e-8)


GOOD = dict(N=[1e6, 2e6, 4e6] * 2, D=[1e8, 2e8, 4e8, 8e8, 16e8, 32e8], L=[4.0, 3.5, 3.3, 3.1, 3.0, 2.9])


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(L=[3.0] * 5), "N, D, L must have equal lengths, got 6, 6, 5"),
        ({name: values[:5] for name, values in GOOD.items()}, "must have at least 6 points, got 5"),
        (dict(L=[4.0, 3.5, float("nan"), 3.1, 3.0, 2.9]), "L must be finite and above 0, got nan"),
        (dict(D=[1e8, 2e8, -4e8, 8e8, 16e8, 32e8]), "D must be finite and above 0, got -400000000.0"),
        (dict(N=[0.0, 2e6, 4e6] * 2), "N must be finite and above 0, got 0.0"),
        (dict(N=[1e6, 2e6] * 3), "N must have at least 3 different values, got 2"),
        (dict(L=[[4.0]] * 6), r"L must be one-dimensional, got shape \(6, 1\)"),
        (dict(L=["x"] * 6), "L must hold numbers, got"),
        (dict(loss="absolute"), "loss must be one of squared, huber, got 'absolute'"),
        (dict(num_resamples=3), r"num_resamples must be an integer in \[20, 100000\], got 3"),
        (dict(confidence=1.0), "confidence must be between 0 and 1, got 1.0"),
    ],
)
def test_bad_points_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^fit_parametric: .*{message}"):
        fit_parametric(**GOOD | changes)


def test_bad_compute_is_refused():
    with pytest.raises(ValueError, match="^fit_power_law: C, L must have at least 4 points, got 3"):
        fit_power_law([1e10, 2e10, 3e10], [3.0, 2.9, 2.8])
    with pytest.raises(ValueError, match="^fit_power_law: C must have at least 4 different values, got 1"):
        fit_power_law([1e10] * 4, [3.0, 2.9, 2.8, 2.7])
    with pytest.raises(ValueError, match="^predict: C must be finite and above 0, got -1.0"):
        PowerLaw(a=2.0, b=-0.5, c=1.0).predict(-1.0)
    with pytest.raises(ValueError, match="^optimum: C must be finite and above 0, got 0.0"):
        HOFFMANN.optimum(0.0)


def test_an_exponent_that_the_points_do_not_determine_is_told():
    C = np.geomspace(1.0, 10.0, 6)
    with pytest.warns(ScalingWarning, match="exponent is at the end of its range"):
        fit_power_law(C, 1 + C**-9.0, num_resamples=20)


@pytest.mark.parametrize("name", ["isoflop", "laws", "plan", "shapes"])
def test_documented_examples_hold(name):
    results = doctest.testmod(importlib.import_module(f"arfast.scaling.{name}"))
    assert results.attempted > 0 and results.failed == 0


def test_scipy_is_named_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r"pip install 'arfast\[scaling\]'"):
        fit_power_law([1e10, 2e10, 3e10, 4e10], [3.0, 2.9, 2.8, 2.75])
