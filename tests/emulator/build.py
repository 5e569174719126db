"""Builds the library of ops with an emulated GPU, and loads it: torch.ops.arfast_emulated.

The bindings and the kernels of csrc/ are compiled once more by the C++ compiler, the kernels with the sanitizers'
hooks, which the emulator implements. Environment: ARFAST_EMULATOR_CACHE (where builds are kept), ARFAST_EMULATOR_OPS
(only these folders of csrc/, separated by commas: for development), CXX, MAX_JOBS.
"""

import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SCHEDULES = ("fifo", "lifo", "random")
ASYNCHRONY = ("late", "early", "mixed")
DEFINES = ["-DARFAST_EMULATED", "-DARFAST_WITH_CUDA", "-Darfast=arfast_emulated"]
COMMON = ["-x", "c++", "-std=c++20", "-fPIC", "-fno-strict-aliasing", "-fcf-protection=none"]
COMMON += ["-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-attributes", "-Werror=return-type"]
RUNTIME = [*COMMON, "-O2", "-g1", "-Wall", "-Wextra"]
KERNELS = [
    *COMMON,
    *DEFINES,
    "-O2",
    "-fvisibility=hidden",
    "-g1",
    "-fsanitize=thread",
    "-fsanitize=alignment,bounds,shift",
]
KERNELS += ["-fno-optimize-sibling-calls", "--param", "tsan-instrument-func-entry-exit=0"]
BINDINGS = [*COMMON, *DEFINES, "-O1", "-fvisibility=hidden", "-g0", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
INTEGERS = [*COMMON, "-DARFAST_EMULATED", "-O1", "-fvisibility=hidden", "-g0"]
OPS, PROBES, INTEGER_MODULE = "_emulated.so", "_probes.so", "_integers.so"
STATS = ("launches", "blocks", "switches", "accesses", "collectives", "barriers")


def unavailable():
    """Why this machine cannot build and run the emulator, or None."""
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        return f"the emulator runs on x86-64 Linux, not on {sys.platform} {platform.machine()}"
    if shutil.which(compiler()[0]) is None:
        return f"the emulator needs a C++ compiler, {compiler()[0]} is not on PATH"
    return None


def compiler():
    return shlex.split(os.environ.get("CXX", "c++"))


def sources():
    """(runtime, kernels, bindings, probes): of the ops that have kernels, all but their CPU implementations."""
    emulator = ROOT / "tests" / "emulator"
    wanted = os.environ.get("ARFAST_EMULATOR_OPS", "").split(",")
    kernels = sorted(k for k in (ROOT / "csrc").rglob("*.cu") if wanted == [""] or k.parent.name in wanted)
    folders = sorted({kernel.parent for kernel in kernels} | {ROOT / "csrc" / "binding"})
    bindings = [path for folder in folders for path in sorted(folder.glob("*.cpp")) if not path.stem.endswith("_cpu")]
    bindings.remove(ROOT / "csrc" / "binding" / "matmul.cpp")  # an op of the CPU alone
    runtime = sorted(path for path in emulator.glob("*.cpp") if path.name not in ("tensors.cpp", "integers.cpp"))
    return (
        runtime,
        kernels,
        [*bindings, emulator / "tensors.cpp"],
        sorted(set((emulator / "probes").glob("*.cu")) - {emulator / "probes" / "main.cu"}),
    )


def cache():
    """The folder of all builds of this machine's user."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path(tempfile.gettempdir(), f"cache-{os.getuid()}"))
    folder = Path(os.environ.get("ARFAST_EMULATOR_CACHE") or default / "arfast-emulator")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def ninja_file():
    """build.ninja: the emulator's runtime as one library, kernels and bindings as another that needs it."""
    package = Path(torch.__file__).parent
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}"]
    torch_include = [f"-isystem{package / 'include'}"]
    objects, lines = {}, []
    rules = {"runtime": [*RUNTIME, *include], "kernel": [*KERNELS, *include]}
    rules["binding"] = [*BINDINGS, *include, *torch_include]
    rules["probe"] = rules["kernel"]
    for (rule, flags), files in zip(rules.items(), sources()):
        lines += [f"rule {rule}", f"  command = {shlex.join([*compiler(), *flags])} -MMD -MF $out.d -c $in -o $out"]
        lines += ["  depfile = $out.d", "  deps = gcc", "  description = $out"]
        objects[rule] = [f"{rule}/{path.relative_to(ROOT).as_posix().replace('/', '_')}.o" for path in files]
        lines += [f"build {name}: {rule} {path}" for name, path in zip(objects[rule], files)]
    symbols = ROOT / "tests" / "emulator" / "symbols.map"
    link = shlex.join([*compiler(), "-shared", "-Wl,-z,defs"])
    own = f"-Wl,-Bsymbolic -Wl,--version-script={symbols} -ldl -lpthread"
    lines += ["rule link_runtime", f"  command = {link} $in -o $out {own}"]
    lines += [f"build libarfast_emulator.so: link_runtime {' '.join(objects['runtime'])} | {symbols}"]
    lines += ["rule link", f"  command = {link} -Wl,-Bsymbolic $in -o $out -L. -larfast_emulator $libraries"]
    ops, own_folder = " ".join(objects["kernel"] + objects["binding"]), "-Wl,-rpath,'$$ORIGIN'"
    lines += [f"build {OPS}: link {ops} | libarfast_emulator.so"]
    lines += [f"  libraries = {own_folder} -L{package / 'lib'} -ltorch_cpu -ltorch -lc10"]
    lines += [f"build {PROBES}: link {' '.join(objects['probe'])} | libarfast_emulator.so"]
    lines += [f"  libraries = {own_folder}"]
    if importlib.util.find_spec("pybind11"):
        headers = [importlib.import_module("pybind11").get_include(), sysconfig.get_path("include")]
        module = shlex.join([*compiler(), "-shared", *INTEGERS, *include, *(f"-I{folder}" for folder in headers)])
        lines += ["rule module", f"  command = {module} -MMD -MF $out.d $in -o $out", "  depfile = $out.d"]
        source = ROOT / "tests" / "emulator" / "integers.cpp"
        lines += ["  deps = gcc", f"build {INTEGER_MODULE}: module {source} | libarfast_emulator.so"]
    return "\n".join([*lines, ""])


