"""Utilisation is FLOPs over time over peak, as stated; waiting for data is told; TensorBoard has the rows."""

import builtins
import json
import time

import pytest
import torch
from tiny_models import TINY
from train_doubles import TinyData, make_trainer

from arfast.models import CausalLM
from arfast.train import TrainConfig, performance
from arfast.train.engine import TrainState
from arfast.train.metrics import TensorBoard
from arfast.train.performance import Meter


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_figures_are_their_definitions(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(performance.time, "perf_counter", clock)
    config = TrainConfig(max_steps=10, batch_size=4, seqlen=16, peak_flops=1e6)
    meter = Meter(CausalLM(TINY), config, torch.device("cpu"))
    assert meter.peak == 1e6
    for seqlen in (8, 16):
        with meter.training():
            with meter.waiting():
                clock.now += 0.5
            clock.now += 1.5
        meter.count(64, seqlen)
        clock.now += 100.0  # evaluation and saving are no training
    flops = 64 * (TINY.flops_per_token(8) + TINY.flops_per_token(16))
    row = meter.row(TrainState(step=2, tokens=128))
    assert row.pop("memory_bytes") > 1 << 20
    assert row == {
        "tokens_per_second": 32.0,
        "data_wait": 0.25,
        "seconds_left": (640 - 128) / 32.0,
        "mfu": pytest.approx(flops / 4.0 / 1e6, abs=1e-4),
    }
    with meter.training():
        clock.now += 2.0
    meter.count(64, 16)
    assert meter.row(TrainState(tokens=192))["mfu"] == pytest.approx(64 * TINY.flops_per_token(16) / 2e6, abs=1e-4)


def test_model_that_does_not_say_has_no_utilisation(tmp_path):
    make_trainer(tmp_path).fit()
    assert all("mfu" not in row for row in rows(tmp_path))


def test_rows_have_utilisation(tmp_path):
    train = TinyData(vocab_size=61)
    make_trainer(tmp_path, model=CausalLM(TINY), train=train, generate=None, peak_flops=1e12).fit()
    train = [row for row in rows(tmp_path) if "loss" in row]
    for row in train:
        expected = TINY.flops_per_token(16) * row["tokens_per_second"] / 1e12
        assert row["mfu"] == pytest.approx(expected, rel=0.01, abs=1e-4)
    assert train[-1]["seconds_left"] == 0.0 < train[0]["seconds_left"]


def test_slow_data_is_told(tmp_path):
    train = TinyData()
    batch = train.batch

    def slow(*args):
        time.sleep(0.05)
        return batch(*args)

    train.batch = slow
    make_trainer(tmp_path / "slow", train=train).fit()
    waits = [row["data_wait"] for row in rows(tmp_path / "slow") if "loss" in row]
    assert min(waits[1:]) > 0.3 and max(waits) <= 1.0


def test_console_has_the_figures(tmp_path, capsys):
    make_trainer(tmp_path, model=CausalLM(TINY), generate=None, progress=True, peak_flops=1e12).fit()
    text = capsys.readouterr().err
    assert "Trainer: mfu is of 1 TFLOP/s, as given; a token of 16 takes 0.1" in text
    for figure in (r"tok/s", "loss=", "lr=", "norm=", "mfu=", "wait=", "mem="):
        assert figure in text


def test_tensorboard(tmp_path):
    """What is cut back and done again replaces what was there."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    make_trainer(tmp_path, max_steps=2, log=["tensorboard"], eval_every=1).fit()
    board = TensorBoard(tmp_path / "tensorboard", keep_through=2)
    board.append({"step": 3, "loss": 9.0, "expert_load": [1.5, 2.5], "note": "text", "left_out": [1, 2]})
    board.close()
    make_trainer(tmp_path, max_steps=4, log=["tensorboard"], eval_every=1).fit()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    expected = {row["step"]: row["loss"] for row in rows(tmp_path) if "loss" in row}
    assert [event.step for event in events.Scalars("loss")] == list(expected)
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(list(expected.values()))
    assert {"loss", "lr", "grad_norm", "val_loss", "tokens_per_second"} <= set(events.Tags()["scalars"])
    assert "step" not in events.Tags()["scalars"]


def test_missing_tensorboard_is_an_error_before_the_first_step(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ValueError, match=r"log must be of installed packages, got 'tensorboard' \(pip install 'arfast\[log"
    ):
        make_trainer(tmp_path, log=["tensorboard"]).fit()
    assert not list(tmp_path.glob("step-*"))
