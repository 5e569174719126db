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


def logged_steps(run: Path) -> list[dict[str, Any]]:
    """The rows of steps in the log of a run's directory."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "tokens_per_second" in row]


def training_seconds(steps: list[dict[str, Any]]) -> float:
    return sum(row["batch_tokens"] / row["tokens_per_second"] for row in steps)
