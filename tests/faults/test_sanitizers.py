"""S6: the C++ of every op under AddressSanitizer and UndefinedBehaviorSanitizer, with arguments that files decide.

Token ids, targets, boundaries of documents, masks and sizes come from data; `tests/ops/test_fuzz.py` makes them, right
and wrong. Part of the long tier: building takes some minutes (``build/sanitized`` keeps it).
"""

import os
import re
import sys

import pytest
import sanitized

OVERFLOW = """
import ctypes, numpy, torch
from arfast import ops
allocate = ctypes.CDLL(None).malloc
allocate.restype, allocate.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
bytes_of_60_floats = allocate(60 * 4)
x = numpy.ctypeslib.as_array((ctypes.c_float * {size}).from_address(bytes_of_60_floats))
x[:60] = 1
ops.rms_norm(torch.from_numpy(x)[None], torch.ones({size}))
"""


@pytest.fixture(scope="module")
def package():
    if os.environ.get("ARFAST_LONG") != "1":
        pytest.skip("part of the long tier: ARFAST_LONG=1")
    if not sys.platform.startswith("linux") or sanitized.library("libasan.so") is None:
        pytest.skip("needs Linux, and a C++ compiler with AddressSanitizer")
    return sanitized.build(sanitized.ROOT / "build" / "sanitized", jobs=int(os.environ.get("MAX_JOBS", "1")))


def findings(done):
    """What a sanitizer said, and the places in our sources."""
    lines = (done.stdout + done.stderr).splitlines()
    return [line for line in lines if any(mark in line for mark in sanitized.FINDINGS) or "csrc/" in line][:20]


@pytest.mark.parametrize("target", ["baseline", "avx2", "avx512"])
def test_the_sanitizers_see_an_op(package, target):
    inside = sanitized.run(package, "-c", OVERFLOW.format(size=60), ARFAST_CPU_TARGET=target)
    assert inside.returncode == 0, inside.stderr[-2000:]
    beyond = sanitized.run(package, "-c", OVERFLOW.format(size=64), ARFAST_CPU_TARGET=target)
    assert beyond.returncode != 0 and any("csrc/rms_norm" in line for line in findings(beyond)), beyond.stderr[-2000:]


@pytest.mark.parametrize("target", ["baseline", "avx2", "avx512"])
def test_ops(package, target, record):
    fuzz = str(sanitized.ROOT / "tests" / "ops" / "test_fuzz.py")
    # What a sanitizer says as it ends the process would be lost in pytest's capture.
    command = ("-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-k", "arguments", fuzz)
    done = sanitized.run(package, *command, ARFAST_CPU_TARGET=target, ARFAST_FUZZ_EXAMPLES="100")
    assert not findings(done), findings(done)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    outcome = "no finding of AddressSanitizer or UndefinedBehaviorSanitizer"
    record("S6", f"calls of every op, right and wrong, under sanitizers ({target})", 100 * int(passed), outcome)
