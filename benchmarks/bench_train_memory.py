"""Peak memory of a training step, ours against transformers' eager LlamaForCausalLM, bfloat16, on the CPU.

Each figure is measured in a process of its own, by the kernel's high-water mark of its resident memory, over steps of
4 x 512 tokens, with glibc's allocator as it is and tuned as `harness.TUNABLES` says. Two figures:

* step: above what is resident after a step on 32 tokens, when the weights, the optimizer's moments, and whatever else
  outlives a step, exist (of ours: a bfloat16 copy of the weights and float32 gradients; transformers frees its own);
* all: above the float32 weights and the two moments, 12 bytes per parameter, and above what the libraries take, which
  is what is resident after a step of a tiny model. Gradients and copies of weights are in it on both sides.

--gates: ours takes at most half of transformers' in both figures. --save-table writes
benchmarks/results/training-memory-cpu.md.
"""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import report
import torch
from bench_train import initial_model, our_step, transformers_step
from harness import TUNABLES
from llama import LLAMA_11M, SIZES, Size

from arfast.doctor.sequence_lengths import ProcessMemory
from arfast.models import CausalLM

TINY = LLAMA_11M.replace(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
CONFIGS = {str(size): size.config for size in SIZES} | {"tiny": TINY}
ALLOCATORS = {"default": None, "tuned": TUNABLES}
PATHS = ("ours", "transformers")
FIGURES = ("step", "all")
BATCH, SEQLEN, DTYPE, STEPS = 4, 512, "bfloat16", 3
MAX_SHARE = 0.5  # of transformers' memory
ABOUT = f"Steps of {BATCH} x {SEQLEN} tokens, {DTYPE}; see `bench_train_memory.py` for the two figures."


@dataclasses.dataclass(frozen=True)
class Memory(Size):
    """A size under an allocator."""

    allocator: str

    def __str__(self) -> str:
        return f"{self.name}-{self.allocator}"


CASES = [Memory(size.name, size.config, allocator) for size in SIZES for allocator in ALLOCATORS]


@dataclasses.dataclass(frozen=True)
class Row:
    """Bytes by path and figure."""

    case: Memory
    peaks: dict[str, dict[str, int]]

    def share(self, figure: str) -> float:
        ours, theirs = (self.peaks[path][figure] for path in PATHS)
        return ours / theirs


@pytest.fixture(scope="module")
def rows(request):
    measured: list[Row] = []
    yield measured
    if measured:
        print(f"\n{table(measured)}")
        if request.config.option.save_table:
            report.save_page("training-memory-cpu", "Peak memory of a training step", ABOUT, table(measured))


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_train_memory(case, device, benchmark, request, rows):
    if device != "cpu":
        pytest.skip("for the CPU")
    option = request.config.option
    size = "tiny" if option.benchmark_disable else case.name
    peaks = benchmark.pedantic(lambda: {path: measure_apart(path, size, case.allocator) for path in PATHS}, rounds=1)
    assert all(peak > 0 for figures in peaks.values() for peak in figures.values()), peaks
    if option.benchmark_disable:
        return
    rows.append(Row(case, peaks))
    if option.gates:
        for figure in FIGURES:
            share = rows[-1].share(figure)
            assert share <= MAX_SHARE, f"{case}: {figure} is {share:.2f} of transformers' memory"


def measure_apart(path: str, size: str, allocator: str, steps: int = STEPS) -> dict[str, int]:
    """Bytes by figure, from a process that does nothing else."""
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)  # what pytest has added
    if ALLOCATORS[allocator]:
        environment["GLIBC_TUNABLES"] = ALLOCATORS[allocator]
    case = dict(path=path, size=size, steps=steps, threads=torch.get_num_threads())
    command = [sys.executable, __file__, json.dumps(case)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise RuntimeError(f"{path}, {size}: {result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def measure_here(path: str, size: str, steps: int, threads: int) -> dict[str, int]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = CONFIGS[size]
    step = our_step if path == "ours" else transformers_eager_step
    step(TINY, DTYPE, torch.randint(0, TINY.vocab_size, (1, 32)))  # loads what is loaded once
    libraries = ProcessMemory()
    num_parameters = CausalLM(config, device="meta").num_parameters()
    step(config, DTYPE, torch.randint(0, config.vocab_size, (1, 32)))
    initial_model.cache_clear()
    ids = torch.randint(0, config.vocab_size, (BATCH, SEQLEN))
    between_steps = ProcessMemory()
    for _ in range(steps):
        step(config, DTYPE, ids)
    return {"step": between_steps.peak(), "all": libraries.peak() - 12 * num_parameters}


def transformers_eager_step(config, dtype, ids):
    return transformers_step(config, dtype, False, ids)


def table(rows) -> str:
    head = "| model | allocator | figure | ours, MiB | transformers, MiB | share |\n|---|---|---|--:|--:|--:|"
    lines = [head]
    for row in rows:
        for figure in FIGURES:
            ours, theirs = (f"{row.peaks[path][figure] / 2**20:,.0f}" for path in PATHS)
            lines.append(
                f"| {row.case.name} | {row.case.allocator} | {figure} | {ours} | {theirs} | {row.share(figure):.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(measure_here(**json.loads(sys.argv[1]))))
