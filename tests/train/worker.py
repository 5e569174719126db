"""The other end of train_worker.py: runs of the trainer in fresh processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def worker_environment():
    """Modules of this tree; and threads that wait without spinning, since the tests share their cores."""
    path = os.pathsep.join([str(HERE), str(HERE.parent / "faults"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_WAIT_POLICY": "passive"}


class Worker:
    """See train_worker.py."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, HERE / "train_worker.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=worker_environment(),
        )

    def __call__(self, output_dir, *, signals=(), **job):
        """Run; returns (exit status, seconds, what it printed). signals: (seconds after the start, number)."""
        output = Path(output_dir).with_suffix(".log")
        output.write_text("")
        config = job.pop("config", {}) | {"output_dir": str(output_dir)}
        job |= {"config": config, "log": str(output), "signals": list(signals)}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["status"], answer["seconds"], output.read_text()

    def close(self):
        self.process.stdin.close()
        assert self.process.wait(timeout=60) == 0
