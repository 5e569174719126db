"""setup.py finds torch and nvcc wherever they are, says what it misses, and packs what a build needs."""

import importlib.metadata
import importlib.util
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import ninja
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setup(monkeypatch):
    """setup.py as a module, where neither torch nor nvcc can be found."""
    for name in ("ARFAST_TORCH_SITE", "ARFAST_CUDA", "CONDA_PREFIX", "CUDA_HOME", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.setattr(sys, "executable", os.devnull)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not Path(path, "torch").is_dir()])
    return module


def fake_torch(site: Path, version="2.13.0+cpu") -> Path:
    (site / "torch").mkdir(parents=True)
    (site / "torch" / "__init__.py").touch()
    (site / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
    return site / "torch"


def program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_torch_nowhere(setup):
    assert setup.find_torch() is None


def test_torch_of_the_build_itself(setup, tmp_path):
    expected = fake_torch(tmp_path)
    sys.path.append(str(tmp_path))
    assert setup.find_torch() == expected


def test_torch_of_the_interpreter_that_an_isolated_build_hides(setup, tmp_path, monkeypatch):
    monkeypatch.undo()
    venv.create(tmp_path / "env", symlinks=True)
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    expected = fake_torch(site)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not Path(p, "torch").is_dir()])
    monkeypatch.setattr(sys, "executable", os.devnull)
    monkeypatch.setenv("PATH", str(tmp_path / "env" / "bin"))
    assert setup.find_torch() == expected


@pytest.mark.parametrize("old", ["2.9.1", "1.13.0"])
def test_an_old_torch_is_passed_over(setup, tmp_path, old):
    fake_torch(tmp_path / "old", old)
    expected = fake_torch(tmp_path / "new", "2.10.0")
    sys.path += [str(tmp_path / "old"), str(tmp_path / "new")]
    assert setup.find_torch() == expected


def test_torch_by_name(setup, tmp_path, monkeypatch):
    sys.path.append(str(tmp_path / "other"))
    fake_torch(tmp_path / "other")
    expected = fake_torch(tmp_path / "site")
    monkeypatch.setenv("ARFAST_TORCH_SITE", str(tmp_path / "site"))
    assert setup.find_torch() == expected


def test_torch_by_a_wrong_name(setup, tmp_path, monkeypatch):
    monkeypatch.setenv("ARFAST_TORCH_SITE", str(tmp_path))
    with pytest.raises(SystemExit, match="arfast: ARFAST_TORCH_SITE must name the folder that holds a torch >= 2.10"):
        setup.find_torch()


@pytest.mark.parametrize(
    "found,command,requirements",
    [(False, "egg_info", ["torch>=2.10"]), (True, "egg_info", []), (False, "build_ext", [])],
)
def test_torch_is_asked_for_only_when_it_is_missing(setup, tmp_path, monkeypatch, found, command, requirements):
    if found:
        fake_torch(tmp_path)
        sys.path.append(str(tmp_path))
    given = {}
    monkeypatch.setattr("setuptools.setup", lambda **arguments: given.update(arguments))
    monkeypatch.setattr(sys, "argv", ["setup.py", command])
    runpy.run_path(str(ROOT / "setup.py"), run_name="__main__")
    assert given["setup_requires"] == requirements
    assert given["options"]["bdist_wheel"] == {"py_limited_api": "cp310"}


def test_nvcc_on_path_or_in_cuda_home(setup, tmp_path, monkeypatch):
    assert setup.find_nvcc() is None
    in_home = program(tmp_path / "home" / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert setup.find_nvcc() == str(in_home)
    on_path = program(tmp_path / "path" / "nvcc")
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert setup.find_nvcc() == str(on_path)
    monkeypatch.setenv("ARFAST_CUDA", "0")
    assert setup.find_nvcc() is None


@pytest.mark.parametrize(
    "wish,message",
    [("1", "ARFAST_CUDA=1 needs nvcc on PATH"), ("yes", "ARFAST_CUDA must be 0, 1 or auto, got yes")],
)
def test_cuda_errors(setup, monkeypatch, wish, message):
    monkeypatch.setenv("ARFAST_CUDA", wish)
    with pytest.raises(SystemExit, match=f"arfast: {message}"):
        setup.find_nvcc()


@pytest.mark.parametrize(
    "wished,names",
    [
        (None, ["sm_80", "sm_90a", "compute_90"]),
        ("8.0", ["sm_80"]),
        ("8.6;9.0+PTX", ["sm_86", "sm_90", "compute_90"]),
        ("9.0a 12.0+PTX", ["sm_90a", "sm_120", "compute_120"]),
    ],
)
def test_architectures(setup, monkeypatch, wished, names):
    if wished:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wished)
    flags, actual = setup.cuda_architectures()
    assert actual == names
    assert [flag.rpartition("code=")[2] for flag in flags if flag != "-gencode"] == names


