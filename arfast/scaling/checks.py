"""Checks of points that a law is fitted to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from arfast.data.checks import check_integer

LOSSES = ("squared", "huber")
MAX_RESAMPLES = 100_000  # each is a fit: a fit.json of a stranger is not to keep a machine for years


def check_positive(name: str, values) -> np.ndarray:
    """The values as float64; ValueError unless all are finite and above 0. ``name`` reads "owner: argument"."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must hold numbers, got {values!r:.100}") from None
    if wrong := array[~(np.isfinite(array) & (array > 0))].tolist():
        raise ValueError(f"{name} must be finite and above 0, got {wrong[0]}")
    return array


def check_points(
    owner: str, columns: Mapping[str, Sequence[float]], *, at_least: int, different: Mapping[str, int]
) -> np.ndarray:
    """Columns of one length as [number of columns, n].

    Args:
        at_least: n. different: how many different values a column must have.

    Raises:
        ValueError: naming the column, the rule and what was found.
    """
    arrays = {name: check_positive(f"{owner}: {name}", values) for name, values in columns.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    for name, shape in shapes.items():
        if len(shape) != 1:
            raise ValueError(f"{owner}: {name} must be one-dimensional, got shape {shape}")
    names, lengths = ", ".join(shapes), [shape[0] for shape in shapes.values()]
    if len(set(lengths)) != 1:
        raise ValueError(f"{owner}: {names} must have equal lengths, got {', '.join(map(str, lengths))}")
    if lengths[0] < at_least:
        raise ValueError(f"{owner}: {names} must have at least {at_least} points, got {lengths[0]}")
    for name, count in different.items():
        found = len(np.unique(arrays[name]))
        if found < count:
            raise ValueError(f"{owner}: {name} must have at least {count} different values, got {found}")
    return np.array(list(arrays.values()))


def check_bootstrap(owner: str, num_resamples: int, confidence: float, seed: int) -> None:
    check_integer(f"{owner}: num_resamples", num_resamples, 20, MAX_RESAMPLES)
    check_integer(f"{owner}: seed", seed, 0, 2**63 - 1)
    if isinstance(confidence, bool) or not isinstance(confidence, (int, float)) or not 0 < confidence < 1:
        raise ValueError(f"{owner}: confidence must be between 0 and 1, got {confidence!r:.100}")


def check_settings(owner: str, loss: str, num_resamples: int, confidence: float, seed: int) -> None:
    if loss not in LOSSES:
        raise ValueError(f"{owner}: loss must be one of {', '.join(LOSSES)}, got {loss!r:.100}")
    check_bootstrap(owner, num_resamples, confidence, seed)
