"""Self-examination on the user's machine: each check does what training relies on and says by how much it holds.

Every check answers a kind of silent fault that real training code has had: an op that is wrong for one instruction set,
a mask that leaks the future or the neighbouring document, an accumulated loss that is a mean of means, a checkpoint
that does not come back as it was, shards of another tokenizer, a utilisation figured from a peak that is not there.
"""

import os
import platform
import sys
from collections.abc import Iterator
from itertools import chain

import torch

from .data import data_checks
from .finding import Finding, run_checks
from .kernels import op_checks
from .machine import machine_checks
from .model import model_checks
from .sequence_lengths import measure_sequence_lengths, table

__all__ = ["Finding", "environment", "examine", "measure_sequence_lengths", "table"]


def environment() -> dict:
    """Versions, build and devices, ready for JSON."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("arfast")
    except PackageNotFoundError:
        own = "source tree"
    cpu_target, architectures = torch.ops.arfast.build_info().split(";")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "arfast": own,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu instructions": cpu_target,
        "cuda kernels for": architectures.split(",") if architectures else "none (built without nvcc)",
        "gpus": gpus or "none",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "executable": sys.executable,
    }


def examine(device: str = "cpu", model: str | None = None, data: str | None = None) -> Iterator[Finding]:
    """Run all checks on a device, one finding at a time.

    Args:
        model: a model directory, a run or adapters, to be examined instead of a small random model.
        data: a data set directory, whose hashes are checked, and whose tokens the model is examined with.
    """
    torch.manual_seed(0)
    checks = (
        op_checks(device),
        model_checks(device, model, data),
        data_checks(model, data),
        machine_checks(device, model),
    )
    yield from run_checks(chain(*checks))
