"""Fixtures that every test may use: the implementation under test, poisoned memory, fixed seeds."""

import os
import sys
from pathlib import Path

import pytest

# Read when torch starts its threads: on a busy machine, waiting threads that spin cost more than the work in the tests.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

import arfast

sys.path.insert(0, str(Path(__file__).parent))

from threads import num_threads


@pytest.fixture(scope="session", autouse=True)
def _child_processes_import_the_same_arfast(tmp_path_factory):
    """Python puts the current folder first: in the source tree, that is the package without its compiled library."""
    before = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(arfast.__file__).parents[1]), prepend=os.pathsep)
        os.chdir(tmp_path_factory.mktemp("cwd"))
        yield
        os.chdir(before)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """For tensors that are too small to share: a second thread that waits costs a busy machine more than it gives."""
    with num_threads(1):
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where the implementation under test runs. `cuda` is skipped, visibly, without a GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return request.param


@pytest.fixture
def poisoned():
    """Every uninitialised tensor is filled with NaN (integers: their largest value), so that unwritten outputs show."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)
