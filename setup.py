"""Builds arfast/_C.abi3.so: C++ always, CUDA whenever nvcc is found, against the torch that is installed.

The library uses only torch's stable ABI, so one binary serves every torch >= 2.10, with or without CUDA.
Environment: ARFAST_CUDA=0|1 (never | always compile the kernels), TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX,
ARFAST_TORCH_SITE (the site-packages that holds torch, if the search below does not find it).
"""

import functools
import gzip
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
TORCH_MINIMUM = (2, 10)
CPU_TARGETS = {"baseline": []}
if sysconfig.get_platform().endswith("x86_64"):
    CPU_TARGETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    CPU_TARGETS["avx512"] = [*CPU_TARGETS["avx2"], *(f"-mavx512{x}" for x in ("f", "bw", "dq", "vl"))]
    CPU_TARGETS["avx512"].append("-mprefer-vector-width=512")
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror=return-type"]
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi", "-Wno-maybe-uninitialized"]
CXX_FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"]
# Some compilers define _FORTIFY_SOURCE themselves, and would warn of another value. nvcc's own parser does not know the
# builtins behind level 3, and the host's part of a kernel file copies nothing.
HARDENING_FLAGS = ["-fstack-protector-strong", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=3"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "--expt-relaxed-constexpr"]
NVCC_FLAGS += ["-Xcompiler=-fPIC,-fvisibility=hidden,-fstack-protector-strong"]
LINK_FLAGS = ["-Wl,-z,relro,-z,now,-z,noexecstack"]
DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0a;9.0+PTX"
BYTES_PER_JOB = 2 << 30  # what the largest translation unit needs in the compiler


def torch_folders():
    """Where torch may be: the build's own packages, then those of the interpreters that a build front end hides.

    An isolated build runs the environment's interpreter (pip) or leaves it on PATH (uv, build) without its packages.
    """
    if os.environ.get("ARFAST_TORCH_SITE"):
        yield os.path.join(os.environ["ARFAST_TORCH_SITE"], "torch")
        sys.exit("arfast: ARFAST_TORCH_SITE must name the folder that holds a torch >= {}.{}".format(*TORCH_MINIMUM))
    yield from (os.path.join(folder, "torch") for folder in sys.path)
    query = "import importlib.util, sys; print(sys.version_info[:2], importlib.util.find_spec('torch').origin, sep='|')"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    path = [*os.environ.get("PATH", "").split(os.pathsep), os.path.join(os.environ.get("CONDA_PREFIX", ""), "bin")]
    pythons = [sys.executable, *(os.path.join(folder, name) for folder in path for name in ("python", "python3"))]
    for python in filter(lambda p: os.access(p, os.X_OK), dict.fromkeys(pythons)):
        answer = subprocess.run([python, "-c", query], capture_output=True, text=True, env=environment, cwd=os.sep)
        version, _, module = answer.stdout.strip().partition("|")
        if version == str(sys.version_info[:2]):
            yield os.path.dirname(module)


@functools.cache
def find_torch():
    """The folder of the first torch that is new enough, or None. Importing it would take seconds."""
    for folder in torch_folders():
        version = Path(folder, "version.py")
        number = re.search(r"__version__ = .(\d+)\.(\d+)", version.read_text()) if version.is_file() else None
        if number and (int(number[1]), int(number[2])) >= TORCH_MINIMUM:
            return Path(folder)
    return None


def find_nvcc():
    """nvcc as the user has it (it may be a wrapper script on PATH), or None; ARFAST_CUDA decides over both."""
    wish = os.environ.get("ARFAST_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        sys.exit(f"arfast: ARFAST_CUDA must be 0, 1 or auto, got {wish}")
    cuda_home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc") or (cuda_home and shutil.which("nvcc", path=os.path.join(cuda_home, "bin")))
    if wish == "1" and not nvcc:
        sys.exit("arfast: ARFAST_CUDA=1 needs nvcc on PATH, or its toolkit named by CUDA_HOME")
    return None if wish == "0" else nvcc


def cuda_link_flags(nvcc):
    """The static CUDA runtime of this nvcc: it says itself where its libraries are."""
    answer = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    line = next((x for x in (answer.stderr + answer.stdout).splitlines() if "LIBRARIES=" in x), "")
    return [*shlex.split(line.split("LIBRARIES=", 1)[-1]), "-lcudart_static", "-lrt", "-ldl", "-lpthread"]


def cuda_architectures():
    """nvcc's -gencode flags and the names that `arfast info` prints, from TORCH_CUDA_ARCH_LIST."""
    wished = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHITECTURES
    flags, names = [], []
    for item in wished.replace(";", " ").split():
        number = item.removesuffix("+PTX").replace(".", "")
        only_ptx = item == "9.0+PTX" and "9.0a" in wished  # sm_90a already holds the machine code of that GPU
        codes = ([] if only_ptx else [f"sm_{number}"]) + ([f"compute_{number}"] if item.endswith("+PTX") else [])
        flags += [flag for code in codes for flag in ("-gencode", f"arch=compute_{number},code={code}")]
        names += codes
    return flags, names


def sources():
    """(bindings, CPU implementations, CUDA kernels): the same globs as in CMakeLists.txt."""
    cpp, kernels = (sorted(p.relative_to(ROOT) for p in (ROOT / "csrc").rglob(x)) for x in ("*.cpp", "*.cu"))
    per_target = [p for p in cpp if p.name.endswith("_cpu.cpp")]
    return [p for p in cpp if p not in per_target], per_target, kernels


def jobs():
    """Compilers at a time: MAX_JOBS, else as many as the cores and the memory allow."""
    if os.environ.get("MAX_JOBS"):
        return os.environ["MAX_JOBS"]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return str(max(1, min(len(os.sched_getaffinity(0)), memory // BYTES_PER_JOB)))


def ninja_file(torch, library):
    """The text of build.ninja: every object, and the library that they are linked into."""
    nvcc, (bindings, per_target, kernels) = find_nvcc(), sources()
    gencode, architectures = cuda_architectures()
    include = [f"-I{ROOT / 'csrc'}", f"-isystem{torch / 'include'}", f"-isystem{sysconfig.get_paths()['include']}"]
    cuda = ["-DARFAST_WITH_CUDA", f'-DARFAST_CUDA_ARCHITECTURES="{",".join(architectures)}"'] if nvcc else []
    link = [f"-L{torch / 'lib'}", "-ltorch_cpu", *LINK_FLAGS, *(cuda_link_flags(nvcc) if nvcc else [])]
    cxx = shlex.split(os.environ.get("CXX", "c++"))
    commands = {
        "cxx": quote(*cxx, *CXX_FLAGS, *HARDENING_FLAGS, *cuda, *include) + " $flags -MMD -MF $out.d -c $in -o $out",
        "nvcc": quote(nvcc or "nvcc", *NVCC_FLAGS, include[0], *gencode) + " -MMD -MF $out.d -c $in -o $out",
        "link": quote(*cxx, "-shared") + " $in -o $out " + quote(*link),
    }
    objects = [("cxx", source, "", []) for source in bindings]
    for source in per_target:
        objects += [("cxx", source, f"_{t}", [*f, f"-DARFAST_CPU_TARGET={t}"]) for t, f in CPU_TARGETS.items()]
    objects += [("nvcc", source, "_cuda", []) for source in kernels if nvcc]
    lines = []
    for rule, command in commands.items():
        depend = "" if rule == "link" else "\n  depfile = $out.d\n  deps = gcc"
        lines.append(f"rule {rule}\n  command = {command}\n  description = $out{depend}")
    names = [f"{source.with_suffix('')}{suffix}.o" for _, source, suffix, _ in objects]
    for name, (rule, source, _, flags) in zip(names, objects):
        lines.append(f"build {name}: {rule} {escape(ROOT / source)}\n  flags = {' '.join(flags)}")
    return "\n".join([*lines, f"build {escape(library)}: link {' '.join(names)}", ""])


def quote(*words):
    """Words for the shell, inside a ninja variable."""
    return shlex.join(words).replace("$", "$$")


def escape(path):
    """A path in a ninja build line."""
    return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


class NinjaBuild(build_ext):
    """Writes build.ninja and runs it: incremental, parallel, and with a rule of our own for nvcc."""

    def build_extension(self, extension):
        torch = find_torch()
        if torch is None:
            sys.exit("arfast: needs torch to build; install it, or let ARFAST_TORCH_SITE name its site-packages")
        print(f"arfast: building against {torch}, {find_nvcc() or 'no CUDA kernels'}", file=sys.stderr)
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        library = Path(self.get_ext_fullpath(extension.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(torch, library))
        package = importlib.util.find_spec("ninja")  # its program may not be on PATH
        ninja = os.path.join(importlib.import_module("ninja").BIN_DIR, "ninja") if package else "ninja"
        subprocess.run([ninja, "-C", str(build), "-j", jobs()], check=True)


class ReproducibleSdist(sdist):
    """With SOURCE_DATE_EPOCH the same files give the same bytes: reproducible-builds.org/specs/source-date-epoch."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if epoch is None or format != "gztar":
            return super().make_archive(base_name, format, root_dir, base_dir, owner, group)

        def without_traces(member):
            member.mtime, member.uid, member.gid, member.uname, member.gname = int(epoch), 0, 0, "", ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            return member

        name = f"{base_name}.tar.gz"
        with open(name, "wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=int(epoch)) as zipped:
            with tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for path in sorted([Path(base_dir), *Path(base_dir).rglob("*")]):
                    tar.add(path, recursive=False, filter=without_traces)
        return name


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("arfast._C", sources=[str(p) for p in sources()[0]], py_limited_api=True)],
        cmdclass={"build_ext": NinjaBuild, "sdist": ReproducibleSdist},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
        # A build front end asks what to install first. The stable ABI fits whichever torch is used later.
        setup_requires=[] if "egg_info" not in sys.argv or find_torch() else ["torch>={}.{}".format(*TORCH_MINIMUM)],
    )
