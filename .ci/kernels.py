#!/usr/bin/env python3
"""Compiles every .cu for sm_80 and sm_90a and prints what the assembler says of each kernel.

Fails on register spills and on any warning. Without nvcc it says so and passes.
"""

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
HEAD = ("file", "architecture", "kernel", "registers", "stack", "spills", "shared", "seconds")


def compile_kernel(nvcc, flags, source, architecture, folder):
    """(rows of the table, warnings) of one translation unit."""
    output = Path(folder, f"{source.stem}-{architecture}.o")
    command = [nvcc, *flags, f"-I{ROOT / 'csrc'}", f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
    start = time.monotonic()
    done = subprocess.run([*command, "-Xptxas=-v", "-c", source, "-o", output], capture_output=True, text=True)
    log = done.stdout + done.stderr
    if done.returncode != 0:
        sys.exit(f"kernels: {source} does not compile for sm_{architecture}:\n{log}")
    seconds = f"{time.monotonic() - start:.0f}"
    rows = []
    for block in log.split("Compiling entry function '")[1:]:
        name = block.partition("'")[0]
        stack, stores, loads = map(int, re.search(r"(\d+) bytes stack.*?(\d+) bytes.*?(\d+) bytes", block).groups())
        registers = re.search(r"Used (\d+) registers", block)[1]
        shared = re.search(r"(\d+) bytes smem", block)
        rows.append(
            (
                source.name,
                f"sm_{architecture}",
                name,
                registers,
                stack,
                stores + loads,
                shared[1] if shared else 0,
                seconds,
            )
        )
    return rows, [line for line in log.splitlines() if re.search(r"\bwarning\b", line, re.IGNORECASE)]


def demangle(names):
    """Readable names, without namespaces and parameters."""
    try:
        answer = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return names
    lines = re.sub(r"\(anonymous namespace\)::|arfast::|void ", "", answer).splitlines()
    return [line.rsplit("(", 1)[0] for line in lines]


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
    rows = [row for rows, _ in results for row in rows]
    warnings = [warning for _, warnings in results for warning in warnings]
    names = demangle([row[2] for row in rows])
    table = [HEAD, *((*row[:2], name, *row[3:]) for row, name in zip(rows, names))]
    widths = [max(len(str(row[i])) for row in table) for i in range(len(HEAD))]
    for row in table:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths)).rstrip())
    spilled = [f"{name} ({row[0]}, {row[1]})" for row, name in zip(rows, names) if row[5]]
    for problem in (*warnings, *(f"kernels: {kernel} must not spill registers" for kernel in spilled)):
        print(problem)
    print(f"kernels: {len(rows)} compiled in {len(pairs)} units, {len(spilled)} spill, {len(warnings)} warnings")
    return 1 if spilled or warnings else 0


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
