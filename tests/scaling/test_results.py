"""From a table of runs to fit.json and back."""

import csv
import json
import sys

import numpy as np
import pytest

from arfast.scaling import ParametricLaw, ScalingFit, fit_runs, plot_fit, read_results
from arfast.scaling.report import table

LAW = ParametricLaw(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)


def measured(num_budgets=5, noise=0.002):
    rng = np.random.default_rng(0)
    rows = []
    for C in np.geomspace(1e18, 1e20, num_budgets):
        for scale in (0.5, 0.8, 1.25, 2.0):
            N = scale * LAW.optimum(C).N[0]
            loss = LAW.predict(N, C / (6 * N)) + noise * rng.standard_normal()
            rows.append(dict(parameters=N, tokens=C / (6 * N), flops=C, loss=float(loss)))
    return rows


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in measured()))
    return path


def test_csv_with_other_names_is_the_same_table(jsonl, tmp_path):
    with open(tmp_path / "runs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["params", "data", "nats"])
        writer.writerows([row["parameters"], row["tokens"], row["loss"]] for row in measured())
    one = read_results(jsonl)
    other = read_results(tmp_path / "runs.csv", dict(N="params", D="data", L="nats"))
    for name in ("N", "D", "L", "C"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-12)
    assert len(read_results(tmp_path)) == len(one) == 20 and not one.held_out.any()


def test_largest_runs_are_predicted_unseen(jsonl):
    runs = read_results(jsonl).hold_out_largest(4)
    assert runs.C[runs.held_out] == pytest.approx([1e20] * 4)
    fit = fit_runs(runs, num_resamples=40)
    for row in fit.held_out:
        assert abs(row["error"]) < 0.005 and row["low"] < row["predicted"] < row["high"]
        assert row["by_compute"] == pytest.approx(float(fit.power_law.predict(row["C"])))
        assert row["by_compute_error"] == pytest.approx(row["by_compute"] / row["measured"] - 1)
    spoilt = fit_runs(type(runs)(runs.N, runs.D, np.where(runs.held_out, 9.0, runs.L), runs.C, runs.held_out))
    assert spoilt.parametric.parameters == fit.parametric.parameters  # what is held out has no say
    assert spoilt.held_out[0]["error"] < -0.5


def test_fit_comes_back_from_its_file(jsonl, tmp_path):
    fit = fit_runs(read_results(jsonl).hold_out_largest(1), loss="squared", num_resamples=40, seed=3)
    fit.save(tmp_path / "fit.json")
    again = ScalingFit.load(tmp_path)
    assert again.parametric.intervals == fit.parametric.intervals and again.held_out == fit.held_out
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "fit.json").read_bytes()
    laws = json.loads((tmp_path / "fit.json").read_text())["laws"]
    assert laws["parametric"]["alpha"]["low"] < 0.34 < laws["parametric"]["alpha"]["high"]
    assert laws["power_law"]["b"]["value"] < 0 < laws["isoflop"]["alpha"]["value"]
    assert fit.flops_factor == pytest.approx(6.0)
    text = table(fit)
    assert "held out: N=" in text and "alpha" in text and "IsoFLOP" in text
    assert any("2603.22339" in note and "would be 1.0" in note for note in fit.notes)
    (tmp_path / "fit.json").write_text("{}")
    with pytest.raises(ValueError, match="^ScalingFit: .* must be an intact fit, got"):
        ScalingFit.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="^ScalingFit: path must hold a fit.json"):
        ScalingFit.load(tmp_path / "nowhere")


def test_laws_that_the_runs_do_not_give_are_left_out_and_told(jsonl):
    runs = read_results(jsonl)
    few = fit_runs(runs[np.arange(20) < 8], num_resamples=20)  # two budgets
    assert few.power_law is None and few.isoflop is not None
    assert any("fit_power_law: C, L must have at least 4 points" in note for note in few.notes)
    scattered = type(runs)(runs.N, runs.D, runs.L, runs.C * np.geomspace(1, 1e3, 20), runs.held_out)
    assert fit_runs(scattered, num_resamples=20).isoflop is None


def test_figure(jsonl, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    fit = fit_runs(read_results(jsonl).hold_out_largest(1), num_resamples=20)
    assert plot_fit(fit, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not plot_fit(fit, tmp_path / "other.png") and not (tmp_path / "other.png").exists()


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("runs.jsonl", "", "must hold at least one row with names"),
        ("runs.jsonl", "{\n", "must be a .csv or .jsonl table"),
        ("runs.jsonl", "3\n", "must hold at least one row with names"),
        ("runs.jsonl", '{"parameters": 1, "tokens": 2}\n', "must have 'loss' in every row, got none in row 1"),
        ("runs.jsonl", '{"parameters": 1, "tokens": 2, "loss": -1}\n', "column 'loss' must be finite and above 0"),
        ("runs.csv", "parameters,tokens,loss\n1,2,three\n", "column 'loss' must hold numbers"),
        ("runs.csv", "parameters,tokens,loss\n1,2,\n", "must have 'loss' in every row, got none in row 1"),
        ("runs.csv", "a\xff", "must"),
    ],
)
def test_bad_tables_are_refused(name, content, message, tmp_path):
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=f"read_results: .*{message}"):
        read_results(tmp_path / name)


def test_bad_requests_are_refused(jsonl, tmp_path):
    with pytest.raises(FileNotFoundError, match="^read_results: path must be a table of runs, got"):
        read_results(tmp_path / "nowhere.csv")
    with pytest.raises(ValueError, match="^read_results: columns must be of N, D, L, C, got 'X'"):
        read_results(jsonl, dict(X="loss"))
    with pytest.raises(ValueError, match=r"^fit: hold_out must be in \[0, 19\], got 20"):
        read_results(jsonl).hold_out_largest(20)
    with pytest.raises(ValueError, match="^fit_parametric: N, D, L must have at least 6 points, got 2"):
        fit_runs(read_results(jsonl).hold_out_largest(18))
