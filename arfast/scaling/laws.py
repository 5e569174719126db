"""The loss as a function of compute, and of parameters and tokens, with bootstrap intervals.

L(C) = a C ** b + c with b < 0 (Kaplan et al., arXiv:2001.08361, with the constant of Henighan et al.,
arXiv:2010.14701), and L(N, D) = E + A N ** -alpha + B D ** -beta (Hoffmann et al., arXiv:2203.15556, equation 2).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from . import power_sum
from .checks import check_points, check_positive, check_settings


class ScalingWarning(UserWarning):
    """A law that the points do not determine, or a method that is known to be biased."""


@dataclass(frozen=True, eq=False)
class Law:
    """A fitted law; of one that is given by its parameters alone, the intervals have no width.

    samples: [R, p], parameters of the bootstrap; residuals: of the points, those of log L when ``relative``.
    """

    samples: np.ndarray = field(default_factory=lambda: np.empty(0), kw_only=True, repr=False)
    residuals: np.ndarray = field(default_factory=lambda: np.empty(0), kw_only=True, repr=False)
    relative: bool = field(default=False, kw_only=True, repr=False)
    confidence: float = field(default=0.9, kw_only=True, repr=False)

    names: ClassVar[tuple[str, ...]]

    @property
    def parameters(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in self.names}

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Of each parameter, at the level ``confidence``."""
        if not self.samples.size:
            return {name: (value, value) for name, value in self.parameters.items()}
        low, high = self.quantiles(self.samples)
        return {name: (float(low[i]), float(high[i])) for i, name in enumerate(self.names)}

    def quantiles(self, values: np.ndarray) -> np.ndarray:
        """Lower and upper end [2, ...] of what the bootstrap gave, [R, ...]."""
        tail = (1 - self.confidence) / 2
        return np.quantile(values, [tail, 1 - tail], axis=0)

    def _with_interval(self, value, sampled):
        """(value, low, high) of a measurement: the law is uncertain, and a run deviates from it."""
        if not self.samples.size:
            return value, value, value
        noise = np.random.default_rng(0).choice(self.residuals, sampled.shape)
        low, high = self.quantiles(sampled * np.exp(noise) if self.relative else sampled + noise)
        return value, low, high


@dataclass(frozen=True, eq=False)
class PowerLaw(Law):
    """L(C) = a C ** b + c: see `fit_power_law`.

    >>> PowerLaw(a=2.0, b=-0.5, c=1.0).predict(4.0)
    np.float64(2.0)
    """

    a: float
    b: float
    c: float
    names = ("a", "b", "c")

    def predict(self, C, return_interval: bool = False):
        """L at compute C, a number or an array; with ``return_interval`` (L, low, high) of a run there."""
        C = check_positive("predict: C", C)
        value = self.a * C**self.b + self.c
        if not return_interval:
            return value
        a, b, c = self.samples.reshape(-1, 3).T.reshape(3, -1, *[1] * C.ndim)
        return self._with_interval(value, a * C**b + c)


@dataclass(frozen=True)
class Optimum:
    """The compute-optimal run: parameters N, tokens D, the loss L, each as (value, low, high)."""

    N: tuple[float, float, float]
    D: tuple[float, float, float]
    L: tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class ParametricLaw(Law):
    """L(N, D) = E + A N ** -alpha + B D ** -beta: see `fit_parametric`.

    The law of Besiroglu et al. (arXiv:2404.10102), and what it says about the compute of Gopher:

    >>> law = ParametricLaw(E=1.8172, A=482.01, alpha=0.3478, B=2085.43, beta=0.3658)
    >>> f"{law.optimum(5.76e23).N[0]:.2e}"
    '7.22e+10'
    """

    E: float
    A: float
    alpha: float
    B: float
    beta: float
    names = ("E", "A", "alpha", "B", "beta")

    def predict(self, N, D, return_interval: bool = False):
        """L of N parameters after D tokens; with ``return_interval`` (L, low, high) of such a run."""
        N, D = np.broadcast_arrays(check_positive("predict: N", N), check_positive("predict: D", D))
        value = self.E + self.A * N**-self.alpha + self.B * D**-self.beta
        if not return_interval:
            return value
        E, A, alpha, B, beta = self.samples.reshape(-1, 5).T.reshape(5, -1, *[1] * N.ndim)
        return self._with_interval(value, E + A * N**-alpha + B * D**-beta)

    @property
    def size_exponent(self) -> float:
        """Of N*(C), the best number of parameters for compute C: beta / (alpha + beta); that of D* is the rest to 1."""
        return self.beta / (self.alpha + self.beta)

    @property
    def size_exponent_interval(self) -> tuple[float, float]:
        if not self.samples.size:
            return self.size_exponent, self.size_exponent
        low, high = self.quantiles(self.samples[:, 4] / (self.samples[:, 2] + self.samples[:, 4]))
        return float(low), float(high)

    def optimum(self, C: float, flops_factor: float = 6.0) -> Optimum:
        """The lowest loss of compute C = ``flops_factor`` N D (Hoffmann et al., equation 4).

        N* = G (C / 6) ** (beta / (alpha + beta)) with G = (alpha A / (beta B)) ** (1 / (alpha + beta)).
        """
        C, flops_factor = (
            float(check_positive(f"optimum: {n}", v)) for n, v in (("C", C), ("flops_factor", flops_factor))
        )
        points = np.concatenate([[[getattr(self, name) for name in self.names]], self.samples.reshape(-1, 5)])
        E, A, alpha, B, beta = points.T
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):  # a term that a resample lacks
            N = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (C / flops_factor) ** (beta / (alpha + beta))
            D = C / flops_factor / N
            L = E + A * N**-alpha + B * D**-beta
        ends = []
        for values in (N, D, L):
            known = values[1:][np.isfinite(values[1:])]
            ends.append((float(values[0]), *map(float, self.quantiles(known) if known.size else values[[0, 0]])))
        return Optimum(*ends)


