"""A worker for runs in fresh processes; one thread, which is all that models of this size can use."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from worker import HERE, Worker, worker_environment

from arfast.train import log


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
    worker.close()
