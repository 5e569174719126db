"""Autoregression by least squares: statsmodels' AutoReg on its series, float64 least squares on the windows, edges."""

import time
from unittest import mock

import numpy as np
import pytest
import torch

from arfast.models import LeastSquaresAR, select_order, sliding_windows

TOLERANCE = 1e-8


def series(name):
    datasets = pytest.importorskip("statsmodels.api").datasets
    if name == "sunspots":
        return datasets.sunspots.load_pandas().data["SUNACTIVITY"].to_numpy()
    return datasets.co2.load_pandas().data["co2"].interpolate().to_numpy()


def auto_reg(*arguments, **options):
    from statsmodels.tsa.ar_model import AutoReg

    return AutoReg(*arguments, **options).fit()


def wavy(length, seed=0, order=4):
    """A stationary series of this order with known coefficients."""
    from scipy.signal import lfilter

    weights = np.array([0.9, -0.5, 0.2, -0.1])[:order]
    noise = np.random.default_rng(seed).standard_normal(length + 100) + 3
    return lfilter([1.0], [1.0, *-weights], noise)[100:]


def design(y, order, intercept=True, exog=None):
    """The windows, built."""
    lags = [y[order - k : len(y) - k] for k in range(1, order + 1)]
    constant = [np.ones(len(y) - order)] if intercept else []
    return np.column_stack([*constant, *lags, *(() if exog is None else exog[order:].reshape(len(y) - order, -1).T)])


def close(ours, theirs, scale=None):
    theirs = np.asarray(theirs)
    return np.abs(ours.numpy() - theirs).max() <= TOLERANCE * (np.abs(theirs).max() if scale is None else scale)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("order", [1, 2, 9, 30, 60])
@pytest.mark.parametrize("name", ["sunspots", "co2"])
def test_equal_to_statsmodels(name, order, intercept):
    y = series(name)
    expected = auto_reg(y, order, trend="c" if intercept else "n")
    model = LeastSquaresAR(order, intercept=intercept).fit(y)
    assert model.num_observations == expected.nobs and model.rank == order + intercept
    assert close(model.params, expected.params)
    assert close(model.predict(y), expected.fittedvalues)
    assert model.sigma2 == pytest.approx(expected.sigma2, rel=TOLERANCE)
    for criterion in ("aic", "bic", "hqic"):
        assert getattr(model, criterion) == pytest.approx(getattr(expected, criterion), rel=TOLERANCE)
    prediction = expected.get_prediction(len(y), len(y) + 23)
    mean, low, high = model.forecast(24, return_interval=True, confidence=0.9)
    bounds = prediction.conf_int(alpha=0.1)
    assert close(mean, prediction.predicted_mean) and close(low, bounds[:, 0]) and close(high, bounds[:, 1])
    assert torch.equal(model.forecast(24), mean)


@pytest.mark.parametrize("columns", [1, 3])
def test_exogenous_columns(columns):
    generator = np.random.default_rng(1)
    y, exog = series("sunspots"), 1e3 * generator.standard_normal((309, columns)) + 1e5
    y = y + exog @ np.arange(1, columns + 1) / 100
    future = 1e3 * generator.standard_normal((5, columns)) + 1e5
    expected = auto_reg(y, 3, exog=exog)
    model = LeastSquaresAR(3).fit(y, exog)
    assert close(model.params[1:], expected.params[1:])
    assert close(model.predict(y, exog), expected.fittedvalues)
    assert close(model.forecast(5, future), expected.forecast(5, exog=future))


@pytest.mark.parametrize("criterion", ["aic", "bic", "hqic"])
@pytest.mark.parametrize("name", ["sunspots", "co2"])
def test_order_selection(name, criterion):
    from statsmodels.tsa.ar_model import ar_select_order

    y = series(name)
    expected = ar_select_order(y, 13, ic=criterion)
    by_order = {lags if lags == 0 else len(lags): value for lags, value in getattr(expected, criterion).items()}
    found = select_order(y, 13, criterion)
    # Their values here, unlike AutoReg's own, do not count the variance among the parameters.
    values = np.array([by_order[order] for order in range(14)])
    assert close(found.values - found.values[0], values - values[0])
    assert found.order == len(expected.ar_lags)


