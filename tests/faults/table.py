"""The table in README.md of what was injected and what happened, written by the tests that passed."""

from __future__ import annotations

import datetime
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch

README = Path(__file__).parent / "README.md"
_HEADER = "| row | fault | injections | outcome | date | device |\n| --- | --- | ---: | --- | --- | --- |\n"
_BEGIN, _END = "<!-- table: written by `ARFAST_FAULT_TABLE=1 pytest tests/faults` -->\n", "<!-- end of table -->"


_TODAY = datetime.date.today().isoformat()  # before any test plays with the clock


class Row(NamedTuple):
    """A test that passed: the row of the fault list it belongs to, what it injected, how often, and what happened."""

    row: str
    fault: str
    injections: int
    outcome: str
    date: str
    device: str


def device_name() -> str:
    """The processor, with the number of cores."""
    with open("/proc/cpuinfo") as file:
        name = re.search(r"model name\s*: (.+)", file.read())
    return f"{name[1].strip() if name else 'CPU'}, {os.cpu_count()} cores, torch {torch.__version__}"


def row(number: str, fault: str, injections: int, outcome: str) -> Row:
    return Row(number, fault, injections, outcome, _TODAY, device_name())


def update(rows: list[Row]) -> None:
    """Put rows into the table; an older one of the same fault goes."""
    text = README.read_text()
    before, rest = text.split(_BEGIN)
    table, after = rest.split(_END)
    found = [tuple(cell.strip() for cell in line.strip("|\n").split("|")) for line in table.splitlines()[2:]]
    merged = {cells[:2]: cells for cells in found}
    merged |= {(each.row, each.fault): (each.row, each.fault, f"{each.injections:,}", *each[3:]) for each in rows}
    order = sorted(merged.values(), key=lambda cells: ("CTS".index(cells[0][0]), int(cells[0][1:]), cells[1]))
    lines = "".join("| " + " | ".join(cells) + " |\n" for cells in order)
    README.write_text(before + _BEGIN + _HEADER + lines + _END + after)
