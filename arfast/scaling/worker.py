"""A process that does one run of a sweep, for `run_sweep` with several processes: it prints the row of the run."""

import json
import os
import sys
import threading
from pathlib import Path

import torch

from .plan import SweepPlan
from .sweep import train


def main() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    if torch.cuda.is_available():
        torch.cuda.set_device(request["place"] % torch.cuda.device_count())
    root = Path(request["directory"])
    plan = SweepPlan.load(root)
    run = next(run for run in plan.runs if run.name == request["run"])
    try:
        row = train(root, plan, run, progress=False)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        sys.exit(f"{run.name}: {error}")
    print(json.dumps(row))


def _end_with_parent() -> None:
    """Ends this process at once when nobody holds the other end of its stdin any more."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