def content(name):
    """What decides the library `name`: every source and header, the flags, the compiler and torch."""
    digest = hashlib.sha256()
    digest.update(
        repr([sources(), RUNTIME, KERNELS, BINDINGS, INTEGERS, compiler(), torch.__version__, sys.prefix]).encode()
    )
    for folder in (ROOT / "csrc", ROOT / "tests" / "emulator"):
        for path in sorted(folder.rglob("*")):
            other = path.name.startswith("test_") or (path.parent.name == "probes" and name != PROBES)
            if path.suffix in (".h", ".cpp", ".cu", ".cuh", ".map", ".py") and not other:
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def run_ninja(work, name):
    (work / "build.ninja").write_text(ninja_file())
    package = importlib.util.find_spec("ninja")
    ninja = os.path.join(importlib.import_module("ninja").BIN_DIR, "ninja") if package else "ninja"
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    done = subprocess.run([ninja, "-C", str(work), "-j", jobs, name], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the emulated library does not build:\n{done.stdout}{done.stderr}")


def build(name):
    """The folder with the library `name` and the emulator. Object files are kept: a change compiles what it touches."""
    finished = cache() / f"{Path(name).stem}-{content(name)}"
    if finished.is_dir():
        return finished
    work = cache() / ("objects-" + hashlib.sha256(str(ROOT).encode()).hexdigest()[:16])
    work.mkdir(exist_ok=True)
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be building the same
        while not finished.is_dir():
            run_ninja(work, name)
            now = cache() / f"{Path(name).stem}-{content(name)}"
            if now != finished:  # a source was edited in the meantime
                finished = now
                continue
            partial = Path(tempfile.mkdtemp(dir=cache()))
            for file in ("libarfast_emulator.so", name):
                shutil.copy2(work / file, partial / file)
            os.replace(partial, finished)
            forget_old_builds(name)
    return finished


def forget_old_builds(name, keep=8):
    builds = sorted(cache().glob(f"{Path(name).stem}-*"), key=lambda folder: folder.stat().st_mtime)
    for folder in builds[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)


class Emulator:
    """Chooses how the emulated GPU runs, and says what it did."""

    def __init__(self, folder):
        self._library = ctypes.CDLL(str(folder / "libarfast_emulator.so"))
        self.folder = folder
        self.configure()

    def configure(
        self,
        schedule="fifo",
        asynchrony="late",
        seed=1,
        jitter=0,
        check=True,
        strict_acquire=False,
        capability=90,
        multiprocessors=4,
        largest_cluster=16,
    ):
        """Set everything anew.

        Args:
            schedule: which thread runs next: "fifo", "lifo" or "random".
            asynchrony: when asynchronous copies happen: "late", "early" or "mixed".
            seed: of random schedules; the same one gives the same schedules again.
            jitter: one plain access in `jitter` gives way to another thread; 0: none.
            check: whether accesses are checked.
            strict_acquire: an atomic operation acquires only together with a __threadfence() after it.
            capability: that launchers see, 80, 86, 89 or 90; the shared memory of a block goes with it.
            multiprocessors: their number that launchers see.
            largest_cluster: the blocks of the largest cluster that the GPU holds.
        """
        modes = SCHEDULES.index(schedule), ASYNCHRONY.index(asynchrony)
        flags, gpu = (jitter, check, strict_acquire), (capability, multiprocessors, largest_cluster)
        self._library.emulator_configure(*modes, ctypes.c_uint64(seed), *map(int, flags + gpu))

    def stats(self):
        values = (ctypes.c_uint64 * len(STATS))()
        self._library.emulator_stats(values)
        return dict(zip(STATS, values))


@functools.cache
def load():
    """Builds if needed, registers torch.ops.arfast_emulated, and gives the Emulator."""
    folder = build(OPS)
    emulator = Emulator(folder)
    torch.ops.load_library(str(folder / OPS))
    return emulator


@functools.cache
def load_probes():
    """(the library of the probes, its Emulator): see probes/probe.h."""
    folder = build(PROBES)
    emulator, probes = Emulator(folder), ctypes.CDLL(str(folder / PROBES))
    for function in (probes.probe_name, probes.probe_expected, probes.probe_run):
        function.restype = ctypes.c_char_p
    return probes, emulator


@functools.cache
def load_integers():
    """The integer functions of the kernels as a Python module."""
    spec = importlib.util.spec_from_file_location("_integers", build(INTEGER_MODULE) / INTEGER_MODULE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    print(build(OPS), build(PROBES))
