"""The benchmarks' options, the `compare` fixture, the header and the table.

`pytest benchmarks --benchmark-only` runs every case on every device of this machine. Further options:
--tuned-allocator: with glibc told to keep freed memory and to ask for huge pages;
--gates: a ratio below a case's gate fails;
--save-table: writes the table to benchmarks/results/;
--benchmark-disable: no timing, the smallest case of each benchmark is checked and run once.
"""

import dataclasses
import os
import subprocess
import sys

import pytest
import report
import torch
from harness import TUNABLES
from harness import compare as compare_case

RESULTS = pytest.StashKey()


def pytest_addoption(parser):
    group = parser.getgroup("arfast benchmarks")
    group.addoption("--gates", action="store_true", help="fail a case whose ratio is below its gate")
    group.addoption("--save-table", action="store_true", help="write the table to benchmarks/results/")
    group.addoption("--tuned-allocator", action="store_true", help="run in a subprocess with glibc's allocator tuned")


def pytest_configure(config):
    config.stash[RESULTS] = []
    config.option.benchmark_columns = ["median", "iqr", "rounds"]
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compiler processes beside the timing


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    if not config.option.tuned_allocator or os.environ.get("GLIBC_TUNABLES") == TUNABLES:
        return None
    config.pluginmanager.getplugin("capturemanager").stop_global_capturing()
    same_command = [sys.executable, *sys.orig_argv[1:]]
    return subprocess.run(same_command, env=os.environ | {"GLIBC_TUNABLES": TUNABLES}).returncode


def pytest_collection_modifyitems(config, items):
    if not config.option.benchmark_disable:
        return
    smallest = {}
    for item in items:
        key = (item.path, item.originalname, item.callspec.params["device"])
        if key not in smallest or size_of(item) < size_of(smallest[key]):
            smallest[key] = item
    kept = set(smallest.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def size_of(item):
    return item.callspec.params["case"].bytes


def pytest_report_header():
    return [f"{key}: {value}" for key, value in report.machine().items()]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where the case runs. `cuda` is skipped, visibly, without a GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return request.param


@pytest.fixture
def compare(device, benchmark, request):
    """compare(case): check, time, remember the result for the table, and hold it against its gates with --gates."""

    def run(case):
        if device not in case.devices:
            pytest.skip(f"not for {device}")
        torch.manual_seed(0)
        result = compare_case(benchmark, case, device)
        if result is None:
            return
        op = request.node.originalname.removeprefix("bench_")
        results = request.config.stash[RESULTS]
        results.append(dataclasses.replace(result, name=f"{op} {case.name}"))
        if request.config.option.save_table:  # a run that is cut short keeps what it measured
            report.save(results, report.FOLDER)
        if request.config.option.gates:
            if result.noisy:
                pytest.skip("the machine was too busy to decide the gates")
            assert not result.missed_gates, f"{case.name}: {'; '.join(result.missed_gates)}"

    return run


def pytest_terminal_summary(terminalreporter, config):
    results = config.stash[RESULTS]
    if not results:
        return
    terminalreporter.section("ours against peers")
    terminalreporter.write_line(report.table(results))
    if config.option.save_table:
        for path in report.save(results, report.FOLDER):
            terminalreporter.write_line(f"wrote {path}")
