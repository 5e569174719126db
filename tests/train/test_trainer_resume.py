"""A run that is killed anywhere and started again ends with the same bits as one that nobody disturbed."""

import os
import random
import re
import signal

import pytest
from safetensors.torch import load_file
from train_doubles import assert_same_outcome, outcome

from arfast.train.checkpoint import list_checkpoints

STEPS = 9
CONFIG = {
    "max_steps": STEPS,
    "micro_batch_size": 3,
    "save_every": 1,
    "eval_every": 2,
    "sample_every": 3,
    "sample_prompts": ["ab"],
    "sample_tokens": 4,
    "keep_last": 0,
}


def no_leftovers(output_dir):
    return [name for name in os.listdir(output_dir) if "tmp" in name] == []


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def undisturbed(request, worker, tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed") / request.param
    config = CONFIG | {"dtype": request.param}
    status, _, log = worker(path, config=config)
    assert status == 0, log
    return config, outcome(path)


def test_undisturbed_run_is_repeatable_and_complete(undisturbed, worker, memory_path):
    config, expected = undisturbed
    assert worker(memory_path / "run", config=config)[0] == 0
    assert_same_outcome(outcome(memory_path / "run"), expected)
    train = [row for row in expected["metrics"] if "loss" in row]
    assert [row["step"] for row in train] == list(range(1, STEPS + 1))
    assert [row["tokens"] for row in train] == [64 * step for step in range(1, STEPS + 1)]
    assert [row["position"] for row in train] == [64 * step for step in range(1, STEPS + 1)]
    assert [row["step"] for row in expected["metrics"] if "val_loss" in row] == [2, 4, 6, 8, 9]
    assert [row["step"] for row in expected["samples"]] == [3, 6, 9]
    assert len({row["loss"] for row in train}) == STEPS


@pytest.mark.parametrize("step", range(1, STEPS))
def test_kill_after_every_step(undisturbed, worker, memory_path, step):
    config, expected = undisturbed
    path = memory_path / "run"
    assert worker(path, config=config, kill_in={"step": step + 1})[0] == -signal.SIGKILL
    assert list_checkpoints(path)[-1].name == f"step-{step:08d}"
    status, _, log = worker(path, config=config)
    assert status == 0, log
    assert_same_outcome(outcome(path), expected)


def test_kill_between_saves_repeats_the_lost_steps(undisturbed, worker, memory_path):
    config, expected = undisturbed
    path, config = memory_path / "run", config | {"save_every": 4}
    for call in (3, 6, 3):
        # Before the first checkpoint, two steps after one, one step after that one again.
        assert worker(path, config=config, kill_in={"step": call})[0] == -signal.SIGKILL
    assert worker(path, config=config)[0] == 0
    assert_same_outcome(outcome(path), expected)


@pytest.mark.parametrize("method", ["_save", "_evaluate", "_publish", "_sample", "_result"])
@pytest.mark.parametrize("call", [1, 2])
def test_kill_between_steps(undisturbed, worker, memory_path, method, call):
    """What was due at the step of the checkpoint is done by the run that continues."""
    config, expected = undisturbed
    path = memory_path / "run"
    status, _, log = worker(path, config=config, kill_in={method: call})
    if method in ("_publish", "_result") and call > 1:
        assert status == 0, log
    else:
        assert status == -signal.SIGKILL, log
    assert worker(path, config=config)[0] == 0
    assert_same_outcome(outcome(path), expected)


def disturb(worker, root, config, seed, number, times):
    """Send a signal at random times to runs, each of which continues the one before, until `times` of them were hit.

    Yields (directory, status, log) of each; when a run gets through unharmed another directory is begun, with an
    earlier signal, since the machine is faster than was thought.
    """
    rng, limit, hits, path = random.Random(seed), 0.5, 0, root / "run-0"
    for attempt in range(200):
        status, _, log = worker(path, config=config, signals=[(rng.uniform(0, limit), number)])
        yield path, status, log
        hits += status != 0
        if status == 0:
            limit *= 0.7
            path = root / f"run-{attempt + 1}"
        if hits == times:
            break
    yield path, *worker(path, config=config)[::2]


def test_random_kills(undisturbed, worker, memory_path):
    """SIGKILL at random times, again and again, until a run gets through."""
    config, expected = undisturbed
    killed = 0
    for path, status, log in disturb(worker, memory_path, config, 0, signal.SIGKILL, 12):
        assert status in (0, -signal.SIGKILL), log
        killed += status != 0
        if status == 0:
            assert_same_outcome(outcome(path), expected)
            assert no_leftovers(path)
    assert status == 0
    assert killed == 12


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_random_signals(undisturbed, worker, memory_path, number):
    """Each ends with its own status, after a checkpoint of the step that was under way."""
    config, expected = undisturbed
    stopped = 0
    for path, status, log in disturb(worker, memory_path, config | {"save_every": 0}, int(number), number, 6):
        if status == 128 + number:
            stopped += 1
            step = int(re.search(rf"Trainer: stopped by {number.name} after step (\d+); run again", log)[1])
            assert step == max([int(checkpoint.name[5:]) for checkpoint in list_checkpoints(path)], default=0)
        elif status == 0:
            assert_same_outcome(outcome(path), expected)
            assert no_leftovers(path)
        else:
            # Before the trainer listens.
            assert status == -number, log
    assert status == 0
    assert stopped > 0


def test_second_signal_leaves_at_once(worker, memory_path):
    signals = [(1.0, signal.SIGTERM), (1.3, signal.SIGTERM)]
    status, seconds, log = worker(memory_path / "run", config={"max_steps": 2}, hang_in_step=30, signals=signals)
    assert status == -signal.SIGTERM, log
    assert seconds < 10


def test_damaged_checkpoint_is_passed_over(undisturbed, worker, memory_path):
    config, expected = undisturbed
    path = memory_path / "run"
    assert worker(path, config=config, kill_in={"step": 7})[0] == -signal.SIGKILL
    for step, name in ((6, "model.safetensors"), (5, "optimizer.safetensors")):
        file = path / f"step-{step:08d}" / name
        data = bytearray(file.read_bytes())
        data[-5] ^= 4
        file.write_bytes(data)
    status, _, log = worker(path, config=config)
    assert status == 0, log
    report = r"step-0000000[56]/\w+.safetensors must have SHA-256 .*; trying the checkpoint before it"
    assert len(re.findall(report, log)) == 2
    assert_same_outcome(outcome(path), expected)
    assert len([name for name in os.listdir(path) if ".damaged-" in name]) == 2


def test_full_disk_stops_and_the_run_goes_on_later(undisturbed, worker, memory_path):
    config, expected = undisturbed
    path, config = memory_path / "run", config | {"save_every": 2}
    assert worker(path, config=config, kill_in={"step": 5})[0] == -signal.SIGKILL
    limit = (path / "step-00000004" / "optimizer.safetensors").stat().st_size - 1
    status, _, log = worker(path, config=config, file_size_limit=limit)
    assert status == 1
    assert re.search(r"CheckpointError: checkpoint: .*step-00000006 must be writable and needs \d+ bytes, got .*$", log)
    assert [checkpoint.name for checkpoint in list_checkpoints(path)] == ["step-00000002", "step-00000004"]
    assert worker(path, config=config)[0] == 0
    assert_same_outcome(outcome(path), expected)


def test_finished_run_does_nothing(undisturbed, worker, memory_path):
    config, expected = undisturbed
    path = memory_path / "run"
    assert worker(path, config=config)[0] == 0
    before = {file: file.stat().st_mtime_ns for file in path.glob("step-*/*")}
    assert worker(path, config=config)[0] == 0
    assert {file: file.stat().st_mtime_ns for file in path.glob("step-*/*")} == before
    assert_same_outcome(outcome(path), expected)


def test_longer_run_continues(worker, memory_path):
    path = memory_path / "run"
    assert worker(path, config=CONFIG | {"max_steps": 4})[0] == 0
    status, _, log = worker(path, config=CONFIG | {"max_steps": 6})
    assert status == 0, log
    assert "step-00000004\nTrainer: its settings were others (max_steps: 4 -> 6)\n" in log
    assert outcome(path)["state"]["step"] == 6


def test_weights_differ_between_steps(undisturbed, worker, memory_path):
    """What the comparisons above rest on: a run cut short is not taken for the whole."""
    config, expected = undisturbed
    path = memory_path / "run"
    worker(path, config=config, kill_in={"step": STEPS})
    weights = (list_checkpoints(path)[-1] / "model.safetensors").read_bytes()
    assert weights != expected["model.safetensors"]
    assert load_file(list_checkpoints(path)[-1] / "rng.safetensors")["cpu"].numpy().tobytes() != b""
