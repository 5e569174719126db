"""What the runs of a study have logged, and where it leaves its figure."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arfast.figures import save_figure


def save_result(arguments: argparse.Namespace, draw: Callable[[Any], object], size: tuple[float, float]) -> str | None:
    """The path of the figure, STUDY.png in the output directory; None without matplotlib."""
    path = Path(arguments.output_dir) / f"{arguments.study}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    if save_figure(path, draw, size):
        return str(path)
    print(f"lab {arguments.study}: the figure needs matplotlib (pip install 'arfast[plot]')", file=sys.stderr)
    return None


def logged_rows(run: Path) -> list[dict[str, Any]]:
    """The log of a run's directory, rows of steps and of evaluations."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def training_seconds(rows: list[dict[str, Any]]) -> float:
    return sum(row["batch_tokens"] / row["tokens_per_second"] for row in rows if "tokens_per_second" in row)
