"""The library's C++ for the CPU with AddressSanitizer and UndefinedBehaviorSanitizer, in a package of its own.

Serebryany et al., "AddressSanitizer: A Fast Address Sanity Checker" (USENIX ATC 2012). Python and torch are as they
are; AddressSanitizer comes into the process first, and gives every tensor of the CPU an allocation with guarded ends.
Loads that the instruction itself masks (AVX-512's) are not seen; those of the other targets are.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import arfast

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = "-fsanitize=address,undefined"
FLAGS = [SANITIZERS, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g1"]
FINDINGS = ("ERROR: AddressSanitizer", "runtime error:")


def build(folder: Path, jobs: int = 1) -> Path:
    """Compiles every source for the CPU into ``folder`` / arfast, beside links to the Python files; what changed."""
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    setup.find_nvcc = lambda: None
    setup.CXX_FLAGS += FLAGS
    setup.HARDENING_FLAGS = []  # their checks would be found before those of the sanitizers
    setup.LINK_FLAGS += [SANITIZERS]
    package = folder / "arfast"
    package.mkdir(parents=True, exist_ok=True)
    for path in Path(arfast.__file__).parent.iterdir():
        if path.suffix != ".so" and not (package / path.name).exists():
            (package / path.name).symlink_to(path)
    (folder / "build.ninja").write_text(setup.ninja_file(setup.find_torch(), package / "_C.abi3.so"))
    ninja = [sys.executable, "-m", "ninja", "-C", str(folder), "-j", str(jobs)]
    done = subprocess.run(ninja, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    return package


def library(name: str) -> str | None:
    """A library of the compiler's, or None."""
    done = subprocess.run([os.environ.get("CXX", "c++"), f"-print-file-name={name}"], capture_output=True, text=True)
    path = done.stdout.strip()
    return os.path.realpath(path) if os.path.isabs(path) and os.path.exists(path) else None


def run(package: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Python with the sanitizers and this package before any other."""
    environment = os.environ | {
        # The C++ runtime too: AddressSanitizer looks for its functions when the process starts.
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    # Not in the repository, where ``python -m`` would find the package of everybody.
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=package.parent)
