"""The peer of the comparison is the same model, learns as much per token as it says, and both are scored alike."""

import json
import math

import compare_training
import numpy as np
import pytest
import torch
from plain_training import PlainConfig, PlainLlama, PlainTrainer

from arfast.data import Document, PackedDataset, prepare_dataset
from arfast.models import CausalLM
from arfast.train import TrainConfig

CONFIG = compare_training.MODEL.replace(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    texts = [f"text {i}: " + " ".join(f"{i * j % 97} is {i} times {j}" for j in range(40)) for i in range(60)]
    prepare_dataset([Document(text, source="") for text in texts], path, vocab_size=CONFIG.vocab_size)
    return str(path)


def plain(**changes):
    settings = dict(max_tokens=1024, warmup_tokens=128, learning_rate=1e-3, batch_size=2, seqlen=32)
    return PlainConfig(**{**settings, "dtype": "float32", "compile": False, **changes})


def test_the_peer_is_the_same_model():
    model = CausalLM(CONFIG, seed=3).double()
    peer = PlainLlama(CONFIG).double()
    peer.load_state_dict(model.state_dict())
    ids = torch.randint(0, CONFIG.vocab_size, (3, 41))
    ours = model(ids, labels=ids).loss
    theirs = peer(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)  # the tables of cos and sin are float32
    ours.backward()
    theirs.backward()
    gradients = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-8)


def test_the_peer_follows_its_schedule():
    trainer = PlainTrainer(PlainLlama(CONFIG), plain(), np.arange(200) % CONFIG.vocab_size)
    rates = []
    while trainer.tokens < trainer.config.max_tokens:
        trainer.step()
        rates.append(trainer.learning_rate())
    assert len(rates) == 16 and rates[0] == pytest.approx(5e-4) and rates[1] == pytest.approx(1e-3)
    middle = 1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * 448 / 896))
    assert rates[8] == pytest.approx(middle) and rates[-1] == pytest.approx(1e-4)
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_crops_are_windows_of_the_stream():
    trainer = PlainTrainer(PlainLlama(CONFIG), plain(batch_size=3000), np.arange(100))
    ids, targets = trainer._crops(torch.Generator().manual_seed(0))
    assert torch.equal(targets, ids + 1)
    assert torch.equal(ids, ids[:, :1] + torch.arange(32))
    assert set(ids[:, 0].tolist()) == set(range(68))  # every place at which a whole window stands


def test_a_scaled_recipe_has_the_stages_of_the_whole():
    whole, scaled = (TrainConfig(**compare_training.recipe_of(n)) for n in (10_240_000, 1_638_400))
    for a, b in zip(whole.stages, scaled.stages, strict=True):
        assert (a.batch_size, a.seqlen) == (b.batch_size, b.seqlen)
        assert a.from_tokens * 16 == b.from_tokens * 100
    assert scaled.num_warmup_tokens * 100 == whole.num_warmup_tokens * 16
    assert scaled.total_tokens == 1_638_400


def test_both_learn_and_are_scored_alike(data, tmp_path):
    saved = []
    ours = dict(max_tokens=4096, seqlen=32, batch_size=4, batch_ramp=[[0, 2], [2048, 4]], learning_rate=3e-3)
    result = compare_training.compare(
        CONFIG,
        data,
        ours,
        vars(plain(max_tokens=4096, learning_rate=3e-3)),
        tmp_path / "run",
        points=4,
        score_tokens=500,
        save=lambda result: saved.append(json.loads(json.dumps(result))),
    )
    curves = result["curves"]
    for curve in curves.values():
        assert [row["tokens"] for row in curve] == [0, 1024, 2048, 3072, 4096]
        assert curve[0]["seconds"] == 0.0 and curve[-1]["seconds"] > curve[1]["seconds"] > 0
        assert curve[-1]["bits_per_byte"] < 0.8 * curve[0]["bits_per_byte"]
    assert curves["ours"][0]["bits_per_byte"] == curves["plain"][0]["bits_per_byte"]  # the same weights
    assert len(saved) == 5 and "final" not in saved[-2] and saved[-1]["final"] == result["final"]
    published = CausalLM.from_pretrained(tmp_path / "run")
    score = compare_training.Scorer(CONFIG, data, 32, torch.float32)
    assert round(score(published.state_dict()), 5) == result["final"]["ours"]
    assert set(result["final"]) == {"ours", "plain"}


def test_the_score_counts_every_target_once(data):
    model = CausalLM(CONFIG, seed=1)
    score = compare_training.Scorer(CONFIG, data, 32, torch.float32)
    split = PackedDataset(data, "validation", 64)
    nats = 0.0
    with torch.no_grad():
        for batch in PackedDataset(data, "validation", 32).evaluation_batches(1):
            nats += float(model(batch.input_ids, labels=batch.labels, reduction="sum").loss)
    assert score(model.state_dict()) == pytest.approx(nats / math.log(2) / split.num_bytes, rel=1e-5)


def test_the_curve_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{"tokens": n, "seconds": n / 2, "bits_per_byte": 5 - n / 1e4} for n in (0, 1000, 2000)]
    compare_training.plot({"curves": {"ours": rows, "plain": rows}}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_writes_what_was_measured(data, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    rows = [{"tokens": n, "seconds": n / 2, "bits_per_byte": 5 - n / 1e6} for n in (0, 102_400, 204_800)]
    result = {"curves": {"ours": rows, "plain": rows}, "final": {"ours": 2.0, "plain": 3.0}}

    def compare(config, folder, ours, plain, output_dir, *, save):
        trained, peer = TrainConfig(**ours), PlainConfig(**plain)
        assert folder == data and config.vocab_size == CONFIG.vocab_size
        assert trained.total_tokens == peer.max_tokens == 204_800 and trained.learning_rate == 2e-3
        assert (peer.learning_rate, peer.batch_size, peer.seqlen, peer.dtype) == (1e-3, 4, 512, trained.dtype)
        save(result)
        return result

    monkeypatch.setattr(compare_training, "compare", compare)
    output = tmp_path / "new" / "comparison.json"
    options = ["--data", data, "--max-tokens", "204800", "--learning-rate", "2e-3", "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["compare_training.py", "run", *options])
    compare_training.main()
    written = json.loads(output.read_text())
    assert written["curves"] == result["curves"] and "torch" in written["machine"]["software"]
    assert output.with_suffix(".png").is_file()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result["final"]
