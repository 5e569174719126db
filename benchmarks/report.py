"""The machine that a benchmark ran on, and its results as a table."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # a script that only says where it ran needs no harness
    from harness import Result

FOLDER = Path(__file__).resolve().parent / "results"
HEAD = tuple("case,device,ours,spread,against,ratio,gate,GB/s,GFLOP/s,tokens/s,of peak,of nominal,rounds".split(","))


def machine() -> dict[str, str]:
    """What a reader must know to judge a number."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "cpu": f"{_cpu_name()}, {torch.get_num_threads()} threads of {os.cpu_count()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "software": f"torch {torch.__version__}, python {platform.python_version()}, {' '.join(platform.libc_ver())}",
        "allocator": os.environ.get("GLIBC_TUNABLES", "default"),
    }


def table(results: Sequence[Result]) -> str:
    """Markdown, one row per pair of ours and a peer; aligned, so that it reads in a terminal too."""
    rows = [HEAD, *(row for result in results for row in _rows(result))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def save(results: Sequence[Result], folder: Path) -> list[Path]:
    """Writes <device>[-tuned].md and .json, replacing older ones of the same device."""
    info = machine()
    name = (
        info["gpu"] if any(r.device == "cuda" for r in results) else f"{_cpu_name()} {torch.get_num_threads()} threads"
    )
    stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ("" if info["allocator"] == "default" else "-tuned")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}.md", folder / f"{stem}.json"]
    paths[0].write_text(f"# {name}\n\n{_list(info)}\n{table(results)}\n")
    rows = [dataclasses.asdict(result) | {"noisy": result.noisy} for result in results]
    paths[1].write_text(json.dumps({"machine": info, "results": rows}, indent=1) + "\n")
    return paths


def save_page(name: str, title: str, about: str, table: str) -> Path:
    """Writes <name>.md: what was measured, where, and the table."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.md"
    path.write_text(f"# {title}\n\n{about}\n\n{_list(machine())}\n{table}\n")
    return path


def _list(info: dict[str, str]) -> str:
    return "".join(f"* {key}: {value}\n" for key, value in info.items())


def _rows(result: Result):
    seconds = result.seconds
    common = (
        _per_second(result.bytes, seconds),
        _per_second(result.flops, seconds),
        f"{result.tokens / seconds:.4g}" if result.tokens else "",
        f"{result.peak:.0%} {result.peak_of}" if result.peak else "",
        f"{result.nominal:.0%}" if result.nominal else "",
        f"{result.quiet_rounds}/{result.rounds}" + (" noisy" if result.noisy else ""),
    )
    for index, (peer, ratio) in enumerate(result.ratios.items()):
        gate = result.gates.get(peer)
        verdict = "" if gate is None else f"{gate:.2f}" + ("" if ratio >= gate else " missed")
        head = (result.name, result.device, _time(seconds), f"{result.spread:.0%}") if index == 0 else ("",) * 4
        tail = common if index == 0 else ("",) * len(common)
        yield *head, f"{peer} {_time(result.peers[peer])}", f"{ratio:.2f}x", verdict, *tail


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _per_second(amount: int, seconds: float) -> str:
    return f"{amount / seconds / 1e9:.3g}" if amount else ""


def _cpu_name() -> str:
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _commit(directory: Path = Path(__file__).parent) -> str:
    """The short hash, with a mark when the tree differs from it, but for the results that a run itself writes."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=directory, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        tree = (":(top)", ":(top,exclude)benchmarks/results")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *tree)
        return git("describe", "--always") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
