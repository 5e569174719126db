"""What this machine reaches, beside what the model FLOPs utilisation (MFU) of a run was divided by."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from arfast.peaks import copy_bandwidth, matmul_rate
from arfast.train.checkpoint import list_checkpoints

from .finding import Check, Outcome

# A peak that is assumed below this share of what is reached makes the MFU too high. The slack is for a busy machine.
_LOWEST_SHARE = 0.8


def machine_checks(device: str, run: str | None = None) -> Iterator[Check]:
    yield "memory bandwidth of a copy", lambda: _bandwidth(device)
    for dtype in (torch.float32, torch.bfloat16):
        label = str(dtype).removeprefix("torch.")
        yield f"matrix product, {label}", lambda dtype=dtype: _product(device, dtype, run)


def _bandwidth(device: str) -> Outcome:
    rate = copy_bandwidth(device)
    return rate > 0, f"{rate / 1e9:.1f} GB/s"


def _product(device: str, dtype: torch.dtype, run: str | None) -> Outcome:
    rate = matmul_rate(device, dtype)
    detail = f"{rate / 1e9:.0f} GFLOP/s on {device}, {torch.get_num_threads()} threads"
    settings = {} if run is None else _run_settings(Path(run))
    assumed = settings.get("peak_flops")
    if assumed is None or settings.get("dtype") != str(dtype).removeprefix("torch."):
        return rate > 0, detail
    return assumed > _LOWEST_SHARE * rate, f"{detail}; {assumed / 1e9:.0f} assumed for the MFU of {run}"


def _run_settings(run: Path) -> dict:
    """The configuration in a run's newest checkpoint; empty for a directory that is no run."""
    steps = [run] if (run / "trainer_state.json").is_file() else list_checkpoints(run)
    return json.loads((steps[-1] / "trainer_state.json").read_text())["config"] if steps else {}
