"""The built library is hardened as SECURITY.md says, and a source distribution can be made again to the byte."""

import hashlib
import importlib.util
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Of the ELF specification, and of <elf.h>.
PT_DYNAMIC, PT_GNU_STACK, PT_GNU_RELRO, PF_X = 2, 0x6474E551, 0x6474E552, 1
DT_FLAGS, DF_BIND_NOW, DT_FLAGS_1, DF_1_NOW, SHT_DYNSYM = 30, 8, 0x6FFFFFFB, 1, 11


def missing(path: Path) -> set[str]:
    """What a 64-bit little-endian ELF library lacks of the hardening."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01"
    segments_at, sections_at = struct.unpack_from("<QQ", data, 32)
    segment_bytes, num_segments, section_bytes, num_sections = struct.unpack_from("<4H", data, 54)
    segments = [struct.unpack_from("<IIQQQQ", data, segments_at + i * segment_bytes) for i in range(num_segments)]
    kinds = {kind: (flags, offset, size) for kind, flags, offset, _, _, size in segments}
    _, offset, size = kinds[PT_DYNAMIC]
    dynamic = dict(struct.iter_unpack("<QQ", data[offset : offset + size]))
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, sections_at + i * section_bytes) for i in range(num_sections)]
    (symbols,) = (section for section in sections if section[1] == SHT_DYNSYM)
    names_at = sections[symbols[6]][4]
    names = set()
    for (name,) in struct.iter_unpack("<I20x", data[symbols[4] : symbols[4] + symbols[5]]):
        names.add(data[names_at + name : data.index(b"\0", names_at + name)].decode())
    found = {
        "relocations that become read-only": PT_GNU_RELRO in kinds,
        "symbols bound at the start": bool(dynamic.get(DT_FLAGS, 0) & DF_BIND_NOW and dynamic[DT_FLAGS_1] & DF_1_NOW),
        "a stack that cannot be executed": PT_GNU_STACK in kinds and not kinds[PT_GNU_STACK][0] & PF_X,
        "stack protector": "__stack_chk_fail" in names,
        "checked copies": "__memcpy_chk" in names,
    }
    return {name for name, there in found.items() if not there}


@pytest.fixture(scope="module")
def setup():
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_built_library():
    import torch  # noqa: F401  (what the library is linked against)

    from arfast import _C

    assert missing(Path(_C.__file__)) == set()


def test_the_flags_and_what_is_missing_without_each(setup, tmp_path):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    source = tmp_path / "x.cpp"
    source.write_text(
        '#include <cstring>\nextern "C" void f(char *);\n'
        'extern "C" void g(const char *from, int n) { char x[9]; memcpy(x, from, n); f(x); }\n'
    )

    def lacks(flags, link):
        command = [compiler, "-O3", "-fPIC", "-shared", *flags, source, "-o", tmp_path / "x.so", *link]
        subprocess.run(command, check=True)
        return missing(tmp_path / "x.so")

    hardening, link = setup.HARDENING_FLAGS, setup.LINK_FLAGS
    assert lacks(hardening, link) == set()
    assert lacks(["-fno-stack-protector", *hardening[1:]], link) == {"stack protector"}
    assert lacks([*hardening, "-U_FORTIFY_SOURCE"], link) == {"checked copies"}
    assert lacks(hardening, ["-Wl,-z,lazy,-z,norelro,-z,execstack"]) == {
        "relocations that become read-only",
        "symbols bound at the start",
        "a stack that cannot be executed",
    }


def test_every_object_is_compiled_with_them(setup, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "find_nvcc", lambda: "/opt/nvcc")
    monkeypatch.setattr(setup, "cuda_link_flags", lambda nvcc: [])
    rules = setup.ninja_file(tmp_path, tmp_path / "x.so").split("\nbuild ")[0].split("rule ")
    commands = {rule.partition("\n")[0]: rule for rule in rules if "command" in rule}
    assert all(flag in commands["cxx"] for flag in setup.HARDENING_FLAGS)
    assert "-fstack-protector-strong" in commands["nvcc"]
    assert all(flag in commands["link"] for flag in setup.LINK_FLAGS)


def test_a_source_distribution_can_be_made_again(tmp_path):
    """From another place, at another time, with other times and modes of the files: the same bytes."""
    skip = shutil.ignore_patterns("build", "dist", ".*", "runs", "*.egg-info", "__pycache__", "*.so")
    code = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    hashes = []
    for number in (1, 2):
        tree, out = shutil.copytree(ROOT, tmp_path / f"tree{number}", ignore=skip), tmp_path / f"out{number}"
        for path in tree.rglob("*"):
            os.utime(path, (10**9 * number, 10**9 * number))
            if path.is_file() and number == 2:
                path.chmod(path.stat().st_mode & ~0o044)
        environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000"}
        command = [sys.executable, "-c", code, out]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        hashes.append(hashlib.sha256((out / done.stdout.split()[-1]).read_bytes()).hexdigest())
    assert hashes[0] == hashes[1]
