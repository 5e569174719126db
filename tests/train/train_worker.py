"""Runs of the trainer in processes that have done nothing before, forked from one that has only imported torch.

One JSON job per line on stdin, one JSON answer per line on stdout. The parent of the forks never computes, so that a
child has no threads or caches of anybody else; it is as a new interpreter, without the seconds for the imports.
"""

import functools
import json
import os
import resource
import signal
import sys
import time
import traceback

import torch
import torch._dynamo  # what the first optimizer imports, in seconds
import tracing
from train_doubles import TinyConfig, TinyData, TinyLM, inject, make_trainer

from arfast.models import CausalLM, CausalLMConfig
from arfast.train import TrainConfig, Trainer, log


def build(job):
    """The trainer of a job: of the real model when it has one, of the small stand-in otherwise."""
    config = job["config"]
    torch.set_num_threads(job.get("threads", 1))
    if "model" in job:
        return Trainer(CausalLM(CausalLMConfig(**job["model"])), TrainConfig(progress=False, **config), job["data"])
    train = TinyData(**job["train"]) if "train" in job else None
    return make_trainer(config.pop("output_dir"), model=TinyLM(TinyConfig(dropout=0.2)), train=train, **config)


def run(job):
    log.plot_loss = lambda rows, path: True  # half a second in each of a hundred runs
    if "file_size_limit" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size_limit"],) * 2)
    trainer = build(job)
    if "fault" in job:
        inject(trainer, *job["fault"])
    if "poison_position" in job:
        row = trainer.datasets["train"].batch(job["poison_position"], 1).input_ids
        trainer.model.poison = lambda ids: bool((ids == row).all(1).any())
    if "served_log" in job:
        note_served(trainer, job["served_log"])
    for method, call in job.get("kill_in", {}).items():
        signal_in(trainer, method, call, signal.SIGKILL)
    for method, (call, number) in job.get("signal_in", {}).items():
        signal_in(trainer, method, call, number)
    if "hang_in_step" in job:
        original = trainer.engine.step
        trainer.engine.step = lambda batches: (time.sleep(job["hang_in_step"]), original(batches))[1]
    trainer.fit()


def signal_in(trainer, path, call, number):
    """Send a signal to this process in the call of this number, before its work; path: of attributes, with dots."""
    *owners, method = path.split(".")
    owner = functools.reduce(getattr, owners, trainer)
    original, count = getattr(owner, method), 0

    def counted(*args, **options):
        nonlocal count
        count += 1
        if count == call:
            os.kill(os.getpid(), number)
        return original(*args, **options)

    setattr(owner, method, counted)


def note_served(trainer, path):
    """Append a line for every batch: [step, position, rows of tokens]."""
    dataset = trainer.datasets["train"]
    original, file = dataset.batch, open(path, "a")

    def noted(position, size):
        batch = original(position, size)
        print(json.dumps([trainer.state.step, position, batch.input_ids.tolist()]), file=file, flush=True)
        return batch

    dataset.batch = noted


def kill_at_change(number):
    """SIGKILL before the system call of this number among those that change files."""
    count = 0

    def decide(_, call):
        nonlocal count
        count += call.changes_files
        return tracing.Do(kill_before=True) if call.changes_files and count == number else None

    return decide


def child(job):
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        run(job)
        code = 0
    except SystemExit as leaving:
        code = leaving.code
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {error}")
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def has_ended(pid):
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def main():
    for line in sys.stdin:
        job = json.loads(line)
        started = time.monotonic()
        if "kill_at_change" in job:
            status = tracing.traced(functools.partial(child, job), kill_at_change(job["kill_at_change"]))
            print(json.dumps({"status": status, "seconds": time.monotonic() - started}), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            child(job)
        for delay, number in job.get("signals", []):
            while time.monotonic() < started + delay and not has_ended(pid):
                time.sleep(0.001)
            os.kill(pid, number)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"status": status, "seconds": time.monotonic() - started}), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # before a child can be interrupted
    # With a job as argument: that one, in this very process.
    child(json.loads(sys.argv[1])) if len(sys.argv) > 1 else main()
