"""Running the command line as a user does, in a process of its own."""

import json
import subprocess
import sys


def arfast(*arguments, cwd=None, **options):
    """Run a verb and return the finished process."""
    command = [sys.executable, "-m", "arfast", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, **options)


def last_line(process):
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])
