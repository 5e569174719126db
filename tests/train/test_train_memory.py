"""Pages that were freed are used again, in a process of its own: the setting holds until a process ends."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from arfast.train.memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
faults = []
for _ in range(40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(1 << 22).zero_()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
# The heap grows a few times more, while remainders of what was freed keep it from fitting the next aligned block.
print(kept, max(faults[20:]))
"""


def page_faults(mode):
    command = [sys.executable, "-c", PROGRAM, mode]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    kept, faults = result.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_kept():
    _, default = page_faults("default")
    kept, faults = page_faults("keep")
    if kept == "False":
        pytest.skip("the C library is not glibc")
    assert faults < 100
    if default > 1000:  # fewer when the system gives huge pages to everybody
        assert faults < default / 100
