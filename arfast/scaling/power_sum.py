"""Least squares for y = c + sum_k a_k x_k ** -theta_k with c, a_k >= 0, by variable projection.

For given exponents the model is linear, so its coefficients follow by non-negative least squares, and what is left to
search for are the exponents alone (Golub and Pereyra 1973, SIAM J. Numer. Anal. 10(2), equation 1.4): one or two
numbers, first on a grid, then by Gauss-Newton steps with the derivative of Kaufman (1975, BIT 15, equation 2.7). There
are no starting points to choose and nothing that stops early, which is what spoilt the published fit of the five
parameters at once (Besiroglu et al., arXiv:2404.10102, section 3).

Variables are divided by their geometric means, so that columns are of one scale; a parameter vector is
[c, a_1, ..., a_K, theta_1, ..., theta_K] in these units.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

MIN_EXPONENT, MAX_EXPONENT = 0.01, 4.0
HUBER_DELTA = 1e-3  # Hoffmann et al., arXiv:2203.15556, appendix D.2
_GRID_POINTS = {1: 160, 2: 24}  # per exponent
_TOLERANCE = 1e-14


def _scipy_optimize():
    """scipy.optimize, which only fits need.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from scipy import optimize
    except ImportError:
        raise ImportError("scaling: scipy must be installed to fit, got none (pip install 'arfast[scaling]')") from None
    return optimize


