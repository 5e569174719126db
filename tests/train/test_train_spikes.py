"""Faults are seen within two steps, clean runs are left alone; a run that goes back ends the same after any kill."""

import json
import os
import random
import signal
from pathlib import Path

import numpy
import pytest
import torch
from train_doubles import (
    TinyConfig,
    TinyData,
    TinyLM,
    assert_same_outcome,
    inject,
    make_trainer,
    outcome,
)

from arfast.train import CheckpointError, DivergedError, TrainConfig, checkpoint, rewind, state
from arfast.train import trainer as trainer_module
from arfast.train.checkpoint import discard, list_checkpoints
from arfast.train.engine import TrainState
from arfast.train.rewind import JOURNAL, Journal, Rewind
from arfast.train.spikes import describe_spike, remember

CONFIG = {
    "max_steps": 60,
    "learning_rate": 4e-2,
    "warmup_tokens": 0,
    "final_lr_ratio": 1.0,
    "on_spike": "rewind",
    "on_nonfinite": "rewind",
    "spike_window": 16,
    "rewind_steps": 10,
    "save_every": 5,
    "keep_last": 4,
}
FAULT = 40
FAULTS = ["rate", "batch", "weight"]


def flagged(losses, norms, window):
    """Steps that are out of line, as the engine goes through them."""
    recent, recent_norms, found = [], [], []
    for step, (loss, norm) in enumerate(zip(losses, norms)):
        if describe_spike(loss, norm, recent, recent_norms, window) is None:
            remember(recent, loss, window)
            remember(recent_norms, norm, window)
        else:
            found.append(step)
    return found


@pytest.mark.parametrize(("noise", "window"), [("normal", 50), ("normal", 200), ("skewed", 200)])
def test_few_false_alarms(noise, window):
    """Less than one in 10,000 steps of a curve that falls as a power law, with the noise of batches around it."""
    rng, steps = numpy.random.default_rng(0), 30_000
    draw = {"normal": rng.standard_normal, "skewed": lambda n: rng.gamma(8.0, size=n) / 8**0.5 - 8**0.5}[noise]
    losses = 2.0 + 8.0 * numpy.arange(10, steps + 10) ** -0.3 + 0.05 * draw(steps)
    norms = numpy.exp(0.3 * rng.standard_normal(steps))
    assert len(flagged(losses.tolist(), norms.tolist(), window)) * 10_000 < steps


def test_spikes_are_found_and_forgotten():
    rng = numpy.random.default_rng(1)
    losses, norms = 3.0 + 0.05 * rng.standard_normal(500), numpy.exp(0.3 * rng.standard_normal(500))
    losses[300:310] += 0.5
    norms[400] = 12.0
    assert flagged(losses.tolist(), norms.tolist(), 200) == [*range(300, 310), 400]


def test_a_spike_is_its_definition():
    losses, norms = [3.0 + 0.1 * (i % 5) for i in range(40)], [1.0] * 40
    limit = 3.2 + 6 * 1.4826 * 0.1
    assert describe_spike(limit - 1e-6, 9.99, losses, norms, 40) is None
    assert describe_spike(limit + 1e-6, 1.0, losses, norms, 40) == "loss 4.09 is above 4.09"
    assert describe_spike(3.0, 10.1, losses, norms, 40) == "gradient norm 10.1 is above 10"
    assert describe_spike(99.0, 99.0, losses[:7], norms[:7], 40) is None
    assert describe_spike(3.01, 5.0, [3.0] * 20, [0.0] * 20, 40) is None
    assert describe_spike(3.001, 1.0, [3.0] * 20, [1.0] * 20, 40) is None
    assert describe_spike(3.1, 1.0, [3.0] * 20, [1.0] * 20, 40) is not None


def make(path, fault=None, **config):
    trainer = make_trainer(
        path, model=TinyLM(TinyConfig(dropout=0.1)), train=TinyData(num_samples=12), **CONFIG | config
    )
    if fault is not None:
        inject(trainer, fault, FAULT)
    return trainer


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def losses_of(path):
    return {row["step"]: row["loss"] for row in rows(path) if "loss" in row}


def rewinds_of(path):
    return Journal(Path(path)).rewinds