@pytest.mark.parametrize("ridge", [0.5, 1e4])
def test_ridge(ridge):
    y, exog = wavy(300), np.random.default_rng(2).standard_normal((300, 2))
    windows = design(y, 5, exog=exog)
    penalty = np.diag([0.0] + [ridge] * 7)
    expected = np.linalg.solve(windows.T @ windows + penalty, windows.T @ y[5:])
    assert close(LeastSquaresAR(5, ridge=ridge).fit(y, exog).params, expected)


def test_bad_condition_goes_to_the_windows(monkeypatch):
    """A smooth series: the Gram matrix alone would leave no correct digit."""
    t = np.linspace(0, 30, 1000)
    y = np.sin(t) + np.cos(2.3 * t) + 1e-7 * np.random.default_rng(0).standard_normal(1000)
    monkeypatch.setattr(sliding_windows, "_BLOCK_ROWS", 77)
    blocks = mock.Mock(side_effect=sliding_windows.Windows.blocks, autospec=True)
    monkeypatch.setattr(sliding_windows.Windows, "blocks", lambda self, rows: blocks(self, rows))
    windows = design(y, 6, intercept=False)
    expected = np.linalg.lstsq(windows, y[6:], rcond=None)[0]
    assert np.linalg.cond(windows) > 1e6
    model = LeastSquaresAR(6, intercept=False).fit(y)
    assert model.sigma2 == pytest.approx(((y[6:] - windows @ expected) ** 2).mean(), rel=1e-6)
    np.testing.assert_allclose(model.params, expected, rtol=1e-6)
    blocks.assert_called_once()


def test_corrections_win_back_what_the_gram_matrix_loses(monkeypatch):
    y = np.cumsum(np.cumsum(np.random.default_rng(0).standard_normal(3000)))  # smooth: condition 1e4
    expected = np.linalg.lstsq(design(y - y.mean(), 6), y[6:] - y.mean(), rcond=None)[0][1:]
    errors = []
    for corrections in (0, 4):
        monkeypatch.setattr(sliding_windows, "_CORRECTIONS", corrections)
        errors.append(np.abs(LeastSquaresAR(6).fit(y).params[1:].numpy() - expected).max())
    assert errors[1] < 1e-9 and errors[1] < errors[0] / 10, errors


def test_singular_design_has_the_shortest_solution():
    y = np.tile([1.0, -1.0], 50)  # lags 1, 3, 5 are equal, and so are 2, 4
    with pytest.warns(UserWarning, match="rank 1"):
        model = LeastSquaresAR(4, intercept=False).fit(y)
    np.testing.assert_allclose(model.params, [-0.25, 0.25, -0.25, 0.25], atol=1e-12)
    np.testing.assert_allclose(model.forecast(3), [1, -1, 1], atol=1e-12)
    duplicate = np.stack([np.arange(100.0), np.arange(100.0)], 1)
    with pytest.warns(UserWarning, match="rank"):
        both = LeastSquaresAR(1).fit(wavy(100), duplicate).params[2:]
    assert both[0] == pytest.approx(both[1].item(), rel=1e-6)
    with pytest.warns(UserWarning, match="has rank 5"):  # more columns than windows
        few = LeastSquaresAR(8, intercept=False).fit(wavy(13))
    np.testing.assert_allclose(few.predict(wavy(13)), wavy(13)[8:], rtol=1e-8)


def test_windows_are_never_built():
    """Memory grows with the series and not with the order."""
    y, peaks = torch.from_numpy(wavy(200_000)), []
    from torch.profiler import ProfilerActivity, profile

    for order in (2, 60):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            LeastSquaresAR(order).fit(y)
        sizes = [e.cpu_memory_usage for e in profiler.events()]
        peaks.append(max(sizes))
    assert peaks[1] < 1.1 * peaks[0] < 10 * y.nbytes


