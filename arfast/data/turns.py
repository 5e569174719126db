"""Which of k sources each row of a mixture comes from: a periodic order, even at every place.

Tijdeman, "The chairman assignment problem" (Discrete Mathematics 32, 1980): |a_i(n) - f_i n| <= 1 - 1 / (2 (k - 1)),
where a_i(n) of the first n rows come from source i, whose fraction is f_i.
"""

import math
from collections.abc import Sequence

import numpy as np

MAX_PERIOD = 10_000


def rows_per_period(fractions: Sequence[float]) -> list[int]:
    """How many rows of a period belong to each source, by the largest remainder; a period of at most 10,000 rows.

    >>> rows_per_period([0.5, 0.25, 0.17, 0.08])
    [50, 25, 17, 8]
    """
    exact = [round(fraction * MAX_PERIOD, 6) for fraction in fractions]
    counts = [math.floor(count) for count in exact]
    by_remainder = sorted(range(len(counts)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: MAX_PERIOD - sum(counts)]:
        counts[i] += 1
    divisor = math.gcd(*counts)
    return [count // divisor for count in counts]


def spread(counts: Sequence[int]) -> np.ndarray:
    """The source of each row of a period: of all that may come, that whose share is the first to run late.

    Args:
        counts: rows of each of k sources in the period, at least 1 each.

    Returns:
        int64 [sum(counts)]; any beginning deviates from the fractions by less than one row of each source.
    """
    period, scale = sum(counts), max(1, 2 * (len(counts) - 1))
    taken = [0] * len(counts)
    order = []
    for n in range(1, period + 1):
        # Multiplied by period * scale, so that all is in integers: how far behind its share each source is.
        behind = [scale * (count * n - period * done) for count, done in zip(counts, taken, strict=True)]
        due = [i for i in range(len(counts)) if behind[i] >= period or len(counts) == 1]
        chosen = min(due, key=lambda i: ((scale - 1) * period - behind[i]) / counts[i])
        taken[chosen] += 1
        order.append(chosen)
    return np.array(order)


class Turns:
    """Which source, and which of its rows, each row of the endless mixture is; all in constant time."""

    def __init__(self, counts: Sequence[int]):
        self.counts = np.array(counts)
        self.period = int(self.counts.sum())
        self._order = spread(counts)
        taken = np.cumsum(self._order[:, None] == np.arange(len(counts)), axis=0)
        # Rows of each source before each place, int64 [period + 1, k].
        self._before = np.concatenate([np.zeros((1, len(counts)), dtype=np.int64), taken])

    def rows_before(self, row: int) -> np.ndarray:
        """How many of the first ``row`` rows come from each source, [k]."""
        periods, place = divmod(row, self.period)
        return periods * self.counts + self._before[place]

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, number among the rows of that source) of each row [N]."""
        periods, place = np.divmod(rows, self.period)
        source = self._order[place]
        return source, periods * self.counts[source] + self._before[place, source]

    def row_of(self, source: int, number: int) -> int:
        """The row of the mixture that is row ``number`` of a source."""
        periods, rest = divmod(number, int(self.counts[source]))
        return periods * self.period + int(np.flatnonzero(self._order == source)[rest])
