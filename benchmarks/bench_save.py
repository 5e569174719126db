"""The pause that a save makes in training: all of it written at once, or a copy taken and written in the background.

`arfast.train.saving.Saver` with the weights and moments of a Llama after a step, float32, into a temporary folder (set
TMPDIR to the disk in question). Pause: until `save` returns; the first in the background also allocates the copy.
Slower steps: the part of the writing that training pays for, which is what steps of 4 x 512 tokens, bfloat16, that run
while the copy is written and read back take beyond as many without. --save-table writes benchmarks/results/save-cpu.md.
"""

import statistics
import time

import pytest
import report
import torch
from bench_train import our_engine, our_step
from llama import SIZES

from arfast.train.saving import Saver
from arfast.train.strategy import OneProcess

SAVES, QUIET_STEPS = 5, 7
MIN_RATIO = 5.0  # pause inline over pause in the background
ABOUT = "Steps while the copy is written and read back, and the pause of the step that saves, bfloat16 on the CPU."
HEAD = (
    "| model | checkpoint, MB | inline, ms | background, first, ms | later, ms | times shorter | slower steps, ms |\n"
    "|---|--:|--:|--:|--:|--:|--:|"
)


@pytest.fixture(scope="module")
def rows(request):
    measured: list[str] = []
    yield measured
    if measured:
        text = "\n".join([HEAD, *measured])
        print(f"\n{text}")
        if request.config.option.save_table:
            report.save_page("save-cpu", "The pause of a save", ABOUT, text)


@pytest.mark.parametrize("case", SIZES, ids=str)
def bench_save(case, device, benchmark, request, rows, tmp_path):
    if device != "cpu":
        pytest.skip("for the CPU")
    option, config = request.config.option, case.config
    ids = torch.randint(0, config.vocab_size, (4, 512))
    step = lambda: our_step(config, "bfloat16", ids)
    step()
    engine = our_engine(config, "cpu", dtype="bfloat16", cuda_graph=False)
    count = 1 if option.benchmark_disable else SAVES

    def measure():
        inline = pauses_of(make_saver(tmp_path / "inline", engine), step, count)
        quiet = statistics.median(seconds_of(step) for _ in range(QUIET_STEPS if count > 1 else 1))
        background = make_saver(tmp_path / "background", engine, background=True)
        pauses, slower = [], []
        for _ in range(count + 1):
            pauses += pauses_of(background, step, 1)
            slower.append(excess_while_writing(background, step, quiet))
        return statistics.median(inline), pauses[0], statistics.median(pauses[1:]), statistics.median(slower[1:])

    inline, first, later, slower = benchmark.pedantic(measure, rounds=1)
    num_bytes = sum(file.stat().st_size for file in next((tmp_path / "inline").glob("step-*")).iterdir())
    figures = [f"{1e3 * seconds:,.0f}" for seconds in (inline, first, later)]
    figures = [f"{num_bytes / 1e6:,.0f}", *figures, f"{inline / later:.0f}", f"{1e3 * slower:,.0f}"]
    rows.append(f"| {case} | {' | '.join(figures)} |")
    if option.gates:
        assert inline / later >= MIN_RATIO, f"{case}: a save in the background pauses for 1/{inline / later:.1f}"


def make_saver(folder, engine, background=False):
    folder.mkdir(parents=True, exist_ok=True)
    return Saver(folder, engine, {}, None, OneProcess(), keep_last=1, background=background)


def pauses_of(saver, step, count):
    """Seconds of ``count`` saves, each of a new step: one of an old step would have a checkpoint to replace."""
    pauses = []
    for _ in range(count):
        step()
        pauses.append(seconds_of(saver.save))
    return pauses


def seconds_of(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def excess_while_writing(saver, step, quiet):
    """Seconds by which steps until the end of the save in flight, and what is left of it, exceed ``quiet`` each."""
    start, steps = time.perf_counter(), 0
    while saver._thread.is_alive():
        step()
        steps += 1
    saver.wait()
    return time.perf_counter() - start - steps * quiet
