"""`arfast lab least-squares`: it forecasts what was held out, of its own series and of a table's column."""

import numpy as np
import pytest
from command_line import arfast, last_line

from arfast.lab.least_squares import read_column, study

STUDY = "least-squares"


def test_own_series(tmp_path, lab):
    pytest.importorskip("matplotlib")
    _, found = lab("--no-speed", "--output-dir", tmp_path)
    assert found["series"]["sunspots"]["order"] == 9  # as statsmodels' ar_select_order finds
    for one in found["series"].values():
        assert one["mean_error"] < 0.8 * one["naive_error"] and one["inside"] > 0.7
    assert (tmp_path / "least-squares.png").read_bytes().startswith(b"\x89PNG")


def table(path, values):
    path.write_text("month,degrees\n" + "".join(f"{month},{value}\n" for month, value in enumerate(values)))
    return path


def test_column_of_a_table(tmp_path, lab):
    y = 10 * np.sin(np.arange(300) / 7) + 3
    data = table(tmp_path / "weather.csv", y)
    assert np.array_equal(read_column(str(data), "degrees"), y)
    arguments = ("--data", data, "--column", "degrees", "--order", 2, "--no-speed", "--output-dir", tmp_path)
    found = lab(*arguments)[1]["series"]["weather"]
    assert found["order"] == 2 and found["mean_error"] < 1e-6  # a wave is an autoregression of order 2


def test_criterion_finds_the_order():
    noise = np.random.default_rng(0).standard_normal(3000)
    y = np.zeros(3000)
    for t in range(3, 3000):
        y[t] = 0.5 * y[t - 1] - 0.3 * y[t - 3] + noise[t]
    assert study(y, None, 12, "bic", 20)["order"] == 3


@pytest.mark.parametrize(
    "content, options, message",
    [
        ("x\n", [], "data must have a header and rows, got 1 lines"),
        ("x\n1\n2\n3\n", ["--column", "y"], "column must be one of x, got 'y'"),
        ("t,x\n1,2\n2,\n", [], "x must be a number in every row, got '2,' in row 3"),
        ("x\n" + "1\n2\n" * 9, ["--steps", "18"], "steps must leave some of the 18 values, got 18"),
        ("x\n" + "4\n" * 90, [], "y must vary, got 54 times 4.0"),
        ("x\n" + "1\n2\n" * 20, ["--max-order", "30"], "y must be longer than the window of 30 values, got 4"),
    ],
)
def test_errors(tmp_path, lab, content, options, message):
    path = tmp_path / "table.csv"
    path.write_text(content)
    assert message in lab("--data", path, "--output-dir", tmp_path / "out", *options, status=2)
    assert not (tmp_path / "out").exists()


def test_in_a_process_of_its_own(tmp_path):
    assert last_line(arfast("lab", "least-squares", "--no-speed", "--output-dir", tmp_path))["study"] == "least-squares"
