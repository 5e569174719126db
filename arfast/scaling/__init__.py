"""Scaling laws: plan a sweep of runs, do it, fit the laws to its losses, predict larger runs.

Fits need scipy: ``pip install 'arfast[scaling]'``.
"""

from .isoflop import IsoflopLaw, fit_isoflop, parabola_bias
from .laws import Optimum, ParametricLaw, PowerLaw, ScalingWarning, fit_parametric, fit_power_law
from .plan import PlannedRun, SweepPlan, plan_sweep
from .plots import plot_fit
from .report import ScalingFit, fit_runs
from .results import Runs, read_results
from .shapes import model_shape
from .sweep import run_sweep

__all__ = [
    "IsoflopLaw",
    "Optimum",
    "ParametricLaw",
    "PlannedRun",
    "PowerLaw",
    "Runs",
    "ScalingFit",
    "ScalingWarning",
    "SweepPlan",
    "fit_isoflop",
    "fit_parametric",
    "fit_power_law",
    "fit_runs",
    "model_shape",
    "parabola_bias",
    "plan_sweep",
    "plot_fit",
    "read_results",
    "run_sweep",
]
