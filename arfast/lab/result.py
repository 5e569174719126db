"""Where a study leaves its figure."""

import argparse
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
