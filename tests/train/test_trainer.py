"""The trainer refuses what does not fit, evaluates, samples, publishes, and keeps a run's identity."""

import json
import math
import os
import re
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file
from train_doubles import SIZE, TinyConfig, TinyData, TinyLM, TinyTokenizer, greedy_generate, make_trainer

import arfast.train.log
from arfast.train import CheckpointError, NonFiniteError, TrainConfig, Trainer, TrainingInterrupted
from arfast.train.checkpoint import list_checkpoints, lock_directory, save_checkpoint


def rows(path, name="metrics.jsonl"):
    return [json.loads(line) for line in (path / name).read_text().splitlines()]


def test_fit(tmp_path):
    trainer = make_trainer(tmp_path, sample_prompts=["abc", "x"], sample_tokens=3, sample_temperature=0)
    result = trainer.fit()
    assert (result.step, result.tokens, result.output_dir) == (4, 256, str(tmp_path))
    assert result.loss == rows(tmp_path)[3]["loss"]
    assert result.evaluation == trainer.evaluate()
    assert [sample["prompt"] for sample in result.samples] == ["abc", "x"]
    ids = torch.tensor([TinyTokenizer().encode("abc")])
    expected = greedy_generate(trainer.model, ids, max_new_tokens=3)[0, 3:]
    assert result.samples[0]["text"] == TinyTokenizer().decode(expected.tolist())
    assert len(result.samples[1]["text"]) == 3
    assert result.samples == trainer.sample()
    assert trainer.fit() == result
    assert rows(tmp_path, "samples.jsonl") == [{"step": 4, "tokens": 256, "samples": result.samples}]


def test_order_of_samples(tmp_path):
    """Over three epochs, in micro-batches that do not divide the batch: every sample, in order, once each."""
    trainer = make_trainer(tmp_path, max_steps=30, micro_batch_size=3)
    trainer.fit()
    assert trainer.datasets["train"].served == list(range(120))
    assert trainer.datasets["train"].num_samples == 40


def test_metrics(tmp_path):
    make_trainer(tmp_path, max_steps=6, eval_every=2, eval_tokens=5).fit()
    train, evaluations = ([row for row in rows(tmp_path) if key in row] for key in ("loss", "val_loss"))
    for step, row in enumerate(train, start=1):
        measured = {"tokens_per_second", "data_wait", "memory_bytes", "seconds_left"}
        assert row.keys() == measured | {
            "step",
            "tokens",
            "position",
            "loss",
            "lr",
            "grad_norm",
            "seqlen",
            "batch_tokens",
        }
        assert row["step"] == step
        assert row["tokens_per_second"] > 0
    assert [row["step"] for row in evaluations] == [2, 4, 6]
    for row in evaluations:
        assert row["val_perplexity"] == pytest.approx(math.exp(row["val_loss"]))
        # 3 bytes per token, of which one per document is no target.
        assert row["val_bits_per_byte"] == pytest.approx(row["val_loss"] / math.log(2) / (3 * 96 / 90))
    tokens = [row["val_tokens"] for row in evaluations]
    assert tokens[0] == tokens[1] < tokens[2]


def test_log_every(tmp_path):
    make_trainer(tmp_path, max_steps=7, log_every=3).fit()
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == [3, 6, 7]


def test_auxiliary_loss_is_logged(tmp_path):
    make_trainer(tmp_path, model=TinyLM(TinyConfig(aux_coefficient=0.1))).fit()
    assert all(row["aux_loss"] > 0 for row in rows(tmp_path) if "loss" in row)


def test_without_validation_or_tokenizer(tmp_path):
    config = TrainConfig(**SIZE, output_dir=tmp_path)
    result = Trainer(TinyLM(TinyConfig()), config, {"train": TinyData()}).fit()
    assert result.evaluation is None
    assert not (tmp_path / "tokenizer.json").exists()


def test_published_model_is_the_last_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, save_every=2, dtype="bfloat16")
    trainer.fit()
    expected = {"config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl", "samples.jsonl"}
    assert set(os.listdir(tmp_path)) == expected | {"step-00000002", "step-00000004"}
    loaded = TinyLM.from_pretrained(tmp_path)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
        assert value.dtype == torch.float32


def test_checkpoint_holds_no_pickle(tmp_path):
    make_trainer(tmp_path).fit()
    (directory,) = list_checkpoints(tmp_path)
    assert {path.suffix for path in directory.iterdir()} == {".json", ".safetensors"}
    assert all(tensor.dtype == torch.uint8 for tensor in load_file(directory / "rng.safetensors").values())


def test_keep_last(tmp_path):
    make_trainer(tmp_path, max_steps=5, save_every=1, keep_last=2).fit()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000004", "step-00000005"]


