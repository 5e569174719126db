"""T8, T9: clocks that jump, other locales, masks and folders; and runs that last."""

import gc
import os
import statistics
import subprocess
import sys
import threading
import time

import pytest
from train_doubles import assert_same_outcome, make_trainer, outcome

from arfast.train.checkpoint import latest_checkpoint, list_checkpoints

CONFIG = {"max_steps": 6, "save_every": 2, "sample_prompts": ["grüße 世界"], "sample_tokens": 3}


def run(root, **config):
    make_trainer(root, **CONFIG | config).fit()
    return outcome(root)


@pytest.mark.parametrize("background", [False, True], ids=["inline", "background"])
def test_clocks_that_jump(tmp_path, monkeypatch, record, background):
    expected = run(tmp_path / "expected")
    jumps = iter(range(10**9))
    for name in ("time", "perf_counter"):
        # Forward a day, back two: never the same twice.
        monkeypatch.setattr(time, name, lambda: (-1) ** (i := next(jumps)) * 86_400.0 * (i % 7))
    assert_same_outcome(run(tmp_path / "run", async_save=background), expected)
    record(
        "T8", f"clocks that jump by days ({'background' if background else 'inline'} saves)", next(jumps), "same run"
    )


def test_times_of_files(tmp_path, record):
    """The newest checkpoint is the one with the highest step, whatever the times of the files say."""
    run(tmp_path / "run", keep_last=0)
    paths = list_checkpoints(tmp_path / "run")
    for i, path in enumerate(paths):
        for file in (*path.iterdir(), path):
            os.utime(file, (4e9 * (1 - i / len(paths)),) * 2)
    assert latest_checkpoint(tmp_path / "run", pytest.fail) == paths[-1]
    record("T8", "file times in 2096 and in reversed order", len(paths), "the highest step is the latest")


PROGRAM = """
import sys, torch
torch.set_num_threads(1)
from train_doubles import make_trainer
from arfast.train import log
log.plot_loss = lambda rows, path: True
make_trainer(sys.argv[1], max_steps=6, save_every=2, sample_prompts=["gr\\u00fc\\u00dfe \\u4e16\\u754c"],
             sample_tokens=3).fit()
"""


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "TZ": "Asia/Kathmandu", "TMPDIR": "/nowhere"},
    ],
    ids=["ASCII locale, other time zone, no TMPDIR"],
)
def test_locales(tmp_path, record, environment, request):
    from worker import worker_environment

    expected = run(tmp_path / "expected")
    target = tmp_path / "rün 世"
    subprocess.run([sys.executable, "-c", PROGRAM, target], env=worker_environment() | environment, check=True)
    assert_same_outcome(outcome(target), expected)
    record("T8", f"{request.node.callspec.id}, a path beyond ASCII", 1, "same run, same bytes")


@pytest.mark.parametrize("mask", [0o000, 0o077, 0o277], ids=oct)
def test_umask(tmp_path, record, mask):
    if mask == 0o277 and os.geteuid() != 0:
        pytest.skip("only root writes where it may not")
    expected = run(tmp_path / "expected")
    before = os.umask(mask)
    try:
        actual = run(tmp_path / "run")
    finally:
        os.umask(before)
    assert_same_outcome(actual, expected)
    record("T8", f"umask {mask:03o}", 1, "same run")


def test_soak(memory_path, amount, record):
    """Memory, descriptors and threads stay what they are; the step time is told, since nobody can promise it here."""
    steps = amount(150, 20_000)
    root = memory_path / "run"
    trainer = make_trainer(root, max_steps=steps, save_every=amount(10, 100), async_save=True, log_every=10)
    samples, step = [], trainer.engine.step

    def measured(batches):
        start = time.perf_counter()
        result = step(batches)
        seconds = time.perf_counter() - start
        if trainer.state.step % (steps // 10) == 0:
            gc.collect()
            resident = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            samples.append((resident, len(os.listdir("/proc/self/fd")), threading.active_count()))
        times.append(seconds)
        return result

    times = []
    trainer.engine.step = measured
    assert trainer.fit().step == steps
    trainer.datasets["train"].served.clear()
    warm = samples[len(samples) // 2 :]
    growth = warm[-1][0] - warm[0][0]
    assert growth < 8 << 20, [resident for resident, *_ in samples]
    # One save may be in flight when they are counted: a thread, a file or a directory.
    assert max(fds for _, fds, _ in warm) - min(fds for _, fds, _ in warm) <= 2
    assert max(threads for *_, threads in samples) <= min(threads for *_, threads in samples) + 1
    assert len(list_checkpoints(root)) == 2 and not [name for name in os.listdir(root) if "tmp" in name]
    tenth = len(times) // 10
    drift = statistics.median(times[-tenth:]) / statistics.median(times[tenth : 2 * tenth])
    happened = f"memory {growth / 2**20:+.1f} MB over the second half, descriptors and threads constant, "
    record("T9", "steps of a run that saves in the background", steps, happened + f"step time x{drift:.2f}")
