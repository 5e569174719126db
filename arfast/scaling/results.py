"""Measured runs as columns, from the results of a sweep or from any table."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from arfast.data.checks import one_line
from arfast.data.files import read_file

from .checks import check_points
from .sweep import RESULTS_NAME

_MAX_BYTES = 64 << 20
COLUMNS = {"N": "parameters", "D": "tokens", "L": "loss", "C": "flops"}  # their names in results.jsonl


@dataclass(frozen=True, eq=False)
class Runs:
    """Measured runs: parameters N, tokens D, loss L, compute C in FLOPs, each [n]; held_out [n] bool."""

    N: np.ndarray
    D: np.ndarray
    L: np.ndarray
    C: np.ndarray
    held_out: np.ndarray

    def __len__(self) -> int:
        return len(self.N)

    def __getitem__(self, index: np.ndarray) -> Runs:
        return Runs(*(column[index] for column in (self.N, self.D, self.L, self.C, self.held_out)))

    def hold_out_largest(self, count: int) -> Runs:
        """The same runs, of which the ``count`` with the most compute are held out.

        Raises:
            ValueError: there are not so many.
        """
        if not 0 <= count < len(self):
            raise ValueError(f"fit: hold_out must be in [0, {len(self) - 1}], got {count}")
        held_out = np.zeros(len(self), dtype=bool)
        held_out[np.argsort(self.C, kind="stable")[len(self) - count :]] = True
        return Runs(self.N, self.D, self.L, self.C, held_out)


def read_results(path: str | os.PathLike[str], columns: Mapping[str, str] | None = None) -> Runs:
    """Read the table of a sweep's directory, a .jsonl file or a .csv file with a line of names.

    Args:
        columns: names of the columns of N, D, L, and of C, which is 6 N D where there is none; those that are left out
            have the names in results.jsonl.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row lacks a column, or a value is not finite and above 0.
    """
    path = Path(path)
    if path.is_dir():
        path = path / RESULTS_NAME
    if not path.exists():
        raise FileNotFoundError(f"read_results: path must be a table of runs, got {str(path)!r}, which is not there")
    if unknown := sorted(set(columns or {}) - set(COLUMNS)):
        raise ValueError(f"read_results: columns must be of {', '.join(COLUMNS)}, got {unknown[0]!r}")
    names = COLUMNS | dict(columns or {})
    rows = _read_rows(path)
    found = {key: name for key, name in names.items() if key != "C" or "C" in (columns or {}) or name in rows[0]}
    values = {}
    for name in found.values():
        if lacking := [number for number, row in enumerate(rows, 1) if row.get(name) in (None, "")]:
            raise ValueError(
                f"read_results: {str(path)!r} must have {name!r} in every row, got none in row {lacking[0]}"
            )
        values[f"column {name!r}"] = [row[name] for row in rows]
    points = dict(zip(found, check_points("read_results", values, at_least=1, different={}), strict=True))
    C = points.get("C", 6 * points["N"] * points["D"])
    held_out = np.array([row.get("held_out") is True for row in rows])
    return Runs(points["N"], points["D"], points["L"], C, held_out)


def _read_rows(path: Path) -> list[dict]:
    try:
        text = read_file(path, _MAX_BYTES).decode()
        if path.suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(text)))
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, csv.Error, RecursionError) as error:
        raise ValueError(
            f"read_results: {str(path)!r} must be a .csv or .jsonl table, got: {one_line(error)}"
        ) from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"read_results: {str(path)!r} must hold at least one row with names, got none")
    return rows