def test_evaluation_and_samples_do_not_change_the_training(tmp_path):
    """Not even with dropout, whose masks come from the same generator."""
    weights = []
    for name, options in (("a", {}), ("b", {"eval_every": 1, "sample_every": 1, "sample_prompts": ["a"]})):

        def noisy(model, ids, **kwargs):
            torch.rand(3)
            return greedy_generate(model, ids, **kwargs)

        make_trainer(tmp_path / name, model=TinyLM(TinyConfig(dropout=0.3)), generate=noisy, **options).fit()
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_random_state_before_the_run_does_not_matter(tmp_path):
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        trainer = make_trainer(tmp_path / str(seed), model=TinyLM(TinyConfig(dropout=0.3)))
        trainer.fit()
        weights.append((tmp_path / str(seed) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_options_of_generate(tmp_path):
    calls = []

    def generate(model, ids, **options):
        calls.append((model.training, torch.is_grad_enabled(), ids.tolist(), options))
        return ids

    sampling = {"sample_prompts": ["a"], "sample_tokens": 7, "sample_temperature": 0.5}
    make_trainer(tmp_path, generate=generate, seed=3, **sampling).fit()
    options = {"max_new_tokens": 7, "do_sample": True, "temperature": 0.5, "eos_token_id": None, "pad_token_id": None}
    assert calls == [(False, False, [[97 % 61]], options | {"seed": 7})]


def test_samples_leave_out_what_the_tokenizer_does_not_know(tmp_path):
    """A vocabulary rounded up to a multiple of 64 is common."""
    generate = lambda model, ids, **options: torch.cat([ids, torch.tensor([[5, 61, 62, 7]])], 1)
    result = make_trainer(tmp_path, model=TinyLM(TinyConfig(64)), generate=generate, sample_prompts=["a"]).fit()
    assert result.samples == [{"prompt": "a", "text": TinyTokenizer().decode([5, 7])}]


def test_save_and_load(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.step([trainer.datasets["train"].batch(0, 4)])
    path = trainer.save()
    other = make_trainer(tmp_path)
    other.load(path)
    assert vars(other.state) == vars(trainer.state)
    batch = trainer.datasets["train"].batch(4, 4)
    assert other.step([batch]) == trainer.step([batch])


def test_no_resume_needs_an_empty_place(tmp_path):
    make_trainer(tmp_path).fit()
    with pytest.raises(CheckpointError, match="output_dir must hold no checkpoint when resume is False, got"):
        make_trainer(tmp_path, resume=False).fit()
    make_trainer(tmp_path / "new", resume=False).fit()


def test_two_trainers_in_one_directory(tmp_path):
    trainer = make_trainer(tmp_path)
    with lock_directory(tmp_path), pytest.raises(CheckpointError, match="must be used by one trainer at a time"):
        trainer.fit()
    with lock_directory(tmp_path), pytest.raises(CheckpointError, match="must be used by one trainer at a time"):
        trainer.save()
    assert os.listdir(tmp_path) == []
    trainer.fit()


def test_all_checkpoints_damaged(tmp_path):
    make_trainer(tmp_path).fit()
    (tmp_path / "step-00000004" / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match="must hold an undamaged checkpoint, got 1 damaged"):
        make_trainer(tmp_path).fit()


def poisoned_at(batch):
    return lambda ids: bool((ids[:1] == batch.input_ids[:1]).all())


def test_nan_stops_and_leaves_what_was_saved(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=6, save_every=2)
    trainer.model.poison = poisoned_at(TinyData().batch(16, 4))
    with pytest.raises(NonFiniteError, match=r"loss must be finite, got nan at step 5, samples 16 to 19"):
        trainer.fit()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000004"]
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == [1, 2, 3, 4]
    result = make_trainer(tmp_path, max_steps=6, save_every=2).fit()
    assert result.step == 6


def test_nan_can_be_skipped(tmp_path, capsys):
    trainer = make_trainer(tmp_path, max_steps=6, on_nonfinite="skip")
    trainer.model.poison = poisoned_at(TinyData().batch(8, 4))
    assert trainer.fit().step == 6
    assert [row["step"] for row in rows(tmp_path) if row.get("skipped")] == [3]
    assert rows(tmp_path)[2]["loss"] is None
    assert "step 3 was not applied: loss nan" in capsys.readouterr().err


def test_signal_handlers_are_restored(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    make_trainer(tmp_path).fit()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_signal_after_a_save_does_not_save_again(tmp_path, monkeypatch):
    steps = []
    save = save_checkpoint

    def counted(root, step, *args, **options):
        steps.append(step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return save(root, step, *args, **options)

    monkeypatch.setattr(arfast.train.checkpoint, "save_checkpoint", counted)
    with pytest.raises(TrainingInterrupted) as leaving:
        make_trainer(tmp_path, save_every=1).fit()
    assert leaving.value.code == 128 + signal.SIGTERM
    assert steps == [1, 2]


def test_signal_between_saves_saves(tmp_path):
    train = TinyData()
    batch = train.batch

    def signalling(position, size):
        if position == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return batch(position, size)

    train.batch = signalling
    with pytest.raises(TrainingInterrupted) as leaving:
        make_trainer(tmp_path, train=train, save_every=0).fit()
    assert leaving.value.code == 128 + signal.SIGINT
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003"]


def test_fit_in_a_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(make_trainer(tmp_path).fit()))
    thread.start()
    thread.join()
    assert results[0].step == 4


def test_progress_bar(tmp_path, capsys):
    make_trainer(tmp_path, progress=True).fit()
    text = capsys.readouterr().err
    assert re.search(r"100%.*256/256 .*tok/s, loss=\d\.\d{4}", text)
    assert "evaluating: " in text


def test_missing_matplotlib_is_told_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(arfast.train.log, "plot_loss", lambda rows, path: False)
    make_trainer(tmp_path).fit()
    assert capsys.readouterr().err.count("loss.png needs matplotlib") == 1
