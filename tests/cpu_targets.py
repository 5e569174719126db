"""Tests again with the instructions of another CPU: the choice is made once per process, so a fresh one runs them."""

import os
import subprocess
import sys

import pytest

from arfast.doctor import environment

CPU_TARGETS = ["baseline", "avx2", "avx512", "amx"]  # each has the instructions of those before it


def other_targets(*targets: str):
    """Parametrizes a test with the targets among these that are less than this machine's."""
    here = CPU_TARGETS.index(environment()["cpu instructions"])

    def case(target):
        no_other = CPU_TARGETS.index(target) >= here
        marks = [pytest.mark.skipif(no_other, reason=f"the machine has nothing beyond {CPU_TARGETS[here]}")]
        return pytest.param(target, marks=[*marks, pytest.mark.slow] if target == "baseline" else marks)

    return pytest.mark.parametrize("target", [case(target) for target in targets])


def run_on_target(target: str, places: list[str], chosen: str = "cpu") -> str:
    """Runs tests (files, or file::name) with `-k chosen` for ARFAST_CPU_TARGET=target; what pytest said."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, *places]
    result = subprocess.run(command, env=os.environ | {"ARFAST_CPU_TARGET": target}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr
    return result.stdout
