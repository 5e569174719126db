"""What the tests of faults share: how many injections there are, and where their outcome is noted."""

import os
import tempfile
from pathlib import Path

import pytest
import table
import tracing
from worker import Worker

from arfast.train import log

_ROWS, _PASSED = pytest.StashKey(), pytest.StashKey()


@pytest.fixture
def amount():
    """Choose between the number of injections of every run and that of a run with ARFAST_LONG=1."""
    return lambda short, full: full if os.environ.get("ARFAST_LONG") == "1" else short


@pytest.fixture
def record(request):
    """Note (row, fault, number of injections, outcome) for the table, if the test passes."""
    rows = []
    yield lambda *cells: rows.append(table.row(*cells))
    if request.node.stash.get(_PASSED, False):
        request.config.stash.setdefault(_ROWS, []).extend(rows)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.when == "call":
        item.stash[_PASSED] = report.passed


def pytest_sessionfinish(session):
    if os.environ.get("ARFAST_FAULT_TABLE") == "1":
        table.update(session.config.stash.get(_ROWS, []))


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tensors here are too small to share, and a fork copies no other thread."""


@pytest.fixture(autouse=True)
def _no_plot(monkeypatch):
    monkeypatch.setattr(log, "plot_loss", lambda rows, path: True)


@pytest.fixture
def memory_path():
    """A directory in memory where there is one: thousands of fsyncs are what these tests would wait for."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as path:
        yield Path(path)


@pytest.fixture(scope="session")
def _why_not_traced():
    return tracing.unavailable()


@pytest.fixture
def traced(_why_not_traced):
    """See `tracing.traced`."""
    if _why_not_traced:
        pytest.skip(_why_not_traced)
    return tracing.traced


@pytest.fixture(scope="session")
def worker():
    worker = Worker()
    yield worker
    worker.close()
