"""Tests again with the instructions of another CPU: the choice is made once per process, so a fresh one runs them."""

import os
import subprocess
import sys


def run_on_target(target: str, places: list[str], chosen: str = "cpu") -> str:
    """Runs tests (files, or file::name) with `-k chosen` for ARFAST_CPU_TARGET=target; what pytest said."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, *places]
    result = subprocess.run(command, env=os.environ | {"ARFAST_CPU_TARGET": target}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr
    return result.stdout
