"""Steps whose loss or gradient norm is out of line with the steps before them.

A loss spikes when it is above the median of a window by more than six times the window's spread: the median distance
from the median (MAD), or of the values above it, scaled to be a standard deviation for normal noise. A gradient norm,
when it is above ten times its median. Medians, because the window may hold the beginning of a fault. PaLM (Chowdhery et
al., arXiv:2204.02311, section 5.1) went back some hundred steps at a spike and left out the batches around it, which
were harmless at another time.
"""

from __future__ import annotations

from statistics import median

DELAY = 2  # steps from a fault to its effect: a bad update is seen in the loss of the next step, or the one after it
_SPREADS, _NORMS = 6.0, 10.0
_NORMAL = 1.4826  # standard deviation of normal noise / MAD
_SMALLEST_SPREAD = 1e-3  # of the median: a loss that hardly moves is not a measure of noise
_SMALLEST_WINDOW = 8


def describe_spike(
    loss: float, grad_norm: float, losses: list[float], grad_norms: list[float], window: int
) -> str | None:
    """What is out of line in a step, after steps with these losses and gradient norms; None: nothing.

    Nothing is while there are fewer than an eighth of ``window`` steps to compare with.

    >>> describe_spike(9.0, 1.0, [3.0, 3.1, 2.9, 3.0] * 5, [1.0] * 20, window=20)
    'loss 9 is above 3.44'
    """
    if len(losses) < max(_SMALLEST_WINDOW, window // 8):
        return None
    middle = median(losses)
    distances = [value - middle for value in losses]
    # The noise of a loss is skewed: its upper half alone, where that is the wider one.
    deviation = max(median(map(abs, distances)), median([distance for distance in distances if distance >= 0]))
    spread = max(_NORMAL * deviation, _SMALLEST_SPREAD * abs(middle))
    limit = middle + _SPREADS * spread
    if loss > limit:
        return f"loss {loss:.3g} is above {limit:.3g}"
    limit = _NORMS * median(grad_norms)
    if grad_norm > limit > 0:
        return f"gradient norm {grad_norm:.3g} is above {limit:.3g}"
    return None


def remember(values: list[float], value: float, window: int) -> None:
    """Append to the last ``window`` values."""
    values.append(value)
    del values[:-window]
