"""The figure of a fit: loss over tokens with the law's curves, IsoFLOP profiles, prediction against measurement."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from arfast.figures import save_figure

from .report import ScalingFit


def plot_fit(fit: ScalingFit, path: Path) -> bool:
    """Draw the figure as a PNG; False without matplotlib."""

    def draw(figure) -> None:
        panels = figure.subplots(1, 3)
        for axes, plot in zip(panels, (_plot_surface, _plot_profiles, _plot_agreement), strict=True):
            plot(axes, fit)
            axes.grid(alpha=0.3)

    return save_figure(path, draw, (15, 4.6))


def _plot_surface(axes, fit):
    from matplotlib import colormaps

    runs = fit.runs
    sizes = np.unique(runs.N)
    tokens = np.geomspace(runs.D.min(), runs.D.max(), 100)
    for size, color in zip(sizes, colormaps["viridis"](np.linspace(0, 0.9, len(sizes))), strict=True):
        axes.plot(tokens, fit.parametric.predict(size, tokens), color=color, linewidth=1)
        for held_out, marker in ((False, "o"), (True, "*")):
            chosen = (runs.N == size) & (runs.held_out == held_out)
            label = f"N = {size:.3g}" if not held_out and chosen.any() else None
            axes.plot(
                runs.D[chosen], runs.L[chosen], marker, color=color, label=label, markersize=12 if held_out else 5
            )
    axes.set(
        xscale="log", xlabel="tokens D", ylabel="validation loss (nats per token)", title="L(N, D); star: held out"
    )
    axes.legend(fontsize=7)


def _plot_profiles(axes, fit):
    runs, law = fit.runs[~fit.runs.held_out], fit.isoflop
    axes.set(xscale="log", xlabel="parameters N", title="IsoFLOP profiles; x: lowest points")
    axes.plot(runs.N, runs.L, "o", color="tab:gray", markersize=4)
    if law is None:
        return
    for budget, curve, centre, best_N, best_L in zip(
        law.budgets, law.curves, law.centres, law.optimal_N, law.optimal_L, strict=True
    ):
        chosen = np.abs(np.log(runs.C / budget)) < 0.1
        x = np.linspace(np.log(runs.N[chosen].min()), np.log(runs.N[chosen].max()), 60)
        (line,) = axes.plot(np.exp(x), np.polyval(curve, x - centre), linewidth=1, label=f"C = {budget:.2g}")
        axes.plot(runs.N[chosen], runs.L[chosen], "o", color=line.get_color(), markersize=5)
        axes.plot(best_N, best_L, "x", color=line.get_color(), markersize=9)
    axes.legend(fontsize=7)


def _plot_agreement(axes, fit):
    runs = fit.runs
    value, low, high = fit.parametric.predict(runs.N, runs.D, return_interval=True)
    for held_out, color, label in ((False, "tab:blue", "fitted"), (True, "tab:red", "held out")):
        chosen = runs.held_out == held_out
        if chosen.any():
            bars = np.maximum(0, [(value - low)[chosen], (high - value)[chosen]])
            axes.errorbar(
                runs.C[chosen],
                (value / runs.L - 1)[chosen] * 100,
                bars / runs.L[chosen] * 100,
                fmt="o",
                color=color,
                label=label,
                capsize=2,
            )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="compute C (FLOPs)", ylabel="predicted - measured (%)", title="prediction error")
    axes.legend()