def test_jobs(setup, monkeypatch):
    assert 1 <= int(setup.jobs()) <= os.cpu_count()
    monkeypatch.setenv("MAX_JOBS", "3")
    assert setup.jobs() == "3"


def test_paths_with_spaces_reach_the_compiler_whole(setup, tmp_path, monkeypatch):
    root, torch = tmp_path / "a $b: c", fake_torch(tmp_path / "d e")
    for name in ("op/op.cpp", "op/op_cpu.cpp", "op/op.cu"):
        (root / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "csrc" / name).touch()
    monkeypatch.setattr(setup, "ROOT", root)
    nvcc = program(tmp_path / "f g" / "nvcc")
    monkeypatch.setenv("PATH", f"{nvcc.parent}:/usr/bin:/bin")
    (root / "build.ninja").write_text(setup.ninja_file(torch, root / "lib.so"))
    done = subprocess.run(
        [os.path.join(ninja.BIN_DIR, "ninja"), "-n", "-v", "-C", root], capture_output=True, text=True, check=True
    )
    commands = [shlex.split(line.partition("] ")[2]) for line in done.stdout.splitlines() if line.startswith("[")]
    compiled = [c[c.index("-c") + 1] for c in commands if "-c" in c]
    expected = {"op.cpp": 1, "op.cu": 1, "op_cpu.cpp": len(setup.CPU_TARGETS)}
    assert {name: compiled.count(str(root / "csrc" / "op" / name)) for name in expected} == expected
    assert all(f"-I{root / 'csrc'}" in c for c in commands if "-c" in c)
    assert [c[0] for c in commands if "op.cu" in str(c[c.index("-c") + 1 :] if "-c" in c else "")] == [str(nvcc)]
    assert f"-L{torch / 'lib'}" in commands[-1] and str(root / "lib.so") in commands[-1]


def test_source_distribution(tmp_path):
    """It has what a build from it needs: sources, headers, kernels, and the tests and benchmarks beside them."""
    skip = shutil.ignore_patterns("build", "dist", ".*", "runs", "*.egg-info", "__pycache__", "*.so")
    tree = shutil.copytree(ROOT, tmp_path / "tree", ignore=skip)
    code = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    archive = tmp_path / done.stdout.split()[-1]
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    kinds = {"csrc": (".cpp", ".h", ".cu", ".cuh"), "arfast": (".py", ".typed"), "tests": (".py", ".cpp")}
    wanted = {"setup.py", "pyproject.toml", "README.md", "CMakeLists.txt", "benchmarks/harness.py"}
    for folder, suffixes in kinds.items():
        wanted |= {str(p.relative_to(tree)) for p in (tree / folder).rglob("*") if p.suffix in suffixes}
    assert wanted - packed == set()
    assert not [name for name in packed if name.endswith((".so", ".o", ".pyc"))]


def test_installed_files():
    try:
        files = [str(f) for f in importlib.metadata.files("arfast") or []]
    except importlib.metadata.PackageNotFoundError:
        files = []
    packages = [f for f in files if f.startswith("arfast/")]
    if not packages:
        pytest.skip("arfast is not installed as a wheel")
    assert "arfast/py.typed" in packages and any(f.endswith("_C.abi3.so") for f in packages)
    assert not [f for f in files if f.startswith(("tests/", "benchmarks/", "csrc/", "setup"))]


def test_only_the_stable_abi_is_linked():
    """No C++ symbol of torch and nothing but Python's limited API: one library serves every torch >= 2.10."""
    import torch  # noqa: F401  (what the library is linked against)

    from arfast import _C

    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm")
    done = subprocess.run([nm, "-DC", "--undefined-only", _C.__file__], capture_output=True, text=True, check=True)
    symbols = [line.split(maxsplit=1)[1] for line in done.stdout.splitlines()]
    assert [s for s in symbols if s.startswith(("at::", "c10::", "torch::", "caffe2::"))] == []
    assert [s for s in symbols if s.startswith(("Py", "_Py"))] == ["PyModule_Create2"]
