"""JSON-lines logs survive kills; the picture is drawn when matplotlib is there; evaluation equals its definition."""

import builtins
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from train_doubles import IGNORE, TinyConfig, TinyData, TinyLM

from arfast.train.evaluation import evaluate
from arfast.train.manifest import CheckpointError
from arfast.train.metrics import JsonLines, plot_loss


def write(path, *rows, tail=b""):
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows) + tail)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_after_the_checkpoint_are_removed(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, {"step": 1}, {"step": 2}, {"step": 2, "val_loss": 1.0}, {"step": 3})
    log = JsonLines(path, keep_through=2)
    log.append({"step": 3, "again": True})
    log.close()
    assert log.read() == [{"step": 1}, {"step": 2}, {"step": 2, "val_loss": 1.0}, {"step": 3, "again": True}]
    assert read(path) == log.read()


@pytest.mark.parametrize("tail", [b'{"step": 3', b"\x00\xff\n", b"[1]\n", b'{"loss": 1}\n', b"3\n", b"\n"])
def test_unreadable_rows_are_removed(tmp_path, tail):
    path = tmp_path / "m.jsonl"
    write(path, {"step": 1}, {"step": 2}, tail=tail)
    JsonLines(path, keep_through=9).close()
    assert read(path) == [{"step": 1}, {"step": 2}]


def test_intact_file_is_not_rewritten(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, {"step": 1})
    inode = path.stat().st_ino
    JsonLines(path, keep_through=1).close()
    assert path.stat().st_ino == inode


def test_non_finite_numbers_are_valid_json(tmp_path):
    log = JsonLines(tmp_path / "m.jsonl", keep_through=0)
    log.append({"step": 1, "loss": math.nan, "val_perplexity": math.inf})
    log.close()
    assert read(log.path) == [{"step": 1, "loss": None, "val_perplexity": None}]


def test_any_text_can_be_a_row(tmp_path):
    log = JsonLines(tmp_path / "m.jsonl", keep_through=0)
    log.append({"step": 1, "text": "a\nb\u2028 \ud800 \U0001f600"})
    log.close()
    assert len(JsonLines(log.path, keep_through=1).read()) == 1


def test_full_disk_is_one_sentence():
    with open("/dev/full", "ab", buffering=0) as full:
        log = JsonLines.__new__(JsonLines)
        log.path, log._file = "m.jsonl", full
        with pytest.raises(CheckpointError, match="metrics: m.jsonl must be writable, got No space left on device"):
            log.append({"step": 1})


def test_refuses_what_is_not_a_file(tmp_path):
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("directory", "link"):
        with pytest.raises(ValueError, match="must be a regular file or absent"):
            JsonLines(tmp_path / name, keep_through=0)


def test_at_step(tmp_path):
    log = JsonLines(tmp_path / "m.jsonl", keep_through=0)
    for row in ({"step": 1, "a": 1}, {"step": 2, "a": 2}, {"step": 2, "b": 3}):
        log.append(row)
    assert log.at_step(2, "a") == {"step": 2, "a": 2}
    assert log.at_step(2, "b") == {"step": 2, "b": 3}
    assert log.at_step(2, "c") is None
    assert log.at_step(1, "a") is None
    assert JsonLines(log.path, keep_through=2).at_step(2, "b") == {"step": 2, "b": 3}


def test_rows_do_not_pile_up_in_memory(tmp_path):
    log = JsonLines(tmp_path / "m.jsonl", keep_through=0)
    for step in range(1, 100):
        log.append({"step": step})
    assert len(log._newest) == 1


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{"step": i, "tokens": 10 * i, "loss": 5 / i} for i in range(1, 50)]
    rows += [{"step": 50, "tokens": 500, "loss": None}, {"step": 50, "tokens": 500, "val_loss": 1.0}]
    assert plot_loss(rows, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert plot_loss([], tmp_path / "empty.png")


def test_plot_without_matplotlib(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert not plot_loss([], tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_evaluation_is_its_definition():
    model, data = TinyLM(TinyConfig(dropout=0.5)).double(), TinyData(num_samples=10)
    result = evaluate(model, data.evaluation_batches(3), bytes_per_token=2.5)
    ids, labels = (torch.stack(c) for c in zip(*(data.row(10_000 + i) for i in range(10))))
    model.eval()
    log_probabilities = F.log_softmax(model(ids).logits[:, :-1].double(), -1)
    targets = labels[:, 1:]
    nll = -log_probabilities.gather(-1, targets.clamp(min=0)[..., None])[..., 0][targets != IGNORE]
    assert result.num_tokens == len(nll)
    assert result.loss == pytest.approx(nll.mean().item(), rel=1e-6)
    assert result.perplexity == pytest.approx(nll.mean().exp().item(), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(nll.sum().item() / math.log(2) / (2.5 * len(nll)), rel=1e-6)


def test_evaluation_keeps_the_mode_and_makes_no_gradient():
    model = TinyLM(TinyConfig())
    for mode in (True, False):
        model.train(mode)
        evaluate(model, TinyData(num_samples=2).evaluation_batches(2))
        assert model.training is mode
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluation_can_be_bounded_and_stopped():
    model, data = TinyLM(TinyConfig()), TinyData(num_samples=10)
    one = next(data.evaluation_batches(1)).num_tokens
    assert evaluate(model, data.evaluation_batches(1), max_tokens=1).num_tokens == one
    assert evaluate(model, data.evaluation_batches(1), stop=lambda: True) is None


def test_evaluation_without_targets():
    batch = SimpleNamespace(input_ids=torch.zeros(1, 4).long(), labels=torch.full((1, 4), IGNORE), cu_seqlens=None)
    for batches in ([], [batch]):
        with pytest.raises(ValueError, match="evaluate: batches must hold at least one target token, got none"):
            evaluate(TinyLM(TinyConfig()), batches)


def test_evaluation_arguments():
    for name in ("bytes_per_token", "max_tokens"):
        with pytest.raises(ValueError, match=f"evaluate: {name} must be > 0, got 0"):
            evaluate(TinyLM(TinyConfig()), [], **{name: 0})


def test_perplexity_of_a_huge_loss():
    class Hopeless(TinyLM):
        def forward(self, *args, **options):
            output = super().forward(*args, **options)
            return SimpleNamespace(loss=output.loss * 1e6, num_tokens=output.num_tokens)

    assert evaluate(Hopeless(TinyConfig()), TinyData(num_samples=2).evaluation_batches(2)).perplexity == math.inf
