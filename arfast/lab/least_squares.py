"""Autoregression of a series of numbers by least squares: an information criterion chooses the order, the end of the
series is held out and forecast with its interval, and the time is compared with statsmodels' AutoReg.

Without --data: yearly sunspots, 1700 to 2008, and weekly CO2 above Mauna Loa, 1958 to 2001, as statsmodels ships them.
"""

import argparse
import csv
import time
from pathlib import Path

import numpy as np

from arfast.models.least_squares import LeastSquaresAR, select_order

from .result import save_result

_SERIES = {"sunspots": 24, "co2": 110}  # their largest order
_SPEED_LENGTH, _SPEED_ORDER = 1_000_000, 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="CSV", help="table with a header line")
    parser.add_argument("--column", help="its column of numbers (default: the last)")
    parser.add_argument("--order", type=int, metavar="P", help="(default: chosen)")
    parser.add_argument("--max-order", type=int, default=24, metavar="P", help="to choose from (default: %(default)s)")
    parser.add_argument("--criterion", choices=("aic", "bic", "hqic"), default="bic", help="(default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=36, metavar="N", help="held out and forecast (default: %(default)s)"
    )
    parser.add_argument("--no-speed", action="store_true", help="leave out the comparison of times")


def run(arguments: argparse.Namespace) -> dict:
    if arguments.data is not None:
        series = {Path(arguments.data).stem: read_column(arguments.data, arguments.column)}
    else:
        series = statsmodels_series()
    found = {}
    for name, y in series.items():
        max_order = arguments.max_order if arguments.data else _SERIES[name]
        found[name] = study(y, arguments.order, max_order, arguments.criterion, arguments.steps)
        print(describe(name, found[name]), flush=True)
    speed = None if arguments.no_speed else compare_times(_SPEED_LENGTH, _SPEED_ORDER)
    if speed:
        print(f"{_SPEED_LENGTH:,} values, order {_SPEED_ORDER}: {speed['seconds']:.3f} s, statsmodels "
              f"{speed['statsmodels_seconds']:.3f} s, {speed['ratio']:.1f} times as long")  # fmt: skip
    figure = save_result(arguments, lambda figure: draw(figure, found), (10, 6))
    keys = ("order", "mean_error", "naive_error", "inside")
    return {"series": {name: {key: one[key] for key in keys} for name, one in found.items()}, "speed": speed,
            "figure": figure}  # fmt: skip


def study(y: np.ndarray, order: int | None, max_order: int, criterion: str, steps: int) -> dict:
    """Choose an order on all but the last `steps` values, fit there, and forecast these."""
    if not 0 < steps < len(y):
        raise ValueError(f"lab least-squares: steps must leave some of the {len(y)} values, got {steps}")
    known, held_out = y[:-steps], y[-steps:]
    choice = select_order(known, max_order, criterion) if order is None else None
    model = LeastSquaresAR(choice.order if choice else order).fit(known)
    mean, low, high = (bound.numpy() for bound in model.forecast(steps, return_interval=True))
    return {
        "known": known,
        "held_out": held_out,
        "forecast": (mean, low, high),
        "choice": choice,
        "order": model.order,
        "mean_error": float(np.abs(mean - held_out).mean()),
        "naive_error": float(np.abs(known[-1] - held_out).mean()),
        "inside": float(((low <= held_out) & (held_out <= high)).mean()),
    }


def describe(name: str, found: dict) -> str:
    return (
        f"{name}: order {found['order']}; {len(found['held_out'])} steps forecast with a mean error of "
        f"{found['mean_error']:.3g} (the last value repeated: {found['naive_error']:.3g}), "
        f"{found['inside']:.0%} of them inside the 95 % interval"
    )


def compare_times(length: int, order: int) -> dict | None:
    """Seconds to fit, the smallest of three in turns; None without statsmodels."""
    try:
        from statsmodels.tsa.ar_model import AutoReg
    except ImportError:
        return None
    y = np.random.default_rng(0).standard_normal(length).cumsum()
    fits = {"seconds": lambda: LeastSquaresAR(order).fit(y), "statsmodels_seconds": lambda: AutoReg(y, order).fit()}
    seconds = dict.fromkeys(fits, float("inf"))
    for _ in range(3):
        for name, fit in fits.items():
            start = time.perf_counter()
            fit()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds | {"ratio": seconds["statsmodels_seconds"] / seconds["seconds"]}


def draw(figure, found: dict) -> None:
    rows = figure.subplots(len(found), 2, squeeze=False, width_ratios=(2, 1))
    for (left, right), (name, one) in zip(rows, found.items(), strict=True):
        steps = len(one["held_out"])
        shown = one["known"][-4 * steps :]
        future = range(len(shown), len(shown) + steps)
        mean, low, high = one["forecast"]
        left.plot(shown, color="tab:gray", label="known")
        left.plot(future, one["held_out"], color="black", label="held out")
        left.plot(future, mean, color="tab:blue", label=f"forecast, order {one['order']}")
        left.fill_between(future, low, high, color="tab:blue", alpha=0.2, label="95 %")
        left.set_title(name)
        left.legend(fontsize="small")
        if one["choice"] is not None:
            right.plot(range(1, len(one["choice"].values)), one["choice"].values[1:], marker=".", color="tab:orange")
            right.set_xlabel("order")
            right.set_ylabel(one["choice"].criterion.upper())


def statsmodels_series() -> dict[str, np.ndarray]:
    try:
        from statsmodels.datasets import co2, sunspots
    except ImportError as error:
        raise ImportError("lab least-squares needs --data, or statsmodels for its series: pip install 'arfast[lab]'") \
            from error  # fmt: skip
    weekly = co2.load_pandas().data["co2"].interpolate()  # 59 weeks were not measured
    return {"sunspots": sunspots.load_pandas().data["SUNACTIVITY"].to_numpy(), "co2": weekly.to_numpy()}


def read_column(path: str, column: str | None) -> np.ndarray:
    """Numbers of a CSV table's column, the last one by default."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if row]
    if len(rows) < 2:
        raise ValueError(f"lab least-squares: data must have a header and rows, got {len(rows)} lines in {path!r}")
    header = rows[0]
    if column is not None and column not in header:
        raise ValueError(f"lab least-squares: column must be one of {', '.join(header)}, got {column!r}")
    place = len(header) - 1 if column is None else header.index(column)
    values = []
    for number, row in enumerate(rows[1:], start=2):
        try:
            values.append(float(row[place]))
        except (IndexError, ValueError):
            rule = f"{header[place]} must be a number in every row"
            raise ValueError(f"lab least-squares: {rule}, got {','.join(row)!r} in row {number}") from None
    return np.array(values)
