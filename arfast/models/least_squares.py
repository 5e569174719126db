"""Autoregression by least squares: the next value as a linear function of the p before it."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .sliding_windows import Windows, factorize


class LeastSquaresAR:
    """y[t] = c + sum_k a[k] y[t - k] + b . x[t] + noise, k = 1 .. order, fitted by least squares.

    Args:
        order: p, how many values before it predict a value; 0: none.
        ridge: lambda >= 0 of the penalty lambda (sum a^2 + sum b^2) on the sum of squares; the constant is free.
        intercept: whether there is a constant c.

    Attributes, after `fit`:
        params: float64 [intercept + order + exogenous columns]: c, a[1] .. a[p], b; as `statsmodels`' AutoReg has them.
        num_observations: values that were predicted, T - order.
        sigma2: mean of the squared residuals.
        rank: of the design; where it is below the number of columns, which `fit` warns of, the params are the shortest
            of those that fit best, each counted in units of its column's length (centred, where there is a constant).
        aic, bic, hqic: information criteria of Akaike, Schwarz, Hannan and Quinn, for Gaussian noise.

    Raises:
        ValueError: `LeastSquaresAR: <argument> must <rule>, got <actual>`.

    >>> y = [0.0, 1.0]
    >>> for _ in range(50):
    ...     y.append(1.5 * y[-1] - 0.8 * y[-2] + 1)
    >>> model = LeastSquaresAR(2).fit(y)
    >>> [round(value, 6) for value in model.params.tolist()]
    [1.0, 1.5, -0.8]
    >>> model.forecast(3).shape
    torch.Size([3])
    """

    def __init__(self, order: int, ridge: float = 0.0, intercept: bool = True):
        self.order = _checked_order("LeastSquaresAR: order", order)
        if isinstance(ridge, bool) or not isinstance(ridge, (int, float)) or not 0 <= ridge < math.inf:
            raise ValueError(f"LeastSquaresAR: ridge must be a finite number >= 0, got {ridge!r}")
        self.ridge, self.intercept = float(ridge), bool(intercept)
        self.params: Tensor | None = None

    def fit(self, y: ArrayLike | Tensor, exog: ArrayLike | Tensor | None = None) -> LeastSquaresAR:
        """Fit to one series.

        Args:
            y: [T] of real numbers, T > order, not all the same.
            exog: [T] or [T, columns] known beside it, or None: x[t] helps to predict y[t].

        Raises:
            ValueError: the series is too short, constant, or not finite.
        """
        series = _checked_series("LeastSquaresAR.fit", y)
        table = _checked_exog("LeastSquaresAR.fit", exog, len(series), None, series)
        columns = self.intercept + self.order + table.shape[1]
        if columns == 0:
            raise ValueError("LeastSquaresAR.fit: order must be at least 1 without intercept and exog, got 0")
        _check_fits("LeastSquaresAR.fit", series, self.order)
        windows = Windows(series, table, self.order, self.intercept)
        factor = factorize(windows, self.ridge)
        solution, self.rank = factor.solve(windows, self.ridge)
        if self.rank < columns:
            warnings.warn(
                f"LeastSquaresAR.fit: the design of {columns} columns has rank {self.rank}; of the params that fit "
                "alike the shortest are taken",
                stacklevel=2,
            )
        residuals = windows.target - windows.times(solution)
        self.num_observations = windows.num_rows
        self.sigma2 = float(residuals @ residuals) / windows.num_rows
        self.params = windows.public(solution)
        self._last, self._num_exog = series[len(series) - self.order :].clone(), table.shape[1]
        return self

    @property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """(constant [], coefficients of lags [p], of exogenous columns)."""
        if self.params is None:
            raise RuntimeError("LeastSquaresAR: the model must be fitted first, got one without params")
        constant, lags, exog = self.params.split([int(self.intercept), self.order, self._num_exog])
        return constant.sum(), lags, exog

    def predict(self, y: ArrayLike | Tensor, exog: ArrayLike | Tensor | None = None) -> Tensor:
        """One step ahead: what values [T - order] the model expects at t = order .. T - 1, from those before each.

        Args as of `fit`, of this or of another series.
        """
        constant, lags, weights = self._parts
        series = _checked_series("LeastSquaresAR.predict", y)
        table = _checked_exog("LeastSquaresAR.predict", exog, len(series), self._num_exog, series)
        _check_length("LeastSquaresAR.predict", series, self.order)
        return Windows(series, table, self.order, intercept=False).times(torch.cat([weights, lags])) + constant

    def forecast(
        self,
        steps: int,
        exog: ArrayLike | Tensor | None = None,
        return_interval: bool = False,
        confidence: float = 0.95,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The values after the fitted series, each from the ones before it, forecast ones where they are not known.

        Args:
            steps: how many.
            exog: [steps, columns] at those times, if the model has exogenous columns.
            return_interval: also return the bounds between which a value lies with probability `confidence`, for
                Gaussian noise and known params: variance sigma2 * sum_{j < h} psi[j]^2 at step h, with psi the response
                to a unit shock (Box and Jenkins, "Time Series Analysis", section 5.1).

        Returns:
            float64 [steps]; or (forecast, low, high), each [steps].
        """
        constant, lags, weights = self._parts
        steps = _checked_order("LeastSquaresAR.forecast: steps", steps, 1)
        if not 0 < confidence < 1:
            raise ValueError(f"LeastSquaresAR.forecast: confidence must lie between 0 and 1, got {confidence!r}")
        known = _checked_exog("LeastSquaresAR.forecast", exog, steps, self._num_exog, self._last)
        drift = (known @ weights + constant).cpu().numpy()
        mean = _recursion(lags, self._last, drift)
        if not return_interval:
            return mean
        shock = np.zeros(steps)
        shock[0] = 1.0
        response = _recursion(lags, torch.zeros_like(self._last), shock)
        width = NormalDist().inv_cdf(0.5 + confidence / 2) * (self.sigma2 * response.square().cumsum(0)).sqrt()
        return mean, mean - width, mean + width

    def _criterion(self, penalty: float) -> float:
        return _criteria(self.sigma2 * self.num_observations, self.num_observations, len(self.params), penalty)

    @property
    def aic(self) -> float:
        return self._criterion(2.0)

    @property
    def bic(self) -> float:
        return self._criterion(math.log(self.num_observations))

    @property
    def hqic(self) -> float:
        return self._criterion(2 * math.log(math.log(self.num_observations)))


