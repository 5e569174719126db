"""The command line under torchrun, from end to end: a whole run, a rank that is killed, one that is told to stop."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from arfast.train import verify
from arfast.train.checkpoint import list_checkpoints

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SETTINGS = "--vocab-size 512 --seqlen 32 --batch-size 4 --max-steps 30 --log-every 1 --save-every 5 --eval-every 0"
TIMEOUT = 240


def command(output_dir, data, *more):
    settings = [*SETTINGS.split(), "--dtype", "float32", "--no-progress", "--sample-prompts", "the "]
    return ["-m", "arfast", "train", "--data", str(data), "--output-dir", str(output_dir), *settings, *more]


def start(arguments, errors):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=open(errors, "w"), text=True, env=environment, start_new_session=True
    )


def finish(process, errors):
    """Exit status and the last line on stdout; nothing of it outlives this."""
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
        return process.returncode, output.strip().splitlines()[-1:], Path(errors).read_text()
    finally:
        for pid in [*workers(process), process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def workers(process):
    try:
        return list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))
    except FileNotFoundError:
        return []


def wait_for_steps(output_dir, count):
    deadline, log = time.monotonic() + TIMEOUT, Path(output_dir) / "metrics.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < count:
        assert time.monotonic() < deadline, "the run has not begun"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--tensor-parallel", "2"], ["--context-parallel", "2"]], ids=str)
def test_a_run_is_that_of_one_process(tmp_path, data, flags):
    results = []
    steady = ["--epsilon", "1e-5"] if flags else []  # see STEADY of test_parallel_trainer.py
    for name, prefix, more in (("one", [sys.executable], []), ("two", TORCHRUN, flags)):
        process = start([*prefix, *command(tmp_path / name, data, *steady, *more)], tmp_path / f"{name}.log")
        status, last, errors = finish(process, tmp_path / f"{name}.log")
        assert status == 0, errors
        results.append(json.loads(last[0]))
        assert errors.count("parameters, float32, on") == 1, "one rank speaks"
    one, two = results
    for key in ("step", "tokens", "loss", "val_loss", "val_bits_per_byte"):
        assert two[key] == pytest.approx(one[key], rel=1e-5), key


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_ends_the_job_and_the_next_one_continues(tmp_path, data, number, rank):
    path, log = tmp_path / "run", tmp_path / "run.log"
    process = start([*TORCHRUN, *command(path, data, "--max-steps", "4000")], log)
    wait_for_steps(path, 8)
    began = time.monotonic()
    os.kill(workers(process)[rank], number)
    status, _, errors = finish(process, log)
    assert status != 0
    assert time.monotonic() - began < 60
    saved = list_checkpoints(path)
    for checkpoint in saved:
        verify(checkpoint)
    if number == signal.SIGTERM:
        step = verify(saved[-1])["step"]
        assert f"stopped by SIGTERM after step {step}; run again to continue" in errors
    else:
        step = verify(saved[-1])["step"]
        assert step >= 5 and step % 5 == 0
    process = start([*TORCHRUN, *command(path, data, "--max-steps", str(step + 5))], log)
    status, last, errors = finish(process, log)
    assert status == 0, errors
    assert json.loads(last[0])["step"] == step + 5
    assert f"continuing {path}/{saved[-1].name}" in errors


@pytest.mark.slow
def test_an_error_is_told_and_ends_the_job(tmp_path, data):
    log = tmp_path / "run.log"
    process = start([*TORCHRUN, *command(tmp_path / "run", data, "--batch-size", "3")], log)
    status, _, errors = finish(process, log)
    assert status != 0
    assert errors.count("arfast train: error: Trainer: batch_size must be a multiple of the 2 data ranks, got 3") == 2


def test_ranks_start_in_a_clone_where_the_package_is_installed(tmp_path):
    """There, ``torchrun -m`` would find the source folder, which has no compiled library."""
    script = Path(sys.executable).with_name("arfast")
    if not script.exists():
        pytest.skip("needs the installed command")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [*TORCHRUN, "--no-python", str(script), "info"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert sum(line.startswith("{") for line in done.stdout.splitlines()) == 2, done.stdout
