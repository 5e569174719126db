"""Fixtures that every test may use: the implementation under test, poisoned memory, fixed seeds."""

import os
import random
import sys
import zlib
from pathlib import Path

import pytest

# Read when torch starts its threads: on a busy machine, waiting threads that spin cost more than the work in the tests.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # `poisoned` asks for deterministic algorithms

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


def pytest_addoption(parser):
    parser.addoption("--emulator-seed", type=int, help="seed of the emulated GPU's random schedules (default: random)")


def pytest_configure(config):
    if config.getoption("--emulator-seed") is None:
        config.option.emulator_seed = random.randrange(1 << 31)
    # A worker of pytest-xdist repeats what the header says.
    config.option.emulator_seed = getattr(config, "workerinput", {}).get("emulator_seed", config.option.emulator_seed)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["emulator_seed"] = node.config.option.emulator_seed


def pytest_report_header(config):
    return f"emulated GPU: --emulator-seed {config.getoption('--emulator-seed')}"


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.hookimpl(tryfirst=True)  # before pytest leaves the slow ones out
def pytest_collection_modifyitems(items):
    """The emulated GPU is slow: by default it runs one in n cases of a test marked `emulated_sample(n)`, and none in
    float16, where a kernel is the one in bfloat16 with another type."""
    for item in items:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        if not str(values.get("device")).startswith("emulated"):
            continue
        sample = item.get_closest_marker("emulated_sample")
        left_out = sample is not None and zlib.crc32(item.name.encode()) % sample.args[0] != 0
        if left_out or values.get("dtype") == torch.float16:
            item.add_marker(pytest.mark.slow)


def pytest_generate_tests(metafunc):
    """Tests that ask for a device run on the CPU, on the emulated GPU and on a GPU."""
    if "device" not in metafunc.fixturenames:
        return
    implementations = ["cpu"]
    if metafunc.definition.get_closest_marker("not_emulated") is None:
        implementations.append("emulated")
        if metafunc.definition.get_closest_marker("random_schedules") is not None:
            implementations.append("emulated-random")
        if metafunc.definition.get_closest_marker("older_gpu") is not None:
            implementations += ["emulated-sm80", pytest.param("emulated-sm89", marks=pytest.mark.slow)]
    implementations.append(pytest.param("cuda", marks=pytest.mark.gpu))
    metafunc.parametrize("device", implementations, indirect=True)


class _EmulatedOps:
    """torch.ops.arfast_emulated; a test that calls an op without CUDA kernels is skipped."""

    def __init__(self, composites):
        self._composites = composites  # made of other ops in Python

    def __getattr__(self, name):
        if name in self._composites:
            return self._composites[name]
        if not hasattr(torch.ops.arfast_emulated, name):
            pytest.skip(f"{name} has no CUDA kernel")
        return getattr(torch.ops.arfast_emulated, name)


@pytest.fixture(scope="session")
def integers():
    """The kernels' integer functions, compiled for the CPU."""
    from emulator import build

    if reason := build.unavailable():
        pytest.skip(reason)
    pytest.importorskip("pybind11")
    return build.load_integers()


@pytest.fixture(scope="session")
def emulator_library():
    """Built by the first test that needs it."""
    from emulator import build

    if reason := build.unavailable():
        pytest.skip(reason)
    return build.load()


@pytest.fixture
def emulator(request, emulator_library, monkeypatch):
    """The emulated GPU in place of the real ops, in the fixed schedule; `configure` chooses others."""
    emulator_library.configure()
    for name, module in list(sys.modules.items()):
        if name.startswith("arfast.ops.") and hasattr(module, "_ops"):
            monkeypatch.setattr(module, "_ops", _EmulatedOps(getattr(module, "COMPOSITES", {})))
    return emulator_library


@pytest.fixture
def device(request):
    """The device of the tensors that the implementation under test takes. `cuda` is skipped, visibly, without a GPU."""
    if request.param != "cpu" and request.node.callspec.params.get("dtype") == torch.float64:
        pytest.skip("float64 is for the CPU")
    sixteen_bits = request.node.get_closest_marker("sixteen_bits") is not None
    if request.param != "cpu" and sixteen_bits and request.node.callspec.params.get("dtype") == torch.float32:
        pytest.skip("the kernels take 16-bit elements")
    if not request.param.startswith("emulated"):
        with torch.device(request.param):  # where a test makes its tensors
            yield request.param
        return
    emulator = request.getfixturevalue("emulator")
    if request.param == "emulated-random":
        seed = request.config.getoption("--emulator-seed") ^ zlib.crc32(request.node.nodeid.encode())
        emulator.configure(schedule="random", asynchrony="mixed", seed=seed, jitter=20)
    elif request.param.startswith("emulated-sm"):
        emulator.configure(capability=int(request.param.removeprefix("emulated-sm")))
    yield "cpu"


@pytest.fixture
def implementation(request):
    """cpu, emulated, emulated-random, emulated-sm80, emulated-sm89 or cuda: for a test that asks for `device` too."""
    return request.node.callspec.params["device"]


@pytest.fixture
def poisoned():
    """Every uninitialised tensor is filled with NaN (integers: their largest value), so that unwritten outputs show."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)
