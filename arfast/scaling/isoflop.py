"""IsoFLOP profiles: for each compute budget a parabola of the loss over log N, and a power law through their lowest
points (Hoffmann et al., arXiv:2203.15556, section 3.2).

The method to look at, not to plan by: the loss is no parabola in log N, so the lowest points are off even without
noise, and the more so the wider and the less centred the sizes are (arXiv:2603.22339). `fit_parametric` has no such
bias; `parabola_bias` tells how large it is for given sizes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .checks import check_bootstrap, check_points, check_positive
from .laws import Law, ParametricLaw, ScalingWarning

_SAME_BUDGET = 1.05  # compute within 5 % counts as one budget: the last step of a run is whole
BIAS_WARNING = (
    "fit_isoflop: parabolas are biased even without noise, more so for wide or uncentred ranges of sizes "
    "(arXiv:2603.22339); fit_parametric is not"
)


@dataclass(frozen=True, eq=False)
class IsoflopLaw(Law):
    """N*(C) = A C ** alpha: see `fit_isoflop`.

    budgets: [m] FLOPs. optimal_N, optimal_L: [m] the lowest point of each parabola. curves: [m, 3] its coefficients,
    highest power first, in log N - centres [m].
    """

    A: float
    alpha: float
    budgets: np.ndarray
    optimal_N: np.ndarray
    optimal_L: np.ndarray
    curves: np.ndarray
    centres: np.ndarray
    names: ClassVar = ("A", "alpha")

    def predict(self, C, return_interval: bool = False):
        """N* for compute C, a number or an array; with ``return_interval`` (N*, low, high)."""
        C = check_positive("predict: C", C)
        value = self.A * C**self.alpha
        if not return_interval:
            return value
        if not self.samples.size:
            return value, value, value
        A, alpha = self.samples.T.reshape(2, -1, *[1] * C.ndim)
        return value, *self.quantiles(A * C**alpha)


def fit_isoflop(
    C: Sequence[float],
    N: Sequence[float],
    L: Sequence[float],
    *,
    num_resamples: int = 200,
    confidence: float = 0.9,
    seed: int = 0,
) -> IsoflopLaw:
    """Fit parabolas to L over log N for each budget, and N*(C) = A C ** alpha to their lowest points.

    Args:
        C, N, L: compute, parameters and loss of each run; runs within 5 % of the compute of the next one are of one
            budget. At least 2 budgets, 3 sizes in each, 4 in one.
        num_resamples, confidence, seed: see `fit_power_law`.

    Raises:
        ValueError: see `fit_parametric`; there is one budget only, one has fewer than 3 sizes, no parabola has a
            residual to tell the noise from, or the loss of a budget has no lowest point.

    Always warns (`ScalingWarning`) of the bias, and of a lowest point outside the sizes that were run.

    >>> law = ParametricLaw(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)
    >>> C, scale = (x.ravel() for x in np.meshgrid([1e18, 1e19, 1e20], [0.5, 0.7, 1.0, 1.4, 2.0], indexing="ij"))
    >>> N = scale * [law.optimum(c).N[0] for c in C]
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore", ScalingWarning)
    ...     fitted = fit_isoflop(C, N, law.predict(N, C / (6 * N)))
    >>> round(fitted.alpha, 3), round(law.size_exponent, 3)
    (0.452, 0.452)
    """
    points = check_points("fit_isoflop", dict(C=C, N=N, L=L), at_least=7, different={})
    check_bootstrap("fit_isoflop", num_resamples, confidence, seed)
    warnings.warn(BIAS_WARNING, ScalingWarning, stacklevel=2)
    groups = _budgets(*points)
    budgets = np.array([math.exp(np.log(group[0]).mean()) for group in groups])
    centres = np.array([np.log(group[1]).mean() for group in groups])
    logs = [np.log(group[1]) - centre for group, centre in zip(groups, centres, strict=True)]
    curves = np.array([np.polyfit(x, group[2], 2) for x, group in zip(logs, groups, strict=True)])
    for budget, curve, x in zip(budgets, curves, logs, strict=True):
        if curve[0] <= 0:
            raise ValueError(f"fit_isoflop: L must have a lowest point at each C, got none at C={budget:.3g}")
        if not x.min() <= _vertices(curve) <= x.max():
            message = f"fit_isoflop: the lowest point at C={budget:.3g} is outside of the sizes that were run there"
            warnings.warn(message, ScalingWarning, stacklevel=2)
    samples, residuals = _resample(budgets, centres, logs, [group[2] for group in groups], curves, num_resamples, seed)
    lowest = _vertices(curves)
    A, alpha = _line(budgets, centres + lowest)
    return IsoflopLaw(
        float(A),
        float(alpha),
        budgets,
        np.exp(centres + lowest),
        curves[:, 2] - curves[:, 1] ** 2 / (4 * curves[:, 0]),
        curves,
        centres,
        samples=samples,
        residuals=residuals,
        confidence=confidence,
    )


def parabola_bias(
    law: ParametricLaw, C: Sequence[float], N: Sequence[float], D: Sequence[float], budget: float
) -> float:
    """N* by parabolas over N* by the law, at ``budget``, when the runs C, N, D have exactly the losses of the law."""
    C, N, D = check_points("parabola_bias", dict(C=C, N=N, D=D), at_least=7, different={})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScalingWarning)
        fitted = fit_isoflop(C, N, law.predict(N, D), num_resamples=20)
    flops_factor = float(np.exp(np.log(C / (N * D)).mean()))
    return float(fitted.predict(budget)) / law.optimum(budget, flops_factor).N[0]


def same_budgets(C: np.ndarray) -> list[np.ndarray]:
    """Indices of the runs of each budget, in ascending order: of compute within 5 % of that of the next one."""
    order = np.argsort(C, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(np.log(C[order])) > math.log(_SAME_BUDGET)) + 1)


def _budgets(C, N, L):
    """Runs [3, n] of each budget, in ascending order."""
    groups = [np.array([C, N, L])[:, group] for group in same_budgets(C)]
    if len(groups) < 2:
        raise ValueError(f"fit_isoflop: C must hold at least 2 budgets, got {len(groups)}")
    for group in groups:
        if (found := len(np.unique(group[1]))) < 3:
            budget = f"C={group[0].mean():.3g}"
            raise ValueError(f"fit_isoflop: N must have at least 3 different values at each C, got {found} at {budget}")
    if len(C) == 3 * len(groups):
        raise ValueError("fit_isoflop: N must have more than 3 values at some C to tell the noise, got 3 at each")
    return groups


def _vertices(curves):
    """Where the parabolas [..., 3] are lowest [...]."""
    return -curves[..., 1] / (2 * curves[..., 0])


def _line(budgets, log_N):
    """(A, alpha) [2, ...] of log N = log A + alpha log C through points [..., m]."""
    alpha, log_A = np.polyfit(np.log(budgets), log_N.T, 1)
    return np.array([np.exp(log_A), alpha])


def _resample(budgets, centres, logs, losses, curves, num_resamples, seed):
    """Residual bootstrap over all parabolas together, as in `arfast.scaling.power_sum.resample`."""
    values = [np.polyval(curve, x) for curve, x in zip(curves, logs, strict=True)]
    residuals = np.concatenate([loss - value for loss, value in zip(losses, values, strict=True)])
    residuals *= math.sqrt(len(residuals) / (len(residuals) - 3 * len(budgets)))
    generator = np.random.default_rng(seed)
    lowest = []
    for x, value in zip(logs, values, strict=True):
        drawn = generator.choice(residuals, (len(x), num_resamples))
        again = np.polyfit(x, value[:, None] + drawn, 2).T
        again[again[:, 0] <= 0] = np.nan  # a parabola that the noise turned over
        lowest.append(_vertices(again))
    points = centres[:, None] + np.array(lowest)  # [m, R]
    return _line(budgets, points.T[np.isfinite(points).all(axis=0)]).T, residuals
