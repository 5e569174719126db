"""C5, C6: two writers in one directory, and saves that go on while the run does."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file
from saving_runs import SavingRun
from tracing import Do
from train_doubles import TinyConfig, TinyLM, assert_same_outcome, content, make_trainer, outcome, save

import arfast.train.checkpoint as ckpt
from arfast.train import CheckpointError, TrainingInterrupted
from arfast.train.checkpoint import list_checkpoints, lock_directory, verify
from arfast.train.state import Snapshot

_WRITER = """
import os, sys, time
from train_doubles import save
from arfast.train.checkpoint import CheckpointError, lock_directory
from pathlib import Path
for line in sys.stdin:
    root, step, start = line.split()
    time.sleep(max(0, float(start) - time.time()))
    try:
        with lock_directory(root):
            save(Path(root), int(step))
            time.sleep(0.02)
        print("saved", flush=True)
    except CheckpointError as error:
        print("must be used by one trainer at a time" in str(error) and "refused" or repr(error), flush=True)
"""


def test_races_of_two_writers(memory_path, amount, record):
    from worker import worker_environment

    writers = [
        subprocess.Popen([sys.executable, "-c", _WRITER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                         env=worker_environment())
        for _ in range(2)
    ]  # fmt: skip
    count, both = amount(5, 50), 0
    for race in range(count):
        root = memory_path / str(race)
        # One save before the race, so that both have imported all they need.
        start = time.time() + (0.05 if race else 0)
        for step, writer in enumerate(writers, start=1):
            writer.stdin.write(f"{root} {step} {start}\n")
            writer.stdin.flush()
        answers = [writer.stdout.readline().strip() for writer in writers]
        assert set(answers) <= {"saved", "refused"} and "saved" in answers, answers
        steps = [int(path.name[5:]) for path in list_checkpoints(root)]
        assert steps == [step for step, answer in enumerate(answers, start=1) if answer == "saved"]
        assert len(os.listdir(root)) == len(steps)
        for path in list_checkpoints(root):
            verify(path)
        both += answers.count("saved") == 2
    for writer in writers:
        writer.stdin.close()
        assert writer.wait(timeout=30) == 0
    assert both < count
    record("C5", "two writers at once in a directory", count, f"{count - both} times one was refused, {both} in turn")


def slow_writes(monkeypatch, event):
    """Saves wait for an event between staging and writing."""
    write = Snapshot.write
    monkeypatch.setattr(Snapshot, "write", lambda self, directory: (event.wait(30), write(self, directory))[1])


def test_what_is_written_is_the_copy(tmp_path, monkeypatch, amount, record):
    """Steps taken while a save is in flight change weights, moments and random state, and none of that is saved."""
    count = amount(3, 100)
    trainer = make_trainer(
        tmp_path, model=TinyLM(TinyConfig(dropout=0.2)), max_steps=10**6, async_save=True, keep_last=1
    )
    data = trainer.datasets["train"]
    for _ in range(count):
        trainer.step([data.batch(trainer.state.position, 4)])
        expected = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        moments = {
            f"{kind}.{name}": value.clone()
            for name, parameter in trainer.model.named_parameters()
            for kind, value in trainer.engine.optimizer.state[parameter].items()
        }
        random_state, step = torch.get_rng_state(), trainer.state.step
        event = threading.Event()
        with monkeypatch.context() as patch, lock_directory(tmp_path):
            slow_writes(patch, event)
            trainer._saver.save()
            for _ in range(3):
                trainer.step([data.batch(trainer.state.position, 4)])
            assert not (tmp_path / f"step-{step:08d}").exists()
            event.set()
            trainer._saver.wait()
        path = tmp_path / f"step-{step:08d}"
        for file, wanted in (("model", expected), ("optimizer", moments), ("rng", {"cpu": random_state})):
            stored = load_file(path / f"{file}.safetensors")
            assert stored.keys() == wanted.keys()
            assert all(torch.equal(stored[name], wanted[name]) for name in wanted), file
        assert not torch.equal(expected["mix.weight"], trainer.model.mix.weight)
        state = json.loads((path / "trainer_state.json").read_text())["state"]
        assert state["step"] == step and state["position"] == 4 * data.seqlen * step
    record(
        "C6", "three steps while a save is in flight", count, "weights, moments, random state saved are the staged ones"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_files_as_a_save_in_line(worker, memory_path, dtype):
    """Both kinds of save leave the same run behind."""
    config = {"max_steps": 8, "save_every": 2, "eval_every": 3, "dtype": dtype, "keep_last": 0}
    outcomes = []
    for background in (False, True):
        path = memory_path / str(background)
        assert worker(path, config=config | {"async_save": background})[0] == 0
        outcomes.append(outcome(path))
    assert_same_outcome(*outcomes)


def test_one_in_flight(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, async_save=True)
    event, order = threading.Event(), []
    real = ckpt.save_checkpoint

    def noted(root, step, *args, **options):
        order.append(f"begin {step}")
        path = real(root, step, *args, **options)
        order.append(f"end {step}")
        return path

    monkeypatch.setattr(ckpt, "save_checkpoint", noted)
    slow_writes(monkeypatch, event)
    with lock_directory(tmp_path):
        trainer._saver.save()
        trainer.step([trainer.datasets["train"].batch(0, 4)])
        threading.Timer(0.1, event.set).start()
        trainer._saver.save()
        trainer._saver.wait()
    assert order == ["begin 0", "end 0", "begin 1", "end 1"]


def test_an_error_is_raised_at_the_next_step_edge(tmp_path, monkeypatch, record):
    trainer = make_trainer(tmp_path, async_save=True, save_every=2, max_steps=8)
    failing = threading.Event()
    real = ckpt.save_checkpoint

    def fail(root, step, *args, **options):
        if step == 4:
            failing.set()
            raise CheckpointError("checkpoint: the disk must work, got smoke")
        return real(root, step, *args, **options)

    monkeypatch.setattr(ckpt, "save_checkpoint", fail)
    step = trainer.engine.step

    def wait_in_step_5(batches):
        if trainer.state.step == 4:
            assert failing.wait(10)
            trainer._saver._thread.join()
        return step(batches)

    trainer.engine.step = wait_in_step_5
    with pytest.raises(CheckpointError, match="got smoke"):
        trainer.fit()
    assert trainer.state.step == 5
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002"]
    record("C6", "the thread that saves fails", 1, "raised at the next step edge; the checkpoint before untouched")


def test_an_error_of_the_last_save_is_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(Snapshot, "write", lambda self, directory: (_ for _ in ()).throw(OSError(5, "smoke")))
    with pytest.raises(CheckpointError, match="got .*smoke"):
        make_trainer(tmp_path, async_save=True).fit()


def test_an_error_does_not_hide_another(tmp_path, monkeypatch, capsys):
    trainer = make_trainer(tmp_path, async_save=True, save_every=1)
    monkeypatch.setattr(Snapshot, "write", lambda self, d: (time.sleep(0.2), open("/nowhere/at/all", "w")))
    step = trainer.engine.step

    def second_step_fails(batches):
        if trainer.state.step == 1:
            raise ValueError("the first to go wrong")
        return step(batches)

    trainer.engine.step = second_step_fails
    with pytest.raises(ValueError, match="the first to go wrong"):
        trainer.fit()
    assert "Trainer: the last save failed too: checkpoint: " in capsys.readouterr().err


def test_exit_waits_for_the_save(tmp_path, monkeypatch, record):
    """A signal, the end of the run and an exception each leave no save half done."""
    write = Snapshot.write
    monkeypatch.setattr(Snapshot, "write", lambda self, directory: (time.sleep(0.2), write(self, directory))[1])
    make_trainer(tmp_path / "end", async_save=True).fit()
    assert [path.name for path in list_checkpoints(tmp_path / "end")] == ["step-00000004"]

    interrupted = make_trainer(tmp_path / "signal", async_save=True, save_every=0)
    step = interrupted.engine.step
    interrupted.engine.step = lambda batches: (os.kill(os.getpid(), 15), step(batches))[1]
    with pytest.raises(TrainingInterrupted):
        interrupted.fit()
    (path,) = list_checkpoints(tmp_path / "signal")
    assert path.name == "step-00000001" and verify(path)

    failing = make_trainer(tmp_path / "exception", async_save=True, save_every=1)
    failing.model.poison = lambda ids: failing.state.step == 2
    with pytest.raises(RuntimeError, match="must be finite"):
        failing.fit()
    (first, second) = list_checkpoints(tmp_path / "exception")
    assert verify(first) and verify(second) and second.name == "step-00000002"
    record("C6", "end of the run, SIGTERM or an exception while a save is in flight", 3, "waited for; it is whole")


def test_interpreter_exit_waits_for_the_save(tmp_path, record):
    program = """