def test_faster_than_statsmodels():
    y, seconds = wavy(100_000), {}
    for name, fit in (("ours", LeastSquaresAR(20).fit), ("statsmodels", lambda y: auto_reg(y, 20))):
        fit(y)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            fit(y)
            times.append(time.perf_counter() - start)
        seconds[name] = min(times)
    assert seconds["ours"] < seconds["statsmodels"], seconds


def test_numbers_of_every_kind():
    y = [1, 5, 2, 4, 3, 3, 2, 5]
    expected = LeastSquaresAR(2).fit(y).params
    for given in (np.array(y), torch.tensor(y), torch.tensor(y).float(), np.array(y, dtype=np.float32)):
        assert torch.equal(LeastSquaresAR(2).fit(given).params, expected)
    assert expected.dtype == torch.float64
    assert LeastSquaresAR(0).fit(y).params.item() == pytest.approx(np.mean(y))


ERRORS = [
    (lambda: LeastSquaresAR(-1), "LeastSquaresAR: order must be an integer >= 0, got -1"),
    (lambda: LeastSquaresAR(2.0), "order must be an integer"),
    (lambda: LeastSquaresAR(1, ridge=-1), "ridge must be a finite number >= 0, got -1"),
    (lambda: LeastSquaresAR(3).fit([1, 2, 3]), "y must be longer than the window of 3 values, got 3"),
    (lambda: LeastSquaresAR(1).fit([]), "y must be longer than the window of 1 values, got 0"),
    (lambda: LeastSquaresAR(1).fit([2.0] * 9), "y must vary, got 9 times 2.0"),
    (lambda: LeastSquaresAR(1).fit([1, float("nan"), 2]), "y must be finite, got nan at 1"),
    (lambda: LeastSquaresAR(1).fit([[1, 2], [3, 4]]), "y must be one series"),
    (lambda: LeastSquaresAR(1).fit(["a", "b"]), "y must be real numbers, got <U1"),
    (lambda: LeastSquaresAR(1).fit([1j, 2, 3]), "y must be real numbers, got complex128"),
    (lambda: LeastSquaresAR(1).fit([1, 2, 3], [1, 2]), r"exog must have shape \[3, columns\], got \[2, 1\]"),
    (lambda: LeastSquaresAR(1).fit([1, 2, 3], [1, 2, float("inf")]), "exog must be finite"),
    (lambda: LeastSquaresAR(0, intercept=False).fit([1, 2, 3]), "order must be at least 1 without intercept"),
    (lambda: LeastSquaresAR(1).fit([1, 2, 4]).predict([1]), "predict: y must be longer than the window of 1"),
    (lambda: LeastSquaresAR(1).fit([1, 2, 4]).predict([1, 2], [1, 2]), "exog must have shape"),
    (lambda: LeastSquaresAR(1).fit([1, 2, 4], [1, 0, 1]).forecast(2), "exog must have the 1 columns of the fit"),
    (lambda: LeastSquaresAR(1).fit([1, 2, 4]).forecast(0), "steps must be an integer >= 1, got 0"),
    (lambda: LeastSquaresAR(1).fit([1, 2, 4]).forecast(1, confidence=1.0), "confidence must lie between 0 and 1"),
    (lambda: select_order([1, 2, 4], 3), "select_order: y must be longer than the window"),
    (lambda: select_order([1, 2, 4, 1], 1, "mdl"), "criterion must be one of aic, bic, hqic, got 'mdl'"),
]


@pytest.mark.parametrize("make, message", ERRORS, ids=[message[:40] for _, message in ERRORS])
@pytest.mark.filterwarnings("ignore:LeastSquaresAR.fit. the design")
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_unfitted():
    with pytest.raises(RuntimeError, match="must be fitted first"):
        LeastSquaresAR(1).predict([1, 2, 3])
