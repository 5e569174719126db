"""The runs of a plan, one or several at a time: killed at any time, started again, each of them is done once."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from arfast.data.checks import check_integer
from arfast.data.files import read_file, write_file
from arfast.train import Trainer
from arfast.train.checkpoint import lock_directory
from arfast.train.strategy import OneProcess

from .plan import PlannedRun, SweepPlan

RESULTS_NAME = "results.jsonl"
_MAX_BYTES = 64 << 20
_MAX_PROCESSES = 1024


def run_sweep(
    directory: str | os.PathLike[str],
    *,
    max_runs: int | None = None,
    processes: int = 1,
    progress: bool = True,
    report: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> list[dict[str, Any]]:
    """Do the runs of ``plan.json`` that ``results.jsonl`` does not have yet, the cheapest first, and return all rows.

    Each run is a directory of `Trainer` under ``runs``, so one that was killed goes on from its newest checkpoint. Its
    row, with the loss on the whole validation split, joins the file when it is done: the file is replaced as a whole.

    Args:
        max_runs: end after so many.
        processes: runs at a time, without progress bars and the dearest first; they share torch's CPU threads, and of
            several GPUs each takes one.
        report: takes a line per run.

    Raises:
        FileNotFoundError, ValueError: there is no intact plan, or a row is not one of its runs; CheckpointError:
            another process works on the sweep; RuntimeError: a run side by side failed, as its process says on stderr;
            and what `Trainer` raises.
    """
    check_integer("run_sweep: processes", processes, 1, _MAX_PROCESSES)
    root = Path(directory)
    plan = SweepPlan.load(root)
    with lock_directory(root):
        rows = _finished(root / RESULTS_NAME, plan)
        todo = [run for run in plan.runs if run.name not in {row["name"] for row in rows}]
        todo = todo[:max_runs]
        report(f"{len(rows)} of {len(plan.runs)} runs are done, {len(todo)} are to do")
        new_rows = _one_by_one(root, plan, todo, progress, report)
        if processes > 1:
            new_rows = _side_by_side(root, todo, processes)
        for row in new_rows:
            rows.append(row)
            write_file(root / RESULTS_NAME, b"".join(json.dumps(row).encode() + b"\n" for row in rows))
            report(f"{row['name']}: validation loss {row['loss']:.4f}, {len(rows)} of {len(plan.runs)} runs are done")
    return rows


def _one_by_one(
    root: Path, plan: SweepPlan, todo: list[PlannedRun], progress: bool, report: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    for run in todo:
        report(f"{run.name}: {run.parameters:,} parameters, {run.tokens:,} tokens, {run.flops:.3g} FLOPs")
        yield train(root, plan, run, progress)


def _side_by_side(root: Path, todo: list[PlannedRun], processes: int) -> Iterator[dict[str, Any]]:
    started: list[subprocess.Popen] = []
    places: queue.SimpleQueue[int] = queue.SimpleQueue()
    for place in range(processes):
        places.put(place)
    threads = max(1, torch.get_num_threads() // processes)

    def train(run: PlannedRun) -> dict[str, Any]:
        place = places.get()
        try:
            return _train_apart(root, run, place, threads, started)
        finally:
            places.put(place)

    with ThreadPoolExecutor(processes) as pool:
        # The dearest first: at the end all processes have something to do.
        futures = [pool.submit(train, run) for run in reversed(todo)]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in started:
                process.terminate()  # it saves, and ends
            raise


def _train_apart(
    root: Path, run: PlannedRun, place: int, threads: int, started: list[subprocess.Popen]
) -> dict[str, Any]:
    """`train` in a process of its own, which ends when its stdin does, and that when this process does."""
    request = dict(directory=str(root.resolve()), run=run.name, place=place, threads=threads)
    command = [sys.executable, "-m", "arfast.scaling.worker", json.dumps(request)]
    # Python puts the current folder first, and in the source tree that is the package without its compiled library.
    options = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parents[2])
    with subprocess.Popen(command, **options) as process:
        started.append(process)
        output = process.stdout.read()
    if process.returncode != 0:
        raise RuntimeError(f"run_sweep: {run.name} must end with its row, got exit status {process.returncode}")
    return json.loads(output.splitlines()[-1])


def train(root: Path, plan: SweepPlan, run: PlannedRun, progress: bool) -> dict[str, Any]:
    start = time.perf_counter()
    strategy = OneProcess("cuda" if torch.cuda.is_available() else "cpu")
    model = strategy.build_model(run.model_config())
    config = run.train_config(str(root / "runs" / run.name), progress=progress)
    result = Trainer(model, config, root / plan.data, strategy=strategy).fit()
    if result.evaluation is None:
        raise ValueError(f"run_sweep: data must have a validation split, got {plan.data!r} without one")
    return _identity(run) | dict(
        hidden_size=model.config.hidden_size,
        layers=model.config.num_hidden_layers,
        learning_rate=config.learning_rate,
        loss=result.evaluation.loss,
        bits_per_byte=result.evaluation.bits_per_byte,
        seconds=round(time.perf_counter() - start, 1),
    )


def _identity(run: PlannedRun) -> dict[str, Any]:
    names = ("name", "budget", "held_out", "parameters", "non_embedding_parameters", "tokens", "flops")
    return {name: getattr(run, name) for name in names}


def _finished(path: Path, plan: SweepPlan) -> list[dict[str, Any]]:
    """The rows of runs that are done, each of which the plan must have."""
    if not path.exists():
        return []
    planned = {run.name: _identity(run) for run in plan.runs}
    rows = []
    for number, line in enumerate(read_file(path, _MAX_BYTES).splitlines(), 1):
        try:
            row = json.loads(line)
            if {name: row[name] for name in planned[row["name"]]} != planned[row["name"]]:
                raise KeyError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"run_sweep: {str(path)!r} must hold rows of this plan, got line {number}") from None
        rows.append(row)
    return rows
