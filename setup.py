"""Builds arfast/_C.abi3.so: C++ always, CUDA whenever nvcc is found, against the torch that is installed.

The library uses only torch's stable ABI, so one binary serves every torch >= 2.10, with or without CUDA.
Environment: ARFAST_CUDA=0|1 (never | always compile the kernels), TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX,
ARFAST_TORCH_SITE (the site-packages that holds torch, if the search below does not find it).
"""

import importlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_MINIMUM = "2.10"
CPU_TARGETS = {"baseline": []}
if sysconfig.get_platform().endswith("x86_64"):
    CPU_TARGETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    CPU_TARGETS["avx512"] = [*CPU_TARGETS["avx2"], *(f"-mavx512{x}" for x in ("f", "bw", "dq", "vl"))]
    CPU_TARGETS["avx512"].append("-mprefer-vector-width=512")
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror=return-type"]
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi", "-Wno-maybe-uninitialized"]
DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0a;9.0+PTX"


def pythons_on_path():
    """Interpreters of this version that a build front end may have hidden behind its own: PATH and CONDA_PREFIX."""
    folders = os.environ.get("PATH", "").split(os.pathsep)
    if os.environ.get("CONDA_PREFIX"):
        folders.append(os.path.join(os.environ["CONDA_PREFIX"], "bin"))
    query = "import sys, sysconfig; print(sys.version_info[:2] == %r and sysconfig.get_paths()['platlib'])"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    for python in dict.fromkeys(os.path.join(folder, name) for folder in folders for name in ("python", "python3")):
        if os.access(python, os.X_OK):
            command = [python, "-c", query % (tuple(sys.version_info[:2]),)]
            found = subprocess.run(command, capture_output=True, text=True, env=environment).stdout.strip()
            if found not in ("", "False"):
                yield found


def find_torch():
    """The folder of the torch to build against, or None.

    An isolated build hides the environment's packages but runs its interpreter, so sysconfig still names them.
    """
    paths = sysconfig.get_paths()
    places = [*sys.path, os.environ.get("ARFAST_TORCH_SITE"), paths["purelib"], paths["platlib"]]
    for site in filter(None, places):
        if Path(site, "torch", "version.py").is_file():
            return Path(site, "torch")
    return next((Path(site, "torch") for site in pythons_on_path() if Path(site, "torch", "version.py").is_file()), None)


def find_nvcc():
    """nvcc as the user has it (it may be a wrapper script on PATH), or None; ARFAST_CUDA decides over both."""
    wish = os.environ.get("ARFAST_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        sys.exit(f"arfast: ARFAST_CUDA must be 0, 1 or auto, got {wish}")
    cuda_home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc") or (cuda_home and shutil.which("nvcc", path=os.path.join(cuda_home, "bin")))
    if wish == "1" and not nvcc:
        sys.exit("arfast: ARFAST_CUDA=1 needs nvcc on PATH or CUDA_HOME to name its toolkit")
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
    """(bindings, CPU implementations, CUDA kernels): one glob, the same as in CMakeLists.txt."""
    cpp = sorted(p.relative_to(ROOT) for p in (ROOT / "csrc").rglob("*.cpp"))
    per_target = [p for p in cpp if p.name.endswith("_cpu.cpp")]
    kernels = sorted(p.relative_to(ROOT) for p in (ROOT / "csrc").rglob("*.cu"))
    return [p for p in cpp if p not in per_target], per_target, kernels


class NinjaBuild(build_ext):
    """Writes build.ninja and runs it: incremental, parallel, and with a rule of our own for nvcc."""

    def build_extension(self, extension):
        torch = find_torch()
        if torch is None:
            sys.exit("arfast: torch not found; install it first, or set ARFAST_TORCH_SITE to the site-packages that holds it")
        print(f"arfast: building against {torch}", file=sys.stderr)
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        library = Path(self.get_ext_fullpath(extension.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(self.rules(torch, library))
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        ninja = importlib.import_module("ninja").BIN_DIR + "/ninja" if importlib.util.find_spec("ninja") else "ninja"
        subprocess.run([ninja, "-C", str(build), "-j", jobs], check=True)

    def rules(self, torch, library):
        """The text of build.ninja."""
        nvcc, (bindings, per_target, kernels) = find_nvcc(), sources()
        include = [ROOT / "csrc", torch / "include", sysconfig.get_paths()["include"]]
        flags = [*CXX_FLAGS, *(f"-I{x}" for x in include[:1]), *(f"-isystem{x}" for x in include[1:])]
        flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"]
        gencode, names = cuda_architectures()
        if nvcc:
            flags += ["-DARFAST_WITH_CUDA", f'-DARFAST_CUDA_ARCHITECTURES=\\"{",".join(names)}\\"']
        nvcc_flags = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-Xcompiler=-fPIC,-fvisibility=hidden", *gencode]
        nvcc_flags += ["--expt-relaxed-constexpr", "-lineinfo"]
        link = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-Wl,-z,relro,-z,now", *(cuda_link_flags(nvcc) if nvcc else [])]
        objects, builds = [], []

        def add(rule, source, name, **variables):
            objects.append(f"{name}.o")
            lines = [f"build {name}.o: {rule} {ROOT / source}", *(f"  {k} = {v}" for k, v in variables.items())]
            builds.append("\n".join(lines))

        for source in bindings:
            add("cxx", source, source.with_suffix(""))
        for source in per_target:
            for target, target_flags in CPU_TARGETS.items():
                more = f"{' '.join(target_flags)} -DARFAST_CPU_TARGET={target}"
                add("cxx", source, f"{source.with_suffix('')}_{target}", more=more)
        for source in kernels if nvcc else []:
            add("nvcc", source, f"{source.with_suffix('')}_cuda")
        cxx = os.environ.get("CXX", "c++")
        return f"""
rule cxx
  command = {cxx} {" ".join(flags)} $more -MMD -MF $out.d -c $in -o $out
  description = $out
  depfile = $out.d
  deps = gcc
rule nvcc
  command = {nvcc} {" ".join(nvcc_flags)} -MMD -MF $out.d -c $in -o $out
  description = $out
  depfile = $out.d
  deps = gcc
rule link
  command = {cxx} -shared $in -o $out {" ".join(link)}
  description = $out
{chr(10).join(builds)}
build {library}: link {" ".join(objects)}
default {library}
"""


def extension():
    bindings, per_target, kernels = sources()
    headers = [p.relative_to(ROOT) for pattern in ("*.h", "*.cuh") for p in sorted((ROOT / "csrc").rglob(pattern))]
    return Extension(
        "arfast._C",
        sources=[str(p) for p in bindings + per_target],
        depends=[str(p) for p in headers + kernels],
        py_limited_api=True,
    )


if __name__ == "__main__":
    setup(
        ext_modules=[extension()],
        cmdclass={"build_ext": NinjaBuild},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
        # Without torch in reach the build fetches one: harmless, since the stable ABI fits whichever is installed later.
        setup_requires=[] if find_torch() else [f"torch>={TORCH_MINIMUM}"],
    )
