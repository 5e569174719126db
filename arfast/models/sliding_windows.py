"""The windows of a series as a least-squares problem, factorised without building them.

Of the design X, whose row t is (1, x[t], y[t-1], ..., y[t-p]), only the Gram matrix is needed, and that of neighbouring
windows slides: with S[i, j] = sum_t y[t-i] y[t-j] over t = p .. n-1,

    S[i+1, j+1] = S[i, j] + y[p-1-i] y[p-1-j] - y[n-1-i] y[n-1-j],

so that p + 1 inner products of the series with itself give all of it: time O(n p + p^3), memory O(n).

A Gram matrix has the squared condition of its design. What its Cholesky factor R loses is won back by corrected
seminormal equations, R^T R d = X^T (y - X b), with residuals from the data (Bjorck, "Stability analysis of the method
of seminormal equations for linear least squares problems", Linear Algebra and its Applications 88/89, 1987). Where the
condition is too bad for that, R comes from QR of the windows in blocks, and a singular design has the shortest of its
solutions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Of the columns scaled to length 1: each correction multiplies the error by about condition^2 * 1e-16.
_LARGEST_CONDITION, _CORRECTIONS = 1e6, 4
_ENOUGH = 1e-12  # after a correction this small relative to the solution, what is left is rounding
_BLOCK_ROWS = 1 << 16


class Windows:
    """The design matrix of a series, as a linear map; its rows exist in blocks only.

    Columns: the constant, exogenous columns, lags 1 .. p. With a constant, series and exogenous columns are centred,
    which changes the constant alone and takes the condition down by orders of magnitude.
    """

    def __init__(self, series: Tensor, exog: Tensor, order: int, intercept: bool):
        self.order, self.intercept = order, intercept
        self._level = series.mean() if intercept else series.new_zeros(())
        self._exog_level = exog.mean(0) if intercept else exog.new_zeros(exog.shape[1])
        self._series = series - self._level
        constant = series.new_ones(len(series) - order, int(intercept))
        self._others = torch.cat([constant, exog[order:] - self._exog_level], 1)
        self.num_rows, self.num_columns = len(series) - order, self._others.shape[1] + order
        self.target = self._series[order:]

    def _lag(self, k: int) -> Tensor:
        return self._series[self.order - k : len(self._series) - k]

    def times(self, coefficients: Tensor) -> Tensor:
        """X b, [num_rows]."""
        others, lags = coefficients.split([self._others.shape[1], self.order])
        out = self._others @ others
        for k, weight in enumerate(lags.tolist(), start=1):
            out.add_(self._lag(k), alpha=weight)
        return out

    def transposed_times(self, residuals: Tensor) -> Tensor:
        """X^T r, [num_columns]."""
        lags = [self._lag(k) @ residuals for k in range(1, self.order + 1)]
        return torch.cat([self._others.T @ residuals, *(lag[None] for lag in lags)])

    def gram(self) -> Tensor:
        """[X y]^T [X y], [num_columns + 1, num_columns + 1], by sliding products."""
        p, z = self.order, self._series
        lags = z.new_empty(p + 1, p + 1)
        lags[0] = lags[:, 0] = torch.stack([self._lag(k) @ self.target for k in range(p + 1)])
        entering, leaving = z[:p].flip(0), z[len(z) - p :].flip(0)
        slide = torch.outer(entering, entering) - torch.outer(leaving, leaving)
        for i in range(p):
            lags[i + 1, 1:] = lags[i, :-1] + slide[i]
        cross = torch.stack([self._others.T @ self._lag(k) for k in range(p + 1)], 1)
        whole = torch.cat([torch.cat([self._others.T @ self._others, cross], 1), torch.cat([cross.T, lags], 1)])
        target = self._others.shape[1]
        places = [i for i in range(len(whole)) if i != target] + [target]
        return whole[places][:, places]

    def penalty(self, ridge: float) -> Tensor:
        """Of each squared coefficient, [num_columns]: the constant is free."""
        penalty = self._series.new_full((self.num_columns,), ridge)
        penalty[: self.intercept] = 0
        return penalty

    def blocks(self, num_rows: int) -> Iterator[Tensor]:
        """The rows of [X y], some at a time."""
        lags = self._series.unfold(0, self.order + 1, 1).flip(1)  # target, lag 1, ..., lag p
        for first in range(0, self.num_rows, num_rows):
            some = slice(first, first + num_rows)
            yield torch.cat([self._others[some], lags[some, 1:], lags[some, :1]], 1)

    def public(self, coefficients: Tensor) -> Tensor:
        """Constant, lags, exogenous columns, of the series as it was given."""
        constant, exog, lags = coefficients.split(
            [int(self.intercept), self._others.shape[1] - self.intercept, self.order]
        )
        constant = constant + self._level * (1 - lags.sum()) - self._exog_level @ exog
        return torch.cat([constant, lags, exog])


@dataclass(frozen=True)
class Factor:
    """R [k, k] with R^T R = D^-1 (X^T X + ridge) D^-1, and Q^T y.

    projected: Q^T y [k]. scale: the diagonal of D [k], the lengths of the columns. corrects: whether the residuals of
    the data are to correct what R, made of a Gram matrix, has lost.
    """

    triangle: Tensor
    projected: Tensor
    scale: Tensor
    corrects: bool

    def solve(self, windows: Windows, ridge: float) -> tuple[Tensor, int]:
        """(coefficients [k], rank)."""
        if not self.corrects:
            u, s, vh = torch.linalg.svd(self.triangle)
            cutoff = s[:1] * max(windows.num_rows, len(s)) * torch.finfo(s.dtype).eps
            inverse = torch.where(s > cutoff, 1 / s, 0)
            return vh.T @ (inverse * (u.T @ self.projected)) / self.scale, int((s > cutoff).sum())
        solution = self._back_substitute(self.projected)
        penalty = windows.penalty(ridge)
        for _ in range(_CORRECTIONS):
            residuals = windows.target - windows.times(solution)
            right = (windows.transposed_times(residuals) - penalty * solution) / self.scale
            half = torch.linalg.solve_triangular(self.triangle.T, right[:, None], upper=False)[:, 0]
            step = self._back_substitute(half)
            solution = solution + step
            if step.norm() <= _ENOUGH * solution.norm():
                break
        return solution, len(solution)

    def _back_substitute(self, right: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.triangle, right[:, None], upper=True)[:, 0] / self.scale


def factorize(windows: Windows, ridge: float) -> Factor:
    gram = windows.gram()
    penalty = windows.penalty(ridge)
    diagonal = gram.diagonal()[:-1] + penalty
    scale = torch.where(diagonal > 0, diagonal, 1).sqrt()
    scaled = (gram[:-1, :-1] + penalty.diag()) / torch.outer(scale, scale)
    lower, failed = torch.linalg.cholesky_ex(scaled)
    if not failed and float(torch.linalg.cond(lower)) <= _LARGEST_CONDITION:
        projected = torch.linalg.solve_triangular(lower, (gram[:-1, -1] / scale)[:, None], upper=False)[:, 0]
        return Factor(lower.T, projected, scale, corrects=True)
    rows = torch.cat([(penalty.sqrt() / scale).diag(), torch.zeros_like(scale)[:, None]], 1)
    weights = torch.cat([1 / scale, torch.ones_like(scale[:1])])
    for block in windows.blocks(_BLOCK_ROWS):
        rows = torch.linalg.qr(torch.cat([rows, block * weights]), mode="r").R
    columns = windows.num_columns
    return Factor(rows[:columns, :columns], rows[:columns, -1], scale, corrects=False)
