"""Logs of a run: JSON-lines files that a kill cannot spoil, and a picture of the loss."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

from arfast.data.files import write_file
from arfast.figures import save_figure

from .manifest import CheckpointError


class JsonLines:
    """An append-only file of JSON objects, each with a ``step``, that can be cut back to a step.

    A row is in the hands of the operating system when `append` returns, so a killed process loses none; after `sync` a
    power failure does not either. NaN and Inf, which JSON does not have, are written as null.

    >>> from tempfile import mkdtemp
    >>> log = JsonLines(Path(mkdtemp()) / "metrics.jsonl", keep_through=0)
    >>> log.append({"step": 1, "loss": 2.5}); log.read()
    [{'step': 1, 'loss': 2.5}]
    """

    def __init__(self, path: Path, keep_through: int) -> None:
        """Open ``path`` with its rows up to step ``keep_through``; later and unreadable ones are removed."""
        self.path = path
        self._newest: list[dict[str, Any]] = []  # the rows of the newest step; a long run has millions in all
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise ValueError(f"metrics: {path} must be a regular file or absent, got something else")
        old = path.read_bytes() if path.exists() else b""
        rows = [row for row in _parse(old) if row["step"] <= keep_through]
        new = b"".join(map(_serialize, rows))
        if new != old:
            write_file(path, new)
        for row in rows:
            self._remember(row)
        self._file = open(path, "ab", buffering=0)

    def append(self, row: dict[str, Any]) -> None:
        """Write a row.

        Raises:
            CheckpointError: the disk is full; what was written of the row is removed when the file is opened again.
        """
        line = _serialize(row)
        try:
            written = self._file.write(line)
        except OSError as error:
            raise CheckpointError(f"metrics: {self.path} must be writable, got {error.strerror}") from error
        if written != len(line):
            raise CheckpointError(f"metrics: {self.path} must have room for {len(line)} bytes, got {written}")
        self._remember(row)

    def at_step(self, step: int, key: str) -> dict[str, Any] | None:
        """The last row with ``key`` when ``step`` is the newest step in the log and has one."""
        return next((row for row in reversed(self.rows_of(step)) if key in row), None)

    def rows_of(self, step: int) -> list[dict[str, Any]]:
        """All rows of ``step`` when that is the newest step in the log."""
        return [row for row in self._newest if row["step"] == step]

    def read(self) -> list[dict[str, Any]]:
        """All rows, from the file."""
        return _parse(self.path.read_bytes())

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _remember(self, row: dict[str, Any]) -> None:
        if self._newest and self._newest[-1]["step"] != row["step"]:
            self._newest.clear()
        self._newest.append(row)


class TensorBoard:
    """The numbers of rows as TensorBoard curves over steps; those of steps that are done again replace the old ones.

    Raises:
        ValueError: tensorboard is not installed.
    """

    def __init__(self, path: Path, keep_through: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(
                "TrainConfig: log must be of installed packages, got 'tensorboard' (pip install 'arfast[log]')"
            ) from None
        self._writer = SummaryWriter(str(path), purge_step=keep_through + 1)

    def append(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, list) and all(isinstance(item, float) for item in value):
                for index, item in enumerate(value):
                    self._writer.add_scalar(f"{name}/{index}", item, row["step"])
            elif isinstance(value, (int, float)) and name != "step":
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()


def _serialize(row: dict[str, Any]) -> bytes:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def _parse(content: bytes) -> list[dict[str, Any]]:
    rows = []
    for line in content.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def plot_loss(rows: list[dict[str, Any]], path: Path) -> bool:
    """Draw training loss (as it is, and smoothed) and validation loss over tokens; False without matplotlib."""
    train = [(row["tokens"], row["loss"]) for row in rows if row.get("loss") is not None]
    validation = [(row["tokens"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        if train:
            tokens, losses = zip(*train)
            axes.plot(tokens, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
            axes.plot(tokens, _smoothed(losses), color="tab:blue", label="train (smoothed)")
        if validation:
            axes.plot(*zip(*validation), color="tab:orange", marker="o", markersize=3, label="validation")
        if train or validation:
            axes.legend()
        axes.set_xlabel("tokens")
        axes.set_ylabel("loss (nats per token)")
        axes.grid(alpha=0.3)

    return save_figure(path, draw)


def _smoothed(values: tuple[float, ...], decay: float = 0.95) -> list[float]:
    """Exponential moving average without the bias of its start (Kingma and Ba 2015, arXiv:1412.6980, section 3)."""
    average, smoothed = 0.0, []
    for count, value in enumerate(values, start=1):
        average = decay * average + (1 - decay) * value
        smoothed.append(average / (1 - decay**count))
    return smoothed
