"""All laws of a table of runs, what they predict of the runs that they have not seen, and ``fit.json``."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arfast.data.checks import one_line
from arfast.data.files import read_file, write_file

from .checks import check_points, check_settings
from .isoflop import BIAS_WARNING, IsoflopLaw, fit_isoflop, parabola_bias, same_budgets
from .laws import Law, ParametricLaw, PowerLaw, ScalingWarning, fit_parametric, fit_power_law
from .results import Runs

FIT_NAME = "fit.json"
_FORMAT = "arfast-scaling-fit-1"
_MAX_BYTES = 16 << 20
_SETTINGS = ("loss", "num_resamples", "confidence", "seed")


@dataclass(frozen=True, eq=False)
class ScalingFit:
    """The laws of a table of runs.

    parametric: L(N, D) of all runs that are not held out. power_law: L(C) of the best of them at each compute, None
    with fewer than 4 different ones. isoflop: N*(C), None where the runs make no profiles. flops_factor: C / (N D),
    the geometric mean over the runs. notes: what to bear in mind.
    """

    runs: Runs
    parametric: ParametricLaw
    power_law: PowerLaw | None
    isoflop: IsoflopLaw | None
    flops_factor: float
    settings: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def held_out(self) -> list[dict[str, float]]:
        """Of each run that the laws have not seen: what it gave, what L(N, D) says, and the relative error; and what
        L(C) says, of a run of about the best size, and its error."""
        runs = self.runs[self.runs.held_out]
        value, low, high = self.parametric.predict(runs.N, runs.D, return_interval=True)
        columns = dict(N=runs.N, D=runs.D, C=runs.C, measured=runs.L)
        columns |= dict(predicted=value, low=low, high=high, error=value / runs.L - 1)
        if self.power_law is not None:
            value = self.power_law.predict(runs.C)
            columns |= dict(by_compute=value, by_compute_error=value / runs.L - 1)
        rows = zip(*columns.values(), strict=True)
        return [dict(zip(columns, map(float, row), strict=True)) for row in rows]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``fit.json``: the laws with their intervals, and the runs and settings that they follow from."""
        laws = dict(parametric=self.parametric, power_law=self.power_law, isoflop=self.isoflop)
        record = dict(
            format=_FORMAT,
            laws={name: law and _describe(law) for name, law in laws.items()},
            flops_factor=self.flops_factor,
            held_out=self.held_out,
            notes=self.notes,
            settings=self.settings,
            runs={name: getattr(self.runs, name).tolist() for name in ("N", "D", "L", "C", "held_out")},
        )
        write_file(Path(path), (json.dumps(record, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ScalingFit:
        """The fit of a ``fit.json``, or of the directory that holds it: its runs are fitted again, to the same end.

        Raises:
            FileNotFoundError: there is none. ValueError: it is damaged.
        """
        runs, settings = read_fit(path)
        return fit_runs(runs, **settings)


def read_fit(path: str | os.PathLike[str]) -> tuple[Runs, dict[str, Any]]:
    """The runs and the settings that a ``fit.json`` follows from; see `ScalingFit.load`."""
    path = Path(path) / FIT_NAME if Path(path).is_dir() else Path(path)
    if not path.exists():
        raise FileNotFoundError(f"ScalingFit: path must hold a {FIT_NAME}, got none at {str(path)!r}")
    try:
        record = json.loads(read_file(path, _MAX_BYTES))
        if record["format"] != _FORMAT:
            raise ValueError(f"format {record['format']!r} instead of {_FORMAT!r}")
        table, settings = record["runs"], {name: record["settings"][name] for name in _SETTINGS}
        columns = check_points("runs", {name: table[name] for name in ("N", "D", "L", "C")}, at_least=1, different={})
        held_out = table["held_out"]
        if len(held_out) != columns.shape[1] or not all(isinstance(value, bool) for value in held_out):
            raise ValueError("held_out that is not true or false for each run")
        check_settings("settings", **settings)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"ScalingFit: {str(path)!r} must be an intact fit, got: {one_line(error)}") from None
    return Runs(*columns, np.array(held_out)), settings


def fit_runs(
    runs: Runs, *, loss: str = "squared", num_resamples: int = 200, confidence: float = 0.9, seed: int = 0
) -> ScalingFit:
    """Fit all laws to the runs that are not held out.

    Raises:
        ValueError: see `fit_parametric`.
    """
    settings = dict(loss=loss, num_resamples=num_resamples, confidence=confidence, seed=seed)
    seen = runs[~runs.held_out]
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ScalingWarning)
        parametric = fit_parametric(seen.N, seen.D, seen.L, **settings)
        best = _best_of_each_budget(seen)
        power_law = _attempt(notes, lambda: fit_power_law(best.C, best.L, **settings))
        isoflop_settings = {name: value for name, value in settings.items() if name != "loss"}
        isoflop = _attempt(notes, lambda: fit_isoflop(seen.C, seen.N, seen.L, **isoflop_settings))
        if isoflop is not None:
            largest = float(runs.C.max())
            bias = _attempt(notes, lambda: parabola_bias(parametric, seen.C, seen.N, seen.D, largest))
    told = [str(warning.message) for warning in caught if issubclass(warning.category, ScalingWarning)]
    if isoflop is not None and bias is not None:
        told = [text for text in told if text != BIAS_WARNING]
        told.append(f"{BIAS_WARNING}; with these sizes N* at C={largest:.3g} would be {bias:.3f} of that of L(N, D)")
    flops_factor = float(np.exp(np.log(seen.C / (seen.N * seen.D)).mean()))
    return ScalingFit(runs, parametric, power_law, isoflop, flops_factor, settings, tuple(dict.fromkeys(told + notes)))


def _attempt(notes, fit):
    """A law that not every table of runs has; what it lacks becomes a note."""
    try:
        return fit()
    except ValueError as error:
        notes.append(f"left out: {error}")
        return None


def _best_of_each_budget(runs: Runs) -> Runs:
    return runs[np.array([group[np.argmin(runs.L[group])] for group in same_budgets(runs.C)])]


def _describe(law: Law) -> dict[str, Any]:
    return {name: dict(value=law.parameters[name], low=low, high=high) for name, (low, high) in law.intervals.items()}


def table(fit: ScalingFit) -> str:
    """The laws and what they say of the runs that are held out, for people."""
    p, level = fit.parametric, f"{fit.settings['confidence']:.0%} intervals"
    seen = int((~fit.runs.held_out).sum())
    lines = [f"L(N, D) = E + A N^-alpha + B D^-beta, {seen} runs, {level}", *_parameter_lines(p)]
    low, high = p.size_exponent_interval
    lines.append(f"  N*(C) ~ C^{p.size_exponent:.4f}  [{low:.4f}, {high:.4f}], D* ~ C^{1 - p.size_exponent:.4f}")
    if fit.power_law is not None:
        lines += ["L(C) = a C^b + c, the best run of each compute", *_parameter_lines(fit.power_law)]
    if fit.isoflop is not None:
        lines += ["IsoFLOP parabolas: N*(C) = A C^alpha", *_parameter_lines(fit.isoflop)]
    for row in fit.held_out:
        lines.append(
            f"held out: N={row['N']:.4g} D={row['D']:.4g}: predicted {row['predicted']:.4f} "
            f"[{row['low']:.4f}, {row['high']:.4f}], measured {row['measured']:.4f}, error {row['error']:+.2%}"
        )
        if "by_compute" in row:
            lines.append(f"  by L(C): {row['by_compute']:.4f}, error {row['by_compute_error']:+.2%}")
    return "\n".join(lines)


def _parameter_lines(law: Law) -> list[str]:
    intervals = law.intervals
    return [
        f"  {name:<6}{law.parameters[name]:<12.5g} [{low:.5g}, {high:.5g}]" for name, (low, high) in intervals.items()
    ]