def evaluate(parameters: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Values of models [..., 1 + 2 K] at points u [K, n], logarithms of the scaled variables: [..., n]."""
    num_terms = len(u)
    a, theta = parameters[..., 1 : 1 + num_terms, None], parameters[..., 1 + num_terms :, None]
    return parameters[..., :1] + (a * np.exp(-theta * u)).sum(axis=-2)


def fit(u: np.ndarray, y: np.ndarray, *, huber: bool = False, start: np.ndarray | None = None) -> np.ndarray:
    """Parameters of the best model of y [n] at u [K, n].

    Args:
        huber: minimise the Huber loss of the residuals of log y (see `_fit_huber`) instead of the squares of those of
            y.
        start: parameters nearby, which spare the grid.
    """
    theta = _search_grid(u, y) if start is None else start[1 + len(u) :]
    parameters = _project(_refine(theta, u, y), u, y)[0]
    if not huber:
        return parameters
    return _fit_huber(parameters, u, y, many_starts=start is None)


def _project(theta, u, y):
    """(parameters with the best coefficients for these exponents, columns [n, 1 + K])."""
    columns = np.concatenate([np.ones((1, len(y))), np.exp(-theta[:, None] * u)]).T
    coefficients, _ = _scipy_optimize().nnls(columns, y)
    return np.concatenate([coefficients, theta]), columns


def _residuals(theta, u, y):
    parameters, _ = _project(theta, u, y)
    return evaluate(parameters, u) - y


def _jacobian(theta, u, y):
    """Kaufman's: the derivative of the columns, without what the active columns can take up."""
    parameters, columns = _project(theta, u, y)
    num_terms = len(u)
    active = np.linalg.qr(columns[:, parameters[: 1 + num_terms] > 0])[0]
    change = -(parameters[1 : 1 + num_terms, None] * u).T * columns[:, 1:]
    return change - active @ (active.T @ change)


def _search_grid(u, y):
    axis = np.geomspace(2 * MIN_EXPONENT, MAX_EXPONENT / 2, _GRID_POINTS[len(u)])
    grid = map(np.array, itertools.product(axis, repeat=len(u)))
    return min(grid, key=lambda theta: float(np.square(_residuals(theta, u, y)).sum()))


def _refine(theta, u, y):
    result = _scipy_optimize().least_squares(
        _residuals,
        np.clip(theta, 1.001 * MIN_EXPONENT, 0.999 * MAX_EXPONENT),
        _jacobian,
        bounds=(MIN_EXPONENT, MAX_EXPONENT),
        args=(u, y),
        **dict.fromkeys(("ftol", "xtol", "gtol"), _TOLERANCE),
        max_nfev=200,
    )
    return result.x


def _fit_huber(start, u, y, many_starts):
    """Minimum of sum_i Huber(log y_i - log model_i) over logarithms of the coefficients and the exponents.

    The objective of Hoffmann et al., arXiv:2203.15556, equation 10, with delta = 1e-3. It is not convex: it is searched
    from the least-squares solution and from others with its exponents halved and doubled. Sums, not means: a mean over
    the points is so small that the optimizer of Hoffmann et al. stopped early (Besiroglu et al., section 3).
    """
    optimize, num_terms = _scipy_optimize(), len(u)
    y_log = np.log(y)

    def terms(p):
        return np.concatenate([np.full((1, len(y)), p[0]), p[1 : 1 + num_terms, None] - p[1 + num_terms :, None] * u])

    def residuals(p):
        return np.logaddexp.reduce(terms(p), axis=0) - y_log

    def jacobian(p):
        logs = terms(p)
        weights = np.exp(logs - np.logaddexp.reduce(logs, axis=0))  # of each term in the model, [1 + K, n]
        return np.concatenate([weights, -weights[1:] * u]).T

    floor = 1e-9 * y.mean()  # a coefficient of zero has no logarithm
    best = None
    for factors in itertools.product((1.0, 0.5, 2.0) if many_starts else (1.0,), repeat=num_terms):
        theta = np.clip(start[1 + num_terms :] * factors, 1.001 * MIN_EXPONENT, 0.999 * MAX_EXPONENT)
        first = start if not many_starts else _project(theta, u, y)[0]
        p = np.concatenate([np.log(np.maximum(first[: 1 + num_terms], floor)), theta])
        free = [np.inf] * (1 + num_terms)
        result = optimize.least_squares(
            residuals,
            p,
            jacobian,
            bounds=([-x for x in free] + [MIN_EXPONENT] * num_terms, free + [MAX_EXPONENT] * num_terms),
            loss="huber",
            f_scale=HUBER_DELTA,
            x_scale="jac",
            **dict.fromkeys(("ftol", "xtol", "gtol"), _TOLERANCE),
            max_nfev=500,
        )
        if best is None or result.cost < best.cost:
            best = result
    return np.concatenate([np.exp(best.x[: 1 + num_terms]), best.x[1 + num_terms :]])


def at_edge(parameters: np.ndarray, num_terms: int) -> bool:
    """Whether an exponent is at the end of its range: the points do not say what it is."""
    theta = parameters[1 + num_terms :]
    return bool(np.any(theta < 1.01 * MIN_EXPONENT) or np.any(theta > 0.99 * MAX_EXPONENT))


def unscale(parameters: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """The same models [..., 1 + 2 K] in the units of x, whose logarithms have the means ``centre`` [K]."""
    num_terms = len(centre)
    factors = np.exp(parameters[..., 1 + num_terms :] * centre)
    result = parameters.copy()
    result[..., 1 : 1 + num_terms] *= factors
    return result


def num_parameters(num_terms: int) -> int:
    return 1 + 2 * num_terms


def resample(
    u: np.ndarray,
    y: np.ndarray,
    parameters: np.ndarray,
    *,
    huber: bool,
    num_resamples: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Residual bootstrap (Efron and Tibshirani 1993, section 9.4): the design stays, residuals are drawn anew.

    With as few runs as a sweep has, drawing whole runs would leave out some sizes altogether. Since p parameters have
    been fitted, residuals are smaller than the noise: those of y are centred and multiplied by sqrt(n / (n - p)). The
    Huber fit is close to one of absolute values, which goes through p of the points: so the p smallest residuals of
    log y are left out, and those of wrong points stay.

    Returns:
        Parameters of the refitted models [R, 1 + 2 K], and the residuals that were drawn from [n].
    """
    model, n = evaluate(parameters, u), len(y)
    if huber:
        residuals = np.log(y / model)
        residuals = residuals[np.argsort(np.abs(residuals))[num_parameters(len(u)) :]]
    else:
        residuals = y - model
        residuals = (residuals - residuals.mean()) * math.sqrt(n / (n - num_parameters(len(u))))
    generator = np.random.default_rng(seed)
    samples = []
    for drawn in generator.choice(residuals, (num_resamples, n)):
        again = model * np.exp(drawn) if huber else np.maximum(model + drawn, 1e-9 * model)
        samples.append(fit(u, again, huber=huber, start=parameters))
    return np.array(samples), residuals
