"""What a user reads when the compiled library is missing or does not load."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import arfast


@pytest.fixture
def source_tree(tmp_path):
    """The package as a clone has it: without the compiled library."""
    shutil.copytree(Path(arfast.__file__).parent, tmp_path / "arfast", ignore=shutil.ignore_patterns("_C.*", "*.pyc"))
    return tmp_path


def error_of_import(folder):
    done = subprocess.run(
        [sys.executable, "-c", "import arfast.ops"], cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True
    )
    assert done.returncode == 1
    return done.stderr.decode().splitlines()[-1]


def test_source_without_the_library_is_named(source_tree):
    error = error_of_import(source_tree)
    assert f"{source_tree / 'arfast'} has no compiled library. Build it with `pip install .`" in error


def test_library_that_does_not_load(source_tree):
    (source_tree / "arfast" / "_C.abi3.so").write_bytes(b"no library")
    assert "the compiled library does not load with torch" in error_of_import(source_tree)
