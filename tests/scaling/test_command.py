"""`arfast scale` from a plan to a prediction, with a kill in between."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from command_line import arfast, last_line

from arfast.cli.main import main
from arfast.scaling import SweepPlan, run_sweep

PLAN = ["--budgets", "2.8e9", "4e9", "--target", "5e9", "--num-sizes", "3", "--size-range", "2", "--vocab-size", "300"]
PLAN += ["--seqlen", "32", "--batch-size", "2", "--tokens-per-parameter", "0.12", "--dtype", "float32"]


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """(directory of a sweep that is planned, what the command printed)."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"line {i} of a small corpus, {i * i} and so on, {i % 7} times\n" * (20 + i))
    directory = tmp_path_factory.mktemp("sweep") / "sweep"
    process = arfast("scale", "plan", directory, "--data", folder, *PLAN)
    return directory, last_line(process), process


def test_plan_prints_its_runs(planned):
    directory, summary, process = planned
    plan = SweepPlan.load(directory)
    assert summary["runs"] == len(plan.runs) == 7 and plan.data == "data"
    assert all(run.name in process.stdout for run in plan.runs)


def test_a_prepared_data_set_is_taken_as_it_is(planned, tmp_path):
    directory, _, _ = planned
    assert main(["scale", "plan", str(tmp_path / "other"), "--data", str(directory / "data"), *PLAN]) == 0
    other, plan = SweepPlan.load(tmp_path / "other"), SweepPlan.load(directory)
    assert (tmp_path / "other" / other.data).resolve() == (directory / "data").resolve()
    assert other.runs == plan.runs and not (tmp_path / "other" / "data").exists()


def test_a_killed_sweep_goes_on_and_repeats_nothing(planned, capsys, one_thread):
    directory, _, _ = planned
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "arfast", "scale", "run", str(directory), "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    runs = SweepPlan.load(directory).runs
    names = [run.name for run in runs]
    killed = next(i for i, run in enumerate(runs) if i > 0 and run.tokens > 64 * 120)  # it has a checkpoint within
    deadline = time.monotonic() + 120
    while not (directory / "runs" / names[killed] / "step-00000100").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == names[:killed]
    weights = directory / "runs" / names[0] / "model.safetensors"
    before = weights.stat().st_mtime_ns

    told = []
    assert len(run_sweep(directory, max_runs=1, progress=False, report=told.append)) == killed + 1
    assert told[0].startswith(f"{names[killed]} ({killed + 1} of 7)") and "validation loss" in told[1]
    metrics = (directory / "runs" / names[killed] / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in metrics if '"loss"' in line]
    assert steps == sorted(set(steps)), "steps of before the kill are not in the log twice"

    assert main(["scale", "run", str(directory), "--quiet"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    again = [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]
    assert result["runs"] == 7 and [row["name"] for row in again] == names and again[:killed] == rows
    assert weights.stat().st_mtime_ns == before
    assert [row["held_out"] for row in again] == [False] * 6 + [True]
    assert run_sweep(directory, progress=False, report=told.append) == again and len(told) == 2

    mended = (directory / "results.jsonl").read_text()
    (directory / "results.jsonl").write_text(mended.replace('"run-002"', '"run-009"'))
    with pytest.raises(ValueError, match="^run_sweep: .*results.jsonl' must hold rows of this plan, got line 2"):
        run_sweep(directory)
    (directory / "results.jsonl").write_text(mended)


def test_fit_and_predict_from_the_sweep(planned, capsys):
    """The text is learned by heart, so the numbers are not looked at: the laws have tests of their own."""
    directory, _, _ = planned
    run_sweep(directory, progress=False, report=lambda text: None)  # what another test has left of it

    def run(*arguments):
        status = main(["scale", *map(str, arguments)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    status, out, _ = run("fit", directory, "--resamples", 20)
    assert status == 0 and "held out: N=" in out
    assert len(json.loads(out.splitlines()[-1])["held_out"]) == 1
    assert {"fit.json", "scaling.png"} <= set(os.listdir(directory))
    status, out, _ = run("predict", directory, "--parameters", 1e5, "--tokens", 1e6)
    values = json.loads(out)
    assert status == 0 and values["low"] <= values["loss"] <= values["high"]
    status, out, _ = run("predict", directory, "--budget", 1e12)
    assert status == 0 and {"parameters", "tokens", "loss"} <= json.loads(out).keys()
    for arguments, message in [
        (["predict", directory, "--budget", 1e12, "--tokens", 3], "predict must be given parameters and tokens"),
        (["fit", directory, "--columns", "N"], "columns must be KEY=NAME, got 'N'"),
        (["fit", directory, "--hold-out", 5], "must have at least 6 points, got 2"),
        (["run", directory, "--max-runs", 0], "max_runs must be at least 1, got 0"),
        (["run", directory / "nowhere"], "directory must hold a plan.json"),
        (["plan", directory, "--budgets", "1e3"], "model_shape: parameters must be near"),
        (["predict", directory / "nowhere", "--budget", 1], "path must hold a fit.json"),
    ]:
        status, out, err = run(*arguments)
        assert status == 2 and out == "" and message in err and err.count("error: ") == 1
