"""The runs of a plan, one after the other: killed at any time, started again, each of them is done once."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from arfast.data.files import read_file, write_file
from arfast.train import Trainer
from arfast.train.checkpoint import lock_directory
from arfast.train.strategy import OneProcess

from .plan import PlannedRun, SweepPlan

RESULTS_NAME = "results.jsonl"
_MAX_BYTES = 64 << 20


def run_sweep(
    directory: str | os.PathLike[str],
    *,
    max_runs: int | None = None,
    progress: bool = True,
    report: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> list[dict[str, Any]]:
    """Do the runs of ``plan.json`` that ``results.jsonl`` does not have yet, the cheapest first, and return all rows.

    Each run is a directory of `Trainer` under ``runs``, so one that was killed goes on from its newest checkpoint. Its
    row, with the loss on the whole validation split, joins the file when it is done: the file is replaced as a whole.

    Args:
        max_runs: end after so many.
        report: takes a line per run.

    Raises:
        FileNotFoundError, ValueError: there is no intact plan, or a row is not one of its runs; CheckpointError:
            another process works on the sweep; and what `Trainer` raises.
    """
    root = Path(directory)
    plan = SweepPlan.load(root)
    with lock_directory(root):
        rows = _finished(root / RESULTS_NAME, plan)
        todo = [run for run in plan.runs if run.name not in {row["name"] for row in rows}]
        for run in todo if max_runs is None else todo[:max_runs]:
            report(
                f"{run.name} ({len(rows) + 1} of {len(plan.runs)}): {run.parameters:,} parameters, "
                f"{run.tokens:,} tokens, {run.flops:.3g} FLOPs"
            )
            rows.append(_train(root, plan, run, progress))
            write_file(root / RESULTS_NAME, b"".join(json.dumps(row).encode() + b"\n" for row in rows))
            report(f"{run.name}: validation loss {rows[-1]['loss']:.4f}")
    return rows


def _train(root: Path, plan: SweepPlan, run: PlannedRun, progress: bool) -> dict[str, Any]:
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