def fit_power_law(
    C: Sequence[float],
    L: Sequence[float],
    *,
    loss: str = "squared",
    num_resamples: int = 200,
    confidence: float = 0.9,
    seed: int = 0,
) -> PowerLaw:
    """Fit L(C) = a C ** b + c, a, c >= 0 > b, by variable projection.

    Args:
        C, L: compute and loss of the best run for each compute, at least 4.
        loss: "squared", of the residuals of L, is right for the noise of a sweep, which is much the same in all runs,
            and is exact to rounding without noise; "huber", of those of log L (Hoffmann et al., appendix D), is for
            points some of which are wrong.
        num_resamples: of the bootstrap. confidence: of the intervals. seed: of the bootstrap.

    Raises:
        ValueError: see `fit_parametric`. ImportError: scipy is missing.

    >>> C = np.geomspace(1e15, 1e20, 6)
    >>> law = fit_power_law(C, 60 * C**-0.1 + 1.7)
    >>> round(law.a, 6), round(law.b, 9), round(law.c, 6)
    (60.0, -0.1, 1.7)
    """
    points = check_points("fit_power_law", dict(C=C, L=L), at_least=4, different=dict(C=4))
    estimate, common = _fit("fit_power_law", points[:1], points[1], loss, num_resamples, confidence, seed)
    return PowerLaw(
        *map(float, _power_law_order(estimate)), samples=_power_law_order(common.pop("samples")).T, **common
    )


def _power_law_order(parameters):
    """(a, b, c) of [c, a, theta]."""
    c, a, theta = parameters.T
    return np.array([a, -theta, c])


def fit_parametric(
    N: Sequence[float],
    D: Sequence[float],
    L: Sequence[float],
    *,
    loss: str = "squared",
    num_resamples: int = 200,
    confidence: float = 0.9,
    seed: int = 0,
) -> ParametricLaw:
    """Fit L(N, D) = E + A N ** -alpha + B D ** -beta, E, A, B >= 0, by variable projection.

    Args:
        N, D, L: parameters, tokens and loss of at least 6 runs, with 3 different N and 3 different D.
        loss, num_resamples, confidence, seed: see `fit_power_law`.

    Raises:
        ValueError: lengths differ, a value is not finite and above 0, there are not more points than parameters, too
            few of them are different, or an option is out of range.
        ImportError: scipy is missing.

    >>> N, D = (x.ravel() for x in np.meshgrid(np.geomspace(1e7, 1e9, 4), np.geomspace(1e9, 1e11, 4)))
    >>> law = fit_parametric(N, D, 1.69 + 406.4 * N**-0.34 + 410.7 * D**-0.28)
    >>> round(law.alpha, 6), round(law.beta, 6), round(law.E, 6)
    (0.34, 0.28, 1.69)
    """
    points = check_points("fit_parametric", dict(N=N, D=D, L=L), at_least=6, different=dict(N=3, D=3))
    estimate, common = _fit("fit_parametric", points[:2], points[2], loss, num_resamples, confidence, seed)
    order = [0, 1, 3, 2, 4]  # E, A, alpha, B, beta of [E, A, B, alpha, beta]
    return ParametricLaw(*map(float, estimate[order]), samples=common.pop("samples")[:, order], **common)


def _fit(owner, x, y, loss, num_resamples, confidence, seed):
    """(parameters in the units of x, what all laws hold of their bootstrap)."""
    check_settings(owner, loss, num_resamples, confidence, seed)
    logs = np.log(x)
    centre = logs.mean(axis=1)
    u, huber = logs - centre[:, None], loss == "huber"
    estimate = power_sum.fit(u, y, huber=huber)
    if power_sum.at_edge(estimate, len(x)):
        message = f"{owner}: an exponent is at the end of its range: the points do not determine it"
        warnings.warn(message, ScalingWarning, stacklevel=3)
    samples, residuals = power_sum.resample(u, y, estimate, huber=huber, num_resamples=num_resamples, seed=seed)
    common = dict(
        samples=power_sum.unscale(samples, centre), residuals=residuals, relative=huber, confidence=confidence
    )
    return power_sum.unscale(estimate, centre), common