def test_clean_run_does_not_go_back(tmp_path):
    make(tmp_path).fit()
    assert not (tmp_path / JOURNAL).exists()
    assert len(losses_of(tmp_path)) == 60
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path)] == [45, 50, 55, 60]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen_and_left_behind(tmp_path, fault, dtype, capsys):
    trainer = make(tmp_path / "run", fault, dtype=dtype)
    result = trainer.fit()
    assert result.step == 60
    (found,) = rewinds_of(tmp_path / "run")
    assert FAULT <= found.from_step <= FAULT + 2
    assert found.to_step == 5 * ((found.from_step - 10) // 5)
    assert (found.first, found.end) == (64 * (found.from_step - 3), 64 * found.from_step)
    assert found.first <= 64 * (FAULT - 1) < found.end
    assert trainer.state.position == 60 * 64 + found.end - found.first
    served = trainer.datasets["train"].served
    again = served[4 * found.from_step :]
    assert again[: 4 * (found.first // 64 - found.to_step)] == list(range(4 * found.to_step, found.first // 16))
    assert not set(again) & set(range(found.first // 16, found.end // 16))
    # The log is that of the run as it went on, with a row that tells of the fault.
    assert list(losses_of(tmp_path / "run")) == list(range(1, 61))
    (told,) = [row for row in rows(tmp_path / "run") if "rewound_from" in row]
    assert (told["step"], told["rewound_from"], told["left_out"]) == (
        found.to_step,
        found.from_step,
        [found.first, found.end],
    )
    assert f"back to step {found.to_step}" in capsys.readouterr().err
    make(tmp_path / "clean", dtype=dtype).fit()
    after, clean = ([losses_of(tmp_path / name)[step] for step in range(50, 61)] for name in ("run", "clean"))
    assert numpy.mean(after) < numpy.mean(clean) + 0.2


@pytest.fixture(scope="module", params=FAULTS)
def faulty_run(request, worker, tmp_path_factory):
    path = tmp_path_factory.mktemp("faulty") / request.param
    status, _, log = worker(path, config=CONFIG, train={"num_samples": 12}, fault=[request.param, FAULT])
    assert status == 0, log
    (found,) = rewinds_of(path)
    return request.param, found, outcome(path)


@pytest.mark.parametrize("after", [1, *(pytest.param(after, marks=pytest.mark.slow) for after in (-3, 3, 12))])
def test_kill_around_a_rewind(faulty_run, worker, memory_path, after):
    """Before the fault is seen, and after the run went back: a fault of the machine does not come a second time."""
    fault, found, expected = faulty_run
    path = memory_path / "run"
    status, _, log = worker(
        path, config=CONFIG, train={"num_samples": 12}, fault=[fault, FAULT], kill_in={"step": found.from_step + after}
    )
    assert status == -signal.SIGKILL, log
    # What is killed before the fault has had no effect yet meets it again.
    again = {"fault": [fault, FAULT]} if after < 0 or fault == "batch" else {}
    status, _, log = worker(path, config=CONFIG, train={"num_samples": 12}, **again)
    assert status == 0, log
    assert_same_outcome(outcome(path), expected)
    assert rewinds_of(path) == [found]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("function", ["write_file", "discard", "discard_newer", "load_engine"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_kill_within_a_rewind(tmp_path, monkeypatch, function, when):
    make(tmp_path / "whole", "batch").fit()
    trainer = make(tmp_path / "run", "batch")
    modules = {"discard": checkpoint, "discard_newer": trainer_module, "load_engine": state}
    module = modules.get(function, rewind)
    real = getattr(module, function)

    def killed(*args):
        if when == "after":
            real(*args)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, function, killed)
        with pytest.raises(Killed):
            trainer.fit()
    make(tmp_path / "run", "batch").fit()
    assert_same_outcome(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))
    assert not [name for name in os.listdir(tmp_path / "run") if "tmp" in name or "damaged" in name]


def test_damaged_target_is_passed_over(tmp_path, monkeypatch):
    trainer = make(tmp_path, "batch")
    real = rewind.plan_rewind

    def damaged(*args):
        file = tmp_path / "step-00000030" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        return real(*args)

    monkeypatch.setattr("arfast.train.trainer.plan_rewind", damaged)
    trainer.fit()
    (found,) = rewinds_of(tmp_path)
    assert found.to_step == 25


def test_always_bad_ends_with_a_report(tmp_path):
    """Whatever is left out, step 41 is bad."""
    trainer = make(tmp_path)
    step = trainer.step

    def bad(batches):
        trainer.engine.compute_model.poison = (lambda ids: True) if trainer.state.step == 40 else None
        return step(batches)

    trainer.step = bad
    with pytest.raises(
        DivergedError, match=r"step-00000030 must be in line in one of 3 rewinds, got step 41: loss or g"
    ):
        trainer.fit()
    assert [found.to_step for found in rewinds_of(tmp_path)] == [30, 30, 30]
    assert list_checkpoints(tmp_path)


def test_nan_before_the_first_save_goes_back_to_the_start(tmp_path):
    trainer = make_trainer(tmp_path, train=TinyData(num_samples=400), **CONFIG)
    bad = trainer.datasets["train"].batch(8, 4).input_ids
    trainer.model.poison = lambda ids: torch.equal(ids, bad)
    trainer.datasets["train"].served.clear()
    assert trainer.fit().step == 60
    (found,) = rewinds_of(tmp_path)
    assert (found.from_step, found.to_step, found.first, found.end) == (3, 0, 0, 192)
    assert found.reason == "loss or gradient is not finite"


def test_report_only_tells(tmp_path, capsys):
    make(tmp_path, "batch", on_spike="report", on_nonfinite="stop").fit()
    assert [row["step"] for row in rows(tmp_path) if "spike" in row] == [FAULT]
    assert f"Trainer: step {FAULT} is out of line: loss" in capsys.readouterr().err
    assert not (tmp_path / JOURNAL).exists()


def test_ignore_remembers_nothing(tmp_path):
    trainer = make(tmp_path, "batch", on_spike="ignore", on_nonfinite="stop")
    trainer.fit()
    assert trainer.state.recent_losses == [] and not any("spike" in row for row in rows(tmp_path))


def test_position_jumps_over_all_that_is_left_out():
    state = TrainState(position=100, left_out=[[200, 300], [100, 200], [400, 500]])
    assert state.next_position() == 300
    state.position = 399
    assert state.next_position() == 399
    rng = random.Random(0)
    for _ in range(200):
        ranges = [sorted(rng.sample(range(40), 2)) for _ in range(4)]
        bad = {p for a, b in ranges for p in range(a, b)}
        for position in range(40):
            expected = next(p for p in range(position, 99) if p not in bad)
            assert TrainState(position=position, left_out=ranges).next_position() == expected


@pytest.mark.parametrize(
    "content", ["", "[]", '{"version": 1}', '{"version": 1, "rewinds": [{"a": 1}]}', '{"version": 2, "rewinds": []}']
)
def test_unreadable_journal(tmp_path, content):
    (tmp_path / JOURNAL).write_text(content)
    with pytest.raises(CheckpointError, match=r"rewinds.json must (be a list of rewinds|have version 1), got"):
        Journal(tmp_path)


def test_journal_keeps_what_was_added(tmp_path):
    journal = Journal(tmp_path)
    entries = [Rewind(40, 30, 64, 128, "loss"), Rewind(50, 30, 128, 192, "norm")]
    for entry in entries:
        journal.add(entry)
    assert Journal(tmp_path).rewinds == entries
    assert journal.abandons(TrainState(step=31)) and not journal.abandons(TrainState(step=30))
    assert not journal.abandons(TrainState(step=45, left_out=[[64, 128], [128, 192]]))


def test_journal_of_an_earlier_run_is_forgotten(tmp_path):
    """Whoever deletes the checkpoints begins anew."""
    make(tmp_path, "batch").fit()
    for path in list_checkpoints(tmp_path):
        discard(path)
    trainer = make(tmp_path, max_steps=3)
    trainer.fit()
    assert trainer.state.left_out == [] and not (tmp_path / JOURNAL).exists()


def test_policies_need_checkpoints_to_go_back_to():
    with pytest.raises(ValueError, match="rewind_steps must be <= save_every"):
        TrainConfig(max_steps=10, on_nonfinite="rewind", save_every=0)