@dataclass(frozen=True)
class OrderSelection:
    """order: with the smallest value; criterion: its name; values [max_order + 1] of orders 0, 1, ..."""

    order: int
    criterion: str
    values: Tensor


def select_order(
    y: ArrayLike | Tensor,
    max_order: int,
    criterion: str = "bic",
    exog: ArrayLike | Tensor | None = None,
    intercept: bool = True,
) -> OrderSelection:
    """The order with the smallest information criterion, all of them judged on the values from `max_order` on.

    One factorisation serves all orders: with lag p as the last column, the squared error of order p - 1 is that of
    order p and the square of one more element of Q^T y.

    Args:
        y, exog: as of `LeastSquaresAR.fit`.
        max_order: largest order to look at.
        criterion: "aic", "bic" or "hqic".

    >>> select_order([1.0, -1.1, 1.0, -0.9, 1.2, -1.0, 0.8, -1.1], 2).order
    1
    """
    penalties = {"aic": lambda n: 2.0, "bic": math.log, "hqic": lambda n: 2 * math.log(math.log(n))}
    if criterion not in penalties:
        raise ValueError(f"select_order: criterion must be one of {', '.join(penalties)}, got {criterion!r}")
    max_order = _checked_order("select_order: max_order", max_order)
    series = _checked_series("select_order", y)
    table = _checked_exog("select_order", exog, len(series), None, series)
    _check_fits("select_order", series, max_order)
    windows = Windows(series, table, max_order, intercept)
    factor = factorize(windows, 0.0)
    solution, _ = factor.solve(windows, 0.0)
    residuals = windows.target - windows.times(solution)
    dropped = factor.projected[windows.num_columns - max_order :].square().flip(0).cumsum(0).flip(0)
    errors = residuals @ residuals + torch.cat([dropped, dropped.new_zeros(1)])
    fixed, rows = windows.num_columns - max_order, windows.num_rows
    penalty = penalties[criterion](rows)
    values = [_criteria(error, rows, fixed + order, penalty) for order, error in enumerate(errors.tolist())]
    return OrderSelection(
        min(range(max_order + 1), key=values.__getitem__), criterion, torch.tensor(values, dtype=torch.float64)
    )


