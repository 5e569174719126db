#!/usr/bin/env python3
"""Compiles every .cu for sm_80 and sm_90a and compares what the assembler says of each kernel with .ci/kernels.txt.

Fails on register spills, on any warning, on a source that takes longer than 90 s, and on a difference to the table,
which `--update` writes: registers decide how many blocks a multiprocessor holds, so a change of theirs should be seen.
Without nvcc, or with another release of it (then the table is only printed), it says so and passes.
"""

import difflib
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("80", "90a")
HEAD = ("file", "architecture", "kernel", "registers", "stack", "spills")
TABLE = Path(__file__).with_suffix(".txt")
MOST_SECONDS = 90


def compile_kernel(nvcc, flags, source, architecture, folder):
    """(rows of the table, warnings, seconds) of one translation unit."""
    start = time.perf_counter()
    output = Path(folder, f"{source.stem}-{architecture}.o")
    command = [nvcc, *flags, f"-I{ROOT / 'csrc'}", f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
    done = subprocess.run([*command, "-Xptxas=-v", "-c", source, "-o", output], capture_output=True, text=True)
    log = done.stdout + done.stderr
    if done.returncode != 0:
        sys.exit(f"kernels: {source} does not compile for sm_{architecture}:\n{log}")
    rows = []
    for block in log.split("Compiling entry function '")[1:]:
        name = block.partition("'")[0]
        stack, stores, loads = map(int, re.search(r"(\d+) bytes stack.*?(\d+) bytes.*?(\d+) bytes", block).groups())
        registers = re.search(r"Used (\d+) registers", block)[1]
        rows.append((source.name, f"sm_{architecture}", name, registers, stack, stores + loads))
    warnings = [line for line in log.splitlines() if re.search(r"\bwarning\b", line, re.IGNORECASE)]
    return rows, warnings, time.perf_counter() - start


def demangle(names):
    """Readable names, without namespaces and parameters."""
    try:
        answer = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return names
    lines = re.sub(r"\(anonymous namespace\)::|arfast::|void ", "", answer).splitlines()
    return [line.rsplit("(", 1)[0] for line in lines]


def release_of(nvcc):
    """Such as "nvcc 13.0, V13.0.88"."""
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return "nvcc " + re.search(r"release (.*)", answer)[1]


def columns(table):
    widths = [max(len(str(row[i])) for row in table) for i in range(len(HEAD))]
    return ["  ".join(str(cell).ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]


def main():
    sys.path.insert(0, str(ROOT))
    import setup  # its globs and flags, so that there is one list of each

    nvcc, (_, _, kernels) = setup.find_nvcc(), setup.sources()
    if nvcc is None:
        print("NOTE: nvcc not found: the CUDA kernels were NOT compiled")
        return 0
    pairs = [(ROOT / source, architecture) for source in kernels for architecture in ARCHITECTURES]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(int(setup.jobs())) as pool:
        results = list(pool.map(lambda pair: compile_kernel(nvcc, setup.NVCC_FLAGS, *pair, folder), pairs))
    rows = [row for rows, _, _ in results for row in rows]
    warnings = [warning for _, warnings, _ in results for warning in warnings]
    slowest, pair = max((seconds, pair) for (_, _, seconds), pair in zip(results, pairs))
    if slowest > MOST_SECONDS:
        warnings.append(f"kernels: {pair[0].name} must compile in {MOST_SECONDS} s, took {slowest:.0f} s")
    names = demangle([row[2] for row in rows])
    rows = sorted((*row[:2], name, *row[3:]) for row, name in zip(rows, names))
    lines = [release_of(nvcc), *columns([HEAD, *rows])]
    if "--update" in sys.argv:
        TABLE.write_text("\n".join(lines) + "\n")
    committed = TABLE.read_text().splitlines() if TABLE.is_file() else []
    changed = []
    if committed[:1] == lines[:1]:
        changed = list(difflib.unified_diff(committed, lines, "committed", "now", n=0, lineterm=""))
    else:
        print(*lines, sep="\n")
        print(f"NOTE: {TABLE.name} is of another nvcc; nothing was compared")
    spilled = [f"{row[2]} ({row[0]}, {row[1]})" for row in rows if row[5]]
    for problem in (*warnings, *(f"kernels: {kernel} must not spill registers" for kernel in spilled), *changed):
        print(problem)
    print(f"kernels: {len(rows)} compiled in {len(pairs)} units, {len(spilled)} spill, {len(warnings)} warnings")
    print(f"kernels: the slowest unit is {pair[0].name} for sm_{pair[1]}, {slowest:.0f} s")
    if changed:
        print("kernels: the table changed: `.ci/kernels.py --update` accepts it")
    return 1 if spilled or warnings or changed else 0


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
