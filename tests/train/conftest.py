"""A worker for runs in fresh processes; one thread, which is all that models of this size can use."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from arfast.train import log

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tensors here are too small to share."""


@pytest.fixture
def memory_path():
    """A directory in memory where there is one: thousands of fsyncs are what these tests would wait for."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as path:
        yield Path(path)


@pytest.fixture(autouse=True)
def _no_plot(monkeypatch):
    """The picture costs more than all else in a run of this size."""
    monkeypatch.setattr(log, "plot_loss", lambda rows, path: True)


def worker_environment():
    """Modules of this tree; and threads that wait without spinning, since the tests share their cores."""
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_WAIT_POLICY": "passive"}


class Worker:
    """See train_worker.py."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, HERE / "train_worker.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=worker_environment(),
        )

    def __call__(self, output_dir, *, signals=(), **job):
        """Run; returns (exit status, seconds, what it printed). signals: (seconds after the start, number)."""
        output = Path(output_dir).with_suffix(".log")
        output.write_text("")
        config = job.pop("config", {}) | {"output_dir": str(output_dir)}
        job |= {"config": config, "log": str(output), "signals": list(signals)}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["status"], answer["seconds"], output.read_text()


@pytest.fixture
def new_interpreter():
    """Run a job as the worker does, in an interpreter of its own; returns the exit status."""

    def run(output_dir, **job):
        job["config"] = job["config"] | {"output_dir": str(output_dir)}
        job["log"] = str(output_dir.with_suffix(".log"))
        command = [sys.executable, HERE / "train_worker.py", json.dumps(job)]
        return subprocess.run(command, env=worker_environment()).returncode

    return run


@pytest.fixture(scope="session")
def worker():
    worker = Worker()
    yield worker
    worker.process.stdin.close()
    assert worker.process.wait(timeout=60) == 0