import sys, time
from train_doubles import make_trainer
from arfast.train.state import Snapshot
write = Snapshot.write
Snapshot.write = lambda self, directory: (time.sleep(0.3), write(self, directory))[1]
make_trainer(sys.argv[1], async_save=True)._saver.save()
"""
    from worker import worker_environment

    (tmp_path / "run").mkdir()
    subprocess.run([sys.executable, "-c", program, tmp_path / "run"], check=True, env=worker_environment())
    (path,) = list_checkpoints(tmp_path / "run")
    verify(path)
    record("C6", "the interpreter ends while a save is in flight", 1, "waited for; it is whole")


def test_crash_between_copy_and_commit(memory_path, traced, amount, record):
    """Killed at system calls spread over the time after staging: the next run never sees the one in flight."""
    run, count = SavingRun(memory_path / "run", async_save=True), amount(8, 200)
    seen = []
    assert traced(run.save, lambda n, call: seen.append(call)) == 0
    run.restore()
    rename = max(n for n, call in enumerate(seen) if call.name == "rename")
    for point in range(count):
        number = point * rename // count

        def decide(n, call, number=number):
            # Numbers shift a little between runs, since two threads take turns: at the latest before the commit.
            return Do(kill_before=True) if n >= number or call.name == "rename" else None

        assert traced(run.save, decide) == -9
        assert not run.check()
        run.restore()
    record("C6", "crash between the copy and the commit", count, "never shows; the checkpoint before is taken")


def test_buffers_are_reused_and_follow_changes(tmp_path):
    trainer = make_trainer(tmp_path, async_save=True)
    with lock_directory(tmp_path):
        trainer._saver.save()  # without moments
        trainer._saver.wait()
        trainer.step([trainer.datasets["train"].batch(0, 4)])
        trainer._saver.save()
        trainer._saver.wait()
        staged = trainer._saver._staged
        pointers = [tensor.data_ptr() for tensor in staged.optimizer.values()]
        trainer.step([trainer.datasets["train"].batch(4, 4)])
        trainer._saver.save()
        trainer._saver.wait()
    assert [tensor.data_ptr() for tensor in trainer._saver._staged.optimizer.values()] == pointers
    own = {parameter.data_ptr() for parameter in trainer.model.parameters()}
    assert not own & {parameter.data_ptr() for parameter in trainer._saver._staged.model.parameters()}
    again = make_trainer(tmp_path)
    again.load(list_checkpoints(tmp_path)[-1])
    for one, two in zip(again.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_temporaries_are_private(tmp_path, monkeypatch, record):
    """S9: nobody else reads or writes a checkpoint before it is complete, whatever the umask."""
    modes, names = [], []
    real = Snapshot.write

    def look(self, directory):
        modes.append(directory.stat().st_mode & 0o777)
        names.append(directory.name)
        assert directory.parent == tmp_path
        return real(self, directory)

    monkeypatch.setattr(Snapshot, "write", look)
    for mask in (0o000, 0o022, 0o027, 0o077):
        before = os.umask(mask)
        try:
            path = make_trainer(tmp_path).save()
        finally:
            os.umask(before)
        assert path.stat().st_mode & 0o777 == 0o777 & ~mask
    assert modes == [0o700] * 4 and len(set(names)) == 4
    assert content(path)
    save(tmp_path, 7)
    record("S9", "umask 000, 022, 027, 077 during a save", 4, "temporaries 0700, random names, same directory")
