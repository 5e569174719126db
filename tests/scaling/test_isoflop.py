"""IsoFLOP parabolas: what they find, and how far off they are."""

import numpy as np
import pytest

from arfast.scaling import ParametricLaw, ScalingWarning, fit_isoflop, parabola_bias

pytestmark = pytest.mark.filterwarnings("ignore::arfast.scaling.ScalingWarning")
CHINCHILLA = ParametricLaw(E=1.62, A=406.4, alpha=0.336, B=410.7, beta=0.283)
BUDGETS = np.logspace(17, 19, 5)
LOPSIDED = ParametricLaw(E=1.6, A=2000.0, alpha=0.45, B=300.0, beta=0.25)


def profiles(law, ratio, num_sizes=15, budgets=BUDGETS):
    """C, N, D of sizes within a factor ``ratio`` of the best one of each budget."""
    C, scale = (x.ravel() for x in np.meshgrid(budgets, np.geomspace(1 / ratio, ratio, num_sizes), indexing="ij"))
    N = scale * [law.optimum(c).N[0] for c in C]
    return C, N, C / (6 * N)


def test_narrow_profiles_find_the_law():
    C, N, D = profiles(CHINCHILLA, 1.2)
    law = fit_isoflop(C, N, CHINCHILLA.predict(N, D))
    assert law.alpha == pytest.approx(CHINCHILLA.size_exponent, abs=1e-4)
    assert law.optimal_N == pytest.approx([CHINCHILLA.optimum(c).N[0] for c in law.budgets], rel=2e-3)
    assert law.optimal_L == pytest.approx([CHINCHILLA.optimum(c).L[0] for c in law.budgets], rel=1e-5)
    assert law.predict(1e24) == pytest.approx(CHINCHILLA.optimum(1e24).N[0], rel=5e-3)


@pytest.mark.parametrize(
    "law,biases", [(CHINCHILLA, (1.003, 1.012, 1.026, 1.047)), (LOPSIDED, (1.011, 1.044, 1.102, 1.188))]
)
def test_bias_of_wide_profiles_is_the_known_one(law, biases):
    """Without noise, from budgets up to 1e19 to 1e24, as computed with numpy.polyfit alone beforehand."""
    found = [parabola_bias(law, *profiles(law, ratio), 1e24) for ratio in (2, 4, 8, 16)]
    assert found == pytest.approx(biases, abs=6e-4)


def test_noise_is_within_the_interval():
    C, N, D = profiles(CHINCHILLA, 2.0, num_sizes=7)
    L = CHINCHILLA.predict(N, D) + 0.002 * np.random.default_rng(0).standard_normal(len(C))
    law = fit_isoflop(C, N, L)
    low, high = law.intervals["alpha"]
    assert low < CHINCHILLA.size_exponent < high and 0.001 < high - low < 0.1
    value, low, high = law.predict([1e19, 1e21], return_interval=True)
    assert (low < value).all() and (value < high).all() and high[1] / low[1] > high[0] / low[0]


def test_runs_of_nearly_the_same_compute_are_one_budget():
    C, N, D = profiles(CHINCHILLA, 2.0, num_sizes=5)
    wobbly = C * np.tile([0.995, 1.0, 1.004, 1.001, 0.998], 5)
    law = fit_isoflop(wobbly[::-1], N[::-1], CHINCHILLA.predict(N, D)[::-1])
    assert len(law.budgets) == 5
    assert law.alpha == pytest.approx(CHINCHILLA.size_exponent, abs=0.01)


@pytest.mark.filterwarnings("default::arfast.scaling.ScalingWarning")
def test_bias_and_lowest_points_outside_are_told():
    C, N, D = profiles(CHINCHILLA, 2.0)
    with pytest.warns(ScalingWarning, match="arXiv:2603.22339"):
        fit_isoflop(C, N, CHINCHILLA.predict(N, D))
    with pytest.warns(ScalingWarning, match="outside of the sizes"):
        fit_isoflop(C, 8 * N, CHINCHILLA.predict(8 * N, D / 8))


def test_bad_profiles_are_refused():
    C, N, D = profiles(CHINCHILLA, 2.0, num_sizes=4)
    L = CHINCHILLA.predict(N, D)
    with pytest.raises(ValueError, match="^fit_isoflop: C must hold at least 2 budgets, got 1"):
        fit_isoflop(np.full(20, 1e18), N, L)
    with pytest.raises(
        ValueError, match="^fit_isoflop: N must have at least 3 different values at each C, got 1 at C="
    ):
        fit_isoflop(C, np.ones(20), L)
    with pytest.raises(ValueError, match="^fit_isoflop: L must have a lowest point at each C, got none at C=1e"):
        fit_isoflop(C, N, 10 - L)
    three = np.arange(20) % 4 < 3
    with pytest.raises(ValueError, match="^fit_isoflop: N must have more than 3 values at some C .* got 3 at each"):
        fit_isoflop(C[three], N[three], L[three])
    with pytest.raises(ValueError, match="^fit_isoflop: C, N, L must have at least 7 points, got 4"):
        fit_isoflop(C[:4], N[:4], L[:4])