def _recursion(lags: Tensor, before: Tensor, drive: np.ndarray) -> Tensor:
    """z[t] = sum_k lags[k] z[t - k] + drive[t], after the values `before` [p]."""
    order, weights = len(lags), lags.flip(0).cpu().numpy()
    values = np.concatenate([before.cpu().numpy(), drive])
    for t in range(order, len(values)):
        values[t] += weights @ values[t - order : t]
    return torch.from_numpy(values[order:]).to(before.device)


def _criteria(error: float, rows: int, num_params: int, penalty: float) -> float:
    """-2 log likelihood + penalty * parameters, that of the variance among them; -inf for a perfect fit."""
    return rows * (math.log(2 * math.pi * error / rows) + 1) + penalty * (num_params + 1) if error > 0 else -math.inf


def _check_length(where: str, series: Tensor, order: int) -> None:
    if len(series) <= order:
        raise ValueError(f"{where}: y must be longer than the window of {order} values, got {len(series)}")


def _check_fits(where: str, series: Tensor, order: int) -> None:
    _check_length(where, series, order)
    if bool((series == series[0]).all()):
        raise ValueError(f"{where}: y must vary, got {len(series)} times {series[0].item()}")


def _as_tensor(what: str, values: ArrayLike | Tensor) -> Tensor:
    tensor = values.detach() if isinstance(values, Tensor) else np.array(values)
    if isinstance(tensor, np.ndarray) and tensor.dtype.kind in "biuf":
        tensor = torch.from_numpy(tensor)
    if not isinstance(tensor, Tensor) or tensor.is_complex():
        raise ValueError(f"{what} must be real numbers, got {tensor.dtype}")
    return tensor.to(torch.float64)


def _checked_series(where: str, y: ArrayLike | Tensor) -> Tensor:
    series = _as_tensor(f"{where}: y", y)
    if series.ndim != 1:
        raise ValueError(f"{where}: y must be one series [T], got shape {list(series.shape)}")
    if not torch.isfinite(series).all():
        place = int((~torch.isfinite(series)).nonzero()[0])
        raise ValueError(f"{where}: y must be finite, got {series[place].item()} at {place}")
    return series


def _checked_exog(where: str, exog: ArrayLike | Tensor | None, rows: int, columns: int | None, like: Tensor) -> Tensor:
    """Regressors [rows, columns]; none are [rows, 0]."""
    if exog is None:
        if columns:
            raise ValueError(f"{where}: exog must have the {columns} columns of the fit, got None")
        return like.new_empty(rows, 0)
    table = _as_tensor(f"{where}: exog", exog)
    table = table[:, None] if table.ndim == 1 else table
    fits = table.ndim == 2 and len(table) == rows and table.shape[1] == (table.shape[1] if columns is None else columns)
    if not fits or table.shape[1] == 0:
        expected = f"[{rows}, {'columns' if columns is None else columns}]"
        raise ValueError(f"{where}: exog must have shape {expected}, got {list(table.shape)}")
    table = table.to(like)
    if not torch.isfinite(table).all():
        raise ValueError(f"{where}: exog must be finite, got NaN or infinity")
    return table


def _checked_order(where: str, value: int, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{where} must be an integer >= {least}, got {value!r}")
    return value
