"""Figures as PNG files, where matplotlib is there to draw them."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arfast.data.files import write_file


def save_figure(
    path: str | os.PathLike[str], draw: Callable[[Any], object], size: tuple[float, float] = (8, 5)
) -> bool:
    """Let `draw(figure)` fill a figure of this size, in inches, and write it; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_file(Path(path), image.getvalue())
    return True
