"""Ramps of batch size and sequence length: every token once, in order, whatever the stages; bits kept over a kill."""

import json
import signal
from types import SimpleNamespace

import pytest
import torch
from tiny_models import TINY
from train_doubles import TinyConfig, TinyData, TinyLM, assert_same_outcome, make_trainer, outcome

from arfast.models import CausalLM
from arfast.nn import RotaryEmbedding, inverse_frequencies
from arfast.train import CheckpointError, TrainConfig
from arfast.train.engine import Engine
from arfast.train.state import read_state

RAMPS = {
    "batch_ramp": [[0, 2], [64, 4]],
    "seqlen_ramp": [[0, 4], [32, 8], [192, 16]],
    "micro_batch_size": 2,
    "max_steps": 8,
}
TINY_RAMPS = {**RAMPS, "seqlen_ramp": [[0, 4, 100.0], [32, 8], [192, 16, 5000.0]]}


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_steps_have_the_shapes_of_their_stage(tmp_path):
    make_trainer(tmp_path, **RAMPS).fit()
    train = [row for row in rows(tmp_path) if "loss" in row]
    assert [(row["tokens"], row["batch_tokens"], row["seqlen"]) for row in train] == [
        (32, 32, 4),
        (64, 32, 8),
        (128, 64, 8),
        (192, 64, 8),
        (256, 64, 16),
        (320, 64, 16),
        (384, 64, 16),
        (448, 64, 16),
    ]
    assert [row["position"] for row in train] == [row["tokens"] for row in train]


def test_every_token_once_and_in_order(tmp_path):
    """The pieces of each row from left to right, then the next row."""
    trainer = make_trainer(tmp_path, **RAMPS)
    trainer.fit()
    expected = [(row, piece) for row in range(2) for piece in range(4)]
    expected += [(row, piece) for row in range(2, 12) for piece in range(2)]
    expected += list(range(12, 28))
    assert trainer.datasets["train"].served == expected


def test_a_stage_does_not_change_what_its_steps_are():
    """A step of pieces is that of a data set whose rows are the pieces."""
    config = {"output_dir": "", "batch_size": 4, "micro_batch_size": 2, "max_steps": 8}
    ramps = {"batch_ramp": [[0, 2], [64, 4]], "seqlen_ramp": [[0, 4], [64, 16]]}
    ramped = Engine(TinyLM(TinyConfig()), TrainConfig(**config | {"output_dir": "x", "seqlen": 16} | ramps))
    data = TinyData()
    result = ramped.step([data.batch(0, 8, seqlen=4)])
    ids, labels = (data.batch(0, 2).__dict__[name].view(8, 4).clone() for name in ("input_ids", "labels"))
    labels[:, 0] = -100
    model = TinyLM(TinyConfig())
    assert result.loss == pytest.approx(model(ids, labels).loss.item(), rel=1e-5)
    assert (ramped.state.tokens, ramped.state.position) == (32, 32)


def test_evaluation_is_not_longer_than_the_stage(tmp_path):
    validation = TinyData(num_samples=6)
    seen, batches = [], validation.evaluation_batches
    validation.evaluation_batches = lambda size, **options: seen.append((size, options)) or batches(size, **options)
    make_trainer(tmp_path, validation=validation, eval_every=2, **RAMPS).fit()
    assert seen == [(2, {"seqlen": 8}), (2, {}), (2, {}), (2, {})]


@pytest.fixture(scope="module")
def undisturbed(worker, tmp_path_factory):
    path = tmp_path_factory.mktemp("stages") / "run"
    config = RAMPS | {"save_every": 1, "keep_last": 0, "dtype": "bfloat16", "eval_every": 2}
    status, _, log = worker(path, config=config)
    assert status == 0, log
    return config, outcome(path)


@pytest.mark.parametrize(
    "step", [pytest.param(s, marks=() if s in (1, 4, 6) else pytest.mark.slow) for s in range(1, 8)]
)
def test_kill_in_every_stage(undisturbed, worker, memory_path, step):
    config, expected = undisturbed
    path = memory_path / "run"
    assert worker(path, config=config, kill_in={"step": step + 1})[0] == -signal.SIGKILL
    status, _, log = worker(path, config=config)
    assert status == 0, log
    assert_same_outcome(outcome(path), expected)


def tables(model):
    (rotary,) = [module for module in model.modules() if isinstance(module, RotaryEmbedding)]
    return rotary.inverse_frequencies, rotary.cos


def batch(stage, step, longest=16):
    ids = torch.randint(61, (stage.batch_size * stage.pieces, longest // stage.pieces),
                        generator=torch.Generator().manual_seed(step))  # fmt: skip
    return SimpleNamespace(input_ids=ids, labels=ids, cu_seqlens=None, num_tokens=ids[:, 1:].numel())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotary_base(dtype):
    """In force from the first step of its stage, in the model that computes and in the configuration that is saved."""
    config = TrainConfig(output_dir="x", seqlen=16, batch_size=4, dtype=dtype, **TINY_RAMPS)
    engine = Engine(CausalLM(TINY, seed=1), config)
    for step in range(6):
        theta = 100.0 if engine.state.tokens < 192 else 5000.0
        assert engine.model.config.rope_theta == engine.compute_model.config.rope_theta == theta
        for model in (engine.model, engine.compute_model):
            frequencies, cos = tables(model)
            assert torch.equal(frequencies, inverse_frequencies(TINY.head_dim, theta))
            assert torch.equal(cos[3], (3 * frequencies).cos())
        current = CausalLM(TINY.replace(rope_theta=theta))
        current.load_state_dict(engine.model.state_dict())
        given = batch(engine.stage, step)
        expected = current(given.input_ids, labels=given.labels).loss.item()
        assert engine.step([given]).loss == pytest.approx(expected, rel=1e-5 if dtype == "float32" else 2e-2)


def test_rotary_base_goes_back_with_the_state():
    config = TrainConfig(
        output_dir="x", seqlen=16, batch_size=4, **{**TINY_RAMPS, "seqlen_ramp": [[0, 8], [64, 16, 7.0]]}
    )
    engine = Engine(CausalLM(TINY, seed=1), config)
    state = engine.state.__class__()
    for step in range(3):
        engine.step([batch(engine.stage, step)])
    assert engine.model.config.rope_theta == 7.0
    engine.state = state
    assert engine.model.config.rope_theta == TINY.rope_theta


def test_rotary_base_needs_a_model_that_has_one(tmp_path):
    with pytest.raises(ValueError, match="Trainer: seqlen_ramp must have no rope_theta for TinyLM, got one"):
        make_trainer(tmp_path, **TINY_RAMPS)


def test_batch_of_a_stage_must_fit_the_data(tmp_path):
    with pytest.raises(ValueError, match="batch_size must be at most the 40 sequences of the train split, got 50"):
        make_trainer(tmp_path, batch_ramp=[[0, 50], [800, 4]], max_steps=8)


def test_checkpoint_that_counts_rows_is_read(tmp_path):
    """As version 1 was written, before there were sequences of several lengths."""
    make_trainer(tmp_path, max_steps=2).fit()
    path = tmp_path / "step-00000002" / "trainer_state.json"
    content = json.loads(path.read_text())
    assert content["state"]["position"] == 128
    state = {"step": 2, "tokens": 128, "position": 8, "consecutive_skips": 0}
    path.write_text(json.dumps(content | {"version": 1, "state": state}))
    assert read_state(path.parent)[0].position == 128
    path.write_text(json.dumps(content | {"version": 3}))
    with pytest.raises(CheckpointError, match="must have version 2, got 3"):
        read_state(path.parent)
