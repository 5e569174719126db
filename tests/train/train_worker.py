"""Runs of the trainer in processes that have done nothing before, forked from one that has only imported torch.

One JSON job per line on stdin, one JSON answer per line on stdout. The parent of the forks never computes, so that a
child has no threads or caches of anybody else; it is as a new interpreter, without the seconds for the imports.
"""

import json
import os
import resource
import signal
import sys
import time
import traceback

import torch
import torch._dynamo  # what the first optimizer imports, in seconds
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
    for method, call in job.get("kill_in", {}).items():
        kill_in(trainer, method, call)
    if "hang_in_step" in job:
        original = trainer.engine.step
        trainer.engine.step = lambda batches: (time.sleep(30), original(batches))
    trainer.fit()


def kill_in(trainer, method, call):
    """SIGKILL instead of the call of this number."""
    original, count = getattr(trainer, method), 0

    def counted(*args, **options):
        nonlocal count
        count += 1
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    setattr(trainer, method, counted)


def child(job):
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
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
    # With a job as argument: that one, in this very process.
    child(json.loads(sys.argv[1])) if len(sys.argv) > 1 else main()
