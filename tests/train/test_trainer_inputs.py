"""The trainer refuses inputs that do not belong together, and checkpoints that are not its own."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from train_doubles import SIZE, TinyConfig, TinyData, TinyLM, TinyTokenizer, make_trainer

from arfast.train import CheckpointError, TrainConfig, Trainer
from arfast.train.checkpoint import save_checkpoint
from arfast.train.state import load_engine

WRONG_INPUTS = [
    ({"train": TinyData(seed=1)}, "the train split must have seed=0 as the config, got 1"),
    ({"validation": TinyData(seqlen=8)}, "the validation split must have seqlen=16 as the config, got 8"),
    ({"packing": "documents"}, "the train split must have packing='documents' as the config, got 'contiguous'"),
    ({"train": TinyData(vocab_size=62)}, "model must have a vocab_size of at least 62 for the train split, got 61"),
    ({"train": TinyData(num_samples=3)}, "batch_size must be at most the 3 sequences of the train split, got 4"),
    ({"model": TinyLM(TinyConfig()).bfloat16()}, "model must have float32 parameters, got torch.bfloat16 for"),
    ({"model": TinyLM(TinyConfig()).requires_grad_(False)}, "model must have a parameter that requires a gradient"),
    (
        {"model": TinyLM(TinyConfig(max_position_embeddings=15))},
        "seqlen must be at most max_position_embeddings=15, got 16",
    ),
]


@pytest.mark.parametrize(("change", "message"), WRONG_INPUTS, ids=[message[:30] for _, message in WRONG_INPUTS])
def test_inputs_must_belong_together(tmp_path, change, message):
    with pytest.raises(ValueError, match=rf"^Trainer: {re.escape(message)}"):
        make_trainer(tmp_path / "run", **change)
    assert not (tmp_path / "run").exists()


def test_tokenizer_must_be_that_of_the_data(tmp_path):
    tokenizer = TinyTokenizer()
    tokenizer.fingerprint = "0" * 64
    with pytest.raises(ValueError, match="Trainer: tokenizer must be the one of the train split, f{64}, got 0{64}"):
        make_trainer(tmp_path, tokenizer=tokenizer)


def test_data_argument(tmp_path):
    config = TrainConfig(**SIZE, output_dir=tmp_path)
    with pytest.raises(
        ValueError, match="Trainer: data must be a directory made by prepare_dataset .*, got '/no/where'"
    ):
        Trainer(TinyLM(TinyConfig()), config, "/no/where")
    with pytest.raises(ValueError, match=r"Trainer: data must have a 'train' split, got \['test'\]"):
        Trainer(TinyLM(TinyConfig()), config, {"test": TinyData()})
    sampling = replace(config, sample_prompts=("a",))
    with pytest.raises(ValueError, match="Trainer: tokenizer must be given for sample_prompts, got None"):
        Trainer(TinyLM(TinyConfig()), sampling, {"train": TinyData()})


def test_kinds_of_arguments(tmp_path):
    data = {"train": TinyData()}
    with pytest.raises(TypeError, match="Trainer: config must be a TrainConfig, got dict"):
        Trainer(TinyLM(TinyConfig()), {"max_steps": 1}, data)
    with pytest.raises(TypeError, match="Trainer: model must have a dataclass as its config, got Linear without"):
        Trainer(torch.nn.Linear(1, 1), TrainConfig(**SIZE, output_dir=tmp_path), data)


def test_unknown_split(tmp_path):
    with pytest.raises(ValueError, match=r"Trainer: split must be one of \['train', 'validation'\], got 'test'"):
        make_trainer(tmp_path).evaluate("test")


class OtherTokens(TinyData):
    tokenizer_fingerprint = "e" * 64


def other_tokenizer():
    tokenizer = TinyTokenizer()
    tokenizer.fingerprint = "e" * 64
    return tokenizer


OTHER_RUNS = [
    ({"seed": 1}, "config.seed must be 0 to continue .*, got 1"),
    ({"seqlen": 8}, "config.seqlen must be 16 to continue .*, got 8"),
    ({"model": TinyLM(TinyConfig(hidden_size=16))}, "model.hidden_size must be 24 to continue .*, got 16"),
    ({"model": TinyLM(TinyConfig(dropout=0.1))}, "model.dropout must be 0.0 to continue .*, got 0.1"),
    ({"train": TinyData(num_samples=41)}, "dataset.fingerprint must be '0-16-40' to continue .*, got '0-16-41'"),
    (
        {"train": OtherTokens(), "validation": OtherTokens(), "tokenizer": other_tokenizer()},
        "tokenizer.fingerprint must be 'f{64}' to continue .*, got 'e{64}'",
    ),
    ({"max_steps": 3}, "max_steps must be at least 4 to continue .*, got 3"),
]


@pytest.mark.parametrize(("change", "message"), OTHER_RUNS, ids=[message[:25] for _, message in OTHER_RUNS])
def test_another_run_is_not_continued(tmp_path, change, message):
    make_trainer(tmp_path).fit()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    trainer = make_trainer(tmp_path, **change)
    with pytest.raises(CheckpointError, match=f"^Trainer: {message}"):
        trainer.fit()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_other_settings_are_told(tmp_path, capsys):
    make_trainer(tmp_path, max_steps=2).fit()
    make_trainer(tmp_path, max_steps=4, learning_rate=2e-3, save_every=1).fit()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"Trainer: continuing {tmp_path}/step-00000002",
        "Trainer: its settings were others (learning_rate: 0.001 -> 0.002, max_steps: 2 -> 4)",
    ]


def test_other_conditions_are_told(tmp_path, capsys, monkeypatch):
    make_trainer(tmp_path, max_steps=2).fit()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    make_trainer(tmp_path, max_steps=2).fit()
    expected = "not bit-identical, since it was written under other conditions (num_threads: 1 -> 7)"
    assert expected in capsys.readouterr().err


UNKNOWN_COUNTER = {"version": 1, "state": {"steps": 1}, "identity": {}, "config": {}, "environment": {}}


@pytest.mark.parametrize("content", ["", "[]", '{"version": 1}', '{"version": 2}', json.dumps(UNKNOWN_COUNTER)])
def test_unknown_trainer_state(tmp_path, content):
    """Intact by its checksum, but of another kind or version."""
    save_checkpoint(tmp_path, 1, lambda path: (path / "trainer_state.json").write_text(content))
    with pytest.raises(CheckpointError, match=r"trainer_state.json must (be a trainer state|have .+), got "):
        make_trainer(tmp_path).fit()


def test_optimizer_of_another_model(tmp_path):
    make_trainer(tmp_path).fit()
    path = tmp_path / "step-00000004"
    tensors = load_file(path / "optimizer.safetensors")
    lacking = {key: value for key, value in tensors.items() if key != "step.mix.bias"}
    matrix, vector = torch.zeros(2, 2), tensors["exp_avg.mix.bias"].clone()
    for changed, message in (
        (tensors | {"exp_avg.nobody": matrix}, "parameters of the model"),
        (tensors | {"momentum_buffer.mix.bias": vector}, "what its optimizer keeps of them"),
        (tensors | {"exp_avg.mix.bias": matrix}, "shape"),
        (tensors | {"step.mix.bias": matrix}, r"shape \(\)"),
        (lacking, "all that the optimizer keeps of mix.bias, lacks step"),
    ):
        save_file(changed, path / "optimizer.safetensors")
        with pytest.raises(CheckpointError, match=message):
            load_engine(make_trainer(tmp_path).engine, path)


def test_random_state_that_no_generator_takes(tmp_path):
    make_trainer(tmp_path).fit()
    path = tmp_path / "step-00000004"
    state = load_file(path / "rng.safetensors")["cpu"]
    save_file({"cpu": torch.zeros_like(state)}, path / "rng.safetensors")
    with pytest.raises(CheckpointError, match="random state cpu that a generator takes"):
        load_engine(make_trainer(tmp_path).engine, path)
